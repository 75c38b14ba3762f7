//! Pods and containers as plugins see them.

use std::sync::Arc;

use serde_json::Value;

use crate::base::container::{ContainerConfig, ContainerState, ContainerStatus, Resources};
use crate::base::pod::{PodConfig, PodStatus};
use crate::base::security::SecurityProfile;
use crate::nri::proto::api;
use crate::nri::resources;

/// A pod as it is now.
#[derive(Clone, Debug)]
pub(crate) struct PodFacts {
    /// As lists show it.
    pub(crate) status: Arc<PodStatus>,
    /// As asked for.
    pub(crate) config: PodConfig,
    /// The cgroup that its cgroups are made in.
    pub(crate) cgroup_parent: String,
    /// Cgroup of its pause process.
    pub(crate) cgroup: String,
    /// Pid of its pause process; 0: it does not run.
    pub(crate) pid: u32,
}

/// A container as it is now, or is to be.
#[derive(Clone, Debug)]
pub(crate) struct ContainerFacts {
    /// As lists show it.
    pub(crate) status: Arc<ContainerStatus>,
    /// As asked for.
    pub(crate) config: ContainerConfig,
    /// The seccomp profile that it gets, asked for or by default; absent: unconfined.
    pub(crate) seccomp: Option<SecurityProfile>,
    /// Limits in force.
    pub(crate) resources: Resources,
    /// Pid of its first process; 0: it does not run.
    pub(crate) pid: u32,
    /// Its OCI spec.
    pub(crate) spec: Value,
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn texts(value: &Value) -> Vec<String> {
    list(value).iter().map(text).collect()
}

fn number(value: &Value) -> u32 {
    value
        .as_u64()
        .and_then(|number| u32::try_from(number).ok())
        .unwrap_or_default()
}

fn unsigned(value: &Value) -> Option<api::OptionalUInt32> {
    value.as_u64().map(|_| api::OptionalUInt32 {
        value: number(value),
    })
}

fn integer(value: &Value) -> Option<api::OptionalInt> {
    value.as_i64().map(|value| api::OptionalInt { value })
}

fn map(value: &Value) -> std::collections::BTreeMap<String, String> {
    let entries = value.as_object().into_iter().flatten();
    entries
        .map(|(key, value)| (key.clone(), text(value)))
        .collect()
}

/// A pod.
pub(super) fn pod(facts: &PodFacts) -> api::PodSandbox {
    let (status, config) = (&facts.status, &facts.config);
    let namespaces = match facts.pid {
        0 => vec![],
        pid => namespaces_of(config, pid),
    };
    api::PodSandbox {
        id: status.id.to_string(),
        name: status.metadata.name.clone(),
        uid: status.metadata.uid.clone(),
        namespace: status.metadata.namespace.clone(),
        labels: status.labels.clone(),
        annotations: status.annotations.clone(),
        runtime_handler: status.runtime_handler.clone(),
        linux: Some(api::LinuxPodSandbox {
            pod_overhead: config.overhead.as_ref().map(resources::to_proto),
            pod_resources: config.resources.as_ref().map(resources::to_proto),
            cgroup_parent: facts.cgroup_parent.clone(),
            cgroups_path: facts.cgroup.clone(),
            namespaces,
            resources: None,
        }),
        pid: facts.pid,
        ips: status.ips.iter().map(ToString::to_string).collect(),
    }
}

fn namespaces_of(config: &PodConfig, pid: u32) -> Vec<api::LinuxNamespace> {
    use crate::base::security::NamespaceMode::Node;
    let modes = &config.security.namespaces;
    [
        ("network", "net", modes.network != Node),
        ("ipc", "ipc", modes.ipc != Node),
        ("uts", "uts", modes.network != Node),
        ("pid", "pid", modes.pid != Node),
        ("mount", "mnt", true),
    ]
    .into_iter()
    .filter(|(_, _, own)| *own)
    .map(|(kind, file, _)| api::LinuxNamespace {
        r#type: kind.to_owned(),
        path: format!("/proc/{pid}/ns/{file}"),
    })
    .collect()
}

/// A container.
pub(super) fn container(facts: &ContainerFacts) -> api::Container {
    let (status, spec) = (&facts.status, &facts.spec);
    let process = &spec["process"];
    api::Container {
        id: status.id.to_string(),
        pod_sandbox_id: status.pod_id.to_string(),
        name: status.name.clone(),
        state: match status.state {
            ContainerState::Created => 1,
            ContainerState::Running => 3,
            ContainerState::Exited => 4,
            ContainerState::Unknown => 0,
        },
        labels: status.labels.clone(),
        annotations: match &spec["annotations"] {
            Value::Object(_) => map(&spec["annotations"]),
            _ => status.annotations.clone(),
        },
        args: texts(&process["args"]),
        env: texts(&process["env"]),
        mounts: list(&spec["mounts"]).iter().map(mount).collect(),
        hooks: Some(hooks(&spec["hooks"])),
        linux: Some(linux(facts)),
        pid: facts.pid,
        rlimits: list(&process["rlimits"]).iter().map(rlimit).collect(),
        created_at: status.created_at.0,
        started_at: status.started_at.0,
        finished_at: status.finished_at.0,
        exit_code: status.exit_code,
        status_reason: status.reason.clone(),
        status_message: status.message.clone(),
        cdi_devices: facts
            .config
            .cdi_devices
            .iter()
            .map(|name| api::CdiDevice { name: name.clone() })
            .collect(),
        user: Some(api::User {
            uid: number(&process["user"]["uid"]),
            gid: number(&process["user"]["gid"]),
            additional_gids: list(&process["user"]["additionalGids"])
                .iter()
                .map(number)
                .collect(),
        }),
        image: Some(api::Image {
            name: status.image_name.clone(),
            digest: match status.image_ref.split_once('@') {
                Some((_, digest)) => digest.to_owned(),
                None => String::new(),
            },
            config_digest: status.image_id.clone(),
        }),
    }
}

fn hooks(value: &Value) -> api::Hooks {
    let of = |point: &str| list(&value[point]).iter().map(hook).collect();
    api::Hooks {
        prestart: of("prestart"),
        create_runtime: of("createRuntime"),
        create_container: of("createContainer"),
        start_container: of("startContainer"),
        poststart: of("poststart"),
        poststop: of("poststop"),
    }
}

fn hook(value: &Value) -> api::Hook {
    api::Hook {
        path: text(&value["path"]),
        args: texts(&value["args"]),
        env: texts(&value["env"]),
        timeout: integer(&value["timeout"]).map(|time| api::OptionalInt { value: time.value }),
    }
}

fn mount(value: &Value) -> api::Mount {
    api::Mount {
        destination: text(&value["destination"]),
        r#type: text(&value["type"]),
        source: text(&value["source"]),
        options: texts(&value["options"]),
    }
}

fn rlimit(value: &Value) -> api::PosixRlimit {
    api::PosixRlimit {
        r#type: text(&value["type"]),
        hard: value["hard"].as_u64().unwrap_or_default(),
        soft: value["soft"].as_u64().unwrap_or_default(),
    }
}

fn linux(facts: &ContainerFacts) -> api::LinuxContainer {
    let spec = &facts.spec;
    let linux = &spec["linux"];
    let namespaces = list(&linux["namespaces"])
        .iter()
        .map(|value| api::LinuxNamespace {
            r#type: text(&value["type"]),
            path: text(&value["path"]),
        });
    let devices = list(&linux["devices"])
        .iter()
        .map(|value| api::LinuxDevice {
            path: text(&value["path"]),
            r#type: text(&value["type"]),
            major: value["major"].as_i64().unwrap_or_default(),
            minor: value["minor"].as_i64().unwrap_or_default(),
            file_mode: unsigned(&value["fileMode"]),
            uid: unsigned(&value["uid"]),
            gid: unsigned(&value["gid"]),
        });
    let rules = list(&linux["resources"]["devices"])
        .iter()
        .map(|value| api::LinuxDeviceCgroup {
            allow: value["allow"].as_bool().unwrap_or_default(),
            r#type: text(&value["type"]),
            major: integer(&value["major"]),
            minor: integer(&value["minor"]),
            access: text(&value["access"]),
        });
    let mut limits = resources::to_proto(&facts.resources);
    limits.devices = rules.collect();
    api::LinuxContainer {
        namespaces: namespaces.collect(),
        devices: devices.collect(),
        resources: Some(limits),
        oom_score_adj: integer(&spec["process"]["oomScoreAdj"]),
        cgroups_path: text(&linux["cgroupsPath"]),
        seccomp_profile: Some(seccomp_profile(facts.seccomp.as_ref())),
        seccomp_policy: linux["seccomp"]
            .is_object()
            .then(|| seccomp(&linux["seccomp"])),
        sysctl: map(&linux["sysctl"]),
        rdt: linux["intelRdt"]
            .is_object()
            .then(|| rdt(&linux["intelRdt"])),
        ..api::LinuxContainer::default()
    }
}

fn rdt(value: &Value) -> api::LinuxRdt {
    let lines = list(&value["schemata"]).iter().map(text).collect();
    api::LinuxRdt {
        clos_id: Some(api::OptionalString {
            value: text(&value["closID"]),
        }),
        schemata: Some(api::OptionalRepeatedString { value: lines }),
        enable_monitoring: Some(api::OptionalBool {
            value: value["enableMonitoring"].as_bool().unwrap_or_default(),
        }),
        remove: false,
    }
}

fn seccomp_profile(profile: Option<&SecurityProfile>) -> api::SecurityProfile {
    let (profile_type, localhost_ref) = match profile {
        Some(SecurityProfile::RuntimeDefault) => (0, ""),
        Some(SecurityProfile::Localhost(path)) => (2, path.as_str()),
        Some(SecurityProfile::Unconfined) | None => (1, ""),
    };
    api::SecurityProfile {
        profile_type,
        localhost_ref: localhost_ref.to_owned(),
    }
}

fn seccomp(value: &Value) -> api::LinuxSeccomp {
    let syscalls = list(&value["syscalls"])
        .iter()
        .map(|one| api::LinuxSyscall {
            names: texts(&one["names"]),
            action: text(&one["action"]),
            errno_ret: unsigned(&one["errnoRet"]),
            args: list(&one["args"])
                .iter()
                .map(|arg| api::LinuxSeccompArg {
                    index: number(&arg["index"]),
                    value: arg["value"].as_u64().unwrap_or_default(),
                    value_two: arg["valueTwo"].as_u64().unwrap_or_default(),
                    op: text(&arg["op"]),
                })
                .collect(),
        });
    api::LinuxSeccomp {
        default_action: text(&value["defaultAction"]),
        default_errno: unsigned(&value["defaultErrnoRet"]),
        architectures: texts(&value["architectures"]),
        flags: texts(&value["flags"]),
        listener_path: text(&value["listenerPath"]),
        listener_metadata: text(&value["listenerMetadata"]),
        syscalls: syscalls.collect(),
    }
}

/// A seccomp policy as JSON of the OCI spec.
pub(super) fn seccomp_json(policy: &api::LinuxSeccomp) -> Vec<u8> {
    let syscalls = policy.syscalls.iter().map(|one| {
        let arguments = one.args.iter().map(|arg| {
            serde_json::json!({
                "index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op,
            })
        });
        let mut made = serde_json::json!({
            "names": one.names, "action": one.action, "args": arguments.collect::<Vec<_>>(),
        });
        if let Some(errno) = one.errno_ret {
            made["errnoRet"] = errno.value.into();
        }
        made
    });
    let mut made = serde_json::json!({
        "defaultAction": policy.default_action,
        "architectures": policy.architectures,
        "flags": policy.flags,
        "syscalls": syscalls.collect::<Vec<_>>(),
    });
    if let Some(errno) = policy.default_errno {
        made["defaultErrnoRet"] = errno.value.into();
    }
    for (key, value) in [
        ("listenerPath", &policy.listener_path),
        ("listenerMetadata", &policy.listener_metadata),
    ] {
        if !value.is_empty() {
            made[key] = value.clone().into();
        }
    }
    made.to_string().into_bytes()
}

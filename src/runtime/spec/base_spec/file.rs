//! The file as it is written: the OCI spec, with every key that it has by runtime-spec 1.2. Unknown keys are errors.
//!
//! `Left`: CRI decides, whatever stands there. `Value`: nothing may stand there; [`super`] refuses it by name.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

/// CRI decides.
pub(super) type Left = Option<IgnoredAny>;

macro_rules! model {
    ($($(#[doc = $doc:literal])+ $name:ident { $($field:ident: $kind:ty,)+ })+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug, Default, Deserialize)]
        #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
        pub(super) struct $name {
            $(pub(super) $field: $kind,)+
        }
    )+};
}

/// The whole.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    #[serde(rename = "ociVersion")]
    pub(super) oci_version: String,
    pub(super) process: Option<Process>,
    pub(super) root: Option<Root>,
    pub(super) hostname: Left,
    pub(super) domainname: Value,
    pub(super) mounts: Option<Vec<Mount>>,
    pub(super) hooks: Option<Hooks>,
    pub(super) annotations: Option<BTreeMap<String, String>>,
    pub(super) linux: Option<Linux>,
}

/// `process`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Process {
    pub(super) terminal: Left,
    pub(super) console_size: Left,
    pub(super) user: Left,
    pub(super) args: Left,
    pub(super) cwd: Left,
    pub(super) no_new_privileges: Left,
    pub(super) env: Option<Vec<String>>,
    pub(super) capabilities: Option<Capabilities>,
    pub(super) rlimits: Option<Vec<Rlimit>>,
    pub(super) io_priority: Option<IoPriority>,
    pub(super) scheduler: Option<Scheduler>,
    pub(super) apparmor_profile: Value,
    pub(super) selinux_label: Value,
    pub(super) oom_score_adj: Value,
    #[serde(rename = "execCPUAffinity")]
    pub(super) exec_cpu_affinity: Value,
}

/// `linux.resources.cpu`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Cpu {
    pub(super) shares: Option<i64>,
    pub(super) quota: Option<i64>,
    pub(super) period: Option<i64>,
    pub(super) cpus: String,
    pub(super) mems: String,
    pub(super) burst: Value,
    pub(super) realtime_runtime: Value,
    pub(super) realtime_period: Value,
    pub(super) idle: Value,
}

/// `linux.resources.memory`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Memory {
    pub(super) limit: Option<i64>,
    pub(super) reservation: Option<i64>,
    pub(super) swap: Option<i64>,
    pub(super) kernel: Value,
    #[serde(rename = "kernelTCP")]
    pub(super) kernel_tcp: Value,
    pub(super) swappiness: Value,
    #[serde(rename = "disableOOMKiller")]
    pub(super) disable_oom_killer: Value,
    pub(super) use_hierarchy: Value,
    pub(super) check_before_update: Value,
}

/// `linux.resources`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Resources {
    pub(super) devices: Option<Vec<Access>>,
    pub(super) memory: Option<Memory>,
    pub(super) cpu: Option<Cpu>,
    pub(super) pids: Option<Pids>,
    pub(super) hugepage_limits: Option<Vec<Hugepage>>,
    pub(super) unified: Option<BTreeMap<String, String>>,
    #[serde(rename = "blockIO")]
    pub(super) block_io: Value,
    pub(super) network: Value,
    pub(super) rdma: Value,
}

/// `process.rlimits`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Rlimit {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) soft: u64,
    pub(super) hard: u64,
}

/// `mounts`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Mount {
    pub(super) destination: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) source: String,
    pub(super) options: Option<Vec<String>>,
    #[serde(rename = "uidMappings")]
    pub(super) uid_mappings: Value,
    #[serde(rename = "gidMappings")]
    pub(super) gid_mappings: Value,
}

/// `linux.namespaces`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Namespace {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) path: String,
}

/// `linux.devices`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Device {
    pub(super) path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    #[serde(rename = "fileMode")]
    pub(super) file_mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// `linux.resources.devices`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Access {
    pub(super) allow: bool,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: Option<i64>,
    pub(super) minor: Option<i64>,
    pub(super) access: String,
}

model! {
    /// `root`.
    Root {
        path: Left,
        readonly: bool,
    }
    /// `process.capabilities`.
    Capabilities {
        bounding: Option<Vec<String>>,
        effective: Option<Vec<String>>,
        permitted: Option<Vec<String>>,
        inheritable: Value,
        ambient: Value,
    }
    /// `process.ioPriority`.
    IoPriority {
        class: String,
        priority: u8,
    }
    /// `process.scheduler`.
    Scheduler {
        policy: String,
        nice: i32,
        priority: u32,
        flags: Value,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    /// `hooks`.
    Hooks {
        prestart: Option<Vec<Program>>,
        create_runtime: Option<Vec<Program>>,
        create_container: Option<Vec<Program>>,
        start_container: Option<Vec<Program>>,
        poststart: Option<Vec<Program>>,
        poststop: Option<Vec<Program>>,
    }
    /// One hook.
    Program {
        path: String,
        args: Option<Vec<String>>,
        env: Option<Vec<String>>,
        timeout: Option<u64>,
    }
    /// `linux.resources.pids`.
    Pids {
        limit: i64,
    }
    /// `linux.resources.hugepageLimits`.
    Hugepage {
        page_size: String,
        limit: u64,
    }
    /// `linux`.
    Linux {
        cgroups_path: Left,
        namespaces: Option<Vec<Namespace>>,
        sysctl: Option<BTreeMap<String, String>>,
        resources: Option<Resources>,
        devices: Option<Vec<Device>>,
        masked_paths: Option<Vec<String>>,
        readonly_paths: Option<Vec<String>>,
        rootfs_propagation: String,
        uid_mappings: Value,
        gid_mappings: Value,
        seccomp: Value,
        mount_label: Value,
        intel_rdt: Value,
        personality: Value,
        time_offsets: Value,
        memory_policy: Value,
        net_devices: Value,
    }
}

//! From CRI config, image config and host facts to a plan and the OCI spec that describes it.
//!
//! ```text
//! prepare::container (I/O) --> Prepared --\
//! ContainerConfig, PodConfig, Image -------+--> container() --> Plan --> oci::describe --> Spec
//! HostFacts (probed once) ----------------/        (pure)
//! cdi::resolve, plugins --> Edits ---------/
//! ```
//!
//! The plan is what is done; the OCI spec is derived from the plan, so that what `crictl inspect` shows
//! is true. Paths of namespaces (`/proc/<pid>/ns/x`) are filled in by the engine once pause runs:
//! [`oci::join`]. Labels, annotations and the image's config are data: none but the fields named in
//! [`crate::base::image::ImageConfig`] has an effect.

pub(crate) mod base_spec;
pub(crate) mod block_io;
pub(crate) mod bundle;
pub(crate) mod cdi;
pub(crate) mod devices;
pub(crate) mod edit;
pub(crate) mod error;
pub(crate) mod hooks;
pub(crate) mod hooks_dir;
pub(crate) mod host;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod oci;
pub(crate) mod prepare;
pub(crate) mod process;
pub(crate) mod rdt;
pub(crate) mod resources;
pub(crate) mod rlimits;
pub(crate) mod security;
pub(crate) mod user;
pub(crate) mod userns;

#[cfg(test)]
mod tests;

use std::path::Path;

use crate::base::container::{ContainerConfig, ProcessUser, Resources};
use crate::base::edits::{Edits, NetDevice, Rdt};
use crate::base::handler::Handler;
use crate::base::id::{ContainerId, PodId};
use crate::base::image::{Image, RootfsLayers};
use crate::base::pod::PodConfig;
use crate::base::security::NamespaceMode;
use crate::runtime::cgroups::devices::DeviceRule;
use crate::runtime::plan::{
    CapabilityMasks, CgroupJoin, ExecPlan, MountPropagation, Plan, ProcessPlan, Rootfs, Tuning,
};
use crate::runtime::resctrl;
use crate::runtime::seccomp::{self, Compiled};
use crate::runtime::spec::host::CgroupHost;

pub(crate) use error::{Result, SpecError};
pub(crate) use host::HostFacts;
pub(crate) use prepare::Prepared;

/// Size of a pod's `/dev/shm` in bytes.
pub(crate) const SHM_SIZE: u64 = 64 << 20;
/// `oom_score_adj` of the sandbox process.
const SANDBOX_OOM_SCORE: i64 = -998;

/// What a container's plan is made of.
#[derive(Debug)]
pub(crate) struct ContainerInput<'a> {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its pod.
    pub(crate) pod_id: PodId,
    /// The pod's config.
    pub(crate) pod: &'a PodConfig,
    /// Where `hosts`, `hostname` and `resolv.conf` of the pod are.
    pub(crate) pod_directory: &'a Path,
    /// The container's config.
    pub(crate) config: &'a ContainerConfig,
    /// Its image.
    pub(crate) image: &'a Image,
    /// The image's layers.
    pub(crate) layers: &'a RootfsLayers,
    /// Writable layer.
    pub(crate) upper: &'a Path,
    /// Overlay's work directory.
    pub(crate) work: &'a Path,
    /// Overlay's `volatile` option.
    pub(crate) volatile: bool,
    /// An empty directory, which exists where SELinux labels are given: the second layer of images that have one only.
    pub(crate) empty_layer: &'a Path,
    /// Directory for the volumes that the image declares: `Plan::declared_volumes` are its subdirectories,
    /// to be made by the engine.
    pub(crate) volumes_directory: &'a Path,
    /// Cgroups to join.
    pub(crate) cgroup_join: CgroupJoin,
    /// `linux.cgroupsPath` of the spec.
    pub(crate) cgroup_path: &'a str,
    /// Host name of the pod.
    pub(crate) hostname: &'a str,
    /// The running container that `target_id` names, where pid is `Target`.
    pub(crate) target: Option<ContainerId>,
    /// Layers of image volumes: (index in `config.mounts`, layers).
    pub(crate) image_volumes: &'a [(usize, RootfsLayers)],
    /// From [`prepare::container`].
    pub(crate) prepared: &'a Prepared,
    /// What CDI devices and NRI plugins ask for, in order.
    pub(crate) edits: &'a [Edits],
    /// The pod's handler.
    pub(crate) handler: &'a Handler,
}

/// What a sandbox's plan is made of.
#[derive(Debug)]
pub(crate) struct SandboxInput<'a> {
    /// Pod.
    pub(crate) id: PodId,
    /// Its config.
    pub(crate) pod: &'a PodConfig,
    /// Cgroups that pause joins.
    pub(crate) cgroup_join: CgroupJoin,
    /// `linux.cgroupsPath` of the spec.
    pub(crate) cgroup_path: &'a str,
    /// Host name of the pod.
    pub(crate) hostname: &'a str,
    /// From [`prepare::sandbox`].
    pub(crate) prepared: &'a Prepared,
    /// The pod's handler.
    pub(crate) handler: &'a Handler,
}

/// A plan and what belongs to it.
#[derive(Debug)]
pub(crate) struct Built {
    /// OCI spec, derived from the plan.
    pub(crate) spec: oci_spec::runtime::Spec,
    /// The plan.
    pub(crate) plan: Plan,
    /// Rules of the devices cgroup, in order.
    pub(crate) device_rules: Vec<DeviceRule>,
    /// Limits in effect.
    pub(crate) resources: Resources,
    /// Network devices of the node that move into the pod.
    pub(crate) net_devices: Vec<NetDevice>,
    /// The resctrl group to make.
    pub(crate) rdt: Option<Rdt>,
    /// Annotations of the spec that an OCI runtime must not see.
    pub(crate) hidden_annotations: Vec<String>,
    /// Signal that asks the container to end.
    pub(crate) stop_signal: i32,
}

/// Makes the plan and spec of a container.
///
/// # Errors
/// [`SpecError`]: the config is wrong, or asks for what is not built or not offered by this node.
pub(crate) fn container(input: &ContainerInput<'_>, host: &HostFacts) -> Result<Built> {
    let (config, image) = (input.config, &input.image.config);
    check_container(input, host)?;
    let base = &input.prepared.base;
    let given = base.resources.with(&config.resources);
    let wanted = edit::resources(&given, input.edits);
    let resources = resources::check(&wanted, host)?;
    resources::check_floor(&resources, input.handler)?;
    let mounts = mounts::of_container(input, host)?;
    let (device_nodes, mut device_rules) = devices::of_container(input, mounts.own_dev);
    let (masked_paths, readonly_paths) = security::hidden_paths(&config.security, base)?;
    mounts::check_hidden(&mounts.mounts, "masked_paths", &masked_paths)?;
    mounts::check_hidden(&mounts.mounts, "readonly_paths", &readonly_paths)?;
    let (process, seccomp) = process_of_container(input, &resources, host)?;
    let namespaces = namespaces::of_container(input)?;
    userns::check_user(&process.user, &namespaces)?;
    let mut plan = Plan {
        namespaces,
        cgroup: input.cgroup_join.clone(),
        hostname: String::new(),
        sysctls: vec![],
        rootfs: Rootfs::Overlay {
            lower: input.layers.lower.clone(),
            upper: Some(input.upper.to_owned()),
            work: input.work.to_owned(),
            volatile: input.volatile,
            readonly: config.security.readonly_rootfs || base.readonly_root,
        },
        root_propagation: mounts.root_propagation,
        mounts: mounts.mounts,
        devices: device_nodes,
        masked_paths,
        readonly_paths,
        declared_volumes: mounts.declared_volumes,
        process,
        hooks: None,
        mount_label: input.prepared.labels.mount.clone(),
    };
    let external = input.handler.runtime.is_some();
    edit::plan(&mut plan, &mut device_rules, input.edits, external, host)?;
    let net_devices = edit::net_devices(&plan.namespaces.network, input.edits)?;
    let mut annotations = oci::container_annotations(input);
    edit::annotations(input.edits, &mut annotations);
    let hooks = hooks::of(input.edits)?;
    if !external {
        plan.hooks = hooks::plan(&hooks, input.id, input.pod_directory, &annotations);
    }
    // An OCI runtime makes and joins the group by itself.
    let rdt = rdt::of(input.edits)?;
    let own_rdt = rdt.clone().filter(|_| !external);
    if let Some(rdt) = &own_rdt {
        plan.process.resctrl = resctrl::groups(input.id, rdt);
    }
    let extras = oci::Extras {
        cgroup_path: input.cgroup_path,
        resources: &resources,
        device_rules: &device_rules,
        seccomp: seccomp.as_deref(),
        annotations,
        hooks,
        rdt,
    };
    let mut spec = oci::describe(&plan, extras);
    if input.handler.exec_on_first_cpu
        && let Some(process) = spec.process_mut()
    {
        let cpu = resources::first_own_cpu(&resources);
        process.set_exec_cpu_affinity(cpu.map(oci::exec_affinity));
    }
    Ok(Built {
        spec,
        device_rules,
        stop_signal: process::stop_signal(config, image)?,
        hidden_annotations: bundle::hidden_annotations(input),
        resources,
        plan,
        net_devices,
        rdt: own_rdt,
    })
}

fn check_container(input: &ContainerInput<'_>, host: &HostFacts) -> Result<()> {
    let config = input.config;
    if config.security.privileged && !input.pod.security.privileged {
        let problem = "is not allowed in this pod sandbox";
        let mend = "make the sandbox privileged too";
        return Err(SpecError::invalid("privileged", true, problem, mend));
    }
    check_cgroup_writable(input.handler, host)?;
    check_hostname(input.hostname)
}

/// A container may write to its cgroups only where that gives it no way around its own limits.
fn check_cgroup_writable(handler: &Handler, host: &HostFacts) -> Result<()> {
    let problem = match (&host.cgroup, host.nsdelegate) {
        _ if !handler.cgroup_writable => return Ok(()),
        (CgroupHost::V1(_), _) => "needs cgroup v2, this node has v1",
        (CgroupHost::V2, false) => {
            "would let containers raise their own limits: the node's cgroup2 is mounted without nsdelegate"
        }
        (CgroupHost::V2, true) => return Ok(()),
    };
    let mend = "remove the key on this node, or mount cgroup2 with nsdelegate (systemd does)";
    let field = handler.key("cgroup_writable");
    Err(SpecError::precondition(field, true, problem, mend))
}

fn check_hostname(hostname: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if hostname.len() > 64 || !hostname.chars().all(plain) {
        let problem = "is no host name";
        let mend = "use at most 64 letters, digits, - and .";
        return Err(SpecError::invalid("hostname", hostname, problem, mend));
    }
    Ok(())
}

fn process_of_container(
    input: &ContainerInput<'_>,
    resources: &Resources,
    host: &HostFacts,
) -> Result<(ProcessPlan, Option<std::sync::Arc<Compiled>>)> {
    let (config, image) = (input.config, &input.image.config);
    let security = &config.security;
    let defaults = &input.handler.defaults;
    let capabilities = security::capabilities(security, defaults.capabilities, host)?;
    let profile = match edit::seccomp(input.edits) {
        None => input.prepared.seccomp.clone(),
        Some((by, text)) => {
            let parsed = seccomp::Profile::parse(by, text).map_err(SpecError::Seccomp)?;
            Some(std::sync::Arc::new(parsed))
        }
    };
    let seccomp = filter(profile.as_deref(), capabilities.bounding, host)?;
    let field = "security_context";
    let plan = ProcessPlan {
        args: process::args(config, image)?,
        env: process::env(config, image, input.hostname, &defaults.env)?,
        cwd: process::cwd(config, image)?,
        user: user::of_container(config, &image.user)?,
        capabilities,
        no_new_privs: security.no_new_privs,
        rlimits: rlimits::of_container(&defaults.rlimits, host)?,
        oom_score_adj: i32::try_from(resources.oom_score_adj).ok(),
        seccomp: seccomp.as_ref().map(|compiled| compiled.filter.clone()),
        apparmor: security::apparmor(
            &format!("{field}.apparmor"),
            security.apparmor.as_ref(),
            input.prepared.apparmor_default,
            host,
        )?,
        selinux: input.prepared.labels.process.clone(),
        terminal: config.tty,
        umask: None,
        tuning: Tuning::default(),
        resctrl: vec![],
    };
    Ok((plan, seccomp))
}

fn filter(
    profile: Option<&seccomp::Profile>,
    capabilities: u64,
    host: &HostFacts,
) -> Result<Option<std::sync::Arc<Compiled>>> {
    let Some(profile) = profile else {
        return Ok(None);
    };
    let target = seccomp::Target {
        arch: seccomp::Arch::native(),
        capabilities,
        kernel: host.kernel,
        actions: &host.seccomp_actions,
    };
    seccomp::compile(profile, &target)
        .map(Some)
        .map_err(SpecError::Seccomp)
}

/// Makes the plan and spec of a sandbox: pause in the pod's namespaces, without any capability.
///
/// # Errors
/// [`SpecError`]: the config is wrong, or asks for what is not built or not offered by this node.
pub(crate) fn sandbox(input: &SandboxInput<'_>, host: &HostFacts) -> Result<Built> {
    let security = &input.pod.security;
    check_cgroup_writable(input.handler, host)?;
    check_hostname(input.hostname)?;
    let namespaces = namespaces::of_sandbox(input.pod)?;
    let seccomp = filter(input.prepared.seccomp.as_deref(), 0, host)?;
    let resources = Resources {
        oom_score_adj: SANDBOX_OOM_SCORE.max(host.min_oom_score_adj.into()),
        ..Resources::default()
    };
    let field = "linux.security_context";
    let process = ProcessPlan {
        args: vec![],
        env: vec![],
        cwd: "/".to_owned(),
        user: user::of_sandbox(input.pod)?,
        capabilities: CapabilityMasks::default(),
        no_new_privs: true,
        rlimits: vec![],
        oom_score_adj: i32::try_from(resources.oom_score_adj).ok(),
        seccomp: seccomp.as_ref().map(|compiled| compiled.filter.clone()),
        apparmor: security::apparmor(
            &format!("{field}.apparmor"),
            security.apparmor.as_ref(),
            input.prepared.apparmor_default,
            host,
        )?,
        selinux: input.prepared.labels.process.clone(),
        terminal: false,
        umask: None,
        tuning: Tuning::default(),
        resctrl: vec![],
    };
    userns::check_user(&process.user, &namespaces)?;
    let own_uts = security.namespaces.network != NamespaceMode::Node;
    let plan = Plan {
        namespaces,
        cgroup: input.cgroup_join.clone(),
        hostname: if own_uts {
            input.hostname.to_owned()
        } else {
            String::new()
        },
        sysctls: namespaces::sysctls(input.pod, &input.handler.defaults.sysctls)?,
        rootfs: Rootfs::Pause {
            shm_size: match security.namespaces.ipc {
                NamespaceMode::Node => 0,
                _ => SHM_SIZE,
            },
        },
        root_propagation: MountPropagation::Private,
        mounts: mounts::of_sandbox(input.pod),
        devices: vec![],
        masked_paths: vec![],
        readonly_paths: vec![],
        declared_volumes: vec![],
        process,
        hooks: None,
        mount_label: input.prepared.labels.mount.clone(),
    };
    let device_rules = devices::of_sandbox();
    let extras = oci::Extras {
        cgroup_path: input.cgroup_path,
        resources: &resources,
        device_rules: &device_rules,
        seccomp: seccomp.as_deref(),
        annotations: oci::sandbox_annotations(input),
        hooks: vec![],
        rdt: None,
    };
    Ok(Built {
        spec: oci::describe(&plan, extras),
        device_rules,
        resources,
        plan,
        net_devices: vec![],
        rdt: None,
        hidden_annotations: vec![],
        stop_signal: crate::runtime::signals::TERM,
    })
}

/// The plan of one more process in a container: as the first one, with another command. `user` is who that one is: a name
/// would mean what the container's own files make of it by now.
///
/// # Errors
/// [`SpecError::Invalid`]: nothing to run, or a NUL byte.
pub(crate) fn exec(
    plan: &Plan,
    user: ProcessUser,
    command: Vec<String>,
    terminal: bool,
) -> Result<ExecPlan> {
    process::check_args("cmd", &command)?;
    let mut process = ProcessPlan {
        args: command,
        terminal,
        ..plan.process.clone()
    };
    let mut env = process::Env(std::mem::take(&mut process.env));
    if terminal && !env.has("TERM") {
        env.set(b"TERM", b"xterm");
    }
    if !env.has("HOME") {
        // Here, for an OCI runtime would look it up again.
        env.set(
            b"HOME",
            if user.home.is_empty() {
                b"/"
            } else {
                &user.home
            },
        );
    }
    process.env = env.0;
    Ok(ExecPlan {
        cgroup: plan.cgroup.clone(),
        user_namespace: plan.namespaces.root(),
        process,
        user,
        text: None,
        cpu: None,
    })
}

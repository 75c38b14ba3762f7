//! The OCI spec that describes a plan: for `crictl inspect` and for plugins. Nothing is executed from it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use oci_spec::runtime as oci;

use crate::base::block_io::{BlockIo, DeviceIo};
use crate::base::container::Resources;
use crate::base::edits::Rdt;
use crate::base::handler::passed;
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::capabilities;
use crate::runtime::cgroups::devices::{DeviceKind, DeviceRule};
use crate::runtime::plan::{
    MountAttributes, MountPlan, MountPropagation, MountSource, NamespaceSource, Namespaces, Plan,
    ProcessPlan, Rootfs, SchedulerPlan, UserName,
};
use crate::runtime::seccomp::Compiled;
use crate::runtime::spec::{ContainerInput, SandboxInput, rdt};

/// Version of the OCI runtime spec.
pub(crate) const VERSION: &str = "1.2.1";

/// What a spec says that a plan does not.
#[derive(Debug)]
pub(crate) struct Extras<'a> {
    /// `linux.cgroupsPath`.
    pub(crate) cgroup_path: &'a str,
    /// Limits in effect.
    pub(crate) resources: &'a Resources,
    /// Device rules.
    pub(crate) device_rules: &'a [DeviceRule],
    /// Filter with its description.
    pub(crate) seccomp: Option<&'a Compiled>,
    /// Annotations.
    pub(crate) annotations: HashMap<String, String>,
    /// Hooks.
    pub(crate) hooks: Vec<Hook>,
    /// `linux.intelRdt`.
    pub(crate) rdt: Option<Rdt>,
}

/// Front of the annotations that are berth's own.
const OWN: &str = "io.kubernetes.cri.";
/// The rest of those of a container; berth gives each its value.
const OF_CONTAINERS: [&str; 7] = [
    "container-type",
    "container-name",
    "image-name",
    "sandbox-id",
    "sandbox-name",
    "sandbox-namespace",
    "sandbox-uid",
];

/// Is this annotation of a container berth's own?
pub(crate) fn is_own(key: &str) -> bool {
    let rest = key.strip_prefix(OWN);
    rest.is_some_and(|rest| OF_CONTAINERS.contains(&rest))
}

fn annotations<const N: usize>(list: [(&str, String); N]) -> HashMap<String, String> {
    list.into_iter()
        .map(|(key, value)| (format!("{OWN}{key}"), value))
        .collect()
}

/// The container's annotations, and those by which tools know it.
pub(crate) fn container_annotations(input: &ContainerInput<'_>) -> HashMap<String, String> {
    let metadata = &input.pod.metadata;
    let of_pod = passed(&input.pod.annotations, &input.handler.pod_annotations);
    let mut all: HashMap<String, String> = of_pod.into_iter().collect();
    all.extend(input.config.annotations.clone());
    let values = [
        "container".to_owned(),
        input.config.name.clone(),
        input.config.image.image.clone(),
        input.pod_id.to_string(),
        metadata.name.clone(),
        metadata.namespace.clone(),
        metadata.uid.clone(),
    ];
    let keys = OF_CONTAINERS.iter().map(|key| format!("{OWN}{key}"));
    all.extend(keys.zip(values));
    all
}

/// The annotations by which tools know a sandbox.
pub(crate) fn sandbox_annotations(input: &SandboxInput<'_>) -> HashMap<String, String> {
    let metadata = &input.pod.metadata;
    annotations([
        ("container-type", "sandbox".to_owned()),
        ("sandbox-id", input.id.to_string()),
        ("sandbox-name", metadata.name.clone()),
        ("sandbox-namespace", metadata.namespace.clone()),
        ("sandbox-uid", metadata.uid.clone()),
        ("sandbox-log-directory", input.pod.log_directory.clone()),
    ])
}

/// Describes a plan.
pub(crate) fn describe(plan: &Plan, extras: Extras<'_>) -> oci::Spec {
    let (path, readonly) = match &plan.rootfs {
        Rootfs::Pause { .. } => (PathBuf::from("rootfs"), true),
        // The overlay is mounted in the container's mount namespace only; there it is the root.
        Rootfs::Overlay { readonly, .. } => (PathBuf::from("rootfs"), *readonly),
        Rootfs::Directory { path, readonly } => (path.clone(), *readonly),
    };
    let mut root = oci::Root::default();
    root.set_path(path).set_readonly(Some(readonly));
    let mut mounts: Vec<oci::Mount> = plan.mounts.iter().map(mount).collect();
    for (source, target) in &plan.declared_volumes {
        let options = vec!["rbind".to_owned(), "rprivate".to_owned()];
        mounts.push(mount_of(target, "bind", source, options));
    }
    let mut spec = oci::Spec::default();
    spec.set_version(VERSION.to_owned())
        .set_root(Some(root))
        .set_mounts(Some(mounts))
        .set_process(Some(process(&plan.process)))
        .set_hostname((!plan.hostname.is_empty()).then(|| plan.hostname.clone()))
        .set_annotations(Some(extras.annotations.clone()))
        .set_hooks(hooks(&extras.hooks))
        .set_linux(Some(linux(plan, &extras)));
    spec
}

/// Writes the paths of the namespaces joined into a spec: those of the pod from its pause process, that of
/// a target container from its first process.
pub(crate) fn join(spec: &mut oci::Spec, plan: &Plan, pause_pid: u32, target_pid: Option<u32>) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    linux.set_namespaces(Some(namespaces(&plan.namespaces, |source| match source {
        NamespaceSource::Pod => Some(pause_pid),
        NamespaceSource::Container(_) => target_pid,
        _ => None,
    })));
}

fn namespaces(
    plan: &Namespaces,
    pid_of: impl Fn(&NamespaceSource) -> Option<u32>,
) -> Vec<oci::LinuxNamespace> {
    use oci::LinuxNamespaceType as Kind;
    let mut all = vec![];
    for (kind, name, source) in [
        (Kind::Pid, "pid", &plan.pid),
        (Kind::Ipc, "ipc", &plan.ipc),
        (Kind::Uts, "uts", &plan.uts),
        (Kind::Mount, "mnt", &NamespaceSource::New),
        (Kind::Network, "net", &plan.network),
        (Kind::Cgroup, "cgroup", &plan.cgroup),
        (Kind::User, "user", &plan.user),
    ] {
        if *source == NamespaceSource::Host {
            continue;
        }
        let path = match source {
            NamespaceSource::Path(path) => Some(path.clone()),
            _ => pid_of(source).map(|pid| PathBuf::from(format!("/proc/{pid}/ns/{name}"))),
        };
        let mut namespace = oci::LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        all.push(namespace);
    }
    all
}

fn mount_of(target: &str, kind: &str, source: &Path, options: Vec<String>) -> oci::Mount {
    let mut mount = oci::Mount::default();
    mount
        .set_destination(target.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options));
    mount
}

fn attributes(attributes: MountAttributes) -> Vec<String> {
    [
        (attributes.nosuid, "nosuid"),
        (attributes.nodev, "nodev"),
        (attributes.noexec, "noexec"),
        (attributes.noatime, "noatime"),
        (attributes.relatime, "relatime"),
        (attributes.recursive_readonly, "rro"),
        (attributes.readonly, "ro"),
        (!attributes.readonly, "rw"),
    ]
    .into_iter()
    .filter(|(is_set, _)| *is_set)
    .map(|(_, name)| name.to_owned())
    .collect()
}

fn mount(plan: &MountPlan) -> oci::Mount {
    let mut options = attributes(plan.attributes);
    let mut add = |option: &str| options.push(option.to_owned());
    match &plan.source {
        MountSource::Bind {
            path,
            recursive,
            propagation,
            uid_mappings,
            gid_mappings,
        } => {
            add(if *recursive { "rbind" } else { "bind" });
            add(propagation_name(*propagation));
            let mut mount = mount_of(&plan.target, "bind", path, options);
            if !uid_mappings.is_empty() || !gid_mappings.is_empty() {
                mount
                    .set_uid_mappings(Some(mappings(uid_mappings)))
                    .set_gid_mappings(Some(mappings(gid_mappings)));
            }
            mount
        }
        MountSource::PodShm => mount_of(&plan.target, "tmpfs", Path::new("shm"), options),
        MountSource::Filesystem { kind, options: own } => {
            for (key, value) in own {
                if value.is_empty() {
                    add(key);
                } else {
                    add(&format!("{key}={value}"));
                }
            }
            mount_of(&plan.target, kind, Path::new(kind), options)
        }
        MountSource::CgroupV1(_) => mount_of(&plan.target, "cgroup", Path::new("cgroup"), options),
        MountSource::Image { sub_path, .. } => {
            mount_of(&plan.target, "overlay", Path::new(sub_path), options)
        }
    }
}

fn propagation_name(propagation: MountPropagation) -> &'static str {
    match propagation {
        MountPropagation::Private => "rprivate",
        MountPropagation::Slave => "rslave",
        MountPropagation::Shared => "rshared",
    }
}

fn mappings(plan: &[(u32, u32, u32)]) -> Vec<oci::LinuxIdMapping> {
    let one = |(inside, outside, length): &(u32, u32, u32)| {
        oci::LinuxIdMappingBuilder::default()
            .container_id(*inside)
            .host_id(*outside)
            .size(*length)
            .build()
            .ok()
    };
    plan.iter().filter_map(one).collect()
}

/// Describes a process. A user by name is shown as 0: it is looked up later.
pub(crate) fn process(plan: &ProcessPlan) -> oci::Process {
    let mut user = oci::User::default();
    let number = |name: &UserName| match name {
        UserName::Id(id) => *id,
        UserName::Name(_) => 0,
    };
    user.set_uid(number(&plan.user.user))
        .set_gid(plan.user.group.as_ref().map_or(0, number))
        .set_umask(plan.umask)
        .set_additional_gids(
            (!plan.user.additional_groups.is_empty()).then(|| plan.user.additional_groups.clone()),
        )
        .set_username(match &plan.user.user {
            UserName::Name(name) => Some(name.clone()),
            UserName::Id(_) => None,
        });
    let set = |mask: u64| -> Option<oci::Capabilities> {
        let names = capabilities::names(mask);
        Some(
            names
                .iter()
                .filter_map(|name| {
                    let bare = name.strip_prefix("CAP_").unwrap_or(name);
                    oci::Capability::from_str(bare).ok()
                })
                .collect(),
        )
    };
    let masks = plan.capabilities;
    let mut capabilities = oci::LinuxCapabilities::default();
    capabilities
        .set_bounding(set(masks.bounding))
        .set_effective(set(masks.permitted))
        .set_permitted(set(masks.permitted))
        .set_inheritable(set(masks.ambient))
        .set_ambient(set(masks.ambient));
    let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let args = if plan.args.is_empty() {
        vec!["/pause".to_owned()]
    } else {
        plan.args.clone()
    };
    let mut process = oci::Process::default();
    process
        .set_terminal(Some(plan.terminal))
        .set_user(user)
        .set_args(Some(args))
        .set_env(Some(plan.env.iter().map(text).collect()))
        .set_cwd(plan.cwd.clone().into())
        .set_capabilities(Some(capabilities))
        .set_rlimits(Some(plan.rlimits.iter().filter_map(rlimit).collect()))
        .set_no_new_privileges(Some(plan.no_new_privs))
        .set_apparmor_profile(some(&plan.apparmor))
        .set_selinux_label(some(&plan.selinux))
        .set_oom_score_adj(plan.oom_score_adj)
        .set_io_priority(plan.tuning.io_priority.and_then(io_priority))
        .set_scheduler(plan.tuning.scheduler.as_ref().and_then(scheduler));
    process
}

/// Execs begin on this CPU and stay there.
pub(crate) fn exec_affinity(cpu: u32) -> oci::ExecCPUAffinity {
    let mut made = oci::ExecCPUAffinity::default();
    made.set_initial(Some(cpu.to_string()))
        .set_cpu_affinity_final(Some(cpu.to_string()));
    made
}

fn io_priority((class, level): (u8, u8)) -> Option<oci::LinuxIOPriority> {
    use oci::IOPriorityClass as Class;
    let class = match class {
        1 => Class::IoprioClassRt,
        2 => Class::IoprioClassBe,
        3 => Class::IoprioClassIdle,
        _ => return None,
    };
    oci::LinuxIOPriorityBuilder::default()
        .class(class)
        .priority(level)
        .build()
        .ok()
}

/// Without its flags.
fn scheduler(wanted: &SchedulerPlan) -> Option<oci::Scheduler> {
    use oci::LinuxSchedulerPolicy as Policy;
    let policy = match wanted.policy {
        0 => Policy::SchedOther,
        1 => Policy::SchedFifo,
        2 => Policy::SchedRr,
        3 => Policy::SchedBatch,
        4 => Policy::SchedIso,
        5 => Policy::SchedIdle,
        6 => Policy::SchedDeadline,
        _ => return None,
    };
    let given = |value: u64| (value != 0).then_some(value);
    let mut made = oci::Scheduler::default();
    made.set_policy(policy)
        .set_nice((wanted.nice != 0).then_some(wanted.nice))
        .set_priority(i32::try_from(wanted.priority).ok().filter(|p| *p != 0))
        .set_runtime(given(wanted.runtime))
        .set_deadline(given(wanted.deadline))
        .set_period(given(wanted.period));
    Some(made)
}

fn hooks(all: &[Hook]) -> Option<oci::Hooks> {
    let at = |point: HookPoint| -> Option<Vec<oci::Hook>> {
        let hooks: Vec<_> = all.iter().filter(|hook| hook.point == point).collect();
        let made = hooks.iter().map(|hook| {
            let mut made = oci::Hook::default();
            made.set_path((&hook.path).into())
                .set_args((!hook.args.is_empty()).then(|| hook.args.clone()))
                .set_env((!hook.env.is_empty()).then(|| hook.env.clone()))
                .set_timeout(hook.timeout.and_then(|time| i64::try_from(time).ok()));
            made
        });
        (!hooks.is_empty()).then(|| made.collect())
    };
    let mut made = oci::Hooks::default();
    made.set_prestart(at(HookPoint::Prestart))
        .set_create_runtime(at(HookPoint::CreateRuntime))
        .set_create_container(at(HookPoint::CreateContainer))
        .set_start_container(at(HookPoint::StartContainer))
        .set_poststart(at(HookPoint::Poststart))
        .set_poststop(at(HookPoint::Poststop));
    (!all.is_empty()).then_some(made)
}

fn rlimit((number, soft, hard): &(u32, u64, u64)) -> Option<oci::PosixRlimit> {
    use oci::PosixRlimitType as Kind;
    // The index is the resource's number (asm-generic/resource.h).
    const KINDS: [Kind; 16] = [
        Kind::RlimitCpu,
        Kind::RlimitFsize,
        Kind::RlimitData,
        Kind::RlimitStack,
        Kind::RlimitCore,
        Kind::RlimitRss,
        Kind::RlimitNproc,
        Kind::RlimitNofile,
        Kind::RlimitMemlock,
        Kind::RlimitAs,
        Kind::RlimitLocks,
        Kind::RlimitSigpending,
        Kind::RlimitMsgqueue,
        Kind::RlimitNice,
        Kind::RlimitRtprio,
        Kind::RlimitRttime,
    ];
    let kind = KINDS.get(usize::try_from(*number).ok()?)?;
    oci::PosixRlimitBuilder::default()
        .typ(*kind)
        .soft(*soft)
        .hard(*hard)
        .build()
        .ok()
}

fn linux(plan: &Plan, extras: &Extras<'_>) -> oci::Linux {
    let sysctls: HashMap<String, String> = plan.sysctls.iter().cloned().collect();
    let mut linux = oci::Linux::default();
    linux
        .set_uid_mappings(some_mappings(&plan.namespaces.uid_mappings))
        .set_gid_mappings(some_mappings(&plan.namespaces.gid_mappings))
        .set_sysctl((!sysctls.is_empty()).then_some(sysctls))
        .set_resources(Some(resources(extras)))
        .set_cgroups_path(Some(extras.cgroup_path.into()))
        .set_namespaces(Some(namespaces(&plan.namespaces, |_| None)))
        .set_devices(Some(plan.devices.iter().map(device).collect()))
        .set_seccomp(extras.seccomp.map(|compiled| compiled.description.clone()))
        .set_rootfs_propagation(Some(propagation_name(plan.root_propagation).to_owned()))
        .set_intel_rdt(extras.rdt.as_ref().map(rdt::describe))
        .set_mount_label((!plan.mount_label.is_empty()).then(|| plan.mount_label.clone()))
        .set_masked_paths(Some(plan.masked_paths.clone()))
        .set_readonly_paths(Some(plan.readonly_paths.clone()));
    linux
}

fn some_mappings(plan: &[(u32, u32, u32)]) -> Option<Vec<oci::LinuxIdMapping>> {
    (!plan.is_empty()).then(|| mappings(plan))
}

fn device(node: &crate::runtime::plan::DeviceNode) -> oci::LinuxDevice {
    let mut device = oci::LinuxDevice::default();
    device
        .set_path(node.path.clone().into())
        .set_typ(if node.block {
            oci::LinuxDeviceType::B
        } else {
            oci::LinuxDeviceType::C
        })
        .set_major(node.major.into())
        .set_minor(node.minor.into())
        .set_file_mode(Some(node.mode))
        .set_uid(Some(node.uid))
        .set_gid(Some(node.gid));
    device
}

fn device_rule(rule: &DeviceRule) -> oci::LinuxDeviceCgroup {
    let access: String = [(rule.read, 'r'), (rule.write, 'w'), (rule.mknod, 'm')]
        .into_iter()
        .filter_map(|(is_set, letter)| is_set.then_some(letter))
        .collect();
    let mut made = oci::LinuxDeviceCgroup::default();
    made.set_allow(rule.allow)
        .set_typ(match rule.kind {
            DeviceKind::All => None,
            DeviceKind::Block => Some(oci::LinuxDeviceType::B),
            DeviceKind::Char => Some(oci::LinuxDeviceType::C),
        })
        .set_major(rule.major.map(i64::from))
        .set_minor(rule.minor.map(i64::from))
        .set_access(Some(access));
    made
}

fn resources(extras: &Extras<'_>) -> oci::LinuxResources {
    let limits = extras.resources;
    let given = |value: i64| (value != 0).then_some(value);
    let text = |value: &str| (!value.is_empty()).then(|| value.to_owned());
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value != 0);
    let mut memory = oci::LinuxMemory::default();
    memory
        .set_limit(given(limits.memory_limit))
        .set_swap(given(limits.memory_swap_limit))
        .set_reservation(given(limits.memory_reservation.max(0)));
    let mut cpu = oci::LinuxCpu::default();
    cpu.set_shares(positive(limits.cpu_shares))
        .set_quota(given(limits.cpu_quota))
        .set_period(positive(limits.cpu_period))
        .set_cpus(text(&limits.cpuset_cpus))
        .set_mems(text(&limits.cpuset_mems));
    let pages = limits.hugepage_limits.iter().map(|(size, limit)| {
        let mut page = oci::LinuxHugepageLimit::default();
        page.set_page_size(size.clone())
            .set_limit(i64::try_from(*limit).unwrap_or(i64::MAX));
        page
    });
    let pages: Vec<_> = pages.collect();
    let unified: HashMap<String, String> = limits.unified.clone().into_iter().collect();
    let mut resources = oci::LinuxResources::default();
    resources
        .set_devices(Some(extras.device_rules.iter().map(device_rule).collect()))
        .set_memory(Some(memory))
        .set_cpu(Some(cpu))
        .set_hugepage_limits((!pages.is_empty()).then_some(pages))
        .set_block_io(limits.block_io.as_ref().and_then(block_io))
        .set_unified((!unified.is_empty()).then_some(unified));
    if limits.pids_limit != 0 {
        let mut pids = oci::LinuxPids::default();
        pids.set_limit(limits.pids_limit);
        resources.set_pids(Some(pids));
    }
    resources
}

fn block_io(limits: &BlockIo) -> Option<oci::LinuxBlockIo> {
    let throttles = |rate: fn(&DeviceIo) -> Option<u64>| -> Option<Vec<_>> {
        let throttle = |one: &DeviceIo| {
            oci::LinuxThrottleDeviceBuilder::default()
                .major(one.major)
                .minor(one.minor)
                .rate(rate(one)?)
                .build()
                .ok()
        };
        let made: Vec<_> = limits.devices.iter().filter_map(throttle).collect();
        (!made.is_empty()).then_some(made)
    };
    let weights = limits.devices.iter().filter_map(|one| {
        oci::LinuxWeightDeviceBuilder::default()
            .major(one.major)
            .minor(one.minor)
            .weight(one.weight?)
            .build()
            .ok()
    });
    let weights: Vec<_> = weights.collect();
    let mut made = oci::LinuxBlockIo::default();
    made.set_weight(limits.weight)
        .set_weight_device((!weights.is_empty()).then_some(weights))
        .set_throttle_read_bps_device(throttles(|one| one.read_bps))
        .set_throttle_write_bps_device(throttles(|one| one.write_bps))
        .set_throttle_read_iops_device(throttles(|one| one.read_iops))
        .set_throttle_write_iops_device(throttles(|one| one.write_iops));
    (*limits != BlockIo::default()).then_some(made)
}

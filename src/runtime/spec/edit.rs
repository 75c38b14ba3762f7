//! Edits of CDI devices and NRI plugins, applied to what the CRI config gave. In the order of the list.

use std::path::Path;

use crate::base::container::{Mount, Resources};
use crate::base::edits::{
    DeviceAccess, DeviceEdit, Edits, MemoryPolicy, MountEdit, NamespaceEdit, NetDevice,
};
use crate::runtime::cgroups::devices::{DeviceKind, DeviceRule};
use crate::runtime::plan::{
    DeviceNode, MemoryPolicyPlan, MountAttributes, MountPlan, MountPropagation, MountSource,
    NamespaceSource, Plan, SchedulerPlan, UserName,
};
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::HostFacts;
use crate::runtime::spec::mounts::{self, clean};
use crate::runtime::spec::namespaces;
use crate::runtime::spec::process::{self, Env};
use crate::runtime::spec::rlimits;

const MODES: &str = "use a mode of the kernel's";

/// The error of a value of `edits`.
fn invalid(
    edits: &Edits,
    field: &str,
    value: impl ToString,
    problem: &str,
    mend: &'static str,
) -> SpecError {
    SpecError::invalid(format!("{}: {field}", edits.by), value, problem, mend)
}

/// Limits with those of the edits over them; `oom_score_adj` too.
pub(crate) fn resources(given: &Resources, all: &[Edits]) -> Resources {
    let mut made = given.clone();
    for edits in all {
        made = made.with(&edits.resources);
        if let Some(score) = edits.oom_score_adj {
            made.oom_score_adj = score;
        }
    }
    made
}

/// The seccomp profile that replaces the container's, and who asks for it.
pub(crate) fn seccomp(all: &[Edits]) -> Option<(&str, &[u8])> {
    let last = |edits: &&Edits| edits.seccomp.is_some();
    let edits = all.iter().rfind(last)?;
    Some((&edits.by, edits.seccomp.as_deref()?))
}

/// Annotations of the OCI spec.
pub(crate) fn annotations(all: &[Edits], made: &mut std::collections::HashMap<String, String>) {
    for (key, value) in all.iter().flat_map(|edits| &edits.annotations) {
        match value {
            Some(value) => made.insert(key.clone(), value.clone()),
            None => made.remove(key),
        };
    }
}

/// Applies everything but limits, annotations, hooks and the seccomp profile. `external`: an OCI runtime makes the
/// container.
///
/// # Errors
/// [`SpecError`] names who asks, the field and its value.
pub(crate) fn plan(
    plan: &mut Plan,
    rules: &mut Vec<DeviceRule>,
    all: &[Edits],
    external: bool,
    host: &HostFacts,
) -> Result<()> {
    for edits in all {
        refuse(edits, external)?;
        process_of(plan, edits)?;
        for mount in &edits.mounts {
            mount_of(plan, edits, mount, host)?;
        }
        for device in &edits.devices {
            device_of(plan, rules, edits, device)?;
        }
        for access in &edits.device_rules {
            rules.push(rule(edits, access)?);
        }
        for namespace in &edits.namespaces {
            namespace_of(plan, edits, namespace)?;
        }
        for (key, value) in &edits.sysctls {
            sysctl(plan, edits, key, value.as_deref())?;
        }
        tune(plan, edits)?;
    }
    plan.mounts
        .sort_by_key(|mount| mounts::depth(&mount.target));
    Ok(())
}

/// What cannot be done: memory policies by an OCI runtime.
fn refuse(edits: &Edits, external: bool) -> Result<()> {
    let (field, value) = if let Some((field, value)) = edits.impossible.first() {
        (field.clone(), value.clone())
    } else if let Some(policy) = edits.memory_policy.as_ref().filter(|_| external) {
        ("memoryPolicy".to_owned(), policy.nodes.clone())
    } else {
        return Ok(());
    };
    Err(SpecError::unimplemented(
        format!("{}: {field}", edits.by),
        value,
        "leave it out",
    ))
}

fn process_of(plan: &mut Plan, edits: &Edits) -> Result<()> {
    let process = &mut plan.process;
    if !edits.args.is_empty() {
        process::check_args(&format!("{}: args", edits.by), &edits.args)?;
        process.args.clone_from(&edits.args);
    }
    let mut env = Env(std::mem::take(&mut process.env));
    for (name, value) in &edits.env {
        match value {
            Some(value) => {
                process::check_variable(&format!("{}: env", edits.by), name, value.as_bytes())?;
                env.set(name.as_bytes(), value.as_bytes());
            }
            None => env.unset(name),
        }
    }
    process.env = env.0;
    for group in &edits.groups {
        if !process.user.additional_groups.contains(group) {
            process.user.additional_groups.push(*group);
        }
    }
    for (name, soft, hard) in &edits.rlimits {
        let Some(number) = rlimits::number(name) else {
            let mend = "use a name of setrlimit(2)";
            return Err(invalid(edits, "rlimits", name, "is no limit", mend));
        };
        if soft > hard {
            let value = format!("{name} {soft}:{hard}");
            let mend = "raise the hard limit";
            let problem = "has a soft limit above the hard one";
            return Err(invalid(edits, "rlimits", value, problem, mend));
        }
        process.rlimits.retain(|(known, ..)| *known != number);
        process.rlimits.push((number, *soft, *hard));
    }
    Ok(())
}

fn mount_of(plan: &mut Plan, edits: &Edits, mount: &MountEdit, host: &HostFacts) -> Result<()> {
    let field = format!("{}: mounts[{}]", edits.by, mount.destination);
    let as_cri = Mount {
        container_path: mount.destination.clone(),
        host_path: mount.source.clone(),
        ..Mount::default()
    };
    let target = mounts::target(&field, &as_cri)?;
    if target == "/dev" && !mount.remove {
        let mend = "mount below it";
        let problem = "would hide the container's devices";
        return Err(SpecError::invalid(field, target, problem, mend));
    }
    let old = plan.mounts.len();
    plan.mounts.retain(|known| known.target != target);
    plan.declared_volumes.retain(|(_, known)| *known != target);
    if mount.remove {
        if old != plan.mounts.len() && matches!(&*target, "/proc" | "/dev" | "/sys" | "/dev/pts") {
            let problem = "is a filesystem that the container cannot do without";
            return Err(SpecError::invalid(field, target, problem, "leave it"));
        }
        return Ok(());
    }
    let options = Options::read(&field, mount, host)?;
    let bind = matches!(&*mount.kind, "" | "bind" | "none") || options.bind.is_some();
    let source = if bind {
        if !mount.source.starts_with('/') || mount.source.contains('\0') {
            let problem = "is not the absolute path of a source";
            let mend = "use an absolute path";
            return Err(SpecError::invalid(field, &mount.source, problem, mend));
        }
        if let Some((key, value)) = options.data.first() {
            let option = format!("{key}={value}");
            let mend = "give options of bind mounts only";
            return Err(SpecError::invalid(field, option, "is not known", mend));
        }
        let follows = |one| plan.root_propagation == MountPropagation::Private && one;
        match options.propagation {
            MountPropagation::Shared => plan.root_propagation = MountPropagation::Shared,
            MountPropagation::Slave if follows(true) => {
                plan.root_propagation = MountPropagation::Slave;
            }
            _ => {}
        }
        MountSource::Bind {
            path: clean(&mount.source).into(),
            recursive: options.bind.unwrap_or(true),
            propagation: options.propagation,
            uid_mappings: vec![],
            gid_mappings: vec![],
        }
    } else {
        const KINDS: [&str; 6] = ["tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup2"];
        if !KINDS.contains(&&*mount.kind) {
            let mend = "use bind, tmpfs, proc, sysfs, devpts, mqueue or cgroup2";
            let problem = "is no type of mount that berth makes";
            return Err(SpecError::invalid(field, &mount.kind, problem, mend));
        }
        if let ("cgroup2", Some((key, _))) = (&*mount.kind, options.data.first()) {
            let mend = "leave it out: cgroup2 has the options that the node has mounted it with";
            let problem = "is an option of the node's one hierarchy, not of a mount";
            return Err(SpecError::invalid(field, key, problem, mend));
        }
        MountSource::Filesystem {
            kind: mount.kind.clone(),
            options: options.data,
        }
    };
    plan.mounts.push(MountPlan {
        target,
        source,
        attributes: options.attributes,
    });
    Ok(())
}

/// Options of a mount, sorted.
struct Options {
    attributes: MountAttributes,
    propagation: MountPropagation,
    /// A bind mount: recursive?
    bind: Option<bool>,
    /// Options of the filesystem; an empty value is a flag.
    data: Vec<(String, String)>,
}

impl Options {
    fn read(field: &str, mount: &MountEdit, host: &HostFacts) -> Result<Self> {
        let mut made = Self {
            attributes: MountAttributes::default(),
            propagation: MountPropagation::Private,
            bind: None,
            data: vec![],
        };
        let attributes = &mut made.attributes;
        for option in &mount.options {
            match option.as_str() {
                "ro" => attributes.readonly = true,
                "rro" if host.kernel_at_least(5, 12) => {
                    attributes.readonly = true;
                    attributes.recursive_readonly = true;
                }
                "rw" => attributes.readonly = false,
                "nosuid" => attributes.nosuid = true,
                "nodev" => attributes.nodev = true,
                "noexec" => attributes.noexec = true,
                "noatime" => attributes.noatime = true,
                "relatime" => attributes.relatime = true,
                "suid" => attributes.nosuid = false,
                "dev" => attributes.nodev = false,
                "exec" => attributes.noexec = false,
                "" | "defaults" | "atime" => {}
                "bind" => made.bind = Some(false),
                "rbind" => made.bind = Some(true),
                "private" | "rprivate" => made.propagation = MountPropagation::Private,
                "slave" | "rslave" => made.propagation = MountPropagation::Slave,
                "shared" | "rshared" => made.propagation = MountPropagation::Shared,
                other if other.contains('\0') || other.starts_with('=') => {
                    let mend = "use options of mount(8)";
                    return Err(SpecError::invalid(field, other, "is no option", mend));
                }
                other => {
                    let (key, value) = other.split_once('=').unwrap_or((other, ""));
                    made.data.push((key.to_owned(), value.to_owned()));
                }
            }
        }
        Ok(made)
    }
}

fn device_of(
    plan: &mut Plan,
    rules: &mut Vec<DeviceRule>,
    edits: &Edits,
    device: &DeviceEdit,
) -> Result<()> {
    let field = format!("devices[{}]", device.path);
    let path = clean(&device.path);
    if !device.path.starts_with('/') || device.path.contains('\0') || path == "/" {
        let problem = "is not the absolute path of a device";
        let mend = "use an absolute path";
        return Err(invalid(edits, &field, &device.path, problem, mend));
    }
    plan.devices.retain(|known| known.path != path);
    if device.remove {
        return Ok(());
    }
    let block = match &*device.kind {
        "b" => true,
        "c" | "u" => false,
        other => {
            let mend = "use b or c";
            let problem = "is no type of device that berth makes";
            return Err(invalid(edits, &field, other, problem, mend));
        }
    };
    let user = match &plan.process.user.user {
        UserName::Id(id) => *id,
        UserName::Name(_) => 0,
    };
    let group = match &plan.process.user.group {
        Some(UserName::Id(id)) => *id,
        _ => 0,
    };
    let host_path = match &*device.host_path {
        "" => &path,
        given => given,
    };
    plan.devices.push(DeviceNode {
        host_path: host_path.into(),
        path,
        block,
        major: device.major,
        minor: device.minor,
        mode: device.mode.unwrap_or(0o666) & 0o777,
        uid: device.uid.unwrap_or(user),
        gid: device.gid.unwrap_or(group),
    });
    if !device.access.is_empty() {
        rules.push(rule(
            edits,
            &DeviceAccess {
                allow: true,
                kind: if block { "b" } else { "c" }.to_owned(),
                major: Some(device.major),
                minor: Some(device.minor),
                access: device.access.clone(),
            },
        )?);
    }
    Ok(())
}

fn rule(edits: &Edits, access: &DeviceAccess) -> Result<DeviceRule> {
    let kind = match &*access.kind {
        "" | "a" => DeviceKind::All,
        "b" => DeviceKind::Block,
        "c" | "u" => DeviceKind::Char,
        other => {
            let problem = "is no type of device";
            return Err(invalid(
                edits,
                "resources.devices",
                other,
                problem,
                "use a, b or c",
            ));
        }
    };
    if !access.access.chars().all(|letter| "rwm".contains(letter)) {
        let mend = "use letters of rwm";
        let problem = "is no set of permissions";
        return Err(invalid(
            edits,
            "resources.devices",
            &access.access,
            problem,
            mend,
        ));
    }
    Ok(DeviceRule {
        allow: access.allow,
        kind,
        major: access.major,
        minor: access.minor,
        read: access.access.contains('r'),
        write: access.access.contains('w'),
        mknod: access.access.contains('m'),
    })
}

fn namespace_of(plan: &mut Plan, edits: &Edits, edit: &NamespaceEdit) -> Result<()> {
    let field = format!("namespaces[{}]", edit.kind);
    let source = match edit.path.as_deref() {
        None => NamespaceSource::Host,
        Some("") => NamespaceSource::New,
        Some(path) if path.starts_with('/') && !path.contains('\0') => {
            NamespaceSource::Path(path.into())
        }
        Some(path) => {
            let mend = "give an absolute path on the node";
            return Err(invalid(
                edits,
                &field,
                path,
                "is no path of a namespace",
                mend,
            ));
        }
    };
    let place = match &*edit.kind {
        "network" => &mut plan.namespaces.network,
        "ipc" => &mut plan.namespaces.ipc,
        "uts" => &mut plan.namespaces.uts,
        "pid" => &mut plan.namespaces.pid,
        "cgroup" => &mut plan.namespaces.cgroup,
        "mount" if source == NamespaceSource::New => return Ok(()),
        other => {
            let mend = "adjust network, ipc, uts, pid or cgroup";
            let field = format!("{}: {field}", edits.by);
            return Err(SpecError::unimplemented(field, other, mend));
        }
    };
    *place = source;
    Ok(())
}

/// Network devices to move into the pod's network namespace.
///
/// # Errors
/// [`SpecError::Invalid`]: no name of a device, the same name twice, or a container without the pod's own network.
pub(crate) fn net_devices(network: &NamespaceSource, all: &[Edits]) -> Result<Vec<NetDevice>> {
    // dev_valid_name() of the kernel.
    let fits = |name: &str| {
        let odd = |byte: u8| byte.is_ascii_whitespace() || matches!(byte, b'/' | b':' | 0);
        (1..16).contains(&name.len()) && !matches!(name, "." | "..") && !name.bytes().any(odd)
    };
    let mut made: Vec<NetDevice> = vec![];
    for edits in all {
        for device in &edits.net_devices {
            made.retain(|known| known.host != device.host);
            if device.name.is_empty() {
                continue;
            }
            let field = format!("netDevices[{}]", device.host);
            let (problem, mend) = if !fits(&device.host) || !fits(&device.name) {
                ("is no name of a network device", "use 1 to 15 bytes")
            } else if made.iter().any(|known| known.name == device.name) {
                ("is the name of another one in the pod", "give another name")
            } else if *network != NamespaceSource::Pod {
                let problem = "cannot be moved: the container has not the pod's own network";
                (problem, "leave it out")
            } else {
                made.push(device.clone());
                continue;
            };
            return Err(invalid(edits, &field, &device.name, problem, mend));
        }
    }
    Ok(made)
}

fn sysctl(plan: &mut Plan, edits: &Edits, key: &str, value: Option<&str>) -> Result<()> {
    let field = format!("{}: sysctl[{key:?}]", edits.by);
    // One joined by its path may be the node's, and is not the container's to change.
    let host = |source: &NamespaceSource| {
        matches!(source, NamespaceSource::Host | NamespaceSource::Path(_))
    };
    let node = namespaces::OfNode {
        network: host(&plan.namespaces.network),
        ipc: host(&plan.namespaces.ipc),
        uts: host(&plan.namespaces.uts),
    };
    let key = namespaces::check_sysctl(&field, key, value.unwrap_or_default(), node)?;
    plan.sysctls.retain(|(known, _)| *known != key);
    if let Some(value) = value {
        plan.sysctls.push((key, value.to_owned()));
    }
    Ok(())
}

fn tune(plan: &mut Plan, edits: &Edits) -> Result<()> {
    let tuning = &mut plan.process.tuning;
    if let Some((class, level)) = edits.io_priority {
        if class > 3 || level > 7 {
            let value = format!("class {class}, priority {level}");
            let mend = "use class 0 to 3 and priority 0 to 7";
            return Err(invalid(edits, "ioPriority", value, "is out of range", mend));
        }
        tuning.io_priority = Some((class, level));
    }
    if let Some(wanted) = edits.scheduler {
        if !(-20..=19).contains(&wanted.nice) {
            let mend = "use -20 to 19";
            return Err(invalid(
                edits,
                "scheduler.nice",
                wanted.nice,
                "is out of range",
                mend,
            ));
        }
        tuning.scheduler = Some(SchedulerPlan {
            policy: wanted.policy,
            nice: wanted.nice,
            priority: wanted.priority,
            flags: wanted.flags,
            runtime: wanted.runtime,
            deadline: wanted.deadline,
            period: wanted.period,
        });
    }
    if let Some(policy) = &edits.memory_policy {
        tuning.memory_policy = Some(memory_policy(edits, policy)?);
    }
    Ok(())
}

fn memory_policy(edits: &Edits, policy: &MemoryPolicy) -> Result<MemoryPolicyPlan> {
    const MAX_NODE: usize = 1023;
    if policy.mode > 6 {
        let field = "memoryPolicy.mode";
        return Err(invalid(edits, field, policy.mode, "is unknown", MODES));
    }
    let bad = || {
        let mend = "write it as in 0-1,3, up to 1023";
        invalid(
            edits,
            "memoryPolicy.nodes",
            &policy.nodes,
            "is no list of nodes",
            mend,
        )
    };
    let mut nodes = vec![];
    for part in policy.nodes.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first <= last && last <= MAX_NODE => (first, last),
            _ => return Err(bad()),
        };
        for node in first..=last {
            if nodes.len() <= node / 64 {
                nodes.resize(node / 64 + 1, 0_u64);
            }
            nodes[node / 64] |= 1 << (node % 64);
        }
    }
    Ok(MemoryPolicyPlan {
        mode: policy.mode | policy.flags,
        nodes,
    })
}

/// Checks that the sources of bind mounts are there. Blocks on their filesystems.
///
/// # Errors
/// [`SpecError::Host`] names who asks and the path.
pub(crate) fn check_sources(all: &[Edits]) -> Result<()> {
    for edits in all {
        for mount in edits.mounts.iter().filter(|mount| !mount.remove) {
            let bind = matches!(&*mount.kind, "" | "bind" | "none")
                || mount.options.iter().any(|o| o == "bind" || o == "rbind");
            let path = Path::new(&mount.source);
            if bind && let Err(error) = std::fs::metadata(path) {
                let field = format!("{}: mounts[{}]", edits.by, mount.destination);
                return Err(SpecError::host(field, "find", path, error));
            }
        }
    }
    Ok(())
}

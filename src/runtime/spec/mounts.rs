//! Mounts of a container: the runtime's own, the pod's files, CRI's volumes, the image's volumes.
//!
//! The order is by depth of the target (a stable sort), so that nothing is hidden by a mount above it. A
//! CRI mount replaces the runtime's own mount at the same path. Over one at `/dev` lie the pod's own `shm`, `mqueue` and `pts`
//! where it has these directories: those of the node are other pods' too, and its administrators' terminals.

use std::path::{Path, PathBuf};

use crate::base::container::{Mount, Propagation};
use crate::base::pod::PodConfig;
use crate::base::security::NamespaceMode;
use crate::runtime::plan::{CgroupJoin, MountAttributes, MountPlan, MountPropagation, MountSource};
use crate::runtime::spec::ContainerInput;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::{CgroupHost, HostFacts};
use crate::runtime::spec::userns::{is_mapped, plan_mappings};

/// Files of procfs that a volume may cover (lxcfs does that); all else below `/proc` is refused.
const PROC_FILES: [&str; 9] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
];
/// Group of terminals, as a number and as an option.
const TTY_GROUP: (u32, &str) = (5, "5");
const ABSOLUTE: &str = "use an absolute path";

/// An absolute path without `.`, `..`, double and trailing slashes; text only.
pub(crate) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            _ => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Is `path` this directory or below it? Both cleaned.
pub(crate) fn is_below(path: &str, directory: &str) -> bool {
    path.strip_prefix(directory)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// How many levels a cleaned path has.
pub(crate) fn depth(path: &str) -> usize {
    path.bytes().filter(|byte| *byte == b'/').count()
}

/// All mounts in order, the propagation of the root, and the image's volumes.
#[derive(Debug)]
pub(crate) struct Mounts {
    /// In order.
    pub(crate) mounts: Vec<MountPlan>,
    /// Propagation of the root.
    pub(crate) root_propagation: MountPropagation,
    /// (host directory, path in the container).
    pub(crate) declared_volumes: Vec<(PathBuf, String)>,
    /// `/dev` is the runtime's own tmpfs, not a volume.
    pub(crate) own_dev: bool,
}

/// Makes the mounts of a container.
///
/// # Errors
/// [`SpecError`]: a mount is malformed, or asks for what is not built or not offered here.
pub(crate) fn of_container(input: &ContainerInput<'_>, host: &HostFacts) -> Result<Mounts> {
    let mut given = vec![];
    for (index, mount) in input.config.mounts.iter().enumerate() {
        given.push(volume(input, index, mount, host)?);
    }
    let own_dev = given.iter().all(|mount| mount.target != "/dev");
    let has_place = |target: &str| {
        let name = target.strip_prefix("/dev/");
        own_dev || name.is_none_or(|name| input.prepared.below_dev.contains(&name))
    };
    let replaced = |target: &str| {
        given.iter().any(|mount| {
            mount.target == target || (is_shared(&mount.source) && is_below(target, &mount.target))
        }) || !has_place(target)
    };
    let mut mounts: Vec<MountPlan> = own(input, host)
        .into_iter()
        .filter(|mount| !replaced(&mount.target))
        .collect();
    let declared_volumes = declared(input, &given)?;
    let root_propagation = propagation_of_root(&input.config.mounts);
    mounts.append(&mut given);
    mounts.sort_by_key(|mount| depth(&mount.target));
    Ok(Mounts {
        mounts,
        root_propagation,
        declared_volumes,
        own_dev,
    })
}

/// Refuses to hide, or to make read-only, what a volume shares with the node: that would happen there, too. `mounts` by depth.
///
/// # Errors
/// [`SpecError::Invalid`] names the path.
pub(crate) fn check_hidden(mounts: &[MountPlan], field: &str, paths: &[String]) -> Result<()> {
    for path in paths {
        let mut above = mounts.iter().rev();
        let above = above.find(|mount| is_below(&clean(path), &mount.target));
        if let Some(volume) = above.filter(|volume| is_shared(&volume.source)) {
            let field = format!("security_context.{field}");
            let problem = format!("is in the BIDIRECTIONAL volume at {}", volume.target);
            let mend = "leave it out, or use another propagation: what covers it would be on the node, too";
            return Err(SpecError::invalid(field, path, problem, mend));
        }
    }
    Ok(())
}

/// What is mounted below would be mounted on the node, too.
fn is_shared(source: &MountSource) -> bool {
    let shared = MountPropagation::Shared;
    matches!(source, MountSource::Bind { propagation, .. } if *propagation == shared)
}

fn propagation_of_root(mounts: &[Mount]) -> MountPropagation {
    let any = |wanted| mounts.iter().any(|mount| mount.propagation == wanted);
    if any(Propagation::Bidirectional) {
        MountPropagation::Shared
    } else if any(Propagation::HostToContainer) {
        MountPropagation::Slave
    } else {
        MountPropagation::Private
    }
}

fn filesystem(
    target: &str,
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttributes,
) -> MountPlan {
    MountPlan {
        target: target.to_owned(),
        source: MountSource::Filesystem {
            kind: kind.to_owned(),
            options: options
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
        },
        attributes,
    }
}

fn bind(target: &str, path: PathBuf, attributes: MountAttributes) -> MountPlan {
    MountPlan {
        target: target.to_owned(),
        source: MountSource::Bind {
            path,
            recursive: true,
            propagation: MountPropagation::Private,
            uid_mappings: vec![],
            gid_mappings: vec![],
        },
        attributes,
    }
}

/// The runtime's own mounts, and the pod's files.
fn own(input: &ContainerInput<'_>, host: &HostFacts) -> Vec<MountPlan> {
    let writable = input.config.security.privileged;
    let nosuid = MountAttributes {
        nosuid: true,
        ..MountAttributes::default()
    };
    let nosuid_noexec = MountAttributes {
        noexec: true,
        ..nosuid
    };
    let strict = MountAttributes {
        nodev: true,
        ..nosuid_noexec
    };
    let system = MountAttributes {
        readonly: !writable,
        ..strict
    };
    let dev = [("mode", "755"), ("size", "65536k")];
    let mut pts = vec![("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620")];
    let user = input.pod.security.namespaces.own_user();
    let few = user.is_some_and(|user| !is_mapped(TTY_GROUP.0, &plan_mappings(&user.gids)));
    if !few {
        pts.push(("gid", TTY_GROUP.1));
    }
    let shm = match input.pod.security.namespaces.ipc {
        NamespaceMode::Node => bind("/dev/shm", "/dev/shm".into(), strict),
        _ => MountPlan {
            target: "/dev/shm".to_owned(),
            source: MountSource::PodShm,
            attributes: strict,
        },
    };
    let mut mounts = vec![
        filesystem("/proc", "proc", &[], strict),
        filesystem("/dev", "tmpfs", &dev, nosuid),
        filesystem("/dev/pts", "devpts", &pts, nosuid_noexec),
        filesystem("/dev/mqueue", "mqueue", &[], strict),
        shm,
        sysfs(input, system),
        cgroup(input, host, system),
    ];
    let file = MountAttributes {
        readonly: input.config.security.readonly_rootfs,
        ..MountAttributes::default()
    };
    for name in ["hosts", "hostname", "resolv.conf"] {
        let path = input.pod_directory.join(name);
        mounts.push(bind(&format!("/etc/{name}"), path, file));
    }
    mounts
}

/// Of pause: `/proc` of the pod's PID namespace, for the containers that come to live there (`runtime::init::procfs`).
pub(super) fn of_sandbox(pod: &PodConfig) -> Vec<MountPlan> {
    if pod.security.namespaces.pid != NamespaceMode::Pod {
        return vec![];
    }
    let strict = MountAttributes {
        nosuid: true,
        nodev: true,
        noexec: true,
        ..MountAttributes::default()
    };
    vec![filesystem("/proc", "proc", &[], strict)]
}

/// `/sys`. It shows a network namespace, so that the node's is out of reach of a user namespace: that of the node is bound,
/// alone, without what is mounted below.
fn sysfs(input: &ContainerInput<'_>, attributes: MountAttributes) -> MountPlan {
    let namespaces = &input.pod.security.namespaces;
    if namespaces.network != NamespaceMode::Node || namespaces.own_user().is_none() {
        return filesystem("/sys", "sysfs", &[], attributes);
    }
    let mut bound = bind("/sys", "/sys".into(), attributes);
    if let MountSource::Bind { recursive, .. } = &mut bound.source {
        *recursive = false;
    }
    bound
}

fn cgroup(input: &ContainerInput<'_>, host: &HostFacts, attributes: MountAttributes) -> MountPlan {
    let attributes = MountAttributes {
        relatime: true,
        readonly: attributes.readonly && !input.handler.cgroup_writable,
        ..attributes
    };
    let (CgroupHost::V1(hierarchies), CgroupJoin::V1(joined)) = (&host.cgroup, &input.cgroup_join)
    else {
        return filesystem("/sys/fs/cgroup", "cgroup2", &[], attributes);
    };
    let mut bound = vec![];
    for directory in joined {
        let hierarchy = hierarchies
            .iter()
            .find(|(mountpoint, _)| directory.starts_with(mountpoint));
        if let Some((_, name)) = hierarchy {
            bound.push((directory.clone(), name.clone()));
        }
    }
    MountPlan {
        target: "/sys/fs/cgroup".to_owned(),
        source: MountSource::CgroupV1(bound),
        attributes,
    }
}

/// Checks mounts as far as that needs no image.
///
/// # Errors
/// As [`of_container`].
pub(crate) fn check(mounts: &[Mount], host: &HostFacts) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        checked(index, mount, host)?;
        if mount.image.is_none() {
            host_source(&format!("mounts[{index}].host_path"), mount)?;
        }
    }
    Ok(())
}

/// Target and attributes of one CRI mount.
fn checked(index: usize, mount: &Mount, host: &HostFacts) -> Result<(String, MountAttributes)> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let target = target(&field("container_path"), mount)?;
    let mut attributes = options(&field("mount_options"), &mount.mount_options)?;
    check_mappings(&field("uidMappings"), mount, host)?;
    attributes.readonly = mount.readonly;
    if mount.recursive_read_only {
        recursive(&field("recursive_read_only"), mount, host)?;
        attributes.recursive_readonly = true;
    }
    Ok((target, attributes))
}

/// Ids of a mount are mapped for users and groups, or not at all.
fn check_mappings(field: &str, mount: &Mount, host: &HostFacts) -> Result<()> {
    let given = (mount.uid_mappings.is_empty(), mount.gid_mappings.is_empty());
    let value = format!(
        "{} of users, {} of groups",
        mount.uid_mappings.len(),
        mount.gid_mappings.len()
    );
    match given {
        (true, true) => Ok(()),
        (false, false) if host.kernel_at_least(5, 12) => Ok(()),
        (false, false) => {
            let problem = "cannot be mapped by this kernel, which is older than 5.12";
            let mend = "use the node's user namespace (hostUsers: true)";
            Err(SpecError::precondition(field, value, problem, mend))
        }
        _ => {
            let problem = "are half of what a mount needs";
            let mend = "give both uidMappings and gidMappings, or neither";
            Err(SpecError::invalid(field, value, problem, mend))
        }
    }
}

/// One CRI mount.
fn volume(
    input: &ContainerInput<'_>,
    index: usize,
    mount: &Mount,
    host: &HostFacts,
) -> Result<MountPlan> {
    let (target, mut attributes) = checked(index, mount, host)?;
    let own_user = input.pod.security.namespaces.own_user();
    if own_user.is_some() && mount.propagation == Propagation::Bidirectional {
        let field = format!("mounts[{index}].propagation");
        let problem = "would let a user namespace mount on the node";
        let mend = "use HOST_TO_CONTAINER, or the node's user namespace (hostUsers: true)";
        return Err(SpecError::invalid(field, "BIDIRECTIONAL", problem, mend));
    }
    let source = match &mount.image {
        Some(_) => image_volume(input, index, mount, &mut attributes)?,
        None => host_source(&format!("mounts[{index}].host_path"), mount)?,
    };
    Ok(MountPlan {
        target,
        source,
        attributes,
    })
}

/// Where a CRI mount goes.
///
/// # Errors
/// [`SpecError::Invalid`]: not an absolute path, the root, or a part of procfs.
pub(crate) fn target(field: &str, mount: &Mount) -> Result<String> {
    let path = mount.container_path.as_str();
    let invalid = |problem: &str, mend| Err(SpecError::invalid(field, path, problem, mend));
    if !path.starts_with('/') {
        return invalid("is not an absolute path", ABSOLUTE);
    }
    if path.contains('\0') {
        return invalid("contains a NUL byte", ABSOLUTE);
    }
    let target = clean(path);
    if target == "/" {
        return invalid("is the root of the container", "mount on a path below it");
    }
    let procfs_itself = target == "/proc" && clean(&mount.host_path) == "/proc";
    if is_below(&target, "/proc") && !procfs_itself && !PROC_FILES.contains(&target.as_str()) {
        return invalid("would replace a part of procfs", "mount outside /proc");
    }
    Ok(target)
}

fn host_source(field: &str, mount: &Mount) -> Result<MountSource> {
    let path = mount.host_path.as_str();
    if !path.starts_with('/') || path.contains('\0') {
        return Err(SpecError::invalid(
            field,
            path,
            "is not an absolute path",
            ABSOLUTE,
        ));
    }
    if !mount.image_sub_path.is_empty() {
        let problem = "is given for a mount without an image";
        let mend = "remove it, or name the image";
        return Err(SpecError::invalid(
            field.replace("host_path", "image_sub_path"),
            &mount.image_sub_path,
            problem,
            mend,
        ));
    }
    Ok(MountSource::Bind {
        path: clean(path).into(),
        recursive: true,
        propagation: match mount.propagation {
            Propagation::Private => MountPropagation::Private,
            Propagation::HostToContainer => MountPropagation::Slave,
            Propagation::Bidirectional => MountPropagation::Shared,
        },
        uid_mappings: plan_mappings(&mount.uid_mappings),
        gid_mappings: plan_mappings(&mount.gid_mappings),
    })
}

fn image_volume(
    input: &ContainerInput<'_>,
    index: usize,
    mount: &Mount,
    attributes: &mut MountAttributes,
) -> Result<MountSource> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    if !mount.host_path.is_empty() {
        let problem = "is given beside an image";
        let mend = "give only one of them";
        return Err(SpecError::invalid(
            field("host_path"),
            &mount.host_path,
            problem,
            mend,
        ));
    }
    let found = input.image_volumes.iter().find(|(of, _)| *of == index);
    let Some((_, layers)) = found else {
        let name = mount.image.as_ref().map_or("", |image| &image.image);
        let (problem, mend) = ("is not on this node", "pull it first");
        return Err(SpecError::precondition(field("image"), name, problem, mend));
    };
    if !mount.readonly {
        let mend = "set readonly: image volumes cannot be written";
        return Err(SpecError::invalid(
            field("readonly"),
            false,
            "is not possible",
            mend,
        ));
    }
    attributes.readonly = true;
    let mut lower = layers.lower.clone();
    if let ([_], false) = (&lower[..], input.prepared.labels.mount.is_empty()) {
        // A label needs an overlay, and that needs two layers.
        lower.push(input.empty_layer.to_owned());
    }
    Ok(MountSource::Image {
        lower,
        sub_path: mount.image_sub_path.clone(),
    })
}

fn recursive(field: &str, mount: &Mount, host: &HostFacts) -> Result<()> {
    let invalid = |problem: &str, mend| Err(SpecError::invalid(field, true, problem, mend));
    if !mount.readonly {
        return invalid("needs readonly", "set readonly too");
    }
    if mount.propagation != Propagation::Private {
        return invalid(
            "needs private propagation",
            "set propagation to PROPAGATION_PRIVATE",
        );
    }
    if !host.kernel_at_least(5, 12) {
        return Err(SpecError::RroUnsupported {
            field: field.to_owned(),
            problem: format!(
                "Linux {}.{} is older than 5.12",
                host.kernel.0, host.kernel.1
            ),
        });
    }
    Ok(())
}

/// Extra options of a mount (API 0.37).
fn options(field: &str, options: &[String]) -> Result<MountAttributes> {
    let mut attributes = MountAttributes::default();
    let has = |wanted: &str| options.iter().any(|option| option == wanted);
    for (flag, opposite) in [
        ("noexec", "exec"),
        ("nosuid", "suid"),
        ("nodev", "dev"),
        ("noatime", "relatime"),
    ] {
        if has(flag) && has(opposite) {
            let problem = "contradict each other";
            let value = format!("{flag},{opposite}");
            return Err(SpecError::invalid(
                field,
                value,
                problem,
                "give only one of them",
            ));
        }
    }
    for option in options {
        match option.as_str() {
            "noexec" => attributes.noexec = true,
            "nosuid" => attributes.nosuid = true,
            "nodev" => attributes.nodev = true,
            "noatime" => attributes.noatime = true,
            "relatime" => attributes.relatime = true,
            "exec" | "suid" | "dev" => {}
            _ => {
                let mend = "use noexec, nosuid, nodev, noatime or relatime";
                return Err(SpecError::invalid(field, option, "is not known", mend));
            }
        }
    }
    Ok(attributes)
}

/// Volumes that the image declares. A CRI mount at or above the path wins, and so do the runtime's own
/// filesystems: what an image says never replaces `/proc`, `/sys` or `/dev`.
fn declared(input: &ContainerInput<'_>, given: &[MountPlan]) -> Result<Vec<(PathBuf, String)>> {
    const FIELD: &str = "image config Volumes";
    let mut paths = vec![];
    for path in &input.image.config.volumes {
        if path.contains('\0') {
            let mend = "repair the image";
            return Err(SpecError::invalid(FIELD, path, "contains a NUL byte", mend));
        }
        let path = clean(path);
        if path == "/" {
            let mend = "repair the image";
            return Err(SpecError::invalid(
                FIELD,
                path,
                "is the root of the container",
                mend,
            ));
        }
        let covered = given.iter().any(|mount| is_below(&path, &mount.target));
        let system = ["/proc", "/sys", "/dev"];
        if !covered && !system.iter().any(|root| is_below(&path, root)) {
            paths.push(path);
        }
    }
    paths.sort_by(|a, b| (depth(a), a).cmp(&(depth(b), b)));
    paths.dedup();
    Ok(paths
        .into_iter()
        .enumerate()
        .map(|(number, path)| {
            (
                Path::new(input.volumes_directory).join(number.to_string()),
                path,
            )
        })
        .collect())
}

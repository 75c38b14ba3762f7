//! Mounts below the root. What comes from the host is copied (`open_tree`) while the host's paths are in sight and before
//! its propagation is cut; everything is attached by descriptor after the pivot.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::plan::{
    Context, Fault, IdMappings, MountAttributes, MountPlan, MountPropagation, MountSource,
    NamespaceSource, Plan,
};
use crate::runtime::userns;
use crate::sys::file::{self, FileType, Make, Mode, OFlags, PROC_SUPER_MAGIC};
use crate::sys::mount::{self, Change, Filesystem, attribute, propagation};

use super::rootfs::{attach_at_top, make_readonly, overlay, set_context, tmpfs};
use super::{ProcFs, Step, copy, node_cgroups};

const STAGE: &str = "mount";
/// The first word is what kubelet knows (cri-api, `ErrImageVolumeMountFailed`).
const IMAGE: &str = Fault::IMAGE_VOLUME;
/// What lxcfs and the like put over files of procfs; nothing else goes there.
const OVER_PROC: [&str; 9] = [
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

/// Detached mounts from the host, waiting for their place.
pub(super) struct Host {
    /// For each mount of the plan: what will be attached, where the host has it.
    sources: Vec<Source>,
    /// For each declared volume: its empty directory on the host.
    volumes: Vec<Option<OwnedFd>>,
    /// In a user namespace, where none can be made: a copy of each device of the plan.
    pub(super) devices: Option<Vec<OwnedFd>>,
    /// Where others live in the PID namespace: a procfs of that for each of the plan.
    pub(super) proc: Vec<OwnedFd>,
}

enum Source {
    /// Made at its turn.
    Later,
    /// A copy of a tree, an image's overlay, procfs or sysfs, or the node's cgroup2.
    Tree(OwnedFd),
    /// One tree for each v1 hierarchy.
    Hierarchies(Vec<OwnedFd>),
}

impl Host {
    /// Copies all that is bound, still in its peer groups, and maps the ids of what is to be mapped. `user`: the user
    /// namespace that the process will be in, if it is not the node's.
    pub(super) fn gather(
        plan: &Plan,
        mut shm: Option<OwnedFd>,
        user: Option<BorrowedFd<'_>>,
    ) -> Result<Self, Fault> {
        let mut sources = Vec::with_capacity(plan.mounts.len());
        for mount in &plan.mounts {
            sources.push(match &mount.source {
                source @ MountSource::Bind { .. } => Source::Tree(bound(plan, source, user)?),
                MountSource::PodShm => {
                    let taken = || Fault::check(STAGE, "pod /dev/shm", "mounted twice");
                    Source::Tree(shm.take().ok_or_else(taken)?)
                }
                MountSource::CgroupV1(list) => {
                    let trees = list.iter().map(|(path, _)| tree(path, false));
                    Source::Hierarchies(trees.collect::<Result<_, _>>()?)
                }
                MountSource::Filesystem { kind, .. } if kind == "cgroup2" => {
                    let of_node = node_cgroups::copy_if_seen(&plan.namespaces)?;
                    of_node.map_or(Source::Later, Source::Tree)
                }
                MountSource::Filesystem { .. } | MountSource::Image { .. } => Source::Later,
            });
        }
        let volumes = plan.declared_volumes.iter();
        let volumes = volumes.map(|(path, _)| tree(path, false).map(Some));
        Ok(Self {
            sources,
            volumes: volumes.collect::<Result<_, _>>()?,
            devices: user.map(|_| super::devices::copies(plan)).transpose()?,
            proc: Vec::new(),
        })
    }

    /// Mounts procfs and sysfs, attached nowhere, while those of the node are in sight.
    pub(super) fn mount_kernel_filesystems(&mut self, plan: &Plan) -> Step {
        let mut others = std::mem::take(&mut self.proc).into_iter().peekable();
        for (mount, source) in plan.mounts.iter().zip(&mut self.sources) {
            if let MountSource::Filesystem { kind, options } = &mount.source
                && matches!(kind.as_str(), "proc" | "sysfs")
            {
                *source = Source::Tree(match others.next_if(|_| kind == "proc") {
                    Some(proc) => dressed_procfs(mount, options, proc)?,
                    None => new_filesystem(mount, kind, options, "")?,
                });
            }
        }
        Ok(())
    }

    /// Mounts image volumes; everything is private by now, so that they may be attached for a moment.
    pub(super) fn gather_images(&mut self, plan: &Plan) -> Step {
        for (mount, source) in plan.mounts.iter().zip(&mut self.sources) {
            if let MountSource::Image { lower, sub_path } = &mount.source {
                *source = Source::Tree(image(lower, sub_path, &plan.mount_label)?);
            }
        }
        Ok(())
    }
}

/// A copy of what a bind mount of the plan shows, still in its peer groups, its ids mapped where the plan says so. `user`: the
/// pod's user namespace, if it is not the node's.
pub(super) fn bound(
    plan: &Plan,
    source: &MountSource,
    user: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, Fault> {
    let MountSource::Bind {
        path,
        recursive,
        propagation,
        uid_mappings,
        gid_mappings,
    } = source
    else {
        return Err(Fault::check(STAGE, "bind", "no bind mount"));
    };
    check_propagation(path, *propagation)?;
    let tree = tree(path, *recursive)?;
    if !uid_mappings.is_empty() {
        let of_pod = &plan.namespaces;
        let same = (uid_mappings, gid_mappings) == (&of_pod.uid_mappings, &of_pod.gid_mappings);
        let user = user.filter(|_| same);
        map_ids(tree.as_fd(), user, (uid_mappings, gid_mappings), path)?;
    }
    Ok(tree)
}

pub(super) fn tree(path: &Path, recursive: bool) -> Result<OwnedFd, Fault> {
    mount::copy_tree(file::CWD, path, recursive).context(STAGE, "open_tree", path.display())
}

/// `BIDIRECTIONAL` needs a shared source, `HOST_TO_CONTAINER` one that is shared or a slave.
fn check_propagation(path: &Path, wanted: MountPropagation) -> Step {
    if wanted == MountPropagation::Private {
        return Ok(());
    }
    let (shared, slave) =
        mount::propagation_of(path).context(STAGE, "mountinfo", path.display())?;
    let fits = shared || (slave && wanted == MountPropagation::Slave);
    let need = match wanted {
        MountPropagation::Shared => "a shared mount",
        _ => "a shared or slave mount",
    };
    if fits {
        Ok(())
    } else {
        let what = format_args!("{} is not on {need}", path.display()).to_string();
        Err(Fault::check(STAGE, "propagation:", what))
    }
}

/// Layers of an image as a mount, or a directory inside: its links lead nowhere else. `label` as for [`overlay`].
pub(super) fn image(
    lower: &[std::path::PathBuf],
    sub_path: &str,
    label: &str,
) -> Result<OwnedFd, Fault> {
    let whole = overlay(lower, None, false, label)?;
    if sub_path.is_empty() {
        return Ok(whole);
    }
    attach_at_top(whole.as_fd())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let part = file::open_in(whole.as_fd(), Path::new(sub_path), flags, Mode::empty());
    let part = part.context(IMAGE, "openat2", sub_path)?;
    let copy = mount::copy_tree(part.as_fd(), Path::new(mount::SELF), false).context(
        IMAGE,
        "open_tree",
        sub_path,
    )?;
    make_readonly(copy.as_fd(), false)?;
    // Nothing may be left over the root: in a mount namespace made of this one it could not be taken away.
    mount::detach(whole.as_fd()).context(IMAGE, "umount2", "/")?;
    Ok(copy)
}

/// Attaches everything in order. A declared volume comes before the first mount below it, else last.
pub(super) fn attach_all(plan: &Plan, host: &mut Host, root: BorrowedFd<'_>) -> Step {
    let sources = std::mem::take(&mut host.sources);
    // The queues of an IPC namespace that is not the pod's are not the pod's to label.
    let queues = match plan.namespaces.ipc {
        NamespaceSource::New | NamespaceSource::Pod => &plan.mount_label,
        _ => "",
    };
    for (mount, source) in plan.mounts.iter().zip(sources) {
        for (number, (_, path)) in plan.declared_volumes.iter().enumerate() {
            if Path::new(&mount.target).starts_with(path) && mount.target != *path {
                attach_volume(host, number, path, root)?;
            }
        }
        let label = match &mount.source {
            MountSource::Filesystem { kind, .. } if kind == "mqueue" => queues,
            _ => &plan.mount_label,
        };
        attach(mount, source, root, label)?;
    }
    for (number, (_, path)) in plan.declared_volumes.iter().enumerate() {
        attach_volume(host, number, path, root)?;
    }
    Ok(())
}

fn attach_volume(host: &mut Host, number: usize, path: &str, root: BorrowedFd<'_>) -> Step {
    let Some(volume) = host.volumes.get_mut(number).and_then(Option::take) else {
        return Ok(());
    };
    let target = make(root, path, Make::Directory)?;
    refuse_special(&target, path, root)?;
    copy::directory(target.as_fd(), volume.as_fd(), path)?;
    mount::attach(volume.as_fd(), target.as_fd()).context("volume", "move_mount", path)?;
    set_propagation(volume.as_fd(), MountPropagation::Private, path)
}

fn attach(plan: &MountPlan, source: Source, root: BorrowedFd<'_>, label: &str) -> Step {
    let path = &plan.target;
    match (&plan.source, source) {
        (MountSource::Filesystem { kind, .. }, Source::Tree(tree)) if kind == "cgroup2" => {
            let target = plain_directory(root, path)?;
            refuse_special(&target, path, root)?;
            bind(plan, tree.as_fd(), target.as_fd())
        }
        (MountSource::Filesystem { kind, options }, made) => {
            let mounted = match made {
                Source::Tree(mounted) => mounted,
                _ => new_filesystem(plan, kind, options, label)?,
            };
            place_filesystem(mounted.as_fd(), kind, path, root)
        }
        (MountSource::CgroupV1(list), Source::Hierarchies(trees)) => {
            let names = list.iter().map(|(_, name)| name.as_str());
            hierarchies(plan, names.zip(trees), root, label)
        }
        (_, Source::Tree(tree)) => {
            let status = file::fstat(&tree).context(STAGE, "fstat", path)?;
            let directory = FileType::from_raw_mode(status.st_mode) == FileType::Directory;
            let kind = if directory {
                Make::Directory
            } else {
                Make::File
            };
            let target = make(root, path, kind)?;
            same_kind(&target, directory, path)?;
            refuse_special_for(&target, path, root, tree.as_fd())?;
            bind(plan, tree.as_fd(), target.as_fd())
        }
        _ => Err(Fault::check(
            STAGE,
            "source",
            format_args!("of {path} is missing"),
        )),
    }
}

fn same_kind(target: &OwnedFd, directory: bool, path: &str) -> Step {
    let status = file::fstat(target).context(STAGE, "fstat", path)?;
    if (FileType::from_raw_mode(status.st_mode) == FileType::Directory) == directory {
        return Ok(());
    }
    let (here, there) = if directory {
        ("no directory", "a directory")
    } else {
        ("a directory", "none")
    };
    let what = format_args!("{path} is {here} in the container, its source is {there}").to_string();
    Err(Fault::check(STAGE, "check", what))
}

fn make(root: BorrowedFd<'_>, path: &str, kind: Make) -> Result<OwnedFd, Fault> {
    file::make_in(root, Path::new(path), kind).context(STAGE, "make mount point", path)
}

fn is_procfs(fd: BorrowedFd<'_>) -> Result<bool, Fault> {
    let kind = file::fstatfs(fd)
        .context(STAGE, "fstatfs", "mount point")?
        .f_type;
    Ok(u64::try_from(kind) == Ok(PROC_SUPER_MAGIC))
}

fn refuse_special(target: &OwnedFd, path: &str, root: BorrowedFd<'_>) -> Step {
    let (here, top) = (
        file::fstat(target).context(STAGE, "fstat", path)?,
        file::fstat(root).context(STAGE, "fstat", "/")?,
    );
    if (here.st_dev, here.st_ino) == (top.st_dev, top.st_ino) {
        let what = format_args!("{path} is the root of the container: mount elsewhere").to_string();
        return Err(Fault::check(STAGE, "check", what));
    }
    Ok(())
}

/// Nothing goes over the root, and over procfs only a procfs and the few files of lxcfs: who reads `/proc` to learn
/// about itself must not be lied to (CVE-2019-16884 and later).
fn refuse_special_for(
    target: &OwnedFd,
    path: &str,
    root: BorrowedFd<'_>,
    source: BorrowedFd<'_>,
) -> Step {
    refuse_special(target, path, root)?;
    let plain = path.trim_end_matches('/');
    if is_procfs(target.as_fd())? && !OVER_PROC.contains(&plain) && !is_procfs(source)? {
        let what = format_args!("{path} is inside /proc: mount elsewhere").to_string();
        return Err(Fault::check(STAGE, "check", what));
    }
    Ok(())
}

fn attributes_of(wanted: MountAttributes) -> u64 {
    [
        (
            wanted.readonly || wanted.recursive_readonly,
            attribute::READONLY,
        ),
        (wanted.nosuid, attribute::NOSUID),
        (wanted.nodev, attribute::NODEV),
        (wanted.noexec, attribute::NOEXEC),
        (wanted.noatime, attribute::NOATIME),
    ]
    .into_iter()
    .filter_map(|(on, bit)| on.then_some(bit))
    .fold(0, |all, bit| all | bit)
}

fn set_propagation(mount: BorrowedFd<'_>, wanted: MountPropagation, path: &str) -> Step {
    let change = Change {
        propagation: match wanted {
            MountPropagation::Private => propagation::PRIVATE,
            MountPropagation::Slave => propagation::SLAVE,
            MountPropagation::Shared => propagation::SHARED,
        },
        recursive: true,
        ..Change::default()
    };
    mount::change(mount, &change).context(STAGE, "mount_setattr", path)
}

fn bind(plan: &MountPlan, tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Step {
    let path = &plan.target;
    let place = || mount::attach(tree, target).context(STAGE, "move_mount", path);
    if dress(plan, tree).is_ok() {
        return place();
    }
    // Before Linux 5.12 only an attached mount can be changed.
    place()?;
    dress(plan, tree)
}

/// Gives a tree from the host the propagation and the attributes of its mount.
pub(super) fn dress(plan: &MountPlan, tree: BorrowedFd<'_>) -> Step {
    let path = &plan.target;
    let wanted = match plan.source {
        MountSource::Bind { propagation, .. } => propagation,
        _ => MountPropagation::Private,
    };
    set_propagation(tree, wanted, path)?;
    let mut set = attributes_of(plan.attributes);
    if matches!(plan.source, MountSource::Image { .. }) {
        // Layers are shared: never writable, whatever the plan says.
        set |= attribute::READONLY;
    }
    if set != 0 || plan.attributes.relatime {
        let atime = plan.attributes.noatime || plan.attributes.relatime;
        let change = Change {
            set,
            clear: if atime { attribute::ATIME } else { 0 },
            ..Change::default()
        };
        mount::change(tree, &change).context(STAGE, "mount_setattr", path)?;
    }
    if plan.attributes.recursive_readonly {
        make_readonly(tree, true)?;
    }
    Ok(())
}

fn new_filesystem(
    plan: &MountPlan,
    kind: &str,
    options: &[(String, String)],
    label: &str,
) -> Result<OwnedFd, Fault> {
    let filesystem = Filesystem::open(kind).context(STAGE, "fsopen", kind)?;
    // Others are one for the node, or for the IPC namespace, and have the labels of the policy.
    if matches!(kind, "tmpfs" | "devpts") {
        set_context(&filesystem, label)?;
    }
    set_options(&filesystem, kind, options)?;
    let mounted = filesystem
        .mount(attributes_with(plan.attributes, options))
        .map_err(|error| {
            let what = format_args!("{kind} {}", filesystem.explain()).to_string();
            Fault::call(STAGE, "fsmount", what.trim_end(), &error)
        })?;
    if kind == "mqueue" {
        // The containers of a pod share it, so that it takes no context: only its top is labelled.
        set_label(mounted.as_fd(), label)?;
    }
    Ok(mounted)
}

/// Attributes of a mount and those among its options.
fn attributes_with(wanted: MountAttributes, options: &[(String, String)]) -> u64 {
    let of = |(key, _): &(String, String)| attribute_of(key).unwrap_or_default();
    options
        .iter()
        .map(of)
        .fold(attributes_of(wanted), |all, bit| all | bit)
}

/// The attribute that an option is, 0 for those that change nothing; absent: it is one of the filesystem.
fn attribute_of(key: &str) -> Option<u64> {
    match key {
        "nosuid" => Some(attribute::NOSUID),
        "nodev" => Some(attribute::NODEV),
        "noexec" => Some(attribute::NOEXEC),
        "noatime" => Some(attribute::NOATIME),
        "ro" => Some(attribute::READONLY),
        "rw" | "relatime" | "newinstance" => Some(0),
        _ => None,
    }
}

/// The options of the filesystem itself among these of a mount.
pub(super) fn own_options(options: &[(String, String)]) -> impl Iterator<Item = &(String, String)> {
    options
        .iter()
        .filter(|(key, _)| attribute_of(key).is_none())
}

/// Sets those.
pub(super) fn set_options(
    filesystem: &Filesystem,
    kind: &str,
    options: &[(String, String)],
) -> Step {
    for (key, value) in own_options(options) {
        let what = format_args!("{kind} {key}={value}").to_string();
        filesystem
            .set(key, value.as_bytes())
            .context(STAGE, "fsconfig", what)?;
    }
    Ok(())
}

/// A procfs that was made elsewhere, with the attributes of its mount.
fn dressed_procfs(
    plan: &MountPlan,
    options: &[(String, String)],
    proc: OwnedFd,
) -> Result<OwnedFd, Fault> {
    let change = Change {
        set: attributes_with(plan.attributes, options),
        propagation: propagation::PRIVATE,
        ..Change::default()
    };
    mount::change(proc.as_fd(), &change).context(STAGE, "mount_setattr", "procfs")?;
    Ok(proc)
}

/// Gives a file of a filesystem of ours a SELinux label, unless that is empty.
pub(super) fn set_label(file: BorrowedFd<'_>, label: &str) -> Step {
    if label.is_empty() {
        return Ok(());
    }
    let readable = file::openat(file, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let readable = readable.context("label", "openat", label)?;
    let flags = file::XattrFlags::empty();
    file::fsetxattr(&readable, "security.selinux", label.as_bytes(), flags).context(
        "label",
        "fsetxattr",
        label,
    )
}

fn place_filesystem(mounted: BorrowedFd<'_>, kind: &str, path: &str, root: BorrowedFd<'_>) -> Step {
    let target = if matches!(kind, "proc" | "sysfs" | "cgroup2") {
        plain_directory(root, path)?
    } else {
        make(root, path, Make::Directory)?
    };
    refuse_special(&target, path, root)?;
    mount::attach(mounted, target.as_fd()).context(STAGE, "move_mount", path)
}

/// A mount point that the image must not have turned into a link: where `/proc` and `/sys` go, labels and limits are
/// written (CVE-2019-19921).
fn plain_directory(root: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match file::open_in_no_links(root, Path::new(path), flags, Mode::empty()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let _made = make(root, path, Make::Directory)?;
            file::open_in_no_links(root, Path::new(path), flags, Mode::empty())
        }
        other => other,
    }
    .context(STAGE, "open without links", path)
}

fn hierarchies<'a>(
    plan: &MountPlan,
    list: impl Iterator<Item = (&'a str, OwnedFd)>,
    root: BorrowedFd<'_>,
    label: &str,
) -> Step {
    let path = &plan.target;
    let flags = attributes_of(plan.attributes) & !attribute::READONLY;
    let holder = tmpfs(&[("mode", "755")], flags, label)?;
    let target = plain_directory(root, path)?;
    mount::attach(holder.as_fd(), target.as_fd()).context(STAGE, "move_mount", path)?;
    for (name, tree) in list {
        file::make_directory(holder.as_fd(), name, 0o755).context(STAGE, "mkdirat", name)?;
        let place = file::openat(
            &holder,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let place = place.context(STAGE, "openat", name)?;
        mount::attach(tree.as_fd(), place.as_fd()).context(STAGE, "move_mount", name)?;
        set_propagation(tree.as_fd(), MountPropagation::Private, name)?;
        let change = Change {
            set: attributes_of(plan.attributes),
            ..Change::default()
        };
        mount::change(tree.as_fd(), &change).context(STAGE, "mount_setattr", name)?;
    }
    if plan.attributes.readonly {
        make_readonly(holder.as_fd(), false)?;
    }
    Ok(())
}

/// Maps the ids of a detached tree by `user`, or by a namespace that a short-lived child lends.
fn map_ids(
    tree: BorrowedFd<'_>,
    user: Option<BorrowedFd<'_>>,
    (uids, gids): (&IdMappings, &IdMappings),
    path: &Path,
) -> Step {
    let shown = path.display().to_string();
    let lent;
    let user = if let Some(user) = user {
        user
    } else {
        let missing = || Fault::check("idmap", "procfs", "not mounted");
        let proc = ProcFs::new()?.0.ok_or_else(missing)?;
        lent = userns::lend(proc.as_fd(), uids, gids)?;
        lent.as_fd()
    };
    userns::map(tree, user, &shown)
}

//! `/dev`: nodes, the usual links, the console. Made inside the new root, on a tmpfs that we mounted ourselves; where a
//! mount of the user's lies over `/dev`, it is left as it is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::plan::{Context, DeviceNode, Fault, MountPropagation, MountSource, Plan};
use crate::sys::file::{self, AtFlags, FileType, Gid, Make, Mode, OFlags, Stat, Uid, makedev};
use crate::sys::mount;

use super::Step;

const STAGE: &str = "device";
/// (name, text) under /dev.
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
    ("core", "/proc/kcore"),
];

/// Whether `/dev` is ours.
fn is_ours(plan: &Plan) -> bool {
    let ours = |source: &MountSource| matches!(source, MountSource::Filesystem { kind, .. } if kind == "tmpfs");
    // The last mount on /dev is what is seen.
    let on_dev = plan.mounts.iter().rev();
    let mut on_dev = on_dev.filter(|mount| mount.target.trim_end_matches('/') == "/dev");
    on_dev.next().is_some_and(|mount| ours(&mount.source))
}

/// Whether what is mounted below `/dev` is mounted on the node, too.
fn is_shared(plan: &Plan) -> bool {
    plan.mounts.iter().any(|mount| match &mount.source {
        MountSource::Bind { propagation, .. } => {
            *propagation == MountPropagation::Shared && mount.target.trim_end_matches('/') == "/dev"
        }
        _ => false,
    })
}

/// Copies of the node's own nodes, one for each device of the plan: for a user namespace, in which no node can be made.
pub(super) fn copies(plan: &Plan) -> Result<Vec<OwnedFd>, Fault> {
    if !is_ours(plan) {
        return Ok(Vec::new());
    }
    plan.devices.iter().map(copy).collect()
}

/// A copy of the node's own node.
pub(super) fn copy(device: &DeviceNode) -> Result<OwnedFd, Fault> {
    let shown = device.host_path.display().to_string();
    let copy = mount::copy_tree(file::CWD, &device.host_path, false);
    let copy = copy.context(STAGE, "open_tree", &shown)?;
    let status = file::fstat(&copy).context(STAGE, "fstat", &shown)?;
    if is_it(device, &status) {
        Ok(copy)
    } else {
        let what = format_args!("{shown} is not the device that it was").to_string();
        Err(Fault::check(STAGE, "check", what))
    }
}

fn is_it(device: &DeviceNode, status: &Stat) -> bool {
    let kind = if device.block {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    status.st_rdev == makedev(device.major, device.minor)
        && FileType::from_raw_mode(status.st_mode) == kind
}

/// Makes nodes and links, if `/dev` is ours. `copies`: what is bound instead of a node.
pub(super) fn make(plan: &Plan, root: BorrowedFd<'_>, copies: Option<Vec<OwnedFd>>) -> Step {
    if !is_ours(plan) {
        return Ok(());
    }
    if let Some(copies) = copies {
        for (device, copy) in plan.devices.iter().zip(copies) {
            bind(device, copy.as_fd(), root)?;
        }
    } else {
        for device in &plan.devices {
            node(device, root)?;
        }
    }
    let dev = file::open_in(
        root,
        Path::new("/dev"),
        OFlags::PATH | OFlags::DIRECTORY,
        Mode::empty(),
    );
    let dev = dev.context(STAGE, "openat2", "/dev")?;
    for (name, text) in LINKS {
        match file::symlinkat(text, &dev, name) {
            Ok(()) => {}
            Err(error) if exists(error.into()) => {}
            Err(error) => return Err(Fault::call(STAGE, "symlinkat", name, &error.into())),
        }
    }
    Ok(())
}

fn exists(error: std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AlreadyExists
}

fn bind(device: &DeviceNode, copy: BorrowedFd<'_>, root: BorrowedFd<'_>) -> Step {
    let path = Path::new(&device.path);
    let target = file::make_in(root, path, Make::File);
    let target = target.context(STAGE, "make mount point", &device.path)?;
    let status = file::fstat(&target).context(STAGE, "fstat", &device.path)?;
    if is_it(device, &status) {
        return Ok(());
    }
    if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
        let what = format_args!("{} exists and is something else", device.path).to_string();
        return Err(Fault::check(STAGE, "check", what));
    }
    mount::attach(copy, target.as_fd()).context(STAGE, "move_mount", &device.path)
}

fn node(device: &DeviceNode, root: BorrowedFd<'_>) -> Step {
    let path = Path::new(&device.path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Fault::check(STAGE, "path", &device.path));
    };
    let parent = file::make_in(root, parent, Make::Directory).context(
        STAGE,
        "make directory",
        &device.path,
    )?;
    let kind = if device.block {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    let number = makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.mode & 0o7777);
    match file::mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {}
        // An earlier entry of the same path: the same device is fine, another is a mistake.
        Err(error) if exists(error.into()) => {
            let status = file::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).context(
                STAGE,
                "fstatat",
                &device.path,
            )?;
            if status.st_rdev == number && FileType::from_raw_mode(status.st_mode) == kind {
                return Ok(());
            }
            let what = format_args!("{} exists and is something else", device.path).to_string();
            return Err(Fault::check(STAGE, "mknodat", what));
        }
        Err(error) => return Err(Fault::call(STAGE, "mknodat", &device.path, &error.into())),
    }
    if (device.uid, device.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
        file::chownat(
            &parent,
            name,
            Some(uid),
            Some(gid),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .context(STAGE, "fchownat", &device.path)?;
    }
    Ok(())
}

/// Binds the slave of the process's terminal at `/dev/console`: a copy of the descriptor's own mount, never of a path
/// (CVE-2025-52565). Not where `/dev` shows its mounts to the node, whose console it would become.
pub(super) fn bind_console(plan: &Plan, root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Step {
    const CONSOLE: &str = "/dev/console";
    if is_shared(plan) {
        return Ok(());
    }
    let dev = file::open_in_no_links(
        root,
        Path::new("/dev"),
        OFlags::PATH | OFlags::DIRECTORY,
        Mode::empty(),
    );
    let dev = dev.context(STAGE, "openat2", "/dev")?;
    let console = console(&dev).context(STAGE, "openat", CONSOLE)?;
    let copy = mount::copy_tree(slave, Path::new(mount::SELF), false);
    let copy = copy.context(STAGE, "open_tree", "pty slave")?;
    mount::attach(copy.as_fd(), console.as_fd()).context(STAGE, "move_mount", CONSOLE)
}

fn console(dev: &OwnedFd) -> std::io::Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    match file::openat(dev, "console", flags, Mode::from_raw_mode(0o600)) {
        Ok(_made) => {}
        Err(error) if exists(error.into()) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(file::openat(dev, "console", flags, Mode::empty())?)
}

//! Cgroups and namespaces: joining those that exist, making those that do not.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::runtime::create::CreateRequest;
use crate::runtime::plan::{
    CgroupJoin, Context, Fault, MountSource, NamespaceSource, Namespaces, Plan,
};
use crate::sys::file::{self, AtFlags, CWD, Gid, Mode, OFlags, Uid};
use crate::sys::ns::{self, flag};

use super::Step;

/// Moves this process into its cgroups, unless the clone has done so.
pub(super) fn cgroups(join: &CgroupJoin, joined: bool) -> Step {
    let directories = match join {
        CgroupJoin::V2(_) if joined => &[],
        CgroupJoin::V2(directory) => std::slice::from_ref(directory),
        CgroupJoin::V1(directories) => directories.as_slice(),
    };
    for directory in directories {
        let path = directory.join("cgroup.procs");
        // "0" is the writer itself, in whatever PID namespace.
        file::write_kernel(CWD, &path, b"0").context("cgroup", "write", path.display())?;
    }
    Ok(())
}

/// Moves this process into groups of resctrl.
pub(super) fn groups(all: &[PathBuf]) -> Step {
    for group in all {
        let path = group.join("tasks");
        // "0" is the writer itself here too.
        file::write_kernel(CWD, &path, b"0").context("rdt", "write", path.display())?;
    }
    Ok(())
}

/// Gives a cgroup that the container may write to the root of its user namespace: what the kernel names as fit for that,
/// which are no limits. Version 2 only.
pub(super) fn delegate(plan: &Plan, (uid, gid): (u32, u32)) -> Step {
    const STAGE: &str = "cgroup";
    let writable = plan.mounts.iter().any(|mount| {
        let cgroup = |kind: &str| kind == "cgroup2";
        !mount.attributes.readonly
            && matches!(&mount.source, MountSource::Filesystem { kind, .. } if cgroup(kind))
    });
    let (CgroupJoin::V2(directory), true) = (&plan.cgroup, writable) else {
        return Ok(());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let shown = directory.display().to_string();
    let fd = file::open(directory, flags, Mode::empty()).context(STAGE, "open", &shown)?;
    // Linux 4.15; before, and where sysfs is not mounted, these three.
    let names = std::fs::read_to_string("/sys/kernel/cgroup/delegate");
    let names =
        names.unwrap_or_else(|_| "cgroup.procs\ncgroup.threads\ncgroup.subtree_control".into());
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    for name in names.lines().chain([""]) {
        match file::chownat(&fd, name, uid, gid, AtFlags::EMPTY_PATH) {
            Ok(()) => {}
            Err(error) if std::io::Error::from(error).kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Fault::call(
                    STAGE,
                    "fchownat",
                    format_args!("{shown}/{name}"),
                    &error.into(),
                ));
            }
        }
    }
    Ok(())
}

/// The namespaces besides PID (settled at the clone), user and mount.
fn sources(namespaces: &Namespaces) -> [(&NamespaceSource, i32, &'static str); 4] {
    [
        (&namespaces.network, flag::NETWORK, "network"),
        (&namespaces.ipc, flag::IPC, "ipc"),
        (&namespaces.uts, flag::UTS, "uts"),
        (&namespaces.cgroup, flag::CGROUP, "cgroup"),
    ]
}

/// Enters the namespaces that exist: the pod's in one call, the passed one, those that files are.
pub(super) fn existing(namespaces: &Namespaces, request: &CreateRequest<'_>) -> Step {
    let (mut of_pod, mut of_target) = (0, 0);
    for (source, kind, name) in sources(namespaces) {
        match source {
            NamespaceSource::Host | NamespaceSource::New => {}
            NamespaceSource::Pod => of_pod |= kind,
            NamespaceSource::Container(_) => of_target |= kind,
            NamespaceSource::Path(path) => {
                let opened = std::fs::File::open(path);
                let opened = opened.context("namespace", "open", path.display())?;
                enter(Some(opened.as_fd()), kind, &path.to_string_lossy(), name)?;
            }
            NamespaceSource::Passed => {
                enter(request.network, kind, "the passed descriptor", name)?;
            }
        }
    }
    if of_pod != 0 {
        enter(
            request.pause,
            of_pod,
            "the pod's pause",
            "network, ipc, uts",
        )?;
    }
    if of_target != 0 {
        enter(request.target, of_target, "the target container", "all")?;
    }
    Ok(())
}

fn enter(fd: Option<BorrowedFd<'_>>, flags: i32, whose: &str, which: &str) -> Step {
    let which = format_args!("{which} namespace of {whose}").to_string();
    let fd = fd.ok_or_else(|| Fault::check("namespace", "setns", &which))?;
    ns::enter(fd, flags).context("namespace", "setns", &which)
}

/// Makes the new namespaces, always one for mounts.
pub(super) fn new(namespaces: &Namespaces) -> Step {
    let mut flags = flag::MOUNT;
    for (source, kind, _) in sources(namespaces) {
        if *source == NamespaceSource::New {
            flags |= kind;
        }
    }
    ns::unshare(flags).context("namespace", "unshare", format_args!("{flags:#x}"))
}

/// A mount namespace alone, still the node's root's: for what is done before the user namespace is entered.
pub(super) fn mounts() -> Step {
    ns::unshare(flag::MOUNT).context("namespace", "unshare", "mount")
}

/// Enters all namespaces of a container's first process but PID (settled at the clone); the user namespace where `user` is
/// its flag, not 0.
pub(super) fn all_of(container: BorrowedFd<'_>, user: i32) -> Step {
    let flags = flag::MOUNT | flag::NETWORK | flag::IPC | flag::UTS | flag::CGROUP | user;
    ns::enter(container, flags).context("namespace", "setns", "namespaces of the container")
}

/// Runs `work` in the mount namespace of the process behind `pidfd`, then comes back. `what`: what it is after.
pub(super) fn visit_mounts<T>(
    pidfd: BorrowedFd<'_>,
    what: &str,
    work: impl FnOnce() -> std::io::Result<T>,
) -> Result<T, Fault> {
    const STAGE: &str = "mount";
    let own = Path::new("/proc/self/ns/mnt");
    let own = std::fs::File::open(own).context(STAGE, "open", own.display())?;
    ns::enter(pidfd, flag::MOUNT).context(STAGE, "setns", "mount namespace of a process")?;
    let outcome = work();
    ns::enter(own.as_fd(), flag::MOUNT).context(STAGE, "setns", "own mount namespace")?;
    outcome.context(STAGE, "open_tree", what)
}

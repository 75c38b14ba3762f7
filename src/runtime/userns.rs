//! User namespaces: making one for a pod, lending one to a mount, moving into one.
//!
//! ```text
//! monitor: make() ------> user namespace (+ network namespace owned by it), kept by descriptor
//! child, as the node's root: map() layers and volumes, give() streams
//! child: enter() -------> root of the namespace; owns what it makes from here on
//! ```
//! Ids on disk are those inside: a mount adds the mapping, nothing is copied and nothing changes its owner.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::plan::{Context, Fault, IdMappings};
use crate::sys::clone::{self, Cloned};
use crate::sys::file::{self, FileType, Gid, Mode, OFlags, Uid};
use crate::sys::mount::{self, Change, attribute};
use crate::sys::{credentials, ns, process, socket};

const STAGE: &str = "user namespace";
const MAP: &str = "idmap";
const EINVAL: i32 = 22;

/// A user namespace and what was made with it.
#[derive(Debug)]
pub(crate) struct Made {
    /// The user namespace; it lives while this, a process, a mount or a namespace it owns does.
    pub(crate) user: OwnedFd,
    /// A network namespace that it owns, if one was asked for; its loopback is down.
    pub(crate) network: Option<OwnedFd>,
}

/// Makes a user namespace with these mappings, with a network namespace in it if asked. The caller has one thread.
///
/// # Errors
/// What failed: `clone3` with `ENOSPC` where `user.max_user_namespaces` forbids more, the write of a map with `EPERM` where
/// an id outside is not ours to give. Nothing is left then.
pub(crate) fn make(uids: &IdMappings, gids: &IdMappings, network: bool) -> Result<Made, Fault> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = file::open("/proc", flags, Mode::empty()).context(STAGE, "open", "/proc")?;
    born(
        (uids, gids),
        proc.as_fd(),
        if network { ns::flag::NETWORK } else { 0 },
        |keep, work| clone::clone(ns::flag::USER, None, keep, work),
        |pid| {
            let of = |kind| open(proc.as_fd(), pid, kind);
            Ok(Made {
                user: of("user")?,
                network: network.then(|| of("net")).transpose()?,
            })
        },
    )
}

/// A user namespace for [`map`] alone. The caller is a child that `clone` made; `proc` is a procfs of its PID namespace.
///
/// # Errors
/// As [`make`].
pub(super) fn lend(
    proc: BorrowedFd<'_>,
    uids: &IdMappings,
    gids: &IdMappings,
) -> Result<OwnedFd, Fault> {
    born(
        (uids, gids),
        proc,
        0,
        |keep, work| clone::fork_into(ns::flag::USER, keep, work),
        |pid| open(proc, pid, "user"),
    )
}

/// Clones a short-lived child into a new user namespace, writes its maps, has it make the namespaces `inside` (their owner
/// must exist by then, or the kernel shows their files as the node's) and takes what is wanted of it.
fn born<T>(
    (uids, gids): (&IdMappings, &IdMappings),
    proc: BorrowedFd<'_>,
    inside: i32,
    clone: impl FnOnce(&[BorrowedFd<'_>], &dyn Fn() -> i32) -> std::io::Result<Cloned>,
    take: impl FnOnce(u32) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let (ours, childs) = socket::pair().context(STAGE, "socketpair", "")?;
    let work = || {
        let hear = || socket::receive(childs.as_fd(), &mut [0; 4]);
        if !hear().is_ok_and(|packet| packet.bytes > 0) {
            return 1;
        }
        let made = match ns::unshare(inside) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(EINVAL),
        };
        let _told = socket::send(childs.as_fd(), &made.to_ne_bytes(), &[]);
        // The end: the parent has what it wants, or is gone.
        let _end = hear();
        0
    };
    let child = clone(&[childs.as_fd()], &work).context(STAGE, "clone3", "CLONE_NEWUSER")?;
    // So that its end is heard.
    drop(childs);
    let go = || -> Result<T, Fault> {
        write_maps(proc, child.pid, uids, gids)?;
        socket::send(ours.as_fd(), b"m", &[]).context(STAGE, "sendmsg", "child")?;
        let mut made = [0; 4];
        let heard = socket::receive(ours.as_fd(), &mut made);
        if heard.context(STAGE, "recvmsg", "child")?.bytes != made.len() {
            return Err(Fault::check(STAGE, "unshare", "the child ended"));
        }
        match i32::from_ne_bytes(made) {
            0 => take(child.pid),
            number => {
                let error = std::io::Error::from_raw_os_error(number);
                Err(Fault::call(STAGE, "unshare", "network", &error))
            }
        }
    };
    let taken = go();
    drop(ours);
    let _ended = process::wait(child.pidfd.as_fd());
    taken
}

fn write_maps(
    proc: BorrowedFd<'_>,
    pid: u32,
    uids: &IdMappings,
    gids: &IdMappings,
) -> Result<(), Fault> {
    for (name, mappings) in [("uid_map", uids), ("gid_map", gids)] {
        let lines = mappings.iter();
        let lines = lines.map(|(inside, outside, length)| format!("{inside} {outside} {length}\n"));
        let text: String = lines.collect();
        let path = format!("{pid}/{name}");
        let shown = format_args!("{name}: {}", text.trim_end()).to_string();
        file::write_kernel(proc, Path::new(&path), text.as_bytes())
            .context(STAGE, "write", shown)?;
    }
    Ok(())
}

fn open(proc: BorrowedFd<'_>, pid: u32, kind: &str) -> Result<OwnedFd, Fault> {
    let path = format!("{pid}/ns/{kind}");
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    file::openat(proc, path, flags, Mode::empty()).context(STAGE, "open", format_args!("ns/{kind}"))
}

/// Maps the ids of a detached tree by the mappings of `user`: what has an id inside on disk gets the one outside. Mounts
/// below are mapped too if all of them can be; else they keep their owners. `shown` is what a failure names.
///
/// # Errors
/// The number of `mount_setattr(2)`; `EINVAL`: the filesystem has no idmapped mounts, and the fault says so.
pub(crate) fn map(tree: BorrowedFd<'_>, user: BorrowedFd<'_>, shown: &str) -> Result<(), Fault> {
    let change = |recursive| Change {
        set: attribute::IDMAP,
        user_namespace: Some(user),
        recursive,
        ..Change::default()
    };
    let mapped = match mount::change(tree, &change(true)) {
        Err(error) if error.raw_os_error() == Some(EINVAL) => mount::change(tree, &change(false)),
        other => other,
    };
    mapped.map_err(|error| {
        let why = match error.raw_os_error() {
            Some(EINVAL) => ": its filesystem has no idmapped mounts",
            _ => "",
        };
        let what = format_args!("{shown}{why}").to_string();
        Fault::call(MAP, "mount_setattr(MOUNT_ATTR_IDMAP)", what, &error)
    })
}

/// Whether what lies in this directory can be mapped by `user`: tried, nothing stays.
///
/// # Errors
/// Why not.
#[cfg(feature = "daemon")]
pub(crate) fn can_map(directory: &Path, user: BorrowedFd<'_>) -> Result<(), Fault> {
    let shown = directory.display().to_string();
    let tree = mount::copy_tree(file::CWD, directory, false);
    let tree = tree.context(MAP, "open_tree", &shown)?;
    map(tree.as_fd(), user, &shown)
}

/// Gives the pipes and sockets among this process's standard streams to the namespace's root, while we are root outside: the
/// process may open `/dev/stdout` again, or give it to its user.
///
/// # Errors
/// The number of `fstat(2)` or `fchown(2)`.
pub(super) fn give_streams((uid, gid): (u32, u32)) -> Result<(), Fault> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let status = file::fstat(stream).context("stdio", "fstat", "stream")?;
        let kind = FileType::from_raw_mode(status.st_mode);
        if kind == FileType::Fifo || kind == FileType::Socket {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            file::fchown(stream, Some(uid), Some(gid)).context("stdio", "fchown", uid.as_raw())?;
        }
    }
    Ok(())
}

/// Moves this process, which has one thread, into the user namespace.
///
/// # Errors
/// The number of `setns(2)`, or as [`become_root`].
pub(super) fn enter(user: BorrowedFd<'_>) -> Result<(), Fault> {
    ns::enter(user, ns::flag::USER).context(STAGE, "setns", "of the pod")?;
    become_root()
}

/// Becomes the root of the user namespace that was entered, with all its capabilities.
///
/// # Errors
/// The number of `setgroups(2)`, `setresgid(2)` or `setresuid(2)`.
pub(super) fn become_root() -> Result<(), Fault> {
    credentials::become_user(0, 0, &[])
        .map_err(|(call, error)| Fault::call(STAGE, call, "its root", &error))?;
    // A change of ids makes a process dumpable where the administrator wants it so.
    credentials::set_not_dumpable().context(STAGE, "prctl", "PR_SET_DUMPABLE")
}

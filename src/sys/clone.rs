//! Making a child that goes on with a copy of this process: `clone3(2)`. For the monitor and tests; the daemon
//! only spawns programs (`sys::spawn`).
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// clone3's flag (linux/sched.h, Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A cloned child.
#[derive(Debug)]
pub(crate) struct Cloned {
    /// Its number in this PID namespace.
    pub(crate) pid: u32,
    /// Its identity.
    pub(crate) pidfd: OwnedFd,
}

/// How many threads this process has: one `stat(2)`, `/proc/self/task` has a link for each.
///
/// # Errors
/// The number of `stat(2)`.
pub(crate) fn threads() -> io::Result<u64> {
    let links = std::fs::metadata("/proc/self/task")?.nlink();
    Ok(links.saturating_sub(2))
}

/// Clones this process into new `namespaces` (`CLONE_NEW*`) and `cgroup` (a directory of the unified hierarchy). The
/// child closes every descriptor but the standard streams and `keep`, runs `work` and exits with its result; it never
/// returns from here. A panic in it is exit code 101. `work` must use no descriptor of the parent's but `keep`.
///
/// # Errors
/// `EBUSY`: this process has more than one thread, so that a child could find locks held for ever; else the number of
/// `clone3(2)`. No child exists then.
pub(crate) fn clone(
    namespaces: i32,
    cgroup: Option<BorrowedFd<'_>>,
    keep: &[BorrowedFd<'_>],
    work: impl FnOnce() -> i32,
) -> io::Result<Cloned> {
    if threads()? != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    clone_unchecked(namespaces, cgroup, Some(keep), work)
}

/// `keep` absent: the child closes nothing.
fn clone_unchecked(
    namespaces: i32,
    cgroup: Option<BorrowedFd<'_>>,
    keep: Option<&[BorrowedFd<'_>]>,
    work: impl FnOnce() -> i32,
) -> io::Result<Cloned> {
    let mut pidfd: i32 = -1;
    let into = cgroup.map_or(0, |_| CLONE_INTO_CGROUP);
    let flags = u64::try_from(namespaces | libc::CLONE_PIDFD).map_err(io::Error::other)?;
    let mut arguments = [0_u64; 11];
    // struct clone_args of linux/sched.h: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls,
    // set_tid, set_tid_size, cgroup.
    arguments[0] = flags | into;
    arguments[1] = (&raw mut pidfd).expose_provenance() as u64;
    // A sibling ends with the signal of the process that clones it; the kernel refuses a number here.
    arguments[4] = if namespaces & libc::CLONE_PARENT == 0 {
        17
    } else {
        0
    };
    arguments[10] = cgroup
        .and_then(|fd| u64::try_from(fd.as_raw_fd()).ok())
        .unwrap_or_default();
    // SAFETY: without CLONE_VM and with no stack given the child continues here in a copy of this memory, as after
    // fork(2). One thread, as the callers know, so that no lock of an allocator or of stdio is held in the copy.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            arguments.as_ptr(),
            size_of_val(&arguments),
        )
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    if pid == 0 {
        // Before Linux 5.9 the call does not exist; all are close-on-exec anyway.
        let _closed = keep.map(close_all_but);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        crate::sys::process::exit_now(outcome.unwrap_or(101));
    }
    // SAFETY: the kernel stored a new descriptor before it returned.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let pid = u32::try_from(pid).unwrap_or_default();
    Ok(Cloned { pid, pidfd })
}

/// As [`clone`], but the caller is itself a child that [`clone`] made, whose `/proc` may be out of sight: it has one
/// thread by birth.
///
/// # Errors
/// The number of `clone3(2)`.
pub(crate) fn fork_into(
    namespaces: i32,
    keep: &[BorrowedFd<'_>],
    work: impl FnOnce() -> i32,
) -> io::Result<Cloned> {
    clone_unchecked(namespaces, None, Some(keep), work)
}

/// As [`fork_into`], but the new process keeps every descriptor and is a child of the caller's parent, which reaps it and
/// must be told of it. `Cloned::pid` is the number in the caller's PID namespace.
///
/// # Errors
/// The number of `clone3(2)`; `EINVAL`: the caller is the first process of a PID namespace.
pub(crate) fn fork_sibling(namespaces: i32, work: impl FnOnce() -> i32) -> io::Result<Cloned> {
    clone_unchecked(namespaces | libc::CLONE_PARENT, None, None, work)
}

/// Closes every descriptor from 3 on but these. Only in a child that never returns to its copy of the parent's code.
fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = keep
        .iter()
        .filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok())
        .collect();
    numbers.sort_unstable();
    let mut first = 3_u32;
    for number in numbers.into_iter().chain([u32::MAX]) {
        if number > first {
            let last = if number == u32::MAX {
                number
            } else {
                number - 1
            };
            // SAFETY: in the child, which leaves by _exit: no owner of these numbers is used or dropped.
            let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = number.saturating_add(1).max(3);
    }
    Ok(())
}

#[cfg(test)]
static IN_CHILD: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
#[cfg(test)]
thread_local! {
    static MESSAGE: std::cell::RefCell<String> = const { std::cell::RefCell::new(String::new()) };
}

/// The hook is set before any fork: in a child its lock may be held by a thread that is not there.
#[cfg(test)]
fn keep_messages_of_children() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if IN_CHILD.load(std::sync::atomic::Ordering::Relaxed) {
            MESSAGE.replace(info.to_string());
        } else {
            usual(info);
        }
    }));
}

/// Test help: runs `work` in a forked child, which has one thread, and gives its panic message as the error. glibc's
/// fork makes the allocator usable in the child; the test must not need other locks of the harness (no printing).
///
/// # Panics
/// With the message of `work`'s panic.
#[cfg(test)]
pub(crate) fn in_forked_child(work: impl FnOnce()) {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(keep_messages_of_children);
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    #[expect(
        clippy::disallowed_methods,
        reason = "glibc's fork prepares the allocator"
    )]
    // SAFETY: the child uses the allocator, which glibc's handlers make consistent, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        drop(reader);
        IN_CHILD.store(true, std::sync::atomic::Ordering::Relaxed);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        if outcome.is_err() {
            let text = MESSAGE.take();
            let _sent =
                crate::sys::fd::write_all(std::os::fd::AsFd::as_fd(&writer), text.as_bytes());
        }
        crate::sys::process::exit_now(i32::from(outcome.is_err()));
    }
    drop(writer);
    let mut text = String::new();
    io::Read::read_to_string(&mut std::fs::File::from(reader), &mut text).unwrap();
    let mut status = 0;
    // SAFETY: our child; `status` is written.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(waited, pid);
    assert!(text.is_empty(), "in the child: {text}");
    assert_eq!(status, 0, "the child ended with wait status {status:#x}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{Exit, wait};
    use std::os::fd::AsFd;

    #[test]
    fn a_process_with_threads_does_not_clone() {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = clone(0, None, &[], || 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        drop(stop);
        let _ended = other.join().unwrap();
    }

    #[test]
    fn a_child_in_new_namespaces() {
        in_forked_child(|| {
            let child = clone(libc::CLONE_NEWPID | libc::CLONE_NEWUTS, None, &[], || {
                if crate::sys::process::id() == 1 {
                    42
                } else {
                    1
                }
            })
            .unwrap();
            assert_eq!(wait(child.pidfd.as_fd()).unwrap(), Exit::Code(42));
            let child = clone(0, None, &[], || {
                std::panic::set_hook(Box::new(|_| {}));
                panic!("in the child")
            })
            .unwrap();
            assert_eq!(wait(child.pidfd.as_fd()).unwrap(), Exit::Code(101));
        });
    }

    #[test]
    fn a_sibling_is_reaped_by_the_parent() {
        in_forked_child(|| {
            let (reader, writer) = crate::sys::fd::pipe().unwrap();
            let child = clone(0, None, &[writer.as_fd()], || {
                let made = fork_sibling(libc::CLONE_NEWPID, || {
                    i32::from(crate::sys::process::id() != 1) + 5
                });
                let pid = made.map_or(0, |cloned| cloned.pid);
                let sent = crate::sys::fd::write(writer.as_fd(), &pid.to_ne_bytes());
                i32::from(sent.is_err())
            })
            .unwrap();
            assert_eq!(wait(child.pidfd.as_fd()).unwrap(), Exit::Code(0));
            let mut pid = [0; 4];
            assert_eq!(crate::sys::fd::read(reader.as_fd(), &mut pid).unwrap(), 4);
            let pidfd = crate::sys::process::pidfd_open(u32::from_ne_bytes(pid)).unwrap();
            assert_eq!(wait(pidfd.as_fd()).unwrap(), Exit::Code(5));
        });
    }

    #[test]
    fn all_but_the_listed_descriptors_close() {
        in_forked_child(|| {
            let kept = std::fs::File::open("/dev/null").unwrap();
            let high = crate::sys::fd::duplicate(kept.as_fd(), 200).unwrap();
            let closed = crate::sys::fd::duplicate(kept.as_fd(), 100).unwrap();
            close_all_but(&[kept.as_fd(), high.as_fd()]).unwrap();
            let (a, b) = (kept.as_fd(), high.as_fd());
            assert!(rustix::fs::fstat(a).is_ok() && rustix::fs::fstat(b).is_ok());
            assert!(rustix::fs::fstat(closed.as_fd()).is_err());
            let _closed_already = std::mem::ManuallyDrop::new(closed);
        });
    }
}

//! Processes by pidfd: signal, wait, become a reaper, end. See `pidfd_open(2)`, `waitid(2)`.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitIdStatus};

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// One number as shells give it: the code, or 128+n for signal n.
    pub(crate) const fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }

    fn of(status: &WaitIdStatus) -> Option<Self> {
        if let Some(code) = status.exit_status() {
            return Some(Self::Code(code));
        }
        status.terminating_signal().map(Self::Signal)
    }
}

/// A pidfd of the process `pid`, close-on-exec. It may be another process than meant unless `pid` is a child
/// not waited for, or the peer of a connected socket.
///
/// # Errors
/// The number of `pidfd_open(2)`; `ESRCH`: no such process.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = pid_of(pid)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Sends a signal, any number. A process that has ended (a zombie too) is no error: `false`.
///
/// # Errors
/// The number of `pidfd_send_signal(2)` other than `ESRCH`.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<bool> {
    // SAFETY: integers and a null pointer (no siginfo); touches no memory of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ESRCH) => Ok(false),
        _ => Err(error),
    }
}

/// Whether the process behind `pidfd` has ended, reaped or not. Its number is nobody else's if it has not.
///
/// # Errors
/// The number of `poll(2)`.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut set = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::io::retry_on_intr(|| {
        rustix::event::poll(&mut set, Some(&rustix::event::Timespec::default()))
    })?;
    Ok(!set[0].revents().is_empty())
}

/// Reaps the child behind `pidfd` if it has ended; `None`: it lives. The pidfd becomes readable at its end.
///
/// # Errors
/// The number of `waitid(2)`; `ECHILD`: not our child, or reaped already.
pub(crate) fn try_wait(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::PidFd(pidfd), options)?;
    Ok(status.as_ref().and_then(Exit::of))
}

/// Waits for the end of the child behind `pidfd` and reaps it. Blocks.
///
/// # Errors
/// The number of `waitid(2)`.
pub(crate) fn wait(pidfd: BorrowedFd<'_>) -> io::Result<Exit> {
    loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED) {
            Ok(status) => {
                if let Some(exit) = status.as_ref().and_then(Exit::of) {
                    return Ok(exit);
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A child of any kind that has ended, not reaped yet: its `/proc` entry is still there. `None`: none has ended, or there is
/// none. For orphans that a subreaper inherits.
///
/// # Errors
/// The number of `waitid(2)` other than `ECHILD`.
pub(crate) fn ended_child() -> io::Result<Option<u32>> {
    let mut told = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel writes the structure.
    if unsafe { libc::waitid(libc::P_ALL, 0, told.as_mut_ptr(), options) } != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ECHILD) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: all zero is a valid value.
    let told = unsafe { told.assume_init() };
    // SAFETY: the kernel has written what belongs to SIGCHLD, or nothing: then it is 0.
    let pid = unsafe { told.si_pid() };
    Ok(u32::try_from(pid).ok().filter(|pid| *pid != 0))
}

/// Reaps the child with this number, which has ended.
///
/// # Errors
/// The number of `waitid(2)`; `ECHILD`: not our child.
pub(crate) fn reap(pid: u32) -> io::Result<Exit> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let status = rustix::process::waitid(WaitId::Pid(pid_of(pid)?), options)?;
    let exit = status.as_ref().and_then(Exit::of);
    exit.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

/// Whether a child has executed a program since it was cloned; it may have ended, but not be reaped. The kernel tells it by
/// a flag of the process (`PF_FORKNOEXEC`): the end of its close-on-exec descriptors may be either.
///
/// # Errors
/// The number of reading `/proc/PID/stat`, or `InvalidData`.
pub(crate) fn has_executed(pid: u32) -> io::Result<bool> {
    const PF_FORKNOEXEC: u64 = 0x40;
    let text = std::fs::read(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything; then: state ppid pgrp session tty_nr tpgid flags.
    let flags = text
        .rsplit(|byte| *byte == b')')
        .next()
        .and_then(|rest| rest.split(|byte| *byte == b' ').nth(7))
        .and_then(|field| std::str::from_utf8(field).ok()?.parse::<u64>().ok());
    let flags = flags.ok_or(io::ErrorKind::InvalidData)?;
    Ok(flags & PF_FORKNOEXEC == 0)
}

/// What keeps a process from running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// A signal stopped it.
    Stopped,
    /// Another process traces it.
    Traced,
}

/// Whether somebody holds a child of ours that is not reaped.
pub(crate) fn held(pid: u32) -> Option<Held> {
    let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status).into_owned();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim_start)
    };
    if of("TracerPid:").is_some_and(|tracer| tracer != "0") {
        return Some(Held::Traced);
    }
    of("State:")
        .filter(|state| state.starts_with(['T', 't']))
        .map(|_stopped| Held::Stopped)
}

/// Makes orphaned descendants children of this process (`PR_SET_CHILD_SUBREAPER`).
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn become_subreaper() -> io::Result<()> {
    Ok(rustix::process::set_child_subreaper(Some(
        rustix::process::getpid(),
    ))?)
}

/// SIGKILL for this process when its parent ends, which must be `parent` (by that number in this PID namespace). It
/// outlasts an exec.
///
/// # Errors
/// The number of `prctl(2)`; `ESRCH`: the parent has ended already.
pub(crate) fn die_with_parent(parent: u32) -> io::Result<()> {
    let kill = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(kill)?;
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    match now.map(u32::try_from) {
        Some(Ok(now)) if now == parent => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// Names the calling thread (15 bytes are kept); `ps` shows it.
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn set_name(name: &std::ffi::CStr) -> io::Result<()> {
    Ok(rustix::thread::set_name(name)?)
}

/// Makes this process the leader of a new session without a terminal.
///
/// # Errors
/// The number of `setsid(2)`; `EPERM`: it leads a process group already.
pub(crate) fn new_session() -> io::Result<()> {
    let _session = rustix::process::setsid()?;
    Ok(())
}

/// Ends this process at once: no destructor, no flush, no handler. For forked children. Where a seccomp filter refuses both
/// calls for that, it ends by SIGILL, which needs none.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: touches no memory.
    let _refused = unsafe { libc::syscall(libc::SYS_exit_group, code) };
    // SAFETY: touches no memory; this process has one thread.
    let _refused = unsafe { libc::syscall(libc::SYS_exit, code) };
    loop {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction that is none; the kernel ends the process, a PID namespace's first too.
        unsafe {
            std::arch::asm!("ud2", options(nomem, nostack));
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        unsafe {
            std::arch::asm!("udf #0", options(nomem, nostack));
        }
    }
}

/// This process's number.
pub(crate) fn id() -> u32 {
    u32::try_from(rustix::process::getpid().as_raw_nonzero().get()).unwrap_or_default()
}

/// The checked form of a pid.
///
/// # Errors
/// `ESRCH` for 0 and what is no pid.
pub(crate) fn pid_of(pid: u32) -> io::Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "test")]
    fn wait_and_signal_by_pidfd() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pidfd = pidfd_open(child.id()).unwrap();
        assert_eq!(try_wait(pidfd.as_fd()).unwrap(), None);
        assert!(send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap());
        assert_eq!(wait(pidfd.as_fd()).unwrap(), Exit::Signal(9));
        assert!(!send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap());
        assert_eq!(
            try_wait(pidfd.as_fd()).unwrap_err().raw_os_error(),
            Some(libc::ECHILD)
        );
        assert!(child.try_wait().is_err());
        assert_eq!(Exit::Signal(9).code(), 137);
    }
}

//! Signals: blocking them, reading them from a descriptor, and a clean state before an exec.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Signal numbers of every architecture we build for.
pub(crate) const SIGHUP: i32 = libc::SIGHUP;
/// Interrupt.
pub(crate) const SIGINT: i32 = libc::SIGINT;
/// Illegal instruction.
pub(crate) const SIGILL: i32 = libc::SIGILL;
/// A system call that a seccomp filter does not stand.
pub(crate) const SIGSYS: i32 = libc::SIGSYS;
/// Kill.
pub(crate) const SIGKILL: i32 = libc::SIGKILL;
/// Terminate.
pub(crate) const SIGTERM: i32 = libc::SIGTERM;
/// A child changed its state.
pub(crate) const SIGCHLD: i32 = libc::SIGCHLD;

fn set_of(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset writes the whole set.
    let _always_zero = unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: written by the line above.
    let mut set: libc::sigset_t = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: `set` is a valid set; a bad number only gives EINVAL.
        let _checked_by_use = unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

/// Blocks `signals` for the calling thread (and the threads and processes it starts later).
///
/// # Errors
/// The number of `pthread_sigmask(3)`.
pub(crate) fn block(signals: &[i32]) -> io::Result<()> {
    let set = set_of(signals);
    // SAFETY: `set` is valid for reads; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// A descriptor that becomes readable when one of `signals` is pending; block them first. It is
/// close-on-exec and non-blocking.
///
/// # Errors
/// The number of `signalfd4(2)`.
pub(crate) fn descriptor(signals: &[i32]) -> io::Result<OwnedFd> {
    let set = set_of(signals);
    // SAFETY: `set` is valid for reads.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes one pending signal from a [`descriptor`]; `None` when there is none.
///
/// # Errors
/// The number of `read(2)`.
pub(crate) fn next(descriptor: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
    // SAFETY: the buffer is as long as said.
    let count = unsafe {
        libc::read(
            descriptor.as_raw_fd(),
            info.as_mut_ptr().cast(),
            size_of::<libc::signalfd_siginfo>(),
        )
    };
    if usize::try_from(count).is_ok_and(|count| count == size_of::<libc::signalfd_siginfo>()) {
        // SAFETY: the kernel wrote all of it.
        let info = unsafe { info.assume_init() };
        return Ok(i32::try_from(info.ssi_signo).ok());
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}

/// Ignores `SIGPIPE`, so that writing to a closed pipe gives `EPIPE` (in a binary whose start-up code
/// has not done so).
pub(crate) fn ignore_sigpipe() {
    // SAFETY: SIG_IGN runs no code of ours.
    let _old = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Sets every signal to its default action and unblocks all: what a program may expect at its start. For a process
/// about to exec: its own handlers are gone afterwards.
pub(crate) fn reset_all() {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: SIG_DFL runs no code of ours; numbers that libc reserves are refused with EINVAL.
        let _old = unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let set = set_of(&[]);
    // SAFETY: `set` is valid for reads.
    let _always_zero =
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_blocked_signal_is_read_from_the_descriptor() {
        std::thread::spawn(|| {
            block(&[libc::SIGUSR2]).unwrap();
            let signals = descriptor(&[libc::SIGUSR2]).unwrap();
            assert_eq!(next(signals.as_fd()).unwrap(), None);
            // SAFETY: sends a signal that this thread blocks to this thread.
            assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
            assert_eq!(next(signals.as_fd()).unwrap(), Some(libc::SIGUSR2));
        })
        .join()
        .unwrap();
    }
}

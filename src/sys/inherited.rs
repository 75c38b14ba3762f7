//! Descriptors that a program finds open at its start.
#![expect(unsafe_code, reason = "taking ownership of a descriptor by number")]

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Takes descriptor 3, which the parent passed, and makes it close-on-exec. Call it before anything else opens
/// a descriptor.
///
/// # Errors
/// `EBADF`: it is not open. `EBUSY`: it was taken before.
pub(crate) fn first() -> io::Result<OwnedFd> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: a plain query, which fails on a closed number.
    if unsafe { libc::fcntl(3, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, and ours alone: `TAKEN` lets this happen once, before anything else was opened.
    let fd = unsafe { OwnedFd::from_raw_fd(3) };
    crate::sys::fd::set_close_on_exec(fd.as_fd(), true)?;
    Ok(fd)
}

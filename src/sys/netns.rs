//! Which network namespace this is. Making and entering them is in `ns`.
#![expect(
    unsafe_code,
    reason = "getsockopt(2) of an option without a safe wrapper"
)]

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A number that the network namespace of this thread has and no other ever had since boot.
///
/// Kernel: `SO_NETNS_COOKIE`, 5.14.
///
/// # Errors
///
/// The errno of `socket(2)` or `getsockopt(2)` (`ENOPROTOOPT`: an older kernel).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    let fd = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: `fd` is open; the pointers are to locals that outlive the call, `length` is the size of
    // `cookie`.
    let done = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match done {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Not in libc for every architecture.
const SO_NETNS_COOKIE: libc::c_int = 71;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ns::{in_netns, new_netns};
    use std::os::fd::AsFd as _;

    #[test]
    fn each_namespace_has_its_own() {
        let (one, two) = (new_netns().unwrap(), new_netns().unwrap());
        let cookie = |netns: &std::os::fd::OwnedFd| in_netns(netns.as_fd(), netns_cookie).unwrap();
        assert_eq!(cookie(&one), cookie(&one));
        assert_ne!(cookie(&one), cookie(&two));
        assert_ne!(cookie(&one), netns_cookie().unwrap());
    }
}

//! Pseudo terminals. See `pty(7)`.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// Both ends of a pseudo terminal, close-on-exec.
#[derive(Debug)]
pub(crate) struct Pty {
    /// The end that the monitor keeps.
    pub(crate) master: OwnedFd,
    /// The end that the process gets.
    pub(crate) slave: OwnedFd,
}

/// Opens a pair in the devpts whose root directory is `devpts` (a container's own), so that its number
/// means the same inside. The slave comes by `TIOCGPTPEER`, never by a path (CVE-2025-52565).
///
/// # Errors
/// The number of `openat(2)` or `ioctl(2)`; `ENXIO` where `devpts` is no devpts.
pub(crate) fn open_in(devpts: BorrowedFd<'_>) -> io::Result<Pty> {
    const DEVPTS_SUPER_MAGIC: u64 = 0x1cd1;
    let kind = rustix::fs::fstatfs(devpts)?.f_type;
    if u64::try_from(kind) != Ok(DEVPTS_SUPER_MAGIC) {
        return Err(rustix::io::Errno::NXIO.into());
    }
    let master = rustix::fs::openat(
        devpts,
        "ptmx",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    peer(master)
}

fn peer(master: OwnedFd) -> io::Result<Pty> {
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )?;
    Ok(Pty { master, slave })
}

/// Sets the size of the terminal; its foreground processes get `SIGWINCH`.
///
/// # Errors
/// The number of `ioctl(2)`.
pub(crate) fn resize(master: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}

/// Makes the calling process the leader of a new session whose controlling terminal is `slave`.
///
/// # Errors
/// The number of `setsid(2)` or `ioctl(TIOCSCTTY)`.
pub(crate) fn control(slave: BorrowedFd<'_>) -> io::Result<()> {
    let _session = rustix::process::setsid()?;
    Ok(rustix::process::ioctl_tiocsctty(slave)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_goes_in_comes_out_and_the_size_sticks() {
        let devpts = std::fs::File::open("/dev/pts").unwrap();
        let pty = open_in(devpts.as_fd()).unwrap();
        resize(pty.master.as_fd(), 132, 43).unwrap();
        let size = rustix::termios::tcgetwinsize(&pty.slave).unwrap();
        assert_eq!((size.ws_col, size.ws_row), (132, 43));
        crate::sys::fd::write_all(pty.slave.as_fd(), b"hi\n").unwrap();
        let mut buffer = [0; 8];
        let count = crate::sys::fd::read(pty.master.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"hi\r\n");
    }

    #[test]
    fn a_directory_that_is_no_devpts_is_refused() {
        let directory = std::fs::File::open("/tmp").unwrap();
        let error = open_in(directory.as_fd()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENXIO));
    }
}

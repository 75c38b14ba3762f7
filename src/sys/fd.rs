//! Descriptors: flags, copies, pipes, plain reads and writes. All are close-on-exec from birth.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::pipe::PipeFlags;

/// Makes reads and writes of the open file description fail with `EAGAIN` instead of blocking, or not.
///
/// # Errors
/// The number of `fcntl(2)`.
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(fd)?;
    flags.set(OFlags::NONBLOCK, on);
    Ok(rustix::fs::fcntl_setfl(fd, flags)?)
}

/// Sets whether `fd` closes on exec.
///
/// # Errors
/// The number of `fcntl(2)`.
pub(crate) fn set_close_on_exec(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let flags = if on {
        FdFlags::CLOEXEC
    } else {
        FdFlags::empty()
    };
    Ok(rustix::io::fcntl_setfd(fd, flags)?)
}

/// A copy of `fd`, close-on-exec, with a number of at least `minimum`.
///
/// # Errors
/// The number of `fcntl(2)`.
pub(crate) fn duplicate(fd: BorrowedFd<'_>, minimum: i32) -> io::Result<OwnedFd> {
    Ok(rustix::io::fcntl_dupfd_cloexec(fd, minimum)?)
}

/// A pipe: (reader, writer), both close-on-exec and blocking.
///
/// # Errors
/// The number of `pipe2(2)`.
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

/// Lets a pipe hold this many bytes (rounded up to a power of two of pages; 64 KiB at first).
///
/// # Errors
/// The number of `fcntl(2)`: `EPERM` over `fs.pipe-max-size` (1 MiB by default) without CAP_SYS_RESOURCE.
pub(crate) fn set_pipe_size(pipe: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    rustix::pipe::fcntl_setpipe_size(pipe, bytes)?;
    Ok(())
}

/// Reads once. 0 is the end. `EINTR` is returned to the caller.
///
/// # Errors
/// The number of `read(2)`; `EAGAIN` has the kind `WouldBlock`.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::io::read(fd, buffer)?)
}

/// Puts the offset at this byte.
///
/// # Errors
/// The number of `lseek(2)`.
pub(crate) fn seek(fd: BorrowedFd<'_>, to: u64) -> io::Result<()> {
    rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(to))?;
    Ok(())
}

/// The next part of a file, at this byte or behind it, that is no hole: first byte, and the one behind the last. `None`:
/// there is none. A filesystem that knows no holes has one part. The offset is anywhere then.
///
/// # Errors
/// The number of `lseek(2)`.
pub(crate) fn next_data(fd: BorrowedFd<'_>, from: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(fd, rustix::fs::SeekFrom::Data(from)) {
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        start => start?,
    };
    let end = rustix::fs::seek(fd, rustix::fs::SeekFrom::Hole(start))?;
    Ok(Some((start, end)))
}

/// Writes once; how many bytes were taken.
///
/// # Errors
/// The number of `write(2)`; `EAGAIN` has the kind `WouldBlock`.
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::write(fd, bytes)?)
}

/// Writes all of `bytes`, going on after `EINTR` and short writes.
///
/// # Errors
/// The number of `write(2)`; how much was written before is unknown.
pub(crate) fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Marks every descriptor from `first` on close-on-exec. Before Linux 5.11, where the call does not
/// exist, each number up to the limit is marked in turn.
///
/// # Errors
/// The number of `close_range(2)`.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: the call takes three integers and touches no memory; it closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) {
        return Err(error);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let last = u32::try_from(limit.current.unwrap_or(4096)).unwrap_or(1 << 20);
    for number in first..last.min(1 << 20) {
        let Ok(number) = i32::try_from(number) else {
            break;
        };
        // SAFETY: F_SETFD on any number is harmless: it changes a flag or fails with EBADF.
        let _closed = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Closes every descriptor from `first` on: only in a process that leaves by `_exit`. Before Linux 5.9, where the call does
/// not exist, each number up to the limit is closed in turn.
///
/// # Errors
/// The number of `close_range(2)`.
pub(crate) fn close_from(first: u32) -> io::Result<()> {
    // SAFETY: the caller never uses or drops an owner of these numbers.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::ENOSYS) {
        return Err(error);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let last = u32::try_from(limit.maximum.unwrap_or(1 << 20)).unwrap_or(1 << 20);
    for number in first..last.min(1 << 20) {
        if let Ok(number) = i32::try_from(number) {
            // SAFETY: as above; a number that is not open is refused.
            let _closed = unsafe { libc::close(number) };
        }
    }
    Ok(())
}

/// Makes copies of these the standard streams 0, 1 and 2, open over exec.
///
/// # Errors
/// The number of `fcntl(2)` or `dup2(2)`.
pub(crate) fn set_standard(streams: [BorrowedFd<'_>; 3]) -> io::Result<()> {
    // Copied out of the way first: a source may be one of the three.
    let copies = [
        duplicate(streams[0], 3)?,
        duplicate(streams[1], 3)?,
        duplicate(streams[2], 3)?,
    ];
    for (number, copy) in (0..).zip(&copies) {
        // SAFETY: 0, 1 and 2 are the standard streams, which no value of ours owns.
        if unsafe { libc::dup2(copy.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_pipe_is_close_on_exec_and_can_be_nonblocking() {
        let (reader, writer) = pipe().unwrap();
        let flags = rustix::io::fcntl_getfd(&reader).unwrap();
        assert!(flags.contains(FdFlags::CLOEXEC));
        set_nonblocking(reader.as_fd(), true).unwrap();
        let mut buffer = [0; 4];
        let error = read(reader.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        write_all(writer.as_fd(), b"abc").unwrap();
        assert_eq!(read(reader.as_fd(), &mut buffer).unwrap(), 3);
        let copy = duplicate(reader.as_fd(), 300).unwrap();
        assert!(copy.as_raw_fd() >= 300);
    }
}

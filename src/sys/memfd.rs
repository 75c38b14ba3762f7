//! Sealed memory files: the monitor's and pause's programs, and plans. See `memfd_create(2)`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use crate::sys::fd::write_all;

/// How long the kernel may have pages of a new file in hand.
const PINNED: Duration = Duration::from_secs(5);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(10);

/// A sealed, close-on-exec file of memory with these bytes, for data. Its offset is 0.
///
/// # Errors
/// The number of `memfd_create(2)`, `write(2)` or `fcntl(2)`.
pub(crate) fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    // Before Linux 6.3 the flag is refused; the file is executable then, which does no harm.
    let fd = create(name, MemfdFlags::NOEXEC_SEAL)?;
    fill(&fd, bytes)?;
    Ok(fd)
}

/// A sealed, close-on-exec program, to be run with `execveat(2)`. Nothing can write to it, not even through
/// `/proc/self/exe` of the process that runs it (CVE-2019-5736). Where `vm.memfd_noexec=2` forbids
/// executable memory files, it is a file on a read-only tmpfs that is mounted nowhere.
///
/// # Errors
/// The number of `memfd_create(2)`, `write(2)` or `fcntl(2)`, or of the file's calls.
pub(crate) fn program(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    match create(name, MemfdFlags::EXEC) {
        Ok(fd) => {
            fill(&fd, bytes)?;
            Ok(fd)
        }
        Err(error) if error.raw_os_error() == Some(Errno::ACCESS.raw_os_error()) => {
            private_copy(name, bytes)
        }
        Err(error) => Err(error),
    }
}

/// All bytes of a memory file, read from its start whatever its offset.
///
/// # Errors
/// The number of `fstat(2)` or `pread(2)`; `EFBIG` for more than `limit` bytes.
pub(crate) fn read_all(fd: BorrowedFd<'_>, limit: usize) -> io::Result<Vec<u8>> {
    let size = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(usize::MAX);
    if size > limit {
        return Err(Errno::FBIG.into());
    }
    read_front(fd, size)
}

/// The first `most` bytes of a file, or all if it has less, whatever its offset.
///
/// # Errors
/// The number of `pread(2)`.
pub(crate) fn read_front(fd: BorrowedFd<'_>, most: usize) -> io::Result<Vec<u8>> {
    let size = usize::try_from(rustix::fs::fstat(fd)?.st_size).unwrap_or(usize::MAX);
    let mut bytes = vec![0; size.min(most)];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let count = rustix::io::pread(fd, rest, done as u64)?;
        if count == 0 {
            break;
        }
        done += count;
    }
    bytes.truncate(done);
    Ok(bytes)
}

fn create(name: &str, extra: MemfdFlags) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match rustix::fs::memfd_create(name, flags | extra) {
        Err(Errno::INVAL) => Ok(rustix::fs::memfd_create(name, flags)?),
        other => Ok(other?),
    }
}

fn fill(fd: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    write_all(fd.as_fd(), bytes)?;
    rustix::fs::seek(fd, rustix::fs::SeekFrom::Start(0))?;
    seal(fd)
}

/// The kernel gives up after some 100 ms (`EBUSY`) where it has a page of the file in hand itself, to move it or to reclaim:
/// then once more. Nobody else has the file.
fn seal(fd: &OwnedFd) -> io::Result<()> {
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    let until = Instant::now() + PINNED;
    loop {
        match rustix::fs::fcntl_add_seals(fd, seals) {
            Err(Errno::BUSY) if Instant::now() < until => std::thread::sleep(AGAIN),
            outcome => return Ok(outcome?),
        }
    }
}

/// The fallback of [`program`]: a file on a tmpfs of its own, which is read-only from then on.
fn private_copy(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&context, "mode", "0700")?;
    fsconfig_create(&context)?;
    let mount = fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
    )?;
    let writer = rustix::fs::openat(
        &mount,
        name,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
        // Pause is run by its pod's user.
        Mode::from_raw_mode(0o555),
    )?;
    write_all(writer.as_fd(), bytes)?;
    drop(writer);
    let program = rustix::fs::openat(
        &mount,
        name,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // The superblock goes read-only: opening /proc/self/exe for writing fails like on the sealed file.
    rustix::mount::fsconfig_set_flag(&context, "ro")?;
    rustix::mount::fsconfig_reconfigure(&context)?;
    Ok(program)
}

/// Test help: path by which this process reaches `fd` while it is open.
#[cfg(test)]
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> std::path::PathBuf {
    std::path::Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&fd).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_cannot_change() {
        for fd in [
            sealed("plan", b"bytes").unwrap(),
            program("program", b"bytes").unwrap(),
        ] {
            assert_eq!(read_all(fd.as_fd(), 5).unwrap(), b"bytes");
            assert_eq!(
                read_all(fd.as_fd(), 4).unwrap_err().raw_os_error(),
                Some(libc::EFBIG)
            );
            assert!(write_all(fd.as_fd(), b"x").is_err());
            let path = path_of(fd.as_fd());
            if let Ok(file) = std::fs::File::options().write(true).open(path) {
                assert!(write_all(file.as_fd(), b"x").is_err());
            }
        }
    }

    #[test]
    fn pages_in_the_kernels_hands_are_waited_for() {
        let fd = create("plan", MemfdFlags::NOEXEC_SEAL).unwrap();
        write_all(fd.as_fd(), b"bytes").unwrap();
        // A pipe has the page now.
        let (reader, writer) = crate::sys::fd::pipe().unwrap();
        let flags = rustix::pipe::SpliceFlags::empty();
        let moved = rustix::pipe::splice(&fd, Some(&mut 0), &writer, None, 5, flags);
        assert_eq!(moved.unwrap(), 5);
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(500));
            drop((reader, writer));
        });
        let sealed = seal(&fd);
        holder.join().unwrap();
        sealed.unwrap();
        assert!(write_all(fd.as_fd(), b"x").is_err());
    }

    #[test]
    fn the_private_copy_is_read_only() {
        let fd = private_copy("program", b"bytes").unwrap();
        assert_eq!(read_all(fd.as_fd(), 5).unwrap(), b"bytes");
        let path = path_of(fd.as_fd());
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_mode & 0o777, 0o555);
        let error = std::fs::File::options().write(true).open(path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }
}

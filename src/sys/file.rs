//! Files by descriptor, and the one way to resolve a path inside a container's root: `openat2(2)` with
//! `RESOLVE_IN_ROOT` and `RESOLVE_NO_MAGICLINKS` (Linux 5.6), or a walk that opens one component at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::ResolveFlags;
pub(crate) use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
    chmodat, chownat, fchmod, fchown, fgetxattr, flistxattr, fsetxattr, fstat, fstatfs, ftruncate,
    futimens, linkat, makedev, mkdirat, mknodat, open, openat, readlinkat, renameat, stat, statat,
    symlinkat, utimensat,
};
#[cfg(feature = "daemon")]
pub(crate) use rustix::fs::{getxattr, lgetxattr, lsetxattr, setxattr};
use rustix::io::Errno;

/// `f_type` of procfs.
pub(crate) const PROC_SUPER_MAGIC: u64 = 0x9fa0;
/// Most symbolic links followed in one path.
const MAX_LINKS: u32 = 40;

/// Opens `path` as a process chrooted to `root` would, but through no magic link of procfs. Close-on-exec.
///
/// # Errors
/// The number of `openat2(2)`: `ENOENT`, `ELOOP` (magic link, or too many links), `ENOSYS` (before Linux 5.6).
pub(crate) fn open_in(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    open_with(root, path, flags, mode, ResolveFlags::empty())
}

/// As [`open_in`], but any symbolic link in `path` is an error (`ELOOP`).
///
/// # Errors
/// As [`open_in`].
pub(crate) fn open_in_no_links(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
) -> io::Result<OwnedFd> {
    open_with(root, path, flags, mode, ResolveFlags::NO_SYMLINKS)
}

fn open_with(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> io::Result<OwnedFd> {
    let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            // EAGAIN: somebody renamed a directory meanwhile, and `..` could not be proven safe.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Makes a directory, or nothing where one exists.
///
/// # Errors
/// The number of `mkdirat(2)`.
pub(crate) fn make_directory(parent: BorrowedFd<'_>, name: &str, mode: u32) -> io::Result<()> {
    match mkdirat(parent, name, Mode::from_raw_mode(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What [`make_in`] makes where the path ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Make {
    /// An empty regular file.
    File,
    /// A directory.
    Directory,
}

/// Opens (`O_PATH`) what `path` leads to inside `root`, making what is missing: directories with mode 0755, at the end
/// what `kind` says. Each component is opened by itself without following links; the text of a link is walked inside the
/// root, a dangling one too, so that no exchange of names by another process leads outside.
///
/// What exists at the end is returned whatever its type.
///
/// # Errors
/// The number of `openat(2)`, `mkdirat(2)` or `readlinkat(2)`; `ELOOP`: more than 40 links.
pub(crate) fn make_in(root: BorrowedFd<'_>, path: &Path, kind: Make) -> io::Result<OwnedFd> {
    match open_in(root, path, OFlags::PATH, Mode::empty()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other,
    }
    let mut todo = components(path.as_os_str().as_encoded_bytes());
    let mut above: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(name) = todo.pop() {
        if name == b".." {
            above.pop();
            continue;
        }
        let here = above.last().map_or(root, AsFd::as_fd);
        let last = todo.is_empty();
        let next = enter(here, &name, if last { kind } else { Make::Directory })?;
        if FileType::from_raw_mode(fstat(&next)?.st_mode) == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP.into());
            }
            let text = readlinkat(&next, "", Vec::new())?.into_bytes();
            if text.first() == Some(&b'/') {
                above.clear();
            }
            todo.extend(components(&text));
            continue;
        }
        above.push(next);
    }
    match above.pop() {
        Some(end) => Ok(end),
        None => crate::sys::fd::duplicate(root, 3),
    }
}

/// Components in reverse order, without `.` and empty ones.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .rev()
        .map(<[u8]>::to_vec)
        .collect()
}

fn enter(directory: BorrowedFd<'_>, name: &[u8], kind: Make) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {}
        other => return Ok(other?),
    }
    match kind {
        Make::Directory => match mkdirat(directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        },
        Make::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            match openat(directory, name, flags, Mode::from_raw_mode(0o644)) {
                Ok(_made) => {}
                Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(openat(directory, name, flags, Mode::empty())?)
}

/// Reads a regular file inside `root`, at most `limit` bytes of it. Opening does not block on a FIFO.
///
/// # Errors
/// The number of the open; `EINVAL`: not a regular file; `EFBIG`: more than `limit` bytes.
pub(crate) fn read_in(root: BorrowedFd<'_>, path: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    // A device is not even opened: its driver may act on that.
    let found = open_in(root, path, OFlags::PATH, Mode::empty())?;
    let before = fstat(&found)?;
    if FileType::from_raw_mode(before.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL.into());
    }
    let file = open_in(root, path, flags, Mode::empty())?;
    let now = fstat(&file)?;
    if (now.st_dev, now.st_ino) != (before.st_dev, before.st_ino) {
        return Err(Errno::STALE.into());
    }
    let size = usize::try_from(now.st_size).unwrap_or(usize::MAX);
    if size > limit {
        return Err(Errno::FBIG.into());
    }
    let mut bytes = Vec::with_capacity(size.saturating_add(1));
    let mut file = std::fs::File::from(file);
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    io::Read::read_to_end(&mut io::Read::take(&mut file, most), &mut bytes)?;
    if bytes.len() > limit {
        return Err(Errno::FBIG.into());
    }
    Ok(bytes)
}

/// Writes `bytes` in one `write(2)` to a file that exists (a kernel file: cgroup, sysctl, attribute).
///
/// # Errors
/// The number of `openat(2)` or `write(2)`; `WriteZero` where not all was taken.
pub(crate) fn write_kernel(directory: BorrowedFd<'_>, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = openat(directory, path, flags, Mode::empty())?;
    match rustix::io::write(&file, bytes)? {
        count if count == bytes.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

/// Sets the file mode creation mask of this process.
pub(crate) fn set_umask(mask: u32) {
    let _old = rustix::process::umask(Mode::from_raw_mode(mask));
}

/// Makes `directory` the working directory of this (single-threaded) process.
///
/// # Errors
/// The number of `fchdir(2)`.
pub(crate) fn change_directory(directory: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::fchdir(directory)?)
}

/// Path of the working directory as the kernel sees it; `(unreachable)/...` when it is outside the root.
///
/// # Errors
/// The number of `getcwd(2)`.
pub(crate) fn working_directory() -> io::Result<Vec<u8>> {
    Ok(rustix::process::getcwd(Vec::new())?.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn path_of(fd: &OwnedFd) -> std::path::PathBuf {
        std::fs::read_link(crate::sys::memfd::path_of(fd.as_fd())).unwrap()
    }

    #[test]
    fn what_is_missing_is_made_inside_the_root() {
        let base = tempfile::tempdir().unwrap();
        let top = base.path().join("root");
        std::fs::create_dir_all(top.join("real")).unwrap();
        std::fs::create_dir(base.path().join("outside")).unwrap();
        symlink("/real", top.join("absolute")).unwrap();
        symlink("../../../outside", top.join("relative")).unwrap();
        symlink("/run/deep", top.join("dangling")).unwrap();
        symlink("loop", top.join("loop")).unwrap();
        let root = std::fs::File::open(&top).unwrap();
        for (path, end) in [
            ("/a/b/c", "a/b/c"),
            ("/absolute/x", "real/x"),
            ("/relative/x", "outside/x"),
            ("/dangling/x", "run/deep/x"),
            ("/../../../y", "y"),
            ("/a/../../z", "z"),
            ("/", ""),
        ] {
            let made = make_in(root.as_fd(), Path::new(path), Make::Directory).unwrap();
            let want = if end.is_empty() {
                top.clone()
            } else {
                top.join(end)
            };
            assert_eq!(path_of(&made), want, "{path}");
        }
        let file = make_in(root.as_fd(), Path::new("/f/g"), Make::File).unwrap();
        let kind = FileType::from_raw_mode(fstat(&file).unwrap().st_mode);
        assert_eq!(kind, FileType::RegularFile);
        let error = make_in(root.as_fd(), Path::new("/loop/x"), Make::File).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        assert_eq!(
            std::fs::read_dir(base.path().join("outside"))
                .unwrap()
                .count(),
            0
        );
    }

    #[test]
    fn magic_links_lead_nowhere() {
        let root = std::fs::File::open("/").unwrap();
        for path in ["/proc/self/fd/0", "/proc/self/cwd", "/proc/self/root/etc"] {
            let error =
                open_in(root.as_fd(), Path::new(path), OFlags::PATH, Mode::empty()).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ELOOP), "{path}");
        }
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let base = tempfile::tempdir().unwrap();
        let root = std::fs::File::open(base.path()).unwrap();
        let read = |name: &str| read_in(root.as_fd(), Path::new(name), 100);
        std::fs::File::create(base.path().join("sparse"))
            .unwrap()
            .set_len(1 << 40)
            .unwrap();
        assert_eq!(
            read("sparse").unwrap_err().raw_os_error(),
            Some(libc::EFBIG)
        );
        rustix::fs::mkfifoat(&root, "fifo", Mode::from_raw_mode(0o600)).unwrap();
        assert_eq!(read("fifo").unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(read(".").unwrap_err().raw_os_error(), Some(libc::EINVAL));
        assert_eq!(read("none").unwrap_err().kind(), io::ErrorKind::NotFound);
        let mut file = std::fs::File::create(base.path().join("fine")).unwrap();
        io::Write::write_all(&mut file, b"text").unwrap();
        assert_eq!(read("fine").unwrap(), b"text");
    }
}

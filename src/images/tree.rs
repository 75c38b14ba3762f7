//! Directory trees by descriptor: removal, disk usage, copies that share their files. No symlink is ever
//! followed, so a tree that others made cannot lead elsewhere.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, XattrFlags};
use rustix::io::{Errno, Result};

const OPEN_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens a directory without following a symlink in its last component.
///
/// # Errors
///
/// `ENOTDIR`, `ELOOP`: it is none; others of openat(2).
pub(crate) fn open(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    rustix::fs::openat(parent, name, OPEN_DIR, Mode::empty())
}

/// Calls `each` with name and type of everything in the directory but `.` and `..`.
fn scan(dir: BorrowedFd<'_>, mut each: impl FnMut(&CStr, FileType) -> Result<()>) -> Result<()> {
    let mut buffer = [const { MaybeUninit::uninit() }; 16 * 1024];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            each(name, entry.file_type())?;
        }
    }
    Ok(())
}

/// Name and type of everything in the directory but `.` and `..`.
///
/// # Errors
///
/// Those of the system calls.
pub(crate) fn names(dir: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, FileType)>> {
    let mut found = vec![];
    scan(dir, |name, kind| {
        found.push((name.to_bytes().to_vec(), kind));
        Ok(())
    })?;
    Ok(found)
}

/// Removes `name` in `parent` with everything below; nothing there is fine.
///
/// Holds one descriptor per level. Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; what could be removed is gone then.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(errno),
    }
    let mut stack = vec![Emptying::new(parent, name)?];
    while let Some(top) = stack.last_mut() {
        if let Some(name) = top.below.pop() {
            let next = Emptying::new(top.dir.as_fd(), &name)?;
            stack.push(next);
            continue;
        }
        let Some(emptied) = stack.pop() else { break };
        let above = stack.last().map_or(parent, |above| above.dir.as_fd());
        rustix::fs::unlinkat(above, &emptied.name[..], AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// A directory with nothing left in it but directories.
struct Emptying {
    dir: OwnedFd,
    name: Vec<u8>,
    /// Directories in it, still to be removed.
    below: Vec<Vec<u8>>,
}

impl Emptying {
    fn new(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Self> {
        let dir = open(parent, name)?;
        let mut below = vec![];
        scan(dir.as_fd(), |name, kind| {
            if kind != FileType::Directory {
                match rustix::fs::unlinkat(&dir, name, AtFlags::empty()) {
                    Err(Errno::ISDIR) => {}
                    Ok(()) | Err(Errno::NOENT) => return Ok(()),
                    Err(errno) => return Err(errno),
                }
            }
            below.push(name.to_bytes().to_vec());
            Ok(())
        })?;
        Ok(Self {
            dir,
            name: name.to_vec(),
            below,
        })
    }
}

/// Removes the tree at `path`; nothing there is fine.
///
/// # Errors
///
/// As [`remove`].
pub(crate) fn remove_path(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    remove(CWD, path.as_os_str().as_bytes())
}

/// Bytes allocated and inodes of the tree at `path`, as du(1) counts: hard links once, other
/// filesystems not at all. What vanishes meanwhile, or lies deeper than a path can say, is left out.
///
/// Blocks on the disk.
///
/// # Errors
///
/// `path` cannot be opened.
#[cfg(test)]
pub(crate) fn usage(path: &Path) -> Result<(u64, u64)> {
    let root = rustix::fs::openat(CWD, path, OPEN_DIR, Mode::empty())?;
    let stat = rustix::fs::fstat(&root)?;
    let (mut bytes, mut inodes) = (blocks(&stat), 1);
    let mut linked = std::collections::HashSet::new();
    let mut pending = vec![vec![]];
    let beneath = rustix::fs::ResolveFlags::BENEATH | rustix::fs::ResolveFlags::NO_SYMLINKS;
    while let Some(path) = pending.pop() {
        let name: &[u8] = if path.is_empty() { b"." } else { &path };
        let dir = rustix::fs::openat2(&root, name, OPEN_DIR, Mode::empty(), beneath);
        let Ok(dir) = dir else { continue };
        let scanned = scan(dir.as_fd(), |name, _| {
            let Ok(stat) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
                return Ok(());
            };
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            if !directory && stat.st_nlink > 1 && !linked.insert((stat.st_dev, stat.st_ino)) {
                return Ok(());
            }
            bytes += blocks(&stat);
            inodes += 1;
            if directory {
                let mut below = path.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend_from_slice(name.to_bytes());
                pending.push(below);
            }
            Ok(())
        });
        if scanned.is_err() {
            continue;
        }
    }
    Ok((bytes, inodes))
}

#[cfg(test)]
fn blocks(stat: &rustix::fs::Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0) * 512
}

/// Copies the tree of `from` into the empty directory `to`: directories anew, with owner, mode, all
/// attributes and times; everything else as one more hard link. Returns how many directories.
///
/// Holds two descriptors per level. Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; the caller removes what was made.
pub(crate) fn share(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<u64> {
    let mut directories = 1;
    scan(from, |name, kind| {
        if kind != FileType::Directory {
            return rustix::fs::linkat(from, name, to, name, AtFlags::empty());
        }
        rustix::fs::mkdirat(to, name, Mode::RWXU)?;
        let (below, copy) = (open(from, name.to_bytes())?, open(to, name.to_bytes())?);
        directories += share(below.as_fd(), copy.as_fd())?;
        Ok(())
    })?;
    let stat = rustix::fs::fstat(from)?;
    describe(
        to,
        &Meta {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            xattrs: xattrs(from)?,
        },
    )?;
    rustix::fs::futimens(
        to,
        &rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec {
                tv_sec: stat.st_atime,
                tv_nsec: i64::try_from(stat.st_atime_nsec).unwrap_or(0),
            },
            last_modification: rustix::fs::Timespec {
                tv_sec: stat.st_mtime,
                tv_nsec: i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
            },
        },
    )?;
    Ok(directories)
}

/// What a directory looks like besides its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// All attributes, sorted.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What the open directory looks like.
///
/// # Errors
///
/// Those of the system calls.
pub(crate) fn meta(dir: BorrowedFd<'_>) -> Result<Meta> {
    let stat = rustix::fs::fstat(dir)?;
    Ok(Meta {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        xattrs: xattrs(dir)?,
    })
}

/// Makes the open directory look so; attributes it has besides stay.
///
/// # Errors
///
/// Those of the system calls.
pub(crate) fn describe(dir: BorrowedFd<'_>, meta: &Meta) -> Result<()> {
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(meta.uid),
        rustix::fs::Gid::from_raw(meta.gid),
    );
    rustix::fs::fchown(dir, Some(uid), Some(gid))?;
    rustix::fs::fchmod(dir, Mode::from_raw_mode(meta.mode))?;
    for (name, value) in &meta.xattrs {
        rustix::fs::fsetxattr(dir, &name[..], value, XattrFlags::empty())?;
    }
    Ok(())
}

fn xattrs(dir: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // Linux: neither the list nor one value is ever longer than 64 KiB.
    let mut list = vec![0; 65536];
    let length = match rustix::fs::flistxattr(dir, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(errno),
    };
    let mut found = vec![];
    for name in list[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 65536];
        match rustix::fs::fgetxattr(dir, name, &mut value[..]) {
            Ok(length) => {
                value.truncate(length);
                found.push((name.to_vec(), value));
            }
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno),
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    #[expect(clippy::disallowed_methods, reason = "makes files under test")]
    fn trees_are_shared_counted_and_removed() {
        let place = tempfile::tempdir().unwrap();
        let (a, b) = (place.path().join("a"), place.path().join("b"));
        fs::create_dir_all(a.join("x/y/z")).unwrap();
        fs::write(a.join("x/file"), vec![1; 10_000]).unwrap();
        fs::hard_link(a.join("x/file"), a.join("x/again")).unwrap();
        std::os::unix::fs::symlink("/", a.join("x/y/root")).unwrap();
        let before = usage(&a).unwrap();
        assert_eq!(before.1, 6);
        assert!(before.0 >= 12_288, "{before:?}");
        fs::create_dir(&b).unwrap();
        let (from, to) = (fs::File::open(&a).unwrap(), fs::File::open(&b).unwrap());
        assert_eq!(share(from.as_fd(), to.as_fd()).unwrap(), 4);
        assert_eq!(fs::read(b.join("x/again")).unwrap().len(), 10_000);
        assert_eq!(usage(place.path()).unwrap().1, 1 + 6 + 4);
        remove_path(&a).unwrap();
        remove_path(&a).unwrap();
        assert!(!a.exists());
        assert_eq!(usage(&b).unwrap().1, 6);
        assert!(fs::exists("/proc").unwrap());
    }
}

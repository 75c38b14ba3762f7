//! Directory trees by descriptor: removal, merging, copies that share their files. No symlink is ever
//! followed, so a tree that others made cannot lead elsewhere.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::{Errno, Result};

use crate::sys::descent::{Ascent, Descent, Failure, Visit, Walk, open_directory};
use crate::sys::remove::Removal;

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

/// Removes `name` in `parent` with everything below; nothing there is fine. Blocks on the disk.
///
/// # Errors
///
/// The first of the system calls; what could be removed is gone then.
pub(crate) fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let name = CString::new(name).map_err(|_nul| Errno::INVAL)?;
    match crate::sys::remove::remove(parent, &name, &mut || false) {
        Removal::Gone | Removal::Stopped => Ok(()),
        Removal::Left(left) => Err(left.errno),
    }
}

/// Removes the tree at `path`; nothing there is fine.
///
/// # Errors
///
/// As [`remove`].
pub(crate) fn remove_path(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt as _;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL);
    };
    let parent = rustix::fs::openat(CWD, parent, OPEN_DIR, Mode::empty())?;
    remove(parent.as_fd(), name.as_bytes())
}

/// Bytes allocated and inodes of the tree at `path`, itself included, as du(1) counts.
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
    let mut usage = crate::sys::usage::Usage::of(root)?;
    usage.run(&mut || false);
    let counted = usage.counted();
    let own = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
    Ok((counted.bytes + own, counted.inodes + 1))
}

/// Copies the tree of `from` into the empty directory `to`: directories anew, with owner, mode, all
/// attributes and times; everything else as one more hard link. Returns how many directories.
///
/// Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; the caller removes what was made.
pub(crate) fn share(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<u64> {
    let mut share = Share {
        to: Descent::at(again(to)?)?,
        directories: 1,
    };
    Walk::of(again(from)?)?.run(&mut share, &mut || false)?;
    Ok(share.directories)
}

/// The directory anew, to be read from its beginning.
fn again(directory: BorrowedFd<'_>) -> Result<OwnedFd> {
    open_directory(directory, c".")
}

struct Share {
    /// The place in the copy.
    to: Descent,
    directories: u64,
}

impl Visit for Share {
    type Error = Errno;

    fn entry(&mut self, at: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Result<()> {
        match kind {
            FileType::Directory => Err(Errno::XDEV),
            _ => {
                let to = self.to.here().ok_or(Errno::STALE)?;
                rustix::fs::linkat(at, name, to, name, AtFlags::empty())
            }
        }
    }

    fn enter(
        &mut self,
        _at: BorrowedFd<'_>,
        name: &CStr,
        _directory: BorrowedFd<'_>,
        _depth: usize,
    ) -> Result<bool> {
        let to = self.to.here().ok_or(Errno::STALE)?;
        rustix::fs::mkdirat(to, name, Mode::RWXU)?;
        let copy = open_directory(to, name)?;
        self.to.enter(copy)?;
        self.directories += 1;
        Ok(true)
    }

    fn leave(&mut self, from: BorrowedFd<'_>) -> Result<()> {
        let to = self.to.here().ok_or(Errno::STALE)?;
        describe(to, &meta(from)?)?;
        rustix::fs::futimens(to, &times(&rustix::fs::fstat(from)?))?;
        match self.to.leave() {
            Ascent::Parent | Ascent::Out => Ok(()),
            Ascent::Lost => Err(Errno::STALE),
        }
    }

    fn failed(&mut self, failure: Failure) -> Result<()> {
        Err(failure.errno)
    }
}

fn times(stat: &rustix::fs::Stat) -> rustix::fs::Timestamps {
    rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: i64::try_from(stat.st_atime_nsec).unwrap_or(0),
        },
        last_modification: rustix::fs::Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: i64::try_from(stat.st_mtime_nsec).unwrap_or(0),
        },
    }
}

/// Moves everything of `from` into `to`; what is in both stays as it is in `to`, directories are merged.
///
/// Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; some of it may be moved then.
pub(crate) fn merge(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let mut merge = Merge(Descent::at(again(to)?)?);
    Walk::of(again(from)?)?.run(&mut merge, &mut || false)?;
    Ok(())
}

/// The place in what is merged into.
struct Merge(Descent);

impl Merge {
    /// `false`: the name is taken.
    fn moved(&self, at: BorrowedFd<'_>, name: &CStr) -> Result<bool> {
        let to = self.0.here().ok_or(Errno::STALE)?;
        match rustix::fs::renameat_with(at, name, to, name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

impl Visit for Merge {
    type Error = Errno;

    fn entry(&mut self, at: BorrowedFd<'_>, name: &CStr, _kind: FileType) -> Result<()> {
        self.moved(at, name).map(|_moved| ())
    }

    fn enter(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        _directory: BorrowedFd<'_>,
        _depth: usize,
    ) -> Result<bool> {
        if self.moved(at, name)? {
            return Ok(false);
        }
        let to = self.0.here().ok_or(Errno::STALE)?;
        match open_directory(to, name) {
            Ok(to) => self.0.enter(to).map(|()| true),
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    fn leave(&mut self, _directory: BorrowedFd<'_>) -> Result<()> {
        match self.0.leave() {
            Ascent::Parent | Ascent::Out => Ok(()),
            Ascent::Lost => Err(Errno::STALE),
        }
    }

    fn failed(&mut self, failure: Failure) -> Result<()> {
        Err(failure.errno)
    }
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

    /// As deep as a layer can be, and deeper, on a thread of the daemon's.
    #[test]
    fn deep_trees_are_shared_merged_and_removed_on_a_small_stack() {
        use crate::sys::descent::tests::{Place, file, nest, open};
        let small = std::thread::Builder::new().stack_size(256 * 1024);
        let work = || {
            let place = Place::new();
            let (a, b, c) = (place.made("a"), place.made("b"), place.made("c"));
            file(&nest(&a, 1500, "d"), "bottom", 1);
            assert_eq!(share(open(&a).as_fd(), open(&b).as_fd()).unwrap(), 1501);
            assert_eq!(usage(&b).unwrap().1, 1502);
            // In the way, but for the innermost.
            drop(nest(&c, 1499, "d"));
            merge(open(&b).as_fd(), open(&c).as_fd()).unwrap();
            assert_eq!(usage(&c).unwrap().1, 1502);
            assert_eq!(usage(&b).unwrap().1, 1500);
            remove_path(&c).unwrap();
            assert!(!c.exists());
        };
        small.spawn(work).unwrap().join().unwrap();
    }
}

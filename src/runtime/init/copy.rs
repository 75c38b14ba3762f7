//! What an image has at the place of a volume is copied into the volume, by descriptors only: names and links of the image
//! lead nowhere else (CVE-2022-23648).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::runtime::plan::{Context as _, Fault};
use crate::sys::descent::{Ascent, Descent, Failure, Visit, Walk, open_directory, open_here};
use crate::sys::fd;
use crate::sys::file::{
    self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};

use crate::sys::remove::{Removal, remove};

use super::Step;

const STAGE: &str = "volume";
/// Levels that are copied: what is walked deeper than any path can say nobody needs.
const MAX_DEPTH: usize = 1 << 16;

/// Copies the directory `from` (any descriptor of it) into `to`, if `to` is empty: owner, mode and times of the
/// directory itself too. What is mounted below it is an empty file or directory in the copy.
pub(super) fn directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &str) -> Step {
    let (from, to) = (reopen(from, path)?, reopen(to, path)?);
    let mut present = Dir::read_from(&to).context(STAGE, "getdents", path)?;
    let dots = |name: &CStr| matches!(name.to_bytes(), b"." | b"..");
    let used = present.any(|entry| entry.is_ok_and(|entry| !dots(entry.file_name())));
    if used {
        return Ok(());
    }
    let top = reopen(to.as_fd(), path)?;
    let mut copy = Copy {
        path,
        to: Descent::at(top).context(STAGE, "fstat", path)?,
        root: &to,
        linked: None,
    };
    let mut walk = Walk::of(from).context(STAGE, "fstat", path)?;
    let copied = walk.run(&mut copy, &mut || false);
    copied.and(copy.forget_links())
}

/// A readable descriptor of a directory known by an `O_PATH` one.
fn reopen(directory: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    file::openat(directory, ".", flags, Mode::empty()).context(STAGE, "openat", path)
}

/// The copy under way.
struct Copy<'a> {
    /// Of the volume, for errors.
    path: &'a str,
    /// The place in the volume.
    to: Descent,
    /// The volume.
    root: &'a OwnedFd,
    /// A directory in it, while it is being filled, with one more name of each file that has several: device and inode in
    /// the image. However many they are, they take no memory.
    linked: Option<(OwnedFd, CString)>,
}

impl Copy<'_> {
    fn here(&self) -> Result<BorrowedFd<'_>, Fault> {
        let gone = || Fault::check(STAGE, "copy", format_args!("{}: it was left", self.path));
        self.to.here().ok_or_else(gone)
    }

    /// Makes another name of a file that was copied before. `false`: it was not.
    fn link(&mut self, key: &str, name: &CStr) -> Result<bool, Fault> {
        let Some((linked, _)) = &self.linked else {
            return Ok(false);
        };
        let to = self.here()?;
        match file::linkat(linked, key, to, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            // As many names as a file can have, ours included.
            Err(Errno::MLINK) => file::renameat(linked, key, to, name)
                .context(STAGE, "renameat", self.path)
                .map(|()| true),
            Err(error) => Err(Fault::call(STAGE, "linkat", self.path, &error.into())),
        }
    }

    /// Remembers a file that has other names.
    fn remember(&mut self, key: &str, name: &CStr) -> Step {
        if self.linked.is_none() {
            let random: [u8; 8] = crate::sys::random::bytes().context(STAGE, "getrandom", "")?;
            let own = format!(".berth-copy-{:016x}", u64::from_ne_bytes(random));
            let own = CString::new(own).map_err(|_nul| Fault::check(STAGE, "copy", self.path))?;
            let mode = Mode::from_raw_mode(0o700);
            file::mkdirat(self.root, &own, mode).context(STAGE, "mkdirat", self.path)?;
            let made = open_directory(self.root.as_fd(), &own);
            self.linked = Some((made.context(STAGE, "openat2", self.path)?, own));
        }
        let Some((linked, _)) = &self.linked else {
            return Ok(());
        };
        file::linkat(self.here()?, name, linked, key, AtFlags::empty())
            .context(STAGE, "linkat", self.path)
    }

    fn forget_links(&mut self) -> Step {
        let Some((_, own)) = self.linked.take() else {
            return Ok(());
        };
        match remove(self.root.as_fd(), &own, &mut || false) {
            Removal::Gone | Removal::Stopped => Ok(()),
            Removal::Left(left) => Err(Fault::check(STAGE, "remove", left)),
        }
    }

    fn file(&mut self, at: BorrowedFd<'_>, name: &CStr, status: &Stat) -> Step {
        let path = self.path;
        let key = format!("{:x}-{:x}", status.st_dev, status.st_ino);
        if status.st_nlink > 1 && self.link(&key, name)? {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        let source = match open_here(at, name, flags) {
            Err(Errno::XDEV) => None,
            source => Some(source.context(STAGE, "openat2", path)?),
        };
        let to = self.here()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let target = file::openat(to, name, flags, Mode::from_raw_mode(0o600));
        let target = target.context(STAGE, "openat", path)?;
        let Some(source) = source else {
            return Ok(());
        };
        bytes(&source, &target, status.st_size, path)?;
        // The owner first: a change of owner clears set-user-id and file capabilities.
        own(target.as_fd(), status, path)?;
        attributes(source.as_fd(), target.as_fd(), path)?;
        match status.st_nlink > 1 {
            true => self.remember(&key, name),
            false => Ok(()),
        }
    }
}

impl Visit for Copy<'_> {
    type Error = Fault;

    fn entry(&mut self, at: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Step {
        let path = self.path;
        if kind == FileType::Directory {
            let mode = Mode::from_raw_mode(0o755);
            return file::mkdirat(self.here()?, name, mode).context(STAGE, "mkdirat", path);
        }
        let status = match file::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            status => status.context(STAGE, "fstatat", path)?,
        };
        let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
        match FileType::from_raw_mode(status.st_mode) {
            FileType::RegularFile => self.file(at, name, &status),
            FileType::Symlink => {
                let text = file::readlinkat(at, name, Vec::new());
                let text = text.context(STAGE, "readlinkat", path)?;
                let to = self.here()?;
                file::symlinkat(&text, to, name).context(STAGE, "symlinkat", path)?;
                own_by_name(to, name, &status, path)
            }
            // A socket without its process is nothing.
            FileType::Socket => Ok(()),
            kind => {
                let to = self.here()?;
                file::mknodat(to, name, kind, mode, status.st_rdev)
                    .context(STAGE, "mknodat", path)?;
                own_by_name(to, name, &status, path)
            }
        }
    }

    fn enter(
        &mut self,
        _at: BorrowedFd<'_>,
        name: &CStr,
        _directory: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<bool, Fault> {
        let path = self.path;
        if depth > MAX_DEPTH {
            let why = format_args!("{path}: more than {MAX_DEPTH} directories in each other");
            return Err(Fault::check(STAGE, "copy", why));
        }
        let to = self.here()?;
        file::mkdirat(to, name, Mode::from_raw_mode(0o700)).context(STAGE, "mkdirat", path)?;
        let made = open_directory(to, name).context(STAGE, "openat2", path)?;
        self.to.enter(made).context(STAGE, "fstat", path)?;
        Ok(true)
    }

    fn leave(&mut self, from: BorrowedFd<'_>) -> Step {
        let path = self.path;
        if self.to.depth() == 0 {
            // Before the last times are set.
            self.forget_links()?;
        }
        let status = file::fstat(from).context(STAGE, "fstat", path)?;
        let to = self.here()?;
        attributes(from, to, path)?;
        own(to, &status, path)?;
        match self.to.leave() {
            Ascent::Parent | Ascent::Out => Ok(()),
            Ascent::Lost => Err(moved(path)),
        }
    }

    fn failed(&mut self, failure: Failure) -> Step {
        match failure.errno {
            Errno::STALE => Err(moved(self.path)),
            errno => Err(Fault::call(STAGE, failure.call, self.path, &errno.into())),
        }
    }
}

fn moved(path: &str) -> Fault {
    let why = format_args!("{path}: directories in it were moved meanwhile");
    Fault::check(STAGE, "copy", why)
}

/// Holes stay holes, as names of one file stay names of one: an image of some bytes could fill the node's disk with what is
/// in none of its layers.
fn bytes(source: &OwnedFd, target: &OwnedFd, size: i64, path: &str) -> Step {
    let mut buffer = vec![0; 128 * 1024];
    let mut at = 0;
    while let Some((start, end)) =
        fd::next_data(source.as_fd(), at).context(STAGE, "lseek", path)?
    {
        fd::seek(source.as_fd(), start).context(STAGE, "lseek", path)?;
        fd::seek(target.as_fd(), start).context(STAGE, "lseek", path)?;
        at = start;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX);
            let wanted = wanted.min(buffer.len());
            let room = buffer.get_mut(..wanted).unwrap_or_default();
            let count = fd::read(source.as_fd(), room).context(STAGE, "read", path)?;
            if count == 0 {
                return Err(Fault::check(
                    STAGE,
                    "read",
                    format_args!("{path}: too short"),
                ));
            }
            let part = room.get(..count).unwrap_or_default();
            fd::write_all(target.as_fd(), part).context(STAGE, "write", path)?;
            at += u64::try_from(count).unwrap_or_default();
        }
    }
    let size = u64::try_from(size).unwrap_or_default();
    file::ftruncate(target, size).context(STAGE, "ftruncate", path)
}

fn times(status: &Stat) -> Timestamps {
    let time = |seconds: i64, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::try_from(nanoseconds).unwrap_or_default(),
    };
    Timestamps {
        last_access: time(status.st_atime, status.st_atime_nsec),
        last_modification: time(status.st_mtime, status.st_mtime_nsec),
    }
}

fn own(target: BorrowedFd<'_>, status: &Stat, path: &str) -> Step {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    file::fchown(target, Some(uid), Some(gid)).context(STAGE, "fchown", path)?;
    let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
    file::fchmod(target, mode).context(STAGE, "fchmod", path)?;
    file::futimens(target, &times(status)).context(STAGE, "futimens", path)
}

fn own_by_name(to: BorrowedFd<'_>, name: &CStr, status: &Stat, path: &str) -> Step {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    file::chownat(to, name, Some(uid), Some(gid), nofollow).context(STAGE, "fchownat", path)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
        file::chmodat(to, name, mode, AtFlags::empty()).context(STAGE, "fchmodat", path)?;
    }
    file::utimensat(to, name, &times(status), nofollow).context(STAGE, "utimensat", path)
}

/// Copies extended attributes, save overlayfs's own; a filesystem that has none takes none.
fn attributes(source: BorrowedFd<'_>, target: BorrowedFd<'_>, path: &str) -> Step {
    let mut names = vec![0; 64 * 1024];
    let Ok(length) = file::flistxattr(source, &mut *names) else {
        return Ok(());
    };
    let names = names.get(..length).unwrap_or_default();
    for name in names.split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        if name.to_bytes().starts_with(b"trusted.") {
            continue;
        }
        let mut value = vec![0; 64 * 1024];
        let Ok(length) = file::fgetxattr(source, name, &mut *value) else {
            continue;
        };
        let value = value.get(..length).unwrap_or_default();
        match file::fsetxattr(target, name, value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(error) if std::io::Error::from(error).kind() == std::io::ErrorKind::Unsupported => {
            }
            Err(error) => return Err(Fault::call(STAGE, "fsetxattr", path, &error.into())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    fn open(path: &std::path::Path) -> std::fs::File {
        std::fs::File::open(path).unwrap()
    }

    #[test]
    fn names_of_one_file_stay_names_of_one() {
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [from, to] = directories.each_ref().map(tempfile::TempDir::path);
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        std::fs::create_dir(from.join("c")).unwrap();
        for name in ["a/b/one", "alone"] {
            let file = std::fs::File::create(from.join(name)).unwrap();
            file.write_all_at(name.as_bytes(), 0).unwrap();
        }
        for name in ["a/two", "c/three", "four"] {
            std::fs::hard_link(from.join("a/b/one"), from.join(name)).unwrap();
        }
        directory(open(from).as_fd(), open(to).as_fd(), "/data").unwrap();
        let number = |name: &str| {
            let found = std::fs::metadata(to.join(name)).unwrap();
            (found.ino(), found.nlink())
        };
        for name in ["a/two", "c/three", "four"] {
            assert_eq!(number(name), (number("a/b/one").0, 4), "{name}");
            assert_eq!(std::fs::read(to.join(name)).unwrap(), b"a/b/one");
        }
        assert_eq!(number("alone").1, 1);
    }

    #[test]
    fn holes_stay_holes() {
        let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [from, to] = directories.each_ref().map(tempfile::TempDir::path);
        let hole = 1 << 29;
        for (name, parts, size) in [
            ("empty", &[][..], 0),
            ("hole", &[], hole),
            ("dense", &[(0, "all")], 3),
            ("ends", &[(0, "first"), (hole, "last")], hole + 4),
            ("front", &[(hole, "last")], 2 * hole),
        ] {
            let file = std::fs::File::create(from.join(name)).unwrap();
            file.set_len(size).unwrap();
            for (at, text) in parts {
                file.write_all_at(text.as_bytes(), *at).unwrap();
            }
        }
        directory(open(from).as_fd(), open(to).as_fd(), "/data").unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let name = entry.unwrap().file_name();
            let (source, copy) = (open(&from.join(&name)), open(&to.join(&name)));
            let told = [&source, &copy].map(|file| file.metadata().unwrap());
            assert_eq!(told[0].len(), told[1].len(), "{name:?}");
            assert!(told[1].blocks() <= told[0].blocks(), "{name:?}: {told:?}");
            for at in [0, hole, told[0].len().saturating_sub(8)] {
                let read = |file: &std::fs::File| {
                    let mut part = [0; 8];
                    let count = file.read_at(&mut part, at).unwrap();
                    part[..count].to_vec()
                };
                assert_eq!(read(&source), read(&copy), "{name:?} at {at}");
            }
        }
    }

    #[test]
    fn any_depth_is_copied_and_nothing_is_left_beside() {
        use crate::sys::descent::tests::{Place, file, nest, open};
        let place = Place::new();
        let (from, to) = (place.made("from"), place.made("to"));
        file(&nest(&from, 1500, "d"), "bottom", 5);
        file(&open(&from), "one", 1);
        std::fs::hard_link(from.join("one"), from.join("d/two")).unwrap();
        directory(open(&from).as_fd(), open(&to).as_fd(), "/data").unwrap();
        let mut names: Vec<_> = std::fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["d", "one"]);
        let number = |path: &str| std::fs::metadata(to.join(path)).unwrap().ino();
        assert_eq!(number("one"), number("d/two"));
        let mut usage = crate::sys::usage::Usage::at(&to).unwrap();
        usage.run(&mut || false);
        assert_eq!(usage.counted().inodes, 1502);
    }

    #[test]
    fn what_is_mounted_is_not_copied() {
        use crate::sys::descent::tests::{Place, file, in_own_mounts, mount_tmpfs, open};
        let place = Place::new();
        let (from, to) = (place.made("from"), place.made("to"));
        let mounted = place.made("from/a/mounted");
        let copied = to.clone();
        in_own_mounts(move || {
            mount_tmpfs(&mounted);
            file(&open(&mounted), "of another", 1);
            directory(open(&from).as_fd(), open(&to).as_fd(), "/data").unwrap();
        });
        let inside = std::fs::read_dir(copied.join("a/mounted")).unwrap();
        assert_eq!(inside.count(), 0);
    }
}

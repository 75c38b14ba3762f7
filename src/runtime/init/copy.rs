//! What an image has at the place of a volume is copied into the volume, by descriptors only: names and links of the image
//! lead nowhere else (CVE-2022-23648).

use std::collections::HashMap;
use std::ffi::{CStr, OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use crate::runtime::plan::{Context, Fault};
use crate::sys::fd;
use crate::sys::file::{
    self, AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};

use super::Step;

const STAGE: &str = "volume";
/// Deeper trees are refused: each level holds two descriptors.
const MAX_DEPTH: usize = 200;

/// Copies the directory `from` (any descriptor of it) into `to`, if `to` is empty: owner, mode and times of the
/// directory itself too.
pub(super) fn directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, path: &str) -> Step {
    let (from, to) = (reopen(from, path)?, reopen(to, path)?);
    let mut present = Dir::read_from(&to).context(STAGE, "getdents", path)?;
    let dots = |name: &CStr| matches!(name.to_bytes(), b"." | b"..");
    let used = present.any(|entry| entry.is_ok_and(|entry| !dots(entry.file_name())));
    if used {
        return Ok(());
    }
    let mut done = Done {
        root: &to,
        links: HashMap::new(),
        below: Vec::new(),
    };
    contents(&from, &to, path, &mut done)?;
    let status = file::fstat(&from).context(STAGE, "fstat", path)?;
    attributes(&from, &to, path)?;
    own(&to, &status, path)
}

/// A readable descriptor of a directory known by an `O_PATH` one.
fn reopen(directory: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    file::openat(directory, ".", flags, Mode::empty()).context(STAGE, "openat", path)
}

/// What has been copied so far.
struct Done<'a> {
    /// The volume.
    root: &'a OwnedFd,
    /// Files of several names: device and inode in the image, the first name in the volume.
    links: HashMap<(u64, u64), PathBuf>,
    /// The directories between the volume and what is copied now.
    below: Vec<OsString>,
}

impl Done<'_> {
    fn place_of(&self, name: &CStr) -> PathBuf {
        let mut place: PathBuf = self.below.iter().collect();
        place.push(OsStr::from_bytes(name.to_bytes()));
        place
    }
}

fn contents(from: &OwnedFd, to: &OwnedFd, path: &str, done: &mut Done<'_>) -> Step {
    if done.below.len() > MAX_DEPTH {
        return Err(Fault::check(
            STAGE,
            "copy",
            format_args!("{path}: too deep"),
        ));
    }
    let entries = Dir::read_from(from).context(STAGE, "getdents", path)?;
    for entry in entries {
        let entry = entry.context(STAGE, "getdents", path)?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            one(from, to, name, path, done)?;
        }
    }
    Ok(())
}

fn one(from: &OwnedFd, to: &OwnedFd, name: &CStr, path: &str, done: &mut Done<'_>) -> Step {
    let status = file::statat(from, name, AtFlags::SYMLINK_NOFOLLOW);
    let status = status.context(STAGE, "fstatat", path)?;
    let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
    match FileType::from_raw_mode(status.st_mode) {
        FileType::Directory => {
            file::mkdirat(to, name, Mode::from_raw_mode(0o700)).context(STAGE, "mkdirat", path)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let open = |parent: &OwnedFd| file::openat(parent, name, flags, Mode::empty());
            let below = open(from).context(STAGE, "openat", path)?;
            let copy = open(to).context(STAGE, "openat", path)?;
            done.below
                .push(OsStr::from_bytes(name.to_bytes()).to_owned());
            contents(&below, &copy, path, done)?;
            let _name = done.below.pop();
            attributes(&below, &copy, path)?;
            own(&copy, &status, path)
        }
        FileType::RegularFile => {
            if status.st_nlink > 1 {
                let file = (status.st_dev, status.st_ino);
                if let Some(first) = done.links.get(&file) {
                    return file::linkat(done.root, first, to, name, AtFlags::empty())
                        .context(STAGE, "linkat", path);
                }
                let place = done.place_of(name);
                let _new = done.links.insert(file, place);
            }
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let source = file::openat(from, name, flags, Mode::empty());
            let source = source.context(STAGE, "openat", path)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let target = file::openat(to, name, flags, Mode::from_raw_mode(0o600));
            let target = target.context(STAGE, "openat", path)?;
            bytes(&source, &target, status.st_size, path)?;
            // The owner first: a change of owner clears set-user-id and file capabilities.
            own(&target, &status, path)?;
            attributes(&source, &target, path)
        }
        FileType::Symlink => {
            let text = file::readlinkat(from, name, Vec::new());
            let text = text.context(STAGE, "readlinkat", path)?;
            file::symlinkat(&text, to, name).context(STAGE, "symlinkat", path)?;
            own_by_name(to, name, &status, path)
        }
        // A socket without its process is nothing.
        FileType::Socket => Ok(()),
        kind => {
            file::mknodat(to, name, kind, mode, status.st_rdev).context(STAGE, "mknodat", path)?;
            own_by_name(to, name, &status, path)
        }
    }
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

fn own(target: &OwnedFd, status: &Stat, path: &str) -> Step {
    let (uid, gid) = (Uid::from_raw(status.st_uid), Gid::from_raw(status.st_gid));
    file::fchown(target, Some(uid), Some(gid)).context(STAGE, "fchown", path)?;
    let mode = Mode::from_raw_mode(status.st_mode & 0o7777);
    file::fchmod(target, mode).context(STAGE, "fchmod", path)?;
    file::futimens(target, &times(status)).context(STAGE, "futimens", path)
}

fn own_by_name(to: &OwnedFd, name: &CStr, status: &Stat, path: &str) -> Step {
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
fn attributes(source: &OwnedFd, target: &OwnedFd, path: &str) -> Step {
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
}

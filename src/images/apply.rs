//! Applies the tar stream of one layer to a directory of its own, in overlayfs' form.
//!
//! Every path is walked component by component from descriptors that are held open; a symlink of the
//! layer itself is followed by hand, `..` by going back on the stack of held descriptors. So nothing
//! an archive can say leads out of the directory, whoever else unpacks at the same time, and no "this
//! parent was checked before" is ever remembered without its descriptor.
//!
//! - `.wh.NAME` becomes a character device 0:0, `.wh..wh..opq` the attribute `trusted.overlay.opaque`.
//!   Both speak about lower layers only, never about entries of the same layer, whatever the order.
//! - Directories that no entry describes are made and noted ([`Applied::implied`]): what they look like
//!   is decided by the layers below, see [`crate::images::mend`].
//! - `trusted.*`, `user.overlay.*` and all of `security.*` but `security.capability` are dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::images::apply_meta::{
    Fault, Outcome, explain, mode_of, os, owner_of, set_opaque, set_owner_mode, set_xattrs,
    timestamps,
};
use crate::images::error::ImageError;
use crate::images::tar::{Entry, EntryKind, TarError, TarReader};
use crate::images::tree;

/// Entries of one layer.
const MAX_ENTRIES: u64 = 5_000_000;
/// Directories above a file.
const MAX_DEPTH: usize = 256;
/// Directories that no entry describes.
const MAX_IMPLIED: usize = 100_000;
/// As the kernel counts.
const MAX_SYMLINKS: u32 = 40;
/// Linux: 12 bits of major, 20 of minor number.
const MAX_MAJOR: u64 = 0xfff;
const MAX_MINOR: u64 = 0xf_ffff;
const WHITEOUT: &[u8] = b".wh.";

/// What a layer came to.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    /// Directories that no entry described, by path from the layer's root (`""`).
    pub(crate) implied: BTreeSet<Vec<u8>>,
    /// The layer hides everything below it.
    pub(crate) opaque_root: bool,
    /// Bytes allocated, as du(1) counts.
    pub(crate) bytes: u64,
    /// Inodes.
    pub(crate) inodes: u64,
}

/// A directory that is open, with its path from the root.
struct Held {
    path: Vec<u8>,
    fd: OwnedFd,
}

struct Applier {
    root: Held,
    /// Open directories from below the root down to the parent of the entry before.
    stack: Vec<Held>,
    /// Times of directories: set at the end, since every entry made in them changes them.
    times: BTreeMap<Vec<u8>, (i64, i64)>,
    applied: Applied,
}

/// Applies all entries of `tar` to the empty directory `root`.
///
/// Blocks on the reader and the disk.
///
/// # Errors
///
/// [`ImageError::Archive`]: the layer is malformed or tries what is not allowed; [`ImageError::TooLarge`];
/// [`ImageError::Io`]. What was made so far stays for the caller to remove.
pub(crate) fn apply<R: BufRead>(
    tar: &mut TarReader<R>,
    root: OwnedFd,
    what: &str,
) -> Result<Applied, ImageError> {
    let mut applier = Applier {
        root: Held {
            path: vec![],
            fd: root,
        },
        stack: vec![],
        times: BTreeMap::new(),
        applied: Applied::default(),
    };
    applier.applied.implied.insert(vec![]);
    let mut entries = 0;
    loop {
        let entry = match tar.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => break,
            Err(error) => return Err(explain(what, None, Fault::Tar(error))),
        };
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(ImageError::TooLarge {
                what: what.to_owned(),
                limit: format!("{MAX_ENTRIES} entries"),
            });
        }
        applier
            .entry(tar, &entry)
            .map_err(|fault| explain(what, Some(&entry.path), fault))?;
    }
    applier.finish().map_err(|fault| explain(what, None, fault))
}

/// Components of a path of the archive, checked.
fn components(path: &[u8]) -> Outcome<Vec<&[u8]>> {
    let parts: Vec<_> = path
        .split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    if parts.contains(&&b".."[..]) {
        return Err(Fault::Refused("a path with `..`"));
    }
    if parts.len() > MAX_DEPTH {
        return Err(Fault::Refused("a path of more than 256 components"));
    }
    Ok(parts)
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    match parent.is_empty() {
        true => name.to_vec(),
        false => [parent, name].join(&b'/'),
    }
}

const OPEN_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

impl Applier {
    fn entry<R: BufRead>(&mut self, tar: &mut TarReader<R>, entry: &Entry) -> Outcome<()> {
        let mut parents = components(&entry.path)?;
        // Bookkeeping of aufs, never part of an image's files.
        let aufs = |part: &&[u8]| part.starts_with(b".wh..wh.") && *part != b".wh..wh..opq";
        if parents.iter().any(aufs) {
            return Ok(());
        }
        let Some(name) = parents.pop() else {
            return match entry.kind {
                EntryKind::Directory => self.describe_directory(&[], entry),
                _ => Err(Fault::Refused("the root is no directory")),
            };
        };
        if entry.kind == EntryKind::Directory && !name.starts_with(WHITEOUT) {
            self.enter(&parents)?;
            self.own_directory(name)?;
            let path = self.here().path.clone();
            return self.describe_directory(&path, entry);
        }
        let target = match entry.kind {
            EntryKind::HardLink => Some(self.link_target(&entry.link)?),
            _ => None,
        };
        self.enter(&parents)?;
        if name == b".wh..wh..opq" {
            return self.opaque();
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(hidden);
        }
        match entry.kind {
            EntryKind::File => self.file(tar, entry, name),
            EntryKind::HardLink => self.hard_link(target, name),
            EntryKind::Symlink => self.symlink(entry, name),
            _ => self.special(entry, name),
        }
    }

    fn here(&self) -> &Held {
        self.stack.last().unwrap_or(&self.root)
    }

    fn dir(&self) -> BorrowedFd<'_> {
        self.here().fd.as_fd()
    }

    /// Makes the directory of `parts` the top of the stack, following symlinks inside the layer and
    /// making what is missing.
    fn enter(&mut self, parts: &[&[u8]]) -> Outcome<()> {
        // Keep what the path of the entry before has in common: those descriptors are still held.
        let mut common = 0;
        let mut path = vec![];
        while let (Some(held), Some(part)) = (self.stack.get(common), parts.get(common)) {
            path = join(&path, part);
            if held.path != path {
                break;
            }
            common += 1;
        }
        self.stack.truncate(common);
        let mut pending: Vec<Vec<u8>> = parts[common..].iter().rev().map(|p| p.to_vec()).collect();
        let mut links = 0;
        while let Some(part) = pending.pop() {
            match &part[..] {
                b"" | b"." => {}
                b".." => {
                    self.stack.pop();
                }
                _ => self.step(part, &mut pending, &mut links)?,
            }
        }
        Ok(())
    }

    /// Goes one component down.
    fn step(&mut self, part: Vec<u8>, pending: &mut Vec<Vec<u8>>, links: &mut u32) -> Outcome<()> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(Fault::Refused("a path of more than 256 components"));
        }
        match rustix::fs::openat(self.dir(), &part[..], OPEN_DIR, Mode::empty()) {
            Ok(fd) => {
                let path = join(&self.here().path, &part);
                self.stack.push(Held { path, fd });
                return Ok(());
            }
            Err(Errno::NOENT) => return self.make_directory(part, false),
            Err(Errno::NOTDIR | Errno::LOOP) => {}
            Err(errno) => return Err(Fault::Os("open directory", errno)),
        }
        let stat = rustix::fs::statat(self.dir(), &part[..], AtFlags::SYMLINK_NOFOLLOW)
            .map_err(os("stat"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                *links += 1;
                if *links > MAX_SYMLINKS {
                    return Err(Fault::Refused("a path through more than 40 symlinks"));
                }
                let target = rustix::fs::readlinkat(self.dir(), &part[..], vec![])
                    .map_err(os("read link"))?
                    .into_bytes();
                if target.starts_with(b"/") {
                    self.stack.clear();
                }
                let parts = target.split(|byte| *byte == b'/').rev();
                pending.extend(parts.map(<[u8]>::to_vec));
                if pending.len() > 4 * MAX_DEPTH {
                    return Err(Fault::Refused("a path of more than 256 components"));
                }
                Ok(())
            }
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                rustix::fs::unlinkat(self.dir(), &part[..], AtFlags::empty())
                    .map_err(os("unlink"))?;
                self.applied.inodes = self.applied.inodes.saturating_sub(1);
                self.make_directory(part, true)
            }
            _ => Err(Fault::Refused(
                "a path through something that is no directory",
            )),
        }
    }

    /// Enters the directory that an entry describes. What else has its name gives way, as for every kind of entry: of a link,
    /// what it leads to is not what the entry is about. A whiteout is for the step to replace.
    fn own_directory(&mut self, name: &[u8]) -> Outcome<()> {
        let gives_way = match rustix::fs::statat(self.dir(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => false,
                FileType::CharacterDevice => stat.st_rdev != 0,
                _ => true,
            },
            Err(Errno::NOENT) => false,
            Err(errno) => return Err(Fault::Os("stat", errno)),
        };
        if gives_way {
            rustix::fs::unlinkat(self.dir(), name, AtFlags::empty()).map_err(os("unlink"))?;
            self.applied.inodes = self.applied.inodes.saturating_sub(1);
        }
        self.step(name.to_vec(), &mut vec![], &mut 0)
    }

    /// Makes a directory that was not there, as implied, and enters it.
    fn make_directory(&mut self, part: Vec<u8>, opaque: bool) -> Outcome<()> {
        rustix::fs::mkdirat(self.dir(), &part[..], Mode::from_raw_mode(0o755))
            .map_err(os("make directory"))?;
        let fd = rustix::fs::openat(self.dir(), &part[..], OPEN_DIR, Mode::empty())
            .map_err(os("open directory"))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(os("chmod"))?;
        let path = join(&self.here().path, &part);
        self.applied.inodes += 1;
        if opaque {
            set_opaque(fd.as_fd())?;
        } else {
            self.applied.implied.insert(path.clone());
            if self.applied.implied.len() > MAX_IMPLIED {
                return Err(Fault::Refused(
                    "more than 100000 directories without an entry",
                ));
            }
        }
        self.stack.push(Held { path, fd });
        Ok(())
    }

    /// Gives the directory on top of the stack (or the root) what its entry says.
    fn describe_directory(&mut self, path: &[u8], entry: &Entry) -> Outcome<()> {
        if path.is_empty() {
            self.stack.clear();
        }
        let fd = self.dir();
        set_owner_mode(fd, entry)?;
        set_xattrs(fd, entry)?;
        self.times.insert(path.to_vec(), entry.mtime);
        self.applied.implied.remove(path);
        Ok(())
    }

    fn opaque(&mut self) -> Outcome<()> {
        if self.stack.is_empty() {
            self.applied.opaque_root = true;
        }
        set_opaque(self.dir())
    }

    fn whiteout(&mut self, hidden: &[u8]) -> Outcome<()> {
        if hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Err(Fault::Refused("a whiteout without a name"));
        }
        match rustix::fs::mknodat(
            self.dir(),
            hidden,
            FileType::CharacterDevice,
            Mode::empty(),
            0,
        ) {
            Ok(()) => {
                self.applied.inodes += 1;
                Ok(())
            }
            // An entry of this layer: it stays, what is below it does not.
            Err(Errno::EXIST) => {
                match rustix::fs::openat(self.dir(), hidden, OPEN_DIR, Mode::empty()) {
                    Ok(fd) => {
                        let path = join(&self.here().path, hidden);
                        self.applied.implied.remove(&path);
                        set_opaque(fd.as_fd())
                    }
                    Err(Errno::NOTDIR | Errno::LOOP) => Ok(()),
                    Err(errno) => Err(Fault::Os("open directory", errno)),
                }
            }
            Err(errno) => Err(Fault::Os("make whiteout", errno)),
        }
    }

    /// Removes what has the name of a later entry that is no directory.
    fn clear(&mut self, name: &[u8]) -> Outcome<()> {
        match rustix::fs::unlinkat(self.dir(), name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR) => {
                tree::remove(self.dir(), name).map_err(os("remove"))?;
                let path = join(&self.here().path, name);
                self.forget(&path);
            }
            Err(errno) => return Err(Fault::Os("unlink", errno)),
        }
        Ok(())
    }

    /// Drops what is noted about `path` and everything below it.
    fn forget(&mut self, path: &[u8]) {
        let below = join(path, b"");
        self.times.remove(path);
        self.applied.implied.remove(path);
        let inside = |known: &&Vec<u8>| known.starts_with(&below);
        let times = self.times.range(below.clone()..).map(|(known, _)| known);
        for known in times.take_while(inside).cloned().collect::<Vec<_>>() {
            self.times.remove(&known);
        }
        let implied = self.applied.implied.range(below.clone()..);
        for known in implied.take_while(inside).cloned().collect::<Vec<_>>() {
            self.applied.implied.remove(&known);
        }
    }

    /// Runs `make` for a new name; where the name is taken, once more after clearing it.
    fn create<T>(
        &mut self,
        name: &[u8],
        operation: &'static str,
        make: impl Fn(BorrowedFd<'_>) -> rustix::io::Result<T>,
    ) -> Outcome<T> {
        match make(self.dir()) {
            Err(Errno::EXIST) => {
                self.clear(name)?;
                make(self.dir()).map_err(os(operation))
            }
            other => {
                self.applied.inodes += 1;
                other.map_err(os(operation))
            }
        }
    }

    fn file<R: BufRead>(
        &mut self,
        tar: &mut TarReader<R>,
        entry: &Entry,
        name: &[u8],
    ) -> Outcome<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = self.create(name, "create", |dir| {
            rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))
        })?;
        let bytes = match &entry.segments {
            None => {
                let bytes = write_data(tar, &fd, 0, entry.size)?;
                bytes.next_multiple_of(4096)
            }
            Some(segments) => {
                let mut bytes = 0;
                for (offset, length) in segments {
                    bytes += write_data(tar, &fd, *offset, *length)?.next_multiple_of(4096);
                }
                rustix::fs::ftruncate(&fd, entry.size).map_err(os("truncate"))?;
                bytes
            }
        };
        self.applied.bytes += bytes;
        set_owner_mode(fd.as_fd(), entry)?;
        set_xattrs(fd.as_fd(), entry)?;
        rustix::fs::futimens(&fd, &timestamps(entry.mtime)).map_err(os("set time"))
    }

    /// An own descriptor of the directory that holds the target of a hard link, and its name there.
    fn link_target(&mut self, link: &[u8]) -> Outcome<(OwnedFd, Vec<u8>)> {
        let mut parents = components(link)?;
        let name = parents
            .pop()
            .ok_or(Fault::Refused("a hard link to the root"))?;
        if name.starts_with(WHITEOUT) {
            return Err(Fault::Refused("a hard link to a whiteout"));
        }
        let missing = Fault::Refused("a hard link to what this layer does not hold");
        let mut fd = rustix::io::fcntl_dupfd_cloexec(&self.root.fd, 0).map_err(os("dup"))?;
        // No symlinks and nothing made on the way: writers name the file as they stored it.
        for part in parents {
            fd = match rustix::fs::openat(&fd, part, OPEN_DIR, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Err(missing),
                Err(errno) => return Err(Fault::Os("open directory", errno)),
            };
        }
        let stat = match rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Err(missing),
            Err(errno) => return Err(Fault::Os("stat", errno)),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            // A link to a symlink is one more name of the symlink itself: linkat does not follow.
            FileType::RegularFile | FileType::Symlink | FileType::Fifo => Ok((fd, name.to_vec())),
            _ => Err(Fault::Refused("a hard link to a device or directory")),
        }
    }

    fn hard_link(&mut self, target: Option<(OwnedFd, Vec<u8>)>, name: &[u8]) -> Outcome<()> {
        let (from, old) = target.ok_or(Fault::Refused("a hard link without a target"))?;
        let stat = |dir: BorrowedFd<'_>, name: &[u8]| {
            rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map(|s| (s.st_dev, s.st_ino))
        };
        let source = stat(from.as_fd(), &old).map_err(os("stat"))?;
        if stat(self.dir(), name).is_ok_and(|there| there == source) {
            return Ok(());
        }
        let inodes = self.applied.inodes;
        match self.create(name, "link", |dir| {
            rustix::fs::linkat(&from, &old[..], dir, name, AtFlags::empty())
        }) {
            // The target was inside the directory that the link replaces.
            Err(Fault::Os(_, Errno::NOENT)) => {
                return Err(Fault::Refused("a hard link that replaces its own target"));
            }
            other => other?,
        }
        // One more name, not one more inode.
        self.applied.inodes = inodes;
        Ok(())
    }

    fn symlink(&mut self, entry: &Entry, name: &[u8]) -> Outcome<()> {
        if entry.link.is_empty() {
            return Err(Fault::Refused("a symlink without a target"));
        }
        self.create(name, "make symlink", |dir| {
            rustix::fs::symlinkat(&entry.link[..], dir, name)
        })?;
        if entry.link.len() >= 60 {
            self.applied.bytes += 4096;
        }
        self.finish_by_name(entry, name)
    }

    fn special(&mut self, entry: &Entry, name: &[u8]) -> Outcome<()> {
        let kind = match entry.kind {
            EntryKind::Char => FileType::CharacterDevice,
            EntryKind::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let (major, minor) = entry.device;
        let device = match (u32::try_from(major), u32::try_from(minor)) {
            (Ok(short_major), Ok(short_minor)) if major <= MAX_MAJOR && minor <= MAX_MINOR => {
                rustix::fs::makedev(short_major, short_minor)
            }
            _ => return Err(Fault::Refused("a device number out of range")),
        };
        let mode = mode_of(entry);
        self.create(name, "make node", |dir| {
            rustix::fs::mknodat(dir, name, kind, mode, device)
        })?;
        // Made just now under an exclusive name, and no symlink: chmod cannot be led elsewhere.
        rustix::fs::chmodat(self.dir(), name, mode, AtFlags::empty()).map_err(os("chmod"))?;
        self.finish_by_name(entry, name)?;
        rustix::fs::chmodat(self.dir(), name, mode, AtFlags::empty()).map_err(os("chmod"))
    }

    /// Owner and time of what has no descriptor.
    fn finish_by_name(&self, entry: &Entry, name: &[u8]) -> Outcome<()> {
        let at = AtFlags::SYMLINK_NOFOLLOW;
        let (owner, group) = owner_of(entry);
        rustix::fs::chownat(self.dir(), name, owner, group, at).map_err(os("chown"))?;
        rustix::fs::utimensat(self.dir(), name, &timestamps(entry.mtime), at)
            .map_err(os("set time"))
    }

    /// Times of the directories, children before parents does not matter: nothing is made any more.
    fn finish(mut self) -> Outcome<Applied> {
        for (path, time) in std::mem::take(&mut self.times) {
            let parts: Vec<_> = path
                .split(|byte| *byte == b'/')
                .filter(|p| !p.is_empty())
                .collect();
            self.enter(&parts)?;
            rustix::fs::futimens(self.dir(), &timestamps(time)).map_err(os("set time"))?;
            let stat = rustix::fs::fstat(self.dir()).map_err(os("stat"))?;
            self.applied.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
        // The root is one more inode. Directories without times are taken for one block each.
        self.applied.inodes += 1;
        self.applied.bytes += 4096 * self.applied.implied.len() as u64;
        Ok(self.applied)
    }
}

/// Copies `length` bytes of the entry's data to `offset`; how many.
fn write_data<R: BufRead>(
    tar: &mut TarReader<R>,
    fd: &OwnedFd,
    mut offset: u64,
    length: u64,
) -> Outcome<u64> {
    let mut left = length;
    while left > 0 {
        let data = tar.data().map_err(Fault::Tar)?;
        if data.is_empty() {
            return Err(Fault::Tar(TarError::Truncated));
        }
        let wanted = usize::try_from(left).map_or(data.len(), |left| left.min(data.len()));
        let written = rustix::io::pwrite(fd, &data[..wanted], offset).map_err(os("write"))?;
        tar.consume(written);
        offset += written as u64;
        left -= written as u64;
    }
    Ok(length)
}

/// Opens `path`, a directory of ours, as the root of a layer.
///
/// # Errors
///
/// [`ImageError::Io`].
pub(crate) fn open_root(path: &std::path::Path) -> Result<OwnedFd, ImageError> {
    rustix::fs::openat(CWD, path, OPEN_DIR, Mode::empty())
        .map_err(|errno| ImageError::io("open", path, errno))
}

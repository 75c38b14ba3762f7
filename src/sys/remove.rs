//! Removal of a directory tree that others made, of any shape, by descriptor.
//!
//! The tree is made flat: what a directory below the top holds goes at once, but for directories that hold something
//! themselves; those are moved up into the top under a number, and their turn comes by that number. So the depth never
//! matters, nothing has to be remembered of the tree, and two directories are open at a time. There is no way back up that
//! somebody else could bend, as one by `..` or by kept names would be: every directory is reached from the top by the name
//! that we gave. (A process that still has its working directory in one of them gets no further by it: the trees that
//! containers write are reached through overlays and bind mounts, and the kernel does not let `..` leave what is mounted.)
//! Interrupted at any moment, it leaves a tree that is removed like any other.
//!
//! No mount is crossed, none is detached. What cannot be removed stays, with what is above it, and the rest goes.

use std::ffi::{CStr, CString};
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, RawDir, SeekFrom};
use rustix::io::{Errno, Result};

use crate::sys::descent::open_directory;

/// Readings of a directory that is still being written to, until it is left.
const READINGS: u32 = 4;
/// Trees in each other that nothing can be moved out of: subvolumes, project quotas.
const APART: usize = 16;
/// Entries between two questions whether to stop.
const PACE: u32 = 256;

/// What became of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Removal {
    /// It is gone, or was not there.
    Gone,
    /// `stop` said so; the rest is there.
    Stopped,
    /// Something of it cannot be removed.
    Left(Leftover),
}

/// What cannot be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leftover {
    /// The first system call that failed.
    pub(crate) call: &'static str,
    /// The name that it was called with, at most 64 bytes of it.
    pub(crate) name: String,
    /// Why.
    pub(crate) errno: Errno,
    /// How many failed besides.
    pub(crate) others: u64,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = std::io::Error::from(self.errno);
        write!(f, "{} {:?}: {error}", self.call, self.name)?;
        match self.others {
            0 => Ok(()),
            others => write!(f, ", and {others} more"),
        }
    }
}

/// Removes `name` below `parent`, whatever it is, with everything in it. `stop` is asked now and then. Blocks on the disk.
pub(crate) fn remove(
    parent: BorrowedFd<'_>,
    name: &CStr,
    stop: &mut dyn FnMut() -> bool,
) -> Removal {
    let mut sweep = Sweep {
        stop,
        prefix: prefix(),
        levels: vec![],
        left: None,
        pace: 0,
    };
    if sweep.run(parent, name).is_err() {
        return Removal::Stopped;
    }
    match sweep.left {
        None => Removal::Gone,
        Some(left) => Removal::Left(left),
    }
}

/// What our numbers begin with: names that nobody has chosen before us. (If somebody has, they are removed in their turn.)
fn prefix() -> String {
    let number = crate::sys::random::bytes().map_or(0, u64::from_ne_bytes);
    format!(".berth-remove-{number:016x}-")
}

/// `stop` said so.
struct Stopped;

type Go<T> = std::result::Result<T, Stopped>;

/// What became of an entry, or of all that a directory holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Gone, or out of the way.
    Gone,
    /// It stays.
    Kept,
    /// A directory that cannot be moved up: it is dealt with where it is.
    Apart,
}

/// What became of a directory with all that it holds.
enum Whole {
    /// Gone.
    Gone,
    /// It stays.
    Kept,
    /// Directories in it cannot be moved up: it becomes a level.
    Apart(OwnedFd),
}

/// A directory that takes the directories from deeper down.
struct Level {
    directory: Arc<OwnedFd>,
    /// Its own name in the level above, or in the parent of all.
    name: CString,
    /// The next number to be dealt with.
    head: u64,
    /// The next number to be given.
    tail: u64,
}

struct Sweep<'a> {
    stop: &'a mut dyn FnMut() -> bool,
    prefix: String,
    levels: Vec<Level>,
    left: Option<Leftover>,
    pace: u32,
}

impl Sweep<'_> {
    fn run(&mut self, parent: BorrowedFd<'_>, name: &CStr) -> Go<()> {
        match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::ISDIR) => {}
            Err(errno) => {
                self.keep("unlinkat", name, errno);
                return Ok(());
            }
        }
        match open_directory(parent, name) {
            Ok(directory) => self.push(directory, name),
            Err(errno) => self.keep("openat2", name, errno),
        }
        while let Some(level) = self.levels.last() {
            let top = Arc::clone(&level.directory);
            if self.own(&top)? && self.numbered(&top)? {
                let Some(done) = self.levels.pop() else { break };
                let above = self.levels.last();
                let above = above.map_or(parent, |above| above.directory.as_fd());
                let removed = rustix::fs::unlinkat(above, &*done.name, AtFlags::REMOVEDIR);
                match removed {
                    Ok(()) | Err(Errno::NOENT) => {}
                    // What stays in it was noted.
                    Err(Errno::NOTEMPTY) if self.left.is_some() => {}
                    Err(errno) => self.keep("rmdir", &done.name, errno),
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, directory: OwnedFd, name: &CStr) {
        self.levels.push(Level {
            directory: Arc::new(directory),
            name: name.to_owned(),
            head: 0,
            tail: 0,
        });
    }

    fn keep(&mut self, call: &'static str, name: &CStr, errno: Errno) {
        match &mut self.left {
            Some(left) => left.others = left.others.saturating_add(1),
            None => {
                let name = name.to_bytes();
                let name = name.get(..64).unwrap_or(name);
                self.left = Some(Leftover {
                    call,
                    name: String::from_utf8_lossy(name).into_owned(),
                    errno,
                    others: 0,
                });
            }
        }
    }

    fn breathe(&mut self) -> Go<()> {
        self.pace += 1;
        if self.pace < PACE {
            return Ok(());
        }
        self.pace = 0;
        std::thread::yield_now();
        match (self.stop)() {
            true => Err(Stopped),
            false => Ok(()),
        }
    }

    /// What the top of this level has of its own. `false`: another level comes first.
    fn own(&mut self, top: &OwnedFd) -> Go<bool> {
        for reading in 0..READINGS {
            let (mut found, mut kept) = (0_u32, false);
            let mut buffer = [MaybeUninit::uninit(); 8192];
            if rewind(top).is_err() {
                break;
            }
            let mut entries = RawDir::new(top, &mut buffer);
            while let Some(entry) = entries.next() {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(errno) => {
                        self.keep("getdents64", c".", errno);
                        return Ok(true);
                    }
                };
                let name = entry.file_name();
                if is_dots(name) || name.to_bytes().starts_with(self.prefix.as_bytes()) {
                    continue;
                }
                self.breathe()?;
                found += 1;
                match self.whole(top.as_fd(), name, entry.file_type())? {
                    Whole::Gone => {}
                    Whole::Kept => kept = true,
                    // Under a number it is not met again here, whatever stays of it.
                    Whole::Apart(directory) => match self.number(top, name) {
                        Ok(number) => {
                            self.push(directory, &number);
                            return Ok(false);
                        }
                        Err(errno) => {
                            self.keep("renameat", name, errno);
                            kept = true;
                        }
                    },
                }
            }
            if found == 0 || kept {
                return Ok(true);
            }
            if reading + 1 == READINGS {
                self.keep("rmdir", c".", Errno::NOTEMPTY);
            }
        }
        Ok(true)
    }

    /// What was moved into the top of this level. `false`: another level comes first.
    fn numbered(&mut self, top: &OwnedFd) -> Go<bool> {
        loop {
            let Some(level) = self
                .levels
                .last_mut()
                .filter(|level| level.head < level.tail)
            else {
                return Ok(true);
            };
            let number = level.head;
            level.head += 1;
            let name = self.numeral(number);
            self.breathe()?;
            if let Whole::Apart(directory) = self.whole(top.as_fd(), &name, FileType::Directory)? {
                self.push(directory, &name);
                return Ok(false);
            }
        }
    }

    fn numeral(&self, number: u64) -> CString {
        // Without a NUL in it.
        CString::new(format!("{}{number}", self.prefix)).unwrap_or_default()
    }

    /// Gives an entry of the innermost level a number.
    fn number(&mut self, top: &OwnedFd, name: &CStr) -> Result<CString> {
        let Some(level) = self.levels.last_mut() else {
            return Err(Errno::NOENT);
        };
        let number = level.tail;
        level.tail += 1;
        let numeral = self.numeral(number);
        rustix::fs::renameat(top, name, top, &*numeral)?;
        Ok(numeral)
    }

    /// An entry of the top of a level with everything in it: directories in it are moved up or removed.
    fn whole(&mut self, at: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Go<Whole> {
        match self.simply(at, name, kind) {
            Some(Fate::Gone) => return Ok(Whole::Gone),
            Some(_) => return Ok(Whole::Kept),
            None => {}
        }
        let directory = match open_directory(at, name) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Ok(Whole::Gone),
            Err(errno) => {
                self.keep("openat2", name, errno);
                return Ok(Whole::Kept);
            }
        };
        for reading in 0..READINGS {
            if reading > 0
                && let Err(errno) = rewind(&directory)
            {
                self.keep("lseek", name, errno);
                return Ok(Whole::Kept);
            }
            match self.hollow(&directory, name)? {
                Fate::Gone => {}
                Fate::Kept => return Ok(Whole::Kept),
                Fate::Apart if self.levels.len() >= APART => {
                    self.keep("renameat", name, Errno::XDEV);
                    return Ok(Whole::Kept);
                }
                Fate::Apart => return Ok(Whole::Apart(directory)),
            }
            match rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return Ok(Whole::Gone),
                // Something came meanwhile.
                Err(Errno::NOTEMPTY) => {}
                Err(errno) => {
                    self.keep("rmdir", name, errno);
                    return Ok(Whole::Kept);
                }
            }
        }
        self.keep("rmdir", name, Errno::NOTEMPTY);
        Ok(Whole::Kept)
    }

    /// Removes what is not a directory that holds something; absent: it is one.
    fn simply(&mut self, at: BorrowedFd<'_>, name: &CStr, kind: FileType) -> Option<Fate> {
        let plain = |flags| rustix::fs::unlinkat(at, name, flags);
        if kind != FileType::Directory {
            match plain(AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return Some(Fate::Gone),
                Err(Errno::ISDIR) => {}
                Err(errno) => {
                    self.keep("unlinkat", name, errno);
                    return Some(Fate::Kept);
                }
            }
        }
        match plain(AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Some(Fate::Gone),
            Err(Errno::NOTEMPTY | Errno::EXIST) => None,
            Err(errno) => {
                self.keep("rmdir", name, errno);
                Some(Fate::Kept)
            }
        }
    }

    /// Takes everything out of a directory, reading it once.
    fn hollow(&mut self, directory: &OwnedFd, called: &CStr) -> Go<Fate> {
        let mut all = Fate::Gone;
        let mut buffer = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(directory, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(errno) => {
                    self.keep("getdents64", called, errno);
                    return Ok(Fate::Kept);
                }
            };
            let name = entry.file_name();
            if is_dots(name) {
                continue;
            }
            self.breathe()?;
            let fate = self.simply(directory.as_fd(), name, entry.file_type());
            match fate.unwrap_or_else(|| self.move_up(directory, name)) {
                Fate::Gone => {}
                Fate::Kept => all = Fate::Kept,
                Fate::Apart => return Ok(Fate::Apart),
            }
        }
        Ok(all)
    }

    /// Moves a directory to the outermost level that takes it.
    fn move_up(&mut self, from: &OwnedFd, name: &CStr) -> Fate {
        let innermost = self.levels.len().saturating_sub(1);
        for index in [0, innermost] {
            let Some(level) = self.levels.get_mut(index) else {
                continue;
            };
            let number = level.tail;
            level.tail += 1;
            let to = Arc::clone(&level.directory);
            match rustix::fs::renameat(from, name, &*to, &*self.numeral(number)) {
                Ok(()) | Err(Errno::NOENT) => return Fate::Gone,
                // Another subvolume or project, too many directories in one, or no room for one more name.
                Err(Errno::XDEV | Errno::MLINK | Errno::NOSPC | Errno::DQUOT) => {}
                Err(errno) => {
                    self.keep("renameat", name, errno);
                    return Fate::Kept;
                }
            }
        }
        Fate::Apart
    }
}

fn rewind(directory: &OwnedFd) -> Result<u64> {
    rustix::fs::seek(directory, SeekFrom::Start(0))
}

fn is_dots(name: &CStr) -> bool {
    name == c"." || name == c".."
}

#[cfg(test)]
#[path = "remove_tests.rs"]
mod tests;

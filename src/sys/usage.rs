//! What a tree takes on its disk, while others change it.

use std::collections::HashSet;
use std::convert::Infallible;
use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, Result};

use crate::sys::descent::{Failure, Progress, Visit, Walk};

/// Files of several names that are remembered: 4 MiB.
const LINKED: usize = 1 << 17;
/// Levels that are walked: 8 MiB.
const DEPTH: usize = 1 << 18;
/// One inode, in parts of it.
const WHOLE: u64 = 1 << 32;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Bytes of the blocks that are allocated.
    pub(crate) bytes: u64,
    /// Files, directories, links and all else, each once.
    pub(crate) inodes: u64,
    /// That is all. Otherwise it is at least so much.
    pub(crate) complete: bool,
}

/// A count under way: everything below a directory, but not that directory itself, as du(1) has it: a file of several
/// names once, what is mounted below not at all. Holds at most 12 MiB and a few descriptors.
#[derive(Debug)]
pub(crate) struct Usage {
    walk: Walk,
    count: Count,
}

#[derive(Debug)]
struct Count {
    bytes: u64,
    /// In parts: what has several names and is not remembered counts a share at each.
    parts: u64,
    inodes: u64,
    linked: HashSet<(u64, u64)>,
    most_linked: usize,
    most_depth: usize,
    complete: bool,
}

impl Usage {
    /// A count of what is below the directory at `path`.
    ///
    /// # Errors
    /// Those of open(2) and fstat(2).
    pub(crate) fn at(path: &Path) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::of(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// A count of what is below `top`, a directory opened for reading.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub(crate) fn of(top: OwnedFd) -> Result<Self> {
        Self::within(top, LINKED, DEPTH)
    }

    /// As [`Usage::of`], that remembers and goes down at most so much.
    ///
    /// # Errors
    /// Those of fstat(2).
    fn within(top: OwnedFd, most_linked: usize, most_depth: usize) -> Result<Self> {
        Ok(Self {
            walk: Walk::of(top)?,
            count: Count {
                bytes: 0,
                parts: 0,
                inodes: 0,
                linked: HashSet::new(),
                most_linked,
                most_depth,
                complete: true,
            },
        })
    }

    /// Counts on until the end, or until `pause` says so, which is asked now and then: it can be called again then.
    pub(crate) fn run(&mut self, pause: &mut dyn FnMut() -> bool) -> Progress {
        match self.walk.run(&mut self.count, pause) {
            Ok(progress) => progress,
        }
    }

    /// What was counted so far; `complete` means something at the end only.
    pub(crate) fn counted(&self) -> Counted {
        Counted {
            bytes: self.count.bytes,
            inodes: self.count.inodes + self.count.parts / WHOLE,
            complete: self.count.complete,
        }
    }
}

impl Count {
    fn add(&mut self, status: &Stat, directory: bool) {
        let bytes = u64::try_from(status.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        // 32 bits on some machines, 64 on others.
        let names = i128::from(status.st_nlink);
        let names = u64::try_from(names).unwrap_or(1).max(1);
        let file = (status.st_dev, status.st_ino);
        if !directory && names > 1 {
            if self.linked.contains(&file) {
                return;
            }
            if self.linked.len() >= self.most_linked {
                self.bytes = self.bytes.saturating_add(bytes / names);
                self.parts = self.parts.saturating_add(WHOLE / names);
                return;
            }
            let _new = self.linked.insert(file);
        }
        self.bytes = self.bytes.saturating_add(bytes);
        self.inodes = self.inodes.saturating_add(1);
    }
}

impl Visit for Count {
    type Error = Infallible;

    fn entry(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        kind: FileType,
    ) -> std::result::Result<(), Infallible> {
        if kind == FileType::Directory {
            // Of another filesystem.
            return Ok(());
        }
        match rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => self.add(&status, false),
            Err(Errno::NOENT) => {}
            Err(_unreadable) => self.complete = false,
        }
        Ok(())
    }

    fn enter(
        &mut self,
        _at: BorrowedFd<'_>,
        _name: &CStr,
        directory: BorrowedFd<'_>,
        depth: usize,
    ) -> std::result::Result<bool, Infallible> {
        match rustix::fs::fstat(directory) {
            Ok(status) => self.add(&status, true),
            Err(_unreadable) => self.complete = false,
        }
        let walked = depth <= self.most_depth;
        self.complete &= walked;
        Ok(walked)
    }

    fn leave(&mut self, _directory: BorrowedFd<'_>) -> std::result::Result<(), Infallible> {
        Ok(())
    }

    fn failed(&mut self, _failure: Failure) -> std::result::Result<(), Infallible> {
        self.complete = false;
        Ok(())
    }
}

#[cfg(test)]
#[path = "usage_tests.rs"]
mod tests;

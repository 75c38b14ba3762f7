//! A place in a directory tree that others made and may still change: entered and left by descriptor.
//!
//! - A directory is entered by one name below its parent; no link is followed and no mount is crossed.
//! - It is left by `..`, and only to the directory that it was entered from: whoever moves directories meanwhile makes us
//!   lose our place, never leave the tree.
//! - The outermost levels keep their descriptors, deeper ones only an identity. So no depth needs more than a few
//!   descriptors, and a lost place is one below a level that is held: the walk goes on there.

use std::ffi::CStr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, Result};

/// Levels that keep their descriptors.
const HELD: usize = 16;

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens a directory by one name below `parent`, to be read: no link is followed, no mount crossed.
///
/// # Errors
/// `ENOTDIR`, `ELOOP`: it is no directory; `EXDEV`: something is mounted there; others of openat2(2).
pub(crate) fn open_directory(parent: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd> {
    open_here(parent, name, DIRECTORY)
}

/// Opens what has this name below `parent`: no link is followed (itself opens with `O_PATH` only), no mount crossed.
///
/// # Errors
/// `EXDEV`: something is mounted there; others of openat2(2).
pub(crate) fn open_here(parent: BorrowedFd<'_>, name: &CStr, flags: OFlags) -> Result<OwnedFd> {
    // Not `NO_SYMLINKS`: with it a link could not be opened itself, with `O_PATH`.
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Device and inode.
type Identity = (u64, u64);

fn identity(directory: BorrowedFd<'_>) -> Result<Identity> {
    let status = rustix::fs::fstat(directory)?;
    Ok((status.st_dev, status.st_ino))
}

#[derive(Debug)]
struct Level {
    identity: Identity,
    /// Where reading goes on, as getdents64(2) has it; 0: at the beginning.
    cookie: u64,
    /// Always there for the outermost [`HELD`] levels and for the innermost one.
    directory: Option<OwnedFd>,
}

/// How a directory was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ascent {
    /// To the one that it was entered from.
    Parent,
    /// It was the outermost one: there is no place any more.
    Out,
    /// It is not any more where it was. The place is now the innermost level that is held.
    Lost,
}

/// A place in a tree. Takes 32 bytes for each level, and at most [`HELD`] + 1 descriptors.
#[derive(Debug)]
pub(crate) struct Descent(Vec<Level>);

impl Descent {
    /// At the top of a tree: a directory opened for reading.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub(crate) fn at(top: OwnedFd) -> Result<Self> {
        let identity = identity(top.as_fd())?;
        Ok(Self(vec![Level {
            identity,
            cookie: 0,
            directory: Some(top),
        }]))
    }

    /// Levels below the top; 0: at the top, or nowhere.
    pub(crate) fn depth(&self) -> usize {
        self.0.len().saturating_sub(1)
    }

    /// The directory of this place; absent: the top was left.
    pub(crate) fn here(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.last()?.directory.as_ref()?.as_fd())
    }

    /// Where reading goes on here.
    fn cookie(&self) -> u64 {
        self.0.last().map_or(0, |level| level.cookie)
    }

    fn set_cookie(&mut self, cookie: u64) {
        if let Some(level) = self.0.last_mut() {
            level.cookie = cookie;
        }
    }

    /// Goes down into a directory that was opened by [`open_directory`] from here.
    ///
    /// # Errors
    /// Those of fstat(2); the place stays.
    pub(crate) fn enter(&mut self, directory: OwnedFd) -> Result<()> {
        let identity = identity(directory.as_fd())?;
        let index = self.0.len().saturating_sub(1);
        if index >= HELD
            && let Some(level) = self.0.last_mut()
        {
            level.directory = None;
        }
        self.0.push(Level {
            identity,
            cookie: 0,
            directory: Some(directory),
        });
        Ok(())
    }

    /// Goes up.
    pub(crate) fn leave(&mut self) -> Ascent {
        let left = self.0.pop();
        let Some(level) = self.0.last_mut() else {
            return Ascent::Out;
        };
        if level.directory.is_some() {
            return Ascent::Parent;
        }
        let parent = left
            .and_then(|left| left.directory)
            .and_then(|left| open_directory(left.as_fd(), c"..").ok())
            .filter(|parent| identity(parent.as_fd()).is_ok_and(|found| found == level.identity));
        if parent.is_some() {
            level.directory = parent;
            return Ascent::Parent;
        }
        while self.0.last().is_some_and(|level| level.directory.is_none()) {
            self.0.pop();
        }
        Ascent::Lost
    }
}

/// What a walk could not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The system call.
    pub(crate) call: &'static str,
    /// Name below the directory of that moment; empty: that directory itself.
    pub(crate) name: Vec<u8>,
    /// Why. `ESTALE`: the directory was moved while it was walked.
    pub(crate) errno: Errno,
}

/// What is done on a [`Walk`]. Whatever was found may be something else, or gone, a moment later.
pub(crate) trait Visit {
    /// What ends a walk early.
    type Error;

    /// Something below `at` that is no directory, or ([`FileType::Directory`]) one that something is mounted on.
    ///
    /// # Errors
    /// End the walk.
    fn entry(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        kind: FileType,
    ) -> std::result::Result<(), Self::Error>;

    /// A directory below `at`, so many levels below the top. `false`: it is not walked, nor left.
    ///
    /// # Errors
    /// End the walk.
    fn enter(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        directory: BorrowedFd<'_>,
        depth: usize,
    ) -> std::result::Result<bool, Self::Error>;

    /// Everything below a directory was seen; the top comes last.
    ///
    /// # Errors
    /// End the walk.
    fn leave(&mut self, directory: BorrowedFd<'_>) -> std::result::Result<(), Self::Error>;

    /// Something could not be read. `Ok`: the walk goes on with what comes after it; after a directory was moved
    /// (`ESTALE`) that is what comes after the innermost level that is held, and some are never left.
    ///
    /// # Errors
    /// End the walk.
    fn failed(&mut self, failure: Failure) -> std::result::Result<(), Self::Error>;
}

/// How far a walk came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// To its end.
    Done,
    /// It was asked to pause and can go on.
    Paused,
}

/// A depth-first walk, each directory before what it holds. Reads as it goes: a directory of any size takes the same memory.
#[derive(Debug)]
pub(crate) struct Walk(Descent);

/// Bytes of names that are read at once. A directory is read again from where it was left when one below it was walked:
/// more bytes would be read more often.
const BUFFER: usize = 4096;
/// Steps (entries, ways down and up) between two questions whether to pause.
const PACE: u32 = 64;

enum Next {
    Down(OwnedFd),
    Up,
    Pause,
}

impl Walk {
    /// A walk of the tree below `top`, a directory opened for reading, whose position is the beginning.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub(crate) fn of(top: OwnedFd) -> Result<Self> {
        Ok(Self(Descent::at(top)?))
    }

    /// Walks on until the end, or until `pause` says so, which is asked now and then: after a pause it can be called again.
    ///
    /// # Errors
    /// Those of `visit`; the walk is over then.
    pub(crate) fn run<V: Visit>(
        &mut self,
        visit: &mut V,
        pause: &mut dyn FnMut() -> bool,
    ) -> std::result::Result<Progress, V::Error> {
        let mut left = PACE;
        loop {
            let next = match self.read(visit, pause, &mut left)? {
                Ok(next) => next,
                Err(errno) => {
                    visit.failed(Failure {
                        call: "getdents64",
                        name: vec![],
                        errno,
                    })?;
                    Next::Up
                }
            };
            match next {
                Next::Pause => return Ok(Progress::Paused),
                Next::Down(directory) => {
                    if let Err(errno) = self.0.enter(directory) {
                        visit.failed(Failure {
                            call: "fstat",
                            name: vec![],
                            errno,
                        })?;
                    }
                }
                Next::Up => {
                    if let Some(directory) = self.0.here() {
                        visit.leave(directory)?;
                    }
                    match self.0.leave() {
                        Ascent::Parent => {}
                        Ascent::Out => return Ok(Progress::Done),
                        Ascent::Lost => visit.failed(Failure {
                            call: "openat2",
                            name: b"..".to_vec(),
                            errno: Errno::STALE,
                        })?,
                    }
                }
            }
            if is_time(&mut left) && pause() {
                return Ok(Progress::Paused);
            }
        }
    }

    /// Reads on in the directory of this place.
    fn read<V: Visit>(
        &mut self,
        visit: &mut V,
        pause: &mut dyn FnMut() -> bool,
        left: &mut u32,
    ) -> std::result::Result<Result<Next>, V::Error> {
        let mut buffer = [const { std::mem::MaybeUninit::uninit() }; BUFFER];
        let mut cookie = self.0.cookie();
        let Some(here) = self.0.here() else {
            return Ok(Ok(Next::Up));
        };
        if cookie != 0
            && let Err(errno) = rustix::fs::seek(here, rustix::fs::SeekFrom::Start(cookie))
        {
            return Ok(Err(errno));
        }
        let mut entries = rustix::fs::RawDir::new(here, &mut buffer);
        let next = loop {
            let entry = match entries.next() {
                None => break Next::Up,
                Some(Err(errno)) => return Ok(Err(errno)),
                Some(Ok(entry)) => entry,
            };
            cookie = entry.next_entry_cookie();
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            if let Some(directory) = look(here, name, entry.file_type(), visit)?
                && visit.enter(here, name, directory.as_fd(), self.0.depth() + 1)?
            {
                break Next::Down(directory);
            }
            if is_time(left) && pause() {
                break Next::Pause;
            }
        };
        self.0.set_cookie(cookie);
        Ok(Ok(next))
    }
}

/// Counts a step. `true`: it is time to ask.
fn is_time(left: &mut u32) -> bool {
    *left = left.saturating_sub(1);
    if *left > 0 {
        return false;
    }
    *left = PACE;
    true
}

/// Tells of what is no directory, and opens what is one.
fn look<V: Visit>(
    here: BorrowedFd<'_>,
    name: &CStr,
    kind: FileType,
    visit: &mut V,
) -> std::result::Result<Option<OwnedFd>, V::Error> {
    if !matches!(kind, FileType::Directory | FileType::Unknown) {
        visit.entry(here, name, kind)?;
        return Ok(None);
    }
    match open_directory(here, name) {
        Ok(directory) => return Ok(Some(directory)),
        Err(Errno::NOENT) => {}
        Err(Errno::XDEV) => visit.entry(here, name, FileType::Directory)?,
        Err(Errno::NOTDIR | Errno::LOOP) => visit.entry(here, name, FileType::Unknown)?,
        Err(errno) => visit.failed(Failure {
            call: "openat2",
            name: name.to_bytes().to_vec(),
            errno,
        })?,
    }
    Ok(None)
}

#[cfg(test)]
#[path = "descent_tests.rs"]
pub(crate) mod tests;

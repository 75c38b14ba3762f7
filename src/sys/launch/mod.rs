//! The last fork of a process that goes to live among others: what is born in their PID namespace has the maker's root,
//! namespaces, cgroups, ids and capabilities, and of its memory only what it is about to execute.
//!
//! ```text
//! parent (the monitor)                 maker: a child in the parent's PID namespace      born: a sibling of the maker
//!   | Shared::new, clone ------------->  |  everything that needs rights                    (in theirs)
//!   |                                    |  prepare(): copies into the arena, marks all
//!   |                                    |    other writable memory "not for children"
//!   |                                    |  go(): clone(VFORK | PARENT) ---------------->  | setsid, terminal, filter
//!   |  <- number, written by the kernel--|  (sleeps)                                       | execve
//!   |                                    |  <- its memory is gone: it executed, or ended --+
//!   |  <- end of the maker --------------+
//! ```
//! Nobody in the namespace sees the maker; whoever takes over the born process has gained nothing. So the born process has
//! no way to speak: it leaves three numbers in memory that it shares with the two others, which take them for what they
//! are, somebody else's. `CLONE_VFORK` is what tells of the exec: a pipe that closes could be held open by who copies its
//! descriptor. Kernel: clone(2), madvise(2) `MADV_DONTFORK`.
#![expect(
    unsafe_code,
    reason = "memory mappings, and a process without a library"
)]

mod arena;
mod raw;

use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicIsize, AtomicU8, AtomicU32, AtomicUsize, Ordering};

use crate::sys::seccomp::Filter;
use arena::Arena;

pub(crate) use raw::GATED;

/// Bytes that a maker can leave for its parent.
pub(crate) const MAX_NOTE: usize = PAGE - 64;
const PAGE: usize = 4096;

/// What the maker and its parent share. The born process does not have it.
#[repr(C)]
struct Kept {
    /// Number of the born process in the maker's PID namespace, written by the kernel before it runs; 0: none yet.
    pid: AtomicI32,
    /// One of `Stage`.
    stage: AtomicU32,
    /// 1 + index of a program that is there, but could not be executed as if it were not; 0: none.
    present: AtomicU32,
    length: AtomicU32,
    note: [AtomicU8; MAX_NOTE],
}

/// What the born process shares with them.
#[repr(C)]
struct Told {
    /// One of [`Failure`]; 0: none.
    failure: AtomicU32,
    /// Error number.
    errno: AtomicIsize,
    /// Which program.
    index: AtomicUsize,
}

/// Where a maker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// It has not closed its control socket yet.
    Early,
    /// It is about to become what its program will be.
    Confining,
    /// The born process has executed or ended: see [`Shared::failure`].
    Over,
    /// It failed; the note is why.
    Failed,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Early, Self::Confining, Self::Over, Self::Failed];
}

/// What the born process says it failed at: hearsay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Taking its terminal, with this number.
    Terminal(i32),
    /// Installing its filter, with this number.
    Filter(i32),
    /// Executing the program of this index, with this number.
    Execute(usize, i32),
}

/// Two pages shared with a child and with what it gives birth to. They are unmapped when this is dropped.
#[derive(Debug)]
pub(crate) struct Shared {
    kept: NonNull<Kept>,
    told: NonNull<Told>,
}

impl Shared {
    /// New pages, all zero; a process that is cloned from here on has them too.
    ///
    /// # Errors
    /// The number of `mmap(2)`.
    pub(crate) fn new() -> io::Result<Self> {
        let kept = map_shared()?;
        match map_shared() {
            Ok(told) => Ok(Self {
                kept: kept.cast(),
                told: told.cast(),
            }),
            Err(error) => {
                unmap(kept);
                Err(error)
            }
        }
    }

    fn kept(&self) -> &Kept {
        // SAFETY: a whole zeroed page that lives as long as `self`; `Kept` is valid for any bytes.
        unsafe { self.kept.as_ref() }
    }

    fn told(&self) -> &Told {
        // SAFETY: as above; what others write into it are numbers, read one by one.
        unsafe { self.told.as_ref() }
    }

    /// Number of the born process, as long as it is not reaped; `None`: none is born yet.
    pub(crate) fn pid(&self) -> Option<u32> {
        let pid = self.kept().pid.load(Ordering::Acquire);
        u32::try_from(pid).ok().filter(|pid| *pid != 0)
    }

    /// Where the maker is, or was when it ended.
    pub(crate) fn stage(&self) -> Stage {
        let number = self.kept().stage.load(Ordering::Acquire);
        let found = usize::try_from(number)
            .ok()
            .and_then(|number| Stage::ALL.get(number));
        found.copied().unwrap_or(Stage::Failed)
    }

    /// For the maker: says where it is.
    pub(crate) fn set_stage(&self, stage: Stage) {
        let number = Stage::ALL.iter().position(|one| *one == stage);
        let number = number.and_then(|number| u32::try_from(number).ok());
        self.kept()
            .stage
            .store(number.unwrap_or_default(), Ordering::Release);
    }

    /// For the maker: leaves these bytes, cut to [`MAX_NOTE`]. No system call.
    pub(crate) fn leave(&self, note: &[u8]) {
        let count = note.len().min(MAX_NOTE);
        for (to, byte) in self.kept().note.iter().zip(note) {
            to.store(*byte, Ordering::Relaxed);
        }
        let length = u32::try_from(count).unwrap_or_default();
        self.kept().length.store(length, Ordering::Release);
    }

    /// What the maker left; it must have ended.
    pub(crate) fn note(&self) -> Vec<u8> {
        let length =
            usize::try_from(self.kept().length.load(Ordering::Acquire)).unwrap_or_default();
        let bytes = self.kept().note.iter().take(length);
        bytes.map(|byte| byte.load(Ordering::Relaxed)).collect()
    }

    /// For the maker: the program of this index is there, though the kernel said `ENOENT`.
    pub(crate) fn set_present(&self, index: usize) {
        let number = u32::try_from(index + 1).unwrap_or_default();
        self.kept().present.store(number, Ordering::Release);
    }

    /// The index that [`Shared::set_present`] named.
    pub(crate) fn present(&self) -> Option<usize> {
        let number =
            usize::try_from(self.kept().present.load(Ordering::Acquire)).unwrap_or_default();
        number.checked_sub(1)
    }

    /// What the born process says it failed at; `None`: it executed, or ended without a word.
    pub(crate) fn failure(&self) -> Option<Failure> {
        let told = self.told();
        let errno = i32::try_from(told.errno.load(Ordering::Acquire)).unwrap_or(libc::EIO);
        let index = told.index.load(Ordering::Acquire);
        match told.failure.load(Ordering::Acquire) {
            raw::TERMINAL => Some(Failure::Terminal(errno)),
            raw::FILTER => Some(Failure::Filter(errno)),
            raw::EXECUTE => Some(Failure::Execute(index, errno)),
            _ => None,
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        unmap(self.kept.cast());
        unmap(self.told.cast());
    }
}

fn map_shared() -> io::Result<NonNull<u8>> {
    arena::map(PAGE, libc::MAP_SHARED)
}

fn unmap(page: NonNull<u8>) {
    // SAFETY: a mapping of one page that `map_shared` made; its owner is being dropped.
    let _cannot_fail = unsafe { libc::munmap(page.as_ptr().cast(), PAGE) };
}

/// What the born process is to do.
#[derive(Debug)]
pub(crate) struct Birth<'a> {
    /// Programs to try, in order: the next one where a file is missing or may not be executed.
    pub(crate) programs: &'a [CString],
    /// Arguments.
    pub(crate) arguments: &'a [CString],
    /// Environment.
    pub(crate) environment: &'a [CString],
    /// Standard input is a terminal to take.
    pub(crate) terminal: bool,
    /// A filter to install last, which needs no_new_privs.
    pub(crate) filter: Option<(&'a Filter, u32)>,
    /// The last argument of those calls that a filter in force lets pass only with it (see [`GATED`]).
    pub(crate) secret: u64,
    /// `/proc/self/maps` of the maker.
    pub(crate) maps: BorrowedFd<'a>,
}

/// All is copied; [`Prepared::go`] is left. What the maker allocates from now on the born process has too.
#[derive(Debug)]
pub(crate) struct Prepared<'a> {
    shared: &'a Shared,
    arena: Arena,
    secret: u64,
}

/// Copies what the birth needs into an arena and keeps all other memory that can be written from children of this process,
/// which must be one that [`crate::sys::clone::clone`] made, with one thread. `shared` came with it from its parent.
///
/// # Errors
/// The number of `mmap(2)`, `pread(2)` or `madvise(2)`.
pub(crate) fn prepare<'a>(shared: &'a Shared, birth: &Birth<'_>) -> io::Result<Prepared<'a>> {
    let arena = Arena::of(birth, shared.told)?;
    arena::keep_from_children(birth.maps, &[arena.range(), page_of(shared.told)])?;
    Ok(Prepared {
        shared,
        arena,
        secret: birth.secret,
    })
}

fn page_of(page: NonNull<Told>) -> std::ops::Range<usize> {
    let start = page.as_ptr().expose_provenance();
    start..start + PAGE
}

impl Prepared<'_> {
    /// Gives birth: in the PID namespace for children, as a child of the parent. Returns when that process has executed its
    /// program or has ended.
    ///
    /// # Errors
    /// The number of `clone(2)`: `ENOMEM`: the namespace has ended; `EAGAIN`: a limit of processes.
    pub(crate) fn go(&self) -> io::Result<()> {
        let pid = self.shared.kept().pid.as_ptr();
        // SAFETY: the arena's stack and block are whole and nobody else's; `pid` is a number in a page of ours.
        let outcome =
            unsafe { raw::give_birth(self.arena.stack(), self.arena.block(), pid, self.secret) };
        match outcome {
            0.. => Ok(()),
            error => {
                let number = i32::try_from(-error).unwrap_or(libc::EIO);
                Err(io::Error::from_raw_os_error(number))
            }
        }
    }
}

#[cfg(test)]
mod tests;

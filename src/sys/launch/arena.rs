//! The memory of a born process, and keeping all other memory from it.
#![expect(unsafe_code, reason = "memory mappings")]

use std::ffi::{CString, c_char, c_void};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use super::raw::Block;
use super::{Birth, Told};

const STACK: usize = 32 * 1024;
/// Longest list of mappings that is read, in bytes; a monitor's has two thousand.
const MAX_MAPS: usize = 4 * 1024 * 1024;

/// A new mapping of zeroes, readable and writable. `kind`: `MAP_PRIVATE` or `MAP_SHARED`.
///
/// # Errors
/// The number of `mmap(2)`.
pub(super) fn map(bytes: usize, kind: i32) -> io::Result<NonNull<u8>> {
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping somewhere free.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            rights,
            kind | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}

/// A mapping with stack, strings, lists and filter of a birth. It is not unmapped: its process ends with it.
#[derive(Debug)]
pub(super) struct Arena {
    start: NonNull<u8>,
    bytes: usize,
    /// Where the next thing goes.
    next: usize,
    block: *const Block,
}

impl Arena {
    pub(super) fn of(birth: &Birth<'_>, told: NonNull<Told>) -> io::Result<Self> {
        let strings = |list: &[CString]| -> usize {
            list.iter()
                .map(|text| text.as_bytes_with_nul().len() + size_of::<usize>())
                .sum()
        };
        let lists = [birth.programs, birth.arguments, birth.environment];
        let filter = birth
            .filter
            .map_or(0, |(filter, _)| size_of_val(filter.instructions()));
        // For each of the things below, so much may be lost to alignment.
        let content = lists.into_iter().map(strings).sum::<usize>() + filter + size_of::<Block>();
        let bytes = (STACK + content + 16 * size_of::<Block>()).next_multiple_of(4096);
        let mut arena = Self {
            start: map(bytes, libc::MAP_PRIVATE)?,
            bytes,
            next: STACK,
            block: std::ptr::null(),
        };
        let (program, filter_flags) = match birth.filter {
            Some((filter, flags)) => (arena.filter(filter.instructions())?, flags),
            None => (std::ptr::null(), 0),
        };
        let block = Block {
            programs: arena.list(birth.programs)?,
            count: birth.programs.len(),
            arguments: arena.list(birth.arguments)?,
            environment: arena.list(birth.environment)?,
            filter: program,
            filter_flags: usize::try_from(filter_flags).map_err(io::Error::other)?,
            terminal: birth.terminal,
            secret: usize::try_from(birth.secret).map_err(io::Error::other)?,
            told,
        };
        arena.block = arena.put(std::slice::from_ref(&block))?;
        Ok(arena)
    }

    /// Copies values into the arena.
    fn put<T: Copy>(&mut self, values: &[T]) -> io::Result<*const T> {
        let full = || io::Error::from_raw_os_error(libc::E2BIG);
        let at = self.next.next_multiple_of(align_of::<T>());
        let end = at.checked_add(size_of_val(values)).ok_or_else(full)?;
        if end > self.bytes {
            return Err(full());
        }
        let to = self.start.as_ptr().wrapping_add(at).cast::<T>();
        // SAFETY: from `at` to `end` the mapping is free, and aligned for T.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len()) };
        self.next = end;
        Ok(to)
    }

    /// A list of strings that ends with null.
    fn list(&mut self, strings: &[CString]) -> io::Result<*const *const c_char> {
        let mut pointers = Vec::with_capacity(strings.len() + 1);
        for text in strings {
            pointers.push(self.put(text.as_bytes_with_nul())?.cast::<c_char>());
        }
        pointers.push(std::ptr::null());
        self.put(&pointers)
    }

    /// A `struct sock_fprog` with its instructions.
    fn filter(&mut self, instructions: &[libc::sock_filter]) -> io::Result<*const c_void> {
        let len = u16::try_from(instructions.len()).map_err(io::Error::other)?;
        let filter = self.put(instructions)?.cast_mut();
        let program = libc::sock_fprog { len, filter };
        Ok(self.put(&[program])?.cast())
    }

    /// Where it lies.
    pub(super) fn range(&self) -> Range<usize> {
        let start = self.start.as_ptr().expose_provenance();
        start..start + self.bytes
    }

    /// Upper end of the stack.
    pub(super) fn stack(&self) -> usize {
        self.range().start + STACK
    }

    pub(super) fn block(&self) -> *const Block {
        self.block
    }
}

/// Marks every mapping that can be written, but these, so that children of this process do not have it.
///
/// # Errors
/// The number of `pread(2)` or `madvise(2)`; `E2BIG`: more mappings than any process of ours has.
pub(super) fn keep_from_children(maps: BorrowedFd<'_>, but: &[Range<usize>]) -> io::Result<()> {
    // Not on the heap, which must not change while the list is read.
    let start = map(MAX_MAPS, libc::MAP_PRIVATE)?;
    // SAFETY: a new mapping of that size, nobody else's.
    let text = unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), MAX_MAPS) };
    let mut length = 0;
    loop {
        let free = text.get_mut(length..).unwrap_or_default();
        if free.is_empty() {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let offset = u64::try_from(length).map_err(io::Error::other)?;
        match rustix::io::pread(maps, free, offset) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    for line in text[..length].split(|byte| *byte == b'\n') {
        let Some(range) = writable(line) else {
            continue;
        };
        if but
            .iter()
            .any(|kept| kept.start <= range.start && range.end <= kept.end)
            || has_rseq(&range)
        {
            continue;
        }
        // The kernel merges neighbours that are alike: one of these may hold what is to stay.
        for part in without(range, but) {
            keep(part)?;
        }
    }
    Ok(())
}

/// The range of a line of `/proc/self/maps` that can be written.
fn writable(line: &[u8]) -> Option<Range<usize>> {
    let text = std::str::from_utf8(line).ok().or_else(|| {
        // The name of a file may be anything; what comes before it is not.
        std::str::from_utf8(line.get(..40)?).ok()
    })?;
    let mut words = text.split(' ');
    let (range, rights) = (words.next()?, words.next()?);
    if !rights.contains('w') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

/// What of `range` lies in none of `but`.
fn without(range: Range<usize>, but: &[Range<usize>]) -> [Range<usize>; 3] {
    let mut parts = [range, 0..0, 0..0];
    let mut used = 1;
    for kept in but {
        let known = used;
        for at in 0..known {
            let part = parts[at].clone();
            if kept.start >= part.end || kept.end <= part.start {
                continue;
            }
            parts[at] = part.start..kept.start.max(part.start);
            if let Some(free) = parts.get_mut(used) {
                *free = kept.end.min(part.end)..part.end;
                used += 1;
            }
        }
    }
    parts
}

fn keep(range: Range<usize>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let start = std::ptr::with_exposed_provenance_mut::<c_void>(range.start);
    // SAFETY: changes nothing for this process; a child that needs what it does not have only ends by that.
    match unsafe { libc::madvise(start, range.end - range.start, libc::MADV_DONTFORK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the kernel writes into this memory at every switch of threads: glibc asks it to (tests); musl, which the
/// monitor has, does not.
fn has_rseq(range: &Range<usize>) -> bool {
    #[cfg(all(target_env = "gnu", target_arch = "x86_64"))]
    {
        let thread: usize;
        // SAFETY: the thread's control block begins with its own address.
        unsafe {
            core::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
        }
        range.contains(&thread)
    }
    #[cfg(not(all(target_env = "gnu", target_arch = "x86_64")))]
    {
        range.is_empty()
    }
}

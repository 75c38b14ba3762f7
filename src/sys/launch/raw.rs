//! What runs in the born process: a few system calls without a library, without a heap, on a stack of its own. It touches
//! the arena, its code, and nothing else: there is nothing else.
#![expect(unsafe_code, reason = "system calls, and a stack that is exchanged")]

use core::arch::asm;
use core::ffi::{c_char, c_void};
use core::ptr::NonNull;

use super::Told;

/// What the born process leaves as the kind of its failure.
pub(super) const TERMINAL: u32 = 1;
pub(super) const FILTER: u32 = 2;
pub(super) const EXECUTE: u32 = 3;

/// `TIOCSCTTY`: request of ioctl(2) by which the born process takes its terminal.
const TAKE_TERMINAL: u32 = 0x540e;
/// `CLONE_VFORK | CLONE_PARENT | CLONE_PARENT_SETTID`.
const FLAGS: usize = 0x4000 | 0x8000 | 0x10_0000;
const SET_MODE_FILTER: usize = 1;

const ENOENT: isize = -2;
const EACCES: isize = -13;
const ENOTDIR: isize = -20;
const NOT_EXECUTED: usize = 127;

#[cfg(target_arch = "x86_64")]
mod number {
    pub(super) const IOCTL: u32 = 16;
    pub(super) const CLONE: u32 = 56;
    pub(super) const EXECVE: u32 = 59;
    pub(super) const SETSID: u32 = 112;
    pub(super) const EXIT_GROUP: u32 = 231;
    pub(super) const SECCOMP: u32 = 317;
}

#[cfg(target_arch = "aarch64")]
mod number {
    pub(super) const IOCTL: u32 = 29;
    pub(super) const EXIT_GROUP: u32 = 94;
    pub(super) const SETSID: u32 = 157;
    pub(super) const CLONE: u32 = 220;
    pub(super) const EXECVE: u32 = 221;
    pub(super) const SECCOMP: u32 = 277;
}

/// The calls of a birth besides the exec, as a filter sees them: number, and what its low 32 bits must be of the argument
/// with this index. The sixth argument, which none of them has, is the secret.
pub(crate) const GATED: [(u32, Option<(u32, u32)>); 3] = [
    (number::CLONE, Some((0, 0x4000 | 0x8000 | 0x10_0000))),
    (number::SETSID, None),
    (number::IOCTL, Some((1, TAKE_TERMINAL))),
];

/// All that the born process knows. Everything it points to lies in the arena.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// `count` programs.
    pub(super) programs: *const *const c_char,
    pub(super) count: usize,
    pub(super) arguments: *const *const c_char,
    pub(super) environment: *const *const c_char,
    /// `struct sock_fprog`, or null.
    pub(super) filter: *const c_void,
    pub(super) filter_flags: usize,
    pub(super) terminal: bool,
    pub(super) secret: usize,
    pub(super) told: NonNull<Told>,
}

/// A system call.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn call(number: u32, arguments: [usize; 3], secret: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention on x86_64; it clobbers rcx and r11 only.
    unsafe {
        asm!("syscall", inlateout("rax") number as usize => result,
            in("rdi") arguments[0], in("rsi") arguments[1], in("rdx") arguments[2],
            in("r10") 0, in("r8") 0, in("r9") secret,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A system call.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn call(number: u32, arguments: [usize; 3], secret: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention on aarch64; it clobbers nothing but the result.
    unsafe {
        asm!("svc #0", in("x8") number as usize, inlateout("x0") arguments[0] => result,
            in("x1") arguments[1], in("x2") arguments[2], in("x3") 0, in("x4") 0, in("x5") secret,
            options(nostack));
    }
    result
}

/// Clones the born process onto `stack` (its upper end), where it runs [`live`]. Its number, or a negative error number.
///
/// # Safety
/// Only from a process with one thread. `stack` and `block` are valid and used by nobody else; `pid` can be written.
#[cfg(target_arch = "x86_64")]
pub(super) unsafe fn give_birth(
    stack: usize,
    block: *const Block,
    pid: *mut i32,
    secret: u64,
) -> isize {
    let result: isize;
    // SAFETY: in the maker, which returns here, the call clobbers rcx and r11 only; the born process goes into `live` and
    // never comes out of it.
    unsafe {
        asm!("syscall", "test rax, rax", "jnz 2f", "xor ebp, ebp", "mov rdi, r12", "call {live}", "ud2", "2:",
            live = sym live,
            inlateout("rax") number::CLONE as usize => result,
            in("rdi") FLAGS, in("rsi") stack, in("rdx") pid, in("r10") 0, in("r8") 0, in("r9") secret,
            in("r12") block, lateout("rcx") _, lateout("r11") _);
    }
    result
}

/// Clones the born process onto `stack` (its upper end), where it runs [`live`]. Its number, or a negative error number.
///
/// # Safety
/// Only from a process with one thread. `stack` and `block` are valid and used by nobody else; `pid` can be written.
#[cfg(target_arch = "aarch64")]
pub(super) unsafe fn give_birth(
    stack: usize,
    block: *const Block,
    pid: *mut i32,
    secret: u64,
) -> isize {
    let result: isize;
    // SAFETY: in the maker, which returns here, the call clobbers nothing but the result; the born process goes into `live`
    // and never comes out of it.
    unsafe {
        asm!("svc #0", "cbnz x0, 2f", "mov x29, #0", "mov x0, x9", "bl {live}", "brk #1", "2:",
            live = sym live,
            in("x8") number::CLONE as usize, inlateout("x0") FLAGS => result,
            in("x1") stack, in("x2") pid, in("x3") 0, in("x4") 0, in("x5") secret, in("x9") block,
            lateout("x30") _);
    }
    result
}

/// The life of the born process up to its program.
///
/// # Safety
/// `block` is whole, and this is the born process.
unsafe extern "C" fn live(block: *const Block) -> ! {
    // SAFETY: by the caller's promise.
    let block = unsafe { *block };
    // SAFETY: no pointer is passed. It cannot fail in a process that has just been born.
    unsafe { call(number::SETSID, [0; 3], block.secret) };
    if block.terminal {
        // SAFETY: no pointer is passed.
        let taken = unsafe { call(number::IOCTL, [0, TAKE_TERMINAL as usize, 0], block.secret) };
        if taken != 0 {
            end(&block, TERMINAL, taken, 0);
        }
    }
    if !block.filter.is_null() {
        let arguments = [SET_MODE_FILTER, block.filter_flags, block.filter as usize];
        // SAFETY: the program lies in the arena, with the length that it says.
        let installed = unsafe { call(number::SECCOMP, arguments, 0) };
        if installed != 0 {
            end(&block, FILTER, installed, 0);
        }
    }
    let (mut worst, mut which, mut index) = (ENOENT, 0, 0);
    while index < block.count {
        // SAFETY: `count` pointers lie there.
        let program = unsafe { *block.programs.wrapping_add(index) };
        let arguments = [
            program as usize,
            block.arguments as usize,
            block.environment as usize,
        ];
        // SAFETY: strings with their NUL, in lists that end with null.
        let error = unsafe { call(number::EXECVE, arguments, 0) };
        match error {
            ENOENT | ENOTDIR => {}
            EACCES => (worst, which) = (error, index),
            _ => end(&block, EXECUTE, error, index),
        }
        index = index.wrapping_add(1);
    }
    end(&block, EXECUTE, worst, which)
}

/// Says why, and ends; by force where a filter refuses the exit.
fn end(block: &Block, failure: u32, error: isize, index: usize) -> ! {
    use core::sync::atomic::Ordering;
    // SAFETY: the page of all three, which lives as long as this process.
    let told = unsafe { block.told.as_ref() };
    told.errno.store(error.wrapping_neg(), Ordering::Release);
    told.index.store(index, Ordering::Release);
    told.failure.store(failure, Ordering::Release);
    // SAFETY: no pointer is passed.
    unsafe { call(number::EXIT_GROUP, [NOT_EXECUTED, 0, 0], 0) };
    end_by_force()
}

/// Ends this process by an instruction that there is not: no filter can refuse that.
pub(crate) fn end_by_force() -> ! {
    loop {
        // SAFETY: raises SIGILL, which nobody handles here.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            asm!("ud2", options(nomem, nostack));
        }
        // SAFETY: as above, SIGTRAP.
        #[cfg(target_arch = "aarch64")]
        unsafe {
            asm!("brk #1", options(nomem, nostack));
        }
    }
}

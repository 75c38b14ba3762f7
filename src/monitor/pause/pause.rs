//! The pod's pause process: holds namespaces, reaps what is reparented to it, ends on SIGTERM or SIGINT. It runs as the
//! pod's user, without any capability.
//!
//! Freestanding: no libc, no heap, a page of code and a page of stack. The signals are blocked and fetched, never handled,
//! which works as PID 1 too: the kernel keeps blocked signals even for an init without handlers.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

const SIGINT: u32 = 2;
const SIGTERM: u32 = 15;
const SIGCHLD: u32 = 17;
const EINTR: isize = -4;
/// Signal n is bit n-1; the kernel's set has 64.
const AWAITED: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1) | 1 << (SIGCHLD - 1);

#[cfg(target_arch = "x86_64")]
mod number {
    pub(crate) const RT_SIGPROCMASK: usize = 14;
    pub(crate) const WAIT4: usize = 61;
    pub(crate) const PRCTL: usize = 157;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 128;
    pub(crate) const EXIT: usize = 60;
    pub(crate) const EXIT_GROUP: usize = 231;
}

#[cfg(target_arch = "aarch64")]
mod number {
    pub(crate) const EXIT: usize = 93;
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const RT_SIGPROCMASK: usize = 135;
    pub(crate) const RT_SIGTIMEDWAIT: usize = 137;
    pub(crate) const PRCTL: usize = 167;
    pub(crate) const WAIT4: usize = 260;
}

// The stack pointer is a multiple of 16 here; a call makes it what the C convention wants.
#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start:", "xor ebp, ebp", "call {main}", "ud2", main = sym main);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start:", "mov x29, #0", "bl {main}", "brk #1", main = sym main);

/// A system call with four arguments.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "x86_64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention on x86_64; it clobbers rcx and r11 only.
    unsafe {
        asm!("syscall", inlateout("rax") number as isize => result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// A system call with four arguments.
///
/// # Safety
/// As the call.
#[cfg(target_arch = "aarch64")]
unsafe fn call(number: usize, a: usize, b: usize, c: usize, d: usize) -> isize {
    let result: isize;
    // SAFETY: the kernel's convention on aarch64.
    unsafe {
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result,
            in("x1") b, in("x2") c, in("x3") d, options(nostack));
    }
    result
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    exit(101)
}

fn exit(code: usize) -> ! {
    for number in [number::EXIT_GROUP, number::EXIT] {
        // SAFETY: ends this process.
        unsafe { call(number, code, 0, 0, 0) };
    }
    // A seccomp filter refuses both: this needs no call.
    loop {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an instruction that is none; it ends this process.
        unsafe {
            asm!("ud2", options(nomem, nostack));
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: as above.
        unsafe {
            asm!("udf #0", options(nomem, nostack));
        }
    }
}

extern "C" fn main() -> ! {
    const SIG_SETMASK: usize = 2;
    const WNOHANG: usize = 1;
    const PR_SET_DUMPABLE: usize = 4;
    const PR_SET_NAME: usize = 15;
    let name = c"pause";
    // Run from memory, it would be called after that file.
    // SAFETY: a string with its NUL.
    unsafe { call(number::PRCTL, PR_SET_NAME, name.as_ptr() as usize, 0, 0) };
    // A container of the same user must not trace it where the PID namespace is shared: it may be confined less.
    // SAFETY: no pointer is passed.
    unsafe { call(number::PRCTL, PR_SET_DUMPABLE, 0, 0, 0) };
    let awaited = AWAITED;
    let set = (&raw const awaited) as usize;
    // SAFETY: `set` points to the 8 bytes the kernel reads.
    if unsafe { call(number::RT_SIGPROCMASK, SIG_SETMASK, set, 0, 8) } != 0 {
        exit(1);
    }
    loop {
        // Children that ended before the mask was set are met here too.
        // SAFETY: no pointer is passed.
        while unsafe { call(number::WAIT4, usize::MAX, 0, WNOHANG, 0) } > 0 {}
        // SAFETY: `set` as above; no siginfo, no time limit.
        let signal = unsafe { call(number::RT_SIGTIMEDWAIT, set, 0, 0, 8) };
        if signal == SIGTERM as isize || signal == SIGINT as isize {
            exit(0);
        }
        // A child to reap, or a stop and its end. Else there is nothing to wait for.
        if signal != SIGCHLD as isize && signal != EINTR {
            exit(1);
        }
    }
}

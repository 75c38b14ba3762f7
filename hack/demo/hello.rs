//! The demonstration's only program, freestanding and static: a few kilobytes are its whole image.
//! Without arguments: says where it runs, then waits until it is told to stop. With one: answers and ends.
#![no_std]
#![no_main]

use core::arch::{asm, global_asm};

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    call(EXIT, 101, 0, 0);
    loop {}
}

#[cfg(target_arch = "x86_64")]
global_asm!(".globl _start", "_start: xor ebp, ebp", "mov rdi, rsp", "and rsp, -16", "call {0}", sym main);
#[cfg(target_arch = "aarch64")]
global_asm!(".globl _start", "_start: mov x0, sp", "bl {0}", sym main);

#[cfg(target_arch = "x86_64")]
mod numbers {
    pub const WRITE: usize = 1;
    pub const GETPID: usize = 39;
    pub const EXIT: usize = 60;
    pub const UNAME: usize = 63;
    pub const SIGPROCMASK: usize = 14;
    pub const SIGTIMEDWAIT: usize = 128;
}
#[cfg(target_arch = "aarch64")]
mod numbers {
    pub const WRITE: usize = 64;
    pub const GETPID: usize = 172;
    pub const EXIT: usize = 93;
    pub const UNAME: usize = 160;
    pub const SIGPROCMASK: usize = 135;
    pub const SIGTIMEDWAIT: usize = 137;
}
use numbers::{EXIT, GETPID, SIGPROCMASK, SIGTIMEDWAIT, UNAME, WRITE};

fn call(number: usize, a: usize, b: usize, c: usize) -> isize {
    let result: isize;
    // SAFETY: every call made here reads or writes only buffers of this program, alive for the call. The
    // fourth argument is the size of a signal set, which the others ignore.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("syscall", inlateout("rax") number as isize => result, in("rdi") a, in("rsi") b, in("rdx") c,
             in("r10") 8usize, lateout("rcx") _, lateout("r11") _);
        #[cfg(target_arch = "aarch64")]
        asm!("svc 0", in("x8") number, inlateout("x0") a as isize => result, in("x1") b, in("x2") c, in("x3") 8usize);
    }
    result
}

fn say(text: &[u8]) {
    call(WRITE, 1, text.as_ptr() as usize, text.len());
}

fn say_number(mut number: usize) {
    let mut digits = [b'0', b'0', b'0', b'0', b'0', b'0', b'0', b'0', b'0', b'0'];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 || at == 0 {
            break;
        }
    }
    say(&digits[at..]);
}

extern "C" fn main(stack: *const usize) -> ! {
    // SAFETY: the kernel puts the argument count at the top of the stack.
    let count = unsafe { *stack };
    // Not zeroed: that would call memset, which nobody provides here.
    let mut name = core::mem::MaybeUninit::<[u8; 390]>::uninit();
    call(UNAME, name.as_mut_ptr() as usize, 0, 0);
    // SAFETY: uname(2) has filled all six fields of 65 bytes; the second is the host name.
    let host = unsafe { &name.assume_init_ref()[65..130] };
    let host = &host[..host.iter().position(|b| *b == 0).unwrap_or(0)];
    say(if count > 1 { b"exec: another process of pod " } else { b"hello from pod " });
    say(host);
    say(b", pid ");
    say_number(call(GETPID, 0, 0, 0) as usize);
    say(b"\n");
    if count > 1 {
        call(EXIT, 0, 0, 0);
    }
    // SIGINT and SIGTERM end it: as PID 1 it must ask for them.
    let wanted: u64 = 1 << (2 - 1) | 1 << (15 - 1);
    call(SIGPROCMASK, 0, &raw const wanted as usize, 0);
    call(SIGTIMEDWAIT, &raw const wanted as usize, 0, 0);
    say(b"goodbye\n");
    call(EXIT, 0, 0, 0);
    loop {}
}

//! Seccomp filters: installing one, and asking one beforehand what it would do to a call of ours.
//! See `seccomp(2)`, Documentation/userspace-api/seccomp_filter.rst.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::fmt;
use std::io;

/// One instruction of a classic BPF program: code, jump if true, jump if false, constant.
pub(crate) type Instruction = (u16, u8, u8, u32);

/// A filter in the kernel's form.
#[derive(Debug)]
pub(crate) struct Filter(Vec<libc::sock_filter>);

impl Filter {
    /// From a program.
    pub(crate) fn new(program: &[Instruction]) -> Self {
        let of = |(code, jt, jf, k): &Instruction| libc::sock_filter {
            code: *code,
            jt: *jt,
            jf: *jf,
            k: *k,
        };
        Self(program.iter().map(of).collect())
    }

    /// Its instructions.
    pub(in crate::sys) fn instructions(&self) -> &[libc::sock_filter] {
        &self.0
    }

    /// Installs it for this process and what it executes, with the flags of `seccomp(2)`. Allocates nothing.
    ///
    /// # Errors
    /// The number of `seccomp(2)`: `EACCES` (neither `CAP_SYS_ADMIN` nor no_new_privs), `EINVAL` (a bad program or
    /// unknown flags).
    pub(crate) fn install(&self, flags: u32) -> io::Result<()> {
        const SECCOMP_SET_MODE_FILTER: u32 = 1;
        let program = libc::sock_fprog {
            len: u16::try_from(self.0.len())
                .map_err(|_long| io::Error::from_raw_os_error(libc::EINVAL))?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the program points to `len` instructions, which the kernel copies.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// As [`Filter::install`], of a program.
///
/// # Errors
/// As [`Filter::install`].
pub(crate) fn install(program: &[Instruction], flags: u32) -> io::Result<()> {
    Filter::new(program).install(flags)
}

/// Arguments of a call, as far as they are known.
pub(crate) type Arguments = [Option<u64>; 6];

/// A call that we make under the filter of somebody else.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// Executes the program of a container, or of a hook.
    Execve,
    /// Executes pause.
    Execveat,
    /// Drops what `CAP_SYS_ADMIN` was kept for.
    Capset,
    /// Sets the ambient capabilities.
    Prctl,
    /// Pause blocks its signals.
    RtSigprocmask,
    /// Pause waits for its signals.
    RtSigtimedwait,
    /// Pause reaps.
    Wait4,
}

impl Call {
    const fn number(self) -> libc::c_long {
        match self {
            Self::Execve => libc::SYS_execve,
            Self::Execveat => libc::SYS_execveat,
            Self::Capset => libc::SYS_capset,
            Self::Prctl => libc::SYS_prctl,
            Self::RtSigprocmask => libc::SYS_rt_sigprocmask,
            Self::RtSigtimedwait => libc::SYS_rt_sigtimedwait,
            Self::Wait4 => libc::SYS_wait4,
        }
    }

    /// As profiles name it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Execve => "execve",
            Self::Execveat => "execveat",
            Self::Capset => "capset",
            Self::Prctl => "prctl",
            Self::RtSigprocmask => "rt_sigprocmask",
            Self::RtSigtimedwait => "rt_sigtimedwait",
            Self::Wait4 => "wait4",
        }
    }
}

/// What a filter does to a call that it does not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It fails with this number.
    Fails(i32),
    /// Its process ends by SIGSYS.
    Ends,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fails(number) => {
                write!(f, "fail with {}", io::Error::from_raw_os_error(*number))
            }
            Self::Ends => write!(f, "end its process (SIGSYS)"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// What `program` does to a call; absent: it lets it through, or that hangs on an argument which is not known.
pub(crate) fn refusal(
    program: &[Instruction],
    call: Call,
    arguments: &Arguments,
) -> Option<Refusal> {
    const ACTION: u32 = 0xffff_0000;
    const DATA: u32 = 0xffff;
    const TRACE: u32 = 0x7ff0_0000;
    const LOG: u32 = 0x7ffc_0000;
    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    let result = evaluate(program, call, arguments)?;
    match result & ACTION {
        LOG | ALLOW => None,
        ERRNO => i32::try_from(result & DATA).ok().map(Refusal::Fails),
        // Nobody traces us.
        TRACE => Some(Refusal::Fails(libc::ENOSYS)),
        _ => Some(Refusal::Ends),
    }
}

/// The result of a program; absent: it looks at an argument that is not known, or is none that the kernel takes.
fn evaluate(program: &[Instruction], call: Call, arguments: &Arguments) -> Option<u32> {
    let (mut accumulator, mut at) = (0_u32, 0_usize);
    // All jumps go forward.
    while let Some((code, yes, no, k)) = program.get(at).copied() {
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { yes } else { no });
        match code {
            0x20 => accumulator = word(k, call, arguments)?,
            0x54 => accumulator &= k,
            0x05 => at = at.checked_add(usize::try_from(k).ok()?)?,
            0x15 => jump(accumulator == k),
            0x25 => jump(accumulator > k),
            0x35 => jump(accumulator >= k),
            0x45 => jump(accumulator & k != 0),
            0x06 => return Some(k),
            _ => return None,
        }
    }
    None
}

/// A word of `struct seccomp_data`: number, architecture, instruction pointer (8 bytes), six arguments of 8 bytes.
fn word(at: u32, call: Call, arguments: &Arguments) -> Option<u32> {
    match at {
        0 => u32::try_from(call.number()).ok(),
        4 => Some(AUDIT_ARCH),
        16..64 => {
            let argument = (*arguments.get(usize::try_from((at - 16) / 8).ok()?)?)?;
            let half = if at.is_multiple_of(8) {
                argument & u64::from(u32::MAX)
            } else {
                argument >> 32
            };
            u32::try_from(half).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::clone::in_forked_child;
    use crate::sys::credentials::set_no_new_privs;

    #[test]
    fn a_filter_makes_a_call_fail() {
        in_forked_child(|| {
            set_no_new_privs().unwrap();
            // Load the call's number; uname (63 on x86_64, 160 on aarch64) fails with errno 99, the rest is allowed.
            let uname = u32::try_from(libc::SYS_uname).unwrap();
            let program = [
                (0x20, 0, 0, 0),
                (0x15, 0, 1, uname),
                (0x06, 0, 0, 0x0005_0000 | 99),
                (0x06, 0, 0, 0x7fff_0000),
            ];
            install(&program, 0).unwrap();
            let mut name = std::mem::MaybeUninit::<libc::utsname>::uninit();
            // SAFETY: uname writes the structure.
            assert_eq!(unsafe { libc::uname(name.as_mut_ptr()) }, -1);
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(99));
        });
    }

    #[test]
    fn a_filter_is_asked_what_the_kernel_does_then() {
        let execve = u32::try_from(libc::SYS_execve).unwrap();
        let (fails, kills, allow, trace) =
            (0x0005_0000 | 13, 0x8000_0000, 0x7fff_0000, 0x7ff0_0000);
        // execve with the second argument's low word 7, or its high word 9, gets `result`.
        let program = |result| {
            [
                (0x20, 0, 0, 0),
                (0x15, 0, 5, execve),
                (0x20, 0, 0, 24),
                (0x15, 2, 0, 7),
                (0x20, 0, 0, 28),
                (0x15, 0, 1, 9),
                (0x06, 0, 0, result),
                (0x06, 0, 0, allow),
            ]
        };
        let with = |value| [Some(1), Some(value), None, None, None, None];
        for (result, refused) in [
            (fails, Some(Refusal::Fails(13))),
            (kills, Some(Refusal::Ends)),
            (trace, Some(Refusal::Fails(libc::ENOSYS))),
            (0x0003_0000, Some(Refusal::Ends)),
            (0x7ffc_0000, None),
            (allow, None),
        ] {
            let asked = |call, value| refusal(&program(result), call, &with(value));
            assert_eq!(asked(Call::Execve, 7), refused, "{result:#x}");
            assert_eq!(asked(Call::Execve, 9 << 32), refused, "{result:#x}");
            assert_eq!(asked(Call::Execve, 8), None);
            assert_eq!(asked(Call::Execveat, 7), None);
        }
        // Nobody knows: the kernel will tell.
        assert_eq!(refusal(&program(kills), Call::Execve, &[None; 6]), None);
        for broken in [&[][..], &[(0x05, 0, 0, u32::MAX)], &[(0x99, 0, 0, 0)]] {
            assert_eq!(refusal(broken, Call::Execve, &[None; 6]), None);
        }
        in_forked_child(|| {
            set_no_new_privs().unwrap();
            install(&program(fails), 0).unwrap();
            // SAFETY: the filter answers before any pointer is looked at.
            let result = unsafe { libc::syscall(libc::SYS_execve, 1, 7, 0, 0, 0, 0) };
            assert_eq!(
                (result, io::Error::last_os_error().raw_os_error()),
                (-1, Some(13))
            );
        });
    }
}

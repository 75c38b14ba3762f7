//! Architectures and their system call numbers.

use std::str::FromStr as _;

/// An architecture (ABI) whose system calls a filter can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Arch {
    /// 64-bit x86.
    X86_64,
    /// 32-bit x86, on a 64-bit kernel.
    X86,
    /// 64-bit x86 with 32-bit pointers.
    X32,
    /// 64-bit ARM.
    Aarch64,
    /// 32-bit ARM.
    Arm,
}

/// Set in the numbers of x32.
pub(crate) const X32_BIT: u32 = 0x4000_0000;
/// First of the numbers that 32-bit ARM keeps for itself.
pub(crate) const ARM_PRIVATE: u32 = 0xf_0000;

/// Calls that have a number of their own in x32, in order from 512 (arch/x86 `syscall_64.tbl`).
const X32_NAMES: [&str; 36] = [
    "rt_sigaction",
    "rt_sigreturn",
    "ioctl",
    "readv",
    "writev",
    "recvfrom",
    "sendmsg",
    "recvmsg",
    "execve",
    "ptrace",
    "rt_sigpending",
    "rt_sigtimedwait",
    "rt_sigqueueinfo",
    "sigaltstack",
    "timer_create",
    "mq_notify",
    "kexec_load",
    "waitid",
    "set_robust_list",
    "get_robust_list",
    "vmsplice",
    "move_pages",
    "preadv",
    "pwritev",
    "rt_tgsigqueueinfo",
    "recvmmsg",
    "sendmmsg",
    "process_vm_readv",
    "process_vm_writev",
    "setsockopt",
    "getsockopt",
    "io_setup",
    "io_submit",
    "execveat",
    "preadv2",
    "pwritev2",
];
const ARM_NAMES: [(&str, u32); 6] = [
    ("breakpoint", 1),
    ("cacheflush", 2),
    ("usr26", 3),
    ("usr32", 4),
    ("set_tls", 5),
    ("get_tls", 6),
];

impl Arch {
    /// The machine's own.
    pub(crate) const fn native() -> Self {
        if cfg!(target_arch = "aarch64") {
            Self::Aarch64
        } else {
            Self::X86_64
        }
    }

    /// Itself and those whose programs the machine runs too.
    pub(crate) const fn family(self) -> &'static [Self] {
        match self {
            Self::X86_64 => &[Self::X86_64, Self::X86, Self::X32],
            Self::Aarch64 => &[Self::Aarch64, Self::Arm],
            Self::X86 => &[Self::X86],
            Self::X32 => &[Self::X32],
            Self::Arm => &[Self::Arm],
        }
    }

    /// The name that profiles use: `SCMP_ARCH_...`.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "SCMP_ARCH_X86_64",
            Self::X86 => "SCMP_ARCH_X86",
            Self::X32 => "SCMP_ARCH_X32",
            Self::Aarch64 => "SCMP_ARCH_AARCH64",
            Self::Arm => "SCMP_ARCH_ARM",
        }
    }

    /// The name that conditions of profiles use.
    pub(crate) const fn short_name(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::X86 => "x86",
            Self::X32 => "x32",
            Self::Aarch64 => "arm64",
            Self::Arm => "arm",
        }
    }

    /// `AUDIT_ARCH_...`: what the kernel puts into `seccomp_data.arch`.
    pub(crate) const fn audit(self) -> u32 {
        match self {
            Self::X86_64 | Self::X32 => 0xc000_003e,
            Self::X86 => 0x4000_0003,
            Self::Aarch64 => 0xc000_00b7,
            Self::Arm => 0x4000_0028,
        }
    }

    /// Are arguments 32 bits wide?
    pub(crate) const fn is_narrow(self) -> bool {
        matches!(self, Self::X86 | Self::Arm)
    }

    /// Number of a system call; absent: this architecture has none of this name.
    pub(crate) fn number(self, name: &str) -> Option<u32> {
        let found = match self {
            Self::X86_64 => x86_64(name),
            Self::X86 => syscalls::x86::Sysno::from_str(name).ok().map(|n| n.id()),
            Self::X32 => return x32(name),
            // The library knows it by the name of C's function.
            Self::Aarch64 if name == "newfstatat" => Some(79),
            Self::Aarch64 => syscalls::aarch64::Sysno::from_str(name)
                .ok()
                .map(|n| n.id()),
            Self::Arm => {
                if let Some((_, number)) = ARM_NAMES.iter().find(|(known, _)| *known == name) {
                    return Some(ARM_PRIVATE + number);
                }
                syscalls::arm::Sysno::from_str(name).ok().map(|n| n.id())
            }
        };
        found.and_then(|number| u32::try_from(number).ok())
    }
}

fn x86_64(name: &str) -> Option<i32> {
    match name {
        "uretprobe" => Some(335),
        "uprobe" => Some(336),
        _ => syscalls::x86_64::Sysno::from_str(name).ok().map(|n| n.id()),
    }
}

fn x32(name: &str) -> Option<u32> {
    let own = X32_NAMES
        .iter()
        .zip(512..)
        .find(|(known, _)| **known == name);
    let number = match own {
        Some((_, number)) => number,
        None => u32::try_from(x86_64(name)?).ok()?,
    };
    Some(number | X32_BIT)
}

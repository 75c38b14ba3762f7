//! Priorities of a process, memory policy of the calling one; kept over an exec.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;

fn outcome(result: libc::c_long) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the priority of a process's block I/O: class 0..=3, level 0..=7. `pid` 0: the caller.
///
/// # Errors
/// The number of `ioprio_set(2)`; `EPERM`: the real-time class without `CAP_SYS_NICE`, `ESRCH`: no such process.
pub(crate) fn set_io_priority(pid: u32, class: u8, level: u8) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let priority = (u32::from(class) << IOPRIO_CLASS_SHIFT) | u32::from(level);
    // SAFETY: three numbers.
    outcome(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) })
}

/// Lets a thread, and what it starts from now on, run on this CPU only; `pid` 0: the calling one.
///
/// # Errors
/// The number of `sched_setaffinity(2)`; `EINVAL`: there is no such CPU in its cpuset, `ESRCH`: it has ended.
pub(crate) fn set_cpu(pid: u32, cpu: u32) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let pid = match pid {
        0 => None,
        pid => Some(crate::sys::process::pid_of(pid)?),
    };
    let mut set = CpuSet::new();
    match usize::try_from(cpu) {
        Ok(cpu) if cpu < CpuSet::MAX_CPU => set.set(cpu),
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
    sched_setaffinity(pid, &set).map_err(io::Error::from)
}

/// Arguments of `sched_setattr(2)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// -20..=19.
    pub(crate) nice: i32,
    /// Real-time priority.
    pub(crate) priority: u32,
    /// Nanoseconds.
    pub(crate) runtime: u64,
    /// Nanoseconds.
    pub(crate) deadline: u64,
    /// Nanoseconds.
    pub(crate) period: u64,
}

/// `struct sched_attr` of its first version (48 bytes).
#[repr(C)]
struct Raw {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Sets the scheduling attributes of a process's first thread. `pid` 0: the calling thread.
///
/// # Errors
/// The number of `sched_setattr(2)`; `EPERM`: without `CAP_SYS_NICE`, or a real-time policy in a cgroup without real-time CPU;
/// `EINVAL`: no such policy or value; `ESRCH`: no such process.
pub(crate) fn set_scheduler(pid: u32, wanted: &Attributes) -> io::Result<()> {
    let raw = Raw {
        size: 48,
        policy: wanted.policy,
        flags: wanted.flags,
        nice: wanted.nice,
        priority: wanted.priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
    };
    // SAFETY: the kernel reads the 48 bytes that `size` names, and writes at most the size back.
    outcome(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const raw, 0) })
}

/// Sets the memory policy: a mode with its flags, and a mask of nodes (64 to a word, none for some modes).
///
/// # Errors
/// The number of `set_mempolicy(2)`; `EINVAL`: no such mode or node, `ENOSYS`: a kernel without NUMA.
pub(crate) fn set_memory_policy(mode: u32, nodes: &[u64]) -> io::Result<()> {
    // The kernel reads one bit less than it is told.
    let bits = if nodes.is_empty() {
        0
    } else {
        nodes.len() * 64 + 1
    };
    let mut mask = nodes.to_vec();
    mask.push(0);
    // SAFETY: the mask has a word more than the bits named.
    outcome(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), bits) })
}

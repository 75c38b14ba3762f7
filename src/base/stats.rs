//! Figures of use, as plain values. Counters count since the cgroup was made. CRI: `ContainerStats`,
//! `PodSandboxStats`.

use crate::base::clock::Timestamp;

/// Stall times in microseconds of one resource. CRI: `PsiStats`; Kernel: Documentation/accounting/psi.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Psi {
    /// Some tasks stalled: total microseconds, then averages over 10, 60 and 300 s in percent.
    pub(crate) some: PsiLine,
    /// All tasks stalled.
    pub(crate) full: PsiLine,
}

/// One line of a pressure file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct PsiLine {
    /// Microseconds.
    pub(crate) total: u64,
    /// Percent over 10 s.
    pub(crate) avg10: f64,
    /// Percent over 60 s.
    pub(crate) avg60: f64,
    /// Percent over 300 s.
    pub(crate) avg300: f64,
}

/// What a cgroup tells in one reading. Absent: the controller or file is not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct CgroupStats {
    /// When it was read.
    pub(crate) timestamp: Timestamp,
    /// CPU time in nanoseconds.
    pub(crate) cpu_usage_ns: Option<u64>,
    /// CPU time in user mode, nanoseconds.
    pub(crate) cpu_user_ns: Option<u64>,
    /// CPU time in the kernel, nanoseconds.
    pub(crate) cpu_system_ns: Option<u64>,
    /// Enforcement periods elapsed.
    pub(crate) cpu_periods: Option<u64>,
    /// Periods throttled.
    pub(crate) cpu_throttled_periods: Option<u64>,
    /// Time throttled, nanoseconds.
    pub(crate) cpu_throttled_ns: Option<u64>,
    /// Bytes in use, page cache included.
    pub(crate) memory_usage: Option<u64>,
    /// Highest use ever, bytes.
    pub(crate) memory_peak: Option<u64>,
    /// Bytes in use less inactive file pages.
    pub(crate) memory_working_set: Option<u64>,
    /// Anonymous memory, bytes.
    pub(crate) memory_rss: Option<u64>,
    /// Page cache, bytes.
    pub(crate) memory_cache: Option<u64>,
    /// Mapped files, bytes.
    pub(crate) memory_mapped_file: Option<u64>,
    /// Kernel memory, bytes.
    pub(crate) memory_kernel: Option<u64>,
    /// Limit in bytes; absent: unlimited.
    pub(crate) memory_limit: Option<u64>,
    /// Allocation failures at the limit.
    pub(crate) memory_failcnt: Option<u64>,
    /// Page faults.
    pub(crate) page_faults: Option<u64>,
    /// Major page faults.
    pub(crate) major_page_faults: Option<u64>,
    /// Swap in use, bytes.
    pub(crate) swap_usage: Option<u64>,
    /// Swap limit in bytes; absent: unlimited.
    pub(crate) swap_limit: Option<u64>,
    /// OOM kills.
    pub(crate) oom_kills: Option<u64>,
    /// Processes (tasks of the pids controller).
    pub(crate) pids: Option<u64>,
    /// Limit of tasks; absent: unlimited.
    pub(crate) pids_limit: Option<u64>,
    /// CPU pressure.
    pub(crate) cpu_psi: Option<Psi>,
    /// Memory pressure.
    pub(crate) memory_psi: Option<Psi>,
    /// I/O pressure.
    pub(crate) io_psi: Option<Psi>,
}

/// Counters of one network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InterfaceStats {
    /// Name inside the pod.
    pub(crate) name: String,
    /// Bytes received.
    pub(crate) rx_bytes: u64,
    /// Packets received.
    pub(crate) rx_packets: u64,
    /// Receive errors.
    pub(crate) rx_errors: u64,
    /// Received packets dropped.
    pub(crate) rx_dropped: u64,
    /// Bytes sent.
    pub(crate) tx_bytes: u64,
    /// Packets sent.
    pub(crate) tx_packets: u64,
    /// Send errors.
    pub(crate) tx_errors: u64,
    /// Sent packets dropped.
    pub(crate) tx_dropped: u64,
}

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

/// How much of a cgroup is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// What the stats calls show: few files.
    Usage,
    /// What the metrics calls show of a pod, too.
    Pod,
    /// What they show of a container, too.
    Everything,
}

/// Traffic of a block device. Kernel: `io.stat` (v2), `blkio.throttle.*` (v1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceIo {
    /// Major number of the device.
    pub(crate) major: u32,
    /// Minor number of the device.
    pub(crate) minor: u32,
    /// Bytes read.
    pub(crate) read_bytes: u64,
    /// Bytes written.
    pub(crate) written_bytes: u64,
    /// Reads.
    pub(crate) reads: u64,
    /// Writes.
    pub(crate) writes: u64,
    /// The same bytes and the discarded ones, as v1 counts them; absent on v2, which does not.
    pub(crate) kinds: Option<IoKinds>,
}

/// Bytes of a block device by kind. Kernel: `blkio.throttle.io_service_bytes_recursive` of v1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct IoKinds {
    /// Of synchronous requests.
    pub(crate) sync: u64,
    /// Of asynchronous requests.
    pub(crate) asynchronous: u64,
    /// Discarded.
    pub(crate) discarded: u64,
    /// Read, written and discarded.
    pub(crate) total: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HugePages {
    /// As the kernel names it: `2MB`, `1GB`.
    pub(crate) size: String,
    /// Bytes in use.
    pub(crate) usage: u64,
    /// Highest use ever in bytes; absent on v2, which does not count it.
    pub(crate) peak: Option<u64>,
}

/// The processes of a cgroup and those below it, by `/proc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ProcessStats {
    /// How many.
    pub(crate) processes: u64,
    /// Their open descriptors.
    pub(crate) descriptors: u64,
    /// Sockets among these; absent where there are too many to look at each.
    pub(crate) sockets: Option<u64>,
    /// Soft limit of open files of the first process; absent: it is gone.
    pub(crate) open_files_limit: Option<u64>,
}

/// The filesystem below a directory. statvfs(3).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FilesystemSize {
    /// Device as the mount table names it (`/dev/sda1`, `tmpfs`).
    pub(crate) device: String,
    /// Size in bytes.
    pub(crate) bytes: u64,
    /// Inodes; 0: the filesystem has no fixed number.
    pub(crate) inodes: u64,
    /// Inodes that are free.
    pub(crate) inodes_free: u64,
}

/// What a cgroup tells in one reading. Absent: the controller or file is not there, or it is of
/// a larger [`Scope`] and was not read.
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
    /// Tasks (threads) of the pids controller.
    pub(crate) pids: Option<u64>,
    /// Limit of tasks; absent: unlimited.
    pub(crate) pids_limit: Option<u64>,
    /// Enforcement period, microseconds.
    pub(crate) cpu_period: Option<u64>,
    /// CPU time in each period, microseconds; absent: unlimited.
    pub(crate) cpu_quota: Option<u64>,
    /// Shares as v1 counts them (2 to 262144); of v2's weight the shares that give it.
    pub(crate) cpu_shares: Option<u64>,
    /// Bytes that are reclaimed last (`memory.low` of v2); absent: none set.
    pub(crate) memory_reservation: Option<u64>,
    /// Traffic by device.
    pub(crate) devices: Vec<DeviceIo>,
    /// Huge pages by size.
    pub(crate) huge_pages: Vec<HugePages>,
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

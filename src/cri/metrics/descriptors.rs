//! Every metric there is.

use crate::cri::metrics::Descriptor;
use crate::cri::v1::MetricType::{Counter, Gauge};

macro_rules! metrics {
    ($($constant:ident: $kind:ident $name:literal $labels:tt = $help:literal;)+) => {
        $(
            #[doc = $help]
            pub(super) static $constant: Descriptor = Descriptor {
                name: concat!("container_", $name),
                help: $help,
                kind: $kind,
                labels: &$labels,
            };
        )+

        /// All of them, by name.
        pub(super) static ALL: &[&Descriptor] = &[$(&$constant),+];
    };
}

metrics! {
    BLKIO: Counter "blkio_device_usage_total" ["device", "major", "minor", "operation"] = "Bytes transferred to and from a block device";
    CFS_PERIODS: Counter "cpu_cfs_periods_total" [] = "Number of elapsed enforcement periods";
    CFS_THROTTLED_PERIODS: Counter "cpu_cfs_throttled_periods_total" [] = "Number of throttled enforcement periods";
    CFS_THROTTLED: Counter "cpu_cfs_throttled_seconds_total" [] = "Time throttled, in seconds";
    CPU_SYSTEM: Counter "cpu_system_seconds_total" [] = "CPU time in the kernel, in seconds";
    CPU_USAGE: Counter "cpu_usage_seconds_total" ["cpu"] = "CPU time, in seconds";
    CPU_USER: Counter "cpu_user_seconds_total" [] = "CPU time in user mode, in seconds";
    FILE_DESCRIPTORS: Gauge "file_descriptors" [] = "Number of open file descriptors";
    FS_INODES_FREE: Gauge "fs_inodes_free" ["device"] = "Number of free inodes of the filesystem";
    FS_INODES: Gauge "fs_inodes_total" ["device"] = "Number of inodes of the filesystem";
    FS_LIMIT: Gauge "fs_limit_bytes" ["device"] = "Size of the filesystem that holds the writable layer, in bytes";
    FS_READ_BYTES: Counter "fs_reads_bytes_total" ["device"] = "Bytes read from a block device";
    FS_READS: Counter "fs_reads_total" ["device"] = "Number of reads from a block device";
    FS_USAGE: Gauge "fs_usage_bytes" ["device"] = "Size of the writable layer, in bytes";
    FS_WRITTEN_BYTES: Counter "fs_writes_bytes_total" ["device"] = "Bytes written to a block device";
    FS_WRITES: Counter "fs_writes_total" ["device"] = "Number of writes to a block device";
    HUGETLB_MAX: Gauge "hugetlb_max_usage_bytes" ["pagesize"] = "Highest use of huge pages, in bytes";
    HUGETLB: Gauge "hugetlb_usage_bytes" ["pagesize"] = "Huge pages in use, in bytes";
    LAST_SEEN: Gauge "last_seen" [] = "When the container was last seen, in seconds since 1970";
    MEMORY_CACHE: Gauge "memory_cache" [] = "Page cache, in bytes";
    MEMORY_FAILCNT: Counter "memory_failcnt" [] = "Number of times that memory use hit its limit";
    MEMORY_FAILURES: Counter "memory_failures_total" ["failure_type", "scope"] = "Number of page faults";
    MEMORY_KERNEL: Gauge "memory_kernel_usage" [] = "Kernel memory, in bytes";
    MEMORY_MAPPED: Gauge "memory_mapped_file" [] = "Memory mapped files, in bytes";
    MEMORY_MAX: Gauge "memory_max_usage_bytes" [] = "Highest memory use, in bytes";
    MEMORY_RSS: Gauge "memory_rss" [] = "Anonymous memory, in bytes";
    MEMORY_SWAP: Gauge "memory_swap" [] = "Swap in use, in bytes";
    MEMORY_USAGE: Gauge "memory_usage_bytes" [] = "Memory in use, page cache included, in bytes";
    MEMORY_WORKING_SET: Gauge "memory_working_set_bytes" [] = "Memory in use without inactive file pages, in bytes";
    RECEIVED_BYTES: Counter "network_receive_bytes_total" ["interface"] = "Bytes received";
    RECEIVE_ERRORS: Counter "network_receive_errors_total" ["interface"] = "Number of errors while receiving";
    RECEIVE_DROPPED: Counter "network_receive_packets_dropped_total" ["interface"] = "Number of packets dropped while receiving";
    RECEIVED_PACKETS: Counter "network_receive_packets_total" ["interface"] = "Number of packets received";
    SENT_BYTES: Counter "network_transmit_bytes_total" ["interface"] = "Bytes sent";
    SEND_ERRORS: Counter "network_transmit_errors_total" ["interface"] = "Number of errors while sending";
    SEND_DROPPED: Counter "network_transmit_packets_dropped_total" ["interface"] = "Number of packets dropped while sending";
    SENT_PACKETS: Counter "network_transmit_packets_total" ["interface"] = "Number of packets sent";
    OOM_EVENTS: Counter "oom_events_total" [] = "Number of processes that the kernel killed for want of memory";
    CPU_STALLED: Counter "pressure_cpu_stalled_seconds_total" [] = "Time in which no task could go on for want of CPU, in seconds";
    CPU_WAITING: Counter "pressure_cpu_waiting_seconds_total" [] = "Time in which some task waited for CPU, in seconds";
    IO_STALLED: Counter "pressure_io_stalled_seconds_total" [] = "Time in which no task could go on for want of I/O, in seconds";
    IO_WAITING: Counter "pressure_io_waiting_seconds_total" [] = "Time in which some task waited for I/O, in seconds";
    MEMORY_STALLED: Counter "pressure_memory_stalled_seconds_total" [] = "Time in which no task could go on for want of memory, in seconds";
    MEMORY_WAITING: Counter "pressure_memory_waiting_seconds_total" [] = "Time in which some task waited for memory, in seconds";
    PROCESSES: Gauge "processes" [] = "Number of processes";
    SOCKETS: Gauge "sockets" [] = "Number of open sockets";
    SPEC_CPU_PERIOD: Gauge "spec_cpu_period" [] = "Enforcement period, in microseconds";
    SPEC_CPU_QUOTA: Gauge "spec_cpu_quota" [] = "CPU time in each period, in microseconds; no value: unlimited";
    SPEC_CPU_SHARES: Gauge "spec_cpu_shares" [] = "CPU shares";
    SPEC_MEMORY_LIMIT: Gauge "spec_memory_limit_bytes" [] = "Memory limit, in bytes; 0: unlimited";
    SPEC_MEMORY_RESERVATION: Gauge "spec_memory_reservation_limit_bytes" [] = "Memory that is reclaimed last, in bytes; 0: none set";
    SPEC_SWAP_LIMIT: Gauge "spec_memory_swap_limit_bytes" [] = "Swap limit, in bytes; 0: none allowed, or unlimited";
    START_TIME: Gauge "start_time_seconds" [] = "When the container was started, in seconds since 1970";
    THREADS: Gauge "threads" [] = "Number of threads";
    THREADS_MAX: Gauge "threads_max" [] = "Limit of threads; 0: unlimited";
    ULIMITS_SOFT: Gauge "ulimits_soft" ["ulimit"] = "Soft resource limits of the container's first process";
}

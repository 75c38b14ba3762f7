//! Figures of a cgroup, read from its files: one open, read and close for each, no allocation.
//! What a version or kernel does not offer is absent.

use super::limits::shares_of_weight;
use super::reader::{Reader, device_of, each, first_number, number, words};
use super::{Cgroups, Version};
use crate::base::clock::Timestamp;
use crate::base::stats::{CgroupStats, DeviceIo, HugePages, IoKinds, Psi, PsiLine, Scope};

/// v1 says "unlimited" with a number near the largest page-aligned one.
const UNLIMITED_V1: u64 = 0x7000_0000_0000_0000;
/// v1 counts CPU time of `cpuacct.stat` in ticks of 1/100 s (`USER_HZ`).
const TICK_NS: u64 = 10_000_000;

/// Reads the figures of cgroup `path`.
pub(super) fn read(
    cgroups: &Cgroups,
    path: &str,
    reader: &mut Reader,
    scope: Scope,
) -> CgroupStats {
    let mut stats = CgroupStats {
        timestamp: Timestamp::now(),
        ..CgroupStats::default()
    };
    match cgroups.version() {
        Version::V2 => {
            if reader.enter(cgroups, "", path) {
                read_v2(reader, &mut stats, scope);
            }
        }
        Version::V1 => read_v1(cgroups, path, reader, &mut stats, scope),
    }
    stats
}

fn read_v2(at: &mut Reader, stats: &mut CgroupStats, scope: Scope) {
    each(at.read("cpu.stat"), |key, value| match key {
        b"usage_usec" => stats.cpu_usage_ns = value.checked_mul(1000),
        b"user_usec" => stats.cpu_user_ns = value.checked_mul(1000),
        b"system_usec" => stats.cpu_system_ns = value.checked_mul(1000),
        b"nr_periods" => stats.cpu_periods = Some(value),
        b"nr_throttled" => stats.cpu_throttled_periods = Some(value),
        b"throttled_usec" => stats.cpu_throttled_ns = value.checked_mul(1000),
        _ => {}
    });
    if stats.cpu_usage_ns.is_none() {
        // There is no such cgroup (any more): every kernel with v2 counts this in each.
        return;
    }
    let mut inactive_file = 0;
    each(at.read("memory.stat"), |key, value| match key {
        b"inactive_file" => inactive_file = value,
        b"anon" => stats.memory_rss = Some(value),
        b"file" => stats.memory_cache = Some(value),
        b"file_mapped" => stats.memory_mapped_file = Some(value),
        b"kernel" => stats.memory_kernel = Some(value),
        b"pgfault" => stats.page_faults = Some(value),
        b"pgmajfault" => stats.major_page_faults = Some(value),
        _ => {}
    });
    stats.memory_usage = number(at.read("memory.current"));
    stats.memory_working_set = working_set(stats.memory_usage, inactive_file);
    stats.memory_limit = number(at.read("memory.max"));
    stats.swap_usage = number(at.read("memory.swap.current"));
    stats.swap_limit = number(at.read("memory.swap.max"));
    stats.pids = number(at.read("pids.current"));
    stats.cpu_psi = pressure(at.read("cpu.pressure"));
    stats.memory_psi = pressure(at.read("memory.pressure"));
    stats.io_psi = pressure(at.read("io.pressure"));
    if scope != Scope::Usage {
        each(at.read("memory.events"), |key, value| match key {
            b"max" => stats.memory_failcnt = Some(value),
            b"oom_kill" => stats.oom_kills = Some(value),
            _ => {}
        });
    }
    if scope == Scope::Everything {
        rest_of_v2(at, stats);
    }
}

fn rest_of_v2(at: &mut Reader, stats: &mut CgroupStats) {
    stats.memory_peak = number(at.read("memory.peak"));
    stats.memory_reservation = number(at.read("memory.low")).filter(|bytes| *bytes > 0);
    stats.pids_limit = number(at.read("pids.max"));
    let [quota, period] = words(at.read("cpu.max"));
    (stats.cpu_quota, stats.cpu_period) = (number(quota), number(period));
    stats.cpu_shares = number(at.read("cpu.weight")).map(shares_of_weight);
    for line in at.read("io.stat").split(|byte| *byte == b'\n') {
        let [name, rest] = words(line);
        let Some((major, minor)) = device_of(name) else {
            continue;
        };
        let mut device = DeviceIo {
            major,
            minor,
            ..DeviceIo::default()
        };
        for field in rest.split(|byte| *byte == b' ') {
            let value = |key: &[u8]| first_number(field.strip_prefix(key)?);
            device.read_bytes = value(b"rbytes=").unwrap_or(device.read_bytes);
            device.written_bytes = value(b"wbytes=").unwrap_or(device.written_bytes);
            device.reads = value(b"rios=").unwrap_or(device.reads);
            device.writes = value(b"wios=").unwrap_or(device.writes);
        }
        stats.devices.push(device);
    }
    huge_pages(at, stats, "current", None);
}

fn read_v1(cgroups: &Cgroups, path: &str, at: &mut Reader, stats: &mut CgroupStats, scope: Scope) {
    if at.enter(cgroups, "cpuacct", path) {
        stats.cpu_usage_ns = number(at.read("cpuacct.usage"));
    }
    if scope != Scope::Usage {
        each(at.read("cpuacct.stat"), |key, value| match key {
            b"user" => stats.cpu_user_ns = value.checked_mul(TICK_NS),
            b"system" => stats.cpu_system_ns = value.checked_mul(TICK_NS),
            _ => {}
        });
    }
    if stats.cpu_usage_ns.is_none() && cgroups.mount("cpuacct").is_some() {
        // There is no such cgroup (any more).
        return;
    }
    if at.enter(cgroups, "memory", path) {
        read_v1_memory(at, stats, scope);
    }
    if at.enter(cgroups, "pids", path) {
        stats.pids = number(at.read("pids.current"));
        if scope == Scope::Everything {
            stats.pids_limit = number(at.read("pids.max"));
        }
    }
    if scope != Scope::Everything {
        return;
    }
    if at.enter(cgroups, "cpu", path) {
        each(at.read("cpu.stat"), |key, value| match key {
            b"nr_periods" => stats.cpu_periods = Some(value),
            b"nr_throttled" => stats.cpu_throttled_periods = Some(value),
            b"throttled_time" => stats.cpu_throttled_ns = Some(value),
            _ => {}
        });
        stats.cpu_period = number(at.read("cpu.cfs_period_us"));
        // -1, no number of ours: unlimited.
        stats.cpu_quota = number(at.read("cpu.cfs_quota_us"));
        stats.cpu_shares = number(at.read("cpu.shares"));
    }
    if at.enter(cgroups, "blkio", path) {
        let text = at.read("blkio.throttle.io_service_bytes_recursive");
        blkio(text, &mut stats.devices, |device, kind, bytes| {
            let kinds = device.kinds.get_or_insert(IoKinds::default());
            match kind {
                b"Read" => device.read_bytes = bytes,
                b"Write" => device.written_bytes = bytes,
                b"Sync" => kinds.sync = bytes,
                b"Async" => kinds.asynchronous = bytes,
                b"Discard" => kinds.discarded = bytes,
                b"Total" => kinds.total = bytes,
                _ => {}
            }
        });
        let text = at.read("blkio.throttle.io_serviced_recursive");
        blkio(text, &mut stats.devices, |device, kind, count| match kind {
            b"Read" => device.reads = count,
            b"Write" => device.writes = count,
            _ => {}
        });
    }
    if at.enter(cgroups, "hugetlb", path) {
        huge_pages(at, stats, "usage_in_bytes", Some("max_usage_in_bytes"));
    }
}

fn read_v1_memory(at: &mut Reader, stats: &mut CgroupStats, scope: Scope) {
    let limited = |value: Option<u64>| value.filter(|limit| *limit < UNLIMITED_V1);
    let mut inactive_file = 0;
    each(at.read("memory.stat"), |key, value| match key {
        b"total_inactive_file" => inactive_file = value,
        b"total_rss" => stats.memory_rss = Some(value),
        b"total_cache" => stats.memory_cache = Some(value),
        b"total_mapped_file" => stats.memory_mapped_file = Some(value),
        b"total_pgfault" => stats.page_faults = Some(value),
        b"total_pgmajfault" => stats.major_page_faults = Some(value),
        b"total_swap" => stats.swap_usage = Some(value),
        _ => {}
    });
    stats.memory_usage = number(at.read("memory.usage_in_bytes"));
    stats.memory_working_set = working_set(stats.memory_usage, inactive_file);
    stats.memory_limit = limited(number(at.read("memory.limit_in_bytes")));
    if let Some(memory) = stats.memory_limit {
        // Memory and swap together; without a memory limit there is none.
        let total = limited(number(at.read("memory.memsw.limit_in_bytes")));
        stats.swap_limit = total.map(|total| total.saturating_sub(memory));
    }
    if scope != Scope::Usage {
        each(at.read("memory.oom_control"), |key, value| {
            if key == b"oom_kill" {
                stats.oom_kills = Some(value);
            }
        });
    }
    if scope == Scope::Everything {
        stats.memory_peak = number(at.read("memory.max_usage_in_bytes"));
        stats.memory_kernel = number(at.read("memory.kmem.usage_in_bytes"));
        stats.memory_failcnt = number(at.read("memory.failcnt"));
        // CRI has no field for v1's soft limit: nobody sets one.
    }
}

/// Calls `visit` with each line of `MAJOR:MINOR KIND NUMBER`, for its device.
fn blkio(text: &[u8], devices: &mut Vec<DeviceIo>, visit: impl Fn(&mut DeviceIo, &[u8], u64)) {
    for line in text.split(|byte| *byte == b'\n') {
        let [name, rest] = words(line);
        let [kind, value] = words(rest);
        let (Some((major, minor)), Some(value)) = (device_of(name), first_number(value)) else {
            continue;
        };
        let known = |d: &DeviceIo| (d.major, d.minor) == (major, minor);
        let at = devices.iter().position(known).unwrap_or_else(|| {
            devices.push(DeviceIo {
                major,
                minor,
                ..DeviceIo::default()
            });
            devices.len() - 1
        });
        visit(&mut devices[at], kind, value);
    }
}

/// Huge pages of every size of this machine: files `hugetlb.SIZE.NAME`.
fn huge_pages(at: &mut Reader, stats: &mut CgroupStats, usage: &str, peak: Option<&str>) {
    for size in super::reader::huge_page_sizes() {
        let Some(usage) = number(at.read(&format!("hugetlb.{size}.{usage}"))) else {
            continue;
        };
        let peak = peak.and_then(|name| number(at.read(&format!("hugetlb.{size}.{name}"))));
        stats.huge_pages.push(HugePages {
            size: size.clone(),
            usage,
            peak,
        });
    }
}

/// What cannot be given back cheaply: the use less inactive file pages, as kubelet's eviction counts.
fn working_set(usage: Option<u64>, inactive_file: u64) -> Option<u64> {
    Some(usage?.saturating_sub(inactive_file))
}

/// Parses a pressure file; absent when it is empty (PSI off).
pub(super) fn pressure(text: &[u8]) -> Option<Psi> {
    let text = std::str::from_utf8(text).ok()?;
    let line = |kind: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = |name: &str| {
            rest.split_ascii_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let average = |name| {
            field(name)
                .and_then(|value| value.parse().ok())
                .unwrap_or_default()
        };
        Some(PsiLine {
            total: field("total")?.parse().ok()?,
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
        })
    };
    Some(Psi {
        some: line("some")?,
        // CPU had no such line before Linux 5.13.
        full: line("full").unwrap_or_default(),
    })
}

//! Figures of a cgroup, read from its files. What a version or kernel does not offer is absent.

use std::fs;
use std::path::{Path, PathBuf};

use super::files::{keyed, number, value_of};
use super::{Cgroups, Version};
use crate::base::clock::Timestamp;
use crate::base::stats::{CgroupStats, Psi, PsiLine};

/// v1 says "unlimited" with a number near the largest page-aligned one.
const UNLIMITED_V1: u64 = 0x7000_0000_0000_0000;
/// v1 counts CPU time of `cpuacct.stat` in ticks of 1/100 s (`USER_HZ`).
const TICK_NS: u64 = 10_000_000;

/// Reads the figures of cgroup `path`.
pub(super) fn read(cgroups: &Cgroups, path: &str) -> CgroupStats {
    let mut stats = CgroupStats {
        timestamp: Timestamp::now(),
        ..CgroupStats::default()
    };
    match cgroups.version() {
        Version::V2 => {
            if let Some(directory) = cgroups.directory("", path) {
                read_v2(&directory, &mut stats);
            }
        }
        Version::V1 => read_v1(
            &|controller| cgroups.directory(controller, path),
            &mut stats,
        ),
    }
    stats
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn read_v2(directory: &Path, stats: &mut CgroupStats) {
    let file = |name: &str| directory.join(name);
    let cpu = text(&file("cpu.stat"));
    let microseconds = |key| value_of(&cpu, key).map(|us| us * 1000);
    stats.cpu_usage_ns = microseconds("usage_usec");
    stats.cpu_user_ns = microseconds("user_usec");
    stats.cpu_system_ns = microseconds("system_usec");
    stats.cpu_periods = value_of(&cpu, "nr_periods");
    stats.cpu_throttled_periods = value_of(&cpu, "nr_throttled");
    stats.cpu_throttled_ns = microseconds("throttled_usec");
    let memory = text(&file("memory.stat"));
    let value = |key| value_of(&memory, key);
    stats.memory_usage = number(&file("memory.current"));
    stats.memory_peak = number(&file("memory.peak"));
    stats.memory_working_set = working_set(stats.memory_usage, value("inactive_file"));
    stats.memory_rss = value("anon");
    stats.memory_cache = value("file");
    stats.memory_mapped_file = value("file_mapped");
    stats.memory_kernel = value("kernel");
    stats.memory_limit = number(&file("memory.max"));
    stats.memory_failcnt = keyed(&file("memory.events"), "max");
    stats.oom_kills = keyed(&file("memory.events"), "oom_kill");
    stats.page_faults = value("pgfault");
    stats.major_page_faults = value("pgmajfault");
    stats.swap_usage = number(&file("memory.swap.current"));
    stats.swap_limit = number(&file("memory.swap.max"));
    stats.pids = number(&file("pids.current"));
    stats.pids_limit = number(&file("pids.max"));
    stats.cpu_psi = pressure(&text(&file("cpu.pressure")));
    stats.memory_psi = pressure(&text(&file("memory.pressure")));
    stats.io_psi = pressure(&text(&file("io.pressure")));
}

fn read_v1(directory: &dyn Fn(&str) -> Option<PathBuf>, stats: &mut CgroupStats) {
    if let Some(directory) = directory("cpuacct") {
        stats.cpu_usage_ns = number(&directory.join("cpuacct.usage"));
        let split = text(&directory.join("cpuacct.stat"));
        stats.cpu_user_ns = value_of(&split, "user").map(|ticks| ticks * TICK_NS);
        stats.cpu_system_ns = value_of(&split, "system").map(|ticks| ticks * TICK_NS);
    }
    if let Some(directory) = directory("cpu") {
        let cpu = text(&directory.join("cpu.stat"));
        stats.cpu_periods = value_of(&cpu, "nr_periods");
        stats.cpu_throttled_periods = value_of(&cpu, "nr_throttled");
        stats.cpu_throttled_ns = value_of(&cpu, "throttled_time");
    }
    if let Some(directory) = directory("memory") {
        read_v1_memory(&directory, stats);
    }
    if let Some(directory) = directory("pids") {
        stats.pids = number(&directory.join("pids.current"));
        stats.pids_limit = number(&directory.join("pids.max"));
    }
}

fn read_v1_memory(directory: &Path, stats: &mut CgroupStats) {
    let file = |name: &str| directory.join(name);
    let limited = |name: &str| number(&file(name)).filter(|limit| *limit < UNLIMITED_V1);
    let memory = text(&file("memory.stat"));
    let value = |key| value_of(&memory, key);
    stats.memory_usage = number(&file("memory.usage_in_bytes"));
    stats.memory_peak = number(&file("memory.max_usage_in_bytes"));
    stats.memory_working_set = working_set(stats.memory_usage, value("total_inactive_file"));
    stats.memory_rss = value("total_rss");
    stats.memory_cache = value("total_cache");
    stats.memory_mapped_file = value("total_mapped_file");
    stats.memory_kernel = number(&file("memory.kmem.usage_in_bytes"));
    stats.memory_limit = limited("memory.limit_in_bytes");
    stats.memory_failcnt = number(&file("memory.failcnt"));
    stats.oom_kills = keyed(&file("memory.oom_control"), "oom_kill");
    stats.page_faults = value("total_pgfault");
    stats.major_page_faults = value("total_pgmajfault");
    stats.swap_usage = value("total_swap");
    stats.swap_limit = limited("memory.memsw.limit_in_bytes")
        .zip(stats.memory_limit)
        .map(|(total, memory)| total.saturating_sub(memory));
}

/// What cannot be given back cheaply: the use less inactive file pages, as kubelet's eviction counts.
fn working_set(usage: Option<u64>, inactive_file: Option<u64>) -> Option<u64> {
    Some(usage?.saturating_sub(inactive_file.unwrap_or(0)))
}

/// Parses a pressure file; absent when it is empty (PSI off).
pub(super) fn pressure(text: &str) -> Option<Psi> {
    let line = |kind: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = |name: &str| {
            rest.split_whitespace()
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
        full: line("full").unwrap_or_default(),
    })
}

//! Limits: from CRI's fields to the files of either version, written all or none.
//!
//! | CRI | v1 | v2 |
//! |---|---|---|
//! | cpu_shares | cpu.shares | cpu.weight (quadratic in log2, as OCI runtimes since 2025) |
//! | cpu_quota, cpu_period | cpu.cfs_quota_us, cpu.cfs_period_us | cpu.max |
//! | memory_limit_in_bytes | memory.limit_in_bytes | memory.max |
//! | memory_swap_limit_in_bytes | memory.memsw.limit_in_bytes (total) | memory.swap.max (difference) |
//! | cpuset_cpus, cpuset_mems | cpuset.cpus, cpuset.mems | the same |
//! | (NRI) pids_limit | pids.max | the same |
//! | (NRI) memory_reservation | memory.soft_limit_in_bytes | memory.low |
//! | hugepage_limits | hugetlb.SIZE.limit_in_bytes | hugetlb.SIZE.max |
//! | unified | refused | written last, as given |
//! | (NRI) blockio_class | see [`super::block_io`] | the same |

use std::path::PathBuf;

use super::{CgroupError, Cgroups, Version, files};
use crate::base::container::Resources;

/// What the limits are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// A new cgroup without processes.
    Create,
    /// A cgroup in use: a memory limit below the use is refused.
    Update,
}

/// The period the kernel has when nobody says anything, in microseconds.
const DEFAULT_PERIOD: i64 = 100_000;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Write {
    /// Hierarchy the file is in.
    pub(super) controller: &'static str,
    /// File name.
    pub(super) file: String,
    /// What is written.
    pub(super) value: String,
    /// A missing file is no error (swap accounting off, controller absent).
    pub(super) optional: bool,
    /// The line of the file that this changes; absent: the file is the value.
    pub(super) line: Option<Line>,
}

/// A line of a file of several.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// Its first word.
    pub(super) key: String,
    /// What is written where there was none.
    pub(super) absent: String,
}

impl Write {
    /// What restores a file that had this content.
    fn undo(&self, before: &str) -> String {
        let Some(Line { key, absent }) = &self.line else {
            return before.trim().to_owned();
        };
        let is_it = |line: &&str| line.split(' ').next() == Some(key);
        before.lines().find(is_it).unwrap_or(absent).to_owned()
    }
}

fn write(controller: &'static str, file: impl Into<String>, value: impl ToString) -> Write {
    Write {
        controller,
        file: file.into(),
        value: value.to_string(),
        optional: false,
        line: None,
    }
}

/// Writes the limits; after a failure the values before are written back.
///
/// # Errors
/// [`CgroupError::Setting`], [`CgroupError::BelowUsage`], [`CgroupError::File`].
pub(super) fn apply(
    cgroups: &Cgroups,
    path: &str,
    resources: &Resources,
    mode: Mode,
) -> Result<(), CgroupError> {
    let mut writes = block_io(cgroups, path, resources);
    writes.extend(match cgroups.version() {
        Version::V2 => plan_v2(resources)?,
        Version::V1 => {
            let raising = v1_memory_rises(cgroups, path, resources);
            plan_v1(resources, raising)?
        }
    });
    if mode == Mode::Update && resources.memory_limit > 0 {
        refuse_below_usage(cgroups, path, resources.memory_limit.unsigned_abs())?;
    }
    let mut undo: Vec<(PathBuf, String)> = vec![];
    for one in writes {
        let Some(directory) = cgroups.directory(one.controller, path) else {
            missing(one.controller, &one.file);
            continue;
        };
        let file = directory.join(&one.file);
        if !file.exists() {
            if one.optional || controller_absent(cgroups, one.controller) {
                missing(one.controller, &one.file);
                continue;
            }
            roll_back(&undo);
            return Err(CgroupError::Setting {
                field: one.file,
                value: one.value,
                mend: "this kernel or cgroup has no such file".to_owned(),
            });
        }
        let before = (mode == Mode::Update)
            .then(|| files::read(&file))
            .transpose()?;
        if let Err(error) = files::write(&file, &one.value) {
            roll_back(&undo);
            return Err(error);
        }
        if let Some(before) = before {
            undo.push((file, one.undo(&before)));
        }
    }
    Ok(())
}

fn block_io(cgroups: &Cgroups, path: &str, resources: &Resources) -> Vec<Write> {
    let Some(limits) = &resources.block_io else {
        return vec![];
    };
    let version = cgroups.version();
    let controller = match version {
        Version::V1 => "blkio",
        Version::V2 => "io",
    };
    let directory = cgroups.directory(controller, path).unwrap_or_default();
    super::block_io::plan(limits, version, |file| directory.join(file).exists())
}

fn controller_absent(cgroups: &Cgroups, controller: &str) -> bool {
    controller != "unified" && !cgroups.has(controller)
}

fn roll_back(undo: &[(PathBuf, String)]) {
    for (file, value) in undo.iter().rev() {
        if let Err(error) = files::write(file, value) {
            tracing::error!(path = %file.display(), %error, "old limit not restored");
        }
    }
}

fn missing(controller: &str, file: &str) {
    use std::collections::HashSet;
    use std::sync::{Mutex, PoisonError};
    static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said
        .get_or_insert_default()
        .insert(format!("{controller}/{file}"))
    {
        tracing::warn!(
            controller,
            file,
            "limit not applied: the machine has no such controller or file"
        );
    }
}

fn refuse_below_usage(cgroups: &Cgroups, path: &str, limit: u64) -> Result<(), CgroupError> {
    let name = match cgroups.version() {
        Version::V1 => "memory.usage_in_bytes",
        Version::V2 => "memory.current",
    };
    let file = cgroups.directory("memory", path).map(|d| d.join(name));
    match file.and_then(|file| files::number(&file)) {
        // Page cache can be given back; only what cannot go counts.
        Some(usage) if usage > limit => {
            let stat = cgroups.stats(path, crate::base::stats::Scope::Usage);
            let fixed = stat.memory_working_set.unwrap_or(usage);
            if fixed > limit {
                Err(CgroupError::BelowUsage {
                    limit,
                    usage: fixed,
                })
            } else {
                Ok(())
            }
        }
        _ => Ok(()),
    }
}

fn v1_memory_rises(cgroups: &Cgroups, path: &str, resources: &Resources) -> bool {
    let now = cgroups
        .directory("memory", path)
        .and_then(|d| files::number(&d.join("memory.limit_in_bytes")));
    match (now, u64::try_from(resources.memory_limit)) {
        (Some(now), Ok(new)) => new > now,
        _ => true,
    }
}

fn number_or_max(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// cpu.weight (1..=10000) for cpu.shares (2..=262144): 10^((l² + 125 l)/612 - 7/34) with l = log2(shares), so
/// that 2 is 1, 1024 is 100 and 262144 is 10000.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the result is between 1 and 10000"
)]
pub(super) fn weight_of_shares(shares: i64) -> u64 {
    match shares {
        ..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            10f64.powf((l * l + 125.0 * l) / 612.0 - 7.0 / 34.0).ceil() as u64
        }
    }
}

/// The shares that give this weight; the other way round than [`weight_of_shares`].
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "the result is between 2 and 262144"
)]
pub(super) fn shares_of_weight(weight: u64) -> u64 {
    let log = (weight.clamp(1, 10_000) as f64).log10();
    let root = (125.0 * 125.0 + 4.0 * 612.0 * (log + 7.0 / 34.0)).sqrt();
    let shares = f64::midpoint(-125.0, root).exp2().round() as u64;
    shares.clamp(2, 262_144)
}

fn cpuset(resources: &Resources, writes: &mut Vec<Write>) {
    if !resources.cpuset_cpus.is_empty() {
        writes.push(write("cpuset", "cpuset.cpus", &resources.cpuset_cpus));
    }
    if !resources.cpuset_mems.is_empty() {
        writes.push(write("cpuset", "cpuset.mems", &resources.cpuset_mems));
    }
}

fn pids(resources: &Resources, writes: &mut Vec<Write>) {
    if resources.pids_limit != 0 {
        let value = number_or_max(resources.pids_limit);
        writes.push(write("pids", "pids.max", value));
    }
}

fn check_swap(resources: &Resources) -> Result<(), CgroupError> {
    let (limit, swap) = (resources.memory_limit, resources.memory_swap_limit);
    if swap > 0 && limit > 0 && swap < limit {
        return Err(CgroupError::Setting {
            field: "memory_swap_limit_in_bytes".into(),
            value: swap.to_string(),
            mend: format!(
                "it counts memory and swap together: at least memory_limit_in_bytes ({limit})"
            ),
        });
    }
    Ok(())
}

/// The writes for cgroup v2, in order.
///
/// # Errors
/// [`CgroupError::Setting`].
pub(super) fn plan_v2(resources: &Resources) -> Result<Vec<Write>, CgroupError> {
    check_swap(resources)?;
    let mut writes = vec![];
    if resources.cpu_shares > 0 {
        writes.push(write(
            "cpu",
            "cpu.weight",
            weight_of_shares(resources.cpu_shares),
        ));
    }
    if resources.cpu_quota != 0 || resources.cpu_period > 0 {
        let quota = if resources.cpu_quota == 0 {
            -1
        } else {
            resources.cpu_quota
        };
        let period = if resources.cpu_period > 0 {
            resources.cpu_period
        } else {
            DEFAULT_PERIOD
        };
        writes.push(write(
            "cpu",
            "cpu.max",
            format!("{} {period}", number_or_max(quota)),
        ));
    }
    if resources.memory_limit != 0 {
        writes.push(write(
            "memory",
            "memory.max",
            number_or_max(resources.memory_limit),
        ));
    }
    if resources.memory_swap_limit != 0 || resources.memory_limit > 0 {
        let (limit, swap) = (resources.memory_limit, resources.memory_swap_limit);
        let value = match swap {
            0 if limit > 0 => "0".to_owned(),
            0 | ..0 => "max".to_owned(),
            _ => (swap - limit.max(0)).to_string(),
        };
        writes.push(Write {
            optional: true,
            ..write("memory", "memory.swap.max", value)
        });
    }
    if resources.memory_reservation != 0 {
        let value = resources.memory_reservation.max(0);
        writes.push(write("memory", "memory.low", value));
    }
    cpuset(resources, &mut writes);
    pids(resources, &mut writes);
    for (size, limit) in &resources.hugepage_limits {
        let file = format!("hugetlb.{size}.max");
        writes.push(Write {
            optional: *limit == 0,
            ..write("hugetlb", file, limit)
        });
    }
    for (key, value) in &resources.unified {
        let controller = key.split('.').next().unwrap_or_default();
        if key.contains('/') || !key.contains('.') || controller == "cgroup" {
            return Err(CgroupError::Setting {
                field: format!("unified[{key:?}]"),
                value: value.clone(),
                mend: "the key must be the name of a controller's file, such as memory.high".into(),
            });
        }
        writes.push(write("unified", key, value));
    }
    Ok(writes)
}

/// The writes for cgroup v1, in order; `raising`: the memory limit rises, so its ceiling goes first.
///
/// # Errors
/// [`CgroupError::Setting`].
pub(super) fn plan_v1(resources: &Resources, raising: bool) -> Result<Vec<Write>, CgroupError> {
    check_swap(resources)?;
    if let Some((key, value)) = resources.unified.iter().next() {
        return Err(CgroupError::Setting {
            field: format!("unified[{key:?}]"),
            value: value.clone(),
            mend: "this machine has cgroup v1: unified needs v2".into(),
        });
    }
    let mut writes = vec![];
    if resources.cpu_shares > 0 {
        writes.push(write("cpu", "cpu.shares", resources.cpu_shares));
    }
    if resources.cpu_period > 0 {
        writes.push(write("cpu", "cpu.cfs_period_us", resources.cpu_period));
    }
    if resources.cpu_quota != 0 {
        writes.push(write("cpu", "cpu.cfs_quota_us", resources.cpu_quota));
    }
    let total = match (resources.memory_swap_limit, resources.memory_limit) {
        (0, limit) => limit,
        (swap, _) => swap,
    };
    let mut memory = vec![];
    if resources.memory_limit != 0 {
        memory.push(write(
            "memory",
            "memory.limit_in_bytes",
            resources.memory_limit,
        ));
    }
    if total != 0 {
        let both = write("memory", "memory.memsw.limit_in_bytes", total);
        memory.push(Write {
            optional: true,
            ..both
        });
    }
    // A new cgroup is unlimited: the limit goes first, then the total. A rising limit may not pass the total.
    if raising {
        memory.reverse();
    }
    writes.append(&mut memory);
    if resources.memory_reservation != 0 {
        let value = resources.memory_reservation.max(-1);
        writes.push(write("memory", "memory.soft_limit_in_bytes", value));
    }
    cpuset(resources, &mut writes);
    pids(resources, &mut writes);
    for (size, limit) in &resources.hugepage_limits {
        let file = format!("hugetlb.{size}.limit_in_bytes");
        writes.push(Write {
            optional: *limit == 0,
            ..write("hugetlb", file, limit)
        });
    }
    Ok(writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_restored_as_it_was() {
        let mut one = write("io", "io.max", "8:0 rbps=1");
        one.line = Some(Line {
            key: "8:0".to_owned(),
            absent: "8:0 rbps=max".to_owned(),
        });
        let before = "8:16 rbps=7 wbps=max\n8:0 rbps=5 wbps=max\n";
        assert_eq!(one.undo(before), "8:0 rbps=5 wbps=max");
        assert_eq!(one.undo("8:16 rbps=7\n"), "8:0 rbps=max");
        one.line = None;
        assert_eq!(one.undo("max\n"), "max");
    }
}

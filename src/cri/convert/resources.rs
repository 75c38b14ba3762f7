//! `LinuxContainerResources`, both ways.

use crate::base::container::Resources;
use crate::cri::convert::check::{Checked, invalid, no_nul, within};
use crate::cri::convert::{hashed, ordered};
use crate::cri::v1;

/// Limits as given; `at` is the path of the message in its request.
pub(in crate::cri) fn from(at: &str, given: v1::LinuxContainerResources) -> Checked<Resources> {
    cpu(at, &given)?;
    memory(at, &given)?;
    within(
        &format!("{at}.oom_score_adj"),
        given.oom_score_adj,
        -1000..=1000,
        "use -1000 to 1000",
    )?;
    cpu_list(&format!("{at}.cpuset_cpus"), &given.cpuset_cpus)?;
    cpu_list(&format!("{at}.cpuset_mems"), &given.cpuset_mems)?;
    for (key, value) in &given.unified {
        let field = format!("{at}.unified");
        if key.is_empty() || key.contains(['/', '\0']) || key.starts_with('.') {
            return Err(invalid(
                field,
                key,
                "is not the name of a cgroup file",
                "use a name such as `memory.high`",
            ));
        }
        no_nul(&field, value)?;
    }
    let mut hugepage_limits: Vec<(String, u64)> = Vec::with_capacity(given.hugepage_limits.len());
    for (n, limit) in given.hugepage_limits.into_iter().enumerate() {
        let field = format!("{at}.hugepage_limits[{n}].page_size");
        if !page_size(&limit.page_size) {
            return Err(invalid(
                field,
                &limit.page_size,
                "is not a page size",
                "use a number with KB, MB or GB, such as `2MB`",
            ));
        }
        if hugepage_limits
            .iter()
            .any(|(size, _)| *size == limit.page_size)
        {
            return Err(invalid(
                field,
                &limit.page_size,
                "is there twice",
                "give one limit for each page size",
            ));
        }
        hugepage_limits.push((limit.page_size, limit.limit));
    }
    Ok(Resources {
        cpu_period: given.cpu_period,
        cpu_quota: given.cpu_quota,
        cpu_shares: given.cpu_shares,
        memory_limit: given.memory_limit_in_bytes,
        oom_score_adj: given.oom_score_adj,
        cpuset_cpus: given.cpuset_cpus,
        cpuset_mems: given.cpuset_mems,
        hugepage_limits,
        unified: ordered(given.unified),
        memory_swap_limit: given.memory_swap_limit_in_bytes,
        pids_limit: 0,
        memory_reservation: 0,
        blockio_class: None,
        block_io: None,
    })
}

/// Kernel: sched-bwc; a period of 1 ms to 1 s, a quota of 1 ms at least.
fn cpu(at: &str, given: &v1::LinuxContainerResources) -> Checked<()> {
    if given.cpu_period != 0 {
        within(
            &format!("{at}.cpu_period"),
            given.cpu_period,
            1000..=1_000_000,
            "use 1000 to 1000000 microseconds, or 0 to leave it",
        )?;
    }
    if given.cpu_quota != 0 && given.cpu_quota != -1 {
        within(
            &format!("{at}.cpu_quota"),
            given.cpu_quota,
            1000..=i64::MAX / 1000,
            "use at least 1000 microseconds, -1 for no limit, or 0 to leave it",
        )?;
    }
    within(
        &format!("{at}.cpu_shares"),
        given.cpu_shares,
        0..=262_144,
        "use 2 to 262144, or 0 to leave it",
    )
}

fn memory(at: &str, given: &v1::LinuxContainerResources) -> Checked<()> {
    let (limit, swap) = (
        given.memory_limit_in_bytes,
        given.memory_swap_limit_in_bytes,
    );
    within(
        &format!("{at}.memory_limit_in_bytes"),
        limit,
        -1..=i64::MAX,
        "use a number of bytes, -1 for no limit, or 0 to leave it",
    )?;
    let field = format!("{at}.memory_swap_limit_in_bytes");
    within(
        &field,
        swap,
        -1..=i64::MAX,
        "use a number of bytes, -1 for no limit, or 0 for the memory limit",
    )?;
    if swap > 0 && limit > swap {
        return Err(invalid(
            field,
            &swap,
            "is below memory_limit_in_bytes",
            "it counts memory and swap together: use at least the memory limit",
        ));
    }
    if swap > 0 && limit == -1 {
        return Err(invalid(
            field,
            &swap,
            "limits swap while memory has no limit",
            "use -1 here too, or limit the memory",
        ));
    }
    Ok(())
}

/// A list as in cpuset(7): numbers and ranges, joined by commas.
fn cpu_list(field: &str, text: &str) -> Checked<()> {
    let number = |text: &str| {
        (!text.is_empty() && text.len() <= 6 && text.bytes().all(|c| c.is_ascii_digit()))
            .then(|| text.parse::<u32>().ok())
            .flatten()
    };
    let fine = |part: &str| match part.split_once('-') {
        None => number(part).is_some(),
        Some((low, high)) => {
            matches!((number(low), number(high)), (Some(low), Some(high)) if low <= high)
        }
    };
    if text.is_empty() || text.split(',').all(fine) {
        return Ok(());
    }
    Err(invalid(
        field,
        &text,
        "is not a list of numbers",
        "use numbers and ranges such as `0-3,7`",
    ))
}

fn page_size(text: &str) -> bool {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    !digits.is_empty()
        && digits.bytes().all(|c| c.is_ascii_digit())
        && matches!(unit, "KB" | "MB" | "GB" | "TB")
}

/// Limits in force, for statuses.
pub(in crate::cri) fn to(limits: &Resources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: limits.cpu_period,
        cpu_quota: limits.cpu_quota,
        cpu_shares: limits.cpu_shares,
        memory_limit_in_bytes: limits.memory_limit,
        oom_score_adj: limits.oom_score_adj,
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
        hugepage_limits: limits
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: hashed(&limits.unified),
        memory_swap_limit_in_bytes: limits.memory_swap_limit,
    }
}

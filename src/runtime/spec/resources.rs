//! Limits as CRI gives them: checked, with what follows from them filled in.

use crate::base::container::Resources;
use crate::base::handler::Handler;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::{CgroupHost, HostFacts};

/// Smallest CFS quota that the kernel takes, in microseconds.
const MIN_QUOTA: i64 = 1000;
/// Range of the CFS period in microseconds.
const PERIOD: std::ops::RangeInclusive<i64> = 1000..=1_000_000;
/// Largest weight.
const MAX_SHARES: i64 = 262_144;

/// Checks limits and returns those in effect: no swap beyond a memory limit unless asked for, weights of
/// at least 2, an `oom_score_adj` that we may write.
///
/// # Errors
/// [`SpecError::Invalid`]: a value out of range.
pub(crate) fn check(given: &Resources, host: &HostFacts) -> Result<Resources> {
    let mut made = given.clone();
    cpu(&mut made)?;
    memory(&mut made)?;
    if !(-1000..=1000).contains(&given.oom_score_adj) {
        let (field, mend) = ("oom_score_adj", "use -1000 to 1000");
        return Err(out_of_range(field, given.oom_score_adj, mend));
    }
    made.oom_score_adj = given.oom_score_adj.max(host.min_oom_score_adj.into());
    for (field, list) in [
        ("cpuset_cpus", &given.cpuset_cpus),
        ("cpuset_mems", &given.cpuset_mems),
    ] {
        if !is_list(list) {
            let mend = "write it as in 0-3,7";
            return Err(SpecError::invalid(
                field,
                list,
                "is no list of numbers",
                mend,
            ));
        }
    }
    hugepages(given, host)?;
    unified(given, host)?;
    Ok(made)
}

/// Is the memory limit, if there is one, as large as the handler wants it?
///
/// # Errors
/// [`SpecError::Invalid`] names the handler's key.
pub(crate) fn check_floor(given: &Resources, handler: &Handler) -> Result<()> {
    let limit = u64::try_from(given.memory_limit).unwrap_or_default();
    if limit == 0 || limit >= handler.min_memory {
        return Ok(());
    }
    let key = handler.key("container_min_memory");
    let problem = format!("bytes are too few: {key} is {}", handler.min_memory);
    let mend = "raise the container's memory limit";
    let field = "memory_limit_in_bytes";
    Err(SpecError::invalid(field, limit, problem, mend))
}

fn out_of_range(field: &str, value: i64, mend: &'static str) -> SpecError {
    SpecError::invalid(field, value, "is out of range", mend)
}

fn cpu(made: &mut Resources) -> Result<()> {
    if made.cpu_period != 0 && !PERIOD.contains(&made.cpu_period) {
        let mend = "use 1000 to 1000000 microseconds, or 0";
        return Err(out_of_range("cpu_period", made.cpu_period, mend));
    }
    if !matches!(made.cpu_quota, 0 | -1) && made.cpu_quota < MIN_QUOTA {
        let mend = "use at least 1000 microseconds, -1 for no limit, or 0";
        return Err(out_of_range("cpu_quota", made.cpu_quota, mend));
    }
    match made.cpu_shares {
        1 => made.cpu_shares = 2,
        0 | 2..=MAX_SHARES => {}
        shares => {
            let mend = "use 2 to 262144, or 0";
            return Err(out_of_range("cpu_shares", shares, mend));
        }
    }
    Ok(())
}

fn memory(made: &mut Resources) -> Result<()> {
    const LIMIT: &str = "memory_limit_in_bytes";
    const SWAP: &str = "memory_swap_limit_in_bytes";
    let (limit, swap) = (made.memory_limit, made.memory_swap_limit);
    if limit < -1 {
        return Err(out_of_range(
            LIMIT,
            limit,
            "use a number of bytes, -1 or 0 for no limit",
        ));
    }
    if swap < -1 {
        return Err(out_of_range(
            SWAP,
            swap,
            "use a number of bytes, -1 for no limit, or 0",
        ));
    }
    if limit > 0 && swap == 0 {
        made.memory_swap_limit = limit;
    }
    if swap > 0 && limit <= 0 {
        let problem = "is given without a memory limit";
        return Err(SpecError::invalid(
            SWAP,
            swap,
            problem,
            "give memory_limit_in_bytes too",
        ));
    }
    if swap > 0 && swap < limit {
        let problem = format!("is less than the memory limit {limit}");
        let mend = "give the sum of memory and swap";
        return Err(SpecError::invalid(SWAP, swap, problem, mend));
    }
    Ok(())
}

/// A list as in cpuset(7); empty is fine.
fn is_list(text: &str) -> bool {
    let number = |text: &str| -> Option<u32> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|_| digits)
    };
    let range = |part: &str| match part.split_once('-') {
        None => number(part).is_some(),
        Some((first, last)) => match (number(first), number(last)) {
            (Some(first), Some(last)) => first <= last,
            _ => false,
        },
    };
    text.is_empty() || text.split(',').all(range)
}

/// The first CPU of a container that has CPUs of its own, as kubelet's static CPU manager gives them: whole ones, and as many
/// shares as go with them.
pub(crate) fn first_own_cpu(given: &Resources) -> Option<u32> {
    let (mut first, mut count) = (None, 0_i64);
    for part in given.cpuset_cpus.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (low, high): (u32, u32) = (low.parse().ok()?, high.parse().ok()?);
        count += i64::from(high.checked_sub(low)?) + 1;
        first = Some(first.map_or(low, |known: u32| known.min(low)));
    }
    first.filter(|_| given.cpu_shares == 1024 * count)
}

fn hugepages(given: &Resources, host: &HostFacts) -> Result<()> {
    for (size, _) in &given.hugepage_limits {
        if !host.hugepage_sizes.contains(size) {
            let problem = format!(
                "is no page size of this node ({})",
                host.hugepage_sizes.join(" ")
            );
            let mend = "use one of the node's sizes";
            return Err(SpecError::invalid(
                "hugepage_limits.page_size",
                size,
                problem,
                mend,
            ));
        }
    }
    Ok(())
}

fn unified(given: &Resources, host: &HostFacts) -> Result<()> {
    if let (Some((key, _)), CgroupHost::V1(_)) = (given.unified.first_key_value(), &host.cgroup) {
        let problem = "needs cgroup v2, this node has v1";
        return Err(SpecError::invalid("unified", key, problem, "remove it"));
    }
    for (key, value) in &given.unified {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let file = key.split_once('.').is_some_and(|(controller, name)| {
            !controller.is_empty() && !name.is_empty() && key.chars().all(plain)
        });
        // cgroup.* moves, freezes and kills processes; no limit is there.
        if !file || key.starts_with("cgroup.") {
            let mend = "use names such as memory.high";
            return Err(SpecError::invalid(
                "unified",
                key,
                "is no limit of cgroup v2",
                mend,
            ));
        }
        if value.contains('\0') {
            let field = format!("unified[{key:?}]");
            return Err(SpecError::invalid(
                field,
                value,
                "contains a NUL byte",
                "remove it",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::spec::tests::host;

    fn with(change: impl FnOnce(&mut Resources)) -> Result<Resources> {
        let mut resources = Resources::default();
        change(&mut resources);
        check(&resources, &host())
    }

    #[test]
    fn ranges() {
        type Change = fn(&mut Resources, i64);
        let fields: [(&str, Change, &[i64], &[i64]); 5] = [
            (
                "cpu_period",
                |r, v| r.cpu_period = v,
                &[0, 1000, 100_000, 1_000_000],
                &[-1, 999, 1_000_001],
            ),
            (
                "cpu_quota",
                |r, v| r.cpu_quota = v,
                &[-1, 0, 1000, i64::MAX],
                &[-2, 1, 999, i64::MIN],
            ),
            (
                "cpu_shares",
                |r, v| r.cpu_shares = v,
                &[0, 1, 2, 1024, 262_144],
                &[-1, 262_145],
            ),
            (
                "memory_limit",
                |r, v| r.memory_limit = v,
                &[-1, 0, 1, i64::MAX],
                &[-2, i64::MIN],
            ),
            (
                "oom_score_adj",
                |r, v| r.oom_score_adj = v,
                &[-1000, 0, 1000],
                &[-1001, 1001, i64::MAX],
            ),
        ];
        for (name, change, good, bad) in fields {
            for value in good {
                assert!(with(|r| change(r, *value)).is_ok(), "{name} {value}");
            }
            for value in bad {
                let error = with(|r| change(r, *value)).unwrap_err().to_string();
                assert!(error.contains(&value.to_string()), "{name}: {error}");
            }
        }
    }

    #[test]
    fn what_follows() {
        let swap = |limit, swap| {
            with(|r| (r.memory_limit, r.memory_swap_limit) = (limit, swap))
                .map(|made| made.memory_swap_limit)
                .ok()
        };
        assert_eq!(swap(100, 0), Some(100));
        assert_eq!(swap(100, -1), Some(-1));
        assert_eq!(swap(100, 150), Some(150));
        assert_eq!(swap(0, 0), Some(0));
        assert_eq!(swap(100, 50), None);
        assert_eq!(swap(0, 50), None);
        assert_eq!(swap(-1, 50), None);
        assert_eq!(swap(100, -2), None);
        assert_eq!(with(|r| r.cpu_shares = 1).unwrap().cpu_shares, 2);
        let clamped = HostFacts {
            min_oom_score_adj: -10,
            ..host()
        };
        let resources = Resources {
            oom_score_adj: -997,
            ..Resources::default()
        };
        assert_eq!(check(&resources, &clamped).unwrap().oom_score_adj, -10);
    }

    #[test]
    fn cpus_of_their_own() {
        for (list, shares, first) in [
            ("0-1", 2048, Some(0)),
            ("5,3,9", 3072, Some(3)),
            ("7", 1024, Some(7)),
            ("0-1", 1024, None),
            ("0-1", 0, None),
            ("", 1024, None),
            ("", 0, None),
        ] {
            let given = Resources {
                cpuset_cpus: list.to_owned(),
                cpu_shares: shares,
                ..Resources::default()
            };
            assert_eq!(first_own_cpu(&given), first, "{list} {shares}");
        }
    }

    #[test]
    fn lists_pages_and_raw_files() {
        for good in ["", "0", "0-3,7", "1,1", "5-5"] {
            assert!(with(|r| r.cpuset_cpus = good.to_owned()).is_ok(), "{good}");
        }
        for bad in [
            " ",
            "a",
            "3-1",
            "0-",
            "-1",
            "0,,1",
            "0;1",
            "0\n",
            "99999999999",
        ] {
            assert!(with(|r| r.cpuset_mems = bad.to_owned()).is_err(), "{bad}");
        }
        let page = |size: &str| with(|r| r.hugepage_limits = vec![(size.to_owned(), 0)]);
        assert!(page("2MB").is_ok());
        assert!(page("3MB").is_err());
        let raw = |key: &str| with(|r| drop(r.unified.insert(key.to_owned(), "1".to_owned())));
        for good in [
            "memory.high",
            "memory.oom.group",
            "hugetlb.2MB.max",
            "io.max",
        ] {
            assert!(raw(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "memory",
            "../memory.max",
            "memory.max/x",
            ".max",
            "cgroup.procs",
            "memory.",
        ] {
            assert!(raw(bad).is_err(), "{bad}");
        }
        let v1 = HostFacts {
            cgroup: CgroupHost::V1(vec![]),
            ..host()
        };
        let mut resources = Resources::default();
        resources.unified.insert("memory.high".into(), "1".into());
        assert!(check(&resources, &v1).is_err());
    }
}

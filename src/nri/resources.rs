//! Limits: berth's plain values to and from those of plugins.

use crate::base::container::Resources;
use crate::nri::owners::{Conflict, Field, Owners};
use crate::nri::proto::api;

/// Limits as plugins see them.
pub(super) fn to_proto(given: &Resources) -> api::LinuxResources {
    let int = |value: i64| (value != 0).then_some(api::OptionalInt { value });
    let unsigned = |value: i64| {
        let value = u64::try_from(value).ok().filter(|value| *value != 0);
        value.map(|value| api::OptionalUInt64 { value })
    };
    let pages = given
        .hugepage_limits
        .iter()
        .map(|(page_size, limit)| api::HugepageLimit {
            page_size: page_size.clone(),
            limit: *limit,
        });
    api::LinuxResources {
        memory: Some(api::LinuxMemory {
            limit: int(given.memory_limit),
            reservation: int(given.memory_reservation.max(0)),
            swap: int(given.memory_swap_limit),
            ..api::LinuxMemory::default()
        }),
        cpu: Some(api::LinuxCpu {
            shares: unsigned(given.cpu_shares),
            quota: int(given.cpu_quota),
            period: unsigned(given.cpu_period),
            cpus: given.cpuset_cpus.clone(),
            mems: given.cpuset_mems.clone(),
            ..api::LinuxCpu::default()
        }),
        hugepage_limits: pages.collect(),
        unified: given.unified.clone(),
        pids: (given.pids_limit != 0).then_some(api::LinuxPids {
            limit: given.pids_limit,
        }),
        blockio_class: given.blockio_class.clone().map(class),
        ..api::LinuxResources::default()
    }
}

/// A class as plugins see it.
fn class(value: String) -> api::OptionalString {
    api::OptionalString { value }
}

/// Limits that a plugin asks for, and what of them berth cannot do: (field, value). Not its `rdt_class`, which is no limit.
pub(super) fn from_proto(given: &api::LinuxResources) -> (Resources, Vec<(String, String)>) {
    let mut impossible = vec![];
    let mut refuse = |field: &str, value: Option<String>| {
        impossible.extend(value.map(|value| (format!("resources.{field}"), value)));
    };
    let memory = given.memory.unwrap_or_default();
    let cpu = given.cpu.clone().unwrap_or_default();
    let int = |value: Option<api::OptionalInt>| value.map_or(0, |value| value.value);
    let signed = |value: Option<api::OptionalUInt64>| {
        value.map_or(0, |value| i64::try_from(value.value).unwrap_or(i64::MAX))
    };
    let text = |value: Option<api::OptionalInt>| value.map(|value| value.value.to_string());
    refuse("memory.kernel", text(memory.kernel));
    refuse("memory.kernelTcp", text(memory.kernel_tcp));
    refuse(
        "memory.swappiness",
        memory.swappiness.map(|value| value.value.to_string()),
    );
    let is_on =
        |value: Option<api::OptionalBool>| value.filter(|v| v.value).map(|_| "true".to_owned());
    refuse("memory.disableOomKiller", is_on(memory.disable_oom_killer));
    // The only way there is.
    let flat = memory.use_hierarchy.filter(|value| !value.value);
    refuse("memory.useHierarchy", flat.map(|_| "false".to_owned()));
    refuse("cpu.realtimeRuntime", text(cpu.realtime_runtime));
    refuse(
        "cpu.realtimePeriod",
        cpu.realtime_period.map(|value| value.value.to_string()),
    );
    let pages = given.hugepage_limits.iter();
    let resources = Resources {
        cpu_period: signed(cpu.period),
        cpu_quota: int(cpu.quota),
        cpu_shares: signed(cpu.shares),
        memory_limit: int(memory.limit),
        oom_score_adj: 0,
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepage_limits: pages
            .map(|one| (one.page_size.clone(), one.limit))
            .collect(),
        unified: given.unified.clone(),
        memory_swap_limit: int(memory.swap),
        pids_limit: given.pids.map_or(0, |pids| pids.limit),
        // 0 is a wish too: none, where the base spec or an earlier update has given one.
        memory_reservation: match memory.reservation {
            Some(api::OptionalInt { value: ..=0 }) => -1,
            given => int(given),
        },
        blockio_class: given.blockio_class.clone().map(|class| class.value),
        block_io: None,
    };
    (resources, impossible)
}

/// Claims every limit that is given, and puts it over those in `into`.
///
/// # Errors
/// [`Conflict`]: another plugin has set it.
pub(super) fn merge(
    owners: &mut Owners,
    id: &str,
    plugin: &str,
    given: &api::LinuxResources,
    into: &mut api::LinuxResources,
) -> Result<(), Conflict> {
    macro_rules! fields {
        ($from:expr, $to:expr, $($name:ident: $field:ident),+ $(,)?) => {
            $(if let Some(value) = $from.$name.clone() {
                owners.claim(id, Field::$field, "", plugin)?;
                $to.$name = Some(value);
            })+
        };
    }
    if let Some(memory) = &given.memory {
        let to = into.memory.get_or_insert_default();
        fields!(memory, to,
            limit: MemLimit, reservation: MemReservation, swap: MemSwapLimit, kernel: MemKernelLimit,
            kernel_tcp: MemTcpLimit, swappiness: MemSwappiness, disable_oom_killer: MemDisableOomKiller,
            use_hierarchy: MemUseHierarchy);
    }
    if let Some(cpu) = &given.cpu {
        let to = into.cpu.get_or_insert_default();
        fields!(cpu, to,
            shares: CpuShares, quota: CpuQuota, period: CpuPeriod, realtime_runtime: CpuRealtimeRuntime,
            realtime_period: CpuRealtimePeriod);
        for (value, place, field) in [
            (&cpu.cpus, &mut to.cpus, Field::CpuSetCpus),
            (&cpu.mems, &mut to.mems, Field::CpuSetMems),
        ] {
            if !value.is_empty() {
                owners.claim(id, field, "", plugin)?;
                place.clone_from(value);
            }
        }
    }
    fields!(given, into, blockio_class: BlockioClass, rdt_class: RdtClass, pids: PidsLimit);
    for limit in &given.hugepage_limits {
        owners.claim(id, Field::HugepageLimits, &limit.page_size, plugin)?;
        into.hugepage_limits
            .retain(|old| old.page_size != limit.page_size);
        into.hugepage_limits.push(limit.clone());
    }
    for (key, value) in &given.unified {
        owners.claim(id, Field::CgroupsUnified, key, plugin)?;
        into.unified.insert(key.clone(), value.clone());
    }
    into.devices.extend(given.devices.iter().cloned());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let given = Resources {
            cpu_period: 100_000,
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit: 1 << 30,
            oom_score_adj: 0,
            cpuset_cpus: "0-1".to_owned(),
            cpuset_mems: "0".to_owned(),
            hugepage_limits: vec![("2MB".to_owned(), 4)],
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            memory_swap_limit: 1 << 31,
            pids_limit: 99,
            memory_reservation: 1 << 20,
            blockio_class: Some("slow".to_owned()),
            block_io: None,
        };
        let (back, impossible) = from_proto(&to_proto(&given));
        assert_eq!((back, impossible), (given, vec![]));
        let empty = from_proto(&to_proto(&Resources::default()));
        assert_eq!(empty, (Resources::default(), vec![]));
    }

    #[test]
    fn a_reservation_of_0_takes_one_away() {
        let asked = |value: i64| {
            let memory = api::LinuxMemory {
                reservation: Some(api::OptionalInt { value }),
                ..api::LinuxMemory::default()
            };
            let given = api::LinuxResources {
                memory: Some(memory),
                ..api::LinuxResources::default()
            };
            from_proto(&given).0
        };
        let both = asked(5).with(&asked(0));
        assert_eq!(
            (asked(5).memory_reservation, both.memory_reservation),
            (5, -1)
        );
        assert_eq!(to_proto(&both).memory.unwrap().reservation, None);
        assert_eq!(asked(5).with(&Resources::default()).memory_reservation, 5);
    }

    #[test]
    fn what_berth_cannot_do_is_named() {
        let given = api::LinuxResources {
            memory: Some(api::LinuxMemory {
                swappiness: Some(api::OptionalUInt64 { value: 5 }),
                use_hierarchy: Some(api::OptionalBool { value: true }),
                ..api::LinuxMemory::default()
            }),
            cpu: Some(api::LinuxCpu {
                realtime_runtime: Some(api::OptionalInt { value: 7 }),
                ..api::LinuxCpu::default()
            }),
            ..api::LinuxResources::default()
        };
        let (_, impossible) = from_proto(&given);
        let fields: Vec<_> = impossible.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "resources.memory.swappiness",
                "resources.cpu.realtimeRuntime"
            ]
        );
    }

    #[test]
    fn limits_have_one_owner() {
        let limit = |value: &str| api::LinuxResources {
            cpu: Some(api::LinuxCpu {
                cpus: value.to_owned(),
                ..api::LinuxCpu::default()
            }),
            ..api::LinuxResources::default()
        };
        let (mut owners, mut into) = (Owners::default(), api::LinuxResources::default());
        merge(&mut owners, "c", "10-a", &limit("1"), &mut into).unwrap();
        assert_eq!(into.cpu.as_ref().unwrap().cpus, "1");
        assert!(merge(&mut owners, "c", "20-b", &limit("2"), &mut into).is_err());
        assert_eq!(into.cpu.as_ref().unwrap().cpus, "1");
        merge(&mut owners, "d", "20-b", &limit("2"), &mut into).unwrap();
    }
}

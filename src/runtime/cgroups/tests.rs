//! Limits and device rules as tables; the life of a cgroup on the machine's own hierarchies.
#![cfg(feature = "daemon")]

use std::process::{Command, Stdio};

use proptest::prelude::*;

use super::devices::{DeviceKind, DeviceRule, Table, fold, program};
use super::layout::{Cgroups, Version};
use super::limits::{plan_v1, plan_v2, shares_of_weight, weight_of_shares};
use super::stats::pressure;
use super::*;
use crate::base::container::Resources;
use crate::base::stats::Scope;
use crate::sys::bpf::Instruction;

fn lines(resources: &Resources) -> Vec<String> {
    let writes = plan_v2(resources).unwrap();
    writes
        .into_iter()
        .map(|w| format!("{}={}", w.file, w.value))
        .collect()
}

#[test]
fn limits_of_v2() {
    let mut r = Resources {
        cpu_shares: 1024,
        cpu_quota: 50_000,
        ..Resources::default()
    };
    assert_eq!(lines(&r), ["cpu.weight=100", "cpu.max=50000 100000"]);
    r = Resources {
        cpu_quota: -1,
        cpu_period: 20_000,
        memory_limit: 1 << 20,
        ..Resources::default()
    };
    assert_eq!(
        lines(&r),
        [
            "cpu.max=max 20000",
            "memory.max=1048576",
            "memory.swap.max=0"
        ]
    );
    r = Resources {
        memory_limit: 100,
        memory_swap_limit: 250,
        ..Resources::default()
    };
    assert_eq!(lines(&r), ["memory.max=100", "memory.swap.max=150"]);
    r = Resources {
        memory_limit: -1,
        memory_swap_limit: -1,
        ..Resources::default()
    };
    assert_eq!(lines(&r), ["memory.max=max", "memory.swap.max=max"]);
    r = Resources {
        cpuset_cpus: "0".into(),
        hugepage_limits: vec![("2MB".into(), 0)],
        ..Resources::default()
    };
    r.unified.insert("memory.oom.group".into(), "1".into());
    assert_eq!(
        lines(&r),
        ["cpuset.cpus=0", "hugetlb.2MB.max=0", "memory.oom.group=1"]
    );
}

#[test]
fn refused_limits_name_the_field() {
    let swap = Resources {
        memory_limit: 100,
        memory_swap_limit: 50,
        ..Resources::default()
    };
    assert!(
        plan_v2(&swap)
            .unwrap_err()
            .to_string()
            .contains("memory_swap_limit_in_bytes")
    );
    for key in ["../memory.max", "a/b.c", "nodot", "cgroup.procs"] {
        let mut r = Resources::default();
        r.unified.insert(key.into(), "1".into());
        assert!(plan_v2(&r).is_err(), "{key}");
        assert!(plan_v1(&r, true).is_err(), "{key}");
    }
}

#[test]
fn weights_fit_the_ends_and_the_default() {
    for (shares, weight) in [
        (0, 1),
        (2, 1),
        (1024, 100),
        (262_144, 10_000),
        (i64::MAX, 10_000),
    ] {
        assert_eq!(weight_of_shares(shares), weight, "{shares}");
    }
    for shares in [2, 512, 1024, 4096, 262_144] {
        let back = shares_of_weight(weight_of_shares(shares)).cast_signed();
        assert!((back - shares).abs() * 50 <= shares, "{shares}: {back}");
    }
    let all: Vec<u64> = (2..262_144).step_by(97).map(weight_of_shares).collect();
    assert!(all.is_sorted());
}

#[test]
fn pressure_lines() {
    let text = b"some avg10=1.50 avg60=0.20 avg300=0.00 total=77\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=5\n";
    let psi = pressure(text).unwrap();
    assert_eq!((psi.some.total, psi.full.total), (77, 5));
    assert!((psi.some.avg10 - 1.5).abs() < 1e-9);
    assert!(pressure(b"").is_none());
}

#[test]
fn paths_that_climb_are_refused() {
    let cgroups = Cgroups::detect().unwrap();
    for path in ["", "a", "/a/../b", "/..", "/a/./b", "/a\n", "/a/."] {
        assert!(
            matches!(cgroups.dirs(path), Err(CgroupError::Path(_))),
            "{path:?}"
        );
    }
    assert!(matches!(cgroups.remove("/"), Err(CgroupError::Path(_))));
}

/// What a folded table answers.
fn allowed(rules: &[DeviceRule], kind: DeviceKind, major: u32, minor: u32, access: u32) -> bool {
    let table = fold(rules);
    run(&program(&table), kind, major, minor, access)
}

/// Interprets the few instructions that device programs use.
fn run(code: &[Instruction], kind: DeviceKind, major: u32, minor: u32, access: u32) -> bool {
    let kind = if kind == DeviceKind::Block { 1 } else { 2 };
    let context = [access << 16 | kind, major, minor];
    let mut registers = [0u32; 11];
    let mut at = 0;
    loop {
        let i = code[at];
        let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
        at += 1;
        let jump = match i.code {
            0x61 => {
                registers[dst] = context[usize::try_from(i.offset).unwrap() / 4];
                false
            }
            0xbc => {
                registers[dst] = registers[src];
                false
            }
            0xb7 => {
                registers[dst] = i.immediate;
                false
            }
            0x54 => {
                registers[dst] &= i.immediate;
                false
            }
            0x74 => {
                registers[dst] >>= i.immediate;
                false
            }
            0x55 => registers[dst] != i.immediate,
            0x15 => registers[dst] == i.immediate,
            0x95 => return registers[0] == 1,
            other => panic!("unknown instruction {other:#x}"),
        };
        if jump {
            at += usize::try_from(i.offset).unwrap();
        }
    }
}

fn rule(
    allow: bool,
    kind: DeviceKind,
    major: Option<u32>,
    minor: Option<u32>,
    bits: u32,
) -> DeviceRule {
    DeviceRule {
        allow,
        kind,
        major,
        minor,
        mknod: bits & 1 != 0,
        read: bits & 2 != 0,
        write: bits & 4 != 0,
    }
}

#[test]
fn device_rules_deny_by_default() {
    use DeviceKind::{Block, Char};
    let rules = [
        DeviceRule::DENY_ALL,
        rule(true, Char, Some(1), Some(3), 6),
        rule(true, Char, None, None, 1),
    ];
    assert!(
        allowed(&rules, Char, 1, 3, 2)
            && allowed(&rules, Char, 1, 3, 6)
            && allowed(&rules, Char, 9, 9, 1)
    );
    assert!(
        !allowed(&rules, Char, 1, 3, 7),
        "no single entry covers rwm"
    );
    assert!(!allowed(&rules, Block, 1, 3, 2) && !allowed(&rules, Block, 254, 0, 1));
    let all = [
        rule(true, DeviceKind::All, None, None, 7),
        rule(false, Block, Some(8), None, 4),
    ];
    assert!(
        allowed(&all, Block, 8, 0, 2)
            && !allowed(&all, Block, 8, 0, 6)
            && allowed(&all, Char, 5, 5, 7)
    );
    assert_eq!(fold(&[]), fold(&[DeviceRule::DENY_ALL]));
}

type Key = (DeviceKind, Option<u32>, Option<u32>);

/// The rules read directly, without folding or program.
fn model(
    table: &Table,
    rules: &[DeviceRule],
    kind: DeviceKind,
    dev: (u32, u32),
    access: u32,
) -> bool {
    let last_all = rules.iter().rposition(|r| r.kind == DeviceKind::All);
    let default = last_all.is_some_and(|at| rules[at].allow);
    assert_eq!(fold(rules), *table);
    let mut sets: Vec<(Key, u32)> = vec![];
    for r in &rules[last_all.map_or(0, |at| at + 1)..] {
        let key = (r.kind, r.major, r.minor);
        let bits = u32::from(r.mknod) | u32::from(r.read) << 1 | u32::from(r.write) << 2;
        if !sets.iter().any(|s| s.0 == key) {
            sets.push((key, 0));
        }
        let set = sets.iter_mut().find(|s| s.0 == key).unwrap();
        set.1 = if r.allow == default {
            set.1 & !bits
        } else {
            set.1 | bits
        };
    }
    let hits = |s: &&(Key, u32)| {
        s.0.0 == kind
            && s.0.1.is_none_or(|m| m == dev.0)
            && s.0.2.is_none_or(|m| m == dev.1)
            && s.1 != 0
    };
    if default {
        !sets.iter().filter(hits).any(|s| s.1 & access != 0)
    } else {
        sets.iter().filter(hits).any(|s| access & !s.1 == 0)
    }
}

fn any_rule() -> impl Strategy<Value = DeviceRule> {
    let kind = prop_oneof![1 => Just(DeviceKind::All), 4 => Just(DeviceKind::Block), 4 => Just(DeviceKind::Char)];
    let number = prop_oneof![Just(None), (0..3u32).prop_map(Some)];
    (any::<bool>(), kind, number.clone(), number, 0..8u32)
        .prop_map(|(a, k, x, y, bits)| rule(a, k, x, y, bits))
}

proptest! {
    #[test]
    fn programs_answer_as_the_rules_say(rules in prop::collection::vec(any_rule(), 0..8)) {
        let table = fold(&rules);
        let code = program(&table);
        for kind in [DeviceKind::Block, DeviceKind::Char] {
            for (major, minor, access) in (0..3).flat_map(|a| (0..3).flat_map(move |b| (1..8).map(move |c| (a, b, c)))) {
                let want = model(&table, &rules, kind, (major, minor), access);
                prop_assert_eq!(run(&code, kind, major, minor, access), want);
            }
        }
    }
}

#[test]
fn a_device_program_is_taken_by_the_kernel() {
    let table = fold(&[
        DeviceRule::DENY_ALL,
        rule(true, DeviceKind::Char, Some(1), Some(3), 7),
    ]);
    let top = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .into_iter()
        .map(Path::new)
        .find(|top| top.join("cgroup.controllers").exists())
        .expect("a cgroup2 mount");
    let name = format!("berth-test-bpf-{}", std::process::id());
    let _scratch = scratch::Scratch::named(&name);
    let directory = top.join(name);
    std::fs::create_dir(&directory).unwrap();
    let twice =
        (0..2).map(|_| crate::sys::bpf::attach_device_program(&directory, &program(&table)));
    let results: Vec<_> = twice.collect();
    std::fs::remove_dir(&directory).unwrap();
    for result in results {
        result.unwrap();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a process to be put into the cgroup under test"
)]
fn sleeper() -> std::process::Child {
    Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn life_of_a_cgroup() {
    let cgroups = Cgroups::detect().unwrap();
    let top = format!("/berth-test-{}", std::process::id());
    let scratch = scratch::Scratch::named(&top);
    let path = format!("{top}/pod/{}", "a".repeat(64));
    let resources = Resources {
        cpu_shares: 512,
        memory_limit: 64 << 20,
        ..Resources::default()
    };
    let null = rule(true, DeviceKind::Char, Some(1), Some(3), 7);
    let dirs = cgroups
        .create(&path, &resources, &[DeviceRule::DENY_ALL, null])
        .unwrap();
    let mut child = sleeper();
    let joined: Vec<PathBuf> = match &dirs.join {
        CgroupJoin::V2(one) => vec![one.clone()],
        CgroupJoin::V1(all) => all.clone(),
    };
    for directory in &joined {
        files::write(&directory.join("cgroup.procs"), &child.id().to_string()).unwrap();
    }
    let stats = cgroups.stats(&path, Scope::Everything);
    assert_eq!(stats.memory_limit, Some(64 << 20));
    assert!(stats.cpu_usage_ns.is_some() && stats.memory_usage.is_some() && stats.pids == Some(1));
    assert!(stats.memory_working_set <= stats.memory_usage && stats.memory_peak.is_some());
    assert_eq!(
        (stats.cpu_period, stats.cpu_quota),
        (Some(100_000), None),
        "{stats:?}"
    );
    assert_eq!(stats.oom_kills, Some(0));
    let shares = stats.cpu_shares.unwrap();
    assert!((505..=520).contains(&shares), "{shares}");
    // PSI is v2's alone: absent, not zero.
    assert!(cgroups.version() == Version::V2 || stats.cpu_psi.is_none());
    let usage = cgroups.stats(&path, Scope::Usage);
    assert!(usage.memory_peak.is_none() && usage.memory_rss.is_some());
    let processes = cgroups.readings().process_stats(&path, child.id());
    assert_eq!(processes.processes, 1);
    assert!(
        processes.descriptors >= 3 && processes.sockets == Some(0),
        "{processes:?}"
    );
    assert!(processes.open_files_limit.is_some_and(|limit| limit > 0));
    let none = cgroups.stats(&format!("{path}/none"), Scope::Everything);
    assert_eq!((none.cpu_usage_ns, none.memory_usage), (None, None));
    let more = Resources {
        memory_limit: 128 << 20,
        cpu_quota: 20_000,
        ..Resources::default()
    };
    cgroups.update(&path, &more).unwrap();
    let bad = Resources {
        memory_limit: 96 << 20,
        cpuset_cpus: "7777".into(),
        ..Resources::default()
    };
    cgroups.update(&path, &bad).unwrap_err();
    assert_eq!(
        cgroups.stats(&path, Scope::Usage).memory_limit,
        Some(128 << 20),
        "all or none"
    );
    assert_eq!(cgroups.processes(&path), [child.id()]);
    cgroups.set_oom_score_adj(&path, 321).unwrap();
    let score = format!("/proc/{}/oom_score_adj", child.id());
    assert_eq!(std::fs::read_to_string(score).unwrap().trim(), "321");
    assert!(cgroups.set_oom_score_adj(&path, 1001).is_err());
    cgroups
        .set_oom_score_adj(&format!("{path}/none"), 1)
        .unwrap();
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    cgroups.kill(&path).unwrap();
    assert!(!reaper.join().unwrap().success());
    cgroups.remove(&path).unwrap();
    cgroups.remove(&path).unwrap();
    cgroups.remove_if_empty(&format!("{top}/pod"));
    cgroups.remove_if_empty(&top);
    assert!(scratch.directories().is_empty());
    assert!(cgroups.version() == Version::V2 || cgroups.has("memory"));
}

#[test]
fn limits_that_only_plugins_set() {
    let given = Resources {
        pids_limit: 55,
        memory_reservation: 1 << 20,
        ..Resources::default()
    };
    assert_eq!(lines(&given), ["memory.low=1048576", "pids.max=55"]);
    let v1 = plan_v1(&given, true).unwrap();
    let v1: Vec<_> = v1
        .iter()
        .map(|w| (w.controller, &*w.file, &*w.value))
        .collect();
    let expected = [
        ("memory", "memory.soft_limit_in_bytes", "1048576"),
        ("pids", "pids.max", "55"),
    ];
    assert_eq!(v1, expected);
    let taken_back = Resources {
        pids_limit: -1,
        memory_reservation: -1,
        ..Resources::default()
    };
    assert_eq!(lines(&taken_back), ["memory.low=0", "pids.max=max"]);
    let v1 = plan_v1(&taken_back, true).unwrap();
    assert_eq!((&*v1[0].value, &*v1[1].value), ("-1", "max"));
}

//! Programs, run by an interpreter and held against a direct reading of the profile.

pub(super) mod model;

use proptest::prelude::*;

use super::profile::{Action, Circumstances, Condition, Operator, Profile, Rule};
use super::*;
use crate::base::error::{HasKind as _, Kind};
use crate::runtime::capabilities;

/// What a filter sees of a system call.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) audit: u32,
    pub(super) number: u32,
    pub(super) args: [u64; 6],
}

/// Runs a program as the kernel would.
pub(super) fn run(program: &[(u16, u8, u8, u32)], call: &Call) -> u32 {
    let word = |at: u32| -> u32 {
        match at {
            0 => call.number,
            4 => call.audit,
            16..64 if at.is_multiple_of(4) => {
                let arg = call.args[((at - 16) / 8) as usize];
                let half = if at.is_multiple_of(8) { arg } else { arg >> 32 };
                u32::try_from(half & 0xffff_ffff).unwrap()
            }
            _ => panic!("load at {at}"),
        }
    };
    let (mut a, mut x, mut at) = (0_u32, 0_u32, 0_usize);
    let mut memory = [0_u32; 16];
    loop {
        let (code, yes, no, k) = program[at];
        at += 1;
        let mut jump = |holds: bool| at += usize::from(if holds { yes } else { no });
        match code {
            0x20 => a = word(k),
            0x54 => a &= k,
            0x05 => at += k as usize,
            0x15 => jump(a == k),
            0x25 => jump(a > k),
            0x35 => jump(a >= k),
            0x45 => jump(a & k != 0),
            0x06 => return k,
            // Only libseccomp's programs have these.
            0x02 => memory[k as usize] = a,
            0x60 => a = memory[k as usize],
            0x07 => x = a,
            0x87 => a = x,
            _ => panic!("code {code:#x}"),
        }
    }
}

pub(super) fn actions() -> Vec<String> {
    [
        "kill_process",
        "kill_thread",
        "trap",
        "errno",
        "user_notif",
        "trace",
        "log",
        "allow",
    ]
    .map(ToOwned::to_owned)
    .to_vec()
}

/// For this machine, the filter of a profile that does `action` to the calls `names` where the conditions `args` (JSON) hold,
/// and `default` to all else.
pub(crate) fn filter(default: &str, action: &str, names: &[&str], args: &str) -> SeccompFilter {
    let names = serde_json::to_string(names).unwrap();
    let text = format!(
        r#"{{"defaultAction":"SCMP_ACT_{default}","syscalls":[
            {{"names":{names},"action":"SCMP_ACT_{action}","args":[{args}]}}]}}"#
    );
    let profile = Profile::parse("test", text.as_bytes()).unwrap();
    let actions = actions();
    let target = Target {
        arch: if cfg!(target_arch = "x86_64") {
            Arch::X86_64
        } else {
            Arch::Aarch64
        },
        capabilities: 0,
        kernel: (6, 12),
        actions: &actions,
    };
    compile(&profile, &target).unwrap().filter.clone()
}

fn target(arch: Arch, capabilities: &[&str], actions: &[String]) -> Compiled {
    let target = Target {
        arch,
        capabilities: capabilities
            .iter()
            .map(|name| capabilities::mask(name).unwrap())
            .sum(),
        kernel: (6, 12),
        actions,
    };
    compile(&Profile::runtime_default(), &target)
        .unwrap()
        .as_ref()
        .clone()
}

const ALLOW: u32 = 0x7fff_0000;
const EPERM: u32 = 0x0005_0001;
const ENOSYS: u32 = 0x0005_0026;
const KILL: u32 = 0x8000_0000;

fn verdict(compiled: &Compiled, arch: Arch, name: &str, first: u64) -> u32 {
    let number = arch
        .number(name)
        .unwrap_or_else(|| panic!("{name} on {arch:?}"));
    number_verdict(compiled, arch, number, first)
}

fn number_verdict(compiled: &Compiled, arch: Arch, number: u32, first: u64) -> u32 {
    let call = Call {
        audit: arch.audit(),
        number,
        args: [first, 0, 0, 0, 0, 0],
    };
    run(&compiled.filter.instructions, &call)
}

#[test]
fn the_default_profile() {
    let actions = actions();
    let plain = target(Arch::X86_64, &[], &actions);
    assert!(
        plain.filter.instructions.len() < 2000,
        "{}",
        plain.filter.instructions.len()
    );
    let cases = [
        ("read", 0, ALLOW),
        ("execve", 0, ALLOW),
        ("ptrace", 0, ALLOW),
        ("arch_prctl", 0, ALLOW),
        ("clone", 0x11, ALLOW),
        ("clone", 0x1000_0000, EPERM),
        ("clone", 0x0002_0000, EPERM),
        ("clone3", 0, ENOSYS),
        ("unshare", 0, EPERM),
        ("setns", 0, EPERM),
        ("mount", 0, EPERM),
        ("bpf", 0, EPERM),
        ("keyctl", 0, EPERM),
        ("add_key", 0, EPERM),
        ("io_uring_setup", 0, EPERM),
        ("io_uring_enter", 0, EPERM),
        ("io_uring_register", 0, EPERM),
        ("userfaultfd", 0, EPERM),
        ("kexec_load", 0, EPERM),
        ("init_module", 0, EPERM),
        ("reboot", 0, EPERM),
        ("open_by_handle_at", 0, EPERM),
        ("perf_event_open", 0, EPERM),
        ("personality", 0, ALLOW),
        ("personality", 0xffff_ffff, ALLOW),
        ("personality", 0x0004_0000, EPERM),
        ("socket", 1, ALLOW),
        ("socket", 2, ALLOW),
        ("socket", 16, ALLOW),
        ("socket", 37, ALLOW),
        ("socket", 38, EPERM),
        ("socket", 39, ALLOW),
        ("socket", 40, EPERM),
        ("socket", 41, ALLOW),
        ("socket", 42, ALLOW),
        ("socket", 45, ALLOW),
        ("socket", 63, ALLOW),
        ("socket", (1 << 32) + 38, EPERM),
        ("socket", (1 << 32) + 40, EPERM),
        ("socket", (7 << 40) + 38, EPERM),
    ];
    for (name, first, expected) in cases {
        let found = verdict(&plain, Arch::X86_64, name, first);
        assert_eq!(found, expected, "{name}({first:#x}): {found:#x}");
    }
    // Calls younger than the profile; a number skipped by a tracer; foreign architectures.
    assert_eq!(number_verdict(&plain, Arch::X86_64, 470, 0), ENOSYS);
    assert_eq!(number_verdict(&plain, Arch::X86_64, 9999, 0), ENOSYS);
    assert_eq!(number_verdict(&plain, Arch::Aarch64, 0, 0), KILL);
    for (name, expected) in [("socketcall", ENOSYS), ("socket", ALLOW), ("mmap2", ALLOW)] {
        assert_eq!(verdict(&plain, Arch::X86, name, 1), expected, "{name}");
    }
    assert_eq!(verdict(&plain, Arch::X32, "ioctl", 0), ALLOW);
    assert_eq!(verdict(&plain, Arch::X32, "socket", 38), EPERM);
}

#[test]
fn the_default_profile_follows_capabilities_and_kernel() {
    let actions = actions();
    let cases: [(&str, &[(&str, u64)]); 12] = [
        (
            "SYS_ADMIN",
            &[
                ("clone3", 0),
                ("clone", 0x1000_0000),
                ("unshare", 0),
                ("mount", 0),
                ("bpf", 0),
                ("fsopen", 0),
            ],
        ),
        ("BPF", &[("bpf", 0)]),
        ("PERFMON", &[("perf_event_open", 0)]),
        ("DAC_READ_SEARCH", &[("open_by_handle_at", 0)]),
        ("SYS_BOOT", &[("reboot", 0)]),
        ("SYS_CHROOT", &[("chroot", 0)]),
        ("SYS_MODULE", &[("finit_module", 0)]),
        ("SYS_NICE", &[("mbind", 0)]),
        ("SYS_PTRACE", &[("process_madvise", 0), ("pidfd_getfd", 0)]),
        ("SYS_RAWIO", &[("iopl", 0)]),
        ("SYS_TIME", &[("clock_settime", 0)]),
        ("SYSLOG", &[("syslog", 0)]),
    ];
    let none = target(Arch::X86_64, &[], &actions);
    for (capability, calls) in cases {
        let with = target(Arch::X86_64, &[capability], &actions);
        for (name, first) in calls {
            let (without, with) = (
                verdict(&none, Arch::X86_64, name, *first),
                verdict(&with, Arch::X86_64, name, *first),
            );
            assert_ne!(without, ALLOW, "{name} without {capability}");
            assert_eq!(with, ALLOW, "{name} with {capability}");
        }
    }
    let old = Target {
        arch: Arch::X86_64,
        capabilities: 0,
        kernel: (4, 7),
        actions: &actions,
    };
    let old = compile(&Profile::runtime_default(), &old).unwrap();
    assert_eq!(verdict(&old, Arch::X86_64, "ptrace", 0), EPERM);
    let arm = target(Arch::Aarch64, &[], &actions);
    assert_eq!(verdict(&arm, Arch::Aarch64, "openat", 0), ALLOW);
    assert_eq!(verdict(&arm, Arch::Aarch64, "socket", 38), EPERM);
    assert_eq!(verdict(&arm, Arch::Arm, "set_tls", 0), ALLOW);
    assert_eq!(number_verdict(&arm, Arch::Arm, 600, 0), ENOSYS);
}

#[test]
fn every_name_of_the_default_profile_is_a_system_call() {
    for rule in &Profile::runtime_default().syscalls {
        for name in &rule.names {
            let known = [Arch::X86_64, Arch::X86, Arch::Aarch64, Arch::Arm]
                .iter()
                .any(|arch| arch.number(name).is_some());
            assert!(known, "{name}");
        }
    }
}

#[test]
fn the_same_filter_is_made_once() {
    let actions = actions();
    let target = Target {
        arch: Arch::X86_64,
        capabilities: 7,
        kernel: (6, 12),
        actions: &actions,
    };
    let profile = Profile::parse("same", br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
    let first = compile(&profile, &target).unwrap();
    assert!(Arc::ptr_eq(&first, &compile(&profile, &target).unwrap()));
}

fn compile_text(text: &str) -> Result<Arc<Compiled>> {
    let actions = actions();
    let target = Target {
        arch: Arch::X86_64,
        capabilities: capabilities::default_set(),
        kernel: (6, 12),
        actions: &actions,
    };
    compile(&Profile::parse("test.json", text.as_bytes())?, &target)
}

#[test]
fn docker_and_oci_profiles() {
    let docker = r#"{
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        "syscalls": [
          {"names": ["read", "no_such_call"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": ""},
          {"name": "write", "action": "SCMP_ACT_LOG", "includes": {}, "excludes": {}},
          {"names": ["chroot"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_CHROOT"]}},
          {"names": ["mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
          {"names": ["open"], "action": "SCMP_ACT_ALLOW", "excludes": {"arches": ["amd64"]}},
          {"names": ["openat"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.12"}},
          {"names": ["openat2"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.13"}},
          {"names": ["close"], "action": "SCMP_ACT_KILL_PROCESS"},
          {"names": ["stat"], "action": "SCMP_ACT_KILL"},
          {"names": ["fstat"], "action": "SCMP_ACT_TRAP"},
          {"names": ["lstat"], "action": "SCMP_ACT_TRACE", "errnoRet": 7},
          {"names": ["poll"], "action": "SCMP_ACT_ERRNO"},
          {"names": ["lseek"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
          {"names": ["mseal"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}
        ]}"#;
    let made = compile_text(docker).unwrap();
    assert_eq!(made.filter.flags, 4);
    let cases = [
        ("read", ALLOW),
        ("write", 0x7ffc_0000),
        ("chroot", ALLOW),
        ("mount", 0x0005_000d),
        ("open", 0x0005_000d),
        ("openat", ALLOW),
        ("openat2", 0x0005_000d),
        ("close", KILL),
        ("stat", 0),
        ("fstat", 0x0003_0000),
        ("lstat", 0x7ff0_0007),
        ("poll", 0x0005_0001),
        ("lseek", 0x0005_0000),
        ("mseal", 0x0005_000d),
        ("setxattrat", ENOSYS),
    ];
    for (name, expected) in cases {
        assert_eq!(verdict(&made, Arch::X86_64, name, 0), expected, "{name}");
    }
    assert_eq!(verdict(&made, Arch::X86, "read", 0), ALLOW);
    assert_eq!(number_verdict(&made, Arch::X86_64, 0x4000_0000, 0), KILL);
    assert_eq!(
        number_verdict(&made, Arch::X86_64, u32::MAX, 0),
        0x0005_000d
    );

    let oci = r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X32", "SCMP_ARCH_ARM"],
        "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO"}]}"#;
    let made = compile_text(oci).unwrap();
    assert_eq!(made.filter.flags, 2);
    assert_eq!(verdict(&made, Arch::X86_64, "chmod", 0), EPERM);
    assert_eq!(verdict(&made, Arch::X32, "fchmodat", 0), EPERM);
    assert_eq!(verdict(&made, Arch::X86_64, "read", 0), ALLOW);
    assert_eq!(number_verdict(&made, Arch::X86_64, 999, 0), ALLOW);
    assert_eq!(verdict(&made, Arch::X86, "read", 0), KILL);
    let shown = serde_json::to_value(&made.description).unwrap();
    assert_eq!(shown["defaultAction"], "SCMP_ACT_ALLOW");
    assert_eq!(shown["syscalls"][0]["names"][1], "fchmodat");
}

#[test]
fn bad_profiles() {
    let rule = |rest: &str| {
        format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["read"],{rest}}}]}}"#)
    };
    let cases = [
        ("{\n  \"defaultAction\": x}".to_owned(), "test.json:2:20: "),
        ("{}".to_owned(), "missing field `defaultAction`"),
        ("[]".to_owned(), "test.json:1:"),
        (String::new(), "EOF"),
        (
            r#"{"defaultAction":"SCMP_ACT_NONE"}"#.to_owned(),
            "SCMP_ACT_NONE",
        ),
        (rule(r#""action":"SCMP_ACT_ERRNO","errnoRet":4096"#), "4096"),
        (
            rule(r#""action":"SCMP_ACT_ERRNO","errnoRet":-1"#),
            "test.json:1:",
        ),
        (
            rule(r#""action":"SCMP_ACT_KILL","errnoRet":1"#),
            "errnoRet of syscalls",
        ),
        (
            rule(r#""action":"SCMP_ACT_KILL","args":[{"index":6,"value":1,"op":"SCMP_CMP_EQ"}]"#),
            "\"6\" is no argument",
        ),
        (
            rule(r#""action":"SCMP_ACT_KILL","args":[{"index":0,"value":1,"op":"EQ"}]"#),
            "EQ",
        ),
        (
            rule(r#""action":"SCMP_ACT_KILL","includes":{"minKernel":"x"}"#),
            "minKernel",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_X"]}"#.to_owned(),
            "SECCOMP_FILTER_FLAG_X",
        ),
        (
            r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],
                "archMap":[{"architecture":"SCMP_ARCH_X86"}]}"#
                .to_owned(),
            "archMap",
        ),
    ];
    for (text, expected) in cases {
        let error = compile_text(&text).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{text}");
        let message = error.to_string();
        assert!(message.contains(expected), "{text}: {message}");
        assert!(message.contains("test.json"), "{text}: {message}");
    }
    let notify = rule(r#""action":"SCMP_ACT_NOTIFY""#);
    assert_eq!(
        compile_text(&notify).unwrap_err().kind(),
        Kind::Unimplemented
    );
    let actions = ["allow".to_owned()];
    let target = Target {
        arch: Arch::X86_64,
        capabilities: 0,
        kernel: (6, 12),
        actions: &actions,
    };
    let error = compile(&Profile::runtime_default(), &target).unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
}

#[test]
fn profiles_too_long_for_the_kernel_are_refused() {
    let args: Vec<String> = (0..6)
        .map(|index| {
            format!(r#"{{"index":{index},"value":77,"valueTwo":3,"op":"SCMP_CMP_MASKED_EQ"}}"#)
        })
        .collect();
    let rule = format!(
        r#"{{"names":["read"],"action":"SCMP_ACT_KILL","args":[{}]}}"#,
        args.join(",")
    );
    let rules = vec![rule; 120].join(",");
    let text = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{rules}]}}"#);
    let error = compile_text(&text).unwrap_err();
    assert!(matches!(error, SeccompError::TooLong { .. }), "{error}");
}

#[test]
fn files_of_profiles() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("profile.json");
    assert!(matches!(
        Profile::load(&path),
        Err(SeccompError::Read { .. })
    ));
    assert!(matches!(
        Profile::load(dir.path()),
        Err(SeccompError::File { .. })
    ));
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(matches!(
        Profile::load(&path),
        Err(SeccompError::File { .. })
    ));
    std::fs::remove_file(&path).unwrap();
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    assert!(matches!(
        Profile::load(&path),
        Err(SeccompError::File { .. })
    ));
}

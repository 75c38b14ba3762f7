//! Programs against what profiles mean, over profiles and calls by chance.

use super::*;

/// Names with numbers on both sides of each other, here and there.
pub(in crate::runtime::seccomp) const POOL: [&str; 20] = [
    "read", "write", "open", "close", "lseek", "ioctl", "readv", "writev", "dup", "getpid",
    "clone", "fork", "execve", "kill", "uname", "chmod", "prctl", "sync", "unshare", "openat",
];

/// Values on both sides of each border that a comparison of two halves can get wrong.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        0_u64..4,
        Just(0xffff_ffff_u64),
        Just(1 << 32),
        Just((1 << 32) + 1),
        Just(u64::MAX),
        Just(1 << 63),
        any::<u64>(),
    ]
}

fn conditions() -> impl Strategy<Value = Condition> {
    let op = prop_oneof![
        Just(Operator::Ne),
        Just(Operator::Lt),
        Just(Operator::Le),
        Just(Operator::Eq),
        Just(Operator::Ge),
        Just(Operator::Gt),
        Just(Operator::MaskedEq),
    ];
    (0_u32..3, value(), value(), op).prop_map(|(index, value, value_two, op)| Condition {
        index,
        value,
        value_two,
        op,
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::Allow),
        Just(Action::Errno),
        Just(Action::KillProcess),
        Just(Action::KillThread),
        Just(Action::Trap),
        Just(Action::Trace),
        Just(Action::Log),
    ]
}

pub(in crate::runtime::seccomp) fn profiles(actions: usize) -> impl Strategy<Value = Profile> {
    let rules = prop::collection::vec(
        (
            prop::collection::vec(prop::sample::select(&POOL[..]), 1..4),
            0..actions,
            prop::collection::vec(conditions(), 0..4),
        ),
        0..12,
    );
    let several = prop::collection::vec(action(), actions);
    (action(), several, rules, any::<[u8; 32]>()).prop_map(|(default, several, rules, digest)| {
        let rule = |(names, action, args): (Vec<&str>, usize, Vec<Condition>)| Rule {
            names: names.into_iter().map(ToOwned::to_owned).collect(),
            name: String::new(),
            action: several[action],
            errno_ret: None,
            args,
            includes: Circumstances::default(),
            excludes: Circumstances::default(),
        };
        Profile {
            name: "random".to_owned(),
            digest,
            default_action: default,
            default_errno_ret: None,
            architectures: ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]
                .map(ToOwned::to_owned)
                .to_vec(),
            arch_map: vec![],
            flags: None,
            listener_path: String::new(),
            syscalls: rules.into_iter().map(rule).collect(),
        }
    })
}

/// Calls that the profile has an opinion on, and some that it has not.
pub(in crate::runtime::seccomp) fn calls() -> impl Strategy<Value = Vec<(usize, Arch, [u64; 6])>> {
    let arch = prop_oneof![Just(Arch::X86_64), Just(Arch::X86), Just(Arch::X32)];
    let args = [value(), value(), value(), value(), value(), value()];
    prop::collection::vec((0..POOL.len(), arch, args), 1..64)
}

pub(in crate::runtime::seccomp) fn call(arch: Arch, number: u32, mut args: [u64; 6]) -> Call {
    if arch.is_narrow() {
        args = args.map(|arg| arg & 0xffff_ffff);
    }
    Call {
        audit: arch.audit(),
        number,
        args,
    }
}

fn holds(condition: &Condition, arch: Arch, args: &[u64; 6]) -> bool {
    let width = if arch.is_narrow() {
        0xffff_ffff
    } else {
        u64::MAX
    };
    let arg = args[condition.index as usize];
    let (value, second) = (condition.value & width, condition.value_two & width);
    match condition.op {
        Operator::Ne => arg != value,
        Operator::Lt => arg < value,
        Operator::Le => arg <= value,
        Operator::Eq => arg == value,
        Operator::Ge => arg >= value,
        Operator::Gt => arg > value,
        Operator::MaskedEq => arg & value == second & value,
    }
}

fn plain_verdict(action: Action) -> u32 {
    match action {
        Action::KillThread => 0,
        Action::KillProcess => KILL,
        Action::Trap => 0x0003_0000,
        Action::Errno => EPERM,
        Action::Trace => 0x7ff0_0001,
        Action::Log => 0x7ffc_0000,
        Action::Allow => ALLOW,
        Action::Notify => panic!("not generated"),
    }
}

/// Numbers of the pool; looking them up by name is slow in tests.
pub(in crate::runtime::seccomp) fn number(arch: Arch, name: &str) -> u32 {
    static NUMBERS: LazyLock<HashMap<(Arch, &str), u32>> = LazyLock::new(|| {
        let archs = [Arch::X86_64, Arch::X86, Arch::X32];
        archs
            .into_iter()
            .flat_map(|arch| POOL.map(|name| ((arch, name), arch.number(name).unwrap())))
            .collect()
    });
    NUMBERS[&(arch, name)]
}

/// What a profile means, read from its text.
fn meaning(profile: &Profile, arch: Arch, name: &str, args: &[u64; 6]) -> u32 {
    let default = plain_verdict(profile.default_action);
    let of_call: Vec<&Rule> = profile
        .syscalls
        .iter()
        .filter(|rule| rule.names.iter().any(|other| other == name))
        .filter(|rule| plain_verdict(rule.action) != default)
        .collect();
    if let Some(rule) = of_call.iter().find(|rule| rule.args.is_empty()) {
        return plain_verdict(rule.action);
    }
    for rule in of_call {
        let mut indices: Vec<u32> = rule.args.iter().map(|condition| condition.index).collect();
        indices.sort_unstable();
        let twice = indices.windows(2).any(|pair| pair[0] == pair[1]);
        let mut all = rule
            .args
            .iter()
            .map(|condition| holds(condition, arch, args));
        if if twice {
            all.any(|h| h)
        } else {
            all.all(|h| h)
        } {
            return plain_verdict(rule.action);
        }
    }
    let highest = profile
        .syscalls
        .iter()
        .flat_map(|rule| &rule.names)
        .map(|name| number(arch, name))
        .max();
    let strict = !matches!(profile.default_action, Action::Allow | Action::Log);
    if strict && highest.is_some_and(|highest| number(arch, name) > highest) {
        return ENOSYS;
    }
    default
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn programs_do_what_profiles_say(profile in profiles(4), calls in calls()) {
        let actions = actions();
        let target = Target {
            arch: Arch::X86_64,
            capabilities: 0,
            kernel: (6, 12),
            actions: &actions,
        };
        let resolved = resolve::resolve(&profile, &target).unwrap();
        let filter = program::assemble(&resolved).unwrap();
        for (index, arch, args) in calls {
            let name = POOL[index];
            let call = call(arch, number(arch, name), args);
            prop_assert_eq!(
                run(&filter.instructions, &call),
                meaning(&profile, arch, name, &call.args),
                "{:?} {} {:x?}", arch, name, call
            );
        }
    }
}

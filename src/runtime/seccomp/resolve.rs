//! From names to numbers: which rules count for a target, and what they say for each architecture.

use std::collections::BTreeMap;

use oci_spec::runtime as oci;

use crate::runtime::capabilities;
use crate::runtime::seccomp::profile::{Action, Condition, Operator, Profile, Rule};
use crate::runtime::seccomp::table::{ARM_PRIVATE, Arch};
use crate::runtime::seccomp::{Result, SeccompError, Target};
use crate::runtime::spec::host::release_of;

/// Largest error number of the kernel.
const MAX_ERRNO: u32 = 4095;
/// Error number where a profile gives none.
const EPERM: u32 = 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: the default, as speculation is not what the filter guards.
const SPEC_ALLOW: u32 = 4;
const FLAGS: [(&str, u32); 3] = [
    ("SECCOMP_FILTER_FLAG_TSYNC", 1),
    ("SECCOMP_FILTER_FLAG_LOG", 2),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", SPEC_ALLOW),
];

/// One way a system call can go: the value returned to the kernel, if all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// All must hold; empty: always.
    pub(crate) conditions: Vec<Condition>,
    /// `SECCOMP_RET_...` with its data.
    pub(crate) verdict: u32,
}

/// What a profile says for one architecture.
#[derive(Clone, Debug)]
pub(crate) struct ArchRules {
    /// Which.
    pub(crate) arch: Arch,
    /// By number; the first that holds counts, else the default.
    pub(crate) calls: BTreeMap<u32, Vec<Choice>>,
    /// Highest number mentioned.
    pub(crate) highest: Option<u32>,
}

/// A profile for one target.
#[derive(Clone, Debug)]
pub(crate) struct Resolved {
    /// Name of the profile.
    pub(crate) name: String,
    /// Verdict where nothing matches.
    pub(crate) default: u32,
    /// Numbers above the highest give `ENOSYS`.
    pub(crate) unknown_is_enosys: bool,
    /// Flags of seccomp(2).
    pub(crate) flags: u32,
    /// Architectures, the machine's own first.
    pub(crate) archs: Vec<ArchRules>,
    /// The rules that count, for the description.
    pub(crate) rules: Vec<Rule>,
    /// The profile's default action and error number, for the description.
    pub(crate) default_action: (Action, Option<u32>),
}

/// Resolves a profile.
///
/// # Errors
/// [`SeccompError`]: a value is wrong, or asks for what is not built or not offered by the kernel.
pub(crate) fn resolve(profile: &Profile, target: &Target<'_>) -> Result<Resolved> {
    let judge = Judge { profile, target };
    let default = judge.verdict(
        "defaultAction",
        profile.default_action,
        profile.default_errno_ret,
    )?;
    if !profile.listener_path.is_empty() {
        return Err(judge.unimplemented("listenerPath"));
    }
    let mut rules = vec![];
    for rule in &profile.syscalls {
        if judge.counts(rule)? {
            judge.check(rule)?;
            rules.push(rule.clone());
        }
    }
    let mut archs = vec![];
    for arch in judge.architectures()? {
        archs.push(judge.arch(arch, &rules, default)?);
    }
    Ok(Resolved {
        name: profile.name.clone(),
        default,
        unknown_is_enosys: !matches!(profile.default_action, Action::Allow | Action::Log),
        flags: judge.flags()?,
        archs,
        rules,
        default_action: (profile.default_action, profile.default_errno_ret),
    })
}

struct Judge<'a> {
    profile: &'a Profile,
    target: &'a Target<'a>,
}

impl Judge<'_> {
    fn invalid(&self, field: &str, value: impl ToString, problem: &'static str) -> SeccompError {
        SeccompError::Invalid {
            name: self.profile.name.clone(),
            field: field.to_owned(),
            value: value.to_string(),
            problem,
        }
    }

    fn unimplemented(&self, what: &'static str) -> SeccompError {
        SeccompError::Unimplemented {
            name: self.profile.name.clone(),
            what,
        }
    }

    fn verdict(&self, field: &str, action: Action, errno: Option<u32>) -> Result<u32> {
        let (value, name) = match action {
            Action::KillThread => (0, "kill_thread"),
            Action::KillProcess => (0x8000_0000, "kill_process"),
            Action::Trap => (0x0003_0000, "trap"),
            Action::Errno => (0x0005_0000, "errno"),
            Action::Trace => (0x7ff0_0000, "trace"),
            Action::Log => (0x7ffc_0000, "log"),
            Action::Allow => (0x7fff_0000, "allow"),
            Action::Notify => {
                return Err(self.unimplemented("SCMP_ACT_NOTIFY (a listener decides)"));
            }
        };
        if self.target.actions.iter().all(|known| known != name) {
            return Err(SeccompError::Kernel {
                name: self.profile.name.clone(),
                what: format!("seccomp action {name:?}"),
            });
        }
        let takes_data = matches!(action, Action::Errno | Action::Trace);
        match errno {
            None if takes_data => Ok(value | EPERM),
            None => Ok(value),
            Some(errno) if !takes_data => {
                let problem = "belongs to SCMP_ACT_ERRNO or SCMP_ACT_TRACE only; remove it";
                Err(self.invalid(&format!("errnoRet of {field}"), errno, problem))
            }
            Some(errno) if errno > MAX_ERRNO => {
                let problem = "is out of range; use 0 to 4095";
                Err(self.invalid(&format!("errnoRet of {field}"), errno, problem))
            }
            Some(errno) => Ok(value | errno),
        }
    }

    fn counts(&self, rule: &Rule) -> Result<bool> {
        let arch = self.target.arch.short_name();
        let has = |name: &String| {
            capabilities::mask(name).is_some_and(|bit| self.target.capabilities & bit != 0)
        };
        let (only, never) = (&rule.includes, &rule.excludes);
        let reached = |text: &str| -> Result<Option<bool>> {
            if text.is_empty() {
                return Ok(None);
            }
            let wanted = release_of(text);
            if wanted == (0, 0) {
                let problem = "is no version of a kernel; write it as in 4.8";
                return Err(self.invalid("minKernel", text, problem));
            }
            Ok(Some(self.target.kernel >= wanted))
        };
        Ok(
            (only.arches.is_empty() || only.arches.iter().any(|name| name == arch))
                && only.caps.iter().all(has)
                && reached(&only.min_kernel)? != Some(false)
                && never.arches.iter().all(|name| name != arch)
                && !never.caps.iter().any(has)
                && reached(&never.min_kernel)? != Some(true),
        )
    }

    fn check(&self, rule: &Rule) -> Result<()> {
        if !rule.name.is_empty() && !rule.names.is_empty() {
            let problem = "is given beside names; give only one of them";
            return Err(self.invalid("syscalls.name", &rule.name, problem));
        }
        match rule.args.iter().find(|condition| condition.index > 5) {
            Some(condition) => {
                let problem = "is no argument; use 0 to 5";
                Err(self.invalid("syscalls.args.index", condition.index, problem))
            }
            None => Ok(()),
        }
    }

    fn architectures(&self) -> Result<Vec<Arch>> {
        let (profile, own) = (self.profile, self.target.arch);
        if !profile.architectures.is_empty() && !profile.arch_map.is_empty() {
            let problem = "is given beside architectures; give only one of them";
            return Err(self.invalid("archMap", "", problem));
        }
        let of_map = profile
            .arch_map
            .iter()
            .filter(|entry| entry.architecture == own.name())
            .flat_map(|entry| &entry.sub_architectures);
        let named: Vec<&String> = profile.architectures.iter().chain(of_map).collect();
        // What this machine cannot run does not matter.
        let wanted = |arch: &&Arch| **arch == own || named.iter().any(|name| *name == arch.name());
        Ok(own.family().iter().filter(wanted).copied().collect())
    }

    fn flags(&self) -> Result<u32> {
        let Some(names) = &self.profile.flags else {
            return Ok(SPEC_ALLOW);
        };
        let mut flags = 0;
        for name in names {
            match FLAGS.iter().find(|(known, _)| known == name) {
                Some((_, flag)) => flags |= flag,
                None if name == "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => {
                    return Err(self.unimplemented("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"));
                }
                None => return Err(self.invalid("flags", name, "is no flag of seccomp(2)")),
            }
        }
        Ok(flags)
    }

    fn arch(&self, arch: Arch, rules: &[Rule], default: u32) -> Result<ArchRules> {
        let mut calls: BTreeMap<u32, Vec<Choice>> = BTreeMap::new();
        let mut highest = None;
        for rule in rules {
            let verdict = self.verdict("syscalls", rule.action, rule.errno_ret)?;
            let single = (!rule.name.is_empty()).then_some(&rule.name);
            for name in rule.names.iter().chain(single) {
                let Some(number) = arch.number(name) else {
                    continue; // of another architecture or a newer kernel
                };
                if !(arch == Arch::Arm && number >= ARM_PRIVATE) {
                    highest = highest.max(Some(number));
                }
                if verdict != default {
                    add(calls.entry(number).or_default(), &rule.args, verdict, arch);
                }
            }
        }
        Ok(ArchRules {
            arch,
            calls,
            highest,
        })
    }
}

/// Adds a rule's choices to those of a call; one without conditions ends all discussion.
fn add(choices: &mut Vec<Choice>, args: &[Condition], verdict: u32, arch: Arch) {
    if choices.iter().any(|choice| choice.conditions.is_empty()) {
        return;
    }
    let mut conditions = args.to_vec();
    for condition in &mut conditions {
        if arch.is_narrow() {
            condition.value &= u64::from(u32::MAX);
            condition.value_two &= u64::from(u32::MAX);
        }
        if condition.op == Operator::MaskedEq {
            // Bits outside the mask are not compared.
            condition.value_two &= condition.value;
        }
    }
    if conditions.is_empty() {
        choices.clear();
    }
    let twice = |condition: &Condition| {
        conditions
            .iter()
            .filter(|other| other.index == condition.index)
            .count()
            > 1
    };
    if conditions.iter().any(twice) {
        for condition in conditions {
            choices.push(Choice {
                conditions: vec![condition],
                verdict,
            });
        }
    } else {
        choices.push(Choice {
            conditions,
            verdict,
        });
    }
}

fn action(action: Action) -> oci::LinuxSeccompAction {
    match action {
        Action::KillThread => oci::LinuxSeccompAction::ScmpActKillThread,
        Action::KillProcess => oci::LinuxSeccompAction::ScmpActKillProcess,
        Action::Trap => oci::LinuxSeccompAction::ScmpActTrap,
        Action::Errno => oci::LinuxSeccompAction::ScmpActErrno,
        Action::Notify => oci::LinuxSeccompAction::ScmpActNotify,
        Action::Trace => oci::LinuxSeccompAction::ScmpActTrace,
        Action::Log => oci::LinuxSeccompAction::ScmpActLog,
        Action::Allow => oci::LinuxSeccompAction::ScmpActAllow,
    }
}

fn operator(operator: Operator) -> oci::LinuxSeccompOperator {
    match operator {
        Operator::Ne => oci::LinuxSeccompOperator::ScmpCmpNe,
        Operator::Lt => oci::LinuxSeccompOperator::ScmpCmpLt,
        Operator::Le => oci::LinuxSeccompOperator::ScmpCmpLe,
        Operator::Eq => oci::LinuxSeccompOperator::ScmpCmpEq,
        Operator::Ge => oci::LinuxSeccompOperator::ScmpCmpGe,
        Operator::Gt => oci::LinuxSeccompOperator::ScmpCmpGt,
        Operator::MaskedEq => oci::LinuxSeccompOperator::ScmpCmpMaskedEq,
    }
}

fn description_of_rule(rule: &Rule) -> Option<oci::LinuxSyscall> {
    let single = (!rule.name.is_empty()).then(|| rule.name.clone());
    let names: Vec<String> = rule.names.iter().cloned().chain(single).collect();
    let argument = |condition: &Condition| {
        let mut builder = oci::LinuxSeccompArgBuilder::default()
            .index(usize::try_from(condition.index).unwrap_or_default())
            .value(condition.value)
            .op(operator(condition.op));
        if condition.op == Operator::MaskedEq {
            builder = builder.value_two(condition.value_two);
        }
        builder.build().ok()
    };
    let args: Vec<_> = rule.args.iter().filter_map(argument).collect();
    let mut builder = oci::LinuxSyscallBuilder::default()
        .names(names)
        .action(action(rule.action));
    if let Some(errno) = rule.errno_ret {
        builder = builder.errno_ret(errno);
    }
    if !args.is_empty() {
        builder = builder.args(args);
    }
    builder.build().ok()
}

/// The resolved profile as the OCI spec says it.
pub(crate) fn describe(resolved: &Resolved) -> oci::LinuxSeccomp {
    let arch = |rules: &ArchRules| match rules.arch {
        Arch::X86_64 => oci::Arch::ScmpArchX86_64,
        Arch::X86 => oci::Arch::ScmpArchX86,
        Arch::X32 => oci::Arch::ScmpArchX32,
        Arch::Aarch64 => oci::Arch::ScmpArchAarch64,
        Arch::Arm => oci::Arch::ScmpArchArm,
    };
    let flags = [
        (1, oci::LinuxSeccompFilterFlag::SeccompFilterFlagTsync),
        (2, oci::LinuxSeccompFilterFlag::SeccompFilterFlagLog),
        (
            SPEC_ALLOW,
            oci::LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow,
        ),
    ];
    let flags = flags
        .into_iter()
        .filter_map(|(bit, flag)| (resolved.flags & bit != 0).then_some(flag));
    let mut made = oci::LinuxSeccomp::default();
    made.set_default_action(action(resolved.default_action.0))
        .set_default_errno_ret(resolved.default_action.1)
        .set_architectures(Some(resolved.archs.iter().map(arch).collect()))
        .set_flags(Some(flags.collect()))
        .set_syscalls(Some(
            resolved
                .rules
                .iter()
                .filter_map(description_of_rule)
                .collect(),
        ));
    made
}

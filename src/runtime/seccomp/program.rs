//! From numbers to classic BPF. Kernel: seccomp(2), Documentation/userspace-api/seccomp_filter.rst.
//!
//! ```text
//! load arch
//!   == own?    load number; binary search over ranges of numbers with the same verdict
//!                leaf: return, or: conditions of the first choice ... return, next choice ..., return
//!   == other?  the same
//!   else       kill the process
//! ```
//!
//! Numbers of `x86_64` and x32 share one search, as they share the architecture's code.

use crate::runtime::plan::SeccompFilter;
use crate::runtime::seccomp::profile::{Condition, Operator};
use crate::runtime::seccomp::resolve::{ArchRules, Choice, Resolved};
use crate::runtime::seccomp::table::{ARM_PRIVATE, Arch, X32_BIT};
use crate::runtime::seccomp::{Result, SeccompError};

/// One instruction: (code, jump if true, jump if false, constant).
pub(crate) type Instruction = (u16, u8, u8, u32);

/// Longest program of the kernel (`BPF_MAXINSNS`).
const MAX_LENGTH: usize = 4096;
/// `A = word at k of seccomp_data`.
const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GT: u16 = 0x25;
const JUMP_GE: u16 = 0x35;
/// Offsets in `seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGS: u32 = 16;

const KILL_PROCESS: u32 = 0x8000_0000;
const ENOSYS: u32 = 0x0005_0000 | 38;

/// What a range of numbers gives.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Leaf {
    Return(u32),
    Choices(Vec<Choice>),
}

/// Makes the program of a resolved profile.
///
/// # Errors
/// [`SeccompError::TooLong`]: it has more than 4096 instructions.
pub(crate) fn assemble(resolved: &Resolved) -> Result<SeccompFilter> {
    let mut program: Vec<Instruction> = vec![(LOAD, 0, 0, ARCH)];
    for rules in &resolved.archs {
        if rules.arch == Arch::X32 {
            continue; // with X86_64
        }
        let mut leaves = leaves(rules, resolved);
        if rules.arch == Arch::X86_64 {
            match resolved.archs.iter().find(|other| other.arch == Arch::X32) {
                Some(x32) => leaves.append(&mut self::leaves(x32, resolved)),
                None => {
                    leaves.push((X32_BIT, Leaf::Return(KILL_PROCESS)));
                    // A tracer that skips a call sets its number to -1.
                    leaves.push((u32::MAX, Leaf::Return(resolved.default)));
                }
            }
        }
        leaves.dedup_by(|next, kept| next.1 == kept.1);
        let mut block = vec![(LOAD, 0, 0, NUMBER)];
        block.append(&mut search(&leaves, resolved.default));
        program.push((JUMP_EQ, 1, 0, rules.arch.audit()));
        program.push((JUMP, 0, 0, offset(block.len())));
        program.append(&mut block);
    }
    program.push((RETURN, 0, 0, KILL_PROCESS));
    if program.len() > MAX_LENGTH {
        return Err(SeccompError::TooLong {
            name: resolved.name.clone(),
            length: program.len(),
        });
    }
    Ok(SeccompFilter {
        instructions: program,
        flags: resolved.flags,
    })
}

fn offset(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// (first number, what it and the next ones give), in order, from the lowest number of the architecture.
fn leaves(rules: &ArchRules, resolved: &Resolved) -> Vec<(u32, Leaf)> {
    let first = if rules.arch == Arch::X32 { X32_BIT } else { 0 };
    let mut leaves = vec![];
    let mut next = Some(first);
    let unlisted = |from: Option<u32>, to: Option<u32>, leaves: &mut Vec<(u32, Leaf)>| {
        // from..to is not listed; above the highest number mentioned it is unknown to the profile.
        let Some(from) = from.filter(|from| to.is_none_or(|to| *from < to)) else {
            return;
        };
        let unknown = match rules.highest {
            Some(highest) if resolved.unknown_is_enosys => highest.checked_add(1),
            _ => None,
        };
        match unknown.filter(|unknown| to.is_none_or(|to| *unknown < to)) {
            None => leaves.push((from, Leaf::Return(resolved.default))),
            Some(unknown) => {
                if from < unknown {
                    leaves.push((from, Leaf::Return(resolved.default)));
                }
                leaves.push((from.max(unknown), Leaf::Return(ENOSYS)));
                let private = rules.arch == Arch::Arm && to.is_none_or(|to| to > ARM_PRIVATE);
                if private && from < ARM_PRIVATE {
                    leaves.push((ARM_PRIVATE, Leaf::Return(resolved.default)));
                }
            }
        }
    };
    for (number, choices) in &rules.calls {
        unlisted(next, Some(*number), &mut leaves);
        let leaf = match choices.as_slice() {
            [only] if only.conditions.is_empty() => Leaf::Return(only.verdict),
            _ => Leaf::Choices(choices.clone()),
        };
        leaves.push((*number, leaf));
        next = number.checked_add(1);
    }
    unlisted(next, None, &mut leaves);
    leaves
}

/// Binary search; every path returns.
fn search(leaves: &[(u32, Leaf)], default: u32) -> Vec<Instruction> {
    match leaves {
        [] => vec![(RETURN, 0, 0, default)],
        [(_, Leaf::Return(verdict))] => vec![(RETURN, 0, 0, *verdict)],
        [(_, Leaf::Choices(choices))] => {
            let mut code: Vec<Instruction> = choices.iter().flat_map(choice).collect();
            code.push((RETURN, 0, 0, default));
            code
        }
        _ => {
            let (low, high) = leaves.split_at(leaves.len() / 2);
            let pivot = high.first().map_or(0, |(number, _)| *number);
            let (mut low, mut high) = (search(low, default), search(high, default));
            let mut code = match u8::try_from(low.len()) {
                Ok(length) => vec![(JUMP_GE, length, 0, pivot)],
                Err(_) => vec![(JUMP_GE, 0, 1, pivot), (JUMP, 0, 0, offset(low.len()))],
            };
            code.append(&mut low);
            code.append(&mut high);
            code
        }
    }
}

/// Returns the verdict if all conditions hold, else goes on behind it.
fn choice(choice: &Choice) -> Vec<Instruction> {
    let mut code = vec![(RETURN, 0, 0, choice.verdict)];
    for test in choice.conditions.iter().rev() {
        let mut all = condition(test, code.len());
        all.append(&mut code);
        code = all;
    }
    code
}

/// Where a comparison goes.
#[derive(Clone, Copy)]
enum To {
    /// The next instruction.
    Next,
    /// Behind this condition: it holds.
    Holds,
    /// Behind the choice: it does not hold.
    Fails,
}

/// Code of one condition, with `rest` instructions of the choice behind it.
fn condition(condition: &Condition, rest: usize) -> Vec<Instruction> {
    use To::{Fails, Holds, Next};
    let low_word = ARGS + 8 * condition.index;
    let halves = |value: u64| {
        let low = u32::try_from(value & u64::from(u32::MAX)).unwrap_or_default();
        let high = u32::try_from(value >> 32).unwrap_or_default();
        (high, low)
    };
    let (high, low) = halves(condition.value);
    let load_high = (LOAD, Next, Next, low_word + 4);
    let load_low = (LOAD, Next, Next, low_word);
    let code: Vec<(u16, To, To, u32)> = match condition.op {
        Operator::Eq => vec![
            load_high,
            (JUMP_EQ, Next, Fails, high),
            load_low,
            (JUMP_EQ, Holds, Fails, low),
        ],
        Operator::Ne => vec![
            load_high,
            (JUMP_EQ, Next, Holds, high),
            load_low,
            (JUMP_EQ, Fails, Holds, low),
        ],
        Operator::Gt | Operator::Ge => vec![
            load_high,
            (JUMP_GT, Holds, Next, high),
            (JUMP_EQ, Next, Fails, high),
            load_low,
            (
                if condition.op == Operator::Gt {
                    JUMP_GT
                } else {
                    JUMP_GE
                },
                Holds,
                Fails,
                low,
            ),
        ],
        Operator::Lt | Operator::Le => vec![
            load_high,
            (JUMP_GT, Fails, Next, high),
            (JUMP_EQ, Next, Holds, high),
            load_low,
            (
                if condition.op == Operator::Lt {
                    JUMP_GE
                } else {
                    JUMP_GT
                },
                Fails,
                Holds,
                low,
            ),
        ],
        Operator::MaskedEq => {
            let (wanted_high, wanted_low) = halves(condition.value_two);
            vec![
                load_high,
                (AND, Next, Next, high),
                (JUMP_EQ, Next, Fails, wanted_high),
                load_low,
                (AND, Next, Next, low),
                (JUMP_EQ, Holds, Fails, wanted_low),
            ]
        }
    };
    let length = code.len();
    let place = |(at, (kind, on_true, on_false, k)): (usize, (u16, To, To, u32))| {
        // At most 6 conditions of 6 instructions: every distance fits.
        let distance = |to| match to {
            Next => 0,
            Holds => length - at - 1,
            Fails => length - at - 1 + rest,
        };
        let jump = |to| u8::try_from(distance(to)).unwrap_or(u8::MAX);
        (kind, jump(on_true), jump(on_false), k)
    };
    code.into_iter().enumerate().map(place).collect()
}

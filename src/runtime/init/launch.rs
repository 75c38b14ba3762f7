//! The end of a maker: a child that stays out of the PID namespace where others live, and lets what executes be born there
//! when all is done (`sys::launch`). What the born process must not do itself is done here, before it: it has the
//! container's root, namespaces, ids and capabilities from birth, the standard streams, and no other descriptor.
//!
//! A filter needs `CAP_SYS_ADMIN` or no_new_privs. With the latter the born process installs it, exactly as the profile is.
//! Without, the maker does, and what is born has it from its first instruction; the three calls that it makes then, besides
//! its exec, pass by a secret in an argument that they do not have (`gate`).

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::runtime::create::CreateRequest;
use crate::runtime::plan::{Context, Fault, NamespaceSource, Namespaces, ProcessPlan, Tuning};
use crate::sys::exec::Image;
use crate::sys::file::{self, CWD, Mode, OFlags};
use crate::sys::launch::{self, Birth, GATED, Prepared, Shared, Stage};
use crate::sys::process::exit_now;
use crate::sys::seccomp::{Filter, Instruction};
use crate::sys::{fd, ns, random};

use super::Step;
use super::process::{self, Capabilities, EACCES, ENOENT, ENOTDIR, search_path};

const STAGE: &str = "launch";

/// What a maker keeps until its end.
#[derive(Debug)]
pub(super) struct Launch<'a> {
    /// The PID namespace of what is born. Itself, for by a pidfd it could be entered only by who may trace that process.
    namespace: OwnedFd,
    /// This process's mappings, opened while a procfs was in sight.
    maps: OwnedFd,
    shared: &'a Shared,
    /// What the born process is given when it has executed.
    late: Option<Tuning>,
}

/// What a maker leaves for `create::born`: the words of a failure of its exec.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::runtime) struct Names {
    /// The program as the plan names it.
    pub(in crate::runtime) name: String,
    /// Where it is looked for; empty: it is a path.
    pub(in crate::runtime) path: String,
    /// What is still to be set.
    pub(in crate::runtime) late: Option<Tuning>,
}

impl<'a> Launch<'a> {
    /// While the node's `/proc` is in sight. `of`: a pidfd of a process in the PID namespace, or that namespace.
    pub(super) fn new(of: BorrowedFd<'_>, shared: &'a Shared) -> Result<Self, Fault> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let maps = file::openat(CWD, "/proc/self/maps", flags, Mode::empty());
        Ok(Self {
            namespace: pid_namespace(of)?,
            maps: maps.context(STAGE, "open", "/proc/self/maps")?,
            shared,
            late: None,
        })
    }

    /// Keeps what no fork passes on for the born process.
    pub(super) fn hold_back(&mut self, tuning: &mut Tuning) {
        self.late = process::take_late(tuning);
    }

    /// As [`Launch::new`], of a plan; absent: nobody else lives in its PID namespace.
    pub(super) fn of_plan(
        namespaces: &Namespaces,
        request: &CreateRequest<'_>,
        shared: Option<&'a Shared>,
    ) -> Result<Option<Self>, Fault> {
        let Some(shared) = shared else {
            return Ok(None);
        };
        let opened;
        let of = match &namespaces.pid {
            NamespaceSource::Pod => request.pause,
            NamespaceSource::Container(_) => request.target,
            NamespaceSource::Path(path) => {
                opened = std::fs::File::open(path).context(STAGE, "open", path.display())?;
                Some(opened.as_fd())
            }
            _ => None,
        };
        let missing = || {
            Fault::check(
                STAGE,
                "pid namespace",
                format_args!("{:?}: not given", namespaces.pid),
            )
        };
        Self::new(of.ok_or_else(missing)?, shared).map(Some)
    }

    /// The PID namespace of what is born.
    pub(super) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Drops what is left of rights, gives birth, and ends. It comes back only where that failed while the control socket
    /// is open.
    pub(super) fn run(
        &self,
        plan: &ProcessPlan,
        image: &Image,
        last: &Capabilities,
        programs: &[CString],
    ) -> Result<Infallible, Fault> {
        self.run_as(self.shared, plan, image, last, programs)
    }

    /// What a child of this process needs of it to be a maker too.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.namespace.as_fd(), self.maps.as_fd()]
    }

    /// As [`Launch::run`], for a child that this process cloned with [`Launch::descriptors`] and pages of their own: what is
    /// born is a child of this process. Without a terminal.
    pub(super) fn run_as(
        &self,
        shared: &Shared,
        plan: &ProcessPlan,
        image: &Image,
        last: &Capabilities,
        programs: &[CString],
    ) -> Result<Infallible, Fault> {
        if let Some(filter) = &plan.seccomp {
            let exec = [None, None, None, Some(0), Some(0), Some(0)];
            process::judge(filter, exec, !plan.no_new_privs)?;
        }
        let secret = u64::from_ne_bytes(random::bytes().context(STAGE, "getrandom", "")?);
        let flags = plan.seccomp.as_ref().map_or(0, |filter| filter.flags);
        let own = plan.seccomp.as_ref().filter(|_| plan.no_new_privs);
        let own = own.map(|filter| Filter::new(&filter.instructions));
        let ours = plan.seccomp.as_ref().filter(|_| !plan.no_new_privs);
        let ours = ours.map(|filter| Filter::new(&gated(&filter.instructions, secret)));
        let own_program = std::ptr::eq(shared, self.shared);
        let names = match programs.first().filter(|_| !own_program) {
            Some(program) => Names::of_file(program),
            None => Names {
                late: self.late.clone(),
                ..Names::of(plan)
            },
        };
        let names = postcard::to_allocvec(&names);
        let names = names.map_err(|error| Fault::check(STAGE, "encode", error))?;
        ns::enter(self.namespace.as_fd(), ns::flag::PID).context(
            STAGE,
            "setns",
            "pid namespace",
        )?;
        if ours.is_none() {
            last.apply()?;
        }
        let prepared = launch::prepare(
            shared,
            &Birth {
                programs,
                arguments: image.arguments(),
                environment: image.environment(),
                terminal: plan.terminal && own_program,
                filter: own.as_ref().map(|filter| (filter, flags)),
                secret,
                maps: self.maps.as_fd(),
            },
        );
        let prepared = prepared.context(STAGE, "prepare", "memory of the process")?;
        // This process leaves by `exit_now`: nobody drops what is closed here.
        fd::close_from(3).context(STAGE, "close_range", "")?;
        shared.leave(&names);
        shared.set_stage(Stage::Confining);
        if let Err(fault) = confine_and_go(
            shared,
            &prepared,
            ours.as_ref().map(|filter| (filter, flags)),
            last,
            programs,
        ) {
            if let Ok(note) = postcard::to_allocvec(&fault) {
                shared.leave(&note);
            }
            shared.set_stage(Stage::Failed);
        }
        exit_now(0)
    }
}

/// From the filter on no memory is allocated unless something fails: who knows what the profile refuses.
fn confine_and_go(
    shared: &Shared,
    prepared: &Prepared<'_>,
    filter: Option<(&Filter, u32)>,
    last: &Capabilities,
    programs: &[CString],
) -> Step {
    if let Some((filter, flags)) = filter {
        filter
            .install(flags)
            .context("seccomp", "seccomp", "filter of the profile")?;
        last.apply()?;
    }
    prepared
        .go()
        .context("clone", "clone", "into the PID namespace of the container")?;
    shared.set_stage(Stage::Over);
    // The profile may end this process here.
    if shared.failure().is_some()
        && let Some(index) = programs
            .iter()
            .position(|program| file::stat(program).is_ok())
    {
        shared.set_present(index);
    }
    Ok(())
}

impl Names {
    fn of_file(program: &CStr) -> Self {
        Self {
            name: program.to_string_lossy().into_owned(),
            path: String::new(),
            late: None,
        }
    }

    fn of(plan: &ProcessPlan) -> Self {
        const MAX_NAME: usize = 256;
        const MAX_PATH: usize = 2048;
        let cut = |text: &str, most: usize| text[..text.floor_char_boundary(most)].to_owned();
        let name = plan.args.first().map_or("", String::as_str);
        let path = match name.contains('/') {
            true => String::new(),
            false => String::from_utf8_lossy(search_path(plan)).into_owned(),
        };
        Self {
            name: cut(name, MAX_NAME),
            path: cut(&path, MAX_PATH),
            late: None,
        }
    }
}

/// The PID namespace itself, of a pidfd: opened through a visit, which moves no process.
fn pid_namespace(of: BorrowedFd<'_>) -> Result<OwnedFd, Fault> {
    let open = |path: &str| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        file::openat(CWD, path, flags, Mode::empty()).context(STAGE, "open", path)
    };
    let own = open("/proc/self/ns/pid")?;
    ns::enter(of, ns::flag::PID).context(STAGE, "setns", "pid namespace")?;
    let found = open("/proc/self/ns/pid_for_children");
    ns::enter(own.as_fd(), ns::flag::PID).context(STAGE, "setns", "own pid namespace")?;
    found
}

/// A filter that lets the calls of a birth pass where their last argument is the secret; everything else goes on to
/// `program`. The number comes first, so that the kernel still knows of every other call that its arguments do not matter.
fn gated(program: &[Instruction], secret: u64) -> Vec<Instruction> {
    const LOAD: u16 = 0x20;
    const JUMP_EQ: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    let argument = |index: u32| 16 + 8 * index;
    #[cfg(target_arch = "x86_64")]
    const OWN: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const OWN: u32 = 0xc000_00b7;
    let [a, b, c, d, e, f, g, h] = secret.to_le_bytes();
    let (low, high) = (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    );
    let mut gate: Vec<Instruction> = Vec::new();
    // Jumps to the profile are filled in when its place is known.
    let mut to_profile: Vec<usize> = Vec::new();
    gate.push((LOAD, 0, 0, ARCH));
    to_profile.push(gate.len());
    gate.push((JUMP_EQ, 0, 0, OWN));
    for (number, condition) in GATED {
        gate.push((LOAD, 0, 0, NUMBER));
        let mut checks: Vec<Instruction> = Vec::new();
        let wanted = [(argument(5), low), (argument(5) + 4, high)];
        let condition = condition.map(|(index, value)| (argument(index), value));
        for (offset, value) in wanted.into_iter().chain(condition) {
            checks.push((LOAD, 0, 0, offset));
            checks.push((JUMP_EQ, 0, 0, value));
        }
        checks.push((RETURN, 0, 0, ALLOW));
        let past = u8::try_from(checks.len()).unwrap_or(u8::MAX);
        gate.push((JUMP_EQ, 0, past, number));
        for check in checks {
            if check.0 == JUMP_EQ {
                to_profile.push(gate.len());
            }
            gate.push(check);
        }
    }
    let length = gate.len();
    for at in to_profile {
        gate[at].2 = u8::try_from(length - at - 1).unwrap_or(u8::MAX);
    }
    gate.extend_from_slice(program);
    gate
}

/// What became of a process whose maker has ended. `Ok`: it executed its program, or was ended by somebody else; what is still
/// to be set on it ([`finish`]).
///
/// # Errors
/// Why it did not.
pub(in crate::runtime) fn outcome(shared: &Shared) -> Result<Option<Tuning>, Fault> {
    let note = shared.note();
    match shared.stage() {
        Stage::Early => {
            let what = "the process ended before it was ready";
            Err(Fault::check(STAGE, "check", what))
        }
        Stage::Failed => Err(postcard::from_bytes(&note)
            .unwrap_or_else(|error| Fault::check(STAGE, "decode", error))),
        Stage::Confining => {
            let what = "the process ended as it was confined: does the seccomp profile refuse what starts a program (capset, prctl, clone)?";
            Err(Fault::check("seccomp", "check", what))
        }
        Stage::Over => {
            let names: Names = postcard::from_bytes(&note)
                .map_err(|error| Fault::check(STAGE, "decode", error))?;
            match shared.failure() {
                Some(failure) => Err(names.fault(failure, shared.present())),
                None => Ok(names.late),
            }
        }
    }
}

/// Sets what no fork passes on.
///
/// # Errors
/// The number of `sched_setattr(2)`.
pub(in crate::runtime) fn finish(pid: u32, late: &Tuning) -> Step {
    process::set_priorities(pid, late)
}

impl Names {
    fn fault(&self, failure: launch::Failure, present: Option<usize>) -> Fault {
        let error = std::io::Error::from_raw_os_error;
        let (index, number) = match failure {
            launch::Failure::Terminal(number) => {
                return Fault::call("terminal", "ioctl", "TIOCSCTTY", &error(number));
            }
            launch::Failure::Filter(number) => {
                return Fault::call(
                    "seccomp",
                    "seccomp",
                    "filter of the profile",
                    &error(number),
                );
            }
            launch::Failure::Execute(index, number) => (index, number),
        };
        let missing = matches!(number, ENOENT | ENOTDIR);
        let program = |index: usize| {
            let directory = self
                .path
                .split(':')
                .nth(index)
                .filter(|_| !self.path.is_empty());
            match directory {
                None => self.name.clone(),
                Some("") => format!("./{}", self.name),
                Some(directory) => format!("{directory}/{}", self.name),
            }
        };
        let what = match present {
            // The file is there: its interpreter or loader is not.
            Some(index) if missing => format!("{:?} (its interpreter is missing)", program(index)),
            _ if missing && !self.path.is_empty() => {
                format!("{:?} (in PATH {})", self.name, self.path)
            }
            _ if number == EACCES && !self.path.is_empty() => {
                format!("{:?} (in PATH {})", self.name, self.path)
            }
            _ => format!("{:?}", program(index)),
        };
        Fault::call("exec", "execve", what, &error(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program over (number, arch, six arguments): the least that filters of these tests need.
    fn judge(program: &[Instruction], number: u32, arch: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&arch.to_le_bytes());
        for (index, argument) in arguments.iter().enumerate() {
            data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let (code, yes, no, k) = program[at];
            at += 1;
            match code {
                0x20 => {
                    let offset = usize::try_from(k).unwrap();
                    accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
                }
                0x15 => at += usize::from(if accumulator == k { yes } else { no }),
                0x06 => return k,
                other => panic!("{other:#x}"),
            }
        }
    }

    #[test]
    fn only_the_secret_opens_the_gate_and_only_for_three_calls() {
        const SECRET: u64 = 0x0123_4567_89ab_cdef;
        const REFUSE: u32 = 0x0005_0001;
        let native = if cfg!(target_arch = "x86_64") {
            0xc000_003e
        } else {
            0xc000_00b7
        };
        let program = gated(&[(0x06, 0, 0, REFUSE)], SECRET);
        let judged = |number, arch, arguments| judge(&program, number, arch, arguments);
        for (number, condition) in GATED {
            let mut right = [0; 6];
            right[5] = SECRET;
            if let Some((index, value)) = condition {
                right[usize::try_from(index).unwrap()] = u64::from(value);
            }
            assert_eq!(judged(number, native, right), 0x7fff_0000, "{number}");
            assert_eq!(
                judged(number, 0x4000_0003, right),
                REFUSE,
                "another architecture"
            );
            for bit in 0..64 {
                let mut wrong = right;
                wrong[5] ^= 1 << bit;
                assert_eq!(judged(number, native, wrong), REFUSE, "{number}, bit {bit}");
            }
            if let Some((index, _)) = condition {
                let mut wrong = right;
                wrong[usize::try_from(index).unwrap()] ^= 0x11;
                assert_eq!(
                    judged(number, native, wrong),
                    REFUSE,
                    "{number}, argument {index}"
                );
            }
        }
        for number in (0..500).filter(|number| GATED.iter().all(|gated| gated.0 != *number)) {
            assert_eq!(judged(number, native, [SECRET; 6]), REFUSE, "{number}");
        }
    }
}

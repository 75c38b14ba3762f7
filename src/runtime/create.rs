//! From a plan to a process: the parent's half. Called by the monitor, which has one thread.
//!
//! ```text
//! monitor                                             child (cloned, one thread, own memory)
//!   | spawn(): clone3 ------------------------------->  |  decodes the plan, joins, mounts, pivots, ...
//!   |  <- Moved{pid} + pidfd, then one byte back ------- |  only with a user namespace and a PID namespace of its own
//!   |  <- Mounted, then one byte back ----------------- |  only with hooks in the monitor's namespaces: see `hooks`
//!   |  <- Ready{uid, gid, groups} (+ pty master) ------ |  over the control socket
//!   | start(): one byte ----------------------------->  |  seccomp, execve
//!   |  <- end of file: the exec happened -------------- |
//!   |  <- Failed(fault), then its exit ---------------- |  at any time instead
//! ```
//! Where others live in the PID namespace (an exec; a PID namespace of the pod or of another container), the child stays in
//! the monitor's, where they cannot see it, and what is seen is born last, as a child of the monitor: see `sys::launch`.
//! ```text
//!   | start(): one byte ----------------------------->  |  copies what its program needs
//!   |  <- end of file: no word comes any more --------- |  filter, last fork ------------> born: execve
//!   |  <- its exit: Spawned::launch tells the rest ---- |  <- memory released -----------
//! ```
//! Pause does not wait for its start, and reports nothing else when all goes well: end of file is its success.
//!
//! A PID namespace that a user namespace shall own must be made from inside it, but layers and volumes are mapped and opened
//! from outside: the child does the latter, enters, and goes on as a sibling of its own.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::init;
use crate::runtime::plan::{Context, Fault, NamespaceSource, Preamble, Report, Tuning};
use crate::sys::file::{self, Mode, OFlags};
use crate::sys::launch::Shared;
use crate::sys::{clone, credentials, memfd, ns, socket};

pub(crate) use crate::runtime::init::NOT_STARTED;

/// Largest encoded [`Report`].
pub(crate) const MAX_REPORT: usize = 128 * 1024;

/// What makes one process.
#[derive(Debug)]
pub(crate) struct CreateRequest<'a> {
    /// Memory file with an encoded `Plan`.
    pub(crate) plan: BorrowedFd<'a>,
    /// Pidfd of the pod's pause; absent for pause itself.
    pub(crate) pause: Option<BorrowedFd<'a>>,
    /// Network namespace, where the plan says `Passed`.
    pub(crate) network: Option<BorrowedFd<'a>>,
    /// User namespace of the pod, where the plan names one.
    pub(crate) user: Option<BorrowedFd<'a>>,
    /// Pidfd of the first process of the container that the plan's `Container` names (see `Preamble::pid`).
    pub(crate) target: Option<BorrowedFd<'a>>,
    /// stdin, stdout, stderr; unused with a terminal.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
}

/// A process that was cloned and is on its way.
#[derive(Debug)]
pub(crate) struct Spawned {
    /// For display and /proc links.
    pub(crate) pid: u32,
    /// Its identity; it is a child of the caller.
    pub(crate) pidfd: OwnedFd,
    /// Control socket (`SOCK_SEQPACKET`, close-on-exec, blocking): see [`receive`] and [`start`]. Dropped before
    /// `start`, the process ends.
    pub(crate) control: OwnedFd,
    /// The process is a maker, and what executes is born after its start: with this the maker tells of it.
    pub(crate) launch: Option<Shared>,
}

/// What comes from the control socket.
#[derive(Debug)]
pub(crate) enum Received {
    /// A report; the master of its terminal with `Ready`, if it has one.
    Report(Report, Option<OwnedFd>),
    /// It goes on as this process, a child of the caller too, which waits for [`proceed`]. The one before ends and is to be
    /// reaped.
    Moved {
        /// For display and /proc links.
        pid: u32,
        /// Its identity.
        pidfd: OwnedFd,
    },
    /// It executed its program, or ended without a word: the pidfd tells.
    Closed,
}

/// Clones a process that follows the plan up to its exec.
///
/// # Errors
/// What failed before or in the clone. No process is left then. Later failures come by [`receive`].
pub(crate) fn spawn(request: CreateRequest<'_>) -> Result<Spawned, Fault> {
    let preamble = preamble(request.plan)?;
    let owned = preamble.user != NamespaceSource::Host;
    if owned && request.user.is_none() {
        let what = "the pod's is not given";
        return Err(Fault::check("clone", "user namespace", what));
    }
    let place = match &preamble.pid {
        // With a user namespace the child makes it itself, inside that.
        NamespaceSource::New if !owned => Place::New,
        NamespaceSource::Host | NamespaceSource::New => Place::Ours,
        _ => Place::Others(shared()?),
    };
    let mut descriptors = vec![request.plan];
    descriptors.extend(request.stdio);
    descriptors.extend(request.pause);
    descriptors.extend(request.network);
    descriptors.extend(request.user);
    descriptors.extend(request.target);
    clone_child(place, &preamble, &descriptors, |control, joined, launch| {
        init::create(&request, control, joined, launch)
    })
}

/// Pages for what is born among others.
///
/// # Errors
/// No memory.
pub(super) fn shared() -> Result<Shared, Fault> {
    Shared::new().context("clone", "mmap", "shared page")
}

/// What became of a process that was to be born; its maker has been reaped. `Ok`: it executed, or somebody ended it; what is
/// still to be set on it ([`finish`]).
///
/// # Errors
/// Why it did not execute.
pub(crate) fn born(launch: &Shared) -> Result<Option<Tuning>, Fault> {
    init::launch::outcome(launch)
}

/// Sets on a process that was born what no fork passes on.
///
/// # Errors
/// The number of `sched_setattr(2)`.
pub(crate) fn finish(pid: u32, late: &Tuning) -> Result<(), Fault> {
    init::launch::finish(pid, late)
}

/// Reads the front of an encoded plan.
///
/// # Errors
/// The number of `pread(2)`, or bytes that are no plan.
pub(crate) fn preamble(plan: BorrowedFd<'_>) -> Result<Preamble, Fault> {
    let bytes = memfd::read_front(plan, Preamble::MAX).context("clone", "pread", "plan")?;
    let (preamble, _plan) =
        Preamble::decode(&bytes).map_err(|error| Fault::check("clone", "decode plan", error))?;
    Ok(preamble)
}

/// Where a new process comes to live.
pub(crate) enum Place {
    /// In the caller's PID namespace.
    Ours,
    /// In a new one.
    New,
    /// In one where others live: the process itself stays in the caller's.
    Others(Shared),
}

/// Clones a child that runs `work` with its end of the control socket; the flag says that it is in its cgroup (v2)
/// already. What [`Place::Others`] holds is `work`'s too.
///
/// # Errors
/// What failed; no child is left.
pub(crate) fn clone_child(
    place: Place,
    preamble: &Preamble,
    descriptors: &[BorrowedFd<'_>],
    work: impl Fn(BorrowedFd<'_>, bool, Option<&Shared>) -> i32,
) -> Result<Spawned, Fault> {
    const STAGE: &str = "clone";
    // The child inherits this: nobody inside its namespaces may trace it before its exec.
    credentials::set_not_dumpable().context(STAGE, "prctl", "PR_SET_DUMPABLE")?;
    let (ours, childs) = socket::pair().context(STAGE, "socketpair", "control")?;
    let mut keep: Vec<BorrowedFd<'_>> = descriptors.to_vec();
    keep.push(childs.as_fd());
    let cgroup = match &preamble.cgroup {
        Some(path) => Some(open_directory(path)?),
        None => None,
    };
    let (flags, launch) = match place {
        Place::New => (ns::flag::PID, None),
        Place::Ours => (0, None),
        Place::Others(shared) => (0, Some(shared)),
    };
    let cgroup = cgroup.as_ref().map(AsFd::as_fd);
    let control = childs.as_fd();
    let work = |joined| work(control, joined, launch.as_ref());
    let mut cloned = clone::clone(flags, cgroup, &keep, || work(true));
    // Linux before 5.7 does not know the flag: the child joins by itself.
    let old = |error: &std::io::Error| matches!(error.raw_os_error(), Some(7 | 22));
    if cgroup.is_some() && cloned.as_ref().is_err_and(old) {
        cloned = clone::clone(flags, None, &keep, || work(false));
    }
    let cloned = cloned.context(STAGE, "clone3", "")?;
    Ok(Spawned {
        pid: cloned.pid,
        pidfd: cloned.pidfd,
        control: ours,
        launch,
    })
}

/// Clones a helper, which stays in all namespaces and cgroups of the caller.
///
/// # Errors
/// As [`clone_child`].
pub(crate) fn helper(
    descriptors: &[BorrowedFd<'_>],
    work: impl Fn(BorrowedFd<'_>) -> i32,
) -> Result<Spawned, Fault> {
    let of_caller = Preamble {
        pid: NamespaceSource::Host,
        user: NamespaceSource::Host,
        cgroup: None,
        terminal: false,
    };
    let work = |control: BorrowedFd<'_>, _joined, _launch: Option<&Shared>| work(control);
    clone_child(Place::Ours, &of_caller, descriptors, work)
}

fn open_directory(path: &Path) -> Result<OwnedFd, Fault> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    file::open(path, flags, Mode::empty()).context("cgroup", "open", path.display())
}

/// Reads one packet from the control socket. Blocks unless the socket was made non-blocking.
///
/// # Errors
/// The number of `recvmsg(2)` (`WouldBlock`), or `InvalidData` for bytes that are no report.
pub(crate) fn receive(control: BorrowedFd<'_>) -> std::io::Result<Received> {
    let mut buffer = vec![0; MAX_REPORT]; // zeroed by the kernel, a page when touched
    let packet = crate::sys::socket::receive(control, &mut buffer)?;
    if packet.bytes == 0 {
        return Ok(Received::Closed);
    }
    let bytes = buffer.get(..packet.bytes).unwrap_or_default();
    let report = postcard::from_bytes(bytes)
        .map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?;
    let descriptor = packet.descriptors.into_iter().next();
    match (report, descriptor) {
        (Report::Moved { pid }, Some(pidfd)) => Ok(Received::Moved { pid, pidfd }),
        (Report::Moved { .. }, None) => Err(std::io::ErrorKind::InvalidData.into()),
        (report, descriptor) => Ok(Received::Report(report, descriptor)),
    }
}

/// Lets a process that [`Received::Moved`] told of, or that reported `Mounted`, go on.
///
/// # Errors
/// The number of `sendmsg(2)`; `EPIPE`: it has ended.
pub(crate) fn proceed(control: BorrowedFd<'_>) -> std::io::Result<()> {
    crate::sys::socket::send(control, b"p", &[])
}

/// Lets a process that reported `Ready` execute its program.
///
/// # Errors
/// The number of `sendmsg(2)`; `EPIPE`: it has ended.
pub(crate) fn start(control: BorrowedFd<'_>) -> std::io::Result<()> {
    crate::sys::socket::send(control, b"x", &[])
}

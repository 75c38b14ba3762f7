//! A process that was cloned for the pod: pause, a container's first process, an exec.
//!
//! The one place that calls `runtime` to make processes. Every child goes through the same life:
//!
//! ```text
//! Setup --Ready--> Waiting --start--> Starting --control closed--> Running --+
//!   |                 |                  |                                   |--reaped--> Ended
//!   +--- report of a failure, silence, too late ---> Failing --reaped--> (gone, Failed is sent)
//! ```
//! Pause has no Waiting: its control socket closes when it runs. In Setup a child may go on as another process, once.
//! A maker ([`Child::is_maker`]) is Starting until it is reaped: then the child is the process that it gave birth to.

use std::cell::Cell;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::base::container::ProcessUser;
use crate::monitor::link::Asked;
use crate::runtime::create::{self, CreateRequest, NOT_STARTED, Received, Spawned};
use crate::runtime::exec::{self, ExecRequest};
use crate::runtime::external::{self, Place, Verb};
use crate::runtime::hooks::{self, Stage};
use crate::runtime::plan::{Fault, Report};
use crate::sys::launch::Shared;
use crate::sys::process::{Exit, Held};
use crate::sys::{fd, process, signal};

/// Where a child is in its life.
#[derive(Debug)]
pub(crate) enum Phase {
    /// Cloned, on its way.
    Setup {
        /// Who waits for it.
        asked: Asked,
        /// When it is given up.
        deadline: Instant,
    },
    /// It waits for its start.
    Waiting,
    /// Told to start.
    Starting {
        /// Who waits for it.
        asked: Asked,
        /// When it is given up.
        deadline: Instant,
    },
    /// It has executed its program.
    Running,
    /// It failed before its exec; it is dead or dying.
    Failing {
        /// Who waits for it.
        asked: Asked,
        /// Why.
        fault: Fault,
    },
    /// It was reaped.
    Ended,
}

/// A child and its control socket.
#[derive(Debug)]
pub(crate) struct Child {
    /// Stays this child's until it is reaped, or goes on as another.
    pub(crate) pid: u32,
    /// Its identity.
    pub(crate) pidfd: OwnedFd,
    /// Open until it has executed.
    pub(crate) control: Option<OwnedFd>,
    /// Where it is in its life.
    pub(crate) phase: Phase,
    /// It was killed: so is what it goes on as.
    killed: Cell<bool>,
    /// It is a maker, and shares these pages with us.
    launch: Option<Shared>,
    /// The process that it gave birth to was reaped before it: how that ended, and whether it had executed.
    born: Option<(Exit, bool)>,
    /// When the one that was born is looked at.
    look: Option<Instant>,
}

/// How often a process that was born, but does not execute, is looked at: a container may have stopped it.
const LOOK: Duration = Duration::from_millis(50);

/// What a child says on its control socket.
#[derive(Debug)]
pub(crate) enum Said {
    /// Nothing yet.
    Nothing,
    /// It waits for its start.
    Ready {
        /// Who it is.
        user: ProcessUser,
        /// Master of its terminal.
        terminal: Option<OwnedFd>,
    },
    /// Its mounts are made, and it waits for hooks.
    Mounted,
    /// It failed and ends.
    Failed(Fault),
    /// A helper: its OCI runtime has made this process.
    Made {
        /// Number of the process.
        pid: u32,
        /// Who it runs as.
        user: ProcessUser,
        /// Master of its terminal.
        terminal: Option<OwnedFd>,
    },
    /// A helper: its OCI runtime has done what it was asked for.
    Done,
    /// It has executed its program, or ended without a word.
    Closed,
}

impl Child {
    /// Clones pause or a container's first process. `streams`: its stdin, stdout, stderr.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn create(
        request: CreateRequest<'_>,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        Self::of(create::spawn(request)?, asked, deadline)
    }

    /// Clones one more process into a container.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn exec(
        request: ExecRequest<'_>,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        Self::of(exec::spawn(request)?, asked, deadline)
    }

    /// Clones a helper that makes a container by an OCI runtime.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn create_external(
        request: &CreateRequest<'_>,
        place: Place<'_>,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        Self::of(external::create(request, place)?, asked, deadline)
    }

    /// Clones a helper that starts exec `number` in a container.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn exec_external(
        request: &ExecRequest<'_>,
        place: Place<'_>,
        number: u64,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        let spawned = external::exec(request, place, number)?;
        Self::of(spawned, asked, deadline)
    }

    /// Clones a helper that calls an OCI runtime.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn call(
        verb: Verb,
        place: Place<'_>,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        Self::of(external::run(verb, place)?, asked, deadline)
    }

    /// Clones a helper that runs the hooks of a stage, of the container with this process and plan.
    ///
    /// # Errors
    /// What failed; no process is left.
    pub(crate) fn hooks(
        stage: Stage,
        plan: BorrowedFd<'_>,
        pid: Option<u32>,
        asked: Asked,
        deadline: Instant,
    ) -> Result<Self, Fault> {
        Self::of(hooks::run(stage, plan, pid)?, asked, deadline)
    }

    /// Lets one that was [`Said::Mounted`] go on.
    ///
    /// # Errors
    /// It has ended already.
    pub(crate) fn proceed(&self) -> Result<(), Fault> {
        let control = self.control.as_ref().ok_or_else(|| check("not waiting"))?;
        create::proceed(control.as_fd()).map_err(|error| fault("sendmsg", "control socket", &error))
    }

    /// Is this process from now on; the one before ends by itself, a stranger to be reaped.
    pub(crate) fn hand_over(&mut self, pid: u32, pidfd: OwnedFd, phase: Phase) {
        (self.pid, self.pidfd, self.phase) = (pid, pidfd, phase);
        self.control = None;
        if self.killed.get() {
            self.kill();
        }
    }

    fn of(spawned: Spawned, asked: Asked, deadline: Instant) -> Result<Self, Fault> {
        let child = Self {
            pid: spawned.pid,
            pidfd: spawned.pidfd,
            control: Some(spawned.control),
            phase: Phase::Setup { asked, deadline },
            killed: Cell::new(false),
            launch: spawned.launch,
            born: None,
            look: None,
        };
        if let Some(control) = &child.control
            && let Err(error) = fd::set_nonblocking(control.as_fd(), true)
        {
            child.kill();
            return Err(fault("fcntl", "O_NONBLOCK", &error));
        }
        Ok(child)
    }

    /// Takes what the child says next. One that goes on as another process is that process from here on.
    pub(crate) fn listen(&mut self) -> Said {
        let Some(control) = &self.control else {
            return Said::Nothing;
        };
        match create::receive(control.as_fd()) {
            Ok(Received::Report(Report::Ready(user), terminal)) => Said::Ready { user, terminal },
            Ok(Received::Report(Report::Mounted, _)) => Said::Mounted,
            Ok(Received::Report(Report::Failed(fault), _)) => Said::Failed(fault),
            Ok(Received::Moved { pid, pidfd }) => {
                // The one before is a stranger to be reaped.
                let told = create::proceed(control.as_fd());
                (self.pid, self.pidfd) = (pid, pidfd);
                if self.killed.get() {
                    self.kill();
                }
                match told {
                    Ok(()) => Said::Nothing,
                    Err(_ended) => Said::Closed,
                }
            }
            Ok(Received::Report(Report::Made { pid, user }, terminal)) => Said::Made {
                pid,
                user,
                terminal,
            },
            Ok(Received::Report(Report::Done, _)) => Said::Done,
            Ok(Received::Report(Report::Moved { .. }, _) | Received::Closed) => Said::Closed,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Said::Nothing,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Said::Closed,
            Err(error) => Said::Failed(fault("recvmsg", "control socket", &error)),
        }
    }

    /// Whether it has executed its program, not ended before: its control socket closes by either.
    pub(crate) fn has_executed(&self) -> bool {
        // Where the kernel does not say, it is believed, as it ends soon if it has not.
        process::has_executed(self.pid).unwrap_or(true)
    }

    /// Lets it execute its program.
    ///
    /// # Errors
    /// It has ended already.
    pub(crate) fn start(&mut self, asked: Asked, deadline: Instant) -> Result<(), Fault> {
        let control = self.control.as_ref().ok_or_else(|| check("not waiting"))?;
        create::start(control.as_fd())
            .map_err(|error| fault("sendmsg", "control socket", &error))?;
        self.phase = Phase::Starting { asked, deadline };
        self.look = self.launch.as_ref().map(|_| Instant::now() + LOOK);
        Ok(())
    }

    /// Sends a signal; a child that has ended is fine.
    ///
    /// # Errors
    /// The kernel refuses the signal (its number).
    pub(crate) fn signal(&self, number: i32) -> Result<(), Fault> {
        if self.is_ended() {
            return Ok(());
        }
        process::send_signal(self.pidfd.as_fd(), number)
            .map(drop)
            .map_err(|error| fault("pidfd_send_signal", &number.to_string(), &error))
    }

    /// Kills it, and what it gave birth to.
    pub(crate) fn kill(&self) {
        self.killed.set(true);
        let _ended_already = self.signal(signal::SIGKILL);
        if let Some(born) = self
            .born_pid()
            .and_then(|pid| process::pidfd_open(pid).ok())
        {
            let _ended_already = process::send_signal(born.as_fd(), signal::SIGKILL);
        }
    }

    /// It stays outside of the PID namespace in which what it makes will live, and ends when that executes.
    pub(crate) const fn is_maker(&self) -> bool {
        self.launch.is_some()
    }

    /// Number of the process that it gave birth to, which is our child and not reaped.
    pub(crate) fn born_pid(&self) -> Option<u32> {
        let launch = self.launch.as_ref().filter(|_| self.born.is_none())?;
        launch.pid()
    }

    /// The process that it gave birth to was reaped; `executed`: as its program.
    pub(crate) fn born_ended(&mut self, exit: Exit, executed: bool) {
        self.born = Some((exit, executed));
    }

    /// The maker was reaped. From here on the child is what it gave birth to, if that executes its program; how that ended,
    /// if it has.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn made(&mut self) -> Result<Option<Exit>, Fault> {
        let Some(launch) = &self.launch else {
            return Ok(None);
        };
        let late = match create::born(launch) {
            Ok(late) => late,
            Err(fault) => {
                // The maker was killed: what it gave birth to goes with it.
                self.kill();
                return Err(fault);
            }
        };
        match (self.born, launch.pid()) {
            (Some((exit, false)), _) => Err(not_ready(exit)),
            (Some((exit, true)), pid) => {
                self.pid = pid.unwrap_or_default();
                self.launch = None;
                Ok(Some(exit))
            }
            (None, None) => Err(check("the process ended before it was ready")),
            (None, Some(pid)) => {
                let pidfd = process::pidfd_open(pid);
                self.pidfd =
                    pidfd.map_err(|error| fault("pidfd_open", &pid.to_string(), &error))?;
                if !came_through(self.pidfd.as_fd(), pid) {
                    return Err(check("the process ended before it executed its program"));
                }
                if let Some(late) = late
                    && let Err(fault) = create::finish(pid, &late)
                {
                    self.kill();
                    return Err(fault);
                }
                self.pid = pid;
                self.launch = None;
                if self.killed.get() {
                    self.kill();
                }
                Ok(None)
            }
        }
    }

    /// Looks at what was born, where it is time: one that a container has stopped or traces is given up.
    fn look(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Starting { .. }) || self.look.is_some_and(|at| at > now) {
            return;
        }
        let Some(pid) = self.born_pid() else {
            self.look = self.launch.as_ref().map(|_| now + LOOK);
            return;
        };
        self.look = Some(now + LOOK);
        let how = match process::held(pid) {
            None => return,
            Some(Held::Stopped) => "stopped".to_owned(),
            Some(Held::Traced) => "traced".to_owned(),
        };
        self.fail(check(&format!("the process was {how} by another process of its PID namespace before it executed its program")));
    }

    /// A child may have been stopped: it is time to look.
    pub(crate) fn look_now(&mut self) {
        self.look = None;
    }

    /// Gives the child up: it is killed, and who asked hears `fault` when it is gone.
    pub(crate) fn fail(&mut self, fault: Fault) {
        if let Phase::Setup { asked, .. } | Phase::Starting { asked, .. } = self.phase {
            self.kill();
            self.control = None;
            self.phase = Phase::Failing { asked, fault };
        }
    }

    /// When there is something to do for it: it is looked at, or given up.
    pub(crate) fn wake(&self) -> Option<Instant> {
        let look = self
            .look
            .filter(|_| matches!(self.phase, Phase::Starting { .. }));
        self.deadline().into_iter().chain(look).min()
    }

    /// When it is given up, if somebody waits for it.
    pub(crate) const fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Setup { deadline, .. } | Phase::Starting { deadline, .. } => Some(deadline),
            _ => None,
        }
    }

    /// Gives it up where its time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.look(now);
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            const ETIMEDOUT: i32 = 110;
            self.fail(Fault {
                errno: ETIMEDOUT,
                ..check("the process did not get ready in time")
            });
        }
    }

    /// Whether it was reaped.
    pub(crate) const fn is_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// Its pid while it lives.
    pub(crate) fn live_pid(&self) -> Option<u32> {
        (!self.is_ended()).then_some(self.pid)
    }

    /// As [`Child::live_pidfd`], of one that lives in the namespaces of its container, PID namespace included.
    pub(crate) fn inside(&self) -> Option<BorrowedFd<'_>> {
        self.live_pidfd().filter(|_| !self.is_maker())
    }

    /// Its pidfd while it lives.
    pub(crate) fn live_pidfd(&self) -> Option<BorrowedFd<'_>> {
        (!self.is_ended()).then(|| self.pidfd.as_fd())
    }
}

/// Why a process did not get ready, by its end alone: a seccomp filter may keep it from saying more (see `init::finish`).
pub(crate) fn not_ready(exit: Exit) -> Fault {
    const SECCOMP: &str = "its seccomp profile";
    const UNTOLD: &str = "the program could not be started, and why could not be told:";
    match exit {
        Exit::Code(number @ 1..NOT_STARTED) => Fault {
            errno: number,
            ..check(&format!("{UNTOLD} {SECCOMP} refuses sendmsg(2)"))
        },
        Exit::Code(_) => check("the process ended before it was ready"),
        Exit::Signal(signal::SIGILL) => check(&format!(
            "{UNTOLD} {SECCOMP} refuses sendmsg(2), and exit_group(2) too"
        )),
        Exit::Signal(signal::SIGSYS) => check(&format!(
            "{SECCOMP} ends the process at a call that starts the program (SIGSYS)"
        )),
        Exit::Signal(number) => check(&format!(
            "signal {number} ended the process before it was ready"
        )),
    }
}

/// Whether a process whose old memory is gone has executed, and not ended. A few microseconds lie between either and what shows
/// it, more on a busy machine.
fn came_through(pidfd: BorrowedFd<'_>, pid: u32) -> bool {
    const TRIES: u32 = 100;
    let executed = || process::has_executed(pid).unwrap_or(true);
    for _ in 0..TRIES {
        if executed() {
            return true;
        }
        if process::has_ended(pidfd).unwrap_or(true) {
            return executed();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    true
}

/// A fault of the monitor's own work: a system call that failed.
pub(crate) fn fault(operation: &str, argument: &str, error: &std::io::Error) -> Fault {
    let mut argument = argument.to_owned();
    argument.truncate(argument.floor_char_boundary(256));
    Fault {
        stage: "monitor".into(),
        operation: operation.into(),
        argument,
        errno: error.raw_os_error().unwrap_or_default(),
    }
}

/// A fault of the monitor's own work: a check that failed.
pub(crate) fn check(what: &str) -> Fault {
    Fault {
        stage: "monitor".into(),
        operation: "check".into(),
        argument: what.into(),
        errno: 0,
    }
}

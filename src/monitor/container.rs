//! A container as its monitor keeps it: first process, output, end.
//!
//! ```text
//! reaped -> kill the rest of the cgroup until it is empty -> read the output to its end -> count OOM kills
//!        -> exit record -> ContainerExited
//! ```
//! None of these steps waits: [`Container::settle`] takes those that can be taken now.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::base::id::ContainerId;
use crate::monitor::attach::Attached;
use crate::monitor::child::{Child, Phase, check, fault};
use crate::monitor::external::External;
use crate::monitor::link::Asked;
use crate::monitor::log::{BATCH, LogFile, MAX_LINE, Pending, Source};
use crate::monitor::protocol::{ContainerExit, ContainerSnapshot};
use crate::monitor::{cgroup, record};
use crate::runtime::plan::Fault;
use crate::runtime::tree;
use crate::sys::process::Exit;
use crate::sys::{fd, pty};

/// How long output that somebody outside the cgroup still holds open is waited for after the end.
const DRAIN: Duration = Duration::from_secs(2);
/// How long killed processes that do not go away are waited for before the exit is reported.
const KILL: Duration = Duration::from_secs(20);
/// Between two looks at a cgroup that should be empty soon: first, and at most.
const KILL_AGAIN: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(20));
/// Between two tries to write a log that could not be written.
const LOG_AGAIN: Duration = Duration::from_secs(1);
/// Before a terminal that nobody has open is read again.
const TERMINAL_AGAIN: Duration = Duration::from_millis(200);
/// Reads of one output before the others get their turn.
const READS_IN_A_ROW: usize = 8;

/// Memory that the whole monitor shares: pages that were never used cost nothing.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// For reading output.
    pub(crate) read: [u8; MAX_LINE],
    /// For formatting log lines.
    pub(crate) batch: [u8; BATCH],
}

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its first process.
    pub(crate) child: Child,
    /// `Created` was sent.
    pub(crate) created: bool,
    /// Write end of its stdin, or master of its terminal.
    pub(crate) stdin: Option<OwnedFd>,
    /// stdin goes to the first who attaches.
    pub(crate) stdin_once: bool,
    /// Has a terminal.
    pub(crate) terminal: bool,
    /// Its log.
    pub(crate) log: LogFile,
    /// What is read for the log.
    pub(crate) outputs: Vec<Output>,
    /// Who gets a copy of it.
    pub(crate) attached: Vec<Attached>,
    /// Where OOM kills are counted.
    pub(crate) memory_cgroup: PathBuf,
    /// Who is killed with it.
    pub(crate) kill_cgroup: PathBuf,
    /// 0: not yet.
    pub(crate) started_at: Timestamp,
    /// How it ended, when all is done.
    pub(crate) exit: Option<ContainerExit>,
    /// Who waits for its removal.
    pub(crate) removal: Option<Asked>,
    /// Steps of its end.
    pub(crate) ending: Option<Ending>,
    /// No output is read before this.
    pub(crate) paused_until: Option<Instant>,
    /// Absent: it is our own.
    pub(crate) external: Option<Box<External>>,
    /// Its plan, for its hooks, until it has started; absent: it has none.
    pub(crate) hooked: Option<OwnedFd>,
}

/// One output of a container.
#[derive(Debug)]
pub(crate) struct Output {
    source: Source,
    fd: Option<OwnedFd>,
    pending: Pending,
}

/// Steps of an end.
#[derive(Debug)]
pub(crate) struct Ending {
    code: i32,
    at: Timestamp,
    emptied: bool,
    kill_until: Instant,
    drain_until: Instant,
    again_at: Instant,
    again_after: Duration,
}

impl Output {
    /// An output that comes from this descriptor.
    ///
    /// # Errors
    /// The number of fcntl(2).
    pub(crate) fn new(source: Source, reader: OwnedFd) -> Result<Self, Fault> {
        fd::set_nonblocking(reader.as_fd(), true)
            .map_err(|error| fault("fcntl", "O_NONBLOCK", &error))?;
        Ok(Self {
            source,
            fd: Some(reader),
            pending: Pending::default(),
        })
    }
}

impl Container {
    /// What to poll for output `index`, if it is read now.
    pub(crate) fn poll(&self, index: usize, now: Instant) -> Option<BorrowedFd<'_>> {
        if self.paused_until.is_some_and(|until| now < until) || self.log.is_blocked() {
            return None;
        }
        self.outputs.get(index)?.fd.as_ref().map(OwnedFd::as_fd)
    }

    /// When something must be done without any descriptor being ready.
    pub(crate) fn wake(&self) -> Option<Instant> {
        let ending = self.ending.as_ref().and_then(|ending| {
            let open = self.outputs.iter().any(|output| output.fd.is_some());
            match (ending.emptied, open) {
                (false, _) => Some(ending.again_at),
                (true, true) => Some(ending.drain_until),
                (true, false) => None,
            }
        });
        [self.paused_until, self.child.wake(), ending]
            .into_iter()
            .flatten()
            .min()
    }

    /// Reads what output `index` has.
    pub(crate) fn read(&mut self, index: usize, buffers: &mut Buffers, now: Instant) {
        for _ in 0..READS_IN_A_ROW {
            let Some(output) = self.outputs.get_mut(index) else {
                return;
            };
            let Some(reader) = &output.fd else {
                return;
            };
            match fd::read(reader.as_fd(), &mut buffers.read) {
                Ok(0) => return self.end_output(index),
                Ok(count) => {
                    let bytes = &buffers.read[..count];
                    for attached in &mut self.attached {
                        attached.copy(index, bytes);
                    }
                    self.attached.retain(|attached| !attached.is_over());
                    let (source, pending) = (output.source, &mut output.pending);
                    let at = Timestamp::now();
                    self.log
                        .write(source, pending, bytes, &mut buffers.batch, at);
                    if self.log.is_blocked() {
                        self.paused_until = Some(now + LOG_AGAIN);
                        return;
                    }
                    if let Some(ending) = &mut self.ending {
                        ending.drain_until = now + DRAIN;
                    }
                    if count < buffers.read.len() {
                        return;
                    }
                }
                Err(error) if is_retry(&error) => return,
                // A terminal without a process gives EIO; while the container lives, one may open it again.
                Err(_) if self.terminal && !self.child.is_ended() => {
                    self.paused_until = Some(now + TERMINAL_AGAIN);
                    return;
                }
                Err(_) => return self.end_output(index),
            }
        }
    }

    fn end_output(&mut self, index: usize) {
        if let Some(output) = self.outputs.get_mut(index) {
            self.log
                .end(output.source, &mut output.pending, Timestamp::now());
            output.fd = None;
        }
        for attached in &mut self.attached {
            attached.end(index);
        }
        self.attached.retain(|attached| !attached.is_over());
    }

    /// Forgets clients that have left. Who is attached to a silent container is never written to.
    pub(crate) fn forget_left(&mut self) {
        for attached in &mut self.attached {
            attached.close_unread();
        }
        self.attached.retain(|attached| !attached.is_over());
    }

    /// Does what has waited for its time: a blocked log, a terminal that was hung up.
    pub(crate) fn resume(&mut self, buffers: &mut Buffers, now: Instant) {
        if self.paused_until.is_none() && self.log.is_blocked() {
            self.paused_until = Some(now + LOG_AGAIN);
        }
        if self.paused_until.is_none_or(|until| now < until) {
            return;
        }
        self.paused_until = None;
        if self.log.is_blocked() {
            let mut outputs: Vec<(Source, &mut Pending)> = self
                .outputs
                .iter_mut()
                .map(|output| (output.source, &mut output.pending))
                .collect();
            self.log
                .retry(&mut outputs, &mut buffers.batch, Timestamp::now());
            if self.log.is_blocked() {
                self.paused_until = Some(now + LOG_AGAIN);
            } else if let Some(ending) = &mut self.ending {
                ending.drain_until = now + DRAIN;
            }
        }
    }

    /// The first process was reaped.
    pub(crate) fn ended(&mut self, exit: Exit, at: Timestamp, now: Instant) {
        self.child.phase = Phase::Ended;
        self.child.control = None;
        self.stdin = None;
        self.paused_until = None;
        self.ending = Some(Ending {
            code: exit.code(),
            at,
            emptied: false,
            kill_until: now + KILL,
            drain_until: now + DRAIN,
            again_at: now,
            again_after: KILL_AGAIN.0,
        });
    }

    /// Takes the next steps of an end; `true` once, when the exit is known completely.
    pub(crate) fn settle(&mut self, now: Instant, directory: &Path) -> bool {
        let Some(ending) = &mut self.ending else {
            return false;
        };
        if !ending.emptied {
            if now < ending.again_at {
                return false;
            }
            ending.emptied = cgroup::kill(&self.kill_cgroup) || now >= ending.kill_until;
            ending.again_at = now + ending.again_after;
            ending.again_after = KILL_AGAIN.1.min(ending.again_after * 2);
            if !ending.emptied {
                return false;
            }
            ending.drain_until = now + DRAIN;
        }
        let late = now >= ending.drain_until;
        let open = self.outputs.iter().any(|output| output.fd.is_some());
        if open && !late {
            return false;
        }
        let exit = ContainerExit {
            id: self.id,
            code: ending.code,
            oom_killed: crate::runtime::cgroups::oom_kills(&self.memory_cgroup) > 0,
            at: ending.at,
        };
        if self.log.is_blocked() {
            // The disk is full: the exit is told, the rest of the output is kept for later.
            ending.drain_until = now + LOG_AGAIN;
        } else {
            for index in 0..self.outputs.len() {
                self.end_output(index);
            }
            self.ending = None;
        }
        if self.exit.is_some() {
            return false;
        }
        // Without a record the daemon still hears of the exit from us, unless this process is killed.
        let _best_effort = record::write(directory, &exit);
        self.exit = Some(exit);
        true
    }

    /// Gives it up where the time for its making is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self
            .child
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.kill_makers();
        }
        self.child.expire(now);
    }

    /// Kills the helper with all that its OCI runtime has started: what is not in the container's cgroup yet, or never
    /// will be, would outlive them.
    fn kill_makers(&self) {
        if self.external.is_some()
            && matches!(self.child.phase, Phase::Setup { .. })
            && let Some(pid) = self.child.live_pid()
        {
            tree::kill(pid);
        }
    }

    /// Kills everything in the container.
    pub(crate) fn kill(&self) {
        self.kill_makers();
        self.child.kill();
        cgroup::kill(&self.kill_cgroup);
    }

    /// Opens the log again.
    ///
    /// # Errors
    /// The container does not run (then no file is made), or the file cannot be opened (then the old one stays).
    pub(crate) fn reopen_log(&mut self) -> Result<(), Fault> {
        if self.child.is_ended() && self.outputs.iter().all(|output| output.fd.is_none()) {
            return Err(check("the container has ended, its log is closed"));
        }
        self.log
            .reopen()
            .map_err(|refused| refused.fault("open log"))
    }

    /// Copies of the output from now on go to the first of these (stdout, stderr; one of a terminal), the news of being
    /// cut off to the one after. The descriptor to write stdin to, where it is wanted and there is one.
    ///
    /// # Errors
    /// The container does not run, or a descriptor cannot be used.
    pub(crate) fn attach(
        &mut self,
        descriptors: Vec<OwnedFd>,
        stdin: bool,
    ) -> Result<Option<OwnedFd>, Fault> {
        if !matches!(self.child.phase, Phase::Running) {
            return Err(check("the container does not run"));
        }
        let attached = Attached::new(descriptors, self.outputs.len())
            .map_err(|error| fault("fcntl", "O_NONBLOCK", &error))?;
        self.attached.push(attached);
        if !stdin {
            return Ok(None);
        }
        if self.stdin_once && !self.terminal {
            return Ok(self.stdin.take());
        }
        let stdin = self.stdin.as_ref();
        stdin
            .map(|stdin| fd::duplicate(stdin.as_fd(), 3))
            .transpose()
            .map_err(|error| fault("fcntl", "F_DUPFD_CLOEXEC", &error))
    }

    /// The container has this terminal.
    ///
    /// # Errors
    /// The descriptor cannot be used.
    pub(crate) fn set_terminal(&mut self, master: OwnedFd, keep_stdin: bool) -> Result<(), Fault> {
        if keep_stdin {
            let copy = fd::duplicate(master.as_fd(), 3)
                .map_err(|error| fault("fcntl", "F_DUPFD_CLOEXEC", &error))?;
            self.stdin = Some(copy);
        }
        self.outputs = vec![Output::new(Source::Stdout, master)?];
        Ok(())
    }

    /// Sets the size of its terminal.
    ///
    /// # Errors
    /// It has none, or it is gone.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), Fault> {
        let master = self.outputs.first().and_then(|output| output.fd.as_ref());
        match master {
            Some(master) if self.terminal => pty::resize(master.as_fd(), width, height)
                .map_err(|error| fault("ioctl", "TIOCSWINSZ", &error)),
            _ => Err(check("the container has no terminal")),
        }
    }

    /// As the daemon sees it after a reconnect.
    pub(crate) fn snapshot(&self) -> ContainerSnapshot {
        ContainerSnapshot {
            id: self.id,
            pid: self.child.live_pid(),
            started_at: self.started_at,
            exit: self.exit.clone(),
        }
    }
}

fn is_retry(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

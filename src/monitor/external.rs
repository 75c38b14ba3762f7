//! Containers that an OCI runtime makes, as their monitor keeps them: calls of the runtime, and who it left us.
//!
//! ```text
//! External -> helper: create -> Made -> its process is the container's first, as if we had cloned it
//! Start    -> helper: start    Signal -> helper: kill    Exec -> helper: exec, then the process itself
//! ended, told, to be forgotten -> helper: delete -> forgotten
//! ```
//! A process that a runtime made comes to us when the runtime ends, for we are a subreaper. It may end before its helper
//! has told its number: while helpers are on their way, the ends of unknown children are kept.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::base::container::ProcessUser;
use crate::base::handler::OciRuntime;
use crate::base::id::ContainerId;
use crate::monitor::calls::SETUP;
use crate::monitor::child::{Child, Phase, Said, check, fault};
use crate::monitor::container::Container;
use crate::monitor::link::Asked;
use crate::monitor::protocol::{Event, Reply};
use crate::monitor::serve::{Exec, Monitor};
use crate::runtime::external::{Place, Verb, exec_files};
use crate::runtime::hooks::Stage;
use crate::runtime::plan::Fault;
use crate::runtime::tree;
use crate::sys::process::{self, Exit};

/// How long a runtime may take for a signal.
const QUICK: Duration = Duration::from_secs(15);
/// How long a runtime may take to forget a container.
const DELETE: Duration = Duration::from_secs(40);
/// Most ends of unknown children that are kept.
const MAX_STRAYS: usize = 1024;

/// What a container of an OCI runtime has besides.
#[derive(Debug)]
pub(crate) struct External {
    /// The runtime.
    pub(crate) runtime: OciRuntime,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// Whether the runtime has forgotten it.
    pub(crate) deletion: Deletion,
}

/// Whether a runtime has forgotten a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deletion {
    /// Not asked for.
    Not,
    /// Asked for.
    Running,
    /// It failed; the next removal tries again.
    Failed,
    /// It has.
    Done,
}

/// A process of ours that works for a container.
#[derive(Debug)]
pub(crate) struct Helper {
    /// Whom for.
    pub(crate) id: ContainerId,
    /// What it does.
    pub(crate) task: Task,
    /// Its process.
    pub(crate) child: Child,
}

/// What a helper does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// A call of a runtime that is not the making of a process.
    Call(Verb),
    /// Runs hooks.
    Hooks(Stage),
}

/// Who a helper says was made.
struct Made {
    pid: u32,
    user: ProcessUser,
}

/// Where a process is that a runtime made.
enum Found {
    /// It is our child.
    Lives(OwnedFd),
    /// It was, and we have reaped it.
    Ended(Exit),
}

impl External {
    /// A container that is to be made.
    pub(crate) fn new(runtime: OciRuntime, bundle: PathBuf) -> Box<Self> {
        Box::new(Self {
            runtime,
            bundle,
            deletion: Deletion::Not,
        })
    }

    /// Where it is, for a call.
    pub(crate) fn place<'a>(&'a self, id: &'a str) -> Place<'a> {
        Place {
            runtime: &self.runtime,
            id,
            bundle: &self.bundle,
        }
    }
}

impl Container {
    /// The runtime, if there is one, has forgotten it.
    pub(crate) fn is_deleted(&self) -> bool {
        let external = self.external.as_ref();
        external.is_none_or(|external| external.deletion == Deletion::Done)
    }

    /// It has ended, and the runtime is to forget it now.
    fn is_to_be_deleted(&self) -> bool {
        let Some(external) = &self.external else {
            return false;
        };
        let asked = match external.deletion {
            Deletion::Not => !self.created || self.removal.is_some(),
            Deletion::Failed => self.removal.is_some(),
            Deletion::Running | Deletion::Done => false,
        };
        self.exit.is_some() && asked
    }
}

impl Exec {
    /// Gives it up where the time for its making is over, with all that its OCI runtime has started for that.
    pub(crate) fn expire(&mut self, now: Instant) {
        let late = self.child.deadline().is_some_and(|at| at <= now);
        if late
            && self.bundle.is_some()
            && let Some(pid) = self.child.live_pid()
        {
            tree::kill(pid);
        }
        self.child.expire(now);
    }

    /// Removes what a helper that was killed has left in the bundle.
    pub(crate) fn remove_files(&self) {
        let Some(bundle) = &self.bundle else { return };
        for name in exec_files(self.number) {
            let _absent = std::fs::remove_file(bundle.join(name));
        }
    }
}

impl Monitor<'_> {
    /// Calls the runtime of a container; who asked hears when it is done.
    ///
    /// # Errors
    /// No such container of a runtime, or no process can be made.
    pub(crate) fn call(&mut self, asked: Asked, id: ContainerId, verb: Verb) -> Result<(), Fault> {
        let container = self.find(id)?;
        let Some(external) = &container.external else {
            return Err(check("the container has no OCI runtime"));
        };
        let name = id.to_string();
        // With a start go the hooks for it.
        let limit = if verb == Verb::Start { SETUP } else { QUICK };
        let child = Child::call(verb, external.place(&name), asked, Instant::now() + limit)?;
        if verb == Verb::Start {
            // Who is started may end before the runtime says so.
            container.child.phase = Phase::Running;
        }
        let task = Task::Call(verb);
        self.helpers.push(Helper { id, task, child });
        Ok(())
    }

    /// Makes a runtime forget a container that this monitor never had.
    ///
    /// # Errors
    /// No process can be made.
    pub(crate) fn clean(
        &mut self,
        asked: Asked,
        id: ContainerId,
        external: &External,
    ) -> Result<(), Fault> {
        let (name, verb) = (id.to_string(), Verb::Delete);
        let child = Child::call(verb, external.place(&name), asked, Instant::now() + DELETE)?;
        let task = Task::Call(verb);
        self.helpers.push(Helper { id, task, child });
        Ok(())
    }

    /// Starts the deletions that are due.
    pub(crate) fn delete_ended(&mut self) {
        for container in &mut self.containers {
            if !container.is_to_be_deleted() {
                continue;
            }
            let id = container.id;
            let name = id.to_string();
            let asked = container.removal.unwrap_or_else(Asked::nobody);
            let Some(external) = &mut container.external else {
                continue;
            };
            let (verb, deadline) = (Verb::Delete, Instant::now() + DELETE);
            match Child::call(verb, external.place(&name), asked, deadline) {
                Ok(child) => {
                    external.deletion = Deletion::Running;
                    let task = Task::Call(verb);
                    self.helpers.push(Helper { id, task, child });
                }
                Err(fault) => {
                    external.deletion = Deletion::Failed;
                    if container.removal.take().is_some() {
                        self.link.reply(asked, Reply::Failed(fault), Vec::new());
                    }
                }
            }
        }
    }

    /// Whether a process may come to us that we do not know.
    fn expects_strays(&self) -> bool {
        let on_its_way = |child: &Child| matches!(child.phase, Phase::Setup { .. });
        self.containers
            .iter()
            .any(|one| one.external.is_some() && on_its_way(&one.child))
            || self.execs.iter().any(|one| on_its_way(&one.child))
    }

    /// A child that is in no list was reaped.
    pub(crate) fn keep_stray(&mut self, pid: u32, exit: Exit) {
        if self.expects_strays() && self.strays.len() < MAX_STRAYS {
            self.strays.push((pid, exit));
        }
    }

    /// Forgets the ends that nobody asks for any more.
    pub(crate) fn drop_strays(&mut self) {
        if !self.strays.is_empty() && !self.expects_strays() {
            self.strays = Vec::new();
        }
    }

    /// # Errors
    /// It is not our child.
    fn find_made(&mut self, pid: u32) -> Result<Found, Fault> {
        let stray = self.strays.iter().position(|stray| stray.0 == pid);
        let ended = stray.map(|index| self.strays.swap_remove(index).1);
        // Our child until we reap it: the number is its own, whoever had it before.
        if !self.knows(pid) && tree::parent_of(pid) == Some(process::id()) {
            return process::pidfd_open(pid)
                .map(Found::Lives)
                .map_err(|error| fault("pidfd_open", &pid.to_string(), &error));
        }
        ended.map(Found::Ended).ok_or_else(|| {
            check(&format!(
                "process {pid} of the OCI runtime is not the monitor's child"
            ))
        })
    }

    /// Whether this number is that of a living child of which we know what it is.
    pub(crate) fn knows(&self, pid: u32) -> bool {
        let containers = self.containers.iter().map(|one| &one.child);
        let execs = self.execs.iter().map(|one| &one.child);
        let helpers = self.helpers.iter().map(|one| &one.child);
        let mut all = containers.chain(execs).chain(helpers).chain(&self.sandbox);
        all.any(|child| child.live_pid() == Some(pid))
    }

    /// A helper says that its runtime has made container `index`.
    pub(crate) fn container_made(&mut self, index: usize, said: Said) {
        let (Some(made), terminal) = taken(said) else {
            return;
        };
        let found = self.find_made(made.pid);
        let container = &mut self.containers[index];
        let &Phase::Setup { asked, .. } = &container.child.phase else {
            return;
        };
        let pidfd = match found {
            Ok(Found::Lives(pidfd)) => pidfd,
            Ok(Found::Ended(_)) => {
                return container
                    .child
                    .fail(check("the process ended before it was ready"));
            }
            Err(fault) => return container.child.fail(fault),
        };
        if let Some(master) = terminal {
            let keep_stdin = container.stdin.take().is_some();
            if let Err(fault) = container.set_terminal(master, keep_stdin) {
                return container.child.fail(fault);
            }
        }
        // The helper ends by itself; nobody needs its end.
        container.child.hand_over(made.pid, pidfd, Phase::Waiting);
        container.created = true;
        let reply = Reply::Created {
            pid: made.pid,
            user: made.user,
        };
        self.link.reply(asked, reply, Vec::new());
    }

    /// A helper says that its runtime has started exec `index`.
    pub(crate) fn exec_made(&mut self, index: usize, said: Said) {
        let (Some(made), terminal) = taken(said) else {
            return;
        };
        let found = self.find_made(made.pid);
        let exec = &mut self.execs[index];
        let &Phase::Setup { asked, .. } = &exec.child.phase else {
            return;
        };
        let reply = Reply::Executed { pid: made.pid };
        match found {
            Ok(Found::Lives(pidfd)) => {
                exec.child.hand_over(made.pid, pidfd, Phase::Running);
                self.link
                    .reply(asked, reply, terminal.into_iter().collect());
            }
            Ok(Found::Ended(exit)) => {
                exec.child.phase = Phase::Ended;
                let (exec, code) = (exec.number, exit.code());
                self.link
                    .reply(asked, reply, terminal.into_iter().collect());
                self.link.event(Event::ExecExited { exec, code });
            }
            Err(fault) => exec.child.fail(fault),
        }
    }

    /// Helper `index` was reaped: what it said last is the outcome.
    pub(crate) fn helper_ended(&mut self, index: usize) {
        let mut helper = self.helpers.swap_remove(index);
        let outcome = match helper.child.listen() {
            Said::Done => Ok(()),
            Said::Failed(fault) => Err(fault),
            _ => Err(check("the helper was killed")),
        };
        // Given up before: that is why it says nothing.
        let outcome = match &helper.child.phase {
            Phase::Failing { fault, .. } => Err(fault.clone()),
            _ => outcome,
        };
        let asked = match helper.child.phase {
            Phase::Setup { asked, .. } | Phase::Failing { asked, .. } => asked,
            _ => Asked::nobody(),
        };
        helper.child.phase = Phase::Ended;
        let verb = match helper.task {
            Task::Call(verb) => verb,
            Task::Hooks(stage) => return self.hooks_ended(stage, helper.id, asked, outcome),
        };
        let found = self.containers.iter_mut().find(|one| one.id == helper.id);
        let reply = match (verb, found) {
            (Verb::Start, Some(container)) => match outcome {
                Ok(()) => {
                    container.started_at = Timestamp::now();
                    let (at, pid) = (container.started_at, container.child.pid);
                    Reply::Started { at, pid }
                }
                Err(fault) => {
                    container.kill();
                    Reply::Failed(fault)
                }
            },
            // It may have ended while the runtime looked for it.
            (Verb::Kill(_), Some(container)) if container.child.is_ended() => Reply::Done,
            (Verb::Delete, Some(container)) => {
                let Some(external) = &mut container.external else {
                    return;
                };
                let Err(fault) = outcome else {
                    // Who asked for the removal hears when it is forgotten.
                    external.deletion = Deletion::Done;
                    return;
                };
                external.deletion = Deletion::Failed;
                match container.removal.take() {
                    Some(asked) => {
                        self.link.reply(asked, Reply::Failed(fault), Vec::new());
                        return;
                    }
                    None => return,
                }
            }
            (_, _) => match outcome {
                Ok(()) => Reply::Done,
                Err(fault) => Reply::Failed(fault),
            },
        };
        self.link.reply(asked, reply, Vec::new());
    }
}

fn taken(said: Said) -> (Option<Made>, Option<OwnedFd>) {
    match said {
        Said::Made {
            pid,
            user,
            terminal,
        } => (Some(Made { pid, user }), terminal),
        _ => (None, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::container::Buffers;
    use crate::monitor::log::{BATCH, MAX_LINE};

    #[test]
    #[expect(clippy::disallowed_methods, reason = "test")]
    fn a_number_is_that_of_who_lives() {
        let (_daemon, ours) = crate::sys::socket::pair().unwrap();
        let mut buffers = Buffers {
            read: [0; MAX_LINE],
            batch: [0; BATCH],
        };
        let mut monitor = Monitor::new(ours, &mut buffers).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        // Who had the number before ended while a helper was on its way.
        let before = (child.id(), Exit::Code(3));
        monitor.strays = vec![before];
        let found = monitor.find_made(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(found, Ok(Found::Lives(_))));
        assert!(monitor.strays.is_empty());
        monitor.strays = vec![before];
        let found = monitor.find_made(child.id());
        assert!(matches!(found, Ok(Found::Ended(Exit::Code(3)))));
        assert!(monitor.find_made(child.id()).is_err());
    }
}

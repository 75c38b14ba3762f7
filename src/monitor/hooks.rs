//! Hooks that run in our namespaces: helpers run them (`runtime::hooks`), whoever waits hears of it afterwards.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use crate::base::id::ContainerId;
use crate::monitor::calls::{Answer, SETUP};
use crate::monitor::child::{Child, Phase, check};
use crate::monitor::external::{Helper, Task};
use crate::monitor::link::Asked;
use crate::monitor::protocol::{Event, Reply};
use crate::monitor::serve::Monitor;
use crate::runtime::external::Verb;
use crate::runtime::hooks::Stage;
use crate::runtime::plan::Fault;
use crate::runtime::tree;

impl Monitor<'_> {
    /// Container `index` has its mounts and waits for hooks.
    pub(crate) fn container_mounted(&mut self, index: usize) {
        let container = &mut self.containers[index];
        let &Phase::Setup { deadline, .. } = &container.child.phase else {
            return;
        };
        let (pid, stage) = (container.child.pid, Stage::Create);
        let child = match &container.hooked {
            Some(plan) => {
                let plan = plan.as_fd();
                Child::hooks(stage, plan, Some(pid), Asked::nobody(), deadline)
            }
            None => Err(check("the container waits for hooks, but has none")),
        };
        match child {
            Ok(child) => self.helpers.push(Helper {
                id: container.id,
                task: Task::Hooks(stage),
                child,
            }),
            Err(fault) => container.child.fail(fault),
        }
    }

    /// Container `index` has executed its program: `asked` hears it after the hooks for that.
    pub(crate) fn container_started(&mut self, index: usize, asked: Asked) {
        let container = &mut self.containers[index];
        let (id, at) = (container.id, container.started_at);
        let (pid, stage) = (container.child.pid, Stage::Started);
        let Some(plan) = container.hooked.take() else {
            return self
                .link
                .reply(asked, Reply::Started { at, pid }, Vec::new());
        };
        let deadline = Instant::now() + SETUP;
        match Child::hooks(stage, plan.as_fd(), Some(pid), asked, deadline) {
            Ok(child) => self.helpers.push(Helper {
                id,
                task: Task::Hooks(stage),
                child,
            }),
            Err(fault) => self.hooks_ended(stage, id, asked, Err(fault)),
        }
    }

    /// Runs the hooks of a container that is gone.
    ///
    /// # Errors
    /// No plan came, or no process can be made.
    pub(crate) fn poststop(
        &mut self,
        asked: Asked,
        id: ContainerId,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let plan = descriptors.into_iter().next();
        let plan = plan.ok_or_else(|| check("no plan came"))?;
        let (stage, deadline) = (Stage::Stopped, Instant::now() + SETUP);
        let child = Child::hooks(stage, plan.as_fd(), None, asked, deadline)?;
        let task = Task::Hooks(stage);
        self.helpers.push(Helper { id, task, child });
        Ok(None)
    }

    /// The hooks of a stage have run, or failed.
    pub(crate) fn hooks_ended(
        &mut self,
        stage: Stage,
        id: ContainerId,
        asked: Asked,
        outcome: Result<(), Fault>,
    ) {
        let found = self.containers.iter_mut().find(|one| one.id == id);
        let reply = match (stage, found) {
            (Stage::Create, None) => return,
            (Stage::Create, Some(container)) => {
                let outcome = outcome.and_then(|()| container.child.proceed());
                if let Err(fault) = outcome {
                    container.child.fail(fault);
                }
                return;
            }
            (Stage::Started, found) => {
                let told = found.map(|container| (container.started_at, container.child.pid));
                if let Err(fault) = outcome {
                    self.link.event(Event::HookFailed { id, fault });
                }
                let gone = || Reply::Failed(check("the container was removed meanwhile"));
                told.map_or_else(gone, |(at, pid)| Reply::Started { at, pid })
            }
            (Stage::Stopped, _) => match outcome {
                Ok(()) => Reply::Done,
                Err(fault) => Reply::Failed(fault),
            },
        };
        self.link.reply(asked, reply, Vec::new());
    }

    /// Ends what runs for a container, or for all, that nobody needs once they are killed: hooks, and an OCI runtime that
    /// starts one (with hooks of its own).
    pub(crate) fn cut_short(&self, id: Option<ContainerId>) {
        for helper in &self.helpers {
            let needless = matches!(helper.task, Task::Hooks(_) | Task::Call(Verb::Start));
            if needless && id.is_none_or(|id| id == helper.id) {
                helper.end();
            }
        }
    }
}

impl Helper {
    /// Kills it with all that it has started.
    fn end(&self) {
        if let Some(pid) = self.child.live_pid() {
            tree::kill(pid);
        }
    }

    /// Gives it up where its time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        if self
            .child
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.end();
        }
        self.child.expire(now);
    }
}

//! What monitors tell: ends of containers, of pause, and of the monitor itself.

use std::sync::Arc;

use crate::base::clock::Timestamp;
use crate::base::counters;
use crate::base::error::chain;
use crate::engine::Engine;
use crate::engine::container::{Container, ContainerInner};
use crate::engine::core::blocking_step;
use crate::engine::monitor_client::{Events, MonitorEvent};
use crate::engine::pod::Pod;
use crate::engine::state::{ContainerInput, ContainerPhase, PodInput};
use crate::monitor::protocol::ContainerExit;

/// Longest message of a status in bytes (kubelet keeps it in the API object).
const MAX_MESSAGE: usize = 4096;
/// 128 + SIGKILL.
const KILLED: i32 = 137;
/// Exit code where the true one is lost.
const LOST: i32 = 255;

/// What is known of an end that no monitor told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// We killed it.
    Killed,
    /// Nothing.
    Unknown,
}

/// CRI's reason for an exit.
pub(crate) const fn reason_of(code: i32, oom_killed: bool) -> &'static str {
    match code {
        0 => "Completed",
        KILLED if oom_killed => "OOMKilled",
        _ => "Error",
    }
}

/// A message of at most [`MAX_MESSAGE`] bytes.
pub(crate) fn bounded(message: &str) -> String {
    if message.len() <= MAX_MESSAGE {
        return message.to_owned();
    }
    let mut end = MAX_MESSAGE - '…'.len_utf8();
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &message[..end])
}

/// Writes an end into the status. Times stay in order, whatever the clock did.
pub(crate) fn note_end(
    inner: &mut ContainerInner,
    at: Timestamp,
    code: i32,
    reason: &str,
    message: &str,
) {
    let status = Arc::make_mut(&mut inner.status);
    status.finished_at = at.max(status.started_at).max(status.created_at);
    status.exit_code = code;
    reason.clone_into(&mut status.reason);
    status.message = bounded(message);
    inner.pid = None;
}

/// Writes the end that the monitor told of.
pub(crate) fn note_exit(inner: &mut ContainerInner, exit: &ContainerExit) {
    let reason = reason_of(exit.code, exit.oom_killed);
    counters::OOM_KILLS.add(u64::from(reason == "OOMKilled"));
    note_end(inner, exit.at, exit.code, reason, "");
}

impl Engine {
    /// Follows a pod's monitor until it ends.
    pub(super) fn watch(&self, pod: &Arc<Pod>, events: Events) {
        let (engine, pod) = (self.clone(), Arc::clone(pod));
        let mut events = events;
        let _follows = self.core().lower.followers.spawn(async move {
            while let Some(event) = events.recv().await {
                match event {
                    MonitorEvent::ContainerExited(exit) => {
                        engine.container_exited(&pod, &exit).await;
                    }
                    MonitorEvent::HookFailed { id, fault } => {
                        tracing::warn!(container.id = %id, error = %fault, "poststart hooks failed");
                    }
                    MonitorEvent::SandboxExited { .. } => engine.pod_died(&pod).await,
                    MonitorEvent::Lost => engine.monitor_lost(&pod).await,
                }
            }
            // Without `Lost` it is we who end: the monitor and its containers go on.
        });
    }

    /// A container's first process ended.
    pub(super) async fn container_exited(&self, pod: &Arc<Pod>, exit: &ContainerExit) {
        let container = pod.lock().containers.get(&exit.id).map(Arc::clone);
        let Some(container) = container else { return };
        let moved = self
            .core()
            .container_input(&container, ContainerInput::Exit, |inner| {
                match inner.phase {
                    // Its verb is not answered yet: it takes the exit when it is.
                    ContainerPhase::Creating { .. } | ContainerPhase::Starting { .. } => {
                        inner.early_exit = Some(exit.clone());
                    }
                    _ if inner.status.finished_at == Timestamp::default() => note_exit(inner, exit),
                    _ => {}
                }
            });
        self.record_moved(&container, moved == Ok(true)).await;
        self.follow_end(&container);
    }

    /// What follows an end, each in the container's turn: whatever goes on with it comes first.
    fn follow_end(&self, container: &Arc<Container>) {
        let (engine, container) = (self.clone(), Arc::clone(container));
        let _followed = self.core().tasks.spawn(async move {
            engine.plugins_ended(&container).await;
            engine.leave_cgroup(&container).await;
        });
    }

    /// Removes the cgroup of a container that has ended: nobody is in it any more, what its files were charged goes to
    /// the parent, and kubelet's cAdvisor does not take it for one that comes (it asks for its process for 3 s then, at
    /// every look). What stays goes when the container is removed. An OCI runtime removes its own.
    async fn leave_cgroup(&self, container: &Arc<Container>) {
        let _turn = container.lane.turn().await;
        if container.phase() != ContainerPhase::Exited || container.pod.handler.runtime.is_some() {
            return;
        }
        let (cgroups, path) = (self.core().lower.cgroups.clone(), container.cgroup());
        let removed = blocking_step("remove the cgroup of an ended container", move || {
            cgroups.remove(&path)
        });
        if let Err(error) = removed.await {
            tracing::warn!(container.id = %container.id, error = %chain(&error), "a cgroup stays");
        }
    }

    /// A container whose end nobody told of is dead: its code is made up.
    pub(super) async fn container_lost(
        &self,
        container: &Arc<Container>,
        message: &str,
        ended: Ended,
    ) {
        let (code, reason) = match ended {
            Ended::Killed => (KILLED, "Error"),
            Ended::Unknown => (LOST, "Unknown"),
        };
        let at = self.core().stamps.next();
        let moved =
            self.core()
                .container_input(container, ContainerInput::Exit, |inner| match inner.phase {
                    ContainerPhase::Creating { .. } | ContainerPhase::Starting { .. } => {
                        inner.early_exit.get_or_insert(ContainerExit {
                            id: container.id,
                            code,
                            oom_killed: false,
                            at,
                        });
                    }
                    _ if inner.status.finished_at == Timestamp::default() => {
                        note_end(inner, at, code, reason, message);
                    }
                    _ => {}
                });
        self.record_moved(container, moved == Ok(true)).await;
        self.follow_end(container);
    }

    /// A container whose monitor is gone: it ended as the monitor noted, else nobody knows how.
    pub(super) async fn container_orphaned(&self, container: &Arc<Container>, message: &str) {
        let core = self.core();
        let directory = core.pod_directory(container.pod.id);
        match core.lower.noted_exit(&directory, container.id) {
            Some(exit) => self.container_exited(&container.pod, &exit).await,
            None => {
                self.container_lost(container, message, Ended::Unknown)
                    .await;
            }
        }
    }

    async fn record_moved(&self, container: &Arc<Container>, moved: bool) {
        if !moved {
            return;
        }
        // The monitor keeps the exit until the container is removed, so a restart finds it again.
        if let Err(error) = self.core().record_container(container).await {
            tracing::error!(container.id = %container.id, error = %chain(&error),
                "an exit could not be recorded");
        }
    }

    /// The pause process ended: the pod is not ready any more.
    pub(super) async fn pod_died(&self, pod: &Arc<Pod>) {
        let moved = self
            .core()
            .pod_input(pod, PodInput::Died, |inner| inner.pause_pid = None);
        if moved == Ok(true)
            && let Err(error) = self.core().record_pod(pod).await
        {
            tracing::error!(pod.id = %pod.id, error = %chain(&error),
                "the end of a pod could not be recorded");
        }
    }

    /// The monitor is gone. If nobody asked it to end, its processes are orphans that nobody reaps or
    /// logs: they are killed, and their ends are unknown.
    pub(super) async fn monitor_lost(&self, pod: &Arc<Pod>) {
        let expected = pod.lock().monitor.take().is_none();
        if expected {
            return;
        }
        let directory = self.core().pod_directory(pod.id);
        if let Ok((monitor, events, state)) = self.core().lower.connect(&directory).await {
            tracing::warn!(pod.id = %pod.id, "only the connection to the monitor was lost");
            pod.lock().monitor = Some(monitor);
            self.reconcile(pod, &state).await;
            self.watch(pod, events);
            return;
        }
        tracing::error!(pod.id = %pod.id, "the monitor ended unasked, killing the pod's processes");
        if let Err(error) = self.kill_cgroups(pod).await {
            tracing::error!(pod.id = %pod.id, error = %chain(&error),
                "processes of a lost pod could not be killed");
        }
        for container in pod.containers() {
            self.container_orphaned(&container, "the pod's monitor ended unexpectedly")
                .await;
        }
        self.pod_died(pod).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons() {
        for (code, oom, reason) in [
            (0, false, "Completed"),
            (0, true, "Completed"),
            (137, true, "OOMKilled"),
            (137, false, "Error"),
            (1, true, "Error"),
            (143, false, "Error"),
        ] {
            assert_eq!(reason_of(code, oom), reason, "{code} {oom}");
        }
    }

    #[test]
    fn messages_are_bounded() {
        assert_eq!(bounded("short"), "short");
        for text in ["x".repeat(5000), "é".repeat(3000), "…".repeat(1366)] {
            let bounded = bounded(&text);
            assert!(bounded.len() <= MAX_MESSAGE && bounded.ends_with('…'));
        }
    }
}

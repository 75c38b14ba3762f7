//! StartContainer and StopContainer.

use std::sync::Arc;
use std::time::Duration;

use crate::base::error::chain;
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::container_create::{check_ready, monitor_of};
use crate::engine::error::{EngineError, Result};
use crate::engine::exits::{Ended, note_end, note_exit};
use crate::engine::state::{ContainerInput, ContainerPhase, Refused};
use crate::nri::ContainerEvent;

/// How long a killed process may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(15);

impl Engine {
    /// Lets the process of a created container exec.
    ///
    /// # Errors
    /// [`EngineError::State`]: it is not just created. [`EngineError::Step`]: the exec failed, the
    /// container is exited with reason StartError.
    pub(super) async fn start_container_by(&self, id: &str) -> Result<()> {
        let container = self.core().container(id)?;
        let engine = self.clone();
        self.task("StartContainer", async move {
            let _turn = container.lane.turn().await;
            check_ready(&container.pod, "start a container in")?;
            engine.start_in_turn(&container).await
        })
        .await
    }

    async fn start_in_turn(&self, container: &Arc<Container>) -> Result<()> {
        let core = self.core();
        let monitor = monitor_of(&container.pod)?;
        core.container_input(container, ContainerInput::Start, |_| {})
            .map_err(|source| state_error("start", container, source))?;
        let outcome = match self.plugins_start(container).await {
            Ok(()) => core.lower.start(&monitor, container).await,
            Err(refused) => {
                // It waits for a start that does not come.
                let killed = core.lower.kill(&monitor, container.id).await;
                if let Err(error) = killed {
                    tracing::warn!(container.id = %container.id, error = chain(&error), "not killed");
                }
                Err(refused)
            }
        };
        let now = core.stamps.next();
        let input = match &outcome {
            Ok(_) => ContainerInput::Started,
            Err(_) => ContainerInput::StartFailed,
        };
        let moved = core.container_input(container, input, |inner| match &outcome {
            Ok((at, pid)) => {
                // One that has ended meanwhile has none.
                inner.pid = inner.pid.map(|_before| *pid);
                let status = Arc::make_mut(&mut inner.status);
                status.started_at = (*at).max(status.created_at);
                if let Some(exit) = inner.early_exit.take() {
                    note_exit(inner, &exit);
                }
            }
            Err(error) => note_end(inner, now, 128, "StartError", &chain(error)),
        });
        debug_assert!(moved.is_ok(), "Starting takes both");
        if outcome.is_ok() {
            let event = ContainerEvent::PostStart;
            self.plugins_event(event, container).await;
        }
        let recorded = core.record_container(container).await;
        outcome.and(recorded)
    }

    /// Asks the container to end, kills it after the grace period. One that does not run, or that nobody
    /// knows, is fine. The wait goes on when the caller hangs up; a call with a shorter one ends it sooner.
    ///
    /// # Errors
    /// [`EngineError::Timeout`]: its processes do not end even when killed.
    pub(super) async fn stop(&self, id: &str, timeout_s: i64) -> Result<()> {
        let container = match self.core().container(id) {
            Err(EngineError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let engine = self.clone();
        let grace = Duration::from_secs(u64::try_from(timeout_s).unwrap_or(0));
        self.task("StopContainer", async move {
            // A start in flight comes first; the grace period is waited for beside the lane.
            let running = {
                let _turn = container.lane.turn().await;
                container.phase() == ContainerPhase::Running
            };
            if !running {
                engine.plugins_ended(&container).await;
                return Ok(());
            }
            if !grace.is_zero() {
                engine.ask_to_end(&container).await?;
                if tokio::time::timeout(grace, container.wait_ended())
                    .await
                    .is_ok()
                {
                    engine.plugins_ended(&container).await;
                    return Ok(());
                }
            }
            engine.kill(&container).await?;
            engine.plugins_ended(&container).await;
            Ok(())
        })
        .await
    }

    /// Sends the stop signal, once in a container's life.
    async fn ask_to_end(&self, container: &Arc<Container>) -> Result<()> {
        let first = !std::mem::replace(&mut container.lock().signalled, true);
        let Some(monitor) = container.pod.monitor().filter(|_| first) else {
            return Ok(());
        };
        let signal = match container.status().stop_signal {
            0 => 15,
            signal => signal,
        };
        self.core()
            .lower
            .signal(&monitor, container.id, signal)
            .await
    }

    /// Kills all processes of a container and waits until that is noticed.
    ///
    /// # Errors
    /// [`EngineError::Timeout`]: they do not end.
    pub(super) async fn kill(&self, container: &Arc<Container>) -> Result<()> {
        if !container.phase().alive() {
            return Ok(());
        }
        let core = self.core();
        let killed = match container.pod.monitor() {
            Some(monitor) => core.lower.kill(&monitor, container.id).await,
            None => Err(EngineError::GivenUp { what: "monitor" }),
        };
        if killed.is_err() {
            let (cgroups, path) = (core.lower.cgroups.clone(), container.cgroup());
            crate::engine::core::blocking_step("kill the container's processes", move || {
                cgroups.kill(&path)
            })
            .await?;
        }
        if container.pod.monitor().is_none() {
            self.container_lost(container, "its monitor is gone", Ended::Killed)
                .await;
        }
        if tokio::time::timeout(KILL_WAIT, container.wait_ended())
            .await
            .is_ok()
        {
            return Ok(());
        }
        let pid = container.lock().pid.unwrap_or_default();
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        Err(EngineError::Timeout {
            what: format!(
                "killing container {}: process {pid} does not end (it waits in the kernel in {:?})",
                container.id, wchan
            ),
            after_s: KILL_WAIT.as_secs(),
        })
    }
}

/// The container's state forbids `verb`.
pub(super) fn state_error(
    verb: &'static str,
    container: &Container,
    source: Refused,
) -> EngineError {
    EngineError::State {
        verb,
        what: "container",
        id: container.id.to_string(),
        source,
    }
}

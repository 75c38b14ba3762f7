//! ExecSync, UpdateContainerResources and ReopenContainerLog.

use std::sync::Arc;
use std::time::Duration;

use crate::base::container::Resources;
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::container_create::monitor_of;
use crate::engine::container_start::state_error;
use crate::engine::core::blocking;
use crate::engine::error::{EngineError, Result};
use crate::engine::facade::ExecOutput;
use crate::engine::state::{ContainerPhase, Refused};
use crate::nri::ContainerEvent;

/// Most bytes of each of the two streams of an ExecSync: both and the rest fit kubelet's 16 MiB.
const OUTPUT_CAP: usize = 8 * 1024 * 1024 - 16 * 1024;

/// Refuses a container that does not run.
///
/// # Errors
/// [`EngineError::State`].
pub(super) fn check_running(verb: &'static str, container: &Container) -> Result<()> {
    match container.phase() {
        ContainerPhase::Running => Ok(()),
        other => Err(state_error(
            verb,
            container,
            Refused {
                state: other.adjective(),
            },
        )),
    }
}

impl Engine {
    /// Runs a command in a running container. A caller that hangs up leaves it running to its end or
    /// its time limit.
    ///
    /// # Errors
    /// [`EngineError::Timeout`]: the time limit passed, its processes are killed. [`EngineError::State`].
    pub(super) async fn exec(
        &self,
        id: &str,
        command: Vec<String>,
        timeout_s: i64,
    ) -> Result<ExecOutput> {
        let container = self.core().container(id)?;
        if command.is_empty() {
            return Err(EngineError::Invalid {
                field: "cmd",
                value: String::new(),
                mend: "name a command".to_owned(),
            });
        }
        check_running("exec in", &container)?;
        let limit = match u64::try_from(timeout_s) {
            Ok(seconds) if seconds > 0 => Some(Duration::from_secs(seconds)),
            _ => None,
        };
        let engine = self.clone();
        self.task("ExecSync", async move {
            let core = engine.core();
            let monitor = monitor_of(&container.pod)?;
            let (work, target) = (engine.clone(), Arc::clone(&container));
            let plan = blocking("plan an exec", move || {
                work.core()
                    .lower
                    .exec_plan(work.core(), &target, command, false)
            })
            .await?;
            core.lower
                .exec_sync(&monitor, container.id, &plan, limit, OUTPUT_CAP)
                .await
        })
        .await
    }

    /// Changes the limits of a created or running container, all or none.
    ///
    /// # Errors
    /// [`EngineError::State`]; [`EngineError::Step`]: the old limits are in force.
    pub(super) async fn update(&self, id: &str, resources: Resources) -> Result<()> {
        let container = self.core().container(id)?;
        let engine = self.clone();
        self.task("UpdateContainerResources", async move {
            let _turn = container.lane.turn().await;
            match container.phase() {
                ContainerPhase::Created | ContainerPhase::Running => {}
                other => {
                    let state = other.adjective();
                    return Err(state_error("update", &container, Refused { state }));
                }
            }
            let wanted = engine.plugins_update(&container, resources).await?;
            engine.apply_limits(&container, wanted).await?;
            let event = ContainerEvent::PostUpdate;
            engine.plugins_event(event, &container).await;
            Ok(())
        })
        .await
    }

    /// Opens the log of a running container again.
    ///
    /// # Errors
    /// [`EngineError::State`]: it does not run; no file is made then.
    pub(super) async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.core().container(id)?;
        check_running("reopen the log of", &container)?;
        let engine = self.clone();
        self.task("ReopenContainerLog", async move {
            let monitor = monitor_of(&container.pod)?;
            engine.core().lower.reopen_log(&monitor, container.id).await
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_update_does_not_give_stays() {
        let old = Resources {
            cpu_shares: 512,
            memory_limit: 1 << 20,
            cpuset_cpus: "0".to_owned(),
            ..Resources::default()
        };
        let new = Resources {
            cpu_quota: -1,
            memory_limit: 1 << 21,
            ..Resources::default()
        };
        let merged = old.with(&new);
        assert_eq!(merged.cpu_shares, 512);
        assert_eq!(merged.cpu_quota, -1);
        assert_eq!(merged.memory_limit, 1 << 21);
        assert_eq!(merged.cpuset_cpus, "0");
    }
}

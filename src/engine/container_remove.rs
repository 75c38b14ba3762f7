//! RemoveContainer, and what undoing and restoring share with it. The log is the kubelet's and stays.

use std::path::Path;
use std::sync::Arc;

use crate::base::tasks::Tasks;
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::container_start::state_error;
use crate::engine::core::{blocking, remove_directory};
use crate::engine::error::{CleanUp, EngineError, Result};
use crate::engine::lower::bundle_of;
use crate::engine::state::{ContainerInput, ContainerPhase};
use crate::runtime::resctrl::Resctrl;

impl Engine {
    /// Removes a container, killing it first if it runs; one that nobody knows is fine.
    ///
    /// # Errors
    /// [`EngineError::CleanUp`] names each step that failed; a repetition tries them again.
    pub(super) async fn remove(&self, id: &str) -> Result<()> {
        let container = match self.core().container(id) {
            Err(EngineError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        self.remove_in_task(container).await
    }

    /// The removal as a task of its own.
    ///
    /// # Errors
    /// As [`Engine::remove`].
    pub(super) async fn remove_in_task(&self, container: Arc<Container>) -> Result<()> {
        let engine = self.clone();
        self.task("RemoveContainer", async move {
            let _turn = container.lane.turn().await;
            if engine.core().containers.get(container.id).is_none() {
                return Ok(());
            }
            engine.remove_container_in_turn(&container).await
        })
        .await
    }

    async fn remove_container_in_turn(&self, container: &Arc<Container>) -> Result<()> {
        let core = self.core();
        if container.phase() == ContainerPhase::Running {
            self.kill(container).await?;
        }
        let mut clean_up = CleanUp::default();
        let record = core
            .container_input(container, ContainerInput::Remove, |_| {})
            .map_err(|source| state_error("remove", container, source))?;
        if record {
            clean_up.note("record", core.record_container(container).await);
        }
        self.plugins_remove(container).await;
        self.erase(container, &mut clean_up).await;
        if clean_up.is_clean() {
            let pod = &container.pod;
            core.containers.remove(container.id);
            pod.lock().containers.remove(&container.id);
            let key = (
                pod.id,
                container.config.name.clone(),
                container.config.attempt,
            );
            core.container_names.release(&key, container.id);
            let _told = core
                .container_input(container, ContainerInput::Gone, |_| {})
                .is_ok();
        }
        clean_up.finish("container", container.id)
    }

    /// Removes what is left of a container that does not run: the waiting process of one never started,
    /// its cgroup, writable layer, files and record.
    pub(super) async fn erase(&self, container: &Arc<Container>, clean_up: &mut CleanUp) {
        let core = self.core();
        let removed = match container.pod.monitor() {
            Some(monitor) => core.lower.forget(&monitor, container.id).await,
            None => core.lower.clean(core, container).await,
        };
        let external = container.pod.handler.runtime.is_some();
        let forgotten = removed.is_ok();
        match removed {
            // What an OCI runtime keeps only it can remove.
            Err(error) if external => clean_up.note::<EngineError>("OCI runtime", Err(error)),
            // A monitor that does not answer does not hold up the removal: its processes go by cgroup.
            Err(error) => {
                tracing::warn!(container.id = %container.id, error = %crate::base::error::chain(&error),
                    "the monitor did not forget a container");
            }
            Ok(()) => {}
        }
        let (cgroups, path) = (core.lower.cgroups.clone(), container.cgroup());
        let files = core.pod_directory(container.pod.id);
        let (directory, trash) = (
            core.container_directory(container.id),
            Arc::clone(&core.trash),
        );
        container.meter.close();
        let (id, bundle) = (container.id, bundle_of(core, container));
        let hooked = !external && bundle.exists();
        let erased = blocking("remove a container's cgroup and files", move || {
            let mut steps = CleanUp::default();
            steps.note("kill", cgroups.kill(&path));
            steps.note("cgroup", cgroups.remove(&path));
            if let Some(resctrl) = Resctrl::find() {
                steps.note("resctrl group", resctrl.remove(id));
            }
            // Hooks need the plan and the bundle once more.
            let suffixes: &[&str] = if hooked { &["json"] } else { &["plan", "json"] };
            for suffix in suffixes {
                let file = files.join(format!("{id}.{suffix}"));
                steps.note("file", remove_file(&file));
            }
            if external && forgotten {
                steps.note("bundle", remove_directory(&bundle));
            }
            steps.note("writable layer", trash.take(&directory));
            steps.finish("files of container", id)
        });
        clean_up.note("erase", erased.await);
        if hooked && clean_up.is_clean() {
            // The last of a container: whatever its hooks say, it is gone.
            if let Err(error) = core.lower.poststop(core, container).await {
                tracing::warn!(container.id = %id, error = %crate::base::error::chain(&error), "poststop hooks failed");
            }
            let (bundle, files) = (
                bundle_of(core, container),
                core.pod_directory(container.pod.id),
            );
            let erased = blocking("remove a container's bundle and plan", move || {
                remove_directory(&bundle)?;
                remove_file(&files.join(format!("{id}.plan")))
            });
            clean_up.note("bundle", erased.await);
        }
        if clean_up.is_clean() {
            core.lower.release(id);
            clean_up.note("record", core.forget_container(container).await);
            self.empty_trash();
        }
    }

    /// Removes what waits in the trash, in the background; what is left when the daemon ends the next one removes.
    pub(super) fn empty_trash(&self) {
        let (trash, tasks) = (Arc::clone(&self.core().trash), self.core().tasks.clone());
        let _emptied = self.core().tasks.spawn(async move {
            let emptied = Tasks::blocking(move || trash.empty(&|| tasks.is_ending())).await;
            if let Err(error) = emptied {
                tracing::error!(%error, "the trash is not being emptied");
            }
        });
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(EngineError::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}

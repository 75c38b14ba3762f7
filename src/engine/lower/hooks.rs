//! Containers with hooks that berth itself runs: the bundle that hooks look for, and those after the end.

use crate::engine::container::Container;
use crate::engine::core::{Core, give, make_directory, make_pod_directory};
use crate::engine::error::{EngineError, Result};
use crate::engine::lower::Lower;
use crate::engine::lower::plans::write_json;
use crate::runtime::spec::Built;

/// Makes the bundle of a container with hooks: `config.json`, and `rootfs`, on which only the container's own mount
/// namespace has something, until its process leaves for it.
///
/// # Errors
/// [`EngineError::Step`], [`EngineError::Store`].
pub(super) fn furnish(container: &Container, built: &Built) -> Result<()> {
    let Some(hooks) = &built.plan.hooks else {
        return Ok(());
    };
    // A pod's root is not the node's: it may pass, and read what is its own.
    make_pod_directory(&hooks.bundle, &container.pod)?;
    let rootfs = hooks.bundle.join("rootfs");
    make_directory(&rootfs, 0o755)?;
    let config = hooks.bundle.join("config.json");
    write_json(&config, &built.spec)?;
    give(&config, &container.pod)
}

impl Lower {
    /// Runs the poststop hooks of a container of which nothing else is left; by another monitor where its own is gone.
    ///
    /// # Errors
    /// [`EngineError::Step`]: all have run, these failed; or they could not be run.
    pub(crate) async fn poststop(&self, core: &Core, container: &Container) -> Result<()> {
        let (pod, id) = (container.pod.id, container.id);
        let path = core.pod_directory(pod).join(format!("{id}.plan"));
        let step = format!("read the plan {}", path.display());
        let plan = std::fs::read(&path).map_err(EngineError::io(step))?;
        let ran = match container.pod.monitor() {
            Some(monitor) => monitor.poststop(id, plan).await,
            None => {
                let (monitor, _events) = self.monitor(pod, &core.pod_directory(pod)).await?;
                let ran = monitor.poststop(id, plan).await;
                self.end_monitor(&monitor).await?;
                ran
            }
        };
        ran.map_err(EngineError::step("run the poststop hooks"))
    }
}

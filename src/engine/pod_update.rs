//! UpdatePodSandboxResources: told to plugins, kept, shown.

use crate::base::container::Resources;
use crate::engine::Engine;
use crate::engine::error::Result;

impl Engine {
    /// Notes the pod's limits: they are shown in verbose status and survive the daemon. The pod's own
    /// cgroup belongs to kubelet, which has changed it before it says so.
    ///
    /// What is absent stays as it was.
    ///
    /// # Errors
    /// [`crate::engine::EngineError::NotFound`]; [`crate::engine::EngineError::Step`]: a plugin refuses, nothing has
    /// changed; [`crate::engine::EngineError::Store`]: noted in memory only.
    pub(super) async fn note_resources(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<()> {
        let pod = self.core().pod(id)?;
        let engine = self.clone();
        self.task("UpdatePodSandboxResources", async move {
            let _turn = pod.lane.turn().await;
            let (was_overhead, was) = {
                let inner = pod.lock();
                (inner.overhead.clone(), inner.resources.clone())
            };
            let told = overhead.clone().or(was_overhead).unwrap_or_default();
            let wanted = resources.clone().or(was).unwrap_or_default();
            engine.plugins_update_pod(&pod, &told, &wanted).await?;
            {
                let mut inner = pod.lock();
                if overhead.is_some() {
                    inner.overhead = overhead;
                }
                if resources.is_some() {
                    inner.resources = resources;
                }
            }
            engine.core().record_pod(&pod).await?;
            engine.plugins_updated_pod(&pod).await;
            Ok(())
        })
        .await
    }
}

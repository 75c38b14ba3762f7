//! Pods and containers: the only owner of state, the only one who decides. One method per CRI verb.

mod container;
mod container_create;
mod container_exec;
mod container_remove;
mod container_start;
mod core;
mod error;
mod events;
mod exits;
mod facade;
mod handlers;
mod lane;
mod lower;
mod meters;
mod metrics;
pub(crate) mod monitor_client;
mod names;
mod plugins;
mod pod;
mod pod_run;
mod pod_stop;
mod pod_update;
mod restore;
mod state;
mod stats;
mod status;
mod streams;
mod table;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use crate::base::container::{ContainerConfig, ContainerFilter, ContainerStatus, Resources};
use crate::base::id::{ContainerId, PodId};
use crate::base::image::{Credentials, FilesystemUsage, Image, ImageSpec, Progress};
use crate::base::pod::{PodConfig, PodFilter, PodStatus};
use crate::base::tasks::Tasks;
use crate::engine::core::Core;
use crate::images::ImageStore;
use crate::network::Network;
use crate::nri::Nri;

pub(crate) use self::core::{EngineConfig, SelinuxConfig};
pub(crate) use error::{EngineError, Result};
pub(crate) use events::{Listener, Silence};
pub(crate) use facade::{
    ContainerFigures, EngineEvent, ExecOutput, Info, Inspection, Metrics, PodFigures, PodMoment,
    RuntimeStatus,
};
pub(crate) use streams::StreamEndpoint;

/// The engine. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Engine(Arc<Core>);

/// The layers below, opened.
#[derive(Debug)]
pub(crate) struct Parts {
    /// Images.
    pub(crate) images: ImageStore,
    /// Network.
    pub(crate) network: Network,
    /// Plugins: none has joined yet.
    pub(crate) nri: Nri,
}

impl Engine {
    /// Starts the engine: restores what the records and the monitors tell, and is ready for calls then.
    /// The caller holds the locks of `root` and `state`.
    ///
    /// # Errors
    /// [`EngineError`]: the records cannot be read, or this machine lacks what pods need.
    pub(crate) async fn start(config: EngineConfig, parts: Parts, tasks: Tasks) -> Result<Self> {
        let boot = restore::boot_id()?;
        let nri = parts.nri.clone();
        let lower = lower::Lower::open(&config, parts).await?;
        let engine = Self(Arc::new(Core::open(config, lower, nri, tasks)?));
        engine.restore(&boot).await?;
        let asking = engine.clone();
        let _asked = engine
            .core()
            .tasks
            .spawn(async move { asking.ask_features().await });
        let node = plugins::PluginNode::new(&engine);
        engine.core().nri.start(Arc::new(node)).await;
        Ok(engine)
    }

    /// Lets go of the monitors; pods go on. What is idle and made for pods only is removed.
    pub(crate) async fn shutdown(&self) {
        self.core().nri.stop().await;
        let _cut_off = self.core().lower.followers.shutdown(Duration::ZERO).await;
        self.core().lower.shut_down(self.core().pods.len()).await;
    }

    fn core(&self) -> &Core {
        &self.0
    }

    /// Runs the work of a verb as a task of its own: it goes on when the caller hangs up.
    async fn task<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let done = self.core().tasks.spawn(work).await;
        done.unwrap_or(Err(EngineError::GivenUp { what }))
    }
}

impl Engine {
    /// CRI: `RunPodSandbox`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn run_pod_sandbox(
        &self,
        config: PodConfig,
        runtime_handler: String,
    ) -> Result<PodId> {
        self.run_pod(config, runtime_handler).await
    }
    /// CRI: `StopPodSandbox`. An unknown id is fine.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        self.stop_pod(id).await
    }
    /// CRI: `RemovePodSandbox`. An unknown id is fine.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        self.remove_pod(id).await
    }
    /// CRI: `PodSandboxStatus` and its containers.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn pod_sandbox_status(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<(PodMoment, Info)> {
        self.status_of_pod(id, verbose).await
    }
    /// CRI: `ListPodSandbox`. From memory.
    pub(crate) fn list_pod_sandboxes(&self, filter: &PodFilter) -> Vec<Arc<PodStatus>> {
        let pods = self.select_pods(filter);
        pods.iter().map(|pod| pod.status()).collect()
    }
    /// CRI: `CreateContainer`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn create_container(
        &self,
        pod: &str,
        config: ContainerConfig,
    ) -> Result<ContainerId> {
        self.create(pod, config).await
    }
    /// CRI: `StartContainer`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn start_container(&self, id: &str) -> Result<()> {
        self.start_container_by(id).await
    }
    /// CRI: `StopContainer`; seconds of grace, at most 0 means none. An unknown id is fine.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn stop_container(&self, id: &str, timeout_s: i64) -> Result<()> {
        self.stop(id, timeout_s).await
    }
    /// CRI: `RemoveContainer`. An unknown id is fine.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn remove_container(&self, id: &str) -> Result<()> {
        self.remove(id).await
    }
    /// CRI: `ListContainers`. From memory.
    pub(crate) fn list_containers(&self, filter: &ContainerFilter) -> Vec<Arc<ContainerStatus>> {
        let containers = self.select_containers(filter);
        containers
            .iter()
            .map(|container| container.status())
            .collect()
    }
    /// CRI: `ContainerStatus`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn container_status(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<(Arc<ContainerStatus>, Info)> {
        self.status_of_container(id, verbose).await
    }
    /// CRI: `UpdateContainerResources`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn update_container_resources(
        &self,
        id: &str,
        resources: Resources,
    ) -> Result<()> {
        self.update(id, resources).await
    }
    /// CRI: `UpdatePodSandboxResources`; what is absent stays as it was.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn update_pod_sandbox_resources(
        &self,
        id: &str,
        overhead: Option<Resources>,
        resources: Option<Resources>,
    ) -> Result<()> {
        self.note_resources(id, overhead, resources).await
    }
    /// CRI: `ReopenContainerLog`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn reopen_container_log(&self, id: &str) -> Result<()> {
        self.reopen_log(id).await
    }
    /// CRI: `ExecSync`; seconds, at most 0: no limit.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn exec_sync(
        &self,
        id: &str,
        command: Vec<String>,
        timeout_s: i64,
    ) -> Result<ExecOutput> {
        self.exec(id, command, timeout_s).await
    }
    /// CRI: `ContainerStats`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn container_stats(&self, id: &str) -> Result<ContainerFigures> {
        self.figures(id).await
    }
    /// CRI: `ListContainerStats`: running ones only; who vanishes meanwhile is left out.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn list_container_stats(
        &self,
        filter: &ContainerFilter,
    ) -> Result<Vec<ContainerFigures>> {
        self.all_figures(filter).await
    }
    /// CRI: `PodSandboxStats`.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn pod_sandbox_stats(&self, id: &str) -> Result<PodFigures> {
        self.figures_of_pod(id).await
    }
    /// CRI: `ListPodSandboxStats`: ready ones only.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn list_pod_sandbox_stats(
        &self,
        filter: &PodFilter,
    ) -> Result<Vec<PodFigures>> {
        self.all_figures_of_pods(filter).await
    }
    /// CRI: `ListPodSandboxMetrics`: of the ready pods.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn metrics(&self) -> Result<Metrics> {
        self.read_metrics().await
    }
    /// CRI: `Status`.
    pub(crate) async fn status(&self, verbose: bool) -> RuntimeStatus {
        self.runtime_status(verbose).await
    }
    /// CRI: `UpdateRuntimeConfig`: the node's pod CIDRs, comma separated for two families.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn update_runtime_config(&self, pod_cidr: &str) -> Result<()> {
        self.core().lower.set_pod_cidr(pod_cidr).await
    }
    /// CRI: `GetContainerEvents`; bounded, a slow reader loses the oldest and is told how many.
    pub(crate) fn events(&self) -> Listener {
        self.core().listen()
    }
    /// CRI: `PullImage`: the image's id. `progress` may be dropped.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn pull_image(
        &self,
        spec: ImageSpec,
        credentials: Option<Credentials>,
        progress: Option<tokio::sync::mpsc::Sender<Progress>>,
    ) -> Result<String> {
        self.core().lower.pull(spec, credentials, progress).await
    }
    /// CRI: `ListImages`; an empty reference lists all.
    pub(crate) fn list_images(&self, reference: &str) -> Vec<Arc<Image>> {
        self.core().lower.list_images(reference)
    }
    /// CRI: `ImageStatus`; absent: not here.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn image_status(
        &self,
        reference: &str,
        verbose: bool,
    ) -> Result<Option<(Arc<Image>, Info)>> {
        Ok(self.core().lower.image_status(reference, verbose))
    }
    /// CRI: `RemoveImage`. An unknown reference is fine.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn remove_image(&self, reference: &str) -> Result<()> {
        self.core().lower.remove_image(reference).await
    }
    /// CRI: `ImageFsInfo`: (image filesystems, container filesystems).
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn image_fs_info(
        &self,
    ) -> Result<(Vec<FilesystemUsage>, Vec<FilesystemUsage>)> {
        self.filesystems().await
    }
    /// berth's own: imports a docker-archive or oci-archive; the ids and names of its images.
    ///
    /// # Errors
    /// [`EngineError`]: its kind says what the caller can do.
    pub(crate) async fn import_images(
        &self,
        archive: std::fs::File,
        name: Option<String>,
        progress: Option<tokio::sync::mpsc::Sender<Progress>>,
    ) -> Result<Vec<Arc<Image>>> {
        self.core().lower.import(archive, name, progress).await
    }
    /// For cAdvisor: a container or sandbox by its full id.
    pub(crate) async fn inspect(&self, id: &str) -> Option<Inspection> {
        self.inspection(id).await
    }
}

#[cfg(test)]
mod tests;

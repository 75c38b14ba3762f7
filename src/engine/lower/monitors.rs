//! Monitors.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use crate::base::clock::Timestamp;
use crate::base::id::{ContainerId, PodId};
use crate::engine::container::Container;
use crate::engine::error::{EngineError, Result};
use crate::engine::facade::ExecOutput;
use crate::engine::lower::{Lower, Materials};
use crate::engine::monitor_client::{Created, Events, MonitorClient, MonitorError, NewContainer};
use crate::engine::pod::Pod;
use crate::monitor::protocol::{ContainerExit, MonitorState, Stdio};
use crate::runtime::plan::{ExecPlan, Plan};
use crate::runtime::spec::userns::plan_mappings;

/// A container was not made. Where its time was over, the error says whose that is.
fn made_no_container(container: &Container, error: MonitorError) -> EngineError {
    const ETIMEDOUT: i32 = 110;
    let name = &container.config.name;
    match &error {
        MonitorError::Refused { fault, .. }
            if (fault.stage.as_str(), fault.errno) == ("monitor", ETIMEDOUT) =>
        {
            let handler = &container.pod.handler;
            let key = handler.key("container_create_timeout");
            EngineError::Timeout {
                what: format!("creating container {name} ({key}: raise it if that is too short)"),
                after_s: handler.create_timeout().as_secs(),
            }
        }
        _ => EngineError::step(format!("create container {name}"))(error),
    }
}

impl Lower {
    /// A monitor for a pod with this directory, which exists.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn monitor(
        &self,
        pod: PodId,
        directory: &Path,
    ) -> Result<(MonitorClient, Events)> {
        self.monitors
            .take(pod, directory)
            .await
            .map_err(EngineError::step("get a monitor for the pod"))
    }

    /// The monitor that serves the pod with this directory since before the daemon's start.
    ///
    /// # Errors
    /// [`EngineError::Step`]: it is gone.
    pub(crate) async fn connect(
        &self,
        directory: &Path,
    ) -> Result<(MonitorClient, Events, MonitorState)> {
        let (monitor, state, events) = MonitorClient::connect(directory, &self.followers)
            .await
            .map_err(EngineError::step("connect to the pod's monitor"))?;
        Ok((monitor, events, state))
    }

    /// Makes the pod's user namespace, with a network namespace in it unless the pod uses the node's.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn user_namespace(
        &self,
        monitor: &MonitorClient,
        pod: &Pod,
    ) -> Result<Option<OwnedFd>> {
        let Some(user) = pod.config.security.namespaces.own_user() else {
            return Ok(None);
        };
        let (uids, gids) = (plan_mappings(&user.uids), plan_mappings(&user.gids));
        let made = monitor
            .user_namespace(uids, gids, !pod.host_network())
            .await;
        let network = made.map_err(EngineError::step("make the pod's user namespace"))?;
        match network {
            None => Ok(None),
            Some(netns) => self.furnish_netns(netns).await.map(Some),
        }
    }

    /// Starts pause; its pid.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn start_pause(
        &self,
        pod: &Pod,
        monitor: &MonitorClient,
        plan: &Plan,
        netns: Option<OwnedFd>,
    ) -> Result<u32> {
        monitor
            .sandbox(plan, netns)
            .await
            .map_err(EngineError::step(format!(
                "start the sandbox of pod {}",
                pod.id
            )))
    }

    /// Makes a container whose process waits for its start.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn create_container(
        &self,
        monitor: &MonitorClient,
        container: &Container,
        materials: &Materials,
    ) -> Result<Created> {
        let config = &container.config;
        let new = NewContainer {
            id: container.id,
            stdio: Stdio {
                log_path: container.status().log_path.clone().into(),
                stdin: config.stdin,
                stdin_once: config.stdin_once,
                terminal: config.tty,
                max_line: self.max_log_line,
            },
            memory_cgroup: materials.dirs.memory.clone(),
            kill_cgroup: materials.dirs.kill.clone(),
            limit: container.pod.handler.create_timeout(),
        };
        let made = match &materials.order {
            None => monitor.container(new, &materials.plan).await,
            Some(order) => {
                let (runtime, bundle) = (order.runtime.clone(), order.bundle.clone());
                let config = &order.config;
                let plan = &materials.plan;
                monitor.external(new, plan, config, runtime, bundle).await
            }
        };
        made.map_err(|error| made_no_container(container, error))
    }

    /// Lets a container's process exec; when it did.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the exec failed, the process is gone.
    pub(crate) async fn start(
        &self,
        monitor: &MonitorClient,
        container: &Container,
    ) -> Result<(Timestamp, u32)> {
        monitor
            .start(container.id)
            .await
            .map_err(EngineError::step(format!(
                "start container {}",
                container.config.name
            )))
    }

    /// Sends a signal to a container's first process.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn signal(
        &self,
        monitor: &MonitorClient,
        id: ContainerId,
        signal: i32,
    ) -> Result<()> {
        monitor
            .signal(id, signal)
            .await
            .map_err(EngineError::step("send the stop signal"))
    }

    /// Kills all processes of a container.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn kill(&self, monitor: &MonitorClient, id: ContainerId) -> Result<()> {
        monitor
            .kill(id)
            .await
            .map_err(EngineError::step("kill the container"))
    }

    /// Opens a container's log again.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn reopen_log(&self, monitor: &MonitorClient, id: ContainerId) -> Result<()> {
        monitor
            .reopen_log(id)
            .await
            .map_err(EngineError::step("reopen the log"))
    }

    /// Makes the monitor forget a container, killing what waits for its start.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn forget(&self, monitor: &MonitorClient, id: ContainerId) -> Result<()> {
        monitor
            .remove(id)
            .await
            .map_err(EngineError::step("make the monitor forget the container"))
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`EngineError::Timeout`]; [`EngineError::Step`].
    pub(crate) async fn exec_sync(
        &self,
        monitor: &MonitorClient,
        id: ContainerId,
        plan: &ExecPlan,
        limit: Option<Duration>,
        cap: usize,
    ) -> Result<ExecOutput> {
        match monitor.exec_sync(id, plan, cap, limit).await {
            Err(MonitorError::Deadline {
                call: "exec",
                after,
            }) => Err(EngineError::Timeout {
                what: "the command".to_owned(),
                after_s: after.as_secs(),
            }),
            other => other.map_err(EngineError::step("exec in the container")),
        }
    }

    /// Kills everything in a pod and waits until it is gone.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn stop_monitor(&self, monitor: &MonitorClient) -> Result<()> {
        monitor
            .stop()
            .await
            .map_err(EngineError::step("stop the pod's processes"))
    }

    /// Ends a monitor in which nothing runs any more; one that does not listen is killed.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn end_monitor(&self, monitor: &MonitorClient) -> Result<()> {
        if monitor.shutdown().await.is_ok() {
            return Ok(());
        }
        monitor
            .kill_monitor()
            .await
            .map_err(EngineError::step("end the pod's monitor"))
    }

    /// How a container ended, as its monitor wrote it down before it was lost itself. Blocks on tmpfs.
    pub(crate) fn noted_exit(&self, directory: &Path, id: ContainerId) -> Option<ContainerExit> {
        crate::monitor::record::read(directory, id)
    }
}

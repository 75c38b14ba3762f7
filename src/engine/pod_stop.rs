//! StopPodSandbox and RemovePodSandbox, and what undoing and restoring share with them.
//!
//! Stop: no new container -> wait for those in the making -> kill everything at once -> network. Remove:
//! stop, then containers (several at a time), monitor, cgroups, directory, record. Every step can be repeated.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use futures_util::stream;

use crate::base::error::chain;
use crate::engine::Engine;
use crate::engine::core::{blocking, blocking_step, remove_directory};
use crate::engine::error::{CleanUp, EngineError, Result};
use crate::engine::exits::Ended;
use crate::engine::pod::Pod;
use crate::engine::state::{ContainerPhase, PodInput, PodPhase};

/// How long work on containers in flight may take before the pod is killed under it.
const LANE_WAIT: Duration = Duration::from_secs(10);
/// How long the exits of killed processes may take to be noticed.
const EXIT_WAIT: Duration = Duration::from_secs(10);
/// How many containers of a pod are removed at a time: what an OCI runtime does for that is mostly waiting.
const REMOVALS: usize = 4;

impl Engine {
    /// Stops a pod; one that is stopped, or that nobody knows, is fine.
    ///
    /// # Errors
    /// [`EngineError::CleanUp`] names each step that failed; a repetition tries them again.
    pub(super) async fn stop_pod(&self, id: &str) -> Result<()> {
        let pod = match self.core().pod(id) {
            Err(EngineError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let engine = self.clone();
        self.task("StopPodSandbox", async move {
            let _turn = pod.lane.turn().await;
            engine.stop_in_turn(&pod).await
        })
        .await
    }

    /// The stop itself; the caller has the pod's turn.
    pub(super) async fn stop_in_turn(&self, pod: &Arc<Pod>) -> Result<()> {
        let core = self.core();
        if matches!(pod.lock().phase, PodPhase::Stopped | PodPhase::Removing) {
            return Ok(());
        }
        core.pod_input(pod, PodInput::Stop, |_| {})
            .map_err(|source| EngineError::State {
                verb: "stop",
                what: "pod sandbox",
                id: pod.id.to_string(),
                source,
            })?;
        let mut clean_up = CleanUp::default();
        clean_up.note("record", core.record_pod(pod).await);
        // Whoever makes, starts or removes a container finishes first; who comes later is refused. One that
        // hangs (an exec from a dead filesystem) is ended by the kill.
        let containers = pod.containers();
        let all = async {
            for container in &containers {
                drop(container.lane.turn().await);
            }
        };
        let _all_done = tokio::time::timeout(LANE_WAIT, all).await.is_ok();
        self.tell_of_stop(pod).await;
        self.halt_pod(pod, &mut clean_up).await;
        let input = match clean_up.is_clean() {
            true => PodInput::Stopped,
            false => PodInput::StopFailed,
        };
        if input == PodInput::Stopped {
            self.leave_pause_cgroup(pod).await;
        }
        let moved = core.pod_input(pod, input, |inner| {
            if input == PodInput::Stopped {
                Arc::make_mut(&mut inner.status).ips = vec![];
            }
        });
        if moved == Ok(true) {
            clean_up.note("record", core.record_pod(pod).await);
        }
        clean_up.finish("pod sandbox", pod.id)
    }

    /// Removes the cgroup of pause, which has ended, as those of containers are; what stays goes with the pod.
    async fn leave_pause_cgroup(&self, pod: &Arc<Pod>) {
        let (cgroups, path) = (self.core().lower.cgroups.clone(), pod.pause_cgroup());
        let removed = blocking_step("remove the cgroup of an ended pause", move || {
            cgroups.remove(&path)
        });
        if let Err(error) = removed.await {
            tracing::warn!(pod.id = %pod.id, error = %chain(&error), "a cgroup stays");
        }
    }

    /// Tells the plugins that the containers have ended, then that the pod has. If there are any, the containers die
    /// first: plugins find the network still there, and nobody using it.
    async fn tell_of_stop(&self, pod: &Arc<Pod>) {
        if self.plugins_none_to_tell_of_stop(pod).await {
            return;
        }
        let containers = pod.containers();
        let kills = containers
            .iter()
            .filter(|one| one.phase() == ContainerPhase::Running);
        // What cannot be killed now the next step kills with the pod, or says why not.
        let _killed = join_all(kills.map(|container| self.kill(container))).await;
        for container in &containers {
            self.plugins_stop(container).await;
        }
        self.plugins_stop_pod(pod).await;
    }

    /// Kills all processes of the pod, then lets go of its network.
    pub(super) async fn halt_pod(&self, pod: &Arc<Pod>, clean_up: &mut CleanUp) {
        let core = self.core();
        let stopped = match pod.monitor() {
            Some(monitor) => core.lower.stop_monitor(&monitor).await,
            None => Err(EngineError::GivenUp { what: "monitor" }),
        };
        if stopped.is_err() {
            // Without its monitor, or with one that does not answer: by cgroup.
            clean_up.note("kill", self.kill_cgroups(pod).await);
        }
        if clean_up.is_clean() {
            self.settle_exits(pod).await;
            if pod.lock().networked {
                let detached = core.lower.detach(pod.id).await;
                if detached.is_ok() {
                    pod.lock().networked = false;
                }
                clean_up.note("network", detached);
            }
        }
    }

    /// Kills every process in the cgroups of the pod.
    pub(super) async fn kill_cgroups(&self, pod: &Arc<Pod>) -> Result<()> {
        let mut paths: Vec<_> = pod.containers().iter().map(|c| c.cgroup()).collect();
        paths.push(pod.pause_cgroup());
        let cgroups = self.core().lower.cgroups.clone();
        blocking("kill the pod's processes", move || {
            let mut clean_up = CleanUp::default();
            for path in paths {
                clean_up.note(&path, cgroups.kill(&path));
            }
            clean_up.finish("processes of pod", "")
        })
        .await
    }

    /// Waits until the exits of the killed containers are noticed; what the monitor did not tell is made
    /// up: everything is dead by now.
    async fn settle_exits(&self, pod: &Arc<Pod>) {
        let containers = pod.containers();
        let all = async {
            for container in &containers {
                if container.is_listed() {
                    container.wait_ended().await;
                }
            }
        };
        let wait = match pod.monitor() {
            Some(_) => EXIT_WAIT,
            None => Duration::ZERO,
        };
        if tokio::time::timeout(wait, all).await.is_err() {
            for container in &containers {
                self.container_lost(
                    container,
                    "its monitor did not tell how it ended",
                    Ended::Killed,
                )
                .await;
            }
        }
    }

    /// Removes a pod with its containers; one that nobody knows is fine.
    ///
    /// # Errors
    /// [`EngineError::CleanUp`] names each step that failed; a repetition tries them again.
    pub(super) async fn remove_pod(&self, id: &str) -> Result<()> {
        let pod = match self.core().pod(id) {
            Err(EngineError::NotFound { .. }) => return Ok(()),
            found => found?,
        };
        let engine = self.clone();
        self.task("RemovePodSandbox", async move {
            let _turn = pod.lane.turn().await;
            if engine.core().pods.get(pod.id).is_none() {
                return Ok(());
            }
            engine.stop_in_turn(&pod).await?;
            engine.remove_in_turn(&pod).await
        })
        .await
    }

    /// The removal of a stopped pod; the caller has its turn.
    pub(super) async fn remove_in_turn(&self, pod: &Arc<Pod>) -> Result<()> {
        let core = self.core();
        let mut clean_up = CleanUp::default();
        let containers = stream::iter(pod.containers());
        let removals = containers.map(|container| self.remove_in_task(container));
        let mut removals = removals.buffered(REMOVALS);
        while let Some(removed) = removals.next().await {
            clean_up.note("container", removed);
        }
        if !clean_up.is_clean() {
            return clean_up.finish("pod sandbox", pod.id);
        }
        let record = core
            .pod_input(pod, PodInput::Remove, |_| {})
            .map_err(|source| EngineError::State {
                verb: "remove",
                what: "pod sandbox",
                id: pod.id.to_string(),
                source,
            })?;
        if record {
            clean_up.note("record", core.record_pod(pod).await);
        }
        self.plugins_remove_pod(pod).await;
        self.erase_pod(pod, &mut clean_up).await;
        if clean_up.is_clean() {
            core.pods.remove(pod.id);
            core.pod_names.release(&pod.config.metadata, pod.id);
            let _told = core.pod_input(pod, PodInput::Gone, |_| {}).is_ok();
        }
        clean_up.finish("pod sandbox", pod.id)
    }

    /// Removes what is left of a pod whose processes are dead and whose network is gone.
    pub(super) async fn erase_pod(&self, pod: &Arc<Pod>, clean_up: &mut CleanUp) {
        let core = self.core();
        // Taken out first, so that its end is not taken for a loss.
        let monitor = pod.lock().monitor.take();
        if let Some(monitor) = monitor {
            clean_up.note("monitor", core.lower.end_monitor(&monitor).await);
        }
        let (cgroups, path) = (core.lower.cgroups.clone(), pod.pause_cgroup());
        let directory = core.pod_directory(pod.id);
        let removed = blocking("remove the pod's cgroup and files", move || {
            let mut steps = CleanUp::default();
            steps.note("cgroup", cgroups.remove(&path));
            steps.note("files", remove_directory(&directory));
            steps.finish("files of pod", "")
        });
        clean_up.note("erase", removed.await);
        if clean_up.is_clean() {
            pod.lock().level = None;
            self.remove_parents(pod).await;
            clean_up.note("record", core.forget_pod(pod).await);
        }
    }

    /// Removes the cgroup parents that we made and that no other pod of ours is in or about to enter.
    async fn remove_parents(&self, pod: &Arc<Pod>) {
        let parents = std::mem::take(&mut pod.lock().made_parents);
        let engine = self.clone();
        let removed = blocking("remove cgroup parents", move || {
            let core = engine.core();
            // Held meanwhile: a pod that counts on a parent must not see it vanish.
            let mut made = core
                .made_parents
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            for parent in parents.iter().rev() {
                match made.get_mut(parent) {
                    Some(pods) if *pods > 1 => *pods -= 1,
                    _last => {
                        made.remove(parent);
                        core.lower.cgroups.remove_if_empty(parent);
                    }
                }
            }
            Ok(())
        });
        let _at_shutdown = removed.await.is_err();
    }
}

//! A container in memory, and its record on disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::base::clock::Timestamp;
use crate::base::container::{ContainerConfig, ContainerStatus, ProcessUser, Resources};
use crate::base::id::{ContainerId, PodId};
use crate::base::image::RootfsLayers;
use crate::engine::lane::Lane;
use crate::engine::lower::ImageVolume;
use crate::engine::meters::Meter;
use crate::engine::plugins::Told;
use crate::engine::pod::Pod;
use crate::engine::state::ContainerPhase;
use crate::engine::stats::Rate;
use crate::monitor::protocol::ContainerExit;
use crate::runtime::selinux::Hold;

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// Id.
    pub(crate) id: ContainerId,
    /// Its pod.
    pub(crate) pod: Arc<Pod>,
    /// As asked for.
    pub(crate) config: ContainerConfig,
    /// Its image's layers, which are held for it.
    pub(crate) layers: RootfsLayers,
    /// Images that its mounts name, held for it too.
    pub(crate) image_volumes: Vec<ImageVolume>,
    /// Create, start, update and remove, one after the other. A stop's grace period waits beside it.
    pub(crate) lane: Lane,
    /// Changes of limits: plugins ask for them from the lanes of other containers.
    pub(crate) limits_lane: Lane,
    /// Writes of the record.
    pub(crate) record_lane: Lane,
    /// True once its first process has ended for good.
    pub(crate) ended: watch::Sender<bool>,
    /// What its writable layer takes.
    pub(crate) meter: Arc<Meter>,
    inner: Mutex<ContainerInner>,
}

/// What changes.
#[derive(Debug)]
pub(crate) struct ContainerInner {
    /// Where in its life it is.
    pub(crate) phase: ContainerPhase,
    /// What lists show; replaced, never changed in place.
    pub(crate) status: Arc<ContainerStatus>,
    /// Pid of its first process, for display and /proc links.
    pub(crate) pid: Option<u32>,
    /// An exit that came before the reply which announces the container.
    pub(crate) early_exit: Option<ContainerExit>,
    /// The stop signal was sent.
    pub(crate) signalled: bool,
    /// Its record is not to be written again.
    pub(crate) gone: bool,
    /// CPU rate between two readings.
    pub(crate) rate: Rate,
    /// Its cgroup; only a plugin changes it, before it is made.
    pub(crate) cgroup: String,
    /// What plugins know of it.
    pub(crate) told: Told,
    /// The SELinux level that it names, held for it.
    pub(crate) level: Option<Hold>,
}

/// What survives the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    /// Id.
    pub(crate) id: ContainerId,
    /// Its pod.
    pub(crate) pod_id: PodId,
    /// Where in its life it is.
    pub(crate) phase: ContainerPhase,
    /// As asked for.
    pub(crate) config: ContainerConfig,
    /// Its cgroup.
    pub(crate) cgroup: String,
    /// As in the status.
    pub(crate) created_at: Timestamp,
    /// As in the status.
    pub(crate) started_at: Timestamp,
    /// As in the status.
    pub(crate) finished_at: Timestamp,
    /// As in the status.
    pub(crate) exit_code: i32,
    /// As in the status.
    pub(crate) image_name: String,
    /// As in the status.
    pub(crate) image_ref: String,
    /// As in the status.
    pub(crate) image_id: String,
    /// The image's layers, which are held for it.
    pub(crate) layers: RootfsLayers,
    /// Images that its mounts name, held for it too.
    #[serde(default)]
    pub(crate) image_volumes: Vec<ImageVolume>,
    /// As in the status.
    pub(crate) reason: String,
    /// As in the status.
    pub(crate) message: String,
    /// As in the status.
    pub(crate) log_path: String,
    /// As in the status.
    pub(crate) resources: Resources,
    /// As in the status.
    pub(crate) user: Option<ProcessUser>,
    /// As in the status.
    pub(crate) stop_signal: i32,
    /// Pid of its first process.
    pub(crate) pid: Option<u32>,
}

impl ContainerRecord {
    /// The object that the record tells of.
    pub(crate) fn into_container(self, pod: Arc<Pod>) -> Container {
        let mut mounts = self.config.mounts.clone();
        for volume in &self.image_volumes {
            let mount = mounts.get_mut(volume.mount);
            if let Some(image) = mount.and_then(|mount| mount.image.as_mut()) {
                image.image_ref.clone_from(&volume.image_ref);
            }
        }
        let status = ContainerStatus {
            id: self.id,
            pod_id: self.pod_id,
            name: self.config.name.clone(),
            attempt: self.config.attempt,
            state: self.phase.shown(),
            created_at: self.created_at,
            started_at: self.started_at,
            finished_at: self.finished_at,
            exit_code: self.exit_code,
            image: self.config.image.clone(),
            image_name: self.image_name,
            image_ref: self.image_ref,
            image_id: self.image_id,
            reason: self.reason,
            message: self.message,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            mounts,
            log_path: self.log_path,
            resources: self.resources,
            user: self.user,
            stop_signal: self.stop_signal,
        };
        Container {
            id: self.id,
            pod,
            config: self.config,
            layers: self.layers,
            image_volumes: self.image_volumes,
            lane: Lane::default(),
            limits_lane: Lane::default(),
            record_lane: Lane::default(),
            ended: watch::Sender::new(!self.phase.alive()),
            meter: Arc::default(),
            inner: Mutex::new(ContainerInner {
                phase: self.phase,
                status: Arc::new(status),
                pid: self.pid,
                early_exit: None,
                signalled: false,
                gone: false,
                rate: Rate::default(),
                cgroup: self.cgroup,
                told: Told::of_container(self.phase),
                level: None,
            }),
        }
    }
}

impl Container {
    /// Its state, for a moment.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ContainerInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What lists show.
    pub(crate) fn status(&self) -> Arc<ContainerStatus> {
        Arc::clone(&self.lock().status)
    }

    /// Pid of its first process; 0: it does not run.
    pub(crate) fn pid(&self) -> u32 {
        self.lock().pid.unwrap_or(0)
    }

    /// Its cgroup.
    pub(crate) fn cgroup(&self) -> String {
        self.lock().cgroup.clone()
    }

    /// Where in its life it is.
    pub(crate) fn phase(&self) -> ContainerPhase {
        self.lock().phase
    }

    /// Is it complete enough to be shown?
    pub(crate) fn is_listed(&self) -> bool {
        !matches!(self.phase(), ContainerPhase::Creating { .. })
    }

    /// Waits until its first process has ended and that is recorded in memory. Cancel-safe.
    pub(crate) async fn wait_ended(&self) {
        // The sender lives as long as we do.
        let _ended = self
            .ended
            .subscribe()
            .wait_for(|ended| *ended)
            .await
            .is_ok();
    }

    /// The record of its state now; absent when it must not be written any more.
    pub(crate) fn record(&self) -> Option<ContainerRecord> {
        let inner = self.lock();
        let status = &inner.status;
        (!inner.gone).then(|| ContainerRecord {
            id: self.id,
            pod_id: self.pod.id,
            phase: inner.phase,
            config: self.config.clone(),
            cgroup: inner.cgroup.clone(),
            created_at: status.created_at,
            started_at: status.started_at,
            finished_at: status.finished_at,
            exit_code: status.exit_code,
            image_name: status.image_name.clone(),
            image_ref: status.image_ref.clone(),
            image_id: status.image_id.clone(),
            layers: self.layers.clone(),
            image_volumes: self.image_volumes.clone(),
            reason: status.reason.clone(),
            message: status.message.clone(),
            log_path: status.log_path.clone(),
            resources: status.resources.clone(),
            user: status.user.clone(),
            stop_signal: status.stop_signal,
            pid: inner.pid,
        })
    }
}

//! The layers below, as the engine uses them: every call into them is in this directory, and every
//! error of theirs becomes an [`EngineError`] here, with what was tried.

mod images;
mod monitors;
mod network;
mod plans;

pub(crate) use images::Held;
pub(crate) use plans::Materials;

use std::path::PathBuf;

use crate::base::tasks::Tasks;
use crate::engine::Parts;
use crate::engine::core::{EngineConfig, blocking_step};
use crate::engine::error::{EngineError, Result};
use crate::engine::handlers::Features;
use crate::engine::monitor_client::{MonitorConfig, MonitorPool};
use crate::images::ImageStore;
use crate::network::Network;
use crate::runtime::cgroups::{CgroupError, Cgroups};
use crate::runtime::spec::HostFacts;

/// The layers below.
#[derive(Debug)]
pub(crate) struct Lower {
    /// Cgroups of this machine.
    pub(crate) cgroups: Cgroups,
    /// Facts of this machine.
    pub(crate) host: HostFacts,
    /// Images and their layers.
    pub(crate) images: ImageStore,
    /// Network of the pods.
    pub(crate) network: Network,
    /// Monitors, a few of them ready.
    pub(crate) monitors: MonitorPool,
    /// Tasks that read from monitors; aborted at shutdown, for nothing depends on their end.
    pub(crate) followers: Tasks,
    /// Bytes after which a log line is split.
    pub(crate) max_log_line: u32,
    /// Directories of CDI files, the last one wins.
    pub(crate) cdi_spec_dirs: Vec<PathBuf>,
    cgroup_root: String,
}

/// The cgroup of all monitors: they are not part of their pods, which kubelet may limit or kill.
fn monitors_cgroup(root: &str) -> String {
    format!("{}/monitors", root.trim_end_matches('/'))
}

/// Score of the monitors: they are the last to go, for their pod goes with them.
const MONITOR_OOM_SCORE: i32 = -999;

impl Lower {
    /// Opens what the engine itself owns of the layers below.
    ///
    /// # Errors
    /// [`EngineError::Step`]: no cgroups, or no monitor program.
    pub(crate) async fn open(config: &EngineConfig, parts: Parts) -> Result<Self> {
        let path = monitors_cgroup(&config.cgroup_root);
        let (cgroups, own, host) = blocking_step("find the cgroups of this node", move || {
            let cgroups = Cgroups::detect()?;
            let own = cgroups.own(&path)?;
            Ok::<_, CgroupError>((cgroups, own, HostFacts::probe()))
        })
        .await?;
        if host.apparmor {
            // Ahead of the first container that needs it, which would wait; a failure is that container's error.
            let _ahead = std::thread::Builder::new().spawn(crate::runtime::apparmor::load_default);
        }
        let followers = Tasks::default();
        let monitor = MonitorConfig {
            program: config.monitor.clone(),
            ready: config.ready_monitors,
            cgroups: own,
            oom_score_adj: MONITOR_OOM_SCORE,
        };
        let monitors = MonitorPool::new(monitor, followers.clone())
            .await
            .map_err(EngineError::step("make monitors ready"))?;
        Ok(Self {
            cgroups,
            host,
            images: parts.images,
            network: parts.network,
            monitors,
            followers,
            max_log_line: config.max_log_line,
            cdi_spec_dirs: config.cdi_spec_dirs.clone(),
            cgroup_root: config.cgroup_root.clone(),
        })
    }

    /// Ends what is ready for pods to come. With no pod left, what all pods share goes too.
    pub(crate) async fn shut_down(&self, pods: usize) {
        let monitors = self.monitors.clone();
        let _ended = Tasks::blocking(move || monitors.end_idle()).await.is_ok();
        if pods > 0 {
            return;
        }
        if let Err(error) = self.network.shutdown_if_unused().await {
            tracing::warn!(error = %crate::base::error::chain(&error), "the network stays");
        }
        for path in [monitors_cgroup(&self.cgroup_root), self.cgroup_root.clone()] {
            self.cgroups.remove_if_empty(&path);
        }
    }

    /// What berth itself offers as a handler.
    pub(crate) fn own_features(&self) -> Features {
        Features {
            // MOUNT_ATTR_RDONLY with AT_RECURSIVE: Linux 5.12.
            recursive_read_only: self.host.kernel_at_least(5, 12),
            // Not built yet.
            user_namespaces: false,
        }
    }
}

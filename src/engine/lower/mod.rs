//! The layers below, as the engine uses them: every call into them is in this directory, and every
//! error of theirs becomes an [`EngineError`] here, with what was tried.

mod external;
mod hooks;
mod images;
mod monitors;
mod network;
mod plans;
mod selinux;
mod unmapped;

pub(crate) use external::bundle_of;
pub(crate) use images::{Held, ImageVolume};
pub(crate) use network::netns_of;
pub(crate) use plans::{Design, Materials};

use std::os::fd::AsFd as _;
use std::path::PathBuf;

use crate::base::tasks::Tasks;
use crate::engine::Parts;
use crate::engine::core::{EngineConfig, blocking_step};
use crate::engine::error::{EngineError, Result};
use crate::engine::handlers::{Features, HandlerTable};
use crate::engine::lower::selinux::Labels;
use crate::engine::monitor_client::{MonitorConfig, MonitorPool};
use crate::engine::pod::Pod;
use crate::images::ImageStore;
use crate::network::Network;
use crate::runtime::cgroups::{CgroupError, Cgroups};
use crate::runtime::spec::HostFacts;
use crate::runtime::userns;

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
    /// Why pods can have no user namespace of their own here, if so.
    no_user_namespaces: Option<String>,
    /// SELinux labels, where they are in use.
    labels: Labels,
    /// Directories of CDI files, the last one wins.
    pub(crate) cdi_spec_dirs: Vec<PathBuf>,
    /// Directories of hooks, the last one wins.
    hooks_dirs: Vec<PathBuf>,
    /// File of block I/O classes; empty: none.
    pub(crate) block_io_classes: PathBuf,
    cgroup_root: String,
}

/// The cgroup of all monitors: they are not part of their pods, which kubelet may limit or kill.
fn monitors_cgroup(root: &str) -> String {
    format!("{}/monitors", root.trim_end_matches('/'))
}

/// Why no pod can have a user namespace of its own: tried once, with the directory that layers are in.
async fn no_user_namespaces(
    monitors: &MonitorPool,
    host: &HostFacts,
    root: &std::path::Path,
) -> Option<String> {
    if !host.kernel_at_least(5, 19) {
        let (major, minor) = host.kernel;
        let why = format!("Linux {major}.{minor} has no overlays of idmapped layers, 5.19 has");
        return Some(why);
    }
    let user = match monitors.user_namespace().await {
        Ok(user) => user,
        Err(error) => return Some(crate::base::error::chain(&error)),
    };
    let root = root.to_owned();
    let tried = Tasks::blocking(move || userns::can_map(&root, user.as_fd())).await;
    match tried {
        Ok(Ok(())) => None,
        Ok(Err(fault)) => Some(fault.to_string()),
        Err(ended) => Some(ended.to_string()),
    }
}

/// Score of the monitors: they are the last to go, for their pod goes with them.
const MONITOR_OOM_SCORE: i32 = -999;

impl Lower {
    /// Opens what the engine itself owns of the layers below.
    ///
    /// # Errors
    /// [`EngineError::Step`]: no cgroups, no monitor program, or no SELinux policy for containers where labels are wanted.
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
        let labels = Labels::open(config.selinux)?;
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
        let no_user_namespaces = no_user_namespaces(&monitors, &host, &config.root).await;
        Ok(Self {
            cgroups,
            host,
            images: parts.images,
            network: parts.network,
            monitors,
            followers,
            max_log_line: config.max_log_line,
            no_user_namespaces,
            labels,
            cdi_spec_dirs: config.cdi_spec_dirs.clone(),
            hooks_dirs: config.hooks_dirs.clone(),
            block_io_classes: config.block_io_classes.clone(),
            cgroup_root: config.cgroup_root.clone(),
        })
    }

    /// Refuses a pod whose user namespace this machine, or its handler, cannot make.
    ///
    /// # Errors
    /// [`EngineError::Unable`].
    pub(crate) fn check_user_namespace(&self, pod: &Pod, handlers: &HandlerTable) -> Result<()> {
        if pod.user_root().is_none() {
            return Ok(());
        }
        let of_handler = || handlers.no_user_namespaces(&pod.runtime_handler);
        let why = self.no_user_namespaces.clone().or_else(of_handler);
        let Some(why) = why else {
            return Ok(());
        };
        Err(EngineError::Unable {
            field: "linux.security_context.namespace_options.userns_options",
            why,
            mend: "use the node's user namespace (hostUsers: true), or a handler that has them",
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
            user_namespaces: self.no_user_namespaces.is_none(),
        }
    }
}

//! A pod sandbox in memory, and its record on disk.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::base::clock::Timestamp;
use crate::base::container::{ContainerStatus, Resources};
use crate::base::handler::Handler;
use crate::base::id::{ContainerId, PodId};
use crate::base::pod::{PodConfig, PodState, PodStatus};
use crate::base::security::SelinuxLabels;
use crate::engine::container::Container;
use crate::engine::lane::Lane;
use crate::engine::monitor_client::MonitorClient;
use crate::engine::plugins::Told;
use crate::engine::state::PodPhase;
use crate::engine::stats::Rate;
use crate::runtime::selinux::Hold;

/// A pod sandbox.
#[derive(Debug)]
pub(crate) struct Pod {
    /// Id.
    pub(crate) id: PodId,
    /// As asked for; its limits as they were then.
    pub(crate) config: PodConfig,
    /// As asked for; empty: the default one.
    pub(crate) runtime_handler: String,
    /// What that meant when the pod was made.
    pub(crate) handler: Handler,
    /// The cgroup that its cgroups are made in.
    pub(crate) cgroup_parent: String,
    /// Its SELinux labels; empty ones: none.
    pub(crate) labels: SelinuxLabels,
    /// Run, stop and remove, one after the other.
    pub(crate) lane: Lane,
    /// Writes of the record.
    pub(crate) record_lane: Lane,
    /// Transitions of the pod and its containers and the events that tell of them, one after the other.
    /// Taken before the locks of the states, never inside.
    pub(crate) order: Mutex<()>,
    inner: Mutex<PodInner>,
}

/// What changes.
#[derive(Debug)]
pub(crate) struct PodInner {
    /// Where in its life it is.
    pub(crate) phase: PodPhase,
    /// What lists show; replaced, never changed in place.
    pub(crate) status: Arc<PodStatus>,
    /// Its containers, those being made too.
    pub(crate) containers: BTreeMap<ContainerId, Arc<Container>>,
    /// Its monitor while it lives.
    pub(crate) monitor: Option<MonitorClient>,
    /// Pid of pause, for display and /proc links.
    pub(crate) pause_pid: Option<u32>,
    /// Its network may be attached.
    pub(crate) networked: bool,
    /// Parents of its cgroups that did not exist before, outermost first.
    pub(crate) made_parents: Vec<String>,
    /// Its record is not to be written again.
    pub(crate) gone: bool,
    /// CPU rate between two readings.
    pub(crate) rate: Rate,
    /// RuntimeClass overhead, as told last.
    pub(crate) overhead: Option<Resources>,
    /// Sum over the containers, as told last.
    pub(crate) resources: Option<Resources>,
    /// What plugins know of it.
    pub(crate) told: Told,
    /// Its SELinux level, held for it.
    pub(crate) level: Option<Hold>,
}

/// What survives the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    /// Id.
    pub(crate) id: PodId,
    /// Where in its life it is.
    pub(crate) phase: PodPhase,
    /// As asked for.
    pub(crate) config: PodConfig,
    /// As asked for.
    pub(crate) runtime_handler: String,
    /// What that meant when the pod was made.
    #[serde(default)]
    pub(crate) handler: Handler,
    /// The cgroup that its cgroups are made in.
    pub(crate) cgroup_parent: String,
    /// Parents made for it.
    pub(crate) made_parents: Vec<String>,
    /// When it was made.
    pub(crate) created_at: Timestamp,
    /// Its addresses.
    pub(crate) ips: Vec<IpAddr>,
    /// Its network may be attached.
    pub(crate) networked: bool,
    /// Pid of pause.
    pub(crate) pause_pid: Option<u32>,
    /// Its SELinux labels.
    #[serde(default)]
    pub(crate) labels: SelinuxLabels,
}

impl PodRecord {
    /// The object that the record tells of.
    pub(crate) fn into_pod(self) -> Pod {
        let status = PodStatus {
            id: self.id,
            metadata: self.config.metadata.clone(),
            state: self.phase.shown(),
            created_at: self.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.runtime_handler.clone(),
            ips: self.ips,
            namespaces: self.config.security.namespaces.clone(),
        };
        let (overhead, resources) = (self.config.overhead.clone(), self.config.resources.clone());
        Pod {
            id: self.id,
            config: self.config,
            runtime_handler: self.runtime_handler,
            handler: self.handler,
            cgroup_parent: self.cgroup_parent,
            labels: self.labels,
            lane: Lane::default(),
            record_lane: Lane::default(),
            order: Mutex::default(),
            inner: Mutex::new(PodInner {
                phase: self.phase,
                status: Arc::new(status),
                containers: BTreeMap::new(),
                monitor: None,
                pause_pid: self.pause_pid,
                networked: self.networked,
                made_parents: self.made_parents,
                gone: false,
                rate: Rate::default(),
                overhead,
                resources,
                told: Told::of_pod(self.phase),
                level: None,
            }),
        }
    }
}

impl Pod {
    /// Its state, for a moment.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PodInner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What lists show.
    pub(crate) fn status(&self) -> Arc<PodStatus> {
        Arc::clone(&self.lock().status)
    }

    /// Pid of its pause process; 0: it does not run.
    pub(crate) fn pause_pid(&self) -> u32 {
        self.lock().pause_pid.unwrap_or(0)
    }

    /// Its monitor while it lives.
    pub(crate) fn monitor(&self) -> Option<MonitorClient> {
        self.lock().monitor.clone()
    }

    /// Its containers, those being made too.
    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.lock().containers.values().map(Arc::clone).collect()
    }

    /// Statuses of the containers that lists show, the latest made first: kubelet with EventedPLEG takes the first
    /// one of a name for that container's latest attempt (`GetPodStatus` in kuberuntime_manager.go sorts no more).
    pub(crate) fn container_statuses(&self) -> Vec<Arc<ContainerStatus>> {
        let mut all: Vec<_> = self
            .containers()
            .iter()
            .filter(|container| container.is_listed())
            .map(|container| container.status())
            .collect();
        all.sort_by_key(|status| std::cmp::Reverse(status.created_at));
        all
    }

    /// Its configuration, with the limits as they were told last.
    pub(crate) fn config_now(&self) -> PodConfig {
        let inner = self.lock();
        self.config_with(&inner)
    }

    fn config_with(&self, inner: &PodInner) -> PodConfig {
        PodConfig {
            overhead: inner.overhead.clone(),
            resources: inner.resources.clone(),
            ..self.config.clone()
        }
    }

    /// The record of its state now; absent when it must not be written any more.
    pub(crate) fn record(&self) -> Option<PodRecord> {
        let inner = self.lock();
        (!inner.gone).then(|| PodRecord {
            id: self.id,
            phase: inner.phase,
            config: self.config_with(&inner),
            runtime_handler: self.runtime_handler.clone(),
            handler: self.handler.clone(),
            cgroup_parent: self.cgroup_parent.clone(),
            made_parents: inner.made_parents.clone(),
            created_at: inner.status.created_at,
            ips: inner.status.ips.clone(),
            networked: inner.networked,
            pause_pid: inner.pause_pid,
            labels: self.labels.clone(),
        })
    }

    /// Is it shown as ready?
    pub(crate) fn is_ready(&self) -> bool {
        self.lock().phase.shown() == PodState::Ready
    }

    /// Cgroup of its pause process.
    pub(crate) fn pause_cgroup(&self) -> String {
        join(&self.cgroup_parent, &self.id.to_string())
    }

    /// Its host name: as asked for, else the node's with the node's network, else from the id.
    pub(crate) fn hostname(&self) -> String {
        match (&*self.config.hostname, self.host_network()) {
            ("", true) => rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            ("", false) => self.id.0.short(),
            (given, _) => given.to_owned(),
        }
    }

    /// User and group on the node of the root of its user namespace; absent: it uses the node's.
    pub(crate) fn user_root(&self) -> Option<(u32, u32)> {
        self.config.security.namespaces.own_user()?.root()
    }

    /// Is its network the node's?
    pub(crate) fn host_network(&self) -> bool {
        self.config.security.namespaces.network == crate::base::security::NamespaceMode::Node
    }
}

/// A cgroup below another.
pub(crate) fn join(parent: &str, leaf: &str) -> String {
    format!("{}/{leaf}", parent.trim_end_matches('/'))
}

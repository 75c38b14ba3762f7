//! What the verbs take and answer, as plain values.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::base::clock::Timestamp;
use crate::base::container::{ContainerStatus, EventKind};
use crate::base::image::FilesystemUsage;
use crate::base::pod::PodStatus;
use crate::base::stats::{CgroupStats, FilesystemSize, InterfaceStats, ProcessStats};

/// What `PodSandboxStatus` and `ContainerStatus` add when asked to be verbose: key to JSON text.
pub(crate) type Info = BTreeMap<String, String>;

/// Output of an ExecSync.
#[derive(Debug, Default)]
pub(crate) struct ExecOutput {
    /// At most the cap (the whole reply fits 16 MiB).
    pub(crate) stdout: Vec<u8>,
    /// At most the cap.
    pub(crate) stderr: Vec<u8>,
    /// Exit code, or 128+n for signal n.
    pub(crate) exit_code: i32,
}

/// Figures of one container.
#[derive(Clone, Debug)]
pub(crate) struct ContainerFigures {
    /// Whose.
    pub(crate) status: Arc<ContainerStatus>,
    /// Path of its cgroup.
    pub(crate) cgroup_path: String,
    /// From its cgroup.
    pub(crate) cgroup: CgroupStats,
    /// Nanoseconds of CPU per second, from two readings; absent before the second.
    pub(crate) usage_nano_cores: Option<u64>,
    /// Writable layer.
    pub(crate) writable_layer: Option<FilesystemUsage>,
    /// Its processes; for metrics only.
    pub(crate) processes: Option<ProcessStats>,
}

/// Figures of one pod.
#[derive(Clone, Debug)]
pub(crate) struct PodFigures {
    /// Whose.
    pub(crate) status: Arc<PodStatus>,
    /// Path of the pod's own cgroup; where it has none, of its pause process's.
    pub(crate) cgroup_path: String,
    /// It has one of its own.
    pub(crate) own_cgroup: bool,
    /// From the pod's parent cgroup where it has one of its own, else summed; in [`Metrics`] only the time then.
    pub(crate) cgroup: CgroupStats,
    /// CPU rate as above.
    pub(crate) usage_nano_cores: Option<u64>,
    /// Interfaces, the default one (eth0) first; empty with host network.
    pub(crate) interfaces: Vec<InterfaceStats>,
    /// Its running containers.
    pub(crate) containers: Vec<ContainerFigures>,
}

/// Everything that the metrics calls tell.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Of the ready pods.
    pub(crate) pods: Vec<PodFigures>,
    /// The filesystem of the writable layers.
    pub(crate) filesystem: FilesystemSize,
    /// Names of the block devices that the figures speak of; absent: the device is gone.
    pub(crate) devices: BTreeMap<(u32, u32), String>,
}

/// A pod and its containers at one moment: what every event up to `at` tells is in it.
#[derive(Clone, Debug)]
pub(crate) struct PodMoment {
    /// When. Later than the events before, earlier than those after.
    pub(crate) at: Timestamp,
    /// The pod.
    pub(crate) pod: Arc<PodStatus>,
    /// Its containers.
    pub(crate) containers: Vec<Arc<ContainerStatus>>,
}

/// One event of the event stream.
#[derive(Clone, Debug)]
pub(crate) struct EngineEvent {
    /// Container, or pod for the sandbox's own events.
    pub(crate) id: String,
    /// What happened.
    pub(crate) kind: EventKind,
    /// When.
    pub(crate) at: Timestamp,
    /// The pod as it is then; in the event of its deletion, as it was last.
    pub(crate) pod: Arc<PodStatus>,
    /// Its containers as they are then.
    pub(crate) containers: Vec<Arc<ContainerStatus>>,
}

/// One condition of `Status`.
#[derive(Clone, Debug)]
pub(crate) struct Condition {
    /// `RuntimeReady`, `NetworkReady`.
    pub(crate) kind: &'static str,
    /// True: fine.
    pub(crate) status: bool,
    /// CamelCase; empty when fine.
    pub(crate) reason: String,
    /// For people.
    pub(crate) message: String,
}

/// What `Status` reports.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeStatus {
    /// Both conditions, always.
    pub(crate) conditions: Vec<Condition>,
    /// (name, recursive read-only mounts, user namespaces), `""` is the default handler.
    pub(crate) handlers: Vec<(String, bool, bool)>,
    /// SupplementalGroupsPolicy is honoured.
    pub(crate) supplemental_groups_policy: bool,
    /// Verbose only: key to JSON text.
    pub(crate) info: Info,
}

/// What cAdvisor needs of a container or sandbox (containerd-shaped services).
#[derive(Clone, Debug)]
pub(crate) struct Inspection {
    /// Labels, with `io.cri-containerd.kind` and the `io.kubernetes.*` ones.
    pub(crate) labels: BTreeMap<String, String>,
    /// Image name; empty for a sandbox.
    pub(crate) image: String,
    /// OCI spec as JSON.
    pub(crate) spec: String,
    /// Pid of its first process; 0: not running.
    pub(crate) pid: u32,
    /// When it was made.
    pub(crate) created_at: Timestamp,
    /// Exit code of a container and when it ended; absent: it has not, or it is a sandbox.
    pub(crate) ended: Option<(i32, Timestamp)>,
}

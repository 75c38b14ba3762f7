//! Containers as plain values. CRI: `ContainerConfig`, `ContainerStatus` and what they are made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::base::block_io::BlockIo;
use crate::base::clock::Timestamp;
use crate::base::id::{ContainerId, PodId};
use crate::base::image::ImageSpec;
use crate::base::security::{ContainerSecurity, IdMapping};

/// CRI: `LinuxContainerResources`. 0 and absent mean "not given" unless said otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resources {
    /// CFS period in microseconds; 0: keep the kernel's.
    pub(crate) cpu_period: i64,
    /// CFS quota in microseconds; 0: not given, -1: unlimited.
    pub(crate) cpu_quota: i64,
    /// Relative weight, 2..=262144.
    pub(crate) cpu_shares: i64,
    /// Bytes; 0: not given, -1: unlimited.
    pub(crate) memory_limit: i64,
    /// Score of the container's first process, -1000..=1000.
    pub(crate) oom_score_adj: i64,
    /// CPU list as in cpuset(7); empty: inherit.
    pub(crate) cpuset_cpus: String,
    /// Memory node list; empty: inherit.
    pub(crate) cpuset_mems: String,
    /// (page size such as `2MB`, limit in bytes). 0 bytes is a limit.
    pub(crate) hugepage_limits: Vec<(String, u64)>,
    /// Raw cgroup v2 files.
    pub(crate) unified: BTreeMap<String, String>,
    /// Memory and swap together in bytes; 0: equal to the memory limit, -1: unlimited.
    pub(crate) memory_swap_limit: i64,
    /// Most processes and threads; 0: not given, -1: unlimited. Not of CRI: NRI plugins set it.
    #[serde(default)]
    pub(crate) pids_limit: i64,
    /// Bytes that the kernel takes back last; 0: not given, -1: none, which takes away another. Not of CRI: NRI plugins set it.
    #[serde(default)]
    pub(crate) memory_reservation: i64,
    /// Block I/O class; empty: none, which takes away another. Not of CRI: NRI plugins and annotations name it.
    #[serde(default)]
    pub(crate) blockio_class: Option<String>,
    /// What that class limited when it was looked up.
    #[serde(default)]
    pub(crate) block_io: Option<BlockIo>,
}

#[cfg(feature = "daemon")]
impl Resources {
    /// These limits with those that `new` gives over them.
    pub(crate) fn with(&self, new: &Self) -> Self {
        let number = |old: i64, new: i64| if new == 0 { old } else { new };
        let text = |old: &String, new: &String| match new.is_empty() {
            true => old.clone(),
            false => new.clone(),
        };
        let mut pages: BTreeMap<_, _> = self.hugepage_limits.iter().cloned().collect();
        pages.extend(new.hugepage_limits.iter().cloned());
        let mut unified = self.unified.clone();
        unified.extend(new.unified.clone());
        Self {
            cpu_period: number(self.cpu_period, new.cpu_period),
            cpu_quota: number(self.cpu_quota, new.cpu_quota),
            cpu_shares: number(self.cpu_shares, new.cpu_shares),
            memory_limit: number(self.memory_limit, new.memory_limit),
            oom_score_adj: number(self.oom_score_adj, new.oom_score_adj),
            cpuset_cpus: text(&self.cpuset_cpus, &new.cpuset_cpus),
            cpuset_mems: text(&self.cpuset_mems, &new.cpuset_mems),
            hugepage_limits: pages.into_iter().collect(),
            unified,
            memory_swap_limit: number(self.memory_swap_limit, new.memory_swap_limit),
            pids_limit: number(self.pids_limit, new.pids_limit),
            memory_reservation: number(self.memory_reservation, new.memory_reservation),
            blockio_class: new.blockio_class.clone().or(self.blockio_class.clone()),
            block_io: new.block_io.clone().or(self.block_io.clone()),
        }
    }
}

/// CRI: `MountPropagation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Propagation {
    /// rprivate.
    #[default]
    Private,
    /// rslave.
    HostToContainer,
    /// rshared.
    Bidirectional,
}

/// CRI: `Mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mount {
    /// Where in the container; resolved inside its root.
    pub(crate) container_path: String,
    /// What of the host; empty with `image`.
    pub(crate) host_path: String,
    /// Read-only.
    pub(crate) readonly: bool,
    /// Read-only with everything mounted below; needs `readonly` and `Private`.
    pub(crate) recursive_read_only: bool,
    /// Relabel the source (SELinux).
    pub(crate) selinux_relabel: bool,
    /// How mounts made later travel.
    pub(crate) propagation: Propagation,
    /// Idmapped mount: user ids.
    pub(crate) uid_mappings: Vec<IdMapping>,
    /// Idmapped mount: group ids.
    pub(crate) gid_mappings: Vec<IdMapping>,
    /// Image volume.
    pub(crate) image: Option<ImageSpec>,
    /// Directory inside the image.
    pub(crate) image_sub_path: String,
    /// Extra mount options (API 0.37).
    pub(crate) mount_options: Vec<String>,
}

/// CRI: `Device`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    /// Path in the container.
    pub(crate) container_path: String,
    /// Device node or directory of them on the host.
    pub(crate) host_path: String,
    /// Subset of `rwm`.
    pub(crate) permissions: String,
}

/// CRI: `ContainerConfig` with its Linux part, checked and without optional messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerConfig {
    /// Name, unique in its pod together with `attempt`.
    pub(crate) name: String,
    /// How often the container was made before.
    pub(crate) attempt: u32,
    /// Image.
    pub(crate) image: ImageSpec,
    /// Replaces the image's entrypoint (and drops its command).
    pub(crate) command: Vec<String>,
    /// Replaces the image's command.
    pub(crate) args: Vec<String>,
    /// Empty: the image's, else `/`.
    pub(crate) working_dir: String,
    /// (name, value); values are bytes on the wire.
    pub(crate) envs: Vec<(String, Vec<u8>)>,
    /// Volumes.
    pub(crate) mounts: Vec<Mount>,
    /// Devices.
    pub(crate) devices: Vec<Device>,
    /// Fully qualified CDI device names.
    pub(crate) cdi_devices: Vec<String>,
    /// Echoed.
    pub(crate) labels: BTreeMap<String, String>,
    /// Echoed; data, never behaviour.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Relative to the pod's log directory; empty: output is discarded.
    pub(crate) log_path: String,
    /// Keep a pipe on stdin.
    pub(crate) stdin: bool,
    /// Close stdin when the first attached client leaves.
    pub(crate) stdin_once: bool,
    /// A terminal instead of pipes.
    pub(crate) tty: bool,
    /// Limits.
    pub(crate) resources: Resources,
    /// Security settings.
    pub(crate) security: ContainerSecurity,
    /// Signal number that asks the container to end; absent: the image's, else SIGTERM (15).
    pub(crate) stop_signal: Option<i32>,
}

/// CRI: `ContainerState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerState {
    /// Made, its process waits before exec.
    Created,
    /// Running.
    Running,
    /// Ended.
    Exited,
    /// Nobody knows.
    Unknown,
}

/// Who the processes of a container run as: looked up once, when it is made, and as the kernel got it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessUser {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Supplementary groups, the primary group first, without repetition.
    pub(crate) groups: Vec<u32>,
    /// Home directory in the container, at most 4096 bytes; `/` where the image knows none.
    #[serde(default)]
    pub(crate) home: Vec<u8>,
}

/// What lists and statuses of a container show.
#[derive(Clone, Debug)]
pub(crate) struct ContainerStatus {
    /// Id.
    pub(crate) id: ContainerId,
    /// Pod.
    pub(crate) pod_id: PodId,
    /// Name and attempt as configured.
    pub(crate) name: String,
    /// As configured.
    pub(crate) attempt: u32,
    /// State now.
    pub(crate) state: ContainerState,
    /// Never 0.
    pub(crate) created_at: Timestamp,
    /// 0 while Created.
    pub(crate) started_at: Timestamp,
    /// 0 unless Exited.
    pub(crate) finished_at: Timestamp,
    /// Exit code, 128+n for signal n; 255 where it is lost.
    pub(crate) exit_code: i32,
    /// Image as asked for in CreateContainer.
    pub(crate) image: ImageSpec,
    /// A tag of the image where it has one, else a digest or the id.
    pub(crate) image_name: String,
    /// First repository digest, else the id.
    pub(crate) image_ref: String,
    /// `sha256:` of the image config.
    pub(crate) image_id: String,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerCannotRun`, `Unknown`; empty before.
    pub(crate) reason: String,
    /// At most 4 KiB.
    pub(crate) message: String,
    /// As configured.
    pub(crate) labels: BTreeMap<String, String>,
    /// As configured.
    pub(crate) annotations: BTreeMap<String, String>,
    /// As configured.
    pub(crate) mounts: Vec<Mount>,
    /// Absolute, or empty.
    pub(crate) log_path: String,
    /// Limits in force.
    pub(crate) resources: Resources,
    /// As the first process got it; absent before it is known.
    pub(crate) user: Option<ProcessUser>,
    /// Effective stop signal (number).
    pub(crate) stop_signal: i32,
}

/// CRI: `ContainerFilter`; what is absent or empty matches everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct ContainerFilter {
    /// Unambiguous prefix of the id.
    pub(crate) id: String,
    /// State.
    pub(crate) state: Option<ContainerState>,
    /// Unambiguous prefix of the pod's id.
    pub(crate) pod_id: String,
    /// All of these labels.
    pub(crate) labels: BTreeMap<String, String>,
}

/// CRI: `ContainerEventType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    /// Made.
    Created,
    /// Running.
    Started,
    /// Ended.
    Stopped,
    /// Gone.
    Deleted,
}

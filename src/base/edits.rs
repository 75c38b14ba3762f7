//! Changes to a container beside its CRI config, as plain values: what CDI files and NRI plugins ask for.

use crate::base::container::Resources;
use crate::base::hook::Hook;

/// Changes of one origin. What is empty or absent changes nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Edits {
    /// Who asks, for messages: `CDI device vendor.com/gpu=0 of /etc/cdi/gpu.json`, `NRI plugin 10-numa`.
    pub(crate) by: String,
    /// Annotations of the OCI spec; absent value: removed.
    pub(crate) annotations: Vec<(String, Option<String>)>,
    /// Replaces the whole command line.
    pub(crate) args: Vec<String>,
    /// Environment variables; absent value: removed.
    pub(crate) env: Vec<(String, Option<String>)>,
    /// Mounts, by destination.
    pub(crate) mounts: Vec<MountEdit>,
    /// Device nodes, by path.
    pub(crate) devices: Vec<DeviceEdit>,
    /// Further rules of the devices cgroup, in order.
    pub(crate) device_rules: Vec<DeviceAccess>,
    /// Hooks, in order.
    pub(crate) hooks: Vec<Hook>,
    /// Supplementary groups, added.
    pub(crate) groups: Vec<u32>,
    /// (name such as `RLIMIT_NOFILE`, soft, hard); `u64::MAX`: unlimited.
    pub(crate) rlimits: Vec<(String, u64, u64)>,
    /// Limits; what is 0 or empty stays as it is. `oom_score_adj` is not looked at.
    pub(crate) resources: Resources,
    /// Score of the first process, -1000..=1000.
    pub(crate) oom_score_adj: Option<i64>,
    /// The container's cgroup, instead of the one below its pod's.
    pub(crate) cgroups_path: String,
    /// Namespaces, by kind.
    pub(crate) namespaces: Vec<NamespaceEdit>,
    /// Network devices of the node to move into the pod's network namespace.
    pub(crate) net_devices: Vec<NetDevice>,
    /// Sysctls; absent value: the container sets none.
    pub(crate) sysctls: Vec<(String, Option<String>)>,
    /// Seccomp profile as JSON of the OCI spec (`linux.seccomp`), replacing the one in force.
    pub(crate) seccomp: Option<Vec<u8>>,
    /// `ioprio_set(2)` of the first process: (class 0..=3, level 0..=7).
    pub(crate) io_priority: Option<(u8, u8)>,
    /// `sched_setattr(2)` of the first process.
    pub(crate) scheduler: Option<Scheduler>,
    /// `set_mempolicy(2)` of the first process.
    pub(crate) memory_policy: Option<MemoryPolicy>,
    /// The resctrl group: (field, as messages name it; change), in order.
    pub(crate) rdt: Vec<(&'static str, RdtEdit)>,
    /// Fully qualified CDI device names, added.
    pub(crate) cdi_devices: Vec<String>,
    /// What was asked for and berth cannot do: (field, value).
    pub(crate) impossible: Vec<(String, String)>,
}

/// A change of the resctrl group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RdtEdit {
    /// This one in the place of all before; absent: none.
    Replace(Option<Rdt>),
    /// What is given over what was.
    Change {
        /// As in [`Rdt`].
        clos_id: Option<String>,
        /// As in [`Rdt`].
        schemata: Option<Vec<String>>,
        /// As in [`Rdt`].
        enable_monitoring: Option<bool>,
    },
}

/// A resctrl group. OCI: config-linux.md#intelrdt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rdt {
    /// Its name; empty: one of the container's own.
    pub(crate) clos_id: String,
    /// Lines of its `schemata`; with the next two empty: those that it has.
    pub(crate) schemata: Vec<String>,
    /// One more line, `L3:...`, before those.
    pub(crate) l3_cache_schema: String,
    /// One more line, `MB:...`.
    pub(crate) mem_bw_schema: String,
    /// A group for monitoring only, of the container, below it.
    pub(crate) enable_monitoring: bool,
}

/// A mount as the OCI spec has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MountEdit {
    /// Absolute path in the container.
    pub(crate) destination: String,
    /// Take away what is mounted there; the other fields do not count.
    pub(crate) remove: bool,
    /// Type; empty, `none` or `bind`: a bind mount.
    pub(crate) kind: String,
    /// Host path of a bind mount.
    pub(crate) source: String,
    /// As of mount(8).
    pub(crate) options: Vec<String>,
}

/// A device node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceEdit {
    /// Absolute path in the container.
    pub(crate) path: String,
    /// Take the node away; the other fields do not count.
    pub(crate) remove: bool,
    /// Path on the host; empty: as in the container.
    pub(crate) host_path: String,
    /// `b`, or `c` (also `u`).
    pub(crate) kind: String,
    /// Major number.
    pub(crate) major: u32,
    /// Minor number.
    pub(crate) minor: u32,
    /// Permission bits; absent: 0666.
    pub(crate) mode: Option<u32>,
    /// Owner; absent: the process's user where it is given by number, else 0.
    pub(crate) uid: Option<u32>,
    /// Group; as `uid`.
    pub(crate) gid: Option<u32>,
    /// Letters of `rwm`; empty: the node is made, but no access is given.
    pub(crate) access: String,
}

/// A rule of the devices cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DeviceAccess {
    /// Allow or deny.
    pub(crate) allow: bool,
    /// `a`, `b` or `c`; empty: `a`.
    pub(crate) kind: String,
    /// Major number; absent: any.
    pub(crate) major: Option<u32>,
    /// Minor number; absent: any.
    pub(crate) minor: Option<u32>,
    /// Letters of `rwm`.
    pub(crate) access: String,
}

/// Where a namespace is to come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamespaceEdit {
    /// As the OCI spec writes it: `network`, `ipc`, `uts`, `pid`, `mount`, `user`, `cgroup`, `time`.
    pub(crate) kind: String,
    /// Absent: the node's. Empty: a new one. Else the path of one to join.
    pub(crate) path: Option<String>,
}

/// A network device of the node for a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NetDevice {
    /// Its name on the node, 1..=15 bytes.
    pub(crate) host: String,
    /// Its name in the pod, 1..=15 bytes; empty: an earlier edit's device of that `host` is not moved.
    pub(crate) name: String,
}

/// Scheduling attributes: numbers as of `sched_setattr(2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scheduler {
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// -20..=19.
    pub(crate) nice: i32,
    /// Real-time priority.
    pub(crate) priority: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// Nanoseconds (deadline policy).
    pub(crate) runtime: u64,
    /// Nanoseconds (deadline policy).
    pub(crate) deadline: u64,
    /// Nanoseconds (deadline policy).
    pub(crate) period: u64,
}

/// Memory policy: numbers as of `set_mempolicy(2)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct MemoryPolicy {
    /// `MPOL_*`.
    pub(crate) mode: u32,
    /// `MPOL_F_*`.
    pub(crate) flags: u32,
    /// List of nodes as `0-1,3`.
    pub(crate) nodes: String,
}

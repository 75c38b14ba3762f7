//! The plan: all that a child between clone and exec needs, prepared by the daemon.
//!
//! A plan is made by pure functions from an OCI spec (`runtime::spec`), encoded with postcard into a
//! memfd ([`Plan::encode`]), and decoded by the cloned child, never by the monitor itself (but its [`Preamble`]), so that its memory goes away
//! with the exec. It is part of the versioned protocol between daemon and monitor: a change here that
//! an older monitor cannot read raises `monitor::protocol::VERSION`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::container::ProcessUser;
use crate::runtime::external::Text;
use crate::runtime::hooks::Hooks;

/// A container's or the sandbox's plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Namespaces.
    pub(crate) namespaces: Namespaces,
    /// Cgroups to join.
    pub(crate) cgroup: CgroupJoin,
    /// Host name to set in a new UTS namespace; empty: leave.
    pub(crate) hostname: String,
    /// Sysctls, (`net.ipv4.ip_forward`, `1`): key and value apart, dots as separators, checked.
    pub(crate) sysctls: Vec<(String, String)>,
    /// Root filesystem.
    pub(crate) rootfs: Rootfs,
    /// Propagation of the mounts above the root: what `BIDIRECTIONAL` and `HOST_TO_CONTAINER` need.
    pub(crate) root_propagation: MountPropagation,
    /// Mounts, in order.
    pub(crate) mounts: Vec<MountPlan>,
    /// Nodes under /dev.
    pub(crate) devices: Vec<DeviceNode>,
    /// Paths hidden by an empty file or directory; missing ones are skipped.
    pub(crate) masked_paths: Vec<String>,
    /// Paths made read-only; missing ones are skipped.
    pub(crate) readonly_paths: Vec<String>,
    /// Image volumes of the config (`VOLUME`): (host directory, path in the container). The content of
    /// the image at that path is copied into the empty host directory, which is then bind-mounted.
    pub(crate) declared_volumes: Vec<(PathBuf, String)>,
    /// The first process.
    pub(crate) process: ProcessPlan,
    /// Absent: none.
    pub(crate) hooks: Option<Box<Hooks>>,
    /// SELinux label of every filesystem that is made for it (`context=`); empty: none.
    pub(crate) mount_label: String,
}

/// What the monitor must know before it clones: the front of every encoded plan, all that it decodes of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Preamble {
    /// Source of the PID namespace; for an exec `Host` (ignored: it is the container's).
    pub(crate) pid: NamespaceSource,
    /// Source of the user namespace; as `pid`. Any but `Host` is the pod's, passed to every process of it.
    pub(crate) user: NamespaceSource,
    /// Directory of the unified hierarchy to clone into.
    pub(crate) cgroup: Option<PathBuf>,
    /// The process gets a terminal: its first report carries the master, the passed streams are unused.
    pub(crate) terminal: bool,
}

impl Preamble {
    /// Largest encoded preamble in bytes.
    pub(crate) const MAX: usize = 16 * 1024;

    /// Takes the preamble off the front of an encoded plan (its first [`Self::MAX`] bytes suffice); the rest
    /// is the plan.
    ///
    /// # Errors
    /// Bytes that are no preamble.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), postcard::Error> {
        postcard::take_from_bytes(bytes)
    }
}

#[cfg(feature = "daemon")]
fn encode(preamble: &Preamble, plan: &impl Serialize) -> Result<Vec<u8>, postcard::Error> {
    let bytes = postcard::to_allocvec(preamble)?;
    if bytes.len() > Preamble::MAX {
        return Err(postcard::Error::SerializeBufferFull);
    }
    postcard::to_extend(plan, bytes)
}

#[cfg(feature = "daemon")]
impl Plan {
    /// The plan as the monitor and its child read it: a [`Preamble`], then the plan.
    ///
    /// # Errors
    /// A preamble longer than [`Preamble::MAX`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let preamble = Preamble {
            pid: self.namespaces.pid.clone(),
            user: self.namespaces.user.clone(),
            cgroup: self.cgroup.unified(),
            terminal: self.process.terminal,
        };
        encode(&preamble, self)
    }

    /// The plan and the configuration for an OCI runtime, as the monitor's helper reads them.
    ///
    /// # Errors
    /// As [`Plan::encode`].
    pub(crate) fn encode_with(&self, text: &Text) -> Result<Vec<u8>, postcard::Error> {
        postcard::to_extend(text, self.encode()?)
    }
}

#[cfg(feature = "daemon")]
impl ExecPlan {
    /// As [`Plan::encode`].
    ///
    /// # Errors
    /// As [`Plan::encode`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let preamble = Preamble {
            pid: NamespaceSource::Host,
            user: NamespaceSource::Host,
            cgroup: self.cgroup.unified(),
            terminal: self.process.terminal,
        };
        let bytes = encode(&preamble, self)?;
        match &self.text {
            Some(text) => postcard::to_extend(text, bytes),
            None => Ok(bytes),
        }
    }
}

#[cfg(feature = "daemon")]
impl CgroupJoin {
    fn unified(&self) -> Option<PathBuf> {
        match self {
            Self::V2(path) => Some(path.clone()),
            Self::V1(_) => None,
        }
    }
}

/// Where each namespace comes from. The mount namespace is always new.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Namespaces {
    /// Network. For the sandbox `Passed` (the daemon made it) or `Host`.
    pub(crate) network: NamespaceSource,
    /// IPC.
    pub(crate) ipc: NamespaceSource,
    /// UTS.
    pub(crate) uts: NamespaceSource,
    /// PID.
    pub(crate) pid: NamespaceSource,
    /// Cgroup.
    pub(crate) cgroup: NamespaceSource,
    /// User: `Host`, for the sandbox `Passed`, for its containers `Pod`. The new namespaces above are owned by it.
    pub(crate) user: NamespaceSource,
    /// Mappings of the user namespace; empty with `Host`.
    pub(crate) uid_mappings: IdMappings,
    /// As `uid_mappings`, for groups.
    pub(crate) gid_mappings: IdMappings,
}

/// (first inside, first outside, length) of each range of a user namespace or of an idmapped mount.
pub(crate) type IdMappings = Vec<(u32, u32, u32)>;

impl Namespaces {
    /// User and group on the node of the user namespace's root; absent: the node's own user namespace.
    pub(crate) fn root(&self) -> Option<(u32, u32)> {
        if self.user == NamespaceSource::Host {
            return None;
        }
        let of_root = |mappings: &IdMappings| {
            let found = mappings.iter().find(|(inside, _, _)| *inside == 0);
            found.map(|(_, outside, _)| *outside)
        };
        of_root(&self.uid_mappings).zip(of_root(&self.gid_mappings))
    }
}

/// Source of one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NamespaceSource {
    /// The node's: stay where the monitor is.
    Host,
    /// A new one.
    New,
    /// That of the pod's pause process.
    Pod,
    /// The descriptor passed with the request (network and user namespace of a sandbox).
    Passed,
    /// That of another container of this pod (64 hex digits).
    Container(String),
    /// The one that this file on the node is, as in `/proc/<pid>/ns` or bound elsewhere. Not for the user namespace.
    Path(PathBuf),
}

/// Cgroups that the process joins before it does anything else. They exist already, limits set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum CgroupJoin {
    /// Directory in the unified hierarchy (`CLONE_INTO_CGROUP`).
    V2(PathBuf),
    /// One directory for each v1 hierarchy.
    V1(Vec<PathBuf>),
}

/// The root filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Rootfs {
    /// Pause: an empty read-only tmpfs with `/dev/shm`, if the pod has one, of this many bytes.
    Pause {
        /// Bytes; 0: none (host IPC).
        shm_size: u64,
    },
    /// Overlay, mounted in the child's own mount namespace only.
    Overlay {
        /// Topmost first.
        lower: Vec<PathBuf>,
        /// Writable layer; absent: none and read-only.
        upper: Option<PathBuf>,
        /// Overlay's work directory, beside `upper`.
        work: PathBuf,
        /// The `volatile` option.
        volatile: bool,
        /// Read-only for the container (after every mount point was made).
        readonly: bool,
    },
    /// An existing directory.
    Directory {
        /// The directory.
        path: PathBuf,
        /// Read-only for the container.
        readonly: bool,
    },
}

/// Propagation of a mount; each is applied recursively where `recursive` says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MountPropagation {
    /// rprivate.
    #[default]
    Private,
    /// rslave.
    Slave,
    /// rshared.
    Shared,
}

/// One mount below the root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountPlan {
    /// Absolute path in the container; resolved inside the root, made if missing.
    pub(crate) target: String,
    /// What is mounted.
    pub(crate) source: MountSource,
    /// Attributes.
    pub(crate) attributes: MountAttributes,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MountSource {
    /// Bind of a host path.
    Bind {
        /// Host path, followed through symbolic links.
        path: PathBuf,
        /// With what is mounted below it.
        recursive: bool,
        /// Propagation of the new mount.
        propagation: MountPropagation,
        /// For an idmapped mount: ids on disk are those inside. Empty: none.
        uid_mappings: IdMappings,
        /// As above for groups.
        gid_mappings: IdMappings,
    },
    /// The pod's `/dev/shm`, taken from pause's mount namespace.
    PodShm,
    /// A new filesystem: type and options as in mount(8) (`tmpfs`, [("mode", "755")]). Types used:
    /// `proc`, `sysfs`, `tmpfs`, `devpts`, `mqueue`, `cgroup2`.
    Filesystem {
        /// Type.
        kind: String,
        /// (key, value); an empty value is a flag.
        options: Vec<(String, String)>,
    },
    /// `/sys/fs/cgroup` of a machine with cgroup v1: a tmpfs with each hierarchy's own cgroup bound below:
    /// (host directory of the container's cgroup in this hierarchy, name below `/sys/fs/cgroup`).
    CgroupV1(Vec<(PathBuf, String)>),
    /// An overlay of image layers, topmost first, read-only: an image volume; only `sub_path` of it.
    Image {
        /// Topmost first.
        lower: Vec<PathBuf>,
        /// Directory inside, resolved in the image; empty: all of it.
        sub_path: String,
    },
}

/// Attributes of a mount (mount_setattr(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is one mount attribute")]
pub(crate) struct MountAttributes {
    /// Read-only.
    pub(crate) readonly: bool,
    /// Read-only with every mount below (`AT_RECURSIVE`; Linux 5.12).
    pub(crate) recursive_readonly: bool,
    /// nosuid.
    pub(crate) nosuid: bool,
    /// nodev.
    pub(crate) nodev: bool,
    /// noexec.
    pub(crate) noexec: bool,
    /// noatime.
    pub(crate) noatime: bool,
    /// relatime.
    pub(crate) relatime: bool,
}

/// A node to make (or, in a user namespace, to bind) under /dev.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceNode {
    /// Absolute path in the container.
    pub(crate) path: String,
    /// Path on the host, to bind where mknod is not allowed.
    pub(crate) host_path: PathBuf,
    /// `true` for a block device.
    pub(crate) block: bool,
    /// Major number.
    pub(crate) major: u32,
    /// Minor number.
    pub(crate) minor: u32,
    /// Permission bits.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
}

/// What is executed, and as whom.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ProcessPlan {
    /// Arguments; the first is looked up in `PATH` of `env` inside the root. Empty for pause.
    pub(crate) args: Vec<String>,
    /// `NAME=value` as bytes (CRI values are bytes). `HOME` is added from /etc/passwd where it is missing.
    pub(crate) env: Vec<Vec<u8>>,
    /// Working directory inside the root; made if missing (containers only).
    pub(crate) cwd: String,
    /// User, still to be looked up in the image; of no use in an [`ExecPlan`].
    pub(crate) user: UserPlan,
    /// Capability sets as bit masks.
    pub(crate) capabilities: CapabilityMasks,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub(crate) no_new_privs: bool,
    /// (resource number, soft, hard); `u64::MAX`: unlimited.
    pub(crate) rlimits: Vec<(u32, u64, u64)>,
    /// `oom_score_adj`; clamped to what the kernel lets us write.
    pub(crate) oom_score_adj: Option<i32>,
    /// Compiled seccomp filter; absent: none.
    pub(crate) seccomp: Option<SeccompFilter>,
    /// AppArmor profile to change to on exec; empty: none.
    pub(crate) apparmor: String,
    /// SELinux label of the process; empty: none.
    pub(crate) selinux: String,
    /// A terminal: new session with a controlling tty.
    pub(crate) terminal: bool,
    /// File mode creation mask; absent: 0022.
    pub(crate) umask: Option<u32>,
    /// Priorities and memory policy.
    pub(crate) tuning: Tuning,
    /// Groups of resctrl that it joins, in this order. They exist already.
    pub(crate) resctrl: Vec<PathBuf>,
}

/// Priorities and memory policy of a process; what is absent stays as the monitor's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tuning {
    /// `ioprio_set(2)`: (class 0..=3, level 0..=7).
    pub(crate) io_priority: Option<(u8, u8)>,
    /// `sched_setattr(2)`.
    pub(crate) scheduler: Option<SchedulerPlan>,
    /// `set_mempolicy(2)`.
    pub(crate) memory_policy: Option<MemoryPolicyPlan>,
}

/// Arguments of `sched_setattr(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SchedulerPlan {
    /// `SCHED_*`.
    pub(crate) policy: u32,
    /// -20..=19.
    pub(crate) nice: i32,
    /// Real-time priority.
    pub(crate) priority: u32,
    /// `SCHED_FLAG_*`.
    pub(crate) flags: u64,
    /// Nanoseconds.
    pub(crate) runtime: u64,
    /// Nanoseconds.
    pub(crate) deadline: u64,
    /// Nanoseconds.
    pub(crate) period: u64,
}

/// Arguments of `set_mempolicy(2)`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemoryPolicyPlan {
    /// `MPOL_*` with `MPOL_F_*`.
    pub(crate) mode: u32,
    /// Mask of the nodes, 64 to a word.
    pub(crate) nodes: Vec<u64>,
}

/// A user as CRI or the image config names it, looked up in the container's /etc/passwd and /etc/group
/// (regular files of at most 10 MiB) by the child.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserPlan {
    /// Number or name; empty: 0.
    pub(crate) user: UserName,
    /// Group; absent: that of the passwd line, else 0.
    pub(crate) group: Option<UserName>,
    /// Supplementary groups asked for.
    pub(crate) additional_groups: Vec<u32>,
    /// Add groups of /etc/group that list the user (policy Merge).
    pub(crate) merge_image_groups: bool,
}

/// A user or group, by number or by name. Which of the two was decided by the daemon, strictly: a text
/// of digits that does not fit an id is refused there, never taken for a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum UserName {
    /// By number.
    Id(u32),
    /// By name.
    Name(String),
}

impl Default for UserName {
    fn default() -> Self {
        Self::Id(0)
    }
}

/// Capability sets; bit n is capability n of capability.h. The inheritable set is `ambient`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CapabilityMasks {
    /// Bounding set.
    pub(crate) bounding: u64,
    /// Permitted and effective set (cleared by the kernel on exec for a user other than 0).
    pub(crate) permitted: u64,
    /// Ambient (and inheritable) set.
    pub(crate) ambient: u64,
}

/// A compiled seccomp filter: classic BPF instructions and the flags of seccomp(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SeccompFilter {
    /// (code, jt, jf, k), at most 4096.
    pub(crate) instructions: Vec<(u16, u8, u8, u32)>,
    /// Flags of `SECCOMP_SET_MODE_FILTER`.
    pub(crate) flags: u32,
}

/// A process added to a running container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExecPlan {
    /// Cgroups of the container.
    pub(crate) cgroup: CgroupJoin,
    /// [`Namespaces::root`] of the container: its user namespace is entered.
    pub(crate) user_namespace: Option<(u32, u32)>,
    /// What runs. `cwd` must exist.
    pub(crate) process: ProcessPlan,
    /// Who it runs as: what the container's files say by now has no part in it.
    pub(crate) user: ProcessUser,
    /// The CPU that it runs on; absent: those of the container.
    pub(crate) cpu: Option<u32>,
    /// For an OCI runtime: its `process.json`. It follows the plan in the memory file.
    #[serde(skip)]
    pub(crate) text: Option<Text>,
}

/// What the child tells the monitor over its control socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// Everything is set up, the process waits for its start as this user.
    Ready(ProcessUser),
    /// Its mounts are made, and it waits until the hooks that run in the monitor's namespaces have run.
    Mounted,
    /// It failed and exits now.
    Failed(Fault),
    /// The process that speaks goes on as this one, whose pidfd comes along, and ends itself.
    Moved {
        /// Number of the new one.
        pid: u32,
    },
    /// An OCI runtime has made a process, which is or becomes the monitor's child. With it: the master of its
    /// terminal, if it has one.
    Made {
        /// Number of the process.
        pid: u32,
        /// Who it runs as.
        user: ProcessUser,
    },
    /// An OCI runtime has done what it was asked for.
    Done,
}

/// A failure as data: where, what, why. `Display` reads like a strace line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{stage}: {operation} {argument}{}", reason(*errno))]
pub(crate) struct Fault {
    /// Part of the work: `clone`, `cgroup`, `rootfs`, `mount`, `device`, `user`, `exec`, ...
    pub(crate) stage: String,
    /// System call or check.
    pub(crate) operation: String,
    /// Its most telling argument, at most 256 bytes.
    pub(crate) argument: String,
    /// Error number; 0 where a check of ours failed.
    pub(crate) errno: i32,
}

fn reason(errno: i32) -> String {
    match errno {
        0 => String::new(),
        number => format!(": {}", std::io::Error::from_raw_os_error(number)),
    }
}

impl Fault {
    /// Stage of what concerns the directory of an image that is to be mounted. kubelet knows the word.
    pub(crate) const IMAGE_VOLUME: &'static str = "ImageVolumeMountFailed";

    /// A failed system call. `argument` is cut to 256 bytes.
    pub(crate) fn call(
        stage: &str,
        operation: &str,
        argument: impl std::fmt::Display,
        error: &std::io::Error,
    ) -> Self {
        let mut fault = Self::check(stage, operation, argument);
        fault.errno = error.raw_os_error().unwrap_or(5);
        fault
    }

    /// A failed check of ours.
    pub(crate) fn check(stage: &str, operation: &str, argument: impl std::fmt::Display) -> Self {
        let mut argument = argument.to_string();
        argument.truncate(argument.floor_char_boundary(256));
        Self {
            stage: stage.to_owned(),
            operation: operation.to_owned(),
            argument,
            errno: 0,
        }
    }
}

/// Turns the error of a system call into a [`Fault`].
pub(crate) trait Context<T> {
    /// Says which part of the work failed, in which call, on what.
    ///
    /// # Errors
    /// The error, with that.
    fn context(
        self,
        stage: &str,
        operation: &str,
        argument: impl std::fmt::Display,
    ) -> Result<T, Fault>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn context(
        self,
        stage: &str,
        operation: &str,
        argument: impl std::fmt::Display,
    ) -> Result<T, Fault> {
        self.map_err(|error| Fault::call(stage, operation, argument, &error.into()))
    }
}

//! Security settings of pods and containers, as plain values. CRI: `LinuxSandboxSecurityContext`,
//! `LinuxContainerSecurityContext`.

use serde::{Deserialize, Serialize};

/// Where a namespace comes from. CRI: `NamespaceMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum NamespaceMode {
    /// Shared by the containers of the pod.
    #[default]
    Pod,
    /// The container's own.
    Container,
    /// The node's.
    Node,
    /// That of the container `target_id`.
    Target,
}

/// One range of a user namespace mapping. CRI: `IDMapping`; all three fields as there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdMapping {
    /// First id on the host.
    pub(crate) host_id: u32,
    /// First id in the namespace.
    pub(crate) container_id: u32,
    /// How many ids; 0 is refused.
    pub(crate) length: u32,
}

/// CRI: `UserNamespace`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UserNamespace {
    /// `Pod` (own user namespace with the mappings below) or `Node`.
    pub(crate) mode: NamespaceMode,
    /// User ids; empty for `Node`.
    pub(crate) uids: Vec<IdMapping>,
    /// Group ids; empty for `Node`.
    pub(crate) gids: Vec<IdMapping>,
}

impl UserNamespace {
    /// User and group on the node of the namespace's root; absent without a mapping of it.
    pub(crate) fn root(&self) -> Option<(u32, u32)> {
        let of_root = |mappings: &[IdMapping]| {
            let found = mappings.iter().find(|mapping| mapping.container_id == 0);
            found.map(|mapping| mapping.host_id)
        };
        of_root(&self.uids).zip(of_root(&self.gids))
    }
}

impl NamespaceOptions {
    /// The user namespace, where it is not the node's.
    pub(crate) fn own_user(&self) -> Option<&UserNamespace> {
        self.user
            .as_ref()
            .filter(|user| user.mode == NamespaceMode::Pod)
    }
}

/// CRI: `NamespaceOption`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamespaceOptions {
    /// `Pod` or `Node`.
    pub(crate) network: NamespaceMode,
    /// Any mode.
    pub(crate) pid: NamespaceMode,
    /// `Pod` or `Node`.
    pub(crate) ipc: NamespaceMode,
    /// The container whose PID namespace is joined when `pid` is `Target`; else empty.
    pub(crate) target_id: String,
    /// Absent: the node's user namespace.
    pub(crate) user: Option<UserNamespace>,
}

/// CRI: `SELinuxOption`. Empty fields take the policy's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SelinuxOptions {
    /// SELinux user.
    pub(crate) user: String,
    /// SELinux role.
    pub(crate) role: String,
    /// SELinux type.
    pub(crate) kind: String,
    /// SELinux level.
    pub(crate) level: String,
}

impl SelinuxOptions {
    /// Nothing is asked for.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// SELinux labels of a pod or container; empty texts: none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SelinuxLabels {
    /// Of its processes.
    pub(crate) process: String,
    /// Of the filesystems that are made for it, and of volumes that it may write (`context=`).
    pub(crate) mount: String,
}

/// CRI: `SecurityProfile` (seccomp and AppArmor). The deprecated string fields are converted to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SecurityProfile {
    /// The runtime's own.
    RuntimeDefault,
    /// None.
    Unconfined,
    /// seccomp: absolute path of a JSON profile. AppArmor: name of a loaded profile.
    Localhost(String),
}

/// CRI: `SupplementalGroupsPolicy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum SupplementalGroupsPolicy {
    /// Groups of the image's /etc/group are added.
    #[default]
    Merge,
    /// Only the groups listed.
    Strict,
}

/// Security settings of a pod sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodSecurity {
    /// Namespaces of the sandbox.
    pub(crate) namespaces: NamespaceOptions,
    /// SELinux label of the sandbox process.
    pub(crate) selinux: Option<SelinuxOptions>,
    /// User id of the sandbox process; absent: 0.
    pub(crate) run_as_user: Option<i64>,
    /// Group id of the sandbox process; needs `run_as_user`.
    pub(crate) run_as_group: Option<i64>,
    /// Informational here: pause's root is always read-only.
    pub(crate) readonly_rootfs: bool,
    /// Supplementary groups of the sandbox process.
    pub(crate) supplemental_groups: Vec<i64>,
    /// Informational here: the sandbox has no image.
    pub(crate) supplemental_groups_policy: SupplementalGroupsPolicy,
    /// May the pod hold privileged containers?
    pub(crate) privileged: bool,
    /// Absent: unconfined.
    pub(crate) seccomp: Option<SecurityProfile>,
    /// Absent: the default where the kernel has AppArmor, but for a privileged pod's.
    pub(crate) apparmor: Option<SecurityProfile>,
}

/// Capabilities by name, with or without `CAP_`, any case; `ALL` for all. CRI: `Capability`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CapabilityChange {
    /// Added to the default set.
    pub(crate) add: Vec<String>,
    /// Dropped from the default set.
    pub(crate) drop: Vec<String>,
    /// Raised as ambient too.
    pub(crate) add_ambient: Vec<String>,
}

/// Security settings of a container. CRI: `LinuxContainerSecurityContext`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerSecurity {
    /// Changes to the default capabilities.
    pub(crate) capabilities: CapabilityChange,
    /// All capabilities and devices, no masks, no seccomp.
    pub(crate) privileged: bool,
    /// Namespaces; must agree with the pod's.
    pub(crate) namespaces: NamespaceOptions,
    /// SELinux label.
    pub(crate) selinux: Option<SelinuxOptions>,
    /// User id; excludes `run_as_username`.
    pub(crate) run_as_user: Option<i64>,
    /// Group id; needs a user.
    pub(crate) run_as_group: Option<i64>,
    /// User name, looked up in the image's /etc/passwd; empty: not given.
    pub(crate) run_as_username: String,
    /// Read-only root filesystem.
    pub(crate) readonly_rootfs: bool,
    /// Supplementary groups.
    pub(crate) supplemental_groups: Vec<i64>,
    /// How groups of the image count.
    pub(crate) supplemental_groups_policy: SupplementalGroupsPolicy,
    /// `prctl(PR_SET_NO_NEW_PRIVS)`.
    pub(crate) no_new_privs: bool,
    /// Paths hidden from the container (kubelet sends the whole list; empty: none).
    pub(crate) masked_paths: Vec<String>,
    /// Paths made read-only (kubelet sends the whole list; empty: none).
    pub(crate) readonly_paths: Vec<String>,
    /// Absent: unconfined.
    pub(crate) seccomp: Option<SecurityProfile>,
    /// Absent: the default where the kernel has AppArmor.
    pub(crate) apparmor: Option<SecurityProfile>,
}

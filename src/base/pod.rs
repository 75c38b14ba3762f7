//! Pod sandboxes as plain values. CRI: `PodSandboxConfig` and what statuses are made of.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::base::clock::Timestamp;
use crate::base::container::Resources;
use crate::base::id::PodId;
use crate::base::security::{NamespaceOptions, PodSecurity};

/// CRI: `PodSandboxMetadata`. Unique on this node: (name, namespace, uid, attempt).
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct PodMetadata {
    /// Pod name.
    pub(crate) name: String,
    /// Pod uid.
    pub(crate) uid: String,
    /// Pod namespace.
    pub(crate) namespace: String,
    /// How often the sandbox of this pod was made before.
    pub(crate) attempt: u32,
}

/// CRI: `DNSConfig`. All empty: an empty resolv.conf is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DnsConfig {
    /// `nameserver` lines.
    pub(crate) servers: Vec<String>,
    /// The `search` line.
    pub(crate) searches: Vec<String>,
    /// The `options` line.
    pub(crate) options: Vec<String>,
}

/// Transport of a port mapping. CRI: `Protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// CRI: `PortMapping`, checked: both ports 1..=65535 (entries without host port are left out).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PortMapping {
    /// Transport.
    pub(crate) protocol: Protocol,
    /// Port in the pod.
    pub(crate) container_port: u16,
    /// Port on the node.
    pub(crate) host_port: u16,
    /// Address on the node; absent: every address.
    pub(crate) host_ip: Option<IpAddr>,
}

/// CRI: `PodSandboxConfig` with its Linux part, checked and without optional messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodConfig {
    /// Identity.
    pub(crate) metadata: PodMetadata,
    /// Host name; empty: the node's with host network, else the first 12 digits of the id.
    pub(crate) hostname: String,
    /// Absolute directory of the container logs; empty: no logs.
    pub(crate) log_directory: String,
    /// Absent: the node's resolv.conf.
    pub(crate) dns: Option<DnsConfig>,
    /// Ports of the node.
    pub(crate) port_mappings: Vec<PortMapping>,
    /// Echoed.
    pub(crate) labels: BTreeMap<String, String>,
    /// Echoed; data, never behaviour.
    pub(crate) annotations: BTreeMap<String, String>,
    /// Cgroup of the pod (cgroupfs path or systemd slice); empty: the default parent.
    pub(crate) cgroup_parent: String,
    /// Sysctls of the pod's namespaces.
    pub(crate) sysctls: BTreeMap<String, String>,
    /// RuntimeClass overhead, informational.
    pub(crate) overhead: Option<Resources>,
    /// Sum over the containers, informational.
    pub(crate) resources: Option<Resources>,
    /// Security settings.
    pub(crate) security: PodSecurity,
}

/// CRI: `PodSandboxState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PodState {
    /// Running.
    Ready,
    /// Stopped or dead.
    NotReady,
}

/// What lists and statuses of a sandbox show.
#[derive(Clone, Debug)]
pub(crate) struct PodStatus {
    /// Id.
    pub(crate) id: PodId,
    /// As configured.
    pub(crate) metadata: PodMetadata,
    /// State now.
    pub(crate) state: PodState,
    /// When the sandbox was made; never 0.
    pub(crate) created_at: Timestamp,
    /// As configured.
    pub(crate) labels: BTreeMap<String, String>,
    /// As configured.
    pub(crate) annotations: BTreeMap<String, String>,
    /// As asked for; empty: the default handler.
    pub(crate) runtime_handler: String,
    /// First address, then the others; empty with host network and after a stop.
    pub(crate) ips: Vec<IpAddr>,
    /// As configured.
    pub(crate) namespaces: NamespaceOptions,
}

/// CRI: `PodSandboxFilter`; what is absent or empty matches everything.
#[derive(Clone, Debug, Default)]
pub(crate) struct PodFilter {
    /// Unambiguous prefix of the id.
    pub(crate) id: String,
    /// State.
    pub(crate) state: Option<PodState>,
    /// All of these labels.
    pub(crate) labels: BTreeMap<String, String>,
}

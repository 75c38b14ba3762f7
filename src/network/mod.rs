//! Pod networks: namespaces, addresses, host ports, and the files that tell a pod its names.
//!
//! ```text
//! engine --> Network --> Provider: bridge (built in); CNI comes later
//!               |------> Pool: two network namespaces kept ready
//! ```
//!
//! What a pod holds (addresses, ports, its link) is recorded under `<state>/network` before it is made,
//! and found again after `kill -9`. Network namespaces are descriptors: nothing is mounted for them.

pub(crate) mod addresses;
mod bridge;
pub(crate) mod cidr;
pub(crate) mod devices;
pub(crate) mod dns;
mod error;
mod lease;
mod namespaces;
mod ports;
mod stats;

use std::future::Future;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::base::id::PodId;
use crate::base::pod::PortMapping;
use crate::base::stats::InterfaceStats;
use crate::network::cidr::Cidr;

pub(crate) use error::{NetworkError, Result};

/// Settings of the built-in network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NetworkConfig {
    /// Name of the bridge, at most 15 bytes. The nftables table is `berth-<bridge>`: daemons side by side
    /// need different bridges.
    pub(crate) bridge: String,
    /// IPv4 addresses of pods; absent: none. The first is the bridge's.
    pub(crate) ipv4_pool: Option<Cidr>,
    /// IPv6 addresses of pods; absent: none.
    pub(crate) ipv6_pool: Option<Cidr>,
    /// Where leases are kept (in `network/` below it): must not outlive a boot.
    pub(crate) state: PathBuf,
    /// Where daemons side by side note which sysctls they changed: the same for all, on tmpfs.
    pub(crate) shared: PathBuf,
    /// Where a CNI configuration would be; only looked at to say that it is not used.
    pub(crate) cni_config_dir: PathBuf,
    /// Take bridge, rules and sysctls away again with the last pod.
    pub(crate) remove_when_unused: bool,
}

impl NetworkConfig {
    /// Where `shared` is unless configured.
    pub(crate) const SHARED: &'static str = "/run/berth-forwarding";
}

/// What a pod got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// Its addresses, IPv4 first.
    pub(crate) ips: Vec<IpAddr>,
    /// Where its default routes point, in the same order.
    pub(crate) gateways: Vec<IpAddr>,
    /// Name of the interface inside the pod.
    pub(crate) interface: String,
    /// Name of the other end on the host.
    pub(crate) host_interface: String,
}

/// A pod that runs, after a restart of the daemon.
#[derive(Debug)]
pub(crate) struct LivePod {
    /// Which.
    pub(crate) id: PodId,
    /// Its network namespace; absent: a link that is gone is not made anew.
    pub(crate) netns: Option<OwnedFd>,
}

/// Why no pod can be attached now. CRI: `RuntimeCondition`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NotReady {
    /// CamelCase.
    pub(crate) reason: &'static str,
    /// For people.
    pub(crate) message: String,
}

/// An answer that is still to come. Dropping it does not stop the work.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// Who attaches pods: the built-in bridge, later CNI.
pub(crate) trait Provider: Send + Sync + std::fmt::Debug {
    /// See [`Network::attach`].
    fn attach(&self, pod: PodId, netns: OwnedFd, ports: Vec<PortMapping>)
    -> Answer<'_, Attachment>;
    /// See [`Network::detach`].
    fn detach(&self, pod: PodId) -> Answer<'_, ()>;
    /// See [`Network::restore`].
    fn restore(&self, live: Vec<LivePod>) -> Answer<'_, ()>;
    /// See [`Network::set_pod_cidr`].
    fn set_pod_cidr(&self, cidrs: String) -> Answer<'_, ()>;
    /// See [`Network::readiness`].
    fn readiness(&self) -> std::result::Result<(), NotReady>;
    /// See [`Network::info`].
    fn info(&self) -> serde_json::Value;
    /// See [`Network::notices`].
    fn notices(&self) -> Vec<String>;
    /// See [`Network::shutdown_if_unused`].
    fn shutdown_if_unused(&self) -> Answer<'_, ()>;
    /// See [`Network::leased`].
    #[cfg(test)]
    fn leased(&self, pod: PodId) -> Answer<'_, Vec<IpAddr>>;
}

/// The network of all pods. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    provider: Arc<dyn Provider>,
    namespaces: Arc<namespaces::Pool>,
}

impl Network {
    /// Opens the built-in network in the network namespace of the calling thread: reads the leases and
    /// starts its threads, a millisecond in all. Changes nothing on the host: the bridge comes with the
    /// first pod.
    ///
    /// # Errors
    ///
    /// [`NetworkError::UnfitPool`]; [`NetworkError::Leases`]; a thread or socket cannot be had.
    pub(crate) fn open(config: NetworkConfig) -> Result<Self> {
        Ok(Self {
            provider: Arc::new(bridge::BridgeNetwork::open(config)?),
            namespaces: Arc::new(namespaces::Pool::start()?),
        })
    }

    /// A fresh network namespace with its loopback up; the descriptor alone keeps it alive. Usually one
    /// is ready. Cancel-safe.
    ///
    /// # Errors
    ///
    /// The kernel refuses (no privilege, no memory, `/proc/sys/user/max_net_namespaces`).
    pub(crate) async fn netns(&self) -> Result<OwnedFd> {
        self.namespaces.take().await
    }

    /// Makes a network namespace that somebody else made (one owned by a user namespace) like those of
    /// [`Network::netns`].
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub(crate) async fn furnish(&self, netns: OwnedFd) -> Result<OwnedFd> {
        namespaces::furnish(netns).await
    }

    /// Connects a pod: `eth0` in `netns` with addresses and default routes, and its host ports. A pod
    /// that is attached already is attached anew. When it fails nothing is left.
    ///
    /// # Errors
    ///
    /// [`NetworkError::PortTaken`], [`NetworkError::BadHostIp`], [`NetworkError::Exhausted`],
    /// [`NetworkError::Overlap`], [`NetworkError::Kernel`].
    pub(crate) async fn attach(
        &self,
        pod: PodId,
        netns: BorrowedFd<'_>,
        ports: &[PortMapping],
    ) -> Result<Attachment> {
        let netns = netns
            .try_clone_to_owned()
            .map_err(NetworkError::system("duplicate", "the network namespace"))?;
        self.provider.attach(pod, netns, ports.to_vec()).await
    }

    /// Disconnects a pod. When it returns the ports are free and no packet goes to or from the pod; the
    /// address is free only when its link is gone, shortly after. A pod that is not attached is fine.
    ///
    /// # Errors
    ///
    /// [`NetworkError::Kernel`]: call it again.
    pub(crate) async fn detach(&self, pod: PodId) -> Result<()> {
        self.provider.detach(pod).await
    }

    /// At the daemon's start: these pods run; whatever others hold is freed, and what is missing of
    /// theirs is made again. Pods with the host's network may be in the list.
    ///
    /// # Errors
    ///
    /// The first failure, after every pod was tried.
    pub(crate) async fn restore(&self, live: Vec<LivePod>) -> Result<()> {
        self.provider.restore(live).await
    }

    /// From now on pods get addresses of these ranges: one, or two of different families separated by a
    /// comma; empty changes nothing. Pods keep what they have. Survives the daemon, not a reboot.
    ///
    /// CRI: `UpdateRuntimeConfig`, `NetworkConfig.pod_cidr`.
    ///
    /// # Errors
    ///
    /// [`NetworkError::BadCidr`], [`NetworkError::TwoOfAFamily`], [`NetworkError::UnfitPool`],
    /// [`NetworkError::Overlap`]; the ranges stay as they were then.
    pub(crate) async fn set_pod_cidr(&self, cidrs: &str) -> Result<()> {
        self.provider.set_pod_cidr(cidrs.to_owned()).await
    }

    /// Whether pods can be attached, as far as known. From memory.
    ///
    /// # Errors
    ///
    /// Why not.
    pub(crate) fn readiness(&self) -> std::result::Result<(), NotReady> {
        self.provider.readiness()
    }

    /// For verbose `Status`: provider, bridge, pools, and `unusedCniConfig` where a CNI configuration
    /// lies unused. From memory.
    pub(crate) fn info(&self) -> serde_json::Value {
        self.provider.info()
    }

    /// What an administrator should know although pods can be attached, in sentences: a CNI configuration
    /// that lies unused, a firewall that drops what is forwarded. From memory; for `Status`.
    pub(crate) fn notices(&self) -> Vec<String> {
        self.provider.notices()
    }

    /// Waits for links that are being deleted; then, if no pod is attached, removes bridge and rules and
    /// puts the sysctls back. The next pod makes it all again.
    ///
    /// # Errors
    ///
    /// The first failure, after every step was tried.
    pub(crate) async fn shutdown_if_unused(&self) -> Result<()> {
        self.provider.shutdown_if_unused().await
    }

    /// The addresses a pod holds; none when it is not attached.
    #[cfg(test)]
    ///
    /// # Errors
    ///
    /// [`NetworkError::Ended`].
    pub(crate) async fn leased(&self, pod: PodId) -> Result<Vec<IpAddr>> {
        self.provider.leased(pod).await
    }

    /// Counters of a pod's interfaces, `eth0` first and without the loopback, by a process in the pod.
    /// One file of `/proc`, read on the calling thread.
    ///
    /// # Errors
    ///
    /// [`NetworkError::System`]: the process is gone.
    pub(crate) fn interfaces(&self, pid: u32) -> Result<Vec<InterfaceStats>> {
        stats::of_process(pid)
    }
}

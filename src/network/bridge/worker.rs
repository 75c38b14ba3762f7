//! What the network thread knows and does for pods. Every method runs on that thread, one at a time.
//!
//! ```text
//! attach   lease on disk -> veth pair -> pod's end configured -> ports forwarded       failure: undone
//! detach   ports not forwarded, port free, link cut off (reply) -> link deleted -> lease and address free
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};

use crate::base::error::{HasKind as _, chain};
use crate::base::id::PodId;
use crate::base::pod::{PortMapping, Protocol};
use crate::network::addresses::{Addresses, Exhausted, gateway};
use crate::network::bridge::links::{
    Links, POD_INTERFACE, PodEnd, configure_pod, host_interface, mac_of,
};
use crate::network::bridge::nftables::{Table, unfit_host_ip};
use crate::network::bridge::remover::{self, Task, flush};
use crate::network::bridge::setup::SetUp;
use crate::network::bridge::{Job, Shared};
use crate::network::cidr::{Cidr, IpFamily};
use crate::network::error::{NetworkError, Result};
use crate::network::lease::{Lease, LeasedAddress};
use crate::network::ports::{Claims, Forward, forwards};
use crate::network::{Attachment, LivePod, NetworkConfig};
use crate::store::{self, CLOSED, Durability, Records};

/// Everything the thread owns.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) config: NetworkConfig,
    pub(super) shared: Arc<Mutex<Shared>>,
    pub(super) links: Links,
    pub(super) table: Table,
    pub(super) leases: Records<Lease>,
    pub(super) settings: Records<Vec<Cidr>>,
    /// Leases, also of pods whose link is being deleted.
    pub(super) held: BTreeMap<PodId, Lease>,
    /// Pods whose link is being deleted.
    pub(super) leaving: BTreeSet<PodId>,
    pub(super) addresses: Addresses,
    claims: Claims,
    /// Absent until the first pod.
    pub(super) set_up: Option<SetUp>,
    pub(super) remover: mpsc::Sender<Task>,
    /// Told when nothing is leaving any more.
    pub(super) idle: Vec<tokio::sync::oneshot::Sender<()>>,
    pub(super) ended: bool,
    /// A CNI configuration that is there and not used.
    pub(super) unused_cni: Option<String>,
    /// Chains of the host's firewall that drop what is forwarded.
    pub(super) dropping: Vec<String>,
}

impl Worker {
    pub(super) fn open(
        config: NetworkConfig,
        shared: Arc<Mutex<Shared>>,
        jobs: mpsc::Sender<Job>,
    ) -> Result<Self> {
        let directory = config.state.join("network");
        store::directory(&directory, CLOSED)?;
        let leases = Records::open(directory.join("leases"), 1)?;
        let settings = Records::<Vec<Cidr>>::open(directory.join("settings"), 1)?;
        let socket = |error| NetworkError::system("open", "a netlink socket")(error);
        let mut worker = Self {
            links: Links::open().map_err(socket)?,
            table: Table::new(&config.bridge),
            held: BTreeMap::new(),
            leaving: BTreeSet::new(),
            addresses: Addresses::default(),
            claims: Claims::default(),
            set_up: None,
            remover: remover::start(jobs)?,
            idle: vec![],
            ended: false,
            unused_cni: None,
            dropping: vec![],
            config,
            shared,
            leases,
            settings,
        };
        worker.choose_pools()?;
        worker.load_leases()?;
        Ok(worker)
    }

    fn load_leases(&mut self) -> Result<()> {
        let loaded = self.leases.load_all()?;
        for (path, trouble) in loaded.corrupt {
            tracing::warn!(path = %path.display(), error = trouble, "lease unreadable, set aside");
        }
        for (_key, lease) in loaded.records {
            for leased in &lease.addresses {
                self.addresses.take(leased.address);
            }
            if let Err(conflict) = self.claims.claim(lease.pod, &lease.ports) {
                tracing::warn!(pod.id = %lease.pod, ?conflict, "lease names a port that another has");
            }
            self.held.insert(lease.pod, lease);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn leased(&self, pod: PodId) -> Vec<IpAddr> {
        self.held.get(&pod).map(Lease::ips).unwrap_or_default()
    }

    /// What all leases forward.
    pub(super) fn all_forwards(&self) -> Vec<Forward> {
        self.held
            .iter()
            .filter(|(pod, _lease)| !self.leaving.contains(pod))
            .flat_map(|(_pod, lease)| forwards(&lease.ports, &lease.ips()))
            .collect()
    }

    pub(super) fn attach(
        &mut self,
        pod: PodId,
        netns: OwnedFd,
        ports: Vec<PortMapping>,
    ) -> Result<Attachment> {
        self.set_up()?;
        if self.held.contains_key(&pod) {
            self.remove_now(pod)?;
        }
        let lease = self.take_lease(pod, ports)?;
        if let Err(error) = self.connect_again(&lease, netns.as_fd()) {
            if let Err(second) = self.remove_now(pod) {
                tracing::warn!(pod.id = %pod, error = chain(&second), "attachment not undone");
            }
            return Err(error);
        }
        self.publish();
        Ok(Attachment {
            ips: lease.ips(),
            gateways: lease.addresses.iter().map(|a| a.gateway).collect(),
            interface: POD_INTERFACE.to_owned(),
            host_interface: lease.host_interface,
        })
    }

    /// Takes ports and addresses and records them.
    fn take_lease(&mut self, pod: PodId, ports: Vec<PortMapping>) -> Result<Lease> {
        for one in &ports {
            let why = one
                .host_ip
                .and_then(|ip| unfit_host_ip(ip).or_else(|| self.no_pool_for(ip)));
            if let (Some(address), Some(why)) = (one.host_ip, why) {
                return Err(NetworkError::BadHostIp {
                    port: one.host_port,
                    address,
                    why,
                });
            }
        }
        self.claims.claim(pod, &ports).map_err(|conflict| {
            let (port, protocol) = (
                conflict.wanted.host_port,
                protocol_name(conflict.wanted.protocol),
            );
            if conflict.holder == pod {
                NetworkError::PortTwice { port, protocol }
            } else {
                NetworkError::PortTaken {
                    port,
                    protocol,
                    holder: conflict.holder,
                }
            }
        })?;
        let pools: Vec<_> = self.addresses.pools().collect();
        let ips = self.allocate().map_err(|full| {
            self.claims.release(pod);
            NetworkError::Exhausted {
                pool: full.0,
                key: pool_key(full.0.family()),
            }
        })?;
        let lease = Lease {
            pod,
            host_interface: host_interface(pod),
            addresses: ips
                .into_iter()
                .zip(&pools)
                .map(|(address, pool)| LeasedAddress {
                    address,
                    prefix: pool.prefix(),
                    gateway: gateway(pool),
                })
                .collect(),
            ports,
        };
        let written = self
            .leases
            .put(&pod.to_string(), &lease, Durability::Process);
        self.held.insert(pod, lease.clone());
        if let Err(error) = written {
            self.forget(pod);
            return Err(error.into());
        }
        Ok(lease)
    }

    /// Where a pool is full, an address whose link is just being deleted is waited for.
    fn allocate(&mut self) -> std::result::Result<Vec<IpAddr>, Exhausted> {
        loop {
            let full = match self.addresses.allocate() {
                Ok(ips) => return Ok(ips),
                Err(full) => full,
            };
            let held_back = self.leaving.first().copied().ok_or(full)?;
            self.delete_link(&host_interface(held_back))
                .map_err(|_error| full)?;
            self.left(held_back);
        }
    }

    fn no_pool_for(&self, address: IpAddr) -> Option<&'static str> {
        let mut pools = self.addresses.pools();
        let none = !pools.any(|p| p.family() == IpFamily::of(address));
        none.then_some("pods have no address of that family here")
    }

    /// Connects, and once more with everything set up anew where somebody took the bridge or the rules
    /// away meanwhile (`ip link del`, `nft flush ruleset`).
    fn connect_again(&mut self, lease: &Lease, netns: BorrowedFd<'_>) -> Result<()> {
        let Err(first) = self.connect(lease, netns) else {
            return Ok(());
        };
        let bridge = self
            .links
            .find(&self.config.bridge)
            .map_err(NetworkError::kernel("look at", &*self.config.bridge))?;
        let same = bridge.map(|b| b.index) == self.set_up.as_ref().map(|s| s.bridge);
        let table = self.table.exists().unwrap_or(true);
        if same && table {
            return Err(first);
        }
        tracing::warn!(
            error = chain(&first),
            "bridge or rules were taken away, making them anew"
        );
        self.delete_link(&lease.host_interface)?;
        self.set_up = None;
        self.set_up()?;
        self.connect(lease, netns)
    }

    /// Makes the pair, configures the pod's end, forwards the ports.
    pub(super) fn connect(&mut self, lease: &Lease, netns: BorrowedFd<'_>) -> Result<()> {
        let (bridge, mtu) = self
            .set_up
            .as_ref()
            .map_or((0, 1500), |s| (s.bridge, s.mtu));
        let name = lease.host_interface.as_str();
        let mac = lease
            .addresses
            .first()
            .map_or([2, 0, 0, 0, 0, 1], |a| mac_of(a.address));
        self.links
            .make_pair(name, bridge, mtu, mac, netns)
            .map_err(NetworkError::kernel("make the veth pair", name))?;
        let end = PodEnd {
            addresses: lease
                .addresses
                .iter()
                .map(|a| (a.address, a.prefix))
                .collect(),
            gateways: lease.addresses.iter().map(|a| a.gateway).collect(),
        };
        configure_pod(netns, &end)
            .map_err(NetworkError::kernel("configure the pod's end of", name))?;
        let list = forwards(&lease.ports, &lease.ips());
        if list.is_empty() {
            return Ok(());
        }
        self.table
            .add(&list)
            .map_err(NetworkError::kernel("forward the ports of", name))?;
        if list.iter().any(|f| f.protocol == Protocol::Udp) {
            self.later(Task::Flush(list));
        }
        Ok(())
    }

    pub(super) fn detach(&mut self, pod: PodId) -> Result<()> {
        let Some(lease) = self.held.get(&pod).cloned() else {
            return Ok(());
        };
        if self.leaving.contains(&pod) {
            return Ok(());
        }
        let name = lease.host_interface.as_str();
        let cut = self
            .links
            .cut(name)
            .map_err(NetworkError::kernel("cut off the link", name));
        self.stop_forwarding(&lease)?;
        self.leaving.insert(pod);
        self.claims.release(pod);
        let link = lease.host_interface.clone();
        self.later(Task::Remove { pod, link });
        self.publish();
        cut
    }

    fn stop_forwarding(&mut self, lease: &Lease) -> Result<()> {
        let list = forwards(&lease.ports, &lease.ips());
        if list.is_empty() {
            return Ok(());
        }
        self.table.remove(&list).map_err(NetworkError::kernel(
            "stop forwarding the ports of",
            &*lease.host_interface,
        ))?;
        if list.iter().any(|f| f.protocol == Protocol::Udp) {
            flush(&list);
        }
        Ok(())
    }

    /// The whole of a pod's end at once, for a failed attach.
    fn remove_now(&mut self, pod: PodId) -> Result<()> {
        let Some(lease) = self.held.get(&pod).cloned() else {
            return Ok(());
        };
        let link = self.delete_link(&lease.host_interface);
        let ports = self.stop_forwarding(&lease);
        link.and(ports)?;
        self.leaving.remove(&pod);
        self.forget(pod);
        Ok(())
    }

    fn delete_link(&mut self, name: &str) -> Result<()> {
        self.links
            .delete(name)
            .map_err(NetworkError::kernel("delete the link", name))
    }

    pub(super) fn later(&mut self, task: Task) {
        if let Err(unsent) = self.remover.send(task) {
            tracing::error!(task = ?unsent.0, "the removal thread has ended");
        }
    }

    /// The remover's answer.
    pub(super) fn removed(&mut self, pod: PodId, gone: bool) {
        if gone {
            self.left(pod);
        } else {
            // Held still; detach can be called again.
            self.leaving.remove(&pod);
            self.tell_idle();
        }
        if self.held.is_empty()
            && self.config.remove_when_unused
            && let Err(error) = self.tear_down()
        {
            tracing::warn!(error = chain(&error), "bridge not removed");
        }
        self.publish();
    }

    /// The link of a pod that was leaving is gone. One that was attached again meanwhile has another.
    fn left(&mut self, pod: PodId) {
        if self.leaving.remove(&pod) {
            self.forget(pod);
        }
        self.tell_idle();
    }

    fn tell_idle(&mut self) {
        if self.leaving.is_empty() {
            for waiting in self.idle.drain(..) {
                // Nobody waits any more.
                let _unheard = waiting.send(()).is_err();
            }
        }
    }

    /// Frees everything a pod held.
    pub(super) fn forget(&mut self, pod: PodId) {
        if let Some(lease) = self.held.remove(&pod) {
            for leased in &lease.addresses {
                self.addresses.release(leased.address);
            }
        }
        self.claims.release(pod);
        if let Err(error) = self.leases.remove(&pod.to_string()) {
            tracing::warn!(pod.id = %pod, error = chain(&error), "lease not deleted");
        }
    }

    pub(super) fn restore(&mut self, live: Vec<LivePod>) -> Result<()> {
        let ids: BTreeSet<_> = live.iter().map(|pod| pod.id).collect();
        let gone: Vec<_> = self
            .held
            .keys()
            .filter(|pod| !ids.contains(pod) && !self.leaving.contains(pod))
            .copied()
            .collect();
        self.leaving.extend(&gone);
        for pod in gone {
            self.claims.release(pod);
            let link = host_interface(pod);
            self.later(Task::Remove { pod, link });
        }
        let in_use = self.held.len() > self.leaving.len();
        let swept = self.sweep();
        if !in_use {
            self.set_up = None;
            if self.held.is_empty() && self.config.remove_when_unused {
                return swept.and(self.tear_down());
            }
            self.table
                .delete()
                .map_err(NetworkError::kernel("delete the table", self.table.name()))?;
            self.publish();
            return swept;
        }
        self.set_up = None;
        self.set_up()?;
        let mut failed = swept;
        for pod in &live {
            if let Err(error) = self.reconnect(pod) {
                tracing::warn!(pod.id = %pod.id, error = chain(&error), "pod not connected again");
                failed = failed.and(Err(error));
            }
        }
        self.publish();
        failed
    }

    /// Makes a live pod's link anew where it is gone.
    fn reconnect(&mut self, pod: &LivePod) -> Result<()> {
        let (Some(lease), Some(netns)) = (self.held.get(&pod.id).cloned(), &pod.netns) else {
            return Ok(());
        };
        let name = lease.host_interface.as_str();
        let there = self
            .links
            .find(name)
            .map_err(NetworkError::kernel("look at", name))?;
        let bridge = self.set_up.as_ref().map(|s| s.bridge);
        if there.is_some_and(|link| link.master == bridge) {
            return Ok(());
        }
        tracing::warn!(pod.id = %pod.id, link = name, "link is gone, making it anew");
        self.delete_link(name)?;
        self.connect(&lease, netns.as_fd())
    }

    /// Deletes links on our bridge that no lease knows.
    fn sweep(&mut self) -> Result<()> {
        let links = self
            .links
            .list()
            .map_err(NetworkError::kernel("list", "the links"))?;
        let bridge = links.iter().find(|l| l.name == self.config.bridge);
        let Some(bridge) = bridge.map(|b| b.index) else {
            return Ok(());
        };
        let known: BTreeSet<_> = self
            .held
            .values()
            .map(|l| l.host_interface.clone())
            .collect();
        for link in links {
            if link.master == Some(bridge) && link.kind == "veth" && !known.contains(&link.name) {
                tracing::warn!(link = link.name, "link without a lease, deleting it");
                self.later(Task::Sweep(link.name));
            }
        }
        Ok(())
    }
}

const fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "TCP",
        Protocol::Udp => "UDP",
        Protocol::Sctp => "SCTP",
    }
}

/// The key of the configuration that a family's pool comes from.
pub(super) const fn pool_key(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "ipv4_pool",
        IpFamily::V6 => "ipv6_pool",
    }
}

impl Worker {
    /// The error as `Status` shows it.
    pub(super) fn trouble(error: &NetworkError) -> crate::network::NotReady {
        let reason = match error {
            NetworkError::Overlap { .. } => "PodNetworkOverlaps",
            NetworkError::NoPool { .. } => "NoPodNetwork",
            _ => "NetworkNotReady",
        };
        tracing::debug!(kind = ?error.kind(), reason, "network not ready");
        crate::network::NotReady {
            reason,
            message: chain(error),
        }
    }
}

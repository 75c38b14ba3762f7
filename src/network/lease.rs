//! What a pod holds, on disk: `<state>/network/leases/<pod id>.json`. On tmpfs, so that it outlives the
//! daemon and not the boot; written before the first link is made, deleted after the last is gone.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::base::id::PodId;
use crate::base::pod::PortMapping;

/// What a pod holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    /// Whose.
    pub(crate) pod: PodId,
    /// The host's end of its veth pair.
    pub(crate) host_interface: String,
    /// (address, length of its network, gateway), IPv4 first.
    pub(crate) addresses: Vec<LeasedAddress>,
    /// Ports of the node.
    pub(crate) ports: Vec<PortMapping>,
}

/// An address as the pod has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeasedAddress {
    /// The address.
    pub(crate) address: IpAddr,
    /// Length of the network part in bits.
    pub(crate) prefix: u8,
    /// The bridge's address in that network.
    pub(crate) gateway: IpAddr,
}

impl Lease {
    /// The addresses alone, IPv4 first.
    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(|a| a.address).collect()
    }
}

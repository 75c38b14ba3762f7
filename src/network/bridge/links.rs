//! Links, addresses and routes of the host, over one rtnetlink socket. See `rtnetlink(7)`,
//! `Documentation/netlink/specs/rt_link.yaml` of the kernel.
//!
//! ```text
//! host netns                              pod netns
//!   bridge (gateway addresses)
//!     '-- veth<11 digits of the pod id> ---- eth0 (addresses, default routes)
//! ```

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::base::id::PodId;
use crate::network::bridge::routes::{self, Route};
use crate::network::cidr::IpFamily;
use crate::sys::netlink::{
    Answer, Attributed as _, Attributes, CREATE, EXCL, Family, Message, REPLACE, Refusal, Socket,
    attribute, read_text, read_u32,
};
use crate::sys::ns::in_netns;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_LEARNING: u16 = 8;
const IFLA_BRPORT_UNICAST_FLOOD: u16 = 9;
const IFLA_BRPORT_FLUSH: u16 = 24;
const IFLA_BRPORT_MCAST_FLOOD: u16 = 27;
const IFLA_BRPORT_BCAST_FLOOD: u16 = 30;
const IFLA_BRPORT_LOCKED: u16 = 39;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
const VETH_INFO_PEER: u16 = 1;
const IFF_UP: u32 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;
const IFA_F_PERMANENT: u32 = 0x80;

pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;

/// Name of the pod's interface inside the pod.
pub(crate) const POD_INTERFACE: &str = "eth0";

/// Name of the host's end of the pod's veth pair: found again from the id alone.
pub(crate) fn host_interface(pod: PodId) -> String {
    let mut name = format!("veth{pod}");
    name.truncate(15);
    name
}

/// A link as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// Number.
    pub(crate) index: u32,
    /// Name.
    pub(crate) name: String,
    /// Number of the bridge it is a port of.
    pub(crate) master: Option<u32>,
    /// `bridge`, `veth`, ...; empty for hardware.
    pub(crate) kind: String,
    /// Free text that an administrator, or we, gave it.
    pub(crate) alias: String,
    /// Largest packet in bytes.
    pub(crate) mtu: u32,
}

/// What a pod's interface gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodEnd {
    /// Addresses with the length of their network.
    pub(crate) addresses: Vec<(IpAddr, u8)>,
    /// Where the default routes point.
    pub(crate) gateways: Vec<IpAddr>,
}

/// The links of the network namespace of the thread that opened it.
#[derive(Debug)]
pub(crate) struct Links(Socket);

impl Links {
    /// Opens the socket.
    ///
    /// # Errors
    ///
    /// The errno of `socket(2)`.
    pub(crate) fn open() -> io::Result<Self> {
        Socket::open(Family::Route).map(Self)
    }

    /// The link of that name.
    ///
    /// # Errors
    ///
    /// Anything but "no such link", which is `None`.
    pub(crate) fn find(&mut self, name: &str) -> Result<Option<Link>, Refusal> {
        let get = Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0)).text(IFLA_IFNAME, name);
        match self.0.ask(&get) {
            Ok(answer) => Ok(read_link(&answer)),
            Err(refused) if refused.is(rustix::io::Errno::NODEV) => Ok(None),
            Err(refused) => Err(refused),
        }
    }

    /// Every link.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn list(&mut self) -> Result<Vec<Link>, Refusal> {
        let get = Message::new(RTM_GETLINK, 0, &link_header(0, 0, 0));
        Ok(self.0.dump(&get)?.iter().filter_map(read_link).collect())
    }

    /// Makes the bridge, down and without addresses, with a hardware address that does not change
    /// with its ports.
    ///
    /// # Errors
    ///
    /// The kernel's refusal (`EEXIST`: the name is taken).
    pub(crate) fn make_bridge(
        &mut self,
        name: &str,
        mac: [u8; 6],
        alias: &str,
    ) -> Result<(), Refusal> {
        // Without a querier snooping only costs: everything multicast is flooded anyway.
        let make = Message::new(RTM_NEWLINK, CREATE | EXCL, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .bytes(IFLA_ADDRESS, &mac)
            .nest(IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_KIND, "bridge")
                    .nest(IFLA_INFO_DATA, |d| d.bytes(IFLA_BR_MCAST_SNOOPING, &[0]))
            });
        let name_it = Message::new(RTM_NEWLINK, 0, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .text(IFLA_IFALIAS, alias);
        self.0.request(&[make, name_it])
    }

    /// Sets a link up.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn set_up(&mut self, index: u32) -> Result<(), Refusal> {
        let up = Message::new(RTM_NEWLINK, 0, &link_header(index, IFF_UP, IFF_UP));
        self.0.request(&[up])
    }

    /// Deletes a link and its peer; one that is not there is fine. Takes milliseconds.
    ///
    /// # Errors
    ///
    /// Any other refusal.
    pub(crate) fn delete(&mut self, name: &str) -> Result<(), Refusal> {
        let delete = Message::new(RTM_DELLINK, 0, &link_header(0, 0, 0)).text(IFLA_IFNAME, name);
        match self.0.request(&[delete]) {
            Err(refused) if refused.is(rustix::io::Errno::NODEV) => Ok(()),
            other => other,
        }
    }

    /// Addresses of a link, with the length of their network.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn addresses(&mut self, index: u32) -> Result<Vec<(IpAddr, u8)>, Refusal> {
        let get = Message::new(RTM_GETADDR, 0, &[0; 8]);
        let list = self.0.dump(&get)?;
        Ok(list
            .iter()
            .filter_map(|answer| read_address(answer, index))
            .collect())
    }

    /// Gives a link an address; one that it has is fine.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn add_address(
        &mut self,
        index: u32,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), Refusal> {
        self.0
            .request(&[address_message(RTM_NEWADDR, index, address, prefix)])
    }

    /// Takes an address from a link; one that it has not is fine.
    ///
    /// # Errors
    ///
    /// Any other refusal.
    pub(crate) fn delete_address(
        &mut self,
        index: u32,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), Refusal> {
        let delete = address_message(RTM_DELADDR, index, address, prefix);
        match self.0.request(&[delete]) {
            Err(refused) if refused.is(rustix::io::Errno::ADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// The routes of every table but the local one.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn routes(&mut self) -> Result<Vec<Route>, Refusal> {
        routes::of(&mut self.0)
    }

    /// The addresses of a link that are of global scope and do not expire.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn lasting_addresses(&mut self, index: u32) -> Result<Vec<(IpAddr, u8)>, Refusal> {
        let list = self.0.dump(&Message::new(RTM_GETADDR, 0, &[0; 8]))?;
        let lasting = list.iter().filter(|answer| is_lasting(answer));
        Ok(lasting
            .filter_map(|answer| read_address(answer, index))
            .collect())
    }

    /// Moves a link to another network namespace, under this name there. It is down there and has no address.
    ///
    /// # Errors
    ///
    /// The kernel's refusal: `EEXIST`, the name is taken there; `EINVAL`, a link of that kind stays where it was made.
    pub(crate) fn move_to(
        &mut self,
        index: u32,
        netns: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), Refusal> {
        let netns = u32::try_from(netns.as_raw_fd()).map_err(io::Error::other)?;
        let message = Message::new(RTM_NEWLINK, 0, &link_header(index, 0, 0))
            .u32(IFLA_NET_NS_FD, netns)
            .text(IFLA_IFNAME, name);
        self.0.request(&[message])
    }

    /// Makes the pair: the host's end a port of the bridge and up, the pod's end in `netns`, not yet
    /// configured.
    ///
    /// # Errors
    ///
    /// The kernel's refusal (`EEXIST`: one of the names is taken). The pair may exist half made then:
    /// [`Links::delete`] it.
    pub(crate) fn make_pair(
        &mut self,
        name: &str,
        bridge: u32,
        mtu: u32,
        mac: [u8; 6],
        netns: BorrowedFd<'_>,
    ) -> Result<(), Refusal> {
        let netns = u32::try_from(netns.as_raw_fd()).map_err(io::Error::other)?;
        let peer = |peer: Attributes| {
            peer.header(&link_header(0, 0, 0))
                .text(IFLA_IFNAME, POD_INTERFACE)
                .u32(IFLA_MTU, mtu)
                .bytes(IFLA_ADDRESS, &mac)
                .u32(IFLA_NET_NS_FD, netns)
        };
        let make = Message::new(RTM_NEWLINK, CREATE | EXCL, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .u32(IFLA_MTU, mtu)
            .u32(IFLA_MASTER, bridge)
            .nest(IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_KIND, "veth")
                    .nest(IFLA_INFO_DATA, |data| data.nest(VETH_INFO_PEER, peer))
            });
        self.0.request(&[make, enable_port(name)])
    }

    /// Stops the bridge from passing anything from or to this port, at once; one that is not there is
    /// fine.
    ///
    /// Not by its state alone: a change of carrier, which the kernel tells up to a second late, sets a disabled
    /// port forwarding again. Without learning and known addresses a locked port (Linux 5.18; older kernels pass over
    /// the attribute) takes nothing in, and without flooding it gives nothing out.
    ///
    /// # Errors
    ///
    /// Any other refusal.
    pub(crate) fn cut(&mut self, name: &str) -> Result<(), Refusal> {
        let disable = Message::new(RTM_NEWLINK, 0, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .nest(IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_SLAVE_KIND, "bridge")
                    .nest(IFLA_INFO_SLAVE_DATA, |port| {
                        port.bytes(IFLA_BRPORT_STATE, &[0])
                            .bytes(IFLA_BRPORT_LEARNING, &[0])
                            .bytes(IFLA_BRPORT_UNICAST_FLOOD, &[0])
                            .bytes(IFLA_BRPORT_MCAST_FLOOD, &[0])
                            .bytes(IFLA_BRPORT_BCAST_FLOOD, &[0])
                            .bytes(IFLA_BRPORT_LOCKED, &[1])
                            .bytes(IFLA_BRPORT_FLUSH, &[])
                    })
            });
        match self.0.request(&[disable]) {
            // No such link, or it is no port of a bridge.
            Err(refused)
                if refused.is(rustix::io::Errno::NODEV)
                    || refused.is(rustix::io::Errno::OPNOTSUPP) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Sets a port forwarding, as the kernel does at a change of its carrier.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    #[cfg(test)]
    pub(crate) fn set_forwarding(&mut self, name: &str) -> Result<(), Refusal> {
        let forwarding = Message::new(RTM_NEWLINK, 0, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .nest(IFLA_LINKINFO, |info| {
                info.text(IFLA_INFO_SLAVE_KIND, "bridge")
                    .nest(IFLA_INFO_SLAVE_DATA, |port| {
                        port.bytes(IFLA_BRPORT_STATE, &[3])
                    })
            });
        self.0.request(&[forwarding])
    }

    /// Makes a pod's link a port of the bridge again, after the bridge was made anew; one that is not
    /// there is fine.
    ///
    /// # Errors
    ///
    /// Any other refusal.
    pub(crate) fn join(&mut self, name: &str, bridge: u32) -> Result<(), Refusal> {
        let join = Message::new(RTM_NEWLINK, 0, &link_header(0, 0, 0))
            .text(IFLA_IFNAME, name)
            .u32(IFLA_MASTER, bridge);
        match self.0.request(&[join, enable_port(name)]) {
            Err(refused) if refused.is(rustix::io::Errno::NODEV) => Ok(()),
            other => other,
        }
    }
}

/// Sets a port up. Hairpin: where bridged packets pass the firewall (`br_netfilter`), a pod's packet to
/// its own host port leaves by the port it came from. A port needs no address of its own.
fn enable_port(name: &str) -> Message {
    Message::new(RTM_NEWLINK, 0, &link_header(0, IFF_UP, IFF_UP))
        .text(IFLA_IFNAME, name)
        .nest(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_SLAVE_KIND, "bridge")
                .nest(IFLA_INFO_SLAVE_DATA, |port| {
                    port.bytes(IFLA_BRPORT_MODE, &[1])
                })
        })
        .nest(IFLA_AF_SPEC, |spec| {
            spec.nest(u16::from(AF_INET6), |inet6| {
                inet6.bytes(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE])
            })
        })
}

/// Sets the loopback of this thread's network namespace up.
///
/// # Errors
///
/// The kernel's refusal.
pub(crate) fn loopback_up() -> Result<(), Refusal> {
    let up = Message::new(RTM_NEWLINK, 0, &link_header(0, IFF_UP, IFF_UP)).text(IFLA_IFNAME, "lo");
    Socket::open(Family::Route)?.request(&[up])
}

/// Sets the pod's end up, gives it its addresses and the pod its default routes.
///
/// # Errors
///
/// The kernel's refusal; part of it may be done.
pub(crate) fn configure_pod(netns: BorrowedFd<'_>, end: &PodEnd) -> Result<(), Refusal> {
    in_netns(netns, || Ok(configure_here(end)))?
}

fn configure_here(end: &PodEnd) -> Result<(), Refusal> {
    let mut links = Links::open()?;
    let link = links.find(POD_INTERFACE)?;
    let index = link.ok_or(rustix::io::Errno::NODEV)?.index;
    let mut batch = vec![Message::new(
        RTM_NEWLINK,
        0,
        &link_header(index, IFF_UP, IFF_UP),
    )];
    for (address, prefix) in &end.addresses {
        batch.push(address_message(RTM_NEWADDR, index, *address, *prefix));
    }
    for gateway in &end.gateways {
        batch.push(routes::default_by(*gateway, index));
    }
    links.0.request(&batch)
}

pub(super) const fn family_number(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

pub(super) fn with_ip(message: Message, kind: u16, address: IpAddr) -> Message {
    match address {
        IpAddr::V4(v4) => message.bytes(kind, &v4.octets()),
        IpAddr::V6(v6) => message.bytes(kind, &v6.octets()),
    }
}

/// `struct ifinfomsg`: family, type, index, flags, which flags to change.
fn link_header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..].copy_from_slice(&change.to_ne_bytes());
    header
}

/// `struct ifaddrmsg` and the address; without duplicate address detection, which takes a second.
fn address_message(kind: u16, index: u32, address: IpAddr, prefix: u8) -> Message {
    let mut header = [family_number(address), prefix, 0, 0, 0, 0, 0, 0];
    header[4..].copy_from_slice(&index.to_ne_bytes());
    let flags = if kind == RTM_NEWADDR {
        CREATE | REPLACE
    } else {
        0
    };
    let message = with_ip(Message::new(kind, flags, &header), IFA_LOCAL, address);
    let message = with_ip(message, IFA_ADDRESS, address);
    match address {
        IpAddr::V6(_) if kind == RTM_NEWADDR => message.u32(IFA_FLAGS, IFA_F_NODAD),
        _ => message,
    }
}

fn read_link(answer: &Answer) -> Option<Link> {
    let (header, rest) = answer.body.split_at_checked(16)?;
    let text = |kind| attribute(rest, kind).map(read_text).unwrap_or_default();
    let info = attribute(rest, IFLA_LINKINFO).unwrap_or_default();
    Some(Link {
        index: read_u32(header.get(4..)?)?,
        name: text(IFLA_IFNAME),
        master: attribute(rest, IFLA_MASTER).and_then(read_u32),
        kind: attribute(info, IFLA_INFO_KIND)
            .map(read_text)
            .unwrap_or_default(),
        alias: text(IFLA_IFALIAS),
        mtu: attribute(rest, IFLA_MTU).and_then(read_u32).unwrap_or(0),
    })
}

pub(super) fn read_ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// Of global scope (`RT_SCOPE_UNIVERSE`) and without an end (`IFA_F_PERMANENT`).
fn is_lasting(answer: &Answer) -> bool {
    let Some((header, rest)) = answer.body.split_at_checked(8) else {
        return false;
    };
    let short = header.get(2).copied().map(u32::from);
    let flags = attribute(rest, IFA_FLAGS).and_then(read_u32).or(short);
    header.get(3) == Some(&0) && flags.is_some_and(|flags| flags & IFA_F_PERMANENT != 0)
}

fn read_address(answer: &Answer, index: u32) -> Option<(IpAddr, u8)> {
    let (header, rest) = answer.body.split_at_checked(8)?;
    if read_u32(header.get(4..)?)? != index {
        return None;
    }
    let bytes = attribute(rest, IFA_LOCAL).or_else(|| attribute(rest, IFA_ADDRESS))?;
    Some((read_ip(bytes)?, *header.get(1)?))
}

/// A hardware address for a pod: locally administered, the same for the same address, so that what
/// neighbours remember stays true when an address goes to another pod.
pub(crate) fn mac_of(address: IpAddr) -> [u8; 6] {
    let tail = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let o = v6.octets();
            [o[12], o[13], o[14], o[15]]
        }
    };
    let family = match IpFamily::of(address) {
        IpFamily::V4 => 0x04,
        IpFamily::V6 => 0x06,
    };
    [0xbe, family, tail[0], tail[1], tail[2], tail[3]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Id;

    #[test]
    fn names_and_hardware_addresses() {
        let name = host_interface(PodId(Id::from_bytes([0xab; 32])));
        assert_eq!(name, "vethabababababa");
        assert_eq!(mac_of("10.7.0.2".parse().unwrap()), [0xbe, 4, 10, 7, 0, 2]);
        assert_eq!(mac_of("fd07::1:2".parse().unwrap()), [0xbe, 6, 0, 1, 0, 2]);
    }
}

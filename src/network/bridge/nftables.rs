//! Our nftables table, over netlink: masquerade, host ports, and the guard of 127.0.0.0/8.
//!
//! ```text
//! table inet berth-<bridge> {
//!   map {v4,v6}-at   { type address . protocol . port : address . port }   host ports of one address
//!   map {v4,v6}-any  { type           protocol . port : address . port }   host ports of every address
//!   chain guard  { filter prerouting raw;  from bridge, from or to 127/8: drop }
//!   chain ports  { dnat by v4-at, v4-any, v6-at, v6-any }
//!   chain enter  { nat prerouting dstnat;  to an address of this host: jump ports }
//!   chain leave  { nat output dstnat;      not to ::1, to an address of this host: jump ports }
//!   chain masq   { nat postrouting srcnat; from a pool, not to bridge: masquerade
//!                                          from 127/8, to bridge: masquerade
//!                                          from a pool, to bridge, redirected: masquerade }
//! }
//! ```
//!
//! Host ports take packets for the host's own addresses only, never those that it merely forwards
//! (CVE-2025-67499). A port on `[::1]` cannot be: the kernel does not let packets from `::1` leave by
//! another link, so those are left alone and the connection is refused. A chain of ours cannot accept
//! what another table drops: where the host's firewall drops forwarded packets, it must let the bridge
//! through.
//!
//! A pod without host ports costs no rule: the pools are matched as networks. One with host ports costs
//! one element a port and family, in one transaction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::base::pod::Protocol;
use crate::network::bridge::expressions::{DATA_VALUE, Is, Rule, Side, octets};
use crate::network::cidr::{Cidr, IpFamily};
use crate::network::ports::Forward;
use crate::sys::netlink::{
    APPEND, Attributed as _, CREATE, EXCL, Family, Message, Refusal, Socket, attribute, read_text,
};

const SUBSYSTEM: u8 = 10;
const NEWTABLE: u8 = 0;
const GETTABLE: u8 = 1;
const DELTABLE: u8 = 2;
const NEWCHAIN: u8 = 3;
const GETCHAIN: u8 = 4;
const NEWRULE: u8 = 6;
const NEWSET: u8 = 9;
const NEWSETELEM: u8 = 12;
const DELSETELEM: u8 = 14;
const NFPROTO_INET: u8 = 1;

/// nft's numbers of data types, for `nft list`; the kernel ignores them.
const TYPE_IPV4: u32 = 7;
const TYPE_IPV6: u32 = 8;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_PORT: u32 = 13;
/// Elements in one message: an attribute holds at most 64 KiB.
const ELEMENTS: usize = 400;

/// Where a chain hangs.
#[derive(Clone, Copy)]
enum Hook {
    /// Before routing, at this priority.
    Prerouting(i32),
    /// From this host.
    Output(i32),
    /// After routing.
    Postrouting(i32),
}

/// The table of one bridge, in the network namespace of the thread that uses it first.
#[derive(Debug)]
pub(crate) struct Table {
    /// Opened when it is needed: a kernel without nftables must not keep the daemon from starting.
    socket: Option<Socket>,
    name: String,
    bridge: String,
}

impl Table {
    /// The table of that bridge. Touches nothing yet.
    pub(crate) fn new(bridge: &str) -> Self {
        Self {
            socket: None,
            name: format!("berth-{bridge}"),
            bridge: bridge.to_owned(),
        }
    }

    fn socket(&mut self) -> Result<&mut Socket, Refusal> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            none => Ok(none.insert(Socket::open(Family::Netfilter)?)),
        }
    }

    /// The table's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the table is there (`nft flush ruleset` takes it away).
    ///
    /// # Errors
    ///
    /// Any other refusal than that it is not.
    pub(crate) fn exists(&mut self) -> Result<bool, Refusal> {
        let get = self.message(GETTABLE, 0, 1);
        match self.socket()?.ask(&get) {
            Ok(answer) => {
                let rest = answer.body.get(4..).unwrap_or_default();
                Ok(attribute(rest, 1).map(read_text).as_ref() == Some(&self.name))
            }
            Err(refused) if refused.is(rustix::io::Errno::NOENT) => Ok(false),
            Err(refused) => Err(refused),
        }
    }

    /// Makes the table anew with these pools and forwards; what was there before is replaced in the
    /// same instant.
    ///
    /// # Errors
    ///
    /// The kernel's refusal; nothing has changed then.
    pub(crate) fn replace(&mut self, pools: &[Cidr], forwards: &[Forward]) -> Result<(), Refusal> {
        let mut batch = vec![
            self.message(NEWTABLE, CREATE, 1),
            self.message(DELTABLE, 0, 1),
            self.message(NEWTABLE, CREATE | EXCL, 1),
        ];
        for (number, map) in Map::ALL.into_iter().enumerate() {
            batch.push(self.map(map, u32::try_from(number).unwrap_or(0)));
        }
        batch.push(self.chain("guard", Some((Hook::Prerouting(-300), "filter"))));
        batch.push(self.chain("ports", None));
        batch.push(self.chain("enter", Some((Hook::Prerouting(-100), "nat"))));
        batch.push(self.chain("leave", Some((Hook::Output(-100), "nat"))));
        batch.push(self.chain("masq", Some((Hook::Postrouting(100), "nat"))));
        for (chain, rule) in self.rules(pools) {
            batch.push(self.rule(chain, rule));
        }
        batch.extend(self.elements(NEWSETELEM, CREATE, forwards));
        self.socket()?.transaction(SUBSYSTEM, &batch)
    }

    /// Deletes the table; one that is not there is fine.
    ///
    /// # Errors
    ///
    /// Any other refusal.
    pub(crate) fn delete(&mut self) -> Result<(), Refusal> {
        let gone = [self.message(DELTABLE, 0, 1)];
        match self.socket()?.transaction(SUBSYSTEM, &gone) {
            Err(refused) if refused.is(rustix::io::Errno::NOENT) => Ok(()),
            other => other,
        }
    }

    /// Forwards these ports too.
    ///
    /// # Errors
    ///
    /// The kernel's refusal (`ENOENT`: the table is gone, `EBUSY`: a port is forwarded elsewhere);
    /// nothing has changed then.
    pub(crate) fn add(&mut self, forwards: &[Forward]) -> Result<(), Refusal> {
        // Without EXCL: the same port to the same target is there where the table was just made anew.
        let batch = self.elements(NEWSETELEM, CREATE, forwards);
        self.run(&batch)
    }

    /// Forwards these ports no longer; those that are not forwarded are fine.
    ///
    /// # Errors
    ///
    /// Any other refusal; as many as can be are removed all the same.
    pub(crate) fn remove(&mut self, forwards: &[Forward]) -> Result<(), Refusal> {
        let absent = |refused: &Refusal| refused.is(rustix::io::Errno::NOENT);
        let all = self.elements(DELSETELEM, 0, forwards);
        match self.run(&all) {
            Err(refused) if absent(&refused) => {}
            other => return other,
        }
        let mut failed = Ok(());
        for one in forwards {
            let batch = self.elements(DELSETELEM, 0, std::slice::from_ref(one));
            match self.run(&batch) {
                Err(refused) if !absent(&refused) => failed = Err(refused),
                _done => {}
            }
        }
        failed
    }

    /// Chains of other tables that drop what is forwarded unless a rule of theirs accepts it:
    /// `<family> <table> <chain>`.
    ///
    /// # Errors
    ///
    /// The kernel's refusal.
    pub(crate) fn dropping(&mut self) -> Result<Vec<String>, Refusal> {
        let get = Message::new(u16::from_be_bytes([SUBSYSTEM, GETCHAIN]), 0, &[0; 4]);
        let own = self.name.clone();
        let list = self.socket()?.dump(&get)?;
        Ok(list
            .iter()
            .filter_map(|answer| dropping_chain(&answer.body, &own))
            .collect())
    }

    fn run(&mut self, batch: &[Message]) -> Result<(), Refusal> {
        if batch.is_empty() {
            return Ok(());
        }
        self.socket()?.transaction(SUBSYSTEM, batch)
    }

    fn message(&self, kind: u8, flags: u16, name_attribute: u16) -> Message {
        let kind = u16::from_be_bytes([SUBSYSTEM, kind]);
        Message::new(kind, flags, &[NFPROTO_INET, 0, 0, 0]).text(name_attribute, &self.name)
    }

    fn chain(&self, name: &str, hook: Option<(Hook, &str)>) -> Message {
        let chain = self.message(NEWCHAIN, CREATE, 1).text(3, name);
        let Some((hook, kind)) = hook else {
            return chain;
        };
        let (number, priority) = match hook {
            Hook::Prerouting(priority) => (0, priority),
            Hook::Output(priority) => (3, priority),
            Hook::Postrouting(priority) => (4, priority),
        };
        const ACCEPT: u32 = 1;
        chain
            .nest(4, |h| h.be32(1, number).bytes(2, &priority.to_be_bytes()))
            .be32(5, ACCEPT)
            .text(7, kind)
    }

    fn rule(&self, chain: &str, rule: Rule) -> Message {
        self.message(NEWRULE, CREATE | APPEND, 1)
            .text(2, chain)
            .nest(4, |_empty| rule.into_list())
    }

    fn rules(&self, pools: &[Cidr]) -> Vec<(&'static str, Rule)> {
        let loopback = Cidr::new(Ipv4Addr::LOCALHOST.into(), 8);
        let localhost6 = Cidr::new(Ipv6Addr::LOCALHOST.into(), 128);
        let new = Rule::default;
        let guard = |side| {
            let rule = new().came_by(&self.bridge);
            ("guard", rule.address_in(side, &loopback).drop())
        };
        let mut rules = vec![guard(Side::Source), guard(Side::Destination)];
        for family in [IpFamily::V4, IpFamily::V6] {
            for map in Map::ALL.into_iter().filter(|map| map.family == family) {
                rules.push(("ports", new().redirect_by(map.name, family, map.by_address)));
            }
        }
        rules.push(("enter", new().meant_for_this_host().jump("ports")));
        let to_localhost6 = new().address_in(Side::Destination, &localhost6);
        rules.push(("leave", to_localhost6.leave()));
        rules.push(("leave", new().meant_for_this_host().jump("ports")));
        for pool in pools {
            let outward = new()
                .address_in(Side::Source, pool)
                .leaves_by(Is::Other, &self.bridge);
            rules.push(("masq", outward.masquerade()));
            let back = new()
                .address_in(Side::Source, pool)
                .leaves_by(Is::Equal, &self.bridge);
            rules.push(("masq", back.redirected().masquerade()));
        }
        let local = new()
            .address_in(Side::Source, &loopback)
            .leaves_by(Is::Equal, &self.bridge);
        rules.push(("masq", local.masquerade()));
        rules
    }

    fn map(&self, map: Map, number: u32) -> Message {
        const FLAG_MAP: u32 = 8;
        let address_type = match map.family {
            IpFamily::V4 => TYPE_IPV4,
            IpFamily::V6 => TYPE_IPV6,
        };
        let address_bytes = u32::from(map.family.bits() / 8);
        let ports = TYPE_PROTOCOL << 6 | TYPE_PORT;
        let (key_type, key_bytes) = if map.by_address {
            (address_type << 12 | ports, address_bytes + 8)
        } else {
            (ports, 8)
        };
        self.message(NEWSET, CREATE, 1)
            .text(2, map.name)
            .be32(3, FLAG_MAP)
            .be32(4, key_type)
            .be32(5, key_bytes)
            .be32(6, address_type << 6 | TYPE_PORT)
            .be32(7, address_bytes + 4)
            .be32(10, number + 1)
    }

    fn elements(&self, kind: u8, flags: u16, forwards: &[Forward]) -> Vec<Message> {
        let mut batch = vec![];
        for map in Map::ALL {
            let of_map: Vec<_> = forwards.iter().filter(|f| Map::of(f) == map).collect();
            for part in of_map.chunks(ELEMENTS) {
                let message = self.message(kind, flags, 1).text(2, map.name);
                batch.push(message.nest(3, |list| {
                    part.iter().fold(list, |list, forward| {
                        list.nest(1, |element| {
                            element
                                .nest(1, |key| key.bytes(DATA_VALUE, &key_of(forward)))
                                .nest(2, |data| data.bytes(DATA_VALUE, &data_of(forward)))
                        })
                    })
                }));
            }
        }
        batch
    }
}

fn dropping_chain(body: &[u8], own: &str) -> Option<String> {
    const FORWARD: u32 = 2;
    const DROP: u32 = 0;
    let (header, rest) = body.split_at_checked(4)?;
    let be32 = |bytes: &[u8]| Some(u32::from_be_bytes(*bytes.first_chunk()?));
    let hook = attribute(attribute(rest, 4)?, 1).and_then(be32);
    let policy = attribute(rest, 5).and_then(be32);
    let family = match *header.first()? {
        NFPROTO_INET => "inet",
        2 => "ip",
        10 => "ip6",
        _ => return None,
    };
    let table = read_text(attribute(rest, 1)?);
    let chain = read_text(attribute(rest, 3)?);
    (hook == Some(FORWARD) && policy == Some(DROP) && table != own)
        .then(|| format!("{family} {table} {chain}"))
}

/// One of the four maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Map {
    name: &'static str,
    family: IpFamily,
    by_address: bool,
}

impl Map {
    /// The more exact of a family comes first.
    const ALL: [Self; 4] = [
        Self::new("v4-at", IpFamily::V4, true),
        Self::new("v4-any", IpFamily::V4, false),
        Self::new("v6-at", IpFamily::V6, true),
        Self::new("v6-any", IpFamily::V6, false),
    ];

    const fn new(name: &'static str, family: IpFamily, by_address: bool) -> Self {
        Self {
            name,
            family,
            by_address,
        }
    }

    fn of(forward: &Forward) -> Self {
        let family = IpFamily::of(forward.target);
        let by_address = forward.host_ip.is_some();
        match (family, by_address) {
            (IpFamily::V4, true) => Self::ALL[0],
            (IpFamily::V4, false) => Self::ALL[1],
            (IpFamily::V6, true) => Self::ALL[2],
            (IpFamily::V6, false) => Self::ALL[3],
        }
    }
}

/// The number of a transport in IP headers.
pub(crate) const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// Each part fills whole 32-bit registers.
fn key_of(forward: &Forward) -> Vec<u8> {
    let mut key = forward.host_ip.map_or_else(Vec::new, octets);
    key.extend_from_slice(&[protocol_number(forward.protocol), 0, 0, 0]);
    key.extend_from_slice(&forward.host_port.to_be_bytes());
    key.extend_from_slice(&[0, 0]);
    key
}

fn data_of(forward: &Forward) -> Vec<u8> {
    let mut data = octets(forward.target);
    data.extend_from_slice(&forward.target_port.to_be_bytes());
    data.extend_from_slice(&[0, 0]);
    data
}

/// An address that cannot be forwarded from, with the reason.
pub(crate) fn unfit_host_ip(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V6(v6) if v6.is_loopback() => {
            Some("the kernel cannot redirect [::1]; use 127.0.0.1, or leave the host IP empty")
        }
        _ if address.is_multicast() => Some("it is a multicast address"),
        _ => None,
    }
}

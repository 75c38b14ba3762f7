//! The expressions that nftables rules are made of, as netlink attributes. See `nft(8)` and
//! `linux/netfilter/nf_tables.h`; all integers are in network byte order.

use std::net::IpAddr;

use crate::network::cidr::{Cidr, IpFamily};
use crate::sys::netlink::{Attributed as _, Attributes};

/// First 32-bit register; the others follow. Register 0 is the verdict.
const R0: u32 = 8;
const R1: u32 = 9;
const VERDICT: u32 = 0;

const LIST_ELEM: u16 = 1;
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
/// `NFTA_DATA_VALUE`: bytes.
pub(crate) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

const META_OIFNAME: u32 = 7;
const META_IIFNAME: u32 = 6;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
pub(crate) const fn nfproto(family: IpFamily) -> u8 {
    match family {
        IpFamily::V4 => 2,
        IpFamily::V6 => 10,
    }
}

/// Which address of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Side {
    /// Where from.
    Source,
    /// Where to.
    Destination,
}

/// Equal or not.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Is {
    /// Equal.
    Equal,
    /// Not equal.
    Other,
}

/// A rule under construction: matches, then what to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rule(Attributes);

impl Rule {
    /// The list for `NFTA_RULE_EXPRESSIONS`.
    pub(crate) fn into_list(self) -> Attributes {
        self.0
    }

    fn add(self, name: &str, fill: impl FnOnce(Attributes) -> Attributes) -> Self {
        Self(
            self.0
                .nest(LIST_ELEM, |e| e.text(EXPR_NAME, name).nest(EXPR_DATA, fill)),
        )
    }

    fn compare(self, is: Is, value: &[u8]) -> Self {
        let operation = match is {
            Is::Equal => 0,
            Is::Other => 1,
        };
        self.add("cmp", |a| {
            a.be32(1, R0)
                .be32(2, operation)
                .nest(3, |data| data.bytes(DATA_VALUE, value))
        })
    }

    fn meta(self, key: u32, register: u32) -> Self {
        self.add("meta", |a| a.be32(1, register).be32(2, key))
    }

    /// The packet is of this family.
    pub(crate) fn family(self, family: IpFamily) -> Self {
        self.meta(META_NFPROTO, R0)
            .compare(Is::Equal, &[nfproto(family)])
    }

    /// It came in by the link of that name.
    pub(crate) fn came_by(self, name: &str) -> Self {
        self.meta(META_IIFNAME, R0)
            .compare(Is::Equal, &link_name(name))
    }

    /// It goes, or does not go, out by the link of that name.
    pub(crate) fn leaves_by(self, is: Is, name: &str) -> Self {
        self.meta(META_OIFNAME, R0).compare(is, &link_name(name))
    }

    fn load_address(self, side: Side, family: IpFamily, register: u32) -> Self {
        let (offset, length) = match (family, side) {
            (IpFamily::V4, Side::Source) => (12, 4),
            (IpFamily::V4, Side::Destination) => (16, 4),
            (IpFamily::V6, Side::Source) => (8, 16),
            (IpFamily::V6, Side::Destination) => (24, 16),
        };
        const NETWORK_HEADER: u32 = 1;
        self.add("payload", |a| {
            a.be32(1, register)
                .be32(2, NETWORK_HEADER)
                .be32(3, offset)
                .be32(4, length)
        })
    }

    /// One of its addresses is in the range (which says the family too).
    pub(crate) fn address_in(self, side: Side, range: &Cidr) -> Self {
        let mask = octets(range.mask());
        let rule = self
            .family(range.family())
            .load_address(side, range.family(), R0);
        let masked = if range.prefix() == range.family().bits() {
            rule
        } else {
            rule.add("bitwise", |a| {
                a.be32(1, R0)
                    .be32(2, R0)
                    .be32(3, u32::from(range.family().bits() / 8))
                    .nest(4, |m| m.bytes(DATA_VALUE, &mask))
                    .nest(5, |x| x.bytes(DATA_VALUE, &vec![0; mask.len()]))
            })
        };
        masked.compare(Is::Equal, &octets(range.network()))
    }

    /// Its destination is an address of this host.
    pub(crate) fn meant_for_this_host(self) -> Self {
        const RESULT_ADDRESS_TYPE: u32 = 3;
        const FLAG_DESTINATION: u32 = 2;
        const RTN_LOCAL: u32 = 2;
        self.add("fib", |a| {
            a.be32(1, R0)
                .be32(2, RESULT_ADDRESS_TYPE)
                .be32(3, FLAG_DESTINATION)
        })
        .compare(Is::Equal, &RTN_LOCAL.to_ne_bytes())
    }

    /// Its connection was redirected.
    pub(crate) fn redirected(self) -> Self {
        const KEY_STATUS: u32 = 2;
        const IPS_DST_NAT: u32 = 1 << 5;
        self.add("ct", |a| a.be32(1, R0).be32(2, KEY_STATUS))
            .add("bitwise", |a| {
                a.be32(1, R0)
                    .be32(2, R0)
                    .be32(3, 4)
                    .nest(4, |m| m.bytes(DATA_VALUE, &IPS_DST_NAT.to_ne_bytes()))
                    .nest(5, |x| x.bytes(DATA_VALUE, &[0; 4]))
            })
            .compare(Is::Other, &[0; 4])
    }

    /// Looks transport and port (and, with `by_address`, the destination address before them) up in a
    /// map and redirects to the address and port found. No match: the next rule.
    pub(crate) fn redirect_by(self, map: &str, family: IpFamily, by_address: bool) -> Self {
        const TRANSPORT_HEADER: u32 = 2;
        const KIND_DNAT: u32 = 1;
        let words = if by_address {
            u32::from(family.bits() / 32)
        } else {
            0
        };
        let mut rule = self.family(family);
        if by_address {
            rule = rule.load_address(Side::Destination, family, R0);
        }
        let address_words = u32::from(family.bits() / 32);
        rule.meta(META_L4PROTO, R0 + words)
            .add("payload", |a| {
                a.be32(1, R1 + words)
                    .be32(2, TRANSPORT_HEADER)
                    .be32(3, 2)
                    .be32(4, 2)
            })
            .add("lookup", |a| a.text(1, map).be32(2, R0).be32(3, R0))
            .add("nat", |a| {
                a.be32(1, KIND_DNAT)
                    .be32(2, u32::from(nfproto(family)))
                    .be32(3, R0)
                    .be32(5, R0 + address_words)
            })
    }

    /// Gives the packet the outgoing link's address as its source.
    pub(crate) fn masquerade(self) -> Self {
        self.add("masq", |a| a)
    }

    /// Drops the packet.
    pub(crate) fn drop(self) -> Self {
        self.verdict(0, None)
    }

    /// Leaves the chain.
    pub(crate) fn leave(self) -> Self {
        self.verdict(-5, None)
    }

    /// Goes through another chain of the table.
    pub(crate) fn jump(self, chain: &str) -> Self {
        self.verdict(-3, Some(chain))
    }

    fn verdict(self, code: i32, chain: Option<&str>) -> Self {
        self.add("immediate", |a| {
            a.be32(1, VERDICT).nest(2, |data| {
                data.nest(DATA_VERDICT, |verdict| {
                    let verdict = verdict.bytes(1, &code.to_be_bytes());
                    match chain {
                        Some(chain) => verdict.text(2, chain),
                        None => verdict,
                    }
                })
            })
        })
    }
}

/// The bytes of an address.
pub(crate) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn link_name(name: &str) -> [u8; 16] {
    let mut padded = [0; 16];
    for (place, byte) in padded.iter_mut().zip(name.bytes().take(15)) {
        *place = byte;
    }
    padded
}

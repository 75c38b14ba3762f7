//! Address ranges as plain values: `10.209.0.0/16`, `fd62:6572:7468::/64`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which of the two address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub(crate) const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Bits of an address.
    pub(crate) const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A network: an address with the host bits zero, and how many bits are the network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Cidr {
    network: IpAddr,
    prefix: u8,
}

/// The text is not an address range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an address range: {why} (write for example 10.209.0.0/16 or fd62:6572:7468::/64)"
)]
pub(crate) struct ParseCidrError {
    text: String,
    why: &'static str,
}

impl Cidr {
    /// The network of `prefix` bits that `address` lies in; a longer prefix than the family has is cut.
    pub(crate) fn new(address: IpAddr, prefix: u8) -> Self {
        let family = IpFamily::of(address);
        let prefix = prefix.min(family.bits());
        let host_bits = u32::from(family.bits() - prefix);
        let number = to_number(address)
            .checked_shr(host_bits)
            .and_then(|n| n.checked_shl(host_bits))
            .unwrap_or(0);
        Self {
            network: from_number(family, number),
            prefix,
        }
    }

    /// IPv4 or IPv6.
    pub(crate) const fn family(&self) -> IpFamily {
        IpFamily::of(self.network)
    }

    /// The first address.
    pub(crate) const fn network(&self) -> IpAddr {
        self.network
    }

    /// Length of the network part in bits.
    pub(crate) const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The highest offset from the first address.
    pub(crate) fn last_offset(&self) -> u128 {
        u128::MAX
            .checked_shr(128 - u32::from(self.family().bits() - self.prefix))
            .unwrap_or(0)
    }

    /// The address `offset` after the first; absent beyond the last.
    pub(crate) fn nth(&self, offset: u128) -> Option<IpAddr> {
        (offset <= self.last_offset())
            .then(|| from_number(self.family(), to_number(self.network) | offset))
    }

    /// How far `address` is after the first; absent when it is not in the range.
    pub(crate) fn offset(&self, address: IpAddr) -> Option<u128> {
        self.contains(address)
            .then(|| to_number(address) - to_number(self.network))
    }

    /// Whether the address is in the range.
    pub(crate) fn contains(&self, address: IpAddr) -> bool {
        IpFamily::of(address) == self.family() && Self::new(address, self.prefix) == *self
    }

    /// Whether the two ranges share an address.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network) || other.contains(self.network)
    }

    /// The netmask as an address.
    pub(crate) fn mask(&self) -> IpAddr {
        let family = self.family();
        let host_bits = u32::from(family.bits() - self.prefix);
        let ones = u128::MAX >> (128 - u32::from(family.bits()));
        let mask = ones
            .checked_shr(host_bits)
            .and_then(|n| n.checked_shl(host_bits))
            .unwrap_or(0);
        from_number(family, mask)
    }
}

fn to_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn from_number(family: IpFamily, number: u128) -> IpAddr {
    match family {
        // Only numbers of 32 bits come here: masked networks and offsets inside them.
        IpFamily::V4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpFamily::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = ParseCidrError;

    fn from_str(text: &str) -> Result<Self, ParseCidrError> {
        let bad = |why| ParseCidrError {
            text: text.chars().take(80).collect(),
            why,
        };
        let (address, prefix) = text.split_once('/').ok_or_else(|| bad("no /prefix"))?;
        let address: IpAddr = address
            .parse()
            .map_err(|_syntax| bad("no IP address before the /"))?;
        let prefix: u8 = Some(prefix)
            .filter(|p| p.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|p| p.parse().ok())
            .filter(|p| *p <= IpFamily::of(address).bits())
            .ok_or_else(|| bad("the prefix is no number of bits of that family"))?;
        Ok(Self::new(address, prefix))
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn texts() {
        for (text, shown) in [
            ("10.209.7.1/16", "10.209.0.0/16"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("255.255.255.255/32", "255.255.255.255/32"),
            ("fd00::5/64", "fd00::/64"),
            ("::/0", "::/0"),
            ("::1/128", "::1/128"),
        ] {
            assert_eq!(cidr(text).to_string(), shown);
        }
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "::/-1",
            "::/+1",
            "x/8",
            "10.0.0.0/8/9",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn facts() {
        let net = cidr("10.1.0.0/30");
        assert_eq!(net.last_offset(), 3);
        assert_eq!(net.nth(3), Some("10.1.0.3".parse().unwrap()));
        assert_eq!(net.nth(4), None);
        assert_eq!(net.mask().to_string(), "255.255.255.252");
        assert_eq!(cidr("::/0").last_offset(), u128::MAX);
        assert_eq!(cidr("::1/128").last_offset(), 0);
        assert_eq!(
            cidr("fd00::/64").mask().to_string(),
            "ffff:ffff:ffff:ffff::"
        );
        assert_eq!(cidr("0.0.0.0/0").mask().to_string(), "0.0.0.0");
        assert!(cidr("10.0.0.0/8").overlaps(&cidr("10.3.0.0/16")));
        assert!(cidr("10.3.0.0/16").overlaps(&cidr("10.0.0.0/8")));
        assert!(!cidr("10.3.0.0/16").overlaps(&cidr("10.4.0.0/16")));
        assert!(!cidr("0.0.0.0/0").overlaps(&cidr("::/0")));
    }

    proptest! {
        #[test]
        fn offsets_come_back(bits in any::<u128>(), prefix in 0_u8..=128, offset in any::<u128>()) {
            let net = Cidr::new(Ipv6Addr::from_bits(bits).into(), prefix);
            prop_assert_eq!(cidr(&net.to_string()), net);
            match net.nth(offset) {
                Some(address) => prop_assert_eq!(net.offset(address), Some(offset)),
                None => prop_assert!(offset > net.last_offset()),
            }
        }

        #[test]
        fn overlap_is_symmetric(a in any::<u32>(), p in 0_u8..=32, b in any::<u32>(), q in 0_u8..=32) {
            let (one, two) = (Cidr::new(Ipv4Addr::from(a).into(), p), Cidr::new(Ipv4Addr::from(b).into(), q));
            prop_assert_eq!(one.overlaps(&two), two.overlaps(&one));
        }
    }
}

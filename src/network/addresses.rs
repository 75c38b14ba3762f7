//! Which address belongs to whom: the pools and what is taken of them. Pure; `lease` keeps it on disk.
//!
//! An address is given out in rising order and starts again at the bottom, so that one that was freed
//! rests as long as possible. The first of a pool is the gateway (the bridge), the network's own and, with
//! IPv4, the broadcast address are never given.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::network::cidr::{Cidr, IpFamily};

/// Offsets beyond this are not used: a pool of IPv6 is larger than any node needs.
const LARGEST_OFFSET: u128 = 0xffff_ffff;

/// Every address of a pool is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exhausted(pub(crate) Cidr);

/// Why a range cannot be a pool of pod addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum UnfitPool {
    /// No room for a gateway and one pod.
    #[error("it has no room for a gateway and one pod: at most /30 for IPv4, /126 for IPv6")]
    Small,
    /// A large part of the internet.
    #[error("it is too large: at least /8 for IPv4, /16 for IPv6")]
    Large,
    /// Not addresses that hosts can have.
    #[error("it holds loopback, link-local, multicast or unspecified addresses")]
    Special,
}

/// Whether a range can be a pool.
///
/// # Errors
///
/// Why not.
pub(crate) fn check_pool(pool: &Cidr) -> Result<(), UnfitPool> {
    let (least, most) = match pool.family() {
        IpFamily::V4 => (8, 30),
        IpFamily::V6 => (16, 126),
    };
    let special: &[&str] = match pool.family() {
        IpFamily::V4 => &["0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"],
        IpFamily::V6 => &["::/16", "fe80::/10", "ff00::/8"],
    };
    if pool.prefix() > most {
        Err(UnfitPool::Small)
    } else if pool.prefix() < least {
        Err(UnfitPool::Large)
    } else if special
        .iter()
        .filter_map(|text| text.parse::<Cidr>().ok())
        .any(|range| range.overlaps(pool))
    {
        Err(UnfitPool::Special)
    } else {
        Ok(())
    }
}

/// The gateway of a pool: its first address.
pub(crate) fn gateway(pool: &Cidr) -> IpAddr {
    pool.nth(1).unwrap_or_else(|| pool.network())
}

/// The pools in use, at most one a family, and every address taken, also of pools given up since.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses {
    pools: Vec<Pool>,
    taken: BTreeSet<IpAddr>,
}

#[derive(Clone, Copy, Debug)]
struct Pool {
    range: Cidr,
    next: u128,
}

impl Addresses {
    /// Empty pools, at most one of each family; IPv4 comes first whatever the order.
    #[cfg(test)]
    pub(crate) fn new(pools: impl IntoIterator<Item = Cidr>) -> Self {
        let mut addresses = Self::default();
        addresses.replace_pools(pools);
        addresses
    }

    /// From now on gives addresses of these pools. What is taken stays taken.
    pub(crate) fn replace_pools(&mut self, pools: impl IntoIterator<Item = Cidr>) {
        let old = std::mem::take(&mut self.pools);
        self.pools = pools
            .into_iter()
            .map(|range| {
                let same = old.iter().find(|p| p.range == range);
                same.copied().unwrap_or(Pool { range, next: FIRST })
            })
            .collect();
        self.pools.sort_by_key(|p| p.range.family());
    }

    /// The ranges that addresses are given from, IPv4 first.
    pub(crate) fn pools(&self) -> impl Iterator<Item = Cidr> {
        self.pools.iter().map(|p| p.range)
    }

    /// One free address of each pool, now taken.
    ///
    /// # Errors
    ///
    /// The first pool that is full; nothing is taken then.
    pub(crate) fn allocate(&mut self) -> Result<Vec<IpAddr>, Exhausted> {
        let found = self
            .pools
            .iter()
            .map(|pool| pool.free(&self.taken).ok_or(Exhausted(pool.range)))
            .collect::<Result<Vec<_>, _>>()?;
        for (pool, (offset, address)) in self.pools.iter_mut().zip(&found) {
            pool.next = offset + 1;
            self.taken.insert(*address);
        }
        Ok(found
            .into_iter()
            .map(|(_offset, address)| address)
            .collect())
    }

    /// Marks an address that a lease on disk names; whether it was free.
    pub(crate) fn take(&mut self, address: IpAddr) -> bool {
        for pool in &mut self.pools {
            if let Some(offset) = pool.range.offset(address) {
                pool.next = pool.next.max(offset + 1);
            }
        }
        self.taken.insert(address)
    }

    /// Frees an address; one that is free already is fine.
    pub(crate) fn release(&mut self, address: IpAddr) {
        self.taken.remove(&address);
    }

    /// How many addresses are taken.
    #[cfg(test)]
    pub(crate) fn taken(&self) -> usize {
        self.taken.len()
    }
}

/// 0 is the network, 1 the gateway.
const FIRST: u128 = 2;

impl Pool {
    fn free(&self, taken: &BTreeSet<IpAddr>) -> Option<(u128, IpAddr)> {
        let last = match self.range.family() {
            IpFamily::V4 => self.range.last_offset() - 1,
            IpFamily::V6 => self.range.last_offset(),
        }
        .min(LARGEST_OFFSET);
        let from = self.next.max(FIRST);
        (from..=last)
            .chain(FIRST..from.min(last + 1))
            .filter_map(|offset| Some((offset, self.range.nth(offset)?)))
            .find(|(_offset, address)| !taken.contains(address))
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
    fn order_reuse_and_exhaustion() {
        let mut all = Addresses::new([cidr("fd00::/64"), cidr("10.1.0.0/29")]);
        let first = all.allocate().unwrap();
        assert_eq!(
            first,
            [
                "10.1.0.2".parse::<IpAddr>().unwrap(),
                "fd00::2".parse().unwrap()
            ]
        );
        for _ in 0..4 {
            all.allocate().unwrap();
        }
        assert_eq!(all.taken(), 10);
        assert_eq!(all.allocate(), Err(Exhausted(cidr("10.1.0.0/29"))));
        assert_eq!(all.taken(), 10, "nothing taken by a failure");
        all.release(first[0]);
        assert_eq!(all.allocate().unwrap()[0], first[0]);
    }

    #[test]
    fn a_freed_address_rests() {
        let mut all = Addresses::new([cidr("10.1.0.0/24")]);
        let one = all.allocate().unwrap();
        all.release(one[0]);
        assert_ne!(all.allocate().unwrap(), one);
    }

    #[test]
    fn pools_can_change_under_leases() {
        let mut all = Addresses::new([cidr("10.1.0.0/24")]);
        let old = all.allocate().unwrap();
        all.replace_pools([cidr("10.1.0.0/25"), cidr("fd00::/126")]);
        let new = all.allocate().unwrap();
        assert_eq!(new.len(), 2);
        assert_ne!(new[0], old[0], "taken stays taken");
        all.release(old[0]);
        assert_eq!(all.taken(), 2);
    }

    #[test]
    fn which_pools_are_fit() {
        for (text, want) in [
            ("10.0.0.0/30", Ok(())),
            ("10.0.0.0/31", Err(UnfitPool::Small)),
            ("10.0.0.0/7", Err(UnfitPool::Large)),
            ("127.0.0.0/16", Err(UnfitPool::Special)),
            ("224.0.0.0/24", Err(UnfitPool::Special)),
            ("fd00::/126", Ok(())),
            ("fd00::/127", Err(UnfitPool::Small)),
            ("fe80::/64", Err(UnfitPool::Special)),
            ("::/64", Err(UnfitPool::Special)),
        ] {
            assert_eq!(check_pool(&cidr(text)), want, "{text}");
        }
    }

    proptest! {
        /// Any order of taking and freeing: no address twice, none outside, never the special ones.
        #[test]
        fn never_twice(prefix in 27_u8..=30, steps in prop::collection::vec(any::<Option<u8>>(), 0..200)) {
            let range = Cidr::new("10.1.0.0".parse().unwrap(), prefix);
            let mut all = Addresses::new([range]);
            let mut held: Vec<IpAddr> = vec![];
            let room = usize::try_from(range.last_offset() - 2).unwrap();
            for step in steps {
                match step {
                    Some(which) if !held.is_empty() => {
                        let gone = held.remove(usize::from(which) % held.len());
                        all.release(gone);
                    }
                    _ => match all.allocate() {
                        Ok(new) => {
                            let offset = range.offset(new[0]).unwrap();
                            prop_assert!(offset >= 2 && offset < range.last_offset());
                            prop_assert!(!held.contains(&new[0]));
                            held.push(new[0]);
                        }
                        Err(_full) => prop_assert_eq!(held.len(), room),
                    },
                }
            }
        }
    }
}

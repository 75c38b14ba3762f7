//! Which pod has which port of the node. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::base::id::PodId;
use crate::base::pod::{PortMapping, Protocol};
use crate::network::cidr::IpFamily;

/// Two mappings want the same port of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    /// What was asked for.
    pub(crate) wanted: PortMapping,
    /// Who has it.
    pub(crate) holder: PodId,
}

/// The ports taken.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims(BTreeMap<(Protocol, u16), Vec<Holder>>);

/// Which address of the node (absent: all), and who has it there.
type Holder = (Option<IpAddr>, PodId);

impl Claims {
    /// Takes every port of the list for `pod`.
    ///
    /// # Errors
    ///
    /// The first that another pod has, or that the list itself names twice with different targets;
    /// nothing is taken then.
    pub(crate) fn claim(&mut self, pod: PodId, mappings: &[PortMapping]) -> Result<(), Conflict> {
        let taken_twice = mappings.iter().enumerate().find_map(|(i, one)| {
            let earlier = mappings.iter().take(i);
            let mut same = earlier.filter(|other| one.clashes(other) && *other != one);
            same.next().map(|_other| (one, pod))
        });
        let taken = mappings.iter().find_map(|one| {
            let holders = self.0.get(&(one.protocol, one.host_port))?;
            let mut clash = holders
                .iter()
                .filter(|(ip, holder)| *holder != pod && meet(*ip, one.host_ip));
            clash.next().map(|(_ip, holder)| (one, *holder))
        });
        if let Some((wanted, holder)) = taken_twice.or(taken) {
            let wanted = wanted.clone();
            return Err(Conflict { wanted, holder });
        }
        for one in mappings {
            let holders = self.0.entry((one.protocol, one.host_port)).or_default();
            if !holders.contains(&(one.host_ip, pod)) {
                holders.push((one.host_ip, pod));
            }
        }
        Ok(())
    }

    /// Frees every port of `pod`.
    pub(crate) fn release(&mut self, pod: PodId) {
        self.0.retain(|_port, holders| {
            holders.retain(|(_ip, holder)| *holder != pod);
            !holders.is_empty()
        });
    }

    /// Whether nothing is taken.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl PortMapping {
    fn clashes(&self, other: &Self) -> bool {
        (self.protocol, self.host_port) == (other.protocol, other.host_port)
            && meet(self.host_ip, other.host_ip)
    }
}

/// Whether two host addresses (absent: all; unspecified: all of that family) share one.
fn meet(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    match (one, other) {
        (None, _) | (_, None) => true,
        (Some(a), Some(b)) => {
            IpFamily::of(a) == IpFamily::of(b)
                && (a == b || a.is_unspecified() || b.is_unspecified())
        }
    }
}

/// Where packets to one port of the node go: what a rule is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    /// Transport.
    pub(crate) protocol: Protocol,
    /// Address of the node; absent: every address of the target's family.
    pub(crate) host_ip: Option<IpAddr>,
    /// Port of the node.
    pub(crate) host_port: u16,
    /// The pod's address.
    pub(crate) target: IpAddr,
    /// The pod's port.
    pub(crate) target_port: u16,
}

/// What to forward for a pod with these addresses, without repetitions.
pub(crate) fn forwards(mappings: &[PortMapping], addresses: &[IpAddr]) -> Vec<Forward> {
    let mut list = vec![];
    for one in mappings {
        for target in addresses {
            if one
                .host_ip
                .is_some_and(|ip| IpFamily::of(ip) != IpFamily::of(*target))
            {
                continue;
            }
            let forward = Forward {
                protocol: one.protocol,
                host_ip: one.host_ip.filter(|ip| !ip.is_unspecified()),
                host_port: one.host_port,
                target: *target,
                target_port: one.container_port,
            };
            if !list.contains(&forward) {
                list.push(forward);
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Id;

    fn pod(n: u8) -> PodId {
        PodId(Id::from_bytes([n; 32]))
    }

    fn map(host: u16, ip: &str, target: u16) -> PortMapping {
        PortMapping {
            protocol: Protocol::Tcp,
            container_port: target,
            host_port: host,
            host_ip: ip.parse().ok(),
        }
    }

    #[test]
    fn who_clashes_with_whom() {
        for (one, other, clash) in [
            ("", "", true),
            ("", "127.0.0.1", true),
            ("", "::", true),
            ("0.0.0.0", "127.0.0.1", true),
            ("0.0.0.0", "::", false),
            ("10.0.0.1", "127.0.0.1", false),
            ("10.0.0.1", "10.0.0.1", true),
            ("fd00::1", "::", true),
        ] {
            let mut claims = Claims::default();
            claims.claim(pod(1), &[map(80, one, 8080)]).unwrap();
            let got = claims.claim(pod(2), &[map(80, other, 8080)]);
            assert_eq!(got.is_err(), clash, "{one:?} {other:?}");
            if let Err(conflict) = got {
                assert_eq!(conflict.holder, pod(1));
            }
            claims.claim(pod(3), &[map(81, other, 8080)]).unwrap();
        }
    }

    #[test]
    fn protocols_are_apart_and_a_release_frees_all() {
        let mut claims = Claims::default();
        let mut udp = map(80, "", 8080);
        udp.protocol = Protocol::Udp;
        claims
            .claim(pod(1), &[map(80, "", 8080), udp.clone()])
            .unwrap();
        assert!(
            claims
                .claim(pod(2), &[map(90, "", 1), udp.clone()])
                .is_err()
        );
        claims.claim(pod(3), &[map(90, "", 1)]).unwrap();
        claims.release(pod(1));
        claims.claim(pod(2), &[udp]).unwrap();
        claims.release(pod(2));
        claims.release(pod(3));
        assert!(claims.is_empty());
    }

    #[test]
    fn a_list_may_repeat_but_not_contradict_itself() {
        let mut claims = Claims::default();
        claims
            .claim(pod(1), &[map(80, "", 1), map(80, "", 1)])
            .unwrap();
        claims.claim(pod(1), &[map(80, "", 1)]).unwrap();
        let got = claims.claim(pod(2), &[map(81, "", 1), map(81, "127.0.0.1", 2)]);
        assert_eq!(got.unwrap_err().holder, pod(2));
        claims.release(pod(1));
        assert!(claims.is_empty());
    }

    #[test]
    fn forwards_follow_the_families() {
        let both: Vec<IpAddr> = vec!["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        for (ip, count) in [
            ("", 2),
            ("0.0.0.0", 1),
            ("::", 1),
            ("192.0.2.1", 1),
            ("fd01::1", 1),
        ] {
            let list = forwards(&[map(80, ip, 8080), map(80, ip, 8080)], &both);
            assert_eq!(list.len(), count, "{ip}");
        }
        let exact = forwards(&[map(80, "192.0.2.1", 8080)], &both);
        assert_eq!(exact[0].host_ip, "192.0.2.1".parse().ok());
        assert!(forwards(&[map(80, "::", 8080)], &both[..1]).is_empty());
    }
}

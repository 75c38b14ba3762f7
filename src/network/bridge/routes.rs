//! Routes of the host. See `rtnetlink(7)`, `Documentation/netlink/specs/rt_route.yaml` of the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::network::bridge::links::{AF_INET, AF_INET6, Link, family_number, read_ip, with_ip};
use crate::network::cidr::Cidr;
use crate::sys::netlink::{
    Answer, Attributed as _, CREATE, Message, REPLACE, Refusal, Socket, attribute, attributes,
    read_u32,
};

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTAX_MTU: u16 = 2;
const RT_TABLE_MAIN: u8 = 254;
const RT_TABLE_LOCAL: u32 = 255;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// Unicast, then the kinds that refuse: blackhole, unreachable, prohibit.
const RTN_REACHING: [u8; 4] = [RTN_UNICAST, 6, 7, 8];

/// A route of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// Where to.
    pub(crate) destination: Cidr,
    /// Through which link; absent for a route that refuses.
    pub(crate) link: Option<u32>,
    /// Smaller wins.
    pub(crate) metric: u32,
    /// Largest packet in bytes, where the route says.
    pub(crate) mtu: Option<u32>,
}

/// The routes of every table but the local one.
///
/// # Errors
///
/// The kernel's refusal.
pub(crate) fn of(socket: &mut Socket) -> Result<Vec<Route>, Refusal> {
    let mut routes = vec![];
    for family in [AF_INET, AF_INET6] {
        let mut header = [0; 12];
        header[0] = family;
        let list = socket.dump(&Message::new(RTM_GETROUTE, 0, &header))?;
        routes.extend(list.iter().filter_map(read_route));
    }
    Ok(routes)
}

/// The request of a default route by `gateway`, through link number `link`.
pub(super) fn default_by(gateway: IpAddr, link: u32) -> Message {
    let mut header = [0; 12];
    header[0] = family_number(gateway);
    header[4] = RT_TABLE_MAIN;
    header[5] = RTPROT_STATIC;
    header[7] = RTN_UNICAST;
    let route = Message::new(RTM_NEWROUTE, CREATE | REPLACE, &header);
    with_ip(route, RTA_GATEWAY, gateway).u32(RTA_OIF, link)
}

fn read_route(answer: &Answer) -> Option<Route> {
    let (header, rest) = answer.body.split_at_checked(12)?;
    let (family, length, kind) = (*header.first()?, *header.get(1)?, *header.get(7)?);
    let table = attribute(rest, RTA_TABLE).and_then(read_u32);
    if table.or_else(|| header.get(4).copied().map(u32::from)) == Some(RT_TABLE_LOCAL)
        || !RTN_REACHING.contains(&kind)
    {
        return None;
    }
    let unspecified = match family {
        AF_INET => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        AF_INET6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let destination = attribute(rest, RTA_DST).map_or(Some(unspecified), read_ip)?;
    let metrics = attribute(rest, RTA_METRICS).unwrap_or_default();
    let mut mtu = attributes(metrics).filter(|(kind, _value)| *kind == RTAX_MTU);
    Some(Route {
        destination: Cidr::new(destination, length),
        link: attribute(rest, RTA_OIF).and_then(read_u32),
        metric: attribute(rest, RTA_PRIORITY)
            .and_then(read_u32)
            .unwrap_or(0),
        mtu: mtu.next().and_then(|(_kind, value)| read_u32(value)),
    })
}

/// Whether the route is a default route.
pub(crate) fn is_default(route: &Route) -> bool {
    route.destination.prefix() == 0
}

/// The largest packet of the host's best default route, else 1500.
pub(crate) fn default_mtu(routes: &[Route], links: &[Link]) -> u32 {
    const ETHERNET: u32 = 1500;
    let best = routes
        .iter()
        .filter(|r| is_default(r) && r.link.is_some())
        .min_by_key(|r| (r.destination.family(), r.metric));
    let of_link = |route: &Route| links.iter().find(|l| Some(l.index) == route.link);
    best.and_then(|route| route.mtu.or_else(|| of_link(route).map(|l| l.mtu)))
        .filter(|mtu| *mtu >= 68)
        .unwrap_or(ETHERNET)
}

/// The link that makes a pool unusable: (its route, its number).
pub(crate) fn overlapping<'r>(
    pool: &Cidr,
    routes: &'r [Route],
    own_bridge: Option<u32>,
) -> Option<&'r Route> {
    routes.iter().find(|route| {
        !is_default(route)
            && route.destination.overlaps(pool)
            && (route.link.is_none() || route.link != own_bridge)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, link: u32, metric: u32, mtu: Option<u32>) -> Route {
        Route {
            destination: destination.parse().unwrap(),
            link: Some(link),
            metric,
            mtu,
        }
    }

    fn link(index: u32, mtu: u32) -> Link {
        Link {
            index,
            name: format!("link{index}"),
            master: None,
            kind: String::new(),
            alias: String::new(),
            mtu,
        }
    }

    #[test]
    fn packets_as_large_as_the_way_out_takes() {
        let links = [link(2, 1400), link(3, 9000)];
        for (routes, want) in [
            (vec![], 1500),
            (vec![route("10.0.0.0/8", 3, 0, None)], 1500),
            (vec![route("0.0.0.0/0", 2, 0, None)], 1400),
            (vec![route("0.0.0.0/0", 2, 0, Some(1280))], 1280),
            (
                vec![
                    route("0.0.0.0/0", 3, 100, None),
                    route("0.0.0.0/0", 2, 50, None),
                ],
                1400,
            ),
            (
                vec![route("::/0", 3, 1, None), route("0.0.0.0/0", 2, 50, None)],
                1400,
            ),
            (vec![route("::/0", 3, 1, None)], 9000),
            (vec![route("0.0.0.0/0", 7, 0, None)], 1500),
        ] {
            assert_eq!(default_mtu(&routes, &links), want, "{routes:?}");
        }
    }

    #[test]
    fn which_routes_are_in_the_way() {
        let pool = "10.7.0.0/16".parse().unwrap();
        for (destination, link, own, found) in [
            ("0.0.0.0/0", 2, None, false),
            ("10.8.0.0/16", 2, None, false),
            ("10.0.0.0/8", 2, None, true),
            ("10.7.3.0/24", 2, None, true),
            ("10.7.3.0/24", 2, Some(3), true),
            ("10.7.0.0/16", 3, Some(3), false),
            ("fd00::/8", 2, None, false),
        ] {
            let routes = [route(destination, link, 0, None)];
            assert_eq!(
                overlapping(&pool, &routes, own).is_some(),
                found,
                "{destination}"
            );
        }
        let mut refusing = route("10.7.0.0/24", 0, 0, None);
        refusing.link = None;
        assert!(overlapping(&pool, &[refusing], None).is_some());
    }
}

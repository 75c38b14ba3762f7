//! Where a registry may lead us. The realm of a challenge and the target of a redirect are words of others, and what
//! answers on the loopback or on a link-local address (a cloud's metadata, say) trusts this machine: such addresses are
//! refused, unless the registry itself is there or `hosts.toml` says so (`local_targets`).
//!
//! Names are judged when a connection is made: [`Guard`] resolves them, and the connection gets the addresses that it let
//! pass and no others. Addresses in URLs are judged before. Where a proxy connects, it resolves too: addresses in URLs and
//! the name localhost are all that can be judged then.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// An address that trusts whoever can reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Near {
    /// The machine itself. An unspecified address leads there too.
    Loopback,
    /// A neighbour on the link.
    Link(IpAddr),
    /// Metadata of a cloud that has them on another address.
    Metadata(IpAddr),
}

impl std::fmt::Display for Near {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Loopback => "on the loopback",
            Self::Link(_) => "on a link-local address",
            Self::Metadata(_) => "on an address of cloud metadata",
        })
    }
}

impl Near {
    /// What is near about an address; `None`: nothing. An IPv6 address that carries an IPv4 one is as near as that.
    pub(crate) fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => Self::of_v6(address),
        }
    }

    fn of_v4(address: Ipv4Addr) -> Option<Self> {
        let [first, ..] = address.octets();
        // Alibaba Cloud, Oracle, Azure.
        let metadata = [[100, 100, 100, 200], [192, 0, 0, 192], [168, 63, 129, 16]];
        if address.is_loopback() || first == 0 {
            Some(Self::Loopback)
        } else if address.is_link_local() {
            Some(Self::Link(address.into()))
        } else if metadata.contains(&address.octets()) {
            Some(Self::Metadata(address.into()))
        } else {
            None
        }
    }

    fn of_v6(address: Ipv6Addr) -> Option<Self> {
        if address.is_loopback() || address.is_unspecified() {
            return Some(Self::Loopback);
        }
        let [a, b, c, ..] = address.segments();
        if a & 0xffc0 == 0xfe80 {
            return Some(Self::Link(address.into()));
        }
        // AWS (fd00:ec2::254 and its other services), Oracle, Google Cloud.
        if matches!((a, b, c), (0xfd00, 0x0ec2 | 0xc1, _) | (0xfd20, 0xce, 0)) {
            return Some(Self::Metadata(address.into()));
        }
        carried(address).into_iter().find_map(Self::of_v4)
    }
}

/// IPv4 addresses to which packets for an IPv6 address may go.
fn carried(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let [a, b, c, d, e, f, g, h] = address.segments();
    let v4 = |high: u16, low: u16| {
        let ([p, q], [r, s]) = (high.to_be_bytes(), low.to_be_bytes());
        Ipv4Addr::new(p, q, r, s)
    };
    match (a, b, c, d, e, f) {
        // Mapped, translated (RFC 2765) and compatible addresses.
        (0, 0, 0, 0, 0, 0xffff | 0) | (0, 0, 0, 0, 0xffff, 0) => vec![v4(g, h)],
        // NAT64: its own prefix, and the one for local use (RFC 6052 and 8215).
        (0x64, 0xff9b, ..) => vec![v4(g, h)],
        // 6to4.
        (0x2002, ..) => vec![v4(b, c)],
        // Teredo: its server, and the client in complement.
        (0x2001, 0, ..) => vec![v4(c, d), v4(!g, !h)],
        // ISATAP.
        (.., 0 | 0x200, 0x5efe) => vec![v4(g, h)],
        _ => vec![],
    }
}

/// The address that a URL has for a host, in whatever spelling; `None`: a name.
pub(crate) fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.trim_matches(['[', ']']).parse().ok()
}

/// Is a name one that means the machine itself everywhere? RFC 6761, 6.3.
pub(crate) fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// Where a host was when it answered first; realms and redirects may lead there.
#[derive(Debug, Default)]
pub(crate) struct Home(OnceLock<Option<Near>>);

impl Home {
    /// Of a host whose URL tells; of others, [`Self::arrived`] does.
    pub(crate) fn of(base: &Url) -> Self {
        let home = Self::default();
        let near = match literal(base) {
            Some(address) => Near::of(address),
            None => base
                .host_str()
                .filter(|name| is_localhost(name))
                .map(|_| Near::Loopback),
        };
        if near.is_some() {
            home.arrived(near);
        }
        home
    }

    /// The host has answered, from here. Only the first answer counts: a name that changes its mind leads nowhere.
    pub(crate) fn arrived(&self, near: Option<Near>) {
        let _first = self.0.set(near).is_ok();
    }

    /// May a connection go there? Before the first answer it is the host itself that is looked for.
    pub(crate) fn permits(&self, near: Near) -> bool {
        self.0.get().is_none_or(|home| *home == Some(near))
    }
}

/// A name that leads where nobody may be led.
#[derive(Debug, thiserror::Error)]
#[error("{name} is {near} ({address})")]
pub(crate) struct TooNear {
    name: String,
    /// What is near about it.
    pub(crate) near: Near,
    /// What the name means at the moment.
    pub(crate) address: IpAddr,
}

type Found = Pin<Box<dyn Future<Output = std::io::Result<Vec<SocketAddr>>> + Send>>;

/// Resolves names for connections, without the addresses that are too near.
#[derive(Debug)]
pub(crate) struct Guard {
    home: Arc<Home>,
    look_up: fn(String) -> Found,
}

impl Guard {
    /// Names are looked up as the machine is configured to.
    pub(crate) fn new(home: Arc<Home>) -> Self {
        let look_up = |name: String| -> Found {
            Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) })
        };
        Self { home, look_up }
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let (home, name) = (self.home.clone(), name.as_str().to_owned());
        let found = (self.look_up)(name.clone());
        Box::pin(async move {
            let mut refused = None;
            let mut passed = vec![];
            for address in found.await? {
                match Near::of(address.ip()).filter(|near| !home.permits(*near)) {
                    None => passed.push(address),
                    Some(near) => refused = Some((near, address.ip())),
                }
            }
            match refused {
                Some((near, address)) if passed.is_empty() => Err(TooNear {
                    name,
                    near,
                    address,
                }
                .into()),
                _ => Ok(Box::new(passed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(text: &str) -> Option<Near> {
        Near::of(text.parse().unwrap())
    }

    #[test]
    fn what_is_near_in_every_dress() {
        for text in [
            "127.0.0.1",
            "127.255.3.4",
            "0.0.0.0",
            "0.1.2.3",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:0.0.0.0",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b:1::7f00:1",
            "2002:7f00:1::1",
            "2001:0:7f00:1::",
            "2001:0:808:808::80ff:fffe",
            "fd12::5efe:127.0.0.1",
            "2001:db8::200:5efe:127.0.0.1",
        ] {
            assert_eq!(near(text), Some(Near::Loopback), "{text}");
        }
        for text in [
            "169.254.169.254",
            "169.254.0.1",
            "fe80::1",
            "febf::1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
        ] {
            assert!(matches!(near(text), Some(Near::Link(_))), "{text}");
        }
        for text in [
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd20:ce::254",
            "100.100.100.200",
            "::ffff:168.63.129.16",
        ] {
            assert!(matches!(near(text), Some(Near::Metadata(_))), "{text}");
        }
        for text in [
            "10.0.0.1",
            "192.168.1.1",
            "8.8.8.8",
            "128.0.0.1",
            "169.253.1.1",
            "2001:db8::1",
            "fd00::1",
            "fec0::1",
            "::ffff:10.0.0.1",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "100.64.0.1",
        ] {
            assert_eq!(near(text), None, "{text}");
        }
    }

    #[test]
    fn spellings_in_urls() {
        for (host, address) in [
            ("127.1", "127.0.0.1"),
            ("2130706433", "127.0.0.1"),
            ("0x7f000001", "127.0.0.1"),
            ("0177.0.0.01", "127.0.0.1"),
            ("127.0.0.1.", "127.0.0.1"),
            ("%31%32%37.0.0.1", "127.0.0.1"),
            ("１２７。0。0。1", "127.0.0.1"),
            ("0", "0.0.0.0"),
            ("0xa9fea9fe", "169.254.169.254"),
            ("[::ffff:7f00:1]", "::ffff:127.0.0.1"),
            ("[0:0::1]", "::1"),
        ] {
            let url = Url::parse(&format!("https://{host}/x")).unwrap();
            assert_eq!(literal(&url), Some(address.parse().unwrap()), "{host}");
        }
        for name in ["localhost", "LocalHost.", "a.b.localhost"] {
            assert!(is_localhost(name), "{name}");
        }
        assert!(!is_localhost("localhost.example") && !is_localhost("notlocalhost"));
        assert!(literal(&Url::parse("https://127.0.0.1.example/").unwrap()).is_none());
    }

    #[test]
    fn a_host_leads_to_where_it_is_itself_and_no_nearer() {
        let home = |base: &str| Home::of(&Url::parse(base).unwrap());
        let link = |text: &str| near(text).unwrap();
        let here = home("http://127.0.0.5:5000/v2");
        assert!(here.permits(Near::Loopback) && !here.permits(link("169.254.1.1")));
        let neighbour = home("http://169.254.1.1/v2");
        assert!(
            neighbour.permits(link("169.254.1.1")) && neighbour.permits(link("::ffff:169.254.1.1"))
        );
        assert!(!neighbour.permits(link("169.254.169.254")) && !neighbour.permits(Near::Loopback));
        assert!(home("http://localhost/v2").permits(Near::Loopback));
        // Of another the first answer tells, and no later one.
        let far = home("https://registry.example/v2");
        assert!(far.permits(Near::Loopback));
        far.arrived(None);
        far.arrived(Some(Near::Loopback));
        assert!(!far.permits(Near::Loopback));
    }

    /// `1.2.3.4_5.6.7.8` means both.
    fn told(name: String) -> Found {
        let addresses = name
            .split('_')
            .map(|text| SocketAddr::new(text.parse().unwrap(), 0));
        Box::pin(std::future::ready(Ok(addresses.collect())))
    }

    #[tokio::test]
    async fn a_name_is_judged_by_what_it_means_when_it_is_connected_to() {
        let home = Arc::new(Home::default());
        let guard = Guard {
            home: home.clone(),
            look_up: told,
        };
        let resolve = async |name: &str| {
            let found = guard.resolve(name.parse().unwrap()).await;
            found.map(|all| {
                all.map(|address| address.ip().to_string())
                    .collect::<Vec<_>>()
                    .join(" ")
            })
        };
        assert_eq!(resolve("127.0.0.1").await.unwrap(), "127.0.0.1");
        home.arrived(None);
        assert_eq!(resolve("10.0.0.1").await.unwrap(), "10.0.0.1");
        // What is near among others is left out; alone it is an error with both.
        assert_eq!(
            resolve("10.0.0.1_127.0.0.1_169.254.1.1").await.unwrap(),
            "10.0.0.1"
        );
        let error = resolve("127.0.0.1_0.0.0.0").await.unwrap_err();
        let error = error.downcast_ref::<TooNear>().unwrap();
        assert_eq!(
            (error.near, error.address.to_string().as_str()),
            (Near::Loopback, "0.0.0.0")
        );
    }
}

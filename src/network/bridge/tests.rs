//! The built-in network for real: a "host" in a network namespace of its own, an "outside" behind it, pods.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::base::error::{HasKind as _, Kind, chain};
use crate::base::id::{Id, PodId};
use crate::base::pod::{PortMapping, Protocol};
use crate::network::bridge::forwarding;
use crate::network::bridge::links::{
    Link, Links, PodEnd, configure_pod, host_interface, loopback_up,
};
use crate::network::bridge::nftables::Table;
use crate::network::{LivePod, Network, NetworkConfig, NetworkError};
use crate::sys::ns::{in_netns, new_netns};

/// A connection that cannot be takes this long to be given up.
const REFUSED_WITHIN: Duration = Duration::from_millis(400);
/// One that can be takes at most this long on a loaded machine.
const CONNECTED_WITHIN: Duration = Duration::from_secs(10);

mod lifetime;
mod ports;

const BEFORE: [(&str, &str); 3] = [
    ("ipv4/ip_forward", "0"),
    ("ipv6/conf/all/forwarding", "0"),
    ("ipv6/conf/wan/accept_ra", "1"),
];

struct World {
    host: OwnedFd,
    outside: OwnedFd,
    directory: tempfile::TempDir,
}

struct Pod {
    id: PodId,
    netns: OwnedFd,
    ips: Vec<IpAddr>,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pod_id(n: u8) -> PodId {
    PodId(Id::from_bytes([n; 32]))
}

fn port(protocol: Protocol, host_port: u16, host_ip: &str, container_port: u16) -> PortMapping {
    PortMapping {
        protocol,
        container_port,
        host_port,
        host_ip: host_ip.parse().ok(),
    }
}

impl World {
    /// host: 192.0.2.1, 2001:db8::1 on `wan`; outside: 192.0.2.2, 2001:db8::2, knows no pod network.
    fn new() -> Self {
        let (host, outside) = (new_netns().unwrap(), new_netns().unwrap());
        for netns in [&host, &outside] {
            let up = || loopback_up().map_err(|refused| refused.error);
            in_netns(netns.as_fd(), up).unwrap();
        }
        in_netns(host.as_fd(), || {
            let mut links = Links::open().unwrap();
            links
                .make_bridge("wan", [2, 0, 0, 0, 0, 8], "the host's way out")
                .unwrap();
            let wan = links.find("wan").unwrap().unwrap().index;
            links
                .make_pair("wan0", wan, 1400, [2, 0, 0, 0, 0, 9], outside.as_fd())
                .unwrap();
            links.add_address(wan, ip("192.0.2.1"), 24).unwrap();
            links.add_address(wan, ip("2001:db8::1"), 64).unwrap();
            links.set_up(wan).unwrap();
            // New namespaces have what the machine's own has.
            for (name, value) in BEFORE {
                forwarding::write(name, value).unwrap();
            }
            Ok(())
        })
        .unwrap();
        let end = PodEnd {
            addresses: vec![(ip("192.0.2.2"), 24), (ip("2001:db8::2"), 64)],
            gateways: vec![],
        };
        configure_pod(outside.as_fd(), &end).unwrap();
        Self {
            host,
            outside,
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn config(&self) -> NetworkConfig {
        let root = self.directory.path();
        NetworkConfig {
            bridge: "testbr".into(),
            ipv4_pool: "10.7.0.0/24".parse().ok(),
            ipv6_pool: "fd07::/64".parse().ok(),
            state: root.join("state"),
            shared: root.join("shared"),
            cni_config_dir: root.join("cni"),
            remove_when_unused: false,
        }
    }

    fn open_with(&self, config: NetworkConfig) -> Network {
        std::fs::create_dir_all(&config.state).unwrap();
        in_netns(self.host.as_fd(), || Ok(Network::open(config)))
            .unwrap()
            .unwrap()
    }

    fn open(&self) -> Network {
        self.open_with(self.config())
    }

    fn links(&self) -> Vec<Link> {
        in_netns(self.host.as_fd(), || Ok(Links::open()?.list().unwrap())).unwrap()
    }

    fn has_link(&self, name: &str) -> bool {
        self.links().iter().any(|l| l.name == name)
    }

    fn has_table(&self) -> bool {
        in_netns(self.host.as_fd(), || {
            Ok(Table::new("testbr").exists().unwrap())
        })
        .unwrap()
    }

    /// Nothing of ours is left on the host or on disk.
    fn assert_empty(&self) {
        let names: Vec<_> = self.links().into_iter().map(|l| l.name).collect();
        let ours: Vec<_> = names
            .iter()
            .filter(|n| n.starts_with("veth") || *n == "testbr")
            .collect();
        assert!(ours.is_empty(), "{ours:?}");
        assert!(!self.has_table());
        let leases = self.directory.path().join("state/network/leases");
        assert_eq!(std::fs::read_dir(leases).unwrap().count(), 0);
        assert!(!self.directory.path().join("shared").exists());
        for (name, value) in BEFORE {
            assert_eq!(self.sysctl(name), value, "{name}");
        }
    }

    fn sysctl(&self, name: &str) -> String {
        let path = Path::new("/proc/sys/net").join(name);
        let text = in_netns(self.host.as_fd(), || std::fs::read_to_string(path)).unwrap();
        text.trim_end().to_owned()
    }
}

async fn run(network: &Network, n: u8, ports: &[PortMapping]) -> Pod {
    try_run(network, n, ports).await.unwrap()
}

async fn try_run(network: &Network, n: u8, ports: &[PortMapping]) -> Result<Pod, NetworkError> {
    let netns = network.netns().await?;
    let id = pod_id(n);
    let attachment = network.attach(id, netns.as_fd(), ports).await?;
    Ok(Pod {
        id,
        netns,
        ips: attachment.ips,
    })
}

fn listen(netns: &OwnedFd, port: u16) -> TcpListener {
    in_netns(netns.as_fd(), || TcpListener::bind(("::", port))).unwrap()
}

/// Connects from `from`; what the listener sees as the peer.
fn connect(from: &OwnedFd, target: SocketAddr, listener: &TcpListener) -> IpAddr {
    let mut client = in_netns(from.as_fd(), || {
        TcpStream::connect_timeout(&target, CONNECTED_WITHIN)
    })
    .unwrap_or_else(|e| panic!("{target}: {e}"));
    // Somebody else's listener may have taken it: do not wait for ever.
    listener.set_nonblocking(true).unwrap();
    let begun = Instant::now();
    let (mut server, peer) = loop {
        match listener.accept() {
            Ok(pair) => break pair,
            Err(_none) if begun.elapsed() < CONNECTED_WITHIN => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{target}: connected, but not to this listener: {error}"),
        }
    };
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(Some(CONNECTED_WITHIN)).unwrap();
    client.write_all(b"ping").unwrap();
    let mut four = [0; 4];
    server.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"ping");
    peer.ip().to_canonical()
}

fn refused(from: &OwnedFd, target: SocketAddr) -> bool {
    in_netns(from.as_fd(), || {
        TcpStream::connect_timeout(&target, REFUSED_WITHIN)
    })
    .is_err()
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < CONNECTED_WITHIN, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[tokio::test]
async fn pods_reach_each_other_the_host_and_the_outside() {
    let world = World::new();
    let network = world.open();
    assert!(
        !world.has_link("testbr"),
        "nothing is made before the first pod"
    );
    network.readiness().unwrap();
    let (one, two) = (run(&network, 1, &[]).await, run(&network, 2, &[]).await);
    assert_eq!(one.ips, [ip("10.7.0.2"), ip("fd07::2")]);
    let (in_two, on_host, outside) = (
        listen(&two.netns, 80),
        listen(&world.host, 81),
        listen(&world.outside, 82),
    );
    for family in [0, 1] {
        let gateway = [ip("10.7.0.1"), ip("fd07::1")][family];
        let far = [ip("192.0.2.2"), ip("2001:db8::2")][family];
        let near = [ip("192.0.2.1"), ip("2001:db8::1")][family];
        assert_eq!(
            connect(&one.netns, at(two.ips[family], 80), &in_two),
            one.ips[family]
        );
        assert_eq!(
            connect(&world.host, at(two.ips[family], 80), &in_two),
            gateway
        );
        assert_eq!(
            connect(&one.netns, at(gateway, 81), &on_host),
            one.ips[family]
        );
        assert_eq!(
            connect(&one.netns, at(far, 82), &outside),
            near,
            "masqueraded"
        );
    }
    let own = in_netns(one.netns.as_fd(), || TcpListener::bind("127.0.0.1:83")).unwrap();
    connect(&one.netns, "127.0.0.1:83".parse().unwrap(), &own);

    network.detach(one.id).await.unwrap();
    network.detach(one.id).await.unwrap();
    assert!(refused(&one.netns, at(two.ips[0], 80)), "cut off at once");
    network.detach(two.id).await.unwrap();
    network.detach(pod_id(77)).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
    network.shutdown_if_unused().await.unwrap();
}

#[tokio::test]
async fn a_port_that_is_cut_stays_cut() {
    let world = World::new();
    let network = world.open();
    let (one, two) = (run(&network, 1, &[]).await, run(&network, 2, &[]).await);
    let (in_one, in_two) = (listen(&one.netns, 80), listen(&two.netns, 80));
    connect(&one.netns, at(two.ips[0], 80), &in_two);
    connect(&two.netns, at(one.ips[0], 80), &in_one);
    in_netns(world.host.as_fd(), || {
        let mut links = Links::open()?;
        let name = host_interface(one.id);
        links.cut(&name).unwrap();
        links.set_forwarding(&name).unwrap();
        Ok(())
    })
    .unwrap();
    assert!(refused(&one.netns, at(two.ips[0], 80)), "out of it");
    assert!(refused(&two.netns, at(one.ips[0], 80)), "into it");
    for pod in [one, two] {
        network.detach(pod.id).await.unwrap();
    }
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

/// CVE-2025-67499: a host port is one of this host only; and the hosts's 127.0.0.1 is closed to pods.
#[tokio::test]
async fn a_pool_that_the_host_uses() {
    let world = World::new();
    let mut config = world.config();
    config.ipv4_pool = "192.0.2.0/28".parse().ok();
    let network = world.open_with(config);
    let error = try_run(&network, 1, &[]).await.err().unwrap();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    let text = chain(&error);
    assert!(
        text.contains("192.0.2.0/24") && text.contains("wan") && text.contains("ipv4_pool"),
        "{text}"
    );
    assert_eq!(
        network.readiness().unwrap_err().reason,
        "PodNetworkOverlaps"
    );
    let error = network
        .set_pod_cidr("10.8.0.0/24,2001:db8::/80")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    let error = network.set_pod_cidr("10.8.0.0").await.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    network.set_pod_cidr("10.8.0.0/24").await.unwrap();
    network.readiness().unwrap();
    let pod = run(&network, 1, &[]).await;
    assert_eq!(pod.ips, [ip("10.8.0.2")]);
    network.detach(pod.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    assert!(!world.has_table());
}

#[tokio::test]
async fn what_status_tells() {
    let world = World::new();
    let cni = world.directory.path().join("cni");
    std::fs::create_dir(&cni).unwrap();
    std::fs::File::create(cni.join("10-x.conflist")).unwrap();
    let network = world.open();
    let _answered = network.leased(pod_id(1)).await.unwrap();
    let info = network.info();
    assert_eq!(info["provider"], "bridge");
    assert_eq!(info["pools"][1], "fd07::/64");
    assert!(
        info["unusedCniConfig"]
            .as_str()
            .unwrap()
            .ends_with("10-x.conflist")
    );
    assert_eq!(info["setUp"], false);
    let notices = network.notices();
    assert_eq!(notices.len(), 1);
    assert!(notices[0].contains("10-x.conflist"), "{notices:?}");
}

#[tokio::test]
async fn a_name_that_is_taken() {
    let world = World::new();
    let mut config = world.config();
    config.bridge = "wan0".into();
    let network = world.open_with(config);
    let error = try_run(&network, 1, &[]).await.err().unwrap();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(chain(&error).contains("wan0"), "{}", chain(&error));
    assert!(network.readiness().is_err());
    assert!(world.has_link("wan0"), "not ours to touch");
}

#[tokio::test]
async fn a_bridge_of_somebody_else() {
    let world = World::new();
    in_netns(world.host.as_fd(), || {
        let mut links = Links::open()?;
        links
            .make_bridge("testbr", [2, 0, 0, 0, 0, 5], "mine")
            .unwrap();
        Ok(())
    })
    .unwrap();
    let network = world.open();
    let pod = run(&network, 1, &[]).await;
    let far = listen(&world.outside, 82);
    connect(&pod.netns, at(ip("192.0.2.2"), 82), &far);
    network.detach(pod.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    assert!(world.has_link("testbr"), "used, not deleted");
    assert!(!world.has_table());
}

#[tokio::test]
async fn a_host_without_ipv6() {
    let world = World::new();
    in_netns(world.host.as_fd(), || {
        for link in ["all", "default"] {
            forwarding::write(&format!("ipv6/conf/{link}/disable_ipv6"), "1").unwrap();
        }
        Ok(())
    })
    .unwrap();
    let mut config = world.config();
    let network = world.open();
    let ports = [port(Protocol::Tcp, 8080, "", 80)];
    let pod = run(&network, 1, &ports).await;
    assert_eq!(pod.ips, [ip("10.7.0.2")]);
    let web = listen(&pod.netns, 80);
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &web);
    let v6 = [port(Protocol::Tcp, 8081, "2001:db8::1", 80)];
    let error = try_run(&network, 2, &v6).await.err().unwrap();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    network.detach(pod.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    config.ipv4_pool = None;
    let network = world.open_with(config);
    let error = try_run(&network, 1, &[]).await.err().unwrap();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(
        chain(&error).contains("IPv6 is switched off"),
        "{}",
        chain(&error)
    );
}

/// What another table drops no rule of ours can accept: it is said.
#[tokio::test]
async fn a_firewall_that_drops() {
    use crate::sys::netlink::{Attributed as _, CREATE, Family, Message, Socket};
    let world = World::new();
    in_netns(world.host.as_fd(), || {
        let message =
            |kind: u16| Message::new(0x0a00 | kind, CREATE, &[2, 0, 0, 0]).text(1, "filter");
        let chain = message(3)
            .text(3, "FORWARD")
            .nest(4, |hook| hook.be32(1, 2).be32(2, 0))
            .be32(5, 0)
            .text(7, "filter");
        let mut socket = Socket::open(Family::Netfilter)?;
        socket.transaction(10, &[message(0), chain]).unwrap();
        Ok(())
    })
    .unwrap();
    let network = world.open();
    let pod = run(&network, 1, &[]).await;
    let notices = network.notices();
    assert!(
        notices
            .iter()
            .any(|n| n.contains("ip filter FORWARD") && n.contains("testbr")),
        "{notices:?}"
    );
    network.detach(pod.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
}

#[tokio::test]
async fn many_at_once() {
    let world = World::new();
    let network = world.open();
    let mut coming = tokio::task::JoinSet::new();
    for n in 0..20_u8 {
        let network = network.clone();
        coming.spawn(async move {
            let pod = run(
                &network,
                n,
                &[port(Protocol::Tcp, 9000 + u16::from(n), "", 80)],
            )
            .await;
            network.detach(pod.id).await.unwrap();
            pod.ips[0]
        });
    }
    let ips: std::collections::BTreeSet<_> = coming.join_all().await.into_iter().collect();
    assert_eq!(ips.len(), 20);
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

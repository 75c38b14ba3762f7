//! Host ports: who reaches them, who does not, who has them.

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::BindToDevice;

use super::*;

#[tokio::test]
async fn from_everywhere() {
    host_ports_from_everywhere(&World::new()).await;
}

/// kube-proxy's setting: what is bridged passes the firewall too.
#[tokio::test]
async fn from_everywhere_with_br_netfilter() {
    let world = World::new();
    in_netns(world.host.as_fd(), || {
        for name in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"] {
            let path = format!("/proc/sys/net/bridge/{name}");
            let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
            file.write_all(b"1")?;
        }
        Ok(())
    })
    .unwrap();
    host_ports_from_everywhere(&world).await;
}

async fn host_ports_from_everywhere(world: &World) {
    let network = world.open();
    let ports = [
        port(Protocol::Tcp, 8080, "", 80),
        port(Protocol::Tcp, 8081, "127.0.0.1", 80),
        port(Protocol::Tcp, 8082, "192.0.2.1", 80),
        port(Protocol::Tcp, 8083, "2001:db8::1", 80),
        port(Protocol::Tcp, 8084, "0.0.0.0", 80),
    ];
    let server = run(&network, 1, &ports).await;
    let other = run(&network, 2, &[]).await;
    let web = listen(&server.netns, 80);
    let (v4, v6) = (ip("192.0.2.1"), ip("2001:db8::1"));

    // From the outside the source stays; the host's own addresses too.
    assert_eq!(connect(&world.outside, at(v4, 8080), &web), ip("192.0.2.2"));
    assert_eq!(
        connect(&world.outside, at(v6, 8080), &web),
        ip("2001:db8::2")
    );
    assert_eq!(connect(&world.host, at(v4, 8080), &web), v4);
    assert_eq!(connect(&world.host, at(v6, 8080), &web), v6);
    assert_eq!(
        connect(&world.host, at(ip("127.0.0.1"), 8080), &web),
        ip("10.7.0.1")
    );
    assert_eq!(
        connect(&world.host, at(ip("127.0.0.1"), 8081), &web),
        ip("10.7.0.1")
    );
    // From another pod and from the pod itself (hairpin).
    for from in [&other.netns, &server.netns] {
        assert_eq!(connect(from, at(v4, 8080), &web), ip("10.7.0.1"));
        assert_eq!(connect(from, at(v6, 8080), &web), ip("fd07::1"));
        assert_eq!(
            connect(from, at(ip("10.7.0.1"), 8080), &web),
            ip("10.7.0.1")
        );
    }
    connect(&world.outside, at(v4, 8082), &web);
    connect(&world.outside, at(v6, 8083), &web);
    connect(&world.outside, at(v4, 8084), &web);

    // Only where they were asked for.
    for target in [
        at(v4, 8081),
        at(v6, 8082),
        at(v4, 8083),
        at(v6, 8084),
        at(v4, 80),
    ] {
        assert!(refused(&world.outside, target), "{target}");
    }
    assert!(
        refused(&world.host, at(ip("::1"), 8080)),
        "[::1] cannot be redirected"
    );
    assert!(refused(&world.host, at(ip("127.0.0.1"), 8082)));

    network.detach(server.id).await.unwrap();
    assert!(refused(&world.host, at(ip("127.0.0.1"), 8080)));
    let next = run(&network, 3, &ports).await;
    let web = listen(&next.netns, 80);
    connect(&world.host, at(ip("127.0.0.1"), 8080), &web);
    connect(&world.outside, at(v6, 8080), &web);
    for pod in [next.id, other.id] {
        network.detach(pod).await.unwrap();
    }
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn only_what_is_meant_for_this_host() {
    let world = World::new();
    let network = world.open();
    let server = run(&network, 1, &[port(Protocol::Tcp, 8080, "", 80)]).await;
    let client = run(&network, 2, &[]).await;
    let _web = listen(&server.netns, 80);
    let far = listen(&world.outside, 8080);
    assert_eq!(
        connect(&client.netns, at(ip("192.0.2.2"), 8080), &far),
        ip("192.0.2.1"),
        "not stolen on its way through"
    );

    // A pod that sends to 127.0.0.1 by its gateway, where route_localnet would let it in.
    assert_eq!(world.sysctl("ipv4/conf/testbr/route_localnet"), "1");
    let secret = in_netns(world.host.as_fd(), || UdpSocket::bind("127.0.0.1:9000")).unwrap();
    secret.set_read_timeout(Some(REFUSED_WITHIN)).unwrap();
    let intruder = in_netns(client.netns.as_fd(), || UdpSocket::bind("0.0.0.0:0")).unwrap();
    let device = std::ffi::OsString::from("eth0");
    setsockopt(&intruder, BindToDevice, &device).unwrap();
    intruder.send_to(b"let me in", "127.0.0.1:9000").unwrap();
    assert!(secret.recv(&mut [0; 16]).is_err(), "guarded");
    in_netns(world.host.as_fd(), || {
        Table::new("testbr").delete().unwrap();
        Ok(())
    })
    .unwrap();
    wait_until(
        "without the guard it gets in: the test tests something",
        || {
            intruder.send_to(b"let me in", "127.0.0.1:9000").unwrap();
            secret.recv(&mut [0; 16]).is_ok()
        },
    );
    network.detach(server.id).await.unwrap();
    network.detach(client.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn udp_follows_its_port() {
    let world = World::new();
    let network = world.open();
    let ports = [port(Protocol::Udp, 5353, "", 53)];
    let client = in_netns(world.outside.as_fd(), || UdpSocket::bind("0.0.0.0:4000")).unwrap();
    client.connect("192.0.2.1:5353").unwrap();
    // Before any pod: the host remembers a flow that nobody answers.
    let _refused = client.send(b"early");
    for n in 1..=2 {
        let pod = run(&network, n, &ports).await;
        let server = in_netns(pod.netns.as_fd(), || UdpSocket::bind("0.0.0.0:53")).unwrap();
        server
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        let begun = Instant::now();
        let mut buffer = [0; 16];
        // The flush comes shortly after the attachment: the same sender gets through soon.
        let (length, from) = loop {
            let _refused = client.send(b"query");
            match server.recv_from(&mut buffer) {
                Ok(got) => break got,
                Err(_none) => assert!(begun.elapsed() < CONNECTED_WITHIN, "pod {n} hears nothing"),
            }
        };
        assert_eq!(
            (&buffer[..length], from.ip()),
            (&b"query"[..], ip("192.0.2.2"))
        );
        network.detach(pod.id).await.unwrap();
    }
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn who_has_the_port() {
    let world = World::new();
    let network = world.open();
    let ports = [port(Protocol::Tcp, 8080, "", 80)];
    let one = run(&network, 1, &ports).await;
    let error = try_run(&network, 2, &ports).await.err().unwrap();
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert!(
        chain(&error).contains(&one.id.to_string()),
        "{}",
        chain(&error)
    );
    for (bad, kind) in [
        (
            vec![port(Protocol::Tcp, 81, "::1", 80)],
            Kind::InvalidArgument,
        ),
        (
            vec![
                port(Protocol::Tcp, 82, "", 80),
                port(Protocol::Tcp, 82, "", 81),
            ],
            Kind::InvalidArgument,
        ),
    ] {
        let error = try_run(&network, 2, &bad).await.err().unwrap();
        assert_eq!(error.kind(), kind, "{}", chain(&error));
    }
    assert_eq!(
        network.leased(pod_id(2)).await.unwrap(),
        Vec::<IpAddr>::new()
    );
    network.detach(one.id).await.unwrap();
    let two = run(&network, 2, &ports).await;
    network.detach(two.id).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

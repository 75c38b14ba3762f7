//! What changes around running pods: restarts, new pools, other daemons, vandals.

use super::*;

#[tokio::test]
async fn a_new_pool_under_running_pods() {
    let world = World::new();
    let network = world.open();
    let old = run(&network, 1, &[port(Protocol::Tcp, 8080, "", 80)]).await;
    network.set_pod_cidr("").await.unwrap();
    network.set_pod_cidr("10.9.0.0/24,fd09::/64").await.unwrap();
    let new = run(&network, 2, &[]).await;
    assert_eq!(new.ips, [ip("10.9.0.2"), ip("fd09::2")]);
    let (in_old, in_new, far) = (
        listen(&old.netns, 80),
        listen(&new.netns, 80),
        listen(&world.outside, 82),
    );
    for family in [0, 1] {
        connect(&old.netns, at(new.ips[family], 80), &in_new);
        connect(&new.netns, at(old.ips[family], 80), &in_old);
    }
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &in_old);
    connect(&old.netns, "192.0.2.2:82".parse().unwrap(), &far);
    connect(&new.netns, "192.0.2.2:82".parse().unwrap(), &far);
    drop(network);
    let network = world.open();
    let third = run(&network, 3, &[]).await;
    assert!(
        third.ips[0].to_string().starts_with("10.9.0."),
        "survives the daemon"
    );
    for pod in [old, new, third] {
        network.detach(pod.id).await.unwrap();
    }
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn leases_outlive_the_daemon() {
    let world = World::new();
    let network = world.open();
    let stays = run(&network, 1, &[port(Protocol::Tcp, 8080, "", 80)]).await;
    let goes = run(&network, 2, &[port(Protocol::Tcp, 8081, "", 80)]).await;
    let broken = run(&network, 3, &[port(Protocol::Tcp, 8082, "", 80)]).await;
    drop(network);
    // While nobody watches: a link is deleted, the rules are flushed, a stray link appears.
    in_netns(world.host.as_fd(), || {
        let mut links = Links::open()?;
        links.delete(&host_interface(broken.id)).unwrap();
        Table::new("testbr").delete().unwrap();
        let bridge = links.find("testbr").unwrap().unwrap().index;
        let stray = new_netns()?;
        links
            .make_pair("vethstray", bridge, 1400, [2, 0, 0, 0, 0, 1], stray.as_fd())
            .unwrap();
        // Kept open by the sweep's own time.
        std::mem::drop(stray);
        Ok(())
    })
    .unwrap();
    let network = world.open();
    let live = |pods: &[&Pod]| {
        pods.iter()
            .map(|pod| LivePod {
                id: pod.id,
                netns: pod.netns.try_clone().ok(),
            })
            .collect::<Vec<_>>()
    };
    network.restore(live(&[&stays, &broken])).await.unwrap();
    assert_eq!(network.leased(stays.id).await.unwrap(), stays.ips);
    let (web, again) = (listen(&stays.netns, 80), listen(&broken.netns, 80));
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &web);
    connect(&world.outside, "192.0.2.1:8082".parse().unwrap(), &again);
    connect(&stays.netns, at(broken.ips[1], 80), &again);
    assert!(refused(&world.outside, "192.0.2.1:8081".parse().unwrap()));
    // The port of the one that is gone is free, the one of the other is not.
    let next = run(&network, 4, &[port(Protocol::Tcp, 8081, "", 80)]).await;
    assert!(!stays.ips.contains(&next.ips[0]) && !broken.ips.contains(&next.ips[0]));
    assert!(
        try_run(&network, 5, &[port(Protocol::Tcp, 8080, "", 80)])
            .await
            .is_err()
    );
    wait_until("links gone", || {
        !world.has_link("vethstray") && !world.has_link(&host_interface(goes.id))
    });
    drop(network);

    // Nobody is left: everything goes.
    let network = world.open();
    network.restore(vec![]).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn taken_away_under_a_running_daemon() {
    let world = World::new();
    let network = world.open();
    let first = run(&network, 1, &[]).await;
    in_netns(world.host.as_fd(), || {
        Links::open()?.delete("testbr").unwrap();
        Ok(())
    })
    .unwrap();
    let pod = run(&network, 2, &[]).await;
    in_netns(world.host.as_fd(), || {
        Table::new("testbr").delete().unwrap();
        Ok(())
    })
    .unwrap();
    let other = run(&network, 3, &[port(Protocol::Tcp, 8080, "", 80)]).await;
    let web = listen(&other.netns, 80);
    connect(&pod.netns, at(other.ips[0], 80), &web);
    connect(&first.netns, at(other.ips[1], 80), &web);
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &web);
    for n in 1..=3 {
        network.detach(pod_id(n)).await.unwrap();
    }
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn an_address_is_used_again_only_when_its_link_is_gone() {
    let world = World::new();
    let mut config = world.config();
    config.ipv4_pool = "10.7.0.0/30".parse().ok();
    config.ipv6_pool = None;
    config.remove_when_unused = true;
    let network = world.open_with(config);
    for round in 0..6_u8 {
        // The only address is held back by a link that is just being deleted: waited for.
        let pod = run(&network, round, &[]).await;
        assert_eq!(pod.ips, [ip("10.7.0.2")]);
        let links = world.links();
        let veths = links.iter().filter(|l| l.name.starts_with("veth")).count();
        assert_eq!(veths, 1, "{links:?}");
        let error = try_run(&network, 99, &[]).await.err().unwrap();
        assert_eq!(error.kind(), Kind::ResourceExhausted, "{}", chain(&error));
        network.detach(pod.id).await.unwrap();
    }
    wait_until("removed when unused", || !world.has_link("testbr"));
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn a_failed_attach_leaves_nothing() {
    let world = World::new();
    let network = world.open();
    let not_a_netns = std::fs::File::open("/dev/null").unwrap();
    let error = network
        .attach(
            pod_id(1),
            not_a_netns.as_fd(),
            &[port(Protocol::Tcp, 8080, "", 80)],
        )
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::Internal, "{}", chain(&error));
    // The same pod, and the same twice.
    for _ in 0..2 {
        let pod = run(&network, 1, &[port(Protocol::Tcp, 8080, "", 80)]).await;
        let web = listen(&pod.netns, 80);
        connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &web);
    }
    network.detach(pod_id(1)).await.unwrap();
    network.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

#[tokio::test]
async fn side_by_side() {
    let world = World::new();
    let (mut left, mut right) = (world.config(), world.config());
    left.state = world.directory.path().join("state");
    right.state = world.directory.path().join("other");
    right.bridge = "otherbr".into();
    right.ipv4_pool = "10.8.0.0/24".parse().ok();
    right.ipv6_pool = None;
    let (left, right) = (world.open_with(left), world.open_with(right));
    let a = run(&left, 1, &[port(Protocol::Tcp, 8080, "", 80)]).await;
    let b = run(&right, 2, &[port(Protocol::Tcp, 8081, "", 80)]).await;
    let (in_a, in_b) = (listen(&a.netns, 80), listen(&b.netns, 80));
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &in_a);
    connect(&world.outside, "192.0.2.1:8081".parse().unwrap(), &in_b);
    right.detach(b.id).await.unwrap();
    right.shutdown_if_unused().await.unwrap();
    connect(&world.outside, "192.0.2.1:8080".parse().unwrap(), &in_a);
    left.detach(a.id).await.unwrap();
    left.shutdown_if_unused().await.unwrap();
    world.assert_empty();
}

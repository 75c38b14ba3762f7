//! Lives of pods and containers without a crash.

use futures_util::FutureExt as _;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::too_many_lines, reason = "one life from beginning to end")]
async fn a_pod_and_its_container_from_run_to_remove() {
    let node = Node::new();
    let engine = node.start().await;
    let mut events = engine.events();
    let pod = run_pod(&node, &engine, "one").await;
    let (moment, info) = engine.pod_sandbox_status(&pod, true).await.unwrap();
    let shown = moment.pod;
    assert_eq!(shown.state, PodState::Ready);
    assert_eq!(shown.ips.len(), 1);
    assert!(info["info"].contains("/ns/net"), "{info:?}");
    let script = "trap 'echo asked; exit 7' TERM; echo begun; while :; do sleep 0.1; done";
    let id = create(&engine, &pod, "main", script).await;
    let created = status(&engine, &id).await;
    assert_eq!(created.state, ContainerState::Created);
    assert_eq!((created.started_at.0, created.finished_at.0), (0, 0));
    assert_eq!(created.image_name, IMAGE);
    assert_eq!(created.user.as_ref().unwrap().uid, 0);
    assert_eq!(log_of(&node, "main"), "");
    engine.start_container(&id).await.unwrap();
    let again = engine.start_container(&id).await.unwrap_err();
    assert_eq!(again.kind(), Kind::FailedPrecondition);
    until("its first line", || log_of(&node, "main").contains("begun")).await;
    let command = |script: &str| ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let output = engine
        .exec_sync(&id, command("echo out; echo err >&2; exit 5"), 10)
        .await
        .unwrap();
    assert_eq!(
        (&output.stdout[..], &output.stderr[..], output.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 5)
    );
    let late = engine
        .exec_sync(&id, command("sleep 100"), 1)
        .await
        .unwrap_err();
    assert_eq!(late.kind(), Kind::DeadlineExceeded);
    let limits = Resources {
        memory_limit: 64 << 20,
        oom_score_adj: 432,
        ..Resources::default()
    };
    engine
        .update_container_resources(&id, limits)
        .await
        .unwrap();
    let changed = status(&engine, &id).await.resources.clone();
    assert_eq!(
        (changed.memory_limit, changed.oom_score_adj),
        (64 << 20, 432)
    );
    let pid = engine.inspect(&id).await.unwrap().pid;
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    assert_eq!(score.trim(), "432");
    // This exec's score is its own, not that of the first process.
    let score = command("read score < /proc/self/oom_score_adj; echo $score");
    let output = engine.exec_sync(&id, score, 10).await.unwrap();
    assert_eq!(output.stdout, b"432\n");
    assert!(
        engine
            .container_stats(&id)
            .await
            .unwrap()
            .cgroup
            .memory_usage
            > Some(0)
    );
    let figures = engine.pod_sandbox_stats(&pod).await.unwrap();
    assert_eq!(
        (figures.containers.len(), &*figures.interfaces[0].name),
        (1, "eth0")
    );
    assert_eq!(
        engine.inspect(&id).await.unwrap().labels["io.kubernetes.container.name"],
        "main"
    );
    let sandbox = engine.inspect(&pod).await.unwrap();
    assert_eq!(sandbox.labels["io.cri-containerd.kind"], "sandbox");
    assert!(sandbox.pid > 0 && sandbox.created_at == shown.created_at);
    engine.stop_container(&id, 30).await.unwrap();
    let ended = status(&engine, &id).await;
    assert_eq!(
        (ended.state, ended.exit_code, &*ended.reason),
        (ContainerState::Exited, 7, "Error")
    );
    assert!(ended.created_at <= ended.started_at && ended.started_at <= ended.finished_at);
    assert!(log_of(&node, "main").contains("asked"));
    engine.remove_container(&id).await.unwrap();
    engine.stop_pod_sandbox(&pod).await.unwrap();
    engine.stop_pod_sandbox(&pod).await.unwrap();
    let stopped = engine.pod_sandbox_status(&pod, false).await.unwrap().0.pod;
    assert_eq!((stopped.state, stopped.ips.len()), (PodState::NotReady, 0));
    let late = engine
        .create_container(&pod, container_config("late", ":"))
        .await
        .unwrap_err();
    assert_eq!(late.kind(), Kind::FailedPrecondition);
    engine.remove_pod_sandbox(&pod).await.unwrap();
    assert!(log_of(&node, "main").contains("begun"), "logs are kept");
    let mut seen = vec![];
    let mut last = crate::base::clock::Timestamp(0);
    while let Some(Ok(event)) = events.next().now_or_never() {
        // Even in the event of its deletion: kubelet ignores one without it.
        assert_eq!(event.pod.id.to_string(), pod);
        assert!(event.at > last && event.containers.len() <= 1);
        last = event.at;
        seen.push((event.id, event.kind));
    }
    use EventKind::{Created, Deleted, Started, Stopped};
    for of in [&pod, &id] {
        let kinds: Vec<_> = seen
            .iter()
            .filter(|(who, _)| who == of)
            .map(|(_, kind)| *kind)
            .collect();
        assert_eq!(kinds, [Created, Started, Stopped, Deleted]);
    }
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retries_join_and_find_the_same() {
    let node = Node::new();
    let engine = node.start().await;
    let many = (0..8).map(|_| engine.run_pod_sandbox(pod_config(&node, "same"), String::new()));
    let ids = futures_util::future::try_join_all(many).await.unwrap();
    assert!(ids.iter().all(|id| *id == ids[0]));
    let pod = ids[0].to_string();
    let config = || container_config("same", "sleep 1000");
    let many = (0..8).map(|_| engine.create_container(&pod, config()));
    let ids = futures_util::future::try_join_all(many).await.unwrap();
    assert!(ids.iter().all(|id| *id == ids[0]));
    let id = ids[0].to_string();
    let other = container_config("same", "sleep 2000");
    let taken = engine.create_container(&pod, other).await.unwrap_err();
    assert_eq!(taken.kind(), Kind::AlreadyExists);
    engine.start_container(&id).await.unwrap();
    // A short stop ends the wait of a long one.
    let (long, short) = tokio::join!(
        engine.stop_container(&id, 1000),
        engine.stop_container(&id, 1)
    );
    long.and(short).unwrap();
    assert_eq!(status(&engine, &id).await.exit_code, 137);
    let many = (0..10).map(|_| engine.remove_container(&id));
    futures_util::future::try_join_all(many).await.unwrap();
    let again = create(&engine, &pod, "same", "sleep 1000").await;
    assert_ne!(again, id, "the name is free again");
    let many = (0..4).map(|_| engine.remove_pod_sandbox(&pod));
    futures_util::future::try_join_all(many).await.unwrap();
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ends_are_told_as_they_were() {
    let node = Node::new();
    let engine = node.start().await;
    let pod = run_pod(&node, &engine, "ends").await;
    for (name, script, code, reason) in [
        ("good", "exit 0", 0, "Completed"),
        ("bad", "exit 3", 3, "Error"),
        ("killed", "kill -9 $$", 137, "Error"),
        ("asked", "kill -15 $$", 143, "Error"),
    ] {
        let mut config = container_config(name, script);
        // In a PID namespace of its own the first process is immune to its own signals.
        config.security.namespaces.pid = NamespaceMode::Pod;
        let id = engine
            .create_container(&pod, config)
            .await
            .unwrap()
            .to_string();
        engine.start_container(&id).await.unwrap();
        let ended = exited(&engine, &id).await;
        assert_eq!((ended.exit_code, &*ended.reason), (code, reason), "{name}");
    }
    let mut config = container_config("nothing", "");
    config.command = vec!["/no/such/program".to_owned()];
    let id = engine
        .create_container(&pod, config)
        .await
        .unwrap()
        .to_string();
    let error = engine.start_container(&id).await.unwrap_err();
    assert!(
        chain(&error).contains("/no/such/program"),
        "{}",
        chain(&error)
    );
    let ended = exited(&engine, &id).await;
    assert_eq!((ended.exit_code, &*ended.reason), (128, "StartError"));
    assert!(
        ended.message.contains("/no/such/program"),
        "{}",
        ended.message
    );
    let mut config = container_config("greedy", "x=a; while :; do x=$x$x; done");
    config.resources.memory_limit = 32 << 20;
    let id = engine
        .create_container(&pod, config)
        .await
        .unwrap()
        .to_string();
    engine.start_container(&id).await.unwrap();
    let ended = exited(&engine, &id).await;
    assert_eq!((ended.exit_code, &*ended.reason), (137, "OOMKilled"));
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_there_or_not_right() {
    let node = Node::new();
    let engine = node.start().await;
    let none = "ab";
    engine.stop_pod_sandbox(none).await.unwrap();
    engine.remove_pod_sandbox(none).await.unwrap();
    engine.stop_container(none, 0).await.unwrap();
    engine.remove_container(none).await.unwrap();
    let kind = |error: EngineError| error.kind();
    let not_found = Kind::NotFound;
    assert_eq!(
        engine
            .pod_sandbox_status(none, false)
            .await
            .map_err(kind)
            .err(),
        Some(not_found)
    );
    assert_eq!(
        engine
            .container_status(none, false)
            .await
            .map_err(kind)
            .err(),
        Some(not_found)
    );
    assert_eq!(
        engine.start_container(none).await.map_err(kind).err(),
        Some(not_found)
    );
    let handler = engine
        .run_pod_sandbox(pod_config(&node, "x"), "nope".to_owned())
        .await
        .unwrap_err();
    assert!(chain(&handler).contains("nope"));
    let pod = run_pod(&node, &engine, "wrong").await;
    let mut config = container_config("no-image", ":");
    config.image.image = "berth.test/none:1".to_owned();
    let error = engine
        .create_container(&pod, config)
        .await
        .map_err(kind)
        .unwrap_err();
    assert_eq!(error, not_found);
    for _ in 0..3 {
        let mut config = container_config("no-user", ":");
        config.security.run_as_username = "nobody-knows".to_owned();
        let error = engine.create_container(&pod, config).await.unwrap_err();
        assert!(chain(&error).contains("nobody-knows"), "{}", chain(&error));
    }
    let mut config = container_config("no-cwd", ":");
    config.mounts[0].container_path = String::new();
    let error = engine
        .create_container(&pod, config)
        .await
        .map_err(kind)
        .unwrap_err();
    assert_eq!(error, Kind::InvalidArgument);
    assert!(
        engine
            .list_containers(&ContainerFilter::default())
            .is_empty()
    );
    let id = create(&engine, &pod, "good", "sleep 1000").await;
    engine.stop_container(&id, 10).await.unwrap();
    assert_eq!(status(&engine, &id).await.state, ContainerState::Created);
    let error = engine
        .reopen_container_log(&id)
        .await
        .map_err(kind)
        .unwrap_err();
    assert_eq!(error, Kind::FailedPrecondition);
    let found = engine.list_containers(&ContainerFilter {
        id: id[..12].to_owned(),
        pod_id: pod[..8].to_owned(),
        state: Some(ContainerState::Created),
        labels: BTreeMap::new(),
    });
    assert_eq!(found.len(), 1);
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_of_many_containers_stops_at_once() {
    let node = Node::new();
    let engine = node.start().await;
    let pod = run_pod(&node, &engine, "many").await;
    for number in 0..5 {
        run(
            &engine,
            &pod,
            &format!("c{number}"),
            "trap : TERM; while :; do sleep 1; done",
        )
        .await;
    }
    let late = engine.create_container(&pod, container_config("late", "sleep 1000"));
    let (stopped, late) = tokio::join!(engine.stop_pod_sandbox(&pod), late);
    stopped.unwrap();
    // Whichever came first: nothing runs now.
    if let Ok(id) = late {
        assert_eq!(
            status(&engine, &id.to_string()).await.state,
            ContainerState::Exited
        );
    }
    for container in engine.list_containers(&ContainerFilter::default()) {
        assert_eq!(
            (container.state, container.exit_code),
            (ContainerState::Exited, 137)
        );
    }
    remove_pods(&engine).await;
    node.end(engine).await;
}

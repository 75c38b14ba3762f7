//! Crashes of the daemon and of monitors, and reboots.

use super::*;
use crate::engine::state::PodPhase;
use crate::store::Durability;

/// Kills everything in the node's cgroups, monitors included: the machine goes down.
fn power_off(node: &Node) {
    node.cgroups.clear().unwrap();
}

fn ips_of(engine: &Engine, pod: &str) -> Vec<std::net::IpAddr> {
    engine.core().pod(pod).unwrap().status().ips.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_daemon_loses_nothing() {
    let node = Node::new();
    let engine = node.start().await;
    let pod = run_pod(&node, &engine, "crash").await;
    let waits = create(&engine, &pod, "waits", "exit 9").await;
    let goes_on = run(
        &engine,
        &pod,
        "goes-on",
        "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done",
    )
    .await;
    let gate = node.path("gate");
    let mut config = container_config(
        "ends",
        "while ! [ -e /gate/open ]; do sleep 0.05; done; exit 42",
    );
    fs::create_dir(&gate).unwrap();
    config.mounts.push(Mount {
        container_path: "/gate".to_owned(),
        host_path: gate.display().to_string(),
        ..Mount::default()
    });
    let ends = engine
        .create_container(&pod, config)
        .await
        .unwrap()
        .to_string();
    engine.start_container(&ends).await.unwrap();
    let (before, ips) = (status(&engine, &goes_on).await, ips_of(&engine, &pod));
    let files = engine.core().pod_directory(pod.parse().unwrap());
    node.crash(engine).await;

    fs::create_dir(gate.join("open")).unwrap();
    let record = files.join(format!("{ends}.exit"));
    until("the exit is noted", || record.exists()).await;
    let while_away = fs::metadata(&record).unwrap().modified().unwrap();
    let engine = node.start().await;
    let ended = exited(&engine, &ends).await;
    assert_eq!(
        (ended.state, ended.exit_code, &*ended.reason),
        (ContainerState::Exited, 42, "Error")
    );
    let at = Duration::from_nanos(ended.finished_at.0.try_into().unwrap());
    let noted = while_away.duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(noted.abs_diff(at) < Duration::from_secs(5));
    let after = status(&engine, &goes_on).await;
    assert_eq!(
        (after.state, after.started_at, after.created_at),
        (
            ContainerState::Running,
            before.started_at,
            before.created_at
        )
    );
    assert_eq!(ips_of(&engine, &pod), ips);
    assert_eq!(
        engine.list_pod_sandboxes(&PodFilter::default())[0].state,
        PodState::Ready
    );
    let output = engine
        .exec_sync(&goes_on, vec!["/bin/echo".to_owned(), "x".to_owned()], 10)
        .await
        .unwrap();
    assert_eq!(output.stdout, b"x\n");
    engine.start_container(&waits).await.unwrap();
    assert_eq!(exited(&engine, &waits).await.exit_code, 9);
    // A retry of the call before the crash finds the pod.
    assert_eq!(run_pod(&node, &engine, "crash").await, pod);
    engine.stop_container(&goes_on, 0).await.unwrap();
    let lines: Vec<_> = log_of(&node, "goes-on")
        .lines()
        .map(|line| line.rsplit(' ').next().unwrap().to_owned())
        .collect();
    let numbers: Vec<_> = (1..=lines.len()).map(|n| n.to_string()).collect();
    assert_eq!(lines, numbers, "no line is lost or doubled");
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_reboot_everything_has_ended() {
    let node = Node::new();
    let engine = node.start().await;
    let pod = run_pod(&node, &engine, "reboot").await;
    let id = run(&engine, &pod, "main", "sleep 1000").await;
    node.crash(engine).await;
    power_off(&node);
    fs::remove_dir_all(node.path("state")).unwrap();
    let boot = node.path("root/boot-id");
    crate::store::write_atomic(&boot, b"another\n", 0o600, Durability::Process).unwrap();

    let engine = node.start().await;
    let ended = status(&engine, &id).await;
    assert_eq!(
        (ended.state, ended.exit_code, &*ended.reason),
        (ContainerState::Exited, 255, "Unknown")
    );
    let shown = engine.pod_sandbox_status(&pod, false).await.unwrap().0.pod;
    assert_eq!((shown.state, shown.ips.len()), (PodState::NotReady, 0));
    let next = run_pod(&node, &engine, "next").await;
    run(&engine, &next, "main2", "sleep 1000").await;
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_monitor_is_told_and_cleaned_up() {
    let node = Node::new();
    let engine = node.start().await;
    let pod = run_pod(&node, &engine, "lost").await;
    let id = run(&engine, &pod, "main", "sleep 1000").await;
    let other = run_pod(&node, &engine, "other").await;
    let monitor: MonitorClient = engine.core().pod(&pod).unwrap().monitor().unwrap();
    monitor.kill_monitor().await.unwrap();
    drop(monitor);
    let ended = exited(&engine, &id).await;
    assert_eq!((ended.exit_code, &*ended.reason), (255, "Unknown"));
    let core = engine.core();
    until("the pod is not ready", || {
        !core.pod(&pod).unwrap().is_ready()
    })
    .await;
    assert!(core.pod(&other).unwrap().is_ready());
    let cgroup = core.container(&id).unwrap().cgroup();
    assert!(core.lower.cgroups.processes(&cgroup).is_empty());
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_made_and_half_removed_things_are_finished() {
    let node = Node::new();
    let engine = node.start().await;
    let made = run_pod(&node, &engine, "half-made").await;
    run(&engine, &made, "a", "sleep 1000").await;
    let stopping = run_pod(&node, &engine, "half-stopped").await;
    run(&engine, &stopping, "b", "sleep 1000").await;
    let removing = run_pod(&node, &engine, "half-removed").await;
    engine.stop_pod_sandbox(&removing).await.unwrap();
    for (id, phase) in [
        (&made, PodPhase::Creating),
        (&stopping, PodPhase::Stopping { announced: false }),
        (&removing, PodPhase::Removing),
    ] {
        let pod = engine.core().pod(id).unwrap();
        pod.lock().phase = phase;
        engine.core().record_pod(&pod).await.unwrap();
    }
    node.crash(engine).await;
    let engine = node.start().await;
    let core = engine.core();
    let gone =
        |id: &str| core.pod(id).is_err() && !core.pod_directory(id.parse().unwrap()).exists();
    until("the half made one is undone", || gone(&made)).await;
    until("the half removed one is gone", || gone(&removing)).await;
    until("the half stopped one is stopped", || {
        core.pod(&stopping).unwrap().lock().phase == PodPhase::Stopped
    })
    .await;
    // By name: reading all records is for a start, when nobody else writes or removes any.
    let records = || fs::read_dir(node.path("root/pods")).unwrap().count();
    until("one record", || records() == 1).await;
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[test]
fn a_test_that_fails_leaves_no_monitor_and_no_cgroup() {
    let (tell, told) = std::sync::mpsc::channel();
    let fails = async move {
        let node = Node::new();
        let engine = node.start().await;
        let pod = run_pod(&node, &engine, "fails").await;
        run(&engine, &pod, "main", "sleep 1000").await;
        let monitor = engine.core().pod(&pod).unwrap().monitor().unwrap().pid();
        let there = node.cgroups.directories();
        tell.send((node.cgroup_root.clone(), monitor, there))
            .unwrap();
        // As an assertion does, without its words.
        std::panic::resume_unwind(Box::new("on purpose"));
    };
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        runtime.unwrap().block_on(fails);
    });
    assert!(thread.join().is_err());
    let (root, monitor, there) = told.recv().unwrap();
    assert!(!there.is_empty());
    let left = Scratch::named(&root).directories();
    assert!(left.is_empty(), "{left:?}");
    assert!(!std::path::Path::new(&format!("/proc/{monitor}")).exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_end_leaves_pods_running() {
    let node = Node::new();
    let mut engine = node.start().await;
    let pod = run_pod(&node, &engine, "stays").await;
    let id = run(&engine, &pod, "main", "sleep 1000").await;
    for _ in 0..5 {
        let core = engine.core();
        assert_eq!(core.tasks.shutdown(PATIENCE).await, 0);
        engine.shutdown().await;
        for pod in core.pods.all() {
            pod.lock().monitor = None;
        }
        drop(engine);
        engine = node.start().await;
        assert_eq!(status(&engine, &id).await.state, ContainerState::Running);
    }
    remove_pods(&engine).await;
    node.end(engine).await;
}

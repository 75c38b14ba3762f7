//! Restarts, deaths, signals, fast writers.

use super::*;

#[tokio::test]
async fn a_restart_of_the_daemon_loses_nothing() {
    let mut pod = Pod::new().await;
    let count = 20_000;
    let script =
        format!("i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done; exit 9");
    let ending = pod.run(&script).await;
    let other = Stdio::default();
    let plan = pod.plan(process(&["sleep", "1000"]));
    let running = pod.create_with(&plan, other.clone()).await.unwrap();
    let (started, pid_started) = pod.client.start(running).await.unwrap();
    let created = pod.create_with(&plan, other).await.unwrap();
    // The daemon dies ...
    let (pid, directory) = (pod.client.pid(), pod.directory.path().to_owned());
    let (_closed, no_events) = mpsc::unbounded_channel();
    pod.events = no_events;
    let died = pod.client.shared.socket.get_ref().as_fd();
    rustix::net::shutdown(died, rustix::net::Shutdown::Both).unwrap();
    wait_for(|| record::read(&directory, ending)).await;
    // ... and comes back.
    let (client, state, events) = MonitorClient::connect(&directory, &pod.tasks)
        .await
        .unwrap();
    (pod.client, pod.events) = (client, events);
    assert_eq!((pod.client.pid(), state.pause_pid), (pid, Some(pod.pause)));
    let find = |id| state.containers.iter().find(|c| c.id == id).unwrap();
    let exit = find(ending).exit.clone().unwrap();
    assert_eq!((exit.code, find(ending).pid), (9, None));
    assert_eq!(record::read(&directory, ending), Some(exit));
    assert_eq!(find(running).started_at, started);
    assert_eq!(find(running).pid, Some(pid_started));
    assert!(find(running).exit.is_none());
    assert_eq!(find(created).started_at, Timestamp(0));
    let expected: Vec<_> = (0..count)
        .map(|i| ("stdout F".to_owned(), format!("line {i}")))
        .collect();
    assert!(pod.lines() == expected, "lost or doubled lines");
    assert_eq!(pod.exec(running, "echo hi").await.unwrap().stdout, b"hi\n");
    pod.client.start(created).await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn the_death_of_a_monitor_is_told() {
    let mut pod = Pod::with_cgroup().await;
    let plan = pod.plan(process(&["sleep", "1000"]));
    let created = pod.create_with(&plan, pod.stdio()).await.unwrap();
    let running = pod.run("sleep 1000").await;
    let _both = (created, running);
    let pause = process::pidfd_open(pod.pause).unwrap();
    pod.client.kill_monitor().await.unwrap();
    let lost = timeout(PATIENCE, pod.events.recv()).await.unwrap();
    assert_eq!(lost, Some(MonitorEvent::Lost));
    pod.client.start(running).await.unwrap_err();
    MonitorClient::connect(pod.directory.path(), &pod.tasks)
        .await
        .unwrap_err();
    // The daemon kills by cgroup, and pause by its pidfd.
    let freezer = pod.freezer.clone().unwrap();
    let target = freezer.clone();
    Tasks::blocking(move || crate::runtime::cgroups::kill(&target).unwrap())
        .await
        .unwrap();
    process::send_signal(pause.as_fd(), 9).unwrap();
    wait_for(|| fs::remove_dir(&freezer).ok()).await;
    pod.ended = true;
}

#[tokio::test]
async fn the_rest_of_the_cgroup_ends_with_the_first_process() {
    let mut pod = Pod::with_cgroup().await;
    let mut plan = pod.plan(process(&["sh", "-c", "setsid sleep 1000 & echo started"]));
    plan.namespaces.pid = NamespaceSource::Host;
    let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
    pod.client.start(id).await.unwrap();
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code), (id, 0));
    let freezer = pod.freezer.clone().unwrap();
    assert_eq!(
        fs::read_to_string(freezer.join("cgroup.procs")).unwrap(),
        ""
    );
    assert_eq!(pod.lines(), [("stdout F".to_owned(), "started".to_owned())]);
    pod.end().await;
}

#[tokio::test]
async fn an_oom_kill_is_told() {
    let hierarchy = Path::new("/sys/fs/cgroup/memory");
    if !hierarchy.exists() {
        return; // v2: the emulated node's tests see it
    }
    let mut pod = Pod::with_cgroup().await;
    let freezer = pod.freezer.clone().unwrap();
    let memory = hierarchy.join(freezer.file_name().unwrap());
    fs::create_dir(&memory).unwrap();
    let limit = fs::File::options()
        .write(true)
        .open(memory.join("memory.limit_in_bytes"));
    std::io::Write::write_all(&mut limit.unwrap(), b"16777216").unwrap();
    let mut plan = pod.plan(process(&["sh", "-c", "tail /dev/zero; exit 5"]));
    plan.cgroup = CgroupJoin::V1(vec![freezer.clone(), memory.clone()]);
    let id = ContainerId(unique());
    let new = NewContainer {
        id,
        stdio: pod.stdio(),
        memory_cgroup: memory.clone(),
        kill_cgroup: freezer,
        limit: std::time::Duration::from_secs(110),
    };
    pod.client.container(new, &plan).await.unwrap();
    pod.client.start(id).await.unwrap();
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code, exit.oom_killed), (id, 5, true));
    // It goes with the pod's others of its name.
    pod.end().await;
    assert!(!memory.exists());
}

#[tokio::test]
async fn signals_do_not_end_a_monitor() {
    let pod = Pod::new().await;
    let monitor = pod.client.shared.pidfd.get_ref().as_fd();
    for signal in [1, 2, 13, 15] {
        assert!(process::send_signal(monitor, signal).unwrap());
    }
    let id = pod.run("sleep 1000").await;
    // What the monitor blocks is not blocked in its children.
    let output = pod
        .exec(id, "grep -E '^Sig(Blk|Ign)' /proc/self/status")
        .await
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        // The first 31: those above are the C library's own.
        let mask = u64::from_str_radix(line.split_once('\t').unwrap().1, 16).unwrap();
        assert_eq!(mask & 0x7fff_ffff, 0, "{line}");
    }
    assert_eq!(text.lines().count(), 2);
    pod.end().await;
}

#[tokio::test]
async fn rotation_under_a_fast_writer() {
    let mut pod = Pod::new().await;
    let count = 200_000;
    let id = pod.run(&format!("seq {count}")).await;
    let mut rotated = vec![];
    while !pod.directory.path().join(format!("{id}.exit")).exists() {
        let to = pod
            .directory
            .path()
            .join(format!("rotated.{}", rotated.len()));
        fs::rename(pod.log(), &to).unwrap();
        rotated.push(to);
        if pod.client.reopen_log(id).await.is_err() {
            break;
        }
    }
    pod.exit().await;
    let mut text = String::new();
    for path in rotated.iter().chain([&pod.log()]) {
        text += &fs::read_to_string(path).unwrap_or_default();
    }
    let numbers: Vec<&str> = text.lines().map(|line| &line[40..]).collect();
    assert_eq!(numbers.len(), count);
    let wrong = numbers
        .iter()
        .zip(1..)
        .find(|(text, number)| **text != number.to_string());
    assert_eq!(wrong, None);
    pod.end().await;
}

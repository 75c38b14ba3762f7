//! Measurements, run by name.

use super::*;

/// Prints what monitors and pauses cost. `BERTH_MONITOR=target/release/berth-monitor cargo test --lib -- --ignored --nocapture cost`
#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_twenty_pods() {
    let mut pods = vec![];
    let tasks = Tasks::default();
    let pool = pool(1, &tasks).await;
    for _ in 0..20 {
        let pod = Pod::of(&pool, tasks.clone()).await;
        let id = pod
            .run("i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done; sleep 1000")
            .await;
        wait_for(|| (pod.lines().len() == 1000).then_some(())).await;
        pod.exec(id, "true").await.unwrap();
        pods.push(pod);
    }
    let pss = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let monitors: u64 = pods.iter().map(|pod| pss(pod.client.pid())).sum();
    let pauses: u64 = pods.iter().map(|pod| pss(pod.pause)).sum();
    println!(
        "per pod: monitor {} KiB, pause {} KiB",
        monitors / 20,
        pauses / 20
    );
    drop(pool);
    for pod in pods {
        pod.client.stop().await.unwrap();
    }
}

/// Prints medians of the steps of a pod's life. As above, with `steps`; better with `--release`.
#[tokio::test]
#[ignore = "a measurement"]
async fn steps_of_a_pod() {
    use std::collections::BTreeMap;
    let tasks = Tasks::default();
    let pool = pool(2, &tasks).await;
    let mut times: BTreeMap<&str, Vec<u128>> = BTreeMap::new();
    for _ in 0..50 {
        let mut last = std::time::Instant::now();
        let mut step = |name| {
            times
                .entry(name)
                .or_default()
                .push(last.elapsed().as_micros());
            last = std::time::Instant::now();
        };
        let pod = Pod::of(&pool, tasks.clone()).await;
        step("1 take, adopt, sandbox (and a test's directories)");
        let plan = pod.plan(process(&["sleep", "1000"]));
        let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
        step("2 container");
        pod.client.start(id).await.unwrap();
        step("3 start");
        let plan = exec_plan(&["true"]);
        pod.client.exec_sync(id, &plan, CAP, None).await.unwrap();
        step("4 exec sync");
        pod.client.stop().await.unwrap();
        step("5 stop");
        pod.client.shutdown().await.unwrap();
        step("6 shutdown");
    }
    for (name, mut all) in times {
        all.sort_unstable();
        println!("{name}: {} us", all[all.len() / 2]);
    }
}

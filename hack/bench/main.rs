//! Benchmark of CRI endpoints side by side: each step of a pod's life, memory, idle CPU and pulls.
//!
//! ```text
//! bench --endpoint berth=/run/berth/berth.sock@berth,berth-monitor,pause \
//!       --endpoint containerd=/run/containerd/containerd.sock@containerd,containerd-shim,pause \
//!       --image registry.k8s.io/lab/bench:1 [--rounds 30] [--parallel 10] [--pods 50] [--pull IMAGE]
//! ```
//!
//! Rounds of the endpoints are interleaved, every second one backwards, so that the noise of a shared machine meets all of
//! them alike: compare the columns of one run, never two runs. The last columns are paired: what the first endpoint took of
//! what another took in the same round, the median of that over all rounds (1.050: 5 % longer) and, in brackets, where that
//! median lies with a probability of 95 %. If 1 is in there, the run has not told the two apart: more rounds do.
//!
//! After `@`: the names (`comm`) of the processes that the runtime runs; their PSS and CPU time are counted. Two builds of
//! one runtime have the same names: `%/CGROUP` after them counts the daemon and what is in cgroups below that one.
//! A benchmark, not a test: it asserts nothing.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::cast_precision_loss,
    clippy::panic,
    clippy::map_err_ignore,
    clippy::large_futures,
    reason = "a program for people: it prints, and a failure ends it"
)]

mod figures;
mod pods;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use figures::{Processes, Table, cpu_seconds, pss_kib};
use pods::{Endpoint, Pod};

/// What a table's figures are.
const UNITS: &str = "milliseconds p50 (min..p90), ratios p50 (95 % of it)";

/// What is asked for on the command line.
struct Options {
    endpoints: Vec<(String, String, Processes)>,
    image: String,
    rounds: u32,
    parallel: u32,
    pods: u32,
    pull: Option<String>,
    host_network: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        endpoints: vec![],
        image: String::new(),
        rounds: 30,
        parallel: 10,
        pods: 50,
        pull: None,
        host_network: false,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if name == "--host-network" {
            options.host_network = true;
            continue;
        }
        let value = arguments
            .next()
            .ok_or_else(|| format!("{name} needs a value"))?;
        let number = || {
            value
                .parse()
                .map_err(|_| format!("{name} {value}: not a number"))
        };
        match name.as_str() {
            "--endpoint" => {
                let (name, rest) = value
                    .split_once('=')
                    .ok_or("--endpoint NAME=SOCKET@COMM,...[%/CGROUP]")?;
                let (socket, which) = rest.split_once('@').unwrap_or((rest, ""));
                let (names, cgroup) = match which.split_once('%') {
                    Some((names, cgroup)) => (names, Some(cgroup.to_owned())),
                    None => (which, None),
                };
                let processes = Processes {
                    names: names.split(',').map(str::to_owned).collect(),
                    cgroup,
                    daemon: None,
                };
                options
                    .endpoints
                    .push((name.to_owned(), socket.to_owned(), processes));
            }
            "--image" => options.image = value,
            "--pull" => options.pull = Some(value),
            "--rounds" => options.rounds = number()?,
            "--parallel" => options.parallel = number()?,
            "--pods" => options.pods = number()?,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if options.endpoints.is_empty() || options.image.is_empty() {
        return Err("--endpoint and --image are needed; see the head of hack/bench/main.rs".into());
    }
    Ok(options)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let options = options().unwrap_or_else(|error| {
        eprintln!("bench: {error}");
        std::process::exit(2);
    });
    let mut endpoints = vec![];
    for (name, socket, processes) in &options.endpoints {
        let endpoint = Endpoint::connect(name, socket, processes.clone()).await;
        endpoint.ensure_image(&options.image).await;
        endpoints.push(endpoint);
    }
    serial(&options, &endpoints).await;
    parallel(&options, &endpoints).await;
    density(&options, &endpoints).await;
    if let Some(image) = &options.pull {
        pulls(&options, &endpoints, image).await;
    }
}

/// The endpoints in this round's order.
fn in_turn(endpoints: &[Endpoint], round: u32) -> Vec<&Endpoint> {
    let mut all: Vec<_> = endpoints.iter().collect();
    if !round.is_multiple_of(2) {
        all.reverse();
    }
    all
}

fn names(endpoints: &[Endpoint]) -> Vec<&str> {
    endpoints.iter().map(|one| &*one.name).collect()
}

/// One pod's life at a time.
async fn serial(options: &Options, endpoints: &[Endpoint]) {
    let mut table = Table::default();
    for round in 0..options.rounds {
        for endpoint in in_turn(endpoints, round) {
            let mut pod = Pod::new(endpoint, &options.image, round, options.host_network);
            pod.live(&mut |step, took| table.add(step, &endpoint.name, round, took))
                .await;
        }
    }
    let title = format!("serial, {} rounds: {UNITS}", options.rounds);
    table.print(&title, &names(endpoints));
}

/// Several pods at once.
async fn parallel(options: &Options, endpoints: &[Endpoint]) {
    let mut table = Table::default();
    for round in 0..options.rounds.div_ceil(5) {
        for endpoint in in_turn(endpoints, round) {
            let began = Instant::now();
            let mut tasks = tokio::task::JoinSet::new();
            for one in 0..options.parallel {
                let endpoint = endpoint.clone();
                let image = options.image.clone();
                let host_network = options.host_network;
                let number = 10_000 + round * options.parallel + one;
                tasks.spawn(async move {
                    let mut steps = vec![];
                    let mut pod = Pod::new(&endpoint, &image, number, host_network);
                    pod.up(&mut |step, took| steps.push((step, took))).await;
                    pod.down(&mut |step, took| steps.push((step, took))).await;
                    steps
                });
            }
            while let Some(steps) = tasks.join_next().await {
                for (step, took) in steps.expect("a pod of the benchmark") {
                    table.add(step, &endpoint.name, round, took);
                }
            }
            table.add("all up and down", &endpoint.name, round, began.elapsed());
        }
    }
    let title = format!("{} pods at a time: {UNITS}", options.parallel);
    table.print(&title, &names(endpoints));
}

/// Many pods on each endpoint: memory for each, idle CPU; then lists, with all of them running.
async fn density(options: &Options, endpoints: &[Endpoint]) {
    println!("\n{} pods", options.pods);
    let (mut running, mut of_first) = (vec![], None);
    for endpoint in endpoints {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = pss_kib(&endpoint.processes);
        for number in 0..options.pods {
            let mut pod = Pod::new(
                endpoint,
                &options.image,
                20_000 + number,
                options.host_network,
            );
            pod.up(&mut |_, _| {}).await;
            running.push(pod);
        }
        tokio::time::sleep(Duration::from_secs(2)).await;
        let after = pss_kib(&endpoint.processes);
        let total = |map: &BTreeMap<String, u64>| map.values().sum::<u64>();
        let each = (total(&after).saturating_sub(total(&before))) as f64 / f64::from(options.pods);
        let cpu = cpu_seconds(&endpoint.processes);
        let window = Duration::from_secs(10);
        tokio::time::sleep(window).await;
        let idle = (cpu_seconds(&endpoint.processes) - cpu) * 1000.0 / window.as_secs_f64();
        println!(
            "  {}: PSS idle {before:?} KiB, with pods {after:?} KiB",
            endpoint.name
        );
        print!(
            "  {}: {each:.1} KiB of PSS per pod, idle CPU {idle:.2} ms/s",
            endpoint.name
        );
        match of_first {
            None => of_first = Some((&endpoint.name, each)),
            Some((first, of_first)) => print!(
                "; {first} / {}: {:.3} of PSS per pod",
                endpoint.name,
                of_first / each
            ),
        }
        println!();
    }
    let mut table = Table::default();
    for round in 0..30 {
        for endpoint in in_turn(endpoints, round) {
            endpoint
                .lists(&mut |step, took| table.add(step, &endpoint.name, round, took))
                .await;
        }
    }
    let title = format!("{} pods: {UNITS}", options.pods);
    table.print(&title, &names(endpoints));
    for mut pod in running {
        pod.down(&mut |_, _| {}).await;
    }
}

/// An image, removed before each pull.
async fn pulls(options: &Options, endpoints: &[Endpoint], image: &str) {
    let mut table = Table::default();
    for round in 0..options.rounds.div_ceil(6) {
        for endpoint in in_turn(endpoints, round) {
            endpoint.remove_image(image).await;
            let began = Instant::now();
            endpoint.pull(image).await;
            table.add("PullImage", &endpoint.name, round, began.elapsed());
        }
    }
    for endpoint in endpoints {
        endpoint.remove_image(image).await;
    }
    let title = format!("pull of {image}: {UNITS}");
    table.print(&title, &names(endpoints));
}

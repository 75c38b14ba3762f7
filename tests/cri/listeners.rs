//! Those who listen to events: one that never reads, and two that hear many lives at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use k8s_cri::v1;
use k8s_cri::v1::ContainerEventType::{
    ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent,
};
use tonic::{Code, Status, Streaming};

use crate::daemon::{Clients, Daemon};
use crate::figures::{free_address, http, remove};
use crate::moments::{DELETED, reached, states};
use crate::{IMAGE, archive, container_config, create, pod_config, run_pod, start};

type Event = v1::ContainerEventResponse;

async fn listen(to: &mut Clients) -> Streaming<Event> {
    let request = v1::GetEventsRequest {};
    let reply = to.runtime.get_container_events(request).await;
    reply.unwrap().into_inner()
}

async fn remove_container(to: &mut Clients, id: &str) -> Result<(), Status> {
    let request = v1::RemoveContainerRequest {
        container_id: id.to_owned(),
    };
    to.runtime.remove_container(request).await.map(drop)
}

/// Creates, starts and removes one container after another, attempts of this range: the last one, and how long each start
/// took.
async fn lives(
    to: &mut Clients,
    pod: &str,
    attempts: std::ops::Range<u32>,
) -> (String, Vec<Duration>) {
    let (mut last, mut took) = (String::new(), vec![]);
    for attempt in attempts {
        let mut config = container_config("c");
        config.metadata.as_mut().unwrap().attempt = attempt;
        last = create(to, pod, config).await.unwrap();
        let began = Instant::now();
        start(to, &last).await.unwrap();
        took.push(began.elapsed());
        remove_container(to, &last).await.unwrap();
    }
    (last, took)
}

fn median(took: &[Duration]) -> Duration {
    let mut sorted = took.to_vec();
    sorted.sort();
    sorted[sorted.len() / 2]
}

/// a client that asks for events and never reads them holds up nobody, and is told of its loss.
#[tokio::test]
async fn a_listener_that_never_reads() {
    let address = free_address();
    let line = format!("metrics_address = \"{address}\"");
    let daemon = Daemon::start(&[&line]);
    let mut to = daemon.clients().await;
    daemon.import(&archive::good(IMAGE)).unwrap();
    let pod = run_pod(&mut to, pod_config(&daemon, "events"))
        .await
        .unwrap();
    // The same with nobody who listens, for comparison.
    let (_, alone) = lives(&mut to, &pod, 0..50).await;
    let mut deaf = daemon.clients().await;
    let mut stream = listen(&mut deaf).await;
    // Four events each: more than are kept for a listener, and than fit into its connection.
    let (last, beside) = lives(&mut to, &pod, 50..570).await;
    // Counted although it has not asked again.
    let (_, text) = http(address, "GET /metrics");
    let dropped = text
        .lines()
        .find_map(|line| line.strip_prefix("berth_events_dropped_total "));
    let dropped: u64 = dropped.unwrap().parse().unwrap();
    assert!(dropped > 0, "{text}");
    // The last ones start when nothing more can be kept for it.
    let (usual, then) = (median(&alone), median(&beside[420..]));
    assert!(
        then < usual * 4 + Duration::from_millis(20),
        "a start took {usual:?} alone, {then:?} beside a deaf listener"
    );
    let mut heard = 0;
    let loss = loop {
        match stream.message().await {
            Ok(Some(event)) => {
                assert!(event.pod_sandbox_status.is_some());
                assert_ne!(event.container_id, last, "a gap was passed over");
                heard += 1;
            }
            Ok(None) => panic!("the stream ended without a word after {heard} events"),
            Err(status) => break status,
        }
    };
    assert_eq!(loss.code(), Code::DataLoss, "{loss}");
    assert!(loss.message().contains("list, then ask again"), "{loss}");
    // Asked again, it hears what happens from now on.
    let mut stream = listen(&mut deaf).await;
    remove(&mut to, &pod).await;
    let mut kinds = vec![];
    while kinds.last() != Some(&ContainerDeletedEvent) {
        let event = stream.message().await.unwrap().unwrap();
        if event.container_id == pod {
            // kubelet forgets the pod by this status.
            assert_eq!(event.pod_sandbox_status.as_ref().unwrap().id, pod);
            kinds.push(event.container_event_type());
        }
    }
    assert_eq!(kinds[0], ContainerStoppedEvent);
    daemon.stop();
}

/// Containers that are created in [`many_lives_at_once`].
const LIVES: usize = 220;
const SLOTS: usize = 4;
const WORKERS: u64 = 8;
/// No more is begun after that.
const TIME: Duration = Duration::from_secs(60);

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit as u64).unwrap()
    }
}

/// What the workers know together.
#[derive(Default)]
struct Work {
    /// A pod, absent while it is replaced, and its containers.
    slots: [(Option<String>, Vec<String>); SLOTS],
    pods: usize,
    attempts: usize,
    created: usize,
    /// What was refused: that is not the subject here, but it is to be one of the usual answers.
    refusals: Vec<Status>,
}

/// One of several that make, start, stop and remove without asking the others.
async fn worker(seed: u64, mut to: Clients, config: v1::PodSandboxConfig, work: Arc<Mutex<Work>>) {
    let (mut random, end) = (Random(seed), Instant::now() + TIME);
    loop {
        let (slot, action) = (random.below(SLOTS), random.below(20));
        let (pod, container, number) = {
            let mut work = work.lock().unwrap();
            if work.created >= LIVES || Instant::now() > end {
                return;
            }
            work.attempts += 1;
            let number = work.attempts;
            let (pod, containers) = &mut work.slots[slot];
            let pod = if action == 0 { pod.take() } else { pod.clone() };
            let index = random.below(containers.len().max(1));
            let container = match action {
                0 => {
                    containers.clear();
                    None
                }
                16.. if !containers.is_empty() => Some(containers.swap_remove(index)),
                _ => containers.get(index).cloned(),
            };
            (pod, container, number)
        };
        let outcome = match (action, pod, container) {
            (0, old, _) => replace(&mut to, old, slot, config.clone(), &work).await,
            (1..7, Some(pod), _) => {
                let made = create(&mut to, &pod, container_config(&format!("c{number}"))).await;
                made.map(|id| {
                    let mut work = work.lock().unwrap();
                    work.created += 1;
                    work.slots[slot].1.push(id);
                })
            }
            (7..13, _, Some(id)) => start(&mut to, &id).await,
            (13..16, _, Some(container_id)) => {
                let request = v1::StopContainerRequest {
                    container_id,
                    timeout: 0,
                };
                to.runtime.stop_container(request).await.map(drop)
            }
            (16.., _, Some(id)) => remove_container(&mut to, &id).await,
            _ => Ok(()),
        };
        if let Err(status) = outcome {
            work.lock().unwrap().refusals.push(status);
        }
    }
}

/// Removes a pod with what is in it, and runs another in its place.
async fn replace(
    to: &mut Clients,
    old: Option<String>,
    slot: usize,
    mut config: v1::PodSandboxConfig,
    work: &Mutex<Work>,
) -> Result<(), Status> {
    if let Some(pod_sandbox_id) = old {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
        to.runtime.remove_pod_sandbox(request).await?;
    }
    let number = {
        let mut work = work.lock().unwrap();
        work.pods += 1;
        work.pods
    };
    config.metadata.as_mut().unwrap().name = format!("p{number}");
    let pod = run_pod(to, config).await?;
    let before = work.lock().unwrap().slots[slot].0.replace(pod);
    match before {
        Some(pod_sandbox_id) => {
            let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
            to.runtime.remove_pod_sandbox(request).await.map(drop)
        }
        None => Ok(()),
    }
}

/// All events until this pod is deleted.
async fn hear(
    mut stream: Streaming<Event>,
    last: tokio::sync::oneshot::Receiver<String>,
) -> Vec<Event> {
    let (mut events, mut last) = (vec![], Box::pin(last));
    let mut end: Option<String> = None;
    loop {
        let over = |event: &Event| {
            Some(&event.container_id) == end.as_ref()
                && event.container_event_type() == ContainerDeletedEvent
        };
        if events.iter().rev().any(over) {
            return events;
        }
        tokio::select! {
            id = &mut last, if end.is_none() => end = Some(id.unwrap()),
            next = tokio::time::timeout(Duration::from_secs(60), stream.message()) => {
                events.push(next.expect("all events").unwrap().unwrap());
            }
        }
    }
}

/// whatever happens at once, of all pods each listener hears all in one order, with the pod, and with
/// statuses that know what was told before.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_lives_at_once() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut to = daemon.clients().await;
    let mut listeners = tokio::task::JoinSet::new();
    let mut ends = vec![];
    for _ in 0..2 {
        let stream = listen(&mut daemon.clients().await).await;
        let (send, receive) = tokio::sync::oneshot::channel();
        ends.push(send);
        listeners.spawn(hear(stream, receive));
    }
    let work = Arc::new(Mutex::new(Work::default()));
    let mut workers = tokio::task::JoinSet::new();
    for seed in 0..WORKERS {
        let config = pod_config(&daemon, "");
        workers.spawn(worker(
            seed,
            daemon.clients().await,
            config,
            Arc::clone(&work),
        ));
    }
    workers.join_all().await;
    let list = to
        .runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest::default());
    for pod in list.await.unwrap().into_inner().items {
        remove(&mut to, &pod.id).await;
    }
    let last = run_pod(&mut to, pod_config(&daemon, "last")).await.unwrap();
    remove(&mut to, &last).await;
    for end in ends {
        end.send(last.clone()).unwrap();
    }
    let heard = listeners.join_all().await;
    let work = std::mem::take(&mut *work.lock().unwrap());
    let usual = [Code::NotFound, Code::FailedPrecondition];
    let unusual: Vec<_> = work
        .refusals
        .iter()
        .filter(|status| !usual.contains(&status.code()))
        .collect();
    assert!(unusual.is_empty(), "{unusual:?}");
    assert_eq!(heard[0], heard[1]);
    let created = check(&heard[0]);
    assert!(
        created >= work.created && created >= 200,
        "{created} of {}",
        work.created
    );
    daemon.stop();
}

const RUNNING: i32 = v1::ContainerState::ContainerRunning as i32;

/// The rules of; how many containers were created.
fn check(events: &[Event]) -> usize {
    let mut created = 0;
    let mut kinds: BTreeMap<&str, Vec<v1::ContainerEventType>> = BTreeMap::new();
    let mut latest: BTreeMap<&str, i64> = BTreeMap::new();
    let mut known: BTreeMap<(&str, &str), i32> = BTreeMap::new();
    // Nothing is told of it before its deletion, which is under way.
    let going = |at: usize, id: &str| {
        let next = events[at..].iter().find(|event| event.container_id == id);
        next.is_some_and(|event| event.container_event_type() == ContainerDeletedEvent)
    };
    for (at, event) in events.iter().enumerate() {
        let (id, kind) = (&*event.container_id, event.container_event_type());
        let status = event.pod_sandbox_status.as_ref();
        assert!(status.is_some(), "no pod: {event:?}");
        let pod = &*status.unwrap().id;
        kinds.entry(id).or_default().push(kind);
        let before = latest.insert(pod, event.created_at).unwrap_or(0);
        assert!(before <= event.created_at, "{event:?} after {before}");
        if id != pod {
            created += usize::from(kind == ContainerCreatedEvent);
            known.insert((pod, id), reached(event));
        }
        let shown = states(&event.containers_statuses);
        for (&(_, id), &least) in known
            .range((pod, "")..)
            .take_while(|((of, _), _)| *of == pod)
        {
            let right = match (least, shown.get(id)) {
                (DELETED, shown) => shown.is_none(),
                (least, Some(state)) => *state >= least,
                (least, None) => least != RUNNING && going(at, id),
            };
            assert!(right, "{id} is known as {least}: {event:?}");
        }
    }
    let mut ends = BTreeSet::new();
    for (id, kinds) in &kinds {
        let mut order = kinds.clone();
        order.sort();
        order.dedup();
        assert_eq!(*kinds, order, "{id}");
        assert_eq!(
            (kinds[0], kinds[kinds.len() - 1]),
            (ContainerCreatedEvent, ContainerDeletedEvent),
            "{id}"
        );
        let [started, stopped] =
            [ContainerStartedEvent, ContainerStoppedEvent].map(|kind| kinds.contains(&kind));
        assert!(stopped || !started, "{id}: {kinds:?}");
        ends.insert(kinds.len());
    }
    // Not all of one sort.
    assert!(ends.len() > 1, "{ends:?}");
    created
}

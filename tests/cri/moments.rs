//! What kubelet's EventedPLEG relies on: of two tellings about a pod, statuses or events, the later one knows all
//! that the earlier one knew; and of a container's attempts the latest comes first.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_cri::v1;

use crate::daemon::{Clients, Daemon};
use crate::{IMAGE, archive, container_config, create, pod_config, run_pod, start};

/// Containers that live and end while others look.
const CONTAINERS: usize = 20;
/// Who look, each as fast as it can.
const LOOKERS: usize = 4;

/// What was told of a pod's containers at one time: container to state.
struct Telling {
    at: i64,
    by: &'static str,
    states: BTreeMap<String, i32>,
}

pub(crate) fn states(of: &[v1::ContainerStatus]) -> BTreeMap<String, i32> {
    of.iter().map(|one| (one.id.clone(), one.state)).collect()
}

/// What the events themselves say that a container has reached; deleted ones are not to be shown again.
pub(crate) const DELETED: i32 = i32::MAX;

pub(crate) fn reached(event: &v1::ContainerEventResponse) -> i32 {
    match event.container_event_type() {
        v1::ContainerEventType::ContainerCreatedEvent => {
            v1::ContainerState::ContainerCreated as i32
        }
        v1::ContainerEventType::ContainerStartedEvent => {
            v1::ContainerState::ContainerRunning as i32
        }
        v1::ContainerEventType::ContainerStoppedEvent => v1::ContainerState::ContainerExited as i32,
        v1::ContainerEventType::ContainerDeletedEvent => DELETED,
    }
}

/// Asks for the pod's status again and again until told to stop.
async fn look(mut to: Clients, pod: String, stop: Arc<AtomicBool>) -> Vec<Telling> {
    let mut told = vec![];
    while !stop.load(Ordering::SeqCst) {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: pod.clone(),
            verbose: false,
        };
        let reply = to.runtime.pod_sandbox_status(request).await.unwrap();
        let reply = reply.into_inner();
        told.push(Telling {
            at: reply.timestamp,
            by: "PodSandboxStatus",
            states: states(&reply.containers_statuses),
        });
    }
    told
}

async fn live_and_end(to: &mut Clients, pod: &str, number: usize) {
    let id = create(to, pod, container_config(&format!("c{number}")))
        .await
        .unwrap();
    start(to, &id).await.unwrap();
    let stop = v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    };
    to.runtime.stop_container(stop).await.unwrap();
    let remove = v1::RemoveContainerRequest { container_id: id };
    to.runtime.remove_container(remove).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_later_telling_knows_what_an_earlier_one_knew() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut to = daemon.clients().await;
    let request = v1::GetEventsRequest {};
    let mut stream = to
        .runtime
        .get_container_events(request)
        .await
        .unwrap()
        .into_inner();
    let pod = run_pod(&mut to, pod_config(&daemon, "moments"))
        .await
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut lookers = tokio::task::JoinSet::new();
    for _ in 0..LOOKERS {
        lookers.spawn(look(daemon.clients().await, pod.clone(), Arc::clone(&stop)));
    }
    for number in 0..CONTAINERS {
        live_and_end(&mut to, &pod, number).await;
    }
    stop.store(true, Ordering::SeqCst);
    let mut told: Vec<Telling> = lookers.join_all().await.into_iter().flatten().collect();
    let looks = told.len();
    let mut events = vec![];
    while events.len() < 2 + 4 * CONTAINERS {
        let next = tokio::time::timeout(Duration::from_secs(20), stream.message());
        events.push(next.await.expect("all events").unwrap().unwrap());
    }
    assert!(
        events
            .windows(2)
            .all(|pair| pair[0].created_at < pair[1].created_at),
        "events in order"
    );
    told.extend(events.iter().map(|event| Telling {
        at: event.created_at,
        by: "event",
        states: states(&event.containers_statuses),
    }));
    told.sort_by_key(|one| one.at);
    let mut known: BTreeMap<String, i32> = BTreeMap::new();
    let mut coming = events.iter().peekable();
    for one in &told {
        while let Some(event) = coming.next_if(|event| event.created_at <= one.at) {
            if event.container_id != pod {
                known.insert(event.container_id.clone(), reached(event));
            }
        }
        for (id, least) in &known {
            let shown = one.states.get(id).copied();
            let right = match (*least, shown) {
                (DELETED, shown) => shown.is_none(),
                (least, Some(state)) => state >= least,
                (_, None) => gone_soon(&events, id, one.at),
            };
            let Telling { by, at, .. } = one;
            assert!(
                right,
                "{by} of {at} shows {id} as {shown:?}, an event before that told {least}"
            );
        }
    }
    assert!(looks > CONTAINERS, "{looks} looks");
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    to.runtime.remove_pod_sandbox(request).await.unwrap();
    drop((to, stream));
    daemon.stop();
}

/// May be missing: its exit was told, its deletion is told later.
fn gone_soon(events: &[v1::ContainerEventResponse], id: &str, at: i64) -> bool {
    let of = |kind| {
        events
            .iter()
            .find(|event| event.container_id == id && event.container_event_type() == kind)
            .map(|event| event.created_at)
    };
    of(v1::ContainerEventType::ContainerStoppedEvent).is_some_and(|stopped| stopped <= at)
        && of(v1::ContainerEventType::ContainerDeletedEvent).is_some_and(|deleted| deleted > at)
}

#[tokio::test]
async fn the_latest_attempt_comes_first() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut to = daemon.clients().await;
    let events = v1::GetEventsRequest {};
    let mut events = to
        .runtime
        .get_container_events(events)
        .await
        .unwrap()
        .into_inner();
    let pod = run_pod(&mut to, pod_config(&daemon, "attempts"))
        .await
        .unwrap();
    let mut made = vec![];
    for attempt in 0..8 {
        let mut config = container_config("main");
        config.metadata.as_mut().unwrap().attempt = attempt;
        made.insert(0, create(&mut to, &pod, config).await.unwrap());
    }
    let request = v1::PodSandboxStatusRequest {
        pod_sandbox_id: pod.clone(),
        verbose: false,
    };
    let reply = to
        .runtime
        .pod_sandbox_status(request)
        .await
        .unwrap()
        .into_inner();
    let ids = |of: &[v1::ContainerStatus]| of.iter().map(|one| one.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&reply.containers_statuses), made);
    loop {
        let next = tokio::time::timeout(Duration::from_secs(20), events.message());
        let event = next.await.expect("all events").unwrap().unwrap();
        if event.container_id == made[0] {
            assert_eq!(ids(&event.containers_statuses), made);
            break;
        }
    }
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    to.runtime.remove_pod_sandbox(request).await.unwrap();
    drop((to, events));
    daemon.stop();
}

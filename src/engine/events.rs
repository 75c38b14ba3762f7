//! Events of pods and containers: everybody who listens gets all of them, in order.
//!
//! Publishing never waits. A listener that reads too slowly loses the oldest and is told how many, so that
//! it lists anew. While nobody listens, the last ones are kept for whoever comes first: kubelet connects
//! again after a restart of either side.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::broadcast::{self, error::RecvError};

use crate::base::clock::Timestamp;
use crate::base::container::EventKind;
use crate::base::counters;
use crate::base::id::PodId;
use crate::base::pod::PodStatus;
use crate::engine::facade::EngineEvent;
use crate::engine::pod::Pod;
use crate::engine::table::Table;

/// Events kept for a slow listener, and while nobody listens.
const BACKLOG: usize = 1024;
/// How long events are kept while nobody listens.
const KEPT: Duration = Duration::from_secs(300);

/// What is kept of an event that nobody heard: statuses are taken when somebody does.
#[derive(Debug)]
struct Kept {
    id: String,
    kind: EventKind,
    at: Timestamp,
    pod: Arc<PodStatus>,
}

/// The events of an engine.
#[derive(Debug)]
pub(crate) struct Events {
    sender: broadcast::Sender<EngineEvent>,
    /// Its lock is what makes "nobody listens" and "kept" one step.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    kept: VecDeque<Kept>,
    /// Events that went out to listeners.
    sent: u64,
    /// How far each listener is, counted like `sent`.
    heard: Vec<Weak<AtomicU64>>,
}

impl State {
    /// Counts an event that goes out, and for each listener with a full backlog the one that it loses by that: also where it
    /// never asks again.
    fn count(&mut self) {
        self.sent += 1;
        let sent = self.sent;
        self.heard.retain(|heard| {
            let Some(heard) = heard.upgrade() else {
                return false;
            };
            if sent - heard.load(Ordering::Relaxed).min(sent) > BACKLOG as u64 {
                counters::EVENTS_DROPPED.add(1);
            }
            true
        });
    }
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: broadcast::channel(BACKLOG).0,
            state: Mutex::default(),
        }
    }
}

/// Why a listener hears no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Silence {
    /// So many events were dropped because they were not read in time.
    Lost(u64),
    /// The engine has ended.
    Ended,
}

/// One who listens.
#[derive(Debug)]
pub(crate) struct Listener {
    first: VecDeque<EngineEvent>,
    live: broadcast::Receiver<EngineEvent>,
    heard: Arc<AtomicU64>,
}

impl Listener {
    /// The next event. Cancel-safe.
    ///
    /// # Errors
    /// [`Silence`]: after a loss, what comes next has a gap before it.
    pub(crate) async fn next(&mut self) -> Result<EngineEvent, Silence> {
        if let Some(event) = self.first.pop_front() {
            return Ok(event);
        }
        match self.live.recv().await {
            Ok(event) => {
                self.heard.fetch_add(1, Ordering::Relaxed);
                Ok(event)
            }
            Err(RecvError::Lagged(lost)) => {
                self.heard.fetch_add(lost, Ordering::Relaxed);
                Err(Silence::Lost(lost))
            }
            Err(RecvError::Closed) => Err(Silence::Ended),
        }
    }
}

impl Events {
    /// Tells everybody. Called in the order in which things happen to a pod.
    pub(crate) fn publish(&self, event: EngineEvent) {
        counters::EVENTS_PUBLISHED.add(1);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // It comes back when nobody listens.
        let Err(unheard) = self.sender.send(event) else {
            state.count();
            return;
        };
        let kept = &mut state.kept;
        let EngineEvent {
            id, kind, at, pod, ..
        } = unheard.0;
        forget_old(kept, at);
        if kept.len() >= BACKLOG {
            kept.pop_front();
            counters::EVENTS_DROPPED.add(1);
        }
        kept.push_back(Kept { id, kind, at, pod });
    }

    /// A listener; the first one gets what happened lately, with statuses of now.
    pub(crate) fn listen(&self, pods: &Table<PodId, Pod>) -> Listener {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        forget_old(&mut state.kept, Timestamp::now());
        let unheard = std::mem::take(&mut state.kept);
        let live = self.sender.subscribe();
        let heard = Arc::new(AtomicU64::new(state.sent));
        state.heard.push(Arc::downgrade(&heard));
        drop(state);
        let first = unheard.into_iter().map(|one| {
            let pod = pods.get(one.pod.id);
            EngineEvent {
                id: one.id,
                kind: one.kind,
                at: one.at,
                containers: pod
                    .as_ref()
                    .map(|pod| pod.container_statuses())
                    .unwrap_or_default(),
                pod: pod.map_or(one.pod, |pod| pod.status()),
            }
        });
        Listener {
            first: first.collect(),
            live,
            heard,
        }
    }
}

/// Drops what is too old at this time.
fn forget_old(kept: &mut VecDeque<Kept>, now: Timestamp) {
    let oldest = now.0 - i64::try_from(KEPT.as_nanos()).unwrap_or(i64::MAX);
    while kept.front().is_some_and(|one| one.at.0 < oldest) {
        kept.pop_front();
        counters::EVENTS_DROPPED.add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Id;
    use crate::base::pod::{PodMetadata, PodState};

    fn event(number: usize, at: i64) -> EngineEvent {
        let status = PodStatus {
            id: PodId(Id::from_bytes([1; 32])),
            metadata: PodMetadata::default(),
            state: PodState::Ready,
            created_at: Timestamp(1),
            labels: std::collections::BTreeMap::new(),
            annotations: std::collections::BTreeMap::new(),
            runtime_handler: String::new(),
            ips: vec![],
            namespaces: crate::base::security::NamespaceOptions::default(),
        };
        EngineEvent {
            id: number.to_string(),
            kind: EventKind::Started,
            at: Timestamp(at),
            pod: Arc::new(status),
            containers: vec![],
        }
    }

    fn now() -> i64 {
        Timestamp::now().0
    }

    #[tokio::test]
    async fn the_first_listener_hears_what_nobody_heard() {
        let (events, pods) = (Events::default(), Table::default());
        events.publish(event(0, now() - 301_000_000_000));
        for number in 1..=BACKLOG + 2 {
            events.publish(event(number, now()));
        }
        let mut first = events.listen(&pods);
        let mut second = events.listen(&pods);
        events.publish(event(9999, now()));
        assert_eq!(second.next().await.unwrap().id, "9999");
        for number in 3..=BACKLOG + 2 {
            let heard = first.next().await.unwrap();
            assert_eq!(heard.id, number.to_string());
        }
        assert_eq!(first.next().await.unwrap().id, "9999");
        drop((first, second));
        events.publish(event(1, now()));
        assert_eq!(events.listen(&pods).next().await.unwrap().id, "1");
    }

    #[tokio::test]
    async fn a_slow_listener_is_told_what_it_lost() {
        let (events, pods) = (Events::default(), Table::default());
        let (mut slow, mut quick) = (events.listen(&pods), events.listen(&pods));
        let dropped = counters::EVENTS_DROPPED.get();
        for number in 0..BACKLOG + 5 {
            events.publish(event(number, now()));
            assert_eq!(quick.next().await.unwrap().id, number.to_string());
        }
        // Counted before it asks.
        assert!(counters::EVENTS_DROPPED.get() >= dropped + 5);
        assert_eq!(slow.next().await.unwrap_err(), Silence::Lost(5));
        drop(events);
        for _ in 0..BACKLOG {
            slow.next().await.unwrap();
        }
        assert_eq!(slow.next().await.unwrap_err(), Silence::Ended);
    }
}

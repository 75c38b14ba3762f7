//! Names that must be unique, and the work in flight under each: a retry joins it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Outcome of a flight, for everybody who joins it; absent while it is in the air.
type Outcome<I, E> = Option<Result<I, E>>;

/// Names `K` of objects with ids `I`. Clones share it.
#[derive(Debug)]
pub(crate) struct Names<K, I, E> {
    slots: Arc<Mutex<BTreeMap<K, Slot<I, E>>>>,
}

#[derive(Debug)]
enum Slot<I, E> {
    /// Somebody makes it.
    InFlight(watch::Receiver<Outcome<I, E>>),
    /// It exists.
    Taken(I),
}

/// What a caller found under a name.
#[derive(Debug)]
pub(crate) enum Claim<K: Ord, I, E> {
    /// Nothing: the caller makes it, and says how that went.
    Ours(Flight<K, I, E>),
    /// Somebody makes it now: wait for [`join`].
    Join(watch::Receiver<Outcome<I, E>>),
    /// It exists.
    Exists(I),
}

/// The right to make the object of one name. Dropped without [`Flight::land`], the name is free again
/// and those who joined are told nothing more than that.
#[derive(Debug)]
pub(crate) struct Flight<K: Ord, I, E> {
    key: Option<K>,
    slots: Arc<Mutex<BTreeMap<K, Slot<I, E>>>>,
    outcome: watch::Sender<Outcome<I, E>>,
}

impl<K, I, E> Clone for Names<K, I, E> {
    fn clone(&self) -> Self {
        Self {
            slots: Arc::clone(&self.slots),
        }
    }
}

impl<K, I, E> Default for Names<K, I, E> {
    fn default() -> Self {
        Self {
            slots: Arc::default(),
        }
    }
}

impl<K: Ord + Clone, I: Copy + PartialEq, E: Clone> Names<K, I, E> {
    /// Takes the name, or says who has it.
    pub(crate) fn claim(&self, key: K) -> Claim<K, I, E> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        match slots.get(&key) {
            Some(Slot::InFlight(outcome)) => Claim::Join(outcome.clone()),
            Some(Slot::Taken(id)) => Claim::Exists(*id),
            None => {
                let (outcome, joined) = watch::channel(None);
                slots.insert(key.clone(), Slot::InFlight(joined));
                Claim::Ours(Flight {
                    key: Some(key),
                    slots: Arc::clone(&self.slots),
                    outcome,
                })
            }
        }
    }

    /// Takes the name of an object that exists (restore); false: another one has it.
    pub(crate) fn take(&self, key: K, id: I) -> bool {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.contains_key(&key) {
            return false;
        }
        slots.insert(key, Slot::Taken(id));
        true
    }

    /// Frees the name, if `id` has it.
    pub(crate) fn release(&self, key: &K, id: I) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(slots.get(key), Some(Slot::Taken(owner)) if *owner == id) {
            slots.remove(key);
        }
    }
}

impl<K: Ord, I: Copy, E: Clone> Flight<K, I, E> {
    /// Ends the flight: on success the name belongs to the object, otherwise it is free. Those who
    /// joined get the same outcome.
    pub(crate) fn land(mut self, outcome: Result<I, E>) {
        self.finish(Some(outcome));
    }
}

impl<K: Ord, I, E> Flight<K, I, E> {
    fn finish(&mut self, outcome: Outcome<I, E>)
    where
        I: Copy,
    {
        let Some(key) = self.key.take() else { return };
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        match &outcome {
            Some(Ok(id)) => {
                slots.insert(key, Slot::Taken(*id));
            }
            _ => {
                slots.remove(&key);
            }
        }
        drop(slots);
        self.outcome.send_replace(outcome);
    }
}

impl<K: Ord, I, E> Drop for Flight<K, I, E> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.slots
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&key);
        }
    }
}

/// Waits for the outcome of a flight joined. Absent: it was given up without one; claim again.
pub(crate) async fn join<I: Copy, E: Clone>(
    mut flight: watch::Receiver<Outcome<I, E>>,
) -> Option<Result<I, E>> {
    match flight.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone(),
        Err(_gone) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Table = Names<String, u32, String>;

    fn ours(table: &Table, key: &str) -> Flight<String, u32, String> {
        match table.claim(key.to_owned()) {
            Claim::Ours(flight) => flight,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_retry_joins_and_gets_the_same() {
        let table = Table::default();
        let flight = ours(&table, "a");
        let joined: Vec<_> = (0..10)
            .map(|_| match table.claim("a".to_owned()) {
                Claim::Join(outcome) => join(outcome),
                other => panic!("{other:?}"),
            })
            .collect();
        flight.land(Ok(7));
        for outcome in joined {
            assert_eq!(outcome.await, Some(Ok(7)));
        }
        assert!(matches!(table.claim("a".to_owned()), Claim::Exists(7)));
        table.release(&"a".to_owned(), 8);
        assert!(matches!(table.claim("a".to_owned()), Claim::Exists(7)));
        table.release(&"a".to_owned(), 7);
        drop(ours(&table, "a"));
    }

    #[tokio::test]
    async fn a_failure_frees_the_name() {
        let table = Table::default();
        let flight = ours(&table, "a");
        let Claim::Join(joined) = table.claim("a".to_owned()) else {
            panic!()
        };
        flight.land(Err("no".to_owned()));
        assert_eq!(join(joined).await, Some(Err("no".to_owned())));
        let flight = ours(&table, "a");
        let Claim::Join(joined) = table.claim("a".to_owned()) else {
            panic!()
        };
        drop(flight);
        assert_eq!(join(joined).await, None);
        drop(ours(&table, "a"));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn of_many_at_once_exactly_one_makes_it() {
        let table = Table::default();
        let made = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let tasks = crate::base::tasks::Tasks::default();
        let all: Vec<_> = (0..64)
            .map(|_| {
                let (table, made) = (table.clone(), Arc::clone(&made));
                tasks.spawn(async move {
                    loop {
                        match table.claim("pod".to_owned()) {
                            Claim::Ours(flight) => {
                                tokio::task::yield_now().await;
                                let id = made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                                flight.land(Ok(id));
                                return id;
                            }
                            Claim::Join(outcome) => {
                                if let Some(Ok(id)) = join(outcome).await {
                                    return id;
                                }
                            }
                            Claim::Exists(id) => return id,
                        }
                    }
                })
            })
            .collect();
        for id in all {
            assert_eq!(id.await.unwrap(), 0);
        }
        assert_eq!(made.load(std::sync::atomic::Ordering::SeqCst), 1);
    }
}

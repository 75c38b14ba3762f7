//! A waiting room for connections whose clients have not said what they want: bounded, and never full for the next one.
//! When it has no place left, whoever has waited longest is put out. A place is safe for a moment first, so that a crowd
//! cannot push out those who are about to speak: then the next one waits before the door, no longer than that.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

#[derive(Debug)]
struct Guest {
    since: Instant,
    /// Dropped with a word: the place is lost.
    out: oneshot::Sender<()>,
}

/// The room. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    places: usize,
    grace: Duration,
    guests: Arc<Mutex<(u64, BTreeMap<u64, Guest>)>>,
    left: Arc<Notify>,
}

/// A place in it, until it is left or lost.
#[derive(Debug)]
pub(crate) struct Place {
    room: Room,
    number: u64,
}

/// Ends when a place is lost.
#[derive(Debug)]
pub(crate) struct Loss(oneshot::Receiver<()>);

impl Room {
    /// With so many places, at least one; each is safe for the time of grace. In that time a client must be able to say what
    /// it wants; so many places for each such time is what a crowd gets through the door.
    pub(crate) fn new(places: usize, grace: Duration) -> Self {
        Self {
            places: places.max(1),
            grace,
            guests: Arc::default(),
            left: Arc::default(),
        }
    }

    fn guests(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Guest>)> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place. Where there is none, the one that was taken first is lost, as soon as it may be.
    pub(crate) async fn enter(&self) -> (Place, Loss) {
        loop {
            let left = self.left.notified();
            let safe = match self.try_enter() {
                Ok(entered) => return entered,
                Err(safe) => safe,
            };
            // In time or not: there is a place now, or one that can be lost.
            let _late = tokio::time::timeout_at(safe, left).await.is_err();
        }
    }

    /// The place, or until when all are safe.
    fn try_enter(&self) -> Result<(Place, Loss), Instant> {
        let mut guests = self.guests();
        let (next, inside) = &mut *guests;
        if inside.len() >= self.places
            && let Some(first) = inside.first_entry()
        {
            let safe = first.get().since + self.grace;
            if safe > Instant::now() {
                return Err(safe);
            }
            // One that has just ended does not hear it.
            let _ended = first.remove().out.send(()).is_err();
        }
        let (out, loss) = oneshot::channel();
        let number = *next;
        *next += 1;
        let since = Instant::now();
        inside.insert(number, Guest { since, out });
        let room = self.clone();
        Ok((Place { room, number }, Loss(loss)))
    }
}

impl Place {
    /// Leaves, because it is known what the client wants; false: the place is lost already, and so is the connection.
    pub(crate) fn leave(&self) -> bool {
        let left = self.room.guests().1.remove(&self.number).is_some();
        self.room.left.notify_one();
        left
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Loss {
    /// Resolves when the place is lost, never when it was left.
    pub(crate) async fn happens(self) {
        if self.0.await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: Duration = Duration::from_secs(3600);

    async fn lost(loss: Loss) -> bool {
        tokio::select! {
            biased;
            () = loss.happens() => true,
            () = std::future::ready(()) => false,
        }
    }

    #[tokio::test]
    async fn when_the_room_is_full_who_came_first_goes() {
        let room = Room::new(2, Duration::ZERO);
        let (first, first_lost) = room.enter().await;
        let (second, second_lost) = room.enter().await;
        let (third, third_lost) = room.enter().await;
        assert!(lost(first_lost).await && !first.leave());
        // Who has left cannot be put out, and has made room.
        assert!(second.leave());
        let (fourth, fourth_lost) = room.enter().await;
        assert!(!lost(second_lost).await && !lost(third_lost).await);
        let _fifth = room.enter().await;
        assert!(!third.leave() && fourth.leave() && !lost(fourth_lost).await);
    }

    #[tokio::test]
    async fn who_waits_before_the_door_gets_the_next_place() {
        let room = Room::new(1, NEVER);
        let (first, first_lost) = room.enter().await;
        let mut next = Box::pin(room.enter());
        tokio::select! {
            biased;
            _ = &mut next => panic!("two in one place"),
            () = std::future::ready(()) => {}
        }
        drop(first);
        let (second, _) = next.await;
        assert!(second.leave() && !lost(first_lost).await);
    }
}

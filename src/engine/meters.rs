//! What writable layers take: walked beside whoever asks, each on its own account.
//!
//! Walks take turns by slices of time. One that ends within its first slice never waits for those that do not: of these a
//! few are under way at a time, and the others come when one of them ends. Nobody waits for a walk longer than he says; he
//! is told what was last known, or what has been counted so far, whichever is more.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::tasks::Tasks;
use crate::sys::descent::Progress;
use crate::sys::usage::{Counted, Usage};

/// How long a figure is good for.
const AGE: Duration = Duration::from_secs(8);
/// A layer that takes long to walk is walked so many times its duration apart.
const REST: u32 = 20;
/// What one walk does before another has its turn.
const SLICE: Duration = Duration::from_millis(20);
/// What one walk may take in all; then what was counted is told as the least that there is.
const BUDGET: Duration = Duration::from_secs(60);
/// Threads that walk, while there is something to walk.
const WORKERS: usize = 2;
/// Walks under way that did not end in their first slice: so many times the memory and the descriptors of one.
const LONG: usize = 4;

/// The figure of one writable layer.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    state: Mutex<State>,
    /// A walk has ended.
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Counted>,
    /// When `last` is to be measured again.
    due: Option<Instant>,
    /// `last` took more than a slice.
    slow: bool,
    /// A walk waits or is under way.
    walking: bool,
    /// What it has counted so far.
    partial: Option<Counted>,
    /// Nobody asks any more.
    closed: bool,
}

impl State {
    fn told(&self) -> Option<Counted> {
        match (self.last, self.partial) {
            (Some(last), Some(partial)) => Some(most(last, partial)),
            (last, partial) => last.or(partial),
        }
    }
}

/// Of two counts of which neither is all, or not any more.
fn most(a: Counted, b: Counted) -> Counted {
    Counted {
        bytes: a.bytes.max(b.bytes),
        inodes: a.inodes.max(b.inodes),
        complete: false,
    }
}

impl Meter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the walks: the layer is being removed.
    pub(crate) fn close(&self) {
        self.state().closed = true;
    }

    /// What was last known, or is by now; a first figure, and one that takes no time, is waited for until `deadline`.
    /// Absent: a first walk has not even begun by then.
    fn read(&self, deadline: Instant) -> Option<Counted> {
        let mut state = self.state();
        while state.walking && !(state.slow && state.last.is_some()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .ended
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.told()
    }

    /// Notes how far a walk is. `false`: it is of no use any more.
    fn progress(&self, counted: Counted) -> bool {
        let mut state = self.state();
        state.partial = Some(
            state
                .partial
                .map_or(counted, |partial| most(partial, counted)),
        );
        !state.closed
    }

    fn end(&self, counted: Option<Counted>, spent: Duration) {
        let mut state = self.state();
        state.last = match (counted, state.last) {
            (Some(counted), Some(last)) if !counted.complete => Some(most(counted, last)),
            (counted, last) => counted.or(last),
        };
        state.due = Some(Instant::now() + AGE.max(spent.saturating_mul(REST)));
        state.slow = spent > SLICE;
        state.walking = false;
        state.partial = None;
        drop(state);
        self.ended.notify_all();
    }
}

/// A walk that has not begun.
#[derive(Debug)]
struct Wanted {
    meter: Arc<Meter>,
    directory: PathBuf,
}

/// A walk under way.
#[derive(Debug)]
struct Walking {
    wanted: Wanted,
    usage: Usage,
    spent: Duration,
    /// It did not end in its first slice, and has one of the places.
    long: bool,
}

#[derive(Debug, Default)]
struct Queue {
    /// Their first slice comes before all others.
    new: VecDeque<Wanted>,
    /// Between two turns.
    long: VecDeque<Walking>,
    /// Places that are taken, at most [`LONG`].
    places: usize,
    /// They begin anew when there is a place.
    parked: VecDeque<Wanted>,
    workers: usize,
}

/// All walks.
#[derive(Clone, Debug)]
pub(crate) struct Meters {
    queue: Arc<Mutex<Queue>>,
    tasks: Tasks,
}

impl Meters {
    /// No walk yet. They end when the daemon does.
    pub(crate) fn new(tasks: Tasks) -> Self {
        Self {
            queue: Arc::default(),
            tasks,
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a walk of `directory`, if it is time for one.
    pub(crate) fn begin(&self, meter: &Arc<Meter>, directory: impl FnOnce() -> PathBuf) {
        {
            let mut state = meter.state();
            let fresh = state.due.is_some_and(|due| Instant::now() < due);
            if state.walking || state.closed || fresh {
                return;
            }
            state.walking = true;
        }
        let mut queue = self.queue();
        queue.new.push_back(Wanted {
            meter: Arc::clone(meter),
            directory: directory(),
        });
        if queue.workers < WORKERS {
            queue.workers += 1;
            let meters = self.clone();
            // It ends by itself, also when the daemon does.
            drop(Tasks::blocking(move || meters.work()));
        }
    }

    /// The figure of `directory`, not waited for longer than until `deadline`. Absent: nothing is known yet.
    pub(crate) fn read(
        &self,
        meter: &Arc<Meter>,
        directory: impl FnOnce() -> PathBuf,
        deadline: Instant,
    ) -> Option<Counted> {
        self.begin(meter, directory);
        meter.read(deadline)
    }

    fn work(&self) {
        while let Some(mut walking) = self.next() {
            let began = Instant::now();
            let walked = walking.usage.run(&mut || began.elapsed() >= SLICE);
            walking.spent += began.elapsed();
            let mut counted = walking.usage.counted();
            let meter = Arc::clone(&walking.wanted.meter);
            let ended = walked == Progress::Done;
            if !ended && meter.progress(counted) && walking.spent < BUDGET {
                self.put_back(walking);
                continue;
            }
            self.make_room(&walking);
            counted.complete &= ended;
            meter.end(Some(counted), walking.spent);
        }
    }

    /// The next turn; absent: there is nothing to do, and one worker less.
    fn next(&self) -> Option<Walking> {
        loop {
            let wanted = {
                let mut queue = self.queue();
                if self.tasks.is_ending() {
                    *queue = Queue {
                        workers: queue.workers,
                        ..Queue::default()
                    };
                }
                match queue.new.pop_front() {
                    Some(wanted) => wanted,
                    None => {
                        let long = queue.long.pop_front();
                        if long.is_none() {
                            queue.workers -= 1;
                        }
                        return long;
                    }
                }
            };
            match Usage::at(&wanted.directory) {
                Ok(usage) => {
                    return Some(Walking {
                        wanted,
                        usage,
                        spent: Duration::ZERO,
                        long: false,
                    });
                }
                // There is no such layer (any more).
                Err(_gone) => wanted.meter.end(None, Duration::ZERO),
            }
        }
    }

    /// One that has not ended: it keeps its place or takes one, or begins anew when there is one.
    fn put_back(&self, mut walking: Walking) {
        let mut queue = self.queue();
        if !walking.long {
            if queue.places >= LONG {
                queue.parked.push_back(walking.wanted);
                return;
            }
            queue.places += 1;
            walking.long = true;
        }
        queue.long.push_back(walking);
    }

    /// One that has ended gives back its place.
    fn make_room(&self, walking: &Walking) {
        if !walking.long {
            return;
        }
        let mut queue = self.queue();
        queue.places = queue.places.saturating_sub(1);
        if let Some(parked) = queue.parked.pop_front() {
            queue.new.push_back(parked);
        }
    }
}

#[cfg(test)]
#[path = "meters_tests.rs"]
mod tests;

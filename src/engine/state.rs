//! The life of a pod and of a container, as pure functions: state x input -> state + effects.
//!
//! ```text
//! pod        Creating --Made--> Ready --Stop--> Stopping --Stopped--> Stopped --Remove--> Removing --Gone--> x
//!                                 |               |   ^                                     ^
//!                                 +--Died--> Unclean -+ Stop                (again: allowed)-+
//!                                                 ^-- StopFailed
//!
//! container  Creating --Made--> Created --Start--> Starting --Started--> Running --Exit--> Exited
//!                                  |                   +--StartFailed-------------------->  ^ |
//!                                  +--Exit, Lost------------------------------------------->+ |
//!                                  +--Remove--> Removing <-------------------------Remove-----+
//! ```
//!
//! An exit may overtake the reply that announces its container (the monitor sends both, two tasks read
//! them): it is kept until the reply is there, so that events keep their order. Whoever waits, locks or
//! does I/O is elsewhere; here is only what may follow what, and what must then be told to whom.

use serde::{Deserialize, Serialize};

use crate::base::container::{ContainerState, EventKind};
use crate::base::pod::PodState;

/// What a transition asks for, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Write the record.
    Record,
    /// Tell the listeners.
    Publish(EventKind),
}

/// The input does not fit the state: text for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is {state}")]
pub(crate) struct Refused {
    /// The state, as an adjective.
    pub(crate) state: &'static str,
}

/// State of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum PodPhase {
    /// Being made; nobody sees it.
    Creating,
    /// Its pause process runs.
    Ready,
    /// Being stopped.
    Stopping {
        /// `Stopped` was published.
        announced: bool,
    },
    /// Not ready, but its network, cgroups or processes may still be there: Stop is due (again).
    Unclean,
    /// Stopped; only records and directories are left.
    Stopped,
    /// Being removed; a restart goes on with it.
    Removing,
}

/// What happens to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PodInput {
    /// Everything is made.
    Made,
    /// Not everything could be made, nor undone: it is shown so that somebody removes it.
    Abandoned,
    /// Its pause process or its monitor is gone.
    Died,
    /// Somebody begins to stop it.
    Stop,
    /// The stop is complete.
    Stopped,
    /// A step of the stop failed.
    StopFailed,
    /// Somebody begins to remove it.
    Remove,
    /// The removal is complete.
    Gone,
}

impl PodPhase {
    /// What CRI shows.
    pub(crate) const fn shown(self) -> PodState {
        match self {
            Self::Ready => PodState::Ready,
            _ => PodState::NotReady,
        }
    }

    /// The state in words, after "it is".
    pub(crate) const fn adjective(self) -> &'static str {
        match self {
            Self::Creating => "still being made",
            Self::Ready => "running",
            Self::Stopping { .. } => "being stopped",
            Self::Unclean => "not ready",
            Self::Stopped => "stopped",
            Self::Removing => "being removed",
        }
    }

    /// The state after `input` and what is to be done.
    ///
    /// # Errors
    /// [`Refused`]: this input has no place in this state.
    pub(crate) fn next(self, input: PodInput) -> Result<(Self, &'static [Effect]), Refused> {
        use Effect::{Publish, Record};
        use EventKind::{Created, Deleted, Started, Stopped};
        Ok(match (self, input) {
            (Self::Creating, PodInput::Made) => {
                (Self::Ready, &[Record, Publish(Created), Publish(Started)])
            }
            (Self::Creating, PodInput::Abandoned) => {
                (Self::Unclean, &[Record, Publish(Created), Publish(Stopped)])
            }
            (Self::Ready, PodInput::Died) => (Self::Unclean, &[Record, Publish(Stopped)]),
            (Self::Ready, PodInput::Stop) => (Self::Stopping { announced: false }, &[Record]),
            (Self::Unclean, PodInput::Stop) => (Self::Stopping { announced: true }, &[Record]),
            (Self::Stopping { announced: false }, PodInput::Died) => {
                (Self::Stopping { announced: true }, &[Publish(Stopped)])
            }
            (Self::Stopping { announced: false }, PodInput::Stopped) => {
                (Self::Stopped, &[Record, Publish(Stopped)])
            }
            (Self::Stopping { announced: true }, PodInput::Stopped) => (Self::Stopped, &[Record]),
            (Self::Stopping { announced: false }, PodInput::StopFailed) => {
                (Self::Unclean, &[Record, Publish(Stopped)])
            }
            (Self::Stopping { announced: true }, PodInput::StopFailed) => {
                (Self::Unclean, &[Record])
            }
            (Self::Stopped, PodInput::Remove) => (Self::Removing, &[Record]),
            (Self::Removing, PodInput::Gone) => (Self::Removing, &[Publish(Deleted)]),
            // Repetitions: nothing to do.
            (Self::Stopped, PodInput::Stop | PodInput::Died | PodInput::Stopped)
            | (Self::Unclean, PodInput::Died)
            | (Self::Stopping { .. }, PodInput::Stop | PodInput::Died)
            | (Self::Removing, PodInput::Remove | PodInput::Stop | PodInput::Died) => (self, &[]),
            _ => {
                return Err(Refused {
                    state: self.adjective(),
                });
            }
        })
    }
}

/// State of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ContainerPhase {
    /// Being made; nobody sees it.
    Creating {
        /// Its process has ended already.
        ended: bool,
    },
    /// Its process waits before exec.
    Created,
    /// It was told to exec.
    Starting {
        /// Its process has ended already.
        ended: bool,
    },
    /// It runs.
    Running,
    /// Its first process ended.
    Exited,
    /// Being removed; a restart goes on with it.
    Removing,
}

/// What happens to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContainerInput {
    /// Everything is made.
    Made,
    /// Not everything could be made, nor undone: it is shown so that somebody removes it.
    Abandoned,
    /// Somebody begins to start it.
    Start,
    /// The exec happened.
    Started,
    /// The exec failed.
    StartFailed,
    /// Its first process ended, or nobody can know any more (`Lost`): with whatever code.
    Exit,
    /// Somebody begins to remove it; it does not run.
    Remove,
    /// The removal is complete.
    Gone,
}

impl ContainerPhase {
    /// What CRI shows.
    pub(crate) const fn shown(self) -> ContainerState {
        match self {
            Self::Creating { .. } | Self::Created | Self::Starting { .. } => {
                ContainerState::Created
            }
            Self::Running => ContainerState::Running,
            Self::Exited | Self::Removing => ContainerState::Exited,
        }
    }

    /// Its process may still be there.
    pub(crate) const fn alive(self) -> bool {
        !matches!(self, Self::Exited | Self::Removing)
    }

    /// The state in words, after "it is".
    pub(crate) const fn adjective(self) -> &'static str {
        match self {
            Self::Creating { .. } => "still being made",
            Self::Created => "created, not started",
            Self::Starting { .. } => "being started",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Removing => "being removed",
        }
    }

    /// The state after `input` and what is to be done.
    ///
    /// # Errors
    /// [`Refused`]: this input has no place in this state.
    pub(crate) fn next(self, input: ContainerInput) -> Result<(Self, &'static [Effect]), Refused> {
        use Effect::{Publish, Record};
        use EventKind::{Created, Deleted, Started, Stopped};
        Ok(match (self, input) {
            (Self::Creating { ended: false }, ContainerInput::Made) => {
                (Self::Created, &[Record, Publish(Created)])
            }
            (Self::Creating { ended: true }, ContainerInput::Made)
            | (Self::Creating { .. }, ContainerInput::Abandoned) => {
                (Self::Exited, &[Record, Publish(Created), Publish(Stopped)])
            }
            (Self::Creating { .. }, ContainerInput::Exit) => (Self::Creating { ended: true }, &[]),
            (Self::Created, ContainerInput::Start) => (Self::Starting { ended: false }, &[]),
            (Self::Starting { .. }, ContainerInput::Exit) => (Self::Starting { ended: true }, &[]),
            (Self::Starting { ended: false }, ContainerInput::Started) => {
                (Self::Running, &[Record, Publish(Started)])
            }
            (Self::Starting { ended: true }, ContainerInput::Started) => {
                (Self::Exited, &[Record, Publish(Started), Publish(Stopped)])
            }
            (Self::Starting { .. }, ContainerInput::StartFailed)
            | (Self::Created | Self::Running, ContainerInput::Exit) => {
                (Self::Exited, &[Record, Publish(Stopped)])
            }
            (Self::Created | Self::Exited, ContainerInput::Remove) => (Self::Removing, &[Record]),
            (Self::Removing, ContainerInput::Gone) => (Self::Removing, &[Publish(Deleted)]),
            // Repetitions: nothing to do.
            (Self::Exited | Self::Removing, ContainerInput::Exit)
            | (Self::Removing, ContainerInput::Remove) => (self, &[]),
            _ => {
                return Err(Refused {
                    state: self.adjective(),
                });
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a listener may have seen so far: the legal orders of events.
    fn legal(events: &[EventKind]) -> bool {
        use EventKind::{Created, Deleted, Started, Stopped};
        let order = |kind: &EventKind| match kind {
            Created => 0,
            Started => 1,
            Stopped => 2,
            Deleted => 3,
        };
        events.first().is_none_or(|kind| *kind == Created)
            && events
                .windows(2)
                .all(|pair| order(&pair[0]) < order(&pair[1]))
    }

    fn container_input() -> impl Strategy<Value = ContainerInput> {
        use ContainerInput::{Abandoned, Exit, Gone, Made, Remove, Start, StartFailed, Started};
        prop::sample::select(vec![
            Made,
            Made,
            Abandoned,
            Start,
            Started,
            StartFailed,
            Exit,
            Remove,
            Gone,
        ])
    }

    fn pod_input() -> impl Strategy<Value = PodInput> {
        use PodInput::{Abandoned, Died, Gone, Made, Remove, Stop, StopFailed, Stopped};
        prop::sample::select(vec![
            Made, Made, Abandoned, Died, Stop, Stopped, StopFailed, Remove, Gone,
        ])
    }

    /// The model: the facts that a container's history comes down to.
    #[derive(Default)]
    #[expect(
        clippy::struct_excessive_bools,
        reason = "each is one fact of the history"
    )]
    struct Facts {
        made: bool,
        started: bool,
        ended: bool,
        removing: bool,
    }

    proptest! {
        #[test]
        fn a_containers_life(inputs in prop::collection::vec(container_input(), 0..24)) {
            use ContainerInput::{Abandoned, Exit, Gone, Made, Remove, Start, StartFailed, Started};
            let mut phase = ContainerPhase::Creating { ended: false };
            let (mut facts, mut starting, mut events) = (Facts::default(), false, vec![]);
            for input in inputs {
                // The model says what is allowed.
                let allowed = match input {
                    Made | Abandoned => !facts.made,
                    Start => facts.made && !facts.ended && !starting && !facts.started && !facts.removing,
                    Started | StartFailed => starting,
                    Exit => true,
                    Remove => facts.made && !starting && (facts.ended || !facts.started),
                    Gone => facts.removing,
                };
                let was = phase;
                let Ok((next, effects)) = phase.next(input) else {
                    prop_assert!(!allowed, "{was:?} refuses {input:?}");
                    continue;
                };
                prop_assert!(allowed, "{was:?} takes {input:?}");
                phase = next;
                for effect in effects {
                    if let Effect::Publish(kind) = effect {
                        events.push(*kind);
                    }
                }
                match input {
                    Made => facts.made = true,
                    Abandoned => { facts.made = true; facts.ended = true; }
                    Start => starting = true,
                    Started => { starting = false; facts.started = true; }
                    StartFailed => { starting = false; facts.ended = true; }
                    Exit if !facts.removing => facts.ended = true,
                    Exit => {}
                    Remove => facts.removing = true,
                    Gone => break,
                }
                let shown = match (facts.removing || (facts.ended && facts.made && !starting), facts.started) {
                    (true, _) => ContainerState::Exited,
                    (false, true) => ContainerState::Running,
                    (false, false) => ContainerState::Created,
                };
                prop_assert_eq!(phase.shown(), shown);
                prop_assert!(legal(&events), "{:?}", events);
                prop_assert_eq!(events.contains(&EventKind::Created), facts.made);
                prop_assert_eq!(events.contains(&EventKind::Started), facts.started);
                prop_assert_eq!(
                    events.contains(&EventKind::Stopped),
                    facts.made && facts.ended && !starting
                );
            }
        }

        #[test]
        fn a_pods_life(inputs in prop::collection::vec(pod_input(), 0..24)) {
            let mut phase = PodPhase::Creating;
            let (mut was_listed, mut events) = (false, vec![]);
            for input in inputs {
                let was = phase;
                let Ok((next, effects)) = phase.next(input) else { continue };
                phase = next;
                for effect in effects {
                    if let Effect::Publish(kind) = effect {
                        events.push(*kind);
                    }
                }
                prop_assert!(legal(&events), "{:?}", events);
                // Ready once, never again; a changed phase is recorded or only announces.
                if phase.shown() == PodState::Ready {
                    prop_assert!(was == phase || was == PodPhase::Creating);
                }
                was_listed |= matches!(input, PodInput::Made | PodInput::Abandoned);
                prop_assert_eq!(was_listed, phase != PodPhase::Creating);
                // Removal only of what is stopped completely.
                if phase == PodPhase::Removing && was != phase {
                    prop_assert_eq!(was, PodPhase::Stopped);
                    prop_assert!(events.contains(&EventKind::Stopped));
                }
                if matches!(phase, PodPhase::Unclean | PodPhase::Stopped) {
                    prop_assert!(events.contains(&EventKind::Stopped));
                }
                if input == PodInput::Gone {
                    break;
                }
            }
        }
    }
}

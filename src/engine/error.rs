//! Why a verb failed, and what the caller can do about it.

use std::sync::Arc;

use crate::base::error::{HasKind, Kind, chain};
use crate::engine::state::Refused;
use crate::store::StoreError;

/// Why a verb failed. `kind` decides the gRPC code.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum EngineError {
    /// No such object.
    #[error("no {what} {id:?} on this node")]
    NotFound {
        /// `pod sandbox`, `container`, `image`.
        what: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// A prefix that fits several ids.
    #[error("{what} {id:?}: the prefix fits several ids, give more digits")]
    Ambiguous {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// The name is taken by another object.
    #[error("{what} {name} exists as {id}: remove it first, or raise metadata.attempt")]
    NameTaken {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// The name.
        name: String,
        /// Who has it.
        id: String,
    },
    /// The object's state forbids it.
    #[error("cannot {verb} {what} {id}")]
    State {
        /// `start`, `create a container in`, ...
        verb: &'static str,
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// Full id.
        id: String,
        /// The state.
        source: Refused,
    },
    /// The request cannot succeed as it is.
    #[error("{field} {value:?}: {mend}")]
    Invalid {
        /// Field of the request.
        field: &'static str,
        /// Its value.
        value: String,
        /// What to do.
        mend: String,
    },
    /// An image that a mount names is not here. The word is what kubelet knows.
    #[error("ImageVolumeMountFailed: {field}: image {image:?} is not on this node; pull it first")]
    Unmountable {
        /// Field of the request.
        field: String,
        /// As asked for.
        image: String,
    },
    /// This machine cannot do what the request asks for.
    #[error("{field}: this node cannot do that: {why}; {mend}")]
    Unable {
        /// Field of the request.
        field: &'static str,
        /// Why not.
        why: String,
        /// What to do.
        mend: &'static str,
    },
    /// A step of the work failed in a lower layer.
    #[error("{step}")]
    Step {
        /// What was tried, with its operands.
        step: String,
        /// What a caller can do.
        kind: Kind,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A record could not be written or read.
    #[error("the records of berth")]
    Store(#[from] StoreError),
    /// Steps of a clean-up failed; each was tried, all can be tried again.
    #[error("{what} {id}: {failures}")]
    CleanUp {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// Full id.
        id: String,
        /// Kind of the first failure.
        kind: Kind,
        /// `step: error`, joined by `; `.
        failures: String,
    },
    /// It took longer than the caller allowed.
    #[error("{what} was not done after {after_s} s")]
    Timeout {
        /// What.
        what: String,
        /// Seconds.
        after_s: u64,
    },
    /// Work failed, and so did its undoing: the object is listed and can be removed.
    #[error("{what} {id} could not be made ({cause}) nor undone; remove it: {failures}")]
    Abandoned {
        /// `pod sandbox`, `container`.
        what: &'static str,
        /// Full id.
        id: String,
        /// What a caller can do about the first failure.
        kind: Kind,
        /// Why it could not be made.
        cause: String,
        /// Why it could not be undone.
        failures: String,
    },
    /// An attached client did not take the output as fast as it came, and nobody waits for one.
    #[error(
        "attach to container {id}: the output ends here because the client reads it more slowly than it comes; all of it is in the \
         container's log"
    )]
    TooSlow {
        /// Full id.
        id: String,
    },
    /// The daemon is shutting down, or the work was given up.
    #[error("{what} was given up: berth is shutting down, try again")]
    GivenUp {
        /// What.
        what: &'static str,
    },
    /// The outcome of work that this call had joined.
    #[error(transparent)]
    Joined(Arc<Self>),
}

impl HasKind for EngineError {
    fn kind(&self) -> Kind {
        match self {
            Self::NotFound { .. } | Self::Unmountable { .. } => Kind::NotFound,
            Self::Ambiguous { .. } | Self::Invalid { .. } => Kind::InvalidArgument,
            Self::NameTaken { .. } => Kind::AlreadyExists,
            Self::State { .. } | Self::Unable { .. } => Kind::FailedPrecondition,
            Self::Step { kind, .. } | Self::CleanUp { kind, .. } | Self::Abandoned { kind, .. } => {
                *kind
            }
            Self::Store(error) => error.kind(),
            Self::Timeout { .. } => Kind::DeadlineExceeded,
            Self::TooSlow { .. } => Kind::ResourceExhausted,
            Self::GivenUp { .. } => Kind::Unavailable,
            Self::Joined(error) => error.kind(),
        }
    }
}

impl EngineError {
    /// A lower layer's error, with what was tried.
    pub(crate) fn step<E: HasKind + Send + Sync + 'static>(
        step: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |source| Self::Step {
            step,
            kind: source.kind(),
            source: Box::new(source),
        }
    }

    /// An operating system error of our own file work.
    pub(crate) fn io(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let step = step.into();
        move |source| Self::Step {
            kind: match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    Kind::ResourceExhausted
                }
                _ => Kind::Internal,
            },
            step,
            source: Box::new(source),
        }
    }

    /// No such pod sandbox.
    pub(crate) fn no_pod(id: &str) -> Self {
        Self::NotFound {
            what: "pod sandbox",
            id: id.to_owned(),
        }
    }

    /// No such container.
    pub(crate) fn no_container(id: &str) -> Self {
        Self::NotFound {
            what: "container",
            id: id.to_owned(),
        }
    }
}

/// Result of a verb.
pub(crate) type Result<T> = std::result::Result<T, EngineError>;

/// Runs every step of a clean-up and keeps every failure. Steps can be repeated.
#[derive(Debug, Default)]
pub(crate) struct CleanUp {
    kind: Option<Kind>,
    failures: Vec<String>,
}

impl CleanUp {
    /// Notes how a step went.
    pub(crate) fn note<E: HasKind>(&mut self, step: &str, outcome: std::result::Result<(), E>) {
        if let Err(error) = outcome {
            self.kind.get_or_insert(error.kind());
            self.failures.push(format!("{step}: {}", chain(&error)));
        }
    }

    /// The error of a call that failed with `cause` and whose undoing this was.
    pub(crate) fn after(
        self,
        cause: EngineError,
        what: &'static str,
        id: impl ToString,
    ) -> EngineError {
        if self.failures.is_empty() {
            return cause;
        }
        EngineError::Abandoned {
            what,
            id: id.to_string(),
            kind: cause.kind(),
            cause: chain(&cause),
            failures: self.failures.join("; "),
        }
    }

    /// Every step went well so far.
    pub(crate) fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }

    /// The failures as one error about an object.
    ///
    /// # Errors
    /// [`EngineError::CleanUp`] when any step failed.
    pub(crate) fn finish(self, what: &'static str, id: impl ToString) -> Result<()> {
        match self.kind {
            None => Ok(()),
            Some(kind) => Err(EngineError::CleanUp {
                what,
                id: id.to_string(),
                kind,
                failures: self.failures.join("; "),
            }),
        }
    }
}

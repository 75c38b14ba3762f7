//! One thing after the other, for one pod or container: the mailbox of its work.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A queue of turns, first come, first served. Never held by anything that waits for a person or for a
/// grace period: those wait beside it.
#[derive(Clone, Debug)]
pub(crate) struct Lane(Arc<Semaphore>);

/// The right to work, until dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Default for Lane {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(1)))
    }
}

impl Lane {
    /// Waits for the turn. Cancel-safe: a caller that gives up leaves the queue.
    pub(crate) async fn turn(&self) -> Turn {
        // The semaphore is never closed, so there is always a permit.
        Turn {
            _permit: Arc::clone(&self.0).acquire_owned().await.ok(),
        }
    }
}

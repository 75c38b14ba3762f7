//! Who owns the daemon's tasks: every task is spawned here, so that shutdown can wait for it.
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::{JoinHandle, JoinSet};

/// A set of tasks that end with the daemon. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tasks {
    set: Arc<Mutex<JoinSet<()>>>,
    ending: Arc<AtomicBool>,
}

impl Tasks {
    /// Runs `work` as a task of its own and returns a handle to its result. Dropping the handle does
    /// not cancel the work.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> tokio::sync::oneshot::Receiver<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        while set.try_join_next().is_some() {}
        set.spawn(async move {
            // The receiver may be gone: the client hung up, the work is done all the same.
            let _unheard = done.send(work.await).is_err();
        });
        result
    }

    /// Runs blocking work on the blocking pool.
    pub(crate) fn blocking<T: Send + 'static>(
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        tokio::task::spawn_blocking(work)
    }

    /// Tells long work that can be taken up again another day to stop.
    pub(crate) fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Is the daemon about to end? Long work asks now and then.
    pub(crate) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    /// Waits until every task has ended, at most `limit`; then aborts what is left and returns how many.
    pub(crate) async fn shutdown(&self, limit: Duration) -> usize {
        self.end();
        let mut set = std::mem::take(&mut *self.set.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while set.join_next().await.is_some() {} };
        if tokio::time::timeout(limit, all).await.is_ok() {
            return 0;
        }
        let left = set.len();
        set.shutdown().await;
        left
    }
}

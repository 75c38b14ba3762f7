//! The slow end of a pod's network: deleting its veth pair takes the kernel 10 to 20 ms. Done on a thread
//! of its own, so that no pod waits for another's end.

use std::sync::mpsc;

use crate::base::error::chain;
use crate::base::id::PodId;
use crate::network::bridge::links::Links;
use crate::network::bridge::{Job, STACK, conntrack};
use crate::network::error::{NetworkError, Result};
use crate::network::ports::Forward;

/// What to do.
#[derive(Debug)]
pub(crate) enum Task {
    /// Delete a pod's link, then tell the worker.
    Remove {
        /// Whose.
        pod: PodId,
        /// The host's end.
        link: String,
    },
    /// Delete a link nobody has a lease for.
    Sweep(String),
    /// Forget connections that began before these ports were forwarded.
    Flush(Vec<Forward>),
}

/// Starts the thread; it ends with the sender.
///
/// # Errors
///
/// The thread cannot start.
pub(crate) fn start(jobs: mpsc::Sender<Job>) -> Result<mpsc::Sender<Task>> {
    let (tasks, queue) = mpsc::channel();
    std::thread::Builder::new()
        .name("network-rm".into())
        .stack_size(STACK)
        .spawn(move || {
            while let Ok(task) = queue.recv() {
                run(task, &jobs);
            }
        })
        .map_err(NetworkError::system("start", "the removal thread"))?;
    Ok(tasks)
}

fn run(task: Task, jobs: &mpsc::Sender<Job>) {
    match task {
        Task::Remove { pod, link } => {
            let gone = delete(&link);
            if let Err(error) = &gone {
                tracing::warn!(pod.id = %pod, error = chain(error), "link not deleted");
            }
            let gone = gone.is_ok();
            let job: Job = Box::new(move |worker| worker.removed(pod, gone));
            // Nobody left to tell: the next daemon finds the lease and the link gone.
            let _ended = jobs.send(job).is_err();
        }
        Task::Sweep(link) => {
            if let Err(error) = delete(&link) {
                tracing::warn!(link, error = chain(&error), "stray link not deleted");
            }
        }
        Task::Flush(forwards) => flush(&forwards),
    }
}

fn delete(link: &str) -> Result<()> {
    Links::open()
        .map_err(NetworkError::system("open", "a netlink socket"))?
        .delete(link)
        .map_err(NetworkError::kernel("delete the link", link))
}

/// Forgets what the kernel remembers of UDP to these ports: a sender that was answered by nobody, or by
/// another pod, would stay with that as long as it sends.
pub(crate) fn flush(forwards: &[Forward]) {
    if let Err(refused) = conntrack::flush(forwards) {
        tracing::warn!(error = %refused, "connections not flushed");
    }
}

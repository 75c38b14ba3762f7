//! The built-in network: a bridge, a veth pair a pod, addresses from pools, rules by nftables. All of it
//! over netlink: no helper process.
//!
//! ```text
//! Network --job--> thread "network"  owns sockets, leases, ports; one job at a time
//!                     |    ^
//!             removal v    | done
//!                  thread "network-rm"  deletes veth pairs (slow), flushes connections
//! ```
//!
//! Both threads work in the network namespace of the thread that opened the network, which is the host's.

mod conntrack;
mod expressions;
mod forwarding;
pub(crate) mod links;
mod nftables;
mod remover;
pub(crate) mod routes;
mod setup;
mod worker;

#[cfg(test)]
mod tests;

#[cfg(test)]
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use crate::base::id::PodId;
use crate::base::pod::PortMapping;
use crate::network::error::{NetworkError, Result};
use crate::network::{Answer, Attachment, LivePod, NetworkConfig, NotReady, Provider};

use worker::Worker;

/// Work for the thread.
type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// What is answered from memory.
#[derive(Debug, Default)]
struct Shared {
    trouble: Option<NotReady>,
    info: serde_json::Value,
    notices: Vec<String>,
}

/// The built-in network.
#[derive(Debug)]
pub(crate) struct BridgeNetwork {
    jobs: mpsc::Sender<Job>,
    shared: Arc<Mutex<Shared>>,
}

impl BridgeNetwork {
    /// Starts the threads and reads the leases. Makes nothing: the bridge comes with the first pod.
    ///
    /// # Errors
    ///
    /// A pool is unfit, the leases cannot be read, or a socket cannot be opened.
    pub(crate) fn open(config: NetworkConfig) -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (opened, answer) = mpsc::channel();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (own, own_jobs) = (Arc::clone(&shared), jobs.clone());
        std::thread::Builder::new()
            .name("network".into())
            .stack_size(STACK)
            .spawn(move || match Worker::open(config, own, own_jobs) {
                Ok(mut worker) => {
                    // Whoever opened it waits for this.
                    let _unheard = opened.send(Ok(())).is_err();
                    worker.check();
                    while let (false, Ok(job)) = (worker.ended, queue.recv()) {
                        job(&mut worker);
                    }
                }
                Err(error) => drop(opened.send(Err(error))),
            })
            .map_err(NetworkError::system("start", "the network thread"))?;
        answer.recv().map_err(|_ended| NetworkError::Ended)??;
        Ok(Self { jobs, shared })
    }

    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker) -> Result<T> + Send + 'static,
    ) -> Answer<'_, T> {
        let (done, answer) = tokio::sync::oneshot::channel();
        let sent = self.jobs.send(Box::new(move |worker| {
            // Nobody listens where the caller gave up: the work is done all the same.
            let _unheard = done.send(work(worker)).is_err();
        }));
        Box::pin(async move {
            sent.map_err(|_ended| NetworkError::Ended)?;
            answer.await.map_err(|_ended| NetworkError::Ended)?
        })
    }
}

impl Drop for BridgeNetwork {
    /// Lets the threads end after the work they have. Pods and their links stay.
    fn drop(&mut self) {
        let _ended = self
            .jobs
            .send(Box::new(|worker| worker.ended = true))
            .is_err();
    }
}

/// Enough for what the threads do; only touched pages count.
const STACK: usize = 256 * 1024;

impl Provider for BridgeNetwork {
    fn attach(
        &self,
        pod: PodId,
        netns: OwnedFd,
        ports: Vec<PortMapping>,
    ) -> Answer<'_, Attachment> {
        self.call(move |worker| worker.attach(pod, netns, ports))
    }

    fn detach(&self, pod: PodId) -> Answer<'_, ()> {
        self.call(move |worker| worker.detach(pod))
    }

    fn restore(&self, live: Vec<LivePod>) -> Answer<'_, ()> {
        self.call(move |worker| worker.restore(live))
    }

    fn set_pod_cidr(&self, cidrs: String) -> Answer<'_, ()> {
        self.call(move |worker| worker.set_pod_cidr(&cidrs))
    }

    fn readiness(&self) -> std::result::Result<(), NotReady> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.trouble.clone().map_or(Ok(()), Err)
    }

    fn info(&self) -> serde_json::Value {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.info.clone()
    }

    fn notices(&self) -> Vec<String> {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.notices.clone()
    }

    fn shutdown_if_unused(&self) -> Answer<'_, ()> {
        Box::pin(async move {
            loop {
                let (idle, wait) = tokio::sync::oneshot::channel();
                let done = self
                    .call(move |worker| worker.shutdown_if_unused(idle))
                    .await?;
                if done {
                    return Ok(());
                }
                // A sender that is dropped means the same: look again.
                let _removed = wait.await.is_ok();
            }
        })
    }

    #[cfg(test)]
    fn leased(&self, pod: PodId) -> Answer<'_, Vec<IpAddr>> {
        self.call(move |worker| Ok(worker.leased(pod)))
    }
}

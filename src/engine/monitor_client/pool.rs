//! Monitors made ahead: a pod takes an idle one, another is started in the background.
//!
//! The monitor's program is read once, into a sealed memory file that all monitors run from: a file that is replaced
//! on disk changes nothing for this daemon, and nothing in a pod can write to it (CVE-2019-5736).

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::base::id::PodId;
use crate::base::tasks::Tasks;
use crate::engine::monitor_client::{Events, MonitorClient, MonitorError, QUICK, Result};
use crate::monitor::protocol::{Call, MAX_PACKET, Message, Reply, Request};
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::spawn::Spawn;
use crate::sys::{memfd, process, socket};

/// How long a new monitor may take to answer for the first time.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

/// What monitors are made of.
#[derive(Clone, Debug)]
pub(crate) struct MonitorConfig {
    /// The program `berth-monitor`.
    pub(crate) program: PathBuf,
    /// How many idle ones are kept ready.
    pub(crate) ready: usize,
    /// Cgroup directories that monitors join: the v2 one, or one for each v1 hierarchy. They exist.
    pub(crate) cgroups: Vec<PathBuf>,
    /// Their `oom_score_adj` (-999), as far as the machine lets them.
    pub(crate) oom_score_adj: i32,
}

/// Keeps idle monitors ready. Clones share it; idle ones end with the last clone.
#[derive(Clone, Debug)]
pub(crate) struct MonitorPool {
    shared: Arc<Shared>,
    tasks: Tasks,
}

#[derive(Debug)]
struct Shared {
    config: MonitorConfig,
    program: OwnedFd,
    idle: Mutex<Vec<Idle>>,
    /// Held while monitors are made ready. True: no more of them, the daemon ends.
    filling: Mutex<bool>,
}

/// A monitor without a pod. It ends when this is dropped.
#[derive(Debug)]
struct Idle {
    socket: Option<OwnedFd>,
    pid: u32,
    pidfd: Option<OwnedFd>,
}

impl Drop for Idle {
    /// Closing the socket ends it at once; it is reaped here.
    fn drop(&mut self) {
        self.socket = None;
        if let Some(pidfd) = &self.pidfd {
            let mut set = [PollFd::new(pidfd, PollFlags::IN)];
            let _ended = poll(&mut set, Some(Duration::from_secs(2)));
            let _reaped = process::try_wait(pidfd.as_fd());
        }
    }
}

impl MonitorPool {
    /// Loads the monitor's program and starts the first idle monitors.
    ///
    /// # Errors
    /// The program cannot be read or does not run.
    pub(crate) async fn new(config: MonitorConfig, tasks: Tasks) -> Result<Self> {
        let load = move || {
            let path = config.program.display().to_string();
            let bytes =
                std::fs::read(&config.program).map_err(MonitorError::io(format!("read {path}")))?;
            let program = memfd::program("berth-monitor", &bytes)
                .map_err(MonitorError::io("memfd_create for berth-monitor"))?;
            let shared = Shared {
                config,
                program,
                idle: Mutex::default(),
                filling: Mutex::default(),
            };
            shared.fill()?;
            Ok(Arc::new(shared))
        };
        let shared = blocking(load).await?;
        Ok(Self { shared, tasks })
    }

    /// A monitor for this pod, whose directory exists; its socket and exit records are made there.
    ///
    /// # Errors
    /// [`MonitorError`]; no monitor of this pod is left then.
    pub(crate) async fn take(
        &self,
        pod_id: PodId,
        directory: &Path,
    ) -> Result<(MonitorClient, Events)> {
        let ready = self.shared.idle().pop();
        let adopted = match ready {
            Some(idle) => self.adopt(idle, pod_id, directory).await,
            None => Err(MonitorError::Lost { call: "adopt" }),
        };
        let result = match adopted {
            // There was none, or it had died meanwhile.
            Err(MonitorError::Lost { .. }) => {
                let shared = Arc::clone(&self.shared);
                let idle = blocking(move || shared.spawn()).await?;
                self.adopt(idle, pod_id, directory).await
            }
            other => other,
        };
        let shared = Arc::clone(&self.shared);
        let _in_the_background = self.tasks.spawn(async move {
            // A failure shows when the next pod needs a monitor.
            let _filled = blocking(move || shared.fill()).await;
        });
        result
    }

    /// A monitor without a pod, which ends with this daemon at the latest: a later one must not take it for a pod's.
    ///
    /// # Errors
    /// [`MonitorError`]; no monitor is left then.
    pub(crate) async fn lend(&self) -> Result<MonitorClient> {
        let shared = Arc::clone(&self.shared);
        let idle = blocking(move || shared.spawn()).await?;
        let (client, _no_events) = self.client(idle)?;
        Ok(client)
    }

    /// A user namespace that no pod uses, made by a monitor of its own: for finding out what this machine can do.
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: the kernel makes none.
    pub(crate) async fn user_namespace(&self) -> Result<OwnedFd> {
        const CALL: &str = "user namespace";
        let shared = Arc::clone(&self.shared);
        let mappings = vec![(0, 65536, 65536)];
        let work = move || {
            let idle = shared.spawn()?;
            let lost = || MonitorError::Lost { call: CALL };
            let socket = idle.socket.as_ref().ok_or_else(lost)?;
            let call = Call::UserNamespace {
                uid_mappings: mappings.clone(),
                gid_mappings: mappings,
                network: false,
            };
            ask(socket, CALL, call)?.pop().ok_or_else(lost)
        };
        blocking(work).await
    }

    /// Ends the idle monitors, one that is being made ready too, and waits for that. No pod is to come any more. Blocks.
    pub(crate) fn end_idle(&self) {
        *self.shared.filling() = true;
        let idle = std::mem::take(&mut *self.shared.idle());
        drop(idle);
    }

    fn client(&self, mut idle: Idle) -> Result<(MonitorClient, Events)> {
        match (idle.socket.take(), idle.pidfd.take()) {
            (Some(socket), Some(pidfd)) => MonitorClient::new(socket, idle.pid, pidfd, &self.tasks),
            _ => Err(MonitorError::Lost { call: "adopt" }),
        }
    }

    async fn adopt(
        &self,
        idle: Idle,
        pod_id: PodId,
        directory: &Path,
    ) -> Result<(MonitorClient, Events)> {
        let (client, events) = self.client(idle)?;
        let call = Call::Adopt {
            pod_id,
            directory: directory.to_owned(),
        };
        match client.done("adopt", call, Vec::new(), QUICK).await {
            Ok(_none) => Ok((client, events)),
            Err(error) => {
                let _best_effort = client.kill_monitor().await;
                Err(error)
            }
        }
    }
}

impl Shared {
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn filling(&self) -> std::sync::MutexGuard<'_, bool> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts monitors until as many as wanted are idle. Blocks.
    fn fill(&self) -> Result<()> {
        let ended = self.filling();
        while !*ended && self.idle().len() < self.config.ready {
            let idle = self.spawn()?;
            self.idle().push(idle);
        }
        Ok(())
    }

    /// Starts one monitor and puts it where monitors belong. Blocks.
    fn spawn(&self) -> Result<Idle> {
        let (ours, theirs) = socket::pair().map_err(MonitorError::io("socketpair"))?;
        let child = Spawn::descriptor(self.program.as_fd(), "berth-monitor")
            .pass(theirs.as_fd())
            .session()
            .start()
            .map_err(|source| MonitorError::Spawn { source })?;
        drop(theirs);
        let idle = Idle {
            socket: Some(ours),
            pid: child.pid,
            pidfd: Some(child.pidfd),
        };
        if let Some(socket) = &idle.socket {
            self.prepare(socket)?;
        }
        Ok(idle)
    }

    fn prepare(&self, socket: &OwnedFd) -> Result<()> {
        let call = Call::Prepare {
            cgroups: self.config.cgroups.clone(),
            oom_score_adj: self.config.oom_score_adj,
        };
        ask(socket, "prepare", call).map(drop)
    }
}

/// A call to an idle monitor, which it answers by `Done`. Blocks.
fn ask(socket: &OwnedFd, name: &'static str, call: Call) -> Result<Vec<OwnedFd>> {
    let request = Request { sequence: 0, call };
    let packet = postcard::to_allocvec(&request).map_err(|source| MonitorError::Plan { source })?;
    let lost = |_closed| MonitorError::Lost { call: name };
    socket::send(socket.as_fd(), &packet, &[]).map_err(lost)?;
    let mut set = [PollFd::new(socket, PollFlags::IN)];
    let ready = poll(&mut set, Some(FIRST_ANSWER)).map_err(MonitorError::io("poll"))?;
    if ready == 0 {
        return Err(MonitorError::Deadline {
            call: name,
            after: FIRST_ANSWER,
        });
    }
    let mut buffer = vec![0; MAX_PACKET];
    let received = socket::receive(socket.as_fd(), &mut buffer).map_err(lost)?;
    match postcard::from_bytes(&buffer[..received.bytes]) {
        Ok(Message::Reply { reply, .. }) => match reply {
            Reply::Done => Ok(received.descriptors),
            Reply::Failed(fault) => Err(MonitorError::Refused { call: name, fault }),
            _ => Err(MonitorError::Unexpected { call: name }),
        },
        Err(_) if received.bytes == 0 => Err(MonitorError::Lost { call: name }),
        _ => Err(MonitorError::Unexpected { call: name }),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    Tasks::blocking(work)
        .await
        .map_err(|join| MonitorError::Io {
            operation: "start a monitor".into(),
            source: std::io::Error::other(join),
        })?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that is made ready while the daemon ends would be in the way of what the daemon removes last.
    #[test]
    fn none_is_made_ready_after_the_end() {
        let shared = Shared {
            config: MonitorConfig {
                program: PathBuf::new(),
                ready: 1,
                cgroups: vec![],
                oom_score_adj: 0,
            },
            // It does not run: who starts it fails.
            program: memfd::program("none", b"none").unwrap(),
            idle: Mutex::default(),
            filling: Mutex::default(),
        };
        let pool = MonitorPool {
            shared: Arc::new(shared),
            tasks: Tasks::default(),
        };
        assert!(pool.shared.fill().is_err());
        pool.end_idle();
        pool.shared.fill().unwrap();
        assert!(pool.shared.idle().is_empty());
    }
}

//! The daemon's side of the monitor protocol: a connection to the monitor of one pod.
//!
//! ```text
//! MonitorPool::take ----+
//!                       +--> MonitorClient (calls, each with a deadline) + receiver of MonitorEvents
//! MonitorClient::connect+        |
//!                                +-- one reader task: replies to who asked, events to the receiver
//! ```
//! The connection closes when the last clone of the client is dropped; the monitor and its containers go on.

mod call;
mod exec;
mod pool;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

use crate::base::clock::Timestamp;
use crate::base::error::{HasKind, Kind};
use crate::base::id::ContainerId;
use crate::base::tasks::Tasks;
use crate::monitor::protocol::{
    Call, ContainerExit, Event, MAX_PACKET, Message, MonitorState, Reply, Request, VERSION,
};
use crate::runtime::plan::Fault;
use crate::sys::spawn::SpawnError;
use crate::sys::{fd, process, socket};

pub(crate) use call::{Created, NewContainer};
pub(crate) use exec::{Execution, Streams};
pub(crate) use pool::{MonitorConfig, MonitorPool};

/// Deadline of calls that the monitor answers at once.
const QUICK: Duration = Duration::from_secs(20);
/// Deadline of calls that set a process up: a little more than the monitor's own.
const SETUP: Duration = Duration::from_secs(115);
/// Deadline of calls that wait for processes to die.
const END: Duration = Duration::from_secs(60);

/// Why a call to a monitor failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum MonitorError {
    /// The monitor (or its connection) is gone.
    #[error("{call}: the monitor of this pod is gone")]
    Lost {
        /// Which call.
        call: &'static str,
    },
    /// Nobody listens on the pod's socket: the monitor has ended.
    #[error("connect to the monitor at {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// The monitor did it, failed, and undid it.
    #[error("{call}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// What failed, as data.
        #[source]
        fault: Fault,
    },
    /// No answer in time.
    #[error("{call}: no answer within {} ms", after.as_millis())]
    Deadline {
        /// Which call, or `exec` for the command of an `ExecSync`.
        call: &'static str,
        /// The time it was given.
        after: Duration,
    },
    /// The monitor's answer makes no sense: its version does not fit.
    #[error("{call}: the monitor answers with something else; is it of another version?")]
    Unexpected {
        /// Which call.
        call: &'static str,
    },
    /// The output of the commands that ran at the same time is more than the daemon holds.
    #[error(
        "the output was not kept: all commands that run now may have berth hold {} MiB; run fewer at a time, or stream it",
        limit >> 20
    )]
    NoRoom {
        /// Bytes.
        limit: usize,
    },
    /// A plan cannot be encoded.
    #[error("encode the plan")]
    Plan {
        /// Why.
        source: postcard::Error,
    },
    /// The monitor cannot be started.
    #[error("start a monitor")]
    Spawn {
        /// Why.
        source: SpawnError,
    },
    /// A system call of our own failed.
    #[error("{operation}")]
    Io {
        /// Which, and on what.
        operation: String,
        /// Its error.
        source: io::Error,
    },
}

impl MonitorError {
    /// The fault as the monitor or the child reported it.
    #[cfg(test)]
    pub(crate) const fn fault(&self) -> Option<&Fault> {
        match self {
            Self::Refused { fault, .. } => Some(fault),
            _ => None,
        }
    }

    fn io(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let operation = operation.into();
        move |source| Self::Io { operation, source }
    }
}

impl HasKind for MonitorError {
    fn kind(&self) -> Kind {
        match self {
            Self::Lost { .. } | Self::Connect { .. } => Kind::Unavailable,
            Self::Deadline { .. } => Kind::DeadlineExceeded,
            Self::NoRoom { .. } => Kind::ResourceExhausted,
            Self::Refused { fault, .. } => match (fault.stage.as_str(), fault.errno) {
                ("monitor", 0) => Kind::FailedPrecondition,
                (_, 110) => Kind::DeadlineExceeded,
                // ENOENT, ENOTDIR, ELOOP, EXDEV: the image has no such directory.
                (Fault::IMAGE_VOLUME, 2 | 20 | 40 | 18) => Kind::InvalidArgument,
                (_, 28 | 122) => Kind::ResourceExhausted,
                _ => Kind::Internal,
            },
            Self::Unexpected { .. } | Self::Plan { .. } | Self::Spawn { .. } | Self::Io { .. } => {
                Kind::Internal
            }
        }
    }
}

/// Result of a call.
pub(crate) type Result<T> = std::result::Result<T, MonitorError>;

/// What happened in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum MonitorEvent {
    /// Pause ended.
    SandboxExited {
        /// When.
        at: Timestamp,
    },
    /// A container ended; its log is complete, its cgroup empty.
    ContainerExited(ContainerExit),
    /// Poststart hooks of a container failed; it runs all the same.
    HookFailed {
        /// Container.
        id: ContainerId,
        /// What failed.
        fault: Fault,
    },
    /// The monitor is gone, or the connection to it. Nothing comes after this.
    Lost,
}

/// Events of one monitor, in order. Unbounded: a pod has few, and the reader must never wait for the engine.
pub(crate) type Events = mpsc::UnboundedReceiver<MonitorEvent>;

/// A connection to the monitor of one pod. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct MonitorClient {
    shared: Arc<Shared>,
    /// Dropped with the last clone; that ends the reader.
    _open: Arc<oneshot::Sender<()>>,
}

#[derive(Debug)]
struct Shared {
    socket: AsyncFd<OwnedFd>,
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    waiting: Mutex<Waiting>,
    next: AtomicU64,
    tasks: Tasks,
}

type Answer = (Reply, Vec<OwnedFd>);

#[derive(Debug, Default)]
struct Waiting {
    replies: HashMap<u64, oneshot::Sender<Answer>>,
    execs: HashMap<u64, oneshot::Sender<i32>>,
    lost: bool,
}

impl MonitorClient {
    /// Connects to the monitor of the pod with this directory, after a restart of the daemon.
    ///
    /// # Errors
    /// [`MonitorError::Connect`]: nobody is there any more; containers' exits may be in their records
    /// ([`crate::monitor::record::read`]).
    pub(crate) async fn connect(
        directory: &Path,
        tasks: &Tasks,
    ) -> Result<(Self, MonitorState, Events)> {
        let path = directory.join(crate::monitor::SOCKET);
        let target = path.clone();
        let fail = |source| MonitorError::Connect {
            path: path.clone(),
            source,
        };
        let socket = Tasks::blocking(move || socket::connect(&target))
            .await
            .map_err(|join| fail(io::Error::other(join)))?
            .map_err(fail)?;
        let (pid, _, _) = socket::peer_credentials(socket.as_fd())
            .map_err(MonitorError::io("getsockopt SO_PEERCRED"))?;
        let pidfd = process::pidfd_open(pid).map_err(fail)?;
        let (client, events) = Self::new(socket, pid, pidfd, tasks)?;
        let hello = Call::Hello { version: VERSION };
        match client.call("hello", hello, Vec::new(), QUICK).await?.0 {
            Reply::State(state) => Ok((client, *state, events)),
            _ => Err(MonitorError::Unexpected { call: "hello" }),
        }
    }

    fn new(socket: OwnedFd, pid: u32, pidfd: OwnedFd, tasks: &Tasks) -> Result<(Self, Events)> {
        fd::set_nonblocking(socket.as_fd(), true).map_err(MonitorError::io("fcntl O_NONBLOCK"))?;
        let shared = Arc::new(Shared {
            socket: register(socket, Interest::READABLE | Interest::WRITABLE)?,
            pid,
            pidfd: register(pidfd, Interest::READABLE)?,
            waiting: Mutex::default(),
            // Exec numbers must not come twice in a monitor's life, which may see many daemons.
            next: AtomicU64::new(u64::try_from(Timestamp::now().0).unwrap_or_default()),
            tasks: tasks.clone(),
        });
        let (open, closed) = oneshot::channel();
        let (sender, events) = mpsc::unbounded_channel();
        let reader = Arc::clone(&shared);
        let _runs_until_closed = tasks.spawn(async move {
            tokio::select! {
                () = reader.read(&sender) => reader.lose(&sender),
                _ = closed => {}
            }
        });
        let client = Self {
            shared,
            _open: Arc::new(open),
        };
        Ok((client, events))
    }

    /// Pid of the monitor, to find its children by. It is another's once the monitor is lost.
    pub(crate) fn pid(&self) -> u32 {
        self.shared.pid
    }

    /// Whether the monitor has ended, known to us or not. If not, [`Self::pid`] is still its own.
    ///
    /// # Errors
    /// The number of `poll(2)`.
    pub(crate) fn has_ended(&self) -> io::Result<bool> {
        process::has_ended(self.shared.pidfd.get_ref().as_fd())
    }

    /// One call and its reply. When the future is dropped, the monitor does it all the same.
    async fn call(
        &self,
        name: &'static str,
        call: Call,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Answer> {
        let sequence = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        {
            let mut waiting = self.shared.waiting();
            if waiting.lost {
                return Err(MonitorError::Lost { call: name });
            }
            waiting.replies.insert(sequence, sender);
        }
        let _forget = Forget(&self.shared, sequence);
        let packet = postcard::to_allocvec(&Request { sequence, call })
            .map_err(|source| MonitorError::Plan { source })?;
        let work = async {
            self.shared.send(&packet, &descriptors).await.ok()?;
            drop(descriptors);
            answer.await.ok()
        };
        match tokio::time::timeout(limit, work).await {
            Err(_elapsed) => Err(MonitorError::Deadline {
                call: name,
                after: limit,
            }),
            Ok(None) => Err(MonitorError::Lost { call: name }),
            Ok(Some((Reply::Failed(fault), _))) => Err(MonitorError::Refused { call: name, fault }),
            Ok(Some(answer)) => Ok(answer),
        }
    }

    /// A call that is answered by `Done`.
    async fn done(
        &self,
        name: &'static str,
        call: Call,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Vec<OwnedFd>> {
        match self.call(name, call, descriptors, limit).await? {
            (Reply::Done, descriptors) => Ok(descriptors),
            _ => Err(MonitorError::Unexpected { call: name }),
        }
    }
}

/// Forgets who waits for a reply when the wait ends in whatever way.
struct Forget<'a>(&'a Shared, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let _answered = self.0.waiting().replies.remove(&self.1);
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn send(&self, packet: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
        let borrowed = || socket::borrow(descriptors);
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                socket::send(socket.as_fd(), packet, &borrowed())
            })
            .await
    }

    /// Hands on what the monitor says until it is gone.
    async fn read(&self, events: &mpsc::UnboundedSender<MonitorEvent>) {
        loop {
            let message = tokio::select! {
                message = self.socket.async_io(Interest::READABLE, receive) => message,
                // Children that have not executed yet may hold copies of the socket: no end of file then.
                _ended = self.pidfd.readable() => {
                    while let Ok(Some((message, descriptors))) = receive(self.socket.get_ref()) {
                        self.hand_on(message, descriptors, events);
                    }
                    return;
                }
            };
            match message {
                Ok(Some((message, descriptors))) => self.hand_on(message, descriptors, events),
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn hand_on(
        &self,
        message: Message,
        descriptors: Vec<OwnedFd>,
        events: &mpsc::UnboundedSender<MonitorEvent>,
    ) {
        let event = match message {
            Message::Reply { sequence, reply } => {
                let asked = self.waiting().replies.remove(&sequence);
                if let Some(asked) = asked {
                    let _gave_up = asked.send((reply, descriptors)).is_err();
                }
                return;
            }
            Message::Event(Event::ExecExited { exec, code }) => {
                let asked = self.waiting().execs.remove(&exec);
                if let Some(asked) = asked {
                    let _gave_up = asked.send(code).is_err();
                }
                return;
            }
            Message::Event(Event::SandboxExited { at }) => MonitorEvent::SandboxExited { at },
            Message::Event(Event::ContainerExited(exit)) => MonitorEvent::ContainerExited(exit),
            Message::Event(Event::HookFailed { id, fault }) => {
                MonitorEvent::HookFailed { id, fault }
            }
        };
        let _nobody_listens = events.send(event).is_err();
    }

    /// The connection is gone: whoever waits hears it, and the monitor is reaped if it was ours.
    fn lose(&self, events: &mpsc::UnboundedSender<MonitorEvent>) {
        let waiting = std::mem::replace(
            &mut *self.waiting(),
            Waiting {
                lost: true,
                ..Waiting::default()
            },
        );
        drop(waiting);
        let _not_ours = process::try_wait(self.pidfd.get_ref().as_fd());
        let _nobody_listens = events.send(MonitorEvent::Lost).is_err();
    }
}

/// Puts a descriptor into the event loop.
#[expect(
    deprecated,
    reason = "unsound only for types whose descriptor changes; `register` is unsafe"
)]
fn register(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest).map_err(MonitorError::io("epoll_ctl"))
}

/// One message; `None`: the end. The buffer is shared by all connections read on this thread.
fn receive(socket: &OwnedFd) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    thread_local! {
        static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(MAX_PACKET, 0);
        let received = socket::receive(socket.as_fd(), buffer)?;
        if received.bytes == 0 {
            return Ok(None);
        }
        let message = postcard::from_bytes(&buffer[..received.bytes])
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some((message, received.descriptors)))
    })
}

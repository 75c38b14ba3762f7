//! Execs: with descriptors, with a terminal, and `ExecSync`.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout};

use crate::base::id::ContainerId;
use crate::engine::ExecOutput;
use crate::engine::monitor_client::call::sealed;
use crate::engine::monitor_client::{END, MonitorClient, MonitorError, QUICK, Result, SETUP};
use crate::monitor::protocol::{Call, Reply};
use crate::runtime::plan::ExecPlan;
use crate::sys::fd;

/// How long the output of a command that has ended is waited for when somebody else holds it open.
const DRAIN: Duration = Duration::from_secs(1);

/// Size of a read whose bytes are dropped.
const READ: usize = 16 * 1024;

/// Streams of an exec without a terminal; what is absent is `/dev/null`.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    /// It reads from this.
    pub(crate) stdin: Option<OwnedFd>,
    /// It writes to this.
    pub(crate) stdout: Option<OwnedFd>,
    /// It writes errors to this.
    pub(crate) stderr: Option<OwnedFd>,
}

impl Streams {
    /// What the call passes.
    fn descriptors(self, plan: &ExecPlan) -> Result<Vec<OwnedFd>> {
        let mut descriptors = vec![sealed(plan.encode())?];
        for stream in [self.stdin, self.stdout, self.stderr] {
            descriptors.push(stream.map_or_else(null, Ok)?);
        }
        Ok(descriptors)
    }
}

/// Kills an exec that nobody waits for any more.
struct Unheard<'a> {
    client: &'a MonitorClient,
    number: u64,
    over: bool,
}

impl Drop for Unheard<'_> {
    fn drop(&mut self) {
        if self.over || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let (client, number) = (self.client.clone(), self.number);
        let _on_its_own = self.client.shared.tasks.spawn(async move {
            let _best_effort = client.kill_exec(number).await;
        });
    }
}

/// A running exec.
#[derive(Debug)]
pub(crate) struct Execution {
    /// Its number, for [`MonitorClient::kill_exec`].
    pub(crate) number: u64,
    /// Gives the exit code (128+n for signal n) when it ends; an error when the monitor is lost.
    pub(crate) exit: oneshot::Receiver<i32>,
}

impl MonitorClient {
    /// Runs one more process in a container.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] with the exec's fault, or another. Nothing runs then.
    pub(crate) async fn exec(
        &self,
        id: ContainerId,
        plan: &ExecPlan,
        streams: Streams,
    ) -> Result<Execution> {
        let descriptors = streams.descriptors(plan)?;
        let number = self.number();
        let (execution, _none) = self.execute(id, number, descriptors).await?;
        Ok(execution)
    }

    /// Runs one more process in a container with a terminal (the plan says so too); the master is ours alone:
    /// when it is closed, the process is hung up.
    ///
    /// # Errors
    /// As [`MonitorClient::exec`].
    pub(crate) async fn exec_terminal(
        &self,
        id: ContainerId,
        plan: &ExecPlan,
    ) -> Result<(Execution, OwnedFd)> {
        let descriptors = vec![sealed(plan.encode())?];
        let number = self.number();
        let (execution, master) = self.execute(id, number, descriptors).await?;
        let master = master.ok_or(MonitorError::Unexpected { call: "exec" })?;
        Ok((execution, master))
    }

    /// A number for a new exec.
    fn number(&self) -> u64 {
        self.shared.next.fetch_add(1, Ordering::Relaxed)
    }

    async fn execute(
        &self,
        id: ContainerId,
        number: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(Execution, Option<OwnedFd>)> {
        let (sender, exit) = oneshot::channel();
        self.shared.waiting().execs.insert(number, sender);
        let call = Call::Exec { id, exec: number };
        let answer = self.call("start exec", call, descriptors, SETUP).await;
        match answer {
            Ok((Reply::Executed { .. }, master)) => {
                let execution = Execution { number, exit };
                Ok((execution, master.into_iter().next()))
            }
            other => {
                self.shared.waiting().execs.remove(&number);
                Err(other
                    .err()
                    .unwrap_or(MonitorError::Unexpected { call: "start exec" }))
            }
        }
    }

    /// Kills an exec's process and all its descendants; fine when it has ended.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn kill_exec(&self, number: u64) -> Result<()> {
        let call = Call::KillExec { exec: number };
        self.done("kill exec", call, Vec::new(), QUICK)
            .await
            .map(drop)
    }

    /// Runs a command to its end and collects its output, each stream up to `cap` bytes; what is beyond is read
    /// and dropped. Returns when the command has ended and its output too, or a second later where a process that
    /// it left behind holds the output open.
    ///
    /// # Errors
    /// [`MonitorError::Deadline`]: `limit` is over; the command and its descendants are killed (also when the future
    /// is dropped before). Else as [`MonitorClient::exec`].
    pub(crate) async fn exec_sync(
        &self,
        id: ContainerId,
        plan: &ExecPlan,
        cap: usize,
        limit: Option<Duration>,
    ) -> Result<ExecOutput> {
        let started = Instant::now();
        let pipe = || fd::pipe().map_err(MonitorError::io("pipe2"));
        let ((stdout, stdout_writer), (stderr, stderr_writer)) = (pipe()?, pipe()?);
        let reader =
            |end| pipe::Receiver::from_owned_fd(end).map_err(MonitorError::io("epoll_ctl"));
        let (mut stdout, mut stderr) = (reader(stdout)?, reader(stderr)?);
        let streams = Streams {
            stdin: None,
            stdout: Some(stdout_writer),
            stderr: Some(stderr_writer),
        };
        let number = self.number();
        let mut guard = Unheard {
            client: self,
            number,
            over: false,
        };
        let deadline = limit.map(|limit| started + limit);
        let late = || MonitorError::Deadline {
            call: "exec",
            after: limit.unwrap_or_default(),
        };
        let descriptors = streams.descriptors(plan)?;
        let executed = tokio::select! {
            executed = self.execute(id, number, descriptors) => executed,
            () = until(deadline) => return Err(late()),
        };
        let (mut execution, _none) = executed?;
        let mut output = ExecOutput::default();
        let mut collected = Box::pin(async {
            tokio::join!(
                collect(&mut stdout, &mut output.stdout, cap),
                collect(&mut stderr, &mut output.stderr, cap),
            )
        });
        let mut complete = false;
        let code = loop {
            tokio::select! {
                code = &mut execution.exit => break Some(code),
                _ends = &mut collected, if !complete => complete = true,
                () = until(deadline) => break None,
            }
        };
        guard.over = true;
        let Some(code) = code else {
            self.kill_exec(number).await?;
            let _killed = timeout(END, execution.exit).await;
            return Err(late());
        };
        if complete {
            drop(collected);
        } else {
            let _held_open = timeout(DRAIN, collected).await;
        }
        output.exit_code = code.map_err(|_closed| MonitorError::Lost { call: "exec" })?;
        Ok(output)
    }
}

/// Waits until then; for ever without a time.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Reads to the end, keeping the first `cap` bytes.
async fn collect(reader: &mut pipe::Receiver, kept: &mut Vec<u8>, cap: usize) {
    let mut dropped = Vec::new();
    loop {
        let room = u64::try_from(cap - kept.len()).unwrap_or(u64::MAX);
        let read = if room > 0 {
            (&mut *reader).take(room).read_buf(kept).await
        } else {
            dropped.clear();
            dropped.reserve(READ);
            reader.read_buf(&mut dropped).await
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(_count) => {}
        }
    }
}

/// An end for a stream that nobody wants.
fn null() -> Result<OwnedFd> {
    std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(MonitorError::io("open /dev/null"))
}

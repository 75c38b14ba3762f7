//! Execs: with descriptors, with a terminal, and `ExecSync`.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// Output that all commands of `ExecSync` may have the daemon hold while they run.
static ROOM: Room = Room::new(256 << 20);

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

/// Forgets who waits for the end of an exec that does not run (yet), when its set-up ends in whatever way.
struct Unstarted<'a> {
    client: &'a MonitorClient,
    number: Option<u64>,
}

impl Drop for Unstarted<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.client.shared.waiting().execs.remove(&number);
        }
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
        // Until it runs: only then an exit of it will come, in whose place the entry is.
        let mut unstarted = Unstarted {
            client: self,
            number: Some(number),
        };
        let call = Call::Exec { id, exec: number };
        let answer = self.call("start exec", call, descriptors, SETUP).await;
        match answer {
            Ok((Reply::Executed { .. }, master)) => {
                unstarted.number = None;
                let execution = Execution { number, exit };
                Ok((execution, master.into_iter().next()))
            }
            other => Err(other
                .err()
                .unwrap_or(MonitorError::Unexpected { call: "start exec" })),
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
    /// [`MonitorError::NoRoom`]: commands that ran at the same time wrote more, all together, than the daemon holds.
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
        let (mut out_held, mut err_held) = (Held::of(&ROOM), Held::of(&ROOM));
        let mut collected = Box::pin(async {
            tokio::join!(
                collect(&mut stdout, &mut output.stdout, cap, &mut out_held),
                collect(&mut stderr, &mut output.stderr, cap, &mut err_held),
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
        if out_held.refused || err_held.refused {
            return Err(MonitorError::NoRoom { limit: ROOM.limit });
        }
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

/// Bytes that may be held at a time, whoever holds them.
#[derive(Debug)]
struct Room {
    limit: usize,
    held: AtomicUsize,
}

impl Room {
    const fn new(limit: usize) -> Self {
        Self {
            limit,
            held: AtomicUsize::new(0),
        }
    }
}

/// What one stream holds of a [`Room`].
#[derive(Debug)]
struct Held<'a> {
    room: &'a Room,
    bytes: usize,
    /// There was no more room once.
    refused: bool,
}

impl<'a> Held<'a> {
    fn of(room: &'a Room) -> Self {
        Self {
            room,
            bytes: 0,
            refused: false,
        }
    }

    /// Holds so much more, or nothing any more.
    fn hold(&mut self, bytes: usize) {
        self.bytes += bytes;
        let before = self.room.held.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > self.room.limit {
            self.refused = true;
            self.release();
        }
    }

    fn release(&mut self) {
        self.room.held.fetch_sub(self.bytes, Ordering::Relaxed);
        self.bytes = 0;
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// Reads to the end, keeping the first `cap` bytes; none of them where there is no room for them.
async fn collect(reader: &mut pipe::Receiver, kept: &mut Vec<u8>, cap: usize, held: &mut Held<'_>) {
    let mut dropped = Vec::new();
    loop {
        let room = u64::try_from(cap - kept.len()).unwrap_or(u64::MAX);
        let keeps = room > 0 && !held.refused;
        let read = if keeps {
            (&mut *reader).take(room).read_buf(kept).await
        } else {
            dropped.clear();
            dropped.reserve(READ);
            reader.read_buf(&mut dropped).await
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(count) if keeps => {
                held.hold(count);
                if held.refused {
                    *kept = Vec::new();
                }
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn commands_share_the_room_for_their_output() {
        let room = Room::new(100);
        let read = async |text: &[u8], cap, held: &mut Held<'_>| {
            let (reader, writer) = fd::pipe().unwrap();
            std::io::Write::write_all(&mut std::fs::File::from(writer), text).unwrap();
            let mut kept = vec![];
            let mut reader = pipe::Receiver::from_owned_fd(reader).unwrap();
            collect(&mut reader, &mut kept, cap, held).await;
            kept.len()
        };
        let mut first = Held::of(&room);
        assert_eq!(read(&[b'x'; 500], 60, &mut first).await, 60);
        assert!(!first.refused);
        let mut second = Held::of(&room);
        assert_eq!(read(&[b'x'; 50], 60, &mut second).await, 0);
        assert!(second.refused, "60 and 50 are over 100");
        let mut third = Held::of(&room);
        assert_eq!(read(&[b'x'; 40], 60, &mut third).await, 40);
        drop((first, second, third));
        assert_eq!(room.held.load(Ordering::Relaxed), 0);
    }
}

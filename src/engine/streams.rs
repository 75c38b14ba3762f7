//! Exec, attach and port-forward: what the streaming server's sessions run on.
//!
//! A session ends with its command, its container, or its client, whichever is first. An exec whose client is gone is
//! killed with its descendants: nobody could ever hear of it again.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::base::error::{HasKind, chain};
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::container_create::{check_ready, monitor_of};
use crate::engine::container_exec::check_running;
use crate::engine::core::blocking;
use crate::engine::error::{EngineError, Result};
use crate::engine::lower::netns_of;
use crate::engine::monitor_client::{Execution, MonitorClient, Streams};
use crate::streaming::{Endpoint, EndpointError, Gone, Input, Output, Size, Stdio, Work};
use crate::sys::{fd, ns};

/// How long output may stay silent after the end of a command whose output somebody else still holds open.
const DRAIN: Duration = Duration::from_secs(1);
/// How long a connection to a port of a pod may take.
const DIAL: Duration = Duration::from_secs(10);
/// Bytes read at once.
const CHUNK: usize = 32 << 10;
/// Before a terminal that is hung up, and yet neither ends nor goes on, is tried again.
const HUNG_UP: Duration = Duration::from_millis(200);
/// How far an attached client may be behind each output, in bytes, beside what is on its way to it.
const BEHIND: usize = 1 << 20;

impl Engine {
    /// The full id of a running container, for Exec and Attach.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::State`].
    pub(crate) fn running_container(&self, verb: &'static str, id: &str) -> Result<String> {
        let container = self.core().container(id)?;
        check_running(verb, &container)?;
        Ok(container.id.to_string())
    }

    /// The full id of a ready pod, for PortForward.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::State`].
    pub(crate) fn ready_pod(&self, id: &str) -> Result<String> {
        let pod = self.core().pod(id)?;
        check_ready(&pod, "forward ports of")?;
        Ok(pod.id.to_string())
    }

    async fn stream_exec(&self, id: String, command: Vec<String>, stdio: Stdio) -> Result<i32> {
        let container = self.core().container(&id)?;
        check_running("exec in", &container)?;
        let monitor = monitor_of(&container.pod)?;
        let (engine, target, tty) = (self.clone(), Arc::clone(&container), stdio.tty);
        let plan = blocking("plan an exec", move || {
            engine
                .core()
                .lower
                .exec_plan(engine.core(), &target, command, tty)
        })
        .await?;
        let failed = EngineError::step("exec in the container");
        if tty {
            let (execution, master) = monitor
                .exec_terminal(container.id, &plan)
                .await
                .map_err(failed)?;
            return exec_on_terminal(&monitor, execution, master, stdio).await;
        }
        let (streams, mut pumps) = Pumps::open(&stdio)?;
        let execution = monitor
            .exec(container.id, &plan, streams)
            .await
            .map_err(failed)?;
        let ended = pumps.start(self, stdio);
        follow(&monitor, execution, ended).await
    }

    async fn stream_attach(&self, id: String, stdio: Stdio) -> Result<i32> {
        let container = self.core().container(&id)?;
        check_running("attach to", &container)?;
        let monitor = monitor_of(&container.pod)?;
        let Stdio {
            stdin,
            stdout,
            stderr,
            tty: _,
            mut resize,
            mut gone,
        } = stdio;
        let terminal = container.config.tty;
        let pipe = || fd::pipe().map_err(EngineError::io("make a pipe"));
        let ((out, out_to), (err, err_to), (news, news_to)) = (pipe()?, pipe()?, pipe()?);
        for wide in [&out, &err] {
            // Where the node forbids it, a client is cut off sooner.
            let _best_effort = fd::set_pipe_size(wide.as_fd(), BEHIND).is_err();
        }
        fd::set_nonblocking(news.as_fd(), true).map_err(EngineError::io("make a pipe"))?;
        let copies = if terminal {
            vec![out_to, news_to]
        } else {
            vec![out_to, err_to, news_to]
        };
        let input = monitor
            .attach(container.id, copies, stdin.is_some())
            .await
            .map_err(EngineError::step("attach to the container"))?;
        let (never, exited) = watch::channel(false);
        let feed = async {
            if let (Some(stdin), Some(to)) = (stdin, input) {
                feed(stdin, to).await;
            }
            std::future::pending::<()>().await;
        };
        let sizes = async {
            while let Some(size) = resize.recv().await {
                set_size(&monitor, &container, size).await;
            }
            std::future::pending::<()>().await;
        };
        let outputs = async {
            let stderr = async {
                if terminal {
                    Ok(())
                } else {
                    drain(err, stderr, exited.clone()).await
                }
            };
            tokio::join!(drain(out, stdout, exited.clone()), stderr)
        };
        tokio::select! {
            // The outputs end with the container, or because the client is too slow for them.
            _ends = outputs => {
                if fd::read(news.as_fd(), &mut [0]).is_ok_and(|count| count > 0) {
                    return Err(EngineError::TooSlow { id });
                }
            }
            () = feed => {}
            () = sizes => {}
            () = gone.wait() => {}
        }
        drop(never);
        Ok(0)
    }

    async fn dial_pod(&self, id: String, port: u16) -> Result<TcpStream> {
        let pod = self.core().pod(&id)?;
        check_ready(&pod, "forward ports of")?;
        let netns = if pod.host_network() {
            None
        } else {
            // Its pause may have ended since: then there is nowhere to connect, least of all on the node.
            Some(netns_of(&pod)?)
        };
        let sockets = blocking("open sockets in the pod", move || {
            let open = || {
                Ok((
                    socket(rustix::net::AddressFamily::INET)?,
                    socket(rustix::net::AddressFamily::INET6).ok(),
                ))
            };
            match netns {
                Some(netns) => ns::in_netns(netns.as_fd(), open),
                None => open(),
            }
            .map_err(EngineError::io("open sockets in the pod"))
        })
        .await?;
        let (v4, v6) = sockets;
        let connect = async {
            match v4
                .connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
                .await
            {
                Ok(stream) => Ok(stream),
                Err(first) => match v6 {
                    Some(v6) => v6
                        .connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
                        .await
                        .map_err(|_second| first),
                    None => Err(first),
                },
            }
        };
        let failed = EngineError::io("connect to the port in the pod");
        match timeout(DIAL, connect).await {
            Ok(result) => result.map_err(failed),
            Err(_elapsed) => Err(failed(std::io::ErrorKind::TimedOut.into())),
        }
    }
}

/// A TCP socket of the calling thread's network namespace.
fn socket(family: rustix::net::AddressFamily) -> std::io::Result<TcpSocket> {
    use rustix::net::{SocketFlags, SocketType, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, None)?;
    Ok(TcpSocket::from_std_stream(std::net::TcpStream::from(fd)))
}

async fn set_size(monitor: &MonitorClient, container: &Container, size: Size) {
    if let Err(error) = monitor.resize(container.id, size.width, size.height).await {
        tracing::debug!(error = %chain(&error), "terminal not resized");
    }
}

/// Our ends of a command's pipes, until they are pumped.
struct Pumps {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// How the pumping goes on.
struct Pumping {
    /// Tell it that the command has ended.
    exited: watch::Sender<bool>,
    /// All output has been sent.
    outputs: tokio::sync::oneshot::Receiver<()>,
    gone: Gone,
}

impl Pumps {
    fn open(stdio: &Stdio) -> Result<(Streams, Self)> {
        let pipe = |wanted: bool| {
            let pipe = wanted.then(fd::pipe).transpose();
            pipe.map_err(EngineError::io("make a pipe"))
                .map(Option::unzip)
        };
        let (stdin_from, stdin) = pipe(stdio.stdin.is_some())?;
        let (stdout, stdout_to) = pipe(stdio.stdout.is_some())?;
        let (stderr, stderr_to) = pipe(stdio.stderr.is_some())?;
        let streams = Streams {
            stdin: stdin_from,
            stdout: stdout_to,
            stderr: stderr_to,
        };
        Ok((
            streams,
            Self {
                stdin,
                stdout,
                stderr,
            },
        ))
    }

    fn start(&mut self, engine: &Engine, stdio: Stdio) -> Pumping {
        let Stdio {
            stdin,
            stdout,
            stderr,
            tty: _,
            resize: _,
            gone,
        } = stdio;
        let tasks = &engine.core().tasks;
        let (exited, news) = watch::channel(false);
        if let (Some(from), Some(to)) = (stdin, self.stdin.take()) {
            let mut ended = news.clone();
            drop(tasks.spawn(async move {
                tokio::select! {
                    () = feed(from, to) => {}
                    _ended = ended.wait_for(|ended| *ended) => {}
                }
            }));
        }
        let (out, err) = (self.stdout.take(), self.stderr.take());
        let outputs = tasks.spawn(async move {
            let one = |from: Option<OwnedFd>, to, news| async move {
                match from {
                    Some(from) => drain(from, to, news).await,
                    None => Ok(()),
                }
            };
            let (_out, _err) = tokio::join!(one(out, stdout, news.clone()), one(err, stderr, news));
        });
        Pumping {
            exited,
            outputs,
            gone,
        }
    }
}

/// Waits for the command's end and then for its output.
async fn follow(
    monitor: &MonitorClient,
    execution: Execution,
    mut pumping: Pumping,
) -> Result<i32> {
    let Execution { number, exit, .. } = execution;
    let code = tokio::select! {
        code = exit => code.map_err(|_lost| EngineError::io("follow the command")(
            std::io::Error::other("the pod's monitor is lost"),
        ))?,
        () = pumping.gone.wait() => {
            monitor.kill_exec(number).await.map_err(EngineError::step("kill the command"))?;
            return Ok(137);
        }
    };
    pumping.exited.send_replace(true);
    tokio::select! {
        _sent = pumping.outputs => {}
        () = pumping.gone.wait() => {}
    }
    Ok(code)
}

async fn exec_on_terminal(
    monitor: &MonitorClient,
    execution: Execution,
    master: OwnedFd,
    stdio: Stdio,
) -> Result<i32> {
    let Stdio {
        stdin,
        stdout,
        mut resize,
        mut gone,
        ..
    } = stdio;
    let io = |what| EngineError::io(what);
    let copy = |fd: &OwnedFd| fd.try_clone().map_err(io("copy the terminal's descriptor"));
    let (write_to, size_of) = (copy(&master)?, copy(&master)?);
    let (exited, news) = watch::channel(false);
    let Execution {
        number, mut exit, ..
    } = execution;
    let sizes = async {
        while let Some(Size { width, height }) = resize.recv().await {
            let size = rustix::termios::Winsize {
                ws_col: width,
                ws_row: height,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            if let Err(error) = rustix::termios::tcsetwinsize(&size_of, size) {
                tracing::debug!(%error, "terminal not resized");
            }
        }
        std::future::pending::<()>().await;
    };
    let input = async {
        if let Some(stdin) = stdin {
            feed(stdin, write_to).await;
        }
        std::future::pending::<()>().await;
    };
    let output = drain(master, stdout, news);
    tokio::pin!(sizes, input, output);
    let mut complete = false;
    let code = loop {
        tokio::select! {
            code = &mut exit => break code.unwrap_or(255),
            _end = &mut output, if !complete => complete = true,
            () = &mut sizes => {}
            () = &mut input => {}
            () = gone.wait() => {
                monitor.kill_exec(number).await.map_err(EngineError::step("kill the command"))?;
                return Ok(137);
            }
        }
    };
    exited.send_replace(true);
    if !complete {
        tokio::select! {
            _end = output => {}
            () = gone.wait() => {}
        }
    }
    Ok(code)
}

#[expect(
    deprecated,
    reason = "its successor is unsafe; an OwnedFd keeps its number for as long as it lives"
)]
fn asynchronous(fd: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    let interest = Interest::READABLE | Interest::WRITABLE;
    AsyncFd::with_interest(fd, interest)
}

/// Writes what the client sends until it ends its stream; then the descriptor is closed.
async fn feed(mut from: Input, to: OwnedFd) {
    let Ok(to) = asynchronous(to) else { return };
    while let Some(mut bytes) = from.recv().await {
        while !bytes.is_empty() {
            let Ok(mut ready) = to.writable().await else {
                return;
            };
            let closed = ready.ready().is_write_closed();
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), &bytes)?)) {
                Ok(Ok(written)) => drop(bytes.split_to(written)),
                // The reader has closed its end: the rest is nobody's.
                Ok(Err(_closed)) => return,
                // A hung-up terminal that is full takes nothing and does not fail; it is "ready" for ever.
                Err(_would_block) if closed => tokio::time::sleep(HUNG_UP).await,
                Err(_would_block) => {}
            }
        }
    }
}

/// Sends what the descriptor gives until its end, or until it is silent after the command's end. Without an output it
/// is read all the same, so that the writer never waits for nobody.
async fn drain(
    from: OwnedFd,
    to: Option<Output>,
    mut exited: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let from = asynchronous(from)?;
    let mut buffer = BytesMut::new();
    loop {
        buffer.resize(CHUNK, 0);
        let read = read_some(&from, &mut buffer);
        let length = tokio::select! {
            length = read => length?,
            () = silence(&mut exited) => 0,
        };
        if length == 0 {
            break;
        }
        buffer.truncate(length);
        let bytes: Bytes = buffer.split().freeze();
        if let Some(to) = &to
            && to.send(bytes).await.is_err()
        {
            return Ok(());
        }
    }
    if let Some(to) = to {
        to.end().await;
    }
    Ok(())
}

async fn silence(exited: &mut watch::Receiver<bool>) {
    // An error: the session itself has ended, nobody reads on.
    if exited.wait_for(|ended| *ended).await.is_ok() {
        tokio::time::sleep(DRAIN).await;
    }
}

/// Reads once; 0 is the end, also of a terminal that nobody holds any more (`EIO`).
async fn read_some(from: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        let mut ready = from.readable().await?;
        let closed = ready.ready().is_read_closed();
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?)) {
            Ok(Err(error))
                if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) =>
            {
                return Ok(0);
            }
            Ok(result) => return result,
            // A terminal that was hung up and opened again is "ready" for ever.
            Err(_would_block) if closed => tokio::time::sleep(HUNG_UP).await,
            Err(_would_block) => {}
        }
    }
}

/// The engine as the streaming server sees it.
#[derive(Clone, Debug)]
pub(crate) struct StreamEndpoint(pub(crate) Engine);

fn told<T>(result: Result<T>) -> std::result::Result<T, EndpointError> {
    result.map_err(|error| EndpointError {
        kind: error.kind(),
        message: chain(&error),
    })
}

impl Endpoint for StreamEndpoint {
    fn exec(&self, container: String, command: Vec<String>, stdio: Stdio) -> Work<i32> {
        let engine = self.0.clone();
        Box::pin(async move { told(engine.stream_exec(container, command, stdio).await) })
    }

    fn attach(&self, container: String, stdio: Stdio) -> Work<i32> {
        let engine = self.0.clone();
        Box::pin(async move { told(engine.stream_attach(container, stdio).await) })
    }

    fn dial(&self, pod: String, port: u16) -> Work<TcpStream> {
        let engine = self.0.clone();
        Box::pin(async move { told(engine.dial_pod(pod, port).await) })
    }
}

//! The same sessions over WebSocket.
//!
//! Remote command: the first byte of a message is its channel (0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize);
//! base64 variants send it as a digit and the rest encoded. v5 adds channel 255, whose payload names a channel that
//! the client closes. Port-forward: either SPDY in binary messages (`SPDY/3.1+portforward.k8s.io`), or for each port
//! a data (2n) and an error (2n+1) channel, each beginning with the port's number, low byte first.
//!
//! While the reading is held back by an input, a pong that nobody asked for goes out now and then (RFC 6455, 5.5.3): a client
//! that was killed meanwhile resets the connection for it (see [`while_beating`]).

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, Bytes};
use futures_util::future::BoxFuture;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Utf8Bytes, coding::CloseCode};
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

use super::channel::{
    Activity, Budget, Closed, Gone, Input, InputEnd, Output, Sink, Stdio, while_beating,
};
use super::http::Site;
use super::session::StreamRequest;
use super::{LINGER, port_forward as forward, remote_command as command};

/// Protocols of exec and attach.
pub(super) const COMMAND_PROTOCOLS: &[&str] = &[
    "v5.channel.k8s.io",
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];
/// SPDY in messages.
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";
/// Protocols of port-forward.
pub(super) const FORWARD_PROTOCOLS: &[&str] = &[
    TUNNEL,
    "v4.channel.k8s.io",
    "v4.base64.channel.k8s.io",
    "channel.k8s.io",
    "base64.channel.k8s.io",
];
/// Longest message taken, in bytes.
const MAX_MESSAGE: usize = 4 << 20;
/// Ports of one old-style port-forward.
const MAX_PORTS: usize = 127;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// The handshake's answer to a key.
pub(super) fn accept_key(key: &[u8]) -> String {
    tokio_tungstenite::tungstenite::handshake::derive_accept_key(key)
}

pub(super) async fn upgrade<S: AsyncRead + AsyncWrite + Unpin>(socket: S) -> WebSocketStream<S> {
    let config = WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(socket, Role::Server, Some(config)).await
}

/// Sends messages of one channel.
struct ChannelSink {
    channel: u8,
    base64: bool,
    writer: mpsc::Sender<Message>,
}

impl ChannelSink {
    fn message(&self, bytes: &[u8]) -> Message {
        if self.base64 {
            let text = format!("{}{}", self.channel, STANDARD.encode(bytes));
            return Message::text(text);
        }
        let mut message = Vec::with_capacity(bytes.len() + 1);
        message.push(self.channel);
        message.extend_from_slice(bytes);
        Message::binary(message)
    }
}

impl Sink for ChannelSink {
    fn send(&self, bytes: Bytes) -> BoxFuture<'_, Result<(), Closed>> {
        Box::pin(async move {
            self.writer
                .send(self.message(&bytes))
                .await
                .map_err(|_gone| Closed)
        })
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        // There is no end of one channel towards the client: the close of the connection says it.
        Box::pin(async {})
    }
}

/// Writes messages until nobody sends any more, and then the close; `false`: the client takes nothing any more.
async fn write_messages<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: SplitSink<WebSocketStream<S>, Message>,
    mut messages: mpsc::Receiver<Message>,
    activity: Activity,
) -> bool {
    while let Some(message) = messages.recv().await {
        let counts = !matches!(message, Message::Pong(_));
        if socket.feed(message).await.is_err() {
            return false;
        }
        if messages.is_empty() && socket.flush().await.is_err() {
            return false;
        }
        if counts {
            activity.touch();
        }
    }
    close(socket).await;
    true
}

/// What a session over messages has: where it sends, and the news of the client's end.
struct Messages {
    writer: mpsc::Sender<Message>,
    gone: Gone,
    activity: Activity,
    written: tokio::sync::oneshot::Receiver<()>,
}

impl Messages {
    /// Starts reading into `inputs` and writing. The client is gone when it leaves, when it takes nothing any more, and when
    /// nothing has gone either way for `idle`.
    async fn start<S>(
        socket: S,
        inputs: Vec<(u8, InputEnd)>,
        base64: bool,
        (site, idle): (&Site, Duration),
    ) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sink, stream) = upgrade(socket).await.split();
        let (writer, messages) = mpsc::channel(32);
        let (leaving, gone) = Gone::new();
        let (writing, mut over) = Gone::new();
        let activity = Activity::new();
        let (mut left, writes) = (
            gone.clone(),
            write_messages(sink, messages, activity.clone()),
        );
        let (told, written) = tokio::sync::oneshot::channel();
        drop(site.tasks.spawn(async move {
            let mut gone = left.clone();
            let late = async {
                gone.wait().await;
                tokio::time::sleep(LINGER).await;
            };
            let all = tokio::select! {
                all = writes => all,
                () = late => false,
            };
            let _session_over = told.send(()).is_err();
            if all {
                let _late = tokio::time::timeout(LINGER, left.wait()).await.is_err();
            }
            writing.send_replace(true);
        }));
        let (weak, own) = (writer.downgrade(), activity.clone());
        drop(site.tasks.spawn(async move {
            tokio::select! {
                () = read_messages(stream, inputs, base64, (weak, &activity)) => {}
                () = activity.silence(idle) => tracing::debug!("websocket was silent for too long"),
                () = over.wait() => {}
            }
            leaving.send_replace(true);
        }));
        Self {
            writer,
            gone,
            activity: own,
            written,
        }
    }

    /// Waits until all is written and the client has answered the close.
    async fn finish(self) {
        let Self {
            writer,
            mut gone,
            activity: _,
            written,
        } = self;
        drop(writer);
        let both = async {
            let _ended = written.await.is_err();
            gone.wait().await;
        };
        let _late = tokio::time::timeout(LINGER, both).await.is_err();
    }
}

/// Closes with a status (RFC 6455, 7.4.1): without one clients take the end for a failure (1005).
async fn close<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: SplitSink<WebSocketStream<S>, Message>,
) {
    let normal = CloseFrame {
        code: CloseCode::Normal,
        reason: Utf8Bytes::default(),
    };
    let _gone = socket.send(Message::Close(Some(normal))).await.is_err();
    let _gone = socket.close().await.is_err();
}

/// A message as (channel, payload).
pub(super) fn decode(message: Message, base64: bool) -> Option<(u8, Bytes)> {
    match message {
        Message::Binary(mut bytes) if !base64 && bytes.has_remaining() => {
            let channel = bytes.get_u8();
            Some((channel, bytes))
        }
        Message::Text(text) if base64 => {
            let (channel, rest) = text.as_str().split_at_checked(1)?;
            let channel = channel.parse().ok()?;
            Some((channel, STANDARD.decode(rest).ok()?.into()))
        }
        // Clients of the binary protocols may send text.
        Message::Text(text) => {
            let (channel, rest) = text.as_bytes().split_first()?;
            Some((*channel, Bytes::copy_from_slice(rest)))
        }
        _ => None,
    }
}

/// Hands messages to the inputs of their channels until the client leaves.
async fn read_messages<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: SplitStream<WebSocketStream<S>>,
    mut inputs: Vec<(u8, InputEnd)>,
    base64: bool,
    (writer, activity): (mpsc::WeakSender<Message>, &Activity),
) {
    let beat = || {
        if let Some(writer) = writer.upgrade() {
            let _busy = writer.try_send(Message::Pong(Bytes::new())).is_err();
        }
    };
    while let Some(Ok(message)) = socket.next().await {
        activity.touch();
        if matches!(message, Message::Close(_)) {
            return;
        }
        let Some((channel, bytes)) = decode(message, base64) else {
            continue;
        };
        if channel == CLOSE {
            inputs.retain(|(one, _)| bytes.first() != Some(one));
            continue;
        }
        let input = inputs.iter().find(|(one, _)| *one == channel);
        if let Some((_, input)) = input
            && !bytes.is_empty()
            && while_beating(input.send(bytes), beat).await.is_err()
        {
            inputs.retain(|(one, _)| *one != channel);
        }
    }
}

/// Serves an exec or attach.
pub(super) async fn remote_command<S>(
    socket: S,
    request: StreamRequest,
    protocol: &str,
    site: Site,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let flags = command::flags(&request)
        .cloned()
        .ok_or("no command to run")?;
    let base64 = protocol.contains("base64");
    let budget = Budget::new();
    let (stdin_to, stdin) = Input::new(&budget);
    let (resize_to, resize_input) = Input::new(&budget);
    let (sizes_to, resize) = mpsc::channel(8);
    drop(
        site.tasks
            .spawn(command::pass_sizes(resize_input, sizes_to)),
    );
    let mut inputs = vec![(RESIZE, resize_to)];
    if flags.stdin {
        inputs.push((0, stdin_to));
    }
    let limit = site.limits.idle + LINGER;
    let messages = Messages::start(socket, inputs, base64, (&site, limit)).await;
    let output = |channel| {
        Output::new(ChannelSink {
            channel,
            base64,
            writer: messages.writer.clone(),
        })
    };
    // Something must come first for clients that wait for the connection to be up.
    let first = ChannelSink {
        channel: if flags.stdout { 1 } else { ERROR },
        base64,
        writer: messages.writer.clone(),
    };
    messages
        .writer
        .send(first.message(&[]))
        .await
        .map_err(|_gone| "the client left")?;
    drop(first);
    let stdio = Stdio {
        stdin: flags.stdin.then_some(stdin),
        stdout: flags.stdout.then(|| output(1)),
        stderr: flags.stderr.then(|| output(2)),
        tty: flags.tty,
        resize,
        gone: messages.gone.clone(),
    };
    let result = command::work(request, stdio, &site, &messages.activity).await;
    let _gone = output(ERROR)
        .send(command::verdict(protocol, &result))
        .await
        .is_err();
    messages.finish().await;
    Ok(())
}

/// Serves a port-forward.
pub(super) async fn port_forward<S>(
    socket: S,
    pod: String,
    ports: Vec<u16>,
    protocol: &str,
    site: Site,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if protocol == TUNNEL {
        return tunnel(socket, pod, site).await;
    }
    if ports.is_empty() || ports.len() > MAX_PORTS {
        return Err(format!(
            "{} ports: name 1 to {MAX_PORTS} in the request",
            ports.len()
        ));
    }
    let base64 = protocol.contains("base64");
    let budget = Budget::new();
    let (mut inputs, mut forwards) = (vec![], vec![]);
    for (index, port) in (0u8..).zip(ports) {
        let (data_to, data) = Input::new(&budget);
        inputs.push((index * 2, data_to));
        forwards.push((index, port, data));
    }
    let limit = site.limits.idle;
    let messages = Messages::start(socket, inputs, base64, (&site, limit)).await;
    let mut sessions = vec![];
    for (index, port, data) in forwards {
        let channel = |channel| ChannelSink {
            channel,
            base64,
            writer: messages.writer.clone(),
        };
        let (data_out, error_out) = (channel(index * 2), channel(index * 2 + 1));
        for sink in [&data_out, &error_out] {
            let number = sink.message(&port.to_le_bytes());
            messages
                .writer
                .send(number)
                .await
                .map_err(|_gone| "the client left")?;
        }
        let (pod, gone, endpoint) = (pod.clone(), messages.gone.clone(), site.endpoint.clone());
        let patience = site.limits.half_closed;
        sessions.push(site.tasks.spawn(async move {
            let error = Output::new(error_out);
            let failure = match endpoint.dial(pod, port).await {
                Ok(socket) => {
                    let copied = forward::copy(socket, data, Output::new(data_out), gone, patience);
                    copied.await.err().map(|e| e.to_string())
                }
                Err(e) => Some(e.to_string()),
            };
            if let Some(text) = failure {
                let _gone = error
                    .send(format!("port {port}: {text}").into())
                    .await
                    .is_err();
            }
        }));
    }
    for session in sessions {
        let _ended = session.await.is_err();
    }
    messages.finish().await;
    Ok(())
}

/// SPDY in binary messages: a byte stream of two pumps.
async fn tunnel<S>(socket: S, pod: String, site: Site) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sink, mut stream) = upgrade(socket).await.split();
    let (near, far) = tokio::io::duplex(256 << 10);
    let (mut from_spdy, mut to_spdy) = tokio::io::split(far);
    let up = async move {
        while let Some(Ok(message)) = stream.next().await {
            match message {
                Message::Binary(bytes) if to_spdy.write_all(&bytes).await.is_err() => break,
                Message::Close(_) => break,
                _ => {}
            }
        }
        let _gone = to_spdy.shutdown().await.is_err();
    };
    let down = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from_spdy.read(&mut buffer).await {
            let message = Message::binary(Bytes::copy_from_slice(&buffer[..length]));
            if sink.send(message).await.is_err() {
                return false;
            }
        }
        close(sink).await;
        true
    };
    // One task: when nothing can be written any more, both halves of the pipe go, and SPDY hears of it.
    drop(site.tasks.spawn(async move {
        tokio::pin!(up, down);
        tokio::select! {
            closed = &mut down => if closed {
                let _late = tokio::time::timeout(LINGER, up).await.is_err();
            },
            () = &mut up => {
                let _closed = down.await;
            }
        }
    }));
    forward::over_spdy(near, pod, site).await
}

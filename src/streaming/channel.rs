//! The ends of a session's streams, whatever the transport: bytes in, bytes out, terminal sizes, and the
//! news that the client is gone.

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Columns.
    pub(crate) width: u16,
    /// Rows.
    pub(crate) height: u16,
}

/// Bytes from the client. Bounded: a reader that lags holds the client back.
#[derive(Debug)]
pub(crate) struct Input(mpsc::Receiver<Bytes>);

impl Input {
    /// An input and the end that fills it; dropping that end is the end of the stream.
    pub(super) fn new() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, receiver) = mpsc::channel(8);
        (sender, Self(receiver))
    }

    /// The next bytes; `None`: the client has closed this stream or is gone. Cancel-safe.
    pub(crate) async fn recv(&mut self) -> Option<Bytes> {
        self.0.recv().await
    }
}

/// The client (or this stream of it) is gone.
#[derive(Debug, thiserror::Error)]
#[error("the client is gone")]
pub(crate) struct Closed;

/// Where an output's bytes go.
pub(super) trait Sink: Send + Sync {
    /// Sends bytes, waiting while the client cannot take more.
    fn send(&self, bytes: Bytes) -> futures_util::future::BoxFuture<'_, Result<(), Closed>>;
    /// Tells the client that this stream has ended.
    fn end(&self) -> futures_util::future::BoxFuture<'_, ()>;
}

/// Bytes to the client.
pub(crate) struct Output(Box<dyn Sink>);

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Output")
    }
}

impl Output {
    pub(super) fn new(sink: impl Sink + 'static) -> Self {
        Self(Box::new(sink))
    }

    /// Sends bytes; waits while the client cannot take more.
    ///
    /// # Errors
    /// [`Closed`]: the client is gone; nothing more can be sent.
    pub(crate) async fn send(&self, bytes: Bytes) -> Result<(), Closed> {
        if bytes.is_empty() {
            Ok(())
        } else {
            self.0.send(bytes).await
        }
    }

    /// Ends the stream: the client reads end of file after what was sent before.
    pub(crate) async fn end(self) {
        self.0.end().await;
    }
}

/// Resolves when the client is gone. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Gone(watch::Receiver<bool>);

impl Gone {
    /// The news and the end that spreads it: by `true`, or by being dropped.
    pub(super) fn new() -> (watch::Sender<bool>, Self) {
        let (sender, receiver) = watch::channel(false);
        (sender, Self(receiver))
    }

    /// Waits until the client is gone. Cancel-safe.
    pub(crate) async fn wait(&mut self) {
        // An error means the sender was dropped: the connection's task has ended.
        let _ended = self.0.wait_for(|gone| *gone).await.is_err();
    }
}

/// What a command or an attached client is connected to.
#[derive(Debug)]
pub(crate) struct Stdio {
    /// Absent: not asked for.
    pub(crate) stdin: Option<Input>,
    /// Absent: not asked for.
    pub(crate) stdout: Option<Output>,
    /// Absent: not asked for, or with a terminal.
    pub(crate) stderr: Option<Output>,
    /// A terminal was asked for.
    pub(crate) tty: bool,
    /// Sizes of the client's terminal, the newest last.
    pub(crate) resize: mpsc::Receiver<Size>,
    /// The client's end.
    pub(crate) gone: Gone,
}

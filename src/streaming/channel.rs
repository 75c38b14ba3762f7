//! The ends of a session's streams, whatever the transport: bytes in, bytes out, terminal sizes, and the
//! news that the client is gone.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;

/// Size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Columns.
    pub(crate) width: u16,
    /// Rows.
    pub(crate) height: u16,
}

/// Bytes that one connection may hold for readers that lag, all its streams together. A single piece that is larger
/// waits until it is alone.
const BUDGET: usize = 4 << 20;
/// What a piece costs beside its bytes, generously.
const PIECE: usize = 128;
/// Between two beats while the connection is not read.
const BEAT: Duration = Duration::from_secs(2);

/// What the inputs of one connection may hold together. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    /// For a new connection.
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET)))
    }
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    held: OwnedSemaphorePermit,
}

/// Bytes from the client. Bounded: a reader that lags holds the client back.
#[derive(Debug)]
pub(crate) struct Input {
    pieces: mpsc::Receiver<Piece>,
    /// For the piece that the reader has now.
    held: Option<OwnedSemaphorePermit>,
}

/// The end that fills an [`Input`]; dropping all of its clones is the end of the stream.
#[derive(Clone, Debug)]
pub(super) struct InputEnd {
    pieces: mpsc::Sender<Piece>,
    budget: Budget,
}

impl Input {
    /// An input of a connection, and the end that fills it.
    pub(super) fn new(budget: &Budget) -> (InputEnd, Self) {
        let (pieces, queue) = mpsc::channel(8);
        let end = InputEnd {
            pieces,
            budget: budget.clone(),
        };
        let input = Self {
            pieces: queue,
            held: None,
        };
        (end, input)
    }

    /// The next bytes; `None`: the client has closed this stream or is gone. Those before count as done with.
    /// Cancel-safe.
    pub(crate) async fn recv(&mut self) -> Option<Bytes> {
        self.held = None;
        let Piece { bytes, held } = self.pieces.recv().await?;
        self.held = Some(held);
        Some(bytes)
    }
}

impl InputEnd {
    /// Hands on bytes; waits while their reader, or others of this connection, lag.
    ///
    /// # Errors
    /// [`Closed`]: nobody reads this input any more.
    pub(super) async fn send(&self, bytes: Bytes) -> Result<(), Closed> {
        let place = self.pieces.reserve().await.map_err(|_left| Closed)?;
        let cost = u32::try_from((bytes.len() + PIECE).min(BUDGET)).unwrap_or(u32::MAX);
        let held = tokio::select! {
            held = Arc::clone(&self.budget.0).acquire_many_owned(cost) => held.map_err(|_closed| Closed)?,
            () = self.pieces.closed() => return Err(Closed),
        };
        place.send(Piece { bytes, held });
        Ok(())
    }
}

/// Does what holds the reading of a connection back. Its end is not seen meanwhile, be it that it waits behind what was not
/// read; so `beat` sends something from time to time that needs no answer. To that the kernel of a client that has ended
/// answers with a reset, and the writer fails. Cancel-safe as far as `work` is.
pub(super) async fn while_beating<T>(work: impl Future<Output = T>, beat: impl Fn()) -> T {
    tokio::pin!(work);
    let mut beats = tokio::time::interval_at(Instant::now() + BEAT, BEAT);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _now = beats.tick() => beat(),
        }
    }
}

/// When something last went over a connection, in either direction. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<(Instant, AtomicU64)>);

impl Activity {
    /// Something goes now.
    pub(super) fn new() -> Self {
        Self(Arc::new((Instant::now(), AtomicU64::new(0))))
    }

    /// Something goes now.
    pub(super) fn touch(&self) {
        let (start, last) = &*self.0;
        let now = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        last.store(now, Ordering::Relaxed);
    }

    /// Waits until nothing has gone for this long. Cancel-safe.
    pub(super) async fn silence(&self, limit: Duration) {
        let (start, last) = &*self.0;
        loop {
            let until = *start + Duration::from_millis(last.load(Ordering::Relaxed)) + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
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

//! The streams of one SPDY connection.
//!
//! One task reads frames and hands them to streams, one task writes what streams send. A stream whose reader lags
//! holds the whole connection's reading back (most clients of Kubernetes know no flow control, so there is no
//! other way to bound memory) once its 8 frames or the connection's budget are full. Windows are honoured from the moment the peer shows that it
//! knows them (a WINDOW_UPDATE, or an initial window in SETTINGS). An error on a stream resets that stream, never
//! the connection; a frame that cannot be parsed ends the connection.
//!
//! While the reading is held back, an empty DATA frame goes out now and then: a client that was killed meanwhile resets
//! the connection for it (see [`while_beating`]).
//!
//! Memory of a connection: what inputs hold (4 MiB) and one more frame (1 MiB), what waits to be written (1 MiB), up to
//! 4096 streams of under 4 KiB, and what the reader of a forwarded port has in hand (32 KiB for each).

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadHalf};
use tokio::sync::{Notify, mpsc};

use super::frame::{self, Frame, MAX_DATA, Status};
use super::headers::{Headers, Reader, Writer};
use super::queue::{Queue, WeakQueue, write_frames};
use crate::base::tasks::Tasks;
use crate::streaming::channel::{
    Activity, Budget, Closed, Gone, Input, InputEnd, Output, Sink, while_beating,
};

/// How many streams may be open at once.
const MAX_STREAMS: usize = 4096;
/// Headers of a stream that anybody asks for, in small letters.
const KEPT: [&str; 3] = ["streamtype", "port", "requestid"];
/// Most bytes of them.
const MAX_KEPT: usize = 1024;
/// The window before anybody says otherwise, in bytes.
const INITIAL_WINDOW: i64 = 64 << 10;
/// The setting that changes it.
const SETTING_INITIAL_WINDOW: u32 = 7;

/// A stream that the client opened.
#[derive(Debug)]
pub(in crate::streaming) struct Stream {
    /// Headers of its SYN_STREAM, those that somebody asks for.
    pub(in crate::streaming) headers: Headers,
    /// From the client.
    pub(in crate::streaming) input: Input,
    /// To the client.
    pub(in crate::streaming) output: Output,
}

impl Stream {
    /// The first value of a header; names are compared without case.
    pub(in crate::streaming) fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// A connection. Dropping it ends the session once what was sent has gone out.
#[derive(Debug)]
pub(in crate::streaming) struct Connection {
    accept: mpsc::Receiver<Stream>,
    /// Resolves when the client is gone.
    pub(in crate::streaming) gone: Gone,
    /// When something has gone either way last.
    pub(in crate::streaming) activity: Activity,
    writer: Queue,
}

#[derive(Debug)]
struct Window {
    credit: AtomicI64,
    reset: AtomicBool,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Open {
    input: Option<InputEnd>,
    window: Option<Arc<Window>>,
}

#[derive(Debug)]
struct Shared {
    streams: Mutex<HashMap<u32, Open>>,
    /// The peer honours windows.
    flow_control: AtomicBool,
    initial_window: AtomicI64,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Open>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, id: u32, act: impl FnOnce(&mut Open) -> T) -> Option<T> {
        let mut streams = self.streams();
        let open = streams.get_mut(&id)?;
        let value = act(open);
        if open.input.is_none() && open.window.is_none() {
            streams.remove(&id);
        }
        Some(value)
    }

    fn end_all(&self) {
        let mut streams = self.streams();
        for (_, open) in streams.drain() {
            if let Some(window) = open.window {
                window.reset.store(true, Ordering::SeqCst);
                window.changed.notify_waiters();
            }
        }
    }
}

impl Connection {
    /// Starts serving on an upgraded socket. The client is gone when nothing has gone either way for `idle`.
    pub(in crate::streaming) fn start<S>(socket: S, idle: Duration, tasks: &Tasks) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (read, write) = tokio::io::split(socket);
        let (writer, frames) = Queue::new();
        let (accepted, accept) = mpsc::channel(64);
        let (leaving, gone) = Gone::new();
        let shared = Arc::new(Shared {
            streams: Mutex::default(),
            flow_control: AtomicBool::new(false),
            initial_window: AtomicI64::new(INITIAL_WINDOW),
        });
        let activity = Activity::new();
        let (writing, mut written) = Gone::new();
        let (writes, own) = (
            write_frames(write, frames, activity.clone(), gone.clone()),
            activity.clone(),
        );
        drop(tasks.spawn(async move {
            writes.await;
            writing.send_replace(true);
        }));
        let reader = ReadLoop {
            shared: shared.clone(),
            // Weak: only the session and its streams keep the writer's task alive.
            writer: writer.downgrade(),
            accepted,
            budget: Budget::new(),
            activity: activity.clone(),
            inflate: Reader::new(),
            deflate: Writer::new(),
            last: 0,
        };
        drop(tasks.spawn(async move {
            let ended = tokio::select! {
                ended = reader.run(read) => ended,
                () = activity.silence(idle) => Err("silent for too long".into()),
                () = written.wait() => Err("the client takes nothing any more".into()),
            };
            if let Err(error) = ended {
                tracing::debug!(error, "SPDY connection ended");
            }
            shared.end_all();
            leaving.send_replace(true);
        }));
        Self {
            accept,
            gone,
            activity: own,
            writer,
        }
    }

    /// The next stream that the client opens; `None`: it is gone. Cancel-safe.
    pub(in crate::streaming) async fn accept(&mut self) -> Option<Stream> {
        self.accept.recv().await
    }

    /// Refuses all streams that come from now on.
    pub(in crate::streaming) fn refuse_more(&mut self) {
        self.accept.close();
    }

    /// Says good-bye and waits, at most `limit`, until the client has closed the connection: what is on its way is
    /// not lost to a reset.
    pub(in crate::streaming) async fn finish(self, limit: Duration) {
        let Self {
            mut accept,
            mut gone,
            activity: _,
            writer,
        } = self;
        let _unheard = writer.send(Frame::GoAway { last: 0 }).await.is_err();
        drop(writer);
        accept.close();
        let _late = tokio::time::timeout(limit, gone.wait()).await.is_err();
    }
}

struct ReadLoop {
    shared: Arc<Shared>,
    writer: WeakQueue,
    accepted: mpsc::Sender<Stream>,
    budget: Budget,
    activity: Activity,
    inflate: Reader,
    deflate: Writer,
    last: u32,
}

impl ReadLoop {
    async fn run<S: AsyncRead + Send>(mut self, mut socket: ReadHalf<S>) -> Result<(), String> {
        loop {
            let mut head = [0; frame::HEAD];
            if socket.read_exact(&mut head).await.is_err() {
                return Ok(());
            }
            self.activity.touch();
            let length = frame::payload_length(head).map_err(|e| e.to_string())?;
            let mut payload = BytesMut::zeroed(length);
            if socket.read_exact(&mut payload).await.is_err() {
                return Ok(());
            }
            let frame = frame::parse(head, payload.freeze()).map_err(|e| e.to_string())?;
            if !self.take(frame).await? {
                return Ok(());
            }
        }
    }

    async fn send(&self, frame: Frame) -> bool {
        match self.writer.upgrade() {
            Some(writer) => writer.send(frame).await.is_ok(),
            // The session is over; the client is only being waited for.
            None => true,
        }
    }

    /// Sends something that needs no answer on this stream, or another that is open: an empty DATA frame.
    fn beat(&self, id: u32) {
        let open = {
            let streams = self.shared.streams();
            let speaks = |id: &&u32| streams.get(id).is_some_and(|open| open.window.is_some());
            Some(&id)
                .filter(speaks)
                .or_else(|| streams.keys().find(speaks))
                .copied()
        };
        if let (Some(id), Some(writer)) = (open, self.writer.upgrade()) {
            writer.send_if_idle(Frame::beat(id));
        }
    }

    async fn reset(&self, id: u32, status: Status) -> bool {
        self.send(Frame::Reset {
            id,
            status: status as u32,
        })
        .await
    }

    /// Acts on a frame; `false`: the connection is over.
    async fn take(&mut self, frame: Frame) -> Result<bool, String> {
        Ok(match frame {
            Frame::SynStream { id, block, fin } => {
                let headers = self.inflate.read(&block).map_err(|e| e.to_string())?;
                self.open(id, headers, fin).await?
            }
            Frame::Headers { id, block, fin } => {
                self.inflate.read(&block).map_err(|e| e.to_string())?;
                if fin {
                    self.shared.with(id, |open| open.input = None);
                }
                true
            }
            Frame::Data { id, bytes, fin } => self.data(id, bytes, fin).await,
            Frame::Reset { id, .. } => {
                self.shared.with(id, |open| {
                    open.input = None;
                    if let Some(window) = open.window.take() {
                        window.reset.store(true, Ordering::SeqCst);
                        window.changed.notify_waiters();
                    }
                });
                true
            }
            Frame::WindowUpdate { id, delta } => {
                self.shared.flow_control.store(true, Ordering::SeqCst);
                self.shared.with(id, |open| {
                    if let Some(window) = &open.window {
                        window.credit.fetch_add(i64::from(delta), Ordering::SeqCst);
                        window.changed.notify_waiters();
                    }
                });
                true
            }
            Frame::Settings(entries) => {
                self.settings(&entries);
                true
            }
            Frame::Ping(id) => self.send(Frame::Ping(id)).await,
            Frame::GoAway { .. } | Frame::SynReply { .. } | Frame::Ignored(_) => true,
        })
    }

    fn settings(&self, entries: &[(u32, u32)]) {
        for (_, value) in entries
            .iter()
            .filter(|(id, _)| *id == SETTING_INITIAL_WINDOW)
        {
            self.shared.flow_control.store(true, Ordering::SeqCst);
            let new = i64::from(*value);
            let old = self.shared.initial_window.swap(new, Ordering::SeqCst);
            let streams = self.shared.streams();
            for window in streams.values().filter_map(|open| open.window.as_ref()) {
                window.credit.fetch_add(new - old, Ordering::SeqCst);
                window.changed.notify_waiters();
            }
        }
    }

    async fn open(&mut self, id: u32, mut headers: Headers, fin: bool) -> Result<bool, String> {
        if id <= self.last || id.is_multiple_of(2) {
            return Err(format!(
                "stream {id} after {}: ids of a client are odd and rise",
                self.last
            ));
        }
        self.last = id;
        let window = Arc::new(Window {
            credit: AtomicI64::new(self.shared.initial_window.load(Ordering::SeqCst)),
            reset: AtomicBool::new(false),
            changed: Notify::new(),
        });
        let (sender, input) = Input::new(&self.budget);
        let Some(writer) = self.writer.upgrade() else {
            return Ok(true);
        };
        headers.retain(|(name, _)| KEPT.iter().any(|kept| name.eq_ignore_ascii_case(kept)));
        let kept: usize = headers.iter().map(|(n, v)| n.len() + v.len()).sum();
        let crowded = {
            let mut streams = self.shared.streams();
            if streams.len() < MAX_STREAMS && kept <= MAX_KEPT {
                let input = (!fin).then_some(sender);
                streams.insert(
                    id,
                    Open {
                        input,
                        window: Some(window.clone()),
                    },
                );
                false
            } else {
                true
            }
        };
        if crowded {
            return Ok(self.reset(id, Status::Refused).await);
        }
        let sink = SpdySink {
            id,
            shared: self.shared.clone(),
            writer: writer.clone(),
            window,
        };
        let block = self.deflate.write(&[]).map_err(|e| e.to_string())?;
        if writer.send(Frame::SynReply { id, block }).await.is_err() {
            return Ok(false);
        }
        let stream = Stream {
            headers,
            input,
            output: Output::new(sink),
        };
        let accepted = self.accepted.send(stream);
        if while_beating(accepted, || self.beat(id)).await.is_err() {
            self.shared.with(id, |open| *open = Open::default());
            return Ok(self.reset(id, Status::Refused).await);
        }
        Ok(true)
    }

    async fn data(&self, id: u32, bytes: Bytes, fin: bool) -> bool {
        let Some(input) = self.shared.with(id, |open| open.input.clone()) else {
            return self.reset(id, Status::InvalidStream).await;
        };
        // Half-closed before: what still comes is nobody's.
        let Some(input) = input else {
            return self.reset(id, Status::InvalidStream).await;
        };
        let length = bytes.len();
        let wanted = bytes.is_empty()
            || while_beating(input.send(bytes), || self.beat(id))
                .await
                .is_ok();
        drop(input);
        if fin || !wanted {
            self.shared.with(id, |open| open.input = None);
        }
        // A reader that has left only stops reading: its output may go on, so no reset.
        if length > 0 && !fin && self.shared.flow_control.load(Ordering::SeqCst) {
            let delta = u32::try_from(length).unwrap_or(0);
            return self.send(Frame::WindowUpdate { id, delta }).await;
        }
        true
    }
}

struct SpdySink {
    id: u32,
    shared: Arc<Shared>,
    writer: Queue,
    window: Arc<Window>,
}

impl SpdySink {
    /// How many of `wanted` bytes may go now; waits for at least one.
    async fn credit(&self, wanted: usize) -> Result<usize, Closed> {
        loop {
            let changed = self.window.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.window.reset.load(Ordering::SeqCst) {
                return Err(Closed);
            }
            let most = wanted.min(MAX_DATA);
            if !self.shared.flow_control.load(Ordering::SeqCst) {
                self.window
                    .credit
                    .fetch_sub(i64::try_from(most).unwrap_or(0), Ordering::SeqCst);
                return Ok(most);
            }
            let left = usize::try_from(self.window.credit.load(Ordering::SeqCst)).unwrap_or(0);
            if left > 0 {
                let now = most.min(left);
                self.window
                    .credit
                    .fetch_sub(i64::try_from(now).unwrap_or(0), Ordering::SeqCst);
                return Ok(now);
            }
            changed.await;
        }
    }
}

impl Sink for SpdySink {
    fn send(&self, mut bytes: Bytes) -> BoxFuture<'_, Result<(), Closed>> {
        Box::pin(async move {
            while !bytes.is_empty() {
                let now = self.credit(bytes.len()).await?;
                let part = bytes.split_to(now);
                let data = Frame::Data {
                    id: self.id,
                    bytes: part,
                    fin: false,
                };
                self.writer.send(data).await?;
            }
            Ok(())
        })
    }

    fn end(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let open = self
                .shared
                .with(self.id, |open| open.window.take().is_some());
            if open == Some(true) {
                let end = Frame::Data {
                    id: self.id,
                    bytes: Bytes::new(),
                    fin: true,
                };
                let _gone = self.writer.send(end).await.is_err();
            }
        })
    }
}

impl Drop for SpdySink {
    fn drop(&mut self) {
        // Not ended in order: the client must not wait for more. (After `end` there is nothing to take.)
        if self
            .shared
            .with(self.id, |open| open.window.take().is_some())
            == Some(true)
        {
            let reset = Frame::Reset {
                id: self.id,
                status: Status::Cancel as u32,
            };
            self.writer.push(reset);
        }
    }
}

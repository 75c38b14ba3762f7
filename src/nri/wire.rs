//! The wire to a plugin: ttrpc over NRI's multiplexer, over one unix stream.
//!
//! ```text
//! multiplexer   connection (4 bytes) | length (4) | piece of that connection's stream
//! ttrpc         length (4) | stream (4) | type (1: request, 2: response) | flags (1) | Request or Response
//! ```
//! Numbers are big-endian. Connection 1 carries our calls and the plugin's answers, connection 2 its calls and our
//! answers. The reader of the Go stub takes a piece into a buffer of 4 KiB unless it waits for more than that:
//! a message goes out as one piece of at most 4 KiB and one with all the rest.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{oneshot, watch};

use crate::base::tasks::Tasks;
use crate::nri::proto::ttrpc::{Request, Response, Status};

/// Connection of our calls.
const PLUGIN_SERVICE: u32 = 1;
/// Connection of the plugin's calls.
const RUNTIME_SERVICE: u32 = 2;
/// Bytes of ttrpc's header.
const HEADER: usize = 10;
/// Largest message of ttrpc.
pub(super) const MAX_MESSAGE: usize = 4 << 20;
/// First piece of a message.
const FIRST_PIECE: usize = 4096;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// gRPC codes that matter here.
pub(super) mod code {
    /// Bad argument.
    pub(in crate::nri) const INVALID_ARGUMENT: i32 = 3;
    /// No such method.
    pub(in crate::nri) const UNIMPLEMENTED: i32 = 12;
}

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The connection is gone, or broke the protocol.
    #[error("the connection is closed")]
    Closed,
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The message does not fit.
    #[error("a message of {0} bytes, at most {MAX_MESSAGE} are allowed")]
    TooLarge(usize),
    /// The plugin answered with an error.
    #[error("{message}")]
    Status {
        /// gRPC code.
        code: i32,
        /// Its text.
        message: String,
    },
    /// The answer makes no sense.
    #[error("the answer cannot be read: {0}")]
    Decode(#[from] prost::DecodeError),
}

impl CallError {
    /// The plugin is of no further use.
    pub(super) const fn is_fatal(&self) -> bool {
        matches!(self, Self::Closed | Self::Timeout(_) | Self::Decode(_))
    }
}

/// What answers the plugin's calls: (method, payload).
pub(super) trait Service: Send + Sync + 'static {
    /// The answer's payload.
    ///
    /// # Errors
    /// (gRPC code, text).
    fn serve(&self, method: String, payload: Vec<u8>) -> Answer<'_>;
}

/// An answer in the making.
pub(super) type Answer<'a> =
    Pin<Box<dyn Future<Output = Result<Vec<u8>, (i32, String)>> + Send + 'a>>;

type Pending = Mutex<HashMap<u32, oneshot::Sender<Response>>>;

/// A connection to a plugin.
pub(super) struct Wire {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Pending,
    /// The next stream's id: odd.
    next: AtomicU32,
    closed: watch::Sender<bool>,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl Wire {
    /// Starts reading; `service` answers the plugin's calls.
    pub(super) fn start(stream: UnixStream, service: Arc<dyn Service>, tasks: &Tasks) -> Arc<Self> {
        let (reader, writer) = stream.into_split();
        let wire = Arc::new(Self {
            writer: tokio::sync::Mutex::new(writer),
            pending: Mutex::default(),
            next: AtomicU32::new(1),
            closed: watch::Sender::new(false),
        });
        let (reading, tasks) = (Arc::clone(&wire), tasks.clone());
        let inner = tasks.clone();
        let _runs = tasks.spawn(async move {
            let mut reader = BufReader::new(reader);
            tokio::select! {
                read = reading.read(&mut reader, &service, &inner) => {
                    if let Err(error) = read {
                        tracing::debug!(%error, "the connection to a plugin ended");
                    }
                }
                () = reading.closed() => {}
            }
            reading.close();
            // Whoever writes to a plugin that does not read gets an error now.
            let stream = reader.get_ref().as_ref();
            let _cut = rustix::net::shutdown(stream, rustix::net::Shutdown::Both).is_ok();
        });
        wire
    }

    /// Cuts the connection; calls in flight end with [`CallError::Closed`].
    pub(super) fn close(&self) {
        self.closed.send_replace(true);
        self.pending().clear();
    }

    /// Waits for the end of the connection.
    pub(super) async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        // The sender lives as long as we do.
        let _ended = closed.wait_for(|closed| *closed).await.is_ok();
    }

    /// Is the connection gone?
    pub(super) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u32, oneshot::Sender<Response>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the plugin.
    ///
    /// # Errors
    /// [`CallError`]; after a fatal one the connection is of no use.
    pub(super) async fn call(
        &self,
        service: &str,
        method: &str,
        payload: Vec<u8>,
        limit: Duration,
    ) -> Result<Vec<u8>, CallError> {
        if self.is_closed() {
            return Err(CallError::Closed);
        }
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload,
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            metadata: vec![],
        };
        let bytes = request.encode_to_vec();
        if bytes.len() > MAX_MESSAGE {
            return Err(CallError::TooLarge(bytes.len()));
        }
        let stream = self.next.fetch_add(2, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        self.pending().insert(stream, answer);
        let exchange = async {
            self.send(PLUGIN_SERVICE, stream, REQUEST, &bytes)
                .await
                .map_err(|_gone| CallError::Closed)?;
            answered.await.map_err(|_gone| CallError::Closed)
        };
        let outcome = tokio::select! {
            outcome = tokio::time::timeout(limit, exchange) => outcome,
            () = self.closed() => Ok(Err(CallError::Closed)),
        };
        self.pending().remove(&stream);
        let response = match outcome {
            Ok(outcome) => outcome?,
            Err(_elapsed) => return Err(CallError::Timeout(limit)),
        };
        match response.status {
            Some(Status { code, message }) if code != 0 => Err(CallError::Status { code, message }),
            _ => Ok(response.payload),
        }
    }

    async fn send(&self, connection: u32, stream: u32, kind: u8, data: &[u8]) -> io::Result<()> {
        let length = u32::try_from(data.len()).map_err(io::Error::other)?;
        let mut frame = Vec::with_capacity(HEADER + data.len() + 16);
        let mut message = Vec::with_capacity(HEADER + data.len());
        message.extend(length.to_be_bytes());
        message.extend(stream.to_be_bytes());
        message.extend([kind, 0]);
        message.extend(data);
        let (first, rest) = message.split_at(message.len().min(FIRST_PIECE));
        for piece in [first, rest].into_iter().filter(|piece| !piece.is_empty()) {
            let length = u32::try_from(piece.len()).map_err(io::Error::other)?;
            frame.extend(connection.to_be_bytes());
            frame.extend(length.to_be_bytes());
            frame.extend(piece);
        }
        self.writer.lock().await.write_all(&frame).await
    }

    async fn read(
        self: &Arc<Self>,
        reader: &mut BufReader<OwnedReadHalf>,
        service: &Arc<dyn Service>,
        tasks: &Tasks,
    ) -> io::Result<()> {
        let mut streams: HashMap<u32, Vec<u8>> = HashMap::new();
        loop {
            let connection = reader.read_u32().await?;
            let length = usize::try_from(reader.read_u32().await?).unwrap_or(usize::MAX);
            if length > MAX_MESSAGE + HEADER {
                return Err(io::Error::other(format!("a piece of {length} bytes")));
            }
            let buffer = streams.entry(connection).or_default();
            let old = buffer.len();
            buffer.resize(old + length, 0);
            reader.read_exact(&mut buffer[old..]).await?;
            if !matches!(connection, PLUGIN_SERVICE | RUNTIME_SERVICE) {
                // Nobody listens there: as the multiplexer of the Go module has it.
                buffer.clear();
                continue;
            }
            while let Some((stream, kind, data)) = take_message(buffer)? {
                match (connection, kind) {
                    (PLUGIN_SERVICE, RESPONSE) => {
                        let response = Response::decode(&*data).map_err(io::Error::other)?;
                        // Without a caller it came too late.
                        if let Some(waits) = self.pending().remove(&stream) {
                            let _heard = waits.send(response).is_ok();
                        }
                    }
                    (RUNTIME_SERVICE, REQUEST) => {
                        let request = Request::decode(&*data).map_err(io::Error::other)?;
                        self.answer(stream, request, service, tasks);
                    }
                    _ => return Err(io::Error::other(format!("a message of type {kind}"))),
                }
            }
        }
    }

    /// Serves a call of the plugin beside the reader, which must go on reading answers.
    fn answer(
        self: &Arc<Self>,
        stream: u32,
        request: Request,
        service: &Arc<dyn Service>,
        tasks: &Tasks,
    ) {
        let (wire, service) = (Arc::clone(self), Arc::clone(service));
        let _served = tasks.spawn(async move {
            let answer = match request.service == super::RUNTIME {
                true => service.serve(request.method, request.payload).await,
                false => Err((
                    code::UNIMPLEMENTED,
                    format!("no service {}", request.service),
                )),
            };
            let response = match answer {
                Ok(payload) => Response {
                    status: None,
                    payload,
                },
                Err((code, message)) => Response {
                    status: Some(Status { code, message }),
                    payload: vec![],
                },
            };
            let bytes = response.encode_to_vec();
            let sent = wire.send(RUNTIME_SERVICE, stream, RESPONSE, &bytes).await;
            if sent.is_err() {
                wire.close();
            }
        });
    }
}

/// The next whole message of a stream: (stream id, type, data).
fn take_message(buffer: &mut Vec<u8>) -> io::Result<Option<(u32, u8, Vec<u8>)>> {
    let Some(header) = buffer.first_chunk::<HEADER>() else {
        return Ok(None);
    };
    let [a, b, c, d, e, f, g, h, kind, _flags] = *header;
    let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    let stream = u32::from_be_bytes([e, f, g, h]);
    if length > MAX_MESSAGE {
        return Err(io::Error::other(format!("a message of {length} bytes")));
    }
    if buffer.len() < HEADER + length {
        return Ok(None);
    }
    let data = buffer[HEADER..HEADER + length].to_vec();
    buffer.drain(..HEADER + length);
    Ok(Some((stream, kind, data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn serve(&self, method: String, payload: Vec<u8>) -> Answer<'_> {
            Box::pin(async move {
                match method.as_str() {
                    "echo" => Ok(payload),
                    _ => Err((code::UNIMPLEMENTED, method)),
                }
            })
        }
    }

    /// The other side, as a plugin: sees our frames, calls us, answers.
    async fn piece(stream: &mut UnixStream) -> (u32, Vec<u8>) {
        let connection = stream.read_u32().await.unwrap();
        let length = stream.read_u32().await.unwrap();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        stream.read_exact(&mut bytes).await.unwrap();
        (connection, bytes)
    }

    async fn put(stream: &mut UnixStream, connection: u32, bytes: &[u8]) {
        stream.write_u32(connection).await.unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        stream.write_u32(length).await.unwrap();
        stream.write_all(bytes).await.unwrap();
    }

    fn message(stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(data.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.extend(data);
        bytes
    }

    #[tokio::test]
    async fn calls_both_ways_and_large_messages_in_two_pieces() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let tasks = Tasks::default();
        let wire = Wire::start(ours, Arc::new(Echo), &tasks);
        let payload = vec![7; 10_000];
        let (calling, sent) = (Arc::clone(&wire), payload.clone());
        let limit = Duration::from_secs(60);
        let answer = tasks.spawn(async move { calling.call("s", "m", sent, limit).await });
        let (connection, first) = piece(&mut theirs).await;
        assert_eq!((connection, first.len()), (1, FIRST_PIECE));
        let (_, rest) = piece(&mut theirs).await;
        let mut whole = [first, rest].concat();
        let (stream, kind, data) = take_message(&mut whole).unwrap().unwrap();
        assert_eq!((stream, kind, whole.len()), (1, REQUEST, 0));
        let request = Request::decode(&*data).unwrap();
        assert_eq!((&*request.service, &*request.method), ("s", "m"));
        assert_eq!(request.payload, payload);
        // A call of theirs comes before the answer, byte by byte.
        let call = Request {
            service: super::super::RUNTIME.to_owned(),
            method: "echo".to_owned(),
            payload: b"hello".to_vec(),
            ..Request::default()
        };
        for byte in message(1, REQUEST, &call.encode_to_vec()) {
            put(&mut theirs, 2, &[byte]).await;
        }
        let (connection, mut bytes) = piece(&mut theirs).await;
        let (_, _, data) = take_message(&mut bytes).unwrap().unwrap();
        let response = Response::decode(&*data).unwrap();
        assert_eq!((connection, &*response.payload), (2, &b"hello"[..]));
        let response = Response {
            status: None,
            payload: b"done".to_vec(),
        };
        put(
            &mut theirs,
            1,
            &message(1, RESPONSE, &response.encode_to_vec()),
        )
        .await;
        assert_eq!(answer.await.unwrap().unwrap(), b"done");
    }

    #[tokio::test]
    async fn errors_timeouts_and_the_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let tasks = Tasks::default();
        let wire = Wire::start(ours, Arc::new(Echo), &tasks);
        let short = Duration::from_millis(20);
        let late = wire.call("s", "m", vec![], short).await;
        assert!(matches!(late, Err(CallError::Timeout(_))), "{late:?}");
        let large = wire.call("s", "m", vec![0; MAX_MESSAGE + 1], short).await;
        assert!(matches!(large, Err(CallError::TooLarge(_))), "{large:?}");
        let response = Response {
            status: Some(Status {
                code: 12,
                message: "no".to_owned(),
            }),
            payload: vec![],
        };
        let calling = Arc::clone(&wire);
        let limit = Duration::from_secs(60);
        let refused = tasks.spawn(async move { calling.call("s", "m", vec![], limit).await });
        piece(&mut theirs).await;
        piece(&mut theirs).await;
        put(
            &mut theirs,
            1,
            &message(3, RESPONSE, &response.encode_to_vec()),
        )
        .await;
        let refused = refused.await.unwrap();
        assert!(
            matches!(refused, Err(CallError::Status { code: 12, .. })),
            "{refused:?}"
        );
        let calling = Arc::clone(&wire);
        let cut = tasks.spawn(async move { calling.call("s", "m", vec![], limit).await });
        piece(&mut theirs).await;
        drop(theirs);
        let cut = cut.await.unwrap();
        assert!(matches!(cut, Err(CallError::Closed)), "{cut:?}");
        wire.closed().await;
    }

    #[tokio::test]
    async fn nonsense_ends_the_connection() {
        for bytes in [
            [&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff][..]].concat(),
            [&[0, 0, 0, 1, 0, 0, 0, 10][..], &[0xff; 10]].concat(),
            [&[0, 0, 0, 1, 0, 0, 0, 10][..], &message(1, 9, &[])].concat(),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let wire = Wire::start(ours, Arc::new(Echo), &Tasks::default());
            theirs.write_all(&bytes).await.unwrap();
            wire.closed().await;
        }
    }
}

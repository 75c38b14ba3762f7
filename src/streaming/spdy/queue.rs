//! Frames on their way out: one task writes what all streams of a connection send, in order.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncWrite, AsyncWriteExt as _, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::frame::{Frame, MAX_DATA};
use crate::streaming::LINGER;
use crate::streaming::channel::{Activity, Closed, Gone};

/// Bytes that wait to be written; who sends more waits too.
const ROOM: usize = 1 << 20;
/// What a frame costs beside its data, generously.
const FRAME: usize = 128;
/// Bytes that are written at once.
const BATCH: usize = 128 << 10;

type Queued = (Frame, Option<OwnedSemaphorePermit>);

/// The end that is sent to. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    frames: mpsc::UnboundedSender<Queued>,
    room: Arc<Semaphore>,
}

/// A [`Queue`] that does not keep its connection up.
#[derive(Debug)]
pub(super) struct WeakQueue {
    frames: mpsc::WeakUnboundedSender<Queued>,
    room: Arc<Semaphore>,
}

/// The end that is written from.
#[derive(Debug)]
pub(super) struct Frames(mpsc::UnboundedReceiver<Queued>);

fn cost(frame: &Frame) -> u32 {
    let data = match frame {
        Frame::Data { bytes, .. } => bytes.len().min(MAX_DATA),
        _ => 0,
    };
    u32::try_from(FRAME + data).unwrap_or(u32::MAX)
}

impl Queue {
    /// A queue and its other end.
    pub(super) fn new() -> (Self, Frames) {
        let (frames, queued) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(ROOM));
        (Self { frames, room }, Frames(queued))
    }

    /// Sends a frame; waits while too much waits to be written.
    ///
    /// # Errors
    /// [`Closed`]: nothing is written any more.
    pub(super) async fn send(&self, frame: Frame) -> Result<(), Closed> {
        // When the writer ends, what waited for it gives its room back, and the send below fails.
        let room = Arc::clone(&self.room).acquire_many_owned(cost(&frame));
        let room = room.await.map_err(|_closed| Closed)?;
        self.frames
            .send((frame, Some(room)))
            .map_err(|_ended| Closed)
    }

    /// Sends a frame without waiting for room: for what comes once in a stream's life and must not be lost.
    pub(super) fn push(&self, frame: Frame) {
        let _ended = self.frames.send((frame, None)).is_err();
    }

    /// Sends a frame if nothing else waits to be written.
    pub(super) fn send_if_idle(&self, frame: Frame) {
        if self.room.available_permits() == ROOM {
            self.push(frame);
        }
    }

    /// One that does not keep the connection up.
    pub(super) fn downgrade(&self) -> WeakQueue {
        WeakQueue {
            frames: self.frames.downgrade(),
            room: Arc::clone(&self.room),
        }
    }
}

impl WeakQueue {
    /// The queue, unless everybody who sends has left.
    pub(super) fn upgrade(&self) -> Option<Queue> {
        Some(Queue {
            frames: self.frames.upgrade()?,
            room: Arc::clone(&self.room),
        })
    }
}

/// Writes frames until nobody sends any more, or until the client is gone for a while. Returns when the connection's
/// reading can end too: at once where the client takes nothing any more, else when it has had time to close.
pub(super) async fn write_frames<S: AsyncWrite + Send + Unpin>(
    mut socket: WriteHalf<S>,
    frames: Frames,
    activity: Activity,
    mut gone: Gone,
) {
    let written = {
        let mut left = gone.clone();
        let late = async {
            left.wait().await;
            tokio::time::sleep(LINGER).await;
        };
        tokio::select! {
            written = write_all(&mut socket, frames, &activity) => written,
            () = late => false,
        }
    };
    drop(socket);
    if written {
        let _late = tokio::time::timeout(LINGER, gone.wait()).await.is_err();
    }
}

async fn write_all<S: AsyncWrite + Send + Unpin>(
    socket: &mut WriteHalf<S>,
    Frames(mut frames): Frames,
    activity: &Activity,
) -> bool {
    let mut buffer = BytesMut::with_capacity(16 << 10);
    while let Some((first, _room)) = frames.recv().await {
        let mut counts = !first.is_beat();
        first.write(&mut buffer);
        while buffer.len() < BATCH
            && let Ok((next, _room)) = frames.try_recv()
        {
            counts |= !next.is_beat();
            next.write(&mut buffer);
        }
        if socket.write_all_buf(&mut buffer).await.is_err() || socket.flush().await.is_err() {
            return false;
        }
        if counts {
            activity.touch();
        }
        buffer.clear();
    }
    socket.shutdown().await.is_ok()
}

//! SPDY/3.1 frames: pure parsing and writing.
//!
//! ```text
//! control  |1| version 15 | type 16 |        data  |0| stream id 31        |
//!          | flags 8 | length 24    |              | flags 8 | length 24   |
//! ```

use bytes::{BufMut as _, Bytes, BytesMut};

/// Bytes of a frame's head.
pub(crate) const HEAD: usize = 8;
/// Longest payload taken; longer frames end the connection.
pub(crate) const MAX_PAYLOAD: usize = 1 << 20;
/// Longest data payload sent.
pub(crate) const MAX_DATA: usize = 64 << 10;
/// Flag of the last frame of a direction.
const FIN: u8 = 1;
const VERSION: u16 = 3;

/// Status of RST_STREAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// A frame for a stream that is not open.
    InvalidStream = 2,
    /// No more streams now.
    Refused = 3,
    /// The stream is no longer wanted.
    Cancel = 5,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Opens a stream; the block is still compressed.
    SynStream {
        /// Stream.
        id: u32,
        /// Compressed headers.
        block: Bytes,
        /// The opener sends nothing more.
        fin: bool,
    },
    /// Accepts a stream.
    SynReply {
        /// Stream.
        id: u32,
        /// Compressed headers.
        block: Bytes,
    },
    /// Ends a stream in both directions.
    Reset {
        /// Stream.
        id: u32,
        /// Why.
        status: u32,
    },
    /// (id, value); 7 is the initial window.
    Settings(Vec<(u32, u32)>),
    /// To be sent back.
    Ping(u32),
    /// No new streams.
    GoAway {
        /// Last stream that was accepted.
        last: u32,
    },
    /// More headers for a stream: the block must be read, for the compression's sake.
    Headers {
        /// Stream.
        id: u32,
        /// Compressed headers.
        block: Bytes,
        /// Nothing more follows.
        fin: bool,
    },
    /// The peer can take more.
    WindowUpdate {
        /// Stream; 0: the connection.
        id: u32,
        /// Bytes.
        delta: u32,
    },
    /// Payload.
    Data {
        /// Stream.
        id: u32,
        /// Bytes.
        bytes: Bytes,
        /// Nothing more follows.
        fin: bool,
    },
    /// A kind that we do not serve.
    Ignored(u16),
}

/// The bytes are no frame of SPDY/3.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// Other version.
    #[error("SPDY version {0}, not 3")]
    Version(u16),
    /// Payload over the limit.
    #[error("a frame of {0} bytes: at most {MAX_PAYLOAD}")]
    TooLong(usize),
    /// Payload of the wrong size for its type.
    #[error("a frame of type {kind} with {length} bytes")]
    Length {
        /// Type.
        kind: u16,
        /// Bytes.
        length: usize,
    },
    /// Stream 0 where a stream must be named.
    #[error("a frame of type {0} for stream 0")]
    Zero(u16),
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |w| u32::from_be_bytes([w[0], w[1], w[2], w[3]]))
}

/// Length of the payload that follows a head.
///
/// # Errors
/// [`FrameError::TooLong`].
pub(crate) fn payload_length(head: [u8; HEAD]) -> Result<usize, FrameError> {
    let length = usize::try_from(word(&head, 4) & 0xff_ffff).unwrap_or(usize::MAX);
    if length > MAX_PAYLOAD {
        Err(FrameError::TooLong(length))
    } else {
        Ok(length)
    }
}

/// Parses a frame from its head and its payload.
///
/// # Errors
/// [`FrameError`].
pub(crate) fn parse(head: [u8; HEAD], payload: Bytes) -> Result<Frame, FrameError> {
    let (first, fin) = (word(&head, 0), head[4] & FIN != 0);
    if first & 1 << 31 == 0 {
        return if first == 0 {
            Err(FrameError::Zero(0))
        } else {
            Ok(Frame::Data {
                id: first,
                bytes: payload,
                fin,
            })
        };
    }
    let version = u16::from_be_bytes([head[0] & 0x7f, head[1]]);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    control(u16::from_be_bytes([head[2], head[3]]), fin, payload)
}

fn settings(payload: &Bytes) -> Result<Frame, FrameError> {
    let length = payload.len();
    let count = usize::try_from(word(payload, 0)).unwrap_or(usize::MAX);
    if length < 4 || count.checked_mul(8) != Some(length - 4) {
        return Err(FrameError::Length { kind: 4, length });
    }
    let entry = |i| {
        (
            word(payload, 4 + i * 8) & 0xff_ffff,
            word(payload, 8 + i * 8),
        )
    };
    Ok(Frame::Settings((0..count).map(entry).collect()))
}

fn control(kind: u16, fin: bool, payload: Bytes) -> Result<Frame, FrameError> {
    let length = payload.len();
    let at_least = |n| {
        if length < n {
            Err(FrameError::Length { kind, length })
        } else {
            Ok(())
        }
    };
    let exactly = |n| {
        if length == n {
            Ok(())
        } else {
            Err(FrameError::Length { kind, length })
        }
    };
    let id = word(&payload, 0) & 0x7fff_ffff;
    let stream = || {
        if id == 0 {
            Err(FrameError::Zero(kind))
        } else {
            Ok(id)
        }
    };
    Ok(match kind {
        1 => {
            at_least(10)?;
            Frame::SynStream {
                id: stream()?,
                block: payload.slice(10..),
                fin,
            }
        }
        2 => {
            at_least(4)?;
            Frame::SynReply {
                id: stream()?,
                block: payload.slice(4..),
            }
        }
        3 => {
            exactly(8)?;
            Frame::Reset {
                id: stream()?,
                status: word(&payload, 4),
            }
        }
        4 => settings(&payload)?,
        6 => {
            exactly(4)?;
            Frame::Ping(word(&payload, 0))
        }
        7 => {
            exactly(8)?;
            Frame::GoAway { last: id }
        }
        8 => {
            at_least(4)?;
            Frame::Headers {
                id: stream()?,
                block: payload.slice(4..),
                fin,
            }
        }
        9 => {
            exactly(8)?;
            Frame::WindowUpdate {
                id,
                delta: word(&payload, 4) & 0x7fff_ffff,
            }
        }
        other => Frame::Ignored(other),
    })
}

fn put_head(out: &mut BytesMut, kind: u16, flags: u8, length: usize) {
    out.put_u16(0x8000 | VERSION);
    out.put_u16(kind);
    out.put_u8(flags);
    out.put_uint(u64::try_from(length).unwrap_or(u64::MAX), 3);
}

fn put_block(out: &mut BytesMut, kind: u16, fin: bool, id: u32, block: &Bytes) {
    put_head(out, kind, u8::from(fin), 4 + block.len());
    out.put_u32(id);
    out.extend_from_slice(block);
}

impl Frame {
    /// A frame that says nothing on a stream.
    pub(crate) fn beat(id: u32) -> Self {
        Self::Data {
            id,
            bytes: Bytes::new(),
            fin: false,
        }
    }

    /// Whether it says nothing.
    pub(crate) fn is_beat(&self) -> bool {
        matches!(self, Self::Data { bytes, fin: false, .. } if bytes.is_empty())
    }

    /// Appends the frame's bytes. Kinds that only a client sends are written too, for tests.
    pub(crate) fn write(&self, out: &mut BytesMut) {
        match self {
            Self::Data { id, bytes, fin } => {
                out.put_u32(*id);
                out.put_u8(u8::from(*fin));
                out.put_uint(u64::try_from(bytes.len()).unwrap_or(u64::MAX), 3);
                out.extend_from_slice(bytes);
            }
            control => control.write_control(out),
        }
    }

    fn write_control(&self, out: &mut BytesMut) {
        match self {
            Self::SynStream { id, block, fin } => {
                put_head(out, 1, u8::from(*fin), 10 + block.len());
                out.put_u32(*id);
                out.put_u32(0);
                out.put_u16(0);
                out.extend_from_slice(block);
            }
            Self::SynReply { id, block } => put_block(out, 2, false, *id, block),
            Self::Reset { id, status } => {
                put_head(out, 3, 0, 8);
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Self::Settings(entries) => {
                put_head(out, 4, 0, 4 + entries.len() * 8);
                out.put_u32(u32::try_from(entries.len()).unwrap_or(u32::MAX));
                for (id, value) in entries {
                    out.put_u32(*id & 0xff_ffff);
                    out.put_u32(*value);
                }
            }
            Self::Ping(id) => {
                put_head(out, 6, 0, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last } => {
                put_head(out, 7, 0, 8);
                out.put_u32(*last);
                out.put_u32(0);
            }
            Self::Headers { id, block, fin } => put_block(out, 8, *fin, *id, block),
            Self::WindowUpdate { id, delta } => {
                put_head(out, 9, 0, 8);
                out.put_u32(*id);
                out.put_u32(*delta);
            }
            Self::Data { .. } | Self::Ignored(_) => {}
        }
    }
}

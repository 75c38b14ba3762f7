//! One pass from a compressed stream to a directory: hash, decompress, hash again, apply.
//!
//! ```text
//! source -> hash -> inflate -> [buffers] -> hash -> tar -> files
//!           the calling thread             a second thread
//! ```
//!
//! The compression is told from the first bytes, not from the media type, which lies often enough.

use std::io::{self, BufRead, Cursor, Read};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::images::apply::{Applied, apply};
use crate::images::digest::{Digest, HashingReader};
use crate::images::error::ImageError;
use crate::images::import::check;
use crate::images::tar::TarReader;

const BUFFER: usize = 256 * 1024;
const BUFFERS: usize = 8;
/// No layer is larger unpacked.
const MAX_UNPACKED: u64 = 256 << 30;
/// A layer that is larger unpacked than this must not be more than so many times its packed size.
const FREE_UNPACKED: u64 = if cfg!(test) { 64 << 20 } else { 1 << 30 };
const MAX_RATIO: u64 = 500;

/// A layer that was unpacked; its digests are for the caller to compare.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// Digest of the stream as it came.
    pub(crate) digest: Digest,
    /// Bytes of the stream as it came.
    pub(crate) size: u64,
    /// Digest of the tar stream.
    pub(crate) diff_id: Digest,
    /// What it made.
    pub(crate) applied: Applied,
}

/// Unpacks `source`, named `what` in messages, into the empty directory `root`. With `expected` it is
/// the digest of the stream: where the content makes no sense and is not what was expected either, the
/// digest is what the error is about.
///
/// Blocks on the source and the disk, and starts a second thread.
///
/// # Errors
///
/// [`ImageError::Archive`], [`ImageError::TooLarge`], [`ImageError::Unsupported`], [`ImageError::Io`];
/// what was made so far stays for the caller to remove.
pub(crate) fn unpack<R: BufRead + Send>(
    source: R,
    root: OwnedFd,
    what: &str,
    expected: Option<&Digest>,
) -> Result<Unpacked, ImageError> {
    let nonsense = AtomicBool::new(false);
    let nonsense = &nonsense;
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel(BUFFERS);
        let (used, spare) = sync_channel(BUFFERS + 2);
        let chunks = Chunks {
            receive,
            used,
            current: vec![],
            at: 0,
        };
        let files = std::thread::Builder::new()
            .name("unpack".into())
            .spawn_scoped(scope, move || {
                let files = apply_chunks(chunks, root, what);
                let blame = matches!(files, Err(ImageError::Archive { .. }));
                nonsense.store(blame, Ordering::Release);
                files
            })
            .map_err(|error| ImageError::io("start thread", what, error))?;
        let mut source = HashingReader::new(source);
        let packed = inflate(&mut source, &send, &spare, what);
        // A file error is the reason, the broken channel only its consequence; and the other way
        // round a failed source reaches the files as a read error.
        drop(send);
        let files = files
            .join()
            .map_err(|_panic| ImageError::archive(what, "the unpacker panicked"))?;
        let blame = match &packed {
            Err(Stop::Because(error)) => matches!(error, ImageError::Archive { .. }),
            _ => nonsense.load(Ordering::Acquire),
        };
        if let Some(expected) = expected.filter(|_| blame)
            && let Ok((actual, _)) = source.finish()
        {
            check(what, expected, &actual)?;
        }
        match (packed, files) {
            (Ok((digest, size)), Ok((diff_id, applied))) => Ok(Unpacked {
                digest,
                size,
                diff_id,
                applied,
            }),
            (Err(Stop::Because(error)), _) | (_, Err(error)) => Err(error),
            (Err(Stop::Quietly), Ok(_)) => Err(ImageError::archive(what, "unpacking stopped")),
        }
    })
}

enum Stop {
    Because(ImageError),
    /// The other side has the reason.
    Quietly,
}

type Chunk = io::Result<Vec<u8>>;

fn inflate<R: BufRead>(
    source: &mut HashingReader<R>,
    send: &SyncSender<Chunk>,
    spare: &Receiver<Vec<u8>>,
    what: &str,
) -> Result<(Digest, u64), Stop> {
    let because = |error| Stop::Because(explain(error, what));
    let mut head = [0; 6];
    let length = read_full(source, &mut head).map_err(because)?;
    let before = Cursor::new(&head[..length]);
    match &head[..length] {
        [0x1f, 0x8b, ..] => pump(
            flate2::bufread::MultiGzDecoder::new(before.chain(&mut *source)),
            |decoder| decoder.get_ref().get_ref().1.consumed(),
            (send, spare, what),
        ),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(before.chain(&mut *source))
                .map_err(because)?;
            pump(
                decoder,
                |decoder| decoder.get_ref().get_ref().1.consumed(),
                (send, spare, what),
            )
        }
        [0xfd, b'7', b'z', b'X', b'Z', 0] | [b'B', b'Z', b'h', ..] => {
            Err(Stop::Because(ImageError::Unsupported {
                what: what.to_owned(),
                reason: "compressed with xz or bzip2; use gzip or zstd",
            }))
        }
        _ => pump(
            before.chain(&mut *source),
            |chain| chain.get_ref().1.consumed(),
            (send, spare, what),
        ),
    }?;
    source.drain().map_err(because)?;
    Ok(source.so_far())
}

fn read_full(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn explain(error: io::Error, what: &str) -> ImageError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
            ImageError::archive(what, format!("cannot be decompressed: {error}"))
        }
        _ => ImageError::io("read", what, error),
    }
}

/// Sends everything of `decoder` on; `packed` tells how much it has taken in.
fn pump<D: Read>(
    mut decoder: D,
    packed: impl Fn(&D) -> u64,
    (send, spare, what): (&SyncSender<Chunk>, &Receiver<Vec<u8>>, &str),
) -> Result<(), Stop> {
    let mut unpacked = 0;
    loop {
        let mut buffer = spare.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let length = match read_full(&mut decoder, &mut buffer) {
            Ok(length) => length,
            Err(error) => {
                let told = io::Error::from(error.kind());
                let error = explain(error, what);
                // When the other side is gone, it has the better reason.
                return Err(match send.send(Err(told)) {
                    Ok(()) => Stop::Because(error),
                    Err(_gone) => Stop::Quietly,
                });
            }
        };
        buffer.truncate(length);
        unpacked += length as u64;
        let allowed = packed(&decoder).saturating_mul(MAX_RATIO);
        let limit = allowed.clamp(FREE_UNPACKED, MAX_UNPACKED);
        if unpacked > limit {
            return Err(Stop::Because(ImageError::TooLarge {
                what: format!("{what} unpacked"),
                limit: format!("{limit} bytes ({MAX_RATIO} times its size)"),
            }));
        }
        if length == 0 {
            return Ok(());
        }
        if send.send(Ok(buffer)).is_err() {
            return Err(Stop::Quietly);
        }
    }
}

/// The buffers of the other thread as a reader.
struct Chunks {
    receive: Receiver<Chunk>,
    used: SyncSender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() {
            let next = match self.receive.recv() {
                Ok(chunk) => chunk?,
                Err(_end) => vec![],
            };
            let used = std::mem::replace(&mut self.current, next);
            self.at = 0;
            // Given back to be filled again; when nobody wants it, it is freed.
            let _kept = self.used.try_send(used).is_ok();
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, amount: usize) {
        self.at = (self.at + amount).min(self.current.len());
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

fn apply_chunks(
    chunks: Chunks,
    root: OwnedFd,
    what: &str,
) -> Result<(Digest, Applied), ImageError> {
    let mut tar = TarReader::new(HashingReader::new(chunks));
    let applied = apply(&mut tar, root, what)?;
    let (diff_id, _) = tar
        .into_inner()
        .finish()
        .map_err(|error| explain(error, what))?;
    Ok((diff_id, applied))
}

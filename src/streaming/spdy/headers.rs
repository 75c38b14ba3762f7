//! The name/value block: zlib with a preset dictionary, one shared window for each direction of a connection.
//!
//! Block: count, then for each header the length and bytes of name and value; all lengths 32 bits.

use bytes::{Buf as _, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// Largest block after decompression, in bytes.
const MAX_BLOCK: usize = 64 << 10;

/// Names and values of a block.
pub(crate) type Headers = Vec<(String, String)>;

/// A block that cannot be read; the connection's compression state is lost with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeadersError {
    /// zlib says no.
    #[error("header block: not readable")]
    Zlib(#[source] flate2::DecompressError),
    /// zlib says no on the way out.
    #[error("header block: not writable")]
    Deflate(#[source] flate2::CompressError),
    /// Over the limit.
    #[error("header block: over {MAX_BLOCK} bytes")]
    TooLong,
    /// Lengths and content disagree.
    #[error("header block: truncated or malformed")]
    Malformed,
}

/// Words of the dictionary that are preceded by their length there.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding \
accept-language accept-ranges age allow authorization cache-control connection content-base \
content-encoding content-language content-length content-location content-md5 content-range content-type \
date etag expect expires from host if-match if-modified-since if-none-match if-range \
if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization \
range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning \
www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin";

/// The rest of the dictionary, as it is.
const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505",
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized",
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable",
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT",
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,",
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
);

/// The dictionary of SPDY/3, 1,423 bytes.
pub(crate) fn dictionary() -> Vec<u8> {
    let mut all = Vec::with_capacity(1423);
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        all.extend(u32::try_from(word.len()).unwrap_or(0).to_be_bytes());
        all.extend(word.as_bytes());
    }
    all.extend(TAIL.as_bytes());
    all
}

/// Reads the blocks of one direction, in order.
pub(crate) struct Reader(Decompress);

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reader")
    }
}

impl Reader {
    /// At the start of a connection.
    pub(crate) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Reads the next block.
    ///
    /// # Errors
    /// [`HeadersError`]: the connection must end.
    pub(crate) fn read(&mut self, block: &[u8]) -> Result<Headers, HeadersError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, block: &[u8]) -> Result<Vec<u8>, HeadersError> {
        let (start_in, start_out) = (self.0.total_in(), self.0.total_out());
        let done = |now: u64, start: u64| usize::try_from(now - start).unwrap_or(usize::MAX);
        let mut out = vec![0; 4096];
        loop {
            let (taken, given) = (
                done(self.0.total_in(), start_in),
                done(self.0.total_out(), start_out),
            );
            let input = block.get(taken..).unwrap_or_default();
            let result = self
                .0
                .decompress(input, &mut out[given..], FlushDecompress::Sync);
            match result {
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&dictionary())
                        .map_err(HeadersError::Zlib)?;
                    continue;
                }
                Err(error) => return Err(HeadersError::Zlib(error)),
            }
            let (taken_now, given_now) = (
                done(self.0.total_in(), start_in),
                done(self.0.total_out(), start_out),
            );
            if given_now > MAX_BLOCK {
                return Err(HeadersError::TooLong);
            }
            if given_now == out.len() {
                out.resize(out.len() * 2, 0);
            } else if taken_now >= block.len() || (taken_now, given_now) == (taken, given) {
                out.truncate(given_now);
                return Ok(out);
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeadersError> {
    let number = |block: &mut &[u8]| {
        let number = block
            .try_get_u32()
            .map_err(|_short| HeadersError::Malformed)?;
        usize::try_from(number).map_err(|_wide| HeadersError::Malformed)
    };
    let text = |block: &mut &[u8]| {
        let length = number(block)?;
        if length > block.len() {
            return Err(HeadersError::Malformed);
        }
        let (text, rest) = block.split_at(length);
        *block = rest;
        String::from_utf8(text.to_vec()).map_err(|_binary| HeadersError::Malformed)
    };
    let count = number(&mut block)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?;
        headers.push((name, text(&mut block)?));
    }
    if block.is_empty() {
        Ok(headers)
    } else {
        Err(HeadersError::Malformed)
    }
}

/// Writes the blocks of one direction, in order.
pub(crate) struct Writer(Compress, bool);

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    /// At the start of a connection.
    pub(crate) fn new() -> Self {
        Self(Compress::new(Compression::fast(), true), false)
    }

    /// Compresses the next block.
    ///
    /// # Errors
    /// [`HeadersError::Deflate`]: the connection must end.
    pub(crate) fn write(&mut self, headers: &[(String, String)]) -> Result<Bytes, HeadersError> {
        if !self.1 {
            self.0
                .set_dictionary(&dictionary())
                .map_err(HeadersError::Deflate)?;
            self.1 = true;
        }
        let mut plain = vec![];
        let length = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
        plain.extend(length(headers.len()));
        for (name, value) in headers {
            for text in [name, value] {
                plain.extend(length(text.len()));
                plain.extend(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(plain.len() + 64);
        let start = self.0.total_in();
        loop {
            let taken = usize::try_from(self.0.total_in() - start).unwrap_or(usize::MAX);
            let rest = plain.get(taken..).unwrap_or_default();
            let room = out.capacity();
            self.0
                .compress_vec(rest, &mut out, FlushCompress::Sync)
                .map_err(HeadersError::Deflate)?;
            if out.len() < room {
                return Ok(out.into());
            }
            out.reserve(256);
        }
    }
}

//! Content digests: `sha256:` and 64 lower-case hexadecimal digits. Other algorithms are refused by name.

use std::fmt;
use std::io::{self, BufRead, Read};
use std::str::FromStr;

use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

/// A SHA-256 digest. OCI: descriptor.md#digests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digest([u8; 32]);

/// The text is no digest that is supported.
#[derive(Debug, thiserror::Error)]
#[error("not a sha256 digest: {0:?}")]
pub(crate) struct ParseDigestError(String);

impl Digest {
    /// The digest of `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The 64 hexadecimal digits alone.
    pub(crate) fn hex(&self) -> String {
        let mut text = self.to_string();
        text.split_off("sha256:".len())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = ParseDigestError;

    fn from_str(text: &str) -> Result<Self, ParseDigestError> {
        let bad = || ParseDigestError(text.chars().take(160).collect());
        let hex = text.strip_prefix("sha256:").ok_or_else(bad)?;
        let id: crate::base::id::Id = hex.parse().map_err(|_error| bad())?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(id.to_string().as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_error| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_error| bad())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Computes a digest piece by piece.
#[derive(Clone)]
pub(crate) struct Hasher(Context);

impl Hasher {
    /// A fresh one.
    pub(crate) fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    /// Adds `bytes`.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all that was added.
    pub(crate) fn finish(self) -> Digest {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.0.finish().as_ref());
        Digest(bytes)
    }
}

/// A reader that hashes and counts what is consumed of `inner`.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R: BufRead> HashingReader<R> {
    /// Hashes what is consumed of `inner` from now on.
    pub(crate) fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Hasher::new(),
            bytes: 0,
        }
    }

    /// Reads `inner` to its end.
    ///
    /// # Errors
    ///
    /// Those of `inner`.
    pub(crate) fn drain(&mut self) -> io::Result<()> {
        loop {
            let length = self.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }

    /// Reads `inner` to its end; digest and size of all of it.
    ///
    /// # Errors
    ///
    /// Those of `inner`.
    pub(crate) fn finish(mut self) -> io::Result<(Digest, u64)> {
        self.drain()?;
        Ok(self.so_far())
    }

    /// Digest and size of what was consumed.
    pub(crate) fn so_far(&self) -> (Digest, u64) {
        (self.hasher.clone().finish(), self.bytes)
    }

    /// Bytes consumed so far.
    pub(crate) fn consumed(&self) -> u64 {
        self.bytes
    }
}

impl<R: BufRead> BufRead for HashingReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        // `fill_buf` again returns the same bytes: the buffer is not empty, so nothing is read.
        if amount > 0
            && let Ok(buffer) = self.inner.fill_buf()
        {
            self.hasher.update(&buffer[..amount.min(buffer.len())]);
        }
        self.inner.consume(amount);
        self.bytes += amount as u64;
    }
}

impl<R: BufRead> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_of_known_texts() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
        let mut reader = HashingReader::new(io::BufReader::with_capacity(3, &b"hello world"[..]));
        let mut first = [0; 5];
        reader.read_exact(&mut first).unwrap();
        assert_eq!(reader.finish().unwrap(), (Digest::of(b"hello world"), 11));
        for bad in [
            "",
            "sha256:",
            "sha512:00",
            &empty[7..],
            &empty.to_uppercase(),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}

//! Image archives: what `docker save` and OCI tools write, as a file or a pipe, compressed or not.
//!
//! Nothing of an archive is unpacked but the layers that its documents name: the archive is scanned for
//! where its files are, and they are read from there. What cannot be sought in is copied to an unlinked
//! temporary file first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags};
use serde::Deserialize;

use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::manifest::MAX_DOCUMENT;
use crate::images::tar::{EntryKind, TarReader};

const MAX_FILES: usize = 100_000;
/// Links of an archive that lead to links.
const MAX_HOPS: usize = 8;

/// Where a file lies in the archive.
#[derive(Clone, Copy, Debug)]
struct Place {
    offset: u64,
    size: u64,
}

/// An archive whose files can be read in any order. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Archive {
    file: Arc<File>,
    files: Arc<HashMap<String, Place>>,
    links: Arc<HashMap<String, String>>,
}

/// Docker: `manifest.json` of an archive.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct DockerManifest {
    /// Path of the config.
    pub(crate) config: String,
    /// Names.
    #[serde(default)]
    pub(crate) repo_tags: Option<Vec<String>>,
    /// Paths of the layers, bottom first.
    #[serde(default)]
    pub(crate) layers: Option<Vec<String>>,
}

impl Archive {
    /// Finds what is in `input`; a copy is made in `temporary` where it cannot be sought in.
    ///
    /// Blocks on the input.
    ///
    /// # Errors
    ///
    /// [`ImageError::Archive`]: malformed; [`ImageError::Io`].
    pub(crate) fn open(input: File, temporary: &Path) -> Result<Self, ImageError> {
        let file = seekable(input, temporary)?;
        let (mut files, mut links) = (HashMap::new(), HashMap::new());
        let reader = BufReader::with_capacity(64 * 1024, &file);
        let mut tar = TarReader::new(reader);
        let malformed =
            |error: crate::images::tar::TarError| ImageError::archive("archive", error.to_string());
        while let Some(entry) = tar.next_entry().map_err(malformed)? {
            let path = plain(&String::from_utf8_lossy(&entry.path));
            match entry.kind {
                EntryKind::File if entry.segments.is_none() => {
                    let place = Place {
                        offset: tar.offset(),
                        size: entry.size,
                    };
                    files.insert(path, place);
                }
                EntryKind::Symlink => {
                    let above = path.rsplit_once('/').map_or("", |(above, _)| above);
                    let target = String::from_utf8_lossy(&entry.link);
                    links.insert(path.clone(), plain(&format!("{above}/{target}")));
                }
                EntryKind::HardLink => {
                    links.insert(path, plain(&String::from_utf8_lossy(&entry.link)));
                }
                _ => {}
            }
            if files.len() + links.len() > MAX_FILES {
                return Err(ImageError::TooLarge {
                    what: "archive".into(),
                    limit: format!("{MAX_FILES} files"),
                });
            }
            skip(&mut tar)?;
        }
        drop(tar);
        Ok(Self {
            file: Arc::new(file),
            files: Arc::new(files),
            links: Arc::new(links),
        })
    }

    fn place(&self, path: &str) -> Result<Place, ImageError> {
        let mut path = plain(path);
        for _ in 0..MAX_HOPS {
            if let Some(place) = self.files.get(&path) {
                return Ok(*place);
            }
            match self.links.get(&path) {
                Some(target) => path.clone_from(target),
                None => break,
            }
        }
        Err(ImageError::archive(
            "archive",
            format!("{path:?} is missing in it"),
        ))
    }

    /// Is there a file of this name?
    pub(crate) fn has(&self, path: &str) -> bool {
        self.place(path).is_ok()
    }

    /// A small file, whole.
    ///
    /// # Errors
    ///
    /// [`ImageError::Archive`]: it is missing; [`ImageError::TooLarge`]; [`ImageError::Io`].
    pub(crate) fn document(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let place = self.place(path)?;
        if place.size > MAX_DOCUMENT {
            return Err(ImageError::TooLarge {
                what: format!("archive: {path}"),
                limit: format!("{MAX_DOCUMENT} bytes"),
            });
        }
        let mut bytes = vec![];
        self.reader_of(place)
            .read_to_end(&mut bytes)
            .map_err(|error| ImageError::io("read", path, error))?;
        Ok(bytes)
    }

    /// A document by digest, in an OCI layout.
    ///
    /// # Errors
    ///
    /// As [`Self::document`], and [`ImageError::Digest`].
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = blob_path(digest);
        let bytes = self.document(&path)?;
        let actual = Digest::of(&bytes);
        match actual == *digest {
            true => Ok(bytes),
            false => Err(ImageError::Digest {
                what: format!("archive: {path}"),
                expected: digest.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    /// A file as a stream, with its size.
    ///
    /// # Errors
    ///
    /// [`ImageError::Archive`]: it is missing.
    pub(crate) fn stream(
        &self,
        path: &str,
    ) -> Result<(impl BufRead + Send + use<>, u64), ImageError> {
        let place = self.place(path)?;
        Ok((
            BufReader::with_capacity(256 * 1024, self.reader_of(place)),
            place.size,
        ))
    }

    fn reader_of(&self, place: Place) -> Part {
        Part {
            file: self.file.clone(),
            place,
        }
    }
}

/// Where an OCI layout has a blob.
pub(crate) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// A part of the archive, read by position: several at once.
struct Part {
    file: Arc<File>,
    place: Place,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.place.size).map_or(buffer.len(), |n| n.min(buffer.len()));
        if wanted == 0 {
            return Ok(0);
        }
        let length = self
            .file
            .read_at(&mut buffer[..wanted], self.place.offset)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.place.offset += length as u64;
        self.place.size -= length as u64;
        Ok(length)
    }
}

/// `a/./b/../c` as `a/c`; what would lead above the top stays at the top.
fn plain(path: &str) -> String {
    let mut parts = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Moves behind the data of the entry without reading it where that pays; the archive must be that long.
fn skip(tar: &mut TarReader<BufReader<&File>>) -> Result<(), ImageError> {
    let left = tar.data_left();
    if left < 64 * 1024 {
        return Ok(());
    }
    let end = tar.offset() + left;
    let reader = tar.data_was_skipped();
    let failed = |error| ImageError::io("seek", "archive", error);
    let distance = i64::try_from(left)
        .map_err(|_error| ImageError::archive("archive", "an entry of impossible size"))?;
    reader.seek_relative(distance).map_err(failed)?;
    let length = reader.get_ref().metadata().map_err(failed)?.len();
    match end <= length {
        true => Ok(()),
        false => Err(ImageError::archive("archive", "it is cut off")),
    }
}

/// The input itself when it is a plain file, else an unlinked copy, decompressed.
fn seekable(mut input: File, temporary: &Path) -> Result<File, ImageError> {
    let failed = |error| ImageError::io("read", "archive", error);
    let regular = input.metadata().map_err(failed)?.is_file();
    if regular {
        let mut head = [0; 6];
        let mut filled = 0;
        // The file's position may not be its start: from there on it is the archive.
        let start = input.stream_position().map_err(failed)?;
        while filled < head.len() {
            match input.read(&mut head[filled..]).map_err(failed)? {
                0 => break,
                length => filled += length,
            }
        }
        input.seek(SeekFrom::Start(start)).map_err(failed)?;
        if start == 0 && !is_packed(&head[..filled]) {
            return Ok(input);
        }
    }
    let copy = rustix::fs::openat(
        CWD,
        temporary,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map_err(|errno| ImageError::io("create temporary file in", temporary, errno))?;
    let mut copy = File::from(copy);
    let mut reader = BufReader::with_capacity(256 * 1024, input);
    let head = reader.fill_buf().map_err(failed)?;
    let copied = match head {
        [0x1f, 0x8b, ..] => transfer(flate2::bufread::MultiGzDecoder::new(reader), &mut copy),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = zstd::stream::read::Decoder::with_buffer(reader).map_err(failed)?;
            transfer(decoder, &mut copy)
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] | [b'B', b'Z', b'h', ..] => {
            return Err(ImageError::Unsupported {
                what: "archive".into(),
                reason: "compressed with xz or bzip2: decompress it, or use gzip or zstd",
            });
        }
        _ => transfer(reader, &mut copy),
    };
    copied?;
    copy.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(copy)
}

fn is_packed(head: &[u8]) -> bool {
    matches!(
        head,
        [0x1f, 0x8b, ..]
            | [0x28, 0xb5, 0x2f, 0xfd, ..]
            | [0xfd, b'7', b'z', b'X', b'Z', ..]
            | [b'B', b'Z', b'h', ..]
    )
}

fn transfer(mut from: impl Read, to: &mut File) -> Result<(), ImageError> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let length = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(match error.kind() {
                    io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::InvalidData
                    | io::ErrorKind::InvalidInput => {
                        ImageError::archive("archive", format!("cannot be decompressed: {error}"))
                    }
                    _ => ImageError::io("read", "archive", error),
                });
            }
        };
        to.write_all(&buffer[..length])
            .map_err(|error| ImageError::io("write", "temporary copy of the archive", error))?;
    }
}

//! Reads tar: the ustar, PAX and GNU forms that image builders write, sparse files included. Nothing
//! here touches a file; what comes out are plain values whose ranges were checked. Every length that
//! the archive announces is bounded before memory is taken for it.
//!
//! POSIX: pax(1) "ustar Interchange Format", "pax Header Block". GNU: tar manual, "Basic Tar Format".

use std::io::{self, BufRead};

use crate::images::tar_fields::{
    Pax, checksum_ok, decimal, header_path, number, pax_record, signed_number, until_nul,
};

const BLOCK: usize = 512;
/// A PAX header, a GNU long name, a sparse map: none is longer.
const MAX_META: u64 = 1 << 20;
const MAX_SEGMENTS: usize = 65_536;
/// Linux: no path given to a system call may be longer.
const MAX_PATH: usize = 4096;
/// Metadata blocks before one entry: long name, long link, global and own PAX header.
const MAX_META_BLOCKS: u32 = 16;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The stream under it failed (decompression, network, disk).
    #[error("the data cannot be read")]
    Read(#[source] io::Error),
    /// It ends inside an entry.
    #[error("the archive is cut off")]
    Truncated,
    /// It is malformed.
    #[error("offset {offset}: {reason}")]
    Malformed {
        /// Byte offset of the header block after the bad one.
        offset: u64,
        /// What is wrong.
        reason: &'static str,
    },
}

/// What an entry makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// Regular file with data.
    File,
    /// Another name of an earlier entry.
    HardLink,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
}

/// One entry; its data is read from the [`TarReader`].
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// As in the archive: not to be trusted.
    pub(crate) path: Vec<u8>,
    /// Target of a hard or symbolic link: not to be trusted.
    pub(crate) link: Vec<u8>,
    /// What it makes.
    pub(crate) kind: EntryKind,
    /// Permission bits, 0..=0o7777.
    pub(crate) mode: u32,
    /// Owner.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
    /// Size of the file it makes, holes included.
    pub(crate) size: u64,
    /// Seconds and nanoseconds since 1970.
    pub(crate) mtime: (i64, i64),
    /// Major and minor number of a device.
    pub(crate) device: (u64, u64),
    /// (name, value), in order.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// (offset, length) of the parts that hold data, ascending, when there are holes.
    pub(crate) segments: Option<Vec<(u64, u64)>>,
}

/// Reads entries one after the other.
pub(crate) struct TarReader<R> {
    input: R,
    offset: u64,
    data_left: u64,
    padding: u64,
}

impl<R: BufRead> TarReader<R> {
    /// Reads from the start of an archive.
    pub(crate) fn new(input: R) -> Self {
        Self {
            input,
            offset: 0,
            data_left: 0,
            padding: 0,
        }
    }

    /// The next entry, or `None` at the end. Data of the entry before that was not read is skipped.
    ///
    /// # Errors
    ///
    /// [`TarError`]; the reader must not be used any more.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut pax = Pax::default();
        let (mut long_path, mut long_link) = (None, None);
        for _ in 0..MAX_META_BLOCKS {
            self.skip_data()?;
            let Some(header) = self.read_header()? else {
                return Ok(None);
            };
            let size = self.number(&header[124..136])?;
            match header[156] {
                b'x' => pax = self.read_pax(size)?,
                // Global headers of image layers hold comments (git archives); none counts here.
                b'g' => {
                    let _comment = self.read_meta(size)?;
                }
                b'L' => long_path = Some(until_nul(&self.read_meta(size)?).to_vec()),
                b'K' => long_link = Some(until_nul(&self.read_meta(size)?).to_vec()),
                _ => return self.entry(&header, pax, long_path, long_link).map(Some),
            }
        }
        Err(self.malformed("too many headers before an entry"))
    }

    /// The data not yet read, as far as it is at hand: empty at the end of the entry's data.
    ///
    /// # Errors
    ///
    /// [`TarError::Read`], [`TarError::Truncated`].
    pub(crate) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.data_left == 0 {
            return Ok(&[]);
        }
        let buffer = self.input.fill_buf().map_err(TarError::Read)?;
        if buffer.is_empty() {
            return Err(TarError::Truncated);
        }
        let length = usize::try_from(self.data_left).map_or(buffer.len(), |n| n.min(buffer.len()));
        Ok(&buffer[..length])
    }

    /// Marks `amount` bytes of [`Self::data`] as read.
    pub(crate) fn consume(&mut self, amount: usize) {
        self.input.consume(amount);
        self.offset += amount as u64;
        self.data_left = self.data_left.saturating_sub(amount as u64);
    }

    /// Byte offset of what is read next.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the entry's data in the archive that were not read yet.
    pub(crate) fn data_left(&self) -> u64 {
        self.data_left
    }

    /// The stream behind what was read.
    pub(crate) fn into_inner(self) -> R {
        self.input
    }

    /// Tells that the caller has moved the stream under this reader past the entry's data.
    pub(crate) fn data_was_skipped(&mut self) -> &mut R {
        self.offset += self.data_left;
        self.data_left = 0;
        &mut self.input
    }

    fn malformed(&self, reason: &'static str) -> TarError {
        TarError::Malformed {
            offset: self.offset,
            reason,
        }
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        self.data_left += std::mem::take(&mut self.padding);
        loop {
            let length = self.data()?.len();
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }

    /// One block; `None` when the stream ends before it.
    fn read_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let buffer = self.input.fill_buf().map_err(TarError::Read)?;
            if buffer.is_empty() {
                return match filled {
                    0 => Ok(None),
                    _ => Err(TarError::Truncated),
                };
            }
            let length = buffer.len().min(BLOCK - filled);
            block[filled..filled + length].copy_from_slice(&buffer[..length]);
            self.input.consume(length);
            filled += length;
        }
        self.offset += BLOCK as u64;
        Ok(Some(block))
    }

    /// A header whose sum is right; `None` at the end of the archive.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let Some(mut block) = self.read_block()? else {
            return Ok(None);
        };
        if block == [0; BLOCK] {
            match self.read_block()? {
                None => return Ok(None),
                Some(second) if second == [0; BLOCK] => {
                    self.end()?;
                    return Ok(None);
                }
                Some(second) => block = second,
            }
            return Err(self.malformed(match checksum_ok(&block) {
                true => "an entry behind the end mark",
                false => "garbage behind the end mark",
            }));
        }
        if !checksum_ok(&block) {
            return Err(self.malformed("the checksum of a header is wrong"));
        }
        Ok(Some(block))
    }

    /// What begins with an end mark and goes on with something else (the image of a filesystem does) is no archive. Behind
    /// entries it is padding, as others take it.
    fn end(&mut self) -> Result<(), TarError> {
        const ONLY_THE_MARK: u64 = 2 * BLOCK as u64;
        if self.offset > ONLY_THE_MARK {
            return Ok(());
        }
        loop {
            let buffer = self.input.fill_buf().map_err(TarError::Read)?;
            let (length, empty) = (buffer.len(), buffer.iter().all(|byte| *byte == 0));
            if !empty {
                return Err(
                    self.malformed("it begins with an end mark, and something else follows")
                );
            }
            if length == 0 {
                return Ok(());
            }
            self.input.consume(length);
        }
    }

    fn read_meta(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > MAX_META {
            return Err(self.malformed("a name or extended header is longer than 1 MiB"));
        }
        self.set_data(size);
        let mut bytes = vec![];
        loop {
            let data = self.data()?;
            if data.is_empty() {
                return Ok(bytes);
            }
            bytes.extend_from_slice(data);
            let length = data.len();
            self.consume(length);
        }
    }

    fn set_data(&mut self, size: u64) {
        self.data_left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn number(&self, field: &[u8]) -> Result<u64, TarError> {
        number(field).ok_or_else(|| self.malformed("a number of a header is malformed"))
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        mut pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let flag = header[156];
        let header_path = header_path(header);
        let kind = match flag {
            b'0' | 0 | b'7' if header_path.ends_with(b"/") && flag == 0 => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            _ => return Err(self.malformed("an entry of an unknown type")),
        };
        let stored = match (kind, pax.size) {
            (EntryKind::File, Some(size)) => size,
            (EntryKind::File, None) => self.number(&header[124..136])?,
            _ => 0,
        };
        if stored > 1 << 62 {
            return Err(self.malformed("an impossible size"));
        }
        self.set_data(stored);
        let mtime = match pax.mtime {
            Some(time) => time,
            None => (signed_number(&header[136..148]).unwrap_or(0), 0),
        };
        let id = |named: Option<u64>, field: &[u8]| match named {
            Some(id) => Ok(id),
            None => self.number(field),
        };
        let (uid, gid) = (
            id(pax.uid, &header[108..116])?,
            id(pax.gid, &header[116..124])?,
        );
        let device = match kind {
            EntryKind::Char | EntryKind::Block => (
                self.number(&header[329..337])?,
                self.number(&header[337..345])?,
            ),
            _ => (0, 0),
        };
        let mode = self.number(&header[100..108])? & 0o7777;
        let mut entry = Entry {
            path: vec![],
            link: pax
                .link
                .take()
                .or(long_link)
                .unwrap_or_else(|| until_nul(&header[157..257]).to_vec()),
            kind,
            mode: u32::try_from(mode).unwrap_or(0),
            uid: self.id(uid)?,
            gid: self.id(gid)?,
            size: stored,
            mtime,
            device,
            xattrs: std::mem::take(&mut pax.xattrs),
            segments: None,
        };
        if flag == b'S' {
            self.gnu_sparse(header, &mut entry)?;
        } else if pax.sparse && kind == EntryKind::File {
            self.pax_sparse(&mut pax, &mut entry)?;
        }
        entry.path = pax
            .sparse_name
            .or(pax.path)
            .or(long_path)
            .unwrap_or(header_path);
        if entry.path.len() > MAX_PATH || entry.link.len() > MAX_PATH {
            return Err(self.malformed("a path longer than 4096 bytes"));
        }
        if entry.path.contains(&0) || entry.link.contains(&0) {
            return Err(self.malformed("a path with a NUL byte"));
        }
        Ok(entry)
    }

    fn id(&self, id: u64) -> Result<u32, TarError> {
        match u32::try_from(id) {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => Err(self.malformed("a user or group id above 4294967294")),
        }
    }

    fn read_pax(&mut self, size: u64) -> Result<Pax, TarError> {
        let bytes = self.read_meta(size)?;
        let mut pax = Pax::default();
        let mut rest = &bytes[..];
        // Some writers pad the last record with NULs.
        while !rest.is_empty() && rest[0] != 0 {
            let record = pax_record(rest);
            let (key, value, length) =
                record.ok_or_else(|| self.malformed("a malformed extended header"))?;
            pax.set(key, value)
                .ok_or_else(|| self.malformed("a bad value in an extended header"))?;
            rest = &rest[length..];
        }
        Ok(pax)
    }

    /// Old GNU form: four segments in the header, more in blocks that follow.
    fn gnu_sparse(&mut self, header: &[u8; BLOCK], entry: &mut Entry) -> Result<(), TarError> {
        let mut map = vec![];
        self.gnu_segments(&header[386..482], &mut map)?;
        let mut more = header[482] != 0;
        while more {
            let block = self.read_block()?.ok_or(TarError::Truncated)?;
            self.gnu_segments(&block[..504], &mut map)?;
            more = block[504] != 0;
        }
        entry.size = self.number(&header[483..495])?;
        self.check_segments(&map, entry.size, self.data_left)?;
        entry.segments = Some(map);
        Ok(())
    }

    fn gnu_segments(&self, fields: &[u8], map: &mut Vec<(u64, u64)>) -> Result<(), TarError> {
        for field in fields.chunks_exact(24) {
            if field[0] == 0 {
                break;
            }
            map.push((self.number(&field[..12])?, self.number(&field[12..])?));
        }
        match map.len() > MAX_SEGMENTS {
            true => Err(self.malformed("a sparse file of more than 65536 parts")),
            false => Ok(()),
        }
    }

    /// PAX forms: 0.x have the map in the extended header, 1.0 at the head of the data.
    fn pax_sparse(&mut self, pax: &mut Pax, entry: &mut Entry) -> Result<(), TarError> {
        let mut numbers = std::mem::take(&mut pax.sparse_map);
        if pax.sparse_major == Some(1) && pax.sparse_minor == Some(0) {
            numbers = self.sparse_map_in_data()?;
        } else if pax.sparse_major.is_some_and(|major| major != 0) {
            return Err(self.malformed("a sparse file of an unknown version"));
        }
        if !numbers.len().is_multiple_of(2) || numbers.len() > 2 * MAX_SEGMENTS {
            return Err(self.malformed("a malformed map of a sparse file"));
        }
        let map: Vec<_> = numbers
            .chunks_exact(2)
            .map(|pair| (pair[0], pair[1]))
            .collect();
        entry.size = pax
            .sparse_size
            .ok_or_else(|| self.malformed("a sparse file without its size"))?;
        self.check_segments(&map, entry.size, self.data_left)?;
        entry.segments = Some(map);
        Ok(())
    }

    fn sparse_map_in_data(&mut self) -> Result<Vec<u64>, TarError> {
        let (mut numbers, mut text, mut wanted) = (vec![], vec![], None);
        while wanted.is_none_or(|wanted| numbers.len() < wanted) {
            if self.data_left < BLOCK as u64 {
                return Err(self.malformed("a malformed map of a sparse file"));
            }
            let block = self.read_block()?.ok_or(TarError::Truncated)?;
            self.data_left -= BLOCK as u64;
            for byte in block {
                if byte != b'\n' {
                    text.push(byte);
                    if text.len() > 20 {
                        return Err(self.malformed("a malformed map of a sparse file"));
                    }
                    continue;
                }
                let number = decimal(&text);
                let number =
                    number.ok_or_else(|| self.malformed("a malformed map of a sparse file"))?;
                text.clear();
                match wanted {
                    None if number > MAX_SEGMENTS as u64 => {
                        return Err(self.malformed("a sparse file of more than 65536 parts"));
                    }
                    None => wanted = usize::try_from(number).ok().map(|count| 2 * count),
                    Some(wanted) if numbers.len() < wanted => numbers.push(number),
                    Some(_) => {}
                }
                if wanted.is_some_and(|wanted| numbers.len() == wanted) {
                    break;
                }
            }
        }
        Ok(numbers)
    }

    fn check_segments(&self, map: &[(u64, u64)], size: u64, stored: u64) -> Result<(), TarError> {
        let (mut end, mut sum) = (0u64, 0u64);
        for (offset, length) in map {
            let next = offset
                .checked_add(*length)
                .filter(|next| *next <= size && *offset >= end);
            end = next.ok_or_else(|| self.malformed("a map of a sparse file out of order"))?;
            sum += length;
        }
        match sum == stored && i64::try_from(size).is_ok() {
            true => Ok(()),
            false => Err(self.malformed("a sparse file whose map does not fit its data")),
        }
    }
}

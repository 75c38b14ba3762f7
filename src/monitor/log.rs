//! The CRI log of a container: `2026-11-20T10:00:00.000000000Z stdout F text`.
//!
//! A line longer than the limit is split: its first pieces carry the tag `P`, the last one `F`. What is left
//! without a newline at the end of the output gets `P` and a newline, so that the file stays parseable.
//! Every other byte, `\r` included, is kept as it is.
//!
//! Nothing is lost when the file cannot be written (disk full): what is formatted is held back, the caller
//! stops reading the container's output (see [`LogFile::is_blocked`]) and tries again later. So at most one
//! read and one batch per container wait in memory, and the container is slowed down by its full pipe.
//!
//! Rotation (kubelet renames the file, then asks for it to be opened again): whole lines only are ever in a
//! file. Where a write stopped in the middle of a line, that piece is taken back before the new file is used.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;

use crate::base::clock::Timestamp;

mod place;
#[cfg(test)]
mod tests;

pub(crate) use place::Refused;

/// Largest number of bytes in one line of a log, text only; also the size of one read.
pub(crate) const MAX_LINE: usize = 16 * 1024;
/// Size of the buffer in which a batch of lines is formatted: any line fits.
pub(crate) const BATCH: usize = 2 * MAX_LINE;
/// `2026-11-20T10:00:00.000000000Z stdout F `.
const PREFIX: usize = STAMP + 10;
const STAMP: usize = 30;
/// Most lines are not longer.
const SHORT: usize = 128;

/// Which output a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Standard output, and everything of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What one output has given that is not in the log yet.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// Start of a line whose end has not come.
    line: Vec<u8>,
    /// Read, not formatted: the log was blocked.
    unread: Vec<u8>,
    /// The output has ended.
    ended: bool,
}

impl Pending {
    /// Whether everything that was read is written or held by the file.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.line.is_empty() && self.unread.is_empty()
    }
}

/// An open log, or none (output is dropped).
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: Option<File>,
    max_line: usize,
    /// Formatted lines that could not be written; starts at the start of a line.
    held: Vec<u8>,
    /// So many bytes of `held` are in the file all the same.
    held_written: usize,
    stamp: Stamp,
}

impl LogFile {
    /// Opens (or creates with mode 0640) the log at `path`, its directory made where it is missing. An empty
    /// path: whatever is written is dropped. `max_line` 0 or above [`MAX_LINE`] means [`MAX_LINE`].
    ///
    /// # Errors
    /// [`Refused`]: a link on the way, something that is no file, or what the kernel says.
    pub(crate) fn open(path: PathBuf, max_line: usize) -> Result<Self, Refused> {
        let file = if path.as_os_str().is_empty() {
            None
        } else {
            Some(place::open(&path, true)?)
        };
        let max_line = if (1..=MAX_LINE).contains(&max_line) {
            max_line
        } else {
            MAX_LINE
        };
        Ok(Self {
            path,
            file,
            max_line,
            held: Vec::new(),
            held_written: 0,
            stamp: Stamp::default(),
        })
    }

    /// Whether the last write failed. Then no more output should be read; call [`LogFile::retry`] at times.
    pub(crate) fn is_blocked(&self) -> bool {
        !self.held.is_empty()
    }

    /// Opens the path again and uses the new file from now on. On an error the old one stays in use.
    ///
    /// # Errors
    /// As [`LogFile::open`].
    pub(crate) fn reopen(&mut self) -> Result<(), Refused> {
        let Some(old) = &self.file else {
            return Ok(());
        };
        let new = place::open(&self.path, false)?;
        if self.held_written > 0 && take_back(old, self.held_written).is_ok() {
            self.held_written = 0;
        }
        self.file = Some(new);
        if self.is_blocked() {
            self.write_held();
        }
        Ok(())
    }

    /// Takes what was read from one output. `batch` (at least [`BATCH`] bytes) is used for formatting.
    pub(crate) fn write(
        &mut self,
        source: Source,
        pending: &mut Pending,
        input: &[u8],
        batch: &mut [u8],
        now: Timestamp,
    ) {
        if self.file.is_none() {
            return;
        }
        if self.is_blocked() {
            pending.unread.extend_from_slice(input);
            return;
        }
        let stamp = self.stamp.at(now);
        let (full, partial) = (prefix(stamp, source, b'F'), prefix(stamp, source, b'P'));
        let (mut rest, mut used) = (input, 0);
        while !rest.is_empty() {
            let room = self.max_line - pending.line.len();
            let window = rest.get(..=room).unwrap_or(rest);
            let (prefix, text, end): (_, _, &[u8]) = match find_newline(window) {
                Some(at) => (&full, &rest[..=at], b""),
                None if window.len() > room => (&partial, &rest[..room], b"\n"),
                None => {
                    pending.line.extend_from_slice(rest);
                    break;
                }
            };
            if batch.len() - used < PREFIX + self.max_line + 1 {
                self.write_batch(&batch[..used]);
                used = 0;
                if self.is_blocked() {
                    pending.unread.extend_from_slice(rest);
                    return;
                }
            }
            batch[used..used + PREFIX].copy_from_slice(prefix);
            used += PREFIX;
            if !pending.line.is_empty() {
                used = append(batch, used, &pending.line);
            }
            // Copies of a fixed length are much faster; what is too much is overwritten by the next line.
            match (rest.get(..SHORT), batch.get_mut(used..used + SHORT)) {
                (Some(from), Some(to)) if text.len() <= SHORT => {
                    to.copy_from_slice(from);
                    used += text.len();
                }
                _ => used = append(batch, used, text),
            }
            used = append(batch, used, end);
            rest = &rest[text.len()..];
            pending.line.clear();
        }
        if pending.line.is_empty() {
            pending.line = Vec::new();
        }
        self.write_batch(&batch[..used]);
    }

    /// The output has ended: what is left without a newline is written.
    pub(crate) fn end(&mut self, source: Source, pending: &mut Pending, now: Timestamp) {
        pending.ended = true;
        if self.is_blocked() || !pending.unread.is_empty() || pending.line.is_empty() {
            return;
        }
        let mut line = Vec::with_capacity(PREFIX + pending.line.len() + 1);
        line.extend_from_slice(&prefix(self.stamp.at(now), source, b'P'));
        line.append(&mut pending.line);
        line.push(b'\n');
        pending.line = Vec::new();
        self.write_batch(&line);
    }

    /// Tries again to write what is held, then what waited behind it.
    pub(crate) fn retry(
        &mut self,
        outputs: &mut [(Source, &mut Pending)],
        batch: &mut [u8],
        now: Timestamp,
    ) {
        if !self.write_held() {
            return;
        }
        for (source, pending) in outputs {
            let unread = std::mem::take(&mut pending.unread);
            self.write(*source, pending, &unread, batch, now);
            if pending.ended {
                self.end(*source, pending, now);
            }
        }
    }

    fn write_held(&mut self) -> bool {
        let held = std::mem::take(&mut self.held);
        let start = std::mem::take(&mut self.held_written);
        let Some(file) = &self.file else {
            return true;
        };
        let written = start + write_most(file, &held[start..]);
        self.hold(&held, written);
        !self.is_blocked()
    }

    fn write_batch(&mut self, batch: &[u8]) {
        if let Some(file) = &self.file {
            let written = write_most(file, batch);
            self.hold(batch, written);
        }
    }

    /// Keeps what of `lines` is not written, from the start of the line in which the write stopped.
    fn hold(&mut self, lines: &[u8], written: usize) {
        if written < lines.len() {
            let start = lines[..written]
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            self.held = lines[start..].to_vec();
            self.held_written = written - start;
        }
    }
}

/// Writes until all is written or an error comes; returns how much was.
fn write_most(mut file: &File, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match file.write(&bytes[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_held_for_later) => break,
        }
    }
    done
}

/// Cuts the last `count` bytes off a file that only we write to.
fn take_back(file: &File, count: usize) -> io::Result<()> {
    let size = file.metadata()?.len();
    let count = u64::try_from(count).unwrap_or(u64::MAX);
    file.set_len(size.saturating_sub(count))
}

fn prefix(stamp: [u8; STAMP], source: Source, tag: u8) -> [u8; PREFIX] {
    let mut out = [b' '; PREFIX];
    out[..STAMP].copy_from_slice(&stamp);
    out[STAMP + 1..STAMP + 7].copy_from_slice(match source {
        Source::Stdout => b"stdout",
        Source::Stderr => b"stderr",
    });
    out[STAMP + 8] = tag;
    out
}

fn append(batch: &mut [u8], used: usize, piece: &[u8]) -> usize {
    let end = used + piece.len();
    batch[used..end].copy_from_slice(piece);
    end
}

/// Position of the first newline; 32 bytes at a time.
fn find_newline(bytes: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::MAX / 0xff;
    const HIGH: u64 = ONES << 7;
    let found = |bytes: &[u8; 8]| {
        let zero_where_newline = u64::from_le_bytes(*bytes) ^ (ONES * 0x0a);
        zero_where_newline.wrapping_sub(ONES) & !zero_where_newline & HIGH
    };
    let (blocks, _) = bytes.as_chunks::<32>();
    let clean = blocks.iter().take_while(|block| {
        let (words, _) = block.as_chunks::<8>();
        words.iter().fold(0, |all, word| all | found(word)) == 0
    });
    let start = clean.count() * 32;
    let (words, tail) = bytes[start..].as_chunks::<8>();
    for (index, word) in words.iter().enumerate() {
        let found = found(word);
        if found != 0 {
            let byte = usize::try_from(found.trailing_zeros() / 8).unwrap_or_default();
            return Some(start + index * 8 + byte);
        }
    }
    let at = tail.iter().position(|byte| *byte == b'\n')?;
    Some(start + words.len() * 8 + at)
}

/// Text of the current time; the date is only computed anew when the second changes.
#[derive(Debug)]
struct Stamp {
    second: i64,
    text: [u8; STAMP],
}

impl Default for Stamp {
    fn default() -> Self {
        Self {
            second: 0,
            text: *b"1970-01-01T00:00:00.000000000Z",
        }
    }
}

impl Stamp {
    fn at(&mut self, now: Timestamp) -> [u8; STAMP] {
        const SECOND: i64 = 1_000_000_000;
        let (second, nanos) = (now.0.div_euclid(SECOND), now.0.rem_euclid(SECOND));
        if second != self.second {
            self.second = second;
            let (year, month, day) = date(second.div_euclid(86_400));
            let of_day = second.rem_euclid(86_400);
            for (range, number) in [
                (0..4, year),
                (5..7, month),
                (8..10, day),
                (11..13, of_day / 3600),
                (14..16, of_day / 60 % 60),
                (17..19, of_day % 60),
            ] {
                digits(&mut self.text[range], number);
            }
        }
        digits(&mut self.text[20..29], nanos);
        self.text
    }
}

/// `number` in decimal, with leading zeros, the lowest digits that fit.
fn digits(out: &mut [u8], mut number: i64) {
    for place in out.iter_mut().rev() {
        *place = b'0' + u8::try_from(number.rem_euclid(10)).unwrap_or_default();
        number /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn date(days: i64) -> (i64, i64, i64) {
    // Years here start on 1 March, so that the leap day comes last; an era is 400 years.
    const ERA: i64 = 146_097;
    let from_march = days + 719_468;
    let (era, day_of_era) = (from_march.div_euclid(ERA), from_march.rem_euclid(ERA));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / (ERA - 1)) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

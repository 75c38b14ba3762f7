//! Reading a container's log: lines of `time stream tag text`, as CRI has them.

use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use crate::cli::error::CliError;

/// A log that is read as it grows.
#[derive(Debug)]
pub(super) struct Follower {
    path: PathBuf,
    file: Option<std::fs::File>,
    rest: Vec<u8>,
}

impl Follower {
    /// A log that may not be there yet.
    pub(super) fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            file: None,
            rest: Vec::new(),
        }
    }

    /// Copies what is new to stdout and stderr.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub(super) fn copy(&mut self) -> Result<(), CliError> {
        if self.file.is_none() {
            match std::fs::File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(CliError::io(format!("open {}", self.path.display()))(error));
                }
            }
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let mut block = vec![0; 64 * 1024];
        loop {
            let count = file
                .read(&mut block)
                .map_err(CliError::io(format!("read {}", self.path.display())))?;
            if count == 0 {
                break;
            }
            self.rest.extend_from_slice(&block[..count]);
            let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
                continue;
            };
            let whole: Vec<u8> = self.rest.drain(..=end).collect();
            show(&whole).map_err(CliError::io("write what the container printed"))?;
        }
        Ok(())
    }
}

/// Writes the texts of whole lines to their streams.
fn show(lines: &[u8]) -> std::io::Result<()> {
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        if let Some((stream, text)) = text(line) {
            match stream {
                b"stderr" => err.write_all(text)?,
                _ => out.write_all(text)?,
            }
        }
    }
    out.flush()?;
    err.flush()
}

/// Stream and text of a line; the text ends in a line feed unless the line is a part (tag `P`).
fn text(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let (_time, stream, tag, text) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let text = match tag.first() {
        Some(b'P') => text.strip_suffix(b"\n").unwrap_or(text),
        _ => text,
    };
    Some((stream, text))
}

/// Removes the log and the directory made for it.
pub(super) fn remove(directory: &Path) {
    // What cannot be removed does no harm; the daemon never looks there.
    let _gone = std::fs::remove_dir_all(directory).is_ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_no_line_feed() {
        let line = b"2026-01-02T03:04:05.000000006Z stdout P abc\n";
        assert_eq!(text(line), Some((&b"stdout"[..], &b"abc"[..])));
        let line = b"2026-01-02T03:04:05.000000006Z stderr F a b\n";
        assert_eq!(text(line), Some((&b"stderr"[..], &b"a b\n"[..])));
        let line = b"2026-01-02T03:04:05.000000006Z stdout F \n";
        assert_eq!(text(line), Some((&b"stdout"[..], &b"\n"[..])));
        assert_eq!(text(b"not a log\n"), None);
    }
}

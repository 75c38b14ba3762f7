//! Reads the small files of one cgroup directory after another through the same two buffers.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use super::Cgroups;

/// Longer than any file that is read: the longest is `memory.stat`, about 2 KiB.
const CAPACITY: usize = 16 * 1024;

/// A directory to read from, and what was read last.
#[derive(Debug, Default)]
pub(super) struct Reader {
    path: Vec<u8>,
    directory: usize,
    text: Vec<u8>,
}

impl Reader {
    /// Goes to the directory of cgroup `path` for `controller`. False: there is no such hierarchy.
    pub(super) fn enter(&mut self, cgroups: &Cgroups, controller: &str, path: &str) -> bool {
        let Some(mount) = cgroups.mount(controller) else {
            return false;
        };
        self.go_to(mount);
        self.path
            .extend_from_slice(path.trim_start_matches('/').as_bytes());
        self.path.push(b'/');
        self.directory = self.path.len();
        true
    }

    /// Goes to a directory by its path.
    pub(super) fn go_to(&mut self, directory: &Path) {
        self.path.clear();
        self.path
            .extend_from_slice(directory.as_os_str().as_bytes());
        self.path.push(b'/');
        self.directory = self.path.len();
    }

    /// The file of that name, without the end of the last line; empty: it is not there, or cannot be read.
    pub(super) fn read(&mut self, name: &str) -> &[u8] {
        self.path.truncate(self.directory);
        self.path.extend_from_slice(name.as_bytes());
        let read = fill(&self.path, &mut self.text).unwrap_or(0);
        self.text[..read].trim_ascii_end()
    }
}

/// Reads a file in one or, where it is long, several reads; the bytes.
fn fill(path: &[u8], text: &mut Vec<u8>) -> rustix::io::Result<usize> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    text.resize(CAPACITY, 0);
    let mut filled = 0;
    while filled < text.len() {
        let read = rustix::io::read(&file, &mut text[filled..])?;
        filled += read;
        // The kernel makes such a file at once: a read that leaves room has all of it, but for lists
        // of many records, which come in pages.
        if read == 0 || filled < 2048 {
            break;
        }
    }
    Ok(filled)
}

/// Calls `visit` with every line of `KEY NUMBER`.
pub(super) fn each(text: &[u8], mut visit: impl FnMut(&[u8], u64)) {
    for line in text.split(|byte| *byte == b'\n') {
        let [key, value] = words(line);
        if let Some(value) = number(value) {
            visit(key, value);
        }
    }
}

/// The first word and what comes after it.
pub(super) fn words(line: &[u8]) -> [&[u8]; 2] {
    match line.iter().position(|byte| *byte == b' ') {
        Some(at) => [&line[..at], &line[at + 1..]],
        None => [line, b""],
    }
}

/// The number that is the whole text; absent: empty, `max`, negative or no number.
pub(super) fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// The number that is the first word.
pub(super) fn first_number(text: &[u8]) -> Option<u64> {
    number(words(text)[0])
}

/// `MAJOR:MINOR`.
pub(super) fn device_of(text: &[u8]) -> Option<(u32, u32)> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The sizes of huge pages that this kernel has, as cgroup files name them (`2MB`).
pub(super) fn huge_page_sizes() -> &'static [String] {
    static SIZES: OnceLock<Vec<String>> = OnceLock::new();
    SIZES.get_or_init(|| {
        let entries = std::fs::read_dir("/sys/kernel/mm/hugepages");
        let mut kib: Vec<u64> = entries
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.strip_prefix("hugepages-")?
                    .strip_suffix("kB")?
                    .parse()
                    .ok()
            })
            .collect();
        kib.sort_unstable();
        kib.into_iter().map(size_name).collect()
    })
}

/// A size in KiB as the kernel writes it, in the largest unit that is not below one.
fn size_name(kib: u64) -> String {
    match kib {
        _ if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        _ if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_the_kernel() {
        let mut seen = vec![];
        each(
            b"a 1\nb  2\nc -1\nd\ne 5 \nf 18446744073709551615",
            |key, value| {
                seen.push((String::from_utf8_lossy(key).into_owned(), value));
            },
        );
        assert_eq!(seen, [("a".into(), 1), ("f".into(), u64::MAX)]);
        assert_eq!(number(b"max"), None);
        assert_eq!(words(b"max 100000"), [&b"max"[..], b"100000"]);
        assert_eq!(device_of(b"8:16"), Some((8, 16)));
        assert_eq!(device_of(b"Total"), None);
        assert_eq!([64, 2048, 1 << 20].map(size_name), ["64KB", "2MB", "1GB"]);
    }

    #[test]
    fn files_long_and_short() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &[u8]| {
            let path = directory.path().join(name);
            crate::store::write_atomic(&path, text, 0o600, crate::store::Durability::Process)
                .unwrap();
        };
        let long = b"x".repeat(5000);
        put("long", &long);
        put("short", b"12\n");
        let mut reader = Reader::default();
        reader.go_to(directory.path());
        assert_eq!(reader.read("long"), long);
        assert_eq!(reader.read("short"), b"12");
        assert_eq!(reader.read("none"), b"");
    }
}

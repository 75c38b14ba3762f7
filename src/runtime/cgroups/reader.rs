//! Reads the small files of one cgroup directory after another through the same two buffers.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags};

use super::Cgroups;

/// Longer than any file of figures: the longest is `memory.stat`, about 2 KiB. Lists of pids may be longer.
const CAPACITY: usize = 8 * 1024;
/// More is not read of any file.
const MOST: usize = 1024 * 1024;
/// A first read shorter than this has the whole file.
const ALL_AT_ONCE: usize = 2048;
const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);

/// A directory to read from, and what was read last.
///
/// A path of a cgroup has many parts, and the kernel asks the filesystem about each: where several files
/// are read, they are opened from their directory.
#[derive(Debug, Default)]
pub(super) struct Reader {
    directory: Option<OwnedFd>,
    path: Vec<u8>,
    text: Vec<u8>,
}

impl Reader {
    /// Goes to the directory of cgroup `path` for `controller`. False: there is none.
    pub(super) fn enter(&mut self, cgroups: &Cgroups, controller: &str, path: &str) -> bool {
        if !self.place(cgroups, controller, path) {
            return false;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        self.directory = rustix::fs::open(&self.path[..], flags, Mode::empty()).ok();
        self.directory.is_some()
    }

    /// The file of that name in the directory, without the end of the last line; empty: it is not there,
    /// or cannot be read.
    pub(super) fn read(&mut self, name: &str) -> &[u8] {
        let opened = match &self.directory {
            Some(directory) => rustix::fs::openat(directory, name, FLAGS, Mode::empty()),
            None => Err(rustix::io::Errno::NOENT),
        };
        self.fill(opened)
    }

    /// One file of cgroup `path`, as [`Reader::read`].
    pub(super) fn read_one(
        &mut self,
        cgroups: &Cgroups,
        controller: &str,
        path: &str,
        name: &str,
    ) -> &[u8] {
        if !self.place(cgroups, controller, path) {
            return &[];
        }
        self.path.push(b'/');
        self.path.extend_from_slice(name.as_bytes());
        let opened = rustix::fs::open(&self.path[..], FLAGS, Mode::empty());
        self.fill(opened)
    }

    /// A file by its path, as [`Reader::read`].
    pub(super) fn read_path(&mut self, path: &str) -> &[u8] {
        let opened = rustix::fs::open(path, FLAGS, Mode::empty());
        self.fill(opened)
    }

    fn place(&mut self, cgroups: &Cgroups, controller: &str, path: &str) -> bool {
        let Some(mount) = cgroups.mount(controller) else {
            return false;
        };
        self.path.clear();
        self.path.extend_from_slice(mount.as_os_str().as_bytes());
        self.path.push(b'/');
        self.path
            .extend_from_slice(path.trim_start_matches('/').as_bytes());
        true
    }

    /// Reads a file in one or, where it is long, several reads.
    fn fill(&mut self, opened: rustix::io::Result<OwnedFd>) -> &[u8] {
        let Ok(file) = opened else {
            return &[];
        };
        if self.text.is_empty() {
            self.text.resize(CAPACITY, 0);
        }
        let mut filled = 0;
        while filled < MOST {
            if filled == self.text.len() {
                self.text.resize(filled * 2, 0);
            }
            match rustix::io::read(&file, &mut self.text[filled..]) {
                Ok(read) => {
                    filled += read;
                    // The kernel makes such a file at once: a read that leaves room has all of it, but
                    // for lists of many records, which come in pages.
                    if read == 0 || filled < ALL_AT_ONCE {
                        break;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return &[],
            }
        }
        self.text[..filled].trim_ascii_end()
    }
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
        let long = b"x".repeat(50_000);
        put("long", &long);
        put("short", b"12\n");
        let mut reader = Reader::default();
        let path = |name: &str| directory.path().join(name).display().to_string();
        assert_eq!(reader.read_path(&path("long")), long);
        assert_eq!(reader.read_path(&path("short")), b"12");
        assert_eq!(reader.read_path(&path("none")), b"");
        assert_eq!(reader.read("short"), b"");
    }
}

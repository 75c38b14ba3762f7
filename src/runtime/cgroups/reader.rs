//! Reads the small files of one cgroup after another through the same buffers and directories.

use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::OnceLock;

use rustix::fs::{AtFlags, Mode, OFlags};

use super::{Cgroups, open_files, stats};
use crate::base::stats::{CgroupStats, ProcessStats, Scope};

/// Longer than any file of figures: the longest is `memory.stat`, about 2 KiB. Lists of pids may be longer.
const CAPACITY: usize = 8 * 1024;
/// More is not read of any file.
const MOST: usize = 1024 * 1024;
/// A first read shorter than this has the whole file.
const ALL_AT_ONCE: usize = 2048;
const FLAGS: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC);

/// Most directories that are kept open: a pod's parents, one for each hierarchy of v1.
const PARENTS: usize = 12;

/// A cgroup to read from, and what was read last.
///
/// A path of a cgroup has many parts, and the kernel asks the filesystem about each: files are opened from the
/// directory *above* their cgroup, which stays open for the brothers that are read next.
#[derive(Debug, Default)]
pub(super) struct Reader {
    parents: Vec<Parent>,
    /// Index of the current one; absent: there is no such cgroup.
    at: Option<usize>,
    /// Which is given up next where there are too many.
    oldest: usize,
    /// `NAME/` of the cgroup, then the file's.
    path: Vec<u8>,
    /// Bytes of `path` that are the cgroup's.
    stem: usize,
    text: Vec<u8>,
}

/// Reads the figures of one cgroup after another.
#[derive(Debug)]
pub(crate) struct Readings<'a> {
    cgroups: &'a Cgroups,
    reader: Reader,
}

impl<'a> Readings<'a> {
    pub(super) fn new(cgroups: &'a Cgroups) -> Self {
        Self {
            cgroups,
            reader: Reader::default(),
        }
    }

    /// Figures of cgroup `path`; what it does not offer is absent, and everything where it is gone.
    pub(crate) fn stats(&mut self, path: &str, scope: Scope) -> CgroupStats {
        stats::read(self.cgroups, path, &mut self.reader, scope)
    }

    /// The processes of cgroup `path`, and what they have open. `first`: pid of the container's own
    /// process, 0: there is none.
    pub(crate) fn process_stats(&mut self, path: &str, first: u32) -> ProcessStats {
        open_files::of(self.cgroups, path, first, &mut self.reader)
    }
}

/// A directory that holds cgroups.
#[derive(Debug)]
struct Parent {
    path: Vec<u8>,
    directory: OwnedFd,
}

impl Reader {
    /// Goes to cgroup `path` for `controller`. False: there is no such controller, or nothing above the cgroup; the cgroup
    /// itself is not looked for, its files are just not there.
    pub(super) fn enter(&mut self, cgroups: &Cgroups, controller: &str, path: &str) -> bool {
        self.at = None;
        let Some(mount) = cgroups.mount(controller) else {
            return false;
        };
        let path = path.trim_matches('/');
        let (above, name) = match path.rsplit_once('/') {
            Some((above, name)) => (above, name),
            None => ("", path),
        };
        self.path.clear();
        self.path.extend_from_slice(mount.as_os_str().as_bytes());
        if !above.is_empty() {
            self.path.push(b'/');
            self.path.extend_from_slice(above.as_bytes());
        }
        self.at = self.parent();
        self.path.clear();
        // The root of the hierarchy has no name.
        self.path
            .extend_from_slice(if name.is_empty() { "." } else { name }.as_bytes());
        self.path.push(b'/');
        self.stem = self.path.len();
        self.at.is_some()
    }

    /// The open directory whose path is in `self.path`.
    fn parent(&mut self) -> Option<usize> {
        let known = |parent: &Parent| parent.path == self.path;
        if let Some(index) = self.parents.iter().position(known) {
            return Some(index);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.path[..], flags, Mode::empty()).ok()?;
        let path = self.path.clone();
        let parent = Parent { path, directory };
        if self.parents.len() < PARENTS {
            self.parents.push(parent);
            return Some(self.parents.len() - 1);
        }
        let index = self.oldest;
        self.oldest = (index + 1) % PARENTS;
        self.parents[index] = parent;
        Some(index)
    }

    /// The file of that name in the cgroup, without the end of the last line; empty: it is not there,
    /// or cannot be read.
    pub(super) fn read(&mut self, name: &str) -> &[u8] {
        self.path.truncate(self.stem);
        self.path.extend_from_slice(name.as_bytes());
        let opened = match self.at {
            Some(index) => {
                let directory = &self.parents[index].directory;
                rustix::fs::openat(directory, &self.path[..], FLAGS, Mode::empty())
            }
            None => Err(rustix::io::Errno::NOENT),
        };
        self.fill(opened)
    }

    /// Whether the cgroup has others below it; false where it is gone.
    pub(super) fn has_children(&mut self) -> bool {
        self.path.truncate(self.stem);
        let Some(index) = self.at else {
            return false;
        };
        let directory = &self.parents[index].directory;
        let status = rustix::fs::statat(directory, &self.path[..], AtFlags::empty());
        // Every cgroup has two links, and one more for each below it.
        status.is_ok_and(|status| status.st_nlink > 2)
    }

    /// A file by its path, as [`Reader::read`].
    pub(super) fn read_path(&mut self, path: &str) -> &[u8] {
        let opened = rustix::fs::open(path, FLAGS, Mode::empty());
        self.fill(opened)
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
        assert!(!reader.has_children());
    }
}

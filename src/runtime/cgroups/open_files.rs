//! What processes have open. Kernel: `/proc/<pid>/fd`, `/proc/<pid>/limits`, proc_pid(5).

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, RawDir};

use super::reader::{Reader, first_number};
use super::{Cgroups, Version, files};
use crate::base::stats::ProcessStats;
use crate::sys::credentials;

/// Descriptors of one container that are looked at to find its sockets: so many take a few milliseconds.
const MOST: u64 = 20_000;

/// Counts for the processes of cgroup `path` and those below it.
pub(super) fn of(cgroups: &Cgroups, path: &str, first: u32, reader: &mut Reader) -> ProcessStats {
    let controller = match cgroups.version() {
        Version::V2 => "",
        Version::V1 => "freezer",
    };
    if !reader.enter(cgroups, controller, path) {
        return count(&[], first, reader);
    }
    let text = reader.read("cgroup.procs");
    let mut pids: Vec<u32> = std::str::from_utf8(text)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    if reader.has_children()
        && let Some(directory) = cgroups.directory(controller, path)
    {
        for child in files::children(&directory) {
            pids.extend(files::processes(&child));
        }
    }
    count(&pids, first, reader)
}

/// Counts for these processes. Who ends meanwhile has nothing open.
fn count(pids: &[u32], first: u32, reader: &mut Reader) -> ProcessStats {
    let mut stats = ProcessStats {
        processes: u64::try_from(pids.len()).unwrap_or(u64::MAX),
        sockets: Some(0),
        open_files_limit: open_files_limit(first, reader),
        ..ProcessStats::default()
    };
    for pid in pids {
        let Ok(directory) = open(&format!("/proc/{pid}/fd")) else {
            continue;
        };
        // Since Linux 6.2 the size of this directory is the number of descriptors.
        let told = rustix::fs::fstat(&directory)
            .ok()
            .and_then(|status| u64::try_from(status.st_size).ok())
            .filter(|size| *size > 0);
        let too_many = |stats: &ProcessStats| stats.descriptors + told.unwrap_or(0) > MOST;
        if stats.sockets.is_none() || too_many(&stats) {
            stats.sockets = None;
            if let Some(told) = told {
                stats.descriptors += told;
                continue;
            }
        }
        let sockets = stats.sockets.is_some();
        let (descriptors, found) = look(directory.as_fd(), sockets);
        stats.descriptors += descriptors;
        stats.sockets = stats.sockets.map(|before| before + found);
    }
    stats
}

fn open(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

/// How many descriptors, and how many of them are sockets (0 where that is not asked).
fn look(directory: impl AsFd, sockets: bool) -> (u64, u64) {
    let mut space = [MaybeUninit::uninit(); 4096];
    let mut target = [0; 8];
    let mut entries = RawDir::new(directory.as_fd(), &mut space);
    let (mut descriptors, mut found) = (0, 0);
    while let Some(Ok(entry)) = entries.next() {
        if entry.file_name().to_bytes().starts_with(b".") {
            continue;
        }
        descriptors += 1;
        if !sockets {
            continue;
        }
        let link = rustix::fs::readlinkat_raw(&directory, entry.file_name(), &mut target[..]);
        if link.is_ok() && target == *b"socket:[" {
            found += 1;
        }
    }
    (descriptors, found)
}

/// The soft limit of open files of a process; absent: it is gone.
fn open_files_limit(pid: u32, reader: &mut Reader) -> Option<u64> {
    if pid == 0 {
        return None;
    }
    // Where we may ask, the kernel need not write the whole table.
    if let Ok(limit) = credentials::open_files_limit(pid) {
        return Some(limit);
    }
    let line = reader
        .read_path(&format!("/proc/{pid}/limits"))
        .split(|byte| *byte == b'\n')
        .find_map(|line| line.strip_prefix(b"Max open files"))?;
    first_number(line.trim_ascii_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own() {
        let _pair = std::os::unix::net::UnixStream::pair().unwrap();
        let own = std::process::id();
        let mut reader = Reader::default();
        let stats = count(&[own, u32::MAX], own, &mut reader);
        assert_eq!(stats.processes, 2);
        assert!(stats.sockets.unwrap() >= 2, "{stats:?}");
        assert!(stats.descriptors >= 5, "{stats:?}");
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        assert_eq!(stats.open_files_limit, limit);
        assert_eq!(count(&[], 0, &mut reader).open_files_limit, None);
    }
}

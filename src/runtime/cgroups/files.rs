//! Reading and writing the small files of cgroup filesystems.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;

use super::{CgroupError, file_error};

/// Writes `value` in one write(2), which is how cgroup files take a value.
///
/// # Errors
/// [`CgroupError::File`] with the value in its operation.
pub(super) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    write_raw(path, value).map_err(|e| file_error(&format!("write {value:?} to"), path, e))
}

/// As [`write`], with the bare error.
///
/// # Errors
/// Those of open(2) and write(2).
pub(super) fn write_raw(path: &Path, value: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

/// The whole file.
///
/// # Errors
/// [`CgroupError::File`].
#[cfg(feature = "daemon")]
pub(super) fn read(path: &Path) -> Result<String, CgroupError> {
    fs::read_to_string(path).map_err(|e| file_error("read", path, e))
}

/// The value after `key` in a file of `key value` lines; absent: no file or no such line.
pub(super) fn keyed(path: &Path, key: &str) -> Option<u64> {
    value_of(&fs::read_to_string(path).ok()?, key)
}

/// The value after `key` in a text of `key value` lines.
pub(super) fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

/// The number that is the whole file; absent: no file, `max`, or no number.
#[cfg(feature = "daemon")]
pub(super) fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Process ids of a cgroup and all below it.
pub(super) fn processes(directory: &Path) -> Vec<u32> {
    let mut pids: Vec<u32> = fs::read_to_string(directory.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for child in children(directory) {
        pids.extend(processes(&child));
    }
    pids
}

/// Cgroups directly below.
pub(super) fn children(directory: &Path) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return vec![];
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

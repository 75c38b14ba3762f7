//! Crash-safe small files: one per object, replaced whole or not at all.
//!
//! ```text
//! DIR/<key>.json      {"format":1,"checksum":"<16 hex>"}\n{the record}\n
//! DIR/.<key>.json.<n>.new  being written; left by a crash, swept by the next load
//! DIR/<key>.json.corrupt   set aside by a load, for people to look at
//! ROOT/lock           flock(2): one daemon a root; holds the pid, for the message only
//! ```
//!
//! A record is written beside its place and renamed, so a process that dies at any point leaves the old
//! or the new one. Without `Durable` a power cut can leave an empty or stale file: the checksum tells,
//! and everything stored that way is void after a reboot anyway. Not a database: no queries, no
//! transactions over two records.

mod lock;
mod records;
mod trash;

pub(crate) use lock::Lock;
pub(crate) use records::{Loaded, Records};
pub(crate) use trash::{Aside, Trash};

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::base::error::{HasKind, Kind};

/// Why a record or the lock could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum StoreError {
    /// A file operation failed.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried: `create`, `write`, `rename`, ...
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The value has no JSON form.
    #[error("cannot encode the record {}", path.display())]
    Encode {
        /// Where it was to go.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A newer berth wrote it.
    #[error(
        "{} is of format {found}, this version of berth reads up to {known}: start the newer version \
         again, or remove its pods with it first",
        path.display()
    )]
    Newer {
        /// The record.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Another process holds the lock.
    #[error(
        "{} is in use by process {holder}: one berth daemon a root; stop it, or set `root` to another directory",
        path.display()
    )]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// Pid as the holder wrote it; `?` if it has not yet.
        holder: String,
    },
}

impl HasKind for StoreError {
    fn kind(&self) -> Kind {
        match self {
            Self::File { source, .. } if source.raw_os_error() == Some(ENOSPC) => {
                Kind::ResourceExhausted
            }
            Self::File { .. } | Self::Encode { .. } => Kind::Internal,
            Self::Newer { .. } | Self::Locked { .. } => Kind::FailedPrecondition,
        }
    }
}

/// `No space left on device` (errno(3)).
const ENOSPC: i32 = 28;

/// Result of a store operation.
pub(crate) type Result<T> = std::result::Result<T, StoreError>;

/// Whether a write survives a power cut or only a crash of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// fsync the file and its directory: survives a power cut. Milliseconds.
    Durable,
    /// Survives `kill -9`. Microseconds.
    Process,
}

fn file_error(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File {
        operation,
        path,
        source,
    }
}

/// Mode of every directory that no process but the daemon's, the monitors' and their helpers' needs: other users of the node can
/// neither list nor pass, so that nothing below is theirs to read or run, whatever mode a container or an image has given it.
pub(crate) const CLOSED: u32 = 0o700;

/// Makes a directory of this mode, or gives it to one that is there (an older version's was open); those above that are missing
/// get the usual 0755.
///
/// Blocks on the disk.
///
/// # Errors
/// [`StoreError::File`].
pub(crate) fn directory(path: &Path, mode: u32) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(file_error("create", parent))?;
    }
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(file_error("create", path)(error));
        }
        _ => {}
    }
    let found = std::fs::metadata(path).map_err(file_error("look at", path))?;
    if found.permissions().mode() & 0o7777 == mode {
        // A filesystem that cannot change modes may have the right one.
        return Ok(());
    }
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(file_error("set the mode of", path))
}

/// Replaces the file at `path` by `content` with permission bits `mode`: readers see the old or the new
/// content, never a part. Its directory must exist.
///
/// Blocks on the disk.
///
/// # Errors
/// [`StoreError::File`]; the old file is untouched then.
pub(crate) fn write_atomic(
    path: &Path,
    content: &[u8],
    mode: u32,
    durability: Durability,
) -> Result<()> {
    let beside = name_beside(path);
    let written = write_beside(&beside, content, mode, durability)
        .and_then(|()| std::fs::rename(&beside, path).map_err(file_error("rename", &beside)));
    if let Err(error) = written {
        // Best effort: a leftover is swept by the next load of the directory.
        let _swept = std::fs::remove_file(&beside).is_ok();
        return Err(error);
    }
    match (durability, path.parent()) {
        (Durability::Durable, Some(directory)) => File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(file_error("sync", directory)),
        _ => Ok(()),
    }
}

fn name_beside(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(
        ".{name}.{}-{}.new",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ))
}

fn write_beside(beside: &Path, content: &[u8], mode: u32, durability: Durability) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(beside)
        .map_err(file_error("create", beside))?;
    file.write_all(content)
        .map_err(file_error("write", beside))?;
    match durability {
        Durability::Durable => file.sync_all().map_err(file_error("sync", beside)),
        Durability::Process => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_atomic_replaces_and_leaves_nothing_beside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        for (content, durability) in [("one", Durability::Process), ("two", Durability::Durable)] {
            write_atomic(&path, content.as_bytes(), 0o640, durability).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        let names: Vec<_> = std::fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
    }

    #[test]
    fn a_directory_has_its_mode_whatever_it_was() {
        let top = tempfile::tempdir().unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let path = top.path().join("above/closed");
        for before in [None, Some(0o777), Some(0o755), Some(0o2711), Some(0)] {
            if let Some(before) = before {
                std::fs::set_permissions(&path, Permissions::from_mode(before)).unwrap();
            }
            directory(&path, CLOSED).unwrap();
            assert_eq!(mode(&path), 0o700, "{before:?}");
        }
        assert_eq!(
            mode(&top.path().join("above")) | 0o022,
            0o777,
            "not ours alone"
        );
        let file = top.path().join("file");
        drop(File::create(&file).unwrap());
        let error = directory(&file.join("below"), CLOSED).unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    }

    #[test]
    fn a_failed_write_keeps_the_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        std::fs::create_dir_all(path.join("by a directory")).unwrap();
        let error = write_atomic(&path, b"x", 0o600, Durability::Process).unwrap_err();
        assert!(error.to_string().contains("cannot rename"), "{error}");
        assert!(path.is_dir());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

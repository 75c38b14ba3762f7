//! Exit records: `DIR/<container id>.exit`, so that an exit is known even when its monitor dies after it.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::base::id::ContainerId;
use crate::monitor::protocol::ContainerExit;

/// A record is smaller than this; what is larger is not one.
const MAX_BYTES: u64 = 4096;

fn path(directory: &Path, id: ContainerId) -> PathBuf {
    directory.join(format!("{id}.exit"))
}

/// Writes the record in one step (rename); never synced: it need not survive a reboot.
///
/// # Errors
/// What the file system says.
pub(crate) fn write(directory: &Path, exit: &ContainerExit) -> io::Result<()> {
    let bytes = postcard::to_allocvec(exit).map_err(io::Error::other)?;
    let temporary = directory.join(format!(".{}.exit", exit.id));
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    io::Write::write_all(&mut file, &bytes)?;
    fs::rename(&temporary, path(directory, exit.id))
}

/// Reads the record of a container; `None`: there is none (or no whole one).
pub(crate) fn read(directory: &Path, id: ContainerId) -> Option<ContainerExit> {
    let path = path(directory, id);
    let size = fs::symlink_metadata(&path).ok()?.len();
    let bytes = (size <= MAX_BYTES).then(|| fs::read(&path))?.ok()?;
    let exit: ContainerExit = postcard::from_bytes(&bytes).ok()?;
    (exit.id == id).then_some(exit)
}

/// Removes the record; there need not be one.
pub(crate) fn remove(directory: &Path, id: ContainerId) {
    let _absent = fs::remove_file(path(directory, id));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::clock::Timestamp;
    use crate::base::id::Id;

    #[test]
    fn round_trip_and_garbage() {
        let dir = tempfile::tempdir().unwrap();
        let id = ContainerId(Id::from_bytes([7; 32]));
        assert_eq!(read(dir.path(), id), None);
        let exit = ContainerExit {
            id,
            code: 137,
            oom_killed: true,
            at: Timestamp(5),
        };
        write(dir.path(), &exit).unwrap();
        assert_eq!(read(dir.path(), id), Some(exit));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::File::create(path(dir.path(), id)).unwrap();
        assert_eq!(read(dir.path(), id), None);
        remove(dir.path(), id);
        remove(dir.path(), id);
    }
}

//! The lock of a root directory: a second daemon on it must not start.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::store::{Result, StoreError, file_error};

/// Held while it lives; the kernel releases it with the process, however that ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of `root` (which is made if missing) and writes our pid into it.
    ///
    /// # Errors
    /// [`StoreError::Locked`]: another process has it, named by its pid. [`StoreError::File`].
    pub(crate) fn take(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(file_error("create", root))?;
        let path = root.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(file_error("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let read = (&mut file).take(20).read_to_string(&mut holder).is_ok();
                let holder = holder.trim();
                let known = read && !holder.is_empty();
                return Err(StoreError::Locked {
                    path,
                    holder: if known { holder } else { "?" }.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(file_error("lock", &path)(source)),
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()))
            .map_err(file_error("write", &path))?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("new");
        let first = Lock::take(&root).unwrap();
        let error = Lock::take(&root).unwrap_err().to_string();
        assert!(
            error.contains(&format!("process {}", std::process::id())),
            "{error}"
        );
        drop(first);
        let _third = Lock::take(&root).unwrap();
    }
}

//! Directories that wait for their removal. What cannot be removed is set aside: named in the log once, told to whoever
//! asks, tried again from time to time, and in nobody's way.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::store::{CLOSED, StoreError};
use crate::sys::remove::{Removal, remove};

/// What was set aside is not tried again before.
const REST: Duration = Duration::from_secs(60);
/// How long one directory is removed before the next has its turn, where somebody comes back to it.
const SLICE: Duration = Duration::from_secs(10);
/// Names that are tried for a directory whose own is taken.
const NAMES: u32 = 1000;

/// What could not be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Aside {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Why it is still there.
    pub(crate) reason: String,
    /// Since when that is known.
    pub(crate) since: Timestamp,
}

#[derive(Debug)]
struct Tried {
    aside: Aside,
    at: Instant,
}

/// Is somebody emptying the trash?
#[derive(Debug, Default, PartialEq, Eq)]
enum Emptying {
    #[default]
    No,
    Yes,
    /// Something came meanwhile.
    Again,
}

/// A directory of trash.
#[derive(Debug)]
pub(crate) struct Trash {
    directory: PathBuf,
    /// What names of trash begin with; what has another name is left alone.
    prefix: &'static str,
    emptying: Mutex<Emptying>,
    /// Held while it is gone through.
    turn: Mutex<()>,
    aside: Mutex<BTreeMap<PathBuf, Tried>>,
}

impl Trash {
    /// The trash in `directory`, which need not be there: what has a name that begins with `prefix`.
    pub(crate) fn new(directory: PathBuf, prefix: &'static str) -> Self {
        Self {
            directory,
            prefix,
            emptying: Mutex::default(),
            turn: Mutex::default(),
            aside: Mutex::default(),
        }
    }

    fn aside(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Tried>> {
        self.aside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emptying(&self) -> MutexGuard<'_, Emptying> {
        self.emptying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What could not be removed, by path. From memory.
    pub(crate) fn set_aside(&self) -> Vec<Aside> {
        let aside = self.aside();
        aside.values().map(|tried| tried.aside.clone()).collect()
    }

    /// Moves a directory of the same filesystem into the trash, so that its place is free at once; nothing there is fine.
    /// Makes the trash, closed.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub(crate) fn take(&self, directory: &Path) -> Result<(), StoreError> {
        let failed = |operation, path: &Path, source| StoreError::File {
            operation,
            path: path.to_owned(),
            source,
        };
        crate::store::directory(&self.directory, CLOSED)?;
        let name = directory.file_name().unwrap_or_default();
        for number in 0..NAMES {
            let mut place = self.directory.join(name).into_os_string();
            if number > 0 {
                place.push(format!(".{number}"));
            }
            match fs::rename(directory, &place) {
                Err(error) if is_taken(&error) && number + 1 < NAMES => {}
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("move to the trash", directory, error));
                }
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Removes what is in the trash, beside whoever does so already: then that one goes through it once more, and this
    /// returns at once. `stop` is asked now and then; what is left then the next time removes. Blocks on the disk.
    pub(crate) fn empty(&self, stop: &dyn Fn() -> bool) {
        {
            let mut emptying = self.emptying();
            if *emptying != Emptying::No {
                *emptying = Emptying::Again;
                return;
            }
            *emptying = Emptying::Yes;
        }
        loop {
            let unfinished = self.pass(stop, SLICE);
            let mut emptying = self.emptying();
            if *emptying != Emptying::Again && !unfinished || stop() {
                *emptying = Emptying::No;
                return;
            }
            *emptying = Emptying::Yes;
        }
    }

    /// Goes through the trash once, after whoever does so already. Blocks on the disk.
    pub(crate) fn go_through(&self, stop: &dyn Fn() -> bool) {
        let _whole = self.pass(stop, Duration::MAX);
    }

    /// Goes through the trash, spending at most so much on each; true: some of it is unfinished.
    fn pass(&self, stop: &dyn Fn() -> bool, slice: Duration) -> bool {
        let mut unfinished = false;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let names = match self.names() {
            Ok(names) => names,
            Err(error) => {
                let reason = format!("it cannot be read: {error}");
                self.note(&self.directory, Some(reason));
                return false;
            }
        };
        self.note(&self.directory, None);
        let Ok(top) = fs::File::open(&self.directory) else {
            return false;
        };
        self.aside().retain(|path, _| path.exists());
        for name in names {
            let path = self
                .directory
                .join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            let rests = |tried: &Tried| tried.at.elapsed() < REST;
            if self.aside().get(&path).is_some_and(rests) {
                continue;
            }
            let began = Instant::now();
            match remove(top.as_fd(), &name, &mut || {
                stop() || began.elapsed() > slice
            }) {
                Removal::Gone => self.note(&path, None),
                Removal::Left(left) => self.note(&path, Some(left.to_string())),
                Removal::Stopped if stop() => return true,
                Removal::Stopped => unfinished = true,
            }
        }
        unfinished
    }

    fn names(&self) -> io::Result<Vec<CString>> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries?,
        };
        let mut names = vec![];
        for entry in entries {
            let name = entry?.file_name();
            if name.as_bytes().starts_with(self.prefix.as_bytes())
                && let Ok(name) = CString::new(name.as_bytes())
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Notes what became of one. The log has it once, however often it is tried.
    fn note(&self, path: &Path, reason: Option<String>) {
        let mut aside = self.aside();
        let Some(reason) = reason else {
            if aside.remove(path).is_some() {
                tracing::info!(path = %path.display(), "trash that was set aside is gone");
            }
            return;
        };
        let before = aside.remove(path).map(|tried| tried.aside);
        let known = before.filter(|before| before.reason == reason);
        if known.is_none() {
            tracing::warn!(path = %path.display(), reason, "trash cannot be removed and is set aside");
        }
        let told = known.unwrap_or_else(|| Aside {
            path: path.to_owned(),
            reason,
            since: Timestamp::now(),
        });
        let at = Instant::now();
        let _new = aside.insert(path.to_owned(), Tried { aside: told, at });
    }
}

/// Is another directory where one was to be moved?
fn is_taken(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::DirectoryNotEmpty
            | io::ErrorKind::AlreadyExists
            | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_removed_and_what_cannot_be_is_named() {
        let place = tempfile::tempdir().unwrap();
        let trash = Trash::new(place.path().join("trash"), "");
        trash.empty(&|| false);
        for round in 0..3 {
            let directory = place.path().join("a");
            fs::create_dir_all(directory.join(format!("b/{round}"))).unwrap();
            trash.take(&directory).unwrap();
            assert!(!directory.exists());
        }
        trash.take(&place.path().join("nothing")).unwrap();
        assert_eq!(fs::read_dir(place.path().join("trash")).unwrap().count(), 3);
        // Asked to stop, it stops, and nothing is taken for a failure.
        let wide = place.path().join("wide");
        for number in 0..600 {
            fs::create_dir_all(wide.join(number.to_string())).unwrap();
        }
        trash.take(&wide).unwrap();
        trash.empty(&|| true);
        assert!(place.path().join("trash/wide").exists());
        assert_eq!(trash.set_aside(), []);
        trash.empty(&|| false);
        assert_eq!(fs::read_dir(place.path().join("trash")).unwrap().count(), 0);
    }

    #[test]
    fn a_trash_that_is_no_directory_is_told() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("trash");
        let _file = fs::File::create(&path).unwrap();
        let trash = Trash::new(path.clone(), "");
        trash.empty(&|| false);
        let aside = trash.set_aside();
        assert_eq!(aside.len(), 1);
        assert_eq!(aside[0].path, path);
        assert!(aside[0].reason.contains("Not a directory"), "{aside:?}");
    }
}

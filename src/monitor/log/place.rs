//! Opening a log where CRI says it lies, and nowhere else.
//!
//! Log agents have the node's `/var/log` as a volume, writable. Such a container can put a link (or a device) at any name below,
//! at `pods` too, and swap it at any moment; the file is opened by root. So every directory is opened from the one above it,
//! by descriptor, and links are followed in `/` and in `/var` alone: who can change these has the node anyway, and nodes do have
//! their logs on another disk that way (`/var/log -> /data/log`). Who has made a link further down cannot be told, for root in a
//! container is root to the filesystem; a node that had one there mounts the directory instead, which no container can undo.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, fstat, mkdirat, openat, statat};
use rustix::io::Errno;

use crate::runtime::plan::Fault;

const MODE: u32 = 0o640;
const MODE_OF_DIRECTORY: u32 = 0o755;
/// How often a file is looked for that others remove and make again meanwhile.
const ATTEMPTS: u32 = 8;

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    /// The kernel says so, of this path.
    #[error("{}", _0.display())]
    Call(PathBuf, #[source] io::Error),
    /// A link stands where none is followed.
    #[error("{} is a link, as a container could have made it: only those in / and /var are followed. Mount the directory there (mount --bind)", _0.display())]
    Link(PathBuf),
    /// Something that is no regular file has the log's name.
    #[error("{} is no regular file: remove it, or give another log_path", _0.display())]
    NoFile(PathBuf),
    /// The path cannot be a log's.
    #[error("{} is not the absolute path of a file, without `..`", _0.display())]
    NoPath(PathBuf),
}

impl Refused {
    /// The same as a fault of the monitor's.
    pub(crate) fn fault(&self, operation: &str) -> Fault {
        match self {
            Self::Call(path, error) => Fault::call("monitor", operation, path.display(), error),
            refused => Fault::check("monitor", operation, refused),
        }
    }
}

/// Opens the log to append to it, made with mode 0640 where it is missing. `make`: directories above it that are missing are
/// made, too, with mode 0755.
///
/// # Errors
/// [`Refused`]; nothing was written anywhere then.
pub(super) fn open(path: &Path, make: bool) -> Result<File, Refused> {
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            std::path::Component::RootDir => {}
            std::path::Component::Normal(name) => names.push(name),
            _ => return Err(Refused::NoPath(path.to_owned())),
        }
    }
    let Some(name) = names.pop().filter(|_| path.is_absolute()) else {
        return Err(Refused::NoPath(path.to_owned()));
    };
    let mut here = PathBuf::from("/");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut directory =
        openat(CWD, "/", flags, Mode::empty()).map_err(|errno| failed(&here, errno))?;
    for (depth, part) in names.iter().enumerate() {
        let followed = depth == 0 || (depth == 1 && names[0] == "var");
        here.push(part);
        let flags = if followed {
            flags
        } else {
            flags | OFlags::NOFOLLOW
        };
        directory = enter(&directory, part.as_bytes(), flags, make)
            .map_err(|errno| explain(&directory, part.as_bytes(), &here, errno))?;
    }
    here.push(name);
    file(&directory, name.as_bytes(), &here)
}

fn failed(path: &Path, errno: Errno) -> Refused {
    Refused::Call(path.to_owned(), errno.into())
}

fn enter(parent: &OwnedFd, name: &[u8], flags: OFlags, make: bool) -> rustix::io::Result<OwnedFd> {
    match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) if make => {
            match mkdirat(parent, name, Mode::from_raw_mode(MODE_OF_DIRECTORY)) {
                Ok(()) | Err(Errno::EXIST) => openat(parent, name, flags, Mode::empty()),
                Err(errno) => Err(errno),
            }
        }
        other => other,
    }
}

/// A link that is not followed has the same number as a file that is no directory.
fn explain(parent: &OwnedFd, name: &[u8], path: &Path, errno: Errno) -> Refused {
    let found = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    let link = found.is_ok_and(|it| FileType::from_raw_mode(it.st_mode) == FileType::Symlink);
    match errno {
        Errno::NOTDIR | Errno::LOOP if link => Refused::Link(path.to_owned()),
        errno => failed(path, errno),
    }
}

/// The file itself. What exists is looked at before it is opened: opening a device does something, and bytes for a log must not
/// go to a disk.
fn file(directory: &OwnedFd, name: &[u8], path: &Path) -> Result<File, Refused> {
    let new = OFlags::WRONLY
        | OFlags::APPEND
        | OFlags::CREATE
        | OFlags::EXCL
        | OFlags::NOFOLLOW
        | OFlags::CLOEXEC;
    let old = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..ATTEMPTS {
        match openat(directory, name, new, Mode::from_raw_mode(MODE)) {
            Ok(made) => return Ok(made.into()),
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(path, errno)),
        }
        let found = match openat(directory, name, old, Mode::empty()) {
            Ok(found) => found,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(failed(path, errno)),
        };
        let status = fstat(&found).map_err(|errno| failed(path, errno))?;
        return match FileType::from_raw_mode(status.st_mode) {
            // By its descriptor: the very file that was looked at.
            FileType::RegularFile => rustix::fs::open(
                format!("/proc/self/fd/{}", found.as_raw_fd()),
                OFlags::WRONLY | OFlags::APPEND | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map(File::from)
            .map_err(|errno| failed(path, errno)),
            FileType::Symlink => Err(Refused::Link(path.to_owned())),
            _ => Err(Refused::NoFile(path.to_owned())),
        };
    }
    Err(failed(path, Errno::AGAIN))
}

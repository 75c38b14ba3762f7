//! Labels of files: `security.selinux`, set on a whole volume where CRI asks for it (`Mount.selinux_relabel`).
//!
//! The walk is by descriptor ([`crate::sys::descent`]): no link leads outside, no mount is crossed, no depth is too much for
//! it. The top comes last: a walk that was cut short is not taken for a complete one.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::base::error::{HasKind, Kind};
use crate::sys::descent::{Failure, Progress, Visit, Walk, open_here};
use crate::sys::file::{self, FileType, Mode, OFlags, XattrFlags};

const ATTRIBUTE: &str = "security.selinux";
/// Deeper trees are refused: each level takes memory.
const MAX_DEPTH: usize = 1 << 16;
/// Longest label that is compared, in bytes; a longer one is set again.
const MAX_LABEL: usize = 512;
/// Directories of the node that are not relabelled, for the node could not work with them: whoever asks for it has
/// made a mistake. What is below them may be.
const SYSTEM: [&str; 27] = [
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/mnt",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Why a volume is not relabelled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelabelError {
    /// It is, or has in it, a directory that the node needs as it is.
    #[error("{} belongs to the node and is not relabelled; use a directory of its own", .0.display())]
    System(PathBuf),
    /// A directory more than [`MAX_DEPTH`] levels down.
    #[error("{} has more than {MAX_DEPTH} directories in each other", .0.display())]
    TooDeep(PathBuf),
    /// A directory was moved while it was walked.
    #[error("directories of {} were moved while they were relabelled; try again", .0.display())]
    Moved(PathBuf),
    /// The daemon ends.
    #[error("{} was not relabelled to its end: berth is stopping", .0.display())]
    Stopped(PathBuf),
    /// A call failed.
    #[error("{call} {}", path.display())]
    Call {
        /// Which.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl HasKind for RelabelError {
    fn kind(&self) -> Kind {
        match self {
            Self::System(_) => Kind::InvalidArgument,
            Self::TooDeep(_) | Self::Moved(_) | Self::Call { .. } => Kind::FailedPrecondition,
            Self::Stopped(_) => Kind::Unavailable,
        }
    }
}

/// Gives a file, directory or link, not what it leads to, this label, unless it has it. A filesystem without labels, or
/// with one for all its files, is left as it is (`EOPNOTSUPP`).
///
/// # Errors
/// The number of `lsetxattr(2)`.
pub(crate) fn set_label(path: &Path, label: &str) -> io::Result<()> {
    let mut now = [0; MAX_LABEL];
    let has = file::lgetxattr(path, ATTRIBUTE, &mut now[..]);
    if has.is_ok_and(|length| is(&now, length, label)) {
        return Ok(());
    }
    let set = file::lsetxattr(path, ATTRIBUTE, label.as_bytes(), XattrFlags::empty());
    tolerate(set.map_err(io::Error::from))
}

/// The file of a descriptor, whatever became of its name.
fn set_by_descriptor(of: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    let link = format!("/proc/self/fd/{}", of.as_raw_fd());
    let mut now = [0; MAX_LABEL];
    let has = file::getxattr(&*link, ATTRIBUTE, &mut now[..]);
    if has.is_ok_and(|length| is(&now, length, label)) {
        return Ok(());
    }
    let set = file::setxattr(&*link, ATTRIBUTE, label.as_bytes(), XattrFlags::empty());
    tolerate(set.map_err(io::Error::from))
}

fn tolerate(set: io::Result<()>) -> io::Result<()> {
    let unsupported = rustix::io::Errno::OPNOTSUPP.raw_os_error();
    match set {
        Err(error) if error.raw_os_error() == Some(unsupported) => Ok(()),
        other => other,
    }
}

/// Is the value, with or without a NUL at its end, this label?
fn is(value: &[u8], length: usize, label: &str) -> bool {
    let value = value.get(..length).unwrap_or_default();
    value.strip_suffix(b"\0").unwrap_or(value) == label.as_bytes()
}

/// Identity of a file: device and inode.
type Identity = (u64, u64);

/// The directories of the node that are there, by identity: neither a link nor a bind mount hides one.
fn system() -> BTreeSet<Identity> {
    let found = SYSTEM.iter().filter_map(|path| file::stat(*path).ok());
    found.map(|status| (status.st_dev, status.st_ino)).collect()
}

/// Relabels what `path` leads to, with all below it, but not what is mounted there. What vanishes meanwhile is fine.
/// `stop` is asked now and then. Blocks on the filesystem.
///
/// # Errors
/// [`RelabelError`]; what was walked before has its label.
pub(crate) fn relabel(
    path: &Path,
    label: &str,
    stop: &mut dyn FnMut() -> bool,
) -> Result<(), RelabelError> {
    let call = |call, source| RelabelError::Call {
        call,
        path: path.to_owned(),
        source,
    };
    // Links of the path are followed, once.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = file::open(path, flags, Mode::empty()).map_err(|error| call("open", error.into()))?;
    let status = file::fstat(&top).map_err(|error| call("fstat", error.into()))?;
    let mut labels = Labels {
        label,
        system: system(),
        path,
    };
    labels.check((status.st_dev, status.st_ino), path)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = file::openat(&top, ".", flags, Mode::empty());
        let top = top.map_err(|error| call("open", error.into()))?;
        let mut walk = Walk::of(top).map_err(|error| call("fstat", error.into()))?;
        return match walk.run(&mut labels, stop)? {
            Progress::Done => Ok(()),
            Progress::Paused => Err(RelabelError::Stopped(path.to_owned())),
        };
    }
    set_by_descriptor(top.as_fd(), label).map_err(|error| call("setxattr", error))
}

struct Labels<'a> {
    label: &'a str,
    system: BTreeSet<Identity>,
    /// Of the top.
    path: &'a Path,
}

impl Labels<'_> {
    fn check(&self, identity: Identity, path: &Path) -> Result<(), RelabelError> {
        match self.system.contains(&identity) {
            true => Err(RelabelError::System(path.to_owned())),
            false => Ok(()),
        }
    }

    /// Tells of something below the top, of which only the last name is known.
    fn fault(&self, call: &'static str, name: &[u8], error: Errno) -> RelabelError {
        let mut path = self.path.to_owned();
        if !name.is_empty() {
            path.push("...");
            path.push(std::ffi::OsStr::from_bytes(name));
        }
        RelabelError::Call {
            call,
            path,
            source: error.into(),
        }
    }
}

impl Visit for Labels<'_> {
    type Error = RelabelError;

    fn entry(
        &mut self,
        at: BorrowedFd<'_>,
        name: &CStr,
        kind: FileType,
    ) -> Result<(), RelabelError> {
        if kind == FileType::Directory {
            return Ok(());
        }
        let found = match open_here(at, name, OFlags::PATH) {
            // Gone, or another file is mounted there.
            Err(Errno::NOENT | Errno::XDEV) => return Ok(()),
            found => found.map_err(|error| self.fault("open", name.to_bytes(), error))?,
        };
        set_by_descriptor(found.as_fd(), self.label).map_err(|source| RelabelError::Call {
            call: "setxattr",
            path: self
                .path
                .join("...")
                .join(std::ffi::OsStr::from_bytes(name.to_bytes())),
            source,
        })
    }

    fn enter(
        &mut self,
        _at: BorrowedFd<'_>,
        name: &CStr,
        directory: BorrowedFd<'_>,
        depth: usize,
    ) -> Result<bool, RelabelError> {
        let status = file::fstat(directory);
        let status = status.map_err(|error| self.fault("fstat", name.to_bytes(), error))?;
        let path = self.path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        self.check((status.st_dev, status.st_ino), &path)?;
        match depth > MAX_DEPTH {
            true => Err(RelabelError::TooDeep(self.path.to_owned())),
            false => Ok(true),
        }
    }

    fn leave(&mut self, directory: BorrowedFd<'_>) -> Result<(), RelabelError> {
        set_by_descriptor(directory, self.label).map_err(|source| RelabelError::Call {
            call: "setxattr",
            path: self.path.to_owned(),
            source,
        })
    }

    fn failed(&mut self, failure: Failure) -> Result<(), RelabelError> {
        match failure.errno {
            Errno::STALE => Err(RelabelError::Moved(self.path.to_owned())),
            errno => Err(self.fault(failure.call, &failure.name, errno)),
        }
    }
}

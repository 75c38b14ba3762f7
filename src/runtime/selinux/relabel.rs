//! Labels of files: `security.selinux`, set on a whole volume where CRI asks for it (`Mount.selinux_relabel`).
//!
//! The walk holds a descriptor of each directory and names entries below it, the last component never followed, so that no
//! link leads outside. The top comes last: a walk that was cut short is not taken for a complete one.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::base::error::{HasKind, Kind};
use crate::sys::file::{self, Dir, FileType, Mode, OFlags, XattrFlags};

const ATTRIBUTE: &str = "security.selinux";
/// Deeper trees are refused: each level holds a descriptor.
const MAX_DEPTH: u32 = 200;
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
    #[error("{} is too deep", .0.display())]
    TooDeep(PathBuf),
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
            Self::TooDeep(_) | Self::Call { .. } => Kind::FailedPrecondition,
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
fn set_by_descriptor(of: &OwnedFd, label: &str) -> io::Result<()> {
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

/// Relabels what `path` leads to, with all below it, filesystems mounted there included. What vanishes meanwhile is fine.
/// Blocks on the filesystem.
///
/// # Errors
/// [`RelabelError`]; what was walked before has its label.
pub(crate) fn relabel(path: &Path, label: &str) -> Result<(), RelabelError> {
    let call = |call, source| RelabelError::Call {
        call,
        path: path.to_owned(),
        source,
    };
    // Links of the path are followed, once.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let top = file::open(path, flags, Mode::empty()).map_err(|error| call("open", error.into()))?;
    let status = file::fstat(&top).map_err(|error| call("fstat", error.into()))?;
    let walk = Walk {
        label,
        system: system(),
    };
    walk.check((status.st_dev, status.st_ino), path)?;
    if FileType::from_raw_mode(status.st_mode) == FileType::Directory {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = file::openat(&top, ".", flags, Mode::empty());
        let top = top.map_err(|error| call("open", error.into()))?;
        return walk.directory(&top, path, 0);
    }
    set_by_descriptor(&top, label).map_err(|error| call("setxattr", error))
}

struct Walk<'a> {
    label: &'a str,
    system: BTreeSet<Identity>,
}

impl Walk<'_> {
    fn check(&self, identity: Identity, path: &Path) -> Result<(), RelabelError> {
        match self.system.contains(&identity) {
            true => Err(RelabelError::System(path.to_owned())),
            false => Ok(()),
        }
    }

    /// What is in the directory, then itself.
    fn directory(&self, directory: &OwnedFd, path: &Path, depth: u32) -> Result<(), RelabelError> {
        let failed = |call, path: &Path, source: io::Error| RelabelError::Call {
            call,
            path: path.to_owned(),
            source,
        };
        if depth > MAX_DEPTH {
            return Err(RelabelError::TooDeep(path.to_owned()));
        }
        let entries = Dir::read_from(directory);
        let entries = entries.map_err(|error| failed("getdents", path, error.into()))?;
        for entry in entries {
            let entry = entry.map_err(|error| failed("getdents", path, error.into()))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let below = path.join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            self.entry(directory, name, &below, depth)?;
        }
        set_by_descriptor(directory, self.label).map_err(|error| failed("setxattr", path, error))
    }

    fn entry(
        &self,
        directory: &OwnedFd,
        name: &CStr,
        path: &Path,
        depth: u32,
    ) -> Result<(), RelabelError> {
        let failed = |call, source: io::Error| RelabelError::Call {
            call,
            path: path.to_owned(),
            source,
        };
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match file::openat(directory, name, flags, Mode::empty()).map_err(io::Error::from) {
            Ok(below) => {
                let status = file::fstat(&below).map_err(|e| failed("fstat", e.into()))?;
                self.check((status.st_dev, status.st_ino), path)?;
                return self.directory(&below, path, depth + 1);
            }
            Err(error) if gone(&error) => return Ok(()),
            // No directory, or a link.
            Err(error) if is_no_directory(&error) => {}
            Err(error) => return Err(failed("open", error)),
        }
        let place = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let place = Path::new(&place).join(std::ffi::OsStr::from_bytes(name.to_bytes()));
        match set_label(&place, self.label) {
            Err(error) if !gone(&error) => Err(failed("lsetxattr", error)),
            _ => Ok(()),
        }
    }
}

fn is_no_directory(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let numbers = [Errno::NOTDIR, Errno::LOOP].map(Errno::raw_os_error);
    error
        .raw_os_error()
        .is_some_and(|number| numbers.contains(&number))
}

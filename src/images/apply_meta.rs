//! Owner, mode, times and attributes of what a layer makes; and why that fails.

use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Mode, RawMode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use crate::images::error::ImageError;
use crate::images::tar::{Entry, TarError};

const OPAQUE: &str = "trusted.overlay.opaque";

/// Why an entry failed; the caller adds its name.
pub(crate) enum Fault {
    /// Not allowed, and why.
    Refused(&'static str),
    /// The machine failed at this.
    Os(&'static str, Errno),
    /// The archive is malformed.
    Tar(TarError),
}

/// The error of a fault in a layer, which `what` names, at an entry.
pub(crate) fn explain(what: &str, path: Option<&[u8]>, fault: Fault) -> ImageError {
    let place = match path {
        Some(path) => format!("{what}: entry {:?}", String::from_utf8_lossy(path)),
        None => what.to_owned(),
    };
    match fault {
        Fault::Refused(reason) => ImageError::archive(place, reason),
        // What only a hostile or broken name can cause.
        Fault::Os(operation, errno @ (Errno::NAMETOOLONG | Errno::MLINK | Errno::LOOP)) => {
            ImageError::archive(place, format!("{operation}: {errno}"))
        }
        Fault::Os(operation, errno) => ImageError::io(operation, place, errno),
        Fault::Tar(TarError::Read(error)) => match error.kind() {
            std::io::ErrorKind::InvalidData
            | std::io::ErrorKind::InvalidInput
            | std::io::ErrorKind::UnexpectedEof => {
                ImageError::archive(place, format!("cannot be decompressed: {error}"))
            }
            _ => ImageError::io("read", place, error),
        },
        Fault::Tar(error) => ImageError::archive(place, error.to_string()),
    }
}

/// What a step of applying comes to.
pub(crate) type Outcome<T> = Result<T, Fault>;

/// Turns an errno into a fault of `operation`.
pub(crate) fn os(operation: &'static str) -> impl FnOnce(Errno) -> Fault {
    move |errno| Fault::Os(operation, errno)
}

/// Permission bits.
pub(crate) fn mode_of(entry: &Entry) -> Mode {
    Mode::from_raw_mode(RawMode::from(entry.mode))
}

/// Owner and group.
pub(crate) fn owner_of(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(entry.uid)),
        Some(Gid::from_raw(entry.gid)),
    )
}

/// Owner first: chown(2) clears the set-id bits.
pub(crate) fn set_owner_mode(fd: BorrowedFd<'_>, entry: &Entry) -> Outcome<()> {
    let (owner, group) = owner_of(entry);
    rustix::fs::fchown(fd, owner, group).map_err(os("chown"))?;
    rustix::fs::fchmod(fd, mode_of(entry)).map_err(os("chmod"))
}

/// For futimens(2) and its like: the access time stays.
pub(crate) fn timestamps((seconds, nanos): (i64, i64)) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: nanos,
        },
    }
}

/// Hides what the layers below have in the directory.
pub(crate) fn set_opaque(fd: BorrowedFd<'_>) -> Outcome<()> {
    rustix::fs::fsetxattr(fd, OPAQUE, b"y", XattrFlags::empty()).map_err(os("set opaque"))
}

/// May an image set this attribute?
fn xattr_allowed(name: &[u8], value: &[u8]) -> bool {
    match name {
        // Version 2 only: version 3 names a user namespace of another machine. linux/capability.h
        b"security.capability" => value.len() == 20 && value.get(3) == Some(&2),
        b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

/// Sets the attributes that an image may set.
pub(crate) fn set_xattrs(fd: BorrowedFd<'_>, entry: &Entry) -> Outcome<()> {
    for (name, value) in &entry.xattrs {
        if !xattr_allowed(name, value) {
            continue;
        }
        match rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty()) {
            // The filesystem has no such attributes: the file is of use without.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(Errno::INVAL | Errno::RANGE | Errno::TOOBIG) => {
                return Err(Fault::Refused("a malformed extended attribute"));
            }
            Err(errno) => return Err(Fault::Os("set attribute", errno)),
        }
    }
    Ok(())
}

//! Mounts by descriptor: a filesystem or a copy of a tree is made detached, given its attributes, then attached.
//! See `fsopen(2)`, `open_tree(2)`, `mount_setattr(2)`, `move_mount(2)`.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

/// `MOUNT_ATTR_*` of mount_setattr(2).
pub(crate) mod attribute {
    /// Read-only.
    pub(crate) const READONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// No set-user-id.
    pub(crate) const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// No device nodes.
    pub(crate) const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// No programs.
    pub(crate) const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
    /// The bits of the access time setting; clear them before setting one.
    pub(crate) const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
    /// No access times.
    pub(crate) const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
    /// Ids mapped by a user namespace.
    pub(crate) const IDMAP: u64 = libc::MOUNT_ATTR_IDMAP;
}

/// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`: values for [`Change::propagation`]. 0 leaves it.
pub(crate) mod propagation {
    /// Nothing comes or goes.
    pub(crate) const PRIVATE: u64 = libc::MS_PRIVATE;
    /// What the peers mount comes.
    pub(crate) const SLAVE: u64 = libc::MS_SLAVE;
    /// Both ways.
    pub(crate) const SHARED: u64 = libc::MS_SHARED;
}

/// A change of a mount; all zero changes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Change<'a> {
    /// Attributes to set.
    pub(crate) set: u64,
    /// Attributes to clear first.
    pub(crate) clear: u64,
    /// One of [`propagation`], or 0.
    pub(crate) propagation: u64,
    /// User namespace for [`attribute::IDMAP`].
    pub(crate) user_namespace: Option<BorrowedFd<'a>>,
    /// Every mount below too.
    pub(crate) recursive: bool,
}

/// A filesystem in the making (`fsopen`).
#[derive(Debug)]
pub(crate) struct Filesystem(OwnedFd);

impl Filesystem {
    /// A new one of this type.
    ///
    /// # Errors
    /// The number of `fsopen(2)`; `ENODEV`: unknown type.
    pub(crate) fn open(kind: &str) -> io::Result<Self> {
        Ok(Self(rustix::mount::fsopen(
            kind,
            FsOpenFlags::FSOPEN_CLOEXEC,
        )?))
    }

    /// Sets an option; an empty value sets a flag.
    ///
    /// # Errors
    /// The number of `fsconfig(2)`; see [`Filesystem::explain`].
    pub(crate) fn set(&self, key: &str, value: &[u8]) -> io::Result<()> {
        let outcome = if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&self.0, key)
        } else {
            rustix::mount::fsconfig_set_string(&self.0, key, value)
        };
        Ok(outcome?)
    }

    /// Sets an option that is an open file.
    ///
    /// # Errors
    /// As [`Filesystem::set`]; `EINVAL`: this kernel has no such option.
    pub(crate) fn set_descriptor(&self, key: &str, value: BorrowedFd<'_>) -> io::Result<()> {
        Ok(rustix::mount::fsconfig_set_fd(&self.0, key, value)?)
    }

    /// Makes the filesystem and a detached mount of it.
    ///
    /// # Errors
    /// The number of `fsconfig(2)` or `fsmount(2)`.
    pub(crate) fn mount(&self, attributes: u64) -> io::Result<OwnedFd> {
        rustix::mount::fsconfig_create(&self.0)?;
        let attributes = u32::try_from(attributes).map_err(io::Error::other)?;
        Ok(rustix::mount::fsmount(
            &self.0,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::from_bits_retain(attributes),
        )?)
    }

    /// What the kernel said about the last failure; often empty.
    pub(crate) fn explain(&self) -> String {
        let mut text = [0; 256];
        match rustix::io::read(&self.0, &mut text) {
            // `e ` (error), `w ` (warning) or `i ` comes first.
            Ok(count) => {
                let text = text.get(2..count).unwrap_or_default();
                String::from_utf8_lossy(text).trim().to_owned()
            }
            Err(_nothing) => String::new(),
        }
    }
}

/// A detached copy of the mounts at `path` (relative to `directory`; empty: `directory` itself). It stays in the
/// peer groups of what it copies.
///
/// # Errors
/// The number of `open_tree(2)`.
pub(crate) fn copy_tree(
    directory: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(OpenTreeFlags::AT_EMPTY_PATH, path.as_os_str().is_empty());
    Ok(rustix::mount::open_tree(directory, path, flags)?)
}

/// Attaches a detached mount at what `target` is.
///
/// # Errors
/// The number of `move_mount(2)`; `ENOTDIR`: one is a directory, the other is not.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(rustix::mount::move_mount(mount, "", target, "", flags)?)
}

/// Changes attributes and propagation of the mount whose root is `mount`.
///
/// Before Linux 5.12, where the call does not exist, an attached mount is changed by `mount(2)` with the mount as working
/// directory, which is left there.
///
/// # Errors
/// The number of `mount_setattr(2)`.
pub(crate) fn change(mount: BorrowedFd<'_>, change: &Change<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: change
            .user_namespace
            .and_then(|fd| u64::try_from(fd.as_raw_fd()).ok())
            .unwrap_or_default(),
    };
    let recursive = if change.recursive {
        libc::AT_RECURSIVE
    } else {
        0
    };
    // SAFETY: the path is a NUL-terminated string, the structure is as long as said; both are only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOSYS) => change_by_path(mount, change),
        _ => Err(error),
    }
}

fn change_by_path(mount: BorrowedFd<'_>, change: &Change<'_>) -> io::Result<()> {
    let impossible = change.user_namespace.is_some() || (change.recursive && change.set != 0);
    if impossible {
        return Err(rustix::io::Errno::NOSYS.into());
    }
    rustix::process::fchdir(mount)?;
    if change.set | change.clear != 0 {
        let mut flags = MountFlags::BIND;
        for (bit, flag) in [
            (attribute::READONLY, MountFlags::RDONLY),
            (attribute::NOSUID, MountFlags::NOSUID),
            (attribute::NODEV, MountFlags::NODEV),
            (attribute::NOEXEC, MountFlags::NOEXEC),
            (attribute::NOATIME, MountFlags::NOATIME),
        ] {
            flags.set(flag, change.set & bit != 0);
        }
        rustix::mount::mount_remount(".", flags, c"")?;
    }
    if change.propagation != 0 {
        let bits = u32::try_from(change.propagation).map_err(io::Error::other)?;
        let mut flags = MountPropagationFlags::from_bits_retain(bits);
        flags.set(MountPropagationFlags::REC, change.recursive);
        rustix::mount::mount_change(".", flags)?;
    }
    Ok(())
}

/// `mount(2)` of a filesystem, for kernels whose `fsconfig(2)` lacks an option.
///
/// # Errors
/// The number of `mount(2)`.
pub(crate) fn mount_by_path(kind: &str, target: &Path, options: &std::ffi::CStr) -> io::Result<()> {
    Ok(rustix::mount::mount(
        kind,
        target,
        kind,
        MountFlags::empty(),
        options,
    )?)
}

/// Takes a mount, of which this is the root, away from where it is attached. It becomes the working directory.
///
/// # Errors
/// The number of `fchdir(2)` or `umount2(2)`.
pub(crate) fn detach(mount: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::fchdir(mount)?;
    Ok(rustix::mount::unmount(".", UnmountFlags::DETACH)?)
}

/// Makes the mount `root` (attached in this mount namespace) the root of this process and lets the old root go, with all
/// that is mounted on it.
///
/// # Errors
/// The number of `fchdir(2)`, `pivot_root(2)` or `umount2(2)`, with that call's name.
pub(crate) fn pivot(root: BorrowedFd<'_>) -> Result<(), (&'static str, io::Error)> {
    use rustix::io::Errno;
    let old = open_root().map_err(|error| ("open the old root", error))?;
    rustix::process::fchdir(root).map_err(|error| ("fchdir", error.into()))?;
    // The old root comes to lie on the new one: no directory is needed for it (pivot_root(2), notes).
    rustix::process::pivot_root(".", ".").map_err(|error| ("pivot_root", error.into()))?;
    // Seen from the old root: what was mounted over it goes first, then itself, never the new one.
    rustix::process::fchdir(&old).map_err(|error| ("fchdir", error.into()))?;
    let mut gone = false;
    loop {
        match rustix::mount::unmount(".", UnmountFlags::DETACH) {
            Ok(()) => gone = true,
            // Not mounted any more.
            Err(Errno::INVAL) if gone => break,
            Err(error) => return Err(("umount2(MNT_DETACH)", error.into())),
        }
    }
    rustix::process::chdir("/").map_err(|error| ("chdir", error.into()))?;
    // `/..` is the topmost mount at the root, which is what setns(2) makes the root of an exec.
    let mount_of = |fd, path| {
        let flags = rustix::fs::AtFlags::EMPTY_PATH;
        rustix::fs::statx(fd, path, flags, rustix::fs::StatxFlags::MNT_ID)
            .map(|status| status.stx_mnt_id)
            .map_err(|error| ("statx", error.into()))
    };
    if mount_of(rustix::fs::CWD, "/..")? != mount_of(root, "")? {
        return Err(("umount2: the old root is still there", Errno::BUSY.into()));
    }
    Ok(())
}

/// The propagation that a path's mount has now: (shared with a peer group, slave of one). Reads
/// `/proc/self/mountinfo`; for the few mounts that need it.
///
/// # Errors
/// The number of `statx(2)` or of reading; `ENODATA`: not listed.
pub(crate) fn propagation_of(path: &Path) -> io::Result<(bool, bool)> {
    let status = rustix::fs::statx(
        rustix::fs::CWD,
        path,
        rustix::fs::AtFlags::empty(),
        rustix::fs::StatxFlags::MNT_ID,
    )?;
    let id = status.stx_mnt_id.to_string();
    let text = std::fs::read("/proc/self/mountinfo")?;
    for line in text.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        if fields.next() != Some(id.as_bytes()) {
            continue;
        }
        // 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 ...: tags from the seventh field up to "-".
        let tags = fields.skip(5).take_while(|field| *field != b"-");
        let mut found = (false, false);
        for tag in tags {
            found.0 |= tag.starts_with(b"shared:");
            found.1 |= tag.starts_with(b"master:");
        }
        return Ok(found);
    }
    Err(rustix::io::Errno::NODATA.into())
}

/// The descriptor's own path: for [`copy_tree`] of what a descriptor is.
pub(crate) const SELF: &str = "";

/// Opens the root directory of this process.
///
/// # Errors
/// The number of `open(2)`.
pub(crate) fn open_root() -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Makes every mount of this mount namespace private.
///
/// # Errors
/// The number of `mount_setattr(2)`.
pub(crate) fn make_all_private() -> io::Result<()> {
    let root = open_root()?;
    let all = Change {
        propagation: propagation::PRIVATE,
        recursive: true,
        ..Change::default()
    };
    change(root.as_fd(), &all)
}

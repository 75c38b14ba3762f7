//! Masked and read-only paths. A mask is one shared empty file or directory on a read-only tmpfs that only we could fill:
//! not the image's `/dev/null` (CVE-2025-31133), and not a tmpfs each.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::plan::{Context, Fault};
use crate::sys::file::{self, FileType, Mode, OFlags};
use crate::sys::mount;

use super::Step;
use super::rootfs::{Root, attach_at_top, make_readonly, tmpfs};

const STAGE: &str = "mask";
const ENOENT: i32 = 2;
const ENOTDIR: i32 = 20;

/// The empty file and directory, as mounts to attach.
pub(super) enum Masks {
    /// Nothing to hide.
    None,
    /// The filesystem, to copy from as needed (Linux 6.15: it may be detached).
    Holder(OwnedFd),
    /// Copies made while the filesystem was attached: (files, directories).
    Stock(Vec<OwnedFd>, Vec<OwnedFd>),
}

impl Masks {
    /// Prepares what hides these paths, before the host's root goes; `label` as for [`tmpfs`].
    pub(super) fn prepare(masked: &[String], label: &str) -> Result<Self, Fault> {
        if masked.is_empty() {
            return Ok(Self::None);
        }
        let options = [("mode", "755"), ("size", "4k"), ("nr_inodes", "4")];
        let attributes =
            mount::attribute::NOSUID | mount::attribute::NODEV | mount::attribute::NOEXEC;
        let holder = tmpfs(&options, attributes, label)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY | OFlags::CLOEXEC;
        let _file = file::openat(&holder, "file", flags, Mode::from_raw_mode(0o444))
            .context(STAGE, "openat", "file")?;
        file::make_directory(holder.as_fd(), "directory", 0o555).context(
            STAGE,
            "mkdirat",
            "directory",
        )?;
        let copy = |name: &str| mount::copy_tree(holder.as_fd(), Path::new(name), false);
        if copy("file").is_ok() && make_readonly(holder.as_fd(), false).is_ok() {
            return Ok(Self::Holder(holder));
        }
        attach_at_top(holder.as_fd())?;
        make_readonly(holder.as_fd(), false)?;
        let stock = |name: &str| -> Result<Vec<OwnedFd>, Fault> {
            let copies = masked
                .iter()
                .map(|_| copy(name).context(STAGE, "open_tree", name));
            copies.collect()
        };
        Ok(Self::Stock(stock("file")?, stock("directory")?))
    }

    fn take(&mut self, directory: bool) -> Result<OwnedFd, Fault> {
        let name = if directory { "directory" } else { "file" };
        let spent = || Fault::check(STAGE, "open_tree", "no mask left");
        match self {
            Self::None => Err(spent()),
            Self::Holder(holder) => mount::copy_tree(holder.as_fd(), Path::new(name), false)
                .context(STAGE, "open_tree", name),
            Self::Stock(files, directories) => {
                let list = if directory { directories } else { files };
                list.pop().ok_or_else(spent)
            }
        }
    }
}

/// Opens a path in the root if it exists.
fn existing(root: BorrowedFd<'_>, path: &str) -> Result<Option<OwnedFd>, Fault> {
    match file::open_in(root, Path::new(path), OFlags::PATH, Mode::empty()) {
        Ok(target) => Ok(Some(target)),
        Err(error) if matches!(error.raw_os_error(), Some(ENOENT | ENOTDIR)) => Ok(None),
        Err(error) => Err(Fault::call(STAGE, "openat2", path, &error)),
    }
}

/// Hides each path that exists.
pub(super) fn hide(paths: &[String], root: &mut Root) -> Step {
    for path in paths {
        let Some(target) = existing(root.fd.as_fd(), path)? else {
            continue;
        };
        let status = file::fstat(&target).context(STAGE, "fstat", path)?;
        let directory = FileType::from_raw_mode(status.st_mode) == FileType::Directory;
        let mask = root.masks.take(directory)?;
        mount::attach(mask.as_fd(), target.as_fd()).context(STAGE, "move_mount", path)?;
    }
    Ok(())
}

/// Makes each path that exists read-only, with all below.
pub(super) fn protect(paths: &[String], root: BorrowedFd<'_>) -> Step {
    for path in paths {
        let Some(target) = existing(root, path)? else {
            continue;
        };
        let copy = mount::copy_tree(target.as_fd(), Path::new(mount::SELF), true).context(
            "readonly path",
            "open_tree",
            path,
        )?;
        let all = make_readonly(copy.as_fd(), true);
        mount::attach(copy.as_fd(), target.as_fd()).context("readonly path", "move_mount", path)?;
        if all.is_err() {
            // Before Linux 5.12: the mount itself, and only once it is attached.
            make_readonly(copy.as_fd(), false)?;
        }
    }
    Ok(())
}

//! A procfs for a PID namespace in which others live, made by a process that does not live there.
//!
//! The kernel's own way (`pidns=`) is of Linux 6.18. Before, a procfs is of the namespace of who opens it; so it is copied from
//! where somebody of that namespace has it: the pod's from pause, another container's from that container, where it is believed
//! only after its process 1 was seen to be in the namespace.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::runtime::create::CreateRequest;
use crate::runtime::plan::{Context, Fault, MountSource, NamespaceSource, Plan};
use crate::sys::file::{self, Mode, OFlags, PROC_SUPER_MAGIC};
use crate::sys::mount::{self, Filesystem, attribute};
use crate::sys::process;

use super::join;

const STAGE: &str = "mount";
const EINVAL: i32 = 22;

/// A detached procfs of `namespace` for each that the plan mounts, in its order. Attributes are left to the caller.
pub(super) fn of_others(
    plan: &Plan,
    request: &CreateRequest<'_>,
    namespace: BorrowedFd<'_>,
) -> Result<Vec<OwnedFd>, Fault> {
    let wanted = plan.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Filesystem { kind, options } if kind == "proc" => Some(options),
        _ => None,
    });
    wanted
        .map(|options| one(plan, request, namespace, options))
        .collect()
}

fn one(
    plan: &Plan,
    request: &CreateRequest<'_>,
    namespace: BorrowedFd<'_>,
    options: &[(String, String)],
) -> Result<OwnedFd, Fault> {
    let filesystem = Filesystem::open("proc").context(STAGE, "fsopen", "proc")?;
    match filesystem.set_descriptor("pidns", namespace) {
        Ok(()) => {
            super::mounts::set_options(&filesystem, "proc", options)?;
            let mounted = filesystem.mount(0);
            return mounted.context(STAGE, "fsmount", "proc of a PID namespace");
        }
        Err(error) if error.raw_os_error() == Some(EINVAL) => {}
        Err(error) => return Err(Fault::call(STAGE, "fsconfig", "proc pidns", &error)),
    }
    if let Some((key, value)) = super::mounts::own_options(options).next() {
        let needs = "an option of a procfs that others have needs Linux 6.18";
        let what = format_args!("proc {key}={value}: {needs}").to_string();
        return Err(Fault::check(STAGE, "fsconfig", what));
    }
    let named = match &plan.namespaces.pid {
        NamespaceSource::Path(path) => named(path)?,
        _ => None,
    };
    let (whose, name) = match &plan.namespaces.pid {
        NamespaceSource::Pod => (request.pause, "the pod's pause"),
        NamespaceSource::Container(_) => (request.target, "the target container"),
        _ => (
            named.as_ref().map(OwnedFd::as_fd),
            "a process of its path (before Linux 6.18 it must be /proc/PID/ns/pid)",
        ),
    };
    let not_given = || Fault::check(STAGE, "proc", format_args!("{name}: not given"));
    let whose = whose.ok_or_else(not_given)?;
    let copied = join::visit_mounts(whose, "procfs of its PID namespace", || copy(namespace))?;
    let none = || {
        let what = format_args!("{name} has no procfs of its PID namespace at /proc").to_string();
        Fault::check(STAGE, "proc", what)
    };
    copied.ok_or_else(none)
}

/// The process whose namespace a path of procfs is. What is found with it is believed only if it is of that namespace.
fn named(path: &Path) -> Result<Option<OwnedFd>, Fault> {
    let text = path.to_str().and_then(|text| text.strip_prefix("/proc/"));
    let pid = text.and_then(|text| text.strip_suffix("/ns/pid")?.parse().ok());
    let open = |pid| process::pidfd_open(pid).context(STAGE, "pidfd_open", path.display());
    pid.map(open).transpose()
}

/// For pause: a procfs of its PID namespace, for the containers that come to live there; none where the kernel can make it
/// for them when they come.
pub(super) fn of_pod() -> Result<Option<OwnedFd>, Fault> {
    let filesystem = Filesystem::open("proc").context(STAGE, "fsopen", "proc")?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let own = file::openat(file::CWD, "/proc/self/ns/pid", flags, Mode::empty());
    let own = own.context(STAGE, "open", "/proc/self/ns/pid")?;
    if filesystem.set_descriptor("pidns", own.as_fd()).is_ok() {
        return Ok(None);
    }
    let attributes = attribute::NOSUID | attribute::NODEV | attribute::NOEXEC;
    filesystem
        .mount(attributes)
        .context(STAGE, "fsmount", "proc of pause")
        .map(Some)
}

/// The procfs at `/proc` of this mount namespace, if it is one of `namespace`.
fn copy(namespace: BorrowedFd<'_>) -> std::io::Result<Option<OwnedFd>> {
    let root = mount::open_root()?;
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let found = match file::open_in_no_links(root.as_fd(), Path::new("/proc"), flags, Mode::empty())
    {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if u64::try_from(file::fstatfs(&found)?.f_type) != Ok(PROC_SUPER_MAGIC) {
        return Ok(None);
    }
    let first = file::openat(
        &found,
        "1/ns/pid",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let (first, wanted) = (file::fstat(&first)?, file::fstat(namespace)?);
    if (first.st_dev, first.st_ino) != (wanted.st_dev, wanted.st_ino) {
        return Ok(None);
    }
    mount::copy_tree(found.as_fd(), Path::new(mount::SELF), false).map(Some)
}

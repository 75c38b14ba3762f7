//! The node's cgroup2, for containers that see it whole. There is one such hierarchy: whoever mounts it in the cgroup
//! namespace it was mounted in gives it the options of that mount, and takes all others from it (`nsdelegate`,
//! `memory_recursiveprot`). So the mount that the node has is shown. In other cgroup namespaces the kernel ignores options.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::runtime::plan::{Context, Fault, NamespaceSource, Namespaces};
use crate::runtime::tree::parent_of;
use crate::sys::{file, mount};

const STAGE: &str = "mount";
/// `f_type` of cgroup2.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// Where nodes have it: cgroup v2, and beside v1.
const PLACES: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// A copy of the node's mount, if this process, which has made its namespaces and sees the node's paths, is in the cgroup
/// namespace of the monitor.
pub(super) fn copy_if_seen(namespaces: &Namespaces) -> Result<Option<OwnedFd>, Fault> {
    let seen = match namespaces.cgroup {
        NamespaceSource::New => false,
        NamespaceSource::Host => true,
        _ => is_monitors()?,
    };
    seen.then(copy).transpose()
}

fn is_monitors() -> Result<bool, Fault> {
    let monitor = || {
        let own = std::fs::read_link("/proc/self").ok()?;
        parent_of(own.to_str()?.parse().ok()?)
    };
    let monitor = monitor().ok_or_else(|| Fault::check(STAGE, "read", "/proc/self"))?;
    let namespace = |path: &str| {
        let found = std::fs::metadata(path).context(STAGE, "stat", path)?;
        Ok((found.dev(), found.ino()))
    };
    let own = namespace("/proc/self/ns/cgroup")?;
    Ok(own == namespace(&format!("/proc/{monitor}/ns/cgroup"))?)
}

fn copy() -> Result<OwnedFd, Fault> {
    for place in PLACES {
        let copy = match mount::copy_tree(file::CWD, Path::new(place), false) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            copy => copy.context(STAGE, "open_tree", place)?,
        };
        let kind = file::fstatfs(&copy).context(STAGE, "fstatfs", place)?;
        if u64::try_from(kind.f_type) == Ok(CGROUP2_SUPER_MAGIC) {
            return Ok(copy);
        }
    }
    let what = format!("the node has none at {}", PLACES.join(" or "));
    Err(Fault::check(STAGE, "cgroup2:", what))
}

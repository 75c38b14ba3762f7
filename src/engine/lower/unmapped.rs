//! Tells of volumes in a user namespace below which files keep their owners.

use std::fs::File;
use std::os::fd::AsFd as _;

use crate::engine::container::Container;
use crate::runtime::plan::{MountSource, Plan};
use crate::runtime::unmapped;

/// Warns, once, of what is mounted below the container's volumes and cannot be idmapped. Blocks.
pub(super) fn tell(container: &Container, plan: &Plan) {
    let volumes = plan.mounts.iter().filter_map(|mount| match &mount.source {
        MountSource::Bind {
            path,
            recursive: true,
            uid_mappings,
            ..
        } if !uid_mappings.is_empty() && path.is_dir() => Some((&mount.target, path)),
        _ => None,
    });
    let mut volumes = volumes.peekable();
    if plan.namespaces.uid_mappings.is_empty() || volumes.peek().is_none() {
        return;
    }
    let Some(pause) = container.pod.lock().pause_pid else {
        return;
    };
    let user = File::open(format!("/proc/{pause}/ns/user"));
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo");
    let (Ok(user), Ok(mountinfo)) = (user, mountinfo) else {
        return;
    };
    let found = volumes.flat_map(|(target, path)| {
        let below = unmapped::below(path, &mountinfo, user.as_fd()).into_iter();
        below.map(move |one| format!("{target}/{} ({})", one.path.display(), one.filesystem))
    });
    let found: Vec<_> = found.collect();
    if !found.is_empty() {
        tracing::warn!(
            container.id = %container.id,
            mounts = found.join(", "),
            "filesystems without idmapped mounts: with all else that is mounted below their volumes they keep the node's \
             owners, nobody inside"
        );
    }
}

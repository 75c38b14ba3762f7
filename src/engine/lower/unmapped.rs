//! Tells of volumes in a user namespace below which files keep their owners.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;

use crate::base::tasks::Tasks;
use crate::engine::container::Container;
use crate::engine::lower::Lower;
use crate::runtime::plan::{MountSource, Plan};
use crate::runtime::unmapped;

impl Lower {
    /// Warns, once, of what is mounted below the container's volumes and cannot be idmapped. In the background: it reads the
    /// node's table of mounts, for which no start waits.
    pub(crate) fn tell_unmapped(&self, tasks: &Tasks, container: &Arc<Container>, plan: &Plan) {
        if plan.namespaces.uid_mappings.is_empty() {
            return;
        }
        let volumes = plan.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Bind {
                path,
                recursive: true,
                uid_mappings,
                ..
            } if !uid_mappings.is_empty() => Some((mount.target.clone(), path.clone())),
            _ => None,
        });
        let volumes: Vec<_> = volumes.collect();
        if volumes.is_empty() {
            return;
        }
        let container = Arc::clone(container);
        let _told = tasks.spawn(async move {
            let work = move || tell(&container, &volumes);
            let _cut_off = Tasks::blocking(work).await.is_err();
        });
    }
}

fn tell(container: &Container, volumes: &[(String, PathBuf)]) {
    let Some(pause) = container.pod.lock().pause_pid else {
        return;
    };
    let user = File::open(format!("/proc/{pause}/ns/user"));
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo");
    let (Ok(user), Ok(mountinfo)) = (user, mountinfo) else {
        return;
    };
    let directories = volumes.iter().filter(|(_, path)| path.is_dir());
    let found = directories.flat_map(|(target, path)| {
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

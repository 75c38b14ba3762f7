//! What the metrics calls tell, read when asked.

use std::collections::BTreeMap;
use std::path::Path;

use crate::base::stats::{FilesystemSize, Scope};
use crate::engine::Engine;
use crate::engine::core::{Core, blocking};
use crate::engine::error::Result;
use crate::engine::facade::{Metrics, PodFigures};

impl Engine {
    /// Everything of all ready pods.
    ///
    /// # Errors
    /// [`crate::engine::EngineError::GivenUp`] at shutdown only.
    pub(super) async fn read_metrics(&self) -> Result<Metrics> {
        let mut pods = self.core().pods.all();
        pods.retain(|pod| pod.is_ready());
        let pods = self.read_pods(pods, Scope::Everything).await?;
        let engine = self.clone();
        blocking("read metrics", move || {
            Ok(Metrics {
                devices: device_names(&pods),
                pods,
                filesystem: filesystem(engine.core()),
            })
        })
        .await
    }
}

/// The filesystem of the writable layers; zeros: it cannot be asked.
fn filesystem(core: &Core) -> FilesystemSize {
    let device = core.device.get_or_init(|| device_below(&core.root));
    match rustix::fs::statvfs(&core.root) {
        Ok(found) => FilesystemSize {
            device: device.clone(),
            bytes: found.f_blocks.saturating_mul(found.f_frsize),
            inodes: found.f_files,
            inodes_free: found.f_favail,
        },
        Err(error) => {
            tracing::warn!(path = %core.root.display(), %error, "filesystem not measured");
            FilesystemSize::default()
        }
    }
}

/// Device of the filesystem that a directory is on, as the mount table has it; empty: not found.
fn device_below(directory: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(metadata) = std::fs::metadata(directory) else {
        return String::new();
    };
    let device = metadata.dev();
    let wanted = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    source_of(&table, &wanted).unwrap_or_default()
}

/// Source of the first mount of a device. Kernel: proc_pid_mountinfo(5).
fn source_of(table: &str, device: &str) -> Option<String> {
    table
        .lines()
        .find_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            (mount.split(' ').nth(2)? == device).then(|| kind.split(' ').nth(1))?
        })
        .map(str::to_owned)
}

/// Names of all devices that the figures speak of.
fn device_names(pods: &[PodFigures]) -> BTreeMap<(u32, u32), String> {
    let mut names = BTreeMap::new();
    let containers = pods.iter().flat_map(|pod| &pod.containers);
    let all = containers
        .map(|container| &container.cgroup)
        .chain(pods.iter().map(|pod| &pod.cgroup));
    for device in all.flat_map(|cgroup| &cgroup.devices) {
        let key = (device.major, device.minor);
        if names.contains_key(&key) {
            continue;
        }
        let link = std::fs::read_link(format!("/sys/dev/block/{}:{}", key.0, key.1));
        if let Some(name) = link.ok().as_deref().and_then(Path::file_name) {
            names.insert(key, format!("/dev/{}", name.to_string_lossy()));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table() {
        let table = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
                     23 22 0:21 / /proc rw - proc proc rw\n24 22 8:1 /a /b rw - ext4 /dev/x rw\n";
        assert_eq!(source_of(table, "8:1").as_deref(), Some("/dev/sda1"));
        assert_eq!(source_of(table, "8:2"), None);
    }
}

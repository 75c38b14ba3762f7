//! SELinux labels of pods and containers, where the configuration wants them and the kernel has them.

use std::path::Path;

use serde_json::{Value, json};

use crate::base::pod::PodConfig;
use crate::base::security::{SelinuxLabels, SelinuxOptions};
use crate::engine::container::Container;
use crate::engine::core::{Core, SelinuxConfig};
use crate::engine::error::{EngineError, Result};
use crate::engine::lower::Lower;
use crate::runtime::selinux::{self, Hold, Label, Levels, Selinux};

/// What labels are made of.
#[derive(Debug)]
pub(super) struct Labels {
    /// Absent: none are given, and what is asked for is ignored.
    policy: Option<Selinux>,
    levels: Levels,
}

impl Labels {
    /// Reads the node's policy. Blocks on its files.
    ///
    /// # Errors
    /// [`EngineError::Step`]: it has no labels for containers.
    pub(super) fn open(config: Option<SelinuxConfig>) -> Result<Self> {
        let enabled = selinux::is_enabled();
        let policy = match config {
            Some(config) if enabled => Some(
                Selinux::open(config.confine_host_network)
                    .map_err(EngineError::step("find SELinux labels for containers"))?,
            ),
            Some(_) => {
                tracing::warn!(
                    "selinux = true, but this kernel has SELinux off: no labels are given"
                );
                None
            }
            None if enabled => {
                tracing::warn!(
                    "this node has SELinux, but selinux = false: labels of pods are ignored"
                );
                None
            }
            None => None,
        };
        Ok(Self {
            policy,
            levels: Levels::new(config.map_or(0, |config| config.category_range)),
        })
    }
}

impl Lower {
    /// Labels of a new pod, and the level that it holds.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the policy does not know what is asked for, or no level is free.
    pub(crate) fn label_pod(&self, pod: &PodConfig) -> Result<(SelinuxLabels, Option<Hold>)> {
        let Some(policy) = &self.labels.policy else {
            return Ok((SelinuxLabels::default(), None));
        };
        let asked = pod
            .security
            .selinux
            .as_ref()
            .filter(|o| !o.level.is_empty());
        let hold = match (asked, policy.sensitivity()) {
            (Some(options), _) => Some(self.labels.levels.hold(&options.level)),
            (None, None) => None,
            (None, Some(sensitivity)) => {
                let random = crate::sys::random::bytes().map(u64::from_ne_bytes);
                let random = random.map_err(EngineError::io("take random bytes for a level"))?;
                let level = self.labels.levels.allocate(sensitivity, random);
                Some(level.map_err(EngineError::step("choose a SELinux level"))?)
            }
        };
        let level = hold.as_ref().map_or("", Hold::level);
        let labels = policy.of_pod(pod, level);
        Ok((labels.map_err(EngineError::step("sandbox config"))?, hold))
    }

    /// Holds the level of a restored pod.
    pub(crate) fn hold_level_of(&self, labels: &SelinuxLabels) -> Option<Hold> {
        let level = Label::parse(&labels.mount)?.level;
        (!level.is_empty()).then(|| self.labels.levels.hold(&level))
    }

    /// Holds the level that a container names.
    pub(crate) fn hold_level(&self, options: Option<&SelinuxOptions>) -> Option<Hold> {
        let level = options.map(|options| options.level.as_str());
        level
            .filter(|level| self.labels.policy.is_some() && !level.is_empty())
            .map(|level| self.labels.levels.hold(level))
    }

    /// Labels of a container; empty ones where none are given.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the policy does not know what is asked for.
    pub(super) fn label_container(&self, container: &Container) -> Result<SelinuxLabels> {
        let pod = &container.pod;
        match &self.labels.policy {
            // A pod from before labels were given has none; neither have its containers.
            Some(policy) if !pod.labels.mount.is_empty() => policy
                .of_container(&pod.config, &pod.labels, &container.config.security)
                .map_err(EngineError::step("container config")),
            _ => Ok(SelinuxLabels::default()),
        }
    }

    /// Relabels the volumes of a container for which that is asked, and the pod's files where its label is not the pod's.
    /// Blocks on their filesystems.
    ///
    /// # Errors
    /// [`EngineError::Step`] names the mount.
    pub(super) fn relabel(&self, core: &Core, container: &Container, label: &str) -> Result<()> {
        let pod = &container.pod;
        let Some(policy) = self.labels.policy.as_ref().filter(|_| !label.is_empty()) else {
            return Ok(());
        };
        if label != pod.labels.mount {
            label_files(&core.pod_directory(pod.id), &policy.shared(label))?;
        }
        for (index, mount) in container.config.mounts.iter().enumerate() {
            if !mount.selinux_relabel || mount.image.is_some() {
                continue;
            }
            let failed = format!("mounts[{index}].selinux_relabel of {}", mount.host_path);
            let mut stop = || core.tasks.is_ending();
            selinux::relabel(Path::new(&mount.host_path), label, &mut stop)
                .map_err(EngineError::step(failed))?;
        }
        Ok(())
    }

    /// For the runtime's verbose status.
    pub(crate) fn selinux_info(&self) -> Value {
        match &self.labels.policy {
            None => json!({ "enabled": false }),
            Some(policy) => {
                let (process, file) = policy.defaults();
                json!({ "enabled": true, "process": process, "file": file })
            }
        }
    }
}

/// Labels the files of a pod that its containers share; an empty label leaves them.
///
/// # Errors
/// [`EngineError::Step`].
pub(super) fn label_files(directory: &Path, label: &str) -> Result<()> {
    if label.is_empty() {
        return Ok(());
    }
    for name in ["hosts", "hostname", "resolv.conf"] {
        label_file(&directory.join(name), label)?;
    }
    Ok(())
}

/// Labels a file or directory of ours; an empty label leaves it.
///
/// # Errors
/// [`EngineError::Step`].
pub(super) fn label_file(path: &Path, label: &str) -> Result<()> {
    if label.is_empty() {
        return Ok(());
    }
    let failed = format!("label {} as {label}", path.display());
    selinux::set_label(path, label).map_err(EngineError::io(failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unlabelled_files_stay() {
        let directory = tempfile::tempdir().unwrap();
        label_files(directory.path(), "").unwrap();
        let missing = label_files(directory.path(), "u:r:t:s0").unwrap_err();
        assert!(missing.to_string().contains("label "), "{missing}");
    }
}

//! SELinux labels of pods, containers and volumes.
//!
//! ```text
//! lxc_contexts of the node's policy --> defaults: process (container_t), mount (container_file_t)
//!   + level of the pod (its own categories, or as asked for)
//!   + user, role, type, level of CRI's SELinuxOption
//!   -> checked by the kernel (/sys/fs/selinux/context) -> Labels{process, mount}
//! ```
//!
//! The process label is written to `attr/exec` between clone and exec, the mount label is the `context=` of every filesystem
//! that is made for the container; neither the image's layers nor the writable layer are relabelled on disk. Volumes are,
//! where CRI asks for it ([`relabel`]). No library: all of it is files of selinuxfs and extended attributes.
//!
//! Kernel: selinux(8), Documentation/admin-guide/LSM/SELinux.rst. Decisions: `hack/adr/0008-selinux.md`.

mod label;
mod levels;
mod relabel;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use crate::base::error::{HasKind, Kind};
use crate::base::pod::PodConfig;
use crate::base::security::{
    ContainerSecurity, NamespaceMode, NamespaceOptions, SelinuxLabels, SelinuxOptions,
};
use crate::runtime::spec::SpecError;

pub(crate) use label::Label;
pub(crate) use levels::{Hold, Levels};
pub(crate) use relabel::{relabel, set_label};

/// Where selinuxfs is mounted.
const SELINUXFS: &str = "/sys/fs/selinux";
/// Where the policy's files are found.
const CONFIG: &str = "/etc/selinux/config";
/// Type of processes that the policy does not confine, as container-selinux and the reference policy name it.
const UNCONFINED: &str = "spc_t";

/// Why labels cannot be given on this node.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PolicyError {
    /// A file of the policy cannot be read.
    #[error("selinux = true needs {}: install a policy with container types, or set selinux = false", path.display())]
    Missing {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file has no label for this.
    #[error("{}: {key} is missing or no label: install a policy with container types, or set selinux = false", path.display())]
    Entry {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
    },
    /// The kernel's policy does not know a label.
    #[error("{}: {key} = {label} is not known to the kernel's policy: install one with container types, or set selinux = false", path.display())]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: &'static str,
        /// Its value.
        label: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

impl HasKind for PolicyError {
    fn kind(&self) -> Kind {
        Kind::FailedPrecondition
    }
}

/// The labels that this node's policy has for containers.
#[derive(Clone, Debug)]
pub(crate) struct Selinux {
    process: Label,
    mount: Label,
    /// Of processes that are not to be confined; absent: the policy has no such type, they get no label.
    unconfined: Option<String>,
    /// Pods with the node's network are confined too.
    confine_host_network: bool,
}

/// Is SELinux on in this kernel, with a policy loaded?
pub(crate) fn is_enabled() -> bool {
    Path::new(SELINUXFS).join("enforce").exists()
        && std::fs::read_to_string("/proc/self/attr/current")
            .is_ok_and(|own| own.trim_end_matches(['\0', '\n']) != "kernel" && !own.is_empty())
}

/// Asks the kernel whether its policy has this label.
fn check(label: &str) -> std::io::Result<()> {
    let directory = std::fs::File::open(SELINUXFS)?;
    crate::sys::file::write_kernel(
        std::os::fd::AsFd::as_fd(&directory),
        Path::new("context"),
        label.as_bytes(),
    )
}

/// Value of a key in a file of lines `key = value`, quotes taken away.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let lines = text.lines().map(str::trim).filter(|l| !l.starts_with('#'));
    let mut pairs = lines.filter_map(|line| line.split_once('='));
    let found = pairs.find(|(name, _)| name.trim() == key);
    found.map(|(_, value)| value.trim().trim_matches('"'))
}

impl Selinux {
    /// Reads the defaults of the node's policy and has the kernel check them.
    ///
    /// # Errors
    /// [`PolicyError`]: the policy has none for containers.
    pub(crate) fn open(confine_host_network: bool) -> Result<Self, PolicyError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path).map_err(|source| PolicyError::Missing {
                path: path.to_owned(),
                source,
            })
        };
        let config = Path::new(CONFIG);
        let text = read(config)?;
        let kind = value(&text, "SELINUXTYPE").filter(|kind| !kind.contains('/'));
        let kind = kind.ok_or_else(|| PolicyError::Entry {
            path: config.to_owned(),
            key: "SELINUXTYPE",
        })?;
        let path = config.with_file_name(kind).join("contexts/lxc_contexts");
        let text = read(&path)?;
        let label = |key: &'static str| {
            let found = value(&text, key).and_then(Label::parse);
            let found = found.ok_or_else(|| PolicyError::Entry {
                path: path.clone(),
                key,
            })?;
            let shown = found.to_string();
            match check(&shown) {
                Ok(()) => Ok(found),
                Err(source) => Err(PolicyError::Unknown {
                    path: path.clone(),
                    key,
                    label: shown,
                    source,
                }),
            }
        };
        let (process, mount) = (label("process")?, label("file")?);
        let unconfined = process.unconfined(UNCONFINED);
        Ok(Self {
            unconfined: unconfined.into_iter().find(|label| check(label).is_ok()),
            process,
            mount,
            confine_host_network,
        })
    }

    /// The defaults: (process, mount).
    pub(crate) fn defaults(&self) -> (String, String) {
        (self.process.to_string(), self.mount.to_string())
    }

    /// Sensitivity that levels of pods begin with, such as `s0`; absent: the policy knows no levels.
    pub(crate) fn sensitivity(&self) -> Option<&str> {
        let (sensitivity, _) = self
            .process
            .level
            .split_once(':')
            .unwrap_or((&self.process.level, ""));
        let low = sensitivity.split('-').next().unwrap_or_default();
        (!low.is_empty()).then_some(low)
    }

    /// The mount label by which containers of every level may read and write.
    pub(crate) fn shared(&self, mount: &str) -> String {
        let mut label = Label::parse(mount).unwrap_or_else(|| self.mount.clone());
        self.sensitivity()
            .unwrap_or_default()
            .clone_into(&mut label.level);
        label.to_string()
    }

    /// Labels of a pod: pause, what is made for it, and what its containers get where they ask for nothing else.
    /// `level`: its own, where it asks for none.
    ///
    /// # Errors
    /// [`SpecError::Invalid`]: the kernel's policy does not know the label that comes of the options.
    pub(crate) fn of_pod(&self, pod: &PodConfig, level: &str) -> Result<SelinuxLabels, SpecError> {
        let security = &pod.security;
        let free =
            security.privileged || self.is_free(&security.namespaces, security.selinux.as_ref());
        self.labels(
            "linux.security_context.selinux_options",
            security.selinux.as_ref(),
            level,
            free,
        )
    }

    /// Labels of a container. What it does not say is as its pod's options and labels say.
    ///
    /// # Errors
    /// As [`Selinux::of_pod`].
    pub(crate) fn of_container(
        &self,
        pod: &PodConfig,
        of_pod: &SelinuxLabels,
        security: &ContainerSecurity,
    ) -> Result<SelinuxLabels, SpecError> {
        let own = security.selinux.as_ref().filter(|own| !own.is_empty());
        let options = own.or(pod.security.selinux.as_ref());
        let free = security.privileged || self.is_free(&pod.security.namespaces, options);
        let level = Label::parse(&of_pod.mount).map_or(String::new(), |label| label.level);
        self.labels("security_context.selinux_options", options, &level, free)
    }

    /// Does what the pod shares with the node make a confined type pointless? One that is asked for is given all the same.
    fn is_free(&self, namespaces: &NamespaceOptions, options: Option<&SelinuxOptions>) -> bool {
        let node = |mode| mode == NamespaceMode::Node;
        let shares = node(namespaces.pid)
            || node(namespaces.ipc)
            || (node(namespaces.network) && !self.confine_host_network);
        shares && options.is_none_or(|options| options.kind.is_empty())
    }

    fn labels(
        &self,
        field: &str,
        options: Option<&SelinuxOptions>,
        level: &str,
        free: bool,
    ) -> Result<SelinuxLabels, SpecError> {
        let (mut process, mut mount) = (self.process.clone(), self.mount.clone());
        for label in [&mut process, &mut mount] {
            level.clone_into(&mut label.level);
        }
        if let Some(options) = options {
            process.apply(field, options)?;
            mount.apply(
                field,
                &SelinuxOptions {
                    user: options.user.clone(),
                    level: options.level.clone(),
                    ..SelinuxOptions::default()
                },
            )?;
        }
        for label in [&process, &mount] {
            check(&label.to_string()).map_err(|_einval| {
                let mend = "use a user, role, type and level of the node's policy";
                SpecError::invalid(
                    field,
                    label,
                    "is not known to the node's SELinux policy",
                    mend,
                )
            })?;
        }
        Ok(SelinuxLabels {
            process: match free {
                true => self.unconfined.clone().unwrap_or_default(),
                false => process.to_string(),
            },
            mount: mount.to_string(),
        })
    }
}

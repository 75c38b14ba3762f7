//! Cgroups, v1 (separate hierarchies) and v2, cgroupfs driver.
//!
//! The daemon creates a cgroup, sets its limits and device rules, reads its figures and removes it; a
//! process joins it between clone and exec ([`CgroupJoin`]). The monitor uses only [`kill`] and
//! [`oom_kills`]. A path is that of kubelet: absolute, below the root of every hierarchy.
//!
//! ```text
//! v2   /sys/fs/cgroup/kubepods/burstable/pod7/<id>/
//! v1   /sys/fs/cgroup/{cpu,memory,...}/kubepods/burstable/pod7/<id>/
//! ```
//!
//! What a machine lacks (a controller, swap accounting) is left out and said once in the log.

#[cfg(feature = "daemon")]
mod block_io;
#[cfg(feature = "daemon")]
pub(crate) mod devices;
mod files;
mod kill;
#[cfg(feature = "daemon")]
mod layout;
#[cfg(feature = "daemon")]
mod limits;
#[cfg(feature = "daemon")]
mod oom_score;
#[cfg(feature = "daemon")]
mod open_files;
#[cfg(feature = "daemon")]
mod reader;
#[cfg(test)]
pub(crate) mod scratch;
#[cfg(feature = "daemon")]
mod stats;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

#[cfg(feature = "daemon")]
pub(crate) use layout::{Cgroups, Version};
#[cfg(feature = "daemon")]
pub(crate) use reader::Readings;

#[cfg(test)]
pub(crate) use kill::kill;
pub(crate) use kill::oom_kills;

#[cfg(feature = "daemon")]
use crate::base::error::{HasKind, Kind};
#[cfg(feature = "daemon")]
use crate::runtime::plan::CgroupJoin;

/// Where a cgroup is, for whoever runs processes in it.
#[cfg(feature = "daemon")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CgroupDirs {
    /// What a process joins.
    pub(crate) join: CgroupJoin,
    /// Where OOM kills are counted: the v2 directory, or that of the v1 memory hierarchy.
    pub(crate) memory: PathBuf,
    /// Whose processes are killed together: the v2 directory, or that of the v1 freezer hierarchy.
    pub(crate) kill: PathBuf,
}

/// Why a cgroup could not be made, changed, read or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    /// The path is not absolute or climbs.
    #[error("cgroup path {0:?}: must be absolute, without `.`, `..` and empty parts")]
    Path(String),
    /// A file below a cgroup could not be used.
    #[error("{operation} {}", path.display())]
    File {
        /// `read`, `mkdir`, `rmdir`, `write VALUE to`, ...
        operation: String,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A setting that makes no sense here.
    #[error("{field}: {value:?}: {mend}")]
    Setting {
        /// Field of the CRI message.
        field: String,
        /// Its value.
        value: String,
        /// What to do.
        mend: String,
    },
    /// The new memory limit is below what is in use.
    #[error(
        "memory_limit_in_bytes: {limit} is below the {usage} bytes in use: the container would be killed"
    )]
    BelowUsage {
        /// New limit in bytes.
        limit: u64,
        /// Bytes in use.
        usage: u64,
    },
    /// This machine has no cgroup hierarchy that we can use.
    #[error("no cgroup hierarchy under {}: mount cgroup2 there", .0.display())]
    None(PathBuf),
    /// Processes do not end.
    #[error("processes {pids:?} of cgroup {} do not end", path.display())]
    Busy {
        /// The cgroup.
        path: PathBuf,
        /// Who is left (host pids).
        pids: Vec<u32>,
    },
    /// The device program was refused.
    #[error("device rules of cgroup {}", path.display())]
    Devices {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[cfg(feature = "daemon")]
impl HasKind for CgroupError {
    fn kind(&self) -> Kind {
        match self {
            Self::Path(_) | Self::Setting { .. } => Kind::InvalidArgument,
            Self::BelowUsage { .. } => Kind::FailedPrecondition,
            Self::File { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Kind::NotFound
            }
            Self::File {
                operation, source, ..
            } if operation.starts_with("write")
                && source.kind() == std::io::ErrorKind::InvalidInput =>
            {
                Kind::InvalidArgument
            }
            Self::File { .. } | Self::None(_) | Self::Busy { .. } | Self::Devices { .. } => {
                Kind::Internal
            }
        }
    }
}

fn file_error(operation: &str, path: &Path, source: std::io::Error) -> CgroupError {
    CgroupError::File {
        operation: operation.to_owned(),
        path: path.to_owned(),
        source,
    }
}

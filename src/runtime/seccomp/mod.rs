//! Seccomp: profiles (Docker's and OCI's JSON), the built-in default, and their compiler to classic BPF.
//!
//! ```text
//! JSON file --profile--> Profile --resolve--> numbers per architecture --program--> cBPF
//! built-in --default--/           (capabilities, kernel)
//! ```
//!
//! Where rules of one system call disagree: a rule that does what the default does counts for nothing; a
//! rule without conditions wins over those with; else the first in the profile that matches wins. A rule that names the same
//! argument twice stands for several rules with one condition each. All of this is how profiles
//! written for libseccomp-based runtimes are meant. Numbers above the highest that the profile mentions
//! give `ENOSYS`, so that programs fall back from system calls younger than the profile.

pub(crate) mod default;
pub(crate) mod profile;
pub(crate) mod program;
pub(crate) mod resolve;
pub(crate) mod table;

#[cfg(test)]
mod differential;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::base::error::{HasKind, Kind};
use crate::runtime::plan::SeccompFilter;

pub(crate) use profile::Profile;
pub(crate) use table::Arch;

/// Most filters kept for the next container.
const MAX_CACHED: usize = 64;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SeccompError {
    /// The profile's file cannot be read.
    #[error("cannot read seccomp profile {}; put it where kubelet's seccomp directory is", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The profile's file is no plain file, or too large.
    #[error("seccomp profile {}: {problem}", path.display())]
    File {
        /// File.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The profile is no JSON, or not of the right shape.
    #[error("seccomp profile {name}:{line}:{column}: {problem}")]
    Json {
        /// File, or another name of the profile.
        name: String,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        problem: String,
    },
    /// A value of the profile can never be right.
    #[error("seccomp profile {name}: {field}: {value:?} {problem}")]
    Invalid {
        /// Name of the profile.
        name: String,
        /// Field, as the JSON names it.
        field: String,
        /// Its value.
        value: String,
        /// What is wrong, and what to do.
        problem: &'static str,
    },
    /// The profile needs what is not built.
    #[error("seccomp profile {name}: {what} is not built in this version of berth")]
    Unimplemented {
        /// Name of the profile.
        name: String,
        /// What.
        what: &'static str,
    },
    /// The kernel does not offer what the profile needs.
    #[error("seccomp profile {name}: this kernel does not offer {what}")]
    Kernel {
        /// Name of the profile.
        name: String,
        /// What.
        what: String,
    },
    /// The program is longer than the kernel takes.
    #[error(
        "seccomp profile {name}: its program has {length} instructions, the kernel takes 4096; simplify it"
    )]
    TooLong {
        /// Name of the profile.
        name: String,
        /// Instructions.
        length: usize,
    },
}

impl HasKind for SeccompError {
    fn kind(&self) -> Kind {
        match self {
            Self::Read { .. }
            | Self::File { .. }
            | Self::Json { .. }
            | Self::Invalid { .. }
            | Self::TooLong { .. } => Kind::InvalidArgument,
            Self::Unimplemented { .. } => Kind::Unimplemented,
            Self::Kernel { .. } => Kind::FailedPrecondition,
        }
    }
}

/// Result of this module.
pub(crate) type Result<T> = std::result::Result<T, SeccompError>;

/// What a filter is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// Architecture of the machine.
    pub(crate) arch: Arch,
    /// Bounding set of the process: rules may depend on it.
    pub(crate) capabilities: u64,
    /// (major, minor) of the kernel: rules may depend on it.
    pub(crate) kernel: (u32, u32),
    /// Actions the kernel offers (`/proc/sys/kernel/seccomp/actions_avail`).
    pub(crate) actions: &'a [String],
}

/// A filter and what it does, as the OCI spec says it.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    /// For the plan.
    pub(crate) filter: SeccompFilter,
    /// For the spec.
    pub(crate) description: oci_spec::runtime::LinuxSeccomp,
}

type Key = ([u8; 32], Arch, u64, (u32, u32), Vec<String>);

static CACHE: LazyLock<Mutex<HashMap<Key, Arc<Compiled>>>> = LazyLock::new(Mutex::default);

/// Compiles a profile; the same one for the same target is compiled once.
///
/// # Errors
/// [`SeccompError`]: a value is wrong, or asks for what is not built or not offered by the kernel.
pub(crate) fn compile(profile: &Profile, target: &Target<'_>) -> Result<Arc<Compiled>> {
    let key = (
        profile.digest,
        target.arch,
        target.capabilities,
        target.kernel,
        target.actions.to_vec(),
    );
    if let Some(compiled) = cache().get(&key) {
        return Ok(Arc::clone(compiled));
    }
    let resolved = resolve::resolve(profile, target)?;
    let compiled = Arc::new(Compiled {
        filter: program::assemble(&resolved)?,
        description: resolve::describe(&resolved),
    });
    let mut cache = cache();
    if cache.len() >= MAX_CACHED {
        cache.clear();
    }
    cache.insert(key, Arc::clone(&compiled));
    Ok(compiled)
}

fn cache() -> std::sync::MutexGuard<'static, HashMap<Key, Arc<Compiled>>> {
    CACHE.lock().unwrap_or_else(PoisonError::into_inner)
}

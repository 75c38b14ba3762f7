//! Why no spec can be made.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::error::{HasKind, Kind};

/// Longest value that a message repeats.
const MAX_VALUE: usize = 200;

/// Why a container's or sandbox's config gives no spec.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// A value can never be right.
    #[error("{field}: {value:?} {problem}; {mend}")]
    Invalid {
        /// Field, as CRI names it (or the image's config).
        field: String,
        /// Its value, shortened.
        value: String,
        /// What is wrong with it, such as `is not an absolute path`.
        problem: String,
        /// What to do.
        mend: &'static str,
    },
    /// A field that is not built yet.
    #[error("{field}: {value:?} is not built in this version of berth; {mend}")]
    Unimplemented {
        /// Field.
        field: String,
        /// Its value, shortened.
        value: String,
        /// What to do.
        mend: &'static str,
    },
    /// The kernel or filesystem cannot make recursive read-only mounts. The word is what kubelet knows.
    #[error("RROUnsupported: {field}: {problem}; use recursiveReadOnly: IfPossible or Disabled")]
    RroUnsupported {
        /// Field.
        field: String,
        /// Why not.
        problem: String,
    },
    /// The node is not as the config needs it.
    #[error("{field}: {value:?} {problem}; {mend}")]
    Precondition {
        /// Field.
        field: String,
        /// Its value, shortened.
        value: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        mend: &'static str,
    },
    /// Something of the node that the config names cannot be used.
    #[error("{field}: cannot {operation} {}", path.display())]
    Host {
        /// Field.
        field: String,
        /// What was tried, such as `read`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The seccomp profile is bad.
    #[error("security_context.seccomp: no filter can be made")]
    Seccomp(#[source] crate::runtime::seccomp::SeccompError),
}

/// Result of this module.
pub(crate) type Result<T> = std::result::Result<T, SpecError>;

fn shorten(value: &str) -> String {
    if value.chars().count() <= MAX_VALUE {
        return value.to_owned();
    }
    value.chars().take(MAX_VALUE).chain("...".chars()).collect()
}

impl SpecError {
    /// A value that can never be right.
    pub(crate) fn invalid(
        field: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        mend: &'static str,
    ) -> Self {
        Self::Invalid {
            field: field.into(),
            value: shorten(&value.to_string()),
            problem: problem.into(),
            mend,
        }
    }

    /// A field that is not built yet.
    pub(crate) fn unimplemented(
        field: impl Into<String>,
        value: impl ToString,
        mend: &'static str,
    ) -> Self {
        Self::Unimplemented {
            field: field.into(),
            value: shorten(&value.to_string()),
            mend,
        }
    }

    /// The node is not as the config needs it.
    pub(crate) fn precondition(
        field: impl Into<String>,
        value: impl ToString,
        problem: impl Into<String>,
        mend: &'static str,
    ) -> Self {
        Self::Precondition {
            field: field.into(),
            value: shorten(&value.to_string()),
            problem: problem.into(),
            mend,
        }
    }

    /// A file of the node that cannot be used.
    pub(crate) fn host(
        field: impl Into<String>,
        operation: &'static str,
        path: &Path,
        source: io::Error,
    ) -> Self {
        Self::Host {
            field: field.into(),
            operation,
            path: path.to_owned(),
            source,
        }
    }
}

impl HasKind for SpecError {
    fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidArgument,
            Self::Unimplemented { .. } => Kind::Unimplemented,
            Self::RroUnsupported { .. } | Self::Precondition { .. } => Kind::FailedPrecondition,
            Self::Host { source, .. } => match source.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidData => Kind::InvalidArgument,
                _ => Kind::FailedPrecondition,
            },
            Self::Seccomp(error) => error.kind(),
        }
    }
}

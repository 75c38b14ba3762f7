//! Why plugins stand in the way.

use std::path::PathBuf;

use crate::base::error::{HasKind, Kind};
use crate::nri::owners::Conflict;
use crate::nri::wire::CallError;

/// Why a request to the plugins failed, or a plugin could not join.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NriError {
    /// A plugin says no.
    #[error("NRI plugin {plugin} refuses {event}")]
    Refused {
        /// Index and name.
        plugin: String,
        /// Name of the event.
        event: &'static str,
        /// What it says.
        #[source]
        source: PluginText,
    },
    /// Two plugins set the same thing.
    #[error("NRI: {0}")]
    Conflict(String),
    /// A plugin asks for what cannot be.
    #[error("NRI plugin {plugin}: {field} {value:?}: {problem}")]
    Invalid {
        /// Index and name.
        plugin: String,
        /// Field of its answer.
        field: String,
        /// Its value.
        value: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// The built-in validator says no.
    #[error("NRI: {0}")]
    Rejected(String),
    /// A plugin could not join.
    #[error("NRI plugin {plugin} could not join: {step}")]
    Join {
        /// Index and name, as far as known.
        plugin: String,
        /// What was tried.
        step: &'static str,
        /// Why not.
        #[source]
        source: PluginText,
    },
    /// A file or socket cannot be used.
    #[error("nri: {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// Words of a plugin, or about its connection.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct PluginText(pub(crate) String);

impl From<CallError> for PluginText {
    fn from(error: CallError) -> Self {
        Self(error.to_string())
    }
}

impl From<Conflict> for NriError {
    fn from(conflict: Conflict) -> Self {
        Self::Conflict(conflict.to_string())
    }
}

impl HasKind for NriError {
    fn kind(&self) -> Kind {
        match self {
            Self::Refused { .. } | Self::Conflict(_) | Self::Rejected(_) | Self::Invalid { .. } => {
                Kind::FailedPrecondition
            }
            Self::Join { .. } => Kind::Unavailable,
            Self::Io { .. } => Kind::Internal,
        }
    }
}

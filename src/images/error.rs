//! Why something with an image failed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::error::{HasKind, Kind};
use crate::store::StoreError;

/// Why something with an image failed. Messages hold no secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ImageError {
    /// The text is no image reference.
    #[error("invalid image reference {text:?}: {reason}")]
    Reference {
        /// As given, cut to a sane length.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nothing here has this name or id.
    #[error("image {reference:?} is not here: pull it first")]
    NotFound {
        /// As asked for.
        reference: String,
    },
    /// More than one image starts with these digits.
    #[error("image id {reference:?} is ambiguous: give more digits")]
    Ambiguous {
        /// As asked for.
        reference: String,
    },
    /// The registry has no such image.
    #[error("{registry} has no {reference:?}")]
    NotInRegistry {
        /// Host asked.
        registry: String,
        /// Image or blob.
        reference: String,
    },
    /// The registry wants other credentials.
    #[error("{registry} denies access to {reference:?}: {reason}")]
    Denied {
        /// Host asked.
        registry: String,
        /// Image or blob.
        reference: String,
        /// Status and what the registry says.
        reason: String,
    },
    /// The registry does not answer, or not with sense.
    #[error("RegistryUnavailable: {registry}: {reason}")]
    RegistryUnavailable {
        /// Host asked.
        registry: String,
        /// What happened.
        reason: String,
    },
    /// The registry leads to where it is not followed.
    #[error("{registry} {reason}")]
    Astray {
        /// Host that does.
        registry: String,
        /// Where it leads, why not there, and the mend.
        reason: String,
    },
    /// The registry asks for patience, and ours is at its end.
    #[error("{registry} limits requests: {reason}")]
    RateLimited {
        /// Host asked.
        registry: String,
        /// Status and what the registry says.
        reason: String,
    },
    /// Configuration of a registry cannot be used.
    #[error("{}: {reason}", path.display())]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Bytes are not what their digest says.
    #[error("{what}: digest is {actual}, expected {expected}")]
    Digest {
        /// Manifest, config, layer and which.
        what: String,
        /// As announced.
        expected: String,
        /// As computed.
        actual: String,
    },
    /// A document of the image makes no sense.
    #[error("{what}: {reason}")]
    Manifest {
        /// Which document.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A document of a kind that is not supported.
    #[error("{what}: {reason}")]
    Unsupported {
        /// Which document.
        what: String,
        /// Why not, and what to do.
        reason: &'static str,
    },
    /// None of the images of an index runs here.
    #[error("{reference:?} has no image for {wanted}, only for {offered}")]
    NoPlatform {
        /// Image.
        reference: String,
        /// This machine.
        wanted: String,
        /// What the index offers.
        offered: String,
    },
    /// A layer or an archive is malformed.
    #[error("{what}: {reason}")]
    Archive {
        /// Which layer or archive, and where in it.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A limit that protects this machine is exceeded.
    #[error("{what} exceeds the limit of {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit with its unit.
        limit: String,
    },
    /// The machine failed.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A record cannot be read or written.
    #[error("the image store failed")]
    Store(#[from] StoreError),
    /// Work shared with another request failed.
    #[error("{0}")]
    Shared(Arc<ImageError>),
    /// The daemon is going down.
    #[error("the daemon is shutting down")]
    Shutdown,
}

impl ImageError {
    /// An I/O error with what was tried on what.
    pub(crate) fn io(
        operation: &'static str,
        path: impl AsRef<Path>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Io {
            operation,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }

    /// A malformed layer or archive.
    pub(crate) fn archive(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Archive {
            what: what.into(),
            reason: reason.into(),
        }
    }

    /// A malformed document.
    pub(crate) fn manifest(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Manifest {
            what: what.into(),
            reason: reason.into(),
        }
    }
}

impl HasKind for ImageError {
    fn kind(&self) -> Kind {
        match self {
            Self::Reference { .. }
            | Self::Ambiguous { .. }
            | Self::Manifest { .. }
            | Self::Archive { .. }
            | Self::TooLarge { .. } => Kind::InvalidArgument,
            Self::NotFound { .. } | Self::NotInRegistry { .. } | Self::NoPlatform { .. } => {
                Kind::NotFound
            }
            Self::Denied { .. } => Kind::PermissionDenied,
            Self::RegistryUnavailable { .. } | Self::RateLimited { .. } | Self::Shutdown => {
                Kind::Unavailable
            }
            Self::Digest { .. } | Self::HostsFile { .. } | Self::Astray { .. } => {
                Kind::FailedPrecondition
            }
            Self::Unsupported { .. } => Kind::Unimplemented,
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::FileTooLarge => Kind::ResourceExhausted,
                _ => Kind::Internal,
            },
            Self::Store(error) => error.kind(),
            Self::Shared(inner) => inner.kind(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_exhaustion() {
        let full = io::Error::from(rustix::io::Errno::NOSPC);
        let error = ImageError::io("write", "/x", full);
        assert_eq!(error.kind(), Kind::ResourceExhausted);
        assert_eq!(
            ImageError::Shared(Arc::new(error)).kind(),
            Kind::ResourceExhausted
        );
    }

    #[test]
    fn kubelet_finds_its_prefix() {
        let error = ImageError::RegistryUnavailable {
            registry: "r".into(),
            reason: "refused".into(),
        };
        assert!(error.to_string().starts_with("RegistryUnavailable: "));
    }
}

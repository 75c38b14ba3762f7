//! Images as plain values. CRI: `ImageSpec`, `Image`; OCI: image-spec `config.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// CRI: `ImageSpec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageSpec {
    /// Reference, id, or unambiguous short id.
    pub(crate) image: String,
    /// Echoed.
    pub(crate) annotations: BTreeMap<String, String>,
    /// What the user wrote; echoed.
    pub(crate) user_specified_image: String,
    /// Handler the image is for; echoed.
    pub(crate) runtime_handler: String,
    /// Digest of an image volume, in statuses.
    pub(crate) image_ref: String,
}

/// CRI: `AuthConfig`. Never printed.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Credentials {
    /// User name; empty: none.
    pub(crate) username: String,
    /// Password.
    pub(crate) password: String,
    /// base64 of `username:password`, used when both above are empty.
    pub(crate) auth: String,
    /// Registry the credentials are for; empty: any.
    pub(crate) server_address: String,
    /// OAuth2 refresh token.
    pub(crate) identity_token: String,
    /// Bearer token sent as it is.
    pub(crate) registry_token: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(hidden)")
    }
}

/// What the runtime uses of an image's config; everything else there is opaque.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageConfig {
    /// `User` as written: `uid`, `name`, each with an optional `:group`.
    pub(crate) user: String,
    /// `NAME=value`.
    pub(crate) env: Vec<String>,
    /// Entrypoint.
    pub(crate) entrypoint: Vec<String>,
    /// Cmd.
    pub(crate) cmd: Vec<String>,
    /// WorkingDir; empty: `/`.
    pub(crate) working_dir: String,
    /// Paths declared as volumes.
    pub(crate) volumes: Vec<String>,
    /// StopSignal as written; empty: none.
    pub(crate) stop_signal: String,
}

/// An image as lists show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    /// `sha256:` of the config; of the manifest for an artifact.
    pub(crate) id: String,
    /// No image but an OCI artifact: it can be mounted, nothing can run from it.
    #[serde(default)]
    pub(crate) artifact: bool,
    /// `name:tag`, sorted.
    pub(crate) repo_tags: Vec<String>,
    /// `name@sha256:...`, sorted.
    pub(crate) repo_digests: Vec<String>,
    /// Bytes: compressed layers and config; stable.
    pub(crate) size: u64,
    /// What the runtime uses of the config.
    pub(crate) config: ImageConfig,
    /// Annotations and the like given at the pull; echoed.
    pub(crate) spec: ImageSpec,
    /// Never to be collected.
    pub(crate) pinned: bool,
    /// Diff ids, lowest layer first.
    pub(crate) layers: Vec<String>,
}

/// What a container's root filesystem is made of; held until the container is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootfsLayers {
    /// Layer directories, **topmost first** (the order of overlayfs `lowerdir`).
    pub(crate) lower: Vec<PathBuf>,
}

/// One filesystem that holds images or containers. CRI: `FilesystemUsage`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FilesystemUsage {
    /// Existing directory on the device.
    pub(crate) mountpoint: String,
    /// Bytes used by us.
    pub(crate) used_bytes: u64,
    /// Inodes used by us.
    pub(crate) inodes_used: u64,
}

/// A step of a pull or an import, for progress bars.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The manifest is known: (layer digest, compressed bytes) of each layer.
    Layers(Vec<(String, u64)>),
    /// So many bytes of a layer are here; `done` once it is unpacked.
    Layer {
        /// Digest of the layer.
        digest: String,
        /// Bytes so far.
        bytes: u64,
        /// Unpacked, or present before.
        done: bool,
    },
}

//! Images: names, registries, archives, unpacked layers, and who uses them.
//!
//! ```text
//! reference ─┐
//! hosts ─────┼─ registry ─┐
//! auth ──────┘            ├─ obtain ── unpack ── tar ── apply ──> ROOT/layers/<n>
//! archive ── import ──────┘      │
//! manifest, platform ────────────┤
//!                                └─ layers (leases, mend) ── catalog ──> ROOT/images/
//! ```
//!
//! Lists and look-ups answer from memory. A pull or an import is a task of its own that finishes or
//! undoes itself, whoever waits for it. No compressed blob is kept: what comes from the network or an
//! archive goes straight to files, both digests checked on the way.
//!
//! Not here: mounting (the runtime's), deciding when to collect an image (kubelet's).

mod apply;
mod apply_meta;
mod archive;
mod artifact;
mod catalog;
mod digest;
mod error;
mod import;
mod layers;
mod manifest;
mod mend;
mod obtain;
mod platform;
mod progress;
mod pull;
mod reference;
mod registry;
mod tar;
mod tar_fields;
mod tree;
mod unpack;

pub(crate) use error::ImageError;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::base::id::ContainerId;
use crate::base::image::{FilesystemUsage, Image, RootfsLayers};
use crate::base::tasks::Tasks;
use crate::images::catalog::Catalog;
use crate::images::layers::Layers;
use crate::images::obtain::Underway;
use crate::images::platform::Wanted;
use crate::images::pull::Flights;
use crate::images::registry::auth::Tokens;
use crate::store::{self, CLOSED};

/// How images are got and kept.
#[derive(Clone, Debug)]
pub(crate) struct ImagesConfig {
    /// Directory that holds `images/` and `layers/`.
    pub(crate) root: PathBuf,
    /// `certs.d` directories; the first that knows a registry counts.
    pub(crate) registry_config_paths: Vec<PathBuf>,
    /// Layers got at the same time, over all pulls and imports.
    pub(crate) concurrent_downloads: usize,
    /// A pull that gets nothing for so long tries the next mirror, then fails.
    pub(crate) pull_progress_timeout: Duration,
    /// Follow a redirect of a blob from https to http, without credentials.
    pub(crate) http_blobs: bool,
    /// Names that the kubelet must not collect.
    pub(crate) pinned: Vec<String>,
}

impl Default for ImagesConfig {
    fn default() -> Self {
        Self {
            root: "/var/lib/berth".into(),
            registry_config_paths: vec![
                "/etc/berth/certs.d".into(),
                "/etc/containerd/certs.d".into(),
            ],
            concurrent_downloads: 3,
            pull_progress_timeout: Duration::from_secs(60),
            http_blobs: true,
            pinned: vec![],
        }
    }
}

#[derive(Debug)]
struct Inner {
    config: ImagesConfig,
    tasks: Tasks,
    wanted: Wanted,
    layers: Layers,
    catalog: Catalog,
    underway: Underway,
    flights: Flights,
    tokens: Tokens,
    downloads: tokio::sync::Semaphore,
    settling: Arc<tokio::sync::Semaphore>,
}

/// The images of this node. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ImageStore(Arc<Inner>);

impl ImageStore {
    /// Opens the store: reads its records, removes what a crash left half-way.
    ///
    /// Layers of images that are gone stay until [`Self::collect`], so that containers can say first
    /// what they hold ([`Self::adopt_hold`]). Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`].
    pub(crate) fn open(config: ImagesConfig, tasks: Tasks) -> Result<Self, ImageError> {
        let root = &config.root;
        store::directory(root, CLOSED)?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map_err(|error| ImageError::io("read", "/proc/sys/kernel/random/boot_id", error))?;
        let layers = Layers::open(root, boot.trim())?;
        let catalog = Catalog::open(root, boot.trim(), layers.clone(), config.pinned.clone())?;
        Ok(Self(Arc::new(Inner {
            wanted: Wanted::here(),
            layers,
            catalog,
            underway: Underway::default(),
            flights: Flights::default(),
            tokens: Tokens::default(),
            downloads: tokio::sync::Semaphore::new(config.concurrent_downloads.max(1)),
            settling: Arc::new(tokio::sync::Semaphore::new(1)),
            config,
            tasks,
        })))
    }

    fn tasks(&self) -> &Tasks {
        &self.0.tasks
    }

    fn layers(&self) -> &Layers {
        &self.0.layers
    }

    fn catalog(&self) -> &Catalog {
        &self.0.catalog
    }

    fn wanted(&self) -> &Wanted {
        &self.0.wanted
    }

    fn underway(&self) -> &Underway {
        &self.0.underway
    }

    fn downloads(&self) -> &tokio::sync::Semaphore {
        &self.0.downloads
    }

    fn flights(&self) -> &Flights {
        &self.0.flights
    }

    fn tokens(&self) -> &Tokens {
        &self.0.tokens
    }

    fn patience(&self) -> Duration {
        self.0.config.pull_progress_timeout
    }

    fn registry_directories(&self) -> &[PathBuf] {
        &self.0.config.registry_config_paths
    }

    fn root(&self) -> &Path {
        &self.0.config.root
    }

    /// All images, by id. From memory.
    pub(crate) fn list(&self) -> Vec<Arc<Image>> {
        self.catalog().list()
    }

    /// The image that `reference` means: id with or without `sha256:`, unambiguous first digits of one,
    /// name with tag or digest (`latest` and `docker.io/library` are implied). From memory.
    pub(crate) fn find(&self, reference: &str) -> Option<Arc<Image>> {
        self.catalog().find(reference).ok()
    }

    /// Removes the image that `reference` means, with **all** its names; it is in no list any more when
    /// this returns. Layers that containers hold stay until they let go. What is not here is fine.
    ///
    /// Goes on when the caller does not wait.
    ///
    /// # Errors
    ///
    /// [`ImageError::Ambiguous`], [`ImageError::Store`], [`ImageError::Io`].
    pub(crate) async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let id = match self.catalog().find(reference) {
            Ok(image) => image.id.clone(),
            Err(ImageError::NotFound { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let store = self.clone();
        self.blocking(move || {
            store.catalog().forget(&id)?;
            store.layers().collect(&|| store.tasks().is_ending())
        })
        .await
    }

    /// Blocking work that goes on when the caller does not wait, and that shutdown waits for.
    async fn blocking(
        &self,
        work: impl FnOnce() -> Result<(), ImageError> + Send + 'static,
    ) -> Result<(), ImageError> {
        let done = self.tasks().spawn(async move {
            Tasks::blocking(work)
                .await
                .map_err(|_panic| ImageError::Shutdown)?
        });
        done.await.map_err(|_gone| ImageError::Shutdown)?
    }

    /// Holds the layers of an image for a container: they stay until [`Self::release`], whatever becomes
    /// of the image. From memory.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], [`ImageError::Ambiguous`].
    pub(crate) fn hold(
        &self,
        image_id: &str,
        holder: ContainerId,
    ) -> Result<RootfsLayers, ImageError> {
        self.catalog().hold(image_id, holder)
    }

    /// Lets go of what the container held. Layers that nobody needs any more are removed in the
    /// background.
    pub(crate) fn release(&self, holder: &ContainerId) {
        if !self.catalog().release(holder) || !self.layers().has_unused() {
            return;
        }
        self.collect_later();
    }

    /// As [`Self::collect`], in the background.
    pub(crate) fn collect_later(&self) {
        let store = self.clone();
        let _detached = self.tasks().spawn(async move {
            if let Err(error) = store.collect().await {
                tracing::warn!(error = %crate::base::error::chain(&error), "layers not removed");
            }
        });
    }

    /// Layers that cannot be removed. From memory.
    pub(crate) fn set_aside(&self) -> Vec<crate::store::Aside> {
        self.layers().set_aside()
    }

    /// Holds again, after a restart, what a container held before it. Call this for every container
    /// before [`Self::collect`].
    pub(crate) fn adopt_hold(&self, holder: ContainerId, layers: &RootfsLayers) {
        let gone = self.catalog().adopt(holder, layers);
        if gone > 0 {
            tracing::warn!(container.id = %holder, gone, "layers of a container are gone");
        }
    }

    /// Removes layers that neither an image nor a container needs.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`]: the first failure; the rest was tried all the same.
    pub(crate) async fn collect(&self) -> Result<(), ImageError> {
        let store = self.clone();
        self.blocking(move || store.layers().collect(&|| store.tasks().is_ending()))
            .await
    }

    /// The last step of a pull or import: on failure layers that nobody needs are removed; what was
    /// recorded is put on disk for good, in the background.
    async fn tidy(&self, failed: bool) {
        if failed
            && self.layers().has_unused()
            && let Err(error) = self.collect().await
        {
            tracing::warn!(error = %crate::base::error::chain(&error), "layers not removed");
        }
        self.settle_later();
    }

    /// What images take on their filesystem, as du(1) counts, ±5 %. From memory.
    pub(crate) fn fs_usage(&self) -> FilesystemUsage {
        let (layer_bytes, layer_inodes) = self.layers().usage();
        let (bytes, inodes) = self.catalog().usage();
        FilesystemUsage {
            mountpoint: self.root().join("layers").to_string_lossy().into_owned(),
            used_bytes: layer_bytes + bytes,
            inodes_used: layer_inodes + inodes,
        }
    }

    /// Makes what was recorded for this boot good for all, in the background; one at a time.
    fn settle_later(&self) {
        let store = self.clone();
        let _detached = self.tasks().spawn(async move {
            let Ok(_turn) = store.0.settling.clone().acquire_owned().await else {
                return;
            };
            let catalog = store.catalog().clone();
            let settled = Tasks::blocking(move || catalog.settle()).await;
            if let Ok(Err(error)) = settled {
                tracing::warn!(
                    error = %crate::base::error::chain(&error),
                    "images are not on disk for good: a power cut would lose them"
                );
            }
        });
    }
}

#[cfg(test)]
mod apply_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod liar;
#[cfg(test)]
mod pull_tests;
#[cfg(test)]
mod tests;

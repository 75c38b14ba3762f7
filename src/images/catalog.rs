//! Which images are here, under which names, and who holds their layers. Answers from memory.
//!
//! ```text
//! ROOT/images/image/<64 hex>.json     one record an image
//! ROOT/images/blob/<64 hex>           manifest, index and config as they came
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::base::clock::Timestamp;
use crate::base::id::ContainerId;
use crate::base::image::{Image, ImageConfig, ImageSpec, RootfsLayers};
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::layers::{Layers, Lease};
use crate::images::reference::Reference;
use crate::store::{self, CLOSED, Durability, Records, write_atomic};

const FORMAT: u32 = 1;
/// Fewer digits are no id.
const MIN_SHORT_ID: usize = 3;

/// An image about to be recorded.
#[derive(Debug)]
pub(crate) struct NewImage {
    /// Digest of the config; of the manifest for an artifact.
    pub(crate) id: Digest,
    /// No image: its blobs are files.
    pub(crate) artifact: bool,
    /// `name:tag` it gets.
    pub(crate) tags: Vec<String>,
    /// `name@digest` it gets.
    pub(crate) digests: Vec<String>,
    /// Compressed layers and config, bytes.
    pub(crate) size: u64,
    /// What the runtime uses of the config.
    pub(crate) config: ImageConfig,
    /// As given at the pull.
    pub(crate) spec: ImageSpec,
    /// Diff ids, bottom first.
    pub(crate) diff_ids: Vec<Digest>,
    /// Layers that fit this chain, bottom first.
    pub(crate) layers: Vec<Lease>,
    /// Documents to keep: manifest, index, config.
    pub(crate) blobs: Vec<(Digest, Vec<u8>)>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct ImageRecord {
    tags: BTreeSet<String>,
    digests: BTreeSet<String>,
    size: u64,
    config: ImageConfig,
    #[serde(default)]
    artifact: bool,
    spec: ImageSpec,
    diff_ids: Vec<Digest>,
    layers: Vec<u64>,
    blobs: BTreeSet<Digest>,
    /// Of two images that claim a name the younger has it.
    at: Timestamp,
    /// The boot it is good for; absent: it is on disk for good.
    boot: Option<String>,
}

#[derive(Clone, Debug)]
struct Entry {
    image: Arc<Image>,
    record: ImageRecord,
    layers: Vec<Lease>,
}

#[derive(Debug, Default)]
struct State {
    /// By id (`sha256:…`).
    images: BTreeMap<String, Entry>,
    /// Tags and digests, to the id.
    names: HashMap<String, String>,
    /// What containers hold, bottom first or as adopted.
    holds: HashMap<ContainerId, Vec<Lease>>,
}

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    boot: String,
    pinned: Vec<String>,
    records: Records<ImageRecord>,
    layers: Layers,
    state: RwLock<State>,
    /// Held while records change; `state` is locked only for a moment inside.
    changing: Mutex<()>,
}

/// The images that are here. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Catalog(Arc<Inner>);

impl Catalog {
    /// Reads the records under `root`. Images whose layers are not there are forgotten. `pinned` are
    /// names that are never collected.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Store`], [`ImageError::Io`].
    pub(crate) fn open(
        root: &Path,
        boot: &str,
        layers: Layers,
        pinned: Vec<String>,
    ) -> Result<Self, ImageError> {
        let blobs = root.join("images/blob");
        store::directory(&blobs, CLOSED)?;
        let records = Records::open(root.join("images/image"), FORMAT)?;
        let loaded = records.load_all()?;
        for (path, why) in &loaded.corrupt {
            tracing::warn!(path = %path.display(), error = %why, "image record set aside");
        }
        let catalog = Self(Arc::new(Inner {
            blobs,
            boot: boot.to_owned(),
            pinned: pinned.iter().map(|name| normal(name)).collect(),
            records,
            layers,
            state: RwLock::default(),
            changing: Mutex::new(()),
        }));
        let mut found: Vec<(String, ImageRecord)> = loaded.records;
        found.sort_by_key(|(_, record)| record.at);
        for (key, record) in found {
            let leases: Option<Vec<_>> = record
                .layers
                .iter()
                .map(|number| catalog.0.layers.lease(*number))
                .collect();
            let void = record.boot.as_deref().is_some_and(|made| made != boot);
            match leases {
                Some(leases) if !void => catalog.show(&format!("sha256:{key}"), record, leases),
                _ => catalog.0.records.remove(&key)?,
            }
        }
        catalog.sweep_blobs()?;
        Ok(catalog)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.0.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.0.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.0
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a record visible. Names that others had go to it.
    fn show(&self, id: &str, record: ImageRecord, layers: Vec<Lease>) {
        let pinned = |name: &String| self.0.pinned.contains(name);
        let image = Arc::new(Image {
            id: id.to_owned(),
            repo_tags: record.tags.iter().cloned().collect(),
            repo_digests: record.digests.iter().cloned().collect(),
            size: record.size,
            config: record.config.clone(),
            artifact: record.artifact,
            spec: record.spec.clone(),
            pinned: record.tags.iter().chain(&record.digests).any(pinned),
            layers: record.diff_ids.iter().map(Digest::to_string).collect(),
        });
        let mut state = self.write();
        for name in record.tags.iter().chain(&record.digests) {
            state.names.insert(name.clone(), id.to_owned());
        }
        state.images.insert(
            id.to_owned(),
            Entry {
                image,
                record,
                layers,
            },
        );
    }

    /// All images, by id.
    pub(crate) fn list(&self) -> Vec<Arc<Image>> {
        let state = self.read();
        state
            .images
            .values()
            .map(|entry| entry.image.clone())
            .collect()
    }

    /// The image that `reference` means: an id with or without `sha256:`, a name, or the first digits
    /// of an id.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`], [`ImageError::Ambiguous`].
    pub(crate) fn find(&self, reference: &str) -> Result<Arc<Image>, ImageError> {
        let state = self.read();
        let missing = || ImageError::NotFound {
            reference: reference.chars().take(512).collect(),
        };
        let digits = reference.strip_prefix("sha256:").unwrap_or(reference);
        let full = format!("sha256:{digits}");
        if let Some(entry) = state.images.get(&full) {
            return Ok(entry.image.clone());
        }
        if let Ok(name) = Reference::parse(reference)
            && let Some(id) = state.names.get(&name.to_string())
            && let Some(entry) = state.images.get(id)
        {
            return Ok(entry.image.clone());
        }
        if digits.len() < MIN_SHORT_ID || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let mut hits = state
            .images
            .range(full.clone()..)
            .take_while(|(id, _)| id.starts_with(&full));
        match (hits.next(), hits.next()) {
            (Some((_, entry)), None) => Ok(entry.image.clone()),
            (Some(_), Some(_)) => Err(ImageError::Ambiguous {
                reference: reference.to_owned(),
            }),
            _ => Err(missing()),
        }
    }

    /// Records an image for this boot and shows it; one with the same id gets the new names too.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Store`]; nothing is shown then.
    pub(crate) fn add(&self, new: NewImage) -> Result<Arc<Image>, ImageError> {
        let _alone = self.change();
        for (digest, bytes) in &new.blobs {
            let path = self.0.blobs.join(digest.hex());
            if !path.exists() {
                write_atomic(&path, bytes, 0o600, Durability::Process)?;
            }
        }
        let id = new.id.to_string();
        let known = self.read().images.get(&id).cloned();
        let (mut record, layers) = match known {
            Some(known) => (known.record, known.layers),
            None => (
                ImageRecord {
                    tags: BTreeSet::new(),
                    digests: BTreeSet::new(),
                    size: new.size,
                    config: new.config,
                    artifact: new.artifact,
                    spec: ImageSpec::default(),
                    diff_ids: new.diff_ids,
                    layers: new.layers.iter().map(Lease::number).collect(),
                    blobs: BTreeSet::new(),
                    at: Timestamp::default(),
                    boot: None,
                },
                new.layers,
            ),
        };
        record.tags.extend(new.tags);
        record.digests.extend(new.digests);
        record
            .blobs
            .extend(new.blobs.iter().map(|(digest, _)| *digest));
        record.spec = new.spec;
        record.at = Timestamp::now();
        record.boot = Some(self.0.boot.clone());
        let names: Vec<_> = record.tags.iter().chain(&record.digests).cloned().collect();
        self.0
            .records
            .put(&new.id.hex(), &record, Durability::Process)?;
        self.show(&id, record, layers);
        self.take_names(&id, &names)?;
        self.find(&id)
    }

    /// Takes the names from every other image.
    fn take_names(&self, id: &str, names: &[String]) -> Result<(), ImageError> {
        let others: Vec<(String, Entry)> = {
            let state = self.read();
            let has = |entry: &Entry| {
                names
                    .iter()
                    .any(|n| entry.record.tags.contains(n) || entry.record.digests.contains(n))
            };
            let others = state
                .images
                .iter()
                .filter(|(other, entry)| *other != id && has(entry));
            others
                .map(|(other, entry)| (other.clone(), entry.clone()))
                .collect()
        };
        for (other, mut entry) in others {
            entry.record.tags.retain(|name| !names.contains(name));
            entry.record.digests.retain(|name| !names.contains(name));
            self.0
                .records
                .put(hex_of(&other), &entry.record, Durability::Process)?;
            self.show(&other, entry.record, entry.layers);
        }
        Ok(())
    }

    /// Forgets the image with this id, with all its names. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Store`]; the image is still there then.
    pub(crate) fn forget(&self, id: &str) -> Result<(), ImageError> {
        let _alone = self.change();
        self.0.records.remove(hex_of(id))?;
        let entry = {
            let mut state = self.write();
            state.names.retain(|_, of| of != id);
            state.images.remove(id)
        };
        drop(entry);
        self.sweep_blobs()
    }

    /// Removes documents that no image needs.
    fn sweep_blobs(&self) -> Result<(), ImageError> {
        let needed: BTreeSet<String> = {
            let state = self.read();
            let records = state.images.values().flat_map(|entry| &entry.record.blobs);
            records.map(Digest::hex).collect()
        };
        let unreadable = |error| ImageError::io("read", &self.0.blobs, error);
        for entry in std::fs::read_dir(&self.0.blobs).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !needed.contains(&*name) {
                std::fs::remove_file(&path)
                    .map_err(|error| ImageError::io("remove", &path, error))?;
            }
        }
        Ok(())
    }

    /// A document of an image: manifest, index or config.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub(crate) fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let path = self.0.blobs.join(digest.hex());
        std::fs::read(&path).map_err(|error| ImageError::io("read", &path, error))
    }

    /// Records as on disk for good what was recorded for this boot; the second half of [`Self::add`].
    ///
    /// Blocks until all of it is on disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`]: the images are good for this boot only.
    pub(crate) fn settle(&self) -> Result<(), ImageError> {
        let pending: Vec<(String, Vec<u64>)> = {
            let state = self.read();
            let pending = state
                .images
                .iter()
                .filter(|(_, entry)| entry.record.boot.is_some());
            pending
                .map(|(id, entry)| (id.clone(), entry.record.layers.clone()))
                .collect()
        };
        if pending.is_empty() {
            return Ok(());
        }
        self.0.layers.sync()?;
        for (id, layers) in pending {
            self.0.layers.settle(&layers)?;
            let _alone = self.change();
            let Some(mut record) = self
                .read()
                .images
                .get(&id)
                .map(|entry| entry.record.clone())
            else {
                continue;
            };
            // A document that `add` wrote after the sync is small, and found missing by its digest.
            record.boot = None;
            self.0
                .records
                .put(hex_of(&id), &record, Durability::Process)?;
            if let Some(entry) = self.write().images.get_mut(&id) {
                entry.record.boot = None;
            }
        }
        self.0.layers.sync()
    }

    /// Holds the layers of an image for a container, whatever becomes of the image.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotFound`].
    pub(crate) fn hold(
        &self,
        image: &str,
        holder: ContainerId,
    ) -> Result<RootfsLayers, ImageError> {
        let id = self.find(image)?.id.clone();
        let mut state = self.write();
        let entry = state.images.get(&id).ok_or_else(|| ImageError::NotFound {
            reference: image.to_owned(),
        })?;
        let leases = entry.layers.clone();
        let lower = self.0.layers.lower(&leases);
        state.holds.entry(holder).or_default().extend(leases);
        Ok(RootfsLayers { lower })
    }

    /// Holds again, after a restart, layers that a container held before, beside what it holds already. How many of them are
    /// gone.
    pub(crate) fn adopt(&self, holder: ContainerId, layers: &RootfsLayers) -> usize {
        let numbers = layers
            .lower
            .iter()
            .filter_map(|path| self.0.layers.number_of(path));
        let numbers: Vec<_> = numbers.filter(|number| *number != 0).collect();
        let leases: Vec<_> = numbers
            .iter()
            .filter_map(|number| self.0.layers.lease(*number))
            .collect();
        let gone = numbers.len() - leases.len();
        let mut state = self.write();
        state.holds.entry(holder).or_default().extend(leases);
        gone
    }

    /// Lets go of everything `holder` held.
    pub(crate) fn release(&self, holder: &ContainerId) -> bool {
        let held = self.write().holds.remove(holder);
        held.is_some()
    }

    /// Bytes and inodes of the records and documents. From memory, an estimate of a block each.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let state = self.read();
        let files = state
            .images
            .values()
            .map(|entry| 1 + entry.record.blobs.len() as u64)
            .sum::<u64>();
        (files * 4096, files)
    }
}

fn hex_of(id: &str) -> &str {
    id.strip_prefix("sha256:").unwrap_or(id)
}

/// A name as records have it; what is no reference stays as it is.
fn normal(name: &str) -> String {
    Reference::parse(name).map_or_else(|_error| name.to_owned(), |reference| reference.to_string())
}

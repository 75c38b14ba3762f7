//! The layer store: unpacked layers, shared by diff id.
//!
//! ```text
//! ROOT/layers/0/              always empty: the root of images without layers
//! ROOT/layers/<number>/       a layer as overlayfs takes it; short names, since mount options are short
//! ROOT/layers/new-<number>/   being unpacked; left by a crash, set aside at the next start
//! ROOT/layers/del-<number>/   to be removed, by `collect`
//! ROOT/images/layer/<number>.json
//! ```
//!
//! A layer lives as long as somebody holds a [`Lease`] on it: an image, a container, a pull under way.
//!
//! **Durability.** A layer is recorded in two steps, so that a pull need not wait for the disk: first for
//! this boot only (a crash of the daemon loses nothing: the page cache stays), then, once syncfs(2) has
//! returned, for good. After a power cut what is recorded for another boot is thrown away.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::images::apply::{Applied, open_root};
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::mend::{self, Look, Looks};
use crate::images::tree;
use crate::store::{self, Aside, CLOSED, Durability, Records, Trash};

const FORMAT: u32 = 1;
/// What names of directories begin with that are to be removed.
const TRASH: &str = "del-";

/// What is recorded of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct LayerRecord {
    diff_id: Digest,
    bytes: u64,
    inodes: u64,
    /// Directories that no entry of its tar described.
    implied: Vec<Vec<u8>>,
    /// Those of them that were made to look as a chain needs.
    looks: Vec<(Vec<u8>, Look)>,
    /// Hides everything below.
    opaque_root: bool,
    /// The boot it is good for; absent: it is on disk for good.
    boot: Option<String>,
}

#[derive(Debug)]
struct Layer {
    record: LayerRecord,
    uses: usize,
}

#[derive(Debug, Default)]
struct State {
    layers: BTreeMap<u64, Layer>,
    next: u64,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    boot: String,
    records: Records<LayerRecord>,
    state: Mutex<State>,
    /// Held while layers are made to fit a chain.
    fitting: Mutex<()>,
    /// Directories that are to be removed.
    trash: Trash,
}

/// The layer store. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Layers(Arc<Inner>);

/// Keeps one layer from being collected.
pub(crate) struct Lease {
    layers: Layers,
    number: u64,
}

/// A directory to unpack into; removed when it is dropped before it was admitted.
#[derive(Debug)]
pub(crate) struct NewLayer {
    number: u64,
    path: PathBuf,
    admitted: bool,
}

impl Layers {
    /// Opens the store under `root`, in the boot named `boot`; removes what crashes left.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`].
    pub(crate) fn open(root: &Path, boot: &str) -> Result<Self, ImageError> {
        let directory = root.join("layers");
        for closed in [&directory, &root.join("images")] {
            store::directory(closed, CLOSED)?;
        }
        // A layer's own mode is what a container or a volume has as its top's.
        store::directory(&directory.join("0"), 0o755)?;
        let records: Records<LayerRecord> = Records::open(root.join("images/layer"), FORMAT)?;
        let mut state = State {
            layers: BTreeMap::new(),
            next: 1,
        };
        let loaded = records.load_all()?;
        for (path, why) in &loaded.corrupt {
            tracing::warn!(path = %path.display(), error = %why, "layer record set aside");
        }
        for (key, record) in loaded.records {
            let void = record.boot.as_deref().is_some_and(|made| made != boot);
            match key.parse::<u64>() {
                Ok(number) if !void && directory.join(&key).is_dir() => {
                    state.layers.insert(number, Layer { record, uses: 0 });
                }
                _ => records.remove(&key)?,
            }
        }
        let unreadable = |error| ImageError::io("read", &directory, error);
        for entry in fs::read_dir(&directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let number = name
                .trim_start_matches(|c: char| !c.is_ascii_digit())
                .parse()
                .unwrap_or(0);
            state.next = state.next.max(number + 1);
            if name == "0" || state.layers.keys().any(|known| known.to_string() == name) {
                continue;
            }
            // Removing takes as long as the disk pleases: `collect` does it, nobody waits for it here.
            let aside = directory.join(format!("{TRASH}{number}"));
            if path != aside
                && let Err(error) = fs::rename(&path, &aside)
            {
                tracing::warn!(path = %path.display(), %error, "what is no layer stays among them");
            }
        }
        let trash = Trash::new(directory.clone(), TRASH);
        Ok(Self(Arc::new(Inner {
            directory,
            boot: boot.to_owned(),
            records,
            state: Mutex::new(state),
            fitting: Mutex::new(()),
            trash,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path_of(&self, number: u64) -> PathBuf {
        self.0.directory.join(number.to_string())
    }

    /// A fresh directory to unpack a layer into.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub(crate) fn begin(&self) -> Result<NewLayer, ImageError> {
        let number = {
            let mut state = self.state();
            state.next += 1;
            state.next - 1
        };
        let path = self.0.directory.join(format!("new-{number}"));
        fs::create_dir(&path).map_err(|error| ImageError::io("create", &path, error))?;
        let new = NewLayer {
            number,
            path,
            admitted: false,
        };
        let root = open_root(&new.path)?;
        rustix::fs::fchmod(&root, rustix::fs::Mode::from_raw_mode(0o755))
            .map_err(|errno| ImageError::io("chmod", &new.path, errno))?;
        Ok(new)
    }

    /// Takes an unpacked layer in, under its diff id, for this boot.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`].
    pub(crate) fn admit(
        &self,
        mut new: NewLayer,
        diff_id: Digest,
        applied: Applied,
    ) -> Result<Lease, ImageError> {
        self.admit_looking(&mut new, diff_id, applied, vec![])
    }

    fn admit_looking(
        &self,
        new: &mut NewLayer,
        diff_id: Digest,
        applied: Applied,
        looks: Vec<(Vec<u8>, Look)>,
    ) -> Result<Lease, ImageError> {
        let place = self.path_of(new.number);
        fs::rename(&new.path, &place)
            .map_err(|error| ImageError::io("rename", &new.path, error))?;
        new.path.clone_from(&place);
        let record = LayerRecord {
            diff_id,
            bytes: applied.bytes,
            inodes: applied.inodes,
            implied: applied.implied.into_iter().collect(),
            looks,
            opaque_root: applied.opaque_root,
            boot: Some(self.0.boot.clone()),
        };
        let key = new.number.to_string();
        self.0.records.put(&key, &record, Durability::Process)?;
        new.admitted = true;
        self.state()
            .layers
            .insert(new.number, Layer { record, uses: 1 });
        Ok(Lease {
            layers: self.clone(),
            number: new.number,
        })
    }

    /// A layer with this diff id that can be made to fit any chain, if there is one.
    pub(crate) fn find(&self, diff_id: &Digest) -> Option<Lease> {
        let mut state = self.state();
        let (number, layer) = state
            .layers
            .iter_mut()
            .find(|(_, layer)| layer.record.diff_id == *diff_id && !moves(&layer.record.looks))?;
        layer.uses += 1;
        Some(Lease {
            layers: self.clone(),
            number: *number,
        })
    }

    /// The layer of this number, if it is there.
    pub(crate) fn lease(&self, number: u64) -> Option<Lease> {
        let mut state = self.state();
        state.layers.get_mut(&number)?.uses += 1;
        Some(Lease {
            layers: self.clone(),
            number,
        })
    }

    /// The directories of a chain (bottom first) as overlayfs takes them: topmost first, none twice,
    /// none that nobody can see, at least one.
    pub(crate) fn lower(&self, chain: &[Lease]) -> Vec<PathBuf> {
        let state = self.state();
        let mut numbers = vec![];
        for lease in chain.iter().rev() {
            if !numbers.contains(&lease.number) {
                numbers.push(lease.number);
            }
            let opaque = |layer: &Layer| layer.record.opaque_root;
            if state.layers.get(&lease.number).is_some_and(opaque) {
                break;
            }
        }
        if numbers.is_empty() {
            numbers.push(0);
        }
        numbers
            .into_iter()
            .map(|number| self.path_of(number))
            .collect()
    }

    /// The layer whose directory this is.
    pub(crate) fn number_of(&self, path: &Path) -> Option<u64> {
        path.strip_prefix(&self.0.directory)
            .ok()
            .and_then(Path::to_str)
            .or_else(|| path.file_name()?.to_str())?
            .parse()
            .ok()
    }

    /// Bytes and inodes of all layers. From memory.
    pub(crate) fn usage(&self) -> (u64, u64) {
        let state = self.state();
        let records = state.layers.values().map(|layer| &layer.record);
        // Beside each layer its record, one block and one inode.
        records.fold((0, 0), |(bytes, inodes), record| {
            (bytes + record.bytes + 4096, inodes + record.inodes + 1)
        })
    }

    /// Exchanges layers of the chain (bottom first) whose implied directories must look otherwise on it.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`].
    pub(crate) fn fit(&self, chain: Vec<Lease>) -> Result<Vec<Lease>, ImageError> {
        let _alone = self
            .0
            .fitting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut fitted: Vec<Lease> = vec![];
        // Roots of what is fitted, topmost first.
        let mut below: Vec<OwnedFd> = vec![];
        for lease in chain {
            let lease = self.fit_one(lease, &below)?;
            let opaque = {
                let state = self.state();
                let layer = state.layers.get(&lease.number);
                layer.is_some_and(|layer| layer.record.opaque_root)
            };
            if opaque {
                below.clear();
            }
            below.insert(0, open_root(&self.path_of(lease.number))?);
            fitted.push(lease);
        }
        Ok(fitted)
    }

    fn fit_one(&self, lease: Lease, below: &[OwnedFd]) -> Result<Lease, ImageError> {
        let (record, uses) = {
            let state = self.state();
            match state.layers.get(&lease.number) {
                Some(layer) => (layer.record.clone(), layer.uses),
                None => return Ok(lease),
            }
        };
        let path = self.path_of(lease.number);
        let wanted = {
            let root = open_root(&path)?;
            mend::looks(root.as_fd(), &record.implied, below).map_err(|errno| match errno {
                Errno::OVERFLOW => ImageError::TooLarge {
                    what: format!("the directories that layer {} only implies", record.diff_id),
                    limit: format!("{} looks into the layers below", mend::MAX_STEPS),
                },
                errno => ImageError::io("fit", &path, errno),
            })?
        };
        let wanted: Vec<_> = wanted.into_iter().collect();
        if wanted == record.looks {
            return Ok(lease);
        }
        if let Some(other) = self.find_variant(&record.diff_id, &wanted) {
            return Ok(other);
        }
        if uses == 1 && record.looks.is_empty() && !moves(&wanted) {
            self.mend_in_place(&lease, record, wanted)?;
            return Ok(lease);
        }
        self.make_variant(&record, &path, wanted)
    }

    fn find_variant(&self, diff_id: &Digest, looks: &[(Vec<u8>, Look)]) -> Option<Lease> {
        let mut state = self.state();
        let (number, layer) = state
            .layers
            .iter_mut()
            .find(|(_, layer)| layer.record.diff_id == *diff_id && layer.record.looks == looks)?;
        layer.uses += 1;
        Some(Lease {
            layers: self.clone(),
            number: *number,
        })
    }

    /// Only this chain uses the layer. Without a record while it changes: a crash drops it.
    fn mend_in_place(
        &self,
        lease: &Lease,
        mut record: LayerRecord,
        wanted: Vec<(Vec<u8>, Look)>,
    ) -> Result<(), ImageError> {
        let key = lease.number.to_string();
        let path = self.path_of(lease.number);
        self.0.records.remove(&key)?;
        let looks: Looks = wanted.iter().cloned().collect();
        mend::mend(open_root(&path)?.as_fd(), &looks)
            .map_err(|errno| ImageError::io("mend", &path, errno))?;
        record.looks = wanted;
        self.0.records.put(&key, &record, Durability::Process)?;
        if let Some(layer) = self.state().layers.get_mut(&lease.number) {
            layer.record = record;
        }
        Ok(())
    }

    fn make_variant(
        &self,
        record: &LayerRecord,
        path: &Path,
        wanted: Vec<(Vec<u8>, Look)>,
    ) -> Result<Lease, ImageError> {
        let mut new = self.begin()?;
        let (from, to) = (open_root(path)?, open_root(&new.path)?);
        let looks: Looks = wanted.iter().cloned().collect();
        let made = tree::share(from.as_fd(), to.as_fd()).and_then(|directories| {
            unlook(to.as_fd(), &record.looks)?;
            mend::mend(to.as_fd(), &looks)?;
            Ok(directories)
        });
        let directories = made.map_err(|errno| ImageError::io("copy", path, errno))?;
        let applied = Applied {
            implied: record.implied.iter().cloned().collect(),
            opaque_root: record.opaque_root,
            bytes: directories * 4096,
            inodes: directories,
        };
        self.admit_looking(&mut new, record.diff_id, applied, wanted)
    }

    /// Is there a layer that nobody holds?
    pub(crate) fn has_unused(&self) -> bool {
        self.state().layers.values().any(|layer| layer.uses == 0)
    }

    /// Removes every layer that nobody holds, and what a crash left. What cannot be removed is set aside. `stop` is asked
    /// now and then; the rest is left to the next start then. Blocks on the disk.
    ///
    /// # Errors
    ///
    /// The first record that stays, or directory that cannot be renamed; the others are removed all the same.
    pub(crate) fn collect(&self, stop: &dyn Fn() -> bool) -> Result<(), ImageError> {
        let unused: Vec<u64> = {
            let mut state = self.state();
            let unused = state.layers.iter().filter(|(_, layer)| layer.uses == 0);
            let unused: Vec<u64> = unused.map(|(number, _)| *number).collect();
            for number in &unused {
                state.layers.remove(number);
            }
            unused
        };
        let mut outcome = Ok(());
        for number in unused {
            let removed = self.discard(number);
            outcome = outcome.and(removed);
        }
        self.0.trash.go_through(stop);
        outcome
    }

    fn discard(&self, number: u64) -> Result<(), ImageError> {
        self.0.records.remove(&number.to_string())?;
        let (from, to) = (
            self.path_of(number),
            self.0.directory.join(format!("{TRASH}{number}")),
        );
        fs::rename(&from, &to).map_err(|error| ImageError::io("rename", &from, error))
    }

    /// Layers that cannot be removed. From memory.
    pub(crate) fn set_aside(&self) -> Vec<Aside> {
        self.0.trash.set_aside()
    }

    /// Records as on disk for good what was recorded for this boot. The caller has synced the
    /// filesystem after the layers were made, and syncs it again afterwards.
    ///
    /// # Errors
    ///
    /// [`ImageError::Store`].
    pub(crate) fn settle(&self, numbers: &[u64]) -> Result<(), ImageError> {
        let _alone = self
            .0
            .fitting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for number in numbers {
            let record = self
                .state()
                .layers
                .get(number)
                .map(|layer| layer.record.clone());
            let Some(mut record) = record.filter(|record| record.boot.is_some()) else {
                continue;
            };
            record.boot = None;
            self.0
                .records
                .put(&number.to_string(), &record, Durability::Process)?;
            let kept = match self.state().layers.get_mut(number) {
                Some(layer) => {
                    layer.record = record;
                    true
                }
                None => false,
            };
            if !kept {
                // Collected meanwhile: its record may have gone before this one was written.
                self.0.records.remove(&number.to_string())?;
            }
        }
        Ok(())
    }

    /// Waits until everything written to the store's filesystem is on disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub(crate) fn sync(&self) -> Result<(), ImageError> {
        let root = open_root(&self.0.directory)?;
        rustix::fs::syncfs(&root).map_err(|errno| ImageError::io("sync", &self.0.directory, errno))
    }
}

/// Does content of the layer lie elsewhere than its tar says?
fn moves(looks: &[(Vec<u8>, Look)]) -> bool {
    looks.iter().any(|(_, look)| matches!(look, Look::Moved(_)))
}

/// Takes the looks that another chain gave back; attributes added there stay.
fn unlook(layer: BorrowedFd<'_>, looks: &[(Vec<u8>, Look)]) -> rustix::io::Result<()> {
    let plain = |(path, _): &(Vec<u8>, Look)| {
        let look = Look::Below {
            mode: 0o755,
            uid: 0,
            gid: 0,
            xattrs: vec![],
        };
        (path.clone(), look)
    };
    mend::mend(layer, &looks.iter().map(plain).collect())
}

impl Lease {
    /// The layer's number, which is the name of its directory.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        if let Some(layer) = self.layers.state().layers.get_mut(&self.number) {
            layer.uses += 1;
        }
        Self {
            layers: self.layers.clone(),
            number: self.number,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(layer) = self.layers.state().layers.get_mut(&self.number) {
            layer.uses = layer.uses.saturating_sub(1);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({})", self.number)
    }
}

impl NewLayer {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`].
    pub(crate) fn open(&self) -> Result<OwnedFd, ImageError> {
        open_root(&self.path)
    }
}

impl Drop for NewLayer {
    fn drop(&mut self) {
        if !self.admitted
            && let Err(errno) = tree::remove_path(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %errno, "unfinished layer not removed");
        }
    }
}

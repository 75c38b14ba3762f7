//! Gets the layers of an image, side by side, each once however many images ask for it at a time.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use crate::base::counters;
use crate::base::image::Image;
use crate::base::tasks::Tasks;
use crate::images::ImageStore;
use crate::images::apply::Applied;
use crate::images::catalog::NewImage;
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::import::check;
use crate::images::layers::{Lease, NewLayer};
use crate::images::progress::Reporter;
use crate::images::unpack::Unpacked;

/// Who is getting which layer now.
#[derive(Debug, Default)]
pub(crate) struct Underway(Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>);

impl Underway {
    fn turn(&self, diff_id: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = turns.get(diff_id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        turns.insert(*diff_id, Arc::downgrade(&turn));
        turn
    }
}

/// An unpacked layer whose diff id was compared.
#[derive(Debug)]
pub(crate) struct Verified {
    new: NewLayer,
    diff_id: Digest,
    applied: Applied,
    size: u64,
}

impl Verified {
    /// Compares the diff id.
    ///
    /// # Errors
    ///
    /// [`ImageError::Digest`].
    pub(crate) fn new(
        new: NewLayer,
        unpacked: Unpacked,
        diff_id: &Digest,
        what: &str,
    ) -> Result<Self, ImageError> {
        check(&format!("{what} unpacked"), diff_id, &unpacked.diff_id)?;
        Ok(Self {
            new,
            diff_id: *diff_id,
            applied: unpacked.applied,
            size: unpacked.size,
        })
    }
}

impl ImageStore {
    /// A lease on each of the layers, in order. `get` unpacks one that is not here; `names` are theirs
    /// in reports of progress.
    ///
    /// # Errors
    ///
    /// The first failure, once the other layers have come to an end.
    pub(crate) async fn obtain_all<F, W>(
        &self,
        diff_ids: &[Digest],
        names: &[String],
        reporter: &Reporter,
        get: F,
    ) -> Result<Vec<Lease>, ImageError>
    where
        F: Fn(usize, NewLayer) -> W,
        W: Future<Output = Result<Verified, ImageError>>,
    {
        let failed = std::sync::atomic::AtomicBool::new(false);
        let (failed, get) = (&failed, &get);
        let mut work: FuturesUnordered<_> = diff_ids
            .iter()
            .zip(names)
            .enumerate()
            .map(|(index, (diff_id, name))| async move {
                let told = |bytes| reporter.layer(name, bytes, true);
                let lease = self
                    .obtain(diff_id, told, failed, |new| get(index, new))
                    .await;
                if lease.is_err() {
                    failed.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                (index, lease)
            })
            .collect();
        let mut leases: Vec<Option<Lease>> = diff_ids.iter().map(|_| None).collect();
        let mut outcome = Ok(());
        while let Some((index, lease)) = work.next().await {
            match lease {
                Ok(lease) => leases[index] = lease,
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| leases.into_iter().flatten().collect())
    }

    /// `None`: not tried, since another layer had failed.
    async fn obtain<W: Future<Output = Result<Verified, ImageError>>>(
        &self,
        diff_id: &Digest,
        told: impl Fn(u64),
        failed: &std::sync::atomic::AtomicBool,
        get: impl FnOnce(NewLayer) -> W,
    ) -> Result<Option<Lease>, ImageError> {
        let turn = self.underway().turn(diff_id);
        let _mine = turn.lock().await;
        if let Some(lease) = self.layers().find(diff_id) {
            told(0);
            counters::LAYERS_REUSED.add(1);
            return Ok(Some(lease));
        }
        let permit = self.downloads().acquire().await;
        let _permit = permit.map_err(|_closed| ImageError::Shutdown)?;
        if failed.load(std::sync::atomic::Ordering::Relaxed) {
            return Ok(None);
        }
        let new = self.layers().begin()?;
        let verified = get(new).await?;
        let size = verified.size;
        let layers = self.layers().clone();
        let lease =
            Tasks::blocking(move || layers.admit(verified.new, verified.diff_id, verified.applied))
                .await
                .map_err(|_panic| ImageError::Shutdown)??;
        told(size);
        Ok(Some(lease))
    }

    /// Makes the layers fit each other and records the image.
    ///
    /// # Errors
    ///
    /// [`ImageError::Io`], [`ImageError::Store`]; nothing is recorded then.
    pub(crate) async fn commit(&self, mut new: NewImage) -> Result<Arc<Image>, ImageError> {
        let store = self.clone();
        Tasks::blocking(move || {
            new.layers = store.layers().fit(new.layers)?;
            let image = store.catalog().add(new)?;
            Ok(image)
        })
        .await
        .map_err(|_panic| ImageError::Shutdown)?
    }
}

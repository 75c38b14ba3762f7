//! Pulls: one flight for each (reference, credentials) however many ask, ended when nobody waits.

use std::collections::HashMap;
use std::io::{self, BufRead, Read};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::base::counters;
use crate::base::image::{Credentials, Image, ImageSpec, Progress};
use crate::base::tasks::Tasks;
use crate::images::ImageStore;
use crate::images::artifact;
use crate::images::catalog::NewImage;
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::import::check;
use crate::images::layers::NewLayer;
use crate::images::manifest::{self, Descriptor, Document, Manifest};
use crate::images::obtain::Verified;
use crate::images::progress::Reporter;
use crate::images::reference::Reference;
use crate::images::registry::{Access, Fetched, Registry};
use crate::images::unpack::unpack;

/// Pieces of a layer between network and unpacker.
const PIECES: usize = 32;
/// An index of indexes of ...
const MAX_NESTING: usize = 3;

type Outcome = Option<Result<Arc<Image>, Arc<ImageError>>>;
type Key = (String, Option<Credentials>);

/// A pull under way.
#[derive(Debug)]
struct Flight {
    outcome: watch::Receiver<Outcome>,
    reporter: Reporter,
    cancel: watch::Sender<bool>,
    waiting: usize,
    number: u64,
}

#[derive(Default)]
struct State {
    flights: HashMap<Key, Flight>,
    next: u64,
}

/// The pulls under way.
#[derive(Clone, Default)]
pub(crate) struct Flights(Arc<Mutex<State>>);

impl std::fmt::Debug for Flights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Flights({})", self.state().flights.len())
    }
}

impl Flights {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who waits for a flight; the last who goes away cancels it.
struct Waiter {
    flights: Flights,
    key: Key,
    number: u64,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut state = self.flights.state();
        if let Some(flight) = state.flights.get_mut(&self.key)
            && flight.number == self.number
        {
            flight.waiting -= 1;
            if flight.waiting == 0 {
                flight.cancel.send_replace(true);
                state.flights.remove(&self.key);
            }
        }
    }
}

impl ImageStore {
    /// Pulls an image, or joins the pull of the same reference with the same credentials that is under
    /// way. What is here already is not fetched again, but the registry is always asked.
    ///
    /// When every caller of a pull has gone away, it ends and leaves nothing.
    ///
    /// # Errors
    ///
    /// [`ImageError::Reference`], [`ImageError::NotInRegistry`], [`ImageError::Denied`],
    /// [`ImageError::RegistryUnavailable`], [`ImageError::RateLimited`], [`ImageError::HostsFile`], [`ImageError::Astray`],
    /// [`ImageError::NoPlatform`], [`ImageError::Manifest`], [`ImageError::Unsupported`],
    /// [`ImageError::Digest`], [`ImageError::Archive`], [`ImageError::TooLarge`], [`ImageError::Io`].
    pub(crate) async fn pull(
        &self,
        spec: &ImageSpec,
        credentials: Option<Credentials>,
        progress: Option<mpsc::Sender<Progress>>,
    ) -> Result<Arc<Image>, ImageError> {
        let reference = Reference::parse(&spec.image)?;
        let (_waiter, mut outcome) = self.board(reference, spec, credentials, progress);
        let landed = outcome.wait_for(Option::is_some).await;
        match landed.ok().and_then(|outcome| outcome.clone()) {
            Some(Ok(image)) => Ok(image),
            Some(Err(error)) => Err(ImageError::Shared(error)),
            None => Err(ImageError::Shutdown),
        }
    }

    fn board(
        &self,
        reference: Reference,
        spec: &ImageSpec,
        credentials: Option<Credentials>,
        progress: Option<mpsc::Sender<Progress>>,
    ) -> (Waiter, watch::Receiver<Outcome>) {
        let key = (reference.to_string(), credentials.clone());
        let mut state = self.flights().state();
        if let Some(flight) = state.flights.get_mut(&key) {
            flight.waiting += 1;
            flight.reporter.listen(progress);
            let waiter = Waiter {
                flights: self.flights().clone(),
                key,
                number: flight.number,
            };
            return (waiter, flight.outcome.clone());
        }
        state.next += 1;
        let number = state.next;
        let (tell, outcome) = watch::channel(None);
        let (cancel, cancelled) = watch::channel(false);
        let reporter = Reporter::default();
        reporter.listen(progress);
        state.flights.insert(
            key.clone(),
            Flight {
                outcome: outcome.clone(),
                reporter: reporter.clone(),
                cancel,
                waiting: 1,
                number,
            },
        );
        drop(state);
        let (store, spec, of) = (self.clone(), spec.clone(), key.clone());
        let _detached = self.tasks().spawn(async move {
            let result = store
                .fly(&reference, spec, credentials, reporter, cancelled)
                .await;
            match &result {
                Ok(_) => counters::PULLS_DONE.add(1),
                Err(_) => counters::PULLS_FAILED.add(1),
            }
            store.tidy(result.is_err()).await;
            let mut state = store.flights().state();
            if state
                .flights
                .get(&of)
                .is_some_and(|flight| flight.number == number)
            {
                state.flights.remove(&of);
            }
            drop(state);
            tell.send_replace(Some(result.map_err(Arc::new)));
        });
        let waiter = Waiter {
            flights: self.flights().clone(),
            key,
            number,
        };
        (waiter, outcome)
    }

    async fn fly(
        &self,
        reference: &Reference,
        spec: ImageSpec,
        credentials: Option<Credentials>,
        reporter: Reporter,
        mut cancelled: watch::Receiver<bool>,
    ) -> Result<Arc<Image>, ImageError> {
        let work = self.pull_now(reference, spec, credentials, &reporter);
        tokio::select! {
            image = work => image,
            _ = cancelled.wait_for(|cancelled| *cancelled) => Err(ImageError::Shutdown),
        }
    }

    async fn pull_now(
        &self,
        reference: &Reference,
        spec: ImageSpec,
        credentials: Option<Credentials>,
        reporter: &Reporter,
    ) -> Result<Arc<Image>, ImageError> {
        let access = Access {
            credentials,
            tokens: self.tokens(),
            patience: self.patience(),
            http_blobs: self.0.config.http_blobs,
        };
        // A few small files; certificates of TLS are read once a pull.
        let registry = Registry::open(reference, self.registry_directories(), &access)?;
        let top = registry.resolve().await?;
        let name = reference.with_digest(top.digest);
        let (name_digest, mut config_size) = (top.digest, 0);
        let mut blobs = vec![(top.digest, top.bytes.clone())];
        let manifest = self.descend(&registry, reference, top, &mut blobs).await?;
        let artifact = artifact::is_artifact(&manifest.config.media_type);
        let (id, config, titles) = if artifact {
            // Most artifacts have the same, empty config: they are known by their manifest.
            let id = blobs.last().map_or(name_digest, |(digest, _)| *digest);
            let (titles, config) = artifact::layout(&manifest, &format!("artifact {reference}"))?;
            (id, config, Some(titles))
        } else {
            let id = manifest.config.digest;
            let bytes = match self.catalog().blob(&id) {
                Ok(bytes) if Digest::of(&bytes) == id => bytes,
                _ => registry.blob(&manifest.config).await?,
            };
            let config = manifest::parse_config(&bytes, &format!("config of {reference}"))?;
            config_size = bytes.len() as u64;
            blobs.push((id, bytes));
            (id, config, None)
        };
        if !self.wanted().runs(&config.platform) {
            return Err(ImageError::NoPlatform {
                reference: reference.to_string(),
                wanted: self.wanted().to_string(),
                offered: config.platform.to_string(),
            });
        }
        let size = manifest.layers.iter().map(|layer| layer.size).sum::<u64>() + config_size;
        let parts = parts(&manifest, &config.diff_ids, titles)?;
        let layers = self.fetch_layers(&registry, &parts, reporter).await?;
        let tag = matches!(reference.target(), crate::images::reference::Target::Tag(_));
        self.commit(NewImage {
            id,
            tags: tag.then(|| reference.to_string()).into_iter().collect(),
            digests: vec![name.to_string()],
            size,
            config: config.runtime,
            artifact,
            spec,
            diff_ids: config.diff_ids,
            layers,
            blobs,
        })
        .await
    }

    /// From what the reference means down to the manifest for this machine.
    async fn descend(
        &self,
        registry: &Registry<'_>,
        reference: &Reference,
        top: Fetched,
        blobs: &mut Vec<(Digest, Vec<u8>)>,
    ) -> Result<Manifest, ImageError> {
        let mut fetched = top;
        for _ in 0..=MAX_NESTING {
            let what = format!("manifest of {reference}");
            match manifest::parse_document(&fetched.bytes, &fetched.media_type, &what)? {
                Document::Manifest(manifest) => return Ok(manifest),
                Document::Index(entries) => {
                    let chosen = self.wanted().choose(&entries);
                    let chosen = chosen.ok_or_else(|| self.none_runs(reference, &entries))?;
                    fetched = registry.child(chosen).await?;
                    blobs.push((fetched.digest, fetched.bytes.clone()));
                }
            }
        }
        Err(ImageError::manifest(
            format!("manifest of {reference}"),
            "indexes nested too deeply",
        ))
    }

    fn none_runs(&self, reference: &Reference, entries: &[Descriptor]) -> ImageError {
        let platforms = entries.iter().filter_map(|entry| entry.platform.as_ref());
        let offered: Vec<_> = platforms.map(ToString::to_string).collect();
        ImageError::NoPlatform {
            reference: reference.to_string(),
            wanted: self.wanted().to_string(),
            offered: offered.join(", "),
        }
    }

    async fn fetch_layers(
        &self,
        registry: &Registry<'_>,
        parts: &[Part],
        reporter: &Reporter,
    ) -> Result<Vec<crate::images::layers::Lease>, ImageError> {
        let names: Vec<_> = parts
            .iter()
            .map(|part| part.layer.digest.to_string())
            .collect();
        let diff_ids: Vec<_> = parts.iter().map(|part| part.diff_id).collect();
        let sizes = parts.iter().map(|part| part.layer.size);
        reporter.layers(names.iter().cloned().zip(sizes).collect());
        self.obtain_all(&diff_ids, &names, reporter, |index, new| {
            self.fetch_from_any(registry, &parts[index], (new, reporter))
        })
        .await
    }

    /// One layer from the first host that gives what it should.
    async fn fetch_from_any(
        &self,
        registry: &Registry<'_>,
        part: &Part,
        (new, reporter): (NewLayer, &Reporter),
    ) -> Result<Verified, ImageError> {
        let mut new = Some(new);
        let mut first = 0;
        loop {
            let place = match new.take() {
                Some(new) => new,
                None => self.layers().begin()?,
            };
            match fetch_layer(registry, part, (place, reporter, first)).await {
                Err(error @ ImageError::Digest { .. }) if first + 1 < registry.sources() => {
                    tracing::warn!(image.digest = %part.layer.digest, %error, "a mirror gave something else");
                    first += 1;
                }
                other => return other,
            }
        }
    }
}

/// A layer to fetch.
struct Part {
    layer: Descriptor,
    diff_id: Digest,
    /// Of an artifact's blob, which becomes this file.
    title: Option<String>,
}

fn parts(
    manifest: &Manifest,
    diff_ids: &[Digest],
    titles: Option<Vec<String>>,
) -> Result<Vec<Part>, ImageError> {
    if manifest.layers.len() != diff_ids.len() {
        return Err(ImageError::manifest(
            "manifest",
            format!(
                "{} layers, but the config has {}",
                manifest.layers.len(),
                diff_ids.len()
            ),
        ));
    }
    let mut titles = titles.unwrap_or_default().into_iter();
    let both = manifest.layers.iter().zip(diff_ids);
    let part = |(layer, diff_id): (&Descriptor, &Digest)| Part {
        layer: layer.clone(),
        diff_id: *diff_id,
        title: titles.next(),
    };
    Ok(both.map(part).collect())
}

/// One layer from socket to files.
async fn fetch_layer(
    registry: &Registry<'_>,
    part: &Part,
    (new, reporter, first): (NewLayer, &Reporter, usize),
) -> Result<Verified, ImageError> {
    let (send, receive) = mpsc::channel(PIECES);
    let layer = &part.layer;
    let what = format!("layer {}", layer.digest);
    let (digest, diff_id, title) = (layer.digest, part.diff_id, part.title.clone());
    let unpacking = Tasks::blocking(move || {
        let pieces = Pieces {
            receive,
            current: Bytes::new(),
        };
        let unpacked = match &title {
            Some(title) => artifact::place(pieces, new.open()?, title, &what)?,
            None => unpack(pieces, new.open()?, &what, Some(&digest))?,
        };
        check(&what, &digest, &unpacked.digest)?;
        Verified::new(new, unpacked, &diff_id, &what)
    });
    let name = digest.to_string();
    let told = |bytes| reporter.layer(&name, bytes, false);
    let fetched = registry.stream(layer, first, (&send, told)).await;
    drop(send);
    let unpacked = unpacking.await.map_err(|_panic| ImageError::Shutdown)?;
    counters::LAYERS_FETCHED.add(u64::from(fetched.is_ok() && unpacked.is_ok()));
    // A broken stream is the reason for whatever the unpacker says about it.
    fetched.and(unpacked)
}

/// What comes from the network, as a reader for the unpacker's thread.
struct Pieces {
    receive: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl BufRead for Pieces {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.current.is_empty() {
            match self.receive.blocking_recv() {
                Some(piece) => self.current = piece,
                None => break,
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, amount: usize) {
        let amount = amount.min(self.current.len());
        let _used = self.current.split_to(amount);
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(buffer.len());
        buffer[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

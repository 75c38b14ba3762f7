//! Registries: the distribution API, read only, over the hosts configured for a registry.
//!
//! Each host is asked in turn until one has what is wanted. A host that refuses, hangs or breaks off is
//! passed over for the next; an answer (denied, not there) counts more than none when all have failed.

pub(crate) mod auth;
pub(crate) mod hosts;
mod reach;
mod request;
mod transport;

use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use tokio::sync::mpsc::Sender;

use crate::base::counters;
use crate::base::image::Credentials;
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::import::check;
use crate::images::manifest::{self, Descriptor, MAX_DOCUMENT};
use crate::images::reference::{Reference, Target};
use crate::images::registry::auth::Tokens;
use crate::images::registry::request::Asker;

/// A connection that brought so many bytes was of use, however it ended.
const ENOUGH: u64 = 256 * 1024;
/// Connections in a row that were of no use, after which a layer is given up.
const MAX_TRIES: usize = 5;

/// A registry while one image is pulled: its hosts in order.
pub(crate) struct Registry<'t> {
    reference: Reference,
    hosts: Vec<Asker<'t>>,
    patience: Duration,
}

/// A manifest or index, as it came.
pub(crate) struct Fetched {
    /// Its content.
    pub(crate) bytes: Vec<u8>,
    /// Its digest.
    pub(crate) digest: Digest,
    /// Media type as the host stated it.
    pub(crate) media_type: String,
}

/// What a pull needs to know besides the image.
pub(crate) struct Access<'t> {
    /// As given.
    pub(crate) credentials: Option<Credentials>,
    /// Kept over pulls.
    pub(crate) tokens: &'t Tokens,
    /// How long a host may be silent.
    pub(crate) patience: Duration,
    /// Follow a redirect of a blob from https to http.
    pub(crate) http_blobs: bool,
}

/// Of two failures the one that says more.
fn worse(before: Option<ImageError>, after: ImageError) -> ImageError {
    let answered = |error: &ImageError| {
        matches!(
            error,
            ImageError::Denied { .. }
                | ImageError::NotInRegistry { .. }
                | ImageError::Astray { .. }
                | ImageError::Digest { .. }
        )
    };
    match before {
        Some(before) if answered(&before) && !answered(&after) => before,
        Some(before @ ImageError::Denied { .. }) => before,
        _ => after,
    }
}

impl<'t> Registry<'t> {
    /// Reads where images of the reference's registry are got from, and makes ready to ask there.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    ///
    /// [`ImageError::HostsFile`].
    pub(crate) fn open(
        reference: &Reference,
        directories: &[std::path::PathBuf],
        access: &Access<'t>,
    ) -> Result<Self, ImageError> {
        let mut hosts = vec![];
        for host in hosts::load(directories, reference.registry())? {
            let clients = transport::Clients::new(&host)?;
            hosts.push(Asker::new(host, clients, reference, access));
        }
        Ok(Self {
            reference: reference.clone(),
            hosts,
            patience: access.patience,
        })
    }

    /// What the reference means: a manifest or an index.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotInRegistry`], [`ImageError::Denied`], [`ImageError::RegistryUnavailable`],
    /// [`ImageError::Astray`], [`ImageError::RateLimited`], [`ImageError::Digest`], [`ImageError::TooLarge`].
    pub(crate) async fn resolve(&self) -> Result<Fetched, ImageError> {
        let path = format!("manifests/{}", self.reference.target());
        let by_tag = matches!(self.reference.target(), Target::Tag(_));
        self.manifest(&path, |asker| {
            if by_tag {
                asker.host().resolve
            } else {
                asker.host().pull
            }
        })
        .await
    }

    /// A manifest of an index.
    ///
    /// # Errors
    ///
    /// As [`Self::resolve`].
    pub(crate) async fn child(&self, entry: &Descriptor) -> Result<Fetched, ImageError> {
        let path = format!("manifests/{}", entry.digest);
        let fetched = self.manifest(&path, |asker| asker.host().pull).await?;
        check(
            &format!("manifest {}", entry.digest),
            &entry.digest,
            &fetched.digest,
        )?;
        Ok(fetched)
    }

    async fn manifest(
        &self,
        path: &str,
        may: impl Fn(&Asker<'t>) -> bool,
    ) -> Result<Fetched, ImageError> {
        let mut failure = None;
        for asker in self.hosts.iter().filter(|asker| may(asker)) {
            match self.manifest_of(asker, path).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => {
                    tracing::debug!(registry = %asker.name(), %error, "no manifest from this host");
                    failure = Some(worse(failure, error));
                }
            }
        }
        Err(self.none_left(failure))
    }

    fn none_left(&self, failure: Option<ImageError>) -> ImageError {
        failure.unwrap_or_else(|| ImageError::RegistryUnavailable {
            registry: self.reference.registry().to_owned(),
            reason: "hosts.toml leaves no host that may be asked".to_owned(),
        })
    }

    async fn manifest_of(&self, asker: &Asker<'t>, path: &str) -> Result<Fetched, ImageError> {
        let accept = [(ACCEPT, HeaderValue::from_static(manifest::ACCEPT))];
        let response = asker.get(path, &accept).await?;
        let media_type = text_header(&response, CONTENT_TYPE.as_str());
        let stated = text_header(&response, "docker-content-digest");
        let what = format!("manifest {} from {}", self.reference, asker.name());
        let bytes = asker.body(response, MAX_DOCUMENT, &what).await?;
        let digest = Digest::of(&bytes);
        if let Target::Digest(wanted) = self.reference.target()
            && path.ends_with(&wanted.to_string())
        {
            check(&what, wanted, &digest)?;
        }
        if let Ok(stated) = stated.parse::<Digest>() {
            check(&what, &stated, &digest)?;
        }
        Ok(Fetched {
            bytes,
            digest,
            media_type,
        })
    }

    /// A small blob, whole: a config.
    ///
    /// # Errors
    ///
    /// As [`Self::resolve`].
    pub(crate) async fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let mut failure = None;
        for asker in self.hosts.iter().filter(|asker| asker.host().pull) {
            match self.blob_of(asker, descriptor).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    tracing::debug!(registry = %asker.name(), %error, "no config from this host");
                    failure = Some(worse(failure, error));
                }
            }
        }
        Err(self.none_left(failure))
    }

    async fn blob_of(
        &self,
        asker: &Asker<'t>,
        descriptor: &Descriptor,
    ) -> Result<Vec<u8>, ImageError> {
        let what = format!("config {} from {}", descriptor.digest, asker.name());
        let response = asker
            .get(&format!("blobs/{}", descriptor.digest), &[])
            .await?;
        let bytes = asker
            .body(response, MAX_DOCUMENT.min(descriptor.size), &what)
            .await?;
        check(&what, &descriptor.digest, &Digest::of(&bytes))?;
        Ok(bytes)
    }

    /// How many hosts may give content.
    pub(crate) fn sources(&self) -> usize {
        self.hosts.iter().filter(|asker| asker.host().pull).count()
    }

    /// Sends a blob piece by piece; what breaks off is gone on with where it broke, with the next host
    /// first. The `first`th host is asked first. Stops without an error when nobody reads `to` any more. `told` gets the bytes so far.
    ///
    /// # Errors
    ///
    /// As [`Self::resolve`]; what was sent before is of no use then.
    pub(crate) async fn stream(
        &self,
        descriptor: &Descriptor,
        first: usize,
        (to, told): (&Sender<Bytes>, impl Fn(u64)),
    ) -> Result<(), ImageError> {
        let hosts: Vec<_> = self
            .hosts
            .iter()
            .filter(|asker| asker.host().pull)
            .collect();
        let mut place = Place {
            have: 0,
            size: descriptor.size,
        };
        let (mut failure, mut tries, mut turn) = (None, 0, first);
        // Each host at least once, and one host several times.
        let limit = MAX_TRIES.max(hosts.len());
        while tries < limit && !hosts.is_empty() {
            let asker = hosts[turn % hosts.len()];
            let before = place.have;
            match self
                .stream_from(asker, descriptor, &mut place, (to, &told))
                .await
            {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(registry = %asker.name(), %error, have = place.have, "layer broke off");
                    let hopeless = hosts.len() == 1
                        && !matches!(error, ImageError::RegistryUnavailable { .. });
                    failure = Some(worse(failure, error));
                    if hopeless {
                        break;
                    }
                }
            }
            turn += 1;
            tries = if place.have >= before + ENOUGH {
                0
            } else {
                tries + 1
            };
            if tries > 0 && turn % hosts.len() == 0 {
                let pause = Duration::from_millis(100 << tries.min(6)).min(self.patience);
                tokio::time::sleep(pause).await;
            }
        }
        Err(self.none_left(failure))
    }

    async fn stream_from(
        &self,
        asker: &Asker<'t>,
        descriptor: &Descriptor,
        place: &mut Place,
        (to, told): (&Sender<Bytes>, &impl Fn(u64)),
    ) -> Result<(), ImageError> {
        let mut headers = vec![];
        if place.have > 0
            && let Ok(range) = HeaderValue::from_str(&format!("bytes={}-", place.have))
        {
            headers.push((RANGE, range));
        }
        let path = format!("blobs/{}", descriptor.digest);
        let mut response = asker.get(&path, &headers).await?;
        // A host that knows no ranges sends all of it: the part that is here is passed over.
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text_header(&response, "content-range");
                if range_start(&range) != Some(place.have) {
                    return Err(asker.broken(format!("answered with another range: {range:?}")));
                }
                0
            }
            _ => place.have,
        };
        loop {
            let Some(mut chunk) = asker.chunk(&mut response).await? else {
                return match place.have == place.size {
                    true => Ok(()),
                    false => Err(asker.broken(format!(
                        "sent {} of {} bytes of {}",
                        place.have, place.size, descriptor.digest
                    ))),
                };
            };
            let passed = usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
            let fresh = chunk.split_off(passed);
            skip -= passed as u64;
            if fresh.is_empty() {
                continue;
            }
            if place.have + fresh.len() as u64 > place.size {
                return Err(ImageError::TooLarge {
                    what: format!("layer {} from {}", descriptor.digest, asker.name()),
                    limit: format!("its stated size of {} bytes", place.size),
                });
            }
            place.have += fresh.len() as u64;
            counters::PULLED_BYTES.add(fresh.len() as u64);
            if to.send(fresh).await.is_err() {
                return Ok(());
            }
            told(place.have);
        }
    }
}

/// How far a blob is here.
struct Place {
    have: u64,
    size: u64,
}

fn text_header(response: &Response, name: &str) -> String {
    let value = response
        .headers()
        .get(name)
        .and_then(|value| value.to_str().ok());
    value.unwrap_or_default().to_owned()
}

/// First byte of `bytes 10-19/20`.
fn range_start(header: &str) -> Option<u64> {
    header
        .strip_prefix("bytes ")?
        .split('-')
        .next()?
        .trim()
        .parse()
        .ok()
}

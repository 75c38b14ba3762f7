//! One request to one host: authorisation, redirects, patience.
//!
//! ```text
//! host ──307──> storage ──401, Bearer realm──> the realm of the storage
//!  │ who we are to the host                     │ nobody
//! ```
//!
//! Every stop of the way is let in on its own account. Headers, credentials, tokens and the client certificate of the
//! host are for requests that have not left it yet; one that comes back to it by way of others is a stranger's.

mod token;

use std::collections::HashMap;
use std::error::Error;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};

use crate::base::counters;
use crate::base::error::chain;
use crate::images::error::ImageError;
use crate::images::reference::Reference;
use crate::images::registry::Access;
use crate::images::registry::auth::{Challenge, Identity, Tokens, authority, hide};
use crate::images::registry::hosts::{Host, HostKind};
use crate::images::registry::reach::{Near, TooNear};
use crate::images::registry::transport::{Clients, NoRoute, Role};

const MAX_REDIRECTS: usize = 5;
/// Requests that were answered by "later" or by a fault of the server.
const MAX_RETRIES: u32 = 3;
/// The first 401 tells what is asked for, the second that a kept token is too old.
const MAX_REFUSALS: u32 = 2;
const MAX_WAIT: Duration = Duration::from_secs(60);
const MAX_REPLY: u64 = 1 << 20;
/// Of what a registry says in an error.
const MAX_WORDS: usize = 200;

/// One host, and who we are to it.
pub(crate) struct Asker<'t> {
    host: Host,
    clients: Clients,
    identity: Identity,
    /// Who we are to everybody else.
    nobody: Identity,
    /// Credentials were given, and not for this host.
    withheld: bool,
    tokens: &'t Tokens,
    patience: Duration,
    http_blobs: bool,
    repository: String,
    reference: String,
    /// Name of the registry, for mirrors of several.
    registry: Option<String>,
    /// The challenge that each stop answered with last: it is met before it is repeated.
    challenges: Mutex<HashMap<Stop, Challenge>>,
}

/// Who asks: origin, and whether as the host.
type Stop = (String, bool);

/// A place on the way of a request.
struct Hop {
    url: Url,
    /// The host that was configured, never left.
    home: bool,
    /// The way went from https to http: no token is got here.
    fallen: bool,
    led: Led,
}

impl Hop {
    fn stop(&self) -> Stop {
        (self.url.origin().ascii_serialization(), self.home)
    }
}

/// Who says that a URL is to be asked, and how.
struct Led {
    by: String,
    verb: &'static str,
}

/// What a redirect may do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Its digest is checked.
    Blob,
    Manifest,
    Token,
}

impl Wanted {
    fn name(self) -> &'static str {
        match self {
            Self::Blob => "a blob",
            Self::Manifest => "a manifest",
            Self::Token => "the request for a token",
        }
    }
}

impl<'t> Asker<'t> {
    /// Asks `host` for the repository of `reference`.
    pub(crate) fn new(
        host: Host,
        clients: Clients,
        reference: &Reference,
        access: &Access<'t>,
    ) -> Self {
        let credentials = access.credentials.as_ref();
        let identity = Identity::for_host(credentials, reference.registry(), &host);
        Self {
            registry: (host.kind != HostKind::Registry).then(|| reference.registry().to_owned()),
            host,
            clients,
            withheld: credentials.is_some() && !identity.is_secret(),
            identity,
            nobody: Identity::default(),
            tokens: access.tokens,
            patience: access.patience,
            http_blobs: access.http_blobs,
            repository: reference.path().to_owned(),
            reference: reference.to_string(),
            challenges: Mutex::default(),
        }
    }

    /// How the host was configured.
    pub(crate) fn host(&self) -> &Host {
        &self.host
    }

    /// Name and port, for messages.
    pub(crate) fn name(&self) -> String {
        authority(&self.host.base)
    }

    /// The host did not do as it should.
    pub(crate) fn broken(&self, reason: impl Into<String>) -> ImageError {
        self.broken_at(&self.host.base, reason)
    }

    /// Nor did the one that it led to.
    fn broken_at(&self, url: &Url, reason: impl Into<String>) -> ImageError {
        ImageError::RegistryUnavailable {
            registry: self.clean(authority(url)),
            reason: self.clean(reason.into()),
        }
    }

    fn astray(&self, led: &Led, where_to: impl std::fmt::Display) -> ImageError {
        ImageError::Astray {
            registry: self.clean(led.by.clone()),
            reason: self.clean(format!("{} {where_to}", led.verb).trim().to_owned()),
        }
    }

    fn too_near(&self, led: &Led, url: &Url, near: Near, address: Option<IpAddr>) -> ImageError {
        let place = authority(url);
        let address = address.map_or_else(String::new, |address| format!(" ({address})"));
        let mend = format!(
            "if that is meant, set local_targets = [{place:?}] for {} in hosts.toml",
            self.name()
        );
        self.astray(
            led,
            format!("{place}, which is {near}{address}: not asked; {mend}"),
        )
    }

    /// Without what nobody else may read: what others say may repeat what we told them.
    fn clean(&self, mut text: String) -> String {
        let headers = self.host.headers.iter().map(|(_, value)| value.clone());
        let words = headers.flat_map(|value| {
            let last = value.rsplit(' ').next().map(str::to_owned);
            last.into_iter().chain([value])
        });
        let long = words.filter(|word| word.len() >= 8);
        for secret in self.identity.secrets().chain(long) {
            hide(&mut text, &secret);
        }
        self.tokens.hide(&mut text);
        text
    }

    fn silent(&self, url: &Url) -> ImageError {
        counters::STALLS.add(1);
        self.broken_at(
            url,
            format!("no data for {} s", self.patience.as_secs_f32()),
        )
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.host.base.clone();
        url.set_path(&format!(
            "{}/{}/{path}",
            self.host.base.path(),
            self.repository
        ));
        if let Some(registry) = &self.registry {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        url
    }

    /// GET below the repository, with everything that it takes to be let in.
    ///
    /// # Errors
    ///
    /// [`ImageError::NotInRegistry`], [`ImageError::Denied`], [`ImageError::RateLimited`],
    /// [`ImageError::RegistryUnavailable`], [`ImageError::Astray`].
    pub(crate) async fn get(
        &self,
        path: &str,
        headers: &[(HeaderName, HeaderValue)],
    ) -> Result<Response, ImageError> {
        let mut retries = 0;
        loop {
            let (response, hop) = self.follow(path, headers).await?;
            let status = response.status();
            let wait = match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::TOO_MANY_REQUESTS => retry_after(&response),
                status if status.is_server_error() => Some(Duration::from_millis(250 << retries)),
                _ => None,
            };
            match wait.filter(|_| retries < MAX_RETRIES) {
                Some(wait) => tokio::time::sleep(wait.min(MAX_WAIT).min(self.patience)).await,
                None => return Err(self.refused(response, self.withheld_from(&hop)).await),
            }
            retries += 1;
        }
    }

    /// Follows redirects to the answer that is none, and tells from where it is.
    async fn follow(
        &self,
        path: &str,
        headers: &[(HeaderName, HeaderValue)],
    ) -> Result<(Response, Hop), ImageError> {
        let wanted = match path.starts_with("blobs/") {
            true => Wanted::Blob,
            false => Wanted::Manifest,
        };
        let mut hop = Hop {
            url: self.url(path),
            home: true,
            fallen: false,
            led: Led {
                by: self.name(),
                verb: "is now at",
            },
        };
        for _ in 0..=MAX_REDIRECTS {
            let response = self.let_in(&hop, headers).await?;
            if !response.status().is_redirection() {
                return Ok((response, hop));
            }
            let (url, led) = self.target(&hop.url, &response, wanted)?;
            hop = Hop {
                home: hop.home && url.origin() == hop.url.origin(),
                fallen: hop.fallen || url.scheme() == "http" && hop.url.scheme() == "https",
                url,
                led,
            };
        }
        Err(self.broken("redirects without end"))
    }

    /// Where a redirect leads from `from`.
    fn target(
        &self,
        from: &Url,
        response: &Response,
        wanted: Wanted,
    ) -> Result<(Url, Led), ImageError> {
        let location = response.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let next = location.and_then(|location| from.join(location).ok());
        let next = next.ok_or_else(|| self.broken_at(from, "redirects to nowhere"))?;
        let led = Led {
            by: authority(from),
            verb: "redirects",
        };
        let place = authority(&next);
        match (from.scheme(), next.scheme()) {
            (_, "https") | ("http", "http") => {}
            (_, "http") if wanted == Wanted::Blob && self.http_blobs => {}
            (_, "http") => {
                let mend = match wanted {
                    Wanted::Blob => {
                        "set registry_http_blobs = true in berth's configuration, or have it redirect to https"
                    }
                    Wanted::Manifest | Wanted::Token => "have it redirect to https",
                };
                let what = wanted.name();
                let reason = format!("{what} from https to http ({place}): not followed; {mend}");
                return Err(self.astray(&led, reason));
            }
            (_, other) => return Err(self.broken_at(from, format!("redirects to {other}:"))),
        }
        if !next.username().is_empty() || next.password().is_some() {
            let reason = format!("to a URL of {place} with a user name in it: not followed");
            return Err(self.astray(&led, reason));
        }
        let verb = "redirects to";
        Ok((next, Led { verb, ..led }))
    }

    /// Asks at one stop, as who it is that asks there.
    async fn let_in(
        &self,
        hop: &Hop,
        headers: &[(HeaderName, HeaderValue)],
    ) -> Result<Response, ImageError> {
        let mut refusals = 0;
        let mut refused = false;
        loop {
            let authorization = self.authorization(hop, refused).await?;
            let known = authorization.is_some();
            let role = match hop.home {
                true => Role::Client,
                false => Role::Stranger,
            };
            let client = self.reach(&hop.url, role, &hop.led)?;
            let mut request = client
                .get(hop.url.clone())
                .headers(headers.iter().cloned().collect());
            if hop.home {
                request = request.headers(self.own_headers());
            }
            if let Some(authorization) = authorization {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.send(request, &hop.url, &hop.led).await?;
            if hop.home {
                self.clients.arrived(&hop.url, response.remote_addr());
            }
            let unauthorized = response.status() == StatusCode::UNAUTHORIZED;
            if !unauthorized
                || refusals >= MAX_REFUSALS
                || !self.note_challenge(hop, &response, known)
            {
                return Ok(response);
            }
            // Without a token nothing was refused yet: one that is kept may do.
            refused = known;
            refusals += 1;
        }
    }

    fn reach(&self, url: &Url, role: Role, led: &Led) -> Result<Client, ImageError> {
        self.clients.reach(url, role).map_err(|error| match error {
            NoRoute::Near(near) => self.too_near(led, url, near, None),
            NoRoute::Tls(error) => error,
            NoRoute::Client(error) => self.broken_at(url, chain(&error.without_url())),
        })
    }

    async fn send(
        &self,
        request: RequestBuilder,
        url: &Url,
        led: &Led,
    ) -> Result<Response, ImageError> {
        match tokio::time::timeout(self.patience, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(match too_near(&error) {
                Some(found) => self.too_near(led, url, found.near, Some(found.address)),
                None => self.broken_at(url, chain(&error.without_url())),
            }),
            Err(_elapsed) => Err(self.silent(url)),
        }
    }

    fn own_headers(&self) -> HeaderMap {
        let headers = self.host.headers.iter().filter_map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
            let mut value = HeaderValue::from_str(value).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        });
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name, value);
        }
        map
    }

    /// The next piece of a body; `None` at its end.
    ///
    /// # Errors
    ///
    /// [`ImageError::RegistryUnavailable`]: the connection broke, or nothing came for too long.
    pub(crate) async fn chunk(&self, response: &mut Response) -> Result<Option<Bytes>, ImageError> {
        match tokio::time::timeout(self.patience, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(self.broken_at(response.url(), chain(&error.without_url()))),
            Err(_elapsed) => Err(self.silent(response.url())),
        }
    }

    /// A whole body of at most `limit` bytes.
    ///
    /// # Errors
    ///
    /// [`ImageError::TooLarge`], [`ImageError::RegistryUnavailable`].
    pub(crate) async fn body(
        &self,
        mut response: Response,
        limit: u64,
        what: &str,
    ) -> Result<Vec<u8>, ImageError> {
        let mut bytes = vec![];
        while let Some(chunk) = self.chunk(&mut response).await? {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(ImageError::TooLarge {
                    what: what.to_owned(),
                    limit: format!("{limit} bytes"),
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Why a stop may have wanted more than it was told; empty: it was told all.
    fn withheld_from(&self, hop: &Hop) -> String {
        let host = self.name();
        if hop.home && self.withheld {
            return "the pull secret is for another server, or may not go to this one in the clear"
                .to_owned();
        }
        match !hop.home && self.identity.is_secret() {
            true => format!("{host} led there, and the pull secret is for {host} alone"),
            false => String::new(),
        }
    }

    /// What an unwelcome status means; `note` is for one that lets us not in.
    async fn refused(&self, response: Response, note: String) -> ImageError {
        let status = response.status();
        let registry = self.clean(authority(response.url()));
        let words = match self.body(response, MAX_REPLY, "error").await {
            Ok(body) => self
                .clean(words_of(&body))
                .chars()
                .take(MAX_WORDS)
                .collect(),
            Err(_unread) => String::new(),
        };
        let reason = match words.is_empty() {
            true => status.to_string(),
            false => format!("{status}: {words}"),
        };
        let reference = self.reference.clone();
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => ImageError::NotInRegistry {
                registry,
                reference,
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ImageError::Denied {
                registry,
                reference,
                reason: match note.is_empty() {
                    true => reason,
                    false => format!("{reason} ({note})"),
                },
            },
            StatusCode::TOO_MANY_REQUESTS => ImageError::RateLimited { registry, reason },
            _ => ImageError::RegistryUnavailable { registry, reason },
        }
    }
}

/// The guard's refusal, somewhere below an error.
fn too_near(error: &reqwest::Error) -> Option<&TooNear> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// Seconds, or a second where the header says nothing that we read.
fn retry_after(response: &Response) -> Option<Duration> {
    let header = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok());
    let seconds = header
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(1);
    Some(Duration::from_secs(seconds))
}

/// Messages of the distribution API's error body, without control characters.
fn words_of(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let errors = value.get("errors").and_then(serde_json::Value::as_array);
    let messages = errors.into_iter().flatten().filter_map(|error| {
        let text = |key| error.get(key).and_then(serde_json::Value::as_str);
        text("message").or(text("code"))
    });
    let words: Vec<_> = messages.collect();
    let all = words.join("; ");
    all.chars().filter(|c| !c.is_control()).collect()
}

//! One request to one host: authorisation, redirects, patience.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER,
    WWW_AUTHENTICATE,
};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};

use crate::base::counters;
use crate::base::error::chain;
use crate::images::error::ImageError;
use crate::images::reference::Reference;
use crate::images::registry::Access;
use crate::images::registry::auth::{
    Challenge, Identity, TokenKey, TokenRequest, Tokens, read_token, token_request,
};
use crate::images::registry::hosts::Host;

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
    client: Client,
    identity: Identity,
    tokens: &'t Tokens,
    patience: Duration,
    repository: String,
    reference: String,
    /// Name of the registry, for mirrors of several.
    registry: Option<String>,
    /// The challenge that the host answered with last: it is met before it is repeated.
    challenge: Mutex<Option<Challenge>>,
}

impl<'t> Asker<'t> {
    /// Asks `host` for the repository of `reference`.
    pub(crate) fn new(
        host: Host,
        client: Client,
        reference: &Reference,
        access: &Access<'t>,
    ) -> Self {
        let authority = authority(&host.base);
        let identity = Identity::for_host(
            access.credentials.as_ref(),
            reference.registry(),
            &authority,
            host.own,
        );
        Self {
            registry: (!host.own).then(|| reference.registry().to_owned()),
            host,
            client,
            identity,
            tokens: access.tokens,
            patience: access.patience,
            repository: reference.path().to_owned(),
            reference: reference.to_string(),
            challenge: Mutex::default(),
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
        ImageError::RegistryUnavailable {
            registry: self.name(),
            reason: reason.into(),
        }
    }

    fn silent(&self) -> ImageError {
        counters::STALLS.add(1);
        self.broken(format!("no data for {} s", self.patience.as_secs_f32()))
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
    /// [`ImageError::RegistryUnavailable`].
    pub(crate) async fn get(
        &self,
        path: &str,
        headers: &[(HeaderName, HeaderValue)],
    ) -> Result<Response, ImageError> {
        let mut retries = 0;
        let mut refusals = 0;
        let mut refused = false;
        loop {
            let authorization = self.authorization(refused).await?;
            let known = authorization.is_some();
            let response = self.follow(self.url(path), headers, authorization).await?;
            let status = response.status();
            let wait = match status {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
                StatusCode::UNAUTHORIZED
                    if refusals < MAX_REFUSALS && self.note_challenge(&response, known) =>
                {
                    // Without a token nothing was refused yet: one that is kept may do.
                    refused = known;
                    refusals += 1;
                    continue;
                }
                StatusCode::TOO_MANY_REQUESTS => retry_after(&response),
                status if status.is_server_error() => Some(Duration::from_millis(250 << retries)),
                _ => None,
            };
            match wait.filter(|_| retries < MAX_RETRIES) {
                Some(wait) => tokio::time::sleep(wait.min(MAX_WAIT).min(self.patience)).await,
                None => return Err(self.refused(response).await),
            }
            retries += 1;
        }
    }

    /// Keeps the challenge of a 401; false: there is nothing new to answer. `known`: we said already
    /// who we are.
    fn note_challenge(&self, response: &Response, known: bool) -> bool {
        let headers = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = Challenge::parse(headers.iter().filter_map(|value| value.to_str().ok()));
        let useful = match &challenge {
            None => false,
            Some(Challenge::Basic) => !known && self.identity.basic().is_some(),
            Some(Challenge::Bearer { .. }) => self.identity.unasked().is_none(),
        };
        *self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = challenge;
        useful
    }

    /// For `Authorization`. `refused`: what was sent before did not do.
    async fn authorization(&self, refused: bool) -> Result<Option<HeaderValue>, ImageError> {
        if let Some(given) = self.identity.unasked() {
            return Ok(secret(&given));
        }
        let challenge = self
            .challenge
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => Ok(self.identity.basic().and_then(|basic| secret(&basic))),
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => {
                let scope = match scope.is_empty() {
                    true => format!("repository:{}:pull", self.repository),
                    false => scope,
                };
                let key = TokenKey::new(&realm, &service, &scope, &self.identity);
                if refused {
                    self.tokens.drop(&key);
                }
                if let Some(token) = self.tokens.get(&key) {
                    return Ok(secret(&format!("Bearer {token}")));
                }
                let token = self.fetch_token(&realm, (&service, &scope), key).await?;
                Ok(secret(&format!("Bearer {token}")))
            }
        }
    }

    async fn fetch_token(
        &self,
        realm: &str,
        about: (&str, &str),
        key: TokenKey,
    ) -> Result<String, ImageError> {
        let tls = self.host.base.scheme() == "https";
        let asked = token_request(realm, about, &self.identity, tls);
        let asked =
            asked.ok_or_else(|| self.broken(format!("names no usable realm: {realm:?}")))?;
        let request = match asked {
            TokenRequest::Get(url, basic) => {
                let request = self.client.get(url);
                match basic.and_then(|basic| secret(&basic)) {
                    Some(basic) => request.header(AUTHORIZATION, basic),
                    None => request,
                }
            }
            TokenRequest::Post(url, form) => self
                .client
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form),
        };
        let response = self.send(request).await?;
        if !response.status().is_success() {
            return Err(self.refused(response).await);
        }
        let body = self.body(response, MAX_REPLY, "token").await?;
        let (token, life) =
            read_token(&body).ok_or_else(|| self.broken("the realm's reply holds no token"))?;
        self.tokens.put(key, token.clone(), life);
        Ok(token)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ImageError> {
        match tokio::time::timeout(self.patience, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.broken(chain(&error.without_url()))),
            Err(_elapsed) => Err(self.silent()),
        }
    }

    /// Follows redirects. Authorisation and headers of the configuration stay with the host.
    async fn follow(
        &self,
        start: Url,
        headers: &[(HeaderName, HeaderValue)],
        authorization: Option<HeaderValue>,
    ) -> Result<Response, ImageError> {
        let origin = start.origin();
        let mut url = start;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self
                .client
                .get(url.clone())
                .headers(headers.iter().cloned().collect());
            if url.origin() == origin {
                request = request.headers(self.own_headers());
                if let Some(authorization) = &authorization {
                    request = request.header(AUTHORIZATION, authorization.clone());
                }
            }
            let response = self.send(request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.ok_or_else(|| self.broken("redirects to nowhere"))?;
            let safe = match next.scheme() {
                "https" => true,
                "http" => url.scheme() == "http",
                _ => false,
            };
            if !safe {
                return Err(self.broken(format!("redirects to {}:", next.scheme())));
            }
            url = next;
        }
        Err(self.broken("redirects without end"))
    }

    fn own_headers(&self) -> HeaderMap {
        let headers = self.host.headers.iter().filter_map(|(name, value)| {
            let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
            Some((name, HeaderValue::from_str(value).ok()?))
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
            Ok(Err(error)) => Err(self.broken(chain(&error.without_url()))),
            Err(_elapsed) => Err(self.silent()),
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

    /// What an unwelcome status means.
    async fn refused(&self, response: Response) -> ImageError {
        let status = response.status();
        let words = match self.body(response, MAX_REPLY, "error").await {
            Ok(body) => words_of(&body),
            Err(_unread) => String::new(),
        };
        let reason = match words.is_empty() {
            true => status.to_string(),
            false => format!("{status}: {words}"),
        };
        let (registry, reference) = (self.name(), self.reference.clone());
        match status {
            StatusCode::NOT_FOUND | StatusCode::GONE => ImageError::NotInRegistry {
                registry,
                reference,
            },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ImageError::Denied {
                registry,
                reference,
                reason,
            },
            StatusCode::TOO_MANY_REQUESTS => ImageError::RateLimited { registry, reason },
            _ => ImageError::RegistryUnavailable { registry, reason },
        }
    }
}

/// Name and, where it is not the scheme's own, port.
fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
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

/// Messages of the distribution API's error body, cut, without control characters.
fn words_of(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let errors = value.get("errors").and_then(serde_json::Value::as_array);
    let messages = errors.into_iter().flatten().filter_map(|error| {
        let text = |key| error.get(key).and_then(serde_json::Value::as_str);
        text("message").or(text("code"))
    });
    let words: Vec<_> = messages.collect();
    let all = words.join("; ");
    all.chars()
        .filter(|c| !c.is_control())
        .take(MAX_WORDS)
        .collect()
}

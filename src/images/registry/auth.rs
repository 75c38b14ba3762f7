//! Who we are to a registry: challenges, tokens, and to whom credentials may go.
//!
//! ```text
//! GET blob ──401, Bearer realm, service, scope──> realm (password or identity token) ──token──> GET blob
//!            401, Basic ───────────────────────────────────────────────────────────────────> GET blob
//! ```
//!
//! Credentials go to the host that was configured for the registry and to the realm it names, never to
//! where it redirects; and never in the clear to a realm when the registry itself is spoken to by TLS.
//! Distribution: "Token Authentication Specification", "Oauth2 Token Authentication".

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::Url;
use serde::Deserialize;

use crate::base::image::Credentials;
use crate::images::digest::Digest;

/// Where the specification does not say how long a token is good.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// A token is not used when it ends so soon.
const MARGIN: Duration = Duration::from_secs(10);
const MAX_TOKENS: usize = 1000;

/// What a 401 asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// A token from the realm.
    Bearer {
        /// Where the token is got.
        realm: String,
        /// Who the token is for.
        service: String,
        /// What the token allows; empty: not said.
        scope: String,
    },
    /// User name and password with each request.
    Basic,
}

impl Challenge {
    /// Reads `WWW-Authenticate` headers; Bearer is preferred. RFC 9110, 11.6.1.
    pub(crate) fn parse<'h>(headers: impl Iterator<Item = &'h str>) -> Option<Self> {
        let mut basic = None;
        for header in headers {
            let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
            if scheme.eq_ignore_ascii_case("basic") {
                basic = Some(Self::Basic);
            }
            if scheme.eq_ignore_ascii_case("bearer") {
                let mut parameters = parameters(rest);
                let realm = parameters.remove("realm")?;
                return Some(Self::Bearer {
                    realm,
                    service: parameters.remove("service").unwrap_or_default(),
                    scope: parameters.remove("scope").unwrap_or_default(),
                });
            }
        }
        basic
    }
}

/// `key=value, key="quoted \" value"`.
fn parameters(text: &str) -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.trim_matches([' ', ',', '\t']).to_ascii_lowercase();
        let mut value = String::new();
        if let Some(quoted) = after.strip_prefix('"') {
            let mut characters = quoted.char_indices();
            let mut end = quoted.len();
            while let Some((at, character)) = characters.next() {
                match character {
                    '"' => {
                        end = at + 1;
                        break;
                    }
                    '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                    other => value.push(other),
                }
            }
            rest = &quoted[end..];
        } else {
            let end = after.find(',').unwrap_or(after.len());
            after[..end].trim().clone_into(&mut value);
            rest = &after[end..];
        }
        found.insert(key, value);
    }
    found
}

/// What is known of one client: from its credentials only what the host asked may see.
#[derive(Clone, Default)]
pub(crate) struct Identity {
    user: Option<(String, String)>,
    identity_token: String,
    registry_token: String,
}

impl Identity {
    /// The part of `credentials` that `host` (name and port) may see, when it is asked for images of
    /// `registry`.
    pub(crate) fn for_host(
        credentials: Option<&Credentials>,
        registry: &str,
        host: &str,
        own: bool,
    ) -> Self {
        let Some(given) = credentials else {
            return Self::default();
        };
        let meant = server_of(&given.server_address);
        let fits =
            meant.is_empty() || meant == host || own && canonical(&meant) == canonical(registry);
        if !fits {
            return Self::default();
        }
        let user = match (given.username.is_empty(), given.auth.is_empty()) {
            (false, _) => Some((given.username.clone(), given.password.clone())),
            (true, false) => decode(&given.auth),
            (true, true) => None,
        };
        Self {
            user,
            identity_token: given.identity_token.clone(),
            registry_token: given.registry_token.clone(),
        }
    }

    /// For `Authorization`, before anybody asked: a token that was given as it is.
    pub(crate) fn unasked(&self) -> Option<String> {
        (!self.registry_token.is_empty()).then(|| format!("Bearer {}", self.registry_token))
    }

    /// For `Authorization: Basic`.
    pub(crate) fn basic(&self) -> Option<String> {
        let (user, password) = self.user.as_ref()?;
        let text = format!("{user}:{password}");
        let text = base64::engine::general_purpose::STANDARD.encode(text);
        Some(format!("Basic {text}"))
    }

    /// A name for what is known, which tells nothing of it.
    fn fingerprint(&self) -> Digest {
        let (user, password) = self.user.clone().unwrap_or_default();
        let parts = [&user, &password, &self.identity_token];
        let lengths = parts.map(|part| part.len().to_string());
        Digest::of(
            [
                lengths.join(" "),
                user.clone(),
                password.clone(),
                self.identity_token.clone(),
            ]
            .join("\0")
            .as_bytes(),
        )
    }
}

fn decode(auth: &str) -> Option<(String, String)> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(auth.trim())
        .ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    // Docker pads with NULs.
    Some((user.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// Host and port of a server address, which may be a URL with a path.
fn server_of(address: &str) -> String {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.split('/').next().unwrap_or_default().to_owned()
}

/// Docker Hub has many names.
fn canonical(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" | "registry.docker.io" => "docker.io",
        host => host,
    }
}

/// How a token is asked for.
pub(crate) enum TokenRequest {
    /// With `Authorization: Basic`, or without.
    Get(Url, Option<String>),
    /// A form.
    Post(Url, String),
}

/// The request for a token that `challenge` asks for; `None`: credentials may not go there, or there is
/// no such place.
pub(crate) fn token_request(
    realm: &str,
    (service, scope): (&str, &str),
    identity: &Identity,
    registry_is_tls: bool,
) -> Option<TokenRequest> {
    let mut url = Url::parse(realm).ok()?;
    let safe = match url.scheme() {
        "https" => true,
        "http" => !registry_is_tls,
        _ => return None,
    };
    if !url.username().is_empty() || url.password().is_some() {
        return None;
    }
    if !identity.identity_token.is_empty() && safe {
        let mut form = Url::parse("http://form/").ok()?;
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service)
            .append_pair("client_id", "berth")
            .append_pair("scope", scope)
            .append_pair("refresh_token", &identity.identity_token);
        return Some(TokenRequest::Post(
            url,
            form.query().unwrap_or_default().to_owned(),
        ));
    }
    {
        let mut query = url.query_pairs_mut();
        if !service.is_empty() {
            query.append_pair("service", service);
        }
        for scope in scope.split(' ').filter(|scope| !scope.is_empty()) {
            query.append_pair("scope", scope);
        }
        if let Some((user, _)) = identity.user.as_ref().filter(|_| safe) {
            query.append_pair("account", user);
        }
    }
    let basic = identity.basic().filter(|_| safe);
    Some(TokenRequest::Get(url, basic))
}

/// Tokens that are still good, by what they are for and who they were given to.
#[derive(Default)]
pub(crate) struct Tokens(Mutex<HashMap<TokenKey, (String, Instant)>>);

/// What a token is for, and whose it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    realm: String,
    service: String,
    scope: String,
    identity: Digest,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens(hidden)")
    }
}

impl TokenKey {
    /// For what `challenge` asked of who is `identity`.
    pub(crate) fn new(realm: &str, service: &str, scope: &str, identity: &Identity) -> Self {
        Self {
            realm: realm.to_owned(),
            service: service.to_owned(),
            scope: scope.to_owned(),
            identity: identity.fingerprint(),
        }
    }
}

impl Tokens {
    /// A token that is still good.
    pub(crate) fn get(&self, key: &TokenKey) -> Option<String> {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (token, end) = tokens.get(key)?;
        (*end > Instant::now() + MARGIN).then(|| token.clone())
    }

    /// Keeps a token.
    pub(crate) fn put(&self, key: TokenKey, token: String, life: Duration) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        tokens.retain(|_, (_, end)| *end > now);
        if tokens.len() < MAX_TOKENS {
            tokens.insert(key, (token, now + life.min(Duration::from_secs(24 * 3600))));
        }
    }

    /// Forgets a token that was refused.
    pub(crate) fn drop(&self, key: &TokenKey) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.remove(key);
    }
}

/// Token and its life, out of the realm's reply.
pub(crate) fn read_token(body: &[u8]) -> Option<(String, Duration)> {
    #[derive(Deserialize)]
    struct Reply {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let reply: Reply = serde_json::from_slice(body).ok()?;
    let token = reply
        .token
        .into_iter()
        .chain(reply.access_token)
        .find(|token| !token.is_empty())?;
    // What would not fit a header line is no token.
    let sane = token.len() <= 64 * 1024 && token.bytes().all(|byte| byte.is_ascii_graphic());
    let life = reply.expires_in.map_or(DEFAULT_LIFE, Duration::from_secs);
    sane.then_some((token, life))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let bearer = |realm: &str, service: &str, scope: &str| Challenge::Bearer {
            realm: realm.into(),
            service: service.into(),
            scope: scope.into(),
        };
        for (headers, expected) in [
            (vec!["Basic realm=\"x\""], Some(Challenge::Basic)),
            (
                vec![
                    "Bearer realm=\"https://a/t\",service=\"s,1\", scope=\"repository:a/b:pull,push\"",
                ],
                Some(bearer("https://a/t", "s,1", "repository:a/b:pull,push")),
            ),
            (
                vec![
                    "Basic realm=\"x\"",
                    "bearer Realm=\"https://a\\\"b\",error=\"e\"",
                ],
                Some(bearer("https://a\"b", "", "")),
            ),
            (
                vec!["Bearer realm=plain,service=s"],
                Some(bearer("plain", "s", "")),
            ),
            (vec!["Bearer service=\"s\""], None),
            (vec!["Negotiate"], None),
            (vec!["Bearer realm=\"open"], Some(bearer("open", "", ""))),
            (vec![], None),
        ] {
            assert_eq!(
                Challenge::parse(headers.iter().copied()),
                expected,
                "{headers:?}"
            );
        }
    }

    #[test]
    fn credentials_go_where_they_are_meant_to() {
        let given = |server: &str| Credentials {
            username: "u".into(),
            password: "p".into(),
            server_address: server.into(),
            ..Credentials::default()
        };
        for (server, registry, host, own, seen) in [
            ("", "r.io", "mirror", false, true),
            ("r.io", "r.io", "r.io", true, true),
            ("r.io", "r.io", "mirror", false, false),
            ("mirror", "r.io", "mirror", false, true),
            ("mirror", "r.io", "r.io", true, false),
            (
                "https://index.docker.io/v1/",
                "docker.io",
                "registry-1.docker.io",
                true,
                true,
            ),
            ("r.io:5000", "r.io", "r.io", true, false),
        ] {
            let identity = Identity::for_host(Some(&given(server)), registry, host, own);
            assert_eq!(
                identity.basic().is_some(),
                seen,
                "{server} {registry} {host}"
            );
        }
        let auth = Credentials {
            auth: "dTpwOnE=".into(),
            ..Credentials::default()
        };
        let identity = Identity::for_host(Some(&auth), "r", "r", true);
        assert_eq!(identity.user, Some(("u".into(), "p:q".into())));
    }

    #[test]
    fn no_secret_in_the_clear_when_the_registry_has_tls() {
        let secret = Credentials {
            username: "u".into(),
            password: "p".into(),
            identity_token: "i".into(),
            ..Credentials::default()
        };
        let identity = Identity::for_host(Some(&secret), "r", "r", true);
        let about = ("s", "repository:a:pull");
        let ask = |realm: &str, tls| token_request(realm, about, &identity, tls);
        assert!(matches!(
            ask("https://t", true),
            Some(TokenRequest::Post(..))
        ));
        let Some(TokenRequest::Get(url, None)) = ask("http://t", true) else {
            panic!("anonymous")
        };
        assert!(!url.as_str().contains("account"));
        assert!(matches!(
            ask("http://t", false),
            Some(TokenRequest::Post(..))
        ));
        for realm in ["file:///etc/passwd", "https://a:b@t", "nonsense"] {
            assert!(ask(realm, true).is_none());
        }
    }

    #[test]
    fn tokens_are_kept_apart_and_end() {
        let tokens = Tokens::default();
        let one = Identity {
            user: Some(("a".into(), "bc".into())),
            ..Identity::default()
        };
        let two = Identity {
            user: Some(("ab".into(), "c".into())),
            ..Identity::default()
        };
        let key = |identity: &Identity| TokenKey::new("r", "s", "p", identity);
        tokens.put(key(&one), "t".into(), Duration::from_secs(60));
        assert_eq!(tokens.get(&key(&one)).as_deref(), Some("t"));
        assert_eq!(tokens.get(&key(&two)), None);
        tokens.put(key(&two), "t".into(), Duration::from_secs(5));
        assert_eq!(tokens.get(&key(&two)), None);
        assert!(read_token(b"{\"token\":\"a\\nb\"}").is_none());
        assert_eq!(
            read_token(b"{\"token\":\"\",\"access_token\":\"b\"}")
                .unwrap()
                .0,
            "b"
        );
    }
}

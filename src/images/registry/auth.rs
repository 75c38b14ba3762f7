//! Who we are to a registry: challenges, tokens, and to whom credentials may go.
//!
//! ```text
//! GET blob ──401, Bearer realm, service, scope──> realm (password or identity token) ──token──> GET blob
//!            401, Basic ───────────────────────────────────────────────────────────────────> GET blob
//! ```
//!
//! Credentials go to the host that was configured for the registry and to the realm it names itself, never to where one
//! of them redirects; and never in the clear to a realm when the registry itself is spoken to by TLS. To whom a redirect
//! leads we are nobody: what it asks for it gets from its own realm, anonymously, and its token is for it alone.
//! Distribution: "Token Authentication Specification", "Oauth2 Token Authentication".

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use reqwest::Url;
use serde::Deserialize;

use crate::base::image::Credentials;
use crate::images::digest::Digest;
use crate::images::registry::hosts::{Host, HostKind, is_local};

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
    /// The part of `credentials` that `host` may see, when it is asked for images of `registry`. What names no server
    /// goes to mirrors too, but not in the clear.
    pub(crate) fn for_host(credentials: Option<&Credentials>, registry: &str, host: &Host) -> Self {
        let Some(given) = credentials else {
            return Self::default();
        };
        let name = authority(&host.base);
        let clear = host.base.scheme() == "http" && !is_local(&name);
        let meant = server_of(&given.server_address);
        let fits = if meant.is_empty() {
            !(clear && host.kind == HostKind::Mirror)
        } else {
            let own = host.kind == HostKind::Registry;
            let same = meant == name || own && canonical(&meant) == canonical(registry);
            same && !(clear && given.server_address.starts_with("https://"))
        };
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

    /// Is anything known that others must not know?
    pub(crate) fn is_secret(&self) -> bool {
        self.secrets().next().is_some()
    }

    /// Everything that must stand in no message.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = String> {
        let basic = self.basic().map(|basic| basic.replace("Basic ", ""));
        let password = self.user.as_ref().map(|(_, password)| password.clone());
        let tokens = [self.identity_token.clone(), self.registry_token.clone()];
        let all = basic.into_iter().chain(password).chain(tokens);
        all.filter(|secret| !secret.is_empty())
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

/// A realm that is not asked.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRealm {
    /// No http or https URL.
    #[error("names no usable realm: it must be an http or https URL without a user name")]
    Url,
    /// From https to http: neither secrets nor tokens go there.
    #[error(
        "is spoken to by https and names the realm {place} by http: not asked, a token would travel in the clear. Have it name an https realm"
    )]
    Falls {
        /// Name and port.
        place: String,
    },
    /// The secret would leave the machine in the clear.
    #[error(
        "is on this machine and names the realm {place} by http: not asked, the secret would travel in the clear. Have it name an https realm"
    )]
    Leaves {
        /// Name and port.
        place: String,
    },
}

/// The request for a token that a challenge asks for, which came in an answer for `asked`.
///
/// # Errors
///
/// [`BadRealm`]
pub(crate) fn token_request(
    realm: &str,
    (service, scope): (&str, &str),
    identity: &Identity,
    asked: &Url,
) -> Result<TokenRequest, BadRealm> {
    let mut url = Url::parse(realm).map_err(|_no_url| BadRealm::Url)?;
    let named = !url.username().is_empty() || url.password().is_some();
    if named || !url.has_host() || !matches!(url.scheme(), "http" | "https") {
        return Err(BadRealm::Url);
    }
    if url.scheme() == "http" {
        let place = authority(&url);
        let local = |url: &Url| is_local(url.host_str().unwrap_or_default());
        if asked.scheme() == "https" {
            return Err(BadRealm::Falls { place });
        }
        if identity.is_secret() && local(asked) && !local(&url) {
            return Err(BadRealm::Leaves { place });
        }
    }
    if !identity.identity_token.is_empty() {
        let mut form = Url::parse("http://form/").map_err(|_no_url| BadRealm::Url)?;
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service)
            .append_pair("client_id", "berth")
            .append_pair("scope", scope)
            .append_pair("refresh_token", &identity.identity_token);
        return Ok(TokenRequest::Post(
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
        if let Some((user, _)) = &identity.user {
            query.append_pair("account", user);
        }
    }
    Ok(TokenRequest::Get(url, identity.basic()))
}

/// Name and, where it is not the scheme's own, port.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// Tokens that are still good, by what they are for and who they were given to.
#[derive(Default)]
pub(crate) struct Tokens(Mutex<HashMap<TokenKey, (String, Instant)>>);

/// What a token is for, and whose it is.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct TokenKey {
    /// The host that it is shown to.
    holder: String,
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
    /// For what the host `holder` asked of who is `identity`. Hosts that name the same realm get a token each: none sees
    /// what was given for another.
    pub(crate) fn new(
        holder: &Url,
        realm: &str,
        (service, scope): (&str, &str),
        identity: &Identity,
    ) -> Self {
        Self {
            holder: holder.origin().ascii_serialization(),
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

    /// Takes them out of a text.
    pub(crate) fn hide(&self, text: &mut String) {
        let tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (token, _) in tokens.values() {
            hide(text, token);
        }
    }

    /// Forgets a token that was refused.
    pub(crate) fn drop(&self, key: &TokenKey) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.remove(key);
    }
}

/// Takes a secret out of a text that others have written.
pub(crate) fn hide(text: &mut String, secret: &str) {
    // Shorter ones are in every text, and no secret.
    if secret.len() >= 4 && text.contains(secret) {
        *text = text.replace(secret, "(hidden)");
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

    /// As `hosts.toml` of `registry` names it.
    fn mirror(registry: &str, base: &str) -> Host {
        let text = format!("[host.\"{base}\"]");
        crate::images::registry::hosts::read(&text, registry)
            .unwrap()
            .remove(0)
    }

    #[test]
    fn credentials_go_where_they_are_meant_to() {
        let given = |server: &str| Credentials {
            username: "u".into(),
            password: "p".into(),
            server_address: server.into(),
            ..Credentials::default()
        };
        for (server, registry, base, seen) in [
            ("", "r.io", "https://mirror", true),
            ("", "r.io", "http://mirror", false),
            ("", "r.io", "http://127.0.0.1:5000", true),
            ("", "r.io", "http://r.io", true),
            ("r.io", "r.io", "https://r.io", true),
            ("r.io", "r.io", "https://mirror", false),
            ("mirror", "r.io", "https://mirror", true),
            ("mirror", "r.io", "http://mirror", true),
            ("https://mirror", "r.io", "http://mirror", false),
            ("mirror", "r.io", "https://r.io", false),
            (
                "https://index.docker.io/v1/",
                "docker.io",
                "https://registry-1.docker.io",
                true,
            ),
            ("r.io:5000", "r.io", "https://r.io", false),
        ] {
            let identity =
                Identity::for_host(Some(&given(server)), registry, &mirror(registry, base));
            assert_eq!(
                identity.basic().is_some(),
                seen,
                "{server} {registry} {base}"
            );
        }
        let auth = Credentials {
            auth: "dTpwOnE=".into(),
            ..Credentials::default()
        };
        let identity = Identity::for_host(Some(&auth), "r", &mirror("r", "https://r"));
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
        let identity = Identity::for_host(Some(&secret), "r", &mirror("r", "https://r"));
        let about = ("s", "repository:a:pull");
        let ask = |realm: &str, asked: &str| {
            let asked = Url::parse(asked).unwrap();
            let nobody = Identity::default();
            [&identity, &nobody].map(|identity| token_request(realm, about, identity, &asked))
        };
        let [post, get] = ask("https://t", "https://r");
        assert!(matches!(post, Ok(TokenRequest::Post(..))));
        let Ok(TokenRequest::Get(url, None)) = get else {
            panic!("anonymous")
        };
        assert!(!url.as_str().contains("account"));
        // Anonymous tokens do not travel in the clear either.
        for asked in ask("http://t:81", "https://r") {
            let place = "t:81".to_owned();
            assert_eq!(asked.err(), Some(BadRealm::Falls { place }));
        }
        assert!(ask("http://t", "http://r").iter().all(Result::is_ok));
        assert!(
            ask("http://localhost:1", "http://127.0.0.1:2")
                .iter()
                .all(Result::is_ok)
        );
        let [with, without] = ask("http://t", "http://localhost:5000");
        assert!(matches!(with, Err(BadRealm::Leaves { .. })) && without.is_ok());
        for realm in [
            "file:///etc/passwd",
            "https://a:b@t",
            "https://a@t",
            "nonsense",
            "/token",
            "//t/token",
        ] {
            assert!(
                ask(realm, "https://r")
                    .into_iter()
                    .all(|asked| asked.err() == Some(BadRealm::Url))
            );
        }
    }

    #[test]
    fn secrets_are_taken_out_of_what_others_say() {
        let given = Credentials {
            auth: "dXNlcjpwYXNzd29yZA==".into(),
            registry_token: "tok-en".into(),
            ..Credentials::default()
        };
        let identity = Identity::for_host(Some(&given), "r", &mirror("r", "https://r"));
        let mut text = "no: password, dXNlcjpwYXNzd29yZA==, tok-en".to_owned();
        identity
            .secrets()
            .for_each(|secret| hide(&mut text, &secret));
        assert_eq!(text, "no: (hidden), (hidden), (hidden)");
        assert!(!Identity::default().is_secret());
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
        let url = |host: &str| Url::parse(&format!("https://{host}")).unwrap();
        let of = |host, identity: &Identity| TokenKey::new(&url(host), "r", ("s", "p"), identity);
        let key = |identity: &Identity| of("h", identity);
        tokens.put(key(&one), "t".into(), Duration::from_secs(60));
        assert_eq!(tokens.get(&key(&one)).as_deref(), Some("t"));
        assert_eq!(tokens.get(&key(&two)), None);
        assert_eq!(tokens.get(&of("h:444", &one)), None);
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

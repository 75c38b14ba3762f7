//! Where images of a registry are got from: `hosts.toml` under a `certs.d` directory, as containerd
//! reads it. Read anew for each pull, so a change counts at once.
//!
//! ```text
//! certs.d/<host>_<port>_/hosts.toml   (or <host>:<port>, or <host>; then _default)
//!
//! server = "https://registry-1.example.org"     # asked last; absent: the registry itself
//! [host."https://mirror.example.org/v2/sub"]    # asked in the order of the file
//!   capabilities = ["pull", "resolve"]
//!   override_path = true                        # the path is complete, no /v2 is added
//!   ca = "ca.pem"                               # one, or a list; from the directory of the file
//!   client = [["client.cert", "client.key"]]
//!   skip_verify = false
//!   dial_timeout = "5s"
//!   local_targets = ["127.0.0.1:5001"]          # berth's own: its realms and redirects may lead there though
//!                                               # that is on the loopback or link-local
//!   [host."https://mirror.example.org/v2/sub".header]
//!     x-tenant = "one"
//! ```
//!
//! Without a `hosts.toml`, `*.crt` in the directory are authorities and `*.cert` with `*.key` client
//! certificates, as Docker has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;
use serde::Deserialize;
use toml::Spanned;

use crate::images::error::ImageError;

/// One place that images of a registry can be got from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    /// Base of the API, `/v2` included, without a slash at its end.
    pub(crate) base: Url,
    /// May tell what a tag means.
    pub(crate) resolve: bool,
    /// May give content.
    pub(crate) pull: bool,
    /// How to connect.
    pub(crate) tls: Tls,
    /// Sent with every request.
    pub(crate) headers: Vec<(String, String)>,
    /// For a connection to be there.
    pub(crate) dial_timeout: Option<Duration>,
    /// What it is to the registry.
    pub(crate) kind: HostKind,
    /// What its realms and redirects may lead to, however near that is.
    pub(crate) local_targets: Vec<LocalTarget>,
}

/// What a host is to the registry that images are named after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    /// The registry itself.
    Registry,
    /// The `server` that stands for it, or a `[host]` of its name.
    Server,
    /// A `[host]` of another name.
    Mirror,
}

/// A place that `hosts.toml` lets a host lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LocalTarget {
    /// Name or address as URLs have it.
    host: String,
    /// Absent: any.
    port: Option<u16>,
}

impl LocalTarget {
    /// `name`, `name:port`, `[v6]:port`; `None`: none of these.
    fn parse(text: &str) -> Option<Self> {
        let [one, other] = ["http", "https"].map(|scheme| {
            let url = Url::parse(&format!("{scheme}://{text}")).ok()?;
            let plain = url.username().is_empty() && url.password().is_none() && url.path() == "/";
            (plain && url.query().is_none() && url.fragment().is_none()).then_some(url)
        });
        let (one, other) = (one?, other?);
        Some(Self {
            host: one.host_str()?.to_owned(),
            // Each scheme leaves out its own.
            port: one.port().or(other.port()),
        })
    }

    /// Does the URL lead there?
    pub(crate) fn is(&self, url: &Url) -> bool {
        let port = url.port_or_known_default();
        url.host_str() == Some(&self.host) && (self.port.is_none() || port == self.port)
    }
}

/// How a connection is secured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tls {
    /// Take any certificate.
    pub(crate) skip_verify: bool,
    /// Authorities besides the machine's.
    pub(crate) ca: Vec<PathBuf>,
    /// (certificate, key); without a key it is in the certificate's file.
    pub(crate) client: Vec<(PathBuf, Option<PathBuf>)>,
}

#[derive(Debug, Default, Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: BTreeMap<String, Spanned<Section>>,
    #[serde(flatten)]
    own: Section,
}

#[derive(Debug, Default, Deserialize)]
struct Section {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: BTreeMap<String, OneOrMany>,
    override_path: Option<bool>,
    dial_timeout: Option<String>,
    #[serde(default)]
    local_targets: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

impl OneOrMany {
    fn list(&self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one.clone()],
            Self::Many(many) => many.clone(),
        }
    }
}

/// Is this name or address (with or without port) the machine itself?
pub(crate) fn is_local(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let loopback = |address: std::net::IpAddr| address.is_loopback();
    host == "localhost" || host.parse().is_ok_and(loopback)
}

/// The places for `registry`, in the order in which they are to be asked.
///
/// Blocks on the disk.
///
/// # Errors
///
/// [`ImageError::HostsFile`]: a file cannot be used.
pub(crate) fn load(directories: &[PathBuf], registry: &str) -> Result<Vec<Host>, ImageError> {
    let Some(directory) = directory_of(directories, registry) else {
        return Ok(vec![itself(
            registry,
            None,
            &Section::default(),
            Path::new(""),
        )?]);
    };
    let path = directory.join("hosts.toml");
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text, registry, &path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut host = itself(registry, None, &Section::default(), &path)?;
            host.tls = docker_certificates(&directory);
            Ok(vec![host])
        }
        Err(error) => Err(bad(&path, format!("cannot be read: {error}"))),
    }
}

fn directory_of(directories: &[PathBuf], registry: &str) -> Option<PathBuf> {
    let mut names = vec![];
    if let Some((host, port)) = registry.rsplit_once(':')
        && !port.ends_with(']')
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    // The registry's own entry counts before `_default`, wherever it is.
    let places = names
        .iter()
        .flat_map(|name| directories.iter().map(move |top| top.join(name)));
    places.into_iter().find(|path| path.is_dir())
}

fn bad(path: &Path, reason: impl Into<String>) -> ImageError {
    ImageError::HostsFile {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

fn parse(text: &str, registry: &str, path: &Path) -> Result<Vec<Host>, ImageError> {
    let file: File = toml::from_str(text).map_err(|error| bad(path, words(text, &error)))?;
    let mut sections: Vec<_> = file.host.iter().collect();
    sections.sort_by_key(|(_, section)| section.span().start);
    let mut hosts = vec![];
    for (url, section) in sections {
        let section = section.get_ref();
        let base = base_of(url, section)
            .map_err(|reason| bad(path, format!("host {:?}: {reason}", shown(url))))?;
        let mut host = host_of(base, section, registry, path)?;
        let name = |url: &Url| url.host_str().map(str::to_owned);
        let same =
            Url::parse(&default_url(registry)).is_ok_and(|own| name(&own) == name(&host.base));
        if !same {
            host.kind = HostKind::Mirror;
        }
        hosts.push(host);
    }
    hosts.push(itself(registry, file.server.as_deref(), &file.own, path)?);
    Ok(hosts)
}

/// What is wrong with a file and on which line; nothing of what it holds, for headers may be secrets.
fn words(text: &str, error: &toml::de::Error) -> String {
    let at = error.span().map_or(0, |span| span.start);
    let line = text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
    let message = error.message();
    // Values stand between quotation marks, which they may hold too.
    let message = match (message.find('"'), message.rfind('"')) {
        (Some(first), Some(last)) => {
            format!("{}(a text){}", &message[..first], &message[last + 1..])
        }
        _ => message.to_owned(),
    };
    format!("line {line}: {message}")
}

/// A URL without what may be a secret in it.
fn shown(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let Some((_user, place)) = authority.rsplit_once('@') else {
        return url.to_owned();
    };
    format!("{scheme}://(hidden)@{place}")
}

/// The registry, or the server that stands for it.
fn itself(
    registry: &str,
    server: Option<&str>,
    section: &Section,
    path: &Path,
) -> Result<Host, ImageError> {
    let default = default_url(registry);
    let url = server.unwrap_or(&default);
    let base = base_of(url, section)
        .map_err(|reason| bad(path, format!("server {:?}: {reason}", shown(url))))?;
    let mut host = host_of(base, section, registry, path)?;
    if server.is_none() {
        host.kind = HostKind::Registry;
    }
    Ok(host)
}

fn default_url(registry: &str) -> String {
    match registry {
        "docker.io" => "https://registry-1.docker.io".to_owned(),
        registry if is_local(registry) => format!("http://{registry}"),
        registry => format!("https://{registry}"),
    }
}

fn base_of(url: &str, section: &Section) -> Result<Url, String> {
    let complete = match url.contains("://") {
        true => url.to_owned(),
        false => {
            let authority = url.split('/').next().unwrap_or_default();
            let scheme = if is_local(authority) { "http" } else { "https" };
            format!("{scheme}://{url}")
        }
    };
    let mut base = Url::parse(&complete).map_err(|error| error.to_string())?;
    if !matches!(base.scheme(), "http" | "https") || !base.has_host() {
        return Err("must be an http or https URL".to_owned());
    }
    if !base.username().is_empty() || base.password().is_some() {
        return Err("must not hold credentials".to_owned());
    }
    base.set_query(None);
    base.set_fragment(None);
    if base.host_str() == Some("docker.io") {
        // Where the API is; the name itself is a web site.
        base.set_host(Some("registry-1.docker.io"))
            .map_err(|error| error.to_string())?;
    }
    let mut path = base.path().trim_end_matches('/').to_owned();
    if !section.override_path.unwrap_or(false) && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    base.set_path(&path);
    Ok(base)
}

fn host_of(base: Url, section: &Section, registry: &str, path: &Path) -> Result<Host, ImageError> {
    let can = |what: &str| match &section.capabilities {
        None => true,
        Some(list) => list.iter().any(|have| have == what),
    };
    let directory = path.parent().unwrap_or(path);
    let place = |name: &String| directory.join(name);
    let client = match &section.client {
        None => vec![],
        Some(Client::One(one)) => vec![(place(one), None)],
        Some(Client::Many(many)) => many.iter().map(|one| (place(one), None)).collect(),
        Some(Client::Pairs(pairs)) => {
            let pair = |pair: &Vec<String>| match &pair[..] {
                [one] => Ok((place(one), None)),
                [certificate, key] if key.is_empty() => Ok((place(certificate), None)),
                [certificate, key] => Ok((place(certificate), Some(place(key)))),
                _ => Err(bad(path, "client: each entry must be [certificate, key]")),
            };
            pairs.iter().map(pair).collect::<Result<_, _>>()?
        }
    };
    let dial_timeout = match &section.dial_timeout {
        None => None,
        Some(text) => Some(
            duration(text)
                .ok_or_else(|| bad(path, format!("dial_timeout: {text:?} is not like 5s")))?,
        ),
    };
    let local_targets = section.local_targets.iter().map(|text| {
        LocalTarget::parse(text).ok_or_else(|| {
            let mend =
                "write a name or an address, with a port if only that is meant: 127.0.0.1:5001";
            bad(path, format!("local_targets: {text:?} is no place: {mend}"))
        })
    });
    let local_targets = local_targets.collect::<Result<_, _>>()?;
    let headers = section.header.iter().flat_map(|(name, values)| {
        values
            .list()
            .into_iter()
            .map(move |value| (name.clone(), value))
    });
    let default = Url::parse(&default_url(registry)).ok();
    let authority = |url: &Url| {
        (
            url.host_str().map(str::to_owned),
            url.port_or_known_default(),
        )
    };
    Ok(Host {
        kind: match default.is_some_and(|own| authority(&own) == authority(&base)) {
            true => HostKind::Registry,
            false => HostKind::Server,
        },
        resolve: can("resolve"),
        pull: can("pull"),
        tls: Tls {
            skip_verify: section.skip_verify.unwrap_or(false),
            ca: section
                .ca
                .iter()
                .flat_map(OneOrMany::list)
                .map(|name| place(&name))
                .collect(),
            client,
        },
        headers: headers.collect(),
        dial_timeout,
        local_targets,
        base,
    })
}

/// As Go writes durations: `1m30s`, `500ms`.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        let unit_end = rest[digits..]
            .find(|c: char| c.is_ascii_digit())
            .map_or(rest.len(), |length| digits + length);
        let unit = match &rest[digits..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        total += Duration::try_from_secs_f64(number * unit).ok()?;
        rest = &rest[unit_end..];
    }
    (!text.is_empty()).then_some(total)
}

fn docker_certificates(directory: &Path) -> Tls {
    let mut tls = Tls::default();
    let Ok(entries) = std::fs::read_dir(directory) else {
        return tls;
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = key.exists().then_some(key);
                tls.client.push((path, key));
            }
            _ => {}
        }
    }
    tls.ca.sort();
    tls.client.sort();
    tls
}

/// A text as a file would have it.
///
/// # Errors
///
/// [`ImageError::HostsFile`]
#[cfg(test)]
pub(crate) fn read(text: &str, registry: &str) -> Result<Vec<Host>, ImageError> {
    parse(text, registry, Path::new("/c/r/hosts.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    #[test]
    fn the_order_of_the_file_and_every_key() {
        let text = r#"
            server = "https://registry.k8s.io"
            capabilities = ["pull"]
            [host."https://z.example/v2/sub"]
              capabilities = ["pull", "resolve"]
              override_path = true
              skip_verify = true
              ca = ["one.pem", "/etc/two.pem"]
              client = [["c.cert", "c.key"], ["d.pem", ""]]
              dial_timeout = "1m500ms"
              unknown = 1
            [host."https://z.example/v2/sub".header]
              x-a = ["1", "2"]
              x-b = "3"
            [host."http://a.example:5000"]
            [host."localhost:5001"]
              client = "one.pem"
        "#;
        let hosts = read(text, "registry.k8s.io").unwrap();
        let expected = [
            "https://z.example/v2/sub",
            "http://a.example:5000/v2",
            "http://localhost:5001/v2",
            "https://registry.k8s.io/v2",
        ];
        assert_eq!(bases(&hosts), expected);
        let first = &hosts[0];
        assert!(
            first.resolve && first.pull && first.kind == HostKind::Mirror && first.tls.skip_verify
        );
        assert_eq!(
            first.tls.ca,
            [Path::new("/c/r/one.pem"), Path::new("/etc/two.pem")]
        );
        assert_eq!(first.tls.client[1], ("/c/r/d.pem".into(), None));
        assert_eq!(first.headers.len(), 3);
        assert_eq!(first.dial_timeout, Some(Duration::from_millis(60_500)));
        let last = &hosts[3];
        assert!(last.kind == HostKind::Registry && last.pull && !last.resolve);
    }

    #[test]
    fn defaults() {
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("r.io:5000", "https://r.io:5000/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1:1", "http://127.0.0.1:1/v2"),
            ("[::1]:1", "http://[::1]:1/v2"),
        ] {
            let hosts = load(&[], registry).unwrap();
            assert_eq!(bases(&hosts), [base]);
            assert_eq!(hosts[0].kind, HostKind::Registry);
        }
    }

    #[test]
    fn directories_are_found_and_read_anew() {
        let place = tempfile::tempdir().unwrap();
        let paths = [place.path().join("absent"), place.path().to_owned()];
        let put = |name: &str, server: &str| {
            let directory = place.path().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            let text = format!("server = \"https://{server}\"");
            let path = directory.join("hosts.toml");
            crate::store::write_atomic(
                &path,
                text.as_bytes(),
                0o600,
                crate::store::Durability::Process,
            )
            .unwrap();
        };
        let server = |registry: &str| load(&paths, registry).unwrap()[0].base.to_string();
        assert_eq!(server("r.io:5000"), "https://r.io:5000/v2");
        for (name, at) in [
            ("_default", "d"),
            ("r.io:5000", "colon"),
            ("r.io_5000_", "port"),
        ] {
            put(name, at);
            assert_eq!(server("r.io:5000"), format!("https://{at}/v2"));
        }
        assert_eq!(server("other"), "https://d/v2");
        std::fs::create_dir(place.path().join("docker")).unwrap();
        for file in ["b.crt", "c.cert", "c.key", "x.txt"] {
            std::fs::File::create(place.path().join("docker").join(file)).unwrap();
        }
        let tls = &load(&paths, "docker").unwrap()[0].tls;
        assert_eq!((tls.ca.len(), tls.client.len()), (1, 1));
        assert!(tls.client[0].1.is_some());
    }

    #[test]
    fn places_that_a_host_may_lead_to() {
        let text = "[host.\"https://a\"]\nlocal_targets = [\"127.1:5001\", \"Auth.Local\", \"[::1]:443\", \"b:80\"]";
        let hosts = read(text, "r").unwrap();
        let may = |url: &str| {
            let url = Url::parse(url).unwrap();
            hosts[0].local_targets.iter().any(|target| target.is(&url))
        };
        for url in [
            "http://127.0.0.1:5001/x",
            "https://auth.local/",
            "http://auth.local:9",
            "https://[::1]/",
            "http://b/",
        ] {
            assert!(may(url), "{url}");
        }
        for url in [
            "http://127.0.0.1/",
            "http://[::1]/",
            "https://b/",
            "https://x.auth.local/",
        ] {
            assert!(!may(url), "{url}");
        }
        assert!(hosts[1].local_targets.is_empty());
        for bad in ["", "a/b", "u@a", "http://a", "a:99999", "a?b", "a b"] {
            let text = format!("local_targets = [\"{bad}\"]");
            let error = read(&text, "r").unwrap_err().to_string();
            assert!(error.contains("local_targets: "), "{bad}: {error}");
        }
    }

    #[test]
    fn no_error_tells_a_secret() {
        for text in [
            "[host.\"https://user:s3cret@a\"]",
            "server = \"https://s3cret@a/v2\"",
            "[host.\"https://a\".header]\nauthorization = \"Basic s3cret",
            "[host.\"https://a\".header]\nauthorization = 's3cret' x",
            "[host.\"https://a\"]\nheader = \"Bearer s3cret\"",
            "[host.\"https://a\"]\nskip_verify = \"s3\\\"s3cret\"",
        ] {
            let error = read(text, "r").unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
            assert!(
                error.contains("line ") || error.contains("(hidden)@a"),
                "{error}"
            );
        }
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_its_file() {
        for bad in [
            "server = 1",
            "[host.\"ftp://a\"]",
            "[host.\"https://user:secret@a\"]",
            "[host.\"https://a\"]\ndial_timeout = \"soon\"",
            "[host.\"https://a\"]\nclient = [[\"a\",\"b\",\"c\"]]",
            "[",
        ] {
            let error = read(bad, "r").unwrap_err().to_string();
            assert!(error.starts_with("/c/r/hosts.toml: "), "{error}");
        }
    }
}

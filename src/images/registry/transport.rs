//! Connections on behalf of one host: TLS with the machine's authorities and the host's own, proxies from the
//! environment (never for the machine itself), no redirect followed unseen, no name believed that leads too near.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::redirect::Policy;
use reqwest::{Client, Url};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::images::error::ImageError;
use crate::images::registry::hosts::{Host, LocalTarget, Tls, is_local};
use crate::images::registry::reach::{Guard, Home, Near, is_localhost, literal};

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// How a URL is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Route {
    /// Directly; its name must not lead too near.
    Guarded,
    /// Directly, wherever that is: `hosts.toml` names it.
    Listed,
    /// Through a proxy, which resolves the name.
    Proxy,
}

/// Whom we show that we are a client of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// The host, and the realm it names: they see the client certificate.
    Client,
    /// Whoever else it leads to.
    Stranger,
}

/// Why there is no connection to a URL.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoRoute {
    /// It leads too near.
    #[error("it is {0}")]
    Near(Near),
    /// Certificates cannot be used any more.
    #[error(transparent)]
    Tls(ImageError),
    /// The parts of a client do not fit together.
    #[error("no client for it: {0}")]
    Client(#[from] reqwest::Error),
}

/// What connects for one host.
pub(crate) struct Clients {
    tls: Tls,
    dial_timeout: Duration,
    home: Arc<Home>,
    local_targets: Vec<LocalTarget>,
    proxies: Matcher,
    made: Mutex<Made>,
}

/// What is made once it is needed.
struct Made {
    /// With the client certificate, and without.
    tls: [ClientConfig; 2],
    /// They know the machine's authorities.
    rooted: bool,
    /// Each has its own connections; the last part of the key: for https.
    clients: HashMap<(Role, Route, bool), Client>,
}

impl Clients {
    /// For what `host` is and leads to.
    ///
    /// Blocks on the disk: it reads certificates.
    ///
    /// # Errors
    ///
    /// [`ImageError::HostsFile`]: a certificate or key cannot be used.
    pub(crate) fn new(host: &Host) -> Result<Self, ImageError> {
        let rooted = host.base.scheme() == "https";
        let made = Made {
            tls: tls_configs(&host.tls, rooted)?,
            rooted,
            clients: HashMap::new(),
        };
        Ok(Self {
            tls: host.tls.clone(),
            dial_timeout: host.dial_timeout.unwrap_or(DIAL_TIMEOUT),
            home: Arc::new(Home::of(&host.base)),
            local_targets: host.local_targets.clone(),
            proxies: Matcher::from_system(),
            made: Mutex::new(made),
        })
    }

    /// What connects to a URL; its connections are the host's own while it has the role of a client.
    ///
    /// Blocks on the disk when a host of plain http leads to https first.
    ///
    /// # Errors
    ///
    /// [`NoRoute`].
    pub(crate) fn reach(&self, url: &Url, role: Role) -> Result<Client, NoRoute> {
        let route = self.route(url);
        let near = match literal(url) {
            Some(address) => Near::of(address),
            None => url
                .host_str()
                .filter(|name| route == Route::Proxy && is_localhost(name))
                .map(|_| Near::Loopback),
        };
        if let Some(near) = near.filter(|near| !self.listed(url) && !self.home.permits(*near)) {
            return Err(NoRoute::Near(near));
        }
        self.client(role, route, url.scheme() == "https")
    }

    /// The host itself has answered a request for this URL from this address.
    pub(crate) fn arrived(&self, url: &Url, from: Option<SocketAddr>) {
        let from = from.filter(|_| self.route(url) != Route::Proxy);
        self.home.arrived(from.and_then(|from| Near::of(from.ip())));
    }

    fn listed(&self, url: &Url) -> bool {
        self.local_targets.iter().any(|target| target.is(url))
    }

    fn route(&self, url: &Url) -> Route {
        let local = url.host_str().is_some_and(is_local);
        let uri = url.as_str().parse::<http::Uri>();
        if !local && uri.is_ok_and(|uri| self.proxies.intercept(&uri).is_some()) {
            Route::Proxy
        } else if self.listed(url) {
            Route::Listed
        } else {
            Route::Guarded
        }
    }

    fn client(&self, role: Role, route: Route, https: bool) -> Result<Client, NoRoute> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a certificate of ours there is nothing that a stranger might see.
        let role = match self.tls.client.is_empty() {
            true => Role::Stranger,
            false => role,
        };
        if let Some(client) = made.clients.get(&(role, route, https)) {
            return Ok(client.clone());
        }
        if https && !made.rooted {
            made.tls = tls_configs(&self.tls, true).map_err(NoRoute::Tls)?;
            made.rooted = true;
        }
        let [with, without] = &made.tls;
        let tls = match role {
            Role::Client => with.clone(),
            Role::Stranger => without.clone(),
        };
        let builder = Client::builder()
            .tls_backend_preconfigured(tls)
            .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            .referer(false)
            .connect_timeout(self.dial_timeout)
            .http1_only();
        let builder = match route {
            Route::Guarded => builder
                .no_proxy()
                .dns_resolver(Guard::new(self.home.clone())),
            Route::Listed => builder.no_proxy(),
            Route::Proxy => builder,
        };
        let client = builder.build()?;
        made.clients.insert((role, route, https), client.clone());
        Ok(client)
    }
}

fn bad(path: &Path, reason: impl ToString) -> ImageError {
    ImageError::HostsFile {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// With the client certificate, and without.
fn tls_configs(tls: &Tls, needed: bool) -> Result<[ClientConfig; 2], ImageError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(Path::new("TLS"), error))?;
    let builder = if tls.skip_verify {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(roots(tls, needed)?)
    };
    let without = builder.clone().with_no_client_auth();
    let Some((certificate, key)) = tls.client.first() else {
        return Ok([without.clone(), without]);
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(certificate, error))?;
    let key_path = key.as_ref().unwrap_or(certificate);
    let key = PrivateKeyDer::from_pem_file(key_path).map_err(|error| bad(key_path, error))?;
    let with = builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| bad(certificate, error))?;
    Ok([with, without])
}

fn roots(tls: &Tls, needed: bool) -> Result<RootCertStore, ImageError> {
    let mut roots = RootCertStore::empty();
    if needed {
        // What of the machine's store cannot be read does not count; the others do.
        for certificate in rustls_native_certs::load_native_certs().certs {
            let _odd = roots.add(certificate).is_err();
        }
    }
    for path in &tls.ca {
        let certificates = CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| bad(path, error))?;
        for certificate in certificates {
            roots.add(certificate).map_err(|error| bad(path, error))?;
        }
    }
    Ok(roots)
}

/// `skip_verify`: whoever answers is believed. Signatures of the handshake are checked all the same.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

//! TLS of the server: which certificate it shows, which clients it asks for one, what it speaks.
//!
//! Files are read when the server starts, and again at the first connection after one of them has changed: nothing
//! polls. What cannot be used then is logged once, and the server goes on with what it had. Without files it has a
//! certificate of its own, whose key lives only in its memory. Sessions are not resumed: a new connection is always
//! judged by the files of now.

mod self_signed;
#[cfg(test)]
mod tests;

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{
    InconsistentKeys, RootCertStore, ServerConfig, SupportedCipherSuite, SupportedProtocolVersion,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::base::error::chain;

/// What the server is to do about TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsOptions {
    /// Its certificate. Absent: one of its own, made when it starts.
    pub(crate) pair: Option<TlsPair>,
    /// PEM file of the authorities by one of which a client's certificate must be signed. Absent: clients need none.
    pub(crate) client_ca: Option<PathBuf>,
    /// TLS 1.3 only; else 1.2 too.
    pub(crate) only_13: bool,
    /// The cipher suites to speak, by their IANA names. Empty: all that are built in.
    pub(crate) cipher_suites: Vec<String>,
}

/// Files of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TlsPair {
    /// PEM: the server's certificate, then those between it and its authority.
    pub(crate) certificate: PathBuf,
    /// PEM: its private key (PKCS #8, PKCS #1 or SEC1).
    pub(crate) key: PathBuf,
}

/// The option that an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TlsSetting {
    /// [`TlsPair::certificate`]
    Certificate,
    /// [`TlsPair::key`]
    Key,
    /// [`TlsOptions::client_ca`]
    ClientCa,
    /// [`TlsOptions::cipher_suites`]
    CipherSuites,
}

/// Why TLS cannot be as the options say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file is not there, or not for us.
    #[error("read {}", path.display())]
    Read {
        /// Of which option.
        setting: TlsSetting,
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file has something else in it.
    #[error("{}: {reason}", path.display())]
    Content {
        /// Of which option.
        setting: TlsSetting,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Cipher suites with which nobody could connect.
    #[error("{reason}")]
    CipherSuites {
        /// What is wrong, and what there is.
        reason: String,
    },
    /// The random numbers for a certificate of our own were not to be had.
    #[error("make a certificate")]
    Own,
}

impl TlsError {
    /// The option that is wrong; absent: none of them is.
    pub(crate) fn setting(&self) -> Option<TlsSetting> {
        match self {
            Self::Read { setting, .. } | Self::Content { setting, .. } => Some(*setting),
            Self::CipherSuites { .. } => Some(TlsSetting::CipherSuites),
            Self::Own => None,
        }
    }
}

impl TlsOptions {
    /// Checks the options and the files they name, as far as that can be done without a client.
    ///
    /// Blocks on the disk.
    ///
    /// # Errors
    /// [`TlsError`].
    pub(crate) fn check(&self) -> Result<(), TlsError> {
        Tls::new(self.clone(), IpAddr::V4(Ipv4Addr::LOCALHOST)).map(drop)
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        let pair = self.pair.iter();
        let pair = pair.flat_map(|pair| [pair.certificate.as_path(), pair.key.as_path()]);
        pair.chain(self.client_ca.as_deref())
    }

    /// Which files there are now, and of when. Compared, never read: a file that was replaced or written has another.
    fn stamps(&self) -> Vec<Option<Stamp>> {
        let stamp = |path| std::fs::metadata(path).ok().map(|found| Stamp::of(&found));
        self.files().map(stamp).collect()
    }
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    /// Moves even where a copy keeps the time of its original.
    changed: (i64, i64),
}

impl Stamp {
    fn of(found: &std::fs::Metadata) -> Self {
        Self {
            file: (found.dev(), found.ino()),
            size: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// TLS of a running server.
#[derive(Debug)]
pub(super) struct Tls {
    options: TlsOptions,
    /// The certificate where no files are named.
    own: Option<CertifiedKey>,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    config: Arc<ServerConfig>,
    /// Of the files when they were last read, be it in vain.
    stamps: Vec<Option<Stamp>>,
}

impl Tls {
    /// For a server that listens on this address. Blocks on the disk.
    ///
    /// # Errors
    /// [`TlsError`].
    pub(super) fn new(options: TlsOptions, address: IpAddr) -> Result<Self, TlsError> {
        let own = match options.pair {
            Some(_) => None,
            None => Some(own(address)?),
        };
        // Before the files are read: what changes meanwhile is seen at the next connection.
        let stamps = options.stamps();
        let config = Arc::new(server_config(&options, own.as_ref())?);
        let now = Mutex::new(Now { config, stamps });
        Ok(Self { options, own, now })
    }

    /// What counts for a connection now. Blocks on the disk: for a few `stat`s, and for as many small files where one
    /// has changed.
    fn current(&self) -> Arc<ServerConfig> {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = self.options.stamps();
        if stamps != now.stamps {
            now.stamps = stamps;
            match server_config(&self.options, self.own.as_ref()) {
                Ok(config) => {
                    tracing::info!(
                        "streaming server: certificates have changed and are read again"
                    );
                    now.config = Arc::new(config);
                }
                Err(error) => tracing::warn!(
                    error = chain(&error),
                    "streaming server: certificates have changed and cannot be used; those of before go on"
                ),
            }
        }
        now.config.clone()
    }

    /// Shakes hands with a client. `None`: it did not within `limit`, or one of both refused the other.
    async fn accept(&self, socket: TcpStream, limit: Duration) -> Option<TlsStream<TcpStream>> {
        let handshake = TlsAcceptor::from(self.current()).accept(socket);
        match tokio::time::timeout(limit, handshake).await {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "streaming connection: no TLS");
                None
            }
            Err(_elapsed) => {
                tracing::debug!("streaming connection: no TLS in time");
                None
            }
        }
    }
}

/// A client's connection, encrypted or not.
#[derive(Debug)]
pub(super) enum Wire {
    /// As it is.
    Plain(TcpStream),
    /// After the handshake.
    Encrypted(Box<TlsStream<TcpStream>>),
}

impl Wire {
    /// Begins a connection: with a handshake where there is TLS. `None`: that failed, or took longer than `limit`.
    pub(super) async fn open(
        socket: TcpStream,
        tls: Option<&Tls>,
        limit: Duration,
    ) -> Option<Self> {
        match tls {
            None => Some(Self::Plain(socket)),
            Some(tls) => {
                let stream = tls.accept(socket, limit).await?;
                Some(Self::Encrypted(Box::new(stream)))
            }
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Self::Encrypted(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Self::Encrypted(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_write_vectored(context, slices),
            Self::Encrypted(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(socket) => socket.is_write_vectored(),
            Self::Encrypted(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_flush(context),
            Self::Encrypted(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Self::Encrypted(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// A certificate of our own for whatever a client on the node may call the server.
fn own(address: IpAddr) -> Result<CertifiedKey, TlsError> {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy();
    let mut addresses = vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    if !addresses.contains(&address) {
        addresses.push(address);
    }
    let (certificate, key) =
        self_signed::make(&["localhost", &host], &addresses).map_err(|_no_random| TlsError::Own)?;
    CertifiedKey::from_der(vec![certificate], key, &ring::default_provider())
        .map_err(|_own_key| TlsError::Own)
}

fn server_config(
    options: &TlsOptions,
    own: Option<&CertifiedKey>,
) -> Result<ServerConfig, TlsError> {
    let mut provider = ring::default_provider();
    let versions: &[&'static SupportedProtocolVersion] = match options.only_13 {
        true => &[&TLS13],
        false => &[&TLS13, &TLS12],
    };
    if !options.cipher_suites.is_empty() {
        provider.cipher_suites = named(&options.cipher_suites, &provider.cipher_suites)?;
    }
    let certified = match (&options.pair, own) {
        (Some(pair), _) => certified(pair, &provider)?,
        (None, Some(own)) => own.clone(),
        (None, None) => return Err(TlsError::Own),
    };
    let usable = |suite: &&SupportedCipherSuite| {
        versions.contains(&suite.version())
            && suite.usable_for_signature_algorithm(certified.key.algorithm())
    };
    if provider.cipher_suites.iter().find(usable).is_none() {
        let reason = format!(
            "none of these goes with the least TLS version and the certificate's key ({:?}): add one of {}",
            certified.key.algorithm(),
            names(ring::ALL_CIPHER_SUITES.iter().filter(usable)),
        );
        return Err(TlsError::CipherSuites { reason });
    }
    let provider = Arc::new(provider);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(|error| TlsError::CipherSuites {
            reason: error.to_string(),
        })?;
    let builder = match &options.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(authorities(path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|error| content(TlsSetting::ClientCa, path, error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // The upgrade to SPDY or WebSocket is one of HTTP/1.1.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn content(setting: TlsSetting, path: &Path, reason: impl ToString) -> TlsError {
    TlsError::Content {
        setting,
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// Most bytes of a file: all public authorities together need a fifth of it.
const MAX_FILE: u64 = 1 << 20;

fn read(setting: TlsSetting, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        setting,
        path: path.to_owned(),
        source,
    };
    // Before it is opened: a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(content(setting, path, "it is no regular file"));
    }
    let mut text = Vec::new();
    let mut file = std::fs::File::open(path)
        .map_err(failed)?
        .take(MAX_FILE + 1);
    if file.read_to_end(&mut text).map_err(failed)? as u64 > MAX_FILE {
        return Err(content(
            setting,
            path,
            format!("it has more than {MAX_FILE} bytes"),
        ));
    }
    Ok(text)
}

/// Whether everybody on the node may read a private key.
fn is_open_to_all(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o004 != 0)
}

fn certificates(
    setting: TlsSetting,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = read(setting, path)?;
    let found = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(setting, path, error))?;
    match found.is_empty() {
        true => Err(content(setting, path, "there is no PEM certificate in it")),
        false => Ok(found),
    }
}

fn certified(pair: &TlsPair, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(TlsSetting::Certificate, &pair.certificate)?;
    let in_key = |reason: String| content(TlsSetting::Key, &pair.key, reason);
    let key = PrivateKeyDer::from_pem_slice(&read(TlsSetting::Key, &pair.key)?)
        .map_err(|error| in_key(format!("there is no PEM private key in it ({error})")))?;
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(|error| in_key(error.to_string()))?;
    if is_open_to_all(&pair.key) {
        tracing::warn!(
            path = %pair.key.display(),
            "streaming server: every user of the node may read the private key; take the right away: chmod o= FILE"
        );
    }
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(_)) => Err(in_key(format!(
            "it is not the key of the certificate in {}",
            pair.certificate.display()
        ))),
        Err(error) => Err(content(TlsSetting::Certificate, &pair.certificate, error)),
    }
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(TlsSetting::ClientCa, path)? {
        roots
            .add(certificate)
            .map_err(|error| content(TlsSetting::ClientCa, path, error))?;
    }
    Ok(roots)
}

/// The suites of these names, in the order of preference of those that there are.
fn named(
    wanted: &[String],
    known: &[SupportedCipherSuite],
) -> Result<Vec<SupportedCipherSuite>, TlsError> {
    let has = |name: &String| known.iter().any(|suite| iana(suite) == *name);
    if let Some(name) = wanted.iter().find(|name| !has(name)) {
        let reason = format!("{name:?} is not built in: use {}", names(known.iter()));
        return Err(TlsError::CipherSuites { reason });
    }
    let asked = |suite: &&SupportedCipherSuite| wanted.contains(&iana(suite));
    Ok(known.iter().filter(asked).copied().collect())
}

fn names<'s>(suites: impl Iterator<Item = &'s SupportedCipherSuite>) -> String {
    suites.map(iana).collect::<Vec<_>>().join(", ")
}

/// IANA's name: rustls writes the version into those of TLS 1.3.
fn iana(suite: &SupportedCipherSuite) -> String {
    format!("{:?}", suite.suite()).replacen("TLS13_", "TLS_", 1)
}

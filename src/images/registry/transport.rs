//! Connections to one host: TLS with the machine's authorities and the host's own, proxies from the
//! environment (never for the machine itself), no redirect followed unseen.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reqwest::redirect::Policy;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::images::error::ImageError;
use crate::images::registry::hosts::{Host, Tls, is_local};

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// A client for `host`.
///
/// Blocks on the disk: it reads certificates.
///
/// # Errors
///
/// [`ImageError::HostsFile`]: a certificate or key cannot be used.
pub(crate) fn client(host: &Host) -> Result<reqwest::Client, ImageError> {
    let needs_tls = host.base.scheme() == "https";
    let config = tls_config(&host.tls, needs_tls)?;
    let mut builder = reqwest::Client::builder()
        .tls_backend_preconfigured(config)
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::none())
        .connect_timeout(host.dial_timeout.unwrap_or(DIAL_TIMEOUT))
        .http1_only();
    if host.base.host_str().is_some_and(is_local) {
        builder = builder.no_proxy();
    }
    builder
        .build()
        .map_err(|error| ImageError::RegistryUnavailable {
            registry: host.base.to_string(),
            reason: format!("no client for it: {error}"),
        })
}

fn bad(path: &Path, reason: impl ToString) -> ImageError {
    ImageError::HostsFile {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn tls_config(tls: &Tls, needed: bool) -> Result<ClientConfig, ImageError> {
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
    let Some((certificate, key)) = tls.client.first() else {
        return Ok(builder.with_no_client_auth());
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| bad(certificate, error))?;
    let key_path = key.as_ref().unwrap_or(certificate);
    let key = PrivateKeyDer::from_pem_file(key_path).map_err(|error| bad(key_path, error))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|error| bad(certificate, error))
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

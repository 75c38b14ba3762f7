//! The keys of the streaming server: its limits, and TLS.

use std::path::PathBuf;
use std::time::Duration;

use super::Config;
use crate::base::error::chain;
use crate::streaming::{Limits, TlsOptions, TlsPair, TlsSetting};

/// Longest time, in seconds, that a limit may be: thirty days.
const LONGEST: u64 = 30 * 24 * 60 * 60;

impl Config {
    /// Times of the streaming server.
    pub(crate) fn stream_limits(&self) -> Limits {
        let (usual, creation) = (
            Limits::default(),
            Duration::from_secs(self.stream_creation_timeout),
        );
        Limits {
            request: usual.request.min(creation),
            creation,
            idle: Duration::from_secs(self.stream_idle_timeout),
            ..usual
        }
    }

    /// TLS of the streaming server; absent: off.
    pub(crate) fn stream_tls(&self) -> Option<TlsOptions> {
        let given = |path: &PathBuf| (!path.as_os_str().is_empty()).then(|| path.clone());
        let pair = given(&self.stream_tls_cert).zip(given(&self.stream_tls_key));
        self.stream_enable_tls.then(|| TlsOptions {
            pair: pair.map(|(certificate, key)| TlsPair { certificate, key }),
            client_ca: given(&self.stream_tls_ca),
            only_13: least_is_13(&self.stream_tls_min_version).unwrap_or(true),
            cipher_suites: self.stream_tls_cipher_suites.clone(),
        })
    }

    /// Key, value and mend of the first value that cannot be; the files of certificates are read.
    pub(super) fn check_stream(&self) -> Result<(), (&'static str, String, String)> {
        for (key, seconds) in [
            ("stream_creation_timeout", self.stream_creation_timeout),
            ("stream_idle_timeout", self.stream_idle_timeout),
        ] {
            if !(1..=LONGEST).contains(&seconds) {
                return Err((key, seconds.to_string(), format!("use 1 to {LONGEST}")));
            }
        }
        let version = &self.stream_tls_min_version;
        let Some(only_13) = least_is_13(version) else {
            let mend = "use `1.2` or `1.3`: nothing older is built in".to_owned();
            return Err(("stream_tls_min_version", format!("{version:?}"), mend));
        };
        let named = |path: &PathBuf| !path.as_os_str().is_empty();
        let (certificate, key) = (&self.stream_tls_cert, &self.stream_tls_key);
        if named(certificate) != named(key) {
            let mend = "name both files, stream_tls_cert and stream_tls_key, or none";
            let (one, value) = match named(certificate) {
                true => ("stream_tls_key", key),
                false => ("stream_tls_cert", certificate),
            };
            return Err((one, format!("{value:?}"), mend.to_owned()));
        }
        let asked = named(certificate)
            || named(&self.stream_tls_ca)
            || only_13
            || !self.stream_tls_cipher_suites.is_empty();
        match self.stream_tls() {
            None if asked => {
                let mend = "set it to true: other keys of stream_tls ask for it".to_owned();
                Err(("stream_enable_tls", "false".to_owned(), mend))
            }
            None => Ok(()),
            Some(options) => options.check().map_err(|error| {
                let (key, value) = match error.setting() {
                    Some(TlsSetting::Certificate) => {
                        ("stream_tls_cert", format!("{certificate:?}"))
                    }
                    Some(TlsSetting::Key) => ("stream_tls_key", format!("{key:?}")),
                    Some(TlsSetting::ClientCa) => {
                        ("stream_tls_ca", format!("{:?}", self.stream_tls_ca))
                    }
                    Some(TlsSetting::CipherSuites) => (
                        "stream_tls_cipher_suites",
                        format!("{:?}", self.stream_tls_cipher_suites),
                    ),
                    None => ("stream_enable_tls", "true".to_owned()),
                };
                (key, value, chain(&error))
            }),
        }
    }
}

/// Is TLS 1.3 the least version? Absent: the text names none that there is.
fn least_is_13(text: &str) -> Option<bool> {
    match text {
        "1.2" | "VersionTLS12" => Some(false),
        "1.3" | "VersionTLS13" => Some(true),
        _ => None,
    }
}

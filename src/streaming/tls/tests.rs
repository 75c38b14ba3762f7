//! Handshakes over loopback: whom a client can trust, what is refused, files that change.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ProtocolVersion};
use tokio::net::TcpListener;
use tokio_rustls::TlsConnector;

use super::*;

/// A certificate and its key in files of this directory.
struct Files {
    directory: tempfile::TempDir,
}

fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        use std::io::Write as _;
        let mut file = std::fs::File::create(self.path(name)).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Writes a new pair as `NAME.crt` and `NAME.key`; the certificate.
    fn pair(&self, name: &str) -> CertificateDer<'static> {
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let (certificate, key) = self_signed::make(&["localhost"], &[loopback]).unwrap();
        self.write(&format!("{name}.crt"), &pem("CERTIFICATE", &certificate));
        self.write(
            &format!("{name}.key"),
            &pem("PRIVATE KEY", key.secret_der()),
        );
        certificate
    }

    fn options(&self, certificate: &str, key: &str) -> TlsOptions {
        TlsOptions {
            pair: Some(TlsPair {
                certificate: self.path(certificate),
                key: self.path(key),
            }),
            ..plain()
        }
    }
}

fn plain() -> TlsOptions {
    TlsOptions {
        pair: None,
        client_ca: None,
        only_13: false,
        cipher_suites: vec![],
    }
}

fn loopback() -> IpAddr {
    IpAddr::V4(Ipv4Addr::LOCALHOST)
}

/// What came of a handshake: for the client the server's certificate and what is spoken; whether the server took it.
struct Met {
    client: Result<(CertificateDer<'static>, ProtocolVersion, String), String>,
    served: bool,
}

async fn meet(
    tls: &Tls,
    trusted: &CertificateDer<'static>,
    name: &str,
    versions: &[&'static SupportedProtocolVersion],
) -> Met {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let client = async {
        let socket = TcpStream::connect(address).await.unwrap();
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, socket).await;
        let stream = stream.map_err(|error| error.to_string())?;
        let (_socket, connection) = stream.get_ref();
        let shown = connection.peer_certificates().unwrap()[0].clone();
        let suite = iana(&connection.negotiated_cipher_suite().unwrap());
        Ok((shown, connection.protocol_version().unwrap(), suite))
    };
    let server = async {
        let (socket, _peer) = listener.accept().await.unwrap();
        Wire::open(socket, Some(tls), Duration::from_secs(20))
            .await
            .is_some()
    };
    let (client, served) = tokio::join!(client, server);
    Met { client, served }
}

const BOTH: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];

#[tokio::test]
async fn a_client_can_trust_the_servers_own_certificate() {
    let address: IpAddr = "192.0.2.7".parse().unwrap();
    let tls = Tls::new(plain(), address).unwrap();
    let own = tls.own.as_ref().unwrap().cert[0].clone();
    for name in ["localhost", "127.0.0.1", "::1", "192.0.2.7"] {
        let met = meet(&tls, &own, name, BOTH).await;
        let (_, version, _) = met.client.unwrap();
        assert_eq!(version, ProtocolVersion::TLSv1_3, "{name}");
        assert!(met.served);
    }
    let met = meet(&tls, &own, "example.org", BOTH).await;
    assert!(met.client.unwrap_err().contains("not valid for name"));
    assert!(!met.served);
    let other = Files::new().pair("other");
    let met = meet(&tls, &other, "localhost", BOTH).await;
    assert!(met.client.is_err() && !met.served, "somebody else's");
}

#[test]
fn lengths_have_their_shortest_form() {
    for (length, head) in [
        (0, &[4, 0][..]),
        (127, &[4, 127]),
        (128, &[4, 0x81, 128]),
        (255, &[4, 0x81, 255]),
        (256, &[4, 0x82, 1, 0]),
    ] {
        let out = self_signed::der(4, &vec![9; length]);
        assert_eq!((&out[..head.len()], out.len()), (head, head.len() + length));
    }
}

#[tokio::test]
async fn files_that_change_count_at_the_next_connection() {
    let files = Files::new();
    let first = files.pair("server");
    let tls = Tls::new(files.options("server.crt", "server.key"), loopback()).unwrap();
    let shown = async |trusted: &CertificateDer<'static>| {
        let met = meet(&tls, trusted, "localhost", BOTH).await;
        met.client.is_ok_and(|(shown, ..)| shown == *trusted)
    };
    assert!(shown(&first).await);
    let second = files.pair("server");
    assert!(shown(&second).await && !shown(&first).await);
    for (name, text) in [
        ("server.key", "nothing of a key"),
        ("server.crt", "nothing of a certificate"),
    ] {
        files.write(name, text);
        assert!(shown(&second).await, "{name}: the old one goes on");
    }
    std::fs::remove_file(files.path("server.key")).unwrap();
    assert!(shown(&second).await, "so it does without the file");
    // Half of a pair, then the other half.
    let third = files.pair("next");
    for half in ["crt", "key"] {
        assert!(shown(&second).await, "not whole yet");
        let from = files.path(&format!("next.{half}"));
        std::fs::rename(from, files.path(&format!("server.{half}"))).unwrap();
    }
    assert!(shown(&third).await);
}

#[tokio::test]
async fn clients_need_a_certificate_where_an_authority_is_named() {
    let files = Files::new();
    let certificate = files.pair("server");
    files.pair("ca");
    let mut options = files.options("server.crt", "server.key");
    options.client_ca = Some(files.path("ca.crt"));
    let tls = Tls::new(options, loopback()).unwrap();
    assert!(!meet(&tls, &certificate, "localhost", BOTH).await.served);
    let met = meet(&tls, &certificate, "localhost", &[&TLS12]).await;
    assert!(met.client.is_err() && !met.served);
}

#[tokio::test]
async fn versions_and_suites_are_those_asked_for() {
    let files = Files::new();
    let certificate = files.pair("server");
    let with = |only_13, suites: &[&str]| {
        let options = TlsOptions {
            only_13,
            cipher_suites: suites.iter().map(|name| (*name).to_owned()).collect(),
            ..files.options("server.crt", "server.key")
        };
        Tls::new(options, loopback())
    };
    let old: &[&SupportedProtocolVersion] = &[&TLS12];
    let tls = with(false, &[]).unwrap();
    let met = meet(&tls, &certificate, "localhost", old).await;
    assert_eq!(met.client.unwrap().1, ProtocolVersion::TLSv1_2);
    let tls = with(true, &[]).unwrap();
    assert!(meet(&tls, &certificate, "localhost", BOTH).await.served);
    let met = meet(&tls, &certificate, "localhost", old).await;
    assert!(met.client.is_err() && !met.served);
    for (suite, version) in [
        ("TLS_CHACHA20_POLY1305_SHA256", ProtocolVersion::TLSv1_3),
        (
            "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            ProtocolVersion::TLSv1_2,
        ),
    ] {
        let tls = with(false, &[suite]).unwrap();
        let (_, spoken, by) = meet(&tls, &certificate, "localhost", BOTH)
            .await
            .client
            .unwrap();
        assert_eq!((spoken, by.as_str()), (version, suite));
    }
    for (only_13, suite, part) in [
        (
            false,
            "TLS_RSA_WITH_AES_128_CBC_SHA",
            "not built in: use TLS_AES_256",
        ),
        (
            true,
            "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
            "add one of TLS_AES_256",
        ),
        // The key is of the other kind.
        (false, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "(ECDSA)"),
    ] {
        let error = with(only_13, &[suite]).unwrap_err();
        assert_eq!(error.setting(), Some(TlsSetting::CipherSuites));
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let files = Files::new();
    files.pair("one");
    files.pair("two");
    files.write("empty", "");
    files.write("bad.crt", &pem("CERTIFICATE", b"not DER"));
    files.write("bad.key", &pem("PRIVATE KEY", b"not DER"));
    let with_ca = |name: &str| TlsOptions {
        client_ca: Some(files.path(name)),
        ..files.options("one.crt", "one.key")
    };
    for (options, setting, part) in [
        (
            files.options("none", "one.key"),
            TlsSetting::Certificate,
            "none",
        ),
        (files.options("one.crt", "none"), TlsSetting::Key, "none"),
        (
            files.options("empty", "one.key"),
            TlsSetting::Certificate,
            "no PEM certificate",
        ),
        (
            files.options("one.crt", "empty"),
            TlsSetting::Key,
            "no PEM private key",
        ),
        (
            files.options("one.crt", "two.key"),
            TlsSetting::Key,
            "not the key of",
        ),
        (
            files.options("bad.crt", "one.key"),
            TlsSetting::Certificate,
            "bad.crt",
        ),
        (
            files.options("one.crt", "bad.key"),
            TlsSetting::Key,
            "bad.key",
        ),
        (with_ca("none"), TlsSetting::ClientCa, "none"),
        (with_ca("empty"), TlsSetting::ClientCa, "no PEM certificate"),
        (with_ca("bad.crt"), TlsSetting::ClientCa, "bad.crt"),
    ] {
        let error = options.check().unwrap_err();
        assert_eq!(error.setting(), Some(setting), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    with_ca("two.crt").check().unwrap();
}

#[tokio::test]
async fn a_client_that_says_nothing_is_left() {
    let tls = Tls::new(plain(), loopback()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _silent = TcpStream::connect(listener.local_addr().unwrap())
        .await
        .unwrap();
    let (socket, _peer) = listener.accept().await.unwrap();
    let begun = std::time::Instant::now();
    let opened = Wire::open(socket, Some(&tls), Duration::from_millis(100)).await;
    assert!(opened.is_none() && begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_file_that_cannot_be_one_is_refused_by_name() {
    let files = Files::new();
    files.pair("good");
    let limit = usize::try_from(MAX_FILE).unwrap();
    let good = std::fs::read_to_string(files.path("good.crt")).unwrap();
    files.write("long.crt", &(good.clone() + &"\n".repeat(limit)));
    files.write(
        "whole.crt",
        &(good.clone() + &"\n".repeat(limit - good.len())),
    );
    files.options("whole.crt", "good.key").check().unwrap();
    for (name, reason) in [
        ("long.crt", "more than 1048576 bytes"),
        ("", "no regular file"),
    ] {
        let error = files.options(name, "good.key").check().unwrap_err();
        assert_eq!(error.setting(), Some(TlsSetting::Certificate));
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_key_that_everybody_may_read_is_noticed() {
    use std::os::unix::fs::PermissionsExt as _;
    let files = Files::new();
    files.write("key", "");
    for (mode, open) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true)] {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(files.path("key"), mode).unwrap();
        assert_eq!(is_open_to_all(&files.path("key")), open);
    }
}

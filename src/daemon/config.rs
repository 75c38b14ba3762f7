//! The configuration: one flat TOML file.
//!
//! Each key is described once, in [`Config`]; the commented default file (`berth config default`,
//! `deploy/config.toml`) is made from that. A key nobody knows is an error that names the nearest one; a
//! value that is not built yet is an error that says so.

mod defaults;
mod runtimes;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::handler::Handlers;
use crate::nri::Rejects;
use runtimes::Runtime;

/// Where the configuration is looked for when none is named; it may be absent there.
pub(crate) const DEFAULT_PATH: &str = "/etc/berth/config.toml";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{}: {text}", path.display())]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// With line and column.
        text: String,
    },
    /// A key that does not exist.
    #[error(
        "{}: unknown key `{key}`: did you mean `{nearest}`? (`berth config default` prints all keys)",
        path.display()
    )]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// As written.
        key: String,
        /// The known key most like it.
        nearest: &'static str,
    },
    /// A value that cannot be.
    #[error("{}: {key} = {value}: {mend}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
        /// As understood.
        value: String,
        /// What is wrong, and what to write instead.
        mend: String,
    },
}

/// A key, for the default file and for the search of the nearest.
struct Key {
    name: &'static str,
    doc: &'static [&'static str],
}

macro_rules! config {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ty = $default:expr;)+) => {
        /// Every key of the configuration.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(crate) struct Config {
            $($(#[doc = $doc])+ pub(crate) $name: $kind,)+
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($name: $default,)+ }
            }
        }

        /// Every key in the order of the file.
        const KEYS: &[Key] = &[$(Key { name: stringify!($name), doc: &[$($doc),+] },)+];
    };
}

config! {
    /// Unix socket on which CRI is served (kubelet's --container-runtime-endpoint). Mode 0660, root only.
    socket: PathBuf = "/run/berth/berth.sock".into();
    /// Number of a group whose members may use the socket too: they can do on the node all that root can. 0: none.
    socket_gid: u32 = 0;
    /// Directory of what survives a reboot: images, layers, records, writable layers. One daemon at a time. For root alone: its mode
    /// is set to 0700 at each start.
    root: PathBuf = "/var/lib/berth".into();
    /// Directory of what does not survive a reboot: sockets and files of running pods. On a tmpfs.
    state: PathBuf = "/run/berth".into();
    /// Directories with a `hosts.toml` per registry, one or a list; the first that knows a registry counts.
    registry_config_path: Directories =
        Directories(vec!["/etc/berth/certs.d".into(), "/etc/containerd/certs.d".into()]);
    /// Unix socket for NRI plugins. Empty: none. Daemons side by side need one each.
    nri_socket: PathBuf = "/var/run/nri/nri.sock".into();
    /// Directory of NRI plugins (programs `NN-name`) that are started with the daemon. Empty: none.
    nri_plugin_dir: PathBuf = "/opt/nri/plugins".into();
    /// Directory of their configurations: `NN-name.conf` or `name.conf`.
    nri_plugin_config_dir: PathBuf = "/etc/nri/conf.d".into();
    /// Milliseconds within which an NRI plugin must register.
    nri_registration_timeout: u64 = 5000;
    /// Milliseconds within which an NRI plugin must answer a request; one that does not is closed.
    nri_request_timeout: u64 = 2000;
    /// Check what NRI plugins adjust: by the next three keys and the annotation `required-plugins.noderesource.dev`.
    nri_validator: bool = false;
    /// What they may not adjust: hooks, seccomp-default, seccomp-unconfined, seccomp-localhost, namespaces, sysctl.
    nri_reject: Vec<String> = vec![];
    /// NRI plugins, by name or as INDEX-NAME, without which no container is made.
    nri_required_plugins: Vec<String> = vec![];
    /// Annotation that lets a pod do without them where its value is true (as Go's ParseBool takes it). Empty: none.
    nri_tolerate_missing_annotation: String = String::new();
    /// Directories of CDI files (devices that vendors describe), one or a list; a later one wins. Empty: no CDI.
    cdi_spec_dirs: Directories = Directories(vec!["/etc/cdi".into(), "/var/run/cdi".into()]);
    /// Directories of OCI hooks that are run for containers that match (`oci-hooks(5)`), one or a list; a later one wins.
    /// CRI-O and podman look in /usr/share/containers/oci/hooks.d. Empty: none, for hooks run as root on the node.
    hooks_dir: Directories = Directories(vec![]);
    /// File of block I/O classes (YAML, as containerd's and CRI-O's), read whenever a container asks for one: by an NRI plugin or
    /// the annotations `blockio.resources.beta.kubernetes.io/pod`, `.../container.NAME`. Empty: no classes, no annotations.
    blockio_config_file: PathBuf = PathBuf::new();
    /// Give pods SELinux labels (container_t, a level of their own) where the kernel has SELinux. Needs a policy with
    /// container types. Off: labels that pods ask for are ignored.
    selinux: bool = false;
    /// Categories, 0 up to this exclusive, of which pods get two that no other pod has. At most 1024.
    selinux_category_range: u32 = 1024;
    /// Do not confine pods with the node's network, unless they name a type (as CRI-O does).
    hostnetwork_disable_selinux: bool = false;
    /// Who makes cgroups: `cgroupfs` (berth itself), or `auto`. `systemd` is not built yet.
    cgroup_driver: String = "auto".to_owned();
    /// Cgroup for pods whose configuration names no parent, and for the monitors.
    cgroup_root: String = "/berth".to_owned();
    /// Pod network: `bridge` (built in, needs no plugin). `cni` is not built yet.
    network: String = "bridge".to_owned();
    /// Name of the bridge that joins the pods. It and its addresses belong to this daemon alone.
    bridge: String = "berth0".to_owned();
    /// IPv4 addresses for pods, until kubelet gives the node's pod CIDR. Empty: no IPv4.
    ipv4_pool: String = "10.85.0.0/16".to_owned();
    /// IPv6 addresses for pods. Empty: no IPv6.
    ipv6_pool: String = "fd85:2b6f:7e10::/64".to_owned();
    /// Directory of CNI configurations. They are not used yet; Status tells of one that lies there.
    cni_config_dir: PathBuf = "/etc/cni/net.d".into();
    /// The program berth-monitor. Empty: beside the program berth.
    monitor: PathBuf = PathBuf::new();
    /// How many monitors are kept ready, so that a pod need not wait for its own.
    monitor_pool: usize = 1;
    /// Mount writable layers with overlayfs's `volatile`: no sync at unmount. They are not used after a reboot.
    volatile_overlay: bool = true;
    /// Bytes after which a line of a container's log is split into parts.
    max_log_line: u32 = 16384;
    /// Image name that `Status` reports for kubeadm's check. Pods need no such image; none is ever pulled.
    sandbox_image: String = "registry.k8s.io/pause:3.10.1".to_owned();
    /// Address on which exec, attach and port-forward are streamed to kubelet. Keep it on the loopback.
    stream_address: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    /// Port of the same. 0: any free one.
    stream_port: u16 = 0;
    /// Seconds that a client may take for opening the streams of a session. For a TLS handshake and for its request it has 5
    /// (or this, if that is less).
    stream_creation_timeout: u64 = 30;
    /// Seconds without a byte in either direction after which a session is closed.
    stream_idle_timeout: u64 = 14400;
    /// Encrypt these streams: their URLs become https. kubelet trusts the certificates that the node trusts.
    stream_enable_tls: bool = false;
    /// File of the certificate for that (PEM, with those between it and its authority), read again when it changes, as the
    /// next two. Empty: one that berth signs itself, new at each start; kubelet does not trust it.
    stream_tls_cert: PathBuf = PathBuf::new();
    /// File of its key (PEM).
    stream_tls_key: PathBuf = PathBuf::new();
    /// File of authorities (PEM): only clients with a certificate of theirs are served. kubelet shows none. Empty: all.
    stream_tls_ca: PathBuf = PathBuf::new();
    /// Least version of TLS: `1.2` or `1.3` (or as CRI-O: `VersionTLS12`, `VersionTLS13`).
    stream_tls_min_version: String = "1.2".to_owned();
    /// Cipher suites of 1.2 and 1.3 that may be used (`TLS_AES_256_GCM_SHA384`). Empty: all that are built in.
    stream_tls_cipher_suites: Vec<String> = vec![];
    /// Address and port (`127.0.0.1:9464`) on which the daemon's own metrics are served for Prometheus, at /metrics.
    /// There is neither encryption nor login: keep it on the loopback. Empty: off.
    metrics_address: String = String::new();
    /// Layers that are downloaded at a time, over all pulls.
    max_concurrent_downloads: usize = 6;
    /// Seconds without a byte after which a pull fails.
    pull_progress_timeout: u64 = 60;
    /// Fetch a layer over http where a registry of https redirects to it (Harbor with a plain store): without credentials,
    /// and checked by its digest. Manifests, tokens and credentials never go that way.
    registry_http_blobs: bool = true;
    /// What is logged to stderr: `error`, `warn`, `info`, `debug`, `trace`, or per module as in `info,berth::images=debug`.
    log_level: String = "info".to_owned();
    /// How it is logged: `text` or `json`.
    log_format: String = "text".to_owned();
    /// The seccomp profile of containers for which kubelet names none: `unconfined`, `runtime/default` (berth's own), or the
    /// absolute path of a JSON profile, read whenever a container is made.
    unset_seccomp_profile: String = "unconfined".to_owned();
    /// The same of privileged containers, whatever kubelet names.
    privileged_seccomp_profile: String = "unconfined".to_owned();
    /// Capabilities of a container to which the pod's changes apply.
    default_capabilities: Vec<String> = defaults::own_capabilities();
    /// Sysctls of every pod (`net.core.somaxconn=1024`) that does not set them itself; of a namespace that is the node's: not.
    default_sysctls: Vec<String> = vec![];
    /// Limits of every container: `nofile=1024:4096` (soft, hard), `core=0`, `memlock=unlimited`.
    default_ulimits: Vec<String> = vec![];
    /// Variables of every container (`NAME=value`) that neither image nor pod sets.
    default_env: Vec<String> = vec![];
    /// Devices that a pod names belong, in the container, to its run_as_user and run_as_group. Not in a user namespace.
    device_ownership_from_security_context: bool = false;
    /// The handler of pods that name none: `berth` (built in) or one of those below.
    default_runtime: String = "berth".to_owned();
    /// Runtime handlers, for RuntimeClass: a table for each, as the one below.
    runtimes: BTreeMap<String, Runtime> = BTreeMap::new();
}

/// One directory, or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Directories(pub(crate) Vec<PathBuf>);

impl<'de> Deserialize<'de> for Directories {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a path or a list of paths")]
        enum Either {
            One(PathBuf),
            Many(Vec<PathBuf>),
        }
        Ok(Self(match Either::deserialize(deserializer)? {
            Either::One(path) => vec![path],
            Either::Many(paths) => paths,
        }))
    }
}

impl Config {
    /// The configuration in a file; without a name, that of the default place or, if none is there, the
    /// defaults.
    ///
    /// # Errors
    /// [`ConfigError`], for each of its reasons.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let place = path.unwrap_or(Path::new(DEFAULT_PATH));
        match std::fs::read_to_string(place) {
            Ok(text) => Self::parse(place, &text),
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read {
                path: place.to_owned(),
                source,
            }),
        }
    }

    /// The configuration in a text; `path` is for messages.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let syntax = |error: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            text: error.to_string().trim_end().to_owned(),
        };
        let table: toml::Table = toml::from_str(text).map_err(syntax)?;
        for key in table.keys() {
            if !KEYS.iter().any(|known| known.name == key) {
                return Err(ConfigError::UnknownKey {
                    path: path.to_owned(),
                    key: key.clone(),
                    nearest: nearest(key),
                });
            }
        }
        let value = |(key, value, mend)| ConfigError::Value {
            path: path.to_owned(),
            key,
            value,
            mend,
        };
        runtimes::check_keys(table.get("runtimes")).map_err(value)?;
        let mut config: Self = toml::from_str(text).map_err(syntax)?;
        let own = config.check();
        own.map_err(|(key, text, mend)| value((key.to_owned(), text, mend)))?;
        runtimes::check(&config.runtimes, &config.default_runtime).map_err(value)?;
        runtimes::load(&mut config.runtimes).map_err(value)?;
        Ok(config)
    }

    /// The runtime handlers.
    pub(crate) fn handlers(&self) -> Handlers {
        // Checked when the file was read.
        let defaults = self.defaults().unwrap_or_default();
        runtimes::handlers(
            &self.runtimes,
            &self.default_runtime,
            &self.state,
            &defaults,
        )
    }

    /// Key, value and mend of the first value that cannot be.
    fn check(&self) -> Result<(), (&'static str, String, String)> {
        let bad =
            |key, value: &dyn std::fmt::Debug, mend: String| Err((key, format!("{value:?}"), mend));
        self.check_paths()?;
        if self.socket.as_os_str().len() > 107 {
            return bad(
                "socket",
                &self.socket,
                "use at most 107 bytes: the kernel takes no longer address".to_owned(),
            );
        }
        if self.nri_socket.as_os_str().len() > 107 {
            return bad(
                "nri_socket",
                &self.nri_socket,
                "use at most 107 bytes: the kernel takes no longer address".to_owned(),
            );
        }
        self.check_nri()?;
        let _given = self.defaults()?;
        if self.root == self.state {
            let mend = "use another directory than that of `root`".to_owned();
            return bad("state", &self.state, mend);
        }
        one_of(
            "cgroup_driver",
            &self.cgroup_driver,
            &["auto", "cgroupfs"],
            &["systemd"],
        )?;
        one_of("network", &self.network, &["bridge"], &["cni"])?;
        one_of("log_format", &self.log_format, &["text", "json"], &[])?;
        let name = self.bridge.as_bytes();
        let fine = |c: &u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
        if name.is_empty() || name.len() > 15 || !name.iter().all(fine) {
            let mend = "use 1 to 15 letters, digits, `-`, `_` and `.`".to_owned();
            return bad("bridge", &self.bridge, mend);
        }
        pool("ipv4_pool", &self.ipv4_pool, IpAddr::is_ipv4, 30)?;
        pool("ipv6_pool", &self.ipv6_pool, IpAddr::is_ipv6, 126)?;
        if let Err(mend) = self.metrics() {
            return bad("metrics_address", &self.metrics_address, mend);
        }
        self.check_numbers()?;
        self.check_stream()?;
        if crate::daemon::logging::filter(&self.log_level).is_none() {
            let mend = "use `error`, `warn`, `info`, `debug` or `trace`, or a list such as `info,berth::images=debug`";
            return bad("log_level", &self.log_level, mend.to_owned());
        }
        Ok(())
    }

    fn check_paths(&self) -> Result<(), (&'static str, String, String)> {
        let directories = self.registry_config_path.0.iter().map(PathBuf::as_path);
        let mut paths = vec![
            ("socket", self.socket.as_path()),
            ("root", &self.root),
            ("state", &self.state),
            ("cgroup_root", Path::new(&self.cgroup_root)),
            ("cni_config_dir", &self.cni_config_dir),
        ];
        paths.extend(directories.map(|path| ("registry_config_path", path)));
        let directories = self.cdi_spec_dirs.0.iter().map(PathBuf::as_path);
        paths.extend(directories.map(|path| ("cdi_spec_dirs", path)));
        let directories = self.hooks_dir.0.iter().map(PathBuf::as_path);
        paths.extend(directories.map(|path| ("hooks_dir", path)));
        for (key, path) in [
            ("monitor", &self.monitor),
            ("nri_socket", &self.nri_socket),
            ("nri_plugin_dir", &self.nri_plugin_dir),
            ("nri_plugin_config_dir", &self.nri_plugin_config_dir),
            ("blockio_config_file", &self.blockio_config_file),
            ("stream_tls_cert", &self.stream_tls_cert),
            ("stream_tls_key", &self.stream_tls_key),
            ("stream_tls_ca", &self.stream_tls_ca),
        ] {
            if !path.as_os_str().is_empty() {
                paths.push((key, path));
            }
        }
        for (key, path) in paths {
            let climbs = path.components().any(|part| part.as_os_str() == "..");
            if !path.is_absolute() || climbs {
                let mend = "use an absolute path without `..`".to_owned();
                return Err((key, format!("{path:?}"), mend));
            }
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<(), (&'static str, String, String)> {
        for (key, value, fine, mend) in [
            (
                "selinux_category_range",
                u64::from(self.selinux_category_range),
                2..=1024,
                "use 2 to 1024",
            ),
            (
                "max_concurrent_downloads",
                self.max_concurrent_downloads as u64,
                1..=u64::MAX,
                "use at least 1",
            ),
            (
                "max_log_line",
                u64::from(self.max_log_line),
                80..=u64::MAX,
                "use at least 80",
            ),
        ] {
            if !fine.contains(&value) {
                return Err((key, value.to_string(), mend.to_owned()));
            }
        }
        Ok(())
    }

    /// Where metrics are served; absent: nowhere.
    ///
    /// # Errors
    /// What to write instead of something that is no address.
    pub(crate) fn metrics(&self) -> Result<Option<std::net::SocketAddr>, String> {
        match &*self.metrics_address {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|_syntax| {
                "use an address with a port, such as `127.0.0.1:9464` or `[::1]:9464`, or nothing"
                    .to_owned()
            }),
        }
    }

    fn check_nri(&self) -> Result<(), (&'static str, String, String)> {
        for (key, value) in [
            ("nri_registration_timeout", self.nri_registration_timeout),
            ("nri_request_timeout", self.nri_request_timeout),
        ] {
            if !(1..=600_000).contains(&value) {
                return Err((key, value.to_string(), "use 1 to 600000".to_owned()));
            }
        }
        let known = |word: &&String| !Rejects::WORDS.contains(&word.as_str());
        if let Some(word) = self.nri_reject.iter().find(known) {
            let mend = format!("use {}", Rejects::WORDS.join(", "));
            return Err(("nri_reject", format!("{word:?}"), mend));
        }
        let checked = !self.nri_reject.is_empty() || !self.nri_required_plugins.is_empty();
        if checked && !self.nri_validator {
            let mend = "set it to true: nri_reject and nri_required_plugins ask for it".to_owned();
            return Err(("nri_validator", "false".to_owned(), mend));
        }
        Ok(())
    }

    /// The configuration as a JSON object, with what others look for in it: kubeadm reads `sandboxImage`,
    /// critest `stateDir`.
    pub(crate) fn to_json(&self) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["sandboxImage"] = self.sandbox_image.clone().into();
        value["stateDir"] = self.state.to_string_lossy().into();
        value["rootDir"] = self.root.to_string_lossy().into();
        value.to_string()
    }
}

fn one_of(
    key: &'static str,
    value: &str,
    built: &[&str],
    coming: &[&str],
) -> Result<(), (&'static str, String, String)> {
    if built.contains(&value) {
        return Ok(());
    }
    let choice = built
        .iter()
        .map(|one| format!("\"{one}\""))
        .collect::<Vec<_>>()
        .join(" or ");
    let mend = match coming.contains(&value) {
        true => format!("not built in this version of berth: use {choice}"),
        false => format!("use {choice}"),
    };
    Err((key, format!("{value:?}"), mend))
}

/// An address range such as `10.85.0.0/16`, or nothing.
fn pool(
    key: &'static str,
    text: &str,
    family: fn(&IpAddr) -> bool,
    longest: u8,
) -> Result<(), (&'static str, String, String)> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        Some((address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?))
    });
    match parsed {
        _ if text.is_empty() => Ok(()),
        Some((address, prefix)) if family(&address) && (8..=longest).contains(&prefix) => Ok(()),
        _ => {
            let family = &key[..4];
            Err((
                key,
                format!("{text:?}"),
                format!("use {family} address/prefix with a prefix of 8 to {longest}, or nothing"),
            ))
        }
    }
}

/// The known key that takes the fewest changes to reach.
fn nearest(key: &str) -> &'static str {
    KEYS.iter()
        .map(|known| known.name)
        .min_by_key(|known| distance(key, known))
        .unwrap_or_default()
}

/// How many insertions, deletions and replacements of a byte lie between two words.
fn distance(a: &str, b: &str) -> usize {
    let b = b.as_bytes();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = corner + usize::from(x != *y);
            corner = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(corner + 1);
        }
    }
    row[b.len()]
}

/// The default file: each key with its description and default, commented out.
pub(crate) fn default_file() -> String {
    let defaults = toml::Table::try_from(Config::default()).unwrap_or_default();
    let mut text = String::from(
        "# berth's configuration (/etc/berth/config.toml). Every key is here with its default; all are optional.\n\
         # This file is made by `berth config default`; `berth config check` reads one and tells what is wrong.\n",
    );
    for key in KEYS {
        text.push('\n');
        for line in key.doc {
            let _infallible = writeln!(text, "#{line}").is_ok();
        }
        if key.name == "runtimes" {
            text.push_str(runtimes::EXAMPLE);
            continue;
        }
        let value = defaults
            .get(key.name)
            .map(ToString::to_string)
            .unwrap_or_default();
        let _infallible = writeln!(text, "# {} = {value}", key.name).is_ok();
    }
    text
}

//! Opens the parts of the daemon in their order: what the engine needs, then the engine.

use std::path::PathBuf;
use std::time::Duration;

use crate::base::tasks::Tasks;
use crate::daemon::config::Config;
use crate::engine::{Engine, EngineConfig, EngineError, Parts, SelinuxConfig, StreamEndpoint};
use crate::images::{ImageError, ImageStore, ImagesConfig};
use crate::network::{Network, NetworkConfig, NetworkError, cidr};
use crate::nri::{Nri, NriConfig, Rejects, Validator};
use crate::streaming::{Server, StreamError};

/// Why a part could not be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum PartError {
    /// Images.
    #[error("open the images")]
    Images(#[from] ImageError),
    /// Network.
    #[error("open the network")]
    Network(#[from] NetworkError),
    /// An address pool of the configuration.
    #[error("{key} = {value:?}: not a range of addresses such as {example}")]
    Pool {
        /// Key of the configuration.
        key: &'static str,
        /// Its value.
        value: String,
        /// A right one.
        example: &'static str,
    },
    /// Engine.
    #[error("start the engine")]
    Engine(#[from] EngineError),
    /// Streaming server.
    #[error("start the streaming server")]
    Streaming(#[from] StreamError),
    /// The kernel does not tell where our own program is.
    #[error("find the program berth-monitor: set `monitor` in the configuration")]
    Program(#[source] std::io::Error),
}

/// The engine over all parts below it.
///
/// # Errors
/// [`PartError`]: one of them cannot be opened.
pub(super) async fn open(config: &Config, tasks: &Tasks) -> Result<Engine, PartError> {
    let images = ImageStore::open(
        ImagesConfig {
            root: config.root.clone(),
            registry_config_paths: config.registry_config_path.0.clone(),
            concurrent_downloads: config.max_concurrent_downloads,
            http_blobs: config.registry_http_blobs,
            pull_progress_timeout: Duration::from_secs(config.pull_progress_timeout),
            pinned: vec![],
        },
        tasks.clone(),
    )?;
    let network = Network::open(NetworkConfig {
        bridge: config.bridge.clone(),
        ipv4_pool: pool("ipv4_pool", &config.ipv4_pool, "10.85.0.0/16")?,
        ipv6_pool: pool("ipv6_pool", &config.ipv6_pool, "fd85:2b6f:7e10::/64")?,
        state: config.state.clone(),
        shared: NetworkConfig::SHARED.into(),
        cni_config_dir: config.cni_config_dir.clone(),
        remove_when_unused: true,
    })?;
    let engine = EngineConfig {
        root: config.root.clone(),
        state: config.state.clone(),
        cgroup_root: config.cgroup_root.clone(),
        monitor: monitor(config)?,
        ready_monitors: config.monitor_pool,
        volatile: config.volatile_overlay,
        max_log_line: config.max_log_line,
        sandbox_image: config.sandbox_image.clone(),
        cdi_spec_dirs: config.cdi_spec_dirs.0.clone(),
        hooks_dirs: config.hooks_dir.0.clone(),
        block_io_classes: config.blockio_config_file.clone(),
        handlers: config.handlers(),
        selinux: config.selinux.then_some(SelinuxConfig {
            category_range: config.selinux_category_range,
            confine_host_network: !config.hostnetwork_disable_selinux,
        }),
    };
    let parts = Parts {
        images,
        network,
        nri: Nri::new(nri(config)),
    };
    Ok(Engine::start(engine, parts, tasks.clone()).await?)
}

fn nri(config: &Config) -> NriConfig {
    let given = |path: &PathBuf| (!path.as_os_str().is_empty()).then(|| path.clone());
    NriConfig {
        socket: given(&config.nri_socket),
        plugins: given(&config.nri_plugin_dir),
        plugin_config: config.nri_plugin_config_dir.clone(),
        registration_timeout: Duration::from_millis(config.nri_registration_timeout),
        request_timeout: Duration::from_millis(config.nri_request_timeout),
        validator: config.nri_validator.then(|| Validator {
            rejects: Rejects::from_words(&config.nri_reject),
            required: config.nri_required_plugins.clone(),
            tolerate_missing: config.nri_tolerate_missing_annotation.clone(),
        }),
        version: crate::cri::VERSION,
    }
}

/// The server of Exec, Attach and PortForward.
///
/// # Errors
/// [`PartError::Streaming`]: it cannot listen, or not encrypt.
pub(super) async fn streaming(
    config: &Config,
    engine: &Engine,
    tasks: &Tasks,
) -> Result<Server, PartError> {
    let address = std::net::SocketAddr::new(config.stream_address, config.stream_port);
    let endpoint = std::sync::Arc::new(StreamEndpoint(engine.clone()));
    let (limits, tls) = (config.stream_limits(), config.stream_tls());
    Ok(Server::start(address, endpoint, limits, tls, tasks.clone()).await?)
}

/// An address pool; an empty text is none.
fn pool(
    key: &'static str,
    value: &str,
    example: &'static str,
) -> Result<Option<cidr::Cidr>, PartError> {
    if value.is_empty() {
        return Ok(None);
    }
    value
        .parse()
        .map(Some)
        .map_err(|_not_a_range| PartError::Pool {
            key,
            value: value.to_owned(),
            example,
        })
}

/// The program of the monitors: as configured, else beside our own.
fn monitor(config: &Config) -> Result<PathBuf, PartError> {
    if config.monitor.as_os_str().is_empty() {
        let own = std::env::current_exe().map_err(PartError::Program)?;
        return Ok(own.with_file_name("berth-monitor"));
    }
    Ok(config.monitor.clone())
}

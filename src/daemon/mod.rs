//! Composition root: builds every part from the configuration and runs until asked to stop.
//!
//! Start: read the configuration, take the locks, make the socket (clients wait in its queue), open the
//! parts, serve, tell systemd. Stop (SIGTERM, SIGINT): refuse new calls, let those in flight end, leave the
//! pods running.

mod config;
mod listener;
mod logging;
mod metrics;
mod notify;
mod parts;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::base::error::chain;
use crate::base::tasks::Tasks;
use crate::cri::{Api, Settings};
use crate::daemon::config::{Config, ConfigError};
use crate::daemon::listener::ListenError;
use crate::store::{self, Lock, StoreError};

/// Longest wait for tasks at the end. What is cut off then is found again at the next start.
const SHUTDOWN: Duration = Duration::from_secs(10);

/// Threads of the asynchronous part: calls are short, the work is in the kernel and on the blocking pool.
const WORKERS: usize = 2;

/// Stack of each thread. Depth is small everywhere; what is not touched costs nothing.
const STACK: usize = 1024 * 1024;

/// Why the daemon ended before its time.
#[derive(Debug, thiserror::Error)]
enum DaemonError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another daemon has the directory, or it cannot be used.
    #[error("take the directory {}", path.display())]
    Lock {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        source: StoreError,
    },
    /// A directory of ours cannot be made, or has a mode that cannot be set.
    #[error("make the directories of `root` and `state`")]
    Directory {
        /// Which, and why not.
        source: StoreError,
    },
    /// There is no socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A part could not be opened.
    #[error(transparent)]
    Part(#[from] parts::PartError),
    /// The kernel refused.
    #[error("{step}")]
    Io {
        /// What was tried.
        step: String,
        /// Why not.
        source: std::io::Error,
    },
}

fn io(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> DaemonError {
    let step = step.into();
    move |source| DaemonError::Io { step, source }
}

/// The commented default configuration.
pub(crate) fn default_config() -> String {
    config::default_file()
}

/// Reads a configuration and says what is wrong with it.
///
/// # Errors
/// The text of what is wrong.
pub(crate) fn check_config(path: Option<&Path>) -> Result<(), String> {
    Config::load(path).map(drop).map_err(|error| chain(&error))
}

/// Runs the daemon until it is asked to stop.
///
/// # Errors
/// The text of why it could not start or go on.
pub(crate) fn serve(path: Option<&Path>) -> Result<(), String> {
    run(path).map_err(|error| chain(&error))
}

fn run(path: Option<&Path>) -> Result<(), DaemonError> {
    let started = Instant::now();
    // Before anything is made: whoever started us may have had any. Who passes and reads is said by each mode.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let config = Config::load(path)?;
    logging::install(&config);
    crate::sys::heap::keep_small();
    let shared = [&config.state, &config.socket];
    let passed = shared.iter().any(|path| path.starts_with(&config.root));
    directory(&config.root, if passed { 0o711 } else { store::CLOSED })?;
    // The socket's group passes here, and roots of user namespaces on their way to a bundle. Nobody lists.
    directory(&config.state, 0o711)?;
    if let Some(parent) = config.socket.parent() {
        std::fs::create_dir_all(parent).map_err(io(format!("make {}", parent.display())))?;
    }
    let lock = |path: &Path| {
        Lock::take(path).map_err(|source| DaemonError::Lock {
            path: path.to_owned(),
            source,
        })
    };
    let _root = lock(&config.root)?;
    let _state = lock(&config.state)?;
    let socket = listener::bind(&config.socket, config.socket_gid)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_stack_size(STACK)
        .thread_keep_alive(Duration::from_secs(2))
        .thread_name("berth")
        .enable_all()
        .build()
        .map_err(io("start the threads"))?;
    let outcome = runtime.block_on(work(&config, socket, started));
    // Blocking work that is stuck in the kernel must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(error) = std::fs::remove_file(&config.socket) {
        tracing::debug!(%error, "socket not removed");
    }
    outcome
}

/// Makes a directory of this mode, or sets it.
fn directory(path: &Path, mode: u32) -> Result<(), DaemonError> {
    store::directory(path, mode).map_err(|source| DaemonError::Directory { source })
}

async fn work(
    config: &Config,
    socket: std::os::unix::net::UnixListener,
    started: Instant,
) -> Result<(), DaemonError> {
    let (close, closing) = watch::channel(false);
    let tasks = Tasks::default();
    // Sessions of exec, attach and port-forward end with the daemon: nobody waits for them.
    let streams = Tasks::default();
    let mut terminate = signal(SignalKind::terminate()).map_err(io("listen for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("listen for SIGINT"))?;
    let manager = notify::Manager::from_env();
    // Before the engine: a daemon that cannot have its address must not have begun anything.
    let scraped = match config.metrics() {
        Ok(Some(address)) => Some(
            metrics::bind(address)
                .await
                .map_err(io(format!("metrics_address: listen on {address}")))?,
        ),
        _ => None,
    };
    let engine = parts::open(config, &tasks).await?;
    let api = Api::new(
        engine.clone(),
        tasks.clone(),
        Settings {
            systemd_cgroups: false,
            config: config.to_json(),
            scratch: config.root.clone(),
            closing: closing.clone(),
            streaming: parts::streaming(config, &engine, &streams).await?,
        },
    );
    if let Some(listener) = scraped {
        let serve = metrics::serve(listener, engine.clone(), streams.clone(), closing.clone());
        drop(streams.spawn(serve));
    }
    let connections = Tasks::default();
    let mut serving = std::pin::pin!(listener::serve(
        (socket, config.socket_gid),
        api,
        &connections,
        closing
    ));
    let elapsed_ms = started.elapsed().as_millis();
    manager.tell("READY=1\nSTATUS=serving CRI v1");
    tracing::info!(
        version = crate::cri::VERSION,
        socket = %config.socket.display(),
        elapsed_ms,
        "ready"
    );
    let name = tokio::select! {
        served = &mut serving => return served.map_err(io("serve the socket")),
        () = manager.keep_alive() => "",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!(signal = name, "stopping; pods go on");
    manager.tell("STOPPING=1");
    close.send_replace(true);
    tasks.end();
    serving.await.map_err(io("serve the socket"))?;
    let _cut_off = streams.shutdown(Duration::ZERO).await;
    let left = connections.shutdown(SHUTDOWN).await + tasks.shutdown(SHUTDOWN).await;
    engine.shutdown().await;
    if left > 0 {
        tracing::warn!(tasks = left, "tasks cut off");
    }
    tracing::info!("stopped");
    Ok(())
}

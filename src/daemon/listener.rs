//! The unix socket: made safely, served over HTTP/2, closed gracefully.

use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::base::tasks::Tasks;
use crate::cri::Api;

/// Longest wait for calls in flight at the end.
const GRACE: Duration = Duration::from_secs(5);

/// Largest header of a request: kubelet's are a few hundred bytes.
const MAX_HEADERS: u32 = 64 * 1024;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// Somebody answers there.
    #[error("another daemon answers on {}: stop it, or set `socket` to another path", path.display())]
    Taken {
        /// The socket.
        path: PathBuf,
    },
    /// Something else than a socket is there.
    #[error("{} is not a socket: remove it, or set `socket` to another path", path.display())]
    NotASocket {
        /// What is there.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("{step} {}", path.display())]
    Io {
        /// What was tried.
        step: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// Makes the socket, mode 0660, for root and this group. What a daemon that is gone has left there is removed; a daemon
/// that answers is not disturbed.
///
/// To be called while the process has one thread: the mode is made by the umask.
///
/// # Errors
/// [`ListenError`].
pub(crate) fn bind(path: &Path, group: u32) -> Result<StdListener, ListenError> {
    let io = |step: &'static str| {
        move |source| ListenError::Io {
            step,
            path: path.to_owned(),
            source,
        }
    };
    if let Ok(found) = std::fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        match StdStream::connect(path) {
            Ok(_answers) => {
                return Err(ListenError::Taken {
                    path: path.to_owned(),
                });
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io("remove the left-over socket"))?;
            }
            Err(error) => return Err(io("connect to")(error)),
        }
    }
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o117));
    let bound = StdListener::bind(path);
    rustix::process::umask(before);
    let listener = bound.map_err(io("listen on"))?;
    // Before the mode: a change of owners takes bits away.
    std::os::unix::fs::lchown(path, None, Some(group)).map_err(io("give socket_gid"))?;
    // An umask cannot add bits; a default ACL of the directory could have changed them.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
        .map_err(io("set the mode of"))?;
    listener
        .set_nonblocking(true)
        .map_err(io("listen without blocking on"))?;
    Ok(listener)
}

/// Accepts connections until `closing` turns true. Each is a task of `tasks`, which ends soon after that. `group` is as in
/// [`bind`].
///
/// # Errors
/// The socket cannot be given to the runtime.
pub(crate) async fn serve(
    (listener, group): (StdListener, u32),
    api: Api,
    tasks: &Tasks,
    mut closing: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ends(&mut closing) => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => {
                if trusted(&stream, group) {
                    drop(tasks.spawn(connection(stream, api.clone(), closing.clone())));
                }
            }
            Err(error) => {
                // Out of descriptors, for instance: others may close some.
                tracing::error!(%error, "connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Waits until the daemon ends.
async fn ends(closing: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone: the daemon has ended.
    let _seen = closing.wait_for(|closing| *closing).await.is_ok();
}

/// Only root, who runs the daemon, and the group that the socket was given to may ask: the mode of the socket alone would
/// let in root's group too.
fn trusted(stream: &UnixStream, group: u32) -> bool {
    let in_group = |primary: u32| {
        let more = || crate::sys::socket::peer_groups(stream.as_fd()).unwrap_or_default();
        group != 0 && (primary == group || more().contains(&group))
    };
    match stream.peer_cred() {
        Ok(peer) if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() => true,
        Ok(peer) if in_group(peer.gid()) => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), pid = peer.pid(), "connection refused");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "connection refused: no peer credentials");
            false
        }
    }
}

/// One client, until it leaves or the daemon ends.
async fn connection(stream: UnixStream, api: Api, mut closing: watch::Receiver<bool>) {
    let served = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(api));
    let mut served = std::pin::pin!(served);
    let outcome = tokio::select! {
        outcome = served.as_mut() => outcome,
        () = ends(&mut closing) => {
            served.as_mut().graceful_shutdown();
            match tokio::time::timeout(GRACE, served).await {
                Ok(outcome) => outcome,
                Err(_elapsed) => return,
            }
        }
    };
    if let Err(error) = outcome {
        tracing::debug!(
            error = crate::base::error::chain(&error),
            "connection ended"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_left_over_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = bind(&path, 0).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        assert!(matches!(bind(&path, 0), Err(ListenError::Taken { .. })));
        drop(first);
        let _second = bind(&path, 4321).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        let made = std::fs::metadata(&path).unwrap();
        assert_eq!(
            (made.uid(), made.gid(), made.mode() & 0o7777),
            (0, 4321, 0o660)
        );
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        std::fs::File::create(&path).unwrap();
        assert!(matches!(
            bind(&path, 0),
            Err(ListenError::NotASocket { .. })
        ));
        assert!(path.exists());
    }
}

//! Network namespaces made ahead: making one takes half a millisecond that no pod has to wait for.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use tokio::sync::{Mutex, mpsc};

use crate::base::tasks::Tasks;
use crate::network::bridge::links::loopback_up;
use crate::network::error::{NetworkError, Result};
use crate::sys::ns::{in_netns, new_netns};

/// Two namespaces kept ready: one in the channel, one in the hand of the thread that makes them. The
/// thread ends with the pool.
#[derive(Debug)]
pub(crate) struct Pool(Mutex<mpsc::Receiver<Result<OwnedFd>>>);

impl Pool {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// The thread cannot start.
    pub(crate) fn start() -> Result<Self> {
        let (ready, pool) = mpsc::channel(1);
        std::thread::Builder::new()
            .name("netns-pool".into())
            .stack_size(128 * 1024)
            .spawn(move || while ready.blocking_send(make()).is_ok() {})
            .map_err(NetworkError::system("start", "the namespace thread"))?;
        Ok(Self(Mutex::new(pool)))
    }

    /// A namespace nobody else has. A failure made ahead may be long past: it is tried again now.
    ///
    /// # Errors
    ///
    /// The kernel refuses now.
    pub(crate) async fn take(&self) -> Result<OwnedFd> {
        let ahead = self.0.lock().await.recv().await;
        match ahead {
            Some(Ok(netns)) => Ok(netns),
            _failed => Tasks::blocking(make)
                .await
                .map_err(|_ended| NetworkError::Ended)?,
        }
    }
}

/// Sets up a namespace that somebody else made.
///
/// # Errors
///
/// The kernel refuses.
pub(crate) async fn furnish(netns: OwnedFd) -> Result<OwnedFd> {
    let work = move || {
        in_netns(netns.as_fd(), prepare).map_err(NetworkError::system(
            "set up",
            "the network namespace of a user namespace",
        ))?;
        Ok(netns)
    };
    Tasks::blocking(work)
        .await
        .map_err(|_ended| NetworkError::Ended)?
}

fn make() -> Result<OwnedFd> {
    let prepared = || {
        let netns = new_netns()?;
        in_netns(netns.as_fd(), prepare)?;
        Ok(netns)
    };
    prepared().map_err(NetworkError::system("make", "a network namespace"))
}

/// Sets the loopback up. Addresses are ours to give: no advertisement changes them, and there is no
/// second of doubt before each.
fn prepare() -> io::Result<()> {
    loopback_up().map_err(|refused| refused.error)?;
    for (name, value) in [("accept_ra", "0"), ("accept_dad", "0")] {
        let file = format!("/proc/sys/net/ipv6/conf/default/{name}");
        match std::fs::OpenOptions::new().write(true).open(file) {
            Ok(mut file) => io::Write::write_all(&mut file, value.as_bytes())?,
            // IPv6 is not there.
            Err(_absent) => {}
        }
    }
    Ok(())
}

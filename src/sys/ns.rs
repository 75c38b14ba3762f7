//! Entering namespaces. See `setns(2)`, `namespaces(7)`.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Runs `work` on a new thread that has entered the network namespace `netns`.
///
/// The thread ends when `work` returns, so no other code ever sees the namespace. Blocks the
/// calling thread; from async code call it inside `spawn_blocking`.
///
/// # Errors
///
/// The `errno` of `setns(2)` (`EINVAL`: not a network namespace; `EPERM`: no `CAP_SYS_ADMIN`),
/// or an error of kind `Other` when the thread cannot start or `work` panics.
pub(crate) fn in_netns<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                enter(netns, libc::CLONE_NEWNET)?;
                work()
            })?
            .join()
            .map_err(|_panic| io::Error::other("work in the network namespace panicked"))?
    })
}

/// A new network namespace. It lives while the descriptor, a process or a mount holds it; its loopback is down.
///
/// Made on a thread that ends at once. Blocks for about half a millisecond; from async code call it inside
/// `spawn_blocking`.
///
/// # Errors
/// The number of `unshare(2)` (`EPERM`, `ENOSPC`: the limit of `user.max_net_namespaces`) or `open(2)`.
pub(crate) fn new_netns() -> io::Result<OwnedFd> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                unshare(libc::CLONE_NEWNET)?;
                let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
                Ok(OwnedFd::from(namespace))
            })?
            .join()
            .map_err(|_panic| io::Error::other("making a network namespace panicked"))?
    })
}

/// Moves the calling thread into the namespaces `flags` (`CLONE_NEW*`) of `fd`: one namespace, or with a pidfd
/// (Linux 5.8) any set of that process's. With `CLONE_NEWPID` only later children are moved.
///
/// # Errors
/// The number of `setns(2)`.
#[expect(
    clippy::disallowed_methods,
    reason = "callers are single-threaded children or dying threads"
)]
pub(crate) fn enter(fd: BorrowedFd<'_>, flags: i32) -> io::Result<()> {
    // SAFETY: `fd` is an open descriptor for the whole call; setns(2) touches no memory of ours.
    match unsafe { libc::setns(fd.as_raw_fd(), flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread new namespaces (`CLONE_NEW*`).
///
/// # Errors
/// The number of `unshare(2)`.
#[expect(
    clippy::disallowed_methods,
    reason = "callers are single-threaded children or dying threads"
)]
pub(crate) fn unshare(flags: i32) -> io::Result<()> {
    // SAFETY: namespace flags only; touches no memory of ours and leaves the descriptor table shared as it is.
    match unsafe { libc::unshare(flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The namespace flags, so that other modules need no libc.
pub(crate) mod flag {
    /// Mount.
    pub(crate) const MOUNT: i32 = libc::CLONE_NEWNS;
    /// UTS.
    pub(crate) const UTS: i32 = libc::CLONE_NEWUTS;
    /// IPC.
    pub(crate) const IPC: i32 = libc::CLONE_NEWIPC;
    /// Network.
    pub(crate) const NETWORK: i32 = libc::CLONE_NEWNET;
    /// PID.
    pub(crate) const PID: i32 = libc::CLONE_NEWPID;
    /// Cgroup.
    pub(crate) const CGROUP: i32 = libc::CLONE_NEWCGROUP;
    /// User.
    pub(crate) const USER: i32 = libc::CLONE_NEWUSER;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::read_link;
    use std::os::fd::AsFd;

    fn here() -> String {
        read_link("/proc/thread-self/ns/net")
            .unwrap()
            .display()
            .to_string()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    #[expect(clippy::disallowed_methods, reason = "test")]
    async fn no_worker_is_left_behind() {
        let (host, pod) = (here(), new_netns().unwrap());
        let mut tasks = vec![];
        for _ in 0..16 {
            let (pod, host) = (pod.try_clone().unwrap(), host.clone());
            tasks.push(tokio::spawn(async move {
                for _ in 0..50 {
                    let p = pod.try_clone().unwrap();
                    let work = move || in_netns(p.as_fd(), || Ok(here()));
                    let inside = tokio::task::spawn_blocking(work).await.unwrap().unwrap();
                    assert_ne!(inside, host);
                    assert_eq!(here(), host);
                }
            }));
        }
        for t in tasks {
            t.await.unwrap();
        }
        for _ in 0..200 {
            let host = host.clone();
            tokio::spawn(async move { assert_eq!(here(), host) })
                .await
                .unwrap();
        }
    }
}

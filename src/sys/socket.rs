//! `SOCK_SEQPACKET` unix sockets that carry packets with descriptors (`SCM_RIGHTS`). See `unix(7)`.

#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Most descriptors in one packet.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

/// What [`receive`] got.
#[derive(Debug)]
pub(crate) struct Received {
    /// Bytes in the buffer; 0: the peer has closed the connection.
    pub(crate) bytes: usize,
    /// Descriptors that came with it, close-on-exec.
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A connected pair, close-on-exec and blocking.
///
/// # Errors
/// The number of `socketpair(2)`.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Binds a new socket at `path` (what is there must be gone) with mode 0600 and listens. The listener is
/// non-blocking. Paths longer than the 107 bytes of an address work.
///
/// # Errors
/// The number of `open(2)` of the parent directory, `socket(2)`, `bind(2)`, `chmod(2)` or `listen(2)`.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    listen_as(SocketType::SEQPACKET, path)
}

/// As [`listen`], for a stream, as OCI runtimes want it for terminals.
///
/// # Errors
/// As [`listen`].
pub(crate) fn listen_stream(path: &Path) -> io::Result<OwnedFd> {
    listen_as(SocketType::STREAM, path)
}

fn listen_as(kind: SocketType, path: &Path) -> io::Result<OwnedFd> {
    let (directory, address) = address(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        kind,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // The mode of the socket's inode is that of the descriptor, masked: no moment with a wider one.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    let name = path.file_name().unwrap_or_default();
    rustix::fs::chmodat(
        &directory,
        name,
        Mode::RUSR | Mode::WUSR,
        rustix::fs::AtFlags::empty(),
    )?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket)
}

/// Accepts one connection (close-on-exec, blocking); `None` when none waits.
///
/// # Errors
/// The number of `accept4(2)`.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(socket) => Ok(Some(socket)),
        Err(
            rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED,
        ) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Connects to the listener at `path`; the socket is close-on-exec and blocking.
///
/// # Errors
/// The number of `open(2)` of the parent directory, `socket(2)` or `connect(2)` (`ECONNREFUSED`: nobody listens
/// any more).
pub(crate) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let (_directory, address) = address(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// An address that reaches `path` whatever its length; valid while the directory is open.
fn address(path: &Path) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let directory = rustix::fs::open(
        parent.unwrap_or(Path::new(".")),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    if let Ok(address) = SocketAddrUnix::new(path) {
        return Ok((directory, address));
    }
    let name = path.file_name().ok_or(rustix::io::Errno::INVAL)?;
    let number = directory.as_raw_fd();
    let short = Path::new("/proc/self/fd")
        .join(number.to_string())
        .join(name);
    let address = SocketAddrUnix::new(short.as_os_str())?;
    Ok((directory, address))
}

/// The peer's (pid, uid, gid) when it connected.
///
/// # Errors
/// The number of `getsockopt(2)`.
pub(crate) fn peer_credentials(socket: BorrowedFd<'_>) -> io::Result<(u32, u32, u32)> {
    let peer = rustix::net::sockopt::socket_peercred(socket)?;
    let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or_default();
    Ok((pid, peer.uid.as_raw(), peer.gid.as_raw()))
}

/// Supplementary groups of the peer when it connected; empty before Linux 4.13, which does not tell.
///
/// # Errors
/// The number of `getsockopt(2)`.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = Vec::new();
    loop {
        let bytes = std::mem::size_of_val(groups.as_slice());
        let mut length = libc::socklen_t::try_from(bytes).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: the kernel writes at most `length` bytes, which `groups` has, and `length` itself; it keeps neither.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
        let error = match result {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            _ => io::Error::last_os_error(),
        };
        match error.raw_os_error() {
            Some(libc::ERANGE) if count > groups.len() => groups.resize(count, 0),
            Some(libc::ENOPROTOOPT) => return Ok(Vec::new()),
            _ => return Err(error),
        }
    }
}

/// Sends one packet with up to [`MAX_DESCRIPTORS`] descriptors. Never raises `SIGPIPE`.
///
/// # Errors
/// The number of `sendmsg(2)`: `EMSGSIZE` (too long), `EPIPE` (the peer is gone), `EAGAIN` (non-blocking socket
/// and the peer does not read); `EINVAL` for too many descriptors. Nothing was sent then.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::from(rustix::io::Errno::INVAL));
    }
    loop {
        let parts = [IoSlice::new(packet)];
        match rustix::net::sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_all) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one packet into `buffer`, with its descriptors.
///
/// # Errors
/// The number of `recvmsg(2)` (`EAGAIN`: non-blocking and nothing there; `ECONNRESET`); `EMSGSIZE` for a packet that is
/// longer than `buffer` or carries too many descriptors, which is lost then, its descriptors closed.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let mut descriptors = Vec::new();
    for item in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = item {
            descriptors.extend(rights);
        }
    }
    if message
        .flags
        .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
    {
        return Err(io::Error::from(rustix::io::Errno::MSGSIZE));
    }
    Ok(Received {
        bytes: message.bytes,
        descriptors,
    })
}

/// Borrows a list of owned descriptors, for [`send`].
pub(crate) fn borrow(descriptors: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    descriptors.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn packets_keep_their_borders_and_descriptors() {
        let (a, b) = pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        send(a.as_fd(), b"one", &[writer.as_fd()]).unwrap();
        send(a.as_fd(), b"second", &[]).unwrap();
        drop(writer);
        let mut buffer = [0; 16];
        let first = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((first.bytes, first.descriptors.len()), (3, 1));
        let mut copy = std::fs::File::from(first.descriptors.into_iter().next().unwrap());
        copy.write_all(b"through").unwrap();
        drop(copy);
        let mut text = String::new();
        { reader }.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        let second = receive(b.as_fd(), &mut buffer).unwrap();
        assert_eq!((second.bytes, second.descriptors.len()), (6, 0));
        send(a.as_fd(), &[0; 17], &[]).unwrap();
        let error = receive(b.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        drop(a);
        assert_eq!(receive(b.as_fd(), &mut buffer).unwrap().bytes, 0);
        let error = send(b.as_fd(), b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_listener_on_a_long_path() {
        let directory = tempfile::tempdir().unwrap();
        let deep = directory.path().join("d".repeat(100)).join("e".repeat(60));
        std::fs::create_dir_all(&deep).unwrap();
        for path in [directory.path().join("s"), deep.join("s")] {
            let listener = listen(&path).unwrap();
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            assert!(accept(listener.as_fd()).unwrap().is_none());
            let client = connect(&path).unwrap();
            let server = accept(listener.as_fd()).unwrap().unwrap();
            let (pid, uid, _) = peer_credentials(server.as_fd()).unwrap();
            assert_eq!((pid, uid), (std::process::id(), 0));
            let groups = rustix::process::getgroups().unwrap();
            let groups: Vec<u32> = groups.iter().map(|group| group.as_raw()).collect();
            assert_eq!(peer_groups(server.as_fd()).unwrap(), groups);
            send(client.as_fd(), b"hi", &[]).unwrap();
            assert_eq!(receive(server.as_fd(), &mut [0; 8]).unwrap().bytes, 2);
            drop(listener);
            let error = connect(&path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}

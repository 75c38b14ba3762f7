//! Netlink: a blocking socket, and the encoding of messages and attributes. See `netlink(7)`.
//!
//! ```text
//! request:  [header type flags seq][family header][attribute]...   one or many in one sendmsg
//! answer:   [header NLMSG_ERROR seq][errno, 0: done][attributes: what the kernel says in words]
//! ```
//!
//! It knows nothing of links or rules: `network` writes those messages.
#![expect(
    unsafe_code,
    reason = "setsockopt(2) of options without a safe wrapper"
)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink as protocol, recvfrom,
    sendto, socket_with, sockopt,
};

/// `NLM_F_REPLACE`: what exists is replaced.
pub(crate) const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`: what exists is an error.
pub(crate) const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`: what does not exist is made.
pub(crate) const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: added at the end of the list.
pub(crate) const APPEND: u16 = 0x800;

const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
const DUMP: u16 = 0x300;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

const MSG_NOOP: u16 = 1;
const MSG_ERROR: u16 = 2;
const MSG_DONE: u16 = 3;
const HEADER: usize = 16;

/// Longer than any answer of a healthy kernel takes; a lost answer is an error, not a hang.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Which part of the kernel a socket speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// Links, addresses, routes: `rtnetlink(7)`.
    Route,
    /// nftables and connection tracking.
    Netfilter,
}

/// One message of a request: a family header and attributes.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A message of type `kind` with `flags` beside `NLM_F_REQUEST` and `NLM_F_ACK`, starting with the
    /// family's fixed header.
    pub(crate) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut body = Vec::with_capacity(256);
        body.extend_from_slice(header);
        pad(&mut body);
        Self { kind, flags, body }
    }
}

/// Attributes inside an attribute, optionally after a fixed header.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// Starts with a fixed header (as `VETH_INFO_PEER` does).
    #[must_use]
    pub(crate) fn header(mut self, header: &[u8]) -> Self {
        self.0.extend_from_slice(header);
        pad(&mut self.0);
        self
    }
}

/// What attributes are added to.
pub(crate) trait Attributed: Sized {
    /// Its bytes.
    fn buffer(&mut self) -> &mut Vec<u8>;

    /// Adds an attribute of bytes.
    #[must_use]
    fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        put(self.buffer(), kind, value);
        self
    }

    /// Adds an attribute of one integer in the machine's byte order (links, addresses, routes).
    #[must_use]
    fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds an attribute of one integer in network byte order (nftables).
    #[must_use]
    fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Adds a NUL-terminated string.
    #[must_use]
    fn text(self, kind: u16, value: &str) -> Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// Adds an attribute made of attributes.
    #[must_use]
    fn nest(self, kind: u16, fill: impl FnOnce(Attributes) -> Attributes) -> Self {
        self.bytes(kind | NESTED, &fill(Attributes::default()).0)
    }
}

impl Attributed for Message {
    fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.body
    }
}

impl Attributed for Attributes {
    fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

fn pad(buffer: &mut Vec<u8>) {
    buffer.resize(buffer.len().next_multiple_of(4), 0);
}

/// A value longer than an attribute can be is cut to nothing: the kernel then refuses the message,
/// which is better than a message that means something else.
fn put(buffer: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let (length, value) = match u16::try_from(value.len() + 4) {
        Ok(length) => (length, value),
        Err(_too_long) => (4, &[][..]),
    };
    buffer.extend_from_slice(&length.to_ne_bytes());
    buffer.extend_from_slice(&kind.to_ne_bytes());
    buffer.extend_from_slice(value);
    pad(buffer);
}

/// The attributes in `bytes`, as (type, value); stops at the first malformed one.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of type `kind`.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// An integer in the machine's byte order; absent when `bytes` are fewer than four.
pub(crate) fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.first_chunk()?))
}

/// A NUL-terminated string; bytes that are no text are replaced.
pub(crate) fn read_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

/// The kernel refused a message, or the socket failed.
#[derive(Debug)]
pub(crate) struct Refusal {
    /// Which message of the request, from 0; absent: the request as a whole.
    pub(crate) index: Option<usize>,
    /// The errno.
    pub(crate) error: io::Error,
    /// What the kernel says in words; often empty.
    pub(crate) words: String,
}

impl Refusal {
    /// Whether the kernel answered with `errno`.
    pub(crate) fn is(&self, errno: rustix::io::Errno) -> bool {
        self.error.raw_os_error() == Some(errno.raw_os_error())
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(index) = self.index {
            write!(f, "message {index}: ")?;
        }
        if self.words.is_empty() {
            write!(f, "{}", self.error)
        } else {
            write!(f, "{} ({})", self.error, self.words)
        }
    }
}

impl std::error::Error for Refusal {}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self {
            index: None,
            error,
            words: String::new(),
        }
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(errno: rustix::io::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

/// A netlink socket in the network namespace of the thread that opened it. Calls block.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// One message of an answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Family header and attributes.
    pub(crate) body: Vec<u8>,
}

impl Socket {
    /// Opens a socket.
    ///
    /// # Errors
    ///
    /// The errno of `socket(2)` or `setsockopt(2)`.
    pub(crate) fn open(family: Family) -> io::Result<Self> {
        let number = match family {
            Family::Route => None,
            Family::Netfilter => Some(protocol::NETFILTER),
        };
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            number,
        )?;
        sockopt::set_socket_timeout(&fd, sockopt::Timeout::Recv, Some(ANSWER_WITHIN))?;
        // The request is not sent back with the answer; the reason comes in words.
        set_option(&fd, libc::NETLINK_CAP_ACK)?;
        set_option(&fd, libc::NETLINK_EXT_ACK)?;
        Ok(Self {
            fd,
            sequence: 0,
            buffer: vec![0; 32 * 1024],
        })
    }

    /// Sends the messages in one go and waits until the kernel has answered each. The kernel handles
    /// them in order and does not stop at the first it refuses.
    ///
    /// # Errors
    ///
    /// The first refusal.
    pub(crate) fn request(&mut self, messages: &[Message]) -> Result<(), Refusal> {
        let first = self.encode_and_send(messages.iter().map(|m| (m, ACK)))?;
        self.await_acks(first, messages.len(), 0)
    }

    /// Like [`Socket::request`] for nftables: all messages take effect or none does.
    ///
    /// # Errors
    ///
    /// The first refusal; nothing has changed then.
    pub(crate) fn transaction(
        &mut self,
        subsystem: u8,
        messages: &[Message],
    ) -> Result<(), Refusal> {
        // struct nfgenmsg: family, version, resource id (the subsystem)
        let edge = [0, 0, 0, subsystem];
        let (begin, end) = (Message::new(0x10, 0, &edge), Message::new(0x11, 0, &edge));
        let all = std::iter::once((&begin, 0))
            .chain(messages.iter().map(|m| (m, ACK)))
            .chain(std::iter::once((&end, 0)));
        let first = self.encode_and_send(all)?;
        self.await_acks(first, messages.len(), 1)
    }

    /// Sends a request whose answer is a list.
    ///
    /// # Errors
    ///
    /// The kernel's refusal, or the errno of the socket.
    pub(crate) fn dump(&mut self, message: &Message) -> Result<Vec<Answer>, Refusal> {
        let sequence = self.encode_and_send(std::iter::once((message, DUMP)))?;
        let mut list = vec![];
        loop {
            for part in self.receive()? {
                match part.kind {
                    _ if part.sequence != sequence => {}
                    MSG_DONE => return Ok(list),
                    MSG_ERROR => return refusal(&part, Some(0)).map_or(Ok(list), Err),
                    MSG_NOOP => {}
                    _ => list.push(Answer { body: part.body }),
                }
            }
        }
    }

    /// Sends a request whose answer is one message.
    ///
    /// # Errors
    ///
    /// The kernel's refusal, or the errno of the socket.
    pub(crate) fn ask(&mut self, message: &Message) -> Result<Answer, Refusal> {
        let sequence = self.encode_and_send(std::iter::once((message, 0)))?;
        loop {
            for part in self.receive()? {
                match part.kind {
                    _ if part.sequence != sequence => {}
                    MSG_ERROR => {
                        return Err(refusal(&part, Some(0))
                            .unwrap_or_else(|| io::Error::other("an answer without data").into()));
                    }
                    _ => return Ok(Answer { body: part.body }),
                }
            }
        }
    }

    /// Returns the sequence number of the first message; the others follow it.
    fn encode_and_send<'m>(
        &mut self,
        messages: impl Iterator<Item = (&'m Message, u16)>,
    ) -> Result<u32, Refusal> {
        let first = self.sequence.wrapping_add(1);
        let mut wire = Vec::with_capacity(1024);
        for (message, extra) in messages {
            self.sequence = self.sequence.wrapping_add(1);
            let length = u32::try_from(HEADER + message.body.len())
                .map_err(|_too_long| rustix::io::Errno::MSGSIZE)?;
            wire.extend_from_slice(&length.to_ne_bytes());
            wire.extend_from_slice(&message.kind.to_ne_bytes());
            wire.extend_from_slice(&(message.flags | REQUEST | extra).to_ne_bytes());
            wire.extend_from_slice(&self.sequence.to_ne_bytes());
            wire.extend_from_slice(&0_u32.to_ne_bytes());
            wire.extend_from_slice(&message.body);
        }
        let kernel = protocol::SocketAddrNetlink::new(0, 0);
        sendto(&self.fd, &wire, SendFlags::empty(), &kernel)?;
        Ok(first)
    }

    /// Waits for `count` answers to the messages that start `skip` after `first`. A refusal of one of
    /// the skipped (the frame of a transaction) ends the wait: the kernel sends nothing more.
    fn await_acks(&mut self, first: u32, count: usize, skip: usize) -> Result<(), Refusal> {
        let (mut waiting, mut failed) = (count, None::<Refusal>);
        while waiting > 0 {
            for part in self.receive()? {
                let place =
                    usize::try_from(part.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                if part.kind != MSG_ERROR || place >= count + skip {
                    continue;
                }
                let index = place.checked_sub(skip);
                let refused = refusal(&part, index);
                match index {
                    Some(_message) => waiting = waiting.saturating_sub(1),
                    None => waiting = 0,
                }
                failed = failed.or(refused);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn receive(&mut self) -> Result<Vec<Part>, Refusal> {
        let (_used, length, _from) = loop {
            match recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        let bytes = self
            .buffer
            .get(..length)
            .ok_or_else(|| io::Error::other("an answer longer than the buffer"))?;
        Ok(Part::split(bytes))
    }
}

struct Part {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: Vec<u8>,
}

impl Part {
    fn split(mut bytes: &[u8]) -> Vec<Self> {
        let mut parts = vec![];
        while let Some(header) = bytes.first_chunk::<HEADER>() {
            let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *header;
            let length = u32::from_ne_bytes([l0, l1, l2, l3]);
            let Some(length) = usize::try_from(length).ok().filter(|l| *l >= HEADER) else {
                break;
            };
            let Some(body) = bytes.get(HEADER..length) else {
                break;
            };
            parts.push(Self {
                kind: u16::from_ne_bytes([k0, k1]),
                flags: u16::from_ne_bytes([f0, f1]),
                sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
                body: body.to_vec(),
            });
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        parts
    }
}

/// Reads `struct nlmsgerr`: the errno, the header of the request, then (flag `ACK_TLVS`) attributes.
fn refusal(part: &Part, index: Option<usize>) -> Option<Refusal> {
    const ACK_TLVS: u16 = 0x200;
    const ATTR_MSG: u16 = 1;
    let code = i32::from_ne_bytes(*part.body.first_chunk().unwrap_or(&[0xff; 4]));
    let tlvs = part.body.get(4 + HEADER..).unwrap_or_default();
    let words = (part.flags & ACK_TLVS != 0)
        .then(|| attribute(tlvs, ATTR_MSG).map(read_text))
        .flatten()
        .unwrap_or_default();
    (code != 0).then(|| Refusal {
        index,
        error: io::Error::from_raw_os_error(-code),
        words,
    })
}

fn set_option(fd: &OwnedFd, option: libc::c_int) -> io::Result<()> {
    let on: libc::c_int = 1;
    let length = libc::socklen_t::try_from(size_of_val(&on)).map_err(io::Error::other)?;
    // SAFETY: `fd` is an open socket and the pointer and length describe `on`, which outlives the call.
    let done = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            (&raw const on).cast(),
            length,
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn attributes_come_back(list in prop::collection::vec((1_u16..0x3000, prop::collection::vec(any::<u8>(), 0..40)), 0..12)) {
            let mut all = Attributes::default();
            for (kind, value) in &list {
                all = all.bytes(*kind, value);
            }
            let back: Vec<_> = attributes(&all.0).map(|(k, v)| (k, v.to_vec())).collect();
            prop_assert_eq!(back, list);
        }

        #[test]
        fn any_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _count = attributes(&bytes).count();
            for part in Part::split(&bytes) {
                let _maybe = refusal(&part, None);
            }
        }
    }

    #[test]
    fn a_value_too_long_is_not_sent() {
        let all = Attributes::default().bytes(1, &vec![7; 70_000]);
        assert_eq!(attributes(&all.0).collect::<Vec<_>>(), [(1, &[][..])]);
    }

    #[test]
    fn the_loopback_is_listed_and_a_bad_request_refused() {
        let mut socket = Socket::open(Family::Route).unwrap();
        let links = socket.dump(&Message::new(18, 0, &[0; 16])).unwrap();
        let names: Vec<_> = links
            .iter()
            .filter_map(|l| attribute(l.body.get(16..)?, 3).map(read_text))
            .collect();
        assert!(names.iter().any(|n| n == "lo"), "{names:?}");
        let get = Message::new(18, 0, &[0; 16]).text(3, "nosuchlink");
        let refused = socket.ask(&get).unwrap_err();
        assert!(refused.is(rustix::io::Errno::NODEV), "{refused}");
    }
}

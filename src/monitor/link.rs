//! The connection to the daemon: one at a time, the newest wins. Nothing here ever waits for it: what
//! it does not take at once is queued, and a daemon that reads nothing at all loses its connection (it
//! learns everything again from the `State` after its next `Hello`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use crate::monitor::protocol::{Event, MAX_PACKET, Message, Reply, Request};
use crate::sys::{fd, socket};

/// More waiting packets than this and the connection is closed.
const MAX_WAITING: usize = 256;

/// Who waits for a reply: a request on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    connection: u64,
    sequence: u64,
}

impl Asked {
    /// Nobody waits: an answer to this goes nowhere.
    pub(crate) const fn nobody() -> Self {
        Self {
            connection: u64::MAX,
            sequence: 0,
        }
    }
}

/// What [`Link::receive`] got.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// Nothing (more).
    Nothing,
    /// A request and its descriptors.
    Request(Asked, Box<Request>, Vec<OwnedFd>),
    /// The connection is closed.
    Closed,
}

/// The connection, or none.
#[derive(Debug, Default)]
pub(crate) struct Link {
    socket: Option<OwnedFd>,
    connection: u64,
    waiting: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Link {
    /// Uses this connection from now on.
    ///
    /// # Errors
    /// The number of fcntl(2); the old connection stays.
    pub(crate) fn replace(&mut self, socket: OwnedFd) -> io::Result<()> {
        fd::set_nonblocking(socket.as_fd(), true)?;
        self.close();
        self.socket = Some(socket);
        Ok(())
    }

    /// Drops the connection and everything meant for it.
    pub(crate) fn close(&mut self) {
        self.socket = None;
        self.connection += 1;
        self.waiting = VecDeque::new();
    }

    /// The socket to poll, and whether something waits to be sent.
    pub(crate) fn poll(&self) -> Option<(BorrowedFd<'_>, bool)> {
        let socket = self.socket.as_ref()?;
        Some((socket.as_fd(), !self.waiting.is_empty()))
    }

    /// Takes the next request. A packet that is none closes the connection.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Incoming {
        let Some(socket) = &self.socket else {
            return Incoming::Nothing;
        };
        let received = match socket::receive(socket.as_fd(), buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Incoming::Nothing,
            Err(_broken) => {
                self.close();
                return Incoming::Closed;
            }
        };
        let request = postcard::from_bytes::<Request>(&buffer[..received.bytes]);
        match request {
            Ok(request) if received.bytes > 0 => Incoming::Request(
                Asked {
                    connection: self.connection,
                    sequence: request.sequence,
                },
                Box::new(request),
                received.descriptors,
            ),
            _ => {
                self.close();
                Incoming::Closed
            }
        }
    }

    /// Answers a request; one of an earlier connection is not answered any more.
    pub(crate) fn reply(&mut self, asked: Asked, reply: Reply, descriptors: Vec<OwnedFd>) {
        if asked.connection == self.connection {
            let sequence = asked.sequence;
            self.send(&Message::Reply { sequence, reply }, descriptors);
        }
    }

    /// Tells the daemon what happened, if there is one.
    pub(crate) fn event(&mut self, event: Event) {
        self.send(&Message::Event(event), Vec::new());
    }

    fn send(&mut self, message: &Message, descriptors: Vec<OwnedFd>) {
        if self.socket.is_none() {
            return;
        }
        match postcard::to_allocvec(message) {
            Ok(packet) if packet.len() <= MAX_PACKET && self.waiting.len() < MAX_WAITING => {
                self.waiting.push_back((packet, descriptors));
                self.flush();
            }
            _ => self.close(),
        }
    }

    /// Sends what waits, as far as the daemon takes it.
    pub(crate) fn flush(&mut self) {
        while let (Some(socket), Some((packet, descriptors))) = (&self.socket, self.waiting.front())
        {
            match socket::send(socket.as_fd(), packet, &socket::borrow(descriptors)) {
                Ok(()) => {
                    let _sent = self.waiting.pop_front();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_gone) => self.close(),
            }
        }
    }
}

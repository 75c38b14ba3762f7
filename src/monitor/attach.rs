//! A client that is attached to a container: it gets a copy of the output from its attach on.
//!
//! ```text
//! read for the log --> copy --> pipe of stdout, pipe of stderr (one of a terminal) --> daemon --> client
//!                       |
//!                       +-- a pipe is full: one byte of news, then all pipes of this client are closed
//! ```
//! A copy is never waited for: no client may hold up the container or its log. So a client that reads too slowly is cut
//! off, and told so, which the end of a pipe alone would not do.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::sys::fd;
use crate::sys::poll::{PollFd, PollFlags, poll};

/// One attached client.
#[derive(Debug)]
pub(crate) struct Attached {
    /// By the index of the container's output; absent: it has ended, or nobody reads it any more.
    copies: Vec<Option<OwnedFd>>,
    /// Where it is told that it was cut off; absent: a daemon that does not listen for it.
    news: Option<OwnedFd>,
}

impl Attached {
    /// A client of a container with so many outputs: a descriptor for each of them, then one for the news.
    ///
    /// # Errors
    /// The number of fcntl(2).
    pub(crate) fn new(descriptors: Vec<OwnedFd>, outputs: usize) -> io::Result<Self> {
        for descriptor in &descriptors {
            fd::set_nonblocking(descriptor.as_fd(), true)?;
        }
        let mut descriptors = descriptors.into_iter();
        let copies = descriptors.by_ref().take(outputs).map(Some).collect();
        Ok(Self {
            copies,
            news: descriptors.next(),
        })
    }

    /// Gives it what an output said. What it cannot take at once cuts it off.
    pub(crate) fn copy(&mut self, output: usize, bytes: &[u8]) {
        let Some(Some(copy)) = self.copies.get(output) else {
            return;
        };
        match fd::write(copy.as_fd(), bytes) {
            Ok(count) if count == bytes.len() => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.end(output),
            // Some of it is missing from here on: the other output says nothing more either.
            _ => {
                let news = self.news.take();
                let _left = news.map(|news| fd::write(news.as_fd(), b"!"));
                self.copies.clear();
            }
        }
    }

    /// An output has ended.
    pub(crate) fn end(&mut self, output: usize) {
        if let Some(copy) = self.copies.get_mut(output) {
            *copy = None;
        }
    }

    /// Whether nothing can come to it any more.
    pub(crate) fn is_over(&self) -> bool {
        self.copies.iter().all(Option::is_none)
    }

    /// What to poll, for errors alone: a pipe that nobody reads any more has one.
    pub(crate) fn pipes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.copies.iter().flatten().map(OwnedFd::as_fd)
    }

    /// Closes the pipes that nobody reads any more.
    pub(crate) fn close_unread(&mut self) {
        for copy in &mut self.copies {
            let unread = copy.as_ref().is_some_and(|pipe| {
                let mut set = [PollFd::new(pipe, PollFlags::empty())];
                poll(&mut set, Some(Duration::ZERO)).is_ok_and(|broken| broken > 0)
            });
            if unread {
                *copy = None;
            }
        }
    }
}

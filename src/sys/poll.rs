//! Waiting for descriptors: `poll(2)`.
//!
//! ```text
//! let mut set = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
//! let ready = poll(&mut set, Some(Duration::from_secs(1)))?;   // 0: time is up
//! if set[0].revents().contains(PollFlags::IN) { ... }
//! ```

use std::io;
use std::time::Duration;

use rustix::event::Timespec;
pub(crate) use rustix::event::{PollFd, PollFlags};

/// Waits until one of `set` is ready; how many are. `None` waits for ever; 0 means the time is up.
/// A signal that interrupts the wait is no error: the result is then 0 ready, possibly early.
///
/// # Errors
/// The number of `poll(2)`.
pub(crate) fn poll(set: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<usize> {
    let timeout = timeout.map(timespec);
    match rustix::event::poll(set, timeout.as_ref()) {
        Ok(count) => Ok(count),
        Err(rustix::io::Errno::INTR) => {
            for entry in set {
                entry.clear_revents();
            }
            Ok(0)
        }
        Err(error) => Err(error.into()),
    }
}

/// The kernel's form of a duration; longer than 292 billion years is cut.
pub(crate) fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

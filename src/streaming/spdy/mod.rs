//! SPDY/3.1, the server's side, as far as Kubernetes streams use it.
//!
//! [`frame`] is the wire format, [`headers`] the compressed name/value block, [`connection`] the streams, [`queue`] what
//! they send.
//! Priorities, credentials and server push are not served: their frames are ignored.

pub(super) mod connection;
pub(super) mod frame;
pub(super) mod headers;
mod queue;

pub(super) use connection::{Connection, Stream};

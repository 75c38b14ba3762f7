//! Plain values and small tools that every other module may use. No I/O but the clock.
//!
//! Siblings (modules of equal rank) never meet directly; they exchange the values of this module.
pub(crate) mod block_io;
pub(crate) mod clock;
pub(crate) mod container;
#[cfg(feature = "daemon")]
pub(crate) mod counters;
#[cfg(feature = "daemon")]
pub(crate) mod edits;
pub(crate) mod error;
pub(crate) mod handler;
pub(crate) mod hook;
pub(crate) mod id;
pub(crate) mod image;
pub(crate) mod pod;
#[cfg(feature = "daemon")]
pub(crate) mod room;
pub(crate) mod security;
pub(crate) mod stats;
#[cfg(feature = "daemon")]
pub(crate) mod tasks;
#[cfg(feature = "daemon")]
pub(crate) mod telemetry;

//! What kind of failure an error is, for whoever must react; and how a chain of causes is printed.

use std::error::Error;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// What a caller can do about a failure. `cri` maps each to one gRPC code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// The object named does not exist.
    NotFound,
    /// The name is taken by another object.
    AlreadyExists,
    /// The request can never succeed as it is.
    InvalidArgument,
    /// The request is right, the state of its object is not.
    FailedPrecondition,
    /// A limit is reached (disk, memory, addresses, tokens).
    ResourceExhausted,
    /// Somebody needed did not answer; trying again may help.
    Unavailable,
    /// The time given was too short.
    DeadlineExceeded,
    /// The caller gave up.
    Cancelled,
    /// The caller may not do this (bad credentials).
    PermissionDenied,
    /// Not built, or not offered by this kernel.
    Unimplemented,
    /// A fault of ours or of the machine.
    Internal,
}

/// An error that knows its [`Kind`].
pub(crate) trait HasKind: Error {
    /// What a caller can do about it.
    fn kind(&self) -> Kind;
}

/// The error and all its causes in one line, outermost first, joined by `: `.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _written: std::fmt::Result = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

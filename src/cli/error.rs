//! Why a command failed, for the one line on stderr.

use std::path::PathBuf;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// What the daemon's own module said.
    #[error("{0}")]
    Daemon(String),
    /// Nobody answers on the socket.
    #[error(
        "no daemon answers on {}: start one with `berth serve`, or name its socket with --address",
        address.display()
    )]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// The daemon refused a call.
    #[error("{step}: {}", spoken(status))]
    Call {
        /// What was asked for.
        step: String,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// Something on our side failed.
    #[error("{step}")]
    Io {
        /// What was tried.
        step: String,
        /// Why not.
        source: std::io::Error,
    },
    /// An argument that cannot be.
    #[error("{option} {value:?}: {mend}")]
    Argument {
        /// Which one.
        option: &'static str,
        /// As given.
        value: String,
        /// What to write instead.
        mend: &'static str,
    },
    /// No such container, or more than one.
    #[error("container {name:?}: {problem}; `berth ps --all` lists them")]
    Container {
        /// As given.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
}

impl CliError {
    /// Names the call that failed.
    pub(super) fn call(step: impl Into<String>) -> impl FnOnce(tonic::Status) -> Self {
        let step = step.into();
        move |status| Self::Call {
            step,
            status: Box::new(status),
        }
    }

    /// Names the step that failed on our side.
    pub(super) fn io(step: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let step = step.into();
        move |source| Self::Io { step, source }
    }
}

/// A status as a person reads it: the message, or the code where there is none.
fn spoken(status: &tonic::Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    }
}

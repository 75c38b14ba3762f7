//! Requests that wait for their client, each under a token that works once.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Limits, StreamError};

/// What a client may do with a token.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "the flags of CRI's ExecRequest"
)]
pub(crate) struct StdioFlags {
    /// Connect stdin.
    pub(crate) stdin: bool,
    /// Connect stdout.
    pub(crate) stdout: bool,
    /// Connect stderr; excludes `tty`.
    pub(crate) stderr: bool,
    /// A terminal.
    pub(crate) tty: bool,
}

/// A checked request. CRI: `ExecRequest`, `AttachRequest`, `PortForwardRequest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StreamRequest {
    /// Run a command in a container.
    Exec {
        /// Full id.
        container: String,
        /// Not empty.
        command: Vec<String>,
        /// Streams.
        flags: StdioFlags,
    },
    /// Connect to a container's first process.
    Attach {
        /// Full id.
        container: String,
        /// Streams.
        flags: StdioFlags,
    },
    /// Forward ports of a pod.
    PortForward {
        /// Full id.
        pod: String,
        /// Ports, for the old WebSocket protocol; others name them later.
        ports: Vec<u16>,
    },
}

impl StreamRequest {
    /// First part of the URL's path.
    pub(super) fn verb(&self) -> &'static str {
        match self {
            Self::Exec { .. } => "exec",
            Self::Attach { .. } => "attach",
            Self::PortForward { .. } => "portforward",
        }
    }

    fn check(&self) -> Result<(), StreamError> {
        let invalid = |field, mend| Err(StreamError::Invalid { field, mend });
        match self {
            Self::Exec { command, .. } if command.is_empty() => {
                invalid("cmd", "name a command to run")
            }
            Self::Exec { flags, .. } | Self::Attach { flags, .. } => {
                if flags.tty && flags.stderr {
                    return invalid(
                        "stderr",
                        "a terminal has one output: leave stderr out with tty",
                    );
                }
                if !(flags.stdin || flags.stdout || flags.stderr) {
                    return invalid("stdin", "ask for at least one of stdin, stdout and stderr");
                }
                Ok(())
            }
            Self::PortForward { .. } => Ok(()),
        }
    }
}

/// Requests that wait, by token.
#[derive(Debug)]
pub(crate) struct Sessions {
    limits: Limits,
    waiting: Mutex<HashMap<String, (Instant, StreamRequest)>>,
}

impl Sessions {
    /// Nobody waits.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: Mutex::default(),
        }
    }

    /// Keeps a request; returns its token: 128 random bits as 22 characters that need no escaping.
    ///
    /// # Errors
    /// [`StreamError::Invalid`], [`StreamError::Busy`].
    pub(crate) fn keep(&self, request: StreamRequest) -> Result<String, StreamError> {
        request.check()?;
        let mut bits = [0u8; 16];
        let token = match rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty())
        {
            Ok(16) => URL_SAFE_NO_PAD.encode(bits),
            _ => return Err(StreamError::Busy { open: 0 }),
        };
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| since.elapsed() < self.limits.token_life);
        if waiting.len() >= self.limits.tokens {
            return Err(StreamError::Busy {
                open: waiting.len(),
            });
        }
        waiting.insert(token.clone(), (Instant::now(), request));
        Ok(token)
    }

    /// Does a request wait under this token for this verb?
    pub(super) fn knows(&self, verb: &str, token: &str) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.get(token).is_some_and(|(since, request)| {
            request.verb() == verb && since.elapsed() < self.limits.token_life
        })
    }

    /// The request under a token for this verb; it is gone afterwards. `None`: used, too old, or never given.
    pub(super) fn redeem(&self, verb: &str, token: &str) -> Option<StreamRequest> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting
            .get(token)
            .is_none_or(|(_, request)| request.verb() != verb)
        {
            return None;
        }
        let (since, request) = waiting.remove(token)?;
        (since.elapsed() < self.limits.token_life).then_some(request)
    }
}

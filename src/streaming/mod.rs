//! The streaming server: exec, attach and port-forward over SPDY/3.1 and WebSocket.
//!
//! ```text
//! kubelet        daemon (cri, engine)                 this server
//!   | Exec(..) ----> |  Server::exec: token, URL          |
//!   | <---- URL      |                                    |
//!   | GET/POST /exec/TOKEN, Upgrade: SPDY/3.1 ----------> |  token redeemed once
//!   | <========== streams ==============================> |  Endpoint::exec (the engine)
//! ```
//!
//! What a session needs (a token, a connection, its tasks) is owned by its task and goes with it: when the
//! client leaves, inputs end, outputs fail and [`Stdio::gone`] resolves, so the endpoint ends too.

mod channel;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod http;
mod port_forward;
mod remote_command;
mod session;
pub(crate) mod spdy;
mod tls;
mod websocket;

#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

pub(crate) use channel::{Gone, Input, Output, Size, Stdio};
use session::Sessions;
pub(crate) use session::{StdioFlags, StreamRequest};
use tls::Tls;
pub(crate) use tls::{TlsError, TlsOptions, TlsPair, TlsSetting};

use crate::base::error::{HasKind, Kind};
use crate::base::tasks::Tasks;

/// How long a client may take to close its side when the session is over, and to take what was sent when it has closed its
/// own.
const LINGER: Duration = Duration::from_secs(10);

/// A future that an [`Endpoint`] returns.
pub(crate) type Work<T> = Pin<Box<dyn Future<Output = Result<T, EndpointError>> + Send>>;

/// What a session runs on: the engine.
pub(crate) trait Endpoint: Send + Sync + 'static {
    /// Runs a command in a container until it ends or the client is gone; returns its exit code.
    fn exec(&self, container: String, command: Vec<String>, stdio: Stdio) -> Work<i32>;
    /// Connects a client to a container's first process until that ends or the client is gone.
    fn attach(&self, container: String, stdio: Stdio) -> Work<i32>;
    /// Connects to a port on the pod's loopback, IPv4 first.
    fn dial(&self, pod: String, port: u16) -> Work<TcpStream>;
}

/// Why an endpoint could not serve a session; told to the client in words.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct EndpointError {
    /// What kind of failure.
    pub(crate) kind: Kind,
    /// The whole chain of causes.
    pub(crate) message: String,
}

/// Why no URL can be given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    /// The flags make no sense together.
    #[error("{field}: {mend}")]
    Invalid {
        /// Field of the request.
        field: &'static str,
        /// What to do.
        mend: &'static str,
    },
    /// Too many tokens wait to be redeemed.
    #[error("{open} streaming requests wait to be used: try again later")]
    Busy {
        /// How many.
        open: usize,
    },
    /// TLS cannot be as it is configured.
    #[error("TLS of the streaming server")]
    Tls(#[from] TlsError),
    /// The server cannot listen.
    #[error("streaming server: listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

impl HasKind for StreamError {
    fn kind(&self) -> Kind {
        match self {
            Self::Invalid { .. } => Kind::InvalidArgument,
            Self::Busy { .. } => Kind::ResourceExhausted,
            Self::Tls(_) | Self::Listen { .. } => Kind::Internal,
        }
    }
}

/// Times and limits of the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How long a token may wait to be used.
    pub(crate) token_life: Duration,
    /// How many tokens may wait.
    pub(crate) tokens: usize,
    /// How long a client may take for a TLS handshake, and for its request.
    pub(crate) request: Duration,
    /// How long a client may take to open the streams of a session.
    pub(crate) creation: Duration,
    /// How long a session may be silent in both directions.
    pub(crate) idle: Duration,
    /// How long the pod may be silent on a forwarded connection whose client has closed its half.
    pub(crate) half_closed: Duration,
    /// How many connections may be open that have not shown a token; for one more the oldest of them is closed.
    pub(crate) unanswered: usize,
    /// How long none of them is closed for another one.
    pub(crate) grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            token_life: Duration::from_secs(60),
            tokens: 1000,
            request: Duration::from_secs(5),
            creation: Duration::from_secs(30),
            idle: Duration::from_secs(4 * 60 * 60),
            half_closed: Duration::from_secs(60),
            unanswered: 1000,
            grace: Duration::from_secs(1),
        }
    }
}

/// The server. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Server {
    sessions: Arc<Sessions>,
    scheme: &'static str,
    address: SocketAddr,
}

impl Server {
    /// Listens on `address` (port 0: any free one) and serves until the daemon ends; encrypted, if there are options
    /// for that.
    ///
    /// # Errors
    /// [`StreamError::Listen`], [`StreamError::Tls`].
    pub(crate) async fn start(
        address: SocketAddr,
        endpoint: Arc<dyn Endpoint>,
        limits: Limits,
        tls: Option<TlsOptions>,
        tasks: Tasks,
    ) -> Result<Self, StreamError> {
        let failed = |source| StreamError::Listen { address, source };
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let tls = tls
            .map(|options| Tls::new(options, address.ip()))
            .transpose()?
            .map(Arc::new);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let sessions = Arc::new(Sessions::new(limits));
        let site = http::Site {
            sessions: sessions.clone(),
            endpoint,
            limits,
            tls,
            tasks: tasks.clone(),
        };
        // Ends with the runtime; nobody waits for it.
        drop(tasks.spawn(http::serve(listener, site)));
        Ok(Self {
            sessions,
            scheme,
            address,
        })
    }

    /// Keeps a request and returns the URL at which it can be used once within a minute.
    ///
    /// # Errors
    /// [`StreamError::Invalid`], [`StreamError::Busy`].
    pub(crate) fn url(&self, request: StreamRequest) -> Result<String, StreamError> {
        let verb = request.verb();
        let token = self.sessions.keep(request)?;
        let Self {
            scheme, address, ..
        } = self;
        Ok(format!("{scheme}://{address}/{verb}/{token}"))
    }
}

//! The HTTP side: routes, tokens, and the upgrade to SPDY or WebSocket.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};

use super::tls::{Tls, Wire};
use super::{Endpoint, Limits, Sessions, StreamRequest, port_forward, remote_command, websocket};
use crate::base::room::{Place, Room};
use crate::base::tasks::Tasks;

/// Name of SPDY in `Upgrade`.
pub(super) const SPDY: &str = "SPDY/3.1";
/// Protocols of a session over SPDY, in both directions.
static STREAM_PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
static WEBSOCKET_PROTOCOL: HeaderName = HeaderName::from_static("sec-websocket-protocol");

/// Bytes of a request's head: kubelet's are a few hundred.
const MAX_HEAD: usize = 16 * 1024;

/// A client whose machine is gone is asked after when nothing has come for this long,
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// then every so often,
const KEEP_ALIVE_AGAIN: Duration = Duration::from_secs(10);
/// so many times, before the connection counts as broken.
const KEEP_ALIVE_COUNT: u32 = 6;

/// What every connection needs.
#[derive(Clone)]
pub(super) struct Site {
    pub(super) sessions: Arc<Sessions>,
    pub(super) endpoint: Arc<dyn Endpoint>,
    pub(super) limits: Limits,
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) tasks: Tasks,
}

/// A session's transport as agreed on.
#[derive(Clone, Debug)]
pub(super) enum Transport {
    /// SPDY with this protocol on top.
    Spdy(String),
    /// WebSocket with this protocol (empty: none named).
    WebSocket(String),
}

/// Accepts connections for ever. Those that have not shown a token share a room: a crowd of them costs its own places,
/// never that of a client that asks for something.
pub(super) async fn serve(listener: TcpListener, site: Site) {
    let room = Room::new(site.limits.unanswered, site.limits.grace);
    loop {
        match listener.accept().await {
            Ok((socket, _peer)) => {
                let (place, loss) = room.enter().await;
                let (tasks, site) = (site.tasks.clone(), site.clone());
                drop(tasks.spawn(async move {
                    tokio::select! {
                        () = connection(socket, site, place) => {}
                        () = loss.happens() => {
                            tracing::debug!("streaming connection closed: others came, and it had sent no request");
                        }
                    }
                }));
            }
            Err(error) => {
                // Out of descriptors, say: others may free some.
                tracing::warn!(%error, "streaming connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn set_options(socket: &TcpStream) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(socket, KEEP_ALIVE_AGAIN)?;
    Ok(sockopt::set_tcp_keepcnt(socket, KEEP_ALIVE_COUNT)?)
}

/// Answers the request of a connection; after an upgrade the session owns that.
async fn connection(socket: TcpStream, site: Site, place: Place) {
    if let Err(error) = set_options(&socket) {
        tracing::debug!(%error, "streaming socket without its options");
    }
    let patience = site.limits.request;
    let opened = Wire::open(socket, site.tls.as_deref(), patience).await;
    let Some(socket) = opened else { return };
    let place = Arc::new(place);
    let service = service_fn(move |request| {
        let (site, place) = (site.clone(), place.clone());
        async move { Ok::<_, Infallible>(answer(request, &site, &place)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    // The header's limit tells how a request may come; this one, how long a client may go on with a body and with an
    // answer that it does not take.
    match tokio::time::timeout(patience * 2, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "streaming connection ended"),
        Err(_elapsed) => tracing::debug!("streaming connection closed: no upgrade in time"),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<String> {
    let mut response = Response::new(format!("{text}\n"));
    *response.status_mut() = status;
    // One request for a connection: the next would have its time again.
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    response
}

fn answer(request: Request<Incoming>, site: &Site, place: &Place) -> Response<String> {
    if !matches!(*request.method(), Method::GET | Method::POST) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "use GET or POST");
    }
    let mut parts = request.uri().path().trim_start_matches('/').split('/');
    let (verb, token, rest) = (parts.next(), parts.next(), parts.next());
    let (Some(verb), Some(token), None) = (verb, token, rest) else {
        return plain(StatusCode::NOT_FOUND, "no such page");
    };
    let forward = verb == "portforward";
    let transport = match negotiate(request.headers(), forward) {
        Ok(transport) => transport,
        Err((status, text)) => return plain(status, text),
    };
    let Some(response) = switching(&transport, request.headers()) else {
        return plain(
            StatusCode::BAD_REQUEST,
            "a websocket handshake needs Sec-WebSocket-Key",
        );
    };
    // Only now: a request that cannot be served must not use up the token. Whoever shows one that counts is put out no
    // more; who was put out has not used it.
    let known = site.sessions.knows(verb, token) && place.leave();
    let Some(wanted) = known.then(|| site.sessions.redeem(verb, token)).flatten() else {
        return plain(
            StatusCode::NOT_FOUND,
            "this token was used already, is too old, or was never given",
        );
    };
    let (tasks, site) = (site.tasks.clone(), site.clone());
    drop(tasks.spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => session(TokioIo::new(upgraded), wanted, transport, site).await,
            Err(error) => tracing::debug!(%error, "upgrade failed"),
        }
    }));
    response
}

async fn session(
    io: TokioIo<hyper::upgrade::Upgraded>,
    request: StreamRequest,
    transport: Transport,
    site: Site,
) {
    let verb = request.verb();
    let result = match (request, transport) {
        (StreamRequest::PortForward { pod, .. }, Transport::Spdy(_)) => {
            port_forward::over_spdy(io, pod, site).await
        }
        (StreamRequest::PortForward { pod, ports }, Transport::WebSocket(protocol)) => {
            websocket::port_forward(io, pod, ports, &protocol, site).await
        }
        (request, Transport::Spdy(protocol)) => {
            remote_command::over_spdy(io, request, &protocol, site).await
        }
        (request, Transport::WebSocket(protocol)) => {
            websocket::remote_command(io, request, &protocol, site).await
        }
    };
    if let Err(error) = result {
        tracing::debug!(verb, error, "streaming session ended early");
    }
}

fn has_word(headers: &HeaderMap, name: &HeaderName, word: &str) -> bool {
    words(headers, name).any(|w| w.eq_ignore_ascii_case(word))
}

fn words<'h>(headers: &'h HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'h str> {
    let values = headers.get_all(name).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(','))
        .map(str::trim)
}

type Refusal = (StatusCode, &'static str);

/// Which transport and protocol, of those the client offers.
pub(super) fn negotiate(headers: &HeaderMap, forward: bool) -> Result<Transport, Refusal> {
    if !has_word(headers, &CONNECTION, "upgrade") {
        return Err((
            StatusCode::BAD_REQUEST,
            "an Upgrade to SPDY/3.1 or websocket is needed",
        ));
    }
    if has_word(headers, &UPGRADE, "websocket") {
        let known = if forward {
            websocket::FORWARD_PROTOCOLS
        } else {
            websocket::COMMAND_PROTOCOLS
        };
        let mut offered = words(headers, &WEBSOCKET_PROTOCOL).peekable();
        if offered.peek().is_none() {
            return Ok(Transport::WebSocket(String::new()));
        }
        return offered
            .find(|o| known.contains(o))
            .map(|o| Transport::WebSocket(o.to_owned()))
            .ok_or((
                StatusCode::FORBIDDEN,
                "none of the offered Sec-WebSocket-Protocol is known",
            ));
    }
    if !has_word(headers, &UPGRADE, SPDY) {
        return Err((
            StatusCode::BAD_REQUEST,
            "Upgrade must be SPDY/3.1 or websocket",
        ));
    }
    let known: &[&str] = if forward {
        &[port_forward::PROTOCOL]
    } else {
        &remote_command::PROTOCOLS
    };
    let mut offered = words(headers, &STREAM_PROTOCOL).peekable();
    if offered.peek().is_none() {
        // Clients of before the header existed speak the first version.
        return Ok(Transport::Spdy(
            known.last().copied().unwrap_or_default().to_owned(),
        ));
    }
    offered
        .find(|o| known.contains(o))
        .map(|o| Transport::Spdy(o.to_owned()))
        .ok_or((
            StatusCode::FORBIDDEN,
            "none of the offered X-Stream-Protocol-Version is known",
        ))
}

fn switching(transport: &Transport, asked: &HeaderMap) -> Option<Response<String>> {
    let mut response = Response::new(String::new());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    match transport {
        Transport::Spdy(protocol) => {
            headers.insert(UPGRADE, HeaderValue::from_static(SPDY));
            headers.insert(&STREAM_PROTOCOL, HeaderValue::from_str(protocol).ok()?);
        }
        Transport::WebSocket(protocol) => {
            let key = asked.get("sec-websocket-key")?;
            headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
            let accept = websocket::accept_key(key.as_bytes());
            headers.insert("sec-websocket-accept", HeaderValue::from_str(&accept).ok()?);
            if !protocol.is_empty() {
                headers.insert(&WEBSOCKET_PROTOCOL, HeaderValue::from_str(protocol).ok()?);
            }
        }
    }
    Some(response)
}

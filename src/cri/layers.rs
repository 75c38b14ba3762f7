//! What surrounds every call: its span, its deadline, and the catching of panics.
//!
//! The deadline is the caller's `grpc-timeout`. When it passes, the caller gets DeadlineExceeded at once;
//! what goes on in tasks of the engine goes on.

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use http::{HeaderMap, Request, Response};
use tonic::body::Body;
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::Service;
use tracing::Instrument as _;

use crate::base::tasks::Tasks;
use crate::cri::berth_v1::images_server::ImagesServer;
use crate::cri::containerd_api::services::containers::v1::containers_server::ContainersServer;
use crate::cri::containerd_api::services::tasks::v1::tasks_server::TasksServer;
use crate::cri::containerd_api::services::version::v1::version_server::VersionServer;
use crate::cri::v1::image_service_server::ImageServiceServer;
use crate::cri::v1::runtime_service_server::RuntimeServiceServer;
use crate::cri::{MAX_MESSAGE, Server, Settings, calls, status};
use crate::engine::Engine;

/// Everything the socket offers, as one service of HTTP/2 requests. Clones are cheap.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    routes: Routes,
}

impl Api {
    /// The services over an engine.
    pub(crate) fn new(engine: Engine, tasks: Tasks, settings: Settings) -> Self {
        let server = Server {
            engine,
            tasks,
            settings: Arc::new(settings),
        };
        let routes = Routes::default()
            .add_service(
                RuntimeServiceServer::new(server.clone())
                    .max_decoding_message_size(MAX_MESSAGE)
                    .max_encoding_message_size(MAX_MESSAGE),
            )
            .add_service(
                ImageServiceServer::new(server.clone())
                    .max_decoding_message_size(MAX_MESSAGE)
                    .max_encoding_message_size(MAX_MESSAGE),
            )
            .add_service(ContainersServer::new(server.clone()))
            .add_service(TasksServer::new(server.clone()))
            .add_service(VersionServer::new(server.clone()))
            .add_service(ImagesServer::new(server))
            .prepare();
        Self { routes }
    }
}

impl<B> Service<Request<B>> for Api
where
    B: hyper::body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path().trim_start_matches('/');
        // Service and method without the package.
        let rpc = path.rsplit('.').next().unwrap_or(path).to_owned();
        let limit = timeout(request.headers());
        let mut routes = self.routes.clone();
        let call = calls::begin(&rpc);
        let span = tracing::info_span!("rpc", rpc);
        let answer = async move {
            let started = Instant::now();
            let response = guarded(routes.call(request.map(Body::new)), limit).await;
            let elapsed = started.elapsed();
            let status = Status::from_header_map(response.headers());
            call.end(status.as_ref().map_or(Code::Ok, Status::code), elapsed);
            report(status.as_ref(), elapsed);
            Ok(response)
        };
        Box::pin(answer.instrument(span))
    }
}

/// The response of a handler; that of its panic, or of its deadline.
async fn guarded(
    handler: impl Future<Output = Result<Response<Body>, Infallible>>,
    limit: Option<Duration>,
) -> Response<Body> {
    let work = AssertUnwindSafe(handler).catch_unwind();
    let outcome = match limit {
        None => work.await,
        Some(limit) => match tokio::time::timeout(limit, work).await {
            Ok(outcome) => outcome,
            Err(_elapsed) => {
                return Status::deadline_exceeded(format!(
                    "the deadline of {} ms passed before the request was done",
                    limit.as_millis()
                ))
                .into_http();
            }
        },
    };
    match outcome {
        Ok(Ok(response)) => response,
        Ok(Err(never)) => match never {},
        // The panic hook has logged it.
        Err(_payload) => status::panicked().into_http(),
    }
}

/// One line per call. What the caller did wrong is told at info, what we did at error.
fn report(status: Option<&Status>, elapsed: Duration) {
    let elapsed_ms = elapsed.as_millis();
    let Some(status) = status else {
        tracing::debug!(elapsed_ms, "call answered");
        return;
    };
    let (code, error) = (status.code(), status.message());
    match code {
        Code::Ok => tracing::debug!(elapsed_ms, "call answered"),
        Code::Internal | Code::DataLoss => {
            tracing::error!(?code, error, elapsed_ms, "call failed");
        }
        Code::Unavailable | Code::ResourceExhausted | Code::Unknown => {
            tracing::warn!(?code, error, elapsed_ms, "call failed");
        }
        _ => tracing::info!(?code, error, elapsed_ms, "call refused"),
    }
}

/// The caller's limit. gRPC: PROTOCOL-HTTP2, at most eight digits and a unit. What cannot be read is none.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(count.checked_mul(3600)?),
        "M" => Duration::from_secs(count.checked_mul(60)?),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(text: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert("grpc-timeout", text.parse().unwrap());
        timeout(&headers)
    }

    #[test]
    fn deadlines_are_read() {
        assert_eq!(limit("1m"), Some(Duration::from_millis(1)));
        assert_eq!(
            limit("99999999H"),
            Some(Duration::from_secs(359_999_996_400))
        );
        assert_eq!(limit("250000u"), Some(Duration::from_millis(250)));
        for text in ["", "m", "123456789S", "-1S", "1x", "1 S"] {
            assert_eq!(limit(text), None, "{text}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let response = guarded(async { panic!("planted") }, None).await;
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::Internal);
    }

    #[tokio::test]
    async fn a_deadline_is_an_answer() {
        let never = std::future::pending();
        let response = guarded(never, Some(Duration::from_millis(1))).await;
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
    }
}

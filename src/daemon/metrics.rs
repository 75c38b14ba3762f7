//! The daemon's own metrics over HTTP, for Prometheus: `GET /metrics`. Off unless `metrics_address` is set.
//!
//! What containers use is not here: kubelet serves that, from `ListPodSandboxMetrics`.

use std::net::SocketAddr;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::base::container::{ContainerFilter, ContainerState};
use crate::base::counters::{self, head, sample};
use crate::base::pod::{PodFilter, PodState};
use crate::base::room::Room;
use crate::base::tasks::Tasks;
use crate::cri::calls;
use crate::engine::Engine;

/// Connections at a time; for one more the oldest is closed.
const CONNECTIONS: usize = 500;
/// How long none is closed for another one.
const GRACE: Duration = Duration::from_secs(1);
/// How long a client may take to send its request.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a connection may live.
const LIFE: Duration = Duration::from_secs(20);
/// Bytes of a request's head.
const MAX_HEAD: usize = 16 * 1024;

/// Listens on an address.
///
/// # Errors
/// The address is taken, or not one of this machine.
pub(super) async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(address).await?;
    tracing::info!(address = %listener.local_addr()?, "metrics are served");
    Ok(listener)
}

/// Serves until the daemon ends.
pub(super) async fn serve(
    listener: TcpListener,
    engine: Engine,
    tasks: Tasks,
    mut closing: watch::Receiver<bool>,
) {
    let room = Room::new(CONNECTIONS, GRACE);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closing| *closing) => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let (place, loss) = room.enter().await;
                let (engine, mut ending) = (engine.clone(), closing.clone());
                drop(tasks.spawn(async move {
                    let service = service_fn(move |request| answer(request, engine.clone()));
                    let served = http1::Builder::new()
                        .timer(TokioTimer::new())
                        .header_read_timeout(PATIENCE)
                        .max_buf_size(MAX_HEAD)
                        .keep_alive(false)
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = tokio::time::timeout(LIFE, served) => {}
                        () = loss.happens() => {}
                        _ = ending.wait_for(|closing| *closing) => {}
                    }
                    drop(place);
                }));
            }
            Err(error) => {
                tracing::warn!(%error, "connection for metrics not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn answer<B>(
    request: Request<B>,
    engine: Engine,
) -> Result<Response<String>, std::convert::Infallible> {
    let (status, kind, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            let kind = "text/plain; version=0.0.4; charset=utf-8";
            (StatusCode::OK, kind, render(&engine))
        }
        (_, "/metrics") => (
            StatusCode::METHOD_NOT_ALLOWED,
            "text/plain",
            "use GET\n".to_owned(),
        ),
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain",
            "only /metrics is here\n".to_owned(),
        ),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert("content-type", http::HeaderValue::from_static(kind));
    Ok(response)
}

/// Everything in Prometheus' text format.
fn render(engine: &Engine) -> String {
    let mut out = String::with_capacity(16 * 1024);
    let family = "berth_build_info";
    head(&mut out, family, "gauge", "Always 1; the labels tell.");
    let labels = format!("version=\"{}\"", crate::cri::VERSION);
    sample(&mut out, family, &labels, 1);
    objects(engine, &mut out);
    counters::render(&mut out);
    calls::render(&mut out);
    let family = "berth_tasks";
    head(
        &mut out,
        family,
        "gauge",
        "Tasks of the daemon that have not ended.",
    );
    let tasks = tokio::runtime::Handle::current().metrics();
    sample(&mut out, family, "", tasks.num_alive_tasks());
    process(&mut out);
    out
}

fn objects(engine: &Engine, out: &mut String) {
    let pods = engine.list_pod_sandboxes(&PodFilter::default());
    let family = "berth_pods";
    head(out, family, "gauge", "Pod sandboxes by state.");
    for (label, state) in [
        ("state=\"ready\"", PodState::Ready),
        ("state=\"notready\"", PodState::NotReady),
    ] {
        let count = pods.iter().filter(|pod| pod.state == state).count();
        sample(out, family, label, count);
    }
    let containers = engine.list_containers(&ContainerFilter::default());
    let family = "berth_containers";
    head(out, family, "gauge", "Containers by state.");
    for (label, state) in [
        ("state=\"created\"", ContainerState::Created),
        ("state=\"running\"", ContainerState::Running),
        ("state=\"exited\"", ContainerState::Exited),
        ("state=\"unknown\"", ContainerState::Unknown),
    ] {
        let count = containers.iter().filter(|one| one.state == state).count();
        sample(out, family, label, count);
    }
}

/// What Prometheus expects of every process, as far as it can be read. proc_pid_stat(5).
fn process(out: &mut String) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // After the name, which may hold anything: utime is field 14 of all, stime the next; in 1/100 s.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: Vec<u64> = fields
        .split_ascii_whitespace()
        .skip(11)
        .take(2)
        .map_while(|field| field.parse().ok())
        .collect();
    if let [user, system] = ticks[..] {
        let ticks = user + system;
        let family = "process_cpu_seconds_total";
        head(
            out,
            family,
            "counter",
            "CPU time of the daemon, in seconds.",
        );
        let value = format!("{}.{:02}", ticks / 100, ticks % 100);
        sample(out, family, "", value);
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        let kib = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()
    });
    if let Some(kib) = resident {
        let family = "process_resident_memory_bytes";
        head(
            out,
            family,
            "gauge",
            "Resident memory of the daemon, in bytes.",
        );
        sample(out, family, "", kib * 1024);
    }
    if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
        let family = "process_open_fds";
        head(out, family, "gauge", "Open descriptors of the daemon.");
        // The one that reads the directory is not counted.
        sample(out, family, "", descriptors.count().saturating_sub(1));
    }
}

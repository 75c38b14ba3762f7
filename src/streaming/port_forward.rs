//! Port-forward over SPDY: pairs of a `data` and an `error` stream with the same `requestID`, each pair one
//! connection to a port of the pod. What goes wrong with one is told on its error stream; the others go on.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::channel::{Gone, Input, Output};
use super::http::Site;
use super::spdy::{Connection, Stream};

/// The protocol's name.
pub(super) const PROTOCOL: &str = "portforward.k8s.io";
/// Headers of a stream.
const PORT: &str = "port";
const REQUEST_ID: &str = "requestID";

/// Streams of a pair as they arrive.
struct Pair {
    since: Instant,
    data: Option<Stream>,
    error: Option<Stream>,
}

/// Serves a port-forward until the client leaves.
pub(super) async fn over_spdy<S>(socket: S, pod: String, site: Site) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut connection = Connection::start(socket, site.limits.idle, &site.tasks);
    let mut pairs: HashMap<String, Pair> = HashMap::new();
    let mut unnumbered = 0u64;
    while let Some(stream) = connection.accept().await {
        // A pair whose other half never came: dropping resets what there is of it.
        pairs.retain(|_, pair| pair.since.elapsed() < site.limits.creation);
        let id = match stream.header(REQUEST_ID) {
            Some(id) => id.to_owned(),
            // Clients of before requestID open error and data of one connection in this order.
            None => {
                unnumbered += 1;
                format!("#{}", unnumbered.div_ceil(2))
            }
        };
        let new = || Pair {
            since: Instant::now(),
            data: None,
            error: None,
        };
        let pair = pairs.entry(id.clone()).or_insert_with(new);
        match stream.header("streamType") {
            Some("data") => pair.data = Some(stream),
            Some("error") => pair.error = Some(stream),
            // Dropping the stream resets it, and only it.
            other => tracing::debug!(?other, "port-forward stream of unknown type"),
        }
        if let Some(Pair {
            data: Some(_),
            error: Some(_),
            ..
        }) = pairs.get(&id)
            && let Some(Pair {
                data: Some(data),
                error: Some(error),
                ..
            }) = pairs.remove(&id)
        {
            let (pod, gone, site) = (pod.clone(), connection.gone.clone(), site.clone());
            let tasks = site.tasks.clone();
            drop(tasks.spawn(async move { forward(data, error, pod, gone, site).await }));
        }
    }
    Ok(())
}

async fn forward(data: Stream, error: Stream, pod: String, gone: Gone, site: Site) {
    let port = data
        .header(PORT)
        .and_then(|text| text.parse::<u16>().ok())
        .filter(|port| *port > 0);
    let Stream { input, output, .. } = data;
    let Some(port) = port else {
        tell(error.output, "the port header is not a port (1..65535)").await;
        output.end().await;
        return;
    };
    match site.endpoint.dial(pod, port).await {
        Ok(socket) => {
            let patience = site.limits.half_closed;
            if let Err(failure) = copy(socket, input, output, gone, patience).await {
                tell(error.output, &format!("port {port}: {failure}")).await;
            } else {
                error.output.end().await;
            }
        }
        Err(failure) => {
            tell(
                error.output,
                &format!("an error occurred forwarding to port {port}: {failure}"),
            )
            .await;
            output.end().await;
        }
    }
}

async fn tell(output: Output, text: &str) {
    let _gone = output
        .send(Bytes::copy_from_slice(text.as_bytes()))
        .await
        .is_err();
    output.end().await;
}

/// Copies both ways until the pod has closed its half, or the client is gone.
///
/// # Errors
/// The connection to the pod broke; `TimedOut`: the client has closed its half and the pod has said nothing for `patience`.
/// The output is reset then.
pub(super) async fn copy(
    socket: TcpStream,
    mut input: Input,
    output: Output,
    mut gone: Gone,
    patience: Duration,
) -> io::Result<()> {
    let (mut from_pod, mut to_pod) = socket.into_split();
    let (half_closed, uploaded) = watch::channel(false);
    let upload = async {
        while let Some(bytes) = input.recv().await {
            if let Err(error) = to_pod.write_all(&bytes).await {
                // The pod closed its end; what it had to say comes the other way.
                return if error.kind() == io::ErrorKind::BrokenPipe {
                    Ok(())
                } else {
                    Err(error)
                };
            }
        }
        to_pod.shutdown().await
    };
    let download = async {
        let mut buffer = BytesMut::with_capacity(32 << 10);
        loop {
            buffer.reserve(16 << 10);
            let read = tokio::select! {
                read = from_pod.read_buf(&mut buffer) => read?,
                () = silence(uploaded.clone(), patience) => return Err(silent(patience)),
            };
            if read == 0 {
                output.end().await;
                return Ok(());
            }
            if output.send(buffer.split().freeze()).await.is_err() {
                return Ok(());
            }
        }
    };
    tokio::pin!(upload, download);
    tokio::select! {
        () = gone.wait() => Ok(()),
        // The pod is done: nobody reads what else the client sends.
        result = &mut download => result,
        result = &mut upload => {
            result?;
            half_closed.send_replace(true);
            tokio::select! {
                () = gone.wait() => Ok(()),
                result = download => result,
            }
        }
    }
}

async fn silence(mut half_closed: watch::Receiver<bool>, patience: Duration) {
    // An error: the copying itself has ended.
    if half_closed.wait_for(|closed| *closed).await.is_ok() {
        tokio::time::sleep(patience).await;
    }
}

fn silent(patience: Duration) -> io::Error {
    let text = format!(
        "nothing came from it for {} s after the client had closed its half of the connection",
        patience.as_secs()
    );
    io::Error::new(io::ErrorKind::TimedOut, text)
}

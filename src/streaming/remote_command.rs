//! Exec and attach: Kubernetes' remote command protocol, over SPDY here; what is common to both transports too.
//!
//! The client opens one stream for each of `error`, `stdin`, `stdout`, `stderr` and `resize` (header
//! `streamType`). The result goes to the error stream: from v4 on a JSON `Status`, before that only the text of a
//! failure.

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::base::error::Kind;

use super::channel::{Activity, Gone, Input, Output, Size, Stdio};
use super::http::Site;
use super::session::{StdioFlags, StreamRequest};
use super::spdy::{Connection, Stream};
use super::{EndpointError, LINGER, Work};

/// Protocols over SPDY, the newest first.
pub(super) const PROTOCOLS: [&str; 4] = [
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];
/// Does this protocol have JSON results?
pub(super) fn has_status(protocol: &str) -> bool {
    protocol.starts_with("v4.") || protocol.starts_with("v5.")
}

/// The flags of an exec or attach.
pub(super) fn flags(request: &StreamRequest) -> Option<&StdioFlags> {
    match request {
        StreamRequest::Exec { flags, .. } | StreamRequest::Attach { flags, .. } => Some(flags),
        StreamRequest::PortForward { .. } => None,
    }
}

/// Does what is asked for until it is over, the client has gone, or nothing has been said for too long: that is the result
/// then, while the client can still hear it. Transports give silence [`LINGER`] more before they cut the connection.
pub(super) async fn work(
    request: StreamRequest,
    mut stdio: Stdio,
    site: &Site,
    activity: &Activity,
) -> Result<i32, EndpointError> {
    let (ending, over) = Gone::new();
    let mut gone = std::mem::replace(&mut stdio.gone, over);
    let mut work = begin(request, stdio, site);
    let idle = site.limits.idle;
    tokio::select! {
        result = &mut work => return result,
        () = gone.wait() => {
            ending.send_replace(true);
            return work.await;
        }
        () = activity.silence(idle) => {}
    }
    ending.send_replace(true);
    let _cut_off = work.await;
    Err(EndpointError {
        kind: Kind::DeadlineExceeded,
        message: format!(
            "the session was ended: nothing was said in it for {} s (stream_idle_timeout)",
            idle.as_secs()
        ),
    })
}

/// Starts the request on the endpoint.
fn begin(request: StreamRequest, stdio: Stdio, site: &Site) -> Work<i32> {
    match request {
        StreamRequest::Exec {
            container, command, ..
        } => site.endpoint.exec(container, command, stdio),
        StreamRequest::Attach { container, .. } => site.endpoint.attach(container, stdio),
        StreamRequest::PortForward { .. } => Box::pin(async { Ok(0) }),
    }
}

/// What the error stream says about a result; empty: nothing (success, before v4).
pub(super) fn verdict(protocol: &str, result: &Result<i32, EndpointError>) -> Bytes {
    let json = has_status(protocol);
    let text = match result {
        Ok(0) if json => r#"{"metadata":{},"status":"Success"}"#.to_owned(),
        Ok(0) => String::new(),
        Ok(code) if json => serde_json::json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
            "code": 500,
        })
        .to_string(),
        Ok(code) => format!("command terminated with non-zero exit code: {code}"),
        Err(error) if json => serde_json::json!({
            "metadata": {},
            "status": "Failure",
            "message": error.message,
            "reason": "InternalError",
            "code": 500,
        })
        .to_string(),
        Err(error) => error.message.clone(),
    };
    text.into()
}

/// Parses what comes on a resize stream: JSON objects `{"Width": .., "Height": ..}`, one after the other. Returns
/// the sizes (1 to 65,535 each) and how many bytes were read; an incomplete object stays for the next time. What is no size
/// is passed over; with what is no JSON goes the rest of the text.
pub(super) fn sizes(text: &[u8]) -> (Vec<Size>, usize) {
    let mut objects = serde_json::Deserializer::from_slice(text).into_iter::<serde_json::Value>();
    let mut found = vec![];
    let mut read = 0;
    loop {
        match objects.next() {
            Some(Ok(object)) => {
                read = objects.byte_offset();
                let cells = |name| {
                    let cells = u16::try_from(object.get(name)?.as_u64()?).ok()?;
                    Some(cells).filter(|cells| *cells > 0)
                };
                if let (Some(width), Some(height)) = (cells("Width"), cells("Height")) {
                    found.push(Size { width, height });
                }
            }
            Some(Err(error)) if !error.is_eof() => return (found, text.len()),
            Some(Err(_)) | None => return (found, read),
        }
    }
}

/// Longest text of sizes that is kept while it is incomplete; more is no size.
const MAX_SIZE_TEXT: usize = 4096;

/// Passes sizes on until the client closes the stream.
pub(super) async fn pass_sizes(mut input: Input, sizes_to: mpsc::Sender<Size>) {
    let mut text = vec![];
    while let Some(bytes) = input.recv().await {
        text.extend_from_slice(&bytes);
        let (found, read) = sizes(&text);
        text.drain(..read);
        if text.len() > MAX_SIZE_TEXT {
            text.clear();
        }
        for size in found {
            if sizes_to.send(size).await.is_err() {
                return;
            }
        }
    }
}

/// The streams of a session, once all that are needed are there.
#[derive(Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Opened {
    fn complete(&self, flags: &StdioFlags, resize: bool) -> bool {
        self.error.is_some()
            && (!flags.stdin || self.stdin.is_some())
            && (!flags.stdout || self.stdout.is_some())
            && (!flags.stderr || self.stderr.is_some())
            && (!(flags.tty && resize) || self.resize.is_some())
    }

    async fn collect(
        connection: &mut Connection,
        flags: &StdioFlags,
        resize: bool,
    ) -> Result<Self, String> {
        let mut opened = Self::default();
        while !opened.complete(flags, resize) {
            let stream = connection.accept().await.ok_or("the client left")?;
            let slot = match stream.header("streamType") {
                Some("error") => &mut opened.error,
                Some("stdin") => &mut opened.stdin,
                Some("stdout") => &mut opened.stdout,
                Some("stderr") => &mut opened.stderr,
                Some("resize") => &mut opened.resize,
                other => return Err(format!("a stream of type {other:?}")),
            };
            *slot = Some(stream);
        }
        Ok(opened)
    }
}

/// Serves an exec or attach.
pub(super) async fn over_spdy<S>(
    socket: S,
    request: StreamRequest,
    protocol: &str,
    site: Site,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let flags = flags(&request).cloned().ok_or("no command to run")?;
    let mut connection = Connection::start(socket, site.limits.idle + LINGER, &site.tasks);
    let resize = protocol != "channel.k8s.io" && protocol != "v2.channel.k8s.io";
    let collected = Opened::collect(&mut connection, &flags, resize);
    let opened = tokio::time::timeout(site.limits.creation, collected)
        .await
        .map_err(|_elapsed| "the client did not open its streams in time")??;
    connection.refuse_more();
    let (sizes_to, resize) = mpsc::channel(8);
    let keep = opened.resize.map(|stream| {
        let Stream { input, output, .. } = stream;
        drop(site.tasks.spawn(pass_sizes(input, sizes_to)));
        output
    });
    let error = opened.error.ok_or("no error stream")?;
    // The client's half of a stream that we do not use must stay: dropping it would reset the stream.
    let (stdin_input, stdin_output) = split(opened.stdin);
    let (_stdout_input, stdout) = split(opened.stdout);
    let (_stderr_input, stderr) = split(opened.stderr);
    let stdio = Stdio {
        stdin: stdin_input.filter(|_| flags.stdin),
        stdout,
        stderr,
        tty: flags.tty,
        resize,
        gone: connection.gone.clone(),
    };
    let result = work(request, stdio, &site, &connection.activity).await;
    let gone = error.output.send(verdict(protocol, &result)).await.is_err();
    if !gone {
        error.output.end().await;
        for output in [stdin_output, keep].into_iter().flatten() {
            output.end().await;
        }
        connection.finish(LINGER).await;
    }
    Ok(())
}

fn split(stream: Option<Stream>) -> (Option<Input>, Option<Output>) {
    match stream {
        Some(stream) => (Some(stream.input), Some(stream.output)),
        None => (None, None),
    }
}

//! Sessions over both transports against an endpoint that echoes; frames and blocks under arbitrary bytes.

mod limits;
mod websocket;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::session::StdioFlags;
use super::spdy::frame::{self, Frame, HEAD};
use super::spdy::headers::{Reader, Writer, dictionary};
use super::*;

/// Copies stdin to stdout, tells sizes and the command on stderr, ends with the code in the first argument. `stall` reads
/// nothing and never ends; `tick` writes a letter ten times a second for two seconds.
struct Echo {
    running: Arc<AtomicUsize>,
}

impl Endpoint for Echo {
    fn exec(&self, _container: String, command: Vec<String>, mut stdio: Stdio) -> Work<i32> {
        let running = self.running.clone();
        Box::pin(async move {
            running.fetch_add(1, Ordering::SeqCst);
            let work = async {
                if command[0] == "fail" {
                    let message = "no such thing".to_owned();
                    return Err(EndpointError {
                        kind: Kind::Internal,
                        message,
                    });
                }
                if command[0] == "stall" {
                    std::future::pending::<()>().await;
                }
                if command[0] == "tick" {
                    let stdout = stdio.stdout.take().unwrap();
                    for _ in 0..20 {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        stdout.send("x".into()).await.unwrap();
                    }
                    stdout.end().await;
                }
                if let Some(stderr) = stdio.stderr.take() {
                    stderr.send(command.join(" ").into()).await.unwrap();
                    stderr.end().await;
                }
                if stdio.tty
                    && let (Some(size), Some(out)) = (stdio.resize.recv().await, &stdio.stdout)
                {
                    out.send(format!("{}x{};", size.width, size.height).into())
                        .await
                        .unwrap();
                }
                if let (Some(mut stdin), Some(stdout)) = (stdio.stdin.take(), stdio.stdout.take()) {
                    while let Some(bytes) = stdin.recv().await {
                        if stdout.send(bytes).await.is_err() {
                            break;
                        }
                    }
                    stdout.end().await;
                }
                Ok(command[0].parse().unwrap_or(0))
            };
            let result = tokio::select! {
                result = work => result,
                () = stdio.gone.wait() => Ok(137),
            };
            running.fetch_sub(1, Ordering::SeqCst);
            result
        })
    }

    fn attach(&self, container: String, stdio: Stdio) -> Work<i32> {
        self.exec(container, vec!["0".into()], stdio)
    }

    fn dial(&self, _pod: String, port: u16) -> Work<TcpStream> {
        Box::pin(async move {
            TcpStream::connect(("127.0.0.1", port))
                .await
                .map_err(|error| EndpointError {
                    kind: Kind::Unavailable,
                    message: error.to_string(),
                })
        })
    }
}

struct Fixture {
    server: Server,
    running: Arc<AtomicUsize>,
}

async fn fixture() -> Fixture {
    fixture_with(Limits::default()).await
}

async fn fixture_with(limits: Limits) -> Fixture {
    let running = Arc::new(AtomicUsize::new(0));
    let endpoint = Arc::new(Echo {
        running: running.clone(),
    });
    let address = "127.0.0.1:0".parse().unwrap();
    let server = Server::start(address, endpoint, limits, None, Tasks::default())
        .await
        .unwrap();
    Fixture { server, running }
}

fn flags(text: &str) -> StdioFlags {
    StdioFlags {
        stdin: text.contains('i'),
        stdout: text.contains('o'),
        stderr: text.contains('e'),
        tty: text.contains('t'),
    }
}

fn exec(command: &str, streams: &str) -> StreamRequest {
    StreamRequest::Exec {
        container: "c".into(),
        command: command.split(' ').map(str::to_owned).collect(),
        flags: flags(streams),
    }
}

/// Sends an upgrade request; returns the status, the head and the socket.
async fn upgrade(url: &str, headers: &str) -> (u16, String, TcpStream) {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut socket = TcpStream::connect(host).await.unwrap();
    let request =
        format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if socket.read(&mut byte).await.unwrap() == 0 {
            break;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    // After anything but an upgrade the connection ends.
    let then = if status == 101 { "upgrade" } else { "close" };
    let small = head.to_lowercase();
    assert!(small.contains(&format!("connection: {then}\r\n")), "{head}");
    (status, head, socket)
}

/// A client of SPDY, as simple as can be.
struct Spdy {
    socket: TcpStream,
    reader: Reader,
    writer: Writer,
    next: u32,
}

impl Spdy {
    async fn connect(url: &str, protocol: &str) -> Self {
        let headers = format!("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: {protocol}\r\n");
        let (status, head, socket) = upgrade(url, &headers).await;
        assert_eq!(status, 101, "{head}");
        assert!(
            head.to_lowercase()
                .contains(&format!("x-stream-protocol-version: {protocol}"))
        );
        Self {
            socket,
            reader: Reader::new(),
            writer: Writer::new(),
            next: 1,
        }
    }

    async fn send(&mut self, frame: Frame) {
        let mut bytes = BytesMut::new();
        frame.write(&mut bytes);
        self.socket.write_all(&bytes).await.unwrap();
    }

    async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let headers: Vec<_> = headers
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect();
        let block = self.writer.write(&headers).unwrap();
        self.send(Frame::SynStream {
            id,
            block,
            fin: false,
        })
        .await;
        id
    }

    async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        self.send(Frame::Data {
            id,
            bytes: Bytes::copy_from_slice(bytes),
            fin,
        })
        .await;
    }

    async fn frame(&mut self) -> Option<Frame> {
        let mut head = [0; HEAD];
        self.socket.read_exact(&mut head).await.ok()?;
        let mut payload = BytesMut::zeroed(frame::payload_length(head).unwrap());
        self.socket.read_exact(&mut payload).await.unwrap();
        let frame = frame::parse(head, payload.freeze()).unwrap();
        if let Frame::SynReply { block, .. } = &frame {
            assert!(self.reader.read(block).unwrap().is_empty());
        }
        Some(frame)
    }

    /// Reads until every one of these streams has ended; their bytes.
    async fn until_ended(&mut self, ids: &[u32]) -> Vec<Vec<u8>> {
        let mut open: Vec<u32> = ids.to_vec();
        let mut bytes = vec![vec![]; ids.len()];
        while !open.is_empty() {
            let frame = self
                .frame()
                .await
                .expect("the server ends streams before it leaves");
            if let Frame::Data {
                id,
                bytes: data,
                fin,
            } = frame
            {
                if let Some(at) = ids.iter().position(|one| *one == id) {
                    bytes[at].extend_from_slice(&data);
                }
                if fin {
                    open.retain(|one| *one != id);
                }
            }
        }
        bytes
    }
}

async fn limit<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .expect("within a minute")
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_spdy_echoes_and_tells_the_code() {
    let f = fixture().await;
    let url = f.server.url(exec("3 words", "ioe")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let error = spdy.open(&[("Streamtype", "error")]).await;
    let stdin = spdy.open(&[("streamtype", "stdin")]).await;
    let stdout = spdy.open(&[("streamType", "stdout")]).await;
    let stderr = spdy.open(&[("streamType", "stderr")]).await;
    spdy.send(Frame::Ping(7)).await;
    let big = vec![b'x'; 300_000];
    for part in big.chunks(30_000) {
        spdy.data(stdin, part, false).await;
    }
    spdy.data(stdin, b"", true).await;
    let got = limit(spdy.until_ended(&[error, stdout, stderr])).await;
    assert_eq!(got[1], big);
    assert_eq!(got[2], b"3 words");
    let status: serde_json::Value = serde_json::from_slice(&got[0]).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "3");
    assert_eq!(status["reason"], "NonZeroExitCode");
    // The token is used up.
    assert_eq!(upgrade(&url, "Upgrade: SPDY/3.1\r\n").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_of_a_peer_that_has_them_are_honoured() {
    let f = fixture().await;
    let url = f.server.url(exec("0", "io")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    spdy.send(Frame::Settings(vec![(7, 10)])).await;
    let error = spdy.open(&[("streamType", "error")]).await;
    let stdin = spdy.open(&[("streamType", "stdin")]).await;
    let stdout = spdy.open(&[("streamType", "stdout")]).await;
    spdy.data(stdin, b"0123456789abcdef", true).await;
    let first = limit(async {
        loop {
            if let Some(Frame::Data { id, bytes, .. }) = spdy.frame().await
                && id == stdout
            {
                return bytes;
            }
        }
    })
    .await;
    assert_eq!(&first[..], b"0123456789");
    spdy.send(Frame::WindowUpdate {
        id: error,
        delta: 1000,
    })
    .await;
    spdy.send(Frame::WindowUpdate {
        id: stdout,
        delta: 100,
    })
    .await;
    let got = limit(spdy.until_ended(&[stdout, error])).await;
    assert_eq!(got[0], b"abcdef");
    assert!(String::from_utf8_lossy(&got[1]).contains("Success"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_ends_the_session() {
    let f = fixture().await;
    for round in 0..20 {
        let url = f.server.url(exec("0", "io")).unwrap();
        let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
        spdy.open(&[("streamType", "error")]).await;
        let stdin = spdy.open(&[("streamType", "stdin")]).await;
        if round % 2 == 0 {
            spdy.open(&[("streamType", "stdout")]).await;
            spdy.data(stdin, b"some", false).await;
            limit(async {
                while f.running.load(Ordering::SeqCst) == 0 {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
        drop(spdy);
        limit(async {
            while f.running.load(Ordering::SeqCst) > 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn terminals_have_sizes_and_old_protocols_plain_errors() {
    let f = fixture().await;
    let url = f.server.url(exec("0", "iot")).unwrap();
    let mut spdy = Spdy::connect(&url, "v3.channel.k8s.io").await;
    let error = spdy.open(&[("streamType", "error")]).await;
    let stdin = spdy.open(&[("streamType", "stdin")]).await;
    let stdout = spdy.open(&[("streamType", "stdout")]).await;
    let resize = spdy.open(&[("streamType", "resize")]).await;
    spdy.data(resize, br#"{"Width":80,"Hei"#, false).await;
    spdy.data(resize, br#"ght":25}"#, false).await;
    spdy.data(stdin, b"x", true).await;
    let got = limit(spdy.until_ended(&[error, stdout])).await;
    assert_eq!(
        (got[0].as_slice(), got[1].as_slice()),
        (&b""[..], &b"80x25;x"[..])
    );
    let url = f.server.url(exec("fail", "o")).unwrap();
    let mut spdy = Spdy::connect(&url, "channel.k8s.io").await;
    let error = spdy.open(&[("streamType", "error")]).await;
    spdy.open(&[("streamType", "stdout")]).await;
    assert_eq!(limit(spdy.until_ended(&[error])).await[0], b"no such thing");
}

async fn echo_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(Tasks::default().spawn(async {}));
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listener = listener.into_std().unwrap();
        runtime.block_on(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                let (mut read, mut write) = socket.into_split();
                let _reset = tokio::io::copy(&mut read, &mut write).await.is_err();
            }
        });
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_forwarded_and_one_failure_spares_the_others() {
    let f = fixture().await;
    let port = echo_port().await.to_string();
    let request = StreamRequest::PortForward {
        pod: "p".into(),
        ports: vec![],
    };
    let mut spdy = Spdy::connect(&f.server.url(request).unwrap(), "portforward.k8s.io").await;
    let pair = |kind, port, id| [("streamType", kind), ("port", port), ("requestID", id)];
    let bad_error = spdy.open(&pair("error", "1", "0")).await;
    spdy.open(&pair("data", "1", "0")).await;
    let nonsense = spdy.open(&pair("nonsense", "1", "7")).await;
    let error = spdy.open(&pair("error", &port, "1")).await;
    let data = spdy.open(&pair("data", &port, "1")).await;
    spdy.data(data, b"through the pod", true).await;
    let mut bytes = vec![];
    let mut ended = std::collections::HashSet::new();
    limit(async {
        while !(ended.contains(&data) && ended.contains(&bad_error) && ended.contains(&nonsense)) {
            match spdy.frame().await.unwrap() {
                Frame::Data {
                    id,
                    bytes: more,
                    fin,
                } => {
                    if id == data {
                        bytes.extend_from_slice(&more);
                    }
                    assert!(id != error || more.is_empty(), "{more:?}");
                    if fin {
                        ended.insert(id);
                    }
                }
                Frame::Reset { id, .. } => {
                    assert_eq!(id, nonsense);
                    ended.insert(id);
                }
                _ => {}
            }
        }
    })
    .await;
    assert_eq!(bytes, b"through the pod");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_makes_no_sense_is_refused() {
    let f = fixture().await;
    for (request, field) in [
        (exec("x", "iet"), "stderr"),
        (exec("x", ""), "stdin"),
        (
            StreamRequest::Exec {
                container: "c".into(),
                command: vec![],
                flags: flags("o"),
            },
            "cmd",
        ),
    ] {
        let error = f.server.url(request).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().contains(field), "{error}");
    }
    let url = f.server.url(exec("x", "o")).unwrap();
    assert_eq!(upgrade(&url, "Upgrade: h2c\r\n").await.0, 400);
    assert_eq!(
        upgrade(
            &url,
            "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9\r\n"
        )
        .await
        .0,
        403
    );
    let other = url.replace("/exec/", "/attach/");
    assert_eq!(
        upgrade(&other, "Upgrade: SPDY/3.1\r\n").await.0,
        404,
        "a token is for one verb"
    );
    assert_eq!(
        upgrade(&url, "Upgrade: SPDY/3.1\r\n").await.0,
        101,
        "refusals do not use it up"
    );
}

#[test]
fn tokens_are_bounded_and_old() {
    let limits = Limits {
        tokens: 2,
        ..Limits::default()
    };
    let sessions = Sessions::new(limits);
    let token = sessions.keep(exec("x", "o")).unwrap();
    sessions.keep(exec("x", "o")).unwrap();
    assert_eq!(
        sessions.keep(exec("x", "o")).unwrap_err().kind(),
        Kind::ResourceExhausted
    );
    assert!(sessions.redeem("exec", &token).is_some());
    assert!(sessions.redeem("exec", &token).is_none());
    let short = Sessions::new(Limits {
        token_life: Duration::ZERO,
        ..limits
    });
    let token = short.keep(exec("x", "o")).unwrap();
    assert!(short.redeem("exec", &token).is_none());
}

#[test]
fn the_dictionary_is_the_one_of_the_specification() {
    assert_eq!(dictionary().len(), 1423);
}

proptest! {
    #[test]
    fn frames_survive_the_wire(id in 1u32..1 << 31, bytes in prop::collection::vec(any::<u8>(), 0..200), fin: bool, n: u32) {
        let bytes = Bytes::from(bytes);
        for frame in [
            Frame::Data { id, bytes: bytes.clone(), fin },
            Frame::SynStream { id, block: bytes.clone(), fin },
            Frame::SynReply { id, block: bytes.clone() },
            Frame::Headers { id, block: bytes.clone(), fin },
            Frame::Reset { id, status: n },
            Frame::WindowUpdate { id, delta: n >> 1 },
            Frame::Ping(n),
            Frame::Settings(vec![(n & 0xff_ffff, n), (7, id)]),
        ] {
            let mut out = BytesMut::new();
            frame.write(&mut out);
            let head: [u8; HEAD] = out[..HEAD].try_into().unwrap();
            prop_assert_eq!(frame::payload_length(head).unwrap(), out.len() - HEAD);
            prop_assert_eq!(frame::parse(head, out.freeze().slice(HEAD..)).unwrap(), frame);
        }
    }

    #[test]
    fn arbitrary_bytes_are_no_panic(head: [u8; HEAD], payload in prop::collection::vec(any::<u8>(), 0..100)) {
        let _parsed = frame::parse(head, payload.clone().into()).is_ok();
        let _read = Reader::new().read(&payload).is_ok();
        let _sizes = remote_command::sizes(&payload);
    }

    #[test]
    fn blocks_share_a_window(blocks in prop::collection::vec(
        prop::collection::vec(("[a-z]{1,20}", "[ -~]{0,300}"), 0..20), 1..6)) {
        let (mut writer, mut reader) = (Writer::new(), Reader::new());
        for block in blocks {
            let bytes = writer.write(&block).unwrap();
            prop_assert_eq!(reader.read(&bytes).unwrap(), block);
        }
    }
}

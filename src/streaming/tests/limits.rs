//! What clients cannot do: leave unheard, stay for ever, take all memory, hold the door.

use super::websocket::websocket;
use super::*;
use crate::streaming::channel::Budget;
use crate::streaming::spdy::Connection;

const SECOND: Duration = Duration::from_secs(1);

impl Fixture {
    async fn running(&self, count: usize) {
        limit(async {
            while self.running.load(Ordering::SeqCst) != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

impl Spdy {
    /// Opens the streams of an exec with stdin and stdout.
    async fn streams(&mut self) -> [u32; 3] {
        let error = self.open(&[("streamType", "error")]).await;
        let stdin = self.open(&[("streamType", "stdin")]).await;
        [error, stdin, self.open(&[("streamType", "stdout")]).await]
    }
}

/// Sends this again and again until nothing has been taken for a while.
async fn flood(socket: &mut TcpStream, frame: &[u8]) {
    while let Ok(sent) = tokio::time::timeout(SECOND / 2, socket.write_all(frame)).await {
        sent.unwrap();
    }
}

fn data(id: u32, length: usize) -> Vec<u8> {
    let mut frame = BytesMut::new();
    let bytes = Bytes::from(vec![b'x'; length]);
    Frame::Data {
        id,
        bytes,
        fin: false,
    }
    .write(&mut frame);
    frame.to_vec()
}

/// A binary message as a client sends it (RFC 6455, 5.2), masked with zeros.
fn wrapped(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x82, 0x80 | 126];
    frame.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// A message of channel 0.
fn message(length: usize) -> Vec<u8> {
    wrapped(&vec![0; length])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_its_stdin_is_stalled_is_noticed() {
    let f = fixture().await;
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let [_, stdin, _] = spdy.streams().await;
    f.running(1).await;
    flood(&mut spdy.socket, &data(stdin, 60_000)).await;
    drop(spdy);
    f.running(0).await;
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    f.running(1).await;
    flood(socket.get_mut(), &message(60_000)).await;
    drop(socket);
    f.running(0).await;
}

/// A port behind which nobody reads; what is connected to it.
async fn deaf_port() -> (u16, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap().port(), listener)
}

fn forward(ports: &[u16]) -> StreamRequest {
    StreamRequest::PortForward {
        pod: "p".into(),
        ports: ports.to_vec(),
    }
}

fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_its_forward_is_stalled_is_noticed() {
    let f = fixture().await;
    let before = tasks();
    let (port, listener) = deaf_port().await;
    let url = f.server.url(forward(&[])).unwrap();
    let mut spdy = Spdy::connect(&url, "portforward.k8s.io").await;
    let number = port.to_string();
    let pair = |kind| [("streamType", kind), ("port", &*number), ("requestID", "1")];
    spdy.open(&pair("error")).await;
    let stream = spdy.open(&pair("data")).await;
    let (_deaf, _) = limit(listener.accept()).await.unwrap();
    flood(&mut spdy.socket, &data(stream, 60_000)).await;
    drop(spdy);
    until_tasks(before).await;
    let url = f.server.url(forward(&[port])).unwrap();
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    let (_deaf, _) = limit(listener.accept()).await.unwrap();
    flood(socket.get_mut(), &message(60_000)).await;
    drop(socket);
    until_tasks(before).await;
    // SPDY in messages.
    let url = f.server.url(forward(&[])).unwrap();
    let mut socket = websocket(&url, "SPDY/3.1+portforward.k8s.io").await;
    let (mut writer, mut bytes) = (Writer::new(), BytesMut::new());
    for (id, kind) in [(1, "error"), (3, "data")] {
        let headers = pair(kind).map(|(n, v)| (n.to_owned(), v.to_owned()));
        let (block, fin) = (writer.write(&headers).unwrap(), false);
        Frame::SynStream { id, block, fin }.write(&mut bytes);
    }
    socket.send(Message::binary(bytes.freeze())).await.unwrap();
    let (_deaf, _) = limit(listener.accept()).await.unwrap();
    let tunnelled = wrapped(&data(3, 60_000));
    flood(socket.get_mut(), &tunnelled).await;
    drop(socket);
    until_tasks(before).await;
}

async fn until_tasks(count: usize) {
    limit(async {
        while tasks() > count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_counts_in_both_directions() {
    let limits = Limits {
        idle: SECOND,
        ..Limits::default()
    };
    let f = fixture_with(limits).await;
    // Output alone keeps a session.
    let url = f.server.url(exec("tick", "o")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let error = spdy.open(&[("streamType", "error")]).await;
    let stdout = spdy.open(&[("streamType", "stdout")]).await;
    let url = f.server.url(exec("tick", "o")).unwrap();
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    let ws = async {
        let mut text = vec![];
        while let Some(Ok(message)) = socket.next().await {
            text.extend_from_slice(&message.into_data());
        }
        String::from_utf8_lossy(&text).into_owned()
    };
    let both = [error, stdout];
    let (got, text) = limit(async { tokio::join!(spdy.until_ended(&both), ws) }).await;
    assert_eq!(got[1], b"x".repeat(20));
    assert!(String::from_utf8_lossy(&got[0]).contains("Success"));
    assert!(text.contains("Success"), "{text}");
    // Silence has a name, in both transports.
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let [error, ..] = spdy.streams().await;
    let got = limit(spdy.until_ended(&[error])).await;
    let told = String::from_utf8_lossy(&got[0]).into_owned();
    assert!(
        told.contains("Failure") && told.contains("for 1 s (stream_idle_timeout)"),
        "{told}"
    );
    drop(spdy);
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    let mut told = vec![];
    limit(async {
        while let Some(Ok(message)) = socket.next().await {
            told.extend_from_slice(&message.into_data());
        }
    })
    .await;
    let told = String::from_utf8_lossy(&told).into_owned();
    assert!(
        told.contains("Failure") && told.contains("for 1 s (stream_idle_timeout)"),
        "{told}"
    );
    drop(socket);
    // A stalled one is silent, though its client is still there.
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut spdy = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let [_, stdin, _] = spdy.streams().await;
    f.running(1).await;
    flood(&mut spdy.socket, &data(stdin, 60_000)).await;
    f.running(0).await;
    let url = f.server.url(exec("stall", "io")).unwrap();
    let mut socket = websocket(&url, "v4.channel.k8s.io").await;
    f.running(1).await;
    flood(socket.get_mut(), &message(60_000)).await;
    f.running(0).await;
}

#[tokio::test]
async fn the_inputs_of_a_connection_share_one_budget() {
    let budget = Budget::new();
    let piece = Bytes::from(vec![0; 1 << 20]);
    let mut inputs: Vec<_> = (0..8).map(|_| Input::new(&budget)).collect();
    let mut held = 0;
    for (end, _) in &inputs {
        for _ in 0..8 {
            let sent = tokio::time::timeout(SECOND / 50, end.send(piece.clone()));
            held += usize::from(sent.await.is_ok());
        }
    }
    assert_eq!(held, 3, "4 MiB less what pieces cost themselves");
    // What a reader has in hand counts until it comes for more.
    assert_eq!(inputs[0].1.recv().await.unwrap().len(), 1 << 20);
    let (end, _) = &inputs[1];
    let mut waiting = Box::pin(end.send(piece.clone()));
    assert!(
        tokio::time::timeout(SECOND / 20, &mut waiting)
            .await
            .is_err()
    );
    drop(waiting);
    inputs[0].1.recv().await.unwrap();
    limit(inputs[1].0.send(piece.clone())).await.unwrap();
    // A reader that leaves gives all of it back; who sends to it is not kept waiting.
    let (end, left) = inputs.remove(0);
    drop(left);
    assert!(limit(end.send(piece.clone())).await.is_err());
    let (end, left) = inputs.remove(0);
    drop((end, left));
    // A piece larger than everything waits until it is alone.
    let (end, mut input) = Input::new(&budget);
    limit(end.send(Bytes::from(vec![0; 5 << 20])))
        .await
        .unwrap();
    assert_eq!(limit(input.recv()).await.unwrap().len(), 5 << 20);
}

/// Waits until the server has closed the connection.
async fn closed(mut socket: TcpStream) {
    let mut rest = vec![];
    let _reset = limit(socket.read_to_end(&mut rest)).await.is_err();
}

/// Connections that send this and then nothing.
async fn crowd(host: &str, sizes: std::ops::Range<usize>, text: &[u8]) -> Vec<TcpStream> {
    let mut all = vec![];
    for _ in sizes {
        let mut socket = TcpStream::connect(host).await.unwrap();
        // The server may have closed it by now.
        let _lost = socket.write_all(text).await.is_err();
        all.push(socket);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_request_are_few_and_short() {
    let limits = Limits {
        request: SECOND,
        ..Limits::default()
    };
    let f = fixture_with(limits).await;
    let host = f.server.url(exec("x", "o")).unwrap();
    let host = host.split('/').nth(2).unwrap();
    for text in ["", "GET /ex", "POST /exec/x HTTP/1.1\r\nHost: x\r\nX-Y: "] {
        for socket in crowd(host, 0..2, text.as_bytes()).await {
            closed(socket).await;
        }
    }
    // Bytes that keep coming do not make the time longer.
    let mut slow = TcpStream::connect(host).await.unwrap();
    limit(async {
        while slow.write_all(b"GET").await.is_ok() {
            tokio::time::sleep(SECOND / 20).await;
        }
    })
    .await;
    // A head without end is no head.
    let mut long = TcpStream::connect(host).await.unwrap();
    long.write_all(b"GET /exec/x HTTP/1.1\r\nX: ")
        .await
        .unwrap();
    limit(async { while long.write_all(&[b'x'; 4096]).await.is_ok() {} }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_without_requests_keeps_nobody_out() {
    let limits = Limits {
        request: SECOND * 3600,
        unanswered: 4,
        grace: SECOND / 20,
        ..Limits::default()
    };
    let f = fixture_with(limits).await;
    let host = f.server.url(exec("x", "o")).unwrap();
    let host = host.split('/').nth(2).unwrap().to_owned();
    let mut sessions = vec![];
    let texts = [
        "",
        "\x16\x03\x01",
        "GET /exec/",
        "GET /exec/none HTTP/1.1\r\nConnection: Upgrade\r\n",
        // Answered, and the answer not taken.
        "GET /exec/none HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: 9\r\n\r\n",
    ];
    for text in texts {
        let held = crowd(&host, 0..12, text.as_bytes()).await;
        let url = f.server.url(exec("stall", "io")).unwrap();
        let mut spdy = limit(Spdy::connect(&url, "v4.channel.k8s.io")).await;
        limit(spdy.streams()).await;
        sessions.push((spdy, held));
    }
    // A session is no place in the room: none of them was put out by the next crowd.
    f.running(texts.len()).await;
    let first = sessions.remove(0).1.remove(0);
    closed(first).await;
    f.running(texts.len() - 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_closed_forwards_last_as_long_as_the_pod_speaks() {
    let limits = Limits {
        half_closed: SECOND,
        ..Limits::default()
    };
    let f = fixture_with(limits).await;
    let (port, listener) = deaf_port().await;
    let number = port.to_string();
    let mut spdy = Spdy::connect(&f.server.url(forward(&[])).unwrap(), "portforward.k8s.io").await;
    let pair = |kind| [("streamType", kind), ("port", &*number), ("requestID", "1")];
    let error = spdy.open(&pair("error")).await;
    let stream = spdy.open(&pair("data")).await;
    spdy.data(stream, b"", true).await;
    let pod = async {
        let (mut pod, _) = listener.accept().await.unwrap();
        for _ in 0..8 {
            tokio::time::sleep(SECOND / 4).await;
            pod.write_all(b"more ").await.unwrap();
        }
        pod
    };
    let client = async {
        let (mut text, mut told, mut reset) = (vec![], vec![], false);
        let mut told_all = false;
        while !(reset && told_all) {
            match spdy.frame().await.unwrap() {
                Frame::Data { id, bytes, .. } if id == stream => text.extend_from_slice(&bytes),
                Frame::Data { bytes, fin, .. } => {
                    told.extend_from_slice(&bytes);
                    told_all |= fin;
                }
                Frame::Reset { id, .. } => reset |= id == stream,
                _ => {}
            }
        }
        (text, String::from_utf8(told).unwrap())
    };
    let (_pod, (text, told)) = limit(async { tokio::join!(pod, client) }).await;
    assert_eq!(text, b"more ".repeat(8));
    assert!(told.contains(&number) && told.contains("half"), "{told}");
    assert!(error > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_without_a_key_does_not_use_up_the_token() {
    let f = fixture().await;
    let url = f.server.url(exec("x", "o")).unwrap();
    let headers = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";
    assert_eq!(upgrade(&url, headers).await.0, 400);
    drop(websocket(&url, "v4.channel.k8s.io").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_is_reset_however_much_waits_to_be_written() {
    let (near, far) = tokio::io::duplex(1000);
    let tasks = Tasks::default();
    let mut connection = Connection::start(near, Duration::from_secs(60), &tasks);
    let (mut read, mut write) = tokio::io::split(far);
    let (mut writer, mut bytes) = (Writer::new(), BytesMut::new());
    for id in [1, 3] {
        let block = writer.write(&[]).unwrap();
        let fin = false;
        Frame::SynStream { id, block, fin }.write(&mut bytes);
    }
    write.write_all(&bytes).await.unwrap();
    let (first, second) = limit(async {
        (
            connection.accept().await.unwrap(),
            connection.accept().await.unwrap(),
        )
    })
    .await;
    // The client reads nothing; the queue is full when this one hangs.
    let chunk = Bytes::from(vec![b'x'; 50_000]);
    while tokio::time::timeout(SECOND / 5, second.output.send(chunk.clone()))
        .await
        .is_ok()
    {}
    drop(first);
    let reset = limit(async {
        loop {
            let mut head = [0; HEAD];
            read.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; frame::payload_length(head).unwrap()];
            read.read_exact(&mut payload).await.unwrap();
            if let Frame::Reset { id, .. } = frame::parse(head, payload.into()).unwrap() {
                return id;
            }
        }
    });
    assert_eq!(reset.await, 1);
}

#[test]
fn sizes_that_are_none_are_passed_over() {
    for (text, found, left) in [
        (r#"{"Width":70000,"Height":5}"#, 0, 0),
        (r#"{"Width":-1,"Height":5}"#, 0, 0),
        (r#"{"Width":"wide","Height":5} [] 7 "x""#, 0, 0),
        (r#"{"Width":0,"Height":5}"#, 0, 0),
        ("{]", 0, 0),
        (
            r#"{"Width":70000,"Height":5}{"Width":80,"Height":25}{"Wi"#,
            1,
            4,
        ),
    ] {
        let (sizes, read) = remote_command::sizes(text.as_bytes());
        assert_eq!((sizes.len(), text.len() - read), (found, left), "{text}");
    }
}

#[tokio::test]
async fn sizes_go_on_after_one_that_is_none() {
    let (end, input) = Input::new(&Budget::new());
    let (sizes_to, mut sizes) = tokio::sync::mpsc::channel(8);
    let tasks = Tasks::default();
    drop(tasks.spawn(remote_command::pass_sizes(input, sizes_to)));
    let endless = format!("\"{}", "x".repeat(5000));
    for text in [
        r#"{"Width":70000,"Height":5}"#,
        "nonsense",
        &endless,
        r#"{"Width":81,"#,
        r#""Height":26}"#,
    ] {
        end.send(Bytes::copy_from_slice(text.as_bytes()))
            .await
            .unwrap();
    }
    let size = limit(sizes.recv()).await.unwrap();
    assert_eq!((size.width, size.height), (81, 26));
}

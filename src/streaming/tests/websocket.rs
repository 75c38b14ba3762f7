//! Sessions over WebSocket.

use super::*;

pub(super) async fn websocket(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let headers = format!(
        "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: {protocol}\r\n"
    );
    let (status, head, socket) = upgrade(url, &headers).await;
    assert_eq!(status, 101, "{head}");
    assert!(
        head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
        "RFC 6455, 1.3: {head}"
    );
    WebSocketStream::from_raw_socket(socket, Role::Client, None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_over_websocket_with_half_close() {
    let f = fixture().await;
    let url = f.server.url(exec("4 words", "ioe")).unwrap();
    let mut socket = websocket(&url, "v5.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0hello"[..])).await.unwrap();
    socket.send(Message::binary(&[255, 0][..])).await.unwrap();
    let mut channels = vec![vec![]; 5];
    limit(async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Binary(bytes))) => {
                    channels[usize::from(bytes[0])].extend_from_slice(&bytes[1..]);
                }
                Some(Ok(Message::Close(Some(frame)))) => break assert_eq!(frame.code, 1000.into()),
                other => panic!("{other:?}"),
            }
        }
    })
    .await;
    assert_eq!(
        (channels[1].as_slice(), channels[2].as_slice()),
        (&b"hello"[..], &b"4 words"[..])
    );
    let status: serde_json::Value = serde_json::from_slice(&channels[3]).unwrap();
    assert_eq!(status["details"]["causes"][0]["message"], "4");
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward_over_websocket_both_ways() {
    let f = fixture().await;
    let port = echo_port().await;
    let request = StreamRequest::PortForward {
        pod: "p".into(),
        ports: vec![port],
    };
    let mut socket = websocket(&f.server.url(request.clone()).unwrap(), "v4.channel.k8s.io").await;
    socket.send(Message::binary(&b"\0ping"[..])).await.unwrap();
    let mut data = vec![];
    limit(async {
        while data.len() < 6 {
            if let Some(Ok(Message::Binary(bytes))) = socket.next().await
                && bytes[0] == 0
            {
                data.extend_from_slice(&bytes[1..]);
            }
        }
    })
    .await;
    assert_eq!(data[..2], port.to_le_bytes());
    assert_eq!(&data[2..], b"ping");
    drop(socket);
    let socket = websocket(
        &f.server.url(request).unwrap(),
        "SPDY/3.1+portforward.k8s.io",
    )
    .await;
    let (mut sink, mut stream) = socket.split();
    let mut writer = Writer::new();
    let mut bytes = BytesMut::new();
    let text = port.to_string();
    for (id, kind) in [(1, "error"), (3, "data")] {
        let headers = [("streamtype", kind), ("port", &text), ("requestid", "0")]
            .map(|(n, v)| (n.to_owned(), v.to_owned()));
        let block = writer.write(&headers).unwrap();
        Frame::SynStream {
            id,
            block,
            fin: false,
        }
        .write(&mut bytes);
    }
    Frame::Data {
        id: 3,
        bytes: "tunnel".into(),
        fin: true,
    }
    .write(&mut bytes);
    sink.send(Message::binary(bytes.freeze())).await.unwrap();
    let mut all = vec![];
    limit(async {
        while !all.windows(6).any(|w| w == b"tunnel") {
            if let Some(Ok(Message::Binary(more))) = stream.next().await {
                all.extend_from_slice(&more);
            }
        }
    })
    .await;
}

//! Entry points for the fuzz targets of hack/fuzz: bytes as a client may send them. They must not panic, hang or
//! allocate without bound.

use bytes::Bytes;
use futures_util::StreamExt as _;

use super::spdy::{frame, headers};
use super::{remote_command, websocket};

/// A connection's bytes as SPDY/3.1: frames one after the other, their header blocks with one shared window.
pub fn spdy(mut data: &[u8]) {
    let mut reader = headers::Reader::new();
    while let Some((head, rest)) = data.split_first_chunk::<{ frame::HEAD }>() {
        let Ok(length) = frame::payload_length(*head) else {
            return;
        };
        let Some((payload, rest)) = rest.split_at_checked(length) else {
            return;
        };
        data = rest;
        let Ok(parsed) = frame::parse(*head, Bytes::copy_from_slice(payload)) else {
            return;
        };
        let block = match parsed {
            frame::Frame::SynStream { block, .. }
            | frame::Frame::SynReply { block, .. }
            | frame::Frame::Headers { block, .. } => block,
            frame::Frame::Data { bytes, .. } => {
                let (_sizes, taken) = remote_command::sizes(&bytes);
                assert!(taken <= bytes.len());
                continue;
            }
            _ => continue,
        };
        if reader.read(&block).is_err() {
            return;
        }
    }
}

/// A connection's bytes after the upgrade: WebSocket frames, and in them the messages of the channel protocols. The
/// first byte chooses the protocol.
pub fn websocket(data: &[u8]) {
    let Some((protocol, data)) = data.split_first() else {
        return;
    };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else {
        return;
    };
    runtime.block_on(async {
        let (near, far) = tokio::io::duplex(data.len() + 1);
        let (_answers, mut client) = tokio::io::split(far);
        let sent = async {
            let _short = tokio::io::AsyncWriteExt::write_all(&mut client, data).await;
            let _ended = tokio::io::AsyncWriteExt::shutdown(&mut client).await;
        };
        let heard = async {
            let mut socket = websocket::upgrade(near).await;
            while let Some(Ok(message)) = socket.next().await {
                if let Some((_channel, bytes)) = websocket::decode(message, protocol % 2 == 1) {
                    let _sizes = remote_command::sizes(&bytes);
                }
            }
        };
        tokio::join!(sent, heard);
    });
}

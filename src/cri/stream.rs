//! Lists in pieces: the bodies of the `Stream*` calls, and the size check of their unary brothers.

use std::pin::Pin;

use futures_util::stream::{self, Stream};
use prost::Message;
use tonic::{Response, Status};

use crate::cri::MAX_MESSAGE;

/// What a streaming call returns.
pub(super) type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// Bytes of items in one message of a streamed list, about.
const PIECE: usize = 1024 * 1024;

/// Room for tag and length of an item in its list.
const FRAME: usize = 8;

/// The items in messages of about [`PIECE`] bytes, at least one item each. No item: no message.
pub(super) fn pieces<T, M>(items: Vec<T>, message: fn(Vec<T>) -> M) -> Response<Items<M>>
where
    T: Message + 'static,
    M: Send + 'static,
{
    let mut messages = Vec::new();
    let (mut piece, mut size) = (Vec::new(), 0);
    for item in items {
        let bytes = item.encoded_len() + FRAME;
        if size + bytes > PIECE && !piece.is_empty() {
            messages.push(Ok(message(std::mem::take(&mut piece))));
            size = 0;
        }
        size += bytes;
        piece.push(item);
    }
    if !piece.is_empty() {
        messages.push(Ok(message(piece)));
    }
    Response::new(Box::pin(stream::iter(messages)))
}

/// The reply, unless it is larger than any client takes: then the error names the call to use.
pub(super) fn fits<M: Message>(message: M, instead: &str) -> Result<Response<M>, Status> {
    let bytes = message.encoded_len();
    if bytes > MAX_MESSAGE {
        return Err(Status::resource_exhausted(format!(
            "the list takes {bytes} bytes, more than the {MAX_MESSAGE} of one message: use {instead} or a filter"
        )));
    }
    Ok(Response::new(message))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt as _;

    use super::*;
    use crate::cri::v1;

    #[tokio::test]
    async fn nothing_is_lost_or_doubled() {
        let image = |n: usize| v1::Image {
            id: format!("{n}"),
            username: "u".repeat(300 * 1024),
            ..Default::default()
        };
        let mut stream = pieces((0..10).map(image).collect(), |images| {
            v1::StreamImagesResponse { images }
        })
        .into_inner();
        let mut ids = Vec::new();
        while let Some(message) = stream.next().await {
            let images = message.unwrap().images;
            assert!(!images.is_empty() && images.len() <= 3);
            ids.extend(images.into_iter().map(|image| image.id));
        }
        assert_eq!(ids, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn a_list_too_long_names_the_way_out() {
        let message = v1::ListImagesResponse {
            images: vec![v1::Image {
                username: "u".repeat(MAX_MESSAGE),
                ..Default::default()
            }],
        };
        let status = fits(message, "StreamImages").unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert!(status.message().contains("StreamImages"));
    }
}

//! Fields of API 0.37 that the client library of these tests does not know, sent by number.

use k8s_cri::v1;
use prost::Message as _;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// A mount with its options (`Mount.mount_options`).
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Mount {
    #[prost(string, tag = "1")]
    pub(crate) container_path: String,
    #[prost(string, tag = "2")]
    pub(crate) host_path: String,
    #[prost(bool, tag = "3")]
    pub(crate) readonly: bool,
    #[prost(message, optional, tag = "9")]
    pub(crate) image: Option<Image>,
    #[prost(string, repeated, tag = "11")]
    pub(crate) mount_options: Vec<String>,
}

/// The image of a mount.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Image {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

/// Those of a `ContainerConfig`: encoded behind one, they are part of it.
#[derive(Clone, PartialEq, prost::Message)]
struct Mounts {
    #[prost(message, repeated, tag = "7")]
    mounts: Vec<Mount>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateRequest {
    #[prost(string, tag = "1")]
    pod: String,
    /// A message is bytes on the wire.
    #[prost(bytes = "vec", tag = "2")]
    config: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateReply {
    #[prost(string, tag = "1")]
    container: String,
}

/// `CreateContainer` with these mounts beside those of the config; the container's id.
pub(crate) async fn create(
    channel: Channel,
    pod: &str,
    config: &v1::ContainerConfig,
    mounts: Vec<Mount>,
) -> Result<String, Status> {
    let mut bytes = config.encode_to_vec();
    bytes.extend(Mounts { mounts }.encode_to_vec());
    let request = CreateRequest {
        pod: pod.to_owned(),
        config: bytes,
    };
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static("/runtime.v1.RuntimeService/CreateContainer");
    let codec: tonic_prost::ProstCodec<CreateRequest, CreateReply> =
        tonic_prost::ProstCodec::default();
    let reply = client.unary(Request::new(request), path, codec).await?;
    Ok(reply.into_inner().container)
}

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
    #[prost(message, repeated, tag = "6")]
    pub(crate) uids: Vec<v1::IdMapping>,
    #[prost(message, repeated, tag = "7")]
    pub(crate) gids: Vec<v1::IdMapping>,
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
    let path = "/runtime.v1.RuntimeService/CreateContainer";
    let reply: CreateReply = ask(channel, path, request).await?;
    Ok(reply.container)
}

async fn ask<A, B>(channel: Channel, path: &'static str, request: A) -> Result<B, Status>
where
    A: prost::Message + Send + Sync + 'static,
    B: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    let codec: tonic_prost::ProstCodec<A, B> = tonic_prost::ProstCodec::default();
    let reply = client.unary(Request::new(request), path, codec).await?;
    Ok(reply.into_inner())
}

/// What the runtime can do (`RuntimeFeatures`).
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Features {
    #[prost(bool, tag = "2")]
    pub(crate) user_namespaces_host_network: bool,
    #[prost(bool, tag = "3")]
    pub(crate) mount_options: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeStatusReply {
    #[prost(message, optional, tag = "4")]
    features: Option<Features>,
}

/// `Status`: the features alone.
pub(crate) async fn features(channel: Channel) -> Features {
    let request = v1::StatusRequest::default();
    let path = "/runtime.v1.RuntimeService/Status";
    let reply: RuntimeStatusReply = ask(channel, path, request).await.unwrap();
    reply.features.unwrap()
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatus {
    #[prost(message, repeated, tag = "14")]
    mounts: Vec<Mount>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatusReply {
    #[prost(message, optional, tag = "1")]
    status: Option<ContainerStatus>,
}

/// `ContainerStatus`: the mounts alone.
pub(crate) async fn mounts(channel: Channel, container: &str) -> Vec<Mount> {
    let request = v1::ContainerStatusRequest {
        container_id: container.to_owned(),
        verbose: false,
    };
    let path = "/runtime.v1.RuntimeService/ContainerStatus";
    let reply: ContainerStatusReply = ask(channel, path, request).await.unwrap();
    reply.status.unwrap().mounts
}

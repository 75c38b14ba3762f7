//! The connection to the daemon.

use std::path::{Path, PathBuf};

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use crate::cli::error::CliError;
use crate::cri::berth_v1::images_client::ImagesClient;
use crate::cri::v1;
use crate::cri::v1::image_service_client::ImageServiceClient;
use crate::cri::v1::runtime_service_client::RuntimeServiceClient;

/// Largest message of the daemon.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// One client per service, all over one connection.
#[derive(Debug)]
pub(super) struct Client {
    /// Where the daemon is.
    pub(super) address: PathBuf,
    /// Pods and containers.
    pub(super) runtime: RuntimeServiceClient<Channel>,
    /// Images by CRI.
    pub(super) images: ImageServiceClient<Channel>,
    /// Imports, and pulls with progress.
    pub(super) own: ImagesClient<Channel>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`CliError::Unreachable`]: nobody answers.
    pub(super) async fn connect(address: &Path) -> Result<Self, CliError> {
        let socket = address.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The name is the one that gRPC clients use as authority on a socket.
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
            .map_err(|source| CliError::Unreachable {
                address: address.to_owned(),
                source,
            })?;
        Ok(Self {
            address: address.to_owned(),
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE),
            own: ImagesClient::new(channel).max_decoding_message_size(MAX_MESSAGE),
        })
    }

    /// One line on who answers.
    ///
    /// # Errors
    /// [`CliError::Call`].
    pub(super) async fn version(&mut self) -> Result<String, CliError> {
        let version = self
            .runtime
            .version(v1::VersionRequest {
                version: "0.1.0".to_owned(),
            })
            .await
            .map_err(CliError::call("ask for the version"))?
            .into_inner();
        Ok(format!(
            "daemon {} {}, CRI {}, on {}\n",
            version.runtime_name,
            version.runtime_version,
            version.runtime_api_version,
            self.address.display()
        ))
    }
}

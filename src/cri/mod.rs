//! The CRI: dispatch, conversion, and the one place that maps errors to gRPC codes. No state, no I/O.
//!
//! [`Api`] is what the daemon's listener serves on the socket: RuntimeService and ImageService of CRI v1,
//! the three containerd-shaped services that kubelet's cAdvisor asks (`containerd`), and berth's own
//! (`own`). `layers` wraps them all: deadline, panic, span.

pub(crate) mod calls;
mod containerd;
mod convert;
mod image_service;
mod layers;
mod lists;
mod metrics;
mod own;
mod runtime_service;
mod status;
mod stream;

pub(crate) use layers::Api;

use std::future::Future;

use tonic::Status;
use tracing::Instrument as _;

use crate::base::tasks::Tasks;
use crate::engine::{Engine, EngineError};

/// The version of berth that Version and Status report.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Largest message taken and sent, as kubelet's client has it.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// The generated types and services of `proto/runtime/v1/api.proto`.
#[expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::struct_excessive_bools,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "generated code"
)]
pub(crate) mod v1 {
    tonic::include_proto!("runtime.v1");

    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("AuthConfig(hidden)")
        }
    }
}

/// The generated types and services of `proto/berth/v1/berth.proto`.
#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::too_many_lines,
    unreachable_pub,
    reason = "generated code"
)]
pub(crate) mod berth_v1 {
    tonic::include_proto!("berth.v1");
}

/// The generated types of `proto/containerd`. Nested as the packages are: the generated code of one
/// names the other by its place.
#[expect(
    clippy::all,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    reason = "generated code"
)]
pub(crate) mod containerd_api {
    /// Package `containerd.services`.
    pub mod services {
        /// Package `containerd.services.containers`.
        pub mod containers {
            /// Package `containerd.services.containers.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.containers.v1");
            }
        }
        /// Package `containerd.services.tasks`.
        pub mod tasks {
            /// Package `containerd.services.tasks.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.tasks.v1");
            }
        }
        /// Package `containerd.services.version`.
        pub mod version {
            /// Package `containerd.services.version.v1`.
            pub mod v1 {
                tonic::include_proto!("containerd.services.version.v1");
            }
        }
    }
    /// Package `containerd.v1`.
    pub mod v1 {
        /// Package `containerd.v1.types`.
        pub mod types {
            tonic::include_proto!("containerd.v1.types");
        }
    }
}

/// What the services need besides the engine.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Is the cgroup driver systemd's? (RuntimeConfig)
    pub(crate) systemd_cgroups: bool,
    /// The configuration as a JSON object, for `Status` when it is asked to be verbose.
    pub(crate) config: String,
    /// Directory for archives on their way in.
    pub(crate) scratch: std::path::PathBuf,
    /// Turns true when the daemon ends: streams end then.
    pub(crate) closing: tokio::sync::watch::Receiver<bool>,
    /// The streaming server of Exec, Attach and PortForward.
    pub(crate) streaming: crate::streaming::Server,
}

/// What every service holds: the engine, the owner of tasks, the settings.
#[derive(Clone, Debug)]
struct Server {
    engine: Engine,
    tasks: Tasks,
    settings: std::sync::Arc<Settings>,
}

impl Server {
    /// Runs work that must not stop half-way when its caller hangs up or its deadline passes.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EngineError>> + Send + 'static,
    ) -> Result<T, Status> {
        match self.tasks.spawn(work.in_current_span()).await {
            Ok(done) => done.map_err(|error| status::of(&error)),
            Err(_lost) => Err(status::panicked()),
        }
    }

    /// A URL at which the request can be used once.
    fn stream_url(&self, request: crate::streaming::StreamRequest) -> Result<String, Status> {
        self.settings
            .streaming
            .url(request)
            .map_err(|error| status::of(&error))
    }
}

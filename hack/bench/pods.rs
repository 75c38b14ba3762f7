//! A pod's life, step by step, through the CRI client of another project's making (k8s-cri).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStatsFilter, ContainerStatusRequest,
    CreateContainerRequest, ExecSyncRequest, ImageSpec, ImageStatusRequest, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, ListContainerStatsRequest, ListContainersRequest,
    ListPodSandboxMetricsRequest, ListPodSandboxRequest, ListPodSandboxStatsRequest, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatsFilter, PullImageRequest,
    RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use tonic::transport::{Channel, Uri};

use crate::figures::Processes;

/// A runtime under measurement.
#[derive(Clone)]
pub(crate) struct Endpoint {
    /// Name in the tables.
    pub(crate) name: String,
    /// Its processes.
    pub(crate) processes: Processes,
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// Receives each step's name and time.
pub(crate) type Note<'a> = &'a mut (dyn FnMut(&'static str, Duration) + Send);

macro_rules! timed {
    ($note:expr, $step:literal, $call:expr) => {{
        let began = Instant::now();
        let reply = $call
            .await
            .unwrap_or_else(|status| panic!("{}: {status}", $step))
            .into_inner();
        $note($step, began.elapsed());
        reply
    }};
}

impl Endpoint {
    /// Connects to a unix socket.
    pub(crate) async fn connect(name: &str, socket: &str, mut processes: Processes) -> Self {
        let path = PathBuf::from(socket.trim_start_matches("unix://"));
        processes.daemon = tokio::net::UnixStream::connect(&path)
            .await
            .and_then(|stream| stream.peer_cred())
            .unwrap_or_else(|error| panic!("{name}: {socket}: {error}"))
            .pid();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move {
                tokio::net::UnixStream::connect(path)
                    .await
                    .map(hyper_util::rt::TokioIo::new)
            }
        });
        let channel = tonic::transport::Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
            .unwrap_or_else(|error| panic!("{name}: {socket}: {error:?}"));
        let limit = 64 << 20;
        Self {
            name: name.to_owned(),
            processes,
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel),
        }
    }

    /// Pulls the image unless it is there.
    pub(crate) async fn ensure_image(&self, image: &str) {
        let request = ImageStatusRequest {
            image: Some(spec(image)),
            verbose: false,
        };
        let status = self
            .images
            .clone()
            .image_status(request)
            .await
            .expect("ImageStatus");
        if status.into_inner().image.is_none() {
            self.pull(image).await;
        }
    }

    /// Pulls an image.
    pub(crate) async fn pull(&self, image: &str) {
        let request = PullImageRequest {
            image: Some(spec(image)),
            ..Default::default()
        };
        self.images
            .clone()
            .pull_image(request)
            .await
            .expect("PullImage");
    }

    /// Removes an image.
    pub(crate) async fn remove_image(&self, image: &str) {
        let request = RemoveImageRequest {
            image: Some(spec(image)),
        };
        self.images
            .clone()
            .remove_image(request)
            .await
            .expect("RemoveImage");
    }

    /// Lists and figures of everything.
    pub(crate) async fn lists(&self, note: Note<'_>) {
        let mut runtime = self.runtime.clone();
        timed!(
            note,
            "ListPodSandbox",
            runtime.list_pod_sandbox(ListPodSandboxRequest::default())
        );
        timed!(
            note,
            "ListContainers",
            runtime.list_containers(ListContainersRequest::default())
        );
        let filter = Some(ContainerStatsFilter::default());
        let request = ListContainerStatsRequest { filter };
        timed!(
            note,
            "ListContainerStats",
            runtime.list_container_stats(request)
        );
        let filter = Some(PodSandboxStatsFilter::default());
        let request = ListPodSandboxStatsRequest { filter };
        // Not every runtime has these two for every pod.
        let began = Instant::now();
        if runtime.list_pod_sandbox_stats(request).await.is_ok() {
            note("ListPodSandboxStats", began.elapsed());
        }
        let began = Instant::now();
        let request = ListPodSandboxMetricsRequest {};
        if runtime.list_pod_sandbox_metrics(request).await.is_ok() {
            note("ListPodSandboxMetrics", began.elapsed());
        }
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

/// One pod with one container.
pub(crate) struct Pod {
    runtime: RuntimeServiceClient<Channel>,
    config: PodSandboxConfig,
    image: String,
    sandbox: String,
    container: String,
}

impl Pod {
    /// A pod that is not yet there; `number` makes its name.
    pub(crate) fn new(endpoint: &Endpoint, image: &str, number: u32, host_network: bool) -> Self {
        let name = format!("bench-{}-{number}", std::process::id());
        let network = if host_network {
            NamespaceMode::Node
        } else {
            NamespaceMode::Pod
        };
        let options = NamespaceOption {
            network: network.into(),
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        };
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: name.clone(),
                name,
                namespace: "bench".into(),
                attempt: 0,
            }),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self {
            runtime: endpoint.runtime.clone(),
            config,
            image: image.to_owned(),
            sandbox: String::new(),
            container: String::new(),
        }
    }

    /// The whole life.
    pub(crate) async fn live(&mut self, note: Note<'_>) {
        self.up(note).await;
        let id = self.container.clone();
        let request = ContainerStatusRequest {
            container_id: id.clone(),
            verbose: false,
        };
        timed!(
            note,
            "ContainerStatus",
            self.runtime.container_status(request)
        );
        for _ in 0..3 {
            let request = ExecSyncRequest {
                container_id: id.clone(),
                cmd: vec!["/bin/true".into()],
                timeout: 60,
            };
            timed!(note, "ExecSync /bin/true", self.runtime.exec_sync(request));
        }
        self.down(note).await;
    }

    /// Until the container runs.
    pub(crate) async fn up(&mut self, note: Note<'_>) {
        let began = Instant::now();
        let request = RunPodSandboxRequest {
            config: Some(self.config.clone()),
            ..Default::default()
        };
        self.sandbox =
            timed!(note, "RunPodSandbox", self.runtime.run_pod_sandbox(request)).pod_sandbox_id;
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".into(),
                attempt: 0,
            }),
            image: Some(spec(&self.image)),
            ..Default::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: self.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        self.container = timed!(
            note,
            "CreateContainer",
            self.runtime.create_container(request)
        )
        .container_id;
        let request = StartContainerRequest {
            container_id: self.container.clone(),
        };
        timed!(
            note,
            "StartContainer",
            self.runtime.start_container(request)
        );
        note("= run + create + start", began.elapsed());
    }

    /// Until nothing is left.
    pub(crate) async fn down(&mut self, note: Note<'_>) {
        let began = Instant::now();
        let id = self.container.clone();
        let request = StopContainerRequest {
            container_id: id.clone(),
            timeout: 10,
        };
        timed!(note, "StopContainer", self.runtime.stop_container(request));
        let request = RemoveContainerRequest { container_id: id };
        timed!(
            note,
            "RemoveContainer",
            self.runtime.remove_container(request)
        );
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.sandbox.clone(),
        };
        timed!(
            note,
            "StopPodSandbox",
            self.runtime.stop_pod_sandbox(request)
        );
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.sandbox.clone(),
        };
        timed!(
            note,
            "RemovePodSandbox",
            self.runtime.remove_pod_sandbox(request)
        );
        note("= stop and remove all", began.elapsed());
    }
}

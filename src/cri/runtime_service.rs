//! RuntimeService: dispatch only.
//!
//! Verbs that change something run as tasks of their own ([`Server::detached`]): a caller that hangs up,
//! or whose deadline passes, does not leave them half done. ExecSync and PullImage (image service) end
//! with their caller.

use tonic::{Request, Response, Status};

use crate::cri::convert::check::{self, missing};
use crate::cri::convert::{container, pod, resources, stats};
use crate::cri::stream::{Items, fits, pieces};
use crate::cri::v1::runtime_service_server::RuntimeService;
use crate::cri::v1::{self, LinuxRuntimeConfiguration};
use crate::cri::{Server, VERSION, metrics, status};
use crate::streaming::{StdioFlags, StreamRequest};

/// Outcome of a call.
type Reply<T> = Result<Response<T>, Status>;

/// How checkpoints are refused.
const CRIU: &str = "checkpoint and restore need criu";

#[tonic::async_trait]
impl RuntimeService for Server {
    type StreamPodSandboxesStream = Items<v1::StreamPodSandboxesResponse>;
    type StreamContainersStream = Items<v1::StreamContainersResponse>;
    type StreamContainerStatsStream = Items<v1::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Items<v1::StreamPodSandboxStatsResponse>;
    type GetContainerEventsStream = Items<v1::ContainerEventResponse>;
    type StreamPodSandboxMetricsStream = Items<v1::StreamPodSandboxMetricsResponse>;

    async fn version(&self, _: Request<v1::VersionRequest>) -> Reply<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            // The version of the kubelet API, the same since its beginning.
            version: "0.1.0".to_owned(),
            runtime_name: "berth".to_owned(),
            runtime_version: VERSION.to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<v1::RunPodSandboxRequest>,
    ) -> Reply<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = pod::config("config", request.config)?;
        let engine = self.engine.clone();
        let id = self
            .detached(async move {
                engine
                    .run_pod_sandbox(config, request.runtime_handler)
                    .await
            })
            .await?;
        Ok(Response::new(v1::RunPodSandboxResponse {
            pod_sandbox_id: id.to_string(),
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<v1::StopPodSandboxRequest>,
    ) -> Reply<v1::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        check::id("pod_sandbox_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.stop_pod_sandbox(&id).await })
            .await?;
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<v1::RemovePodSandboxRequest>,
    ) -> Reply<v1::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        check::id("pod_sandbox_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.remove_pod_sandbox(&id).await })
            .await?;
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<v1::PodSandboxStatusRequest>,
    ) -> Reply<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        check::id("pod_sandbox_id", &request.pod_sandbox_id)?;
        let (moment, info) = self
            .engine
            .pod_sandbox_status(&request.pod_sandbox_id, request.verbose)
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(pod::status_response(&moment, info)))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<v1::ListPodSandboxRequest>,
    ) -> Reply<v1::ListPodSandboxResponse> {
        let items = self.pods(request.into_inner().filter)?;
        fits(v1::ListPodSandboxResponse { items }, "StreamPodSandboxes")
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let items = self.pods(request.into_inner().filter)?;
        Ok(pieces(items, |pod_sandboxes| {
            v1::StreamPodSandboxesResponse { pod_sandboxes }
        }))
    }

    async fn create_container(
        &self,
        request: Request<v1::CreateContainerRequest>,
    ) -> Reply<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let pod = request.pod_sandbox_id;
        check::id("pod_sandbox_id", &pod)?;
        let config = container::config("config", request.config)?;
        let engine = self.engine.clone();
        let id = self
            .detached(async move { engine.create_container(&pod, config).await })
            .await?;
        Ok(Response::new(v1::CreateContainerResponse {
            container_id: id.to_string(),
        }))
    }

    async fn start_container(
        &self,
        request: Request<v1::StartContainerRequest>,
    ) -> Reply<v1::StartContainerResponse> {
        let id = request.into_inner().container_id;
        check::id("container_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.start_container(&id).await })
            .await?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(
        &self,
        request: Request<v1::StopContainerRequest>,
    ) -> Reply<v1::StopContainerResponse> {
        let v1::StopContainerRequest {
            container_id: id,
            timeout,
        } = request.into_inner();
        check::id("container_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.stop_container(&id, timeout.max(0)).await })
            .await?;
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<v1::RemoveContainerRequest>,
    ) -> Reply<v1::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        check::id("container_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.remove_container(&id).await })
            .await?;
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Reply<v1::ListContainersResponse> {
        let containers = self.containers(request.into_inner().filter)?;
        fits(
            v1::ListContainersResponse { containers },
            "StreamContainers",
        )
    }

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Reply<Self::StreamContainersStream> {
        let containers = self.containers(request.into_inner().filter)?;
        Ok(pieces(containers, |containers| {
            v1::StreamContainersResponse { containers }
        }))
    }

    async fn container_status(
        &self,
        request: Request<v1::ContainerStatusRequest>,
    ) -> Reply<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        check::id("container_id", &request.container_id)?;
        let (found, info) = self
            .engine
            .container_status(&request.container_id, request.verbose)
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(v1::ContainerStatusResponse {
            status: Some(container::status(&found)),
            info: info.into_iter().collect(),
        }))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Reply<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let id = request.container_id;
        check::id("container_id", &id)?;
        let limits = request
            .linux
            .ok_or_else(|| missing("linux", "give the limits to change"))?;
        let limits = resources::from("linux", limits)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.update_container_resources(&id, limits).await })
            .await?;
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Reply<v1::ReopenContainerLogResponse> {
        let id = request.into_inner().container_id;
        check::id("container_id", &id)?;
        let engine = self.engine.clone();
        self.detached(async move { engine.reopen_container_log(&id).await })
            .await?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<v1::ExecSyncRequest>,
    ) -> Reply<v1::ExecSyncResponse> {
        let request = request.into_inner();
        check::id("container_id", &request.container_id)?;
        check::command("cmd", &request.cmd)?;
        let output = self
            .engine
            .exec_sync(&request.container_id, request.cmd, request.timeout)
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(v1::ExecSyncResponse {
            stdout: output.stdout,
            stderr: output.stderr,
            exit_code: output.exit_code,
        }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Reply<v1::ExecResponse> {
        let request = request.into_inner();
        check::id("container_id", &request.container_id)?;
        check::command("cmd", &request.cmd)?;
        let container = self
            .engine
            .running_container("exec in", &request.container_id)
            .map_err(|error| status::of(&error))?;
        let flags = StdioFlags {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        let command = request.cmd;
        let url = self.stream_url(StreamRequest::Exec {
            container,
            command,
            flags,
        })?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Reply<v1::AttachResponse> {
        let request = request.into_inner();
        check::id("container_id", &request.container_id)?;
        let container = self
            .engine
            .running_container("attach to", &request.container_id)
            .map_err(|error| status::of(&error))?;
        let flags = StdioFlags {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        };
        let url = self.stream_url(StreamRequest::Attach { container, flags })?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<v1::PortForwardRequest>,
    ) -> Reply<v1::PortForwardResponse> {
        let request = request.into_inner();
        check::id("pod_sandbox_id", &request.pod_sandbox_id)?;
        let pod = self
            .engine
            .ready_pod(&request.pod_sandbox_id)
            .map_err(|error| status::of(&error))?;
        let ports = request
            .port
            .iter()
            .map(|port| {
                u16::try_from(*port)
                    .ok()
                    .filter(|port| *port > 0)
                    .ok_or(port)
            })
            .collect::<Result<_, _>>()
            .map_err(|port| check::invalid("port", port, "not a port", "ports are 1 to 65535"))?;
        let url = self.stream_url(StreamRequest::PortForward { pod, ports })?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<v1::ContainerStatsRequest>,
    ) -> Reply<v1::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        check::id("container_id", &id)?;
        let figures = self
            .engine
            .container_stats(&id)
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(v1::ContainerStatsResponse {
            stats: Some(stats::container(&figures)),
        }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Reply<v1::ListContainerStatsResponse> {
        let stats = self.container_figures(request.into_inner().filter).await?;
        fits(
            v1::ListContainerStatsResponse { stats },
            "StreamContainerStats",
        )
    }

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let stats = self.container_figures(request.into_inner().filter).await?;
        Ok(pieces(stats, |container_stats| {
            v1::StreamContainerStatsResponse { container_stats }
        }))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<v1::PodSandboxStatsRequest>,
    ) -> Reply<v1::PodSandboxStatsResponse> {
        let id = request.into_inner().pod_sandbox_id;
        check::id("pod_sandbox_id", &id)?;
        let figures = self
            .engine
            .pod_sandbox_stats(&id)
            .await
            .map_err(|error| status::of(&error))?;
        Ok(Response::new(v1::PodSandboxStatsResponse {
            stats: Some(stats::pod(&figures)),
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Reply<v1::ListPodSandboxStatsResponse> {
        let stats = self.pod_figures(request.into_inner().filter).await?;
        fits(
            v1::ListPodSandboxStatsResponse { stats },
            "StreamPodSandboxStats",
        )
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        let stats = self.pod_figures(request.into_inner().filter).await?;
        Ok(pieces(stats, |pod_sandbox_stats| {
            v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Reply<v1::UpdateRuntimeConfigResponse> {
        let cidr = request
            .into_inner()
            .runtime_config
            .and_then(|config| config.network_config)
            .map(|network| network.pod_cidr)
            .unwrap_or_default();
        // kubelet sends an empty one where the node has no pod CIDR yet: nothing to do.
        if !cidr.is_empty() {
            let engine = self.engine.clone();
            self.detached(async move { engine.update_runtime_config(&cidr).await })
                .await?;
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Reply<v1::StatusResponse> {
        let verbose = request.into_inner().verbose;
        let found = self.engine.status(verbose).await;
        let mut info = std::collections::HashMap::new();
        if verbose {
            info.extend(found.info);
            info.insert("config".to_owned(), self.settings.config.clone());
        }
        let conditions = found
            .conditions
            .into_iter()
            .map(|one| v1::RuntimeCondition {
                r#type: one.kind.to_owned(),
                status: one.status,
                reason: one.reason,
                message: one.message,
            });
        let mut handlers = found.handlers;
        handlers.sort();
        let user_namespaces = handlers.iter().any(|(_, _, user)| *user);
        let handlers = handlers
            .into_iter()
            .map(|(name, recursive, user)| v1::RuntimeHandler {
                name,
                features: Some(v1::RuntimeHandlerFeatures {
                    recursive_read_only_mounts: recursive,
                    user_namespaces: user,
                }),
            });
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: conditions.collect(),
            }),
            info,
            runtime_handlers: handlers.collect(),
            features: Some(v1::RuntimeFeatures {
                supplemental_groups_policy: found.supplemental_groups_policy,
                user_namespaces_host_network: user_namespaces,
                mount_options: true,
            }),
        }))
    }

    async fn checkpoint_container(
        &self,
        _: Request<v1::CheckpointContainerRequest>,
    ) -> Reply<v1::CheckpointContainerResponse> {
        Err(status::unbuilt("CheckpointContainer", CRIU))
    }

    async fn checkpoint_pod(
        &self,
        _: Request<v1::CheckpointPodRequest>,
    ) -> Reply<v1::CheckpointPodResponse> {
        Err(status::unbuilt("CheckpointPod", CRIU))
    }

    async fn restore_pod(
        &self,
        _: Request<v1::RestorePodRequest>,
    ) -> Reply<v1::RestorePodResponse> {
        Err(status::unbuilt("RestorePod", CRIU))
    }

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Reply<Self::GetContainerEventsStream> {
        Ok(Response::new(self.event_stream()))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Reply<v1::ListMetricDescriptorsResponse> {
        Ok(Response::new(v1::ListMetricDescriptorsResponse {
            descriptors: metrics::descriptors(),
        }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Reply<v1::ListPodSandboxMetricsResponse> {
        let pod_metrics = self.metrics().await?;
        fits(
            v1::ListPodSandboxMetricsResponse { pod_metrics },
            "StreamPodSandboxMetrics",
        )
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        let all = self.metrics().await?;
        Ok(pieces(all, |pod_sandbox_metrics| {
            v1::StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<v1::RuntimeConfigRequest>,
    ) -> Reply<v1::RuntimeConfigResponse> {
        let driver = match self.settings.systemd_cgroups {
            true => v1::CgroupDriver::Systemd,
            false => v1::CgroupDriver::Cgroupfs,
        };
        Ok(Response::new(v1::RuntimeConfigResponse {
            linux: Some(LinuxRuntimeConfiguration {
                cgroup_driver: driver as i32,
            }),
        }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<v1::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let id = request.pod_sandbox_id;
        check::id("pod_sandbox_id", &id)?;
        let limits = |name: &str, given: Option<v1::LinuxContainerResources>| {
            given.map(|given| resources::from(name, given)).transpose()
        };
        let overhead = limits("overhead", request.overhead)?;
        let limits = limits("resources", request.resources)?;
        let engine = self.engine.clone();
        self.detached(async move {
            engine
                .update_pod_sandbox_resources(&id, overhead, limits)
                .await
        })
        .await?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}

//! Lists as streams, metrics, events and the limits of a pod, at the socket. What the numbers mean is
//! checked against the kernel by tests/metrics.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use k8s_cri::v1;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::daemon::{Clients, Daemon};
use crate::{IMAGE, archive, container_config, create, pod_config, refused, run_pod, start};

/// CRI: `UpdatePodSandboxResourcesRequest`, newer than the client.
#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePod {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    overhead: Option<v1::LinuxContainerResources>,
    #[prost(message, optional, tag = "3")]
    resources: Option<v1::LinuxContainerResources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Nothing {}

fn path(call: &str) -> PathAndQuery {
    format!("/runtime.v1.{call}").parse().unwrap()
}

async fn unary<I, O>(channel: Channel, call: &str, request: I) -> Result<O, Status>
where
    I: prost::Message + Send + Sync + 'static,
    O: prost::Message + Default + Send + Sync + 'static,
{
    let mut to = Grpc::new(channel);
    to.ready().await.unwrap();
    let codec: ProstCodec<I, O> = ProstCodec::default();
    let reply = to.unary(Request::new(request), path(call), codec).await?;
    Ok(reply.into_inner())
}

/// All messages of a stream, which must end. Stream replies have the fields of their List brothers.
async fn streamed<O>(channel: &Channel, call: &str) -> Vec<O>
where
    O: prost::Message + Default + Send + Sync + 'static,
{
    let mut to = Grpc::new(channel.clone());
    to.ready().await.unwrap();
    let codec: ProstCodec<Nothing, O> = ProstCodec::default();
    let request = Request::new(Nothing {});
    let reply = to.server_streaming(request, path(call), codec).await;
    let mut stream = reply.unwrap().into_inner();
    let mut all = vec![];
    while let Some(message) = stream.message().await.unwrap() {
        all.push(message);
    }
    all
}

async fn remove(to: &mut Clients, pod: &str) {
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod.to_owned(),
    };
    to.runtime.remove_pod_sandbox(request).await.unwrap();
}

fn sorted(ids: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut all: Vec<_> = ids.into_iter().collect();
    all.sort();
    all
}

/// each item once, an end, and what the lists say; stopped ones are in no figures.
#[tokio::test]
async fn streams_give_what_lists_give() {
    let daemon = Daemon::start(&[]);
    let (mut to, channel) = (daemon.clients().await, daemon.channel().await);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let (mut pods, mut containers) = (vec![], vec![]);
    for number in 0..3 {
        let config = pod_config(&daemon, &format!("p{number}"));
        let pod = run_pod(&mut to, config).await.unwrap();
        let id = create(&mut to, &pod, container_config("c")).await.unwrap();
        start(&mut to, &id).await.unwrap();
        pods.push(pod);
        containers.push(id);
    }
    let stop = v1::StopPodSandboxRequest {
        pod_sandbox_id: pods[2].clone(),
    };
    to.runtime.stop_pod_sandbox(stop).await.unwrap();
    let all = (sorted(pods.clone()), sorted(containers.clone()));
    let live = (sorted(pods[..2].to_vec()), sorted(containers[..2].to_vec()));

    let found: Vec<v1::ListPodSandboxResponse> =
        streamed(&channel, "RuntimeService/StreamPodSandboxes").await;
    let ids = found.into_iter().flat_map(|one| one.items);
    assert_eq!(sorted(ids.map(|one| one.id)), all.0);
    let found: Vec<v1::ListContainersResponse> =
        streamed(&channel, "RuntimeService/StreamContainers").await;
    let ids = found.into_iter().flat_map(|one| one.containers);
    assert_eq!(sorted(ids.map(|one| one.id)), all.1);
    let found: Vec<v1::ListImagesResponse> = streamed(&channel, "ImageService/StreamImages").await;
    assert_eq!(found.iter().map(|one| one.images.len()).sum::<usize>(), 1);

    let found: Vec<v1::ListContainerStatsResponse> =
        streamed(&channel, "RuntimeService/StreamContainerStats").await;
    let stats: Vec<_> = found.into_iter().flat_map(|one| one.stats).collect();
    for one in &stats {
        let cpu = one.cpu.as_ref().unwrap();
        assert!(cpu.timestamp > 0 && cpu.usage_core_nano_seconds.is_some());
        assert!(one.memory.as_ref().unwrap().working_set_bytes.is_some());
    }
    let ids = stats.into_iter().filter_map(|one| one.attributes);
    assert_eq!(sorted(ids.map(|one| one.id)), live.1);
    let found: Vec<v1::ListPodSandboxStatsResponse> =
        streamed(&channel, "RuntimeService/StreamPodSandboxStats").await;
    let ids = found.into_iter().flat_map(|one| one.stats);
    let ids = ids.filter_map(|one| one.attributes);
    assert_eq!(sorted(ids.map(|one| one.id)), live.0);

    let found: Vec<v1::ListPodSandboxMetricsResponse> =
        streamed(&channel, "RuntimeService/StreamPodSandboxMetrics").await;
    let streamed: Vec<_> = found.into_iter().flat_map(|one| one.pod_metrics).collect();
    let ids = streamed.iter().map(|one| one.pod_sandbox_id.clone());
    assert_eq!(sorted(ids), live.0);
    let listed = to
        .runtime
        .list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {})
        .await
        .unwrap()
        .into_inner()
        .pod_metrics;
    // The same names; the values move on.
    let names = |pods: &[v1::PodSandboxMetrics]| {
        let parts = pods.iter().flat_map(|pod| &pod.container_metrics);
        let names = parts.flat_map(|one| one.metrics.iter().map(|metric| metric.name.clone()));
        sorted(names)
    };
    assert_eq!(names(&streamed), names(&listed));
    assert!(names(&listed).len() > 2 * 30);
    for pod in &pods {
        remove(&mut to, pod).await;
    }
    daemon.stop();
}

/// noted, shown, on disk; and refused where there is nothing to note it of.
#[tokio::test]
async fn limits_of_a_pod_are_noted() {
    const CALL: &str = "RuntimeService/UpdatePodSandboxResources";
    let daemon = Daemon::start(&[]);
    let (mut to, channel) = (daemon.clients().await, daemon.channel().await);
    let update = |id: &str, shares: i64| UpdatePod {
        pod_sandbox_id: id.to_owned(),
        overhead: None,
        resources: Some(v1::LinuxContainerResources {
            cpu_shares: shares,
            memory_limit_in_bytes: 7_654_321,
            ..Default::default()
        }),
    };
    let unknown = unary::<_, Nothing>(channel.clone(), CALL, update("0123abcd", 2)).await;
    refused(unknown, Code::NotFound, &["0123abcd"]);
    let mut config = pod_config(&daemon, "limits");
    let limits = v1::LinuxContainerResources {
        cpu_shares: 11,
        ..Default::default()
    };
    config.linux.as_mut().unwrap().overhead = Some(limits.clone());
    let pod = run_pod(&mut to, config).await.unwrap();
    let bad = unary::<_, Nothing>(channel.clone(), CALL, update(&pod, -7)).await;
    refused(bad, Code::InvalidArgument, &["resources.cpu_shares", "-7"]);
    let done = unary::<_, Nothing>(channel.clone(), CALL, update(&pod, 22)).await;
    done.unwrap();
    let request = v1::PodSandboxStatusRequest {
        pod_sandbox_id: pod.clone(),
        verbose: true,
    };
    let status = to.runtime.pod_sandbox_status(request).await.unwrap();
    let info: serde_json::Value = serde_json::from_str(&status.into_inner().info["info"]).unwrap();
    let config = &info["config"];
    assert_eq!(config["overhead"]["cpu_shares"], 11, "{config}");
    assert_eq!(config["resources"]["cpu_shares"], 22, "{config}");
    let records = std::fs::read_dir(daemon.path("root/pods"))
        .unwrap()
        .flatten();
    let texts: Vec<_> = records
        .filter_map(|one| std::fs::read_to_string(one.path()).ok())
        .collect();
    assert!(
        texts.iter().any(|text| text.contains("7654321")),
        "{texts:?}"
    );
    remove(&mut to, &pod).await;
    daemon.stop();
}

/// a client that asks for events and never reads them holds up nobody, and is told of its loss.
#[tokio::test]
async fn a_listener_that_never_reads() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    daemon.import(&archive::good(IMAGE)).unwrap();
    let pod = run_pod(&mut to, pod_config(&daemon, "events"))
        .await
        .unwrap();
    let mut deaf = daemon.clients().await;
    let request = v1::GetEventsRequest {};
    let mut stream = deaf
        .runtime
        .get_container_events(request)
        .await
        .unwrap()
        .into_inner();
    // Three events each: more than are kept for a listener, and than fit into its connection.
    let mut last = String::new();
    for number in 0..520 {
        let mut config = container_config("c");
        config.metadata.as_mut().unwrap().attempt = number;
        last = create(&mut to, &pod, config).await.unwrap();
        let request = v1::RemoveContainerRequest {
            container_id: last.clone(),
        };
        start(&mut to, &last).await.unwrap();
        to.runtime.remove_container(request).await.unwrap();
    }
    let mut heard = 0;
    let loss = loop {
        match stream.message().await {
            Ok(Some(event)) => {
                assert!(event.pod_sandbox_status.is_some());
                assert_ne!(event.container_id, last, "a gap was passed over");
                heard += 1;
            }
            Ok(None) => panic!("the stream ended without a word after {heard} events"),
            Err(status) => break status,
        }
    };
    assert_eq!(loss.code(), Code::DataLoss, "{loss}");
    assert!(loss.message().contains("list, then ask again"), "{loss}");
    // Asked again, it hears what happens from now on.
    let request = v1::GetEventsRequest {};
    let mut stream = deaf
        .runtime
        .get_container_events(request)
        .await
        .unwrap()
        .into_inner();
    remove(&mut to, &pod).await;
    let mut kinds = vec![];
    while kinds.last() != Some(&v1::ContainerEventType::ContainerDeletedEvent) {
        let event = stream.message().await.unwrap().unwrap();
        if event.container_id == pod {
            // kubelet forgets the pod by this status.
            assert_eq!(event.pod_sandbox_status.as_ref().unwrap().id, pod);
            kinds.push(event.container_event_type());
        }
    }
    assert_eq!(kinds[0], v1::ContainerEventType::ContainerStoppedEvent);
    daemon.stop();
}

/// One request over a connection of its own: status line and body.
fn http(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let text = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(text.as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

/// O-01, O-02: counters of calls, events and objects, in a form that Prometheus reads.
#[tokio::test]
async fn the_daemons_own_metrics() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let line = format!("metrics_address = \"{address}\"");
    let daemon = Daemon::start(&[&line]);
    let mut to = daemon.clients().await;
    let pod = run_pod(&mut to, pod_config(&daemon, "one")).await.unwrap();
    let unknown = v1::ContainerStatusRequest::default();
    to.runtime.container_status(unknown).await.unwrap_err();
    let (status, text) = http(address, "GET /metrics");
    assert_eq!(status, "HTTP/1.1 200 OK");
    for part in [
        "berth_rpc_total{rpc=\"RuntimeService/RunPodSandbox\",code=\"Ok\"} 1\n",
        "berth_rpc_total{rpc=\"RuntimeService/ContainerStatus\",code=\"InvalidArgument\"} 1\n",
        "berth_rpc_duration_seconds_count{rpc=\"RuntimeService/RunPodSandbox\"} 1\n",
        "berth_pods{state=\"ready\"} 1\n",
        "berth_events_published_total 2\n",
        "berth_events_dropped_total 0\n",
        "process_resident_memory_bytes ",
        "berth_image_pulls_total{result=\"ok\"} 0\n",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    // Every sample is of a family that was announced once, and is a number.
    let heads: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = name.split('{').next().unwrap();
        let known = heads.iter().filter(|head| name.starts_with(**head));
        assert!(known.count() == 1, "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    assert_eq!(
        http(address, "POST /metrics").0,
        "HTTP/1.1 405 Method Not Allowed"
    );
    assert_eq!(http(address, "GET /other").0, "HTTP/1.1 404 Not Found");
    remove(&mut to, &pod).await;
    daemon.stop();
    TcpStream::connect(address).unwrap_err();
}

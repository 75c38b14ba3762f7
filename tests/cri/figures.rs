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
    streamed_of(channel, call, Nothing {}).await
}

/// As [`streamed`], with a request, which has the fields of its List brother too.
async fn streamed_of<I, O>(channel: &Channel, call: &str, request: I) -> Vec<O>
where
    I: prost::Message + Send + Sync + 'static,
    O: prost::Message + Default + Send + Sync + 'static,
{
    let mut to = Grpc::new(channel.clone());
    to.ready().await.unwrap();
    let codec: ProstCodec<I, O> = ProstCodec::default();
    let request = Request::new(request);
    let reply = to.server_streaming(request, path(call), codec).await;
    let mut stream = reply.unwrap().into_inner();
    let mut all = vec![];
    while let Some(message) = stream.message().await.unwrap() {
        all.push(message);
    }
    all
}

pub(crate) async fn remove(to: &mut Clients, pod: &str) {
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

fn chosen(id: &str, pod: &str, label: &str) -> v1::ListContainerStatsRequest {
    let labels = [("tier".to_owned(), label.to_owned())];
    v1::ListContainerStatsRequest {
        filter: Some(v1::ContainerStatsFilter {
            id: id.to_owned(),
            pod_sandbox_id: pod.to_owned(),
            label_selector: match label {
                "" => std::collections::HashMap::new(),
                _ => labels.into(),
            },
        }),
    }
}

/// of each container the list and the stream tell what single calls before and after do.
async fn lists_have_what_single_calls_have(to: &mut Clients, channel: &Channel, ids: &[String]) {
    async fn single(to: &mut Clients, ids: &[String]) -> Vec<v1::ContainerStats> {
        let mut all = vec![];
        for container_id in ids.iter().cloned() {
            let request = v1::ContainerStatsRequest { container_id };
            let reply = to.runtime.container_stats(request).await;
            all.push(reply.unwrap().into_inner().stats.unwrap());
        }
        all
    }
    let cpu = |one: &v1::ContainerStats| {
        let cpu = one.cpu.as_ref().unwrap();
        (cpu.timestamp, cpu.usage_core_nano_seconds.unwrap().value)
    };
    let before = single(to, ids).await;
    let request = v1::ListContainerStatsRequest { filter: None };
    let listed = to.runtime.list_container_stats(request.clone()).await;
    let listed = listed.unwrap().into_inner().stats;
    let call = "RuntimeService/StreamContainerStats";
    let found: Vec<v1::ListContainerStatsResponse> = streamed_of(channel, call, request).await;
    let found: Vec<_> = found.into_iter().flat_map(|one| one.stats).collect();
    let after = single(to, ids).await;
    for all in [&listed, &found] {
        assert_eq!(all.len(), ids.len());
        for (first, last) in before.iter().zip(&after) {
            let same = |one: &&v1::ContainerStats| one.attributes == first.attributes;
            let one = all.iter().find(same).unwrap();
            let ((then, least), (at, used), (now, most)) = (cpu(first), cpu(one), cpu(last));
            assert!(then < at && at < now, "{then} {at} {now}");
            assert!((least..=most).contains(&used), "{least} {used} {most}");
            let layer = |one: &v1::ContainerStats| {
                let layer = one.writable_layer.clone().unwrap();
                (layer.fs_id, layer.used_bytes, layer.inodes_used)
            };
            assert_eq!(layer(one), layer(first));
            let memory = |one: &v1::ContainerStats| one.memory.as_ref().unwrap().usage_bytes;
            assert_eq!(memory(one).is_some(), memory(first).is_some());
        }
    }
}

/// by id, pod and label, alone and together; the list and the stream choose alike.
#[tokio::test]
async fn figures_are_chosen_by_id_pod_and_label() {
    let daemon = Daemon::start(&[]);
    let (mut to, channel) = (daemon.clients().await, daemon.channel().await);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let (mut pods, mut containers) = (vec![], vec![]);
    for number in 0..2 {
        let config = pod_config(&daemon, &format!("p{number}"));
        let pod = run_pod(&mut to, config).await.unwrap();
        for name in ["front", "back"] {
            let mut config = container_config(name);
            config.labels = [("tier".to_owned(), name.to_owned())].into();
            let id = create(&mut to, &pod, config).await.unwrap();
            start(&mut to, &id).await.unwrap();
            containers.push(id);
        }
        pods.push(pod);
    }
    let [a, b, c, d] = &containers[..] else {
        panic!("{containers:?}");
    };
    for (id, pod, label, wanted) in [
        ("", "", "", vec![a, b, c, d]),
        (a, "", "", vec![a]),
        (&a[..12], "", "", vec![a]),
        ("", &pods[1], "", vec![c, d]),
        ("", "", "front", vec![a, c]),
        ("", &pods[0], "back", vec![b]),
        (a, &pods[1], "", vec![]),
        (a, &pods[0], "back", vec![]),
        ("0123abcd", "", "", vec![]),
    ] {
        let wanted = sorted(wanted.into_iter().cloned());
        let request = chosen(id, pod, label);
        let listed = to.runtime.list_container_stats(request.clone()).await;
        let listed = listed.unwrap().into_inner().stats;
        let ids = listed.into_iter().filter_map(|one| one.attributes);
        assert_eq!(sorted(ids.map(|one| one.id)), wanted, "{id} {pod} {label}");
        let call = "RuntimeService/StreamContainerStats";
        let found: Vec<v1::ListContainerStatsResponse> = streamed_of(&channel, call, request).await;
        let found = found.into_iter().flat_map(|one| one.stats);
        let ids = found.filter_map(|one| one.attributes);
        assert_eq!(sorted(ids.map(|one| one.id)), wanted, "{id} {pod} {label}");
    }
    lists_have_what_single_calls_have(&mut to, &channel, &containers).await;
    for pod in &pods {
        remove(&mut to, pod).await;
    }
    daemon.stop();
}

/// What a container or pod has used: CPU time and, for pods, names of their containers.
fn used(pod: &v1::PodSandboxStats) -> (u64, Vec<String>) {
    let linux = pod.linux.as_ref().unwrap();
    let cpu = linux.cpu.as_ref().unwrap().usage_core_nano_seconds.unwrap();
    let containers = linux.containers.iter();
    let ids = containers.filter_map(|one| one.attributes.clone());
    (cpu.value, sorted(ids.map(|one| one.id)))
}

/// one pod's figures are what the list says of it; errors of pods that have none.
#[tokio::test]
async fn figures_of_one_pod_and_of_all() {
    let daemon = Daemon::start(&[]);
    let (mut to, channel) = (daemon.clients().await, daemon.channel().await);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut pods = vec![];
    for number in 0..2 {
        let mut config = pod_config(&daemon, &format!("p{number}"));
        config
            .labels
            .insert("number".to_owned(), number.to_string());
        let pod = run_pod(&mut to, config).await.unwrap();
        let id = create(&mut to, &pod, container_config("c")).await.unwrap();
        start(&mut to, &id).await.unwrap();
        pods.push((pod, id));
    }
    let one = |id: &str| v1::PodSandboxStatsRequest {
        pod_sandbox_id: id.to_owned(),
    };
    let filter = |id: &str, number: &str| v1::ListPodSandboxStatsRequest {
        filter: Some(v1::PodSandboxStatsFilter {
            id: id.to_owned(),
            label_selector: match number {
                "" => std::collections::HashMap::new(),
                _ => [("number".to_owned(), number.to_owned())].into(),
            },
        }),
    };
    for (number, (pod, container)) in pods.iter().enumerate() {
        let before = to.runtime.pod_sandbox_stats(one(pod)).await;
        let before = before.unwrap().into_inner().stats.unwrap();
        for request in [filter(pod, ""), filter("", &number.to_string())] {
            let all = to.runtime.list_pod_sandbox_stats(request.clone()).await;
            let all = all.unwrap().into_inner().stats;
            let call = "RuntimeService/StreamPodSandboxStats";
            let found: Vec<v1::ListPodSandboxStatsResponse> =
                streamed_of(&channel, call, request).await;
            let found: Vec<_> = found.into_iter().flat_map(|one| one.stats).collect();
            let after = to.runtime.pod_sandbox_stats(one(pod)).await;
            let after = after.unwrap().into_inner().stats.unwrap();
            let (first, last) = (used(&before), used(&after));
            for listed in [&all, &found] {
                assert_eq!(listed.len(), 1);
                assert_eq!(listed[0].attributes, before.attributes);
                let (cpu, containers) = used(&listed[0]);
                assert_eq!(containers, std::slice::from_ref(container));
                assert!(
                    (first.0..=last.0).contains(&cpu),
                    "{first:?} {cpu} {last:?}"
                );
            }
        }
    }
    let unknown = to.runtime.pod_sandbox_stats(one("0123abcd")).await;
    refused(unknown, Code::NotFound, &["0123abcd"]);
    let stop = v1::StopPodSandboxRequest {
        pod_sandbox_id: pods[0].0.clone(),
    };
    to.runtime.stop_pod_sandbox(stop).await.unwrap();
    let stopped = to.runtime.pod_sandbox_stats(one(&pods[0].0)).await;
    refused(
        stopped,
        Code::FailedPrecondition,
        &[&pods[0].0, "not ready"],
    );
    let both = to
        .runtime
        .list_pod_sandbox_stats(filter(&pods[0].0, "1"))
        .await;
    assert_eq!(both.unwrap().into_inner().stats, []);
    for (pod, _) in &pods {
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
    assert_eq!(info["overhead"]["linux"]["cpu_shares"], 11, "{info}");
    assert_eq!(info["resources"]["linux"]["cpu_shares"], 22, "{info}");
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

/// Where nobody listens at this moment.
pub(crate) fn free_address() -> SocketAddr {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap()
}

/// One request over a connection of its own: status line and body.
pub(crate) fn http(address: SocketAddr, request: &str) -> (String, String) {
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
    let address = free_address();
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

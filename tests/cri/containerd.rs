//! The calls of containerd's API by which kubelet's cAdvisor finds containers, at the same socket.

use k8s_cri::v1;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::daemon::Daemon;
use crate::{IMAGE, archive, container_config, create, pod_config, refused, run_pod, start};

#[derive(Clone, PartialEq, prost::Message)]
struct GetRequest {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    exec_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetReply {
    #[prost(message, optional, tag = "1")]
    process: Option<Process>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Process {
    #[prost(uint32, tag = "3")]
    pid: u32,
    #[prost(int32, tag = "4")]
    status: i32,
    #[prost(uint32, tag = "9")]
    exit_status: u32,
}

const RUNNING: i32 = 2;
const STOPPED: i32 = 3;

async fn task(channel: &Channel, id: &str, exec_id: &str) -> Result<Process, Status> {
    let mut to = Grpc::new(channel.clone());
    to.ready().await.unwrap();
    let codec: ProstCodec<GetRequest, GetReply> = ProstCodec::default();
    let path = PathAndQuery::from_static("/containerd.services.tasks.v1.Tasks/Get");
    let request = Request::new(GetRequest {
        container_id: id.to_owned(),
        exec_id: exec_id.to_owned(),
    });
    let reply = to.unary(request, path, codec).await?;
    Ok(reply.into_inner().process.unwrap())
}

#[tokio::test]
async fn a_task_runs_and_has_ended() {
    let daemon = Daemon::start(&[]);
    let (mut to, channel) = (daemon.clients().await, daemon.channel().await);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let pod = run_pod(&mut to, pod_config(&daemon, "tasks"))
        .await
        .unwrap();
    let id = create(&mut to, &pod, container_config("c")).await.unwrap();
    start(&mut to, &id).await.unwrap();
    for running in [&pod, &id] {
        let found = task(&channel, running, "").await.unwrap();
        assert!(found.pid > 0 && found.status == RUNNING, "{found:?}");
    }
    let stop = v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    };
    to.runtime.stop_container(stop).await.unwrap();
    let ended = task(&channel, &id, "").await.unwrap();
    assert_eq!(
        (ended.pid, ended.status, ended.exit_status),
        (0, STOPPED, 137)
    );
    refused(
        task(&channel, &id, "some").await,
        Code::NotFound,
        &[&id, "exec"],
    );
    let remove = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    to.runtime.remove_pod_sandbox(remove).await.unwrap();
    for gone in [&pod, &id] {
        refused(task(&channel, gone, "").await, Code::NotFound, &[gone]);
    }
    drop((to, channel));
    daemon.stop();
}

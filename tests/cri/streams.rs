//! Exec, Attach and PortForward: which requests get a URL, with which code the others are refused, how many may wait,
//! and that a URL can be used once.

use k8s_cri::v1;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Status};

use crate::daemon::{Clients, Daemon};
use crate::{IMAGE, archive, container_config, create, pod_config, refused, run_pod, start};

/// Streaming requests that may wait for their client.
const OPEN: usize = 1000;

fn exec(container: &str) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: container.to_owned(),
        cmd: vec!["/pause".to_owned()],
        stdout: true,
        ..Default::default()
    }
}

async fn exec_url(to: &mut Clients, request: v1::ExecRequest) -> Result<String, Status> {
    Ok(to.runtime.exec(request).await?.into_inner().url)
}

/// The same of an attach.
async fn attach_url(to: &mut Clients, request: &v1::ExecRequest) -> Result<String, Status> {
    let request = v1::AttachRequest {
        container_id: request.container_id.clone(),
        stdin: request.stdin,
        tty: request.tty,
        stdout: request.stdout,
        stderr: request.stderr,
    };
    Ok(to.runtime.attach(request).await?.into_inner().url)
}

async fn forward_url(to: &mut Clients, pod: &str, port: Vec<i32>) -> Result<String, Status> {
    let request = v1::PortForwardRequest {
        pod_sandbox_id: pod.to_owned(),
        port,
    };
    Ok(to.runtime.port_forward(request).await?.into_inner().url)
}

/// What becomes of an Exec and of an Attach of the same kind.
async fn both_refused(to: &mut Clients, request: v1::ExecRequest, code: Code, parts: &[&str]) {
    refused(attach_url(to, &request).await, code, parts);
    refused(exec_url(to, request).await, code, parts);
}

/// The status that the URL gets from the server.
async fn status(url: &str, method: &str) -> u16 {
    let rest = url.strip_prefix("http://").unwrap();
    let (host, path) = rest.split_once('/').unwrap();
    let mut socket = TcpStream::connect(host).await.unwrap();
    let request = format!(
        "{method} /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
         X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
    );
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut head = [0; 12];
    socket.read_exact(&mut head).await.unwrap();
    let head = std::str::from_utf8(&head).unwrap();
    head.strip_prefix("HTTP/1.1 ").unwrap().parse().unwrap()
}

#[tokio::test]
async fn requests_for_streams_and_their_codes() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut to = daemon.clients().await;
    let pod = run_pod(&mut to, pod_config(&daemon, "streams"))
        .await
        .unwrap();
    let made = create(&mut to, &pod, container_config("made"))
        .await
        .unwrap();
    let ended = create(&mut to, &pod, container_config("ended"))
        .await
        .unwrap();
    start(&mut to, &ended).await.unwrap();
    let stop = v1::StopContainerRequest {
        container_id: ended.clone(),
        timeout: 0,
    };
    to.runtime.stop_container(stop).await.unwrap();
    let running = create(&mut to, &pod, container_config("running"))
        .await
        .unwrap();
    start(&mut to, &running).await.unwrap();

    for id in [&made, &ended] {
        both_refused(&mut to, exec(id), Code::FailedPrecondition, &[id]).await;
    }
    let unknown = "0123456789abcdef".repeat(4);
    both_refused(&mut to, exec(&unknown), Code::NotFound, &[&unknown]).await;
    both_refused(&mut to, exec(""), Code::InvalidArgument, &["container_id"]).await;
    let mut odd = exec(&running);
    (odd.tty, odd.stderr) = (true, true);
    both_refused(&mut to, odd, Code::InvalidArgument, &["stderr", "tty"]).await;
    let mut odd = exec(&running);
    odd.stdout = false;
    both_refused(&mut to, odd.clone(), Code::InvalidArgument, &["stdin"]).await;
    odd.tty = true;
    both_refused(&mut to, odd, Code::InvalidArgument, &["stdin"]).await;
    let mut odd = exec(&running);
    odd.cmd.clear();
    let outcome = exec_url(&mut to, odd).await;
    refused(outcome, Code::InvalidArgument, &["cmd"]);
    for (stdin, stdout, stderr, tty) in [
        (true, false, false, false),
        (false, false, true, false),
        (true, true, true, false),
        (true, true, false, true),
    ] {
        let request = v1::ExecRequest {
            stdin,
            stdout,
            stderr,
            tty,
            ..exec(&running)
        };
        let url = attach_url(&mut to, &request).await.unwrap();
        assert!(
            url.starts_with("http://127.0.0.1:") && url.contains("/attach/"),
            "{url}"
        );
        let url = exec_url(&mut to, request).await.unwrap();
        assert!(url.contains("/exec/"), "{url}");
    }

    for port in [0, -1, 65_536] {
        let outcome = forward_url(&mut to, &pod, vec![port]).await;
        refused(outcome, Code::InvalidArgument, &["port", &port.to_string()]);
    }
    for ports in [vec![], vec![1, 65_535]] {
        let url = forward_url(&mut to, &pod, ports).await.unwrap();
        assert!(url.contains("/portforward/"), "{url}");
    }
    let outcome = forward_url(&mut to, &unknown, vec![80]).await;
    refused(outcome, Code::NotFound, &[&unknown]);
    let request = v1::StopPodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    to.runtime.stop_pod_sandbox(request).await.unwrap();
    let outcome = forward_url(&mut to, &pod, vec![80]).await;
    refused(outcome, Code::FailedPrecondition, &[&pod]);
    both_refused(
        &mut to,
        exec(&running),
        Code::FailedPrecondition,
        &[&running],
    )
    .await;
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    to.runtime.remove_pod_sandbox(request).await.unwrap();
    drop(to);
    daemon.stop();
}

#[tokio::test]
async fn a_thousand_urls_may_wait_each_for_one_use() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let mut to = daemon.clients().await;
    let pod = run_pod(&mut to, pod_config(&daemon, "urls")).await.unwrap();
    let id = create(&mut to, &pod, container_config("c")).await.unwrap();
    start(&mut to, &id).await.unwrap();
    let begun = std::time::Instant::now();
    let mut urls = std::collections::BTreeSet::new();
    for _ in 0..OPEN {
        urls.insert(exec_url(&mut to, exec(&id)).await.unwrap());
    }
    assert_eq!(urls.len(), OPEN, "each is another");
    // After a minute the first ones count no more.
    assert!(begun.elapsed().as_secs() < 50, "{:?}", begun.elapsed());
    let full = [OPEN.to_string()];
    let full = [full[0].as_str(), "try again"];
    both_refused(&mut to, exec(&id), Code::ResourceExhausted, &full).await;
    let outcome = forward_url(&mut to, &pod, vec![80]).await;
    refused(outcome, Code::ResourceExhausted, &full);
    for method in ["GET", "POST"] {
        let url = urls.pop_first().unwrap();
        let other = url.replace("/exec/", "/attach/");
        assert_eq!(status(&other, method).await, 404, "for one verb");
        assert_eq!(status(&url, "PUT").await, 405);
        assert_eq!(status(&url, method).await, 101);
        assert_eq!(status(&url, method).await, 404, "once");
        // One place is free again.
        exec_url(&mut to, exec(&id)).await.unwrap();
        let outcome = exec_url(&mut to, exec(&id)).await;
        refused(outcome, Code::ResourceExhausted, &full);
    }
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod,
    };
    to.runtime.remove_pod_sandbox(request).await.unwrap();
    drop(to);
    daemon.stop();
}

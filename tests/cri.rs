//! The CRI socket of a real daemon, asked by an independent, older client (k8s-cri): what every client needs,
//! and the answers to bad input, with nothing left behind. Needs root.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::large_futures,
    clippy::too_many_lines,
    reason = "a failed test may panic, and tells its story in one piece"
)]

#[path = "cri/archive.rs"]
mod archive;
#[path = "cri/containerd.rs"]
mod containerd;
#[path = "cri/daemon.rs"]
mod daemon;
#[path = "cri/figures.rs"]
mod figures;
#[path = "cri/listeners.rs"]
mod listeners;
#[path = "cri/moments.rs"]
mod moments;
#[path = "cri/newer.rs"]
mod newer;
#[path = "cri/options.rs"]
mod options;
#[path = "cri/registry.rs"]
mod registry;
#[path = "../src/runtime/cgroups/scratch.rs"]
mod scratch;
#[path = "cri/streams.rs"]
mod streams;

use std::collections::HashMap;
use std::time::Duration;

use k8s_cri::v1;
use tonic::{Code, Request, Status};

use crate::daemon::{Clients, Daemon, eventually};

/// The image of these tests: one static program that waits for a signal.
const IMAGE: &str = "test.invalid/pause:1";

fn pod_config(daemon: &Daemon, name: &str) -> v1::PodSandboxConfig {
    // The node's network: these tests leave the node's own network alone.
    let namespaces = v1::NamespaceOption {
        network: v1::NamespaceMode::Node as i32,
        pid: v1::NamespaceMode::Container as i32,
        ..Default::default()
    };
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "test".to_owned(),
            attempt: 0,
        }),
        log_directory: daemon.path("logs").to_string_lossy().into_owned(),
        labels: HashMap::from([("a".to_owned(), "b".to_owned())]),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config(name: &str) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: IMAGE.to_owned(),
            ..Default::default()
        }),
        log_path: format!("{name}.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    network: v1::NamespaceMode::Node as i32,
                    pid: v1::NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn create(
    to: &mut Clients,
    pod: &str,
    config: v1::ContainerConfig,
) -> Result<String, Status> {
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod.to_owned(),
        config: Some(config),
        sandbox_config: None,
    };
    let reply = to.runtime.create_container(request).await?;
    Ok(reply.into_inner().container_id)
}

async fn start(to: &mut Clients, id: &str) -> Result<(), Status> {
    let request = v1::StartContainerRequest {
        container_id: id.to_owned(),
    };
    to.runtime.start_container(request).await.map(drop)
}

async fn run_pod(to: &mut Clients, config: v1::PodSandboxConfig) -> Result<String, Status> {
    let request = v1::RunPodSandboxRequest {
        config: Some(config),
        runtime_handler: String::new(),
    };
    let reply = to.runtime.run_pod_sandbox(request).await?;
    Ok(reply.into_inner().pod_sandbox_id)
}

async fn pull(to: &mut Clients, image: &str, limit: Option<Duration>) -> Result<String, Status> {
    let mut request = Request::new(v1::PullImageRequest {
        image: Some(v1::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        ..Default::default()
    });
    if let Some(limit) = limit {
        request.set_timeout(limit);
    }
    let reply = to.images.pull_image(request).await?;
    Ok(reply.into_inner().image_ref)
}

/// The refusal has this code, and its message all these parts.
fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, parts: &[&str]) {
    let status = outcome.expect_err("not refused");
    assert_eq!(status.code(), code, "{status}");
    for part in parts {
        assert!(status.message().contains(part), "{part:?} in {status}");
    }
}

#[tokio::test]
async fn an_older_client_is_served() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    let version = to
        .runtime
        .version(v1::VersionRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(version.version, "0.1.0");
    assert_eq!(version.runtime_name, "berth");
    assert_eq!(version.runtime_api_version, "v1");
    let status = to
        .runtime
        .status(v1::StatusRequest { verbose: true })
        .await
        .unwrap()
        .into_inner();
    let conditions = status.status.unwrap().conditions;
    for kind in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|one| one.r#type == kind);
        assert!(condition.unwrap().status, "{conditions:?}");
    }
    let config: serde_json::Value = serde_json::from_str(&status.info["config"]).unwrap();
    assert!(config["sandboxImage"].is_string() && config["stateDir"].is_string());
    let quiet = to.runtime.status(v1::StatusRequest::default()).await;
    assert!(quiet.unwrap().into_inner().info.is_empty());
    let driver = to
        .runtime
        .runtime_config(v1::RuntimeConfigRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        driver.linux.unwrap().cgroup_driver(),
        v1::CgroupDriver::Cgroupfs
    );
    let filesystems = to
        .images
        .image_fs_info(v1::ImageFsInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    for one in filesystems
        .image_filesystems
        .iter()
        .chain(&filesystems.container_filesystems)
    {
        let directory = &one.fs_id.as_ref().unwrap().mountpoint;
        assert!(std::path::Path::new(directory).is_dir(), "{directory}");
    }
    let unbuilt = to
        .runtime
        .checkpoint_container(v1::CheckpointContainerRequest::default());
    refused(unbuilt.await, Code::Unimplemented, &["criu"]);
    daemon.stop();
}

#[tokio::test]
async fn a_second_daemon_on_the_same_root_is_refused() {
    let daemon = Daemon::start(&[]);
    let second = daemon.second();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains("lock is in use by process"), "{text}");
    daemon.stop();
}

/// What names nothing: fine where kubelet repeats itself, else NotFound.
#[tokio::test]
async fn unknown_objects() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    let id = "0123456789abcdef".repeat(4);
    let container_id = || id.clone();
    let pod_sandbox_id = || id.clone();
    let outcome = to.runtime.stop_pod_sandbox(v1::StopPodSandboxRequest {
        pod_sandbox_id: pod_sandbox_id(),
    });
    outcome.await.unwrap();
    let outcome = to.runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod_sandbox_id(),
    });
    outcome.await.unwrap();
    let outcome = to.runtime.stop_container(v1::StopContainerRequest {
        container_id: container_id(),
        timeout: 0,
    });
    outcome.await.unwrap();
    let outcome = to.runtime.remove_container(v1::RemoveContainerRequest {
        container_id: container_id(),
    });
    outcome.await.unwrap();
    let outcome = to.runtime.pod_sandbox_status(v1::PodSandboxStatusRequest {
        pod_sandbox_id: pod_sandbox_id(),
        verbose: false,
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    let outcome = to.runtime.container_status(v1::ContainerStatusRequest {
        container_id: container_id(),
        verbose: false,
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    refused(start(&mut to, &id).await, Code::NotFound, &[&id]);
    let outcome = create(&mut to, &id, container_config("c")).await;
    refused(outcome, Code::NotFound, &[&id]);
    let outcome = to.runtime.exec_sync(v1::ExecSyncRequest {
        container_id: container_id(),
        cmd: vec!["true".to_owned()],
        timeout: 1,
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    let outcome = to
        .runtime
        .update_container_resources(v1::UpdateContainerResourcesRequest {
            container_id: container_id(),
            linux: Some(v1::LinuxContainerResources::default()),
            ..Default::default()
        });
    refused(outcome.await, Code::NotFound, &[&id]);
    let outcome = to.runtime.container_stats(v1::ContainerStatsRequest {
        container_id: container_id(),
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    let outcome = to.runtime.exec(v1::ExecRequest {
        container_id: container_id(),
        cmd: vec!["true".to_owned()],
        stdout: true,
        ..Default::default()
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    let outcome = to.runtime.port_forward(v1::PortForwardRequest {
        pod_sandbox_id: pod_sandbox_id(),
        port: vec![80],
    });
    refused(outcome.await, Code::NotFound, &[&id]);
    let missing = Some(v1::ImageSpec {
        image: "test.invalid/nothing:1".to_owned(),
        ..Default::default()
    });
    let found = to.images.image_status(v1::ImageStatusRequest {
        image: missing.clone(),
        verbose: false,
    });
    assert_eq!(found.await.unwrap().into_inner().image, None);
    let outcome = to
        .images
        .remove_image(v1::RemoveImageRequest { image: missing });
    outcome.await.unwrap();
    daemon.stop();
}

/// What no runtime could honour is InvalidArgument and names its field. (The whole table is a unit test of
/// the conversions; here it goes over the wire.)
#[tokio::test]
async fn invalid_arguments() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    let outcome = to
        .runtime
        .run_pod_sandbox(v1::RunPodSandboxRequest::default());
    refused(outcome.await, Code::InvalidArgument, &["config is missing"]);
    let mut config = pod_config(&daemon, "bad");
    config.metadata = None;
    let outcome = run_pod(&mut to, config).await;
    refused(
        outcome,
        Code::InvalidArgument,
        &["config.metadata is missing"],
    );
    let mut config = pod_config(&daemon, "bad");
    config.port_mappings = vec![v1::PortMapping {
        host_port: 70_000,
        container_port: 80,
        ..Default::default()
    }];
    let outcome = run_pod(&mut to, config).await;
    refused(
        outcome,
        Code::InvalidArgument,
        &["config.port_mappings[0].host_port", "70000", "1 to 65535"],
    );
    let mut config = container_config("c");
    config.mounts = vec![v1::Mount {
        container_path: "/x".to_owned(),
        ..Default::default()
    }];
    let outcome = create(&mut to, "0", config).await;
    refused(
        outcome,
        Code::InvalidArgument,
        &["config.mounts[0].host_path is missing"],
    );
    let outcome = to.images.pull_image(v1::PullImageRequest::default()).await;
    refused(outcome, Code::InvalidArgument, &["image.image is missing"]);
    for bad in ["a/UPPER:1", "a//b", "x:tag:tag", "x@sha256:12"] {
        let outcome = pull(&mut to, bad, None).await;
        refused(outcome, Code::InvalidArgument, &[]);
    }
    let outcome = to
        .runtime
        .run_pod_sandbox(v1::RunPodSandboxRequest {
            config: Some(pod_config(&daemon, "handler")),
            runtime_handler: "nope".to_owned(),
        })
        .await;
    let status = outcome.expect_err("an unknown handler");
    assert!(status.message().contains("nope"), "{status}");
    daemon.stop();
}

/// Requests that are right for objects in the wrong state, and programs that cannot run.
#[tokio::test]
async fn wrong_states_and_programs() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    daemon.import(&archive::good(IMAGE)).unwrap();
    let pod = run_pod(&mut to, pod_config(&daemon, "states"))
        .await
        .unwrap();

    let mut config = container_config("no-image");
    config.image = Some(v1::ImageSpec {
        image: "test.invalid/nothing:1".to_owned(),
        ..Default::default()
    });
    let outcome = create(&mut to, &pod, config).await;
    refused(outcome, Code::NotFound, &["test.invalid/nothing:1"]);

    let mut config = container_config("no-user");
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().run_as_username = "nobody-here".to_owned();
    let outcome = create(&mut to, &pod, config).await;
    let status = outcome.expect_err("an unknown user");
    assert!(status.message().contains("nobody-here"), "{status}");

    let mut config = container_config("no-source");
    config.mounts = vec![v1::Mount {
        container_path: "/x".to_owned(),
        host_path: "/proc/nothing/here".to_owned(),
        ..Default::default()
    }];
    let outcome = create(&mut to, &pod, config).await;
    let status = outcome.expect_err("a mount from nowhere");
    assert!(status.message().contains("/proc/nothing/here"), "{status}");

    let mut config = container_config("no-program");
    config.command = vec!["/not/here".to_owned()];
    let absent = create(&mut to, &pod, config).await.unwrap();
    let status = start(&mut to, &absent).await.expect_err("no program");
    assert!(status.message().contains("/not/here"), "{status}");

    let id = create(&mut to, &pod, container_config("c")).await.unwrap();
    let again = create(&mut to, &pod, container_config("c")).await;
    // A retry of the same creation gets the same container.
    assert!(again.as_ref().is_ok_and(|other| *other == id), "{again:?}");
    let exec = v1::ExecSyncRequest {
        container_id: id.clone(),
        cmd: vec!["/pause".to_owned()],
        timeout: 1,
    };
    let outcome = to.runtime.exec_sync(exec.clone()).await;
    refused(outcome, Code::FailedPrecondition, &[]);
    let reopen = v1::ReopenContainerLogRequest {
        container_id: id.clone(),
    };
    let outcome = to.runtime.reopen_container_log(reopen.clone()).await;
    refused(outcome, Code::FailedPrecondition, &[]);
    start(&mut to, &id).await.unwrap();
    refused(start(&mut to, &id).await, Code::FailedPrecondition, &[]);
    let outcome = to.runtime.exec_sync(exec).await;
    refused(outcome, Code::DeadlineExceeded, &[]);
    let mut empty = v1::ExecSyncRequest {
        container_id: id.clone(),
        ..Default::default()
    };
    let outcome = to.runtime.exec_sync(empty.clone()).await;
    refused(outcome, Code::InvalidArgument, &["cmd is missing"]);
    empty.cmd = vec!["/not/here".to_owned()];
    let status = to.runtime.exec_sync(empty).await.expect_err("no program");
    assert!(status.message().contains("/not/here"), "{status}");

    let stop = v1::StopContainerRequest {
        container_id: id.clone(),
        timeout: 0,
    };
    to.runtime.stop_container(stop).await.unwrap();
    let outcome = to.runtime.reopen_container_log(reopen).await;
    refused(outcome, Code::FailedPrecondition, &[]);
    let stop = v1::StopPodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    to.runtime.stop_pod_sandbox(stop).await.unwrap();
    let outcome = create(&mut to, &pod, container_config("late")).await;
    refused(outcome, Code::FailedPrecondition, &[]);
    let remove = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    to.runtime.remove_pod_sandbox(remove).await.unwrap();
    let left = to
        .runtime
        .list_containers(v1::ListContainersRequest::default());
    assert_eq!(left.await.unwrap().into_inner().containers, []);
    daemon.stop();
}

/// Archives that are not what they should be.
#[tokio::test]
async fn bad_archives() {
    let daemon = Daemon::start(&[]);
    let good = archive::good(IMAGE);
    for (name, bytes) in [
        ("empty", vec![]),
        ("truncated", good[..good.len() / 2].to_vec()),
        ("noise", vec![0x5a; 10_000]),
        ("wrong digest", archive::wrong_digest(IMAGE)),
        ("no manifest", archive::without_manifest()),
    ] {
        let error = daemon.import(&bytes).expect_err(name);
        assert!(error.starts_with("berth: import"), "{name}: {error}");
    }
    let mut to = daemon.clients().await;
    let images = to.images.list_images(v1::ListImagesRequest::default());
    assert_eq!(images.await.unwrap().into_inner().images, []);
    daemon.stop();
}

/// Registries that refuse, hang, lie, or have nothing.
#[tokio::test]
async fn bad_registries() {
    let daemon = Daemon::start(&["pull_progress_timeout = 2"]);
    let mut to = daemon.clients().await;

    let refusing = registry::refusing();
    daemon.trust_http(&refusing);
    let image = format!("{refusing}/a:1");
    let status = pull(&mut to, &image, None).await.expect_err("refused");
    // kubelet's client keeps the text as it is only under Unknown, and looks at its first word.
    assert_eq!(status.code(), Code::Unknown, "{status}");
    assert!(
        status.message().starts_with("RegistryUnavailable: "),
        "{status}"
    );
    assert!(status.message().contains(&refusing), "{status}");

    let hanging = registry::hanging();
    daemon.trust_http(&hanging);
    let image = format!("{hanging}/a:1");
    let outcome = pull(&mut to, &image, Some(Duration::from_millis(300))).await;
    let status = outcome.expect_err("a deadline");
    // This client counts, too, and calls its own finding Cancelled; whoever is first answers.
    assert!(
        matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded),
        "{status}"
    );
    let status = pull(&mut to, &image, None).await.expect_err("hangs");
    assert!(
        matches!(status.code(), Code::Unknown | Code::DeadlineExceeded),
        "{status}"
    );

    let empty = registry::answering("404 Not Found", "{\"errors\":[]}");
    daemon.trust_http(&empty);
    let outcome = pull(&mut to, &format!("{empty}/a:1"), None).await;
    refused(outcome, Code::NotFound, &[&empty]);

    let lying = registry::answering("200 OK", "{\"schemaVersion\":2}");
    daemon.trust_http(&lying);
    let digest = format!("sha256:{}", "1".repeat(64));
    let outcome = pull(&mut to, &format!("{lying}/a@{digest}"), None).await;
    let status = outcome.expect_err("wrong digest");
    assert!(status.message().contains("1111"), "{status}");

    let images = to.images.list_images(v1::ListImagesRequest::default());
    assert_eq!(images.await.unwrap().into_inner().images, []);
    daemon.stop();
}

/// A deadline that passes does not stop the work: a retry finds it done.
#[tokio::test]
async fn a_caller_that_gives_up_leaves_no_half() {
    let daemon = Daemon::start(&[]);
    let mut to = daemon.clients().await;
    let mut request = Request::new(v1::RunPodSandboxRequest {
        config: Some(pod_config(&daemon, "late")),
        runtime_handler: String::new(),
    });
    request.set_timeout(Duration::from_millis(1));
    // Quick machines may be done in time.
    let _early = to.runtime.run_pod_sandbox(request).await.is_ok();
    let pod = run_pod(&mut to, pod_config(&daemon, "late")).await.unwrap();
    let list = to
        .runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest::default());
    let items = list.await.unwrap().into_inner().items;
    let ids: Vec<_> = items.iter().map(|one| one.id.as_str()).collect();
    assert_eq!(ids, [pod.as_str()]);
    let remove = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod.clone(),
    };
    to.runtime.remove_pod_sandbox(remove).await.unwrap();
    daemon.stop();
}

/// `berth run --rm` and Ctrl-C, the way a person has it: nothing is left but the image.
#[tokio::test]
async fn run_cleans_up_after_itself() {
    let daemon = Daemon::start(&[]);
    daemon.import(&archive::good(IMAGE)).unwrap();
    let output = |arguments: &[&str]| {
        let output = daemon.berth(arguments).output().unwrap();
        let (out, err) = (output.stdout, output.stderr);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status, text(out), text(err))
    };

    let run = ["run", "--rm", "--host-network", "--name", "one", IMAGE];
    let child = daemon.berth(&run).spawn().unwrap();
    eventually("the container runs", || {
        output(&["ps"]).1.contains("running")
    });
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert!(ended.status.code().is_some(), "{ended:?}");
    assert_eq!(output(&["ps", "--all"]).1.lines().count(), 1);

    let absent = ["run", "--host-network", IMAGE, "--entrypoint", "/not/here"];
    let absent = [&absent[..2], &absent[3..], &absent[2..3]].concat();
    let (status, _, err) = output(&absent);
    assert_eq!(status.code(), Some(1));
    assert!(
        err.starts_with("berth: ") && err.contains("/not/here"),
        "{err}"
    );
    assert_eq!(output(&["ps", "--all"]).1.lines().count(), 1);

    let detached = ["run", "--detach", "--host-network", "--name", "two", IMAGE];
    let (status, id, err) = output(&detached);
    assert!(status.success(), "{err}");
    assert_eq!(id.trim().len(), 64);
    let (status, _, err) = output(&["exec", "two", "/not/here"]);
    assert!(!status.success() && err.contains("/not/here"), "{err}");
    assert!(output(&["stop", "--timeout", "0", "two"]).0.success());
    assert!(output(&["ps", "--all"]).1.contains("exited"));
    assert!(output(&["rm", "two"]).0.success());
    let (status, _, err) = output(&["rm", "two"]);
    assert!(!status.success() && err.contains("is not here"), "{err}");
    assert!(output(&["image", "rm", IMAGE]).0.success());
    let logs = daemon.path("run");
    let left = std::fs::read_dir(logs).map(Iterator::count);
    assert_eq!(left.unwrap_or_default(), 0);
    daemon.stop();
}

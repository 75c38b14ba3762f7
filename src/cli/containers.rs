//! `berth ps`, `logs`, `exec`, `stop` and `rm`.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::base::clock::Timestamp;
use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::log::{self, Follower};
use crate::cli::print;
use crate::cli::table::{age, short, table};
use crate::cri::v1;

/// Label of what `berth run` made. Its value is the name given.
pub(super) const RUN_LABEL: &str = "berth.run";

/// Annotation of what `berth run` made: the directory with the log.
pub(super) const LOG_ANNOTATION: &str = "berth.run/log-directory";

/// `ps`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn list(client: &mut Client, all: bool) -> Result<(), CliError> {
    let now = Timestamp::now().0;
    let mut rows = vec![["ID", "NAME", "IMAGE", "STATE", "CREATED", "POD"].map(str::to_owned)];
    let mut containers = containers(client).await?;
    containers.sort_by_key(|one| std::cmp::Reverse(one.created_at));
    for one in containers {
        let state = one.state();
        if !all && state != v1::ContainerState::ContainerRunning {
            continue;
        }
        let image = one.image.unwrap_or_default();
        let image = match image.user_specified_image.as_str() {
            "" => image.image,
            written => written.to_owned(),
        };
        rows.push([
            short(&one.id),
            one.metadata.unwrap_or_default().name,
            image,
            state_name(state).to_owned(),
            age(now, one.created_at),
            short(&one.pod_sandbox_id),
        ]);
    }
    print(&table(&rows))
}

const fn state_name(state: v1::ContainerState) -> &'static str {
    match state {
        v1::ContainerState::ContainerCreated => "created",
        v1::ContainerState::ContainerRunning => "running",
        v1::ContainerState::ContainerExited => "exited",
        v1::ContainerState::ContainerUnknown => "unknown",
    }
}

async fn containers(client: &mut Client) -> Result<Vec<v1::Container>, CliError> {
    let list = client
        .runtime
        .list_containers(v1::ListContainersRequest::default())
        .await
        .map_err(CliError::call("list the containers"))?;
    Ok(list.into_inner().containers)
}

/// The one container of a name, or of an id's beginning.
async fn find(client: &mut Client, name: &str) -> Result<v1::Container, CliError> {
    let refused = |problem| CliError::Container {
        name: name.to_owned(),
        problem,
    };
    let all = containers(client).await?;
    let named = |one: &v1::Container| one.metadata.as_ref().is_some_and(|m| m.name == name);
    let mut found: Vec<_> = all.iter().filter(|one| named(one)).collect();
    if found.is_empty() && !name.is_empty() {
        found = all.iter().filter(|one| one.id.starts_with(name)).collect();
    }
    match found.as_slice() {
        [] => Err(refused("is not here")),
        [one] => Ok((*one).clone()),
        _ => Err(refused("is more than one: give an id")),
    }
}

/// State, exit code and log of a container.
///
/// # Errors
/// [`CliError::Call`].
pub(super) async fn status(client: &mut Client, id: &str) -> Result<v1::ContainerStatus, CliError> {
    let status = client
        .runtime
        .container_status(v1::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        })
        .await
        .map_err(CliError::call("ask for the container's state"))?;
    Ok(status.into_inner().status.unwrap_or_default())
}

/// `logs`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn logs(client: &mut Client, name: &str, follow: bool) -> Result<(), CliError> {
    let found = find(client, name).await?;
    let path = status(client, &found.id).await?.log_path;
    if path.is_empty() {
        return Err(CliError::Container {
            name: name.to_owned(),
            problem: "keeps no log",
        });
    }
    let mut log = Follower::new(PathBuf::from(path));
    loop {
        // Asked before the copy: what was printed before the end is copied after it.
        let runs = status(client, &found.id).await?.state() == v1::ContainerState::ContainerRunning;
        log.copy()?;
        if !follow || !runs {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// `exec`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn exec(
    client: &mut Client,
    name: &str,
    timeout: u32,
    command: Vec<String>,
) -> Result<ExitCode, CliError> {
    let found = find(client, name).await?;
    let output = client
        .runtime
        .exec_sync(v1::ExecSyncRequest {
            container_id: found.id,
            cmd: command,
            timeout: timeout.into(),
        })
        .await
        .map_err(CliError::call("run the command"))?
        .into_inner();
    std::io::stdout()
        .write_all(&output.stdout)
        .and_then(|()| std::io::stdout().flush())
        .and_then(|()| std::io::stderr().write_all(&output.stderr))
        .map_err(CliError::io("write what the command printed"))?;
    Ok(exit_code(output.exit_code))
}

/// The exit code of a container or command as ours.
pub(super) fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

/// `stop`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn stop(
    client: &mut Client,
    names: &[String],
    timeout: u32,
) -> Result<(), CliError> {
    for name in names {
        let found = find(client, name).await?;
        stop_one(client, &found.id, timeout).await?;
    }
    Ok(())
}

/// Stops a container by its id.
///
/// # Errors
/// [`CliError::Call`].
pub(super) async fn stop_one(client: &mut Client, id: &str, timeout: u32) -> Result<(), CliError> {
    client
        .runtime
        .stop_container(v1::StopContainerRequest {
            container_id: id.to_owned(),
            timeout: timeout.into(),
        })
        .await
        .map_err(CliError::call("stop the container"))?;
    Ok(())
}

/// `rm`.
///
/// # Errors
/// [`CliError`].
pub(super) async fn remove(
    client: &mut Client,
    names: &[String],
    all: bool,
) -> Result<(), CliError> {
    let mut found = Vec::new();
    if all {
        found = containers(client).await?;
        found.retain(|one| one.labels.contains_key(RUN_LABEL));
    }
    for name in names {
        found.push(find(client, name).await?);
    }
    for one in &found {
        remove_one(client, one).await?;
    }
    if all {
        // A run that was cut off may have left a pod without a container.
        let filter = v1::PodSandboxFilter::default();
        let request = v1::ListPodSandboxRequest {
            filter: Some(filter),
        };
        let pods = client
            .runtime
            .list_pod_sandbox(request)
            .await
            .map_err(CliError::call("list the pods"))?;
        for pod in pods.into_inner().items {
            if pod.labels.contains_key(RUN_LABEL) {
                let logs = pod.annotations.get(LOG_ANNOTATION).map(PathBuf::from);
                remove_pod(client, &pod.id, logs).await?;
            }
        }
    }
    Ok(())
}

async fn remove_one(client: &mut Client, one: &v1::Container) -> Result<(), CliError> {
    if one.labels.contains_key(RUN_LABEL) {
        let logs = one.annotations.get(LOG_ANNOTATION).map(PathBuf::from);
        return remove_pod(client, &one.pod_sandbox_id, logs).await;
    }
    client
        .runtime
        .remove_container(v1::RemoveContainerRequest {
            container_id: one.id.clone(),
        })
        .await
        .map_err(CliError::call("remove the container"))?;
    Ok(())
}

/// Removes a pod with its containers, and the log made for it.
///
/// # Errors
/// [`CliError::Call`].
pub(super) async fn remove_pod(
    client: &mut Client,
    id: &str,
    logs: Option<PathBuf>,
) -> Result<(), CliError> {
    stop_pod(client, id).await?;
    client
        .runtime
        .remove_pod_sandbox(v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        })
        .await
        .map_err(CliError::call("remove the pod"))?;
    if let Some(directory) = logs {
        log::remove(&directory);
    }
    Ok(())
}

/// Stops a pod: its network and namespaces go, its container's state and log stay.
///
/// # Errors
/// [`CliError::Call`].
pub(super) async fn stop_pod(client: &mut Client, id: &str) -> Result<(), CliError> {
    client
        .runtime
        .stop_pod_sandbox(v1::StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        })
        .await
        .map_err(CliError::call("stop the pod"))?;
    Ok(())
}

//! `berth run`: a pod of one container, through CRI like any client.
//!
//! The log goes to a directory of its own beside the socket; `rm` removes it. Ctrl-C stops the container
//! (a second one kills it); with `--rm` nothing is left in any case.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::base::id::Id;
use crate::cli::arguments::RunOptions;
use crate::cli::client::Client;
use crate::cli::containers::{self, LOG_ANNOTATION, RUN_LABEL};
use crate::cli::error::CliError;
use crate::cli::log::Follower;
use crate::cli::{images, print};
use crate::cri::v1;
use crate::runtime::spec::security::{DEFAULT_MASKED_PATHS, DEFAULT_READONLY_PATHS};

/// Name of the log below its directory.
const LOG: &str = "container.log";

/// Seconds for a container that is asked to end.
const GRACE: u32 = 10;

/// How often the log is looked at.
const TICK: Duration = Duration::from_millis(50);

/// A pod that was made, and what must go with it.
struct Made {
    pod: String,
    logs: PathBuf,
}

/// Both signals that mean "end".
struct Interrupt(Signal, Signal);

impl Interrupt {
    fn listen() -> Result<Self, CliError> {
        let failed = || CliError::io("listen for signals");
        Ok(Self(
            signal(SignalKind::interrupt()).map_err(failed())?,
            signal(SignalKind::terminate()).map_err(failed())?,
        ))
    }

    async fn comes(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// `run`: the exit code of the container.
///
/// # Errors
/// [`CliError`]: an argument cannot be, or a call failed; with `--rm` what was made is gone again.
pub(super) async fn run(client: &mut Client, options: RunOptions) -> Result<ExitCode, CliError> {
    let mut interrupt = Interrupt::listen()?;
    let id = crate::sys::random::bytes()
        .map(Id::from_bytes)
        .map_err(CliError::io("take random bytes for a name"))?;
    let logs = client
        .address
        .parent()
        .unwrap_or(Path::new("/"))
        .join("run")
        .join(id.short());
    let plan = Plan::new(&options, &id, &logs)?;
    let image = tokio::select! {
        image = image(client, &options.image) => image?,
        () = interrupt.comes() => return Ok(ExitCode::from(130)),
    };
    let request = v1::RunPodSandboxRequest {
        config: Some(plan.pod.clone()),
        runtime_handler: String::new(),
    };
    let pod = client
        .runtime
        .run_pod_sandbox(request)
        .await
        .map_err(CliError::call("make the pod"))?
        .into_inner()
        .pod_sandbox_id;
    let made = Made { pod, logs };
    let work = attend(client, &made, plan, image, (&options, &mut interrupt));
    let outcome = Box::pin(work).await;
    let failed = outcome.is_err();
    if options.rm || failed {
        let removed = containers::remove_pod(client, &made.pod, Some(made.logs)).await;
        // The first failure is the one to tell.
        return outcome.and_then(|code| removed.map(|()| code));
    }
    outcome
}

/// The id of the image, which is pulled if it is not here.
async fn image(client: &mut Client, name: &str) -> Result<String, CliError> {
    let found = client
        .images
        .image_status(v1::ImageStatusRequest {
            image: Some(v1::ImageSpec {
                image: name.to_owned(),
                ..Default::default()
            }),
            verbose: false,
        })
        .await
        .map_err(CliError::call(format!("look for {name}")))?;
    match found.into_inner().image {
        Some(image) => Ok(image.id),
        None => images::pull_quietly(client, name).await,
    }
}

/// Creates and starts the container; stays with it unless detached.
async fn attend(
    client: &mut Client,
    made: &Made,
    mut plan: Plan,
    image: String,
    (options, interrupt): (&RunOptions, &mut Interrupt),
) -> Result<ExitCode, CliError> {
    plan.container.image = Some(v1::ImageSpec {
        image,
        user_specified_image: options.image.clone(),
        ..Default::default()
    });
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: made.pod.clone(),
        config: Some(plan.container),
        sandbox_config: Some(plan.pod),
    };
    let id = client
        .runtime
        .create_container(request)
        .await
        .map_err(CliError::call("create the container"))?
        .into_inner()
        .container_id;
    client
        .runtime
        .start_container(v1::StartContainerRequest {
            container_id: id.clone(),
        })
        .await
        .map_err(CliError::call("start the container"))?;
    if options.detach {
        print(&format!("{id}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = follow(client, &id, &made.logs.join(LOG), interrupt).await?;
    if !options.rm {
        containers::stop_pod(client, &made.pod).await?;
    }
    if !status.message.is_empty() {
        return Err(CliError::Daemon(format!(
            "{}: {}",
            status.reason, status.message
        )));
    }
    Ok(containers::exit_code(status.exit_code))
}

/// Copies the log until the container has ended; its last state.
async fn follow(
    client: &mut Client,
    id: &str,
    log: &Path,
    interrupt: &mut Interrupt,
) -> Result<v1::ContainerStatus, CliError> {
    let mut log = Follower::new(log);
    let runtime = client.runtime.clone();
    let watch = async {
        loop {
            // Asked before the copy: what was printed before the end is copied after it.
            let status = containers::status(client, id).await?;
            log.copy()?;
            if status.state() == v1::ContainerState::ContainerExited {
                return Ok(status);
            }
            tokio::time::sleep(TICK).await;
        }
    };
    let mut watch = std::pin::pin!(watch);
    let mut stops = FuturesUnordered::new();
    let mut timeout = GRACE;
    loop {
        tokio::select! {
            ended = &mut watch => return ended,
            Some(stopped) = stops.next() => {
                let stopped: Result<_, tonic::Status> = stopped;
                stopped.map_err(CliError::call("stop the container"))?;
            }
            () = interrupt.comes() => {
                let mut runtime = runtime.clone();
                let request = v1::StopContainerRequest {
                    container_id: id.to_owned(),
                    timeout: timeout.into(),
                };
                stops.push(async move { runtime.stop_container(request).await });
                timeout = 0;
            }
        }
    }
}

/// The configurations, made before anything is asked for.
#[derive(Debug)]
struct Plan {
    pod: v1::PodSandboxConfig,
    container: v1::ContainerConfig,
}

impl Plan {
    fn new(options: &RunOptions, id: &Id, logs: &Path) -> Result<Self, CliError> {
        let name = options.name.clone().unwrap_or_else(|| id.short());
        // Those of kubelet's, too: crictl and cAdvisor name the pod by them.
        let labels = HashMap::from(
            [
                (RUN_LABEL, name.clone()),
                ("io.kubernetes.pod.name", name.clone()),
                ("io.kubernetes.pod.namespace", "berth".to_owned()),
                ("io.kubernetes.pod.uid", id.to_string()),
                ("io.kubernetes.container.name", name.clone()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let directory = logs.to_string_lossy().into_owned();
        let annotations = HashMap::from([(LOG_ANNOTATION.to_owned(), directory.clone())]);
        let network = match options.host_network {
            true => v1::NamespaceMode::Node,
            false => v1::NamespaceMode::Pod,
        };
        let namespaces = Some(v1::NamespaceOption {
            network: network as i32,
            pid: v1::NamespaceMode::Container as i32,
            ..Default::default()
        });
        let pod = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.clone(),
                uid: id.to_string(),
                namespace: "berth".to_owned(),
                attempt: 0,
            }),
            hostname: match options.host_network {
                true => String::new(),
                false => host_name(&name),
            },
            log_directory: directory,
            port_mappings: each(&options.publish, port)?,
            labels: labels.clone(),
            annotations: annotations.clone(),
            linux: Some(v1::LinuxPodSandboxConfig {
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: namespaces.clone(),
                    seccomp: Some(default_profile()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let container = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name, attempt: 0 }),
            command: options.entrypoint.iter().cloned().collect(),
            args: options.command.clone(),
            working_dir: options.workdir.clone().unwrap_or_default(),
            envs: each(&options.env, variable)?,
            mounts: each(&options.volume, volume)?,
            labels,
            annotations,
            log_path: LOG.to_owned(),
            linux: Some(v1::LinuxContainerConfig {
                security_context: Some(v1::LinuxContainerSecurityContext {
                    namespace_options: namespaces,
                    readonly_rootfs: options.read_only,
                    seccomp: Some(default_profile()),
                    masked_paths: DEFAULT_MASKED_PATHS.map(str::to_owned).to_vec(),
                    readonly_paths: DEFAULT_READONLY_PATHS.map(str::to_owned).to_vec(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Ok(Self { pod, container })
    }
}

fn default_profile() -> v1::SecurityProfile {
    v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::RuntimeDefault as i32,
        localhost_ref: String::new(),
    }
}

fn each<T>(texts: &[String], one: fn(&str) -> Result<T, CliError>) -> Result<Vec<T>, CliError> {
    texts.iter().map(|text| one(text)).collect()
}

/// A name as a host name: what does not fit becomes `-`.
fn host_name(name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    name.chars()
        .map(|c| if fits(c) { c } else { '-' })
        .take(63)
        .collect()
}

fn variable(text: &str) -> Result<v1::KeyValue, CliError> {
    use std::os::unix::ffi::OsStringExt as _;
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, value.as_bytes().to_vec()),
        None => (text, std::env::var_os(text).unwrap_or_default().into_vec()),
    };
    if key.is_empty() {
        return Err(CliError::Argument {
            option: "--env",
            value: text.to_owned(),
            mend: "write NAME=VALUE, or NAME alone for the value it has here",
        });
    }
    Ok(v1::KeyValue {
        key: key.to_owned(),
        value,
    })
}

fn volume(text: &str) -> Result<v1::Mount, CliError> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, readonly) = match parts.as_slice() {
        [source, target] | [source, target, "rw"] => (*source, *target, false),
        [source, target, "ro"] => (*source, *target, true),
        _ => ("", "", false),
    };
    let source = std::path::absolute(source).unwrap_or_default();
    if !target.starts_with('/') || source.as_os_str().is_empty() {
        return Err(CliError::Argument {
            option: "--volume",
            value: text.to_owned(),
            mend: "write SOURCE:TARGET or SOURCE:TARGET:ro, the target an absolute path",
        });
    }
    Ok(v1::Mount {
        container_path: target.to_owned(),
        host_path: source.to_string_lossy().into_owned(),
        readonly,
        ..Default::default()
    })
}

fn port(text: &str) -> Result<v1::PortMapping, CliError> {
    let wrong = || CliError::Argument {
        option: "--publish",
        value: text.to_owned(),
        mend: "write PORT:PORT, the port of this machine first, with ADDRESS: before and /udp after as needed",
    };
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => v1::Protocol::Tcp,
        "udp" => v1::Protocol::Udp,
        "sctp" => v1::Protocol::Sctp,
        _ => return Err(wrong()),
    };
    let (ports, container_port) = ports.rsplit_once(':').ok_or_else(wrong)?;
    let (address, host_port) = ports.rsplit_once(':').unwrap_or(("", ports));
    let address = address.trim_start_matches('[').trim_end_matches(']');
    if !address.is_empty() && address.parse::<std::net::IpAddr>().is_err() {
        return Err(wrong());
    }
    let number = |text: &str| match text.parse::<u16>() {
        Ok(number) if number > 0 => Ok(i32::from(number)),
        _ => Err(wrong()),
    };
    Ok(v1::PortMapping {
        protocol: protocol as i32,
        container_port: number(container_port)?,
        host_port: number(host_port)?,
        host_ip: address.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports() {
        let given = port("127.0.0.1:8080:80/udp").unwrap();
        assert_eq!((given.host_port, given.container_port), (8080, 80));
        assert_eq!(given.host_ip, "127.0.0.1");
        assert_eq!(given.protocol(), v1::Protocol::Udp);
        assert_eq!(port("[::1]:1:2").unwrap().host_ip, "::1");
        assert_eq!(port("1:2").unwrap().host_ip, "");
        for bad in ["80", "0:80", "80:65536", "1:2/icmp", "x:1:2", "a:b"] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn volumes() {
        assert!(volume("/a:/b:ro").unwrap().readonly);
        assert!(!volume("/a:/b").unwrap().readonly);
        assert!(volume("a:/b").unwrap().host_path.ends_with("/a"));
        for bad in ["/a", "/a:b", "/a:/b:xx", ":/b", "/a:/b:ro:x"] {
            assert!(volume(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables() {
        assert_eq!(variable("A=b=c").unwrap().value, b"b=c");
        assert_eq!(variable("BERTH_TEST_NOT_SET").unwrap().value, b"");
        assert!(variable("=x").is_err());
    }
}

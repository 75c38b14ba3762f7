//! The engine over the real layers below, as root: pods in cgroups, directories and a network namespace
//! of their own. Each test ends by asserting that nothing is left.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::base::container::{ContainerState, EventKind, Mount};
use crate::base::error::{HasKind as _, Kind, chain};
use crate::base::pod::PodState;
use crate::base::security::{NamespaceMode, NamespaceOptions};
use crate::engine::monitor_client::MonitorClient;
use crate::images::ImagesConfig;
use crate::network::NetworkConfig;
use crate::nri::NriConfig;
use crate::runtime::cgroups::Cgroups;
use crate::runtime::cgroups::scratch::Scratch;

mod handlers;
mod life;
mod restarts;

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);
const IMAGE: &str = "berth.test/host:1";

/// The monitor's program as this tree builds it (or the one that `BERTH_MONITOR` names).
#[expect(clippy::disallowed_methods, reason = "cargo, once per test process")]
fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        if let Some(given) = std::env::var_os("BERTH_MONITOR") {
            return given.into();
        }
        let arguments = [
            "build",
            "-q",
            "--no-default-features",
            "--bin",
            "berth-monitor",
        ];
        let built = std::process::Command::new(env!("CARGO"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&built.stderr);
        assert!(built.status.success(), "{said}");
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().join("berth-monitor")
    };
    PROGRAM.get_or_init(build).clone()
}

/// An image without programs: containers get the machine's `/usr` as a volume.
fn archive() -> fs::File {
    let mut layer = tar::Builder::new(vec![]);
    let entry = |kind, mode| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(0);
        header
    };
    for name in ["usr", "tmp", "etc", "proc", "sys", "dev"] {
        let mut header = entry(tar::EntryType::Directory, 0o755);
        layer.append_data(&mut header, name, &[][..]).unwrap();
    }
    for name in ["bin", "lib", "lib64"] {
        let mut header = entry(tar::EntryType::Symlink, 0o777);
        layer
            .append_link(&mut header, name, format!("usr/{name}"))
            .unwrap();
    }
    let layer = layer.into_inner().unwrap();
    let digest = ring::digest::digest(&ring::digest::SHA256, &layer);
    let hex: String = digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = serde_json::json!({
        "architecture": arch, "os": "linux", "config": { "Env": ["PATH=/usr/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{hex}")] },
    });
    let manifest = serde_json::json!([
        { "Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"] }
    ]);
    let mut archive = tar::Builder::new(vec![]);
    for (name, bytes) in [
        ("manifest.json", manifest.to_string().into_bytes()),
        ("config.json", config.to_string().into_bytes()),
        ("layer.tar", layer),
    ] {
        let mut header = entry(tar::EntryType::Regular, 0o644);
        header.set_size(bytes.len().try_into().unwrap());
        archive.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&archive.into_inner().unwrap()).unwrap();
    file.rewind().unwrap();
    file
}

/// A node of its own: directories, cgroups and a network namespace that stands for the host's.
struct Node {
    /// What of a failed test's pods still runs ends with them, before anything else goes.
    cgroups: Scratch,
    directory: tempfile::TempDir,
    host: std::os::fd::OwnedFd,
    cgroup_root: String,
    bridge: String,
    handlers: crate::base::handler::Handlers,
}

impl Node {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let host = crate::sys::ns::new_netns().unwrap();
        let cgroup_root = format!("/berth-test-{}-{number}", std::process::id());
        Self {
            cgroups: Scratch::named(&cgroup_root),
            directory: tempfile::tempdir().unwrap(),
            host,
            cgroup_root,
            bridge: format!("bt{number}"),
            handlers: crate::base::handler::Handlers::default(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The daemon starts (again).
    async fn start(&self) -> Engine {
        let tasks = Tasks::default();
        let config = ImagesConfig {
            root: self.path("root"),
            ..ImagesConfig::default()
        };
        let images = ImageStore::open(config, tasks.clone()).unwrap();
        let config = NetworkConfig {
            bridge: self.bridge.clone(),
            ipv4_pool: Some("10.218.0.0/24".parse().unwrap()),
            ipv6_pool: None,
            state: self.path("state"),
            shared: self.path("shared"),
            cni_config_dir: self.path("cni"),
            remove_when_unused: true,
        };
        let open = || Network::open(config).map_err(std::io::Error::other);
        let network = crate::sys::ns::in_netns(self.host.as_fd(), open).unwrap();
        let config = EngineConfig {
            root: self.path("root"),
            state: self.path("state"),
            cgroup_root: self.cgroup_root.clone(),
            monitor: program(),
            ready_monitors: 1,
            volatile: true,
            max_log_line: 16384,
            sandbox_image: String::new(),
            cdi_spec_dirs: vec![self.path("cdi-files")],
            hooks_dirs: vec![],
            block_io_classes: PathBuf::new(),
            handlers: self.handlers.clone(),
            selinux: None,
        };
        let nri = Nri::new(NriConfig {
            socket: Some(self.path("nri.sock")),
            plugins: None,
            plugin_config: self.path("nri-conf"),
            registration_timeout: PATIENCE,
            request_timeout: PATIENCE,
            validator: None,
            version: "test",
        });
        let engine = Engine::start(
            config,
            Parts {
                images,
                network,
                nri,
            },
            tasks,
        )
        .await
        .unwrap();
        if engine.list_images("").is_empty() {
            engine.import_images(archive(), None, None).await.unwrap();
        }
        engine
    }

    /// The daemon is killed: nothing is said to anybody.
    async fn crash(&self, engine: Engine) {
        let core = engine.core();
        let _cut_off = core.lower.followers.shutdown(Duration::ZERO).await;
        let _cut_off = core.tasks.shutdown(Duration::ZERO).await;
        for pod in core.pods.all() {
            pod.lock().monitor = None;
        }
        drop(engine);
    }

    /// The daemon ends with no pod, and nothing of them is left.
    async fn end(self, engine: Engine) {
        assert!(engine.list_pod_sandboxes(&PodFilter::default()).is_empty());
        assert!(
            engine
                .list_containers(&ContainerFilter::default())
                .is_empty()
        );
        // What is removed, is beside everything else, and not any more once the daemon ends.
        let trash = self.path("root/trash");
        until("trash is left", || {
            fs::read_dir(&trash).into_iter().flatten().next().is_none()
        })
        .await;
        assert_eq!(engine.core().tasks.shutdown(PATIENCE).await, 0);
        engine.shutdown().await;
        for place in [
            "root/containers",
            "root/pods",
            "state/pods",
            "state/network/leases",
        ] {
            let left: Vec<_> = fs::read_dir(self.path(place))
                .into_iter()
                .flatten()
                .collect();
            assert!(left.is_empty(), "{place}: {left:?}");
        }
        let cgroups = Cgroups::detect().unwrap();
        // A monitor that was being made ready when its daemon was killed ends by itself, a moment later.
        until("cgroups are left", || {
            cgroups.remove_if_empty(&format!("{}/monitors", self.cgroup_root));
            cgroups.remove_if_empty(&self.cgroup_root);
            self.cgroups.directories().is_empty()
        })
        .await;
    }
}

/// Waits until `level` is true.
async fn until(what: &str, mut level: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !level() {
        assert!(Instant::now() < deadline, "{what}");
        sleep(Duration::from_millis(10)).await;
    }
}

fn pod_config(node: &Node, name: &str) -> PodConfig {
    PodConfig {
        metadata: crate::base::pod::PodMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "test".to_owned(),
            attempt: 0,
        },
        log_directory: node.path("logs").display().to_string(),
        labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
        ..PodConfig::default()
    }
}

fn container_config(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        name: name.to_owned(),
        image: ImageSpec {
            image: IMAGE.to_owned(),
            ..ImageSpec::default()
        },
        command: vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()],
        log_path: format!("{name}.log"),
        mounts: vec![Mount {
            container_path: "/usr".to_owned(),
            host_path: "/usr".to_owned(),
            readonly: true,
            ..Mount::default()
        }],
        security: crate::base::security::ContainerSecurity {
            namespaces: NamespaceOptions {
                pid: NamespaceMode::Container,
                ..NamespaceOptions::default()
            },
            ..Default::default()
        },
        ..ContainerConfig::default()
    }
}

async fn run_pod(node: &Node, engine: &Engine, name: &str) -> String {
    let config = pod_config(node, name);
    let made = engine.run_pod_sandbox(config, String::new()).await;
    made.unwrap_or_else(|error| panic!("{}", chain(&error)))
        .to_string()
}

async fn create(engine: &Engine, pod: &str, name: &str, script: &str) -> String {
    let made = engine
        .create_container(pod, container_config(name, script))
        .await;
    made.unwrap_or_else(|error| panic!("{}", chain(&error)))
        .to_string()
}

async fn run(engine: &Engine, pod: &str, name: &str, script: &str) -> String {
    let id = create(engine, pod, name, script).await;
    let started = engine.start_container(&id).await;
    started.unwrap_or_else(|error| panic!("{}", chain(&error)));
    id
}

async fn status(engine: &Engine, id: &str) -> Arc<ContainerStatus> {
    engine.container_status(id, false).await.unwrap().0
}

async fn exited(engine: &Engine, id: &str) -> Arc<ContainerStatus> {
    let container = engine.core().container(id).unwrap();
    timeout(PATIENCE, container.wait_ended()).await.unwrap();
    status(engine, id).await
}

async fn remove_pods(engine: &Engine) {
    for pod in engine.list_pod_sandboxes(&PodFilter::default()) {
        let removed = engine.remove_pod_sandbox(&pod.id.to_string()).await;
        removed.unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
}

fn log_of(node: &Node, name: &str) -> String {
    fs::read_to_string(node.path("logs").join(format!("{name}.log"))).unwrap_or_default()
}

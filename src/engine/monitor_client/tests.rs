//! The real monitor, as a process, with real containers: `/usr` of the machine in a root of their own.

mod exec;
mod seccomp;
mod troubles;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU8;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::time::{sleep, timeout};

use super::*;
use crate::base::container::ProcessUser;
use crate::base::id::{ContainerId, Id, PodId};
use crate::engine::ExecOutput;
use crate::monitor::protocol::Stdio;
use crate::monitor::record;
use crate::runtime::cgroups::scratch::Scratch;
use crate::runtime::plan::{
    CapabilityMasks, CgroupJoin, DeviceNode, ExecPlan, MountAttributes, MountPlan,
    MountPropagation, MountSource, NamespaceSource, Namespaces, Plan, ProcessPlan, Rootfs,
    UserPlan,
};

/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);
const CAP: usize = 16 << 20;

/// The monitor's program as this tree builds it (or the one that `BERTH_MONITOR` names).
#[expect(clippy::disallowed_methods, reason = "cargo, once per test process")]
fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        if let Some(given) = std::env::var_os("BERTH_MONITOR") {
            return given.into();
        }
        let built = std::process::Command::new(env!("CARGO"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args([
                "build",
                "--quiet",
                "--no-default-features",
                "--bin",
                "berth-monitor",
            ])
            .output()
            .unwrap();
        assert!(
            built.status.success(),
            "{}",
            String::from_utf8_lossy(&built.stderr)
        );
        let test = std::env::current_exe().unwrap();
        test.ancestors().nth(2).unwrap().join("berth-monitor")
    };
    PROGRAM.get_or_init(build).clone()
}

fn unique() -> Id {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let mut bytes = [0xbe; 32];
    bytes[0] = NEXT.fetch_add(1, Ordering::Relaxed);
    bytes[1..5].copy_from_slice(&std::process::id().to_le_bytes());
    Id::from_bytes(bytes)
}

async fn pool(ready: usize, tasks: &Tasks) -> MonitorPool {
    let config = MonitorConfig {
        program: program(),
        ready,
        cgroups: vec![],
        oom_score_adj: -999,
    };
    MonitorPool::new(config, tasks.clone()).await.unwrap()
}

/// A pod with a running pause, and all that its test needs.
struct Pod {
    client: MonitorClient,
    events: Events,
    directory: TempDir,
    root: TempDir,
    tasks: Tasks,
    pause: u32,
    freezer: Option<PathBuf>,
    cgroup: Option<Scratch>,
    ended: bool,
}

impl Pod {
    async fn new() -> Self {
        let tasks = Tasks::default();
        let pool = pool(1, &tasks).await;
        Self::of(&pool, tasks).await
    }

    async fn of(pool: &MonitorPool, tasks: Tasks) -> Self {
        let directory = TempDir::new().unwrap();
        let (client, events) = pool.take(PodId(unique()), directory.path()).await.unwrap();
        let root = TempDir::new().unwrap();
        for name in ["usr", "proc", "dev", "tmp"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        for name in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.path().join(name)).unwrap();
        }
        let pause = client.sandbox(&sandbox_plan(), None).await.unwrap();
        Self {
            client,
            events,
            directory,
            root,
            tasks,
            pause,
            freezer: None,
            cgroup: None,
            ended: false,
        }
    }

    /// With a freezer cgroup that containers join.
    async fn with_cgroup() -> Self {
        let mut pod = Self::new().await;
        let name = format!("berth-test-{}-{}", std::process::id(), unique().short());
        pod.cgroup = Some(Scratch::named(&name));
        let freezer = PathBuf::from("/sys/fs/cgroup/freezer").join(name);
        fs::create_dir(&freezer).unwrap();
        pod.freezer = Some(freezer);
        pod
    }

    fn plan(&self, process: ProcessPlan) -> Plan {
        let bind = |source: MountSource, target: &str| MountPlan {
            target: target.into(),
            source,
            attributes: MountAttributes::default(),
        };
        let usr = MountSource::Bind {
            path: "/usr".into(),
            recursive: true,
            propagation: MountPropagation::Private,
            uid_mappings: vec![],
            gid_mappings: vec![],
        };
        let proc = MountSource::Filesystem {
            kind: "proc".into(),
            options: vec![],
        };
        let dev = MountSource::Filesystem {
            kind: "tmpfs".into(),
            options: vec![("mode".into(), "755".into())],
        };
        let pts = MountSource::Filesystem {
            kind: "devpts".into(),
            options: vec![
                ("newinstance".into(), String::new()),
                ("ptmxmode".into(), "0666".into()),
                ("mode".into(), "0620".into()),
            ],
        };
        Plan {
            namespaces: namespaces(),
            cgroup: CgroupJoin::V1(self.freezer.iter().cloned().collect()),
            hostname: String::new(),
            sysctls: vec![],
            rootfs: Rootfs::Directory {
                path: self.root.path().into(),
                readonly: false,
            },
            root_propagation: MountPropagation::Private,
            mounts: vec![
                bind(proc, "/proc"),
                bind(dev, "/dev"),
                bind(pts, "/dev/pts"),
                bind(usr, "/usr"),
            ],
            devices: vec![device("/dev/null", 3), device("/dev/zero", 5)],
            masked_paths: vec![],
            readonly_paths: vec![],
            declared_volumes: vec![],
            hooks: None,
            process,
            mount_label: String::new(),
        }
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("logs/container/0.log")
    }

    fn stdio(&self) -> Stdio {
        Stdio {
            log_path: self.log(),
            ..Stdio::default()
        }
    }

    async fn create_with(&self, plan: &Plan, stdio: Stdio) -> Result<ContainerId> {
        let id = ContainerId(unique());
        let new = NewContainer {
            id,
            stdio,
            memory_cgroup: PathBuf::new(),
            kill_cgroup: self.freezer.clone().unwrap_or_default(),
            limit: std::time::Duration::from_secs(110),
        };
        self.client.container(new, plan).await.map(|_created| id)
    }

    /// Starts a container with this shell script.
    async fn run(&self, script: &str) -> ContainerId {
        let plan = self.plan(process(&["sh", "-c", script]));
        let id = self.create_with(&plan, self.stdio()).await.unwrap();
        self.client.start(id).await.unwrap();
        id
    }

    async fn exit(&mut self) -> ContainerExit {
        let event = timeout(PATIENCE, self.events.recv()).await.unwrap();
        match event.unwrap() {
            MonitorEvent::ContainerExited(exit) => exit,
            other => panic!("{other:?}"),
        }
    }

    /// Lines of the log as (stream and tag, text).
    fn lines(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(self.log()).unwrap();
        let parse = |line: &str| (line[31..39].to_owned(), line[40..].to_owned());
        // Not `lines`: it would take `\r` away.
        text.split_terminator('\n').map(parse).collect()
    }

    async fn exec(&self, id: ContainerId, script: &str) -> Result<crate::engine::ExecOutput> {
        let plan = exec_plan(&["sh", "-c", script]);
        self.client.exec_sync(id, &plan, CAP, None).await
    }

    /// Ends the pod; nothing may be left of it.
    async fn end(mut self) {
        self.ended = true;
        self.client.stop().await.unwrap();
        assert!(!Path::new(&format!("/proc/{}", self.pause)).exists());
        let monitor = self.client.pid();
        self.client.shutdown().await.unwrap();
        assert!(!Path::new(&format!("/proc/{monitor}")).exists());
        assert!(!self.directory.path().join(crate::monitor::SOCKET).exists());
        if let Some(freezer) = &self.freezer {
            fs::remove_dir(freezer).unwrap();
        }
        let tasks = self.tasks.clone();
        drop(self);
        assert_eq!(tasks.shutdown(PATIENCE).await, 0);
    }
}

impl Drop for Pod {
    /// A test that failed leaves nothing behind either.
    fn drop(&mut self) {
        let monitor = self.client.pid();
        let children = format!("/proc/{monitor}/task/{monitor}/children");
        let children = fs::read_to_string(children).unwrap_or_default();
        let children = children.split_whitespace().flat_map(str::parse);
        for pid in children.chain([monitor]).filter(|_| !self.ended) {
            if let Ok(pidfd) = process::pidfd_open(pid) {
                let _ended_already = process::send_signal(pidfd.as_fd(), 9);
                let _not_ours = process::try_wait(pidfd.as_fd());
            }
        }
    }
}

fn device(path: &str, minor: u32) -> DeviceNode {
    DeviceNode {
        path: path.into(),
        host_path: path.into(),
        block: false,
        major: 1,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    }
}

fn namespaces() -> Namespaces {
    Namespaces {
        network: NamespaceSource::Host,
        ipc: NamespaceSource::New,
        uts: NamespaceSource::New,
        pid: NamespaceSource::New,
        cgroup: NamespaceSource::Host,
        user: NamespaceSource::Host,
        uid_mappings: vec![],
        gid_mappings: vec![],
    }
}

fn sandbox_plan() -> Plan {
    Plan {
        namespaces: Namespaces {
            pid: NamespaceSource::Host,
            ..namespaces()
        },
        cgroup: CgroupJoin::V1(vec![]),
        hostname: "pod".into(),
        sysctls: vec![],
        rootfs: Rootfs::Pause { shm_size: 1 << 20 },
        root_propagation: MountPropagation::Private,
        mounts: vec![],
        devices: vec![],
        masked_paths: vec![],
        readonly_paths: vec![],
        declared_volumes: vec![],
        hooks: None,
        process: process(&[]),
        mount_label: String::new(),
    }
}

fn process(args: &[&str]) -> ProcessPlan {
    ProcessPlan {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec![b"PATH=/usr/bin:/bin".to_vec()],
        cwd: "/".into(),
        user: UserPlan::default(),
        capabilities: CapabilityMasks {
            bounding: 1 << 5, // CAP_KILL
            permitted: 1 << 5,
            ambient: 0,
        },
        no_new_privs: true,
        rlimits: vec![],
        oom_score_adj: None,
        seccomp: None,
        apparmor: String::new(),
        selinux: String::new(),
        terminal: false,
        umask: None,
        tuning: crate::runtime::plan::Tuning::default(),
        resctrl: vec![],
    }
}

fn exec_plan(args: &[&str]) -> ExecPlan {
    ExecPlan {
        text: None,
        cpu: None,
        cgroup: CgroupJoin::V1(vec![]),
        user_namespace: None,
        process: process(args),
        user: ProcessUser::default(),
    }
}

/// Waits for a level with a deadline.
async fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let look = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, look).await.unwrap()
}

#[tokio::test]
async fn an_idle_monitor_is_adopted_found_again_and_ends() {
    let tasks = Tasks::default();
    let pool = pool(2, &tasks).await;
    let directory = TempDir::new().unwrap();
    let id = PodId(unique());
    let (client, mut events) = pool.take(id, directory.path()).await.unwrap();
    let (second, state, _events) = MonitorClient::connect(directory.path(), &tasks)
        .await
        .unwrap();
    assert_eq!(
        (state.pod_id, state.pause_pid, state.version),
        (id, None, VERSION)
    );
    assert_eq!(second.pid(), client.pid());
    // The newest connection wins.
    assert_eq!(
        timeout(PATIENCE, events.recv()).await.unwrap(),
        Some(MonitorEvent::Lost)
    );
    let error = client.stop().await.unwrap_err();
    assert!(
        matches!(error, MonitorError::Lost { call: "stop" }),
        "{error}"
    );
    let error = second.start(ContainerId(unique())).await.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    second.remove(ContainerId(unique())).await.unwrap();
    second.shutdown().await.unwrap();
    let error = MonitorClient::connect(directory.path(), &tasks)
        .await
        .unwrap_err();
    assert!(matches!(error, MonitorError::Connect { .. }), "{error}");
    drop((client, second, pool));
    assert_eq!(tasks.shutdown(PATIENCE).await, 0);
}

#[tokio::test]
async fn a_monitor_that_cannot_be_used_is_an_error() {
    let tasks = Tasks::default();
    let config = |program: &str| MonitorConfig {
        program: program.into(),
        ready: 1,
        cgroups: vec!["/missing".into()],
        oom_score_adj: 0,
    };
    for (program, text) in [
        ("/missing", "read /missing"),
        ("/etc/hostname", "start a monitor"),
        ("/bin/true", "prepare: the monitor of this pod is gone"),
    ] {
        let error = MonitorPool::new(config(program), tasks.clone())
            .await
            .unwrap_err();
        assert_eq!(error.to_string(), text);
    }
    let pool = pool(1, &tasks).await;
    let missing = Path::new("/missing/directory");
    let error = pool.take(PodId(unique()), missing).await.unwrap_err();
    assert_eq!(error.fault().unwrap().errno, 2, "{error}");
}

#[tokio::test]
async fn output_exit_code_and_record() {
    let mut pod = Pod::new().await;
    let id = pod
        .run("echo out; echo err >&2; sleep 0; printf tail; exit 3")
        .await;
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code, exit.oom_killed), (id, 3, false));
    assert!(exit.at.0 > 0);
    let found: BTreeSet<_> = pod.lines().into_iter().collect();
    let expected = [
        ("stdout F", "out"),
        ("stderr F", "err"),
        ("stdout P", "tail"),
    ];
    let expected = expected.map(|(tag, text)| (tag.to_owned(), text.to_owned()));
    assert_eq!(found, BTreeSet::from(expected));
    assert_eq!(record::read(pod.directory.path(), id), Some(exit));
    // what has ended is not opened again.
    fs::remove_file(pod.log()).unwrap();
    pod.client.reopen_log(id).await.unwrap_err();
    assert!(!pod.log().exists());
    pod.client.signal(id, 15).await.unwrap();
    pod.client.kill(id).await.unwrap();
    pod.exec(id, "true").await.unwrap_err();
    pod.client.remove(id).await.unwrap();
    assert_eq!(record::read(pod.directory.path(), id), None);
    pod.end().await;
}

#[tokio::test]
async fn signals_and_removal_of_the_living() {
    let mut pod = Pod::new().await;
    let trap = pod
        .run("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
        .await;
    wait_for(|| {
        pod.log()
            .exists()
            .then(|| pod.lines().len() == 1)?
            .then_some(())
    })
    .await;
    pod.client.signal(trap, 15).await.unwrap();
    assert_eq!(pod.exit().await.code, 7);
    let killed = pod.run("sleep 1000").await;
    pod.client.kill(killed).await.unwrap();
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code), (killed, 137));
    let removed = pod.run("sleep 1000").await;
    pod.client.remove(removed).await.unwrap();
    assert_eq!(pod.exit().await.id, removed);
    let plan = pod.plan(process(&["sleep", "1000"]));
    let created = pod.create_with(&plan, pod.stdio()).await.unwrap();
    pod.client.remove(created).await.unwrap();
    assert_eq!(pod.exit().await.id, created);
    pod.end().await;
}

#[tokio::test]
async fn failures_are_data() {
    let mut pod = Pod::new().await;
    let plan = pod.plan(process(&["/missing/program"]));
    let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
    let error = pod.client.start(id).await.unwrap_err();
    let fault = error.fault().unwrap();
    assert_eq!((fault.stage.as_str(), fault.errno), ("exec", 2), "{fault}");
    assert_eq!(pod.exit().await.id, id);
    let mut plan = pod.plan(process(&["true"]));
    plan.rootfs = Rootfs::Directory {
        path: "/missing".into(),
        readonly: false,
    };
    let error = pod.create_with(&plan, pod.stdio()).await.unwrap_err();
    assert_eq!(error.fault().unwrap().errno, 2, "{error}");
    let id = pod.run("sleep 1000").await;
    let plan = exec_plan(&["/missing/program"]);
    let error = pod
        .client
        .exec_sync(id, &plan, CAP, None)
        .await
        .unwrap_err();
    assert_eq!(error.fault().unwrap().errno, 2, "{error}");
    let stdio = Stdio {
        log_path: "/proc/none/0.log".into(),
        ..Stdio::default()
    };
    let plan = pod.plan(process(&["true"]));
    pod.create_with(&plan, stdio).await.unwrap_err();
    pod.end().await;
}

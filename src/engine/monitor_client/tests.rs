//! The real monitor, as a process, with real containers: `/usr` of the machine in a root of their own.

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
use crate::base::id::{ContainerId, Id, PodId};
use crate::engine::ExecOutput;
use crate::monitor::protocol::Stdio;
use crate::monitor::record;
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
            ended: false,
        }
    }

    /// With a freezer cgroup that containers join.
    async fn with_cgroup() -> Self {
        let mut pod = Self::new().await;
        let name = format!("berth-test-{}-{}", std::process::id(), unique().short());
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
            process,
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
        let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
        for pid in children.chain([monitor]).filter(|_| !self.ended) {
            if let Ok(pidfd) = process::pidfd_open(pid) {
                process::send_signal(pidfd.as_fd(), 9).unwrap();
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
        process: process(&[]),
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
    }
}

fn exec_plan(args: &[&str]) -> ExecPlan {
    ExecPlan {
        text: None,
        cgroup: CgroupJoin::V1(vec![]),
        user_namespace: None,
        process: process(args),
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
    // R-141: what has ended is not opened again.
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

#[tokio::test]
async fn a_restart_of_the_daemon_loses_nothing() {
    let mut pod = Pod::new().await;
    let count = 20_000;
    let script =
        format!("i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done; exit 9");
    let ending = pod.run(&script).await;
    let other = Stdio::default();
    let plan = pod.plan(process(&["sleep", "1000"]));
    let running = pod.create_with(&plan, other.clone()).await.unwrap();
    let started = pod.client.start(running).await.unwrap();
    let created = pod.create_with(&plan, other).await.unwrap();
    // The daemon dies ...
    let (pid, directory) = (pod.client.pid(), pod.directory.path().to_owned());
    let (_closed, no_events) = mpsc::unbounded_channel();
    pod.events = no_events;
    let died = pod.client.shared.socket.get_ref().as_fd();
    rustix::net::shutdown(died, rustix::net::Shutdown::Both).unwrap();
    wait_for(|| record::read(&directory, ending)).await;
    // ... and comes back.
    let (client, state, events) = MonitorClient::connect(&directory, &pod.tasks)
        .await
        .unwrap();
    (pod.client, pod.events) = (client, events);
    assert_eq!((pod.client.pid(), state.pause_pid), (pid, Some(pod.pause)));
    let find = |id| state.containers.iter().find(|c| c.id == id).unwrap();
    let exit = find(ending).exit.clone().unwrap();
    assert_eq!((exit.code, find(ending).pid), (9, None));
    assert_eq!(record::read(&directory, ending), Some(exit));
    assert_eq!(find(running).started_at, started);
    assert!(find(running).pid.is_some() && find(running).exit.is_none());
    assert_eq!(find(created).started_at, Timestamp(0));
    let expected: Vec<_> = (0..count)
        .map(|i| ("stdout F".to_owned(), format!("line {i}")))
        .collect();
    assert!(pod.lines() == expected, "lost or doubled lines");
    assert_eq!(pod.exec(running, "echo hi").await.unwrap().stdout, b"hi\n");
    pod.client.start(created).await.unwrap();
    pod.end().await;
}

#[tokio::test]
async fn the_death_of_a_monitor_is_told() {
    let mut pod = Pod::with_cgroup().await;
    let plan = pod.plan(process(&["sleep", "1000"]));
    let created = pod.create_with(&plan, pod.stdio()).await.unwrap();
    let running = pod.run("sleep 1000").await;
    let _both = (created, running);
    let pause = process::pidfd_open(pod.pause).unwrap();
    pod.client.kill_monitor().await.unwrap();
    let lost = timeout(PATIENCE, pod.events.recv()).await.unwrap();
    assert_eq!(lost, Some(MonitorEvent::Lost));
    pod.client.start(running).await.unwrap_err();
    MonitorClient::connect(pod.directory.path(), &pod.tasks)
        .await
        .unwrap_err();
    // The daemon kills by cgroup, and pause by its pidfd.
    let freezer = pod.freezer.clone().unwrap();
    let target = freezer.clone();
    Tasks::blocking(move || crate::runtime::cgroups::kill(&target).unwrap())
        .await
        .unwrap();
    process::send_signal(pause.as_fd(), 9).unwrap();
    wait_for(|| fs::remove_dir(&freezer).ok()).await;
    pod.ended = true;
}

#[tokio::test]
async fn exec_sync_gives_output_code_and_limits() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    let output = pod
        .exec(id, "echo out; echo err >&2; exit 4")
        .await
        .unwrap();
    let ExecOutput {
        stdout,
        stderr,
        exit_code,
    } = output;
    assert_eq!(
        (stdout.as_slice(), stderr.as_slice(), exit_code),
        (&b"out\n"[..], &b"err\n"[..], 4)
    );
    let output = pod.exec(id, "kill -9 $$").await.unwrap();
    assert_eq!(output.exit_code, 137);
    let plan = exec_plan(&["sh", "-c", "head -c 3000000 /dev/zero; echo end >&2"]);
    let output = pod.client.exec_sync(id, &plan, 1000, None).await.unwrap();
    assert_eq!(
        (output.stdout.len(), output.stderr.as_slice()),
        (1000, &b"end\n"[..])
    );
    // R-153: a child that holds the pipe does not hold the answer.
    let output = timeout(PATIENCE, pod.exec(id, "echo hi; sleep 1000 &"))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(output.stdout, b"hi\n");
    pod.end().await;
}

#[tokio::test]
async fn an_exec_that_is_too_slow_dies_with_its_children() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    let plan = exec_plan(&["sh", "-c", "sh -c 'sleep 4321 & sleep 4322' & sleep 4323"]);
    let limit = Some(Duration::from_secs(2));
    let error = pod
        .client
        .exec_sync(id, &plan, CAP, limit)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded, "{error}");
    let script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    loop {
        let left = pod.exec(id, script).await.unwrap().stdout;
        let left = String::from_utf8(left).unwrap();
        if !left.contains("sleep 432") {
            assert!(left.contains("sleep 1000"), "{left}");
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    pod.end().await;
}

#[tokio::test]
async fn an_exec_that_nobody_waits_for_dies() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    let plan = exec_plan(&["sh", "-c", "touch /tmp/started; sleep 4321"]);
    let mut waiting = Box::pin(pod.client.exec_sync(id, &plan, CAP, None));
    let started = pod.root.path().join("tmp/started");
    tokio::select! {
        ended = &mut waiting => panic!("{ended:?}"),
        () = wait_for(|| started.exists().then_some(())) => {}
    }
    drop(waiting);
    let script = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '";
    loop {
        let left = String::from_utf8(pod.exec(id, script).await.unwrap().stdout).unwrap();
        if !left.contains("sleep 4321") {
            break;
        }
        sleep(Duration::from_millis(20)).await;
    }
    pod.end().await;
}

#[tokio::test]
async fn the_rest_of_the_cgroup_ends_with_the_first_process() {
    let mut pod = Pod::with_cgroup().await;
    let mut plan = pod.plan(process(&["sh", "-c", "setsid sleep 1000 & echo started"]));
    plan.namespaces.pid = NamespaceSource::Host;
    let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
    pod.client.start(id).await.unwrap();
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code), (id, 0));
    let freezer = pod.freezer.clone().unwrap();
    assert_eq!(
        fs::read_to_string(freezer.join("cgroup.procs")).unwrap(),
        ""
    );
    assert_eq!(pod.lines(), [("stdout F".to_owned(), "started".to_owned())]);
    pod.end().await;
}

#[tokio::test]
async fn an_oom_kill_is_told() {
    let hierarchy = Path::new("/sys/fs/cgroup/memory");
    if !hierarchy.exists() {
        return; // v2: the emulated node's tests see it
    }
    let mut pod = Pod::with_cgroup().await;
    let freezer = pod.freezer.clone().unwrap();
    let memory = hierarchy.join(freezer.file_name().unwrap());
    fs::create_dir(&memory).unwrap();
    let limit = fs::File::options()
        .write(true)
        .open(memory.join("memory.limit_in_bytes"));
    std::io::Write::write_all(&mut limit.unwrap(), b"16777216").unwrap();
    let mut plan = pod.plan(process(&["sh", "-c", "tail /dev/zero; exit 5"]));
    plan.cgroup = CgroupJoin::V1(vec![freezer.clone(), memory.clone()]);
    let id = ContainerId(unique());
    let new = NewContainer {
        id,
        stdio: pod.stdio(),
        memory_cgroup: memory.clone(),
        kill_cgroup: freezer,
    };
    pod.client.container(new, &plan).await.unwrap();
    pod.client.start(id).await.unwrap();
    let exit = pod.exit().await;
    assert_eq!((exit.id, exit.code, exit.oom_killed), (id, 5, true));
    pod.end().await;
    wait_for(|| fs::remove_dir(&memory).ok()).await;
}

#[tokio::test]
async fn signals_do_not_end_a_monitor() {
    let pod = Pod::new().await;
    let monitor = pod.client.shared.pidfd.get_ref().as_fd();
    for signal in [1, 2, 13, 15] {
        assert!(process::send_signal(monitor, signal).unwrap());
    }
    let id = pod.run("sleep 1000").await;
    // What the monitor blocks is not blocked in its children.
    let output = pod
        .exec(id, "grep -E '^Sig(Blk|Ign)' /proc/self/status")
        .await
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        // The first 31: those above are the C library's own.
        let mask = u64::from_str_radix(line.split_once('\t').unwrap().1, 16).unwrap();
        assert_eq!(mask & 0x7fff_ffff, 0, "{line}");
    }
    assert_eq!(text.lines().count(), 2);
    pod.end().await;
}

#[tokio::test]
async fn rotation_under_a_fast_writer() {
    let mut pod = Pod::new().await;
    let count = 200_000;
    let id = pod.run(&format!("seq {count}")).await;
    let mut rotated = vec![];
    while !pod.directory.path().join(format!("{id}.exit")).exists() {
        let to = pod
            .directory
            .path()
            .join(format!("rotated.{}", rotated.len()));
        fs::rename(pod.log(), &to).unwrap();
        rotated.push(to);
        if pod.client.reopen_log(id).await.is_err() {
            break;
        }
    }
    pod.exit().await;
    let mut text = String::new();
    for path in rotated.iter().chain([&pod.log()]) {
        text += &fs::read_to_string(path).unwrap_or_default();
    }
    let numbers: Vec<&str> = text.lines().map(|line| &line[40..]).collect();
    assert_eq!(numbers.len(), count);
    let wrong = numbers
        .iter()
        .zip(1..)
        .find(|(text, number)| **text != number.to_string());
    assert_eq!(wrong, None);
    pod.end().await;
}

#[tokio::test]
async fn attach_copies_output_and_feeds_stdin() {
    let mut pod = Pod::new().await;
    let stdio = Stdio {
        stdin: true,
        stdin_once: true,
        ..pod.stdio()
    };
    let plan = pod.plan(process(&["sh", "-c", "cat; echo done >&2"]));
    let id = pod.create_with(&plan, stdio).await.unwrap();
    pod.client.start(id).await.unwrap();
    let (stdout, out) = fd::pipe().unwrap();
    let (stderr, err) = fd::pipe().unwrap();
    let stdin = pod
        .client
        .attach(id, vec![out, err], true)
        .await
        .unwrap()
        .unwrap();
    let (_unread, slow) = fd::pipe().unwrap();
    assert!(
        pod.client
            .attach(id, vec![slow], true)
            .await
            .unwrap()
            .is_none()
    );
    let text = "x".repeat(99) + "\n";
    let text = text.repeat(3000);
    let mut stdin = pipe::Sender::from_owned_fd(stdin).unwrap();
    let (given, mut out, mut err) = (text.clone(), vec![], vec![]);
    let write = async {
        stdin.write_all(given.as_bytes()).await.unwrap();
        drop(stdin);
    };
    let mut stdout = pipe::Receiver::from_owned_fd(stdout).unwrap();
    let mut stderr = pipe::Receiver::from_owned_fd(stderr).unwrap();
    let all = async {
        tokio::join!(
            write,
            stdout.read_to_end(&mut out),
            stderr.read_to_end(&mut err)
        )
    };
    let ((), first, second) = timeout(PATIENCE, all).await.unwrap();
    assert_eq!((first.unwrap(), second.unwrap()), (out.len(), err.len()));
    assert_eq!(err, b"done\n");
    // Our pipe holds 64 KiB and we read slowly: a copy may be cut short, never wrong; the log has it all.
    assert!(text.as_bytes().starts_with(&out));
    assert_eq!(pod.exit().await.code, 0);
    assert_eq!(pod.lines().len(), 3001);
    pod.end().await;
}

#[tokio::test]
async fn terminals_of_containers_and_execs() {
    let mut pod = Pod::new().await;
    let mut plan = pod.plan(process(&[
        "sh",
        "-c",
        "test -t 0 && test -t 1; echo tty $?; read x; stty size; echo got $x",
    ]));
    plan.process.terminal = true;
    let stdio = Stdio {
        terminal: true,
        stdin: true,
        ..pod.stdio()
    };
    let id = pod.create_with(&plan, stdio).await.unwrap();
    pod.client.start(id).await.unwrap();
    pod.client.resize(id, 111, 33).await.unwrap();
    let mut plan = exec_plan(&["sh", "-c", "test -t 0; echo exec tty $?; exit 5"]);
    plan.process.terminal = true;
    let (execution, master) = pod.client.exec_terminal(id, &plan).await.unwrap();
    let mut text = vec![];
    let mut buffer = [0; 100];
    while let Ok(count @ 1..) = fd::read(master.as_fd(), &mut buffer) {
        text.extend_from_slice(&buffer[..count]);
    }
    assert_eq!(String::from_utf8(text).unwrap(), "exec tty 0\r\n");
    assert_eq!(execution.exit.await.unwrap(), 5);
    let (_reader, copy) = fd::pipe().unwrap();
    let input = pod
        .client
        .attach(id, vec![copy], true)
        .await
        .unwrap()
        .unwrap();
    fd::write_all(input.as_fd(), b"word\n").unwrap();
    drop(input);
    assert_eq!(pod.exit().await.code, 0);
    let lines: Vec<String> = pod.lines().into_iter().map(|(_, text)| text).collect();
    assert_eq!(lines, ["tty 0\r", "word\r", "33 111\r", "got word\r"]);
    pod.end().await;
}

/// Prints what monitors and pauses cost. `BERTH_MONITOR=target/release/berth-monitor cargo test --lib -- --ignored --nocapture cost`
#[tokio::test]
#[ignore = "a measurement"]
async fn cost_of_twenty_pods() {
    let mut pods = vec![];
    let tasks = Tasks::default();
    let pool = pool(1, &tasks).await;
    for _ in 0..20 {
        let pod = Pod::of(&pool, tasks.clone()).await;
        let id = pod
            .run("i=0; while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); done; sleep 1000")
            .await;
        wait_for(|| (pod.lines().len() == 1000).then_some(())).await;
        pod.exec(id, "true").await.unwrap();
        pods.push(pod);
    }
    let pss = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let monitors: u64 = pods.iter().map(|pod| pss(pod.client.pid())).sum();
    let pauses: u64 = pods.iter().map(|pod| pss(pod.pause)).sum();
    println!(
        "per pod: monitor {} KiB, pause {} KiB",
        monitors / 20,
        pauses / 20
    );
    drop(pool);
    for pod in pods {
        pod.client.stop().await.unwrap();
    }
}

/// Prints medians of the steps of a pod's life. As above, with `steps`; better with `--release`.
#[tokio::test]
#[ignore = "a measurement"]
async fn steps_of_a_pod() {
    use std::collections::BTreeMap;
    let tasks = Tasks::default();
    let pool = pool(2, &tasks).await;
    let mut times: BTreeMap<&str, Vec<u128>> = BTreeMap::new();
    for _ in 0..50 {
        let mut last = std::time::Instant::now();
        let mut step = |name| {
            times
                .entry(name)
                .or_default()
                .push(last.elapsed().as_micros());
            last = std::time::Instant::now();
        };
        let pod = Pod::of(&pool, tasks.clone()).await;
        step("1 take, adopt, sandbox (and a test's directories)");
        let plan = pod.plan(process(&["sleep", "1000"]));
        let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
        step("2 container");
        pod.client.start(id).await.unwrap();
        step("3 start");
        let plan = exec_plan(&["true"]);
        pod.client.exec_sync(id, &plan, CAP, None).await.unwrap();
        step("4 exec sync");
        pod.client.stop().await.unwrap();
        step("5 stop");
        pod.client.shutdown().await.unwrap();
        step("6 shutdown");
    }
    for (name, mut all) in times {
        all.sort_unstable();
        println!("{name}: {} us", all[all.len() / 2]);
    }
}

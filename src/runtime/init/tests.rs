//! Plans become processes for real: as root, in namespaces of their own, from a directory with busybox.

mod cgroups;
mod hooks;
mod mounts;
mod pods;
mod processes;
mod protocol;
mod seccomp;
mod userns;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::container::ProcessUser;
use crate::runtime::create::{self, CreateRequest, Received, Spawned};
use crate::runtime::exec::{self, ExecRequest};
use crate::runtime::plan::*;
use crate::sys::clone::in_forked_child;
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::process::{self, Exit};
use crate::sys::{fd, memfd, ns, signal};

const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with a root filesystem made of busybox.
struct Image {
    base: tempfile::TempDir,
}

impl Image {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let root = base.path().join("root");
        for directory in ["bin", "etc", "tmp", "lib"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        let program = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .expect("busybox is missing: apt-get install busybox-static");
        fs::copy(program, root.join("bin/busybox")).unwrap();
        for name in [
            "sh", "cat", "ls", "id", "mount", "umount", "env", "grep", "stat", "readlink", "touch",
            "mkdir", "hostname", "tty", "true", "sleep", "ps", "kill", "test", "dd", "head", "wc",
            "tr", "ulimit", "rm", "sysctl", "chmod", "pwd",
        ] {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        let image = Self { base };
        image.write(
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n",
        );
        image.write("etc/group", "root:x:0:\napps:x:1001:\nextra:x:50:app\n");
        image
    }

    fn root(&self) -> PathBuf {
        self.base.path().join("root")
    }

    fn host(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        write(&self.root().join(name), text);
    }
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = fs::File::create(path).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
}

fn filesystem(kind: &str, target: &str, options: &[(&str, &str)], readonly: bool) -> MountPlan {
    let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    MountPlan {
        target: target.to_owned(),
        source: MountSource::Filesystem {
            kind: kind.to_owned(),
            options: options.iter().map(own).collect(),
        },
        attributes: MountAttributes {
            nosuid: true,
            readonly,
            ..MountAttributes::default()
        },
    }
}

fn bind(path: &Path, target: &str) -> MountPlan {
    MountPlan {
        target: target.to_owned(),
        source: MountSource::Bind {
            path: path.to_owned(),
            recursive: true,
            propagation: MountPropagation::Private,
            uid_mappings: Vec::new(),
            gid_mappings: Vec::new(),
        },
        attributes: MountAttributes::default(),
    }
}

fn device(path: &str, major: u32, minor: u32) -> DeviceNode {
    DeviceNode {
        path: path.to_owned(),
        host_path: path.into(),
        block: false,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    }
}

fn process(script: &str) -> ProcessPlan {
    let all = 0x1_ffff_ffff;
    ProcessPlan {
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec![b"PATH=/bin".to_vec()],
        cwd: "/".to_owned(),
        user: UserPlan::default(),
        capabilities: CapabilityMasks {
            bounding: all,
            permitted: all,
            ambient: 0,
        },
        no_new_privs: false,
        rlimits: Vec::new(),
        oom_score_adj: None,
        seccomp: None,
        apparmor: String::new(),
        selinux: String::new(),
        terminal: false,
        umask: None,
        tuning: crate::runtime::plan::Tuning::default(),
        resctrl: Vec::new(),
    }
}

fn plan(image: &Image, script: &str) -> Plan {
    use NamespaceSource::{Host, New};
    Plan {
        namespaces: Namespaces {
            network: New,
            ipc: New,
            uts: New,
            pid: New,
            cgroup: New,
            user: Host,
            uid_mappings: Vec::new(),
            gid_mappings: Vec::new(),
        },
        cgroup: CgroupJoin::V1(Vec::new()),
        hostname: "inside".to_owned(),
        sysctls: Vec::new(),
        rootfs: Rootfs::Overlay {
            lower: vec![image.root()],
            upper: Some(made(image.host("upper"))),
            work: made(image.host("work")),
            volatile: true,
            readonly: false,
        },
        root_propagation: MountPropagation::Private,
        mounts: vec![
            filesystem("proc", "/proc", &[], false),
            filesystem(
                "tmpfs",
                "/dev",
                &[("mode", "755"), ("size", "65536k")],
                false,
            ),
            filesystem(
                "devpts",
                "/dev/pts",
                &[("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")],
                false,
            ),
            filesystem("mqueue", "/dev/mqueue", &[], false),
            filesystem("sysfs", "/sys", &[], true),
        ],
        devices: vec![
            device("/dev/null", 1, 3),
            device("/dev/zero", 1, 5),
            device("/dev/tty", 5, 0),
        ],
        masked_paths: Vec::new(),
        readonly_paths: Vec::new(),
        declared_volumes: Vec::new(),
        hooks: None,
        process: process(script),
        mount_label: String::new(),
    }
}

fn made(path: PathBuf) -> PathBuf {
    fs::create_dir_all(&path).unwrap();
    path
}

/// What came of a plan.
#[derive(Debug)]
struct Outcome {
    output: String,
    exit: Exit,
    ready: Option<Report>,
    fault: Option<Fault>,
}

impl Outcome {
    fn text(&self) -> &str {
        assert_eq!(self.fault, None);
        assert_eq!(self.exit, Exit::Code(0), "{}", self.output);
        self.output.trim_end()
    }

    fn refused(&self) -> String {
        let fault = self.fault.as_ref();
        fault
            .unwrap_or_else(|| panic!("no fault: {self:?}"))
            .to_string()
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "time is up: {what}");
        std::thread::yield_now();
    }
}

fn readable(fd: std::os::fd::BorrowedFd<'_>) {
    let mut set = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    assert_eq!(poll(&mut set, Some(PATIENCE)).unwrap(), 1, "time is up");
}

fn receive(spawned: &Spawned) -> Received {
    readable(spawned.control.as_fd());
    create::receive(spawned.control.as_fd()).unwrap()
}

/// Where the process is a maker that was started: waits for its end, and goes on with what it gave birth to, if that executes.
fn born(spawned: &mut Spawned) -> Result<(), (Fault, Exit)> {
    let Some(launch) = spawned.launch.take() else {
        return Ok(());
    };
    readable(spawned.pidfd.as_fd());
    let exit = process::wait(spawned.pidfd.as_fd()).unwrap();
    match create::born(&launch) {
        Ok(late) => assert_eq!(late, None),
        Err(fault) => {
            // The first process of its namespace would wait for it at its own end.
            let _ended = launch.pid().map(process::reap);
            return Err((fault, exit));
        }
    }
    spawned.pid = launch.pid().unwrap();
    spawned.pidfd = process::pidfd_open(spawned.pid).unwrap();
    Ok(())
}

/// Follows a process from its clone to its end, with what it prints.
fn complete(mut spawned: Spawned, reader: OwnedFd) -> Outcome {
    let (mut ready, mut fault, mut master) = (None, None, None);
    loop {
        match receive(&spawned) {
            Received::Moved { pid, pidfd } => spawned = userns::moved(spawned, pid, pidfd),
            Received::Report(Report::Failed(failed), _) => fault = Some(failed),
            Received::Report(report, terminal) => {
                ready = Some(report);
                master = terminal;
                create::start(spawned.control.as_fd()).unwrap();
            }
            Received::Closed => break,
        }
    }
    let mut unborn = None;
    if ready.is_some()
        && fault.is_none()
        && let Err((failed, exit)) = born(&mut spawned)
    {
        (fault, unborn) = (Some(failed), Some(exit));
    }
    let mut output = Vec::new();
    let source = master.unwrap_or(reader);
    let mut buffer = [0; 4096];
    loop {
        readable_or_hung(source.as_fd());
        match fd::read(source.as_fd(), &mut buffer) {
            // A terminal whose last process is gone gives EIO.
            Ok(0) | Err(_) => break,
            Ok(count) => output.extend(&buffer[..count]),
        }
    }
    let wait = || {
        readable(spawned.pidfd.as_fd());
        process::wait(spawned.pidfd.as_fd()).unwrap()
    };
    Outcome {
        output: String::from_utf8(output).unwrap(),
        exit: unborn.unwrap_or_else(wait),
        ready,
        fault,
    }
}

fn readable_or_hung(fd: std::os::fd::BorrowedFd<'_>) {
    readable(fd);
}

#[derive(Clone, Copy)]
struct Pod<'a> {
    pause: Option<&'a Spawned>,
    network: Option<&'a OwnedFd>,
    user: Option<&'a OwnedFd>,
    target: Option<&'a Spawned>,
}

const NO_POD: Pod<'static> = Pod {
    pause: None,
    network: None,
    user: None,
    target: None,
};

fn spawn_in(pod: &Pod<'_>, plan: &Plan) -> (Result<Spawned, Fault>, OwnedFd) {
    if let Rootfs::Overlay { work, .. } = &plan.rootfs {
        // A volatile layer is mounted once only; the tests use it again.
        let _unused = fs::remove_dir_all(work.join("work/incompat"));
    }
    let plan = memfd::sealed("plan", &plan.encode().unwrap()).unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let (reader, writer) = fd::pipe().unwrap();
    let spawned = create::spawn(CreateRequest {
        plan: plan.as_fd(),
        pause: pod.pause.map(|pause| pause.pidfd.as_fd()),
        network: pod.network.map(AsFd::as_fd),
        user: pod.user.map(AsFd::as_fd),
        target: pod.target.map(|target| target.pidfd.as_fd()),
        stdio: [null.as_fd(), writer.as_fd(), writer.as_fd()],
    });
    (spawned, reader)
}

fn run_in(pod: &Pod<'_>, plan: &Plan) -> Outcome {
    let (spawned, reader) = spawn_in(pod, plan);
    complete(spawned.unwrap(), reader)
}

/// Runs a plan by itself, in a forked child of the test.
fn run(plan: &Plan, check: impl FnOnce(Outcome)) {
    in_forked_child(|| check(run_in(&NO_POD, plan)));
}

fn execute(container: &Spawned, process: ProcessPlan) -> Outcome {
    execute_as(container, process, known(0, 0, "/root"), None)
}

fn known(uid: u32, gid: u32, home: &str) -> ProcessUser {
    ProcessUser {
        uid,
        gid,
        groups: vec![gid],
        home: home.into(),
    }
}

fn execute_as(
    container: &Spawned,
    process: ProcessPlan,
    user: ProcessUser,
    user_namespace: Option<(u32, u32)>,
) -> Outcome {
    let plan = ExecPlan {
        text: None,
        cpu: None,
        cgroup: CgroupJoin::V1(Vec::new()),
        user_namespace,
        process,
        user,
    };
    let plan = memfd::sealed("exec", &plan.encode().unwrap()).unwrap();
    let null = fs::File::open("/dev/null").unwrap();
    let (reader, writer) = fd::pipe().unwrap();
    let spawned = exec::spawn(ExecRequest {
        plan: plan.as_fd(),
        container: container.pidfd.as_fd(),
        stdio: [null.as_fd(), writer.as_fd(), writer.as_fd()],
    });
    drop(writer);
    complete(spawned.unwrap(), reader)
}

fn end(spawned: &Spawned) -> Exit {
    process::send_signal(spawned.pidfd.as_fd(), signal::SIGKILL).unwrap();
    process::wait(spawned.pidfd.as_fd()).unwrap()
}

/// The container runs when it has executed.
fn start(spawned: &mut Spawned) {
    match receive(spawned) {
        Received::Report(Report::Ready(_), _) => {}
        other => panic!("{other:?}"),
    }
    create::start(spawned.control.as_fd()).unwrap();
    match receive(spawned) {
        Received::Closed => {}
        other => panic!("{other:?}"),
    }
    born(spawned).unwrap();
}

fn host_mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

fn sandbox(image: &Image, pid: NamespaceSource) -> Plan {
    let mut sandbox = plan(image, "");
    sandbox.rootfs = Rootfs::Pause { shm_size: 1 << 20 };
    sandbox.mounts.clear();
    sandbox.devices.clear();
    sandbox.namespaces.network = NamespaceSource::Passed;
    sandbox.namespaces.pid = pid;
    sandbox.sysctls = vec![
        (
            "net.ipv4.ip_unprivileged_port_start".to_owned(),
            "77".to_owned(),
        ),
        ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
    ];
    sandbox.process.capabilities = CapabilityMasks::default();
    sandbox.process.no_new_privs = true;
    sandbox
}

#[test]
fn a_container_from_layers() {
    let image = Image::new();
    let before = host_mounts();
    let script = "echo pid $$; hostname; pwd; ls /; cat /proc/1/comm; ls /dev; readlink /dev/fd; readlink /dev/ptmx; echo new > /written; ls /proc/self/fd | wc -l; grep -c . /proc/mounts";
    run(&plan(&image, script), |outcome| {
        assert_eq!(
            outcome.text(),
            "pid 1\ninside\n/\nbin\ndev\netc\nlib\nproc\nsys\ntmp\nsh\n\
             core\nfd\nmqueue\nnull\nptmx\npts\nstderr\nstdin\nstdout\ntty\nzero\n\
             /proc/self/fd\npts/ptmx\n4\n6"
        );
        let ready = Some(Report::Ready(known(0, 0, "/root")));
        assert_eq!(outcome.ready, ready);
    });
    assert_eq!(
        fs::read_to_string(image.host("upper/written")).unwrap(),
        "new\n"
    );
    assert!(!image.root().join("written").exists());
    assert_eq!(host_mounts(), before);
}

/// What a kernel before 5.9 and 5.12 lacks fails here with ENOSYS.
#[test]
fn older_kernels() {
    let image = Image::new();
    let data = made(image.host("data"));
    write(&data.join("file"), "x\n");
    image.write("vol/kept", "");
    let mut old = plan(
        &image,
        "cat /v/file; touch /v/x || echo ro; cat /etc/passwd; touch /proc/sys/x || echo ro; touch /x || echo ro; ls /vol /i; touch /i/x || echo ro",
    );
    if let Rootfs::Overlay { readonly, .. } = &mut old.rootfs {
        *readonly = true;
    }
    let mut readonly = bind(&data, "/v");
    readonly.attributes.readonly = true;
    old.mounts.push(readonly);
    old.mounts.push(MountPlan {
        target: "/i".to_owned(),
        source: MountSource::Image {
            lower: vec![data.clone()],
            sub_path: String::new(),
        },
        attributes: MountAttributes::default(),
    });
    old.declared_volumes = vec![(made(image.host("volume")), "/vol".to_owned())];
    old.masked_paths = vec!["/etc/passwd".to_owned()];
    old.readonly_paths = vec!["/proc/sys".to_owned()];
    in_forked_child(|| {
        let (close_range, mount_setattr) = (436, 442);
        let missing = 0x0005_0000 | 38;
        let program = [
            (0x20, 0, 0, 0),
            (0x15, 1, 0, close_range),
            (0x15, 0, 1, mount_setattr),
            (0x06, 0, 0, missing),
            (0x06, 0, 0, 0x7fff_0000),
        ];
        crate::sys::seccomp::install(&program, 0).unwrap();
        let outcome = run_in(&NO_POD, &old);
        let text = outcome.text().lines();
        let text = text.filter(|line| !line.contains("Read-only") && !line.contains("/proc/sys"));
        let text: Vec<_> = text.collect();
        assert_eq!(
            text,
            [
                "x", "ro", "ro", "ro", "/i:", "file", "", "/vol:", "kept", "ro"
            ]
        );
    });
}

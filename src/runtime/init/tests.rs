//! Plans become processes for real: as root, in namespaces of their own, from a directory with busybox.

mod userns;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

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
        process: process(script),
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
    readable(spawned.pidfd.as_fd());
    Outcome {
        output: String::from_utf8(output).unwrap(),
        exit: process::wait(spawned.pidfd.as_fd()).unwrap(),
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
    execute_as(container, process, None)
}

fn execute_as(
    container: &Spawned,
    process: ProcessPlan,
    user_namespace: Option<(u32, u32)>,
) -> Outcome {
    let plan = ExecPlan {
        text: None,
        cgroup: CgroupJoin::V1(Vec::new()),
        user_namespace,
        process,
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
fn start(spawned: &Spawned) {
    match receive(spawned) {
        Received::Report(Report::Ready { .. }, _) => {}
        other => panic!("{other:?}"),
    }
    create::start(spawned.control.as_fd()).unwrap();
    match receive(spawned) {
        Received::Closed => {}
        other => panic!("{other:?}"),
    }
}

fn host_mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
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
        let ready = Some(Report::Ready {
            uid: 0,
            gid: 0,
            groups: vec![0],
        });
        assert_eq!(outcome.ready, ready);
    });
    assert_eq!(
        fs::read_to_string(image.host("upper/written")).unwrap(),
        "new\n"
    );
    assert!(!image.root().join("written").exists());
    assert_eq!(host_mounts(), before);
}

#[test]
fn a_directory_as_root_and_many_layers() {
    let image = Image::new();
    let mut plan_of = plan(&image, "ls /; echo x > /etc/new || echo readonly");
    plan_of.rootfs = Rootfs::Directory {
        path: image.root(),
        readonly: true,
    };
    run(&plan_of, |outcome| {
        assert!(outcome.text().ends_with("readonly"), "{outcome:?}");
    });
    let mut lower = Vec::new();
    for number in 0..40 {
        let layer = made(image.host(&format!("a-layer-with-a-long-name-{number}")));
        write(&layer.join(format!("from-{number}")), "");
        lower.push(layer);
    }
    lower.push(image.root());
    let mut layered = plan(&image, "ls / | grep -c from");
    layered.rootfs = Rootfs::Overlay {
        lower,
        upper: Some(made(image.host("upper"))),
        work: made(image.host("work")),
        volatile: true,
        readonly: true,
    };
    run(&layered, |outcome| assert_eq!(outcome.text(), "40"));
}

#[test]
fn volumes_of_every_kind() {
    let image = Image::new();
    let data = made(image.host("data"));
    write(&data.join("file"), "content\n");
    symlink("/run", image.root().join("var-run")).unwrap();
    symlink("../../../../../../outside", image.root().join("up")).unwrap();
    let mut all = plan(
        &image,
        "cat /a/b/c/file /single /run/x/file /outside/file; echo w >> /rw/file; echo w >> /ro/file || echo ro; \
         grep /opts /proc/mounts | grep -c ' ro,nosuid,nodev,noexec,noatime'; cat /small/of/tmp; ls /vol; stat -c %a:%u /vol /vol/kept",
    );
    let mut readonly = bind(&data, "/ro");
    readonly.attributes.readonly = true;
    let mut options = bind(&data, "/opts");
    options.attributes = MountAttributes {
        readonly: true,
        nosuid: true,
        nodev: true,
        noexec: true,
        noatime: true,
        ..MountAttributes::default()
    };
    write(&image.host("single"), "one\n");
    all.mounts.extend([
        bind(&data, "/a/b/c"),
        bind(&image.host("single"), "/single"),
        bind(&data, "/var-run/x"),
        bind(&data, "/up"),
        bind(&data, "/rw"),
        readonly,
        options,
        filesystem("tmpfs", "/small", &[("size", "16k")], false),
        bind(&image.host("single"), "/small/of/tmp"),
    ]);
    image.write("vol/kept", "from the image\n");
    fs::set_permissions(image.root().join("vol"), fs::Permissions::from_mode(0o1770)).unwrap();
    let owner =
        |path: &str, id| std::os::unix::fs::chown(image.root().join(path), Some(id), Some(id));
    owner("vol", 7).unwrap();
    owner("vol/kept", 1000).unwrap();
    symlink("/etc/passwd", image.root().join("vol/link")).unwrap();
    let volume = made(image.host("volume"));
    all.declared_volumes = vec![(volume.clone(), "/vol".to_owned())];
    run(&all, |outcome| {
        assert_eq!(
            outcome.text(),
            "content\none\ncontent\ncontent\nsh: can't create /ro/file: Read-only file system\nro\n\
             1\none\nkept\nlink\n1770:7\n644:1000"
        );
    });
    assert_eq!(
        fs::read_to_string(data.join("file")).unwrap(),
        "content\nw\n"
    );
    assert_eq!(
        fs::read_to_string(volume.join("kept")).unwrap(),
        "from the image\n"
    );
    assert_eq!(fs::symlink_metadata(volume.join("link")).unwrap().uid(), 0);
    assert!(!image.base.path().join("outside").exists());
}

#[test]
fn propagation() {
    let image = Image::new();
    let shared = made(image.host("shared"));
    let private = made(image.host("private"));
    in_forked_child(|| {
        // A namespace of the test's own, in which mounts may be shared at will.
        ns::unshare(ns::flag::MOUNT).unwrap();
        crate::sys::mount::make_all_private().unwrap();
        let mount = |at: &Path, shared: bool| {
            let tmpfs = crate::sys::mount::Filesystem::open("tmpfs")
                .unwrap()
                .mount(0)
                .unwrap();
            let place = fs::File::open(at).unwrap();
            crate::sys::mount::attach(tmpfs.as_fd(), place.as_fd()).unwrap();
            let change = crate::sys::mount::Change {
                propagation: if shared {
                    crate::sys::mount::propagation::SHARED
                } else {
                    crate::sys::mount::propagation::PRIVATE
                },
                ..Default::default()
            };
            crate::sys::mount::change(tmpfs.as_fd(), &change).unwrap();
        };
        mount(&shared, true);
        mount(&private, false);
        fs::create_dir(shared.join("in")).unwrap();
        fs::create_dir(shared.join("out")).unwrap();
        let with = |wanted, path: &Path, script: &str| {
            let mut plan = plan(&image, script);
            let mut volume = bind(path, "/v");
            if let MountSource::Bind { propagation, .. } = &mut volume.source {
                *propagation = wanted;
            }
            plan.mounts.push(volume);
            plan
        };
        for wanted in [MountPropagation::Shared, MountPropagation::Slave] {
            let outcome = run_in(&NO_POD, &with(wanted, &private, "true"));
            assert!(
                outcome.refused().contains("is not on a shared"),
                "{outcome:?}"
            );
        }
        // Bidirectional: what the container mounts is seen here.
        let script = "mount -t tmpfs x /v/out && touch /v/out/file";
        let outcome = run_in(&NO_POD, &with(MountPropagation::Shared, &shared, script));
        assert_eq!(outcome.text(), "");
        assert!(shared.join("out/file").exists());
        // Host to container: what is mounted here later is seen there, not the other way round.
        let script = "while ! test -e /v/in/late; do sleep 0.02; done; mount -t tmpfs x /v/in; touch /v/in/mine; ls /v/in";
        let (spawned, reader) = spawn_in(&NO_POD, &with(MountPropagation::Slave, &shared, script));
        let spawned = spawned.unwrap();
        start(&spawned);
        mount(&shared.join("in"), false);
        write(&shared.join("in/late"), "");
        let mut text = String::new();
        std::io::Read::read_to_string(&mut fs::File::from(reader), &mut text).unwrap();
        assert_eq!(text, "mine\n");
        assert!(!shared.join("in/mine").exists());
        assert_eq!(process::wait(spawned.pidfd.as_fd()).unwrap(), Exit::Code(0));
        // Recursive read-only: the mount below too.
        let mut plan = with(
            MountPropagation::Private,
            &shared,
            "touch /v/in/x || touch /v/x || echo ro",
        );
        plan.mounts.last_mut().unwrap().attributes.readonly = true;
        let outcome = run_in(&NO_POD, &plan);
        assert_eq!(outcome.text(), "");
        plan.mounts
            .last_mut()
            .unwrap()
            .attributes
            .recursive_readonly = true;
        let outcome = run_in(&NO_POD, &plan);
        assert!(outcome.text().ends_with("\nro"), "{outcome:?}");
    });
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
fn a_pod_with_pause() {
    let image = Image::new();
    let network = ns::new_netns().unwrap();
    let before = host_mounts();
    for shared_pid in [false, true] {
        in_forked_child(|| {
            let pid = if shared_pid {
                NamespaceSource::New
            } else {
                NamespaceSource::Host
            };
            let pod = Pod {
                network: Some(&network),
                ..NO_POD
            };
            let (pause, _output) = spawn_in(&pod, &sandbox(&image, pid));
            let pause = pause.unwrap();
            assert!(matches!(receive(&pause), Received::Closed), "pause runs");
            until("pause has its name", || {
                fs::read_to_string(format!("/proc/{}/comm", pause.pid)).unwrap() == "pause\n"
            });
            let status = fs::read_to_string(format!("/proc/{}/status", pause.pid)).unwrap();
            assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
            let pod = Pod {
                pause: Some(&pause),
                ..NO_POD
            };
            let member = |script: &str| {
                let mut member = plan(&image, script);
                member.namespaces.network = NamespaceSource::Pod;
                member.namespaces.ipc = NamespaceSource::Pod;
                member.namespaces.uts = NamespaceSource::Pod;
                if shared_pid {
                    member.namespaces.pid = NamespaceSource::Pod;
                }
                member.mounts.push(MountPlan {
                    target: "/dev/shm".to_owned(),
                    source: MountSource::PodShm,
                    attributes: MountAttributes::default(),
                });
                member
            };
            let script = "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; echo x > /dev/shm/y; \
                grep -c ' /dev/shm tmpfs .*size=1024k' /proc/mounts; cat /proc/1/comm; true";
            let outcome = run_in(&pod, &member(script));
            let first = if shared_pid { "pause" } else { "sh" };
            assert_eq!(outcome.text(), format!("inside\n77\n1\n1\n{first}"));
            let outcome = run_in(&pod, &member("cat /dev/shm/y"));
            assert_eq!(outcome.text(), "x");
            if shared_pid {
                // An orphan comes to pause, which reaps it.
                let script = "(sleep 0.05 & ); sleep 0.01; true";
                assert_eq!(run_in(&pod, &member(script)).text(), "");
                let children = format!("/proc/{0}/task/{0}/children", pause.pid);
                until("pause has reaped", || {
                    fs::read_to_string(&children).unwrap().is_empty()
                });
            }
            process::send_signal(pause.pidfd.as_fd(), signal::SIGTERM).unwrap();
            readable(pause.pidfd.as_fd());
            assert_eq!(process::wait(pause.pidfd.as_fd()).unwrap(), Exit::Code(0));
            let outcome = spawn_in(&pod, &member("true"));
            match outcome.0 {
                Err(fault) => assert_eq!(fault.errno, 3, "{fault}"),
                Ok(late) => {
                    let refused = complete(late, outcome.1).refused();
                    assert!(refused.contains("namespace"), "{refused}");
                }
            }
        });
    }
    assert_eq!(host_mounts(), before);
}

#[test]
fn users_and_privileges() {
    let image = Image::new();
    let mut user = plan(
        &image,
        "id; env | grep HOME; grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; ulimit -n; umask; pwd; echo again > /dev/stdout; cat /proc/self/oom_score_adj",
    );
    user.process.user = UserPlan {
        user: UserName::Name("app".to_owned()),
        group: None,
        additional_groups: vec![7],
        merge_image_groups: true,
    };
    let net_bind = 1 << 10;
    user.process.capabilities = CapabilityMasks {
        bounding: net_bind | 1,
        permitted: net_bind | 1,
        ambient: net_bind,
    };
    user.process.no_new_privs = true;
    user.process.rlimits = vec![(7, 64, 128)];
    user.process.umask = Some(0o027);
    user.process.cwd = "/work/dir".to_owned();
    user.process.oom_score_adj = Some(500);
    // Everything is allowed, but it is a filter.
    user.process.seccomp = Some(SeccompFilter {
        instructions: vec![(0x06, 0, 0, 0x7fff_0000)],
        flags: 0,
    });
    let want = "uid=1000(app) gid=1001(apps) groups=7,50(extra),1001(apps)\nHOME=/home/app\n\
        CapInh:\t0000000000000400\nCapPrm:\t0000000000000400\nCapEff:\t0000000000000400\n\
        CapBnd:\t0000000000000401\nCapAmb:\t0000000000000400\nNoNewPrivs:\t1\nSeccomp:\t2\n64\n0027\n/work/dir\nagain\n500";
    run(&user, |outcome| {
        assert_eq!(outcome.text(), want);
        let Some(Report::Ready { uid, gid, groups }) = outcome.ready else {
            panic!()
        };
        assert_eq!((uid, gid, groups), (1000, 1001, vec![1001, 7, 50]));
    });
    // Without no_new_privs the filter is installed while CAP_SYS_ADMIN is there; nothing of that is left.
    user.process.no_new_privs = false;
    user.process.capabilities.ambient = 0;
    let want = want
        .replace("NoNewPrivs:\t1", "NoNewPrivs:\t0")
        .replace("CapInh:\t0000000000000400", "CapInh:\t0000000000000000")
        .replace("CapPrm:\t0000000000000400", "CapPrm:\t0000000000000000")
        .replace("CapEff:\t0000000000000400", "CapEff:\t0000000000000000")
        .replace("CapAmb:\t0000000000000400", "CapAmb:\t0000000000000000");
    run(&user, |outcome| assert_eq!(outcome.text(), want));
    user.process.user.user = UserName::Name("nobody".to_owned());
    run(&user, |outcome| {
        assert_eq!(
            outcome.refused(),
            "user: look up user \"nobody\": not in the image's /etc/passwd"
        );
    });
}

#[test]
fn hostile_files_are_no_users() {
    for hostile in ["fifo", "device", "sparse", "link"] {
        let image = Image::new();
        let passwd = image.root().join("etc/passwd");
        fs::remove_file(&passwd).unwrap();
        match hostile {
            "fifo" => rustix::fs::mkfifoat(rustix::fs::CWD, &passwd, 0o644.into()).unwrap(),
            "device" => rustix::fs::mknodat(
                rustix::fs::CWD,
                &passwd,
                rustix::fs::FileType::CharacterDevice,
                0o644.into(),
                rustix::fs::makedev(1, 5),
            )
            .unwrap(),
            "sparse" => fs::File::create(&passwd).unwrap().set_len(1 << 40).unwrap(),
            _ => symlink("/proc/1/environ", &passwd).unwrap(),
        }
        run(&plan(&image, "true"), |outcome| {
            if hostile == "link" {
                // An empty regular file of the container's own procfs: data like any other.
                assert_eq!(outcome.text(), "");
            } else {
                let refused = outcome.refused();
                assert!(
                    refused.starts_with("user: read a regular file /etc/passwd"),
                    "{refused}"
                );
            }
        });
    }
}

#[test]
fn masked_and_readonly_paths() {
    let image = Image::new();
    image.write("secret/file", "secret\n");
    let mut masked = plan(
        &image,
        "cat /proc/timer_list /etc/passwd; ls /sys/firmware /secret; echo 1 > /proc/sys/kernel/printk || echo ro; \
         touch /secret/x || echo ro; touch /etc/x || echo ro",
    );
    let paths = [
        "/proc/timer_list",
        "/etc/passwd",
        "/sys/firmware",
        "/secret",
        "/missing",
        "/etc/passwd/below",
    ];
    masked.masked_paths = paths.map(str::to_owned).to_vec();
    masked.readonly_paths = ["/proc/sys", "/etc", "/nothing"]
        .map(str::to_owned)
        .to_vec();
    // The image's /dev/null is a link: no mask comes from there.
    fs::create_dir_all(image.root().join("dev")).unwrap();
    symlink("/etc/group", image.root().join("dev/null")).unwrap();
    run(&masked, |outcome| {
        let text = outcome.text();
        let text = text
            .lines()
            .filter(|line| !line.contains("Read-only file system"));
        assert_eq!(
            text.collect::<Vec<_>>(),
            ["/secret:", "", "/sys/firmware:", "ro", "ro", "ro"]
        );
    });
}

#[test]
fn links_in_the_image_do_not_reach_the_host() {
    for (link, text) in [
        ("dev", "/outside"),
        ("dev", "../../outside"),
        ("etc", "/outside"),
        ("etc", "../../../../../../outside"),
    ] {
        let image = Image::new();
        let outside = made(image.host("outside"));
        let _gone = fs::remove_dir_all(image.root().join(link));
        symlink(text, image.root().join(link)).unwrap();
        write(&image.host("hosts"), "hosts\n");
        let mut plan = plan(&image, "cat /etc/hosts; test -c /dev/null && echo node");
        plan.mounts.push(bind(&image.host("hosts"), "/etc/hosts"));
        run(&plan, |outcome| assert_eq!(outcome.text(), "hosts\nnode"));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
    for link in ["proc", "sys"] {
        let image = Image::new();
        symlink("/tmp", image.root().join(link)).unwrap();
        run(&plan(&image, "true"), |outcome| {
            let want = format!("mount: open without links /{link}: ");
            assert!(outcome.refused().starts_with(&want), "{outcome:?}");
        });
    }
}

#[test]
fn refused_mount_points_and_sources() {
    let image = Image::new();
    let data = made(image.host("data"));
    for (mount, want) in [
        (bind(&data, "/"), "is the root of the container"),
        (bind(&data, "/x/.."), "is the root of the container"),
        (bind(&data, "/proc"), "is inside /proc"),
        (bind(&data, "/proc/sys/net"), "is inside /proc"),
        (
            bind(&image.host("missing"), "/x"),
            "missing: No such file or directory",
        ),
        (
            bind(&data, "/etc/passwd"),
            "is no directory in the container, its source is a directory",
        ),
        (
            filesystem("nosuchfs", "/x", &[], false),
            "fsopen nosuchfs: No such device",
        ),
        (
            filesystem("tmpfs", "/x", &[("size", "abc")], false),
            "fsconfig tmpfs size=abc",
        ),
    ] {
        let mut plan = plan(&image, "true");
        plan.mounts.push(mount);
        run(&plan, |outcome| {
            let refused = outcome.refused();
            assert!(refused.contains(want), "{refused:?} has no {want:?}");
            assert_eq!(outcome.exit, Exit::Code(127));
            assert_eq!(outcome.ready, None);
        });
    }
    let mut over = plan(&image, "cat /proc/uptime");
    write(&image.host("uptime"), "forever\n");
    over.mounts
        .push(bind(&image.host("uptime"), "/proc/uptime"));
    run(&over, |outcome| assert_eq!(outcome.text(), "forever"));
}

#[test]
fn working_directories() {
    let image = Image::new();
    symlink("/proc/self/fd/5", image.root().join("sly")).unwrap();
    image.write("file", "");
    let elsewhere = ["/sly".to_owned(), "/file".to_owned()];
    let numbers = (3..64)
        .step_by(6)
        .map(|number| format!("/proc/self/fd/{number}"));
    for cwd in numbers.chain(elsewhere) {
        let mut plan = plan(&image, "pwd");
        plan.process.cwd = cwd.clone();
        run(&plan, |outcome| {
            assert!(outcome.refused().starts_with("cwd: "), "{cwd}: {outcome:?}");
        });
    }
}

#[test]
fn commands_that_cannot_run() {
    let image = Image::new();
    image.write("bin/script", "#!/bin/none\n");
    fs::set_permissions(
        image.root().join("bin/script"),
        fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    image.write("bin/plain", "text");
    for (name, want) in [
        (
            "none",
            "exec: execve \"none\" (in PATH /bin): No such file or directory (os error 2)",
        ),
        (
            "/none",
            "exec: execve \"/none\": No such file or directory (os error 2)",
        ),
        (
            "script",
            "exec: execve \"/bin/script\" (its interpreter is missing): No such file or directory (os error 2)",
        ),
        (
            "plain",
            "exec: execve \"plain\" (in PATH /bin): Permission denied (os error 13)",
        ),
        (
            "/etc",
            "exec: execve \"/etc\": Permission denied (os error 13)",
        ),
        ("", "exec: execve no command: the image has none either"),
    ] {
        let mut plan = plan(&image, "");
        plan.process.args = vec![name.to_owned()];
        run(&plan, |outcome| {
            assert!(outcome.ready.is_some());
            assert_eq!(outcome.refused(), want);
            assert_eq!(outcome.exit, Exit::Code(127));
        });
    }
}

#[test]
fn a_terminal() {
    let image = Image::new();
    let mut plan = plan(
        &image,
        "tty; test -c /dev/console && echo console; ls /dev/pts | tr '\\n' ' '; stat -c %u /dev/pts/0",
    );
    plan.process.terminal = true;
    plan.process.user.user = UserName::Id(1000);
    run(&plan, |outcome| {
        assert_eq!(
            outcome.text().replace('\r', ""),
            "/dev/pts/0\nconsole\n0 ptmx 1000"
        );
    });
}

#[test]
fn more_processes_in_a_container() {
    let image = Image::new();
    let before = host_mounts();
    in_forked_child(|| {
        let mut main = plan(&image, "touch /tmp/up; sleep 1000; true");
        main.hostname = "main".to_owned();
        let (spawned, _output) = spawn_in(&NO_POD, &main);
        let container = spawned.unwrap();
        start(&container);
        let outcome = execute(
            &container,
            process(
                "hostname; cat /proc/1/comm; ls /proc/self/fd | wc -l; readlink /proc/self/cwd",
            ),
        );
        assert_eq!(outcome.text(), "main\nsh\n4\n/");
        let mut as_user = process("id -u; pwd; exit 3");
        as_user.user.user = UserName::Name("app".to_owned());
        as_user.cwd = "/tmp".to_owned();
        let outcome = execute(&container, as_user);
        assert_eq!(
            (outcome.exit, outcome.output.as_str()),
            (Exit::Code(3), "1000\n/tmp\n")
        );
        let mut nowhere = process("true");
        nowhere.cwd = "/none".to_owned();
        let refused = execute(&container, nowhere.clone()).refused();
        assert_eq!(
            refused,
            "cwd: openat2 /none: No such file or directory (os error 2)"
        );
        nowhere.cwd = "/proc/self/fd/3".to_owned();
        let refused = execute(&container, nowhere).refused();
        assert!(
            refused.starts_with("cwd: openat2 /proc/self/fd/3: "),
            "{refused}"
        );
        let mut tty = process("tty");
        tty.terminal = true;
        let outcome = execute(&container, tty);
        assert_eq!(outcome.text(), "/dev/pts/0");
        let mut none = process("");
        none.args = vec!["none".to_owned()];
        assert!(
            execute(&container, none)
                .refused()
                .starts_with("exec: execve \"none\"")
        );
        // A second container in the first one's PID namespace.
        let mut debug = plan(&image, "cat /proc/1/comm");
        debug.namespaces.pid = NamespaceSource::Container("0".repeat(64));
        let pod = Pod {
            target: Some(&container),
            ..NO_POD
        };
        assert_eq!(run_in(&pod, &debug).text(), "sh");
        let fault = spawn_in(&NO_POD, &debug).0.unwrap_err();
        assert!(fault.to_string().contains("not given"), "{fault}");
        assert_eq!(end(&container), Exit::Signal(9));
        let late = ExecPlan {
            text: None,
            cgroup: CgroupJoin::V1(Vec::new()),
            user_namespace: None,
            process: process("true"),
        };
        let late = memfd::sealed("exec", &late.encode().unwrap()).unwrap();
        let null = fs::File::open("/dev/null").unwrap();
        let fault = exec::spawn(ExecRequest {
            plan: late.as_fd(),
            container: container.pidfd.as_fd(),
            stdio: [null.as_fd(), null.as_fd(), null.as_fd()],
        });
        assert_eq!(fault.unwrap_err().errno, 3);
        // The test's own children are still born in its own namespace.
        assert_eq!(run_in(&NO_POD, &plan(&image, "echo fine")).text(), "fine");
    });
    assert_eq!(host_mounts(), before);
}

#[test]
fn a_process_that_is_never_started_ends_with_its_monitor() {
    let image = Image::new();
    in_forked_child(|| {
        let (spawned, _output) = spawn_in(&NO_POD, &plan(&image, "touch /ran"));
        let spawned = spawned.unwrap();
        assert!(matches!(
            receive(&spawned),
            Received::Report(Report::Ready { .. }, None)
        ));
        let status = fs::read_to_string(format!("/proc/{}/status", spawned.pid)).unwrap();
        assert!(status.contains("Threads:\t1\n"), "{status}");
        drop(spawned.control);
        readable(spawned.pidfd.as_fd());
        assert_eq!(
            process::wait(spawned.pidfd.as_fd()).unwrap(),
            Exit::Code(127)
        );
    });
    assert!(!image.host("upper/ran").exists());
}

#[test]
fn image_volumes() {
    let image = Image::new();
    let (one, two) = (made(image.host("one")), made(image.host("two")));
    write(&one.join("a/file"), "a\n");
    write(&two.join("a/other"), "b\n");
    symlink("/a", one.join("inside")).unwrap();
    symlink("../../../../../..", one.join("outside")).unwrap();
    let volume = |lower: &[&PathBuf], sub_path: &str| {
        let mut plan = plan(&image, "ls /v; touch /v/x || echo ro");
        plan.mounts.push(MountPlan {
            target: "/v".to_owned(),
            source: MountSource::Image {
                lower: lower.iter().map(|path| (*path).clone()).collect(),
                sub_path: sub_path.to_owned(),
            },
            attributes: MountAttributes {
                readonly: true,
                ..MountAttributes::default()
            },
        });
        plan
    };
    let check = |lower: &[&PathBuf], sub_path: &str, want: &str| {
        run(&volume(lower, sub_path), |outcome| {
            let text = outcome
                .text()
                .replace("touch: /v/x: Read-only file system\n", "");
            assert_eq!(text, want, "{sub_path}");
        });
    };
    check(&[&one, &two], "", "a\ninside\noutside\nro");
    check(&[&one, &two], "a", "file\nother\nro");
    check(&[&one], "a", "file\nro");
    check(&[&one, &two], "inside", "file\nother\nro");
    check(&[&one, &two], "outside/a", "file\nother\nro");
    for bad in ["none", "a/file"] {
        run(&volume(&[&one, &two], bad), |outcome| {
            assert!(
                outcome
                    .refused()
                    .starts_with("ImageVolumeMountFailed: openat2"),
                "{outcome:?}"
            );
        });
    }
}

#[test]
fn ids_of_a_volume_are_mapped() {
    let image = Image::new();
    let data = made(image.host("data"));
    write(&data.join("file"), "x");
    std::os::unix::fs::chown(data.join("file"), Some(5), Some(6)).unwrap();
    let mut mapped = plan(&image, "stat -c %u:%g /v/file");
    let mut volume = bind(&data, "/v");
    if let MountSource::Bind {
        uid_mappings,
        gid_mappings,
        ..
    } = &mut volume.source
    {
        *uid_mappings = vec![(0, 1000, 10)];
        *gid_mappings = vec![(0, 2000, 5), (5, 3005, 5)];
    }
    mapped.mounts.push(volume);
    run(&mapped, |outcome| assert_eq!(outcome.text(), "1005:3006"));
}

#[test]
fn old_control_groups() {
    let base = Path::new("/sys/fs/cgroup");
    let hierarchies: Vec<&str> = ["freezer", "pids"]
        .into_iter()
        .filter(|name| base.join(name).join("cgroup.procs").exists())
        .collect();
    if hierarchies.is_empty() {
        return; // A machine with cgroup v2 only.
    }
    let image = Image::new();
    let name = format!("berth-test-init-{}", std::process::id());
    let directories: Vec<PathBuf> = hierarchies
        .iter()
        .map(|hierarchy| made(base.join(hierarchy).join(&name)))
        .collect();
    let mut plan = plan(
        &image,
        "cat /proc/self/cgroup | grep -E 'freezer|pids' | grep -c ':/$'; ls /sys/fs/cgroup; cat /sys/fs/cgroup/*/cgroup.procs | wc -l; touch /sys/fs/cgroup/x || mkdir /sys/fs/cgroup/freezer/y || echo ro",
    );
    plan.cgroup = CgroupJoin::V1(directories.clone());
    let list = directories
        .iter()
        .cloned()
        .zip(hierarchies.iter().map(|h| (*h).to_owned()));
    plan.mounts.push(MountPlan {
        target: "/sys/fs/cgroup".to_owned(),
        source: MountSource::CgroupV1(list.collect()),
        attributes: MountAttributes {
            readonly: true,
            ..MountAttributes::default()
        },
    });
    let count = hierarchies.len();
    run(&plan, |outcome| {
        let text = outcome.text();
        assert!(
            text.starts_with(&format!("{count}\n{}\n", hierarchies.join("\n"))),
            "{text}"
        );
        assert!(text.ends_with("ro"), "{text}");
    });
    for directory in directories {
        fs::remove_dir(directory).unwrap();
    }
}

#[test]
fn the_unified_hierarchy_is_entered_at_the_clone() {
    let Some(base) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|base| base.join("cgroup.controllers").exists())
    else {
        panic!("no cgroup v2 hierarchy is mounted");
    };
    let image = Image::new();
    let directory = made(base.join(format!("berth-test-init2-{}", std::process::id())));
    let mut plan = plan(&image, "grep ^0:: /proc/self/cgroup");
    plan.cgroup = CgroupJoin::V2(directory.clone());
    run(&plan, |outcome| assert_eq!(outcome.text(), "0::/"));
    plan.namespaces.cgroup = NamespaceSource::Host;
    let want = format!("0::/{}", directory.strip_prefix(base).unwrap().display());
    run(&plan, |outcome| assert_eq!(outcome.text(), want));
    let mut gone = plan.clone();
    gone.cgroup = CgroupJoin::V2(base.join("berth-test-missing"));
    in_forked_child(|| {
        let fault = spawn_in(&NO_POD, &gone).0.unwrap_err();
        assert!(fault.to_string().starts_with("cgroup: open"), "{fault}");
    });
    fs::remove_dir(directory).unwrap();
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
        crate::sys::credentials::set_seccomp(&program, 0).unwrap();
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

#[test]
fn an_overlay_by_mount_2() {
    let image = Image::new();
    let (upper, work) = (made(image.host("up,per:")), made(image.host("wo,rk")));
    let lower = [made(image.host("lo:wer\\,")), image.root()];
    write(&lower[0].join("from-the-odd-one"), "");
    in_forked_child(|| {
        ns::unshare(ns::flag::MOUNT).unwrap();
        crate::sys::mount::make_all_private().unwrap();
        let both = Some((upper.as_path(), work.as_path()));
        let root = super::rootfs::overlay_by_path(&lower, both, true).unwrap();
        let list = |name: &str| rustix::fs::statat(&root, name, rustix::fs::AtFlags::empty());
        list("from-the-odd-one").unwrap();
        list("etc/passwd").unwrap();
        rustix::fs::mkdirat(&root, "new", 0o755.into()).unwrap();
        assert!(super::rootfs::overlay_by_path(&vec![image.root(); 200], None, false).is_err());
    });
    assert!(upper.join("new").is_dir());
}

/// Another process exchanges a directory of a shared volume with a link to the host while containers mount below it
/// (CVE-2021-30465): nothing appears outside, whichever comes first.
#[test]
fn a_racing_neighbour_does_not_lead_outside() {
    let image = Image::new();
    let volume = made(image.host("volume"));
    let outside = made(image.host("outside"));
    let data = made(image.host("data"));
    fs::create_dir(volume.join("a")).unwrap();
    symlink("../../../../../../../outside", volume.join("b")).unwrap();
    let before = host_mounts();
    in_forked_child(|| {
        let racer = crate::sys::clone::clone(0, None, &[], || {
            loop {
                let _exchanged = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    volume.join("a"),
                    rustix::fs::CWD,
                    volume.join("b"),
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        })
        .unwrap();
        let mut plan = plan(&image, "true");
        plan.mounts.push(bind(&volume, "/volume"));
        plan.mounts.push(bind(&data, "/volume/a/deep/er"));
        plan.mounts.push(bind(&data, "/volume/b/deep/er"));
        for _ in 0..60 {
            // Either of the two may win, or the loser be told so.
            let _either = run_in(&NO_POD, &plan);
        }
        process::send_signal(racer.pidfd.as_fd(), signal::SIGKILL).unwrap();
        process::wait(racer.pidfd.as_fd()).unwrap();
    });
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(host_mounts(), before);
}

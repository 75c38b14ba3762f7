//! Users, rights, directories, terminals, execs.

use super::*;

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
        let ready = ProcessUser {
            groups: vec![1001, 7, 50],
            ..known(1000, 1001, "/home/app")
        };
        assert_eq!(outcome.ready, Some(Report::Ready(ready)));
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

/// A console is put over whatever a volume has at its place, and never where a link leads (CVE-2025-52565).
#[test]
fn a_console_that_is_a_link() {
    for link in ["{}", "../../../../../..{}", "/proc/1/root{}", "pts/0"] {
        let image = Image::new();
        let outside = made(image.host("outside"));
        write(&outside.join("file"), "of the node\n");
        let dev = made(image.host("dev"));
        let target = outside.join("file").display().to_string();
        symlink(link.replace("{}", &target), dev.join("console")).unwrap();
        let mut plan = plan(&image, "echo x > /dev/console; echo done");
        plan.process.terminal = true;
        plan.devices.clear();
        plan.mounts[1] = bind(&dev, "/dev");
        let before = host_mounts();
        run(&plan, |outcome| {
            // It is there as a terminal, or not at all.
            assert!(outcome.fault.is_some() || outcome.output.contains("done"));
        });
        let kept = fs::read_to_string(outside.join("file")).unwrap();
        assert_eq!(kept, "of the node\n", "{link}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(host_mounts(), before);
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
        let mut container = spawned.unwrap();
        start(&mut container);
        let outcome = execute(
            &container,
            process(
                "hostname; cat /proc/1/comm; ls /proc/self/fd | wc -l; readlink /proc/self/cwd",
            ),
        );
        assert_eq!(outcome.text(), "main\nsh\n4\n/");
        // Nothing in the container tells who an exec is: its files are what its processes made of them.
        let spoilt = "echo app:x:0:0::/: > /etc/passwd; echo wheel:x:10:app > /etc/group";
        assert_eq!(execute(&container, process(spoilt)).exit, Exit::Code(0));
        let mut as_user = process("id -u; id -G; echo $HOME; pwd; exit 3");
        as_user.user.user = UserName::Name("app".to_owned());
        as_user.user.merge_image_groups = true;
        as_user.cwd = "/tmp".to_owned();
        let outcome = execute_as(&container, as_user, known(1000, 1001, "/home/app"), None);
        assert_eq!(
            (outcome.exit, outcome.output.as_str()),
            (Exit::Code(3), "1000\n1001\n/home/app\n/tmp\n")
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
        let refused = run_in(&NO_POD, &debug).refused();
        assert!(refused.contains("not given"), "{refused}");
        assert_eq!(end(&container), Exit::Signal(9));
        let late = ExecPlan {
            text: None,
            cpu: None,
            cgroup: CgroupJoin::V1(Vec::new()),
            user_namespace: None,
            process: process("true"),
            user: known(0, 0, "/root"),
        };
        let late = memfd::sealed("exec", &late.encode().unwrap()).unwrap();
        let (reader, writer) = fd::pipe().unwrap();
        let spawned = exec::spawn(ExecRequest {
            plan: late.as_fd(),
            container: container.pidfd.as_fd(),
            stdio: [writer.as_fd(); 3],
        });
        drop(writer);
        assert_eq!(complete(spawned.unwrap(), reader).fault.unwrap().errno, 3);
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
            Received::Report(Report::Ready(_), None)
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

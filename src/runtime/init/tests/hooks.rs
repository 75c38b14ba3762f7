//! Hooks at every point: where they run, what they see, how they fail.

use super::*;
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::external::Text;
use crate::runtime::hooks::{self, Hooks, Stage};
use crate::sys::process::become_subreaper;

/// A hook of `sh`, that of the node or of the image.
pub(super) fn hook(point: HookPoint, script: &str) -> Hook {
    Hook {
        point,
        path: "/bin/sh".to_owned(),
        args: ["sh", "-c", script].map(str::to_owned).to_vec(),
        env: vec![],
        timeout: Some(20),
    }
}

pub(super) fn with_hooks(image: &Image, plan: &mut Plan, all: Vec<Hook>) {
    let bundle = image.host("bundle");
    made(bundle.join("rootfs"));
    plan.hooks = Some(Box::new(Hooks {
        state: Text {
            head: "{\"id\":\"x\",".to_owned(),
            tail: format!(",\"bundle\":\"{}\"}}", bundle.display()),
        },
        bundle,
        all,
    }));
}

/// Does what the monitor does for a stage; its failure.
fn stage(stage: Stage, plan: &Plan, pid: Option<u32>) -> Result<(), Fault> {
    let plan = memfd::sealed("plan", &plan.encode().unwrap()).unwrap();
    let helper = hooks::run(stage, plan.as_fd(), pid).unwrap();
    let outcome = match receive(&helper) {
        Received::Report(Report::Done, _) => Ok(()),
        Received::Report(Report::Failed(fault), _) => Err(fault),
        other => panic!("{other:?}"),
    };
    assert_eq!(process::wait(helper.pidfd.as_fd()).unwrap(), Exit::Code(0));
    outcome
}

/// A container from its create to its end, as the monitor makes it.
fn live(pod: &Pod<'_>, plan: &Plan) -> Outcome {
    let (spawned, reader) = spawn_in(pod, plan);
    let mut spawned = spawned.unwrap();
    loop {
        match receive(&spawned) {
            Received::Moved { pid, pidfd } => spawned = userns::moved(spawned, pid, pidfd),
            Received::Report(Report::Mounted, _) => {
                if let Err(fault) = stage(Stage::Create, plan, Some(spawned.pid)) {
                    process::send_signal(spawned.pidfd.as_fd(), signal::SIGKILL).unwrap();
                    return Outcome {
                        output: String::new(),
                        exit: process::wait(spawned.pidfd.as_fd()).unwrap(),
                        ready: None,
                        fault: Some(fault),
                    };
                }
                create::proceed(spawned.control.as_fd()).unwrap();
            }
            Received::Report(Report::Ready(_), _) => {
                create::start(spawned.control.as_fd()).unwrap();
                return complete(spawned, reader);
            }
            Received::Report(Report::Failed(fault), _) => {
                return Outcome {
                    output: String::new(),
                    exit: process::wait(spawned.pidfd.as_fd()).unwrap(),
                    ready: None,
                    fault: Some(fault),
                };
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What a hook says of where it is: point, its mount namespace, the state.
fn says(image: &Image, point: HookPoint) -> String {
    let out = image.host("out");
    format!(
        "echo {} $(readlink /proc/self/ns/mnt) $(cat) >> {}",
        point.name(),
        out.display()
    )
}

#[test]
fn every_point_in_order() {
    use HookPoint::*;
    let image = Image::new();
    let mut plan = plan(
        &image,
        "echo ran; cat /marks/*; readlink /link; ls -d /etc/cut",
    );
    plan.mounts.push(bind(&made(image.host("marks")), "/marks"));
    plan.masked_paths = vec!["/etc/cut".to_owned()];
    plan.process.user.user = UserName::Id(1000);
    plan.process.capabilities = CapabilityMasks::default();
    // They begin in the bundle, as those on the node.
    let root = "$(cat > /dev/null; pwd)/rootfs";
    let below = format!(
        "cd {root}; ln -s /host link; : > etc/cut; ls dev/null proc/self > /dev/null; test -d /work -o -d /usr && \
         test -e marks/first && echo from-create > marks/second"
    );
    let inside = "read state; echo \"$state $(id -u) $A\"; echo \"$state $(id -u) $A\" > /tmp/said";
    let mut in_container = hook(StartContainer, inside);
    in_container.env = vec!["A=1".to_owned(), "PATH=/bin".to_owned()];
    let first = format!("echo first > {}", image.host("marks/first").display());
    with_hooks(
        &image,
        &mut plan,
        vec![
            hook(Poststop, &says(&image, Poststop)),
            hook(CreateContainer, &says(&image, CreateContainer)),
            hook(CreateContainer, &below),
            in_container,
            hook(CreateRuntime, &says(&image, CreateRuntime)),
            hook(Prestart, &says(&image, Prestart)),
            hook(Prestart, &first),
        ],
    );
    fs::set_permissions(image.root().join("tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    let before = host_mounts();
    let bundle = image.host("bundle").display().to_string();
    in_forked_child(|| {
        let outcome = live(&NO_POD, &plan);
        assert_eq!(outcome.text(), "ran\nfirst\nfrom-create\n/host\n/etc/cut");
        stage(Stage::Started, &plan, None).unwrap();
        stage(Stage::Stopped, &plan, None).unwrap();
    });
    assert_eq!(host_mounts(), before);
    assert_eq!(
        fs::read_dir(image.host("bundle/rootfs")).unwrap().count(),
        0
    );
    let said = fs::read_to_string(image.host("upper/tmp/said")).unwrap();
    let state = |status: &str, pid: &str| {
        format!("{{\"id\":\"x\",\"status\":\"{status}\"{pid},\"bundle\":\"{bundle}\"}}")
    };
    assert_eq!(
        said.trim_end(),
        format!("{} 1000 1", state("created", ",\"pid\":1"))
    );
    let out = fs::read_to_string(image.host("out")).unwrap();
    let lines: Vec<Vec<&str>> = out.lines().map(|line| line.split(' ').collect()).collect();
    let points: Vec<&str> = lines.iter().map(|line| line[0]).collect();
    assert_eq!(
        points,
        ["prestart", "createRuntime", "createContainer", "poststop"]
    );
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    let own = own.to_str().unwrap();
    assert_eq!((lines[0][1], lines[1][1], lines[3][1]), (own, own, own));
    assert_ne!(lines[2][1], own);
    assert!(
        lines[0][2].contains("\"status\":\"creating\",\"pid\":"),
        "{out}"
    );
    assert!(!lines[0][2].contains("\"pid\":1,"), "{out}");
    assert_eq!(lines[2][2], state("creating", ",\"pid\":1"));
    assert_eq!(lines[3][2], state("stopped", ""));
}

#[test]
fn a_hook_that_fails_says_how() {
    use HookPoint::*;
    for point in [Prestart, CreateRuntime, CreateContainer, StartContainer] {
        let image = Image::new();
        let mut plan = plan(&image, "echo ran");
        let refused = |plan: &Plan| {
            in_forked_child(|| {
                let outcome = live(&NO_POD, plan);
                assert!(!outcome.output.contains("ran"));
                let name = point.name();
                let want = match &plan.hooks.as_ref().unwrap().all[0] {
                    hook if hook.path == "/bin/none" => {
                        format!("hook: {name} /bin/none: No such file or directory (os error 2)")
                    }
                    hook if hook.timeout == Some(1) => format!(
                        "hook: {name} /bin/sh did not end within 1 s and was killed; it wrote: waits"
                    ),
                    hook if hook.args[2].contains("kill") => {
                        format!("hook: {name} /bin/sh was killed by signal 9")
                    }
                    _ => format!("hook: {name} /bin/sh exited with 3; it wrote: so\nit is"),
                };
                assert_eq!(outcome.refused(), want);
            });
        };
        let second = hook(point, "echo second > /second");
        let failing = hook(point, "echo so >&2; echo it is; exit 3");
        with_hooks(&image, &mut plan, vec![failing, second]);
        refused(&plan);
        assert!(!Path::new("/second").exists() && !image.host("upper/second").exists());
        with_hooks(&image, &mut plan, vec![hook(point, "kill -9 $$")]);
        refused(&plan);
        let mut missing = hook(point, "");
        missing.path = "/bin/none".to_owned();
        with_hooks(&image, &mut plan, vec![missing]);
        refused(&plan);
        let mut late = hook(point, "echo waits; sleep 1000 & sleep 1000; :");
        late.timeout = Some(1);
        with_hooks(&image, &mut plan, vec![late]);
        refused(&plan);
    }
}

#[test]
fn a_late_hook_ends_with_all_it_started() {
    let image = Image::new();
    let mut plan = plan(&image, "true");
    let pids = image.host("pids");
    let script = format!(
        "setsid sh -c 'sleep 1000 & echo $! >> {0}; sh -c \"setsid sleep 1000 & echo \\$! >> {0}\"'; echo $$ >> {0}; wait; sleep 1000",
        pids.display()
    );
    let mut late = hook(HookPoint::Poststart, &script);
    late.timeout = Some(2);
    let quick = hook(HookPoint::Poststart, "sleep 1000 > /dev/null & exit 5");
    with_hooks(&image, &mut plan, vec![late, quick]);
    in_forked_child(|| {
        become_subreaper().unwrap();
        let fault = stage(Stage::Started, &plan, None).unwrap_err().to_string();
        assert!(fault.contains("poststart hooks failed: "), "{fault}");
        assert!(
            fault.contains("did not end within 2 s") && fault.contains("exited with 5"),
            "{fault}"
        );
        let text = fs::read_to_string(&pids).unwrap();
        let pids: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(pids.len(), 3);
        for pid in pids {
            assert!(!Path::new("/proc").join(pid).exists(), "{pid} lives");
        }
        // What a hook that ends well enough leaves behind goes on; it is our child now.
        let ours = crate::runtime::tree::children(process::id());
        assert_eq!(ours.len(), 1);
        crate::runtime::tree::kill(ours[0]);
    });
}

#[test]
fn a_state_larger_than_a_pipe_and_much_output() {
    let image = Image::new();
    let mut plan = plan(&image, "true");
    let count =
        "n=$(wc -c); test $n -gt 200000 && dd if=/dev/zero bs=1000000 count=3 2>/dev/null; exit 7";
    with_hooks(&image, &mut plan, vec![hook(HookPoint::Poststop, count)]);
    if let Some(hooks) = &mut plan.hooks {
        hooks.state.tail = format!(",\"annotations\":{{\"a\":\"{}\"}}}}", "x".repeat(200_000));
    }
    in_forked_child(|| {
        let fault = stage(Stage::Stopped, &plan, None).unwrap_err();
        assert!(
            fault.argument.starts_with("/bin/sh exited with 7"),
            "{fault}"
        );
        assert!(fault.argument.len() < 2000);
    });
}

#[test]
fn in_a_pod_with_a_user_namespace() {
    use HookPoint::*;
    let image = Image::new();
    fs::set_permissions(image.base.path(), fs::Permissions::from_mode(0o711)).unwrap();
    userns::in_pod(&image, |pod| {
        let mut plan = userns::member(&image, "readlink /link; cat /proc/self/uid_map");
        let script = "cat > /dev/null; id -u; ln -s /from-the-hook rootfs/link; test -d /usr";
        let inside = "test $(id -u) = 0 && test -h /link";
        with_hooks(
            &image,
            &mut plan,
            vec![
                hook(
                    CreateRuntime,
                    "test $(id -u) = 0 && ! grep -q 200000 /proc/self/uid_map",
                ),
                hook(CreateContainer, script),
                hook(StartContainer, inside),
            ],
        );
        let outcome = live(pod, &plan);
        let text = outcome.text();
        assert!(
            text.starts_with("/from-the-hook\n") && text.contains("200000"),
            "{text}"
        );
    });
}

/// What a hook inside executes is the image's: it must not run where it could signal the node's processes.
#[test]
fn hooks_inside_are_born_where_the_container_lives() {
    let image = Image::new();
    in_forked_child(|| {
        let network = ns::new_netns().unwrap();
        let pod = Pod {
            network: Some(&network),
            ..NO_POD
        };
        let (pause, _output) = spawn_in(&pod, &sandbox(&image, NamespaceSource::New));
        let pause = pause.unwrap();
        assert!(matches!(receive(&pause), Received::Closed), "pause runs");
        let pod = Pod {
            pause: Some(&pause),
            ..NO_POD
        };
        let with = |hooks: Vec<Hook>| {
            let mut member = plan(&image, "cat /tmp/said; echo $$");
            member.namespaces.pid = NamespaceSource::Pod;
            with_hooks(&image, &mut member, hooks);
            member
        };
        let says =
            "cat > /tmp/state; echo $$ $(cat /proc/1/comm) $(ls /proc/self/fd | wc -l) > /tmp/said";
        let outcome = run_in(&pod, &with(vec![hook(HookPoint::StartContainer, says)]));
        // Pause is 1, the hook 2; the shell of the pipe, cat, ls and wc come before the container. ls has the directory open.
        let lines: Vec<&str> = outcome.text().lines().collect();
        assert!(lines[0].starts_with("2 pause 4"), "{lines:?}");
        assert!(lines[1].parse::<u32>().unwrap() < 20, "{lines:?}");
        let mut late = hook(HookPoint::StartContainer, "echo oh; sleep 60");
        late.timeout = Some(1);
        let mut gone = hook(HookPoint::StartContainer, "true");
        gone.path = "/bin/gone".to_owned();
        for (hook, wanted) in [
            (
                hook(HookPoint::StartContainer, "echo oh; exit 3"),
                "exited with 3; it wrote: oh",
            ),
            (late, "did not end within 1 s and was killed; it wrote: oh"),
            (gone, "execve \"/bin/gone\": No such file or directory"),
        ] {
            let refused = run_in(&pod, &with(vec![hook])).refused();
            assert!(refused.contains(wanted), "{refused}, not {wanted}");
        }
        process::send_signal(pause.pidfd.as_fd(), signal::SIGTERM).unwrap();
        readable(pause.pidfd.as_fd());
        assert_eq!(process::wait(pause.pidfd.as_fd()).unwrap(), Exit::Code(0));
    });
}

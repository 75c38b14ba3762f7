//! Whatever a filter refuses, our process ends and the reason is told: by itself, or by how it ends.

use super::hooks::{hook, with_hooks};
use super::*;
use crate::base::hook::HookPoint;
use crate::runtime::seccomp::tests::filter;

fn confined(image: &Image, command: &str, filter: SeccompFilter, no_new_privs: bool) -> Plan {
    let mut plan = plan(image, "");
    plan.process.args = vec![command.to_owned()];
    plan.process.seccomp = Some(filter);
    plan.process.no_new_privs = no_new_privs;
    plan
}

/// Everything, by each action: it is told before the filter is there.
#[test]
fn a_filter_that_refuses_everything() {
    let image = Image::new();
    for (action, how) in [
        ("ERRNO", "fail with Operation not permitted (os error 1)"),
        ("TRACE", "fail with Function not implemented (os error 38)"),
        ("KILL", "end its process (SIGSYS)"),
        ("KILL_PROCESS", "end its process (SIGSYS)"),
        ("TRAP", "end its process (SIGSYS)"),
    ] {
        for no_new_privs in [true, false] {
            let all = filter(action, "ALLOW", &[], "");
            run(&confined(&image, "true", all, no_new_privs), |outcome| {
                let want = format!(
                    "seccomp: the profile makes execve(2) {how}: no program can be started with it; allow execve"
                );
                assert_eq!((outcome.refused(), outcome.exit), (want, Exit::Code(127)));
            });
        }
    }
}

/// One call that we make, or may make, is refused; the others are allowed.
#[test]
fn a_filter_that_refuses_what_starts_the_program() {
    let image = Image::new();
    let ambient = r#"{"index":0,"value":47,"op":"SCMP_CMP_EQ"}"#;
    let name = r#"{"index":0,"value":15,"op":"SCMP_CMP_EQ"}"#;
    // execve has three arguments: the fourth is 0 with us.
    let fourth = r#"{"index":3,"value":0,"op":"SCMP_CMP_EQ"}"#;
    let path = r#"{"index":0,"value":0,"op":"SCMP_CMP_EQ"}"#;
    for action in ["ERRNO", "KILL", "TRAP", "TRACE"] {
        for (call, args, no_new_privs, refused) in [
            ("execve", "", true, true),
            ("execve", fourth, true, true),
            ("execve", path, true, false),
            ("execve", path, false, false),
            ("capset", "", false, true),
            ("capset", "", true, false),
            ("prctl", "", false, true),
            ("prctl", ambient, false, true),
            ("prctl", ambient, true, false),
            ("prctl", name, false, false),
            ("sendmsg", "", true, false),
            ("exit", "", false, false),
            ("seccomp", "", true, false),
        ] {
            let filter = filter("ALLOW", action, &[call], args);
            run(&confined(&image, "true", filter, no_new_privs), |outcome| {
                let shown = format!("{action} {call} {args}: {outcome:?}");
                if refused {
                    let text = format!("the profile makes {call}(2)");
                    assert!(outcome.refused().contains(&text), "{shown}");
                    assert_eq!(outcome.exit, Exit::Code(127), "{shown}");
                } else {
                    assert_eq!(outcome.exit, Exit::Code(0), "{shown}");
                    assert_eq!(outcome.fault, None, "{shown}");
                }
            });
        }
    }
    let logged = filter("LOG", "LOG", &["execve"], "");
    run(&confined(&image, "true", logged, true), |outcome| {
        assert_eq!(outcome.text(), "");
    });
}

/// The filter lets the program be executed, but there is none: what is left to do for us is refused.
#[test]
fn a_filter_under_which_a_failure_cannot_be_told() {
    const SIGILL: i32 = 4;
    const SIGSYS: i32 = 31;
    let image = Image::new();
    let all_but = |action, names: &[&str]| filter(action, "ALLOW", names, "");
    let (ended, killed) = (Exit::Signal(SIGILL), Exit::Signal(SIGSYS));
    let for_start = ["execve", "capset", "prctl"];
    for no_new_privs in [true, false] {
        for (command, filter, exit, told) in [
            (
                "/none",
                filter("ALLOW", "ERRNO", &["sendmsg"], ""),
                Exit::Code(2),
                false,
            ),
            (
                "/bin",
                filter("ALLOW", "ERRNO", &["sendmsg"], ""),
                Exit::Code(13),
                false,
            ),
            (
                "none",
                filter("ALLOW", "KILL", &["sendmsg"], ""),
                killed,
                false,
            ),
            (
                "none",
                filter("ALLOW", "ERRNO", &["exit_group"], ""),
                Exit::Code(127),
                true,
            ),
            (
                "none",
                filter("ALLOW", "ERRNO", &["exit_group", "exit"], ""),
                ended,
                true,
            ),
            (
                "none",
                filter("ALLOW", "TRAP", &["exit_group"], ""),
                killed,
                true,
            ),
            (
                "none",
                filter("ALLOW", "ERRNO", &["stat", "newfstatat"], ""),
                Exit::Code(127),
                true,
            ),
            (
                "none",
                filter("ALLOW", "ERRNO", &["mmap", "brk", "mremap"], ""),
                Exit::Code(127),
                true,
            ),
            ("none", all_but("ERRNO", &for_start), ended, false),
            ("none", all_but("TRACE", &for_start), ended, false),
            ("none", all_but("KILL", &for_start), killed, false),
            ("none", all_but("TRAP", &for_start), killed, false),
        ] {
            let plan = confined(&image, command, filter, no_new_privs);
            run(&plan, |outcome| {
                let shown = format!("{command} {no_new_privs}: {outcome:?}");
                assert_eq!(outcome.exit, exit, "{shown}");
                assert_eq!(outcome.fault.is_some(), told, "{shown}");
            });
        }
    }
}

#[test]
fn a_filter_that_refuses_what_pause_needs() {
    let image = Image::new();
    let fourth = r#"{"index":2,"value":1,"op":"SCMP_CMP_EQ"}"#;
    for (call, args) in [
        ("execveat", ""),
        ("rt_sigprocmask", ""),
        ("rt_sigtimedwait", ""),
        ("wait4", ""),
        ("wait4", fourth),
    ] {
        for action in ["ERRNO", "KILL", "TRAP", "TRACE"] {
            let mut plan = sandbox(&image, NamespaceSource::New);
            plan.namespaces.network = NamespaceSource::New;
            plan.process.seccomp = Some(filter("ALLOW", action, &[call], args));
            run(&plan, |outcome| {
                let text = outcome.refused();
                assert!(
                    text.contains(&format!("the profile makes {call}(2)")),
                    "{text}"
                );
                assert_eq!(outcome.exit, Exit::Code(127), "{text}");
            });
        }
    }
}

/// Where pause cannot be told what is refused, for it hangs on a pointer: it ends, even where the calls for that are refused.
#[test]
fn pause_ends_without_a_call() {
    let image = Image::new();
    let pointer = r#"{"index":0,"value":0,"op":"SCMP_CMP_NE"}"#;
    for (names, exit) in [
        (&["rt_sigtimedwait"][..], Exit::Code(1)),
        (&["rt_sigtimedwait", "exit_group"], Exit::Code(1)),
        (&["rt_sigtimedwait", "exit_group", "exit"], Exit::Signal(4)),
    ] {
        let mut plan = sandbox(&image, NamespaceSource::New);
        plan.namespaces.network = NamespaceSource::New;
        plan.process.seccomp = Some(filter("ALLOW", "ERRNO", names, pointer));
        run(&plan, |outcome| {
            assert_eq!((outcome.exit, outcome.fault), (exit, None), "{names:?}");
        });
    }
}

/// A hook of the container's own is confined as its program.
#[test]
fn a_filter_that_refuses_a_hook() {
    let image = Image::new();
    let start = ["execve", "capset", "prctl"];
    for (path, filter, wanted) in [
        (
            "/bin/sh",
            filter("ERRNO", "ALLOW", &[], ""),
            "exited with 127; it wrote: seccomp: the profile makes execve(2) fail",
        ),
        (
            "/bin/none",
            filter("ERRNO", "ALLOW", &start, ""),
            "/bin/none was killed by signal 4",
        ),
        (
            "/bin/none",
            filter("KILL", "ALLOW", &start, ""),
            "/bin/none was killed by signal 31",
        ),
    ] {
        let mut plan = confined(&image, "true", filter, true);
        let mut hook = hook(HookPoint::StartContainer, "exit 0");
        path.clone_into(&mut hook.path);
        with_hooks(&image, &mut plan, vec![hook]);
        run(&plan, |outcome| {
            let text = outcome.refused();
            assert!(text.contains(wanted), "{text}, not {wanted}");
            assert_eq!(outcome.exit, Exit::Code(127), "{text}");
        });
    }
}

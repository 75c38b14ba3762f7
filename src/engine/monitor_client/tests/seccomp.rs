//! Filters that refuse what starts a program: the call fails with the reason, and nothing waits.

use super::*;
use crate::runtime::plan::SeccompFilter;
use crate::runtime::seccomp::tests::filter;

const COMMAND: &str = "/usr/bin/true";
const MISSING: &str = "/usr/bin/none";

/// (command, filter, what is told)
fn cases() -> Vec<(&'static str, SeccompFilter, &'static str)> {
    let all_but_execve = |action| filter(action, "ALLOW", &["execve", "capset", "prctl"], "");
    vec![
        (
            COMMAND,
            filter("ERRNO", "ALLOW", &[], ""),
            "the profile makes execve(2) fail with Operation not permitted",
        ),
        (
            COMMAND,
            filter("KILL_PROCESS", "ALLOW", &[], ""),
            "the profile makes execve(2) end its process",
        ),
        (
            MISSING,
            filter("ALLOW", "ERRNO", &["sendmsg"], ""),
            "refuses sendmsg(2): No such file or directory",
        ),
        (
            MISSING,
            all_but_execve("ERRNO"),
            "refuses sendmsg(2), and exit_group(2) too",
        ),
        (MISSING, all_but_execve("KILL"), "(SIGSYS)"),
        (MISSING, all_but_execve("TRAP"), "(SIGSYS)"),
    ]
}

#[tokio::test]
async fn a_start_that_a_filter_refuses() {
    let mut pod = Pod::new().await;
    for no_new_privs in [true, false] {
        for (command, filter, wanted) in cases() {
            let mut plan = pod.plan(process(&[command]));
            plan.process.seccomp = Some(filter);
            plan.process.no_new_privs = no_new_privs;
            let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
            let started = timeout(PATIENCE, pod.client.start(id)).await.unwrap();
            let text = crate::base::error::chain(&started.unwrap_err()).to_string();
            assert!(text.contains(wanted), "{text}, not {wanted}");
            assert_eq!(pod.exit().await.id, id);
        }
    }
    pod.end().await;
}

#[tokio::test]
async fn an_exec_that_a_filter_refuses() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    for no_new_privs in [true, false] {
        for (command, filter, wanted) in cases() {
            // What an exec executes is born without a voice, so that no filter can take it.
            let wanted = match command {
                MISSING => "execve \"/usr/bin/none\": No such file or directory",
                _ => wanted,
            };
            exec_refused(&pod, id, command, filter, no_new_privs, wanted).await;
        }
    }
    assert_eq!(pod.exec(id, "echo hi").await.unwrap().stdout, b"hi\n");
    pod.end().await;
}

async fn exec_refused(
    pod: &Pod,
    id: ContainerId,
    command: &str,
    filter: SeccompFilter,
    no_new_privs: bool,
    wanted: &str,
) {
    let mut plan = exec_plan(&[command]);
    plan.process.seccomp = Some(filter);
    plan.process.no_new_privs = no_new_privs;
    let done = pod.client.exec_sync(id, &plan, CAP, None);
    let done = timeout(PATIENCE, done).await.unwrap();
    let text = crate::base::error::chain(&done.unwrap_err()).to_string();
    assert!(text.contains(wanted), "{text}, not {wanted}");
}

#[tokio::test]
async fn a_sandbox_that_a_filter_refuses() {
    let tasks = Tasks::default();
    let pool = pool(1, &tasks).await;
    let directory = TempDir::new().unwrap();
    let (client, _events) = pool.take(PodId(unique()), directory.path()).await.unwrap();
    for (action, call) in [
        ("ERRNO", "execveat"),
        ("KILL", "execveat"),
        ("ERRNO", "rt_sigtimedwait"),
    ] {
        let mut plan = sandbox_plan();
        let refused = match call {
            "execveat" => filter(action, "ALLOW", &[], ""),
            other => filter("ALLOW", action, &[other], ""),
        };
        plan.process.seccomp = Some(refused);
        let made = timeout(PATIENCE, client.sandbox(&plan, None))
            .await
            .unwrap();
        let text = crate::base::error::chain(&made.unwrap_err()).to_string();
        let wanted = format!("the profile makes {call}(2)");
        assert!(text.contains(&wanted), "{text}, not {wanted}");
    }
    client.sandbox(&sandbox_plan(), None).await.unwrap();
    client.stop().await.unwrap();
    client.shutdown().await.unwrap();
    drop((client, pool));
    assert_eq!(tasks.shutdown(PATIENCE).await, 0);
}

/// Who ends before the monitor looks has started all the same.
#[tokio::test]
async fn the_shortest_program_has_started() {
    let mut pod = Pod::new().await;
    let running = pod.run("sleep 1000").await;
    for _ in 0..30 {
        let plan = pod.plan(process(&[COMMAND]));
        let id = pod.create_with(&plan, pod.stdio()).await.unwrap();
        pod.client.start(id).await.unwrap();
        let exit = pod.exit().await;
        assert_eq!((exit.id, exit.code), (id, 0));
        let done = pod.exec(running, "exit 7").await.unwrap();
        assert_eq!(done.exit_code, 7);
    }
    pod.end().await;
}

//! Pods whose containers an OCI runtime makes: a shell script that does as little as one can.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::base::handler::{Handler, OciRuntime};
use crate::base::security::{IdMapping, NamespaceMode, UserNamespace};

/// It makes no namespaces: its containers' first process waits for a file, then prints and sleeps.
const RUNTIME: &str = r#"#!/bin/sh
here=${0%/*}
while :; do
	case $1 in
	--root) root=$2; shift 2 ;;
	--log) log=$2; shift 2 ;;
	--log-format) shift 2 ;;
	*) break ;;
	esac
done
verb=$1
shift
echo "$verb" >> "$here/calls"
fail() {
	printf '{"level":"error","msg":"%s","time":"now"}\n' "$1" > "$log"
	exit 1
}
case $verb in
features) echo '{"mountOptions":["ro","rro"]}' ;;
create)
	bundle=$2 pid_file=$4 id=$5
	mkdir -p "$root/$id"
	case $(cat "$here/mode") in
	fails) fail 'no luck with \"create\"' ;;
	dies) kill -9 $$ ;;
	hangs) exec sleep 1000 ;;
	esac
	[ -d "$bundle/rootfs/usr" ] || fail 'the root filesystem is not there'
	grep -q '"user":{"uid":0,"gid":0,' "$bundle/config.json" || fail 'no user'
	sh -c 'while [ ! -e "$0/start" ]; do sleep 0.02; done
		trap "exit 7" TERM
		echo from the container
		while :; do sleep 0.02; done' "$root/$id" &
	echo $! > "$root/$id/pid"
	cp "$root/$id/pid" "$pid_file"
	;;
start)
	case $(cat "$here/mode") in
	refuses) fail 'it will not start' ;;
	hooked) sleep 1000 & echo $! > "$here/hook"; wait ;;
	esac
	touch "$root/$1/start"
	;;
exec)
	pid_file=$4
	if [ "$(cat "$here/mode")" = hangs ]; then sleep 1000 & echo $! > "$here/hook"; wait; fi
	# It outlives this shell, which would take its exit code along.
	sh -c 'while [ -e "/proc/$0" ]; do sleep 0.01; done; echo out; echo err >&2; exit 5' $$ &
	echo $! > "$pid_file"
	;;
kill) kill "-$2" "$(cat "$root/$1/pid")" ;;
delete)
	touch "$here/deletes.$2"
	case $(cat "$here/mode") in
	together) while [ "$(find "$here" -name 'deletes.*' | wc -l)" -lt 4 ]; do sleep 0.02; done ;;
	slow) while [ ! -e "$here/go" ]; do sleep 0.02; done ;;
	esac
	[ ! -e "$root/$2/pid" ] || kill -9 "$(cat "$root/$2/pid")" 2> /dev/null
	rm -rf "${root:?}/${2:?}"
	;;
esac
"#;

/// A node with the script as a handler.
fn node_with_runtime() -> Node {
    let mut node = Node::new();
    let path = node.path("runtime");
    fill(&path, RUNTIME);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    set_mode(&node, "works");
    let missing = OciRuntime {
        path: node.path("missing"),
        root: node.path("state/other"),
        arguments: vec![],
    };
    let script = OciRuntime {
        path,
        root: node.path("state/script"),
        arguments: vec![],
    };
    for (name, runtime) in [("script", script), ("missing", missing)] {
        let handler = Handler {
            runtime: Some(runtime),
            ..Handler::default()
        };
        node.handlers.named.insert(name.to_owned(), handler);
    }
    node
}

fn fill(path: &std::path::Path, text: &str) {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn set_mode(node: &Node, mode: &str) {
    fill(&node.path("mode"), mode);
}

async fn run_script_pod(node: &Node, engine: &Engine, name: &str) -> String {
    let made = engine.run_pod_sandbox(pod_config(node, name), "script".to_owned());
    let made = made.await;
    made.unwrap_or_else(|error| panic!("{}", chain(&error)))
        .to_string()
}

/// Containers that the script knows.
fn known(node: &Node) -> usize {
    let found = fs::read_dir(node.path("state/script"));
    found.into_iter().flatten().count()
}

/// Whether the script has told its features.
fn node_told(engine: &Engine) -> bool {
    engine
        .core()
        .handlers
        .no_user_namespaces("script")
        .is_some()
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_of_an_oci_runtime_from_create_to_remove() {
    let mut node = node_with_runtime();
    let engine = node.start().await;
    let listed = || async { engine.status(false).await.handlers };
    let deadline = Instant::now() + PATIENCE;
    while !listed().await.contains(&("script".to_owned(), true, false)) {
        assert!(Instant::now() < deadline, "{:?}", listed().await);
        sleep(Duration::from_millis(10)).await;
    }
    let pod = run_script_pod(&node, &engine, "one").await;
    let (moment, info) = engine.pod_sandbox_status(&pod, true).await.unwrap();
    assert_eq!(moment.pod.runtime_handler, "script");
    assert!(info["info"].contains("/runtime\""), "{info:?}");
    let id = create(&engine, &pod, "main", "unused").await;
    assert_eq!(status(&engine, &id).await.state, ContainerState::Created);
    assert!(!mounts().contains(&id));
    engine.start_container(&id).await.unwrap();
    let said = || log_of(&node, "main").contains("from the container");
    until("its first line", said).await;
    // The daemon comes back with a configuration that knows no such handler: the pod keeps it.
    node.crash(engine).await;
    let handlers = std::mem::take(&mut node.handlers);
    let engine = node.start().await;
    let list = engine.list_pod_sandboxes(&PodFilter::default());
    assert_eq!(list[0].runtime_handler, "script");
    assert_eq!(status(&engine, &id).await.state, ContainerState::Running);
    let command = vec!["any".to_owned()];
    let output = engine.exec_sync(&id, command, 20).await.unwrap();
    let shown = (&output.stdout[..], &output.stderr[..], output.exit_code);
    assert_eq!(shown, (&b"out\n"[..], &b"err\n"[..], 5));
    let second = create(&engine, &pod, "second", "unused").await;
    let config = pod_config(&node, "two");
    let refused = engine.run_pod_sandbox(config, "script".to_owned()).await;
    assert_eq!(refused.unwrap_err().kind(), Kind::InvalidArgument);
    engine.stop_container(&id, 30).await.unwrap();
    let ended = status(&engine, &id).await;
    assert_eq!((ended.state, ended.exit_code), (ContainerState::Exited, 7));
    assert_eq!(known(&node), 2);
    engine.remove_container(&id).await.unwrap();
    engine.remove_container(&second).await.unwrap();
    assert_eq!(known(&node), 0);
    remove_pods(&engine).await;
    node.handlers = handlers;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_oci_runtime_cannot_do_is_told_and_undone() {
    let node = node_with_runtime();
    let engine = node.start().await;
    for (handler, part) in [
        ("nope", "this node has berth, missing, script"),
        ("missing", "cannot be run"),
    ] {
        let config = pod_config(&node, "never");
        let error = engine.run_pod_sandbox(config, handler.to_owned()).await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(chain(&error).contains(part), "{}", chain(&error));
    }
    let pod = run_script_pod(&node, &engine, "one").await;
    for (mode, part) in [
        ("fails", "runtime create: no luck with \"create\""),
        ("dies", "signal 9 killed it"),
    ] {
        set_mode(&node, mode);
        let config = container_config(mode, "unused");
        let error = engine.create_container(&pod, config).await.unwrap_err();
        assert!(chain(&error).contains(part), "{}", chain(&error));
        assert_eq!(known(&node), 0, "{mode}");
    }
    // While it hangs, the pod is removed.
    set_mode(&node, "hangs");
    let (creating, of) = (engine.clone(), pod.clone());
    let hanging = Tasks::default();
    let asked = hanging.spawn(async move {
        let config = container_config("hangs", "unused");
        creating.create_container(&of, config).await
    });
    until("it hangs", || known(&node) == 1).await;
    engine
        .core()
        .pod(&pod)
        .unwrap()
        .monitor()
        .unwrap()
        .stop()
        .await
        .unwrap();
    let error = timeout(PATIENCE, asked)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    assert!(chain(&error).contains("container"), "{}", chain(&error));
    assert_eq!(known(&node), 0);
    remove_pods(&engine).await;
    set_mode(&node, "refuses");
    let pod = run_script_pod(&node, &engine, "two").await;
    let id = create(&engine, &pod, "main", "unused").await;
    let error = engine.start_container(&id).await.unwrap_err();
    assert!(
        chain(&error).contains("it will not start"),
        "{}",
        chain(&error)
    );
    assert_eq!(exited(&engine, &id).await.reason, "StartError");
    remove_pods(&engine).await;
    assert_eq!(known(&node), 0);
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_namespace_that_the_handler_cannot_make_is_refused() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let mut config = pod_config(&node, "never");
    let ids = vec![IdMapping {
        host_id: 65536,
        container_id: 0,
        length: 65536,
    }];
    config.security.namespaces.user = Some(UserNamespace {
        mode: NamespaceMode::Pod,
        uids: ids.clone(),
        gids: ids,
    });
    let told = || node_told(&engine);
    until("its features", told).await;
    let error = engine.run_pod_sandbox(config, "script".to_owned()).await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    let text = chain(&error);
    for part in [
        "userns_options",
        "\"script\"",
        "/runtime features`",
        "hostUsers: true",
    ] {
        assert!(text.contains(part), "{text}");
    }
    remove_pods(&engine).await;
    node.end(engine).await;
}

/// The script tells that it knows no cgroup of either version, and no bundle of version 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_runtime_has_not_is_refused_by_name_before_it_is_called() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "poor").await;
    for (features, field, at) in [
        (
            r#"{"linux":{"cgroup":{"v1":false,"v2":false}}}"#,
            "linux.cgroupsPath: ",
            "linux.cgroup.v",
        ),
        (
            r#"{"ociVersionMin":"2.0.0","ociVersionMax":"2.1.0"}"#,
            "ociVersion: ",
            "ociVersionMin and ociVersionMax",
        ),
    ] {
        // Another file: as if it had been installed anew. It is asked before the container is made.
        let told = r#"{"mountOptions":["ro","rro"]}"#;
        let path = node.path("runtime");
        let other = RUNTIME.replace(told, features);
        assert_ne!(other, RUNTIME);
        fill(&node.path("runtime.new"), &other);
        fs::set_permissions(node.path("runtime.new"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(node.path("runtime.new"), &path).unwrap();
        let error = engine
            .create_container(&pod, container_config("poor", "sleep 1000"))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        let text = chain(&error);
        for part in [field, "/runtime ", at, "/runtime features`", "newer"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let calls = fs::read_to_string(node.path("calls")).unwrap();
        assert!(!calls.contains("create"), "{calls}");
        assert!(
            engine
                .list_containers(&ContainerFilter::default())
                .is_empty()
        );
    }
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_monitor_cleans_up_for_one_that_was_killed() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    let id = run(&engine, &pod, "main", "unused").await;
    let monitor = engine.core().pod(&pod).unwrap().monitor().unwrap();
    let calls = || fs::read_to_string(node.path("calls")).unwrap();
    assert!(!calls().contains("delete"));
    monitor.kill_monitor().await.unwrap();
    assert_eq!(exited(&engine, &id).await.reason, "Unknown");
    assert_eq!(known(&node), 1);
    remove_pods(&engine).await;
    assert_eq!(known(&node), 0);
    assert_eq!(calls().matches("delete").count(), 1);
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn containers_of_a_pod_are_removed_side_by_side() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    for name in ["a", "b", "c", "d", "e"] {
        run(&engine, &pod, name, "unused").await;
    }
    // Each deletion waits for three others.
    set_mode(&node, "together");
    timeout(Duration::from_secs(20), remove_pods(&engine))
        .await
        .expect("one after the other");
    assert_eq!(known(&node), 0);
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_daemon_that_dies_while_another_monitor_cleans_up_finds_the_rest() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    for name in ["a", "b"] {
        run(&engine, &pod, name, "unused").await;
    }
    let monitor = engine.core().pod(&pod).unwrap().monitor().unwrap();
    monitor.kill_monitor().await.unwrap();
    until("the loss is noticed", || {
        !engine.core().pod(&pod).unwrap().is_ready()
    })
    .await;
    set_mode(&node, "slow");
    let (removing, tasks) = (engine.clone(), Tasks::default());
    let id = pod.clone();
    let removed = tasks.spawn(async move { removing.remove_pod_sandbox(&id).await });
    let begun = || fs::read_to_string(node.path("calls")).unwrap();
    until("a deletion", || begun().contains("delete")).await;
    assert_eq!(tasks.shutdown(Duration::ZERO).await, 1);
    assert!(removed.await.is_err());
    node.crash(engine).await;
    set_mode(&node, "works");
    let engine = node.start().await;
    remove_pods(&engine).await;
    assert_eq!(known(&node), 0);
    fill(&node.path("go"), "");
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_for_a_removal_again_waits_for_it_too() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    let id = run(&engine, &pod, "main", "unused").await;
    let id = engine.core().container(&id).unwrap().id;
    set_mode(&node, "slow");
    let monitor = engine.core().pod(&pod).unwrap().monitor().unwrap();
    let tasks = Tasks::default();
    let ask = || {
        let monitor = monitor.clone();
        tasks.spawn(async move { monitor.remove(id).await })
    };
    let first = ask();
    until("its deletion", || {
        node.path(&format!("deletes.{id}")).exists()
    })
    .await;
    let mut second = ask();
    let told = timeout(PATIENCE, first).await.unwrap().unwrap();
    assert!(chain(&told.unwrap_err()).contains("again"));
    assert!(second.try_recv().is_err(), "it is told of what is not done");
    assert_eq!(known(&node), 1);
    fill(&node.path("go"), "");
    timeout(PATIENCE, second).await.unwrap().unwrap().unwrap();
    assert_eq!(known(&node), 0);
    remove_pods(&engine).await;
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hooks_of_an_oci_runtime_do_not_outlive_their_pod() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    let id = create(&engine, &pod, "main", "unused").await;
    set_mode(&node, "hooked");
    let (starting, of, tasks) = (engine.clone(), id.clone(), Tasks::default());
    let start = tasks.spawn(async move { starting.start_container(&of).await });
    let hook = || fs::read_to_string(node.path("hook")).unwrap_or_default();
    until("its hook", || hook().ends_with('\n')).await;
    let hook = node.path("/proc").join(hook().trim());
    assert!(hook.exists());
    let monitor = engine.core().pod(&pod).unwrap().monitor().unwrap();
    let stopped = timeout(Duration::from_secs(10), monitor.stop()).await;
    stopped.expect("it waits for the hook").unwrap();
    let error = timeout(PATIENCE, start).await.unwrap().unwrap();
    assert!(chain(&error.unwrap_err()).contains("helper was killed"));
    until("the hook goes on", || !hook.exists()).await;
    remove_pods(&engine).await;
    assert_eq!(known(&node), 0);
    node.end(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exec_that_an_oci_runtime_does_not_start_leaves_nothing() {
    let node = node_with_runtime();
    let engine = node.start().await;
    let pod = run_script_pod(&node, &engine, "one").await;
    let id = run(&engine, &pod, "main", "unused").await;
    set_mode(&node, "hangs");
    let command = vec!["any".to_owned()];
    let error = engine.exec_sync(&id, command, 3).await.unwrap_err();
    assert_eq!(error.kind(), Kind::DeadlineExceeded);
    let started = fs::read_to_string(node.path("hook")).unwrap();
    let started = PathBuf::from("/proc").join(started.trim());
    until("what the runtime started goes on", || !started.exists()).await;
    let bundle = node.path("state/pods").join(&pod).join(&id);
    let left = || {
        let all = fs::read_dir(&bundle).unwrap();
        let mut names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.find(|name| name.starts_with("exec-"))
    };
    until("files are left", || left().is_none()).await;
    remove_pods(&engine).await;
    node.end(engine).await;
}

//! Execs, attach and terminals.

use std::io::Read as _;

use super::*;

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
async fn an_exec_that_was_given_up_and_never_ran_is_forgotten() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    let plan = exec_plan(&["/no/such/program"]);
    let mut asked = Box::pin(pod.client.exec(id, &plan, Streams::default()));
    tokio::select! {
        biased;
        ended = &mut asked => panic!("{ended:?}"),
        () = std::future::ready(()) => {}
    }
    assert_eq!(pod.client.shared.waiting().execs.len(), 1);
    drop(asked);
    // It fails after this one was asked for, before it is answered.
    pod.exec(id, "true").await.unwrap();
    wait_for(|| pod.client.shared.waiting().execs.is_empty().then_some(())).await;
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
    fd::set_pipe_size(out.as_fd(), 1 << 20).unwrap();
    let stdin = pod
        .client
        .attach(id, vec![out, err], true)
        .await
        .unwrap()
        .unwrap();
    let ((unread, slow), (_second, err2), (news, news_to)) = (
        fd::pipe().unwrap(),
        fd::pipe().unwrap(),
        fd::pipe().unwrap(),
    );
    assert!(
        pod.client
            .attach(id, vec![slow, err2, news_to], true)
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
    // R-159: who does not read is told that it lost something; what it has until then is whole.
    let mut told = [0; 2];
    assert_eq!(fd::read(news.as_fd(), &mut told).unwrap(), 1);
    let mut kept = vec![];
    std::fs::File::from(unread).read_to_end(&mut kept).unwrap();
    assert!(kept.len() < text.len() && text.as_bytes().starts_with(&kept));
    assert!(text.as_bytes() == out, "{} bytes", out.len());
    assert_eq!(pod.exit().await.code, 0);
    assert_eq!(pod.lines().len(), 3001);
    pod.end().await;
}

#[tokio::test]
async fn who_leaves_a_silent_container_is_forgotten() {
    let pod = Pod::new().await;
    let id = pod.run("sleep 1000").await;
    let open = || {
        fs::read_dir(format!("/proc/{}/fd", pod.client.pid()))
            .unwrap()
            .count()
    };
    let before = open();
    let mut readers = vec![];
    for _ in 0..50 {
        let ((out, to_out), (err, to_err), (news, to_news)) = (
            fd::pipe().unwrap(),
            fd::pipe().unwrap(),
            fd::pipe().unwrap(),
        );
        let copies = vec![to_out, to_err, to_news];
        assert!(
            pod.client
                .attach(id, copies, false)
                .await
                .unwrap()
                .is_none()
        );
        readers.push((out, err, news));
    }
    assert_eq!(open(), before + 150);
    // One output alone is no more read: the client stays.
    let (out, err, news) = readers.remove(0);
    drop((out, readers));
    wait_for(|| (open() == before + 2).then_some(())).await;
    drop((err, news));
    wait_for(|| (open() == before).then_some(())).await;
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
    // The terminal echoes what is typed at once: not before the program has spoken.
    wait_for(|| (!pod.lines().is_empty()).then_some(())).await;
    fd::write_all(input.as_fd(), b"word\n").unwrap();
    drop(input);
    assert_eq!(pod.exit().await.code, 0);
    let lines: Vec<String> = pod.lines().into_iter().map(|(_, text)| text).collect();
    assert_eq!(lines, ["tty 0\r", "word\r", "33 111\r", "got word\r"]);
    pod.end().await;
}

//! Pods with pause, and the containers in them.

use super::*;

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

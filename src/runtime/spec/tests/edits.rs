//! What CDI devices and NRI plugins change.

use super::*;
use crate::base::block_io::BlockIo;
use crate::base::edits::{
    DeviceAccess, DeviceEdit, Edits, MemoryPolicy, MountEdit, NamespaceEdit, NetDevice, Rdt,
    RdtEdit, Scheduler,
};
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::plan::NamespaceSource;

fn edited(change: impl FnOnce(&mut Edits)) -> Result<Built> {
    let mut edits = Edits {
        by: "NRI plugin 10-x".to_owned(),
        ..Edits::default()
    };
    change(&mut edits);
    World::with(|world| world.edits = vec![edits]).build()
}

fn refusal(change: impl FnOnce(&mut Edits)) -> String {
    let error = edited(change).unwrap_err().to_string();
    assert!(error.contains("NRI plugin 10-x"), "{error}");
    error
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> MountEdit {
    MountEdit {
        destination: destination.to_owned(),
        remove: false,
        kind: kind.to_owned(),
        source: source.to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

#[test]
fn process_edits() {
    let built = edited(|edits| {
        edits.args = vec!["sleep".to_owned(), "1".to_owned()];
        edits.env = vec![("A".to_owned(), some("x=y")), ("PATH".to_owned(), None)];
        edits.groups = vec![44, 44];
        edits.rlimits = vec![
            ("RLIMIT_NOFILE".to_owned(), 10, 20),
            ("RLIMIT_CORE".to_owned(), 0, u64::MAX),
        ];
        edits.oom_score_adj = Some(500);
        edits.annotations = vec![("a".to_owned(), some("b"))];
    })
    .unwrap();
    let process = &built.plan.process;
    assert_eq!(process.args, ["sleep", "1"]);
    assert!(process.env.contains(&b"A=x=y".to_vec()));
    assert!(!process.env.iter().any(|entry| entry.starts_with(b"PATH=")));
    assert_eq!(process.user.additional_groups, [44]);
    assert_eq!(process.rlimits, [(7, 10, 20), (4, 0, u64::MAX)]);
    assert_eq!(process.oom_score_adj, Some(500));
    assert_eq!(built.spec.annotations().as_ref().unwrap()["a"], "b");
    for (error, part) in [
        (refusal(|e| e.args = vec!["a\0".to_owned()]), "args"),
        (refusal(|e| e.env = vec![(String::new(), some("x"))]), "env"),
        (
            refusal(|e| e.rlimits = vec![("RLIMIT_X".to_owned(), 1, 1)]),
            "RLIMIT_X",
        ),
        (
            refusal(|e| e.rlimits = vec![("RLIMIT_CORE".to_owned(), 2, 1)]),
            "hard",
        ),
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn mount_edits() {
    let built = edited(|edits| {
        edits.mounts = vec![
            mount("/dev/shm", "tmpfs", "tmpfs", &["size=1m", "nosuid", "rw"]),
            mount("/a/b", "", "/srv", &["ro", "rbind", "rslave"]),
            mount("/a", "bind", "/opt", &["bind"]),
            MountEdit {
                destination: "/etc/hosts".to_owned(),
                remove: true,
                ..MountEdit::default()
            },
        ];
    })
    .unwrap();
    let MountSource::Filesystem { kind, options } = &at(&built, "/dev/shm").source else {
        panic!()
    };
    assert_eq!(
        (&**kind, &options[..]),
        ("tmpfs", &[("size".to_owned(), "1m".to_owned())][..])
    );
    assert!(at(&built, "/dev/shm").attributes.nosuid);
    assert_eq!(bound_from(at(&built, "/a/b")), Path::new("/srv"));
    assert!(at(&built, "/a/b").attributes.readonly);
    assert_eq!(built.plan.root_propagation, MountPropagation::Slave);
    let MountSource::Bind { recursive, .. } = at(&built, "/a").source else {
        panic!()
    };
    assert!(!recursive);
    let targets: Vec<_> = built.plan.mounts.iter().map(|m| &*m.target).collect();
    assert!(!targets.contains(&"/etc/hosts"));
    let place = |target| targets.iter().position(|one| *one == target).unwrap();
    assert!(place("/a") < place("/a/b"), "{targets:?}");
    for (edit, part) in [
        (mount("a", "bind", "/srv", &[]), "mounts[a]"),
        (mount("/dev", "bind", "/srv", &[]), "devices"),
        (mount("/proc/sys", "bind", "/srv", &[]), "procfs"),
        (mount("/a", "ext4", "/dev/sda", &[]), "ext4"),
        (mount("/a", "bind", "srv", &[]), "srv"),
        (mount("/a", "bind", "/srv", &["size=1"]), "size=1"),
        (
            mount("/sys/fs/cgroup", "cgroup2", "cgroup", &["ro", "nsdelegate"]),
            "nsdelegate",
        ),
    ] {
        let error = refusal(|edits| edits.mounts = vec![edit]);
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn device_edits() {
    let device = |path: &str| DeviceEdit {
        path: path.to_owned(),
        kind: "c".to_owned(),
        major: 10,
        minor: 200,
        mode: Some(0o600),
        access: "rw".to_owned(),
        ..DeviceEdit::default()
    };
    let built = edited(|edits| {
        let gone = DeviceEdit {
            path: "/dev/tty".to_owned(),
            remove: true,
            ..DeviceEdit::default()
        };
        edits.devices = vec![device("/dev/net/tun"), gone];
        edits.device_rules = vec![DeviceAccess {
            allow: true,
            kind: "b".to_owned(),
            major: Some(8),
            minor: None,
            access: "r".to_owned(),
        }];
    })
    .unwrap();
    let made = built.plan.devices.iter().find(|d| d.path == "/dev/net/tun");
    let made = made.unwrap();
    assert_eq!((made.major, made.minor, made.mode), (10, 200, 0o600));
    assert!(built.plan.devices.iter().all(|d| d.path != "/dev/tty"));
    let [.., node, raw] = &built.device_rules[..] else {
        panic!()
    };
    assert!(node.read && node.write && !node.mknod && node.minor == Some(200));
    assert!(raw.read && !raw.write && raw.major == Some(8) && raw.minor.is_none());
    for (edit, part) in [
        (device("tun"), "absolute"),
        (
            DeviceEdit {
                kind: "p".to_owned(),
                ..device("/dev/p")
            },
            "devices[/dev/p]",
        ),
        (
            DeviceEdit {
                access: "x".to_owned(),
                ..device("/dev/x")
            },
            "rwm",
        ),
    ] {
        let error = refusal(|edits| edits.devices = vec![edit]);
        assert!(error.contains(part), "{part}: {error}");
    }
}

fn net_device(host: &str, name: &str) -> NetDevice {
    NetDevice {
        host: host.to_owned(),
        name: name.to_owned(),
    }
}

#[test]
fn network_devices_are_taken_and_taken_back() {
    let built = edited(|edits| {
        edits.net_devices = vec![
            net_device("eth1", "x"),
            net_device("eth2", "y"),
            net_device("eth1", ""),
            net_device("eth3", "x"),
        ];
    });
    let wanted = [net_device("eth2", "y"), net_device("eth3", "x")];
    assert_eq!(built.unwrap().net_devices, wanted);
    for error in [
        refusal(|e| e.net_devices = vec![net_device("eth1", "a/b")]),
        refusal(|e| e.net_devices = vec![net_device("", "eth1")]),
        refusal(|e| e.net_devices = vec![net_device("eth1", "a-name-too-long!")]),
        refusal(|e| e.net_devices = vec![net_device("eth1", "x"), net_device("eth2", "x")]),
        refusal(|e| {
            e.namespaces = vec![NamespaceEdit {
                kind: "network".to_owned(),
                path: None,
            }];
            e.net_devices = vec![net_device("eth1", "x")];
        }),
    ] {
        assert!(error.starts_with("NRI plugin 10-x: netDevices["), "{error}");
    }
}

#[test]
fn edits_of_namespaces_sysctls_and_priorities() {
    let namespace = |kind: &str, path: Option<&str>| NamespaceEdit {
        kind: kind.to_owned(),
        path: path.map(ToOwned::to_owned),
    };
    let built = edited(|edits| {
        edits.namespaces = vec![
            namespace("pid", Some("")),
            namespace("uts", None),
            namespace("ipc", Some("/run/ns/ipc")),
        ];
        edits.sysctls = vec![("net.core.somaxconn".to_owned(), some("77"))];
        edits.io_priority = Some((2, 7));
        edits.scheduler = Some(Scheduler {
            policy: 3,
            ..Scheduler::default()
        });
        edits.memory_policy = Some(MemoryPolicy {
            mode: 2,
            flags: 1 << 15,
            nodes: "0-1,64".to_owned(),
        });
        edits.resources.pids_limit = 9;
        edits.resources.cpu_shares = 77;
    })
    .unwrap();
    assert_eq!(built.plan.namespaces.pid, NamespaceSource::New);
    assert_eq!(built.plan.namespaces.uts, NamespaceSource::Host);
    let joined = NamespaceSource::Path("/run/ns/ipc".into());
    assert_eq!(built.plan.namespaces.ipc, joined);
    let sysctl = ("net.core.somaxconn".to_owned(), "77".to_owned());
    assert_eq!(built.plan.sysctls, [sysctl]);
    let tuning = &built.plan.process.tuning;
    assert_eq!(tuning.io_priority, Some((2, 7)));
    assert_eq!(tuning.scheduler.unwrap().policy, 3);
    let policy = tuning.memory_policy.as_ref().unwrap();
    assert_eq!((policy.mode, &policy.nodes[..]), (2 | 1 << 15, &[3, 1][..]));
    assert_eq!(
        (built.resources.pids_limit, built.resources.cpu_shares),
        (9, 77)
    );
    for error in [
        refusal(|e| e.namespaces = vec![namespace("network", Some("ns/net"))]),
        refusal(|e| e.namespaces = vec![namespace("mount", Some("/proc/1/ns/mnt"))]),
        refusal(|e| {
            e.namespaces = vec![namespace("network", Some("/proc/1/ns/net"))];
            e.sysctls = vec![("net.core.somaxconn".to_owned(), some("1"))];
        }),
        refusal(|e| e.namespaces = vec![namespace("user", Some(""))]),
        refusal(|e| e.sysctls = vec![("vm.swappiness".to_owned(), some("1"))]),
        refusal(|e| {
            e.namespaces = vec![namespace("network", None)];
            e.sysctls = vec![("net.core.somaxconn".to_owned(), some("1"))];
        }),
        refusal(|e| e.io_priority = Some((4, 0))),
        refusal(|e| {
            e.scheduler = Some(Scheduler {
                nice: 20,
                ..Scheduler::default()
            });
        }),
        refusal(|e| {
            e.memory_policy = Some(MemoryPolicy {
                nodes: "1-".to_owned(),
                ..MemoryPolicy::default()
            });
        }),
        refusal(|e| e.impossible = vec![("cpu.realtimeRuntime".to_owned(), "7".to_owned())]),
        refusal(|e| e.rdt = vec![("rdt", class("a/b"))]),
        refusal(|e| e.hooks = vec![hook(|hook| hook.path = "bin/hook".to_owned())]),
        refusal(|e| e.hooks = vec![hook(|hook| hook.env = vec!["A".to_owned()])]),
        refusal(|e| e.hooks = vec![hook(|hook| hook.args = vec!["a\0".to_owned()])]),
        refusal(|e| e.hooks = vec![hook(|hook| hook.timeout = Some(0))]),
    ] {
        assert!(error.starts_with("NRI plugin 10-x: "), "{error}");
    }
}

#[test]
fn a_seccomp_profile_of_an_edit_replaces_the_containers() {
    let built = edited(|edits| {
        edits.seccomp = Some(
            br#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#.to_vec(),
        );
    })
    .unwrap();
    assert!(built.plan.process.seccomp.is_some());
    assert!(built.spec.linux().as_ref().unwrap().seccomp().is_some());
    let bad = edited(|edits| edits.seccomp = Some(b"{".to_vec()));
    assert!(crate::base::error::chain(&bad.unwrap_err()).contains("NRI plugin 10-x"));
}

fn class(name: &str) -> RdtEdit {
    RdtEdit::Replace(Some(Rdt {
        clos_id: name.to_owned(),
        ..Rdt::default()
    }))
}

#[test]
fn the_group_is_joined_or_left_to_an_oci_runtime() {
    let group = Rdt {
        clos_id: "gold".to_owned(),
        enable_monitoring: true,
        ..Rdt::default()
    };
    let built = edited(|edits| edits.rdt = vec![("rdt", RdtEdit::Replace(Some(group.clone())))]);
    let built = built.unwrap();
    let joined = &built.plan.process.resctrl;
    assert_eq!(joined[0], std::path::Path::new("/sys/fs/resctrl/gold"));
    assert!(joined[1].starts_with("/sys/fs/resctrl/gold/mon_groups"));
    assert_eq!(built.rdt, Some(group.clone()));
    let shown = |built: &Built| {
        let linux = built.spec.linux().as_ref().unwrap();
        linux.intel_rdt().as_ref().unwrap().clos_id().clone()
    };
    assert_eq!(shown(&built).as_deref(), Some("gold"));
    let external = World::with(|world| {
        world.handler.runtime = Some(crate::base::handler::OciRuntime {
            path: "/bin/runc".into(),
            root: "/run/runc".into(),
            arguments: vec![],
        });
        world.edits = vec![Edits {
            rdt: vec![("rdt", RdtEdit::Replace(Some(group)))],
            ..Edits::default()
        }];
    });
    let external = external.build().unwrap();
    assert_eq!(
        (&external.rdt, &external.plan.process.resctrl[..]),
        (&None, &[][..])
    );
    assert_eq!(shown(&external).as_deref(), Some("gold"));
}

#[test]
fn block_io_is_described() {
    let built = edited(|edits| {
        let mut limits = BlockIo {
            weight: Some(80),
            ..BlockIo::default()
        };
        limits.device(8, 16).read_bps = Some(7);
        limits.device(8, 16).weight = Some(50);
        limits.device(8, 0).write_iops = Some(9);
        edits.resources.block_io = Some(limits);
    });
    let spec = serde_json::to_value(&built.unwrap().spec).unwrap();
    assert_eq!(
        spec["linux"]["resources"]["blockIO"],
        serde_json::json!({
            "weight": 80,
            "weightDevice": [{"major": 8, "minor": 16, "weight": 50}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 7}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 9}],
        })
    );
}

#[test]
fn the_later_edit_wins() {
    let one = |value: &str| Edits {
        by: value.to_owned(),
        env: vec![("A".to_owned(), some(value))],
        ..Edits::default()
    };
    let built = World::with(|world| world.edits = vec![one("1"), one("2")]).build();
    assert!(built.unwrap().plan.process.env.contains(&b"A=2".to_vec()));
}

fn hook(change: impl FnOnce(&mut Hook)) -> Hook {
    let mut made = Hook {
        point: HookPoint::CreateContainer,
        path: "/bin/hook".to_owned(),
        args: vec![],
        env: vec![],
        timeout: None,
    };
    change(&mut made);
    made
}

#[test]
fn hooks_come_with_a_bundle_and_a_state() {
    let built = edited(|edits| {
        edits.annotations = vec![("a".to_owned(), some("say \"x\""))];
        edits.hooks = vec![
            hook(|hook| hook.timeout = Some(3)),
            hook(|hook| hook.point = HookPoint::Poststop),
        ];
    });
    let built = built.unwrap();
    let hooks = built.plan.hooks.unwrap();
    let bundle = format!("/run/pods/b/{}", id("c"));
    assert_eq!(hooks.bundle, Path::new(&bundle));
    assert_eq!(hooks.all.len(), 2);
    let state: serde_json::Value = serde_json::from_str(&hooks.state("creating", Some(1))).unwrap();
    assert_eq!(state["id"], id("c").to_string());
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&"creating".into(), &1.into())
    );
    assert_eq!(state["bundle"], *bundle);
    assert_eq!(state["annotations"]["a"], "say \"x\"");
    assert_eq!(
        state["annotations"]["io.kubernetes.cri.container-type"],
        "container"
    );
    let spec = serde_json::to_value(built.spec).unwrap();
    assert_eq!(spec["root"]["path"], "rootfs");
    assert_eq!(spec["hooks"]["createContainer"][0]["timeout"], 3);
    assert!(edited(|_| {}).unwrap().plan.hooks.is_none());
}

#[test]
fn an_oci_runtime_gets_hooks_and_priorities() {
    let hook = |point| Hook {
        point,
        path: "/bin/hook".to_owned(),
        args: vec!["hook".to_owned()],
        env: vec![],
        timeout: Some(3),
    };
    let built = |change: fn(&mut Edits)| {
        let mut edits = Edits {
            by: "CDI device v.com/x=0 of /etc/cdi/x.json".to_owned(),
            hooks: vec![hook(HookPoint::CreateContainer), hook(HookPoint::Poststop)],
            ..Edits::default()
        };
        change(&mut edits);
        World::with(|world| {
            world.edits = vec![edits];
            world.handler.runtime = Some(crate::base::handler::OciRuntime {
                path: "/bin/runc".into(),
                root: "/run/runc".into(),
                arguments: vec![],
            });
        })
        .build()
    };
    assert!(built(|_| {}).unwrap().plan.hooks.is_none());
    let made = built(|edits| {
        edits.io_priority = Some((2, 7));
        edits.scheduler = Some(Scheduler {
            policy: 3,
            nice: 5,
            ..Scheduler::default()
        });
    });
    let spec = serde_json::to_value(made.unwrap().spec).unwrap();
    assert_eq!(spec["hooks"]["createContainer"][0]["path"], "/bin/hook");
    assert_eq!(spec["hooks"]["poststop"][0]["timeout"], 3);
    assert_eq!(spec["process"]["ioPriority"]["class"], "IOPRIO_CLASS_BE");
    assert_eq!(spec["process"]["scheduler"]["policy"], "SCHED_BATCH");
    assert_eq!(spec["process"]["scheduler"]["nice"], 5);
    let error = built(|edits| edits.memory_policy = Some(MemoryPolicy::default()));
    assert!(error.unwrap_err().to_string().contains("memoryPolicy"));
}

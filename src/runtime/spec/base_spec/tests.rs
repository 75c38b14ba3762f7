//! What a base spec may say, and what comes of it.

use super::*;
use crate::base::container::{Device, Mount};

/// As `ctr oci spec` writes it, shortened where lists are long.
const GENERATED: &str = r#"{"ociVersion":"1.2.1","process":{"user":{"uid":0,"gid":0},"args":["sh"],"cwd":"/",
    "env":["PATH=/usr/local/sbin:/bin"],"capabilities":{"bounding":["CAP_CHOWN","CAP_KILL"],
    "effective":["CAP_CHOWN","CAP_KILL"],"permitted":["CAP_CHOWN","CAP_KILL"]},
    "rlimits":[{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}],"noNewPrivileges":true},
    "root":{"path":"rootfs"},"mounts":[
    {"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
    {"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
    {"destination":"/dev/pts","type":"devpts","source":"devpts",
     "options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
    {"destination":"/dev/shm","type":"tmpfs","source":"shm","options":["nosuid","noexec","nodev","mode=1777","size=65536k"]},
    {"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},
    {"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
    {"destination":"/run","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]}],
    "linux":{"resources":{"devices":[{"allow":false,"access":"rwm"}]},"cgroupsPath":"/default",
    "namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network"}],
    "maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"]}}"#;

fn read(text: &str) -> Checked<Base> {
    Base::read("base", text)
}

/// A spec with this beside its version.
fn with(rest: &str) -> Checked<Base> {
    read(&format!("{{\"ociVersion\":\"1.2.0\",{rest}}}"))
}

#[test]
fn a_generated_spec_is_fine() {
    let base = read(GENERATED).unwrap();
    let wanted = Base {
        edits: Edits {
            by: "base".to_owned(),
            ..Edits::default()
        },
        masked_paths: vec!["/proc/kcore".to_owned()],
        readonly_paths: vec!["/proc/sys".to_owned()],
        env: vec![("PATH".to_owned(), "/usr/local/sbin:/bin".to_owned())],
        rlimits: vec![(7, 1024, 1024)],
        capabilities: Some(0b10_0001),
        ..Base::default()
    };
    assert_eq!(base, wanted);
}

#[test]
fn everything_that_counts() {
    let base = with(
        r#""root":{"readonly":true},"annotations":{"a":"1"},
        "process":{"ioPriority":{"class":"IOPRIO_CLASS_BE","priority":6},
            "scheduler":{"policy":"SCHED_BATCH","nice":5}},
        "mounts":[{"destination":"/data/","type":"tmpfs","source":"tmpfs","options":["size=1m"]}],
        "hooks":{"createRuntime":[{"path":"/bin/true","args":["true"],"timeout":3}]},
        "linux":{"sysctl":{"net.core.somaxconn":"9"},
            "devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229,"fileMode":438}],
            "resources":{"memory":{"limit":100,"reservation":50},"cpu":{"shares":7,"cpus":"0"},
                "pids":{"limit":99},"unified":{"memory.high":"1"},"hugepageLimits":[{"pageSize":"2MB","limit":0}],
                "devices":[{"allow":false,"access":"rwm"},
                    {"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}]}}"#,
    )
    .unwrap();
    assert!(base.readonly_root);
    let edits = &base.edits;
    assert_eq!(edits.annotations, [("a".to_owned(), Some("1".to_owned()))]);
    assert_eq!(edits.io_priority, Some((2, 6)));
    let scheduler = edits.scheduler.unwrap();
    assert_eq!((scheduler.policy, scheduler.nice), (3, 5));
    assert_eq!(edits.mounts[0].destination, "/data");
    assert_eq!(edits.hooks[0].timeout, Some(3));
    assert_eq!(edits.devices[0].path, "/dev/fuse");
    assert_eq!(edits.device_rules[0].minor, Some(229));
    assert_eq!(base.sysctls[0].1, "9");
    let limits = &base.resources;
    assert_eq!((limits.memory_limit, limits.memory_reservation), (100, 50));
    assert_eq!((limits.cpu_shares, limits.pids_limit), (7, 99));
    assert_eq!(limits.cpuset_cpus, "0");
    assert_eq!(limits.hugepage_limits, [("2MB".to_owned(), 0)]);
    assert_eq!(limits.unified["memory.high"], "1");
}

#[test]
fn what_pods_say_comes_over_it() {
    let base = || {
        with(
            r#""annotations":{"a":"1","b":"1","io.kubernetes.cri.x":"1"},
            "mounts":[{"destination":"/data","type":"tmpfs"},{"destination":"/other","type":"tmpfs"}],
            "linux":{"devices":[{"path":"/dev/fuse","type":"c"},{"path":"/dev/kvm","type":"c"}]}"#,
        )
        .unwrap()
    };
    let mut config = ContainerConfig::default();
    let all = base().under(&config).edits;
    assert_eq!((all.mounts.len(), all.devices.len()), (2, 2));
    assert_eq!(all.annotations.len(), 2);
    config.mounts.push(Mount {
        container_path: "/data/".to_owned(),
        ..Mount::default()
    });
    config.devices.push(Device {
        host_path: "/dev/fuse".to_owned(),
        ..Device::default()
    });
    config.annotations.insert("a".to_owned(), "2".to_owned());
    let left = base().under(&config).edits;
    assert_eq!(left.mounts[0].destination, "/other");
    assert_eq!(left.devices[0].path, "/dev/kvm");
    assert_eq!(left.annotations[0].0, "b");
    assert_eq!((left.mounts.len(), left.devices.len()), (1, 1));
}

/// (what stands beside the version, part of the error).
const REFUSED: &[(&str, &str)] = &[
    (r#""domainname":"x""#, "domainname = \"x\": leave it out"),
    (r#""process":{"oomScoreAdj":5}"#, "process.oomScoreAdj = 5"),
    (
        r#""process":{"apparmorProfile":"x"}"#,
        "process.apparmorProfile",
    ),
    (r#""process":{"selinuxLabel":"x"}"#, "process.selinuxLabel"),
    (
        r#""process":{"execCPUAffinity":{"initial":"0"}}"#,
        "the key exec_cpu_affinity",
    ),
    (r#""process":{"env":["A"]}"#, "process.env = \"A\": write"),
    (
        r#""process":{"capabilities":{"bounding":["CAP_X"]}}"#,
        "process.capabilities.bounding = CAP_X",
    ),
    (
        r#""process":{"capabilities":{"bounding":["CAP_KILL"],"effective":[]}}"#,
        "process.capabilities.effective",
    ),
    (
        r#""process":{"capabilities":{"ambient":["CAP_KILL"]}}"#,
        "process.capabilities.ambient",
    ),
    (
        r#""process":{"rlimits":[{"type":"RLIMIT_X","soft":1,"hard":1}]}"#,
        "process.rlimits = RLIMIT_X 1:1",
    ),
    (
        r#""process":{"rlimits":[{"type":"RLIMIT_CPU","soft":2,"hard":1}]}"#,
        "raise the hard limit",
    ),
    (
        r#""process":{"ioPriority":{"class":"X"}}"#,
        "process.ioPriority.class = X: use one of",
    ),
    (
        r#""process":{"scheduler":{"policy":"SCHED_OTHER","flags":["SCHED_FLAG_RECLAIM"]}}"#,
        "process.scheduler.flags",
    ),
    (
        r#""mounts":[{"destination":"x","type":"tmpfs"}]"#,
        "mounts[0].destination = \"x\"",
    ),
    (
        r#""mounts":[{"destination":"/dev/shm","type":"tmpfs","options":["size=1g"]}]"#,
        "mounts[0].options = \"size=1g\": leave this mount out",
    ),
    (
        r#""mounts":[{"destination":"/proc","type":"tmpfs"}]"#,
        "mounts[0].type = \"tmpfs\"",
    ),
    (
        r#""hooks":{"poststop":[{"path":"true"}]}"#,
        "hooks.poststop",
    ),
    (
        r#""linux":{"namespaces":[{"type":"user"}]}"#,
        "linux.namespaces = user:",
    ),
    (
        r#""linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#,
        "linux.namespaces = pid /proc/1/ns/pid",
    ),
    (
        r#""linux":{"sysctl":{"vm.swappiness":"1"}}"#,
        "linux.sysctl = vm.swappiness",
    ),
    (r#""linux":{"maskedPaths":["x"]}"#, "linux.maskedPaths"),
    (r#""linux":{"intelRdt":{"closID":"x"}}"#, "linux.intelRdt"),
    (
        r#""linux":{"rootfsPropagation":"shared"}"#,
        "linux.rootfsPropagation = shared",
    ),
    (
        r#""linux":{"devices":[{"path":"/dev/x","type":"p"}]}"#,
        "linux.devices[/dev/x].type",
    ),
    (
        r#""linux":{"resources":{"blockIO":{"weight":5}}}"#,
        "linux.resources.blockIO",
    ),
    (
        r#""linux":{"resources":{"memory":{"swappiness":5}}}"#,
        "linux.resources.memory.swappiness = 5",
    ),
    (
        r#""linux":{"resources":{"devices":[{"allow":true},{"allow":false,"type":"c","major":1}]}}"#,
        "linux.resources.devices[1]",
    ),
    (r#""linux":{"what":1}"#, "unknown field `what`"),
];

#[test]
fn what_cannot_be_taken_is_refused_by_name() {
    for (text, part) in REFUSED {
        let error = with(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    for text in ["", "[]", "{}", r#"{"ociVersion":"2.0.0"}"#] {
        assert!(read(text).is_err(), "{text}");
    }
}

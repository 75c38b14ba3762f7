//! Devices, privileges, hidden paths, capabilities, profiles.

use super::*;
use crate::runtime::plan::DeviceNode;

#[test]
fn what_the_configuration_gives() {
    let mut world = World::with(|world| {
        world.config.security.run_as_user = Some(1000);
        world.config.security.run_as_group = Some(2000);
        world.config.envs = vec![("B".to_owned(), b"cri".to_vec())];
        world.image.config.env = vec!["A=image".to_owned()];
        let defaults = &mut world.handler.defaults;
        defaults.capabilities = Some(0b11);
        defaults.rlimits = vec![(4, 0, 0), (7, 5, 6)];
        let pair = |key: &str| (key.to_owned(), "config".to_owned());
        defaults.env = vec![pair("A"), pair("B"), pair("C")];
        let node = |path: &str| DeviceNode {
            path: path.to_owned(),
            host_path: path.into(),
            block: false,
            major: 1,
            minor: 9,
            mode: 0o600,
            uid: 7,
            gid: 8,
        };
        world.prepared.devices = vec![HostDevice {
            node: node("/dev/x"),
            permissions: "rw".to_owned(),
        }];
    });
    let owner = |built: &Built, path: &str| {
        let found = built.plan.devices.iter().find(|node| node.path == path);
        found.map(|node| (node.uid, node.gid))
    };
    let built = world.build().unwrap();
    let process = &built.plan.process;
    assert_eq!(process.capabilities.bounding, 0b11);
    assert_eq!(process.rlimits, [(4, 0, 0), (7, 5, 6)]);
    for entry in ["A=image", "B=cri", "C=config"] {
        assert!(process.env.contains(&entry.as_bytes().to_vec()), "{entry}");
    }
    assert_eq!(owner(&built, "/dev/x"), Some((7, 8)));
    world.handler.defaults.device_ownership = true;
    let built = world.build().unwrap();
    assert_eq!(owner(&built, "/dev/x"), Some((1000, 2000)));
    assert_eq!(owner(&built, "/dev/null"), Some((0, 0)));
    world.config.security.run_as_group = None;
    assert_eq!(owner(&world.build().unwrap(), "/dev/x"), Some((1000, 8)));
    world.handler.defaults.rlimits = vec![(7, 1, u64::MAX)];
    let error = world.build().unwrap_err().to_string();
    assert!(
        error.contains("fs.nr_open of this node, which is 1048576"),
        "{error}"
    );
}

#[test]
fn devices_are_denied_unless_listed() {
    let world = World::with(|world| {
        let node = crate::runtime::plan::DeviceNode {
            path: "/dev/kvm".to_owned(),
            host_path: "/dev/kvm".into(),
            block: false,
            major: 10,
            minor: 232,
            mode: 0o660,
            uid: 0,
            gid: 104,
        };
        world.prepared.devices = vec![HostDevice {
            node,
            permissions: "r".to_owned(),
        }];
    });
    let built = world.build().unwrap();
    let names: Vec<_> = built
        .plan
        .devices
        .iter()
        .map(|node| node.path.as_str())
        .collect();
    let basic = crate::runtime::external::BASIC;
    assert_eq!(names, [&basic[..], &["/dev/kvm"]].concat());
    assert_eq!(built.device_rules[0], DeviceRule::DENY_ALL);
    let last = built.device_rules.last().unwrap();
    assert_eq!((last.major, last.minor), (Some(10), Some(232)));
    assert_eq!((last.read, last.write, last.mknod), (true, false, false));
    // Nothing but making nodes is allowed for devices in general.
    for rule in &built.device_rules[1..] {
        if rule.major.is_none() {
            assert!(rule.mknod && !rule.read && !rule.write, "{rule:?}");
        }
        assert!(rule.allow && rule.kind != DeviceKind::All, "{rule:?}");
    }
    let linux = built.spec.linux().as_ref().unwrap();
    let shown = linux
        .resources()
        .as_ref()
        .unwrap()
        .devices()
        .as_ref()
        .unwrap();
    assert_eq!(shown.len(), built.device_rules.len());
    assert_eq!(shown[0].access().as_deref(), Some("rwm"));
}

#[test]
fn a_handler_lets_annotations_through_and_keeps_devices_back() {
    let built = World::with(|world| {
        let map = |keys: &[&str]| {
            let pairs = keys.iter().map(|key| ((*key).to_owned(), "x".to_owned()));
            pairs.collect::<std::collections::BTreeMap<_, _>>()
        };
        world.pod.annotations = map(&["io.kata.a", "other"]);
        world.config.annotations = map(&["run.oci.x", "io.kubernetes.cri.container-type"]);
        world.handler.pod_annotations = vec!["io.kata.*".to_owned()];
        world.handler.container_annotations = vec!["*".to_owned()];
        world.pod.security.privileged = true;
        world.config.security.privileged = true;
        world.prepared.without_host_devices = true;
    });
    let built = built.build().unwrap();
    let shown = built.spec.annotations().clone().unwrap();
    let value = |key: &str| shown.get(key).map(String::as_str);
    assert_eq!(value("io.kata.a"), Some("x"));
    assert_eq!(value("other"), None);
    assert_eq!(value("run.oci.x"), Some("x"));
    assert_eq!(value("io.kubernetes.cri.container-type"), Some("container"));
    assert!(!built.device_rules[0].allow, "{:?}", built.device_rules[0]);
}

#[test]
fn no_annotation_passes_for_one_of_ours() {
    let own = "io.kubernetes.cri.sandbox-id";
    let made_up = [
        "io.kubernetes.cri.",
        "io.kubernetes.cri.untrusted",
        "run.oci.x",
    ];
    let world = World::with(|world| {
        let all = made_up.iter().chain([&own]);
        let all = all.map(|key| ((*key).to_owned(), "x".to_owned()));
        world.config.annotations = all.collect();
    });
    let built = world.build().unwrap();
    assert_eq!(built.hidden_annotations, made_up);
    let shown = built.spec.annotations().clone().unwrap();
    assert_ne!(shown[own], "x");
}

#[test]
fn privileged_containers() {
    let refused = World::with(|world| world.config.security.privileged = true);
    let error = refused.build().unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    let world = World::with(|world| {
        world.pod.security.privileged = true;
        let security = &mut world.config.security;
        security.privileged = true;
        security.capabilities.drop = vec!["ALL".to_owned()];
        security.masked_paths = vec!["/proc/kcore".to_owned()];
        security.readonly_paths = vec!["/proc/sys".to_owned()];
        security.apparmor = Some(SecurityProfile::RuntimeDefault);
        world.host.apparmor = true;
    });
    let built = world.build().unwrap();
    let plan = &built.plan;
    assert!(plan.masked_paths.is_empty() && plan.readonly_paths.is_empty());
    assert_eq!(plan.process.capabilities.permitted, (1 << 41) - 1);
    assert_eq!(plan.process.capabilities.ambient, 0);
    let mut ambient = world;
    let asked = vec!["CAP_CHOWN".to_owned()];
    ambient.config.security.capabilities.add_ambient = asked;
    let sets = ambient.build().unwrap().plan.process.capabilities;
    assert_eq!((sets.permitted, sets.ambient), ((1 << 41) - 1, 1));
    assert!(!at(&built, "/sys").attributes.readonly);
    assert!(!at(&built, "/sys/fs/cgroup").attributes.readonly);
    assert_eq!(plan.namespaces.cgroup, NamespaceSource::Host);
    assert_eq!(plan.process.seccomp, None);
    assert_eq!(built.device_rules.len(), 1);
    let rule = built.device_rules[0];
    assert!(rule.allow && rule.read && rule.write && rule.kind == DeviceKind::All);
}

#[test]
fn hidden_paths() {
    let build = |masked: &[&str]| {
        let masked = masked.iter().map(|path| (*path).to_owned()).collect();
        World::with(|world| world.config.security.masked_paths = masked).build()
    };
    assert!(build(&[]).unwrap().plan.masked_paths.is_empty());
    let plan = build(&["/proc/kcore"]).unwrap().plan;
    assert_eq!(
        plan.masked_paths,
        ["/proc/kcore", "/sys/devices/virtual/powercap"]
    );
    assert!(build(&["proc/kcore"]).is_err());
    assert!(build(&["/"]).is_err());
    assert!(security::DEFAULT_MASKED_PATHS.contains(&"/sys/devices/virtual/powercap"));
    assert!(security::DEFAULT_READONLY_PATHS.contains(&"/proc/sys"));
}

#[test]
fn capabilities_are_never_inherited_unasked() {
    let built = World::default().build().unwrap();
    let masks = built.plan.process.capabilities;
    assert_eq!(masks.ambient, 0);
    assert_eq!(masks.permitted, crate::runtime::capabilities::default_set());
    let process = built.spec.process().as_ref().unwrap();
    let shown = process.capabilities().as_ref().unwrap();
    assert_eq!(shown.bounding().as_ref().unwrap().len(), 14);
    assert!(shown.inheritable().as_ref().unwrap().is_empty());
    let bad = World::with(|world| {
        world.config.security.capabilities.add = vec!["CAP_MAGIC".to_owned()];
    });
    let error = bad.build().unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(error.to_string().contains("CAP_MAGIC"), "{error}");
}

#[test]
fn seccomp_reaches_plan_and_spec() {
    let world = World::with(|world| world.prepared.seccomp = Some(Profile::runtime_default()));
    let built = world.build().unwrap();
    let filter = built.plan.process.seccomp.as_ref().unwrap();
    assert!(filter.instructions.len() < 4096);
    let linux = built.spec.linux().as_ref().unwrap();
    let shown = linux.seccomp().as_ref().unwrap();
    assert!(!shown.syscalls().as_ref().unwrap().is_empty());
    // With SYS_ADMIN it is another filter.
    let mut admin = world;
    admin.config.security.capabilities.add = vec!["SYS_ADMIN".to_owned()];
    let other = admin.build().unwrap();
    assert_ne!(other.plan.process.seccomp, built.plan.process.seccomp);
    assert!(
        World::default()
            .build()
            .unwrap()
            .plan
            .process
            .seccomp
            .is_none()
    );
}

#[test]
fn apparmor_and_selinux() {
    use SecurityProfile::{Localhost, RuntimeDefault, Unconfined};
    let apparmor = |profile: Option<SecurityProfile>, enabled| {
        World::with(|world| {
            world.config.security.apparmor = profile;
            world.host.apparmor = enabled;
        })
        .build()
        .map(|built| built.plan.process.apparmor)
        .map_err(|error| error.kind())
    };
    let named = || Some(Localhost("localhost/mine".to_owned()));
    for profile in [None, Some(RuntimeDefault), Some(Unconfined)] {
        assert_eq!(apparmor(profile, false), Ok(String::new()));
    }
    assert_eq!(apparmor(named(), false), Err(Kind::FailedPrecondition));
    assert_eq!(apparmor(named(), true), Ok("mine".to_owned()));
    // The default profile is loaded where AppArmor and its parser are, never for a privileged container.
    let default = |profile: Option<SecurityProfile>| {
        let loaded = World::with(|world| {
            world.config.security.apparmor = profile;
            world.host.apparmor = true;
            world.prepared.apparmor_default = true;
        });
        loaded.build().unwrap().plan.process.apparmor
    };
    assert_eq!(default(None), "berth-default");
    assert_eq!(default(Some(RuntimeDefault)), "berth-default");
    assert_eq!(default(Some(Unconfined)), "");
    assert_eq!(default(named()), "mine");
    assert_eq!(apparmor(Some(Unconfined), true), Ok(String::new()));
    assert_eq!(
        apparmor(Some(Localhost(String::new())), true),
        Err(Kind::InvalidArgument)
    );

    let labels = SelinuxLabels {
        process: "u:r:container_t:s0:c1,c2".to_owned(),
        mount: "u:object_r:container_file_t:s0:c1,c2".to_owned(),
    };
    let mut world = World::default();
    assert_eq!(world.build().unwrap().plan.mount_label, "");
    world.prepared.labels = labels.clone();
    for built in [world.build().unwrap(), world.sandbox().unwrap()] {
        assert_eq!(built.plan.process.selinux, labels.process);
        assert_eq!(built.plan.mount_label, labels.mount);
        let spec = serde_json::to_value(&built.spec).unwrap();
        assert_eq!(spec["process"]["selinuxLabel"], labels.process);
        assert_eq!(spec["linux"]["mountLabel"], labels.mount);
    }
}

//! Mounts of the runtime, of the image and of the config.

use super::*;

#[test]
fn default_mounts() {
    let built = World::default().build().unwrap();
    let expected = [
        "/proc proc nosuid,nodev,noexec,rw",
        "/dev tmpfs nosuid,rw,mode=755,size=65536k",
        "/sys sysfs nosuid,nodev,noexec,ro",
        "/dev/pts devpts nosuid,noexec,rw,newinstance,ptmxmode=0666,mode=0620,gid=5",
        "/dev/mqueue mqueue nosuid,nodev,noexec,rw",
        "/dev/shm tmpfs nosuid,nodev,noexec,rw",
        "/etc/hosts bind rw,rbind,rprivate",
        "/etc/hostname bind rw,rbind,rprivate",
        "/etc/resolv.conf bind rw,rbind,rprivate",
        "/sys/fs/cgroup cgroup2 nosuid,nodev,noexec,relatime,ro",
    ];
    assert_eq!(lines(&built), expected);
    assert_eq!(at(&built, "/dev/shm").source, MountSource::PodShm);
    let hosts = bound_from(at(&built, "/etc/hosts"));
    assert_eq!(hosts, Path::new("/run/pods/b/hosts"));
}

#[test]
fn a_readonly_root_makes_the_pods_files_readonly_and_volumes_not() {
    let world = World::with(|world| {
        world.config.security.readonly_rootfs = true;
        world.config.mounts = vec![volume("/data", "/srv/data")];
    });
    let built = world.build().unwrap();
    assert!(at(&built, "/etc/resolv.conf").attributes.readonly);
    assert!(!at(&built, "/data").attributes.readonly);
    assert!(matches!(
        built.plan.rootfs,
        Rootfs::Overlay {
            readonly: true,
            volatile: true,
            ..
        }
    ));
    assert_eq!(built.spec.root().as_ref().unwrap().readonly(), Some(true));
}

#[test]
fn cgroup_v1_shows_the_containers_own_cgroups() {
    let world = World::with(|world| {
        world.host.cgroup = CgroupHost::V1(vec![
            ("/sys/fs/cgroup/memory".into(), "memory".into()),
            ("/sys/fs/cgroup/cpu,cpuacct".into(), "cpu,cpuacct".into()),
        ]);
        world.join = CgroupJoin::V1(vec![
            "/sys/fs/cgroup/memory/pod/c".into(),
            "/sys/fs/cgroup/cpu,cpuacct/pod/c".into(),
        ]);
    });
    let built = world.build().unwrap();
    let cgroup = at(&built, "/sys/fs/cgroup");
    assert!(cgroup.attributes.readonly);
    let expected = MountSource::CgroupV1(vec![
        ("/sys/fs/cgroup/memory/pod/c".into(), "memory".into()),
        (
            "/sys/fs/cgroup/cpu,cpuacct/pod/c".into(),
            "cpu,cpuacct".into(),
        ),
    ]);
    assert_eq!(cgroup.source, expected);
}

#[test]
fn a_volume_wins_over_the_runtimes_own_mount() {
    let world = World::with(|world| {
        world.config.mounts = vec![
            volume("/etc/hosts", "/srv/hosts"),
            volume("//dev/./shm/", "/srv/shm"),
            volume("/sys", "/sys"),
        ];
    });
    let built = world.build().unwrap();
    assert_eq!(
        bound_from(at(&built, "/etc/hosts")),
        Path::new("/srv/hosts")
    );
    assert_eq!(bound_from(at(&built, "/dev/shm")), Path::new("/srv/shm"));
    assert_eq!(bound_from(at(&built, "/sys")), Path::new("/sys"));
    at(&built, "/sys/fs/cgroup");
    assert!(!built.plan.devices.is_empty());
}

#[test]
fn a_volume_at_dev_brings_its_own_devices() {
    let below = |world: &World| -> Vec<String> {
        let built = world.build().unwrap();
        // No node may be made: that would be the node's own /dev.
        assert!(built.plan.devices.is_empty());
        let mounts = built.plan.mounts.into_iter();
        let below = mounts.filter(|mount| mount.target.starts_with("/dev/"));
        below.map(|mount| mount.target).collect()
    };
    let mut world = World::with(|world| world.config.mounts = vec![volume("/dev/", "/dev")]);
    assert_eq!(below(&world), [""; 0], "a volume without the directories");
    world.prepared.below_dev = vec!["mqueue", "pts", "shm"];
    assert_eq!(below(&world), ["/dev/pts", "/dev/mqueue", "/dev/shm"]);
    let built = world.build().unwrap();
    assert_eq!(at(&built, "/dev/shm").source, MountSource::PodShm);
    let place = |target: &str| {
        let mounts = &built.plan.mounts;
        mounts.iter().position(|mount| mount.target == target)
    };
    assert!(place("/dev") < place("/dev/shm"));
    world.config.mounts.push(volume("/dev/shm", "/srv/shm"));
    let built = world.build().unwrap();
    assert_eq!(bound_from(at(&built, "/dev/shm")), Path::new("/srv/shm"));
}

#[test]
fn nothing_of_the_runtimes_own_is_mounted_on_the_node() {
    for (parent, child) in [
        ("/dev", "/dev/shm"),
        ("/etc", "/etc/hosts"),
        ("/sys", "/sys/fs/cgroup"),
    ] {
        let mut world = World::with(|world| world.config.mounts = vec![volume(parent, parent)]);
        world.prepared.below_dev = vec!["shm"];
        at(&world.build().unwrap(), child);
        world.config.mounts[0].propagation = Propagation::HostToContainer;
        at(&world.build().unwrap(), child);
        world.config.mounts[0].propagation = Propagation::Bidirectional;
        let built = world.build().unwrap();
        let mut mounts = built.plan.mounts.iter();
        assert!(mounts.all(|mount| mount.target != child), "{child}");
    }
}

#[test]
fn attributes_and_propagation_of_volumes() {
    let world = World::with(|world| {
        let mut slave = volume("/slave", "/srv");
        slave.propagation = Propagation::HostToContainer;
        let mut ro = volume("/ro", "/srv/../srv/x/");
        ro.readonly = true;
        ro.recursive_read_only = true;
        ro.mount_options = vec!["noexec".to_owned(), "suid".to_owned()];
        world.config.mounts = vec![slave, ro];
    });
    let built = world.build().unwrap();
    assert_eq!(built.plan.root_propagation, MountPropagation::Slave);
    let MountSource::Bind {
        propagation,
        recursive,
        ..
    } = &at(&built, "/slave").source
    else {
        panic!()
    };
    assert!(*recursive);
    assert_eq!(*propagation, MountPropagation::Slave);
    let ro = at(&built, "/ro");
    assert_eq!(bound_from(ro), Path::new("/srv/x"));
    let expected = MountAttributes {
        readonly: true,
        recursive_readonly: true,
        noexec: true,
        ..MountAttributes::default()
    };
    assert_eq!(ro.attributes, expected);
    let linux = built.spec.linux().as_ref().unwrap();
    assert_eq!(linux.rootfs_propagation().as_deref(), Some("rslave"));
    let shared = World::with(|world| {
        let mut shared = volume("/shared", "/srv");
        shared.propagation = Propagation::Bidirectional;
        world.config.mounts = vec![shared];
    });
    let plan = shared.build().unwrap().plan;
    assert_eq!(plan.root_propagation, MountPropagation::Shared);
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn malformed_mounts() {
    type Change = fn(&mut Mount);
    let cases: [(&str, Change, Kind, &str); 18] = [
        (
            "relative target",
            |m| m.container_path = "data".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "no target",
            |m| m.container_path.clear(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "the root",
            |m| m.container_path = "/x/..".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "NUL",
            |m| m.container_path = "/x\0".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "procfs",
            |m| m.container_path = "/proc".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "in procfs",
            |m| m.container_path = "/proc/sys/x".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "into procfs",
            |m| m.container_path = "/a/../proc/1".into(),
            Kind::InvalidArgument,
            "container_path",
        ),
        (
            "relative source",
            |m| m.host_path = "srv".into(),
            Kind::InvalidArgument,
            "host_path",
        ),
        (
            "no source",
            |m| m.host_path.clear(),
            Kind::InvalidArgument,
            "host_path",
        ),
        (
            "source with NUL",
            |m| m.host_path = "/a\0".into(),
            Kind::InvalidArgument,
            "host_path",
        ),
        (
            "rro, not ro",
            |m| m.recursive_read_only = true,
            Kind::InvalidArgument,
            "recursive_read_only",
        ),
        (
            "rro with propagation",
            |m| {
                m.recursive_read_only = true;
                m.readonly = true;
                m.propagation = Propagation::HostToContainer;
            },
            Kind::InvalidArgument,
            "recursive_read_only",
        ),
        (
            "option",
            |m| m.mount_options = vec!["bind".into()],
            Kind::InvalidArgument,
            "mount_options",
        ),
        (
            "contradiction",
            |m| m.mount_options = vec!["exec".into(), "noexec".into()],
            Kind::InvalidArgument,
            "mount_options",
        ),
        (
            "sub path",
            |m| m.image_sub_path = "x".into(),
            Kind::InvalidArgument,
            "image_sub_path",
        ),
        (
            "image and path",
            |m| m.image = Some(ImageSpec::default()),
            Kind::InvalidArgument,
            "host_path",
        ),
        (
            "image",
            |m| {
                m.host_path.clear();
                m.image = Some(ImageSpec {
                    image: "volume:1".into(),
                    ..ImageSpec::default()
                });
            },
            Kind::FailedPrecondition,
            "mounts[0].image: \"volume:1\"",
        ),
        (
            "id mappings",
            |m| {
                m.uid_mappings = vec![crate::base::security::IdMapping {
                    host_id: 1,
                    container_id: 0,
                    length: 1,
                }];
            },
            Kind::InvalidArgument,
            "mounts[0].uidMappings: \"1 of users, 0 of groups\"",
        ),
    ];
    for (name, change, kind, field) in cases {
        let mut mount = volume("/data", "/srv");
        change(&mut mount);
        let error = World::with(|world| world.config.mounts = vec![mount])
            .build()
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{name}: {error}");
        assert!(error.to_string().contains(field), "{name}: {error}");
    }
    for good in ["/proc/cpuinfo", "/proc/uptime"] {
        assert!(
            World::with(|w| w.config.mounts = vec![volume(good, "/srv")])
                .build()
                .is_ok()
        );
    }
    assert!(
        World::with(|w| w.config.mounts = vec![volume("/proc", "/proc/")])
            .build()
            .is_ok()
    );
}

#[test]
fn recursive_readonly_needs_linux_5_12() {
    let world = World::with(|world| {
        let mut mount = volume("/data", "/srv");
        mount.readonly = true;
        mount.recursive_read_only = true;
        world.config.mounts = vec![mount];
        world.host.kernel = (5, 11);
    });
    let error = world.build().unwrap_err();
    assert!(error.to_string().starts_with("RROUnsupported"), "{error}");
}

#[test]
fn image_volumes_with_their_layers() {
    let mut mount = volume("/data", "");
    mount.image = Some(ImageSpec::default());
    mount.image_sub_path = "sub".to_owned();
    let layers = RootfsLayers {
        lower: vec!["/layers/v".into()],
    };
    let mut world = World::with(|world| world.image_volumes = vec![(0, layers)]);
    world.config.mounts = vec![mount.clone()];
    assert!(world.build().unwrap_err().to_string().contains("readonly"));
    world.config.mounts[0].readonly = true;
    let built = world.build().unwrap();
    let expected = MountSource::Image {
        lower: vec!["/layers/v".into()],
        sub_path: "sub".to_owned(),
    };
    assert_eq!(at(&built, "/data").source, expected);
    assert!(at(&built, "/data").attributes.readonly);
}

#[test]
fn volumes_that_the_image_declares() {
    let world = World::with(|world| {
        world.image.config.volumes = [
            "/var/lib/data",
            "relative",
            "/a",
            "/var/lib/data/",
            "/mounted",
            "/mounted/below",
            "/sys/fs/cgroup",
            "/proc",
            "/dev/shm",
            "/../escape",
        ]
        .map(ToOwned::to_owned)
        .to_vec();
        world.config.mounts = vec![volume("/mounted", "/srv")];
    });
    let built = world.build().unwrap();
    let expected = ["/a", "/escape", "/relative", "/var/lib/data"];
    let volumes = &built.plan.declared_volumes;
    assert_eq!(
        volumes
            .iter()
            .map(|(_, path)| path.as_str())
            .collect::<Vec<_>>(),
        expected
    );
    assert_eq!(volumes[3].0, PathBuf::from("/own/volumes/3"));
    assert!(lines(&built).contains(&"/a bind rbind,rprivate".to_owned()));
    for bad in ["/", "/x/..", "", "/a\0b"] {
        let world = World::with(|world| world.image.config.volumes = vec![bad.to_owned()]);
        assert!(world.build().is_err(), "{bad:?}");
    }
}

//! Whole plans and specs, row by row.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::base::container::{Mount, Propagation};
use crate::base::error::{HasKind as _, Kind};
use crate::base::handler::Handler;
use crate::base::image::ImageSpec;
use crate::base::security::{SecurityProfile, SelinuxOptions};
use crate::runtime::cgroups::devices::{DeviceKind, DeviceRule};
use crate::runtime::plan::{MountAttributes, MountPlan, MountSource, NamespaceSource, UserName};
use crate::runtime::seccomp::Profile;
use crate::runtime::spec::devices::HostDevice;
use crate::runtime::spec::host::CgroupHost;

mod edits;

/// A node with everything and cgroup v2.
pub(crate) fn host() -> HostFacts {
    HostFacts {
        cgroup: CgroupHost::V2,
        kernel: (6, 12),
        seccomp_actions: [
            "kill_process",
            "kill_thread",
            "trap",
            "errno",
            "user_notif",
            "trace",
            "log",
            "allow",
        ]
        .map(ToOwned::to_owned)
        .to_vec(),
        apparmor: false,
        selinux: false,
        last_capability: 40,
        bounding: u64::MAX >> 23,
        min_oom_score_adj: -1000,
        max_open_files: 1 << 20,
        hugepage_sizes: vec!["2MB".to_owned(), "1GB".to_owned()],
    }
}

/// All that an input borrows.
struct World {
    pod: PodConfig,
    config: ContainerConfig,
    image: Image,
    layers: RootfsLayers,
    host: HostFacts,
    prepared: Prepared,
    join: CgroupJoin,
    target: Option<ContainerId>,
    image_volumes: Vec<(usize, RootfsLayers)>,
    edits: Vec<crate::base::edits::Edits>,
    handler: Handler,
}

fn id(digit: &str) -> ContainerId {
    digit.repeat(64).parse().unwrap()
}

impl Default for World {
    fn default() -> Self {
        Self {
            pod: PodConfig::default(),
            config: ContainerConfig {
                command: vec!["true".to_owned()],
                ..ContainerConfig::default()
            },
            image: Image::default(),
            layers: RootfsLayers {
                lower: vec!["/layers/b".into(), "/layers/a".into()],
            },
            host: host(),
            prepared: Prepared::default(),
            join: CgroupJoin::V2("/sys/fs/cgroup/pod/container".into()),
            target: None,
            image_volumes: vec![],
            edits: vec![],
            handler: Handler::default(),
        }
    }
}

impl World {
    fn with(change: impl FnOnce(&mut Self)) -> Self {
        let mut world = Self::default();
        change(&mut world);
        world
    }

    fn build(&self) -> Result<Built> {
        let input = ContainerInput {
            pod_id: "b".repeat(64).parse().unwrap(),
            pod: &self.pod,
            pod_directory: Path::new("/run/pods/b"),
            config: &self.config,
            image: &self.image,
            layers: &self.layers,
            upper: Path::new("/own/upper"),
            work: Path::new("/own/work"),
            volatile: true,
            volumes_directory: Path::new("/own/volumes"),
            cgroup_join: self.join.clone(),
            cgroup_path: "/pod/container",
            hostname: "pod",
            target: self.target,
            image_volumes: &self.image_volumes,
            prepared: &self.prepared,
            edits: &self.edits,
            handler: &self.handler,
        };
        container(&input, &self.host)
    }

    fn sandbox(&self) -> Result<Built> {
        let input = SandboxInput {
            id: "b".repeat(64).parse().unwrap(),
            pod: &self.pod,
            cgroup_join: self.join.clone(),
            cgroup_path: "/pod/pause",
            hostname: "pod",
            prepared: &self.prepared,
        };
        sandbox(&input, &self.host)
    }
}

fn volume(container_path: &str, host_path: &str) -> Mount {
    Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.to_owned(),
        ..Mount::default()
    }
}

fn at<'a>(built: &'a Built, target: &str) -> &'a MountPlan {
    let found: Vec<_> = built
        .plan
        .mounts
        .iter()
        .filter(|mount| mount.target == target)
        .collect();
    assert_eq!(found.len(), 1, "{target}: {found:?}");
    found[0]
}

fn bound_from(mount: &MountPlan) -> &Path {
    match &mount.source {
        MountSource::Bind { path, .. } => path,
        other => panic!("{other:?}"),
    }
}

/// Each mount as a line: `target type options`, from the spec.
fn lines(built: &Built) -> Vec<String> {
    let mounts = built.spec.mounts().as_ref().unwrap();
    mounts
        .iter()
        .map(|mount| {
            format!(
                "{} {} {}",
                mount.destination().display(),
                mount.typ().as_deref().unwrap_or_default(),
                mount.options().as_deref().unwrap_or_default().join(",")
            )
        })
        .collect()
}

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
    let world = World::with(|world| world.config.mounts = vec![volume("/dev", "/dev")]);
    let built = world.build().unwrap();
    let below = |mount: &&MountPlan| mount.target.starts_with("/dev/");
    assert_eq!(built.plan.mounts.iter().find(below), None);
    // No node may be made: that would be the node's own /dev.
    assert!(built.plan.devices.is_empty());
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
    let expected = [
        "/dev/null",
        "/dev/zero",
        "/dev/full",
        "/dev/random",
        "/dev/urandom",
        "/dev/tty",
        "/dev/kvm",
    ];
    assert_eq!(names, expected);
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
fn namespaces_follow_the_pod() {
    use NamespaceMode::{Container, Node, Pod, Target};
    use NamespaceSource as Source;
    let build = |pod: NamespaceMode, own: NamespaceMode, target| {
        World::with(|world| {
            world.pod.security.namespaces.pid = pod;
            world.config.security.namespaces.pid = own;
            world.target = target;
        })
        .build()
        .map(|built| built.plan.namespaces.pid)
        .map_err(|error| error.kind())
    };
    let bad = Kind::InvalidArgument;
    assert_eq!(build(Pod, Pod, None), Ok(Source::Pod));
    assert_eq!(build(Container, Pod, None), Ok(Source::Pod));
    assert_eq!(build(Container, Container, None), Ok(Source::New));
    assert_eq!(build(Node, Pod, None), Ok(Source::Host));
    assert_eq!(build(Node, Node, None), Ok(Source::Host));
    assert_eq!(build(Pod, Node, None), Err(bad));
    assert_eq!(build(Pod, Target, None), Err(bad));
    let joined = Source::Container(id("c").to_string());
    assert_eq!(build(Pod, Target, Some(id("c"))), Ok(joined));

    let network = |pod: NamespaceMode, own: NamespaceMode| {
        World::with(|world| {
            world.pod.security.namespaces.network = pod;
            world.config.security.namespaces.network = own;
        })
        .build()
        .map(|built| (built.plan.namespaces.network, built.plan.namespaces.uts))
        .map_err(|error| error.kind())
    };
    assert_eq!(network(Pod, Pod), Ok((Source::Pod, Source::Pod)));
    assert_eq!(network(Node, Pod), Ok((Source::Host, Source::Host)));
    assert_eq!(network(Node, Node), Ok((Source::Host, Source::Host)));
    assert_eq!(network(Pod, Node), Err(bad));
    assert_eq!(network(Pod, Container), Err(bad));

    let ipc = World::with(|world| world.pod.security.namespaces.ipc = Node)
        .build()
        .unwrap();
    assert_eq!(ipc.plan.namespaces.ipc, Source::Host);
    assert_eq!(bound_from(at(&ipc, "/dev/shm")), Path::new("/dev/shm"));
    let stray = World::with(|world| {
        world.config.security.namespaces.target_id = "abc".to_owned();
    });
    assert!(stray.build().is_err());
}

#[test]
fn paths_of_namespaces_are_filled_in() {
    let world = World::with(|world| {
        world.config.security.namespaces.pid = NamespaceMode::Target;
        world.target = Some(id("c"));
    });
    let mut built = world.build().unwrap();
    oci::join(&mut built.spec, &built.plan, 100, Some(200));
    let linux = built.spec.linux().as_ref().unwrap();
    let shown: Vec<String> = linux
        .namespaces()
        .as_ref()
        .unwrap()
        .iter()
        .map(|namespace| {
            let path = namespace.path().clone().unwrap_or_default();
            format!("{} {}", namespace.typ(), path.display())
        })
        .collect();
    let expected = [
        "pid /proc/200/ns/pid",
        "ipc /proc/100/ns/ipc",
        "uts /proc/100/ns/uts",
        "mnt ",
        "net /proc/100/ns/net",
        "cgroup ",
    ];
    assert_eq!(shown, expected);
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

    let selinux = |enabled| {
        World::with(|world| {
            world.config.security.selinux = Some(SelinuxOptions {
                level: "s0:c1,c2".to_owned(),
                ..SelinuxOptions::default()
            });
            world.host.selinux = enabled;
        })
        .build()
        .map(|built| built.plan.process.selinux)
        .map_err(|error| error.kind())
    };
    assert_eq!(selinux(false), Ok(String::new()));
    assert_eq!(selinux(true), Err(Kind::Unimplemented));
}

#[test]
fn what_is_not_built_or_wrong_names_its_field() {
    type Change = fn(&mut World);
    let cases: [(Change, Kind, &str); 7] = [
        (
            |w| {
                w.config.security.namespaces.user =
                    Some(crate::base::security::UserNamespace::default());
            },
            Kind::InvalidArgument,
            "userns_options",
        ),
        (
            |w| w.config.command.clear(),
            Kind::InvalidArgument,
            "command",
        ),
        (
            |w| w.config.working_dir = "tmp".into(),
            Kind::InvalidArgument,
            "working_dir",
        ),
        (
            |w| w.config.security.run_as_group = Some(1),
            Kind::InvalidArgument,
            "run_as_group",
        ),
        (
            |w| w.image.config.user = "-1".into(),
            Kind::InvalidArgument,
            "image config User",
        ),
        (
            |w| w.config.resources.cpu_period = 1,
            Kind::InvalidArgument,
            "cpu_period: \"1\"",
        ),
        (
            |w| w.config.stop_signal = Some(99),
            Kind::InvalidArgument,
            "stop_signal: \"99\"",
        ),
    ];
    for (change, kind, part) in cases {
        let error = World::with(change).build().unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn limits_and_process_settings() {
    let world = World::with(|world| {
        let resources = &mut world.config.resources;
        resources.memory_limit = 1 << 20;
        resources.cpu_quota = -1;
        resources.cpu_shares = 1;
        resources.oom_score_adj = -997;
        resources
            .unified
            .insert("memory.high".into(), "1000".into());
        world.host.min_oom_score_adj = -100;
        world.host.max_open_files = 4096;
        world.config.tty = true;
        world.config.security.no_new_privs = true;
        world.config.security.run_as_user = Some(1000);
    });
    let built = world.build().unwrap();
    let process = &built.plan.process;
    assert_eq!(process.oom_score_adj, Some(-100));
    assert_eq!(process.rlimits, [(7, 1024, 4096)]);
    assert!(process.terminal && process.no_new_privs);
    assert_eq!(process.user.user, UserName::Id(1000));
    assert_eq!(built.resources.memory_swap_limit, 1 << 20);
    assert_eq!(built.resources.oom_score_adj, -100);
    let shown = serde_json::to_value(&built.spec).unwrap();
    assert_eq!(shown["linux"]["resources"]["memory"]["limit"], 1 << 20);
    assert_eq!(shown["linux"]["resources"]["memory"]["swap"], 1 << 20);
    assert_eq!(shown["linux"]["resources"]["cpu"]["shares"], 2);
    assert_eq!(
        shown["linux"]["resources"]["unified"]["memory.high"],
        "1000"
    );
    assert_eq!(shown["linux"]["cgroupsPath"], "/pod/container");
    assert_eq!(shown["process"]["oomScoreAdj"], -100);
    assert_eq!(shown["process"]["rlimits"][0]["type"], "RLIMIT_NOFILE");
    assert_eq!(shown["process"]["user"]["uid"], 1000);
    let bounding = shown["process"]["capabilities"]["bounding"]
        .as_array()
        .unwrap();
    assert!(bounding.contains(&"CAP_AUDIT_WRITE".into()), "{bounding:?}");
    assert_eq!(
        shown["annotations"]["io.kubernetes.cri.container-type"],
        "container"
    );
    let again: oci_spec::runtime::Spec = serde_json::from_value(shown).unwrap();
    assert_eq!(again, built.spec);
}

#[test]
fn execs_are_like_the_first_process() {
    let world = World::with(|world| {
        world.config.security.no_new_privs = true;
        world.prepared.seccomp = Some(Profile::runtime_default());
    });
    let plan = world.build().unwrap().plan;
    let made = exec(&plan, vec!["ls".to_owned()], true).unwrap();
    assert_eq!(made.cgroup, plan.cgroup);
    let process = &made.process;
    assert_eq!(process.args, ["ls"]);
    assert!(process.terminal);
    assert!(process.env.contains(&b"TERM=xterm".to_vec()));
    let same = ProcessPlan {
        args: plan.process.args.clone(),
        env: plan.process.env.clone(),
        terminal: false,
        ..process.clone()
    };
    assert_eq!(same, plan.process);
    let plain = exec(&plan, vec!["ls".to_owned()], false).unwrap();
    assert_eq!(plain.process.env, plan.process.env);
    for bad in [vec![], vec![String::new()], vec!["a\0".to_owned()]] {
        assert!(exec(&plan, bad, false).is_err());
    }
}

#[test]
fn sandboxes() {
    let world = World::with(|world| {
        world.pod.security.seccomp = Some(SecurityProfile::RuntimeDefault);
        world.pod.security.run_as_user = Some(65534);
        world.pod.security.supplemental_groups = vec![7];
        world.prepared.seccomp = Some(Profile::runtime_default());
    });
    let built = world.sandbox().unwrap();
    let plan = &built.plan;
    assert_eq!(plan.hostname, "pod");
    assert_eq!(plan.rootfs, Rootfs::Pause { shm_size: 64 << 20 });
    assert_eq!(plan.sysctls.len(), 2);
    assert_eq!(plan.process.capabilities, CapabilityMasks::default());
    assert_eq!(plan.process.user.user, UserName::Id(65534));
    assert_eq!(plan.process.user.additional_groups, [7]);
    assert_eq!(plan.process.oom_score_adj, Some(-998));
    assert!(plan.process.no_new_privs && plan.process.seccomp.is_some());
    assert!(plan.process.args.is_empty() && plan.mounts.is_empty());
    let shown = serde_json::to_value(&built.spec).unwrap();
    assert_eq!(
        shown["annotations"]["io.kubernetes.cri.container-type"],
        "sandbox"
    );
    assert_eq!(
        shown["linux"]["sysctl"]["net.ipv4.ping_group_range"],
        "0 2147483647"
    );
    assert_eq!(shown["root"]["readonly"], true);

    let node = World::with(|world| {
        world.pod.security.namespaces.network = NamespaceMode::Node;
        world.pod.security.namespaces.ipc = NamespaceMode::Node;
    });
    let plan = node.sandbox().unwrap().plan;
    assert_eq!(plan.rootfs, Rootfs::Pause { shm_size: 0 });
    assert!(plan.hostname.is_empty() && plan.sysctls.is_empty());
    let group = World::with(|world| world.pod.security.run_as_group = Some(5));
    assert_eq!(group.sandbox().unwrap_err().kind(), Kind::InvalidArgument);
}

#[test]
fn host_names() {
    for good in ["pod", "web-0.example.org", &"a".repeat(64), ""] {
        assert!(check_hostname(good).is_ok(), "{good}");
    }
    for bad in ["a b", "a\n", "a/b", "a:b", &"a".repeat(65)] {
        assert!(check_hostname(bad).is_err(), "{bad}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever paths are mounted, what is above comes before what is below.
    #[test]
    fn mounts_are_sorted(paths in prop::collection::vec("(/[a-c.]{1,2}){1,4}/?", 0..10)) {
        let mounts: Vec<Mount> = paths.iter().map(|path| volume(path, "/srv")).collect();
        let root = |path: &String| mounts::clean(path) == "/";
        prop_assume!(!paths.iter().any(root));
        let built = World::with(|world| world.config.mounts = mounts).build().unwrap();
        let targets: Vec<&str> =
            built.plan.mounts.iter().map(|mount| mount.target.as_str()).collect();
        for (index, target) in targets.iter().enumerate() {
            for later in &targets[index + 1..] {
                prop_assert!(
                    target == later || !mounts::is_below(target, later),
                    "{target} before {later}"
                );
            }
        }
        for path in &paths {
            prop_assert!(targets.contains(&mounts::clean(path).as_str()));
        }
    }

    /// Labels and annotations of pod, container and image are data.
    #[test]
    fn annotations_change_nothing(
        key in "[a-z./-]{1,30}|io\\.kubernetes\\.cri-o\\.[A-Za-z]{1,12}|cdi\\.k8s\\.io/[a-z]{1,8}",
        value in "\\PC{0,20}",
    ) {
        let plain = World::default();
        let map: BTreeMap<String, String> = [(key, value)].into();
        let annotated = World::with(|world| {
            world.pod.annotations = map.clone();
            world.pod.labels = map.clone();
            world.config.annotations = map.clone();
            world.config.labels = map.clone();
            world.image.spec.annotations = map.clone();
            world.config.image.annotations = map;
        });
        for (a, b) in [
            (plain.build().unwrap(), annotated.build().unwrap()),
            (plain.sandbox().unwrap(), annotated.sandbox().unwrap()),
        ] {
            prop_assert_eq!(a.plan, b.plan);
            // The spec shows them, that is all.
            let mut shown = b.spec;
            shown.set_annotations(a.spec.annotations().clone());
            prop_assert_eq!(a.spec, shown);
            prop_assert_eq!(a.device_rules, b.device_rules);
        }
    }
}

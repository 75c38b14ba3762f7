//! Whole plans and specs, row by row.

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::base::container::{Mount, Propagation};
use crate::base::error::{HasKind as _, Kind};
use crate::base::handler::Handler;
use crate::base::image::ImageSpec;
use crate::base::security::{SecurityProfile, SelinuxLabels};
use crate::runtime::cgroups::devices::{DeviceKind, DeviceRule};
use crate::runtime::plan::{MountAttributes, MountPlan, MountSource, NamespaceSource, UserName};
use crate::runtime::seccomp::Profile;
use crate::runtime::spec::devices::HostDevice;
use crate::runtime::spec::host::CgroupHost;

mod bundles;
mod edits;
mod handlers;
mod rights;
mod volumes;

/// A node with everything and cgroup v2.
pub(crate) fn host() -> HostFacts {
    HostFacts {
        cgroup: CgroupHost::V2,
        nsdelegate: true,
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
        last_capability: 40,
        bounding: u64::MAX >> 23,
        min_oom_score_adj: -1000,
        max_open_files: 1 << 20,
        nr_open: 1 << 20,
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
            id: id("c"),
            pod_id: "b".repeat(64).parse().unwrap(),
            pod: &self.pod,
            pod_directory: Path::new("/run/pods/b"),
            config: &self.config,
            image: &self.image,
            layers: &self.layers,
            upper: Path::new("/own/upper"),
            work: Path::new("/own/work"),
            volatile: true,
            empty_layer: Path::new("/own/empty"),
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
            handler: &self.handler,
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
    let user = ProcessUser {
        uid: 1000,
        gid: 1001,
        groups: vec![1001, 7],
        home: b"/home/app".to_vec(),
    };
    let run = |words, terminal| exec(&plan, user.clone(), words, terminal);
    let made = run(vec!["ls".to_owned()], true).unwrap();
    // Not looked up again, nor by an OCI runtime.
    assert_eq!(made.user, user);
    assert_eq!(made.cgroup, plan.cgroup);
    let process = &made.process;
    assert_eq!(process.args, ["ls"]);
    assert!(process.terminal);
    assert!(process.env.contains(&b"TERM=xterm".to_vec()));
    assert!(process.env.contains(&b"HOME=/home/app".to_vec()));
    let same = ProcessPlan {
        args: plan.process.args.clone(),
        env: plan.process.env.clone(),
        terminal: false,
        ..process.clone()
    };
    assert_eq!(same, plan.process);
    let plain = run(vec!["ls".to_owned()], false).unwrap();
    let env = [plan.process.env.clone(), vec![b"HOME=/home/app".to_vec()]].concat();
    assert_eq!(plain.process.env, env);
    let given = World::with(|world| {
        world.config.envs = vec![("HOME".to_owned(), b"/given".to_vec())];
    });
    let given = given.build().unwrap().plan;
    let kept = exec(&given, user.clone(), vec!["ls".to_owned()], false).unwrap();
    assert_eq!(kept.process.env, given.process.env);
    for bad in [vec![], vec![String::new()], vec!["a\0".to_owned()]] {
        assert!(run(bad, false).is_err());
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
    assert!(plan.process.args.is_empty());
    // For the containers that share its PID namespace.
    let places = |plan: &Plan| {
        plan.mounts
            .iter()
            .map(|mount| mount.target.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(places(plan), ["/proc"]);
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
        world.pod.security.namespaces.pid = NamespaceMode::Container;
    });
    let plan = node.sandbox().unwrap().plan;
    assert!(plan.mounts.is_empty());
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

//! What a handler's keys make of a container.

use super::*;
use crate::runtime::external::abilities::Abilities;
use crate::runtime::spec::base_spec::Base;
use crate::runtime::spec::bundle;

fn with_base(text: &str, change: impl FnOnce(&mut World)) -> Result<Built> {
    let mut world = World::with(change);
    world.handler.name = "h".to_owned();
    let base = Base::read("runtimes.h.base_runtime_spec", text).unwrap();
    world.prepared.base = base.under(&world.config);
    world.edits = vec![world.prepared.base.edits.clone()];
    world.build()
}

#[test]
fn a_base_spec_counts_where_the_pod_says_nothing() {
    const BASE: &str = r#"{"ociVersion":"1.2.0","root":{"readonly":true},
        "mounts":[{"destination":"/data","type":"tmpfs"}],
        "linux":{"maskedPaths":["/proc/version"],"resources":{"memory":{"limit":1000},"pids":{"limit":9}}}}"#;
    let built = with_base(BASE, |world| {
        world.config.security.masked_paths = vec!["/proc/kcore".to_owned()];
        world.config.resources.memory_limit = 5000;
    })
    .unwrap();
    assert_eq!(built.resources.memory_limit, 5000);
    assert_eq!(built.resources.pids_limit, 9);
    assert!(built.plan.mounts.iter().any(|one| one.target == "/data"));
    assert!(
        built
            .plan
            .masked_paths
            .contains(&"/proc/version".to_owned())
    );
    let Rootfs::Overlay { readonly, .. } = built.plan.rootfs else {
        panic!("{:?}", built.plan.rootfs);
    };
    assert!(readonly);
    // procMount: Unmasked, and its limit for who has none.
    let built = with_base(BASE, |_| {}).unwrap();
    assert!(built.plan.masked_paths.is_empty());
    assert_eq!(built.resources.memory_limit, 1000);
}

#[test]
fn memory_limits_have_a_floor() {
    let limited = |limit| {
        World::with(|world| {
            world.handler.name = "h".to_owned();
            world.handler.min_memory = 4096;
            world.config.resources.memory_limit = limit;
        })
        .build()
    };
    for limit in [-1, 0, 4096, 5000] {
        assert!(limited(limit).is_ok(), "{limit}");
    }
    let error = limited(4095).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert_eq!(
        error.to_string(),
        "memory_limit_in_bytes: \"4095\" bytes are too few: runtimes.h.container_min_memory is 4096; \
         raise the container's memory limit"
    );
}

#[test]
fn cgroups_are_writable_only_where_that_is_safe() {
    let built = |change: fn(&mut HostFacts)| {
        let world = World::with(|world| {
            world.handler.name = "h".to_owned();
            world.handler.cgroup_writable = true;
            change(&mut world.host);
        });
        (world.sandbox().err(), world.build())
    };
    let (sandbox, container) = built(|_| {});
    assert!(sandbox.is_none());
    let container = container.unwrap();
    let mount = |target: &str| {
        let mut all = container.plan.mounts.iter();
        all.find(|one| one.target == target).unwrap()
    };
    assert!(!mount("/sys/fs/cgroup").attributes.readonly);
    assert!(mount("/sys").attributes.readonly);
    for (change, part) in [
        (
            (|host| host.cgroup = CgroupHost::V1(vec![])) as fn(&mut HostFacts),
            "this node has v1",
        ),
        (|host| host.nsdelegate = false, "without nsdelegate"),
    ] {
        let (sandbox, container) = built(change);
        for error in [sandbox.unwrap(), container.unwrap_err()] {
            let text = error.to_string();
            assert!(
                text.starts_with("runtimes.h.cgroup_writable: ") && text.contains(part),
                "{text}"
            );
        }
    }
}

#[test]
fn execs_of_a_container_with_its_own_cpus_are_told_where_to_run() {
    let affinity = |on| {
        let built = World::with(|world| {
            world.handler.exec_on_first_cpu = on;
            world.config.resources.cpuset_cpus = "3-4".to_owned();
            world.config.resources.cpu_shares = 2048;
        });
        let shown = serde_json::to_value(&built.build().unwrap().spec).unwrap();
        shown["process"]["execCPUAffinity"].clone()
    };
    assert!(affinity(false).is_null());
    assert_eq!(
        affinity(true),
        serde_json::json!({"initial": "3", "final": "3"})
    );
}

#[test]
fn an_oci_runtime_gets_its_own_view() {
    let built = World::with(|world| {
        world
            .config
            .annotations
            .insert("secret".to_owned(), "x".to_owned());
    });
    let built = built.build().unwrap();
    let hidden = &built.hidden_annotations;
    let text = bundle::config(
        &built.spec,
        &built.plan,
        Path::new("/bundle"),
        hidden,
        &Abilities::default(),
    )
    .unwrap();
    let whole = format!("{}{{}}{}", text.head, text.tail);
    let config: serde_json::Value = serde_json::from_str(&whole).unwrap();
    // No sandbox of its making: nothing speaks of one.
    let annotations = config["annotations"].as_object().unwrap();
    assert!(annotations.contains_key("io.kubernetes.cri.container-name"));
    for key in [
        "secret",
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ] {
        assert!(!annotations.contains_key(key), "{key}");
    }
    assert_eq!(config["linux"]["rootfsPropagation"], "private");
}

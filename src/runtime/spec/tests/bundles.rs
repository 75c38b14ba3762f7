//! What an OCI runtime is told.

use serde_json::{Value, json};

use super::*;
use crate::base::security::{IdMapping, UserNamespace};
use crate::runtime::external::abilities::Abilities;
use crate::runtime::plan::DeviceNode;
use crate::runtime::spec::bundle;

/// `config.json`; the gap for the user is filled.
fn config(built: &Built) -> Value {
    let text = bundle::config(
        &built.spec,
        &built.plan,
        Path::new("/bundle"),
        &[],
        &Abilities::default(),
    )
    .unwrap();
    serde_json::from_str(&[&text.head, "{}", &text.tail].concat()).unwrap()
}

fn mount_at<'a>(config: &'a Value, target: &str) -> &'a Value {
    let mut all = config["mounts"].as_array().unwrap().iter();
    let found = all.find(|mount| mount["destination"] == target);
    found.unwrap_or_else(|| panic!("{target}: {config}"))
}

/// A container with one of each kind of mount, a device under another name and a volume of the image.
fn world(owned: bool) -> World {
    World::with(|world| {
        let ids = vec![IdMapping {
            host_id: 65536,
            container_id: 0,
            length: 65536,
        }];
        let user = owned.then(|| UserNamespace {
            mode: NamespaceMode::Pod,
            uids: ids.clone(),
            gids: ids.clone(),
        });
        world.pod.security.namespaces.user.clone_from(&user);
        world.config.security.namespaces.user = user;
        world.config.mounts = vec![
            Mount {
                readonly: true,
                ..volume("/plain", "/host/plain")
            },
            Mount {
                uid_mappings: ids.clone(),
                gid_mappings: ids,
                ..volume("/mapped", "/host/mapped")
            },
            Mount {
                propagation: Propagation::HostToContainer,
                ..volume("/slave", "/host/slave")
            },
        ];
        world.image.config.volumes = vec!["/declared".to_owned()];
        world.prepared.devices = vec![HostDevice {
            node: DeviceNode {
                path: "/dev/other".to_owned(),
                host_path: "/dev/fuse".into(),
                block: false,
                major: 10,
                minor: 229,
                mode: 0o666,
                uid: 0,
                gid: 0,
            },
            permissions: "rw".to_owned(),
        }];
    })
}

#[test]
fn in_a_user_namespace_what_is_the_nodes_comes_from_the_bundle() {
    let built = world(true).build().unwrap();
    let config = config(&built);
    let number = |target: &str| {
        let mut mounts = built.plan.mounts.iter();
        mounts.position(|mount| mount.target == target).unwrap()
    };
    for (target, kind, propagation) in [
        ("/plain", "rbind", "rprivate"),
        ("/mapped", "rbind", "rprivate"),
        ("/slave", "rbind", "rslave"),
        ("/etc/hosts", "rbind", "rprivate"),
    ] {
        let wanted = json!({"destination": target, "type": "bind", "options": [kind, propagation],
            "source": format!("/bundle/mount-{}", number(target))});
        assert_eq!(mount_at(&config, target), &wanted);
    }
    let wanted = json!({"destination": "/dev/shm", "type": "bind", "options": ["bind"],
        "source": format!("/bundle/mount-{}", number("/dev/shm"))});
    assert_eq!(mount_at(&config, "/dev/shm"), &wanted);
    assert_eq!(mount_at(&config, "/declared")["source"], "/bundle/volume-0");
    let index = built.plan.devices.len() - 1;
    assert_eq!(
        mount_at(&config, "/dev/other")["source"],
        format!("/bundle/device-{index}")
    );
    // The runtime makes its own mounts itself.
    assert_eq!(mount_at(&config, "/proc")["type"], "proc");
    let linux = &config["linux"];
    let devices = linux["devices"].as_array().unwrap();
    assert!(devices.iter().any(|one| one["path"] == "/dev/null"));
    assert!(devices.iter().all(|one| one["path"] != "/dev/other"));
    assert!(linux.get("uidMappings").is_none() && linux.get("gidMappings").is_none());
}

#[test]
fn elsewhere_only_what_the_runtime_could_not_mount() {
    let built = world(false).build().unwrap();
    let config = config(&built);
    let plain = mount_at(&config, "/plain");
    assert_eq!(plain["source"], "/host/plain");
    assert!(plain["options"].as_array().unwrap().contains(&json!("ro")));
    let staged = |target: &str| {
        let source = mount_at(&config, target)["source"].as_str().unwrap();
        source.starts_with("/bundle/mount-")
    };
    for (target, wanted) in [
        ("/slave", true),
        ("/mapped", false),
        ("/dev/shm", true),
        ("/etc/hosts", false),
        ("/declared", false),
    ] {
        assert_eq!(staged(target), wanted, "{target}");
    }
    let mappings = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
    assert_eq!(mount_at(&config, "/mapped")["uidMappings"], mappings);
    let mounts = config["mounts"].as_array().unwrap();
    assert!(mounts.iter().all(|one| one["destination"] != "/dev/other"));
    let devices = config["linux"]["devices"].as_array().unwrap();
    assert!(devices.iter().any(|one| one["path"] == "/dev/other"));
}

/// A mount of cgroup2 in the node's cgroup namespace would change its options for the whole node.
#[test]
fn the_nodes_cgroups_are_bound() {
    let privileged = World::with(|world| {
        world.config.security.privileged = true;
        world.pod.security.privileged = true;
    });
    let config = config(&privileged.build().unwrap());
    let cgroups = mount_at(&config, "/sys/fs/cgroup");
    assert_eq!(
        (&cgroups["type"], &cgroups["source"]),
        (&json!("bind"), &json!("/sys/fs/cgroup"))
    );
    let options = cgroups["options"].as_array().unwrap();
    assert!(options.contains(&json!("bind")) && options.contains(&json!("nosuid")));
    let plain = self::config(&World::with(|_| {}).build().unwrap());
    assert_eq!(mount_at(&plain, "/sys/fs/cgroup")["type"], "cgroup");
}

//! Cgroups of both versions and groups of resctrl are joined.

use super::*;
use crate::runtime::cgroups::scratch::Scratch;

#[test]
fn old_control_groups() {
    let base = Path::new("/sys/fs/cgroup");
    let hierarchies: Vec<&str> = ["freezer", "pids"]
        .into_iter()
        .filter(|name| base.join(name).join("cgroup.procs").exists())
        .collect();
    if hierarchies.is_empty() {
        return; // A machine with cgroup v2 only.
    }
    let image = Image::new();
    let name = format!("berth-test-init-{}", std::process::id());
    let _scratch = Scratch::named(&name);
    let directories: Vec<PathBuf> = hierarchies
        .iter()
        .map(|hierarchy| made(base.join(hierarchy).join(&name)))
        .collect();
    let mut plan = plan(
        &image,
        "cat /proc/self/cgroup | grep -E 'freezer|pids' | grep -c ':/$'; ls /sys/fs/cgroup; cat /sys/fs/cgroup/*/cgroup.procs | wc -l; touch /sys/fs/cgroup/x || mkdir /sys/fs/cgroup/freezer/y || echo ro",
    );
    plan.cgroup = CgroupJoin::V1(directories.clone());
    let list = directories
        .iter()
        .cloned()
        .zip(hierarchies.iter().map(|h| (*h).to_owned()));
    plan.mounts.push(MountPlan {
        target: "/sys/fs/cgroup".to_owned(),
        source: MountSource::CgroupV1(list.collect()),
        attributes: MountAttributes {
            readonly: true,
            ..MountAttributes::default()
        },
    });
    let count = hierarchies.len();
    run(&plan, |outcome| {
        let text = outcome.text();
        assert!(
            text.starts_with(&format!("{count}\n{}\n", hierarchies.join("\n"))),
            "{text}"
        );
        assert!(text.ends_with("ro"), "{text}");
    });
    for directory in directories {
        fs::remove_dir(directory).unwrap();
    }
}

/// A plain file stands for the kernel's.
#[test]
fn groups_of_resctrl_are_joined() {
    let image = Image::new();
    let group = made(image.host("group"));
    let mut plan = plan(&image, "echo in");
    plan.process.resctrl = vec![group.clone()];
    run(&plan, |outcome| {
        let fault = outcome.refused();
        assert!(fault.starts_with("rdt: write"), "{fault}");
    });
    write(&group.join("tasks"), "");
    run(&plan, |outcome| assert_eq!(outcome.text(), "in"));
    assert_eq!(fs::read_to_string(group.join("tasks")).unwrap(), "0");
}

#[test]
fn the_unified_hierarchy_is_entered_at_the_clone() {
    let Some(base) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|base| base.join("cgroup.controllers").exists())
    else {
        panic!("no cgroup v2 hierarchy is mounted");
    };
    let image = Image::new();
    let name = format!("berth-test-init2-{}", std::process::id());
    let _scratch = Scratch::named(&name);
    let directory = made(base.join(name));
    let mut plan = plan(&image, "grep ^0:: /proc/self/cgroup");
    plan.cgroup = CgroupJoin::V2(directory.clone());
    run(&plan, |outcome| assert_eq!(outcome.text(), "0::/"));
    plan.namespaces.cgroup = NamespaceSource::Host;
    let want = format!("0::/{}", directory.strip_prefix(base).unwrap().display());
    run(&plan, |outcome| assert_eq!(outcome.text(), want));
    let mut gone = plan.clone();
    gone.cgroup = CgroupJoin::V2(base.join("berth-test-missing"));
    in_forked_child(|| {
        let fault = spawn_in(&NO_POD, &gone).0.unwrap_err();
        assert!(fault.to_string().starts_with("cgroup: open"), "{fault}");
    });
    fs::remove_dir(directory).unwrap();
}

/// The hierarchy of cgroup v2 is one for the node: what a container mounts leaves its options alone.
#[test]
fn the_nodes_cgroup2_keeps_its_options() {
    let of_node = || {
        let mounts = host_mounts();
        let line = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        line.map(|line| line.split_once(" - ").unwrap().1.to_owned())
    };
    let Some(before) = of_node() else {
        return; // A machine with cgroup v1 only.
    };
    let image = Image::new();
    let mut plan = plan(
        &image,
        "grep ' - cgroup2 ' /proc/self/mountinfo; ls /sys/fs/cgroup/cgroup.procs; mkdir /sys/fs/cgroup/x || echo ro",
    );
    let own = "/proc/self/ns/cgroup";
    // As of a plugin's mount. It is not set: then every mount without it would pass for one that does nothing.
    assert!(!before.contains("memory_localevents"), "{before}");
    let options = [("memory_localevents", "")];
    plan.mounts
        .push(filesystem("cgroup2", "/sys/fs/cgroup", &options, true));
    for cgroup in [
        NamespaceSource::Host,
        NamespaceSource::Path(own.into()),
        NamespaceSource::New,
    ] {
        plan.namespaces.cgroup = cgroup;
        run(&plan, |outcome| {
            let text = outcome.text();
            let shown = text.lines().next().unwrap();
            assert!(shown.contains(" / /sys/fs/cgroup ro,nosuid"), "{text}");
            assert!(!shown.contains("shared:"), "{text}");
            assert!(text.ends_with("ro"), "{text}");
        });
        assert_eq!(of_node().as_ref(), Some(&before), "{:?}", plan.namespaces);
    }
}

/// Queues of an IPC namespace that is not the pod's get no label: without SELinux none can be given at all.
#[test]
fn the_nodes_queues_keep_their_label() {
    let image = Image::new();
    let mut plan = plan(&image, "ls -d /dev/mqueue");
    plan.rootfs = Rootfs::Directory {
        path: image.root(),
        readonly: false,
    };
    plan.mounts = vec![filesystem("mqueue", "/dev/mqueue", &[], false)];
    plan.mount_label = "system_u:object_r:container_file_t:s0".to_owned();
    plan.namespaces.ipc = NamespaceSource::Path("/proc/self/ns/ipc".into());
    run(&plan, |outcome| assert_eq!(outcome.text(), "/dev/mqueue"));
    plan.namespaces.ipc = NamespaceSource::Host;
    run(&plan, |outcome| assert_eq!(outcome.text(), "/dev/mqueue"));
    plan.namespaces.ipc = NamespaceSource::New;
    run(&plan, |outcome| {
        let refused = outcome.refused();
        assert!(refused.starts_with("label: fsetxattr"), "{refused}");
    });
}

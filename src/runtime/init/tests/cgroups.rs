//! Cgroups of both versions and groups of resctrl are joined.

use super::*;

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
    let directory = made(base.join(format!("berth-test-init2-{}", std::process::id())));
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

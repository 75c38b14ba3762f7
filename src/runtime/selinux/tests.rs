//! The pure parts, and relabelling of what is no SELinux filesystem too.

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;

use super::relabel::RelabelError;
use super::*;
use crate::base::security::SecurityProfile;

fn policy() -> Selinux {
    let label = |text| Label::parse(text).unwrap();
    Selinux {
        process: label("system_u:system_r:container_t:s0"),
        mount: label("system_u:object_r:container_file_t:s0"),
        unconfined: Some("system_u:system_r:spc_t:s0".to_owned()),
        confine_host_network: true,
    }
}

#[test]
fn labels_are_read_and_written() {
    for text in [
        "system_u:system_r:container_t:s0",
        "u:r:t",
        "u:object_r:t:s0:c1,c2",
        "u:r:t-x_y.z:s0-s15:c0.c1023",
    ] {
        let label = Label::parse(text).unwrap();
        assert_eq!(label.to_string(), text);
    }
    let label = Label::parse("u:r:t:s0:c1,c2").unwrap();
    assert_eq!((&*label.kind, &*label.level), ("t", "s0:c1,c2"));
    for text in [
        "",
        "u",
        "u:r",
        "u:r:",
        ":r:t",
        "u:r:t x:s0",
        "u:r:t:s0:",
        "u:r:t:s0\n",
        "u:r:t:0",
    ] {
        assert_eq!(Label::parse(text), None, "{text:?}");
    }
}

#[test]
fn levels_have_a_form() {
    for text in [
        "s0",
        "s15",
        "s0:c1",
        "s0:c1,c2",
        "s0:c0.c1023",
        "s0-s0:c0.c1023",
        "s0:c1-s15:c1,c3.c5",
    ] {
        assert!(label::is_level(text), "{text}");
    }
    for text in [
        "",
        "s",
        "0",
        "S0",
        "c1",
        "s0,c4,c5",
        "s0:",
        "s0:c",
        "s0:c1,",
        "s0:c1;c2",
        "s0:1",
        "s0-",
        "s0:c1.",
        "s0:c1.c2.c3",
        "s0-s1-s2",
        "s123456",
        "s0:c1 ",
        "s0\"",
    ] {
        assert!(!label::is_level(text), "{text}");
    }
}

#[test]
fn options_replace_parts_and_are_named_when_wrong() {
    let apply = |change: fn(&mut SelinuxOptions)| {
        let mut options = SelinuxOptions::default();
        change(&mut options);
        let mut label = policy().process;
        label
            .apply("f", &options)
            .map(|()| label.to_string())
            .map_err(|e| e.to_string())
    };
    assert_eq!(apply(|_| {}).unwrap(), "system_u:system_r:container_t:s0");
    assert_eq!(
        apply(|o| {
            "me_u".clone_into(&mut o.user);
            "me_r".clone_into(&mut o.role);
            "me_t".clone_into(&mut o.kind);
            "s0:c4,c5".clone_into(&mut o.level);
        })
        .unwrap(),
        "me_u:me_r:me_t:s0:c4,c5"
    );
    for (wrong, parts) in [
        (
            apply(|o| "s0,c4,c5".clone_into(&mut o.level)),
            ["f.level", "s0,c4,c5"],
        ),
        (apply(|o| "a:b".clone_into(&mut o.kind)), ["f.type", "a:b"]),
        (apply(|o| "a b".clone_into(&mut o.user)), ["f.user", "a b"]),
        (
            apply(|o| "a\n".clone_into(&mut o.role)),
            ["f.role", "is no name"],
        ),
    ] {
        let text = wrong.unwrap_err();
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn pairs_are_all_different_and_in_range() {
    let pairs: BTreeSet<_> = (0..10 * 9 / 2).map(levels::pair).collect();
    assert_eq!(pairs.len(), 45);
    assert!(
        pairs.iter().all(|(low, high)| low < high && *high < 10),
        "{pairs:?}"
    );
    assert_eq!(levels::pair(1024 * 1023 / 2 - 1), (1022, 1023));
}

#[test]
fn a_level_is_unique_while_it_is_held() {
    let levels = Levels::new(3);
    let named = levels.hold("s0:c0,c2");
    let again = levels.hold("s0:c0,c2");
    let first = levels.allocate("s0", u64::MAX).unwrap();
    let second = levels.allocate("s0", 7).unwrap();
    let have: BTreeSet<_> = [&named, &first, &second].map(Hold::level).into();
    assert_eq!(have, ["s0:c0,c1", "s0:c0,c2", "s0:c1,c2"].into());
    let error = levels.allocate("s0", 0).unwrap_err();
    assert_eq!(error.kind(), Kind::ResourceExhausted);
    assert!(error.to_string().contains("all 3 "), "{error}");
    drop(named);
    levels.allocate("s0", 0).unwrap_err();
    drop(again);
    assert_eq!(levels.allocate("s0", 0).unwrap().level(), "s0:c0,c2");
    // What was allocated in that line is free again; another sensitivity is another level.
    let third = levels.allocate("s0", 0).unwrap();
    assert_eq!(third.level(), "s0:c0,c2");
    assert_eq!(levels.allocate("s1", 0).unwrap().level(), "s1:c0,c1");
}

#[test]
fn what_is_shared_with_the_node_is_not_confined() {
    let mut policy = policy();
    let free = |policy: &Selinux, change: fn(&mut NamespaceOptions), kind: &str| {
        let mut namespaces = NamespaceOptions::default();
        change(&mut namespaces);
        let options = SelinuxOptions {
            kind: kind.to_owned(),
            level: "s0:c1".to_owned(),
            ..SelinuxOptions::default()
        };
        policy.is_free(&namespaces, Some(&options))
    };
    let pid: fn(&mut NamespaceOptions) = |n| n.pid = NamespaceMode::Node;
    let ipc: fn(&mut NamespaceOptions) = |n| n.ipc = NamespaceMode::Node;
    let network: fn(&mut NamespaceOptions) = |n| n.network = NamespaceMode::Node;
    assert!(!free(&policy, |_| {}, ""));
    assert!(free(&policy, pid, "") && free(&policy, ipc, ""));
    assert!(!free(&policy, pid, "my_t"));
    assert!(!free(&policy, network, ""));
    policy.confine_host_network = false;
    assert!(free(&policy, network, ""));
    assert!(!free(&policy, network, "my_t"));
}

#[test]
fn files_of_the_policy() {
    let text = "# process = \"x\"\nprocess = \"u:r:t:s0\"\n  file=u:object_r:f:s0\nprocessor = 1\nempty =\n";
    assert_eq!(value(text, "process"), Some("u:r:t:s0"));
    assert_eq!(value(text, "file"), Some("u:object_r:f:s0"));
    assert_eq!(value(text, "empty"), Some(""));
    assert_eq!(value(text, "ro_file"), None);
    assert_eq!(policy().sensitivity(), Some("s0"));
    assert_eq!(policy().shared("u:object_r:f:s0:c1,c2"), "u:object_r:f:s0");
    let bare = Label::parse("u:r:t").unwrap();
    assert_eq!(bare.unconfined("spc_t"), ["u:r:spc_t"]);
    assert_eq!(policy().process.unconfined("spc_t").len(), 2);
}

/// Where the kernel has no SELinux its attribute is stored as any other.
#[test]
fn a_tree_is_relabelled_and_links_are_not_followed() {
    let base = tempfile::tempdir().unwrap();
    let outside = base.path().join("outside");
    std::fs::File::create(&outside).unwrap();
    let top = base.path().join("volume");
    std::fs::create_dir_all(top.join("a/b")).unwrap();
    std::fs::File::create(top.join("a/b/file")).unwrap();
    symlink(&outside, top.join("link")).unwrap();
    symlink(&top, base.path().join("way")).unwrap();
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    let of = |path: &Path| {
        let mut value = [0; 256];
        let length = crate::sys::file::lgetxattr(path, "security.selinux", &mut value[..]).ok()?;
        let text = String::from_utf8_lossy(&value[..length]).into_owned();
        Some(text.trim_end_matches('\0').to_owned())
    };
    let before = of(&outside);
    relabel(&base.path().join("way"), label, &mut || false).unwrap();
    for path in ["", "a", "a/b", "a/b/file", "link"] {
        assert_eq!(of(&top.join(path)).as_deref(), Some(label), "{path}");
    }
    assert_eq!(of(&outside), before);
    // A single file, and once more.
    relabel(&top.join("a/b/file"), "u:object_r:f:s0", &mut || false).unwrap();
    assert_eq!(
        of(&top.join("a/b/file")).as_deref(),
        Some("u:object_r:f:s0")
    );
    relabel(&top, label, &mut || false).unwrap();
    assert_eq!(of(&top.join("a/b/file")).as_deref(), Some(label));
}

#[test]
fn any_depth_is_relabelled_but_not_what_is_mounted() {
    use crate::sys::descent::tests::{Place, file, in_own_mounts, mount_tmpfs, nest, open};
    let place = Place::new();
    let top = place.made("volume");
    let bottom = nest(&top, 1500, "d");
    file(&bottom, "file", 1);
    let mounted = place.made("volume/mounted");
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    let of = |at: std::os::fd::BorrowedFd<'_>| {
        let path = format!(
            "/proc/self/fd/{}/file",
            std::os::fd::AsRawFd::as_raw_fd(&at)
        );
        let mut value = [0; 256];
        let length = crate::sys::file::lgetxattr(&*path, "security.selinux", &mut value[..]);
        String::from_utf8_lossy(&value[..length.unwrap_or(0)]).into_owned()
    };
    let beside = in_own_mounts(move || {
        mount_tmpfs(&mounted);
        file(&open(&mounted), "file", 1);
        relabel(&top, label, &mut || false).unwrap();
        let error = relabel(&top, "u:object_r:f:s0", &mut || true).unwrap_err();
        assert!(matches!(error, RelabelError::Stopped(_)), "{error}");
        of(std::os::fd::AsFd::as_fd(&open(&mounted)))
    });
    assert_eq!(
        of(std::os::fd::AsFd::as_fd(&bottom)).trim_end_matches('\0'),
        label
    );
    assert_eq!(beside, "");
}

#[test]
fn directories_of_the_node_are_refused_by_any_name() {
    let base = tempfile::tempdir().unwrap();
    symlink("/usr", base.path().join("usr")).unwrap();
    for path in [
        Path::new("/"),
        Path::new("/etc/"),
        Path::new("/usr/../usr"),
        &base.path().join("usr"),
    ] {
        let error = relabel(path, "u:object_r:f:s0", &mut || false).unwrap_err();
        assert!(matches!(error, RelabelError::System(_)), "{error}");
        assert_eq!(error.kind(), Kind::InvalidArgument);
    }
    let error = relabel(&base.path().join("none"), "u:object_r:f:s0", &mut || false).unwrap_err();
    assert!(
        matches!(error, RelabelError::Call { call: "open", .. }),
        "{error}"
    );
}

#[test]
fn privileged_containers_are_not_confined_but_their_options_are_checked_for_form() {
    let security = ContainerSecurity {
        privileged: true,
        selinux: Some(SelinuxOptions {
            level: "s0,c4".to_owned(),
            ..SelinuxOptions::default()
        }),
        seccomp: Some(SecurityProfile::Unconfined),
        ..ContainerSecurity::default()
    };
    let of_pod = SelinuxLabels {
        process: String::new(),
        mount: "system_u:object_r:container_file_t:s0:c1,c2".to_owned(),
    };
    let error = policy()
        .of_container(&PodConfig::default(), &of_pod, &security)
        .unwrap_err();
    assert!(
        error.to_string().contains("selinux_options.level"),
        "{error}"
    );
}

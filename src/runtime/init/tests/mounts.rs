//! Volumes, images as volumes, hidden paths, hostile images.

use super::*;

#[test]
fn a_directory_as_root_and_many_layers() {
    let image = Image::new();
    let mut plan_of = plan(&image, "ls /; echo x > /etc/new || echo readonly");
    plan_of.rootfs = Rootfs::Directory {
        path: image.root(),
        readonly: true,
    };
    run(&plan_of, |outcome| {
        assert!(outcome.text().ends_with("readonly"), "{outcome:?}");
    });
    let mut lower = Vec::new();
    for number in 0..40 {
        let layer = made(image.host(&format!("a-layer-with-a-long-name-{number}")));
        write(&layer.join(format!("from-{number}")), "");
        lower.push(layer);
    }
    lower.push(image.root());
    let mut layered = plan(&image, "ls / | grep -c from");
    layered.rootfs = Rootfs::Overlay {
        lower,
        upper: Some(made(image.host("upper"))),
        work: made(image.host("work")),
        volatile: true,
        readonly: true,
    };
    run(&layered, |outcome| assert_eq!(outcome.text(), "40"));
}

#[test]
fn volumes_of_every_kind() {
    let image = Image::new();
    let data = made(image.host("data"));
    write(&data.join("file"), "content\n");
    symlink("/run", image.root().join("var-run")).unwrap();
    symlink("../../../../../../outside", image.root().join("up")).unwrap();
    let mut all = plan(
        &image,
        "cat /a/b/c/file /single /run/x/file /outside/file; echo w >> /rw/file; echo w >> /ro/file || echo ro; \
         grep /opts /proc/mounts | grep -c ' ro,nosuid,nodev,noexec,noatime'; cat /small/of/tmp; ls /vol; stat -c %a:%u /vol /vol/kept",
    );
    let mut readonly = bind(&data, "/ro");
    readonly.attributes.readonly = true;
    let mut options = bind(&data, "/opts");
    options.attributes = MountAttributes {
        readonly: true,
        nosuid: true,
        nodev: true,
        noexec: true,
        noatime: true,
        ..MountAttributes::default()
    };
    write(&image.host("single"), "one\n");
    all.mounts.extend([
        bind(&data, "/a/b/c"),
        bind(&image.host("single"), "/single"),
        bind(&data, "/var-run/x"),
        bind(&data, "/up"),
        bind(&data, "/rw"),
        readonly,
        options,
        filesystem("tmpfs", "/small", &[("size", "16k")], false),
        bind(&image.host("single"), "/small/of/tmp"),
    ]);
    image.write("vol/kept", "from the image\n");
    fs::set_permissions(image.root().join("vol"), fs::Permissions::from_mode(0o1770)).unwrap();
    let owner =
        |path: &str, id| std::os::unix::fs::chown(image.root().join(path), Some(id), Some(id));
    owner("vol", 7).unwrap();
    owner("vol/kept", 1000).unwrap();
    symlink("/etc/passwd", image.root().join("vol/link")).unwrap();
    let volume = made(image.host("volume"));
    all.declared_volumes = vec![(volume.clone(), "/vol".to_owned())];
    run(&all, |outcome| {
        assert_eq!(
            outcome.text(),
            "content\none\ncontent\ncontent\nsh: can't create /ro/file: Read-only file system\nro\n\
             1\none\nkept\nlink\n1770:7\n644:1000"
        );
    });
    assert_eq!(
        fs::read_to_string(data.join("file")).unwrap(),
        "content\nw\n"
    );
    assert_eq!(
        fs::read_to_string(volume.join("kept")).unwrap(),
        "from the image\n"
    );
    assert_eq!(fs::symlink_metadata(volume.join("link")).unwrap().uid(), 0);
    assert!(!image.base.path().join("outside").exists());
}

#[test]
fn propagation() {
    let image = Image::new();
    let shared = made(image.host("shared"));
    let private = made(image.host("private"));
    in_forked_child(|| {
        // A namespace of the test's own, in which mounts may be shared at will.
        ns::unshare(ns::flag::MOUNT).unwrap();
        crate::sys::mount::make_all_private().unwrap();
        let mount = |at: &Path, shared: bool| {
            let tmpfs = crate::sys::mount::Filesystem::open("tmpfs")
                .unwrap()
                .mount(0)
                .unwrap();
            let place = fs::File::open(at).unwrap();
            crate::sys::mount::attach(tmpfs.as_fd(), place.as_fd()).unwrap();
            let change = crate::sys::mount::Change {
                propagation: if shared {
                    crate::sys::mount::propagation::SHARED
                } else {
                    crate::sys::mount::propagation::PRIVATE
                },
                ..Default::default()
            };
            crate::sys::mount::change(tmpfs.as_fd(), &change).unwrap();
        };
        mount(&shared, true);
        mount(&private, false);
        fs::create_dir(shared.join("in")).unwrap();
        fs::create_dir(shared.join("out")).unwrap();
        let with = |wanted, path: &Path, script: &str| {
            let mut plan = plan(&image, script);
            let mut volume = bind(path, "/v");
            if let MountSource::Bind { propagation, .. } = &mut volume.source {
                *propagation = wanted;
            }
            plan.mounts.push(volume);
            plan
        };
        for wanted in [MountPropagation::Shared, MountPropagation::Slave] {
            let outcome = run_in(&NO_POD, &with(wanted, &private, "true"));
            assert!(
                outcome.refused().contains("is not on a shared"),
                "{outcome:?}"
            );
        }
        // Bidirectional: what the container mounts is seen here.
        let script = "mount -t tmpfs x /v/out && touch /v/out/file";
        let outcome = run_in(&NO_POD, &with(MountPropagation::Shared, &shared, script));
        assert_eq!(outcome.text(), "");
        assert!(shared.join("out/file").exists());
        // Host to container: what is mounted here later is seen there, not the other way round.
        let script = "while ! test -e /v/in/late; do sleep 0.02; done; mount -t tmpfs x /v/in; touch /v/in/mine; ls /v/in";
        let (spawned, reader) = spawn_in(&NO_POD, &with(MountPropagation::Slave, &shared, script));
        let mut spawned = spawned.unwrap();
        start(&mut spawned);
        mount(&shared.join("in"), false);
        write(&shared.join("in/late"), "");
        let mut text = String::new();
        std::io::Read::read_to_string(&mut fs::File::from(reader), &mut text).unwrap();
        assert_eq!(text, "mine\n");
        assert!(!shared.join("in/mine").exists());
        assert_eq!(process::wait(spawned.pidfd.as_fd()).unwrap(), Exit::Code(0));
        // Recursive read-only: the mount below too.
        let mut plan = with(
            MountPropagation::Private,
            &shared,
            "touch /v/in/x || touch /v/x || echo ro",
        );
        plan.mounts.last_mut().unwrap().attributes.readonly = true;
        let outcome = run_in(&NO_POD, &plan);
        assert_eq!(outcome.text(), "");
        plan.mounts
            .last_mut()
            .unwrap()
            .attributes
            .recursive_readonly = true;
        let outcome = run_in(&NO_POD, &plan);
        assert!(outcome.text().ends_with("\nro"), "{outcome:?}");
    });
}

#[test]
fn masked_and_readonly_paths() {
    let image = Image::new();
    image.write("secret/file", "secret\n");
    let mut masked = plan(
        &image,
        "cat /proc/timer_list /etc/passwd; ls /sys/firmware /secret; echo 1 > /proc/sys/kernel/printk || echo ro; \
         touch /secret/x || echo ro; touch /etc/x || echo ro",
    );
    let paths = [
        "/proc/timer_list",
        "/etc/passwd",
        "/sys/firmware",
        "/secret",
        "/missing",
        "/etc/passwd/below",
    ];
    masked.masked_paths = paths.map(str::to_owned).to_vec();
    masked.readonly_paths = ["/proc/sys", "/etc", "/nothing"]
        .map(str::to_owned)
        .to_vec();
    // The image's /dev/null is a link: no mask comes from there.
    fs::create_dir_all(image.root().join("dev")).unwrap();
    symlink("/etc/group", image.root().join("dev/null")).unwrap();
    run(&masked, |outcome| {
        let text = outcome.text();
        let text = text
            .lines()
            .filter(|line| !line.contains("Read-only file system"));
        assert_eq!(
            text.collect::<Vec<_>>(),
            ["/secret:", "", "/sys/firmware:", "ro", "ro", "ro"]
        );
    });
}

#[test]
fn links_in_the_image_do_not_reach_the_host() {
    for (link, text) in [
        ("dev", "/outside"),
        ("dev", "../../outside"),
        ("etc", "/outside"),
        ("etc", "../../../../../../outside"),
    ] {
        let image = Image::new();
        let outside = made(image.host("outside"));
        let _gone = fs::remove_dir_all(image.root().join(link));
        symlink(text, image.root().join(link)).unwrap();
        write(&image.host("hosts"), "hosts\n");
        let mut plan = plan(&image, "cat /etc/hosts; test -c /dev/null && echo node");
        plan.mounts.push(bind(&image.host("hosts"), "/etc/hosts"));
        run(&plan, |outcome| assert_eq!(outcome.text(), "hosts\nnode"));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }
    for link in ["proc", "sys"] {
        let image = Image::new();
        symlink("/tmp", image.root().join(link)).unwrap();
        run(&plan(&image, "true"), |outcome| {
            let want = format!("mount: open without links /{link}: ");
            assert!(outcome.refused().starts_with(&want), "{outcome:?}");
        });
    }
}

#[test]
fn refused_mount_points_and_sources() {
    let image = Image::new();
    let data = made(image.host("data"));
    for (mount, want) in [
        (bind(&data, "/"), "is the root of the container"),
        (bind(&data, "/x/.."), "is the root of the container"),
        (bind(&data, "/proc"), "is inside /proc"),
        (bind(&data, "/proc/sys/net"), "is inside /proc"),
        (
            bind(&image.host("missing"), "/x"),
            "missing: No such file or directory",
        ),
        (
            bind(&data, "/etc/passwd"),
            "is no directory in the container, its source is a directory",
        ),
        (
            filesystem("nosuchfs", "/x", &[], false),
            "fsopen nosuchfs: No such device",
        ),
        (
            filesystem("tmpfs", "/x", &[("size", "abc")], false),
            "fsconfig tmpfs size=abc",
        ),
    ] {
        let mut plan = plan(&image, "true");
        plan.mounts.push(mount);
        run(&plan, |outcome| {
            let refused = outcome.refused();
            assert!(refused.contains(want), "{refused:?} has no {want:?}");
            assert_eq!(outcome.exit, Exit::Code(127));
            assert_eq!(outcome.ready, None);
        });
    }
    let mut over = plan(&image, "cat /proc/uptime");
    write(&image.host("uptime"), "forever\n");
    over.mounts
        .push(bind(&image.host("uptime"), "/proc/uptime"));
    run(&over, |outcome| assert_eq!(outcome.text(), "forever"));
}

#[test]
fn image_volumes() {
    let image = Image::new();
    let (one, two) = (made(image.host("one")), made(image.host("two")));
    write(&one.join("a/file"), "a\n");
    write(&two.join("a/other"), "b\n");
    symlink("/a", one.join("inside")).unwrap();
    symlink("../../../../../..", one.join("outside")).unwrap();
    let volume = |lower: &[&PathBuf], sub_path: &str| {
        let mut plan = plan(&image, "ls /v; touch /v/x || echo ro");
        plan.mounts.push(MountPlan {
            target: "/v".to_owned(),
            source: MountSource::Image {
                lower: lower.iter().map(|path| (*path).clone()).collect(),
                sub_path: sub_path.to_owned(),
            },
            attributes: MountAttributes {
                readonly: true,
                ..MountAttributes::default()
            },
        });
        plan
    };
    let check = |lower: &[&PathBuf], sub_path: &str, want: &str| {
        run(&volume(lower, sub_path), |outcome| {
            let text = outcome
                .text()
                .replace("touch: /v/x: Read-only file system\n", "");
            assert_eq!(text, want, "{sub_path}");
        });
    };
    check(&[&one, &two], "", "a\ninside\noutside\nro");
    check(&[&one, &two], "a", "file\nother\nro");
    check(&[&one], "a", "file\nro");
    check(&[&one, &two], "inside", "file\nother\nro");
    check(&[&one, &two], "outside/a", "file\nother\nro");
    for bad in ["none", "a/file"] {
        run(&volume(&[&one, &two], bad), |outcome| {
            assert!(
                outcome
                    .refused()
                    .starts_with("ImageVolumeMountFailed: openat2"),
                "{outcome:?}"
            );
        });
    }
}

#[test]
fn ids_of_a_volume_are_mapped() {
    let image = Image::new();
    let data = made(image.host("data"));
    write(&data.join("file"), "x");
    std::os::unix::fs::chown(data.join("file"), Some(5), Some(6)).unwrap();
    let mut mapped = plan(&image, "stat -c %u:%g /v/file");
    let mut volume = bind(&data, "/v");
    if let MountSource::Bind {
        uid_mappings,
        gid_mappings,
        ..
    } = &mut volume.source
    {
        *uid_mappings = vec![(0, 1000, 10)];
        *gid_mappings = vec![(0, 2000, 5), (5, 3005, 5)];
    }
    mapped.mounts.push(volume);
    run(&mapped, |outcome| assert_eq!(outcome.text(), "1005:3006"));
}

#[test]
fn an_overlay_by_mount_2() {
    let image = Image::new();
    let (upper, work) = (made(image.host("up,per:")), made(image.host("wo,rk")));
    let lower = [made(image.host("lo:wer\\,")), image.root()];
    write(&lower[0].join("from-the-odd-one"), "");
    in_forked_child(|| {
        ns::unshare(ns::flag::MOUNT).unwrap();
        crate::sys::mount::make_all_private().unwrap();
        let both = Some((upper.as_path(), work.as_path()));
        let root = crate::runtime::init::rootfs::overlay_by_path(&lower, both, true, "").unwrap();
        let list = |name: &str| rustix::fs::statat(&root, name, rustix::fs::AtFlags::empty());
        list("from-the-odd-one").unwrap();
        list("etc/passwd").unwrap();
        rustix::fs::mkdirat(&root, "new", 0o755.into()).unwrap();
        assert!(
            crate::runtime::init::rootfs::overlay_by_path(
                &vec![image.root(); 200],
                None,
                false,
                ""
            )
            .is_err()
        );
    });
    assert!(upper.join("new").is_dir());
}

/// Another process exchanges a directory of a shared volume with a link to the host while containers mount below it
/// (CVE-2021-30465): nothing appears outside, whichever comes first.
#[test]
fn a_racing_neighbour_does_not_lead_outside() {
    let image = Image::new();
    let volume = made(image.host("volume"));
    let outside = made(image.host("outside"));
    let data = made(image.host("data"));
    fs::create_dir(volume.join("a")).unwrap();
    symlink("../../../../../../../outside", volume.join("b")).unwrap();
    let before = host_mounts();
    in_forked_child(|| {
        let racer = crate::sys::clone::clone(0, None, &[], || {
            loop {
                let _exchanged = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    volume.join("a"),
                    rustix::fs::CWD,
                    volume.join("b"),
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        })
        .unwrap();
        let mut plan = plan(&image, "true");
        plan.mounts.push(bind(&volume, "/volume"));
        plan.mounts.push(bind(&data, "/volume/a/deep/er"));
        plan.mounts.push(bind(&data, "/volume/b/deep/er"));
        for _ in 0..60 {
            // Either of the two may win, or the loser be told so.
            let _either = run_in(&NO_POD, &plan);
        }
        process::send_signal(racer.pidfd.as_fd(), signal::SIGKILL).unwrap();
        process::wait(racer.pidfd.as_fd()).unwrap();
    });
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert_eq!(host_mounts(), before);
}

/// What a VOLUME of the image is filled with comes from the container's root, wherever a link leads (CVE-2022-23648).
#[test]
fn a_declared_volume_behind_a_link_copies_nothing_of_the_node() {
    for (link, volume) in [
        ("{}", "/data"),
        ("../../../../../..{}", "/data"),
        ("/proc/1/root{}", "/data"),
        ("{}", "/data/.."),
        ("/", "/data{}"),
    ] {
        let image = Image::new();
        let outside = made(image.host("outside"));
        write(&outside.join("secret"), "of the node\n");
        let shown = outside.display().to_string();
        symlink(link.replace("{}", &shown), image.root().join("data")).unwrap();
        let mut plan = plan(&image, "cat /data/secret 2>/dev/null || echo none");
        let own = made(image.host("volume"));
        plan.declared_volumes = vec![(own.clone(), volume.replace("{}", &shown))];
        run(&plan, |outcome| {
            if outcome.fault.is_none() {
                assert_eq!(outcome.text(), "none", "{link} {volume}");
            }
        });
        for copied in [own.join("secret"), own.join("outside/secret")] {
            assert!(!copied.exists(), "{link} {volume}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    }
}

/// Sysctls are written to a procfs that is mounted nowhere: what lies at `/proc` is nothing to us (CVE-2025-52881).
#[test]
fn sysctls_are_not_written_by_a_path_of_the_container() {
    const FILE: &str = "sys/net/ipv4/ip_unprivileged_port_start";
    let image = Image::new();
    image.write(&format!("proc/{FILE}"), "of the image\n");
    let cover = made(image.host("cover"));
    write(&cover.join("ip_unprivileged_port_start"), "of a volume\n");
    let mut plan = plan(&image, &format!("cat /proc/{FILE} /real/{FILE}"));
    plan.mounts.retain(|mount| mount.target != "/proc");
    plan.mounts.push(filesystem("proc", "/real", &[], false));
    plan.sysctls = vec![(
        "net.ipv4.ip_unprivileged_port_start".to_owned(),
        "77".to_owned(),
    )];
    run(&plan, |outcome| {
        assert_eq!(outcome.text(), "of the image\n77");
    });
    plan.mounts.push(bind(&cover, "/proc/sys/net/ipv4"));
    run(&plan, |outcome| {
        assert_eq!(outcome.text(), "of a volume\n77");
    });
    let kept = fs::read_to_string(cover.join("ip_unprivileged_port_start"));
    assert_eq!(kept.unwrap(), "of a volume\n");
}

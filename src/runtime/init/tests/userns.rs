//! Pods with a user namespace: what the kernel shows from inside and from outside.

use super::*;
use crate::runtime::cgroups::scratch::Scratch;
use crate::runtime::userns::{self, Made};

const SIZE: u32 = 65536;
const FIRST: u32 = 200_000;
const GROUP: u32 = 300_000;

fn maps() -> (IdMappings, IdMappings) {
    (vec![(0, FIRST, SIZE)], vec![(0, GROUP, SIZE)])
}

fn namespaces() -> Made {
    let (uids, gids) = maps();
    userns::make(&uids, &gids, true).unwrap()
}

/// The process goes on as this one; the one before ends.
pub(super) fn moved(spawned: Spawned, pid: u32, pidfd: OwnedFd) -> Spawned {
    readable(spawned.pidfd.as_fd());
    let _code = process::wait(spawned.pidfd.as_fd()).unwrap();
    create::proceed(spawned.control.as_fd()).unwrap();
    Spawned {
        pid,
        pidfd,
        ..spawned
    }
}

fn settled(spawned: Result<Spawned, Fault>) -> Spawned {
    let spawned = spawned.unwrap();
    match receive(&spawned) {
        Received::Moved { pid, pidfd } => moved(spawned, pid, pidfd),
        other => panic!("{other:?}"),
    }
}

fn owned(mut plan: Plan, source: NamespaceSource) -> Plan {
    plan.namespaces.user = source;
    let (uids, gids) = maps();
    (plan.namespaces.uid_mappings, plan.namespaces.gid_mappings) = (uids, gids);
    if let Rootfs::Overlay {
        upper: Some(upper), ..
    } = &plan.rootfs
    {
        std::os::unix::fs::chown(upper, Some(FIRST), Some(GROUP)).unwrap();
    }
    plan
}

pub(super) fn member(image: &Image, script: &str) -> Plan {
    let mut member = plan(image, script);
    member.namespaces.network = NamespaceSource::Pod;
    member.namespaces.ipc = NamespaceSource::Pod;
    member.namespaces.uts = NamespaceSource::Pod;
    member.mounts.push(MountPlan {
        target: "/dev/shm".to_owned(),
        source: MountSource::PodShm,
        attributes: MountAttributes::default(),
    });
    owned(member, NamespaceSource::Pod)
}

/// Runs `work` in a pod whose pause runs.
pub(super) fn in_pod(image: &Image, work: impl FnOnce(&Pod<'_>)) {
    let before = host_mounts();
    in_forked_child(|| {
        let made = namespaces();
        let pod = Pod {
            network: made.network.as_ref(),
            user: Some(&made.user),
            ..NO_POD
        };
        let plan = owned(
            sandbox(image, NamespaceSource::New),
            NamespaceSource::Passed,
        );
        let pause = settled(spawn_in(&pod, &plan).0);
        assert!(matches!(receive(&pause), Received::Closed), "pause runs");
        work(&Pod {
            pause: Some(&pause),
            ..pod
        });
        process::send_signal(pause.pidfd.as_fd(), signal::SIGTERM).unwrap();
        readable(pause.pidfd.as_fd());
        assert_eq!(process::wait(pause.pidfd.as_fd()).unwrap(), Exit::Code(0));
    });
    assert_eq!(host_mounts(), before);
}

/// Every file with owner, mode and time of change.
fn listing(directory: &Path) -> Vec<(PathBuf, u32, u32, u32, i64, i64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let status = fs::symlink_metadata(&path).unwrap();
        if status.is_dir() {
            found.extend(listing(&path));
        }
        let (uid, gid, mode) = (status.uid(), status.gid(), status.mode());
        found.push((path, uid, gid, mode, status.ctime(), status.ctime_nsec()));
    }
    found.sort();
    found
}

fn volume(image: &Image, name: &str, mapped: bool) -> MountPlan {
    let mut volume = bind(&made(image.host(name)), &format!("/{name}"));
    if let (
        true,
        MountSource::Bind {
            uid_mappings,
            gid_mappings,
            ..
        },
    ) = (mapped, &mut volume.source)
    {
        (*uid_mappings, *gid_mappings) = maps();
    }
    volume
}

#[test]
fn files_have_their_owners_inside_and_out() {
    let image = Image::new();
    image.write("etc/owned", "layer\n");
    std::os::unix::fs::chown(image.root().join("etc/owned"), Some(1000), Some(1001)).unwrap();
    let layer = listing(&image.root());
    in_pod(&image, |pod| {
        let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; \
            stat -c '%n %u:%g' / /bin/busybox /etc/owned /proc/self/status /proc/1 /sys/devices/virtual/net/lo /dev /dev/shm /dev/pts /mapped /plain /mapped/old; \
            echo x > /mapped/new; echo x > /written; echo y >> /etc/owned; \
            stat -c '%n %u:%g' /mapped/new /written /etc/owned /dev/null; echo x > /plain/new || echo not ours; \
            echo x > /dev/null; head -c 3 /dev/zero | wc -c; cat /proc/1/comm; hostname";
        let mut inside = member(&image, script);
        let (mapped, plain) = (
            volume(&image, "mapped", true),
            volume(&image, "plain", false),
        );
        write(&image.host("mapped/old"), "x");
        std::os::unix::fs::chown(image.host("mapped/old"), Some(7), Some(8)).unwrap();
        inside.mounts.extend([mapped, plain]);
        let outcome = run_in(pod, &inside);
        assert_eq!(
            outcome.text(),
            format!(
                " 0 {FIRST} {SIZE}\n 0 {GROUP} {SIZE}\n\
                 / 0:0\n/bin/busybox 0:0\n/etc/owned 1000:1001\n/proc/self/status 0:0\n/proc/1 0:0\n\
                 /sys/devices/virtual/net/lo 0:0\n/dev 0:0\n/dev/shm 0:0\n/dev/pts 0:0\n/mapped 0:0\n/plain 65534:65534\n/mapped/old 7:8\n\
                 /mapped/new 0:0\n/written 0:0\n/etc/owned 1000:1001\n/dev/null 65534:65534\n\
                 sh: can't create /plain/new: Permission denied\nnot ours\n3\nsh\ninside"
            )
        );
        let ready = Some(Report::Ready(known(0, 0, "/root")));
        assert_eq!(outcome.ready, ready);
    });
    let owner = |name: &str| {
        let status = fs::metadata(image.host(name)).unwrap();
        (status.uid(), status.gid())
    };
    // In a mapped volume ids are those inside, in the writable layer those of the node.
    assert_eq!(owner("mapped/new"), (0, 0));
    assert_eq!(owner("upper/written"), (FIRST, GROUP));
    assert_eq!(owner("upper/etc/owned"), (FIRST + 1000, GROUP + 1001));
    assert_eq!(listing(&image.root()), layer, "the layer is untouched");
}

#[test]
fn the_namespaces_belong_to_the_pod() {
    let image = Image::new();
    in_pod(&image, |pod| {
        // Each needs a capability over the namespace's owner.
        let script = "hostname changed && hostname; echo 5 > /proc/sys/net/ipv4/ip_default_ttl && cat /proc/sys/net/ipv4/ip_default_ttl; \
            echo 9 > /proc/sys/kernel/msgmni && cat /proc/sys/kernel/msgmni; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; \
            mount -t tmpfs none /tmp && echo mounted; umount /tmp; echo x > /dev/shm/y";
        let mut inside = member(&image, script);
        inside.masked_paths = vec!["/proc/keys".to_owned(), "/sys/firmware".to_owned()];
        inside.readonly_paths = vec!["/proc/bus".to_owned()];
        let outcome = run_in(pod, &inside);
        assert_eq!(outcome.text(), "changed\n5\n9\n77\nmounted");
        // Another container of the pod: the same IPC, UTS and network namespaces, a root of its own.
        let next = member(
            &image,
            "hostname; cat /dev/shm/y /proc/sys/kernel/msgmni; ls /proc/self/fd | wc -l",
        );
        assert_eq!(run_in(pod, &next).text(), "changed\nx\n9\n4");
        let mut shared = member(&image, "cat /proc/1/comm; stat -c %u /proc/1; id -u");
        shared.namespaces.pid = NamespaceSource::Pod;
        assert_eq!(run_in(pod, &shared).text(), "pause\n0\n0");
        // Capabilities count inside only.
        let host = member(
            &image,
            "mknod /tmp/null c 1 3; chmod 600 /dev/null; dd if=/dev/null of=/proc/sysrq-trigger; echo $?",
        );
        let text = run_in(pod, &host).output;
        assert!(
            text.contains("not permitted") && text.trim_end().ends_with('1'),
            "{text}"
        );
    });
}

#[test]
fn more_processes_and_terminals() {
    let image = Image::new();
    in_pod(&image, |pod| {
        let mut main = member(&image, "cat; true");
        main.process.args = ["sleep", "1000"].map(str::to_owned).to_vec();
        let mut container = settled(spawn_in(pod, &main).0);
        start(&mut container);
        let root = Some((FIRST, GROUP));
        let script = "cat /proc/self/uid_map | tr -s ' '; id -u; cat /proc/1/comm; echo x > /made; stat -c %u:%g /made; echo out > /dev/stdout";
        let outcome = execute_as(&container, process(script), known(0, 0, "/root"), root);
        let want = format!(" 0 {FIRST} {SIZE}\n0\nsleep\n0:0\nout");
        assert_eq!(outcome.text(), want);
        let mut as_user = process("id -u; id -g; echo out > /dev/stdout");
        as_user.capabilities = CapabilityMasks::default();
        let app = known(1000, 1001, "/home/app");
        assert_eq!(
            execute_as(&container, as_user, app, root).text(),
            "1000\n1001\nout"
        );
        let mut tty = process("tty; stat -c %u /dev/pts/0");
        tty.terminal = true;
        let outcome = execute_as(&container, tty, known(0, 0, "/root"), root);
        assert_eq!(outcome.text(), "/dev/pts/0\r\n0");
        assert_eq!(end(&container), Exit::Signal(9));
        let mut tty = member(
            &image,
            "tty; stat -c %t:%T:%u /dev/console; echo x > /dev/console",
        );
        tty.process.terminal = true;
        tty.process.user.user = UserName::Name("app".to_owned());
        let text = run_in(pod, &tty).output;
        assert!(text.starts_with("/dev/pts/0\r\n88:0:1000\r\nx"), "{text}");
    });
}

#[test]
fn users_volumes_and_seccomp() {
    let image = Image::new();
    image.write("vol/kept", "kept\n");
    std::os::unix::fs::chown(image.root().join("vol/kept"), Some(9), Some(9)).unwrap();
    in_pod(&image, |pod| {
        let script = "id -u; id -G; echo x > /dev/stdout; stat -c %u:%g /vol/kept; grep -c '^Seccomp:.2' /proc/self/status; \
            grep CapEff /proc/self/status";
        let mut inside = member(&image, script);
        let declared = made(image.host("declared"));
        std::os::unix::fs::chown(&declared, Some(FIRST), Some(GROUP)).unwrap();
        inside.declared_volumes = vec![(declared, "/vol".to_owned())];
        inside.process.user = UserPlan {
            user: UserName::Name("app".to_owned()),
            additional_groups: vec![77],
            merge_image_groups: true,
            ..UserPlan::default()
        };
        inside.process.seccomp = Some(SeccompFilter {
            instructions: vec![(0x06, 0, 0, 0x7fff_0000)],
            flags: 0,
        });
        let outcome = run_in(pod, &inside);
        let want = "1000\n1001 50 77\nx\n9:9\n1\nCapEff:\t0000000000000000";
        assert_eq!(outcome.text(), want);
        let kept = fs::metadata(image.host("declared/kept")).unwrap();
        assert_eq!((kept.uid(), kept.gid()), (FIRST + 9, GROUP + 9));
        let mut beyond = member(&image, "true");
        beyond.process.user.user = UserName::Id(70_000);
        let refused = run_in(pod, &beyond).refused();
        assert!(refused.contains("70000"), "{refused}");
    });
}

#[test]
fn image_volumes_are_mapped() {
    let image = Image::new();
    let base = image.host("layers");
    write(&base.join("1/a/file"), "a\n");
    write(&base.join("2/b/file"), "b\n");
    std::os::unix::fs::chown(base.join("1/a/file"), Some(5), Some(6)).unwrap();
    let before = listing(&base);
    in_pod(&image, |pod| {
        for (lower, sub_path) in [
            (vec![base.join("1"), base.join("2")], ""),
            (vec![base.join("1")], ""),
            (vec![base.join("1"), base.join("2")], "a"),
        ] {
            let script = "stat -c %u:%g $(grep -l a /v/file /v/a/file 2>/dev/null); echo x > /v/x || echo ro";
            let mut inside = member(&image, script);
            inside.mounts.push(MountPlan {
                target: "/v".to_owned(),
                source: MountSource::Image {
                    lower,
                    sub_path: sub_path.to_owned(),
                },
                attributes: MountAttributes::default(),
            });
            let outcome = run_in(pod, &inside);
            let want = "5:6\nsh: can't create /v/x: Read-only file system\nro";
            assert_eq!(outcome.text(), want);
        }
    });
    assert_eq!(listing(&base), before);
}

#[test]
fn what_cannot_be_mapped_is_refused() {
    let image = Image::new();
    in_pod(&image, |pod| {
        let mut inside = member(&image, "true");
        let mut volume = volume(&image, "x", true);
        if let MountSource::Bind { path, .. } = &mut volume.source {
            *path = "/proc/sys".into();
        }
        inside.mounts.push(volume);
        let refused = run_in(pod, &inside).refused();
        let want = "idmap: mount_setattr(MOUNT_ATTR_IDMAP) /proc/sys: its filesystem has no idmapped mounts";
        assert!(refused.starts_with(want), "{refused}");
        let mut alone = member(&image, "true");
        alone.namespaces.user = NamespaceSource::Pod;
        let stranger = Pod { user: None, ..*pod };
        let fault = spawn_in(&stranger, &alone).0.unwrap_err();
        assert!(fault.to_string().contains("user namespace"), "{fault}");
    });
    in_forked_child(|| {
        let fault = userns::make(&vec![(1, 1, 0)], &vec![(0, 0, 1)], false).unwrap_err();
        assert!(fault.argument.starts_with("uid_map"), "{fault}");
    });
}

#[test]
fn a_process_whose_monitor_does_not_proceed_ends() {
    let image = Image::new();
    in_pod(&image, |pod| {
        let spawned = spawn_in(pod, &member(&image, "touch /ran")).0.unwrap();
        let Received::Moved { pid: _, pidfd } = receive(&spawned) else {
            panic!("it did not move");
        };
        drop(spawned.control);
        for ended in [&spawned.pidfd, &pidfd] {
            readable(ended.as_fd());
            assert_eq!(process::wait(ended.as_fd()).unwrap(), Exit::Code(127));
        }
    });
    assert!(!image.host("upper/ran").exists());
}

#[test]
fn programs_with_capabilities_have_them_inside() {
    let image = Image::new();
    let program = made(image.root().join("capable")).join("grep");
    fs::copy(image.root().join("bin/busybox"), &program).unwrap();
    // vfs_cap_data, version 2, effective: CAP_NET_RAW (13) is permitted. linux/capability.h
    let words = [0x0200_0001_u32, 1 << 13, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let file = fs::File::open(&program).unwrap();
    let flags = crate::sys::file::XattrFlags::empty();
    crate::sys::file::fsetxattr(&file, "security.capability", &value, flags).unwrap();
    drop(file);
    in_pod(&image, |pod| {
        let mut inside = member(&image, "");
        inside.process.user.user = UserName::Id(1000);
        inside.process.args = ["/capable/grep", "CapEff", "/proc/self/status"]
            .map(str::to_owned)
            .to_vec();
        let outcome = run_in(pod, &inside);
        assert_eq!(outcome.text(), "CapEff:\t0000000000002000");
    });
}

#[test]
fn a_cgroup_that_may_be_written_belongs_to_the_root_inside() {
    let base = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|base| base.join("cgroup.controllers").exists())
        .expect("no cgroup v2 hierarchy is mounted");
    let image = Image::new();
    for (readonly, want) in [
        (false, "0:0\n0:0\n65534:65534\nmade\n0::/"),
        (true, "65534:65534\n65534:65534\n65534:65534\n0::/"),
    ] {
        let name = format!("berth-test-userns-{}-{readonly}", std::process::id());
        let _scratch = Scratch::named(&name);
        let directory = made(base.join(name));
        in_pod(&image, |pod| {
            let script = "cd /sys/fs/cgroup; stat -c %u:%g . cgroup.procs cgroup.max.depth; \
                mkdir below 2>/dev/null && echo made; cat /proc/self/cgroup | grep ^0:: ";
            let mut inside = member(&image, script);
            inside.cgroup = CgroupJoin::V2(directory.clone());
            inside
                .mounts
                .push(filesystem("cgroup2", "/sys/fs/cgroup", &[], readonly));
            assert_eq!(run_in(pod, &inside).text(), want);
        });
        if !readonly {
            fs::remove_dir(directory.join("below")).unwrap();
        }
        fs::remove_dir(directory).unwrap();
    }
}

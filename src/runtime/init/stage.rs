//! What the helper of an OCI runtime mounts below the bundle before it calls the runtime: the root filesystem, and the mounts
//! and devices that a runtime could not make. Nothing of it leaves the helper's mount namespace. See `runtime::external`.
//!
//! In a pod with a user namespace the runtime's init, which is the namespace's root by then, walks to all of it by path.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::runtime::create::{self, CreateRequest, Received};
use crate::runtime::external::{is_owned, staged, staged_device, staged_volume};
use crate::runtime::plan::{Context, Fault, MountSource, Plan, Report};
use crate::runtime::userns;
use crate::sys::file::{self, FileType, Make};
use crate::sys::{clone, mount, process, socket};

use super::external::tell;
use super::process::raise_limits;
use super::{Step, copy, devices, join, mounts, open_host, rootfs};

const STAGE: &str = "user namespace";

/// The user namespace of the pod, if it has one, with all that is done for its root before: streams and a writable cgroup are
/// given, limits raised.
pub(super) fn owner<'a>(
    plan: &Plan,
    request: &CreateRequest<'a>,
    bundle: &Path,
) -> Result<Option<BorrowedFd<'a>>, Fault> {
    let Some(root) = plan.namespaces.root() else {
        return Ok(None);
    };
    let missing = || Fault::check(STAGE, "take", "the pod's is not given");
    let user = request.user.ok_or_else(missing)?;
    check_passable(bundle, root.1)?;
    userns::give_streams(root)?;
    raise_limits(&plan.process)?;
    join::delegate(plan, root)?;
    Ok(Some(user))
}

/// The namespace's root may pass every directory down to the bundle: it is nobody to the node, but for its group, to which the
/// pod's own belong.
fn check_passable(bundle: &Path, group: u32) -> Step {
    for directory in bundle.ancestors() {
        let shown = directory.display();
        let found = std::fs::metadata(directory).context(STAGE, "stat", shown)?;
        let mode = found.mode() & 0o7777;
        let passes = if found.gid() == group { 0o010 } else { 0o001 };
        if mode & passes == 0 {
            let what = format_args!(
                "{}: mode {mode:04o} closes the bundle to the pod's root; give it o+x, or move berth's `state`",
                directory.display()
            )
            .to_string();
            return Err(Fault::check(STAGE, "pass through", what));
        }
    }
    Ok(())
}

/// Mounts the root filesystem and all that is staged, each below the bundle. The root.
pub(super) fn mounts(
    plan: &Plan,
    mut shm: Option<OwnedFd>,
    user: Option<BorrowedFd<'_>>,
    bundle: BorrowedFd<'_>,
) -> Result<OwnedFd, Fault> {
    let mut trees: Vec<Option<OwnedFd>> = Vec::with_capacity(plan.mounts.len());
    for (index, mount) in plan.mounts.iter().enumerate() {
        trees.push(match &mount.source {
            _ if staged(plan, index).is_none() => None,
            source @ MountSource::Bind { .. } => Some(mounts::bound(plan, source, user)?),
            MountSource::PodShm => shm.take(),
            _ => None,
        });
    }
    let others = others_of(plan)?;
    mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
    if let Some(user) = user {
        rootfs::map_layers(plan, user)?;
    }
    for (mount, tree) in plan.mounts.iter().zip(&mut trees) {
        if let MountSource::Image { lower, sub_path } = &mount.source {
            *tree = Some(mounts::image(lower, sub_path, &plan.mount_label)?);
        }
    }
    let root = rootfs::build(&plan.rootfs, &plan.mount_label, user)?;
    let root = root.ok_or_else(|| Fault::check("runtime", "pause", "not here"))?;
    attach(bundle, "rootfs", &root)?;
    for (index, (mount, tree)) in plan.mounts.iter().zip(&trees).enumerate() {
        if let (Some(name), Some(tree)) = (staged(plan, index), tree) {
            attach(bundle, &name, tree)?;
            if is_owned(plan) {
                // Here, for what the node's mount has of these is locked in there, and runtimes differ in what they do then.
                mounts::dress(mount, tree.as_fd())?;
            }
        }
    }
    for (name, copy) in &others {
        attach(bundle, name, copy)?;
    }
    Ok(root)
}

/// Copies of the devices and of the image's volumes that are staged, with their names.
fn others_of(plan: &Plan) -> Result<Vec<(String, OwnedFd)>, Fault> {
    let mut others = Vec::new();
    for (index, device) in plan.devices.iter().enumerate() {
        if let Some(name) = staged_device(plan, index) {
            others.push((name, devices::copy(device)?));
        }
    }
    for (index, (volume, _)) in plan.declared_volumes.iter().enumerate() {
        if let Some(name) = staged_volume(plan, index) {
            others.push((name, mounts::tree(volume, false)?));
        }
    }
    Ok(others)
}

fn attach(bundle: BorrowedFd<'_>, name: &str, tree: &OwnedFd) -> Step {
    let status = file::fstat(tree).context("mount", "fstat", name)?;
    let kind = match FileType::from_raw_mode(status.st_mode) {
        FileType::Directory => Make::Directory,
        _ => Make::File,
    };
    let target = file::make_in(bundle, Path::new(name), kind);
    let target = target.context("mount", "make mount point", name)?;
    mount::attach(tree.as_fd(), target.as_fd()).context("mount", "move_mount", name)
}

/// Copies what the image has at the places of its volumes into them, and makes these places.
pub(super) fn fill_volumes(
    plan: &Plan,
    user: Option<BorrowedFd<'_>>,
    root: BorrowedFd<'_>,
) -> Step {
    let volumes = plan.declared_volumes.iter();
    let volumes = volumes.map(|(volume, path)| Ok((open_host(volume, "volume")?, path.as_str())));
    let volumes: Vec<(OwnedFd, &str)> = volumes.collect::<Result<_, Fault>>()?;
    let fill = || -> Step {
        for (volume, path) in &volumes {
            let target = file::make_in(root, Path::new(path), Make::Directory);
            let target = target.context("volume", "make mount point", path)?;
            copy::directory(target.as_fd(), volume.as_fd(), path)?;
        }
        Ok(())
    };
    match user {
        Some(user) if !volumes.is_empty() => {
            let mut keep: Vec<BorrowedFd<'_>> = volumes.iter().map(|one| one.0.as_fd()).collect();
            keep.extend([root, user]);
            as_root_of(user, &keep, fill)
        }
        _ => fill(),
    }
}

/// Does `work`, which uses no descriptor but `keep`, in a short-lived child that is the root of the user namespace: what it
/// makes belongs to that one.
fn as_root_of(user: BorrowedFd<'_>, keep: &[BorrowedFd<'_>], work: impl FnOnce() -> Step) -> Step {
    let (ours, childs) = socket::pair().context(STAGE, "socketpair", "")?;
    let helper = process::id();
    // Entering takes the signal at a parent's end back: it is asked for afterwards.
    let enter = || {
        userns::enter(user)?;
        process::die_with_parent(helper).context(STAGE, "prctl", "PR_SET_PDEATHSIG")
    };
    let all = [keep, &[childs.as_fd()]].concat();
    let child = clone::fork_into(0, &all, || {
        let outcome = enter().and_then(|()| work());
        tell(outcome.map(|()| (Report::Done, None)), childs.as_fd())
    });
    let child = child.context(STAGE, "clone3", "")?;
    // So that its end is heard.
    drop(childs);
    let heard = create::receive(ours.as_fd());
    let _ended = process::wait(child.pidfd.as_fd());
    match heard.context(STAGE, "recvmsg", "child")? {
        Received::Report(Report::Done, _) => Ok(()),
        Received::Report(Report::Failed(fault), _) => Err(fault),
        _ => Err(Fault::check(STAGE, "wait", "the child ended")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_works_for_a_helper_ends_with_it() {
        use crate::sys::poll::{PollFd, PollFlags, poll};
        clone::in_forked_child(|| {
            let ids = vec![(0, 65536, 65536)];
            let made = userns::make(&ids, &ids, false).unwrap();
            let (reader, writer) = crate::sys::fd::pipe().unwrap();
            let keep = [made.user.as_fd(), writer.as_fd()];
            let helper = clone::fork_into(0, &keep, || {
                let work = || {
                    crate::sys::fd::write_all(writer.as_fd(), &process::id().to_ne_bytes())
                        .context(STAGE, "write", "")?;
                    loop {
                        let _for_ever = poll(&mut [], None);
                    }
                };
                i32::from(as_root_of(keep[0], &keep, work).is_err())
            });
            let helper = helper.unwrap();
            drop(writer);
            let mut pid = [0; 4];
            std::io::Read::read_exact(&mut std::fs::File::from(reader), &mut pid).unwrap();
            let worker = process::pidfd_open(u32::from_ne_bytes(pid)).unwrap();
            process::send_signal(helper.pidfd.as_fd(), 9).unwrap();
            let mut set = [PollFd::new(&worker, PollFlags::IN)];
            let ended = poll(&mut set, Some(std::time::Duration::from_secs(5))).unwrap();
            process::send_signal(worker.as_fd(), 9).unwrap();
            process::wait(helper.pidfd.as_fd()).unwrap();
            assert_eq!(ended, 1, "it goes on without its helper");
        });
    }

    #[test]
    fn a_closed_directory_above_the_bundle_is_named() {
        use std::os::unix::fs::PermissionsExt as _;
        const GROUP: u32 = 200_000;
        let top = tempfile::tempdir().unwrap();
        let closed = top.path().join("closed");
        let bundle = closed.join("bundle");
        std::fs::create_dir_all(&bundle).unwrap();
        let set = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        set(top.path(), 0o711);
        set(&bundle, 0o711);
        for (mode, good) in [(0o711, true), (0o755, true), (0o750, false), (0o700, false)] {
            set(&closed, mode);
            let checked = check_passable(&bundle, GROUP);
            assert_eq!(checked.is_ok(), good, "{mode:o}: {checked:?}");
            if let Err(fault) = checked {
                let text = fault.to_string();
                let named = format!("pass through {}: mode {mode:04o}", closed.display());
                assert!(text.contains(&named) && text.contains("o+x"), "{text}");
            }
        }
        // Its own group counts, and nothing else then.
        std::os::unix::fs::chown(&closed, None, Some(GROUP)).unwrap();
        for (mode, good) in [(0o710, true), (0o750, true), (0o701, false)] {
            set(&closed, mode);
            let checked = check_passable(&bundle, GROUP);
            assert_eq!(checked.is_ok(), good, "{mode:o}: {checked:?}");
        }
    }
}

//! The root filesystem: made detached, attached over the old root in a private mount namespace, entered with
//! `pivot_root(2)`; nothing of it is ever visible on the host.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::runtime::hooks::Hooks;
use crate::runtime::plan::{Context, Fault, MountPropagation, MountSource, Plan, Rootfs};
use crate::runtime::userns;
use crate::sys::mount::{self, Change, Filesystem, attribute, propagation};

use super::masks::Masks;
use super::{Step, open_host};

const STAGE: &str = "rootfs";

/// The root that this process has now.
pub(super) struct Root {
    /// Its directory.
    pub(super) fd: OwnedFd,
    /// What hides masked paths.
    pub(super) masks: Masks,
}

/// Makes the root, attached nowhere; none for pause. Everything is private by now. `label`: SELinux label of
/// an overlay, or empty; `user`: whose mappings a directory takes.
pub(super) fn build(
    rootfs: &Rootfs,
    label: &str,
    user: Option<BorrowedFd<'_>>,
) -> Result<Option<OwnedFd>, Fault> {
    match rootfs {
        Rootfs::Pause { .. } => Ok(None),
        Rootfs::Overlay {
            lower,
            upper,
            work,
            volatile,
            readonly: _,
        } => overlay(
            lower,
            upper.as_deref().map(|upper| (upper, work.as_path())),
            *volatile,
            label,
        )
        .map(Some),
        Rootfs::Directory { path, .. } => {
            let tree = directory(path)?;
            if let Some(user) = user {
                userns::map(tree.as_fd(), user, &path.display().to_string())?;
            }
            Ok(Some(tree))
        }
    }
}

/// Mounts the directories that hold the plan's layers over themselves, their ids mapped: an overlay is made of what its layers'
/// paths lead to. Only in this mount namespace, which is private and goes away.
pub(super) fn map_layers(plan: &Plan, user: BorrowedFd<'_>) -> Step {
    let (of_root, upper) = match &plan.rootfs {
        Rootfs::Overlay { lower, upper, .. } => (lower.as_slice(), upper.as_deref()),
        Rootfs::Pause { .. } | Rootfs::Directory { .. } => (&[][..], None),
    };
    let of_images = plan.mounts.iter().flat_map(|mount| match &mount.source {
        MountSource::Image { lower, .. } => lower.as_slice(),
        _ => &[],
    });
    // One mount for all layers of a directory, unless the writable layer, which is not mapped, is below it too.
    let place = |layer: &'_ PathBuf| -> PathBuf {
        let parent = layer.parent().unwrap_or(layer);
        let alone = upper.is_some_and(|upper| upper.starts_with(parent));
        if alone { layer } else { parent }.to_owned()
    };
    let places: BTreeSet<PathBuf> = of_root.iter().chain(of_images).map(place).collect();
    // All before the first is attached: what is mapped is not mapped again.
    let mut trees = Vec::with_capacity(places.len());
    for place in &places {
        let tree = directory(place)?;
        userns::map(tree.as_fd(), user, &place.display().to_string())?;
        trees.push(tree);
    }
    // In order of paths: what lies above comes first.
    for (place, tree) in places.iter().zip(trees) {
        let target = open_host(place, STAGE)?;
        let attached = mount::attach(tree.as_fd(), target.as_fd());
        attached.context(STAGE, "move_mount", place.display())?;
    }
    Ok(())
}

/// Moves into the root that [`build`] made.
pub(super) fn enter(fd: OwnedFd, plan: &Plan) -> Result<Root, Fault> {
    let masks = Masks::prepare(&plan.masked_paths, &plan.mount_label)?;
    pivot_into(fd.as_fd())?;
    if matches!(plan.rootfs, Rootfs::Overlay { upper: None, .. }) {
        // At once: not even a mount point may be made in a shared layer.
        make_readonly(fd.as_fd(), false)?;
    }
    Ok(Root { fd, masks })
}

/// Attaches the root that [`build`] made where hooks look for it, to be moved into by [`pivot`].
pub(super) fn show(fd: OwnedFd, plan: &Plan, hooks: &Hooks) -> Result<Root, Fault> {
    let masks = Masks::prepare(&plan.masked_paths, &plan.mount_label)?;
    let place = super::hooks::mount_point(hooks)?;
    let shown = hooks.bundle.display();
    mount::attach(fd.as_fd(), place.as_fd()).context(STAGE, "move_mount", shown)?;
    if matches!(plan.rootfs, Rootfs::Overlay { upper: None, .. }) {
        make_readonly(fd.as_fd(), false)?;
    }
    Ok(Root { fd, masks })
}

/// A detached, private copy of a directory as a mount.
pub(super) fn directory(path: &Path) -> Result<OwnedFd, Fault> {
    let source = open_host(path, STAGE)?;
    mount::copy_tree(source.as_fd(), Path::new(mount::SELF), true).context(
        STAGE,
        "open_tree",
        path.display(),
    )
}

/// Attaches `root` over the old root and pivots into it.
pub(super) fn pivot_into(root: BorrowedFd<'_>) -> Step {
    attach_at_top(root)?;
    pivot(root)
}

/// Pivots into `root`, which is attached.
pub(super) fn pivot(root: BorrowedFd<'_>) -> Step {
    mount::pivot(root).map_err(|(call, error)| Fault::call(STAGE, call, "/", &error))
}

/// Attaches a mount over the host's root, in our private namespace, so that it can be pivoted into or copied from.
pub(super) fn attach_at_top(mount: BorrowedFd<'_>) -> Step {
    let top = mount::open_root().context(STAGE, "open", "/")?;
    mount::attach(mount, top.as_fd()).context(STAGE, "move_mount", "/")
}

/// Gives all files of a filesystem in the making one SELinux label, unless that is empty.
pub(super) fn set_context(filesystem: &Filesystem, label: &str) -> Step {
    if label.is_empty() {
        return Ok(());
    }
    let shown = format_args!("context={label}").to_string();
    let set = filesystem.set("context", label.as_bytes());
    set.context("mount", "fsconfig", shown)
}

/// A detached tmpfs with this SELinux label, or none.
pub(super) fn tmpfs(
    options: &[(&str, &str)],
    attributes: u64,
    label: &str,
) -> Result<OwnedFd, Fault> {
    let filesystem = Filesystem::open("tmpfs").context("mount", "fsopen", "tmpfs")?;
    set_context(&filesystem, label)?;
    for (key, value) in options {
        filesystem.set(key, value.as_bytes()).context(
            "mount",
            "fsconfig",
            format_args!("tmpfs {key}={value}"),
        )?;
    }
    filesystem
        .mount(attributes)
        .context("mount", "fsmount", "tmpfs")
}

/// A detached overlay: `upper` is (writable layer, work directory). Without one it is read-only, but for one lower layer
/// alone, which is then a copy of its directory: the caller makes it read-only. `label`: its SELinux label, or empty.
pub(super) fn overlay(
    lower: &[PathBuf],
    upper: Option<(&Path, &Path)>,
    volatile: bool,
    label: &str,
) -> Result<OwnedFd, Fault> {
    if let (None, [only]) = (upper, lower) {
        return directory(only);
    }
    let filesystem = Filesystem::open("overlay").context(STAGE, "fsopen", "overlay")?;
    set_context(&filesystem, label)?;
    match configure(&filesystem, lower, upper, volatile) {
        // Before Linux 6.7 there is no `lowerdir+`, and an option of fsconfig(2) has at most 255 bytes.
        Err(fault) if fault.errno == EINVAL && fault.argument.starts_with("lowerdir+") => {
            overlay_by_path(lower, upper, volatile, label)
        }
        Err(mut fault) => {
            let said = filesystem.explain();
            if !said.is_empty() {
                fault.argument = format!("{} ({said})", fault.argument);
            }
            Err(fault)
        }
        Ok(mount) => Ok(mount),
    }
}

const EINVAL: i32 = 22;

fn configure(
    filesystem: &Filesystem,
    lower: &[PathBuf],
    upper: Option<(&Path, &Path)>,
    volatile: bool,
) -> Result<OwnedFd, Fault> {
    let set = |key: &str, value: &[u8]| {
        let shown = String::from_utf8_lossy(value);
        let shown = format_args!("{key}={shown}").to_string();
        filesystem.set(key, value).context(STAGE, "fsconfig", shown)
    };
    for layer in lower {
        set("lowerdir+", layer.as_os_str().as_bytes())?;
    }
    if let Some((upper, work)) = upper {
        set("upperdir", upper.as_os_str().as_bytes())?;
        set("workdir", work.as_os_str().as_bytes())?;
        if volatile {
            set("volatile", b"")?;
        }
    }
    // Layers are shared by many mounts: an index over them has no use and logs warnings.
    set("index", b"off")?;
    filesystem.mount(0).context(STAGE, "fsmount", "overlay")
}

/// The overlay by mount(2), whose options may fill a page. It is mounted over its own upper (or first lower) directory,
/// in this private namespace, and taken from there.
pub(super) fn overlay_by_path(
    lower: &[PathBuf],
    upper: Option<(&Path, &Path)>,
    volatile: bool,
    label: &str,
) -> Result<OwnedFd, Fault> {
    const PAGE: usize = 4096;
    let mut options = b"lowerdir=".to_vec();
    for (number, layer) in lower.iter().enumerate() {
        if number > 0 {
            options.push(b':');
        }
        escape(layer, &mut options);
    }
    if let Some((upper, work)) = upper {
        options.extend(b",upperdir=");
        escape(upper, &mut options);
        options.extend(b",workdir=");
        escape(work, &mut options);
        if volatile {
            options.extend(b",volatile");
        }
    }
    options.extend(b",index=off");
    if !label.is_empty() {
        // Quoted: a level has commas.
        options.extend(format!(",context=\"{label}\"").into_bytes());
    }
    if options.len() >= PAGE {
        let what = format_args!(
            "{} layers need {} bytes of options",
            lower.len(),
            options.len()
        )
        .to_string();
        return Err(Fault::check(STAGE, "mount(overlay)", what));
    }
    let place = upper
        .map(|(upper, _)| upper)
        .or(lower.first().map(PathBuf::as_path));
    let place = place.ok_or_else(|| Fault::check(STAGE, "mount(overlay)", "no layer"))?;
    let options = CString::new(options)
        .map_err(|_nul| Fault::check(STAGE, "mount(overlay)", "a NUL byte in a path"))?;
    mount::mount_by_path("overlay", place, &options).context(
        STAGE,
        "mount(overlay)",
        place.display(),
    )?;
    directory(place)
}

/// Colons, commas and backslashes mean something in overlay's options.
fn escape(path: &Path, options: &mut Vec<u8>) {
    for byte in path.as_os_str().as_bytes() {
        if matches!(byte, b':' | b',' | b'\\') {
            options.push(b'\\');
        }
        options.push(*byte);
    }
}

/// Makes a mount read-only, with all below or alone.
pub(super) fn make_readonly(mount: BorrowedFd<'_>, recursive: bool) -> Step {
    let change = Change {
        set: attribute::READONLY,
        recursive,
        ..Change::default()
    };
    mount::change(mount, &change).context(STAGE, "mount_setattr", "read-only")
}

/// The last changes, when everything is in place: read-only, and shared where the plan says so.
pub(super) fn seal(plan: &Plan, root: &Root) -> Step {
    let (Rootfs::Overlay {
        readonly, upper: _, ..
    }
    | Rootfs::Directory { readonly, .. }) = &plan.rootfs
    else {
        return Ok(());
    };
    let change = Change {
        set: if *readonly { attribute::READONLY } else { 0 },
        propagation: match plan.root_propagation {
            MountPropagation::Shared => propagation::SHARED,
            // Nothing is left above us to be a slave of.
            MountPropagation::Private | MountPropagation::Slave => 0,
        },
        ..Change::default()
    };
    if change.set == 0 && change.propagation == 0 {
        return Ok(());
    }
    mount::change(root.fd.as_fd(), &change).context(STAGE, "mount_setattr", "/")
}

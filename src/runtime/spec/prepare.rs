//! What must be read of the node, or made there, before a spec can be computed. The only part with I/O.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::base::container::{ContainerConfig, Device, Mount, Propagation};
use crate::base::handler::Handler;
use crate::base::pod::PodConfig;
use crate::base::security::{SecurityProfile, SelinuxLabels};
use crate::runtime::apparmor::{self, ProfileError};
use crate::runtime::plan::DeviceNode;
use crate::runtime::seccomp::Profile;
use crate::runtime::spec::base_spec::Base;
use crate::runtime::spec::devices::HostDevice;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::HostFacts;
use crate::runtime::spec::mounts::{self, clean};

/// Names below `/dev` that are never given to a privileged container: they belong to its own `/dev`.
const NOT_DEVICES: [&str; 7] = ["console", "fd", "mqueue", "ptmx", "pts", "shm", ".udev"];
/// What a container has of its own below `/dev`, beside devices.
const OWN_BELOW_DEV: [&str; 3] = ["mqueue", "pts", "shm"];
/// Most devices below one directory.
const MAX_DEVICES: usize = 4096;
/// Entries of one directory of devices, and directories of them, that are looked at.
const MAX_ENTRIES: usize = 65536;
/// Directories of devices in each other.
const MAX_DEPTH: usize = 16;

/// What was read for one container or sandbox.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prepared {
    /// Devices asked for, or all of the node for a privileged container.
    pub(crate) devices: Vec<HostDevice>,
    /// The seccomp profile; absent: no filter.
    pub(crate) seccomp: Option<Arc<Profile>>,
    /// The process is confined by the AppArmor profile of [`apparmor::DEFAULT_NAME`], which is loaded.
    pub(crate) apparmor_default: bool,
    /// A privileged container may use only the devices above.
    pub(crate) without_host_devices: bool,
    /// SELinux labels; empty ones where SELinux is not in use.
    pub(crate) labels: SelinuxLabels,
    /// Directories that the volume at `/dev`, if there is one, has for mounts of the container's own: nothing is made in it.
    pub(crate) below_dev: Vec<&'static str>,
    /// What the handler's base spec says beside CRI.
    pub(crate) base: Base,
}

/// Reads what a container's spec needs, checks the propagation of its mounts' sources, and makes those
/// that are missing (directories, mode 0755). Blocks on the filesystems that the config names.
///
/// # Errors
/// [`SpecError`]: a device, profile or mount source is missing or not as it must be.
pub(crate) fn container(
    config: &ContainerConfig,
    handler: &Handler,
    host: &HostFacts,
) -> Result<Prepared> {
    let security = &config.security;
    let without_host_devices = handler.privileged_without_host_devices;
    let mut found = vec![];
    if security.privileged && !without_host_devices {
        walk(Path::new("/dev"), "/dev", "rwm", &mut found);
    }
    for (index, device) in config.devices.iter().enumerate() {
        devices(index, device, &mut found)?;
    }
    let apparmor_default = apparmor_default(security.apparmor.as_ref(), security.privileged, host)?;
    mounts::check(&config.mounts, host)?;
    let field = match (security.privileged, &security.seccomp) {
        (true, _) => "privileged_seccomp_profile",
        (false, None) => "unset_seccomp_profile",
        (false, Some(_)) => "security_context.seccomp",
    };
    let seccomp = seccomp(field, handler.defaults.seccomp_of(security))?;
    prepare_mount_sources(&config.mounts)?;
    Ok(Prepared {
        devices: found,
        seccomp,
        apparmor_default,
        without_host_devices,
        labels: SelinuxLabels::default(),
        below_dev: below_dev(&config.mounts),
        base: base(config, handler)?,
    })
}

fn below_dev(mounts: &[Mount]) -> Vec<&'static str> {
    let mut on_dev = mounts.iter().rev();
    let volume = on_dev.find(|mount| clean(&mount.container_path) == "/dev");
    let Some(volume) = volume.filter(|volume| volume.image.is_none()) else {
        return vec![];
    };
    let mut names = OWN_BELOW_DEV.to_vec();
    names.retain(|name| Path::new(&volume.host_path).join(name).is_dir());
    names
}

fn base(config: &ContainerConfig, handler: &Handler) -> Result<Base> {
    let Some(text) = &handler.base_spec else {
        return Ok(Base::default());
    };
    let key = handler.key("base_runtime_spec");
    let read = Base::read(&key, text).map_err(|wrong| {
        let mend = "correct the file, then make the pod again";
        SpecError::invalid(&key, wrong, "cannot be used", mend)
    });
    Ok(read?.under(config))
}

/// Reads what a sandbox's spec needs.
///
/// # Errors
/// [`SpecError`]: the seccomp or AppArmor profile cannot be used.
pub(crate) fn sandbox(pod: &PodConfig, host: &HostFacts) -> Result<Prepared> {
    let security = &pod.security;
    let field = "linux.security_context.seccomp";
    let apparmor = security.apparmor.as_ref();
    Ok(Prepared {
        seccomp: seccomp(field, security.seccomp.as_ref())?,
        apparmor_default: apparmor_default(apparmor, security.privileged, host)?,
        ..Prepared::default()
    })
}

fn seccomp(field: &str, asked: Option<&SecurityProfile>) -> Result<Option<Arc<Profile>>> {
    match asked {
        None | Some(SecurityProfile::Unconfined) => Ok(None),
        Some(SecurityProfile::RuntimeDefault) => Ok(Some(Profile::runtime_default())),
        Some(SecurityProfile::Localhost(path)) if !path.starts_with('/') => {
            let mend = "use the absolute path of a JSON profile";
            Err(SpecError::invalid(
                field,
                path,
                "is not an absolute path",
                mend,
            ))
        }
        Some(SecurityProfile::Localhost(path)) => Profile::load(Path::new(path))
            .map(|profile| Some(Arc::new(profile)))
            .map_err(SpecError::Seccomp),
    }
}

/// Is the default profile to be used? Sees to it that it is loaded.
fn apparmor_default(
    asked: Option<&SecurityProfile>,
    privileged: bool,
    host: &HostFacts,
) -> Result<bool> {
    let asked = match asked {
        _ if !host.apparmor => return Ok(false), // the pure part refuses a name
        Some(SecurityProfile::Localhost(name)) => {
            apparmor_loaded(name)?;
            return Ok(false);
        }
        Some(SecurityProfile::Unconfined) => return Ok(false),
        _ if privileged => return Ok(false),
        asked => asked.is_some(),
    };
    match apparmor::load_default() {
        Ok(()) => Ok(true),
        Err(error @ ProfileError::NoParser) if !asked => {
            tracing::warn!(%error, "containers that name no AppArmor profile run without one");
            Ok(false)
        }
        Err(error) => Err(SpecError::precondition(
            APPARMOR,
            "RuntimeDefault",
            error.to_string(),
            "install apparmor, or use Unconfined",
        )),
    }
}

const APPARMOR: &str = "security_context.apparmor";

fn apparmor_loaded(name: &str) -> Result<()> {
    let name = name.strip_prefix("localhost/").unwrap_or(name);
    let loaded = apparmor::is_loaded(name).map_err(|error| {
        SpecError::host(
            APPARMOR,
            "read",
            Path::new("/sys/kernel/security/apparmor/profiles"),
            error,
        )
    })?;
    if loaded || name.is_empty() {
        return Ok(()); // the pure part refuses what is no name
    }
    let mend = "load it with apparmor_parser";
    Err(SpecError::precondition(
        APPARMOR,
        name,
        "is not loaded in the kernel",
        mend,
    ))
}

/// Finds the device, or all devices below a directory.
fn devices(index: usize, device: &Device, found: &mut Vec<HostDevice>) -> Result<()> {
    let field = |name: &str| format!("devices[{index}].{name}");
    let permissions = match device.permissions.as_str() {
        "" => "rwm",
        given if given.chars().all(|c| "rwm".contains(c)) => given,
        given => {
            let mend = "use letters of rwm";
            let problem = "is no set of permissions";
            return Err(SpecError::invalid(
                field("permissions"),
                given,
                problem,
                mend,
            ));
        }
    };
    let inside = if device.container_path.is_empty() {
        &device.host_path
    } else {
        &device.container_path
    };
    for (name, path) in [("host_path", &device.host_path), ("container_path", inside)] {
        if !path.starts_with('/') || path.contains('\0') || clean(path) == "/" {
            let mend = "use an absolute path";
            let problem = "is not the absolute path of a device";
            return Err(SpecError::invalid(field(name), path, problem, mend));
        }
    }
    let path = Path::new(&device.host_path);
    let metadata = fs::metadata(path)
        .map_err(|error| SpecError::host(field("host_path"), "find", path, error))?;
    if metadata.is_dir() {
        walk(path, &clean(inside), permissions, found);
        return Ok(());
    }
    let Some(one) = host_device(path, clean(inside), &metadata, permissions) else {
        let mend = "name a device node, or a directory of them";
        let problem = "is no device";
        return Err(SpecError::invalid(
            field("host_path"),
            path.display(),
            problem,
            mend,
        ));
    };
    found.push(one);
    Ok(())
}

fn host_device(
    path: &Path,
    inside: String,
    metadata: &fs::Metadata,
    permissions: &str,
) -> Option<HostDevice> {
    let kind = metadata.file_type();
    if !kind.is_block_device() && !kind.is_char_device() {
        return None;
    }
    Some(HostDevice {
        node: DeviceNode {
            path: inside,
            host_path: path.to_owned(),
            block: kind.is_block_device(),
            major: rustix::fs::major(metadata.rdev()),
            minor: rustix::fs::minor(metadata.rdev()),
            mode: metadata.mode() & 0o777,
            uid: metadata.uid(),
            gid: metadata.gid(),
        },
        permissions: permissions.to_owned(),
    })
}

/// All device nodes below a directory, links left out, at most [`MAX_DEPTH`] levels down. What vanishes meanwhile is left
/// out too.
fn walk(directory: &Path, inside: &str, permissions: &str, found: &mut Vec<HostDevice>) {
    let mut todo = vec![(directory.to_owned(), inside.to_owned(), 0)];
    while let Some((directory, inside, depth)) = todo.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        let mut entries: Vec<_> = entries.flatten().take(MAX_ENTRIES).collect();
        // From the last to the first: those that come first are taken from the end.
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.file_name()));
        let mut nodes = vec![];
        for entry in entries {
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if directory == Path::new("/dev") && NOT_DEVICES.contains(&name.as_str()) {
                continue;
            }
            let (path, inside) = (entry.path(), format!("{inside}/{name}"));
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            if metadata.is_dir() && depth < MAX_DEPTH && todo.len() < MAX_ENTRIES {
                todo.push((path, inside, depth + 1));
            } else if let Some(one) = host_device(&path, inside, &metadata, permissions) {
                nodes.push(one);
            }
        }
        let room = MAX_DEVICES.saturating_sub(found.len());
        found.extend(nodes.into_iter().rev().take(room));
    }
}

/// Checks the propagation of the mounts' sources, then makes those that are missing (directories, mode
/// 0755). What is to be shared must be on a shared mount, what is to follow the node on a shared or slave
/// one. Relative paths are left to the pure part.
///
/// # Errors
/// [`SpecError`]: a source cannot be made, or is on a mount of another propagation.
pub(crate) fn prepare_mount_sources(mounts: &[Mount]) -> Result<()> {
    let on_host = || {
        mounts
            .iter()
            .enumerate()
            .filter(|(_, mount)| mount.image.is_none() && mount.host_path.starts_with('/'))
    };
    let mut mountinfo = None;
    for (index, mount) in on_host() {
        if mount.propagation == Propagation::Private {
            continue;
        }
        let field = format!("mounts[{index}].host_path");
        let real = real_path(Path::new(&mount.host_path)).map_err(|error| {
            SpecError::host(&field, "resolve", Path::new(&mount.host_path), error)
        })?;
        let text = match mountinfo.take() {
            Some(text) => text,
            None => {
                let path = Path::new("/proc/self/mountinfo");
                fs::read_to_string(path)
                    .map_err(|error| SpecError::host(&field, "read", path, error))?
            }
        };
        check_propagation(index, mount, &real, &text)?;
        mountinfo = Some(text);
    }
    for (index, mount) in on_host() {
        let field = format!("mounts[{index}].host_path");
        let path = Path::new(&mount.host_path);
        match fs::metadata(path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut builder = fs::DirBuilder::new();
                let made = builder.recursive(true).mode(0o755).create(path);
                made.map_err(|error| SpecError::host(&field, "make directory", path, error))?;
            }
            Err(error) => return Err(SpecError::host(&field, "find", path, error)),
        }
    }
    Ok(())
}

/// The path without links, or that of the first directory above it that exists.
fn real_path(path: &Path) -> io::Result<PathBuf> {
    match (fs::canonicalize(path), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => real_path(parent),
        (result, _) => result,
    }
}

fn check_propagation(index: usize, mount: &Mount, real: &Path, mountinfo: &str) -> Result<()> {
    let Some((point, tags)) = mount_of(real, mountinfo) else {
        return Ok(());
    };
    let tagged = |prefix: &str| tags.iter().any(|tag| tag.starts_with(prefix));
    let (good, wanted) = match mount.propagation {
        Propagation::Bidirectional => (tagged("shared:"), "shared"),
        _ => (tagged("shared:") || tagged("master:"), "shared or slave"),
    };
    if good {
        return Ok(());
    }
    let field = format!("mounts[{index}].propagation");
    let value = format!("{:?} of {}", mount.propagation, mount.host_path);
    let problem = format!("needs a {wanted} mount, {} is not", point.display());
    let mend = "make it so with mount --make-rshared, or ask for no propagation";
    Err(SpecError::precondition(field, value, problem, mend))
}

/// Mount point that holds `path`, and the optional fields of its line.
fn mount_of<'a>(path: &Path, mountinfo: &'a str) -> Option<(PathBuf, Vec<&'a str>)> {
    let mut best: Option<(PathBuf, Vec<&str>)> = None;
    for line in mountinfo.lines() {
        let head = line.split(" - ").next().unwrap_or_default();
        let fields: Vec<&str> = head.split(' ').collect();
        let Some(point) = fields.get(4).map(|text| PathBuf::from(unescape(text))) else {
            continue;
        };
        let longer =
            |old: &(PathBuf, Vec<&str>)| point.components().count() >= old.0.components().count();
        if path.starts_with(&point) && best.as_ref().is_none_or(longer) {
            best = Some((point, fields.get(6..).unwrap_or_default().to_vec()));
        }
    }
    best
}

/// Undoes the octal escapes of mountinfo.
pub(in crate::runtime) fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        match after.get(..3).map(|digits| u8::from_str_radix(digits, 8)) {
            Some(Ok(byte)) if byte.is_ascii() => {
                out.push(byte.into());
                rest = &after[3..];
            }
            _ => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::runtime::spec::tests::host;

    const MOUNTINFO: &str = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
        30 22 0:30 / /run rw,nosuid - tmpfs tmpfs rw\n\
        31 30 0:31 / /run/with\\040blank rw master:3 - tmpfs tmpfs rw\n";

    fn propagates(path: &str, propagation: Propagation) -> bool {
        let mount = Mount {
            host_path: path.to_owned(),
            propagation,
            ..Mount::default()
        };
        check_propagation(0, &mount, Path::new(path), MOUNTINFO).is_ok()
    }

    #[test]
    fn sources_propagate_as_asked() {
        use Propagation::{Bidirectional, HostToContainer};
        for (path, propagation, expected) in [
            ("/srv/x", Bidirectional, true),
            ("/srv/x", HostToContainer, true),
            ("/run/x", Bidirectional, false),
            ("/run/x", HostToContainer, false),
            ("/running", Bidirectional, true),
            ("/run/with blank/x", Bidirectional, false),
            ("/run/with blank/x", HostToContainer, true),
        ] {
            assert_eq!(
                propagates(path, propagation),
                expected,
                "{path} {propagation:?}"
            );
        }
    }

    fn mount(host_path: &Path, container_path: &str) -> Mount {
        Mount {
            host_path: host_path.to_string_lossy().into_owned(),
            container_path: container_path.to_owned(),
            ..Mount::default()
        }
    }

    #[test]
    fn missing_sources_are_made_unless_the_config_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("a/b");
        let config = |container_path: &str| ContainerConfig {
            mounts: vec![
                mount(&source, container_path),
                mount(dir.path(), "relative"),
            ],
            ..ContainerConfig::default()
        };
        assert!(container(&config("/a"), &Handler::default(), &host()).is_err());
        assert!(!dir.path().join("a").exists());
        let mut good = config("/a");
        good.mounts.truncate(1);
        container(&good, &Handler::default(), &host()).unwrap();
        assert_eq!(fs::metadata(&source).unwrap().mode() & 0o7777, 0o755);
        container(&good, &Handler::default(), &host()).unwrap();
        // Below a file nothing can be made.
        let file = dir.path().join("file");
        drop(File::create(&file).unwrap());
        good.mounts = vec![mount(&file.join("x"), "/a")];
        let error = container(&good, &Handler::default(), &host())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("mounts[0].host_path: cannot find"),
            "{error}"
        );
    }

    fn devices_of(host_path: &str, container_path: &str, permissions: &str) -> Result<Prepared> {
        let config = ContainerConfig {
            devices: vec![Device {
                host_path: host_path.to_owned(),
                container_path: container_path.to_owned(),
                permissions: permissions.to_owned(),
            }],
            ..ContainerConfig::default()
        };
        container(&config, &Handler::default(), &host())
    }

    #[test]
    fn devices_are_found() {
        let found = devices_of("/dev/null", "/dev/nothing", "r")
            .unwrap()
            .devices;
        assert_eq!(found.len(), 1);
        let node = &found[0].node;
        assert_eq!((node.major, node.minor, node.block), (1, 3, false));
        assert_eq!(node.path, "/dev/nothing");
        assert_eq!(found[0].permissions, "r");
        // A link is followed, an empty path in the container is the host's, empty permissions are all.
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        let found = devices_of(&link.to_string_lossy(), "", "").unwrap().devices;
        assert_eq!(
            (found[0].node.minor, found[0].permissions.as_str()),
            (5, "rwm")
        );
        // Directories give what is below.
        let deep = dir.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            deep.join("node"),
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::from_raw_mode(0o640),
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        let found = devices_of(&dir.path().to_string_lossy(), "/dev/x", "rw")
            .unwrap()
            .devices;
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].node.path, "/dev/x/a/b/node");
        assert_eq!(found[0].node.mode, 0o640);
        for (host_path, inside, permissions) in [
            ("/dev/no-such-device", "/dev/x", "r"),
            ("/etc/passwd", "/dev/x", "r"),
            ("dev/null", "/dev/x", "r"),
            ("", "", ""),
            ("/dev/null", "dev/x", "r"),
            ("/dev/null", "/", "r"),
            ("/dev/null", "/dev/x", "rx"),
            ("/dev/null", "/dev/x", "R"),
        ] {
            let error = devices_of(host_path, inside, permissions).unwrap_err();
            assert!(error.to_string().starts_with("devices[0]."), "{error}");
        }
    }

    #[test]
    fn seccomp_profiles_are_read() {
        let with = |profile: Option<SecurityProfile>, privileged| {
            let mut config = ContainerConfig::default();
            config.security.seccomp = profile;
            config.security.privileged = privileged;
            container(&config, &Handler::default(), &host())
                .map(|prepared| prepared.seccomp.is_some())
        };
        use SecurityProfile::{Localhost, RuntimeDefault, Unconfined};
        assert!(!with(None, false).unwrap());
        assert!(!with(Some(Unconfined), false).unwrap());
        assert!(with(Some(RuntimeDefault), false).unwrap());
        assert!(!with(Some(RuntimeDefault), true).unwrap());
        for bad in ["", "relative.json", "/no/such/profile.json"] {
            assert!(
                with(Some(Localhost(bad.to_owned())), false).is_err(),
                "{bad}"
            );
            assert!(!with(Some(Localhost(bad.to_owned())), true).unwrap());
        }
    }
}

//! Container Device Interface: devices that vendors describe in files.
//!
//! ```text
//! /etc/cdi/*.{json,yaml} --load--> Files --\
//! CDI_devices, cdi.k8s.io/* --names---------+--resolve--> Edits (pure, but for the host's device nodes)
//! ```
//!
//! The files are read whenever a container asks for a device, so a changed file counts at once. A later directory
//! wins over an earlier one; the same device twice in one directory is an error for who asks for it. A file
//! that cannot be used spoils only its own devices. Format: CDI 0.3.0 to 1.1.0 (`cncf-tags/container-device-interface`,
//! SPEC.md).

mod file;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use crate::base::edits::{DeviceEdit, Edits, MountEdit, NetDevice, Rdt, RdtEdit};
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::spec::cdi::file::{ContainerEdits, DeviceNode, Spec};
use crate::runtime::spec::error::{Result, SpecError};

/// Keys of annotations that ask for devices begin with this (device plugins of kubelet before 1.28).
const ANNOTATION: &str = "cdi.k8s.io/";
const FIELD: &str = "CDI_devices";
/// Most bytes of one file.
const MAX_FILE: u64 = 4 << 20;

/// What the directories hold.
#[derive(Debug, Default)]
pub(crate) struct Files {
    directories: Vec<PathBuf>,
    /// (index of the directory, file, content or what is wrong with it).
    files: Vec<(usize, PathBuf, std::result::Result<Spec, String>)>,
}

impl Files {
    /// Reads all files `*.json` and `*.yaml` of the directories; a missing directory holds none. Blocks on the disk.
    pub(crate) fn load(directories: &[PathBuf]) -> Self {
        let mut files = vec![];
        for (index, directory) in directories.iter().enumerate() {
            let entries = match fs::read_dir(directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => {
                    files.push((index, directory.clone(), Err(error.to_string())));
                    continue;
                }
            };
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.retain(|path| {
                let ending = path.extension().and_then(|ending| ending.to_str());
                matches!(ending, Some("json" | "yaml")) && !path.is_dir()
            });
            paths.sort();
            for path in paths {
                let spec = read(&path);
                files.push((index, path, spec));
            }
        }
        Self {
            directories: directories.to_vec(),
            files,
        }
    }

    /// The file and index of a device.
    fn find(&self, name: &str) -> Result<(&Path, &Spec, usize)> {
        let (kind, device) = name.split_once('=').unwrap_or_default();
        let mut found: Vec<(usize, &Path, &Spec, usize)> = vec![];
        for (directory, path, spec) in &self.files {
            let Ok(spec) = spec else { continue };
            if spec.kind != kind {
                continue;
            }
            let place = spec.devices.iter().position(|one| one.name == device);
            found.extend(place.map(|place| (*directory, path.as_path(), spec, place)));
        }
        let top = found.iter().map(|(directory, ..)| *directory).max();
        found.retain(|(directory, ..)| Some(*directory) == top);
        match found[..] {
            [(_, path, spec, place)] => Ok((path, spec, place)),
            [] => Err(SpecError::invalid(FIELD, name, self.absence(kind), MEND)),
            [(_, one, ..), (_, other, ..), ..] => {
                let problem = format!("is in {} and in {}", one.display(), other.display());
                let mend = "keep it in one of them";
                Err(SpecError::invalid(FIELD, name, problem, mend))
            }
        }
    }

    fn absence(&self, kind: &str) -> String {
        let directories: Vec<_> = self.directories.iter().map(|d| d.display()).collect();
        let list = directories
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        let mut text = match list.as_str() {
            "" => "cannot be had: cdi_spec_dirs is empty".to_owned(),
            list => format!("is in no CDI file of {list}"),
        };
        let known = self
            .files
            .iter()
            .filter_map(|(_, _, spec)| spec.as_ref().ok());
        if known.clone().all(|spec| spec.kind != kind) {
            text.push_str(", nor is its kind");
        }
        for (_, path, spec) in &self.files {
            if let Err(error) = spec {
                text = format!("{text} ({} cannot be used: {error})", path.display());
            }
        }
        text
    }
}

/// What to do about an unknown device.
const MEND: &str = "install the device's CDI file, or ask for another device";

fn read(path: &Path) -> std::result::Result<Spec, String> {
    let size = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if size > MAX_FILE {
        return Err(format!("larger than {MAX_FILE} bytes"));
    }
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("json") => file::from_json(&text),
        _ => file::from_yaml(&text),
    }
}

/// The devices that a container asks for by its field and its annotations: each once, in order.
///
/// # Errors
/// [`SpecError::Invalid`]: a name that is not `vendor/class=device`.
pub(crate) fn names(
    field: &[String],
    annotations: &BTreeMap<String, String>,
) -> Result<Vec<String>> {
    let mut names: Vec<String> = vec![];
    let mut add = |field: &str, name: &str| {
        if !is_qualified(name) {
            let problem = "is no fully qualified CDI device";
            let mend = "write it as vendor.com/class=device";
            return Err(SpecError::invalid(field, name, problem, mend));
        }
        if names.iter().all(|known| known != name) {
            names.push(name.to_owned());
        }
        Ok(())
    };
    for name in field {
        add(FIELD, name)?;
    }
    for (key, value) in annotations {
        if key.starts_with(ANNOTATION) {
            for name in value.split(',') {
                add(&format!("annotations[{key:?}]"), name)?;
            }
        }
    }
    Ok(names)
}

fn is_qualified(name: &str) -> bool {
    name.split_once('=')
        .is_some_and(|(kind, device)| file::is_kind(kind) && file::is_device_name(device))
}

/// The changes that the devices ask for. What a file says for all its devices comes once, before its first
/// device. Looks at the device nodes of the host where the file leaves something open.
///
/// # Errors
/// [`SpecError`] names the device and its file: unknown, twice, or a device node that the host does not have.
pub(crate) fn resolve(names: &[String], files: &Files) -> Result<Vec<Edits>> {
    let mut all = vec![];
    let mut opened: Vec<&Path> = vec![];
    for name in names {
        let (path, spec, place) = files.find(name)?;
        let by = format!("CDI device {name} of {}", path.display());
        if !opened.contains(&path) {
            opened.push(path);
            all.push(edits(&by, &spec.container_edits)?);
        }
        all.push(edits(&by, &spec.devices[place].container_edits)?);
    }
    Ok(all)
}

fn edits(by: &str, given: &ContainerEdits) -> Result<Edits> {
    let mut made = Edits {
        by: by.to_owned(),
        groups: given.additional_gids.clone(),
        ..Edits::default()
    };
    made.groups.retain(|group| *group != 0);
    for entry in &given.env {
        // Checked when it was read: there is a `=`.
        let (name, value) = entry.split_once('=').unwrap_or((entry, ""));
        made.env.push((name.to_owned(), Some(value.to_owned())));
    }
    for node in &given.device_nodes {
        made.devices.push(device(by, node)?);
    }
    for mount in &given.mounts {
        made.mounts.push(MountEdit {
            destination: mount.container_path.clone(),
            remove: false,
            kind: mount.kind.clone(),
            source: mount.host_path.clone(),
            options: mount.options.clone(),
        });
    }
    for hook in &given.hooks {
        // Checked when it was read.
        let point = HookPoint::from_name(&hook.hook_name).unwrap_or(HookPoint::CreateRuntime);
        made.hooks.push(Hook {
            point,
            path: hook.path.clone(),
            args: hook.args.clone(),
            env: hook.env.clone(),
            timeout: hook.timeout,
        });
    }
    if let Some(rdt) = &given.intel_rdt {
        // enableCMT and enableMBM have no effect any more: OCI 1.3 has enableMonitoring instead.
        let group = Rdt {
            clos_id: rdt.clos_id.clone(),
            schemata: rdt.schemata.clone().unwrap_or_default(),
            l3_cache_schema: rdt.l3_cache_schema.clone(),
            mem_bw_schema: rdt.mem_bw_schema.clone(),
            enable_monitoring: rdt.enable_monitoring,
        };
        made.rdt.push(("intelRdt", RdtEdit::Replace(Some(group))));
    }
    for interface in &given.net_devices {
        made.net_devices.push(NetDevice {
            host: interface.host_interface_name.clone(),
            name: interface.name.clone(),
        });
    }
    Ok(made)
}

/// A node with what its file leaves open taken from the host.
fn device(by: &str, node: &DeviceNode) -> Result<DeviceEdit> {
    let host_path = match &*node.host_path {
        "" => &*node.path,
        given => given,
    };
    let mut made = DeviceEdit {
        path: node.path.clone(),
        remove: false,
        host_path: host_path.to_owned(),
        kind: node.kind.clone(),
        major: node.major,
        minor: node.minor,
        mode: node.file_mode.map(|mode| mode & 0o777),
        uid: node.uid,
        gid: node.gid,
        access: match &*node.permissions {
            "" => "rwm".to_owned(),
            "none" => String::new(),
            given => given.to_owned(),
        },
    };
    let described = !node.kind.is_empty() && node.major != 0;
    let field = || format!("{by}: deviceNodes[{}].hostPath", node.path);
    let metadata = match fs::symlink_metadata(host_path) {
        Ok(metadata) => metadata,
        Err(_) if described => return Ok(made),
        Err(error) => {
            return Err(SpecError::host(
                field(),
                "find",
                Path::new(host_path),
                error,
            ));
        }
    };
    let kind = match metadata.file_type() {
        kind if kind.is_block_device() => "b",
        kind if kind.is_char_device() => "c",
        _ if described => return Ok(made),
        _ => {
            let mend = "name a device node of this node";
            return Err(SpecError::invalid(field(), host_path, "is no device", mend));
        }
    };
    made.mode.get_or_insert(metadata.mode() & 0o777);
    if described {
        return Ok(made);
    }
    let is = match &*made.kind {
        "u" => "c",
        given => given,
    };
    if !is.is_empty() && is != kind {
        let problem = format!("is of type {kind}, not {is}");
        let mend = "correct the type in the file";
        return Err(SpecError::invalid(field(), host_path, problem, mend));
    }
    kind.clone_into(&mut made.kind);
    made.major = rustix::fs::major(metadata.rdev());
    made.minor = rustix::fs::minor(metadata.rdev());
    Ok(made)
}

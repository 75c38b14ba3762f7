//! One CDI file: its model, and what a file must keep to. Unknown keys are errors, as the format asks.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::base::hook::HookPoint;

/// Versions of the format, oldest first.
const VERSIONS: [(u32, u32); 10] = [
    (0, 1),
    (0, 2),
    (0, 3),
    (0, 4),
    (0, 5),
    (0, 6),
    (0, 7),
    (0, 8),
    (1, 0),
    (1, 1),
];

/// A file.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Spec {
    cdi_version: String,
    /// `vendor.com/class`.
    pub(super) kind: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    pub(super) devices: Vec<Device>,
    #[serde(default)]
    pub(super) container_edits: ContainerEdits,
}

/// A device.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Device {
    pub(super) name: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub(super) container_edits: ContainerEdits,
}

/// What a device asks for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ContainerEdits {
    pub(super) env: Vec<String>,
    pub(super) device_nodes: Vec<DeviceNode>,
    pub(super) net_devices: Vec<NetDevice>,
    pub(super) hooks: Vec<FileHook>,
    pub(super) mounts: Vec<FileMount>,
    pub(super) intel_rdt: Option<IntelRdt>,
    pub(super) additional_gids: Vec<u32>,
}

/// A device node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct DeviceNode {
    pub(super) path: String,
    pub(super) host_path: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) file_mode: Option<u32>,
    pub(super) permissions: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// A mount.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FileMount {
    pub(super) host_path: String,
    pub(super) container_path: String,
    #[serde(default)]
    pub(super) options: Vec<String>,
    #[serde(default, rename = "type")]
    pub(super) kind: String,
}

/// A hook.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct FileHook {
    pub(super) hook_name: String,
    pub(super) path: String,
    #[serde(default)]
    pub(super) args: Vec<String>,
    #[serde(default)]
    pub(super) env: Vec<String>,
    pub(super) timeout: Option<u64>,
}

/// resctrl settings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct IntelRdt {
    #[serde(rename = "closID")]
    pub(super) clos_id: String,
    pub(super) l3_cache_schema: String,
    pub(super) mem_bw_schema: String,
    pub(super) schemata: Option<Vec<String>>,
    pub(super) enable_monitoring: bool,
    // Until 1.1.0; they never had an effect without a CLOS.
    #[serde(rename = "enableCMT")]
    enable_cmt: bool,
    #[serde(rename = "enableMBM")]
    enable_mbm: bool,
}

/// A network interface to move.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NetDevice {
    pub(super) host_interface_name: String,
    pub(super) name: String,
}

/// Reads JSON.
///
/// # Errors
/// What is wrong, for people.
pub(super) fn from_json(text: &str) -> Result<Spec, String> {
    checked(serde_json::from_str(text).map_err(|error| error.to_string())?)
}

/// Reads YAML; a number with a leading 0 is octal.
///
/// # Errors
/// What is wrong, for people.
pub(super) fn from_yaml(text: &str) -> Result<Spec, String> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true, with_snippet: false };
    let spec = serde_saphyr::from_str_with_options(text, options);
    checked(spec.map_err(|error| error.to_string())?)
}

fn checked(spec: Spec) -> Result<Spec, String> {
    if !is_kind(&spec.kind) {
        return Err(format!(
            "kind {:?}: write it as vendor.com/class",
            spec.kind
        ));
    }
    if spec.devices.is_empty() {
        return Err("devices: there is none".to_owned());
    }
    check_version(&spec)?;
    check_edits("containerEdits", &spec.container_edits)?;
    for (index, device) in spec.devices.iter().enumerate() {
        let field = format!("devices[{index}]");
        if !is_device_name(&device.name) {
            return Err(format!(
                "{field}.name {:?}: use letters, digits, _, -, . and :, a letter or digit first and last",
                device.name
            ));
        }
        if spec.devices[..index].iter().any(|d| d.name == device.name) {
            return Err(format!(
                "{field}.name {:?}: there are two of it",
                device.name
            ));
        }
        check_edits(&format!("{field}.containerEdits"), &device.container_edits)?;
    }
    Ok(spec)
}

fn check_version(spec: &Spec) -> Result<(), String> {
    let given = spec.cdi_version.trim_start_matches('v');
    let mut numbers = given.split('.').map(str::parse::<u32>);
    let version = match (
        numbers.next(),
        numbers.next(),
        numbers.next(),
        numbers.next(),
    ) {
        (Some(Ok(major)), Some(Ok(minor)), Some(Ok(0)), None) => (major, minor),
        _ => (0, 0),
    };
    if !VERSIONS.contains(&version) {
        return Err(format!(
            "cdiVersion {:?}: this berth reads 0.3.0 to 1.1.0",
            spec.cdi_version
        ));
    }
    let needed = needed_version(spec);
    // All before 0.3.0 count as that.
    if version.max((0, 3)) < needed {
        return Err(format!(
            "cdiVersion {:?}: what the file uses needs at least {}.{}.0",
            spec.cdi_version, needed.0, needed.1
        ));
    }
    Ok(())
}

/// The oldest version that has all that the file uses.
fn needed_version(spec: &Spec) -> (u32, u32) {
    let edits = || {
        let own = spec.devices.iter().map(|device| &device.container_edits);
        own.chain([&spec.container_edits])
    };
    let rdt = |test: fn(&IntelRdt) -> bool| edits().any(|e| e.intel_rdt.as_ref().is_some_and(test));
    let digit_first = |device: &Device| {
        device
            .name
            .starts_with(|first: char| first.is_ascii_digit())
    };
    if rdt(|rdt| rdt.schemata.is_some() || rdt.enable_monitoring)
        || edits().any(|e| !e.net_devices.is_empty())
    {
        (1, 1)
    } else if rdt(|_| true) || edits().any(|e| !e.additional_gids.is_empty()) {
        (0, 7)
    } else if !spec.annotations.is_empty()
        || spec.devices.iter().any(|d| !d.annotations.is_empty())
        || spec
            .kind
            .rsplit('/')
            .next()
            .is_some_and(|c| c.contains('.'))
    {
        (0, 6)
    } else if spec.devices.iter().any(digit_first)
        || edits().any(|e| e.device_nodes.iter().any(|n| !n.host_path.is_empty()))
    {
        (0, 5)
    } else if edits().any(|e| e.mounts.iter().any(|mount| !mount.kind.is_empty())) {
        (0, 4)
    } else {
        (0, 3)
    }
}

fn check_edits(field: &str, edits: &ContainerEdits) -> Result<(), String> {
    let absolute = |field: String, path: &str| match path.starts_with('/') {
        true => Ok(()),
        false => Err(format!("{field} {path:?}: use an absolute path")),
    };
    for (index, entry) in edits.env.iter().enumerate() {
        if entry
            .split_once('=')
            .is_none_or(|(name, _)| name.is_empty())
        {
            return Err(format!("{field}.env[{index}] {entry:?}: write NAME=value"));
        }
    }
    for (index, node) in edits.device_nodes.iter().enumerate() {
        let field = format!("{field}.deviceNodes[{index}]");
        absolute(format!("{field}.path"), &node.path)?;
        if !node.host_path.is_empty() {
            absolute(format!("{field}.hostPath"), &node.host_path)?;
        }
        if !matches!(&*node.kind, "" | "b" | "c" | "u" | "p") {
            return Err(format!("{field}.type {:?}: use b, c, u or p", node.kind));
        }
        if node.permissions != "none" && !node.permissions.chars().all(|c| "rwm".contains(c)) {
            return Err(format!(
                "{field}.permissions {:?}: use letters of rwm, or none",
                node.permissions
            ));
        }
    }
    for (index, mount) in edits.mounts.iter().enumerate() {
        let field = format!("{field}.mounts[{index}]");
        if mount.host_path.is_empty() {
            return Err(format!("{field}.hostPath: there is none"));
        }
        absolute(format!("{field}.containerPath"), &mount.container_path)?;
    }
    for (index, hook) in edits.hooks.iter().enumerate() {
        let field = format!("{field}.hooks[{index}]");
        if HookPoint::from_name(&hook.hook_name).is_none() {
            return Err(format!("{field}.hookName {:?}: unknown", hook.hook_name));
        }
        absolute(format!("{field}.path"), &hook.path)?;
        if hook.timeout == Some(0) {
            return Err(format!("{field}.timeout 0: use at least 1 second"));
        }
    }
    for (index, interface) in edits.net_devices.iter().enumerate() {
        if interface.host_interface_name.is_empty() || interface.name.is_empty() {
            return Err(format!("{field}.netDevices[{index}]: give both names"));
        }
    }
    if let Some(rdt) = &edits.intel_rdt {
        let unfit = |name: &String| name.contains(['/', '\n']) || name.len() >= 4096;
        let schemas = [&rdt.l3_cache_schema, &rdt.mem_bw_schema];
        if unfit(&rdt.clos_id) || matches!(&*rdt.clos_id, "." | "..") {
            return Err(format!("{field}.intelRdt.closID {:?}", rdt.clos_id));
        }
        let monitored = rdt.enable_cmt || rdt.enable_mbm;
        if rdt.clos_id.is_empty() && schemas.iter().all(|s| s.is_empty()) && monitored {
            return Err(format!("{field}.intelRdt: names no class to monitor"));
        }
    }
    Ok(())
}

/// `vendor.com/class`.
pub(super) fn is_kind(kind: &str) -> bool {
    let label = |text: &str, also: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || also.contains(c);
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(inner)
    };
    kind.split_once('/').is_some_and(|(vendor, class)| {
        label(vendor, "_-.") && label(class, "_-.") && kind.len() <= 253 && class.len() <= 63
    })
}

/// Letters, digits and `_-.:`, the first and last no sign.
pub(super) fn is_device_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric();
    name.starts_with(plain)
        && name.ends_with(plain)
        && name.chars().all(|c| plain(c) || "_-.:".contains(c))
}

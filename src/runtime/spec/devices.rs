//! Devices of a container: nodes and rules. All is denied that is not listed here.

use std::path::PathBuf;

use crate::base::security::ContainerSecurity;
use crate::runtime::cgroups::devices::{DeviceKind, DeviceRule};
use crate::runtime::plan::DeviceNode;
use crate::runtime::spec::ContainerInput;
use crate::runtime::spec::mounts::is_below;

/// A device of the node that a container gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostDevice {
    /// The node.
    pub(crate) node: DeviceNode,
    /// Subset of `rwm`.
    pub(crate) permissions: String,
}

/// Nodes every container has: (name, major, minor), all character devices with mode 0666.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
/// Character devices every container may use besides: (major, minor): `/dev/console`, `/dev/ptmx` and the
/// slaves of devpts.
const TERMINALS: [(u32, Option<u32>); 3] = [(5, Some(1)), (5, Some(2)), (136, None)];

fn rule(kind: DeviceKind, major: Option<u32>, minor: Option<u32>, access: &str) -> DeviceRule {
    DeviceRule {
        allow: true,
        kind,
        major,
        minor,
        read: access.contains('r'),
        write: access.contains('w'),
        mknod: access.contains('m'),
    }
}

/// Nodes to make and rules in order; `own_dev`: `/dev` is the runtime's own, nodes may be made there.
///
/// Any node may be made, as capability `MKNOD` is among the defaults; that does not open it.
pub(crate) fn of_container(
    input: &ContainerInput<'_>,
    own_dev: bool,
) -> (Vec<DeviceNode>, Vec<DeviceRule>) {
    let mut given = input.prepared.devices.clone();
    let security = &input.config.security;
    let all = security.privileged && !input.prepared.without_host_devices;
    if input.handler.defaults.device_ownership && !all {
        give(&mut given, security);
    }
    let mut nodes: Vec<DeviceNode> = vec![];
    let basic = NODES.map(|(name, major, minor)| DeviceNode {
        path: format!("/dev/{name}"),
        host_path: PathBuf::from("/dev").join(name),
        block: false,
        major,
        minor,
        mode: 0o666,
        uid: 0,
        gid: 0,
    });
    for node in basic
        .into_iter()
        .chain(given.iter().map(|device| device.node.clone()))
    {
        match nodes.iter_mut().find(|old| old.path == node.path) {
            Some(old) => *old = node,
            None => nodes.push(node),
        }
    }
    if !own_dev {
        nodes.retain(|node| !is_below(&node.path, "/dev"));
    }
    (nodes, rules(all, &given))
}

/// Gives devices to the user and group of the container, where it names them by number.
fn give(devices: &mut [HostDevice], security: &ContainerSecurity) {
    let id = |given: Option<i64>| given.and_then(|id| u32::try_from(id).ok());
    for device in devices {
        device.node.uid = id(security.run_as_user).unwrap_or(device.node.uid);
        device.node.gid = id(security.run_as_group).unwrap_or(device.node.gid);
    }
}

fn rules(all: bool, given: &[HostDevice]) -> Vec<DeviceRule> {
    let everything = rule(DeviceKind::All, None, None, "rwm");
    if all {
        return vec![everything];
    }
    let mut rules = vec![
        DeviceRule {
            allow: false,
            ..everything
        },
        rule(DeviceKind::Char, None, None, "m"),
        rule(DeviceKind::Block, None, None, "m"),
    ];
    for (_, major, minor) in NODES {
        rules.push(rule(DeviceKind::Char, Some(major), Some(minor), "rwm"));
    }
    for (major, minor) in TERMINALS {
        rules.push(rule(DeviceKind::Char, Some(major), minor, "rwm"));
    }
    for device in given {
        let kind = if device.node.block {
            DeviceKind::Block
        } else {
            DeviceKind::Char
        };
        let (major, minor) = (device.node.major, device.node.minor);
        rules.push(rule(kind, Some(major), Some(minor), &device.permissions));
    }
    rules
}

/// Rules of the sandbox process, which opens nothing.
pub(crate) fn of_sandbox() -> Vec<DeviceRule> {
    rules(false, &[])
}

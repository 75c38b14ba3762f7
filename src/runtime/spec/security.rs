//! Security settings of a container's or sandbox's process.

use crate::base::security::{CapabilityChange, ContainerSecurity, SecurityProfile};
use crate::runtime::apparmor;
use crate::runtime::capabilities::{self, UnknownCapability};
use crate::runtime::plan::CapabilityMasks;
use crate::runtime::spec::base_spec::Base;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::HostFacts;

/// Paths hidden unless the caller asks otherwise: for clients that, unlike kubelet, send no list.
pub(crate) const DEFAULT_MASKED_PATHS: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/sched_debug",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Paths made read-only unless the caller asks otherwise.
pub(crate) const DEFAULT_READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];
/// Energy counters by which processes spy on others: hidden whenever anything is.
const POWERCAP: &str = "/sys/devices/virtual/powercap";

/// Capability sets; `default`: the configuration's default set, if it has one.
///
/// # Errors
/// [`SpecError::Invalid`]: a capability that does not exist.
pub(crate) fn capabilities(
    security: &ContainerSecurity,
    default: Option<u64>,
    host: &HostFacts,
) -> Result<CapabilityMasks> {
    let available = host.available_capabilities();
    let default = default.unwrap_or_else(capabilities::default_set);
    let privileged = CapabilityChange {
        // It has all, whatever is added or dropped; what is not asked for is not ambient.
        add_ambient: security.capabilities.add_ambient.clone(),
        ..CapabilityChange::default()
    };
    let made = match security.privileged {
        true => capabilities::of_container(&privileged, available, available),
        false => capabilities::of_container(&security.capabilities, default, available),
    };
    made.map_err(|UnknownCapability(name)| {
        let problem = "is no capability";
        let mend = "use a name of capabilities(7), or ALL";
        SpecError::invalid("capabilities", name, problem, mend)
    })
}

/// (masked, read-only) paths: as asked for, and with any those of the base spec; none for a privileged container.
///
/// # Errors
/// [`SpecError::Invalid`]: a path is not absolute.
pub(crate) fn hidden_paths(
    security: &ContainerSecurity,
    base: &Base,
) -> Result<(Vec<String>, Vec<String>)> {
    for (field, paths) in [
        ("masked_paths", &security.masked_paths),
        ("readonly_paths", &security.readonly_paths),
    ] {
        let bad = |path: &&String| !path.starts_with('/') || path.contains('\0') || *path == "/";
        if let Some(path) = paths.iter().find(bad) {
            let problem = "is not an absolute path below the root";
            return Err(SpecError::invalid(
                field,
                path,
                problem,
                "use an absolute path",
            ));
        }
    }
    if security.privileged {
        return Ok((vec![], vec![]));
    }
    let with = |asked: &Vec<String>, more: &Vec<String>| {
        let mut all = asked.clone();
        // No list at all is procMount: Unmasked.
        let more = more.iter().filter(|path| !asked.contains(path));
        all.extend(more.filter(|_| !asked.is_empty()).cloned());
        all
    };
    let mut masked = with(&security.masked_paths, &base.masked_paths);
    if !masked.is_empty() && masked.iter().all(|path| path != POWERCAP) {
        masked.push(POWERCAP.to_owned());
    }
    Ok((masked, with(&security.readonly_paths, &base.readonly_paths)))
}

/// AppArmor profile of the process; empty: none. `default`: the default profile is loaded, and meant where none is
/// named.
///
/// # Errors
/// [`SpecError::Precondition`]: a profile by name on a node without AppArmor.
pub(crate) fn apparmor(
    field: &str,
    asked: Option<&SecurityProfile>,
    default: bool,
    host: &HostFacts,
) -> Result<String> {
    match asked {
        Some(SecurityProfile::Localhost(name)) => {
            let name = name.strip_prefix("localhost/").unwrap_or(name);
            if name.is_empty() || name.contains(['\0', '\n']) {
                let problem = "is no name of a profile";
                return Err(SpecError::invalid(
                    field,
                    name,
                    problem,
                    "name a loaded profile",
                ));
            }
            if !host.apparmor {
                let problem = "is asked for, but this node has no AppArmor";
                let mend = "use RuntimeDefault or Unconfined";
                return Err(SpecError::precondition(field, name, problem, mend));
            }
            Ok(name.to_owned())
        }
        None | Some(SecurityProfile::RuntimeDefault) if default => {
            Ok(apparmor::DEFAULT_NAME.to_owned())
        }
        None | Some(SecurityProfile::RuntimeDefault | SecurityProfile::Unconfined) => {
            Ok(String::new())
        }
    }
}

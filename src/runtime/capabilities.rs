//! Capabilities: names, numbers, and the sets that a container gets. Kernel: capabilities(7).

use crate::base::security::CapabilityChange;
use crate::runtime::plan::CapabilityMasks;

/// Names without `CAP_`; the index is the capability's number (linux/capability.h of 5.9 and later).
pub(crate) const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Those a container has unless it asks otherwise.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// A name that no kernel knows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct UnknownCapability(pub(crate) String);

/// Mask of one capability by name: with or without `CAP_`, in any case. Absent: no such capability.
pub(crate) fn mask(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    NAMES
        .iter()
        .position(|known| *known == bare)
        .map(|number| 1 << number)
}

/// `CAP_...` names of a set, in the order of their numbers. Bits without a name are left out.
pub(crate) fn names(set: u64) -> Vec<String> {
    NAMES
        .iter()
        .enumerate()
        .filter(|(number, _)| set & (1 << number) != 0)
        .map(|(_, name)| format!("CAP_{name}"))
        .collect()
}

/// The default set.
pub(crate) fn default_set() -> u64 {
    DEFAULT.iter().filter_map(|name| mask(name)).sum()
}

/// Sets of a container that is not privileged.
///
/// `default` is what one has that asks for nothing. `ALL` is applied first, whether added or dropped (both: dropped); then single names are added, then
/// single names dropped. Ambient ones count as added. What is not in `available` (newer than the kernel,
/// or outside the daemon's own bounding set) is left out.
///
/// # Errors
/// [`UnknownCapability`] for a name of no capability.
pub(crate) fn of_container(
    change: &CapabilityChange,
    default: u64,
    available: u64,
) -> Result<CapabilityMasks, UnknownCapability> {
    let is_all =
        |name: &String| name.eq_ignore_ascii_case("ALL") || name.eq_ignore_ascii_case("CAP_ALL");
    let single = |names: &[String]| {
        names
            .iter()
            .filter(|name| !is_all(name))
            .try_fold(0, |set, name| match mask(name) {
                Some(bit) => Ok(set | bit),
                None => Err(UnknownCapability(name.clone())),
            })
    };
    let mut set = default;
    if change.add.iter().any(is_all) {
        set = available;
    }
    if change.drop.iter().any(is_all) {
        set = 0;
    }
    let dropped = single(&change.drop)?;
    let mut ambient = single(&change.add_ambient)?;
    if change.add_ambient.iter().any(is_all) {
        ambient |= available;
    }
    set = (set | single(&change.add)? | ambient) & !dropped & available;
    Ok(CapabilityMasks {
        bounding: set,
        permitted: set,
        ambient: ambient & set,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = (1 << 41) - 1;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn set(add: &[&str], drop: &[&str], available: u64) -> Result<u64, UnknownCapability> {
        let change = CapabilityChange {
            add: list(add),
            drop: list(drop),
            add_ambient: vec![],
        };
        of_container(&change, default_set(), available).map(|masks| {
            assert_eq!(masks.bounding, masks.permitted);
            assert_eq!(masks.ambient, 0);
            masks.permitted
        })
    }

    #[test]
    fn the_default_set_has_the_known_value() {
        // What Docker's containers show in CapBnd.
        assert_eq!(default_set(), 0xa804_25fb);
    }

    #[test]
    fn additions_and_drops() {
        let bit = |name| mask(name).unwrap();
        let cases: [(&[&str], &[&str], u64); 9] = [
            (&[], &[], default_set()),
            (&["SYS_ADMIN"], &[], default_set() | bit("SYS_ADMIN")),
            (&["cap_sys_admin"], &[], default_set() | bit("SYS_ADMIN")),
            (&[], &["net_raw"], default_set() & !bit("NET_RAW")),
            (&["all"], &[], ALL),
            (&[], &["ALL"], 0),
            (&["NET_ADMIN"], &["ALL"], bit("NET_ADMIN")),
            (&["ALL"], &["SYS_ADMIN"], ALL & !bit("SYS_ADMIN")),
            (&["ALL"], &["ALL"], 0),
        ];
        for (add, drop, expected) in cases {
            assert_eq!(set(add, drop, ALL), Ok(expected), "+{add:?} -{drop:?}");
        }
        let bad = Err(UnknownCapability("SYS_MAGIC".to_owned()));
        assert_eq!(set(&["SYS_MAGIC"], &[], ALL), bad);
        assert_eq!(set(&[], &["SYS_MAGIC"], ALL), bad);
    }

    #[test]
    fn what_the_kernel_or_we_lack_is_left_out() {
        let without_bpf = ALL & !mask("BPF").unwrap();
        assert_eq!(set(&["BPF"], &[], without_bpf), Ok(default_set()));
        assert_eq!(set(&["ALL"], &[], without_bpf), Ok(without_bpf));
    }

    #[test]
    fn ambient_ones_are_in_every_set() {
        let change = CapabilityChange {
            add: vec![],
            drop: list(&["ALL"]),
            add_ambient: list(&["NET_BIND_SERVICE"]),
        };
        let bit = mask("NET_BIND_SERVICE").unwrap();
        assert_eq!(
            of_container(&change, 0, ALL),
            Ok(CapabilityMasks {
                bounding: bit,
                permitted: bit,
                ambient: bit,
            })
        );
    }

    #[test]
    fn names_come_back() {
        let all = names(u64::MAX);
        assert_eq!(all.len(), 41);
        assert_eq!(all.iter().map(|name| mask(name).unwrap()).sum::<u64>(), ALL);
    }
}

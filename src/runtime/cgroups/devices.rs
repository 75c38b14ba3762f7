//! Device access of a cgroup: the v1 devices controller, or an eBPF program on v2. Default: deny.
//!
//! Rules are folded first into one table (later rules override earlier ones for the same device), so that both
//! versions answer alike: access is allowed when one entry covers all that is asked for.
//!
//! Kernel: Documentation/admin-guide/cgroup-v1/devices.rst, `BPF_PROG_TYPE_CGROUP_DEVICE` (4.15).

use std::path::Path;

use super::{CgroupError, Cgroups, Version, files};
use crate::sys::bpf::{self, Instruction};

/// Kind of device a rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    /// Both kinds; major and minor are not looked at.
    All,
    /// Block devices.
    Block,
    /// Character devices.
    Char,
}

/// One rule, in the order of the OCI spec (`linux.resources.devices`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "three kinds of access, each allowed or denied"
)]
pub(crate) struct DeviceRule {
    /// Allow or deny.
    pub(crate) allow: bool,
    /// Kind.
    pub(crate) kind: DeviceKind,
    /// Major number; absent: any.
    pub(crate) major: Option<u32>,
    /// Minor number; absent: any.
    pub(crate) minor: Option<u32>,
    /// Open for reading.
    pub(crate) read: bool,
    /// Open for writing.
    pub(crate) write: bool,
    /// Make the node.
    pub(crate) mknod: bool,
}

impl DeviceRule {
    /// Everything is denied; the usual first rule.
    #[cfg(test)]
    pub(crate) const DENY_ALL: Self = Self {
        allow: false,
        kind: DeviceKind::All,
        major: None,
        minor: None,
        read: true,
        write: true,
        mknod: true,
    };

    fn access(&self) -> u32 {
        (u32::from(self.mknod) * MKNOD)
            | (u32::from(self.read) * READ)
            | (u32::from(self.write) * WRITE)
    }
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;

/// What is allowed (or, where the default is to allow, denied).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    kind: DeviceKind,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// Rules folded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Table {
    default_allow: bool,
    exceptions: Vec<Entry>,
}

/// Folds rules; without any the default is to deny.
pub(super) fn fold(rules: &[DeviceRule]) -> Table {
    let mut table = Table {
        default_allow: false,
        exceptions: vec![],
    };
    for rule in rules {
        if rule.kind == DeviceKind::All {
            table = Table {
                default_allow: rule.allow,
                exceptions: vec![],
            };
            continue;
        }
        let same =
            |e: &&mut Entry| (e.kind, e.major, e.minor) == (rule.kind, rule.major, rule.minor);
        let found = table.exceptions.iter_mut().find(same);
        let exception = rule.allow != table.default_allow;
        match found {
            Some(entry) if exception => entry.access |= rule.access(),
            Some(entry) => entry.access &= !rule.access(),
            None if exception => table.exceptions.push(Entry {
                kind: rule.kind,
                major: rule.major,
                minor: rule.minor,
                access: rule.access(),
            }),
            None => {}
        }
    }
    table.exceptions.retain(|entry| entry.access != 0);
    table
}

/// Applies rules to cgroup `path`; no rules: nothing is changed.
///
/// # Errors
/// [`CgroupError::Devices`] when the kernel refuses the program, [`CgroupError::File`] on v1.
pub(super) fn apply(
    cgroups: &Cgroups,
    path: &str,
    rules: &[DeviceRule],
) -> Result<(), CgroupError> {
    if rules.is_empty() {
        return Ok(());
    }
    let table = fold(rules);
    let Some(directory) = cgroups.directory("devices", path) else {
        tracing::warn!("device rules not applied: this machine has no devices controller");
        return Ok(());
    };
    match cgroups.version() {
        Version::V1 => apply_v1(&directory, &table),
        Version::V2 => bpf::attach_device_program(&directory, &program(&table)).map_err(|source| {
            CgroupError::Devices {
                path: directory,
                source,
            }
        }),
    }
}

fn apply_v1(directory: &Path, table: &Table) -> Result<(), CgroupError> {
    let (all, others) = if table.default_allow {
        ("devices.allow", "devices.deny")
    } else {
        ("devices.deny", "devices.allow")
    };
    files::write(&directory.join(all), "a")?;
    for entry in &table.exceptions {
        files::write(&directory.join(others), &line_v1(entry))?;
    }
    Ok(())
}

fn line_v1(entry: &Entry) -> String {
    let kind = if entry.kind == DeviceKind::Block {
        'b'
    } else {
        'c'
    };
    let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
    let mut access = String::new();
    for (bit, letter) in [(READ, 'r'), (WRITE, 'w'), (MKNOD, 'm')] {
        if entry.access & bit != 0 {
            access.push(letter);
        }
    }
    format!(
        "{kind} {}:{} {access}",
        number(entry.major),
        number(entry.minor)
    )
}

/// The program: context {access << 16 | type, major, minor}; 1 allows, 0 denies.
pub(super) fn program(table: &Table) -> Vec<Instruction> {
    use bpf::{
        and, exit, jump_if_not_equal, jump_if_zero, load_context, move_immediate, move_register,
        shift_right,
    };
    const TYPE: u8 = 2;
    const ACCESS: u8 = 3;
    const MAJOR: u8 = 4;
    const MINOR: u8 = 5;
    const SCRATCH: u8 = 6;
    let mut code = vec![
        load_context(TYPE, 0),
        move_register(ACCESS, TYPE),
        and(TYPE, 0xffff),
        shift_right(ACCESS, 16),
        load_context(MAJOR, 4),
        load_context(MINOR, 8),
    ];
    for entry in &table.exceptions {
        let mut checks = vec![];
        let kind = if entry.kind == DeviceKind::Block {
            1
        } else {
            2
        };
        checks.push(jump_if_not_equal(TYPE, kind));
        if let Some(major) = entry.major {
            checks.push(jump_if_not_equal(MAJOR, major));
        }
        if let Some(minor) = entry.minor {
            checks.push(jump_if_not_equal(MINOR, minor));
        }
        checks.push(move_register(SCRATCH, ACCESS));
        if table.default_allow {
            // Denied when anything asked for is in the entry.
            checks.push(and(SCRATCH, entry.access));
            checks.push(jump_if_zero(SCRATCH));
        } else {
            // Allowed when nothing asked for is outside the entry.
            checks.push(and(SCRATCH, 7 & !entry.access));
            checks.push(jump_if_not_equal(SCRATCH, 0));
        }
        checks.push(move_immediate(0, u32::from(!table.default_allow)));
        checks.push(exit());
        let total = checks.len();
        for (at, mut instruction) in checks.into_iter().enumerate() {
            instruction.skip_to(at, total);
            code.push(instruction);
        }
    }
    code.push(move_immediate(0, u32::from(table.default_allow)));
    code.push(exit());
    code
}

//! Block I/O limits of a container, as plain values.

use serde::{Deserialize, Serialize};

/// Limits of a cgroup; what is absent is the kernel's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlockIo {
    /// Weight against other cgroups, 10..=1000; 0: the kernel's again.
    pub(crate) weight: Option<u16>,
    /// Limits on single devices, each once.
    pub(crate) devices: Vec<DeviceIo>,
}

/// Limits on one block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeviceIo {
    /// Major number.
    pub(crate) major: u32,
    /// Minor number.
    pub(crate) minor: u32,
    /// As [`BlockIo::weight`].
    pub(crate) weight: Option<u16>,
    /// Bytes read in a second; 0: unlimited. So are the next three.
    pub(crate) read_bps: Option<u64>,
    /// Bytes written in a second.
    pub(crate) write_bps: Option<u64>,
    /// Reads in a second.
    pub(crate) read_iops: Option<u64>,
    /// Writes in a second.
    pub(crate) write_iops: Option<u64>,
}

impl DeviceIo {
    /// These limits with those that `new` gives over them.
    pub(crate) fn with(self, new: Self) -> Self {
        Self {
            major: self.major,
            minor: self.minor,
            weight: new.weight.or(self.weight),
            read_bps: new.read_bps.or(self.read_bps),
            write_bps: new.write_bps.or(self.write_bps),
            read_iops: new.read_iops.or(self.read_iops),
            write_iops: new.write_iops.or(self.write_iops),
        }
    }

    /// Takes back all that this limits.
    fn lifted(self) -> Self {
        Self {
            major: self.major,
            minor: self.minor,
            weight: self.weight.map(|_| 0),
            read_bps: self.read_bps.map(|_| 0),
            write_bps: self.write_bps.map(|_| 0),
            read_iops: self.read_iops.map(|_| 0),
            write_iops: self.write_iops.map(|_| 0),
        }
    }
}

impl BlockIo {
    /// The limits of a device, to be changed.
    pub(crate) fn device(&mut self, major: u32, minor: u32) -> &mut DeviceIo {
        let known = |one: &DeviceIo| (one.major, one.minor) == (major, minor);
        let at = self.devices.iter().position(known).unwrap_or_else(|| {
            self.devices.push(DeviceIo {
                major,
                minor,
                ..DeviceIo::default()
            });
            self.devices.len() - 1
        });
        &mut self.devices[at]
    }

    /// What makes a cgroup that has the limits `old` have these and no others.
    pub(crate) fn after(&self, old: &Self) -> Self {
        let mut made = Self {
            weight: self.weight.or(old.weight.map(|_| 0)),
            devices: old.devices.iter().map(|one| one.lifted()).collect(),
        };
        for new in &self.devices {
            let one = made.device(new.major, new.minor);
            *one = one.with(*new);
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_old_limits_had_is_taken_back() {
        let mut old = BlockIo {
            weight: Some(50),
            ..BlockIo::default()
        };
        *old.device(8, 0) = DeviceIo {
            major: 8,
            read_bps: Some(100),
            write_iops: Some(7),
            weight: Some(20),
            ..DeviceIo::default()
        };
        let mut new = BlockIo::default();
        new.device(8, 0).read_bps = Some(200);
        new.device(8, 16).write_bps = Some(300);
        let made = new.after(&old);
        assert_eq!(made.weight, Some(0));
        let [first, second] = made.devices[..] else {
            panic!("{made:?}")
        };
        assert_eq!((first.read_bps, first.write_bps), (Some(200), None));
        assert_eq!((first.write_iops, first.weight), (Some(0), Some(0)));
        assert_eq!((second.minor, second.write_bps), (16, Some(300)));
        assert_eq!(
            BlockIo::default().after(&BlockIo::default()),
            BlockIo::default()
        );
    }
}

//! Block I/O limits as files of either version.
//!
//! | limit | v1 (`blkio.`) | v2 (`io.`) |
//! |---|---|---|
//! | weight, 10..=1000 | bfq.weight, else weight | bfq.weight, else weight (scaled to 1..=10000) |
//! | weight of a device | bfq.weight_device, else weight_device | the same files, a line for each device |
//! | rates | throttle.{read,write}_{bps,iops}_device | max |
//!
//! Without the BFQ scheduler a kernel may have no file for weights: then they are left out, which the log tells once. 0 takes a
//! limit back.

use super::Version;
use super::limits::{Line, Write};
use crate::base::block_io::{BlockIo, DeviceIo};

/// The writes, in order. `has`: does the cgroup have that file?
pub(super) fn plan(limits: &BlockIo, version: Version, has: impl Fn(&str) -> bool) -> Vec<Write> {
    let mut writes = weights(limits, version, has);
    for one in &limits.devices {
        match version {
            Version::V1 => writes.extend(rates_v1(*one)),
            Version::V2 => writes.extend(rates_v2(*one)),
        }
    }
    writes
}

fn write(version: Version, file: String, value: String, line: Option<Line>) -> Write {
    Write {
        controller: match version {
            Version::V1 => "blkio",
            Version::V2 => "io",
        },
        optional: file.contains("weight"),
        file,
        value,
        line,
    }
}

/// The kernel's weight where none is given, in every file.
const WEIGHT: u32 = 100;

fn weights(limits: &BlockIo, version: Version, has: impl Fn(&str) -> bool) -> Vec<Write> {
    let choose = |bfq: &str, other: &str| match has(bfq) {
        true => (bfq.to_owned(), false),
        false => (other.to_owned(), true),
    };
    let (of_all, of_one) = match version {
        Version::V1 => (
            choose("blkio.bfq.weight", "blkio.weight"),
            choose("blkio.bfq.weight_device", "blkio.weight_device"),
        ),
        Version::V2 => {
            let both = choose("io.bfq.weight", "io.weight");
            (both.clone(), both)
        }
    };
    // io.weight has a scale of its own.
    let scaled = |weight: u16, other: bool| match (version, other) {
        (Version::V2, true) => 1 + (u32::from(weight.max(10)) - 10) * 9999 / 990,
        _ => u32::from(weight),
    };
    let mut writes = vec![];
    if let Some(weight) = limits.weight {
        let (file, other) = of_all;
        let value = match weight {
            0 => WEIGHT,
            weight => scaled(weight, other),
        };
        // Beside those of devices; v1 has a file for each.
        let line = (version == Version::V2).then(|| Line {
            key: "default".to_owned(),
            absent: format!("default {WEIGHT}"),
        });
        writes.push(write(version, file, value.to_string(), line));
    }
    for one in &limits.devices {
        let Some(weight) = one.weight else { continue };
        let (file, other) = of_one.clone();
        let key = format!("{}:{}", one.major, one.minor);
        let absent = format!("{key} default");
        let value = match weight {
            0 => absent.clone(),
            weight => format!("{key} {}", scaled(weight, other)),
        };
        writes.push(write(version, file, value, Some(Line { key, absent })));
    }
    writes
}

fn rates_v1(one: DeviceIo) -> Vec<Write> {
    let key = format!("{}:{}", one.major, one.minor);
    let rates = [
        ("read_bps", one.read_bps),
        ("write_bps", one.write_bps),
        ("read_iops", one.read_iops),
        ("write_iops", one.write_iops),
    ];
    let given = rates
        .into_iter()
        .filter_map(|(name, rate)| Some((name, rate?)));
    let made = given.map(|(name, rate)| {
        let line = Line {
            key: key.clone(),
            absent: format!("{key} 0"),
        };
        let file = format!("blkio.throttle.{name}_device");
        write(Version::V1, file, format!("{key} {rate}"), Some(line))
    });
    made.collect()
}

fn rates_v2(one: DeviceIo) -> Option<Write> {
    let key = format!("{}:{}", one.major, one.minor);
    let rates = [
        ("rbps", one.read_bps),
        ("wbps", one.write_bps),
        ("riops", one.read_iops),
        ("wiops", one.write_iops),
    ];
    let mut value = key.clone();
    for (name, rate) in rates {
        match rate {
            Some(0) => value.push_str(&format!(" {name}=max")),
            Some(rate) => value.push_str(&format!(" {name}={rate}")),
            None => {}
        }
    }
    let absent = format!("{key} rbps=max wbps=max riops=max wiops=max");
    let is_set = value != key;
    is_set.then(|| {
        write(
            Version::V2,
            "io.max".to_owned(),
            value,
            Some(Line { key, absent }),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> BlockIo {
        let mut made = BlockIo {
            weight: Some(505),
            ..BlockIo::default()
        };
        *made.device(8, 16) = DeviceIo {
            major: 8,
            minor: 16,
            weight: Some(50),
            read_bps: Some(1000),
            write_iops: Some(0),
            ..DeviceIo::default()
        };
        made
    }

    fn shown(limits: &BlockIo, version: Version, bfq: bool) -> Vec<String> {
        let made = plan(limits, version, |_| bfq);
        made.iter()
            .map(|w| format!("{} {} < {}", w.controller, w.file, w.value))
            .collect()
    }

    #[test]
    fn files_of_both_versions() {
        assert_eq!(
            shown(&limits(), Version::V1, true),
            [
                "blkio blkio.bfq.weight < 505",
                "blkio blkio.bfq.weight_device < 8:16 50",
                "blkio blkio.throttle.read_bps_device < 8:16 1000",
                "blkio blkio.throttle.write_iops_device < 8:16 0",
            ]
        );
        assert_eq!(
            shown(&limits(), Version::V2, true),
            [
                "io io.bfq.weight < 505",
                "io io.bfq.weight < 8:16 50",
                "io io.max < 8:16 rbps=1000 wiops=max",
            ]
        );
        let other = shown(&limits(), Version::V2, false);
        assert_eq!(
            other[..2],
            ["io io.weight < 5000", "io io.weight < 8:16 405"]
        );
        let mut lifted = BlockIo {
            weight: Some(0),
            ..BlockIo::default()
        };
        lifted.device(8, 0).weight = Some(0);
        assert_eq!(
            shown(&lifted, Version::V1, false),
            [
                "blkio blkio.weight < 100",
                "blkio blkio.weight_device < 8:0 default"
            ]
        );
        for bfq in [true, false] {
            let file = if bfq { "io.bfq.weight" } else { "io.weight" };
            let lines = [
                format!("io {file} < 100"),
                format!("io {file} < 8:0 default"),
            ];
            assert_eq!(shown(&lifted, Version::V2, bfq), lines);
        }
        assert!(plan(&BlockIo::default(), Version::V2, |_| true).is_empty());
    }

    #[test]
    fn only_weights_may_be_missing() {
        for version in [Version::V1, Version::V2] {
            for one in plan(&limits(), version, |_| true) {
                assert_eq!(one.optional, one.file.contains("weight"), "{one:?}");
            }
        }
    }
}

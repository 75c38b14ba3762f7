//! Block I/O classes: a file of the node says what each limits (`blockio_config_file`).
//!
//! ```text
//! file --read--> Classes --limits(class)--> BlockIo, by the devices that the node has now
//! ```
//! Read whenever a container asks for a class, so that a changed file counts at once, and so do devices that come and go. The
//! format is that of containerd and CRI-O (`github.com/intel/goresctrl`, doc/blockio.md). A pattern that matches no
//! device limits nothing, for one file serves nodes of several kinds; the log tells.

mod glob;
mod quantity;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use serde::Deserialize;

use crate::base::block_io::{BlockIo, DeviceIo};
use crate::base::edits::Edits;
use crate::runtime::spec::error::{Result, SpecError};

/// Most bytes of the file.
const MAX_FILE: u64 = 1 << 20;
/// Smallest and largest weight.
const WEIGHTS: std::ops::RangeInclusive<u64> = 10..=1000;
/// Annotation of a container, as containerd reads it too.
const OF_CONTAINER: &str = "io.kubernetes.cri.blockio-class";
/// Annotations of a pod: for the container whose name follows, and for all.
const OF_POD: [&str; 2] = [
    "blockio.resources.beta.kubernetes.io/container.",
    "blockio.resources.beta.kubernetes.io/pod",
];

/// The file, as written.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields)]
struct File {
    #[serde(default)]
    classes: Option<BTreeMap<String, Option<Vec<Item>>>>,
}

/// Parameters for some devices, or for all that have none of their own.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
struct Item {
    /// Patterns of paths; absent: `weight` is that of the cgroup.
    devices: Option<Vec<String>>,
    weight: String,
    throttle_read_bps: String,
    throttle_write_bps: String,
    #[serde(rename = "ThrottleReadIOPS")]
    throttle_read_iops: String,
    #[serde(rename = "ThrottleWriteIOPS")]
    throttle_write_iops: String,
}

/// The class that annotations ask for; the container's own counts first, then that of the pod for it. Without
/// `blockio_config_file` annotations have no effect.
pub(crate) fn annotated(
    file: &Path,
    name: &str,
    own: &BTreeMap<String, String>,
    pod: &BTreeMap<String, String>,
) -> Option<Edits> {
    if file.as_os_str().is_empty() {
        return None;
    }
    let [of_one, of_all] = OF_POD;
    let places = [
        (own, OF_CONTAINER.to_owned()),
        (pod, format!("{of_one}{name}")),
        (pod, of_all.to_owned()),
    ];
    let (key, class) = places
        .into_iter()
        .find_map(|(all, key)| Some((all.get(&key)?.clone(), key)))
        .map(|(class, key)| (key, class))?;
    let mut edits = Edits {
        by: format!("annotation {key}"),
        ..Edits::default()
    };
    edits.resources.blockio_class = Some(class);
    Some(edits)
}

/// The limits of a class; none for the empty one, which lifts those of another. `by`: who asks. `file`: where the classes
/// are; empty: nowhere. Blocks on the file and on /dev.
///
/// # Errors
/// [`SpecError`] names who asks, the class and the file: unknown, or not to be read.
pub(crate) fn limits(by: &str, class: &str, file: &Path) -> Result<BlockIo> {
    if class.is_empty() {
        return Ok(BlockIo::default());
    }
    let field = || format!("{by}: resources.blockioClass");
    if file.as_os_str().is_empty() {
        let problem = "cannot be had: blockio_config_file is empty";
        let mend = "name a file of classes there, or leave the class out";
        return Err(SpecError::precondition(field(), class, problem, mend));
    }
    let text = read(file).map_err(|error| SpecError::host(field(), "read", file, error))?;
    let unusable = |error: String| {
        let problem = format!("is in no usable file: {}: {error}", file.display());
        SpecError::precondition(field(), class, problem, "correct the file")
    };
    let items = items(&text, class).map_err(unusable)?;
    let Some(items) = items else {
        let problem = format!("is no class of {}", file.display());
        let mend = "add it to the file, or use one that is there";
        return Err(SpecError::invalid(field(), class, problem, mend));
    };
    of_items(&items, matching).map_err(unusable)
}

fn read(file: &Path) -> std::io::Result<String> {
    if fs::metadata(file)?.len() > MAX_FILE {
        return Err(std::io::Error::other(format!("more than {MAX_FILE} bytes")));
    }
    fs::read_to_string(file)
}

/// What the file says of a class; absent: nothing.
fn items(text: &str, class: &str) -> std::result::Result<Option<Vec<Item>>, String> {
    if text.trim().is_empty() {
        return Ok(None);
    }
    let options = serde_saphyr::options! { with_snippet: false };
    let file: Option<File> =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| error.to_string())?;
    let mut classes = file.unwrap_or_default().classes.unwrap_or_default();
    Ok(classes.remove(class).map(Option::unwrap_or_default))
}

/// Puts later items over earlier ones. `find`: numbers of the devices that match a pattern.
fn of_items(
    items: &[Item],
    find: impl Fn(&str) -> Vec<(u32, u32)>,
) -> std::result::Result<BlockIo, String> {
    let mut made = BlockIo::default();
    for item in items {
        let wanted = item.limits()?;
        let Some(patterns) = &item.devices else {
            if wanted
                != (DeviceIo {
                    weight: wanted.weight,
                    ..DeviceIo::default()
                })
            {
                return Err("Throttle… without Devices: name the devices".to_owned());
            }
            made.weight = wanted.weight.or(made.weight);
            continue;
        };
        for (major, minor) in patterns.iter().flat_map(|pattern| find(pattern)) {
            let one = made.device(major, minor);
            *one = one.with(wanted);
        }
    }
    Ok(made)
}

impl Item {
    fn limits(&self) -> std::result::Result<DeviceIo, String> {
        let number = |key: &str, text: &str| match (text, quantity::parse(text)) {
            ("", _) => Ok(None),
            (_, Some(number)) => Ok(Some(number)),
            _ => Err(format!(
                "{key} {text:?}: write a number of at least 0 as 1000, 10k, 5M or 1Gi"
            )),
        };
        let weight = match number("Weight", &self.weight)? {
            Some(weight) if !WEIGHTS.contains(&weight) => {
                return Err(format!("Weight {weight}: use 10 to 1000"));
            }
            weight => weight.and_then(|weight| u16::try_from(weight).ok()),
        };
        Ok(DeviceIo {
            weight,
            read_bps: number("ThrottleReadBps", &self.throttle_read_bps)?,
            write_bps: number("ThrottleWriteBps", &self.throttle_write_bps)?,
            read_iops: number("ThrottleReadIOPS", &self.throttle_read_iops)?,
            write_iops: number("ThrottleWriteIOPS", &self.throttle_write_iops)?,
            ..DeviceIo::default()
        })
    }
}

/// The whole block devices of this node that match; the kernel limits no partitions.
fn matching(pattern: &str) -> Vec<(u32, u32)> {
    let mut found = vec![];
    for path in glob::paths(pattern) {
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        let numbers = (
            rustix::fs::major(metadata.rdev()),
            rustix::fs::minor(metadata.rdev()),
        );
        let (major, minor) = numbers;
        let part = format!("/sys/dev/block/{major}:{minor}/partition");
        if !metadata.file_type().is_block_device() || Path::new(&part).exists() {
            tracing::warn!(path = %path.display(), "a block I/O class names what is no whole block device");
        } else if !found.contains(&numbers) {
            found.push(numbers);
        }
    }
    if found.is_empty() {
        tracing::warn!(pattern, "no device matches a pattern of a block I/O class");
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "
Classes:
  slow:
    - Weight: 80
    - Devices: [/dev/sd*]
      ThrottleReadBps: 50M
      ThrottleWriteBps: 10M
      ThrottleReadIOPS: 10k
      ThrottleWriteIOPS: 5k
      Weight: 50
    - Devices:
        - /dev/sdb
      ThrottleReadBps: 1Gi
  plain:
  bad: [{Devices: [/dev/sda], Weight: 5}]
  torn: [{ThrottleReadBps: 1}]
";

    fn of(class: &str) -> std::result::Result<BlockIo, String> {
        let items = items(FILE, class)?.expect("a class");
        of_items(&items, |pattern| match pattern {
            "/dev/sd*" => vec![(8, 0), (8, 16)],
            "/dev/sdb" => vec![(8, 16)],
            _ => vec![],
        })
    }

    #[test]
    fn later_items_count_more() {
        let made = of("slow").unwrap();
        assert_eq!((made.weight, made.devices.len()), (Some(80), 2));
        let (a, b) = (made.devices[0], made.devices[1]);
        assert_eq!((a.major, a.minor, a.weight), (8, 0, Some(50)));
        assert_eq!(
            (a.read_bps, a.write_bps),
            (Some(50_000_000), Some(10_000_000))
        );
        assert_eq!((a.read_iops, a.write_iops), (Some(10_000), Some(5_000)));
        assert_eq!(
            (b.minor, b.read_bps, b.write_bps),
            (16, Some(1 << 30), Some(10_000_000))
        );
        assert_eq!(of("plain").unwrap(), BlockIo::default());
    }

    #[test]
    fn what_cannot_be_is_named() {
        assert!(of("bad").unwrap_err().contains("Weight 5"));
        assert!(of("torn").unwrap_err().contains("Devices"));
        assert!(items(FILE, "none").unwrap().is_none());
        assert!(items("", "none").unwrap().is_none());
        assert!(items("Classes:\n", "none").unwrap().is_none());
        let unknown = items("Classes: {a: [{Wait: 5}]}", "a").unwrap_err();
        assert!(unknown.contains("Wait"), "{unknown}");
        assert!(items("bad config", "a").is_err());
        let text = |result: Result<BlockIo>| crate::base::error::chain(&result.unwrap_err());
        let error = text(limits("P", "slow", Path::new("")));
        for word in ["P: resources.blockioClass", "slow", "blockio_config_file"] {
            assert!(error.contains(word), "{error}");
        }
        let error = text(limits("P", "slow", Path::new("/no/such/file")));
        assert!(error.contains("/no/such/file"), "{error}");
        assert_eq!(limits("P", "", Path::new("")).unwrap(), BlockIo::default());
    }

    #[test]
    fn annotations_by_rank() {
        let map = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
            let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
            list.iter().map(own).collect()
        };
        let pod = map(&[
            ("blockio.resources.beta.kubernetes.io/pod", "all"),
            ("blockio.resources.beta.kubernetes.io/container.a", "one"),
        ]);
        let own = map(&[("io.kubernetes.cri.blockio-class", "own")]);
        let class = |name: &str, own: &BTreeMap<String, String>| {
            let edits = annotated(Path::new("/classes"), name, own, &pod)?;
            edits.resources.blockio_class
        };
        assert_eq!(class("a", &own).as_deref(), Some("own"));
        assert_eq!(class("a", &map(&[])).as_deref(), Some("one"));
        assert_eq!(class("b", &map(&[])).as_deref(), Some("all"));
        assert!(annotated(Path::new("/classes"), "a", &map(&[]), &map(&[])).is_none());
        assert!(annotated(Path::new(""), "a", &own, &pod).is_none());
    }
}

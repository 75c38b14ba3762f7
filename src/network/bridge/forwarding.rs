//! Forwarding in the host's kernel, switched on for pods and put back when no bridge needs it.
//!
//! ```text
//! <shared>/<netns cookie>/original.json   what every sysctl was before the first daemon changed it
//! <shared>/<netns cookie>/<bridge>        one empty file a bridge that needs forwarding
//! ```
//!
//! Several daemons may run side by side, and the last to go puts things back: so the record is shared,
//! under a lock. A bridge that is no longer there needs nothing. Everything is void after a reboot (the
//! boot's id is in the record).
//!
//! Routers ignore router advertisements: a host that gets its default route from one would lose it by
//! forwarding. `accept_ra` = 2 (accept even so) replaces 1 first, on the links that are there. Not for
//! links to come: other software's bridges would then listen to their containers (CVE-2020-13401).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::network::error::{NetworkError, Result};
use crate::store::{self, CLOSED, Durability, write_atomic};
use crate::sys::netns::netns_cookie;

const NET: &str = "/proc/sys/net";

/// What a sysctl was, by its path below `/proc/sys/net`.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Original {
    boot: String,
    values: BTreeMap<String, String>,
}

/// The record of one network namespace.
#[derive(Debug)]
pub(crate) struct Forwarding {
    directory: PathBuf,
    bridge: String,
}

/// Which families forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Families {
    /// IPv4.
    pub(crate) v4: bool,
    /// IPv6.
    pub(crate) v6: bool,
}

impl Forwarding {
    /// The record for the network namespace of this thread. Reads nothing yet.
    ///
    /// # Errors
    ///
    /// `/proc` is not there.
    pub(crate) fn open(shared: &Path, bridge: &str) -> Result<Self> {
        let netns = match netns_cookie() {
            Ok(cookie) => format!("netns-{cookie}"),
            Err(_old_kernel) => {
                let here = "/proc/thread-self/ns/net";
                let file = fs::metadata(here).map_err(NetworkError::system("look at", here))?;
                format!("inode-{}", file.ino())
            }
        };
        Ok(Self {
            directory: shared.join(netns),
            bridge: bridge.to_owned(),
        })
    }

    /// Switches forwarding on, recording first what it was.
    ///
    /// # Errors
    ///
    /// A sysctl or the record cannot be written; what was changed is recorded.
    pub(crate) fn enable(&self, families: Families) -> Result<()> {
        let _lock = self.lock()?;
        let marker = self.directory.join(&self.bridge);
        fs::File::create(&marker).map_err(NetworkError::system("create", show(&marker)))?;
        let mut original = self.load();
        let wanted = wanted(families, &self.bridge);
        for (name, value) in &wanted {
            // Kept the first time only: later it may be what another daemon made of it.
            if !original.values.contains_key(name)
                && let Some(now) = read(name)
                && now != *value
            {
                for name in dragged_along(name) {
                    if let Some(now) = read(&name) {
                        original.values.entry(name).or_insert(now);
                    }
                }
                original.values.insert(name.clone(), now);
            }
        }
        self.save(&original)?;
        wanted
            .iter()
            .filter(|(name, value)| read(name).is_some_and(|now| now != *value))
            .try_for_each(|(name, value)| write(name, value))
    }

    /// This bridge needs forwarding no longer: puts everything back if no other bridge does.
    ///
    /// # Errors
    ///
    /// A sysctl cannot be written; the record stays then.
    pub(crate) fn disable(&self, exists: impl Fn(&str) -> bool) -> Result<()> {
        if !self.directory.exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        let entries = fs::read_dir(&self.directory)
            .map_err(NetworkError::system("list", show(&self.directory)))?;
        let others = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .any(|name| {
                name != self.bridge && !name.ends_with(".json") && name != LOCK && exists(&name)
            });
        let marker = self.directory.join(&self.bridge);
        if others {
            return remove_if_there(&marker).map_err(NetworkError::system("remove", show(&marker)));
        }
        let original = self.load();
        // The switches first: they drag the others along.
        let (switches, rest): (Vec<_>, Vec<_>) = original
            .values
            .iter()
            .partition(|(name, _value)| SWITCHES.contains(&name.as_str()));
        for (name, value) in switches.into_iter().chain(rest) {
            if read(name).is_some_and(|now| now != *value) {
                write(name, value)?;
            }
        }
        fs::remove_dir_all(&self.directory)
            .map_err(NetworkError::system("remove", show(&self.directory)))?;
        // Not empty: another network namespace's record is in it.
        let _gone = self
            .directory
            .parent()
            .is_some_and(|d| fs::remove_dir(d).is_ok());
        Ok(())
    }

    fn lock(&self) -> Result<fs::File> {
        let path = self.directory.join(LOCK);
        // Closed: whoever can open the file, were it to read, can hold its lock.
        let above = self.directory.parent().unwrap_or(&self.directory);
        let locked = || loop {
            for closed in [above, &*self.directory] {
                store::directory(closed, CLOSED).map_err(io::Error::other)?;
            }
            let file = fs::File::create(&path)?;
            file.lock()?;
            // Whoever had the lock may have deleted it with its directory.
            match fs::metadata(&path) {
                Ok(there) if there.ino() == file.metadata()?.ino() => return Ok(file),
                _gone => {}
            }
        };
        locked().map_err(NetworkError::system("lock", show(&self.directory)))
    }

    fn load(&self) -> Original {
        let boot = boot_id();
        let text = fs::read(self.directory.join(RECORD)).unwrap_or_default();
        serde_json::from_slice(&text)
            .ok()
            .filter(|o: &Original| o.boot == boot)
            .unwrap_or_else(|| Original {
                boot,
                values: BTreeMap::new(),
            })
    }

    fn save(&self, original: &Original) -> Result<()> {
        let path = self.directory.join(RECORD);
        let text = serde_json::to_vec_pretty(original)
            .map_err(io::Error::other)
            .map_err(NetworkError::system("encode", show(&path)))?;
        Ok(write_atomic(&path, &text, 0o600, Durability::Process)?)
    }
}

const RECORD: &str = "original.json";
const LOCK: &str = ".lock";
const SWITCHES: [&str; 2] = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"];

/// In the order in which they must be written.
fn wanted(families: Families, bridge: &str) -> Vec<(String, String)> {
    let mut list = vec![];
    if families.v6 {
        let passed_over = ["all", "default", "lo", bridge];
        for link in links("ipv6").filter(|link| !passed_over.contains(&link.as_str())) {
            let name = format!("ipv6/conf/{link}/accept_ra");
            let forwards = read(&format!("ipv6/conf/{link}/forwarding"));
            // Where forwarding was on already, 1 means that advertisements are ignored: left so.
            if read(&name).as_deref() == Some("1") && forwards.as_deref() == Some("0") {
                list.push((name, "2".to_owned()));
            }
        }
        list.push((SWITCHES[1].to_owned(), "1".to_owned()));
    }
    if families.v4 {
        list.push((SWITCHES[0].to_owned(), "1".to_owned()));
    }
    list
}

/// What the kernel overwrites along with a switch.
fn dragged_along(switch: &str) -> Vec<String> {
    let (family, mut names) = match switch {
        "ipv4/ip_forward" => ("ipv4", vec!["ipv4/conf/all/accept_redirects".to_owned()]),
        "ipv6/conf/all/forwarding" => ("ipv6", vec![]),
        _ => return vec![],
    };
    let links = links(family).filter(|link| link != "all");
    names.extend(links.map(|link| format!("{family}/conf/{link}/forwarding")));
    names
}

fn links(family: &str) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(format!("{NET}/{family}/conf"));
    entries
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// A sysctl's value without the line's end; absent when it is not there.
fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(Path::new(NET).join(name)).ok()?;
    Some(text.trim_end().to_owned())
}

/// Writes one sysctl of this thread's network namespace, by its path below `/proc/sys/net`.
///
/// # Errors
///
/// It cannot be written.
pub(crate) fn write(name: &str, value: &str) -> Result<()> {
    use std::io::Write as _;
    let path = Path::new(NET).join(name);
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(NetworkError::system("write", show(&path)))
}

/// Whether this network namespace has IPv6 at all.
pub(crate) fn has_ipv6() -> bool {
    read("ipv6/conf/all/disable_ipv6").as_deref() == Some("0")
        && read("ipv6/conf/default/disable_ipv6").as_deref() == Some("0")
}

fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn show(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::ns::{in_netns, new_netns};
    use std::os::fd::AsFd as _;

    const BOTH: Families = Families { v4: true, v6: true };

    fn all() -> BTreeMap<String, String> {
        let mut values = BTreeMap::new();
        for family in ["ipv4", "ipv6"] {
            for link in links(family) {
                for leaf in ["forwarding", "accept_ra", "accept_redirects"] {
                    let name = format!("{family}/conf/{link}/{leaf}");
                    if let Some(value) = read(&name) {
                        values.insert(name, value);
                    }
                }
            }
        }
        values.insert("ip_forward".into(), read("ipv4/ip_forward").unwrap());
        values
    }

    #[test]
    fn the_last_bridge_puts_everything_back() {
        let netns = new_netns().unwrap();
        let shared = tempfile::tempdir().unwrap();
        let root = shared.path().join("shared");
        in_netns(netns.as_fd(), || {
            crate::network::bridge::links::Links::open()?
                .make_bridge("up", [2, 0, 0, 0, 0, 1], "")
                .unwrap();
            // New namespaces have what the machine's own has.
            write(SWITCHES[0], "0").unwrap();
            write(SWITCHES[1], "0").unwrap();
            write("ipv4/conf/all/accept_redirects", "0").unwrap();
            write("ipv6/conf/lo/forwarding", "1").unwrap();
            let before = all();
            let one = Forwarding::open(&root, "one").unwrap();
            let two = Forwarding::open(&root, "two").unwrap();
            one.enable(BOTH).unwrap();
            one.enable(BOTH).unwrap();
            two.enable(BOTH).unwrap();
            assert_eq!(read("ipv4/ip_forward").unwrap(), "1");
            assert_eq!(read("ipv6/conf/all/forwarding").unwrap(), "1");
            assert_eq!(read("ipv6/conf/up/accept_ra").unwrap(), "2");
            assert_eq!(read("ipv6/conf/default/accept_ra").unwrap(), "1");
            one.disable(|_| true).unwrap();
            assert_eq!(read("ipv4/ip_forward").unwrap(), "1", "two needs it");
            two.disable(|name| name == "two").unwrap();
            assert_eq!(all(), before);
            two.disable(|_| false).unwrap();
            Ok(())
        })
        .unwrap();
        assert!(!root.exists());
    }
}

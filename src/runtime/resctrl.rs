//! Cache and memory bandwidth classes (Intel RDT and its like): groups of the resctrl filesystem.
//!
//! ```text
//! /sys/fs/resctrl/CLASS/{schemata,tasks}                  one that is named: it belongs to the node and stays
//! /sys/fs/resctrl/CLASS/mon_groups/<container>/tasks      where monitoring is asked for
//! /sys/fs/resctrl/<container>/{schemata,tasks}            without a name: the container's own
//! ```
//! A class that is there already is used as it is: other containers are in it. Whoever asks for other schemata than it has
//! is refused.
//!
//! The daemon makes a group before the container's first process, which joins it before it executes anything, as does every
//! later one ([`ProcessPlan::resctrl`]); it removes the container's own with the container. An OCI runtime does all that itself.
//! Kernel: filesystems/resctrl.rst. OCI: config-linux.md#intelrdt.
//!
//! [`ProcessPlan::resctrl`]: crate::runtime::plan::ProcessPlan::resctrl

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::base::edits::Rdt;
use crate::base::error::{HasKind, Kind};
use crate::base::id::ContainerId;

/// Where the filesystem is mounted, if the node has it.
pub(crate) const ROOT: &str = "/sys/fs/resctrl";
/// `f_type` of resctrl.
const MAGIC: i64 = 0x0765_5821;

/// Why a group could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResctrlError {
    /// A class that only somebody else can make.
    #[error("rdt: there is no class {class:?} in {}: make it there, or give its schemata", root.display())]
    Missing {
        /// Its name.
        class: String,
        /// Where classes are.
        root: PathBuf,
    },
    /// A class that is there, and is not as it is asked for.
    #[error(
        "rdt: schemata {wanted:?}: {} has {found:?}, and others may use it: ask for what it has, leave the schemata out, or name another class",
        path.display()
    )]
    Differs {
        /// Of what is asked for, the first that it has not.
        wanted: String,
        /// What it has of that resource; empty: nothing.
        found: String,
        /// The class.
        path: PathBuf,
    },
    /// The kernel refuses.
    #[error("rdt: {operation} {}{status}", path.display())]
    Call {
        /// `mkdir`, `write VALUE to`, ...
        operation: String,
        /// The group, or its file.
        path: PathBuf,
        /// What the kernel says besides, after a blank; or empty.
        status: String,
        /// Why.
        source: io::Error,
    },
}

impl HasKind for ResctrlError {
    fn kind(&self) -> Kind {
        match self {
            Self::Missing { .. } | Self::Differs { .. } => Kind::FailedPrecondition,
            Self::Call { source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput => Kind::InvalidArgument,
                // No class or monitoring id is left.
                io::ErrorKind::StorageFull => Kind::ResourceExhausted,
                _ => Kind::Internal,
            },
        }
    }
}

/// The filesystem.
#[derive(Clone, Debug)]
pub(crate) struct Resctrl(PathBuf);

/// The groups that the processes of a container join, in this order.
pub(crate) fn groups(id: ContainerId, wanted: &Rdt) -> Vec<PathBuf> {
    Resctrl(ROOT.into()).groups(id, wanted)
}

impl Resctrl {
    /// The one of this node; absent: it is not mounted, or the node has none.
    pub(crate) fn find() -> Option<Self> {
        let mounted = rustix::fs::statfs(ROOT).is_ok_and(|fs| fs.f_type == MAGIC);
        mounted.then(|| Self(ROOT.into()))
    }

    fn groups(&self, id: ContainerId, wanted: &Rdt) -> Vec<PathBuf> {
        let group = match &*wanted.clos_id {
            "" => self.0.join(id.to_string()),
            class => self.0.join(class),
        };
        let mut all = vec![group];
        if wanted.enable_monitoring {
            all.push(all[0].join("mon_groups").join(id.to_string()));
        }
        all
    }

    /// Makes what a container needs. A class that is named and has no schemata must exist; one that has some and exists
    /// must have the same.
    ///
    /// # Errors
    /// [`ResctrlError`]; what was made is removed again.
    pub(crate) fn make(&self, id: ContainerId, wanted: &Rdt) -> Result<(), ResctrlError> {
        let lines: Vec<&str> = [&wanted.l3_cache_schema, &wanted.mem_bw_schema]
            .into_iter()
            .chain(&wanted.schemata)
            .map(String::as_str)
            .filter(|line| !line.is_empty())
            .collect();
        let groups = self.groups(id, wanted);
        if lines.is_empty() && !wanted.clos_id.is_empty() && !groups[0].is_dir() {
            return Err(ResctrlError::Missing {
                class: wanted.clos_id.clone(),
                root: self.0.clone(),
            });
        }
        // Who finds a class finds it with its schemata.
        static ORDER: Mutex<()> = Mutex::new(());
        let _order = ORDER.lock().unwrap_or_else(PoisonError::into_inner);
        let mut made = vec![];
        let mut outcome = Ok(());
        for group in &groups {
            let is_class = *group == groups[0];
            match fs::create_dir(group) {
                Ok(()) => made.push(group),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if is_class && !wanted.clos_id.is_empty() {
                        outcome = self.compare(group, &lines);
                        if outcome.is_err() {
                            break;
                        }
                        continue;
                    }
                }
                Err(error) => {
                    outcome = Err(self.failed("mkdir", group, error));
                    break;
                }
            }
            if is_class && !lines.is_empty() {
                let text = lines.join("\n") + "\n";
                outcome = self.write(&group.join("schemata"), &text);
                if outcome.is_err() {
                    break;
                }
            }
        }
        if outcome.is_err() {
            for group in made.into_iter().rev() {
                // The first failure is what matters.
                let _gone = fs::remove_dir(group).is_ok();
            }
        }
        outcome
    }

    /// Removes a container's groups, wherever they are; processes that are left go back to the root's. None is fine.
    ///
    /// # Errors
    /// [`ResctrlError::Call`] for the first that stays; all are tried.
    pub(crate) fn remove(&self, id: ContainerId) -> Result<(), ResctrlError> {
        let name = id.to_string();
        let mut all = vec![self.0.join(&name)];
        let entries = fs::read_dir(&self.0).map_err(|error| self.failed("read", &self.0, error))?;
        let classes = entries.flatten().map(|entry| entry.path());
        all.extend(classes.map(|class| class.join("mon_groups").join(&name)));
        let mut first = Ok(());
        for group in all {
            let absent = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
            match fs::remove_dir(&group) {
                Err(error) if !absent.contains(&error.kind()) && first.is_ok() => {
                    first = Err(self.failed("rmdir", &group, error));
                }
                _ => {}
            }
        }
        first
    }

    /// Whether a class has these schemata.
    fn compare(&self, group: &Path, lines: &[&str]) -> Result<(), ResctrlError> {
        if lines.is_empty() {
            return Ok(());
        }
        let file = group.join("schemata");
        let text = fs::read_to_string(&file).map_err(|error| self.failed("read", &file, error))?;
        match lines.iter().find(|line| !has(&text, line)) {
            None => Ok(()),
            Some(line) => Err(ResctrlError::Differs {
                wanted: (*line).to_owned(),
                found: of_resource(&text, resource(line))
                    .unwrap_or_default()
                    .to_owned(),
                path: group.to_owned(),
            }),
        }
    }

    fn write(&self, path: &Path, text: &str) -> Result<(), ResctrlError> {
        let file = OpenOptions::new().write(true).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|error| self.failed(&format!("write {:?} to", text.trim_end()), path, error))
    }

    fn failed(&self, operation: &str, path: &Path, source: io::Error) -> ResctrlError {
        let said = fs::read_to_string(self.0.join("info/last_cmd_status")).unwrap_or_default();
        let status = match said.trim() {
            "" | "ok" => String::new(),
            said => format!(" (the kernel says: {said})"),
        };
        ResctrlError::Call {
            operation: operation.to_owned(),
            path: path.to_owned(),
            status,
            source,
        }
    }
}

/// The resource of a line, as `L3` of `L3:0=f`.
fn resource(line: &str) -> &str {
    line.split(':').next().unwrap_or_default().trim()
}

/// The line of a resource in what the kernel shows.
fn of_resource<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| resource(line) == name)
}

/// Whether every value of a line is in what the kernel shows: it has blanks and zeros before numbers, and more domains.
fn has(text: &str, line: &str) -> bool {
    fn values(line: &str) -> impl Iterator<Item = (&str, String)> {
        let (_, values) = line.split_once(':').unwrap_or_default();
        let parts = values.split(';').filter(|part| !part.trim().is_empty());
        parts.map(|part| {
            let (domain, value) = part.split_once('=').unwrap_or((part, ""));
            let value = value.trim().trim_start_matches("0x");
            let value = value.trim_start_matches('0').to_ascii_lowercase();
            (domain.trim(), value)
        })
    }
    of_resource(text, resource(line))
        .is_some_and(|found| values(line).all(|wanted| values(found).any(|one| one == wanted)))
}

/// A tree of plain files stands for the kernel's; what it makes by itself (`schemata`, `tasks`, `mon_groups`) the tests make.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::chain;
    use crate::base::id::Id;

    struct World {
        root: tempfile::TempDir,
        resctrl: Resctrl,
        id: ContainerId,
    }

    fn put(path: &Path, text: &str) {
        let mut file = fs::File::create(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    impl World {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("info")).unwrap();
            let gold = root.path().join("gold");
            fs::create_dir_all(gold.join("mon_groups")).unwrap();
            put(&gold.join("schemata"), "");
            Self {
                resctrl: Resctrl(root.path().to_owned()),
                id: ContainerId(Id::from_bytes([7; 32])),
                root,
            }
        }

        fn own(&self) -> PathBuf {
            self.root.path().join(self.id.to_string())
        }

        fn make(&self, change: impl FnOnce(&mut Rdt)) -> Result<Vec<PathBuf>, ResctrlError> {
            let mut wanted = Rdt::default();
            change(&mut wanted);
            self.resctrl.make(self.id, &wanted)?;
            Ok(self.resctrl.groups(self.id, &wanted))
        }

        fn names(&self, directory: &str) -> Vec<String> {
            let entries = fs::read_dir(self.root.path().join(directory)).unwrap();
            let mut all: Vec<_> = entries
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            all.sort();
            all
        }
    }

    #[test]
    fn a_class_of_the_node_is_used_and_stays() {
        let world = World::new();
        let groups = world
            .make(|rdt| {
                rdt.clos_id = "gold".to_owned();
                rdt.enable_monitoring = true;
            })
            .unwrap();
        let monitored = world
            .root
            .path()
            .join("gold/mon_groups")
            .join(world.id.to_string());
        assert_eq!(groups, [world.root.path().join("gold"), monitored.clone()]);
        assert!(monitored.is_dir());
        world.resctrl.remove(world.id).unwrap();
        assert!(world.names("gold/mon_groups").is_empty());
        assert_eq!(world.names(""), ["gold", "info"]);
        world.resctrl.remove(world.id).unwrap();
    }

    #[test]
    fn a_class_without_schemata_must_exist() {
        let world = World::new();
        let error = world
            .make(|rdt| rdt.clos_id = "lead".to_owned())
            .unwrap_err();
        assert!(chain(&error).contains("\"lead\""), "{error}");
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert_eq!(world.names(""), ["gold", "info"]);
    }

    #[test]
    fn schemata_are_written_at_once() {
        let world = World::new();
        fs::create_dir(world.own()).unwrap();
        put(&world.own().join("schemata"), "");
        let wanted = |rdt: &mut Rdt| {
            rdt.l3_cache_schema = "L3:0=f".to_owned();
            rdt.schemata = vec!["MB:0=50".to_owned(), "L2:0=3".to_owned()];
        };
        world.make(wanted).unwrap();
        let text = fs::read_to_string(world.own().join("schemata")).unwrap();
        assert_eq!(text, "L3:0=f\nMB:0=50\nL2:0=3\n");
    }

    #[test]
    fn a_class_that_exists_is_never_changed() {
        let world = World::new();
        let kernels = "    MB:0= 50;1=100\n    L3:0=00f;1=7ff\n";
        let file = world.root.path().join("gold/schemata");
        put(&file, kernels);
        let ask = |lines: &[&str]| {
            let lines = lines.iter().map(|line| (*line).to_owned()).collect();
            world.make(|rdt| {
                rdt.clos_id = "gold".to_owned();
                rdt.schemata = lines;
            })
        };
        for same in [
            &["MB:0=50"][..],
            &["L3:0=f;1=7FF", "MB:1=100;0=50"],
            &["L3:1=0x7ff"],
        ] {
            ask(same).unwrap();
        }
        for (other, has) in [
            (&["MB:0=5"][..], "MB:0= 50;1=100"),
            (&["MB:0=50", "L3:0=7ff"], "L3:0=00f;1=7ff"),
            (&["L3:2=f"], "L3:0=00f;1=7ff"),
            (&["L2:0=f"], ""),
        ] {
            let error = ask(other).unwrap_err();
            let text = chain(&error);
            let named = [
                other[other.len() - 1],
                "gold",
                has,
                "leave the schemata out",
            ];
            assert!(named.iter().all(|part| text.contains(part)), "{text}");
            assert_eq!(error.kind(), Kind::FailedPrecondition);
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), kernels);
    }

    #[test]
    fn a_group_of_its_own_goes_with_the_container() {
        let world = World::new();
        fs::create_dir_all(world.own().join("mon_groups")).unwrap();
        put(&world.own().join("schemata"), "");
        let groups = world
            .make(|rdt| {
                rdt.schemata = vec!["MB:0=50".to_owned()];
                rdt.enable_monitoring = true;
            })
            .unwrap();
        assert_eq!(groups[0], world.own());
        assert!(groups[1].starts_with(world.own()) && groups[1].is_dir());
        // The kernel removes a group with all that is in it.
        fs::remove_dir_all(world.own()).unwrap();
        fs::create_dir(world.own()).unwrap();
        world.resctrl.remove(world.id).unwrap();
        assert_eq!(world.names(""), ["gold", "info"]);
    }

    #[test]
    fn what_was_made_goes_when_the_kernel_refuses() {
        let world = World::new();
        put(
            &world.root.path().join("info/last_cmd_status"),
            "Unknown or unsupported resource name 'L9'\n",
        );
        for class in ["", "lead"] {
            // A new directory has no schemata here: the write fails.
            let error = world
                .make(|rdt| {
                    rdt.clos_id = class.to_owned();
                    rdt.schemata = vec!["L9:0=1".to_owned()];
                })
                .unwrap_err();
            let text = chain(&error);
            for word in ["L9:0=1", "schemata", "unsupported resource name"] {
                assert!(text.contains(word), "{text}");
            }
            assert_eq!(world.names(""), ["gold", "info"]);
        }
    }
}

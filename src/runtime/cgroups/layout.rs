//! Which hierarchies this machine has, and the life of one cgroup in them.

use std::collections::HashSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::devices::{self, DeviceRule};
use super::reader::Readings;
use super::{CgroupDirs, CgroupError, file_error, files, kill, limits};
use crate::base::container::Resources;
use crate::base::stats::{CgroupStats, Scope};
use crate::runtime::plan::CgroupJoin;

/// Version of the cgroup interface in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// One hierarchy for each controller (or group of them).
    V1,
    /// The unified hierarchy.
    V2,
}

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hierarchy {
    /// Its controllers (`cpu`, `memory`, ...), or `name=systemd`; `` for the unified one.
    pub(crate) controllers: Vec<String>,
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
}

/// The cgroup hierarchies of this machine. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    version: Version,
    hierarchies: Vec<Hierarchy>,
    /// Of a v1 machine: the unified hierarchy beside the others. We make nothing there; OCI runtimes do.
    beside: Option<PathBuf>,
    /// Directories whose `cgroup.subtree_control` is known to hold all that is available.
    delegated: Mutex<HashSet<PathBuf>>,
}

const CGROUP2_MAGIC: i64 = 0x6367_7270;

impl Cgroups {
    /// Finds the hierarchies at `/sys/fs/cgroup` (cgroup v2 there) or in the mount table (v1).
    ///
    /// # Errors
    /// [`CgroupError::None`] when there is neither.
    pub(crate) fn detect() -> Result<Self, CgroupError> {
        let top = Path::new("/sys/fs/cgroup");
        let unified = rustix::fs::statfs(top).is_ok_and(|fs| fs.f_type == CGROUP2_MAGIC);
        let (version, hierarchies, beside) = if unified {
            let only = Hierarchy {
                controllers: vec![String::new()],
                mount: top.to_owned(),
            };
            (Version::V2, vec![only], None)
        } else {
            let table = files::read(Path::new("/proc/self/mountinfo"))?;
            (Version::V1, parse_v1(&table), unified_in(&table))
        };
        if hierarchies.is_empty() {
            return Err(CgroupError::None(top.to_owned()));
        }
        Ok(Self(Arc::new(Inner {
            version,
            hierarchies,
            beside,
            delegated: Mutex::default(),
        })))
    }

    /// v1 or v2.
    pub(crate) fn version(&self) -> Version {
        self.0.version
    }

    /// Is this controller to be had? (v2: at the root.)
    pub(crate) fn has(&self, controller: &str) -> bool {
        match self.0.version {
            Version::V1 => self.hierarchy(controller).is_some(),
            Version::V2 => files::read(&self.0.hierarchies[0].mount.join("cgroup.controllers"))
                .is_ok_and(|text| text.split_whitespace().any(|name| name == controller)),
        }
    }

    fn hierarchy(&self, controller: &str) -> Option<&Hierarchy> {
        match self.0.version {
            Version::V2 => self.0.hierarchies.first(),
            Version::V1 => self
                .0
                .hierarchies
                .iter()
                .find(|h| h.controllers.iter().any(|c| c == controller)),
        }
    }

    /// Where the hierarchy of `controller` is mounted; absent: there is none.
    pub(super) fn mount(&self, controller: &str) -> Option<&Path> {
        Some(&self.hierarchy(controller)?.mount)
    }

    /// The directory of cgroup `path` that has the files of `controller`; absent: no such hierarchy.
    pub(super) fn directory(&self, controller: &str, path: &str) -> Option<PathBuf> {
        Some(
            self.hierarchy(controller)?
                .mount
                .join(path.trim_start_matches('/')),
        )
    }

    /// Where cgroup `path` is (whether it exists or not).
    ///
    /// # Errors
    /// [`CgroupError::Path`].
    pub(crate) fn dirs(&self, path: &str) -> Result<CgroupDirs, CgroupError> {
        check(path)?;
        let all = self.directories(path);
        let first = all.first().cloned().unwrap_or_default();
        let of = |controller| {
            self.directory(controller, path)
                .unwrap_or_else(|| first.clone())
        };
        let (memory, kill) = (of("memory"), of("freezer"));
        let join = match self.0.version {
            Version::V2 => CgroupJoin::V2(first),
            Version::V1 => CgroupJoin::V1(all),
        };
        Ok(CgroupDirs { join, memory, kill })
    }

    /// Where an OCI runtime may have made the cgroup too.
    fn beside(&self, path: &str) -> Option<PathBuf> {
        let mount = self.0.beside.as_ref()?;
        Some(mount.join(path.trim_start_matches('/')))
    }

    fn directories(&self, path: &str) -> Vec<PathBuf> {
        let below = path.trim_start_matches('/');
        self.0
            .hierarchies
            .iter()
            .map(|h| h.mount.join(below))
            .collect()
    }

    /// Makes cgroup `path` with its parents, sets its limits and allows only the devices of `rules` (an
    /// empty list leaves devices alone: for the sandbox's own cgroup and for parents). An existing cgroup is
    /// taken over.
    ///
    /// # Errors
    /// Those of [`CgroupError`]; what was made is removed again.
    pub(crate) fn create(
        &self,
        path: &str,
        resources: &Resources,
        rules: &[DeviceRule],
    ) -> Result<CgroupDirs, CgroupError> {
        let dirs = self.dirs(path)?;
        let made = self
            .make(path)
            .and_then(|()| limits::apply(self, path, resources, limits::Mode::Create))
            .and_then(|()| devices::apply(self, path, rules));
        if let Err(error) = made {
            // The first failure is what matters; a cgroup that stays is found again by its path.
            let _removed = self.remove(path).is_ok();
            return Err(error);
        }
        Ok(dirs)
    }

    /// Changes limits, all or none.
    ///
    /// # Errors
    /// Those of [`CgroupError`]; the old limits are in force again.
    pub(crate) fn update(&self, path: &str, resources: &Resources) -> Result<(), CgroupError> {
        check(path)?;
        limits::apply(self, path, resources, limits::Mode::Update)
    }

    /// Gives every process of a cgroup this `oom_score_adj` (-1000..=1000).
    ///
    /// # Errors
    /// [`CgroupError::File`]: the kernel refuses; some may have it.
    pub(crate) fn set_oom_score_adj(&self, path: &str, score: i64) -> Result<(), CgroupError> {
        super::oom_score::set(&self.dirs(path)?.kill, score)
    }

    fn make(&self, path: &str) -> Result<(), CgroupError> {
        for hierarchy in &self.0.hierarchies {
            let directory = hierarchy.mount.join(path.trim_start_matches('/'));
            match self.0.version {
                Version::V2 => self.make_v2(&hierarchy.mount, &directory)?,
                Version::V1 => make_v1(hierarchy, &directory)?,
            }
        }
        Ok(())
    }

    fn make_v2(&self, top: &Path, directory: &Path) -> Result<(), CgroupError> {
        let mut parents: Vec<&Path> = directory
            .ancestors()
            .skip(1)
            .take_while(|p| p.starts_with(top))
            .collect();
        parents.reverse();
        for parent in parents {
            if parent != top {
                mkdir(parent)?;
            }
            let known = {
                let set = self
                    .0
                    .delegated
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                set.contains(parent)
            };
            // A directory may have been made anew since: its file tells.
            if !known || !subtree_complete(parent) {
                delegate(parent)?;
                let mut set = self
                    .0
                    .delegated
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                set.insert(parent.to_owned());
            }
        }
        mkdir(directory)
    }

    /// What reads the figures of one cgroup after another. It holds directories open: not to be kept.
    pub(crate) fn readings(&self) -> Readings<'_> {
        Readings::new(self)
    }

    /// Figures of cgroup `path` alone, as [`Readings::stats`].
    pub(crate) fn stats(&self, path: &str, scope: Scope) -> CgroupStats {
        self.readings().stats(path, scope)
    }

    /// Host pids of the cgroup and those below it.
    #[cfg(test)]
    pub(crate) fn processes(&self, path: &str) -> Vec<u32> {
        self.dirs(path)
            .map(|dirs| files::processes(&dirs.kill))
            .unwrap_or_default()
    }

    /// Kills every process of the cgroup and waits until they are gone.
    ///
    /// # Errors
    /// As [`kill::kill`].
    pub(crate) fn kill(&self, path: &str) -> Result<(), CgroupError> {
        kill::kill(&self.dirs(path)?.kill)
    }

    /// Removes cgroup `path` and what containers made below it, in every hierarchy; a missing one is fine.
    /// Its processes must have ended; those still on their way out are waited for up to a second.
    ///
    /// # Errors
    /// [`CgroupError::File`] for the first directory that stays; all are tried.
    pub(crate) fn remove(&self, path: &str) -> Result<(), CgroupError> {
        check(path)?;
        if path.trim_matches('/').is_empty() {
            return Err(CgroupError::Path(path.to_owned()));
        }
        let mut first = Ok(());
        for directory in self.directories(path).into_iter().chain(self.beside(path)) {
            let removed = remove_tree(&directory);
            self.0
                .delegated
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&directory);
            if first.is_ok() {
                first = removed;
            }
        }
        first
    }

    /// Removes cgroup `path` where it has neither processes nor cgroups below it; else leaves it.
    pub(crate) fn remove_if_empty(&self, path: &str) {
        if check(path).is_err() || path.trim_matches('/').is_empty() {
            return;
        }
        for directory in self.directories(path).into_iter().chain(self.beside(path)) {
            // EBUSY and ENOTEMPTY are the point; a stale empty cgroup does no harm otherwise.
            let _left = fs::remove_dir(&directory).is_err();
            self.0
                .delegated
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&directory);
        }
    }

    /// Makes a cgroup for berth's own processes (monitors) in the hierarchies where it matters (v1: memory,
    /// cpu, pids and systemd's; all in v2) and returns its directories, to which pids are written.
    ///
    /// # Errors
    /// [`CgroupError::Path`], [`CgroupError::File`].
    pub(crate) fn own(&self, path: &str) -> Result<Vec<PathBuf>, CgroupError> {
        check(path)?;
        let ours = ["", "memory", "cpu", "pids", "name=systemd"];
        let mut made = vec![];
        for hierarchy in &self.0.hierarchies {
            if hierarchy
                .controllers
                .iter()
                .any(|c| ours.contains(&c.as_str()))
            {
                let directory = hierarchy.mount.join(path.trim_start_matches('/'));
                match self.0.version {
                    // No controllers are delegated to a leaf with processes.
                    Version::V2 => fs::create_dir_all(&directory)
                        .map_err(|e| file_error("mkdir", &directory, e))?,
                    Version::V1 => make_v1(hierarchy, &directory)?,
                }
                made.push(directory);
            }
        }
        Ok(made)
    }
}

fn check(path: &str) -> Result<(), CgroupError> {
    let bad = || CgroupError::Path(path.chars().take(256).collect());
    if !path.starts_with('/') || path.contains(['\n', '\0']) {
        return Err(bad());
    }
    let fine = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if Path::new(path).components().all(fine) && !path.contains("/./") && !path.ends_with("/.") {
        Ok(())
    } else {
        Err(bad())
    }
}

fn mkdir(directory: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(directory) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(file_error("mkdir", directory, e))
        }
        _ => Ok(()),
    }
}

fn make_v1(hierarchy: &Hierarchy, directory: &Path) -> Result<(), CgroupError> {
    let cpuset = hierarchy.controllers.iter().any(|c| c == "cpuset");
    if !cpuset {
        return fs::create_dir_all(directory).map_err(|e| file_error("mkdir", directory, e));
    }
    // A new cpuset is empty and takes no process: each level inherits from the one above.
    let mut levels: Vec<&Path> = directory
        .ancestors()
        .take_while(|p| *p != hierarchy.mount)
        .collect();
    levels.reverse();
    for level in levels {
        mkdir(level)?;
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let file = level.join(name);
            if files::read(&file)?.trim().is_empty() {
                let above = level.parent().unwrap_or(level).join(name);
                files::write(&file, files::read(&above)?.trim())?;
            }
        }
    }
    Ok(())
}

fn subtree_complete(directory: &Path) -> bool {
    let words = |name: &str| files::read(&directory.join(name)).unwrap_or_default();
    let (have, want) = (words("cgroup.subtree_control"), words("cgroup.controllers"));
    let have: HashSet<&str> = have.split_whitespace().collect();
    want.split_whitespace()
        .filter(|c| WANTED.contains(c))
        .all(|c| have.contains(c))
}

/// Controllers that children get.
const WANTED: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];

fn delegate(directory: &Path) -> Result<(), CgroupError> {
    let file = directory.join("cgroup.subtree_control");
    let available = files::read(&directory.join("cgroup.controllers"))?;
    let wanted: Vec<String> = available
        .split_whitespace()
        .filter(|c| WANTED.contains(c))
        .map(|c| format!("+{c}"))
        .collect();
    if wanted.is_empty() || files::write_raw(&file, &wanted.join(" ")).is_ok() {
        return Ok(());
    }
    // One that cannot be had (a real-time task and cpu, say) must not cost the others.
    for one in wanted {
        if let Err(e) = files::write_raw(&file, &one) {
            tracing::warn!(path = %file.display(), controller = one, error = %e, "controller not delegated");
        }
    }
    Ok(())
}

fn remove_tree(directory: &Path) -> Result<(), CgroupError> {
    let mut pause = Duration::from_millis(1);
    for attempt in 0.. {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) if attempt >= 10 => return Err(file_error("rmdir", directory, e)),
            Err(_busy) => {
                for child in files::children(directory) {
                    remove_tree(&child)?;
                }
                if attempt > 0 {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(200));
                }
            }
        }
    }
    Ok(())
}

/// The mount of the unified hierarchy in a mount table, if it has one.
fn unified_in(table: &str) -> Option<PathBuf> {
    let mut lines = table.lines().filter_map(|line| line.split_once(" - "));
    let (left, _) = lines.find(|(_, right)| right.starts_with("cgroup2 "))?;
    left.split(' ').nth(4).map(PathBuf::from)
}

/// The v1 hierarchies of a mount table (proc_pid_mountinfo(5)), the first mount of each.
fn parse_v1(table: &str) -> Vec<Hierarchy> {
    const KNOWN: [&str; 12] = [
        "cpu",
        "cpuacct",
        "cpuset",
        "memory",
        "devices",
        "freezer",
        "blkio",
        "pids",
        "hugetlb",
        "net_cls",
        "net_prio",
        "perf_event",
    ];
    let mut found: Vec<Hierarchy> = vec![];
    for line in table.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let mut right = right.split(' ');
        if right.next() != Some("cgroup") {
            continue;
        }
        let options = right.nth(1).unwrap_or_default();
        let controllers: Vec<String> = options
            .split(',')
            .filter(|o| KNOWN.contains(o) || *o == "name=systemd")
            .map(str::to_owned)
            .collect();
        let Some(mount) = left.split(' ').nth(4) else {
            continue;
        };
        let seen = |c: &String| found.iter().any(|h| h.controllers.contains(c));
        if !controllers.is_empty() && !controllers.iter().any(seen) {
            found.push(Hierarchy {
                controllers,
                mount: PathBuf::from(mount),
            });
        }
    }
    found
}

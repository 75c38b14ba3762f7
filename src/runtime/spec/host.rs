//! What specs need to know of the node. Probed once, when the daemon starts; the rest is pure.

use std::path::{Path, PathBuf};

use crate::runtime::capabilities;

/// The cgroup filesystems of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CgroupHost {
    /// One unified hierarchy with all controllers.
    V2,
    /// Separate hierarchies (hybrid counts as this): (mount point, name below `/sys/fs/cgroup`).
    V1(Vec<(PathBuf, String)>),
}

/// Facts of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostFacts {
    /// Cgroup version, and hierarchies of v1.
    pub(crate) cgroup: CgroupHost,
    /// cgroup v2 lets no process change the limits of its own cgroup namespace's root.
    pub(crate) nsdelegate: bool,
    /// Kernel release: (major, minor).
    pub(crate) kernel: (u32, u32),
    /// Actions of seccomp that the kernel offers, such as `errno`; empty: no seccomp.
    pub(crate) seccomp_actions: Vec<String>,
    /// AppArmor is on.
    pub(crate) apparmor: bool,
    /// Number of the last capability of the kernel.
    pub(crate) last_capability: u32,
    /// The daemon's own bounding set.
    pub(crate) bounding: u64,
    /// The lowest `oom_score_adj` that we may write for certain.
    pub(crate) min_oom_score_adj: i32,
    /// The daemon's hard limit of open files.
    pub(crate) max_open_files: u64,
    /// Most open files that the kernel allows any process (`fs.nr_open`).
    pub(crate) nr_open: u64,
    /// Page sizes of hugetlb, as CRI writes them: `2MB`, `1GB`.
    pub(crate) hugepage_sizes: Vec<String>,
}

impl HostFacts {
    /// Capabilities that can be given: known to the kernel and within our own bounding set.
    pub(crate) fn available_capabilities(&self) -> u64 {
        let known = 1_u64
            .checked_shl(self.last_capability + 1)
            .map_or(u64::MAX, |bit| bit - 1);
        known & self.bounding
    }

    /// Is the kernel at least this one?
    pub(crate) fn kernel_at_least(&self, major: u32, minor: u32) -> bool {
        self.kernel >= (major, minor)
    }

    /// Reads the facts from `/proc` and `/sys`. What cannot be read counts as absent.
    pub(crate) fn probe() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let uname = rustix::system::uname();
        let bounding = status_mask(&read("/proc/self/status"), "CapBnd:");
        let resource = capabilities::mask("SYS_RESOURCE").unwrap_or_default();
        let effective = status_mask(&read("/proc/self/status"), "CapEff:");
        Self {
            cgroup: cgroup_of(&read("/proc/self/mountinfo")),
            nsdelegate: is_nsdelegate(&read("/proc/self/mountinfo")),
            kernel: release_of(&uname.release().to_string_lossy()),
            seccomp_actions: read("/proc/sys/kernel/seccomp/actions_avail")
                .split_whitespace()
                .map(ToOwned::to_owned)
                .collect(),
            apparmor: read("/sys/module/apparmor/parameters/enabled").trim() == "Y"
                && Path::new("/sys/kernel/security/apparmor").is_dir(),
            last_capability: read("/proc/sys/kernel/cap_last_cap")
                .trim()
                .parse()
                .unwrap_or(40),
            bounding,
            min_oom_score_adj: if effective & resource == 0 {
                read("/proc/self/oom_score_adj").trim().parse().unwrap_or(0)
            } else {
                -1000
            },
            max_open_files: rustix::process::getrlimit(rustix::process::Resource::Nofile)
                .maximum
                .unwrap_or(u64::MAX),
            nr_open: read("/proc/sys/fs/nr_open")
                .trim()
                .parse()
                .unwrap_or(u64::MAX),
            hugepage_sizes: hugepage_sizes(),
        }
    }
}

fn status_mask(status: &str, key: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or_default()
}

/// (major, minor) of a kernel release such as `6.12.57+deb13-amd64`; (0, 0) where it has none.
pub(crate) fn release_of(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|text| text.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Reads the cgroup filesystems from the text of a mountinfo file.
pub(crate) fn cgroup_of(mountinfo: &str) -> CgroupHost {
    let mut hierarchies: Vec<(PathBuf, String)> = vec![];
    for line in mountinfo.lines() {
        let Some((head, tail)) = line.split_once(" - ") else {
            continue;
        };
        if tail.split(' ').next() != Some("cgroup") {
            continue;
        }
        let Some(mountpoint) = head.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        let name = mountpoint.file_name().map(|n| n.to_string_lossy().into());
        if mountpoint.parent() == Some(Path::new("/sys/fs/cgroup"))
            && let Some(name) = name
            && hierarchies.iter().all(|(known, _)| *known != mountpoint)
        {
            hierarchies.push((mountpoint, name));
        }
    }
    if hierarchies.is_empty() {
        CgroupHost::V2
    } else {
        CgroupHost::V1(hierarchies)
    }
}

/// Is cgroup2 mounted with `nsdelegate` (cgroups(7))? An option of the one hierarchy, wherever it is mounted.
fn is_nsdelegate(mountinfo: &str) -> bool {
    mountinfo.lines().any(|line| {
        let tail = line.split_once(" - ").map_or("", |(_, tail)| tail);
        let mut fields = tail.split(' ');
        fields.next() == Some("cgroup2")
            && fields
                .nth(1)
                .is_some_and(|options| options.split(',').any(|option| option == "nsdelegate"))
    })
}

fn hugepage_sizes() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/sys/kernel/mm/hugepages") else {
        return vec![];
    };
    let mut sizes: Vec<u64> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()
        })
        .collect();
    sizes.sort_unstable();
    sizes.into_iter().map(page_size_text).collect()
}

/// A page size in KiB as CRI and the hugetlb controller write it.
fn page_size_text(kib: u64) -> String {
    match kib {
        _ if kib.is_multiple_of(1 << 20) => format!("{}GB", kib >> 20),
        _ if kib.is_multiple_of(1 << 10) => format!("{}MB", kib >> 10),
        _ => format!("{kib}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases() {
        for (text, expected) in [
            ("6.12.57+deb13-amd64", (6, 12)),
            ("5.4.0", (5, 4)),
            ("6.18", (6, 18)),
            ("", (0, 0)),
        ] {
            assert_eq!(release_of(text), expected, "{text}");
        }
    }

    #[test]
    fn cgroup_versions() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(cgroup_of(v2), CgroupHost::V2);
        assert!(is_nsdelegate(v2));
        assert!(!is_nsdelegate(&v2.replace(",nsdelegate", "")));
        assert!(!is_nsdelegate(&v2.replace("cgroup2", "cgroup")));
        let v1 = "30 23 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                  31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                  33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                  34 30 0:27 / /mnt/memory rw - cgroup cgroup rw,memory\n";
        assert_eq!(
            cgroup_of(v1),
            CgroupHost::V1(vec![
                ("/sys/fs/cgroup/memory".into(), "memory".into()),
                ("/sys/fs/cgroup/cpu,cpuacct".into(), "cpu,cpuacct".into()),
            ])
        );
    }

    #[test]
    fn page_sizes() {
        assert_eq!(page_size_text(2048), "2MB");
        assert_eq!(page_size_text(1 << 20), "1GB");
        assert_eq!(page_size_text(64), "64KB");
    }

    #[test]
    fn this_node_can_be_probed() {
        let facts = HostFacts::probe();
        assert!(facts.kernel_at_least(4, 0), "{facts:?}");
        assert!(facts.last_capability >= 37);
        assert_ne!(facts.available_capabilities(), 0);
    }
}

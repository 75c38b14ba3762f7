//! A container's cgroup as its monitor sees it: killing all of it, step by step, without ever waiting.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use crate::sys::{process, signal};

/// How deep nested cgroups are looked into.
const MAX_DEPTH: usize = 8;

/// Kills every process of the cgroup at `directory` and of those below it. `true`: nobody is left.
///
/// On v2 by `cgroup.kill` (Linux 5.14), which reaches everyone at once; on v1 (and before 5.14) one by one,
/// while the freezer, where `directory` has it, keeps them from having more children.
pub(crate) fn kill(directory: &Path) -> bool {
    // A directory that is not a container's own is never killed.
    if is_empty(directory, 0) || pids(directory).any(|pid| pid == process::id()) {
        return true;
    }
    if write(&directory.join("cgroup.kill"), "1").is_ok() {
        return is_empty(directory, 0);
    }
    let freezer = ["freezer.state", "cgroup.freeze"]
        .map(|name| directory.join(name))
        .into_iter()
        .find(|path| path.exists());
    let v1 = |path: &Path| path.ends_with("freezer.state");
    if let Some(path) = &freezer {
        let _best_effort = write(path, if v1(path) { "FROZEN" } else { "1" });
    }
    kill_each(directory, 0);
    if let Some(path) = &freezer {
        let _best_effort = write(path, if v1(path) { "THAWED" } else { "0" });
    }
    is_empty(directory, 0)
}

/// Moves the calling process into the cgroup.
///
/// # Errors
/// What open(2) or write(2) on `cgroup.procs` say.
pub(crate) fn join(directory: &Path) -> io::Result<()> {
    write(&directory.join("cgroup.procs"), "0")
}

fn kill_each(directory: &Path, depth: usize) {
    for pid in pids(directory) {
        // Between the reading and this line the pid may have changed hands: look again, pidfd in hand.
        if let Ok(pidfd) = process::pidfd_open(pid)
            && pids(directory).any(|again| again == pid)
        {
            let _ended_already = process::send_signal(pidfd.as_fd(), signal::SIGKILL);
        }
    }
    for below in children(directory, depth) {
        kill_each(&below, depth + 1);
    }
}

fn is_empty(directory: &Path, depth: usize) -> bool {
    if let Ok(events) = fs::read_to_string(directory.join("cgroup.events")) {
        return events.lines().any(|line| line == "populated 0");
    }
    pids(directory).next().is_none()
        && children(directory, depth)
            .iter()
            .all(|below| is_empty(below, depth + 1))
}

/// A cgroup that is gone has no processes.
fn pids(directory: &Path) -> impl Iterator<Item = u32> + use<> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let pids: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    pids.into_iter().filter(|pid| *pid != 0)
}

fn children(directory: &Path, depth: usize) -> Vec<std::path::PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| depth < MAX_DEPTH && entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// One write(2): cgroup files take it whole or not at all.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    let _all = io::Write::write(&mut &file, text.as_bytes())?;
    Ok(())
}

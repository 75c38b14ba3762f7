//! Killing a process with all its descendants.
//!
//! Each is stopped before its children are listed: a stopped process starts no more of them and reaps none, so
//! their numbers cannot pass to strangers. When nobody new is found, all are killed. Who was left behind by
//! a parent that had ended before is not a descendant any more, and is spared.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{Mode, OFlags, open, openat};

use crate::sys::{process, signal};

/// More processes than this are not walked in one go; the rest loses its parents and is left to the cgroup.
const MAX: usize = 4096;

/// Stops and kills `pid` and its descendants. `pid` must be a child that is not reaped yet.
pub(crate) fn kill(pid: u32) {
    let mut found: Vec<(u32, OwnedFd)> = Vec::new();
    if let Ok(pidfd) = process::pidfd_open(pid) {
        stop(&pidfd);
        found.push((pid, pidfd));
    }
    // A child may be born between the signal and the stop: walk until a whole round finds nobody new.
    loop {
        let known = found.len();
        let mut next = 0;
        while next < found.len() && found.len() < MAX {
            let parent = found[next].0;
            for child in children(parent) {
                if found.iter().any(|(pid, _)| *pid == child) {
                    continue;
                }
                if let Ok(pidfd) = process::pidfd_open(child)
                    && parent_of(child) == Some(parent)
                {
                    stop(&pidfd);
                    found.push((child, pidfd));
                }
            }
            next += 1;
        }
        if found.len() == known || found.len() >= MAX {
            break;
        }
    }
    for (_, pidfd) in &found {
        let _ended_already = process::send_signal(pidfd.as_fd(), signal::SIGKILL);
    }
}

fn stop(pidfd: &OwnedFd) {
    const SIGSTOP: i32 = 19;
    let _ended_already = process::send_signal(pidfd.as_fd(), SIGSTOP);
}

/// Children of all threads of `pid`; where the kernel has no such list, all of /proc is searched.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let mut out = Vec::new();
    let mut listed = false;
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    for thread in threads.into_iter().flatten().filter_map(Result::ok) {
        if let Ok(text) = fs::read_to_string(thread.path().join("children")) {
            listed = true;
            out.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    if !listed {
        let all = fs::read_dir("/proc").into_iter().flatten();
        let pids = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        out.extend(pids.filter(|child| parent_of(*child) == Some(pid)));
    }
    out
}

/// Number of the parent of `pid`; absent: there is no such process.
pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    parent_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The parent as proc_pid_stat(5) writes it.
fn parent_in(stat: &str) -> Option<u32> {
    // The name in brackets may hold anything, brackets too.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

/// The network namespace of `pid`, a child of the living process `parent`.
///
/// # Errors
/// The number of `openat(2)`; [`NotFound`](std::io::ErrorKind::NotFound) also where the child has ended and its number is
/// another's by now.
pub(crate) fn network_of_child(parent: u32, pid: u32) -> std::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // This directory stays the process's own: when it ends, nothing in it can be opened any more.
    let process = open(format!("/proc/{pid}"), flags, Mode::empty())?;
    let stat = openat(
        &process,
        "stat",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let stat = std::io::read_to_string(fs::File::from(stat))?;
    if parent_in(&stat) != Some(parent) {
        return Err(std::io::ErrorKind::NotFound.into());
    }
    Ok(openat(
        &process,
        "ns/net",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    #[expect(clippy::disallowed_methods, reason = "test")]
    fn the_whole_tree_dies() {
        let mut shell = std::process::Command::new("sh")
            .args([
                "-c",
                "sh -c 'sleep 1000 & sleep 1001 & wait' & (sleep 1002 & wait) & wait",
            ])
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let grown = |pid| {
            let below: Vec<u32> = children(pid);
            let leaves: Vec<u32> = below.iter().flat_map(|pid| children(*pid)).collect();
            (leaves.len() == 3).then(|| [below, leaves].concat())
        };
        let all = loop {
            if let Some(all) = grown(shell.id()) {
                break all;
            }
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        };
        let pidfds: Vec<OwnedFd> = all
            .iter()
            .map(|pid| process::pidfd_open(*pid).unwrap())
            .collect();
        kill(shell.id());
        assert!(!shell.wait().unwrap().success());
        for pidfd in pidfds {
            let mut set = [crate::sys::poll::PollFd::new(
                &pidfd,
                crate::sys::poll::PollFlags::IN,
            )];
            let ready = crate::sys::poll::poll(&mut set, Some(Duration::from_secs(20))).unwrap();
            assert_eq!(ready, 1);
        }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "test")]
    fn a_network_is_that_of_a_living_child_of_this_parent() {
        use std::io::ErrorKind;
        use std::os::unix::fs::MetadataExt as _;

        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let (parent, pid) = (std::process::id(), child.id());
        let found = network_of_child(parent, pid).unwrap();
        let found = fs::File::from(found).metadata().unwrap();
        let own = fs::metadata("/proc/self/ns/net").unwrap();
        assert_eq!((found.dev(), found.ino()), (own.dev(), own.ino()));
        // As if the number had passed to somebody else's child.
        let other = network_of_child(parent_of(parent).unwrap(), pid).unwrap_err();
        assert_eq!(other.kind(), ErrorKind::NotFound);
        child.kill().unwrap();
        // Ended and not reaped: it has no namespaces any more.
        let pidfd = process::pidfd_open(pid).unwrap();
        while !process::has_ended(pidfd.as_fd()).unwrap() {
            std::thread::sleep(Duration::from_millis(1));
        }
        network_of_child(parent, pid).unwrap_err();
        child.wait().unwrap();
        assert!(process::has_ended(pidfd.as_fd()).unwrap());
        assert_eq!(
            network_of_child(parent, pid).unwrap_err().kind(),
            ErrorKind::NotFound
        );
    }
}

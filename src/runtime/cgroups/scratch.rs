//! A cgroup of a test's own: whatever becomes of the test, its cgroups and the processes in them do not outlive it.
//! `tests/cri.rs` has this file as a module too, so it needs nothing of the crate's.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

const TOP: &str = "/sys/fs/cgroup";
/// How long processes that were killed may take to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The cgroups of one name in all hierarchies, and those below. Cleared when it is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    name: String,
}

impl Scratch {
    /// Of this name, a path from the root of each hierarchy. Makes nothing: the test does.
    pub(crate) fn named(name: &str) -> Self {
        Self {
            name: name.trim_matches('/').to_owned(),
        }
    }

    /// Those that are there, each before what is below it.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        let hierarchies = fs::read_dir(TOP).into_iter().flatten().flatten();
        let tops = hierarchies
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path());
        let mut found: Vec<PathBuf> = tops
            .chain([PathBuf::from(TOP)])
            .filter(|top| top.join("cgroup.procs").exists())
            .map(|top| top.join(&self.name))
            .filter(|directory| directory.exists())
            .collect();
        let mut next = 0;
        while let Some(directory) = found.get(next) {
            let below = fs::read_dir(directory).into_iter().flatten().flatten();
            let below: Vec<_> = below
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path())
                .collect();
            found.extend(below);
            next += 1;
        }
        found
    }

    /// Kills the processes in them and removes them. Blocks.
    ///
    /// # Errors
    /// The last refusal, when [`PATIENCE`] is over.
    pub(crate) fn clear(&self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut refused = None;
            for directory in self.directories().iter().rev() {
                end_processes(directory);
                match fs::remove_dir(directory) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => refused = Some(error),
                    _ => {}
                }
            }
            match refused {
                None => return Ok(()),
                Some(error) if Instant::now() > deadline => return Err(error),
                Some(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            let told = format!("the cgroups {} stay: {error}\n", self.name);
            let _best_effort = io::Write::write_all(&mut io::stderr(), told.as_bytes());
        }
    }
}

fn end_processes(directory: &Path) {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    let listed = text.lines().filter_map(|line| line.parse().ok());
    for pid in listed.filter_map(Pid::from_raw) {
        let _ended_already = kill_process(pid, Signal::KILL);
        // Of those that are this process's children; the others have parents that reap them.
        let _not_ours = waitpid(Some(pid), WaitOptions::NOHANG);
    }
    // What is frozen (v1) ends only when it thaws.
    let state = fs::File::options()
        .write(true)
        .open(directory.join("freezer.state"));
    if let Ok(mut state) = state {
        let _as_it_was = io::Write::write_all(&mut state, b"THAWED");
    }
}

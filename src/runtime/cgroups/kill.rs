//! Ending every process of a cgroup at once, and telling whether the kernel's OOM killer did.
//!
//! v2: `cgroup.kill` (Linux 5.14). v1: freeze, signal everyone, thaw: nobody forks away meanwhile.
//! Used by the monitor too: no allocation beyond the list of pids.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{CgroupError, file_error, files};

/// How long to wait for signalled processes to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Kills every process in the cgroup at `directory` (a v2 directory or one of a v1 hierarchy, best
/// freezer) and in those below it, and waits until they are gone. A missing directory is fine.
///
/// Blocks up to 10 s when a process is in uninterruptible sleep. The caller must not be a member.
///
/// # Errors
/// [`CgroupError::Busy`] names who is left; the signal is pending, so a repetition may succeed.
pub(crate) fn kill(directory: &Path) -> Result<(), CgroupError> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(200);
    loop {
        let pids = files::processes(directory);
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(CgroupError::Busy {
                path: directory.to_owned(),
                pids,
            });
        }
        strike(directory, &pids)?;
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

fn strike(directory: &Path, pids: &[u32]) -> Result<(), CgroupError> {
    let all_at_once = directory.join("cgroup.kill");
    match files::write_raw(&all_at_once, "1") {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(file_error("write \"1\" to", &all_at_once, e)),
    }
    let state = directory.join("freezer.state");
    let frozen = files::write_raw(&state, "FROZEN").is_ok();
    // While frozen nobody forks and no pid of the list is used again.
    let pids = if frozen {
        files::processes(directory)
    } else {
        pids.to_vec()
    };
    for pid in pids {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            continue;
        };
        if let Err(e) = kill_process(pid, Signal::KILL)
            && e != rustix::io::Errno::SRCH
        {
            return Err(file_error("kill a process of", directory, e.into()));
        }
    }
    if frozen && let Err(e) = files::write_raw(&state, "THAWED") {
        return Err(file_error("write \"THAWED\" to", &state, e));
    }
    Ok(())
}

/// How many processes of this cgroup the OOM killer has killed. 0 where nobody counts or the cgroup is gone.
///
/// Kernel: `memory.events` (v2), `memory.oom_control` (v1, field since 4.13).
pub(crate) fn oom_kills(directory: &Path) -> u64 {
    files::keyed(&directory.join("memory.events"), "oom_kill")
        .or_else(|| files::keyed(&directory.join("memory.oom_control"), "oom_kill"))
        .unwrap_or(0)
}

//! `oom_score_adj` of processes that run already.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use super::{CgroupError, file_error, files};
use crate::sys::file::write_kernel;

/// More rounds than this and a cgroup forks faster than we write: what is born now has the score of its parent.
const ROUNDS: usize = 16;

/// Gives every process of the cgroup at `directory`, and of those below it, this score (-1000..=1000). A process that is born
/// meanwhile is found in the next round, or has it from its parent; one that ends is fine.
///
/// Kernel: proc_pid_oom_score_adj(5).
///
/// # Errors
/// [`CgroupError::File`]: the kernel refuses, as it does with a score below the lowest that we may write.
pub(crate) fn set(directory: &Path, score: i64) -> Result<(), CgroupError> {
    let mut done = BTreeSet::new();
    for _ in 0..ROUNDS {
        let mut found = files::processes(directory);
        found.retain(|pid| !done.contains(pid));
        if found.is_empty() {
            break;
        }
        let opened: Vec<(u32, File)> = found
            .into_iter()
            .filter_map(|pid| Some((pid, File::open(format!("/proc/{pid}")).ok()?)))
            .collect();
        // Whose directory we hold and who is still a member has not lent its number to a stranger.
        let members = files::processes(directory);
        for (pid, process) in opened {
            if members.contains(&pid) {
                write(pid, &process, score)?;
            }
            done.insert(pid);
        }
    }
    Ok(())
}

fn write(pid: u32, process: &File, score: i64) -> Result<(), CgroupError> {
    const ESRCH: i32 = 3;
    let name = Path::new("oom_score_adj");
    match write_kernel(process.as_fd(), name, score.to_string().as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(ESRCH) => Ok(()),
        Err(error) => {
            let path = Path::new("/proc").join(pid.to_string()).join(name);
            Err(file_error(&format!("write \"{score}\" to"), &path, error))
        }
        Ok(()) => Ok(()),
    }
}

//! The per-pod process: parent of pause and of every container's init.
//!
//! ```text
//!            seqpacket socket             clone3, control socket, pipes
//! daemon  <=================>  monitor  ------------------------------->  pause, inits, execs
//!                                 |
//!                                 +--> CRI logs, DIR/monitor.sock, DIR/<container>.exit
//! ```
//! It has one thread and no runtime, keeps only what a pod needs, and outlives the daemon: after a restart the
//! daemon connects to `DIR/monitor.sock` and gets a `State`. Only the protocol (or SIGKILL) ends it; an idle
//! one, which has no pod yet, ends with the daemon. What it deliberately does not do: decide anything, read a plan
//! (the cloned child does, so that its memory goes with the exec), create or remove cgroups.
mod attach;
mod calls;
mod cgroup;
mod child;
mod container;
mod external;
mod hooks;
mod link;
pub(crate) mod log;
pub(crate) mod protocol;
pub(crate) mod record;
mod serve;

use std::io;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use crate::sys::{inherited, process, signal};

#[cfg(feature = "daemon")]
pub(crate) use serve::SOCKET;

/// In .bss, so that a page counts only once it is used.
static BUFFERS: Mutex<container::Buffers> = Mutex::new(container::Buffers {
    read: [0; log::MAX_LINE],
    batch: [0; log::BATCH],
});

/// Runs the monitor on the socket that the daemon passed as descriptor 3; returns its exit code.
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may listen: stderr is /dev/null unless somebody starts it by hand.
            use io::Write as _;
            let _unheard = writeln!(io::stderr(), "berth-monitor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let connection = inherited::first()?;
    process::set_name(c"berth-monitor")?;
    process::become_subreaper()?;
    signal::ignore_sigpipe();
    // Blocked, not handled: who sends one of these to a monitor gets nothing. Children start with a clean mask.
    signal::block(&[
        signal::SIGCHLD,
        signal::SIGTERM,
        signal::SIGINT,
        signal::SIGHUP,
    ])?;
    let _old = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let mut buffers = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    serve::Monitor::new(connection, &mut buffers)?.run()
}

//! The AppArmor profile of containers that name none.
//!
//! Kernel: apparmor(7), apparmor.d(5). The kernel takes compiled profiles only, so `apparmor_parser` of the node
//! compiles and loads it: once in a daemon's life, never again on the start path.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::sys::process::{self, Exit};
use crate::sys::spawn::Spawn;
use crate::sys::{fd, memfd};

/// Name of the profile in the kernel.
pub(crate) const DEFAULT_NAME: &str = "berth-default";

/// What it allows: files, network and capabilities as the container otherwise has them, signals and ptrace among
/// containers, signals from the node. (Since Ubuntu 24.04 runc and crun have profiles of these names there: what has one is
/// not `unconfined`, though it may do everything.) What it takes away: mounts, and writing what belongs to the node in /proc and /sys.
const DEFAULT_PROFILE: &str = r"profile berth-default flags=(attach_disconnected, mediate_deleted) {
  file,
  network,
  capability,
  umount,
  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send, receive) peer=berth-default,
  ptrace (trace, read, tracedby, readby) peer=berth-default,

  deny mount,
  deny pivot_root,

  deny /proc/* w,
  deny /proc/{sysrq-trigger,kcore,kmem,mem} rwklx,
  deny /proc/sys/{abi,debug,dev,user,vm}/** w,
  deny /proc/sys/fs/{[^m],m[^q]}** w,
  deny /proc/sys/kernel/{[^sm],s[^h],m[^s]}** w,

  deny /sys/{block,bus,class,dev,devices,hypervisor,module,power}/** wklx,
  deny /sys/fs/{[^c],c[^g]}** wklx,
  deny /sys/kernel/{[^s],s[^e]}** wklx,
  deny /sys/{firmware,kernel/security}/** rwklx,
}
";

/// Where a program of the node's administrator may lie.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Why there is no default profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ProfileError {
    /// The node has no `apparmor_parser`.
    #[error("this node has no apparmor_parser")]
    NoParser,
    /// It could not be run, or did not load the profile.
    #[error("apparmor_parser did not load {DEFAULT_NAME}: {0}")]
    Parser(String),
}

/// Loads the default profile unless this process has done so before. Blocks while `apparmor_parser` runs (under a
/// second); callers at the same time wait for the one that runs it. A failure is tried again the next time.
///
/// # Errors
/// [`ProfileError`]
pub(crate) fn load_default() -> Result<(), ProfileError> {
    static LOADED: Mutex<bool> = Mutex::new(false);
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*loaded {
        load(&parser().ok_or(ProfileError::NoParser)?, DEFAULT_PROFILE)?;
        *loaded = true;
    }
    Ok(())
}

/// Is a profile of this name loaded?
///
/// # Errors
/// The kernel's list cannot be read.
pub(crate) fn is_loaded(name: &str) -> std::io::Result<bool> {
    let loaded = std::fs::read_to_string("/sys/kernel/security/apparmor/profiles")?;
    let is_it = |line: &str| {
        line.rsplit_once(" (")
            .is_some_and(|(found, _mode)| found == name)
    };
    Ok(loaded.lines().any(is_it))
}

fn parser() -> Option<PathBuf> {
    PLACES
        .iter()
        .map(|place| Path::new(place).join("apparmor_parser"))
        .find(|path| path.exists())
}

/// Has the program replace the profile of that name by this text.
fn load(program: &Path, text: &str) -> Result<(), ProfileError> {
    let failed = |what: &str, error: &dyn std::fmt::Display| {
        ProfileError::Parser(format!("{what}: {error}"))
    };
    let input = memfd::sealed("profile", text.as_bytes())
        .map_err(|error| failed("memfd_create", &error))?;
    let (words, writer) = fd::pipe().map_err(|error| failed("pipe2", &error))?;
    let child = Spawn::path(program)
        .argument("--replace")
        .argument("--skip-cache")
        .variable("LC_ALL", "C")
        .standard(0, input.as_fd())
        .standard(1, writer.as_fd())
        .standard(2, writer.as_fd())
        .start()
        .map_err(|error| failed("start", &error))?;
    drop(writer);
    let mut said = vec![];
    let read = std::fs::File::from(words)
        .take(64 * 1024)
        .read_to_end(&mut said);
    let exit = process::wait(child.pidfd.as_fd()).map_err(|error| failed("wait", &error))?;
    read.map_err(|error| failed("read", &error))?;
    match exit {
        Exit::Code(0) => Ok(()),
        other => Err(ProfileError::Parser(format!(
            "{} ({other:?})",
            String::from_utf8_lossy(&said).trim()
        ))),
    }
}

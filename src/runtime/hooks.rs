//! OCI hooks: the parent's half. Called by the monitor.
//!
//! ```text
//! monitor                       child (container's namespaces)          helper (monitor's namespaces)
//!   |  <- Mounted ------------- | root at BUNDLE/rootfs, mounts made
//!   | run(Create) clone3 ------------------------------------------------> | prestart, createRuntime
//!   |  <- Done --------------------------------------------------------- |
//!   | proceed: one byte ------> | createContainer; pivot, masks, ...
//!   |  <- Ready --------------- |
//!   | start: one byte --------> | startContainer, as the container's user; execve
//!   | run(Started) clone3 -----------------------------------------------> | poststart
//!   | Remove, then run(Stopped) clone3 ----------------------------------> | poststop
//! ```
//! Every hook gets the OCI state on stdin, is waited for, and ends with all it started when its time is over. The first that
//! fails up to the exec fails the create or the start; of those after, all run, and their failures are told. A plan without
//! hooks takes none of these steps.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::hook::{Hook, HookPoint};
use crate::runtime::create::{Spawned, helper};
use crate::runtime::external::Text;
use crate::runtime::init;
use crate::runtime::plan::Fault;

/// How long a hook may run that has no timeout of its own, or a longer one. The monitor gives up a container that is not
/// ready within 110 seconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(100);

/// Hooks of a container that berth itself makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hooks {
    /// Directory with `config.json`, and `rootfs`, where the root is mounted until the pivot.
    pub(crate) bundle: PathBuf,
    /// The OCI state as JSON, with a gap for `status` and `pid`.
    pub(crate) state: Text,
    /// In order; at least one.
    pub(crate) all: Vec<Hook>,
}

impl Hooks {
    /// The hooks of these points, in the order of the points.
    pub(crate) fn at<'a>(&'a self, points: &'a [HookPoint]) -> impl Iterator<Item = &'a Hook> {
        let of = |point: HookPoint| self.all.iter().filter(move |hook| hook.point == point);
        points.iter().copied().flat_map(of)
    }

    /// The OCI state as JSON. `pid` absent: there is no process.
    ///
    /// OCI: runtime.md#state.
    pub(crate) fn state(&self, status: &str, pid: Option<u32>) -> String {
        let pid = pid.map(|pid| format!(",\"pid\":{pid}")).unwrap_or_default();
        let Text { head, tail } = &self.state;
        format!("{head}\"status\":\"{status}\"{pid}{tail}")
    }
}

/// Which hooks of the runtime's namespaces run together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// prestart, createRuntime.
    Create,
    /// poststart.
    Started,
    /// poststop.
    Stopped,
}

impl Stage {
    /// The hooks.
    pub(crate) const fn points(self) -> &'static [HookPoint] {
        match self {
            Self::Create => &[HookPoint::Prestart, HookPoint::CreateRuntime],
            Self::Started => &[HookPoint::Poststart],
            Self::Stopped => &[HookPoint::Poststop],
        }
    }

    /// The container's `status` for them.
    pub(crate) const fn status(self) -> &'static str {
        match self {
            Self::Create => "creating",
            Self::Started => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// Clones a helper that runs the hooks of a stage; `pid` is the container's process, `plan` its encoded plan. It reports
/// `Done`, or the failure. When it is to end earlier: `tree::kill`.
///
/// # Errors
/// What failed before or in the clone. Later failures come by `create::receive`.
pub(crate) fn run(stage: Stage, plan: BorrowedFd<'_>, pid: Option<u32>) -> Result<Spawned, Fault> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Fault::call("hook", "open", "/dev/null", &error))?;
    let monitor = crate::sys::process::id();
    helper(&[plan, null.as_fd()], |control| {
        init::hooks::run(stage, plan, pid, (monitor, null.as_fd()), control)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_state() {
        let hook = |point, path: &str| Hook {
            point,
            path: path.to_owned(),
            args: vec![],
            env: vec![],
            timeout: None,
        };
        let hooks = Hooks {
            bundle: "/b".into(),
            state: Text {
                head: "{\"id\":\"x\",".to_owned(),
                tail: ",\"bundle\":\"/b\"}".to_owned(),
            },
            all: vec![
                hook(HookPoint::Poststop, "/6"),
                hook(HookPoint::CreateRuntime, "/2"),
                hook(HookPoint::Prestart, "/1"),
                hook(HookPoint::CreateRuntime, "/3"),
            ],
        };
        let at = |stage: Stage| -> Vec<&str> {
            hooks.at(stage.points()).map(|hook| &*hook.path).collect()
        };
        assert_eq!(at(Stage::Create), ["/1", "/2", "/3"]);
        assert!(at(Stage::Started).is_empty());
        assert_eq!(at(Stage::Stopped), ["/6"]);
        assert_eq!(
            hooks.state("creating", Some(7)),
            "{\"id\":\"x\",\"status\":\"creating\",\"pid\":7,\"bundle\":\"/b\"}"
        );
        assert_eq!(
            hooks.state("stopped", None),
            "{\"id\":\"x\",\"status\":\"stopped\",\"bundle\":\"/b\"}"
        );
    }
}

//! Containers that an OCI runtime program makes: the parent's half. Called by the monitor.
//!
//! ```text
//! monitor                helper (cloned)                    RUNTIME
//!   | create() clone3 ---> | own mount namespace, all private
//!   |                      | root filesystem on BUNDLE/rootfs, other mounts on BUNDLE/mount-N
//!   |                      | looks the user up, writes config.json
//!   |                      | RUNTIME create ------------------> | init, which waits for its start
//!   |  <- Made{pid} ------ | <-- BUNDLE/pid, console ---------- | ends
//!   | init is an orphan now, the monitor its reaper
//!   | run(Start) clone3 -> | RUNTIME start ----------------------> | init executes
//!   |  <- Done ----------- |
//! ```
//! In a pod with a user namespace the helper also maps layers and volumes, and the runtime's init joins the namespace: what the
//! runtime needs by path from in there is below the bundle, which the namespace's root may pass.
//!
//! The helper's memory and mounts go with it; the host's mount table never shows them. When the monitor dies, helper and
//! runtime die too (`PR_SET_PDEATHSIG`). What the runtime's log tells is the error.

#[cfg(feature = "daemon")]
pub(crate) mod abilities;

use std::os::fd::AsFd as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::base::handler::OciRuntime;
use crate::runtime::create::{CreateRequest, Spawned, helper};
use crate::runtime::exec::ExecRequest;
use crate::runtime::init;
use crate::runtime::plan::{Fault, MountPropagation, MountSource, NamespaceSource, Plan};

/// JSON with a gap, where the helper puts the OCI spec's `user`: it looks the user up in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Text {
    /// Before the gap.
    pub(crate) head: String,
    /// After it.
    pub(crate) tail: String,
}

/// A container of an OCI runtime.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    /// The program.
    pub(crate) runtime: &'a OciRuntime,
    /// Its name there: the container's id.
    pub(crate) id: &'a str,
    /// Directory for the bundle and all files of calls; exists.
    pub(crate) bundle: &'a Path,
}

/// A call that needs nothing but the container's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    /// `start`.
    Start,
    /// `kill` with this signal.
    Kill(i32),
    /// `delete --force`.
    Delete,
}

impl Verb {
    /// The sub-command.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Kill(_) => "kill",
            Self::Delete => "delete",
        }
    }
}

/// Whether the containers of a plan are in a user namespace of their pod's.
pub(crate) fn is_owned(plan: &Plan) -> bool {
    plan.namespaces.user != NamespaceSource::Host
}

/// Name below the bundle of what the helper mounts there for mount `index` of the plan; absent: the runtime mounts it
/// by itself. These are mounts that a runtime could not make, or only where mounts of the host are still shared; in a
/// user namespace all of the host's: their ids are mapped, their paths may be closed to the namespace's root.
pub(crate) fn staged(plan: &Plan, index: usize) -> Option<String> {
    let by_helper = match &plan.mounts.get(index)?.source {
        MountSource::PodShm | MountSource::Image { .. } => true,
        MountSource::Bind { propagation, .. } => {
            is_owned(plan) || *propagation != MountPropagation::Private
        }
        MountSource::Filesystem { .. } | MountSource::CgroupV1(_) => false,
    };
    by_helper.then(|| format!("mount-{index}"))
}

/// Name below the bundle of a copy of device `index` of the plan; absent: the runtime makes it by itself. In a user namespace
/// it can make none: it binds the node's by the path that it is to have, which may be another device there.
pub(crate) fn staged_device(plan: &Plan, index: usize) -> Option<String> {
    let device = plan.devices.get(index)?;
    let own = device.host_path == Path::new(&device.path) && BASIC.contains(&device.path.as_str());
    (is_owned(plan) && !own).then(|| format!("device-{index}"))
}

/// Name below the bundle of a copy of volume `index` that the image declares; absent: the runtime binds the node's path.
pub(crate) fn staged_volume(plan: &Plan, index: usize) -> Option<String> {
    is_owned(plan).then(|| format!("volume-{index}"))
}

/// Devices that every container has; a runtime makes them unasked.
pub(crate) const BASIC: [&str; 6] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];

/// Clones a helper that makes a container; `request.plan` is a plan followed by its [`Text`].
///
/// # Errors
/// What failed before or in the clone. Later failures come by `create::receive`.
pub(crate) fn create(request: &CreateRequest<'_>, place: Place<'_>) -> Result<Spawned, Fault> {
    let mut descriptors = vec![request.plan];
    descriptors.extend(request.stdio);
    descriptors.extend(request.pause);
    descriptors.extend(request.user);
    let monitor = crate::sys::process::id();
    helper(&descriptors, |control| {
        init::external::create(request, place, monitor, control)
    })
}

/// Clones a helper that starts one more process in the container; `request.plan` is an exec's plan followed by its
/// [`Text`], `number` is unique in the container.
///
/// # Errors
/// As [`create`].
pub(crate) fn exec(
    request: &ExecRequest<'_>,
    place: Place<'_>,
    number: u64,
) -> Result<Spawned, Fault> {
    let mut descriptors = vec![request.plan];
    descriptors.extend(request.stdio);
    let monitor = crate::sys::process::id();
    helper(&descriptors, |control| {
        init::external::exec(request, place, number, monitor, control)
    })
}

/// Names of the files of exec `number` below the bundle: what it is to be, its number as a process, the runtime's log, the
/// socket for its terminal.
pub(crate) fn exec_files(number: u64) -> [String; 4] {
    ["json", "pid", "log", "sock"].map(|what| format!("exec-{number}.{what}"))
}

/// Clones a helper for one call of the runtime.
///
/// # Errors
/// As [`create`].
pub(crate) fn run(verb: Verb, place: Place<'_>) -> Result<Spawned, Fault> {
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| Fault::call("runtime", "open", "/dev/null", &error))?;
    let monitor = crate::sys::process::id();
    helper(&[null.as_fd()], |control| {
        init::external::run(verb, place, null.as_fd(), monitor, control)
    })
}

/// What a runtime's log (`--log-format json`) says last of an error; absent: nothing. runc, crun and runsc write `level` and
/// `msg`, youki `LEVEL` and `message`.
pub(crate) fn message_of(log: &str) -> Option<String> {
    let errors = log.lines().rev().filter(|line| {
        let level = value_of(line, "level").unwrap_or_default();
        let errors = ["error", "fatal", "panic"];
        errors.iter().any(|error| level.eq_ignore_ascii_case(error))
    });
    errors
        .filter_map(|line| value_of(line, "msg").or_else(|| value_of(line, "message")))
        .find(|text| !text.is_empty())
}

/// The text that `key` has in a flat JSON object.
fn value_of(line: &str, key: &str) -> Option<String> {
    let (_, after) = line.split_once(&format!("\"{key}\":"))?;
    let mut rest = after.trim_start().strip_prefix('"')?.chars();
    let mut text = String::new();
    loop {
        match rest.next()? {
            '"' => return Some(text),
            '\\' => text.push(match rest.next()? {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                'u' => {
                    let digits: String = rest.by_ref().take(4).collect();
                    let code = u32::from_str_radix(&digits, 16).ok()?;
                    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
                }
                other => other,
            }),
            other => text.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log() {
        let log = r#"{"level":"warning","msg":"odd","time":"x"}
{"level":"error","msg":"first","time":"x"}
{"msg":"exec: \"nope\": not\u0020found\nin $PATH","level":"error","time":"x"}
{"level":"info","msg":"bye","time":"x"}
"#;
        assert_eq!(
            message_of(log).as_deref(),
            Some("exec: \"nope\": not found\nin $PATH")
        );
        let youki = r#"{"timestamp":"x","level":"ERROR","message":"no cgroup","target":"youki"}
{"timestamp":"x","level":"DEBUG","message":"bye"}"#;
        assert_eq!(message_of(youki).as_deref(), Some("no cgroup"));
        for log in [
            "",
            "no JSON\n",
            r#"{"level":"info","msg":"a"}"#,
            r#"{"level":"error","msg":"cut"#,
        ] {
            assert_eq!(message_of(log), None, "{log}");
        }
    }
}

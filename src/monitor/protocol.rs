//! The protocol between the daemon and a pod's monitor.
//!
//! One `SOCK_SEQPACKET` unix socket; each packet is one postcard-encoded [`Request`] or [`Message`], at
//! most [`MAX_PACKET`] bytes, with descriptors in `SCM_RIGHTS`. Plans travel in a sealed memfd, so their
//! size is not bounded by the packet. Requests carry a sequence number and are answered by a
//! [`Message::Reply`] with the same number, in any order; the monitor also sends [`Message::Event`]s.
//!
//! ```text
//! daemon                                   monitor
//!   | spawn: socketpair on fd 3               |      (idle, pooled; ends on EOF while not adopted)
//!   | Prepare{cgroups, score} ------------->  |      leaves the daemon's cgroup
//!   | Adopt{pod id, dir} ------------------>  |      binds DIR/monitor.sock, listens
//!   | UserNamespace{mappings} ------------->  |      (only a pod with its own) makes it, its netns too
//!   | Sandbox{plan, fds: plan, netns} ----->  |      clones pause
//!   | Container{...} / Start / Exec ... --->  |
//!   |  <---------------- Reply / Event        |
//!   | (daemon restarts)                       |
//!   | connect DIR/monitor.sock, Hello ----->  |
//!   |  <------------- State: everything, exits included
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::clock::Timestamp;
use crate::base::container::ProcessUser;
use crate::base::handler::OciRuntime;
use crate::base::id::{ContainerId, PodId};
use crate::runtime::plan::{Fault, IdMappings};

/// Version of this protocol and of the plan. A daemon speaks this one and the one before.
pub(crate) const VERSION: u16 = 2;
/// Largest packet in bytes.
pub(crate) const MAX_PACKET: usize = 64 * 1024;

/// A packet to the monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Chosen by the daemon, repeated in the reply.
    pub(crate) sequence: u64,
    /// What to do.
    pub(crate) call: Call,
}

/// What the daemon asks of a monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    /// First packet on a new connection to an adopted monitor. Reply: `State`.
    Hello {
        /// The daemon's [`VERSION`].
        version: u16,
    },
    /// Where the monitor itself belongs; sent to an idle one, because joining a cgroup can take
    /// milliseconds. A directory that cannot be joined is skipped. Reply: `Done`.
    Prepare {
        /// Cgroup directories for monitors: the v2 one, or one for each v1 hierarchy.
        cgroups: Vec<PathBuf>,
        /// Its own `oom_score_adj`; clamped to what the kernel lets it write.
        oom_score_adj: i32,
    },
    /// The idle monitor becomes the monitor of a pod. Reply: `Done`.
    Adopt {
        /// Pod.
        pod_id: PodId,
        /// Its directory under the state directory; the socket is made here.
        directory: PathBuf,
    },
    /// Makes the pod's user namespace, which its pause and containers will be in; before `Sandbox`. Reply: `Done` with
    /// the namespace as descriptor, then, if asked for, a network namespace that it owns, loopback down. An idle monitor
    /// makes one that it does not keep.
    UserNamespace {
        /// User ids.
        uid_mappings: IdMappings,
        /// Group ids.
        gid_mappings: IdMappings,
        /// Make a network namespace too.
        network: bool,
    },
    /// Starts pause. Descriptors: plan memfd, then the network namespace if the plan says `Passed`.
    /// Reply: `Sandbox`.
    Sandbox,
    /// Makes a container whose process waits before exec. Descriptor: plan memfd. Reply: `Created`.
    Container {
        /// Container.
        id: ContainerId,
        /// Its output and input.
        stdio: Stdio,
        /// Where its exits and OOM kills are read: the v2 directory, or the v1 memory directory.
        memory_cgroup: PathBuf,
        /// Directories whose processes are killed when the first process ends: v2 directory, or v1 freezer
        /// (else any v1) directory.
        kill_cgroup: PathBuf,
        /// Whose PID namespace it joins, where the plan says `Container`.
        target: Option<ContainerId>,
        /// The plan has hooks.
        hooks: bool,
        /// After so many seconds without the reply it is given up.
        setup_s: u32,
    },
    /// Lets the process exec. Reply: `Started`, or `Failed` with the exec's fault.
    Start {
        /// Container.
        id: ContainerId,
    },
    /// Sends a signal to a container's first process. Reply: `Done`; also when it has ended.
    Signal {
        /// Container.
        id: ContainerId,
        /// Signal number.
        signal: i32,
    },
    /// Kills every process of the container (all of its cgroup). Reply: `Done`.
    Kill {
        /// Container.
        id: ContainerId,
    },
    /// Opens the log file again. Reply: `Done` when the new file is in use.
    ReopenLog {
        /// Container.
        id: ContainerId,
    },
    /// Forgets an exited (or never started: then killed first) container. Reply: `Done`.
    Remove {
        /// Container.
        id: ContainerId,
    },
    /// Runs one more process in a container. Descriptors: plan memfd (an `ExecPlan`), stdin, stdout, stderr
    /// (with `terminal`: only the plan; the reply carries the pty master). Reply: `Executed`; its end is an
    /// [`Event::ExecExited`].
    Exec {
        /// Container.
        id: ContainerId,
        /// Chosen by the daemon, unique in this monitor's life.
        exec: u64,
    },
    /// Kills an exec's process and all its descendants. Reply: `Done`.
    KillExec {
        /// As in `Exec`.
        exec: u64,
    },
    /// Descriptor of the container's stdin pipe or pty master for attach, and a copy of the output from now
    /// on: the passed descriptors (stdout, stderr or only one with a tty) get every byte. A reader whose pipe cannot
    /// take a piece of output at once is cut off, never the log: one byte comes from the descriptor passed after those, then
    /// all its copies end. Reply: `Done` with stdin as descriptor where it is wanted and the container has one.
    Attach {
        /// Container.
        id: ContainerId,
        /// The client writes to stdin. One that only looks leaves it to the next.
        stdin: bool,
    },
    /// Sets the size of a container's terminal (an exec's is in the daemon's hands). Reply: `Done`.
    Resize {
        /// Container.
        id: ContainerId,
        /// Columns.
        width: u16,
        /// Rows.
        height: u16,
    },
    /// Kills pause and every container, then waits for them. Reply: `Done`.
    Stop,
    /// The monitor ends after its reply, `Done`; the socket is removed. Only after `Stop`, or with nothing
    /// running.
    Shutdown,
    /// As `Container`, by an OCI runtime; the memory file goes on after the plan with its configuration
    /// (`Plan::encode_with`). Reply: `Created`.
    External {
        /// Container.
        id: ContainerId,
        /// Its output and input.
        stdio: Stdio,
        /// As for `Container`.
        memory_cgroup: PathBuf,
        /// As for `Container`.
        kill_cgroup: PathBuf,
        /// The runtime.
        runtime: OciRuntime,
        /// Directory for the bundle; exists.
        bundle: PathBuf,
        /// As of `Container`.
        setup_s: u32,
    },
    /// Runs the poststop hooks of a container that is gone, all of them. Descriptor: plan memfd. Reply: `Done`, or `Failed`
    /// with what failed.
    Poststop {
        /// Container.
        id: ContainerId,
    },
    /// Makes an OCI runtime forget a container whose monitor is gone. Reply: `Done`.
    Clean {
        /// Container.
        id: ContainerId,
        /// The runtime.
        runtime: OciRuntime,
        /// Directory for the files of the call; exists.
        bundle: PathBuf,
    },
}

/// Output and input of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Stdio {
    /// Absolute path of the log; empty: output is read and dropped.
    pub(crate) log_path: PathBuf,
    /// Keep a pipe for stdin.
    pub(crate) stdin: bool,
    /// Close stdin when the first attached client leaves.
    pub(crate) stdin_once: bool,
    /// Use a pty.
    pub(crate) terminal: bool,
    /// Bytes after which a line is split (tag P).
    pub(crate) max_line: u32,
}

/// A packet from the monitor.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Answer to the request with this number.
    Reply {
        /// Number of the request.
        sequence: u64,
        /// Outcome.
        reply: Reply,
    },
    /// Something happened.
    Event(Event),
}

/// Outcome of a request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// Done.
    Done,
    /// Not done; what was half made is undone.
    Failed(Fault),
    /// Answer to `Hello`.
    State(Box<MonitorState>),
    /// Pause runs. With this reply: a pidfd of pause.
    Sandbox {
        /// Pid of pause on the host; for display and /proc links only.
        pid: u32,
    },
    /// The container's process waits.
    Created {
        /// Its pid on the host.
        pid: u32,
        /// Who it runs as.
        user: ProcessUser,
    },
    /// The container runs.
    Started {
        /// When its exec happened.
        at: Timestamp,
        /// Its pid on the host: another than before the start where others live in its PID namespace.
        pid: u32,
    },
    /// The exec runs. With a terminal: its pty master is passed.
    Executed {
        /// Pid on the host.
        pid: u32,
    },
}

/// Something that happened in the pod. Ends are repeated in [`MonitorState`] after a reconnect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Event {
    /// Pause ended.
    SandboxExited {
        /// When.
        at: Timestamp,
    },
    /// A container's first process ended, its output is in the log completely.
    ContainerExited(ContainerExit),
    /// An exec's process ended.
    ExecExited {
        /// As in `Exec`.
        exec: u64,
        /// Exit code, or 128+n for signal n.
        code: i32,
    },
    /// Poststart hooks failed; the container runs all the same. Not repeated.
    HookFailed {
        /// Container.
        id: ContainerId,
        /// What failed.
        fault: Fault,
    },
}

/// End of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerExit {
    /// Container.
    pub(crate) id: ContainerId,
    /// Exit code, or 128+n for signal n.
    pub(crate) code: i32,
    /// The kernel's OOM killer killed processes of this cgroup during the container's life.
    pub(crate) oom_killed: bool,
    /// When.
    pub(crate) at: Timestamp,
}

/// All that a monitor knows, for a daemon that has just come (back).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MonitorState {
    /// The monitor's [`VERSION`].
    pub(crate) version: u16,
    /// Pod.
    pub(crate) pod_id: PodId,
    /// Pid of the running pause; absent: it ended or was never started.
    pub(crate) pause_pid: Option<u32>,
    /// Containers.
    pub(crate) containers: Vec<ContainerSnapshot>,
}

/// One container of a [`MonitorState`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ContainerSnapshot {
    /// Container.
    pub(crate) id: ContainerId,
    /// Pid on the host while it lives.
    pub(crate) pid: Option<u32>,
    /// When it was started; 0: not yet.
    pub(crate) started_at: Timestamp,
    /// How it ended.
    pub(crate) exit: Option<ContainerExit>,
}

//! The child between clone and exec: it follows a plan, step by step, reports, waits for its start and executes.
//!
//! It has one thread and a copy of the monitor's memory that dies with the exec, so it may allocate. It sees no descriptor
//! but those listed at the clone, is not dumpable, and leaves by exec or `_exit` only. The order matters:
//!
//! ```text
//! streams, plan, cgroup, oom_score_adj        on the host's mounts
//! join namespaces, unshare the rest
//! copies of what is bound                     while the host's paths are in sight, peers kept
//! everything private; root and image volumes  made, not attached yet
//! host name, sysctls                          by a procfs of our own, mounted nowhere
//! pivot                                       the host is gone from here on
//! mounts, devices, volumes, masks             by descriptor, inside the root
//! user, cwd, terminal, limits, capabilities
//! -> Ready ... start byte ->                  see `create`
//! seccomp, exec
//! ```
//!
//! With hooks the root is attached at the bundle's `rootfs` instead, mounts and devices come before the pivot, and between
//! them run the hooks that want to see both the node's files and the container's (`runtime::hooks`).
//!
//! In a pod with a user namespace the first part is done by the node's root, in a mount namespace for that alone: layers and
//! volumes are mapped, devices copied. Then the process enters the user namespace, becomes its root, goes on as a sibling
//! where it is to be the first of a PID namespace, and only now makes the new namespaces, which are the pod's own. procfs and
//! sysfs are mounted before the pivot: the kernel wants to see the node's, uncovered, in the mount namespace.
mod copy;
mod devices;
pub(in crate::runtime) mod external;
pub(in crate::runtime) mod hooks;
mod join;
pub(in crate::runtime) mod launch;
mod masks;
mod mounts;
mod node_cgroups;
mod process;
mod procfs;
mod rootfs;
mod stage;
mod user;

#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::runtime::create::CreateRequest;
use crate::runtime::exec::ExecRequest;
use crate::runtime::plan::{
    Context, ExecPlan, Fault, MountSource, NamespaceSource, Plan, Preamble, Report, Rootfs,
};
use crate::runtime::userns;
use crate::sys::file::{self, Make, Mode, OFlags};
use crate::sys::launch::Shared;
use crate::sys::{clone, credentials, fd, memfd, mount, ns, socket};

use launch::Launch;

/// Largest plan in bytes.
const MAX_PLAN: usize = 16 * 1024 * 1024;
/// Exit code of a child that could not be started, or was not told to.
pub(crate) const NOT_STARTED: i32 = 127;
/// The program that pause runs.
const PAUSE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// A step that gives nothing but may fail.
type Step = Result<(), Fault>;

/// The child of `create::spawn`. Returns its exit code, if at all. `shared`: others live in its PID namespace.
pub(super) fn create(
    request: &CreateRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
    shared: Option<&Shared>,
) -> i32 {
    finish(control, follow(request, control, joined, shared))
}

/// The child of `exec::spawn`. Returns its exit code, if at all.
pub(super) fn execute(
    request: &ExecRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
    shared: Option<&Shared>,
) -> i32 {
    finish(control, follow_exec(request, control, joined, shared))
}

/// Exit code of a child that was not started: 127, as shells say it when a command cannot be run; where the failure cannot be
/// told, since a seccomp filter keeps us from it, its error number.
fn finish(control: BorrowedFd<'_>, outcome: Result<process::Abandoned, Fault>) -> i32 {
    let Err(fault) = outcome else {
        return NOT_STARTED;
    };
    let number = fault.errno;
    let packet = postcard::to_allocvec(&Report::Failed(fault));
    let told = packet.is_ok_and(|packet| socket::send(control, &packet, &[]).is_ok());
    if told || !(1..NOT_STARTED).contains(&number) {
        NOT_STARTED
    } else {
        number
    }
}

fn decode<T: DeserializeOwned>(plan: BorrowedFd<'_>) -> Result<T, Fault> {
    let bytes = memfd::read_all(plan, MAX_PLAN).context("plan", "pread", "plan")?;
    let bad = |error| Fault::check("plan", "decode", error);
    let (_preamble, rest) = Preamble::decode(&bytes).map_err(bad)?;
    postcard::from_bytes(rest).map_err(bad)
}

/// A container's or pause's process, prepared as the node's root: what is left needs the new namespaces only.
struct Inside<'a> {
    plan: Plan,
    host: mounts::Host,
    /// Absent for pause.
    root: Option<OwnedFd>,
    /// The namespaces are not made yet: this happens inside the user namespace.
    owned: bool,
    /// Others live in the PID namespace.
    launch: Option<Launch<'a>>,
    /// Opened where it can be: a procfs of this process's PID namespace, if the plan needs one.
    proc: Option<ProcFs>,
}

fn follow(
    request: &CreateRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
    shared: Option<&Shared>,
) -> Result<process::Abandoned, Fault> {
    fd::set_standard(request.stdio).context("stdio", "dup2", "standard streams")?;
    let mut plan: Plan = decode(request.plan)?;
    file::set_umask(0);
    join::cgroups(&plan.cgroup, joined)?;
    join::groups(&plan.process.resctrl)?;
    process::set_oom_score(&plan.process)?;
    let owner = request.user.zip(plan.namespaces.root());
    let mut launch = Launch::of_plan(&plan.namespaces, request, shared)?;
    if let Some(launch) = &mut launch {
        launch.hold_back(&mut plan.process.tuning);
    }
    join::existing(&plan.namespaces, request)?;
    let shm = take_pod_shm(&plan, request)?;
    let (mut proc, mut proc_of_others) = (None, Vec::new());
    if let Some(launch) = &launch {
        proc = Some(ProcFs::for_plan(&plan)?);
        proc_of_others = procfs::of_others(&plan, request, launch.namespace())?;
    }
    if let Some((_, root)) = owner {
        userns::give_streams(root)?;
        join::delegate(&plan, root)?;
        join::mounts()?;
    } else {
        join::new(&plan.namespaces)?;
    }
    let user = owner.map(|(user, _)| user);
    let mut host = mounts::Host::gather(&plan, shm, user)?;
    host.proc = proc_of_others;
    mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
    if let Some(user) = user {
        rootfs::map_layers(&plan, user)?;
    }
    let root = rootfs::build(&plan.rootfs, &plan.mount_label, user)?;
    host.gather_images(&plan)?;
    let own_pid = plan.namespaces.pid == NamespaceSource::New;
    let inside = Inside {
        plan,
        host,
        root,
        owned: user.is_some(),
        launch,
        proc,
    };
    let Some(user) = user else {
        return inside.go_on(control);
    };
    process::limit_and_tune(&inside.plan.process)?;
    userns::enter(user)?;
    if own_pid {
        inside.go_on_as_sibling(control)
    } else {
        inside.go_on(control)
    }
}

impl Inside<'_> {
    /// Goes on as the first process of a new PID namespace, of which the monitor hears here.
    fn go_on_as_sibling(self, control: BorrowedFd<'_>) -> Result<process::Abandoned, Fault> {
        const STAGE: &str = "clone";
        let work = || {
            let heard = socket::receive(control, &mut [0; 8]);
            let outcome = match heard.context(STAGE, "recvmsg", "control") {
                Ok(packet) if packet.bytes > 0 => self.go_on(control),
                Ok(_closed) => Ok(process::Abandoned),
                Err(fault) => Err(fault),
            };
            finish(control, outcome)
        };
        let sibling = clone::fork_sibling(ns::flag::PID, work);
        let sibling = sibling.context(STAGE, "clone3", "CLONE_NEWPID | CLONE_PARENT")?;
        let report = Report::Moved { pid: sibling.pid };
        let packet =
            postcard::to_allocvec(&report).map_err(|e| Fault::check(STAGE, "encode", e))?;
        // Where nobody hears it, the sibling does not go on.
        socket::send(control, &packet, &[sibling.pidfd.as_fd()])
            .context(STAGE, "sendmsg", "control")?;
        Ok(process::Abandoned)
    }

    fn go_on(mut self, control: BorrowedFd<'_>) -> Result<process::Abandoned, Fault> {
        let plan = &self.plan;
        if self.owned {
            join::new(&plan.namespaces)?;
            mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
        }
        let proc = match self.proc.take() {
            Some(proc) => proc,
            None => ProcFs::for_plan(plan)?,
        };
        process::join_new_keyring(&plan.process, proc.0.as_ref())?;
        if !plan.hostname.is_empty() && plan.namespaces.uts == NamespaceSource::New {
            credentials::set_host_name(&plan.hostname).context(
                "namespace",
                "sethostname",
                &plan.hostname,
            )?;
        }
        set_sysctls(plan, &proc)?;
        if let Rootfs::Pause { shm_size } = plan.rootfs {
            return pause(plan, shm_size, control, &proc);
        }
        self.host.mount_kernel_filesystems(plan)?;
        let root = self.root.take();
        let root = root.ok_or_else(|| Fault::check("rootfs", "check", "none was made"))?;
        let mut root = match &plan.hooks {
            None => rootfs::enter(root, plan)?,
            Some(hooks) => rootfs::show(root, plan, hooks)?,
        };
        mounts::attach_all(plan, &mut self.host, root.fd.as_fd())?;
        devices::make(plan, root.fd.as_fd(), self.host.devices)?;
        if let Some(hooks) = &plan.hooks {
            if !hooks::before_pivot(hooks, control, self.launch.is_some())? {
                return Ok(process::Abandoned);
            }
            rootfs::pivot(root.fd.as_fd())?;
        }
        let terminal = furnish(plan, &mut root, self.launch.is_none())?;
        process::reopen_null(root.fd.as_fd())?;
        let user = user::look_up(root.fd.as_fd(), &plan.process.user)?;
        let cwd = process::open_cwd(root.fd.as_fd(), &plan.process.cwd, process::Cwd::Make)?;
        rootfs::seal(plan, &root)?;
        process::enter_cwd(cwd, &plan.process.cwd)?;
        process::Ending {
            plan: &plan.process,
            user,
            control,
            terminal,
            proc: proc.0,
            tuned: self.owned,
            hooks: plan.hooks.as_deref(),
            launch: self.launch,
        }
        .run()
    }
}

/// What lies over mounts and nodes below the new root; the terminal, if the process has one. `take`: it is this process's own.
fn furnish(
    plan: &Plan,
    root: &mut rootfs::Root,
    take: bool,
) -> Result<Option<crate::sys::pty::Pty>, Fault> {
    let terminal = if plan.process.terminal {
        let pty = process::open_terminal(root.fd.as_fd(), take)?;
        devices::bind_console(plan, root.fd.as_fd(), pty.slave.as_fd())?;
        Some(pty)
    } else {
        None
    };
    masks::hide(&plan.masked_paths, root)?;
    masks::protect(&plan.readonly_paths, root.fd.as_fd())?;
    Ok(terminal)
}

fn follow_exec(
    request: &ExecRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
    shared: Option<&Shared>,
) -> Result<process::Abandoned, Fault> {
    fd::set_standard(request.stdio).context("stdio", "dup2", "standard streams")?;
    let mut plan: ExecPlan = decode(request.plan)?;
    file::set_umask(0);
    join::cgroups(&plan.cgroup, joined)?;
    join::groups(&plan.process.resctrl)?;
    process::stay_on(0, plan.cpu)?;
    process::set_oom_score(&plan.process)?;
    let missing = || Fault::check("launch", "shared page", "not given");
    let mut launch = Launch::new(request.container, shared.ok_or_else(missing)?)?;
    launch.hold_back(&mut plan.process.tuning);
    // The node's, and while it is in sight: in a user namespace no other of this PID namespace could be mounted.
    let proc = if plan.process.apparmor.is_empty() && plan.process.selinux.is_empty() {
        ProcFs(None)
    } else {
        ProcFs::new()?
    };
    if let Some(root) = plan.user_namespace {
        userns::give_streams(root)?;
        process::limit_and_tune(&plan.process)?;
        join::all_of(request.container, ns::flag::USER)?;
        userns::become_root()?;
    } else {
        join::all_of(request.container, 0)?;
    }
    process::join_new_keyring(&plan.process, proc.0.as_ref())?;
    let root = mount::open_root().context("rootfs", "open", "/")?;
    let cwd = process::open_cwd(root.as_fd(), &plan.process.cwd, process::Cwd::MustExist)?;
    process::enter_cwd(cwd, &plan.process.cwd)?;
    let terminal = if plan.process.terminal {
        Some(process::open_terminal(root.as_fd(), false)?)
    } else {
        None
    };
    process::reopen_null(root.as_fd())?;
    process::Ending {
        plan: &plan.process,
        user: plan.user,
        control,
        terminal,
        proc: proc.0,
        tuned: plan.user_namespace.is_some(),
        hooks: None,
        launch: Some(launch),
    }
    .run()
}

/// A procfs of the new process's PID namespace, mounted nowhere: nothing that a container does can stand in its way
/// (CVE-2025-52881).
pub(super) struct ProcFs(Option<OwnedFd>);

impl ProcFs {
    fn new() -> Result<Self, Fault> {
        let filesystem = mount::Filesystem::open("proc").context("mount", "fsopen", "proc")?;
        let attributes =
            mount::attribute::NOSUID | mount::attribute::NODEV | mount::attribute::NOEXEC;
        let mount = filesystem.mount(attributes);
        Ok(Self(Some(mount.context("mount", "fsmount", "proc")?)))
    }

    fn for_plan(plan: &Plan) -> Result<Self, Fault> {
        let needed = !plan.sysctls.is_empty()
            || !plan.process.apparmor.is_empty()
            || !plan.process.selinux.is_empty();
        if needed { Self::new() } else { Ok(Self(None)) }
    }
}

fn set_sysctls(plan: &Plan, proc: &ProcFs) -> Step {
    let Some(proc) = &proc.0 else {
        return Ok(());
    };
    for (key, value) in &plan.sysctls {
        // A slash in a key is a dot in a name, as with sysctl(8): net.ipv4.conf.eth0/1.forwarding.
        let swapped: String = key
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect();
        if swapped
            .split('/')
            .any(|part| part.is_empty() || part == "..")
        {
            return Err(Fault::check("sysctl", "name", key));
        }
        let path = Path::new("sys").join(swapped);
        file::write_kernel(proc.as_fd(), &path, value.as_bytes()).context(
            "sysctl",
            "write",
            format_args!("{key} = {value}"),
        )?;
    }
    Ok(())
}

/// A copy of the pod's `/dev/shm`, from pause's mount namespace, if a mount of the plan asks for it.
fn take_pod_shm(plan: &Plan, request: &CreateRequest<'_>) -> Result<Option<OwnedFd>, Fault> {
    let wanted = |mount: &crate::runtime::plan::MountPlan| mount.source == MountSource::PodShm;
    if !plan.mounts.iter().any(wanted) {
        return Ok(None);
    }
    let pause = request
        .pause
        .ok_or_else(|| Fault::check("mount", "pod /dev/shm", "no pause given"))?;
    join::visit_mounts(pause, "pod /dev/shm", || {
        let root = mount::open_root()?;
        mount::copy_tree(root.as_fd(), Path::new("dev/shm"), false)
    })
    .map(Some)
}

/// Pause: a tiny read-only root with nothing but `/dev/shm`, and `/proc` where containers come to live in its PID namespace.
fn pause(
    plan: &Plan,
    shm_size: u64,
    control: BorrowedFd<'_>,
    proc: &ProcFs,
) -> Result<process::Abandoned, Fault> {
    let label = plan.mount_label.as_str();
    let program = memfd::program("pause", PAUSE).context("exec", "memfd_create", "pause")?;
    if !label.is_empty() {
        // What a confined process may execute is told by the label of the file.
        let flags = file::XattrFlags::empty();
        let set = file::fsetxattr(&program, "security.selinux", label.as_bytes(), flags);
        let set = set.map_err(std::io::Error::from);
        // Where memory files may not be executed it lies on a read-only tmpfs.
        if !set
            .as_ref()
            .is_err_and(|e| e.kind() == std::io::ErrorKind::ReadOnlyFilesystem)
        {
            set.context("label", "fsetxattr", "pause")?;
        }
    }
    let shared = |mount: &crate::runtime::plan::MountPlan| mount.target == "/proc";
    let procfs = match plan.mounts.iter().any(shared) {
        // While the node's is in sight: see `mount_kernel_filesystems`.
        true => procfs::of_pod()?,
        false => None,
    };
    mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
    let root = rootfs::tmpfs(
        &[("mode", "755"), ("size", "4k"), ("nr_inodes", "5")],
        0,
        label,
    )?;
    let proc_point = file::make_in(root.as_fd(), Path::new("/proc"), Make::Directory);
    let proc_point = proc_point.context("rootfs", "mkdir", "/proc")?;
    let shm = file::make_in(root.as_fd(), Path::new("/dev/shm"), Make::Directory)
        .context("rootfs", "mkdir", "/dev/shm")?;
    rootfs::pivot_into(root.as_fd())?;
    if shm_size > 0 {
        let size = shm_size.to_string();
        let attributes =
            mount::attribute::NOSUID | mount::attribute::NODEV | mount::attribute::NOEXEC;
        let memory = rootfs::tmpfs(&[("mode", "1777"), ("size", &size)], attributes, label)?;
        mount::attach(memory.as_fd(), shm.as_fd()).context("rootfs", "move_mount", "/dev/shm")?;
    }
    if let Some(procfs) = procfs {
        mount::attach(procfs.as_fd(), proc_point.as_fd()).context(
            "rootfs",
            "move_mount",
            "/proc",
        )?;
    }
    rootfs::make_readonly(root.as_fd(), false)?;
    process::run_pause(plan, program.as_fd(), control, proc.0.as_ref())
}

/// Opens a directory of the host for later use as a path by descriptor.
fn open_host(path: &Path, stage: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    file::open(path, flags, Mode::empty()).context(stage, "open", path.display())
}

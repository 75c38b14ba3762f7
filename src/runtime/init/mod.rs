//! The child between clone and exec: it follows a plan, step by step, reports, waits for its start and executes.
//!
//! It has one thread and a copy of the monitor's memory that dies with the exec, so it may allocate. It sees no descriptor
//! but those listed at the clone, is not dumpable, and leaves by exec or `_exit` only. The order matters:
//!
//! ```text
//! streams, plan, cgroup, oom_score_adj        on the host's mounts
//! join namespaces, unshare the rest
//! host name, sysctls                          by a procfs of our own, mounted nowhere
//! copies of what is bound                     while the host's paths are in sight, peers kept
//! everything private; root, pivot             the host is gone from here on
//! mounts, devices, volumes, masks             by descriptor, inside the root
//! user, cwd, terminal, limits, capabilities
//! -> Ready ... start byte ->                  see `create`
//! seccomp, exec
//! ```
mod copy;
mod devices;
mod join;
mod masks;
mod mounts;
mod process;
mod rootfs;
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
use crate::sys::file::{self, Make, Mode, OFlags};
use crate::sys::{credentials, fd, memfd, mount, socket};

/// Largest plan in bytes.
const MAX_PLAN: usize = 16 * 1024 * 1024;
/// The program that pause runs.
const PAUSE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// A step that gives nothing but may fail.
type Step = Result<(), Fault>;

/// The child of `create::spawn`. Returns its exit code, if at all.
pub(super) fn create(request: &CreateRequest<'_>, control: BorrowedFd<'_>, joined: bool) -> i32 {
    finish(control, follow(request, control, joined))
}

/// The child of `exec::spawn`. Returns its exit code, if at all.
pub(super) fn execute(request: &ExecRequest<'_>, control: BorrowedFd<'_>, joined: bool) -> i32 {
    finish(control, follow_exec(request, control, joined))
}

/// Exit code of a child that was not started; 127 as shells say it when a command cannot be run.
fn finish(control: BorrowedFd<'_>, outcome: Result<process::Abandoned, Fault>) -> i32 {
    if let Err(fault) = outcome
        && let Ok(packet) = postcard::to_allocvec(&Report::Failed(fault))
    {
        // Without a listener nobody needs to know.
        let _sent = socket::send(control, &packet, &[]);
    }
    127
}

fn decode<T: DeserializeOwned>(plan: BorrowedFd<'_>) -> Result<T, Fault> {
    let bytes = memfd::read_all(plan, MAX_PLAN).context("plan", "pread", "plan")?;
    let bad = |error| Fault::check("plan", "decode", error);
    let (_preamble, rest) = Preamble::decode(&bytes).map_err(bad)?;
    postcard::from_bytes(rest).map_err(bad)
}

fn follow(
    request: &CreateRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
) -> Result<process::Abandoned, Fault> {
    fd::set_standard(request.stdio).context("stdio", "dup2", "standard streams")?;
    let plan: Plan = decode(request.plan)?;
    file::set_umask(0);
    join::cgroups(&plan.cgroup, joined)?;
    process::set_oom_score(&plan.process)?;
    credentials::join_new_session_keyring().context("process", "keyctl", "session keyring")?;
    join::existing(&plan.namespaces, request)?;
    let shm = take_pod_shm(&plan, request)?;
    join::new(&plan.namespaces)?;
    if !plan.hostname.is_empty() && plan.namespaces.uts == NamespaceSource::New {
        credentials::set_host_name(&plan.hostname).context(
            "namespace",
            "sethostname",
            &plan.hostname,
        )?;
    }
    let proc = ProcFs::for_plan(&plan)?;
    set_sysctls(&plan, &proc)?;
    if let Rootfs::Pause { shm_size } = plan.rootfs {
        return pause(&plan, shm_size, control);
    }
    let mut host = mounts::Host::gather(&plan, shm, proc)?;
    mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
    host.gather_images(&plan)?;
    let mut root = rootfs::enter(&plan.rootfs, &plan.masked_paths)?;
    let (terminal, host) = furnish(&plan, host, &mut root)?;
    let user = user::look_up(root.fd.as_fd(), &plan.process.user)?;
    let cwd = process::open_cwd(root.fd.as_fd(), &plan.process.cwd, process::Cwd::Make)?;
    rootfs::seal(&plan, &root)?;
    process::enter_cwd(cwd, &plan.process.cwd)?;
    process::Ending {
        plan: &plan.process,
        user,
        control,
        terminal,
        proc: host.into_proc(),
    }
    .run()
}

/// Mounts and nodes below the new root; the terminal, if the process has one.
fn furnish(
    plan: &Plan,
    mut host: mounts::Host,
    root: &mut rootfs::Root,
) -> Result<(Option<crate::sys::pty::Pty>, mounts::Host), Fault> {
    mounts::attach_all(plan, &mut host, root.fd.as_fd())?;
    devices::make(plan, root.fd.as_fd())?;
    let terminal = if plan.process.terminal {
        let pty = process::open_terminal(root.fd.as_fd())?;
        devices::bind_console(root.fd.as_fd(), pty.slave.as_fd())?;
        Some(pty)
    } else {
        None
    };
    masks::hide(&plan.masked_paths, root)?;
    masks::protect(&plan.readonly_paths, root.fd.as_fd())?;
    Ok((terminal, host))
}

fn follow_exec(
    request: &ExecRequest<'_>,
    control: BorrowedFd<'_>,
    joined: bool,
) -> Result<process::Abandoned, Fault> {
    fd::set_standard(request.stdio).context("stdio", "dup2", "standard streams")?;
    let plan: ExecPlan = decode(request.plan)?;
    file::set_umask(0);
    join::cgroups(&plan.cgroup, joined)?;
    process::set_oom_score(&plan.process)?;
    credentials::join_new_session_keyring().context("process", "keyctl", "session keyring")?;
    join::all_of(request.container)?;
    let proc = if plan.process.apparmor.is_empty() && plan.process.selinux.is_empty() {
        ProcFs(None)
    } else {
        ProcFs::new()?
    };
    let root = mount::open_root().context("rootfs", "open", "/")?;
    let user = user::look_up(root.as_fd(), &plan.process.user)?;
    let cwd = process::open_cwd(root.as_fd(), &plan.process.cwd, process::Cwd::MustExist)?;
    process::enter_cwd(cwd, &plan.process.cwd)?;
    let terminal = if plan.process.terminal {
        Some(process::open_terminal(root.as_fd())?)
    } else {
        None
    };
    process::Ending {
        plan: &plan.process,
        user,
        control,
        terminal,
        proc: proc.0,
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
        let idmapped = |source: &MountSource| matches!(source, MountSource::Bind { uid_mappings, .. } if !uid_mappings.is_empty());
        let needed = !plan.sysctls.is_empty()
            || !plan.process.apparmor.is_empty()
            || !plan.process.selinux.is_empty()
            || plan.mounts.iter().any(|mount| idmapped(&mount.source));
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
    join::visit_mounts(pause, || {
        let root = mount::open_root()?;
        mount::copy_tree(root.as_fd(), Path::new("dev/shm"), false)
    })
    .map(Some)
}

/// Pause: a tiny read-only root with nothing but `/dev/shm`.
fn pause(plan: &Plan, shm_size: u64, control: BorrowedFd<'_>) -> Result<process::Abandoned, Fault> {
    let program = memfd::program("pause", PAUSE).context("exec", "memfd_create", "pause")?;
    mount::make_all_private().context("rootfs", "mount_setattr", "/")?;
    let root = rootfs::tmpfs(&[("mode", "755"), ("size", "4k"), ("nr_inodes", "4")], 0)?;
    let shm = file::make_in(root.as_fd(), Path::new("/dev/shm"), Make::Directory)
        .context("rootfs", "mkdir", "/dev/shm")?;
    rootfs::pivot_into(root.as_fd())?;
    if shm_size > 0 {
        let size = shm_size.to_string();
        let attributes =
            mount::attribute::NOSUID | mount::attribute::NODEV | mount::attribute::NOEXEC;
        let memory = rootfs::tmpfs(&[("mode", "1777"), ("size", &size)], attributes)?;
        mount::attach(memory.as_fd(), shm.as_fd()).context("rootfs", "move_mount", "/dev/shm")?;
    }
    rootfs::make_readonly(root.as_fd(), false)?;
    process::run_pause(plan, program.as_fd(), control)
}

/// Opens a directory of the host for later use as a path by descriptor.
fn open_host(path: &Path, stage: &str) -> Result<OwnedFd, Fault> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    file::open(path, flags, Mode::empty()).context(stage, "open", path.display())
}

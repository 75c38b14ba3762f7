//! The last steps: working directory, terminal, limits, identity, report, start, seccomp, exec.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use crate::base::container::ProcessUser;
use crate::runtime::hooks::Hooks;
use crate::runtime::plan::{
    Context, Fault, Plan, ProcessPlan, Report, SchedulerPlan, SeccompFilter, Tuning,
};
use crate::sys::credentials::{self, CAP_SYS_ADMIN};
use crate::sys::exec::Image;
use crate::sys::file::{self, FileType, Make, Mode, OFlags, Uid, makedev};
use crate::sys::launch::Shared;
use crate::sys::pty::{self, Pty};
use crate::sys::seccomp::{self, Call};
use crate::sys::{fd, scheduling, signal, socket};

use super::launch::Launch;
use super::{Step, hooks, user};

/// The monitor went away before the start: nobody is left to tell.
pub(super) struct Abandoned;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
pub(super) const ENOENT: i32 = 2;
pub(super) const EACCES: i32 = 13;
pub(super) const ENOTDIR: i32 = 20;

/// Sets `oom_score_adj`, clamped; while the host's /proc is in sight.
pub(super) fn set_oom_score(plan: &ProcessPlan) -> Step {
    if let Some(wanted) = plan.oom_score_adj {
        credentials::set_oom_score_adj(wanted).context("process", "oom_score_adj", wanted)?;
    }
    Ok(())
}

/// A session keyring of its own, with the SELinux label of the process. (The exec resets `keycreate`.)
pub(super) fn join_new_keyring(plan: &ProcessPlan, proc: Option<&OwnedFd>) -> Step {
    if !plan.selinux.is_empty() {
        let missing = || Fault::check("label", "procfs", "not mounted");
        let (proc, path) = (proc.ok_or_else(missing)?, "self/attr/keycreate");
        let label = plan.selinux.as_bytes();
        let written = file::write_kernel(proc.as_fd(), Path::new(path), label);
        written.context("label", "write", format_args!("{} to {path}", plan.selinux))?;
    }
    credentials::join_new_session_keyring().context("process", "keyctl", "session keyring")
}

/// What to do where the working directory is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cwd {
    /// A container's: make it.
    Make,
    /// An exec's: fail.
    MustExist,
}

/// Opens the working directory, inside the root and through no magic link: `/proc/self/fd/N` is refused
/// (CVE-2024-21626).
pub(super) fn open_cwd(root: BorrowedFd<'_>, path: &str, missing: Cwd) -> Result<OwnedFd, Fault> {
    let path = if path.is_empty() { "/" } else { path };
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let open = || file::open_in(root, Path::new(path), flags, Mode::empty());
    match open() {
        Err(error) if missing == Cwd::Make && error.kind() == std::io::ErrorKind::NotFound => {
            let made = file::make_in(root, Path::new(path), Make::Directory);
            let _made = made.context("cwd", "mkdirat", path)?;
            open()
        }
        other => other,
    }
    .context("cwd", "openat2", path)
}

/// Enters it, and asks the kernel where that is.
pub(super) fn enter_cwd(directory: OwnedFd, path: &str) -> Step {
    file::change_directory(directory.as_fd()).context("cwd", "fchdir", path)?;
    let real = file::working_directory().context("cwd", "getcwd", path)?;
    if real.first() == Some(&b'/') {
        Ok(())
    } else {
        Err(Fault::check(
            "cwd",
            "check",
            format_args!("{path} is outside the root"),
        ))
    }
}

/// Opens a terminal in the container's own `/dev/pts`, takes it as standard streams and, where `take` says so, as controlling
/// terminal.
pub(super) fn open_terminal(root: BorrowedFd<'_>, take: bool) -> Result<Pty, Fault> {
    const STAGE: &str = "terminal";
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let devpts = file::open_in_no_links(root, Path::new("/dev/pts"), flags, Mode::empty());
    let devpts = devpts.context(STAGE, "openat2", "/dev/pts")?;
    let pty = pty::open_in(devpts.as_fd()).context(STAGE, "open", "/dev/pts/ptmx")?;
    if take {
        pty::control(pty.slave.as_fd()).context(STAGE, "ioctl", "TIOCSCTTY")?;
    }
    let slave = pty.slave.as_fd();
    fd::set_standard([slave, slave, slave]).context(STAGE, "dup2", "pty slave")?;
    Ok(pty)
}

/// Puts the container's own `/dev/null` in the place of the node's among the standard streams: who has that open may change
/// its mode and owner for everybody on the node.
pub(super) fn reopen_null(root: BorrowedFd<'_>) -> Step {
    const STAGE: &str = "stdio";
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    let mut replaced = [None, None, None];
    for (number, (stream, own)) in streams.iter().zip(&mut replaced).enumerate() {
        if is_null(*stream)? {
            *own = Some(own_null(root, number == 0)?);
        }
    }
    if replaced.iter().all(Option::is_none) {
        return Ok(());
    }
    let now = [0, 1, 2].map(|at| replaced[at].as_ref().map_or(streams[at], OwnedFd::as_fd));
    fd::set_standard(now).context(STAGE, "dup2", "/dev/null")
}

/// The container's `/dev/null`. Where a volume over `/dev` has none, what is only `read` is a pipe at its end.
fn own_null(root: BorrowedFd<'_>, read: bool) -> Result<OwnedFd, Fault> {
    const STAGE: &str = "stdio";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let null = file::open_in(root, Path::new("/dev/null"), flags, Mode::empty());
    let null = null.context(STAGE, "openat2", "/dev/null of the container");
    let null = null.and_then(|null| match is_null(null.as_fd())? {
        true => Ok(null),
        false => Err(Fault::check(
            STAGE,
            "check",
            "the container's /dev/null is another file",
        )),
    });
    if null.is_err() && read {
        let (reader, _closed_here) = fd::pipe().context(STAGE, "pipe2", "stdin")?;
        return Ok(reader);
    }
    let null = null?;
    fd::set_nonblocking(null.as_fd(), false).context(STAGE, "fcntl", "O_NONBLOCK")?;
    Ok(null)
}

fn is_null(stream: BorrowedFd<'_>) -> Result<bool, Fault> {
    let status = file::fstat(stream).context("stdio", "fstat", "stream")?;
    let device = FileType::from_raw_mode(status.st_mode) == FileType::CharacterDevice;
    Ok(device && status.st_rdev == makedev(1, 3))
}

/// All that is left to do.
pub(super) struct Ending<'a> {
    pub(super) plan: &'a ProcessPlan,
    pub(super) user: ProcessUser,
    pub(super) control: BorrowedFd<'a>,
    pub(super) terminal: Option<Pty>,
    /// A procfs of our own, where a security module needs it.
    pub(super) proc: Option<OwnedFd>,
    /// [`limit_and_tune`] was done.
    pub(super) tuned: bool,
    /// Hooks of the container, if it has any.
    pub(super) hooks: Option<&'a Hooks>,
    /// This process is a maker: what executes is born in a PID namespace where others live.
    pub(super) launch: Option<Launch<'a>>,
}

impl Ending<'_> {
    /// Becomes the user, reports, waits, executes.
    pub(super) fn run(self) -> Result<Abandoned, Fault> {
        let plan = self.plan;
        if self.terminal.is_none() && self.launch.is_none() {
            // A session of its own; it cannot fail in a fresh child.
            let _session = crate::sys::process::new_session();
        }
        let image = self.image()?;
        self.own_streams()?;
        label(plan, self.proc.as_ref())?;
        if !self.tuned {
            limit_and_tune(plan)?;
        }
        file::set_umask(plan.umask.unwrap_or(0o022));
        let last = become_user(plan, &self.user, self.launch.is_some())?;
        credentials::set_not_dumpable().context("process", "prctl", "PR_SET_DUMPABLE")?;
        if !report_and_wait(&self.user, self.control, self.terminal)? {
            return Ok(Abandoned);
        }
        signal::reset_all();
        let candidates = candidates(plan)?;
        let confine = |image: &Image, program: &CStr| confine(plan, last.as_ref(), image, program);
        if let Some(hooks) = self.hooks {
            // Each is confined as the program will be: this process could not clone any more once it is.
            let as_born = |image: &Image, program: &CStr, shared: &Shared| -> Step {
                if let (Some(launch), Some(last)) = (&self.launch, &last) {
                    let programs = [program.to_owned()];
                    let never = launch.run_as(shared, plan, image, last, &programs)?;
                    match never {}
                }
                confine(image, program)
            };
            hooks::before_exec(hooks, &confine, self.launch.as_ref(), &as_born)?;
        }
        if let (Some(launch), Some(last)) = (&self.launch, &last) {
            let never = launch.run(plan, &image, last, &candidates)?;
            match never {}
        }
        if let Some(first) = candidates.first() {
            confine(&image, first)?;
        }
        Err(execute(plan, &image, &candidates))
    }

    /// Arguments and environment, `HOME` added.
    fn image(&self) -> Result<Image, Fault> {
        let text = |bytes: Vec<u8>| {
            CString::new(bytes).map_err(|_nul| Fault::check("exec", "strings", "a NUL byte"))
        };
        let plan = self.plan;
        let arguments = plan.args.iter().map(|text| text.clone().into_bytes());
        let arguments = arguments.map(text).collect::<Result<_, _>>()?;
        let mut environment = plan.env.clone();
        if !environment.iter().any(|entry| entry.starts_with(b"HOME=")) {
            environment.push([b"HOME=", self.user.home.as_slice()].concat());
        }
        let environment = environment.into_iter().map(text);
        Ok(Image::new(
            arguments,
            environment.collect::<Result<_, _>>()?,
        ))
    }

    /// Pipes and terminals belong to the user, who may open `/dev/stdout` again.
    fn own_streams(&self) -> Step {
        if self.user.uid == 0 {
            return Ok(());
        }
        let streams = [
            std::io::stdin().as_fd().try_clone_to_owned(),
            std::io::stdout().as_fd().try_clone_to_owned(),
            std::io::stderr().as_fd().try_clone_to_owned(),
        ];
        for stream in streams {
            let stream = stream.context("stdio", "dup", "stream")?;
            let status = file::fstat(&stream).context("stdio", "fstat", "stream")?;
            let kind = FileType::from_raw_mode(status.st_mode);
            let tty = self.terminal.is_some();
            // Nodes of the host (/dev/null) and files stay as they are.
            if kind == FileType::Fifo || kind == FileType::Socket || tty {
                let owner = Some(Uid::from_raw(self.user.uid));
                file::fchown(&stream, owner, None).context("stdio", "fchown", self.user.uid)?;
            }
        }
        Ok(())
    }
}

/// Limits, priorities and memory policy: they need capabilities that the user may not have, nor any user namespace.
pub(super) fn limit_and_tune(plan: &ProcessPlan) -> Step {
    for (resource, soft, hard) in &plan.rlimits {
        let what = format_args!("limit {resource} to {soft}:{hard}").to_string();
        credentials::set_limit(*resource, *soft, *hard).context("process", "prlimit64", what)?;
    }
    tune(&plan.tuning)
}

/// Raises hard limits of this process as far as the plan's are higher: what a runtime sets from inside a user namespace can
/// only be lower than what it has there.
pub(super) fn raise_limits(plan: &ProcessPlan) -> Step {
    for (resource, _, hard) in &plan.rlimits {
        let what = format_args!("hard limit {resource} to {hard}").to_string();
        let ours = credentials::limit(*resource).context("process", "prlimit64", &what)?;
        if ours.1 < *hard {
            credentials::set_limit(*resource, ours.0, *hard).context(
                "process",
                "prlimit64",
                what,
            )?;
        }
    }
    Ok(())
}

/// Keeps a process on a CPU, after it has joined its cpuset; `pid` 0: this one.
pub(super) fn stay_on(pid: u32, cpu: Option<u32>) -> Step {
    const ESRCH: i32 = 3;
    const EINVAL: i32 = 22;
    let Some(cpu) = cpu else { return Ok(()) };
    match scheduling::set_cpu(pid, cpu) {
        // The container was given others meanwhile: it runs on those. Or the process has ended.
        Err(error) if matches!(error.raw_os_error(), Some(EINVAL | ESRCH)) => Ok(()),
        outcome => outcome.context("process", "sched_setaffinity", cpu),
    }
}

fn tune(tuning: &Tuning) -> Step {
    set_priorities(0, tuning)?;
    let Some(policy) = &tuning.memory_policy else {
        return Ok(());
    };
    scheduling::set_memory_policy(policy.mode, &policy.nodes).context(
        "process",
        "set_mempolicy",
        format_args!("{policy:?}"),
    )
}

/// Takes out of a tuning what does not outlast a fork: it is to be set once more on the process that is born.
pub(super) fn take_late(tuning: &mut Tuning) -> Option<Tuning> {
    const DEADLINE: u32 = 6;
    const RESET_ON_FORK: u64 = 1;
    let scheduler = tuning.scheduler?;
    if scheduler.policy == DEADLINE {
        // Who has it cannot fork at all.
        tuning.scheduler = None;
    } else if scheduler.flags & RESET_ON_FORK != 0 {
        let flags = scheduler.flags & !RESET_ON_FORK;
        tuning.scheduler = Some(SchedulerPlan { flags, ..scheduler });
    } else {
        return None;
    }
    Some(Tuning {
        scheduler: Some(scheduler),
        ..Tuning::default()
    })
}

/// Those of another process, which has one thread or is to go on with its first; `pid` 0: of this one.
pub(super) fn set_priorities(pid: u32, tuning: &Tuning) -> Step {
    if let Some((class, level)) = tuning.io_priority {
        scheduling::set_io_priority(pid, class, level).context(
            "process",
            "ioprio_set",
            format_args!("class {class}, level {level}"),
        )?;
    }
    let Some(wanted) = &tuning.scheduler else {
        return Ok(());
    };
    let attributes = scheduling::Attributes {
        policy: wanted.policy,
        flags: wanted.flags,
        nice: wanted.nice,
        priority: wanted.priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
    };
    scheduling::set_scheduler(pid, &attributes).context(
        "process",
        "sched_setattr",
        format_args!("{wanted:?}"),
    )
}

/// Labels that security modules apply at the exec, written to a procfs that is certainly one.
fn label(plan: &ProcessPlan, proc: Option<&OwnedFd>) -> Step {
    for (value, path, text) in [
        (
            &plan.apparmor,
            "self/attr/apparmor/exec",
            format!("exec {}", plan.apparmor),
        ),
        (&plan.selinux, "self/attr/exec", plan.selinux.clone()),
    ] {
        if value.is_empty() {
            continue;
        }
        let missing = || Fault::check("label", "procfs", "not mounted");
        let proc = proc.ok_or_else(missing)?;
        let mut written = file::write_kernel(proc.as_fd(), Path::new(path), text.as_bytes());
        let absent = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
        if path.contains("apparmor") && written.as_ref().is_err_and(absent) {
            // Before Linux 5.8 the file is not in a directory of its own.
            let old = Path::new("self/attr/exec");
            written = file::write_kernel(proc.as_fd(), old, text.as_bytes());
        }
        written.context("label", "write", format_args!("{value} to {path}"))?;
    }
    Ok(())
}

/// The capabilities at exec.
#[derive(Debug)]
pub(super) struct Capabilities {
    permitted: u64,
    ambient: u64,
}

impl Capabilities {
    pub(super) fn apply(&self) -> Step {
        let (permitted, ambient) = (self.permitted, self.ambient);
        credentials::set_capabilities(permitted, permitted, ambient).context(
            "capabilities",
            "capset",
            format_args!("{permitted:#x}"),
        )?;
        credentials::set_ambient(ambient).context(
            "capabilities",
            "PR_CAP_AMBIENT",
            format_args!("{ambient:#x}"),
        )
    }
}

/// Changes ids and drops capabilities; those that are left to apply are returned: after a seccomp filter that needs
/// `CAP_SYS_ADMIN`, or, where a maker must `hold` that one, after its last step that does.
fn become_user(
    plan: &ProcessPlan,
    user: &ProcessUser,
    hold: bool,
) -> Result<Option<Capabilities>, Fault> {
    const STAGE: &str = "user";
    // A machine may lack some: what we do not have, we cannot give.
    let ours = credentials::permitted_capabilities().context(STAGE, "capget", "")?;
    let ambient = plan.capabilities.ambient & ours;
    let wanted = Capabilities {
        permitted: plan.capabilities.permitted & ours | ambient,
        ambient,
    };
    let bounding = plan.capabilities.bounding | wanted.permitted;
    credentials::limit_bounding(bounding).context(STAGE, "PR_CAPBSET_DROP", "")?;
    credentials::keep_capabilities(true).context(STAGE, "PR_SET_KEEPCAPS", "")?;
    credentials::become_user(user.uid, user.gid, &user.groups).map_err(|(call, error)| {
        let who = format_args!("{}:{}", user.uid, user.gid).to_string();
        Fault::call(STAGE, call, who, &error)
    })?;
    credentials::keep_capabilities(false).context(STAGE, "PR_SET_KEEPCAPS", "")?;
    let at_once = !hold && (plan.no_new_privs || plan.seccomp.is_none());
    if at_once {
        wanted.apply()?;
    }
    if plan.no_new_privs {
        credentials::set_no_new_privs().context(STAGE, "PR_SET_NO_NEW_PRIVS", "")?;
    }
    if at_once {
        return Ok(None);
    }
    let held = wanted.permitted | CAP_SYS_ADMIN & ours;
    credentials::set_capabilities(held, held, ambient).context(STAGE, "capset", "")?;
    Ok(Some(wanted))
}

/// Says that all is set up, then waits for one byte; `false`: the monitor is gone.
fn report_and_wait(
    user: &ProcessUser,
    control: BorrowedFd<'_>,
    terminal: Option<Pty>,
) -> Result<bool, Fault> {
    let report = Report::Ready(user.clone());
    let packet =
        postcard::to_allocvec(&report).map_err(|error| Fault::check("report", "encode", error))?;
    let master = terminal.as_ref().map(|pty| pty.master.as_fd());
    let descriptors = master.as_slice();
    socket::send(control, &packet, descriptors).context("report", "sendmsg", "control")?;
    drop(terminal);
    let received = socket::receive(control, &mut [0; 8]).context("report", "recvmsg", "control")?;
    Ok(received.bytes > 0)
}

/// Installs the seccomp filter, with which nothing may go wrong unseen: what it certainly refuses of what is left to do is
/// told before, while we can still tell and end. Memory is not asked for afterwards either, unless something fails.
fn confine(plan: &ProcessPlan, last: Option<&Capabilities>, image: &Image, program: &CStr) -> Step {
    if let Some(filter) = &plan.seccomp {
        judge(filter, image.call(program), last.is_some())?;
        install(filter)?;
    }
    last.map_or(Ok(()), Capabilities::apply)
}

/// Refuses a filter that does not let an exec with these arguments pass, nor, where they are `left` to be dropped after it, the
/// capabilities.
pub(super) fn judge(filter: &SeccompFilter, exec: seccomp::Arguments, left: bool) -> Step {
    let mut calls = vec![(Call::Execve, exec)];
    if left {
        calls.extend([
            (Call::Capset, [None; 6]),
            (Call::Prctl, credentials::CLEAR_AMBIENT),
        ]);
    }
    let what = "no program can be started with it";
    refuse(filter, &calls, what)
}

/// Refuses a filter that does not let each of `calls` pass; else `what` does not work.
fn refuse(filter: &SeccompFilter, calls: &[(Call, seccomp::Arguments)], what: &str) -> Step {
    for (call, arguments) in calls {
        if let Some(refusal) = seccomp::refusal(&filter.instructions, *call, arguments) {
            let name = call.name();
            let told = format_args!("{name}(2) {refusal}: {what}; allow {name}").to_string();
            return Err(Fault::check("seccomp", "the profile makes", told));
        }
    }
    Ok(())
}

fn install(filter: &SeccompFilter) -> Step {
    let count = filter.instructions.len();
    seccomp::install(&filter.instructions, filter.flags).context(
        "seccomp",
        "seccomp",
        format_args!("{count} instructions, flags {:#x}", filter.flags),
    )
}

/// Where the program is looked for, as execvp(3) does; at least one.
fn candidates(plan: &ProcessPlan) -> Result<Vec<CString>, Fault> {
    let Some(name) = plan.args.first().filter(|name| !name.is_empty()) else {
        return Err(Fault::check(
            "exec",
            "execve",
            "no command: the image has none either",
        ));
    };
    let candidates: Vec<Vec<u8>> = if name.contains('/') {
        vec![name.clone().into_bytes()]
    } else {
        let directories = search_path(plan).split(|byte| *byte == b':');
        directories
            .map(|directory| match directory {
                b"" => [b"./", name.as_bytes()].concat(),
                directory => [directory, b"/", name.as_bytes()].concat(),
            })
            .collect()
    };
    let candidates = candidates.into_iter().map(CString::new);
    let nul = |_nul| Fault::check("exec", "strings", "a NUL byte");
    candidates.collect::<Result<_, _>>().map_err(nul)
}

/// Where programs are looked for.
pub(super) fn search_path(plan: &ProcessPlan) -> &[u8] {
    let mut entries = plan.env.iter();
    let path = entries.find_map(|entry| entry.strip_prefix(b"PATH="));
    path.unwrap_or(DEFAULT_PATH.as_bytes())
}

/// Executes the first candidate that there is. Returns only on failure.
fn execute(plan: &ProcessPlan, image: &Image, candidates: &[CString]) -> Fault {
    let mut worst = None;
    for candidate in candidates {
        let error = image.execute(candidate);
        match error.raw_os_error() {
            Some(ENOENT | ENOTDIR) if file::stat(candidate).is_ok() => {
                // The file is there: its interpreter or loader is not.
                let shown = candidate.to_string_lossy();
                let what = format_args!("{shown:?} (its interpreter is missing)").to_string();
                return Fault::call("exec", "execve", what, &error);
            }
            Some(ENOENT | ENOTDIR) => {}
            Some(EACCES) => worst = Some(error),
            _ => {
                let shown = candidate.to_string_lossy();
                return Fault::call("exec", "execve", format_args!("{shown:?}"), &error);
            }
        }
    }
    let error = worst.unwrap_or_else(|| std::io::Error::from_raw_os_error(ENOENT));
    let name = plan.args.first().map(String::as_str).unwrap_or_default();
    let place = if name.contains('/') {
        String::new()
    } else {
        format!(" (in PATH {})", String::from_utf8_lossy(search_path(plan)))
    };
    Fault::call("exec", "execve", format_args!("{name:?}{place}"), &error)
}

/// Pause: no report, no wait; the end of the control socket is its success.
pub(super) fn run_pause(
    plan: &Plan,
    program: BorrowedFd<'_>,
    control: BorrowedFd<'_>,
    proc: Option<&OwnedFd>,
) -> Result<Abandoned, Fault> {
    label(&plan.process, proc)?;
    let _session = crate::sys::process::new_session();
    let user = user::of_numbers(&plan.process.user)?;
    let _none_left = become_user(&plan.process, &user, false)?;
    let _open_until_exec = control;
    signal::reset_all();
    let image = Image::new(vec![c"/pause".to_owned()], Vec::new());
    if let Some(filter) = &plan.process.seccomp {
        const WNOHANG: u64 = 1;
        let wait = [Some(u64::MAX), Some(0), Some(WNOHANG), Some(0), None, None];
        let calls = [
            (Call::Execveat, image.call_of_descriptor(program)),
            (Call::RtSigprocmask, [None; 6]),
            (Call::RtSigtimedwait, [None; 6]),
            (Call::Wait4, wait),
        ];
        let what = "the pod's own process cannot do its work with it";
        refuse(filter, &calls, what)?;
        install(filter)?;
    }
    let error = image.execute_descriptor(program);
    Err(Fault::call("exec", "execveat", "pause", &error))
}

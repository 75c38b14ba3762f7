//! Hooks, run: one after the other, each waited for with its output and its time. See `runtime::hooks`.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::base::hook::{Hook, HookPoint};
use crate::runtime::hooks::{Hooks, LIMIT, Stage};
use crate::runtime::plan::{Context, Fault, Plan, Report};
use crate::runtime::tree;
use crate::sys::exec::Image;
use crate::sys::file;
use crate::sys::launch::Shared;
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::process::{self, Exit};
use crate::sys::{clone, credentials, fd, memfd, signal, socket};

use super::external::{PATH, begin, tell};
use super::launch::{self, Launch};
use super::{Step, decode, open_host};

const STAGE: &str = "hook";
/// Of what a hook writes, the last bytes are told.
const MAX_TOLD: usize = 1024;
/// Before the number of a failed execve(2), in what a hook wrote.
const EXEC: &str = "berth: execve failed: ";
/// Exit code of a hook that could not be executed.
const NOT_EXECUTED: i32 = 127;

/// The helper of `hooks::run`; `parent` is the monitor and what the standard streams are. Returns its exit code.
pub(in crate::runtime) fn run(
    stage: Stage,
    plan: BorrowedFd<'_>,
    pid: Option<u32>,
    (monitor, null): (u32, BorrowedFd<'_>),
    control: BorrowedFd<'_>,
) -> i32 {
    let work = || {
        begin(monitor, [null; 3])?;
        // What a hook leaves behind stays ours, so that its end is the end of all it started.
        process::become_subreaper().context(STAGE, "prctl", "PR_SET_CHILD_SUBREAPER")?;
        // Not as precious as the monitor, whose score this is.
        credentials::set_oom_score_adj(0).context(STAGE, "oom_score_adj", 0)?;
        let plan: Plan = decode(plan)?;
        let Some(hooks) = &plan.hooks else {
            return Ok((Report::Done, None));
        };
        let state = hooks.state(stage.status(), pid);
        let directory = open_host(&hooks.bundle, STAGE)?;
        let mut failed = Vec::new();
        for hook in hooks.at(stage.points()) {
            let one = Run {
                hook,
                state: &state,
                directory: Some(directory.as_fd()),
                before: &|_, _| Ok(()),
                helper: Some(process::id()),
                launch: None,
            };
            match one.run() {
                Err(fault) if stage == Stage::Create => return Err(fault),
                Err(fault) => failed.push(fault),
                Ok(()) => {}
            }
        }
        let failed = failed.into_iter().reduce(|mut all, next| {
            all.argument = format!("{all}; {next}");
            all.operation = format!("{} hooks failed:", stage.points()[0].name());
            all.errno = 0;
            all
        });
        failed.map_or(Ok((Report::Done, None)), Err)
    };
    tell(work(), control)
}

/// What is between the mounts and the pivot: the monitor has the hooks of its namespaces run, then those of the container's
/// run here. `unborn`: see [`pid_inside`]. `false`: the monitor is gone.
pub(super) fn before_pivot(
    hooks: &Hooks,
    control: BorrowedFd<'_>,
    unborn: bool,
) -> Result<bool, Fault> {
    if hooks.at(Stage::Create.points()).next().is_some() {
        let packet = postcard::to_allocvec(&Report::Mounted);
        let packet = packet.map_err(|error| Fault::check(STAGE, "encode", error))?;
        socket::send(control, &packet, &[]).context(STAGE, "sendmsg", "control")?;
        let answer = socket::receive(control, &mut [0; 8]);
        if answer.context(STAGE, "recvmsg", "control")?.bytes == 0 {
            return Ok(false);
        }
    }
    let state = hooks.state("creating", Some(pid_inside(unborn)));
    // Not in the root, where runc has them begin: what is there is the image's, and a program may look for its libraries
    // in its directory.
    let bundle = open_host(&hooks.bundle, STAGE)?;
    for hook in hooks.at(&[HookPoint::CreateContainer]) {
        let one = Run {
            hook,
            state: &state,
            directory: Some(bundle.as_fd()),
            before: &|_, _| Ok(()),
            helper: None,
            launch: None,
        };
        one.run()?;
    }
    Ok(true)
}

/// Number of the container's process as the container sees it (OCI runtime-spec, state, `pid`); 0 as long as it is not born
/// there.
fn pid_inside(unborn: bool) -> u32 {
    if unborn { 0 } else { process::id() }
}

/// The hooks of the container's own namespaces and root, as its user. `before` is done by each before it is executed. Where
/// others live in the PID namespace (`launch`) they are born there as the container's process will be, by `as_born`: their
/// programs are the image's, which must not run outside.
pub(super) fn before_exec(
    hooks: &Hooks,
    before: &Before<'_>,
    launch: Option<&Launch<'_>>,
    as_born: &dyn Fn(&Image, &CStr, &Shared) -> Step,
) -> Step {
    let state = hooks.state("created", Some(pid_inside(launch.is_some())));
    for hook in hooks.at(&[HookPoint::StartContainer]) {
        let shared = launch.map(|_| Shared::new()).transpose();
        let shared = shared.context(STAGE, "mmap", "shared page")?;
        let maker = shared
            .as_ref()
            .map(|shared| move |image: &Image, program: &CStr| as_born(image, program, shared));
        let one = Run {
            hook,
            state: &state,
            directory: None,
            before: maker.as_ref().map_or(before, |maker| maker),
            helper: None,
            launch: launch.zip(shared.as_ref()),
        };
        one.run()?;
    }
    Ok(())
}

/// What the process of a hook does before it executes this program.
type Before<'a> = dyn Fn(&Image, &CStr) -> Step + 'a;

/// One hook.
struct Run<'a> {
    hook: &'a Hook,
    /// For its stdin.
    state: &'a str,
    /// Its working directory; absent: this one.
    directory: Option<BorrowedFd<'a>>,
    /// Done by its process before the exec.
    before: &'a Before<'a>,
    /// This process, if it is a helper, which sees all processes: then it ends what a late hook has started. Else that is
    /// in the container's cgroup, and goes with the container.
    helper: Option<u32>,
    /// The process that `before` is called in is a maker, with these pages: the hook is what it gives birth to.
    launch: Option<(&'a Launch<'a>, &'a Shared)>,
}

impl Run<'_> {
    fn run(&self) -> Step {
        let name = self.hook.point.name();
        let path = &*self.hook.path;
        let (program, image) = self.image()?;
        let state = memfd::sealed("state", self.state.as_bytes());
        let state = state.context(STAGE, "memfd_create", path)?;
        let (reader, writer) = fd::pipe().context(STAGE, "pipe2", path)?;
        let others = self.helper.map(tree::children).unwrap_or_default();
        let keep: Vec<BorrowedFd<'_>> = [state.as_fd(), writer.as_fd()]
            .into_iter()
            .chain(self.directory)
            .chain(
                self.launch
                    .iter()
                    .flat_map(|(launch, _)| launch.descriptors()),
            )
            .collect();
        let child = clone::fork_into(0, &keep, || {
            let set_up = || -> Step {
                signal::reset_all();
                process::new_session().context(STAGE, "setsid", path)?;
                if let Some(helper) = self.helper {
                    let bound = process::die_with_parent(helper);
                    bound.context(STAGE, "prctl", "PR_SET_PDEATHSIG")?;
                }
                fd::set_standard([state.as_fd(), writer.as_fd(), writer.as_fd()])
                    .context(STAGE, "dup2", path)?;
                if let Some(directory) = self.directory {
                    file::change_directory(directory).context(STAGE, "fchdir", path)?;
                }
                (self.before)(&image, &program)
            };
            let told = match set_up() {
                Ok(()) => {
                    let error = image.execute(&program);
                    format!("{EXEC}{}", error.raw_os_error().unwrap_or_default())
                }
                Err(fault) => fault.to_string(),
            };
            let _unheard = fd::write_all(writer.as_fd(), told.as_bytes());
            NOT_EXECUTED
        });
        let child = child.context(STAGE, "clone3", path)?;
        drop(writer);
        let time = self.hook.timeout.map_or(LIMIT, Duration::from_secs);
        let until = Instant::now() + time.min(LIMIT);
        let mut output = Output::new(reader)?;
        let child = match self.launch {
            None => child,
            Some((_, shared)) => self.born(&child, shared, &mut output, until)?,
        };
        let Some(exit) = output.wait(child.pidfd.as_fd(), until)? else {
            self.end(&child, &others);
            output.read();
            let after = format!(
                "did not end within {} s and was killed",
                time.min(LIMIT).as_secs()
            );
            return Err(told(name, path, &after, &output.told()));
        };
        let output = output.told();
        match exit {
            Exit::Code(0) => Ok(()),
            Exit::Code(NOT_EXECUTED) if output.starts_with(EXEC) => {
                let number = output[EXEC.len()..].parse().unwrap_or(5);
                let error = std::io::Error::from_raw_os_error(number);
                Err(Fault::call(STAGE, name, path, &error))
            }
            Exit::Code(code) => Err(told(name, path, &format!("exited with {code}"), &output)),
            Exit::Signal(number) => {
                let how = format!("was killed by signal {number}");
                Err(told(name, path, &how, &output))
            }
        }
    }

    /// Waits for the end of a maker; what it gave birth to, a child of this process.
    fn born(
        &self,
        maker: &clone::Cloned,
        shared: &Shared,
        output: &mut Output,
        until: Instant,
    ) -> Result<clone::Cloned, Fault> {
        let (name, path) = (self.hook.point.name(), &*self.hook.path);
        let ended = output.wait(maker.pidfd.as_fd(), until)?;
        if ended.is_none() {
            let _ended = process::send_signal(maker.pidfd.as_fd(), signal::SIGKILL);
            let _reaped = process::wait(maker.pidfd.as_fd());
        }
        let outcome = match ended {
            Some(_) => launch::outcome(shared),
            None => Err(Fault::check(STAGE, "check", "it did not begin in time")),
        };
        let child = shared
            .pid()
            .map(|pid| process::pidfd_open(pid).map(|pidfd| clone::Cloned { pid, pidfd }));
        let child = child.transpose().context(STAGE, "pidfd_open", path)?;
        match (outcome, child) {
            (Ok(_hooks_have_none), Some(child)) => Ok(child),
            (outcome, child) => {
                if let Some(child) = child {
                    let _ended = process::send_signal(child.pidfd.as_fd(), signal::SIGKILL);
                    let _reaped = process::wait(child.pidfd.as_fd());
                }
                output.read();
                let fault = outcome
                    .err()
                    .map(|fault| fault.to_string())
                    .unwrap_or_default();
                Err(told(
                    name,
                    path,
                    &format!("did not run: {fault}"),
                    &output.told(),
                ))
            }
        }
    }

    fn image(&self) -> Result<(CString, Image), Fault> {
        let text = |text: &str| {
            CString::new(text).map_err(|_nul| Fault::check(STAGE, "strings", "a NUL byte"))
        };
        let hook = self.hook;
        let arguments = match hook.args.is_empty() {
            true => vec![text(&hook.path)?],
            false => hook
                .args
                .iter()
                .map(|one| text(one))
                .collect::<Result<_, _>>()?,
        };
        let environment = match hook.env.is_empty() {
            // Never the container's: the image has filled that (CVE-2025-23266).
            true => vec![PATH.to_owned()],
            false => hook
                .env
                .iter()
                .map(|one| text(one))
                .collect::<Result<_, _>>()?,
        };
        Ok((text(&hook.path)?, Image::new(arguments, environment)))
    }

    /// Kills a hook, and in a helper all that it started: what left it is our child by now, or will be.
    fn end(&self, child: &clone::Cloned, others: &[u32]) {
        const ROUNDS: usize = 100;
        let Some(helper) = self.helper else {
            let _ended = process::send_signal(child.pidfd.as_fd(), signal::SIGKILL);
            let _reaped = process::wait(child.pidfd.as_fd());
            return;
        };
        for _ in 0..ROUNDS {
            let ours = tree::children(helper);
            let ours: Vec<u32> = ours
                .into_iter()
                .filter(|pid| !others.contains(pid))
                .collect();
            if ours.is_empty() {
                return;
            }
            for pid in ours {
                tree::kill(pid);
                if let Ok(pidfd) = process::pidfd_open(pid) {
                    let _reaped = process::wait(pidfd.as_fd());
                }
            }
        }
    }
}

fn told(name: &str, path: &str, how: &str, output: &str) -> Fault {
    let wrote = match output {
        "" => String::new(),
        output => format!("; it wrote: {output}"),
    };
    Fault {
        stage: STAGE.to_owned(),
        operation: name.to_owned(),
        argument: format!("{path} {how}{wrote}"),
        errno: 0,
    }
}

/// What a hook writes, the end of it.
struct Output {
    reader: OwnedFd,
    bytes: Vec<u8>,
}

impl Output {
    fn new(reader: OwnedFd) -> Result<Self, Fault> {
        fd::set_nonblocking(reader.as_fd(), true).context(STAGE, "fcntl", "O_NONBLOCK")?;
        Ok(Self {
            reader,
            bytes: Vec::new(),
        })
    }

    /// Reads until the process ends, and reaps it; absent: its time is over. What it leaves behind may keep the pipe open:
    /// nobody waits for that.
    fn wait(&mut self, pidfd: BorrowedFd<'_>, until: Instant) -> Result<Option<Exit>, Fault> {
        let mut open = true;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let watched = if open {
                PollFlags::IN
            } else {
                PollFlags::empty()
            };
            let mut set = [
                PollFd::from_borrowed_fd(pidfd, PollFlags::IN),
                PollFd::new(&self.reader, watched),
            ];
            let set = if open { &mut set[..] } else { &mut set[..1] };
            let _count = poll(set, Some(left)).context(STAGE, "poll", "hook")?;
            open = open && self.read();
            if let Some(exit) = process::try_wait(pidfd).context(STAGE, "waitid", "hook")? {
                self.read();
                return Ok(Some(exit));
            }
            if left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// Reads what there is; `false`: nothing more will come.
    fn read(&mut self) -> bool {
        let mut buffer = [0; 4096];
        // A hook that writes without end does not keep us from looking at the time.
        for _ in 0..64 {
            match fd::read(self.reader.as_fd(), &mut buffer) {
                Ok(0) => return false,
                Ok(count) => {
                    self.bytes.extend_from_slice(&buffer[..count]);
                    let front = self.bytes.len().saturating_sub(MAX_TOLD);
                    let _older = self.bytes.drain(..front);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
        true
    }

    fn told(&self) -> String {
        String::from_utf8_lossy(&self.bytes).trim().to_owned()
    }
}

/// Where the root is shown to hooks.
pub(super) fn mount_point(hooks: &Hooks) -> Result<OwnedFd, Fault> {
    open_host(&hooks.bundle.join("rootfs"), STAGE)
}

//! The helper of a container that an OCI runtime makes. See `runtime::external`.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::base::container::ProcessUser;
use crate::runtime::create::CreateRequest;
use crate::runtime::exec::ExecRequest;
use crate::runtime::external::{Place, Text, Verb, exec_files, message_of};
use crate::runtime::plan::{Context, ExecPlan, Fault, Plan, Preamble, Report};
use crate::runtime::userns;
use crate::sys::exec::Image;
use crate::sys::{clone, fd, file, memfd, ns, process, signal, socket};

use super::process::{raise_limits, set_priorities, stay_on};
use super::user;
use super::{MAX_PLAN, Step, open_host, stage, take_pod_shm};

const STAGE: &str = "runtime";
/// Where runtimes and hooks look for programs of their own.
pub(super) const PATH: &std::ffi::CStr =
    c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Most bytes of a log that are looked at.
const MAX_LOG: u64 = 256 * 1024;
/// Most bytes of a message that are told.
const MAX_MESSAGE: usize = 2048;

/// What a helper reports at its end.
type Outcome = Result<(Report, Option<OwnedFd>), Fault>;

/// The helper of `external::create`. Returns its exit code.
pub(in crate::runtime) fn create(
    request: &CreateRequest<'_>,
    place: Place<'_>,
    monitor: u32,
    control: BorrowedFd<'_>,
) -> i32 {
    let work = || {
        begin(monitor, request.stdio)?;
        make(request, place)
    };
    tell(work(), control)
}

/// The helper of `external::exec`, by the number of the exec. Returns its exit code.
pub(in crate::runtime) fn exec(
    request: &ExecRequest<'_>,
    place: Place<'_>,
    number: u64,
    monitor: u32,
    control: BorrowedFd<'_>,
) -> i32 {
    let work = || {
        begin(monitor, request.stdio)?;
        join(request, place, number)
    };
    tell(work(), control)
}

/// The helper of `external::run`. Returns its exit code.
pub(in crate::runtime) fn run(
    verb: Verb,
    place: Place<'_>,
    null: BorrowedFd<'_>,
    monitor: u32,
    control: BorrowedFd<'_>,
) -> i32 {
    let work = || {
        begin(monitor, [null; 3])?;
        let name = verb.name();
        let mut call = Call::new(place, name, format!("{name}.log"));
        match verb {
            Verb::Start => {}
            Verb::Delete => call.add("--force"),
            Verb::Kill(_) => {}
        }
        call.add(place.id);
        if let Verb::Kill(number) = verb {
            call.add(number.to_string());
        }
        match call.run() {
            // Not every runtime takes it well that there is nothing to delete.
            Err(_) if verb == Verb::Delete && !is_known(place) => {}
            outcome => outcome?,
        }
        Ok((Report::Done, None))
    };
    tell(work(), control)
}

/// Does the runtime keep anything under the container's name? All keep it below their root, by a name that begins with the id.
fn is_known(place: Place<'_>) -> bool {
    let entries = match std::fs::read_dir(&place.runtime.root) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return false,
        Err(_) => return true,
        Ok(entries) => entries,
    };
    let own = |name: &OsStr| name.as_bytes().starts_with(place.id.as_bytes());
    entries
        .into_iter()
        .any(|entry| entry.map_or(true, |entry| own(&entry.file_name())))
}

pub(super) fn tell(outcome: Outcome, control: BorrowedFd<'_>) -> i32 {
    let (report, descriptor) = outcome.unwrap_or_else(|fault| (Report::Failed(fault), None));
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.iter().map(OwnedFd::as_fd).collect();
    if let Ok(packet) = postcard::to_allocvec(&report) {
        // Without a listener nobody needs to know.
        let _sent = socket::send(control, &packet, &descriptors);
    }
    0
}

pub(super) fn begin(monitor: u32, stdio: [BorrowedFd<'_>; 3]) -> Step {
    process::die_with_parent(monitor).context(STAGE, "prctl", "PR_SET_PDEATHSIG")?;
    fd::set_standard(stdio).context("stdio", "dup2", "standard streams")?;
    file::set_umask(0o022);
    Ok(())
}

/// A plan and the text after it.
fn decode<T: DeserializeOwned>(plan: BorrowedFd<'_>) -> Result<(T, Text), Fault> {
    let bytes = memfd::read_all(plan, MAX_PLAN).context("plan", "pread", "plan")?;
    let bad = |error| Fault::check("plan", "decode", error);
    let (_preamble, rest) = Preamble::decode(&bytes).map_err(bad)?;
    let (plan, rest) = postcard::take_from_bytes(rest).map_err(bad)?;
    Ok((plan, postcard::from_bytes(rest).map_err(bad)?))
}

fn make(request: &CreateRequest<'_>, place: Place<'_>) -> Outcome {
    let (plan, text): (Plan, Text) = decode(request.plan)?;
    let user = stage::owner(&plan, request, place.bundle)?;
    let shm = take_pod_shm(&plan, request)?;
    ns::unshare(ns::flag::MOUNT).context("namespace", "unshare", "mount")?;
    let bundle = open_host(place.bundle, STAGE)?;
    let root = stage::mounts(&plan, shm, user, bundle.as_fd())?;
    stage::fill_volumes(&plan, user, root.as_fd())?;
    let user = user::look_up(root.as_fd(), &plan.process.user)?;
    write_text(
        &place.bundle.join("config.json"),
        &text,
        &user,
        plan.process.umask,
    )?;
    let console = Console::open(plan.process.terminal, place.bundle, &bundle, "console.sock")?;
    let pid_file = place.bundle.join("pid");
    let mut call = Call::new(place, "create", "log".to_owned());
    call.add("--bundle");
    call.add(place.bundle);
    call.add("--pid-file");
    call.add(&pid_file);
    console.add_to(&mut call);
    call.add(place.id);
    call.run()?;
    // The runtime joined namespaces by process numbers: they were those of the pod only if these processes live.
    for (joined, what) in [(request.pause, "pause"), (request.target, "target")] {
        if let Some(pidfd) = joined
            && process::has_ended(pidfd).context(STAGE, "poll", what)?
        {
            return Err(Fault::check(STAGE, what, "it ended meanwhile"));
        }
    }
    let pid = pid_of(&pid_file)?;
    // Not by the runtime: not every one can (crun 1.8), nor from inside a user namespace. Its process waits to be started.
    set_priorities(pid, &plan.process.tuning)?;
    made(pid, user, console)
}

fn join(request: &ExecRequest<'_>, place: Place<'_>, number: u64) -> Outcome {
    let (plan, text): (ExecPlan, Text) = decode(request.plan)?;
    if let Some(root) = plan.user_namespace {
        userns::give_streams(root)?;
        raise_limits(&plan.process)?;
    }
    let bundle = open_host(place.bundle, STAGE)?;
    let [json, pid_file, log, socket] = exec_files(number);
    let files = [&json, &pid_file, &socket].map(|name| place.bundle.join(name));
    let work = || {
        write_text(&files[0], &text, &plan.user, plan.process.umask)?;
        let console = Console::open(plan.process.terminal, place.bundle, &bundle, &socket)?;
        let mut call = Call::new(place, "exec", log);
        call.add("--process");
        call.add(&files[0]);
        call.add("--pid-file");
        call.add(&files[1]);
        call.add("--detach");
        console.add_to(&mut call);
        call.add(place.id);
        call.run()?;
        let pid = pid_of(&files[1])?;
        // Runtimes of before OCI runtime-spec 1.2.1 do not look at `execCPUAffinity`.
        stay_on(pid, plan.cpu)?;
        made(pid, plan.user.clone(), console)
    };
    let outcome = work();
    for file in &files {
        let _absent = std::fs::remove_file(file);
    }
    outcome
}

/// The number of the process, which the runtime has written.
fn pid_of(pid_file: &Path) -> Result<u32, Fault> {
    let text = std::fs::read_to_string(pid_file);
    let text = text.context(STAGE, "read", pid_file.display())?;
    text.trim().parse().map_err(|_no_number| {
        Fault::check(STAGE, "pid file", format_args!("{text:?} is no number"))
    })
}

/// Reports the process that the runtime has made.
fn made(pid: u32, user: ProcessUser, console: Console) -> Outcome {
    let report = Report::Made { pid, user };
    Ok((report, console.master()?))
}

fn write_text(path: &Path, text: &Text, user: &ProcessUser, umask: Option<u32>) -> Step {
    let groups: Vec<String> = user.groups.iter().map(ToString::to_string).collect();
    let umask = umask.map(|umask| format!(",\"umask\":{umask}"));
    let user = format!(
        "{{\"uid\":{},\"gid\":{},\"additionalGids\":[{}]{}}}",
        user.uid,
        user.gid,
        groups.join(","),
        umask.unwrap_or_default()
    );
    let whole = [text.head.as_str(), &user, &text.tail].concat();
    fill(path, &whole).context(STAGE, "write", path.display())
}

/// A file that only its runtime reads, after this: not atomic. For root alone: a pod's root may pass the bundle.
fn fill(path: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())
}

/// The socket by which a runtime hands over the terminal that it made.
struct Console {
    listener: Option<OwnedFd>,
    path: PathBuf,
}

impl Console {
    fn open(terminal: bool, bundle: &Path, directory: &OwnedFd, name: &str) -> Result<Self, Fault> {
        let whole = bundle.join(name);
        let listener = if terminal {
            let _absent = std::fs::remove_file(&whole);
            let listener = socket::listen_stream(&whole);
            Some(listener.context(STAGE, "listen", whole.display())?)
        } else {
            None
        };
        // An address has 107 bytes at most: this helper's descriptor makes it short.
        let (pid, number) = (process::id(), directory.as_raw_fd());
        Ok(Self {
            listener,
            path: format!("/proc/{pid}/fd/{number}/{name}").into(),
        })
    }

    fn add_to(&self, call: &mut Call<'_>) {
        if self.listener.is_some() {
            call.add("--console-socket");
            call.add(&self.path);
        }
    }

    /// The master, after the runtime has ended: what it sent waits in the socket.
    fn master(&self) -> Result<Option<OwnedFd>, Fault> {
        let Some(listener) = &self.listener else {
            return Ok(None);
        };
        let none = || Fault::check(STAGE, "console", "the runtime sent no terminal");
        let connection = socket::accept(listener.as_fd()).context(STAGE, "accept", "console")?;
        let connection = connection.ok_or_else(none)?;
        let received = socket::receive(connection.as_fd(), &mut [0; 4096]);
        let received = received.context(STAGE, "recvmsg", "console")?;
        let master = received.descriptors.into_iter().next();
        Ok(Some(master.ok_or_else(none)?))
    }
}

/// One call of the runtime.
struct Call<'a> {
    place: Place<'a>,
    verb: &'static str,
    log: PathBuf,
    arguments: Vec<Vec<u8>>,
}

impl<'a> Call<'a> {
    fn new(place: Place<'a>, verb: &'static str, log: String) -> Self {
        let mut call = Self {
            place,
            verb,
            log: place.bundle.join(log),
            arguments: Vec::new(),
        };
        call.add(&place.runtime.path);
        for argument in &place.runtime.arguments {
            call.add(argument);
        }
        call.add("--root");
        call.add(&place.runtime.root);
        call.add("--log");
        let log = call.log.clone();
        call.add(log);
        call.add("--log-format");
        call.add("json");
        call.add(verb);
        call
    }

    fn add(&mut self, argument: impl AsRef<OsStr>) {
        self.arguments.push(argument.as_ref().as_bytes().to_vec());
    }

    /// Runs it to its end; what it logged is the error, the log is removed.
    fn run(self) -> Step {
        let outcome = self.wait();
        let outcome = outcome.and_then(|exit| match exit {
            process::Exit::Code(0) => Ok(()),
            exit => Err(self.told(exit)),
        });
        let _absent = std::fs::remove_file(&self.log);
        outcome
    }

    fn wait(&self) -> Result<process::Exit, Fault> {
        let path = &self.place.runtime.path;
        let text = |bytes: &Vec<u8>| {
            CString::new(bytes.clone())
                .map_err(|_nul| Fault::check(STAGE, "arguments", "a NUL byte"))
        };
        let arguments: Vec<CString> = self.arguments.iter().map(text).collect::<Result<_, _>>()?;
        let program = text(&path.as_os_str().as_bytes().to_vec())?;
        let image = Image::new(arguments, vec![PATH.to_owned()]);
        let helper = process::id();
        let child = clone::fork_into(0, &[], || {
            signal::reset_all();
            if process::die_with_parent(helper).is_err() {
                return 127;
            }
            // Our parent reads the number: exit codes of exec failures are not a runtime's.
            let error = image.execute(&program);
            let number = error.raw_os_error().unwrap_or_default();
            let _told = fill(&self.log, &format!("{EXEC}{number}"));
            127
        });
        let child = child.context(STAGE, "clone3", path.display())?;
        process::wait(child.pidfd.as_fd()).context(STAGE, "waitid", path.display())
    }

    fn told(&self, exit: process::Exit) -> Fault {
        let path = self.place.runtime.path.display();
        let log = end_of(&self.log).unwrap_or_default();
        if let Some(number) = log.strip_prefix(EXEC.as_bytes()) {
            let number = std::str::from_utf8(number)
                .ok()
                .and_then(|n| n.parse().ok());
            let error = std::io::Error::from_raw_os_error(number.unwrap_or(5));
            return Fault::call(STAGE, "execve", path, &error);
        }
        let said = message_of(&String::from_utf8_lossy(&log));
        let mut text = said.unwrap_or_else(|| match exit {
            process::Exit::Code(code) => format!("it exited with {code} and logged no error"),
            process::Exit::Signal(number) => format!("signal {number} killed it"),
        });
        text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        Fault {
            stage: STAGE.to_owned(),
            operation: format!("{path} {}:", self.verb),
            argument: text,
            errno: 0,
        }
    }
}

/// The last bytes of a file, at most [`MAX_LOG`].
fn end_of(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG)))?;
    let mut bytes = Vec::new();
    file.take(MAX_LOG).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Marks a log that the helper wrote instead of the runtime.
const EXEC: &str = "execve failed: ";

//! Starting programs from the daemon, which has many threads: `vfork(2)`-like, nothing is allocated between
//! clone and exec, the environment is empty but for what is given, the working directory is `/`, and no descriptor passes that is not listed.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::ffi::{CString, OsStr, c_int, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A program to start. Standard streams are `/dev/null` unless set.
#[derive(Debug)]
pub(crate) struct Spawn<'a> {
    program: Program<'a>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    standard: [Option<BorrowedFd<'a>>; 3],
    passed: Vec<BorrowedFd<'a>>,
    session: bool,
    bad: Option<String>,
}

#[derive(Debug)]
enum Program<'a> {
    Path(CString),
    Descriptor(BorrowedFd<'a>),
}

/// A started program.
#[derive(Debug)]
pub(crate) struct Child {
    /// For display.
    pub(crate) pid: u32,
    /// Its identity; readable when it has ended. Reap it with `process::wait` or `process::try_wait`.
    pub(crate) pidfd: OwnedFd,
}

/// A program could not be started. Nothing runs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpawnError {
    /// An argument or variable has a NUL byte.
    #[error("start {program}: a NUL byte in {text:?}")]
    Nul {
        /// Program.
        program: String,
        /// The text.
        text: String,
    },
    /// A system call failed.
    #[error("start {program}: {operation}")]
    Call {
        /// Program.
        program: String,
        /// System call.
        operation: &'static str,
        /// Its error.
        source: io::Error,
    },
}

impl<'a> Spawn<'a> {
    /// A program by descriptor (a sealed memory file), with this `argv[0]`.
    pub(crate) fn descriptor(program: BorrowedFd<'a>, name: &str) -> Self {
        let mut spawn = Self::new(Program::Descriptor(program));
        let name = spawn.text(OsStr::new(name));
        spawn.arguments.push(name);
        spawn
    }

    fn new(program: Program<'a>) -> Self {
        Self {
            program,
            arguments: Vec::new(),
            environment: Vec::new(),
            standard: [None; 3],
            passed: Vec::new(),
            session: false,
            bad: None,
        }
    }

    fn text(&mut self, text: &OsStr) -> CString {
        CString::new(text.as_bytes()).unwrap_or_else(|_nul| {
            self.bad = Some(text.to_string_lossy().into_owned());
            CString::default()
        })
    }

    /// Passes one more descriptor: the first gets number 3, the next 4, ...
    #[must_use]
    pub(crate) fn pass(mut self, fd: BorrowedFd<'a>) -> Self {
        self.passed.push(fd);
        self
    }

    /// In a session of its own, away from the daemon's terminal and process group.
    #[must_use]
    pub(crate) fn session(mut self) -> Self {
        self.session = true;
        self
    }

    fn display(&self) -> String {
        self.arguments
            .first()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// Starts it. Blocks until it has executed.
    ///
    /// # Errors
    /// [`SpawnError`]; the errors of the exec itself (`ENOENT`, `EACCES`) too.
    pub(crate) fn start(self) -> Result<Child, SpawnError> {
        let program = self.display();
        if let Some(text) = &self.bad {
            return Err(SpawnError::Nul {
                program,
                text: text.clone(),
            });
        }
        let fail = |operation, source| SpawnError::Call {
            program: program.clone(),
            operation,
            source,
        };
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(|error| fail("open /dev/null", error))?;
        // Copies with high numbers, so that none is overwritten before it is used.
        let mut copies = Vec::with_capacity(3 + self.passed.len());
        let standard = self.standard.iter().map(|fd| fd.unwrap_or(null.as_fd()));
        let floor = i32::try_from(16 + self.passed.len()).unwrap_or(i32::MAX);
        for fd in standard.chain(self.passed.iter().copied()) {
            let copy = crate::sys::fd::duplicate(fd, floor)
                .map_err(|error| fail("fcntl(F_DUPFD_CLOEXEC)", error))?;
            copies.push(copy);
        }
        let executable = match &self.program {
            Program::Path(_) => None,
            Program::Descriptor(fd) => Some(
                crate::sys::fd::duplicate(*fd, floor)
                    .map_err(|error| fail("fcntl(F_DUPFD_CLOEXEC)", error))?,
            ),
        };
        let pointers = |list: &[CString]| {
            let ends = std::iter::once(std::ptr::null());
            list.iter()
                .map(|text| text.as_ptr())
                .chain(ends)
                .collect::<Vec<_>>()
        };
        let arguments = pointers(&self.arguments);
        let environment = pointers(&self.environment);
        let mut stage = Stage {
            descriptors: copies.iter().map(AsRawFd::as_raw_fd).collect(),
            executable: executable.as_ref().map_or(-1, AsRawFd::as_raw_fd),
            path: match &self.program {
                Program::Path(path) => path.as_ptr(),
                Program::Descriptor(_) => c"".as_ptr(),
            },
            arguments: arguments.as_ptr(),
            environment: environment.as_ptr(),
            session: self.session,
            failed: "",
            number: 0,
        };
        let (pid, pidfd) = vfork(&mut stage).map_err(|error| fail("clone", error))?;
        if stage.number != 0 {
            let _reaped = crate::sys::process::wait(pidfd.as_fd());
            return Err(fail(
                stage.failed,
                io::Error::from_raw_os_error(stage.number),
            ));
        }
        Ok(Child { pid, pidfd })
    }
}

/// What other programs than the monitor need.
impl<'a> Spawn<'a> {
    /// A program by absolute path; `argv[0]` is that path.
    pub(crate) fn path(path: &Path) -> Self {
        let mut spawn = Self::new(Program::Path(CString::default()));
        let text = spawn.text(path.as_os_str());
        spawn.program = Program::Path(text.clone());
        spawn.arguments.push(text);
        spawn
    }

    /// Adds an argument.
    #[must_use]
    pub(crate) fn argument(mut self, argument: impl AsRef<OsStr>) -> Self {
        let argument = self.text(argument.as_ref());
        self.arguments.push(argument);
        self
    }

    /// Adds a variable.
    #[must_use]
    pub(crate) fn variable(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut both = std::ffi::OsString::from(name);
        both.push("=");
        both.push(value);
        let both = self.text(&both);
        self.environment.push(both);
        self
    }

    /// Sets standard stream 0, 1 or 2.
    #[must_use]
    pub(crate) fn standard(mut self, number: usize, fd: BorrowedFd<'a>) -> Self {
        if let Some(slot) = self.standard.get_mut(number) {
            *slot = Some(fd);
        }
        self
    }
}

/// All that the child needs, prepared: it allocates nothing.
struct Stage {
    descriptors: Vec<RawFd>,
    executable: RawFd,
    path: *const libc::c_char,
    arguments: *const *const libc::c_char,
    environment: *const *const libc::c_char,
    session: bool,
    failed: &'static str,
    number: c_int,
}

const STACK: usize = 64 * 1024;

/// Clones with shared memory; this thread stands still until the child has executed or ended.
fn vfork(stage: &mut Stage) -> io::Result<(u32, OwnedFd)> {
    let mut stack = vec![0_u128; STACK / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    let mut pidfd: c_int = -1;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD | libc::SIGCHLD;
    let old = mask_all()?;
    // SAFETY: the stack is ours, aligned, and alive until the child is done with it: CLONE_VFORK keeps this
    // thread here until then. `stage` lives as long. All signals are blocked, so no handler runs in the child.
    let pid = unsafe {
        libc::clone(
            child,
            top.cast(),
            flags,
            std::ptr::from_mut(stage).cast::<c_void>(),
            &raw mut pidfd,
        )
    };
    let error = io::Error::last_os_error();
    // SAFETY: `old` was written by the kernel.
    let _always_zero =
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut()) };
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: the kernel made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((u32::try_from(pid).unwrap_or_default(), pidfd))
}

fn mask_all() -> io::Result<libc::sigset_t> {
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut old = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: writes the whole set.
    let _always_zero = unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: `all` is initialised, `old` is written.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr()) } {
        // SAFETY: written on success.
        0 => Ok(unsafe { old.assume_init() }),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// The child, on its own stack in its parent's memory: system calls only.
extern "C" fn child(stage: *mut c_void) -> c_int {
    // SAFETY: `vfork` passes its `&mut Stage`, and stands still while we run.
    let stage = unsafe { &mut *stage.cast::<Stage>() };
    stage.failed = run(stage);
    stage.number = io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    crate::sys::process::exit_now(127)
}

/// Returns the name of the call that failed; its number is in errno.
fn run(stage: &Stage) -> &'static str {
    // The dispositions are the child's own: no CLONE_SIGHAND.
    crate::sys::signal::reset_all();
    // SAFETY: takes nothing, touches no memory.
    if stage.session && unsafe { libc::setsid() } < 0 {
        return "setsid";
    }
    // SAFETY: a NUL-terminated string.
    if unsafe { libc::chdir(c"/".as_ptr()) } < 0 {
        return "chdir";
    }
    let mut count = 0;
    for source in &stage.descriptors {
        // SAFETY: our descriptor table is a copy, about to be replaced by exec; all sources are above all targets.
        if unsafe { libc::dup2(*source, count) } < 0 {
            return "dup2";
        }
        count += 1;
    }
    let first = u32::try_from(count).unwrap_or(3);
    if crate::sys::fd::close_on_exec_from(first).is_err() {
        return "close_range";
    }
    if stage.executable < 0 {
        // SAFETY: NUL-terminated strings and null-terminated lists that the parent keeps.
        let _failed = unsafe { libc::execve(stage.path, stage.arguments, stage.environment) };
        return "execve";
    }
    // SAFETY: as above.
    let _failed = unsafe {
        libc::syscall(
            libc::SYS_execveat,
            stage.executable,
            stage.path,
            stage.arguments,
            stage.environment,
            libc::AT_EMPTY_PATH,
        )
    };
    "execveat"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{Exit, wait};
    use std::io::Read;

    fn output(spawn: Spawn<'_>) -> (Exit, String) {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let child = spawn.standard(1, writer.as_fd()).start().unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        (wait(child.pidfd.as_fd()).unwrap(), text)
    }

    #[test]
    fn only_what_is_listed_passes() {
        let (extra, _keep) = std::io::pipe().unwrap();
        let spawn = Spawn::path(Path::new("/bin/sh"))
            .argument("-c")
            .argument("echo $(ls /proc/self/fd) $(pwd); env; kill -9 $$")
            .variable("A", "b c")
            .pass(extra.as_fd())
            .session();
        let (exit, text) = output(spawn);
        assert_eq!(exit, Exit::Signal(9));
        let mut lines = text.lines();
        // 4 is the directory that ls reads.
        assert_eq!(lines.next(), Some("0 1 2 3 4 /"));
        assert!(
            lines.all(|line| line == "A=b c" || line.starts_with("PWD=")),
            "{text}"
        );
    }

    #[test]
    fn a_program_from_memory_and_a_missing_one() {
        let bytes = std::fs::read("/bin/sh").unwrap();
        let program = crate::sys::memfd::program("shell", &bytes).unwrap();
        let spawn = Spawn::descriptor(program.as_fd(), "shell")
            .argument("-c")
            .argument("echo $0; exit 7");
        assert_eq!(output(spawn), (Exit::Code(7), "shell\n".to_owned()));
        let error = Spawn::path(Path::new("/missing")).start().unwrap_err();
        assert_eq!(
            crate::base::error::chain(&error),
            "start /missing: execve: No such file or directory (os error 2)"
        );
        let error = Spawn::path(Path::new("/bin/sh"))
            .argument("a\0b")
            .start()
            .unwrap_err();
        assert!(error.to_string().contains("NUL"), "{error}");
    }

    #[test]
    fn many_threads_spawn_at_once() {
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        let child = Spawn::path(Path::new("/bin/true")).start().unwrap();
                        assert_eq!(wait(child.pidfd.as_fd()).unwrap(), Exit::Code(0));
                    }
                });
            }
        });
    }
}

//! What the daemon asks for, call by call.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::base::id::ContainerId;
use crate::monitor::cgroup;
use crate::monitor::child::{Child, Phase, check, fault};
use crate::monitor::container::{Container, Output};
use crate::monitor::external::External;
use crate::monitor::link::Asked;
use crate::monitor::log::{LogFile, Source};
use crate::monitor::protocol::{Call, MonitorState, Reply, Stdio, VERSION};
use crate::monitor::serve::{Exec, Monitor, SOCKET};
use crate::runtime::create::CreateRequest;
use crate::runtime::exec::ExecRequest;
use crate::runtime::external::Verb;
use crate::runtime::plan::{Fault, IdMappings};
use crate::runtime::tree;
use crate::runtime::userns;
use crate::sys::fd;

/// After so long without a word pause, an exec, or what is started is given up; a container has the time of its handler.
pub(crate) const SETUP: Duration = Duration::from_secs(110);

/// What a call gives back at once; absent: the reply comes later.
pub(crate) type Answer = Result<Option<(Reply, Vec<OwnedFd>)>, Fault>;

/// What a new container is made of.
struct NewContainer {
    id: ContainerId,
    stdio: Stdio,
    memory_cgroup: PathBuf,
    kill_cgroup: PathBuf,
    target: Option<ContainerId>,
    external: Option<Box<External>>,
    hooks: bool,
    setup: Duration,
}

impl NewContainer {
    fn of(call: Call) -> Result<Self, Fault> {
        match call {
            Call::Container {
                id,
                stdio,
                memory_cgroup,
                kill_cgroup,
                target,
                hooks,
                setup_s,
            } => Ok(Self {
                id,
                stdio,
                memory_cgroup,
                kill_cgroup,
                target,
                external: None,
                hooks,
                setup: Duration::from_secs(setup_s.into()),
            }),
            Call::External {
                id,
                stdio,
                memory_cgroup,
                kill_cgroup,
                runtime,
                bundle,
                setup_s,
            } => Ok(Self {
                id,
                stdio,
                memory_cgroup,
                kill_cgroup,
                target: None,
                external: Some(External::new(runtime, bundle)),
                hooks: false,
                setup: Duration::from_secs(setup_s.into()),
            }),
            _ => Err(check("no new container")),
        }
    }
}

const DONE: Answer = Ok(Some((Reply::Done, Vec::new())));

impl Monitor<'_> {
    /// Does what a request asks and answers it, now or later.
    pub(crate) fn serve(&mut self, asked: Asked, call: Call, descriptors: Vec<OwnedFd>) {
        match self.answer(asked, call, descriptors) {
            Ok(None) => {}
            Ok(Some((reply, descriptors))) => self.link.reply(asked, reply, descriptors),
            Err(fault) => self.link.reply(asked, Reply::Failed(fault), Vec::new()),
        }
    }

    fn answer(&mut self, asked: Asked, call: Call, descriptors: Vec<OwnedFd>) -> Answer {
        if self.pod.is_none()
            && !matches!(
                call,
                Call::Prepare { .. }
                    | Call::Adopt { .. }
                    | Call::UserNamespace { .. }
                    | Call::Clean { .. }
                    | Call::Shutdown
            )
        {
            return Err(check("this monitor has no pod yet"));
        }
        match call {
            Call::Hello { version: _ } => self.state(),
            Call::Prepare {
                cgroups,
                oom_score_adj,
            } => prepare(&cgroups, oom_score_adj),
            Call::Adopt { pod_id, directory } => {
                if self.pod.is_some() {
                    return Err(check("this monitor has a pod already"));
                }
                let path = directory.display().to_string();
                self.adopt(pod_id, directory)
                    .map_err(|error| fault("listen", &path, &error))?;
                DONE
            }
            Call::UserNamespace {
                uid_mappings,
                gid_mappings,
                network,
            } => self.user_namespace(&uid_mappings, &gid_mappings, network),
            Call::Sandbox => self.sandbox(asked, descriptors),
            call @ (Call::Container { .. } | Call::External { .. }) => {
                self.container(asked, NewContainer::of(call)?, descriptors)
            }
            Call::Clean {
                id,
                runtime,
                bundle,
            } => {
                self.clean(asked, id, &External::new(runtime, bundle))?;
                Ok(None)
            }
            Call::Poststop { id } => self.poststop(asked, id, descriptors),
            Call::Start { id } => self.start(asked, id),
            Call::Exec { id, exec } => self.exec(asked, id, exec, descriptors),
            Call::Signal { id, signal } => {
                let container = self.find(id)?;
                if container.external.is_some() && !container.child.is_ended() {
                    self.call(asked, id, Verb::Kill(signal))?;
                    return Ok(None);
                }
                container.child.signal(signal)?;
                DONE
            }
            Call::Kill { id } => {
                self.find(id)?.kill();
                DONE
            }
            Call::ReopenLog { id } => {
                self.find(id)?.reopen_log()?;
                DONE
            }
            Call::Remove { id } => self.remove(asked, id),
            Call::KillExec { exec } => self.kill_exec(exec),
            Call::Attach { id, stdin } => {
                let stdin = self.find(id)?.attach(descriptors, stdin)?;
                Ok(Some((Reply::Done, stdin.into_iter().collect())))
            }
            Call::Resize { id, width, height } => {
                self.find(id)?.resize(width, height)?;
                DONE
            }
            Call::Stop => {
                self.stop(asked);
                Ok(None)
            }
            Call::Shutdown => self.shutdown(),
        }
    }

    /// The container, unless it is being removed.
    ///
    /// # Errors
    /// The pod has no such container.
    pub(crate) fn find(&mut self, id: ContainerId) -> Result<&mut Container, Fault> {
        self.containers
            .iter_mut()
            .find(|container| container.id == id && container.removal.is_none())
            .ok_or_else(|| check(&format!("no container {id} in this pod")))
    }

    fn state(&self) -> Answer {
        let Some(pod) = &self.pod else {
            return Err(check("this monitor has no pod yet"));
        };
        let created = self.containers.iter().filter(|c| c.created);
        let state = MonitorState {
            version: VERSION,
            pod_id: pod.id,
            pause_pid: self.sandbox.as_ref().and_then(Child::live_pid),
            containers: created.map(Container::snapshot).collect(),
        };
        Ok(Some((Reply::State(Box::new(state)), Vec::new())))
    }

    /// Makes the user namespace of the pod, or one for the daemon alone while there is none.
    fn user_namespace(&mut self, uids: &IdMappings, gids: &IdMappings, network: bool) -> Answer {
        if self.user.is_some() {
            return Err(check("the pod has a user namespace already"));
        }
        let made = userns::make(uids, gids, network)?;
        if self.pod.is_some() {
            let kept = fd::duplicate(made.user.as_fd(), 3)
                .map_err(|error| fault("fcntl", "F_DUPFD_CLOEXEC", &error))?;
            self.user = Some(kept);
        }
        let descriptors = [Some(made.user), made.network];
        Ok(Some((
            Reply::Done,
            descriptors.into_iter().flatten().collect(),
        )))
    }

    fn sandbox(&mut self, asked: Asked, descriptors: Vec<OwnedFd>) -> Answer {
        if self.sandbox.is_some() {
            return Err(check("the pod has a pause already"));
        }
        let mut descriptors = descriptors.into_iter();
        let plan = descriptors.next().ok_or_else(|| check("no plan came"))?;
        self.network = descriptors.next();
        let null = null()?;
        let request = CreateRequest {
            plan: plan.as_fd(),
            pause: None,
            network: self.network.as_ref().map(OwnedFd::as_fd),
            user: self.user.as_ref().map(OwnedFd::as_fd),
            target: None,
            stdio: [null.as_fd(); 3],
        };
        self.sandbox = Some(Child::create(request, asked, Instant::now() + SETUP)?);
        Ok(None)
    }

    fn container(&mut self, asked: Asked, new: NewContainer, descriptors: Vec<OwnedFd>) -> Answer {
        if self.containers.iter().any(|c| c.id == new.id) {
            return Err(check("the pod has this container already"));
        }
        let plan = descriptors.into_iter().next();
        let plan = plan.ok_or_else(|| check("no plan came"))?;
        let max_line = usize::try_from(new.stdio.max_line).unwrap_or_default();
        let log = LogFile::open(new.stdio.log_path, max_line)
            .map_err(|refused| refused.fault("open log"))?;
        let null = null()?;
        let [mut stdin, mut stdout, mut stderr] = [const { None }; 3];
        let (mut outputs, mut input) = (Vec::new(), None);
        if new.stdio.terminal {
            // Its master comes with the first report; a descriptor here marks that stdin is wanted.
            if new.stdio.stdin {
                input = Some(
                    null.try_clone()
                        .map_err(|e| fault("dup", "null", &e))?
                        .into(),
                );
            }
        } else {
            for (slot, source) in [(&mut stdout, Source::Stdout), (&mut stderr, Source::Stderr)] {
                let (reader, writer) = pipe()?;
                outputs.push(Output::new(source, reader)?);
                *slot = Some(writer);
            }
            if new.stdio.stdin {
                let (reader, writer) = pipe()?;
                (stdin, input) = (Some(reader), Some(writer));
            }
        }
        let pidfd = |id| {
            let found = self.containers.iter().find(|c| c.id == id);
            found.and_then(|found| found.child.inside())
        };
        let target = match new.target {
            None => None,
            Some(id) => Some(pidfd(id).ok_or_else(|| check("the target container does not run"))?),
        };
        let streams = [&stdin, &stdout, &stderr];
        let request = CreateRequest {
            plan: plan.as_fd(),
            pause: self.sandbox.as_ref().and_then(Child::live_pidfd),
            network: self.network.as_ref().map(OwnedFd::as_fd),
            user: self.user.as_ref().map(OwnedFd::as_fd),
            target,
            stdio: streams.map(|fd| fd.as_ref().map_or(null.as_fd(), OwnedFd::as_fd)),
        };
        let deadline = Instant::now() + new.setup;
        let child = match &new.external {
            None => Child::create(request, asked, deadline)?,
            Some(external) => {
                let name = new.id.to_string();
                Child::create_external(&request, external.place(&name), asked, deadline)?
            }
        };
        self.containers.push(Container {
            id: new.id,
            child,
            created: false,
            stdin: input,
            stdin_once: new.stdio.stdin_once,
            terminal: new.stdio.terminal,
            log,
            outputs,
            attached: Vec::new(),
            memory_cgroup: new.memory_cgroup,
            kill_cgroup: new.kill_cgroup,
            started_at: Timestamp(0),
            exit: None,
            removal: None,
            ending: None,
            paused_until: None,
            external: new.external,
            hooked: new.hooks.then_some(plan),
        });
        Ok(None)
    }

    fn start(&mut self, asked: Asked, id: ContainerId) -> Answer {
        let container = self.find(id)?;
        let (child, external) = (&mut container.child, container.external.is_some());
        if !matches!(child.phase, Phase::Waiting) {
            return Err(check("the container is not waiting for its start"));
        }
        if external {
            self.call(asked, id, Verb::Start)?;
            return Ok(None);
        }
        child.start(asked, Instant::now() + SETUP)?;
        Ok(None)
    }

    fn exec(
        &mut self,
        asked: Asked,
        id: ContainerId,
        number: u64,
        descriptors: Vec<OwnedFd>,
    ) -> Answer {
        let null = null()?;
        let container = self.find(id)?;
        let Some(pidfd) = container.child.live_pidfd() else {
            return Err(check("the container does not run"));
        };
        if !matches!(container.child.phase, Phase::Running) {
            return Err(check("the container does not run"));
        }
        let mut given = descriptors.iter().map(OwnedFd::as_fd);
        let plan = given.next().ok_or_else(|| check("no plan came"))?;
        let mut stream = || given.next().unwrap_or(null.as_fd());
        let request = ExecRequest {
            plan,
            container: pidfd,
            stdio: [stream(), stream(), stream()],
        };
        let deadline = Instant::now() + SETUP;
        let child = match &container.external {
            None => Child::exec(request, asked, deadline)?,
            Some(external) => {
                let name = id.to_string();
                Child::exec_external(&request, external.place(&name), number, asked, deadline)?
            }
        };
        let bundle = container.external.as_ref();
        let bundle = bundle.map(|external| external.bundle.clone());
        self.execs.push(Exec {
            number,
            child,
            terminal: None,
            bundle,
        });
        Ok(None)
    }

    fn kill_exec(&self, number: u64) -> Answer {
        let found = self.execs.iter().find(|found| found.number == number);
        if let Some(exec) = found
            && let Some(pid) = exec.child.live_pid()
        {
            tree::kill(pid);
            exec.child.kill();
        }
        DONE
    }

    fn remove(&mut self, asked: Asked, id: ContainerId) -> Answer {
        let found = self.containers.iter_mut().find(|one| one.id == id);
        let Some(container) = found else {
            return DONE;
        };
        if let Some(before) = container.removal.replace(asked) {
            let again = Reply::Failed(check("the removal was asked for again"));
            self.link.reply(before, again, Vec::new());
        }
        if container.exit.is_none() {
            container.kill();
        }
        self.cut_short(Some(id));
        Ok(None)
    }

    fn stop(&mut self, asked: Asked) {
        for container in &self.containers {
            if container.exit.is_none() {
                container.kill();
            }
        }
        for exec in &self.execs {
            exec.child.kill();
        }
        if let Some(sandbox) = &self.sandbox {
            sandbox.kill();
        }
        self.cut_short(None);
        self.stop = Some(asked);
    }

    fn shutdown(&mut self) -> Answer {
        if !self.is_quiet() {
            return Err(check("something runs in the pod"));
        }
        if let Some(pod) = &self.pod {
            let _absent = std::fs::remove_file(pod.directory.join(SOCKET));
        }
        self.done = true;
        DONE
    }
}

/// Leaves the daemon's cgroups and takes the OOM score of a monitor, as far as this machine lets it.
fn prepare(cgroups: &[PathBuf], oom_score_adj: i32) -> Answer {
    for directory in cgroups {
        let _stays_where_it_is = cgroup::join(directory);
    }
    // Lowering it needs CAP_SYS_RESOURCE; without, the inherited score stays.
    if let Ok(file) = File::options().write(true).open("/proc/self/oom_score_adj") {
        let _clamped = std::io::Write::write(&mut &file, oom_score_adj.to_string().as_bytes());
    }
    DONE
}

fn null() -> Result<File, Fault> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(|error| fault("open", "/dev/null", &error))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Fault> {
    fd::pipe().map_err(|error| fault("pipe2", "O_CLOEXEC", &error))
}

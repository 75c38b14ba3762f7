//! The monitor's loop: polls every descriptor it has, hands on what is ready, sleeps otherwise.
//!
//! One round: wait; read output; hear the children; reap; answer the daemon; settle ends. Lists of containers and
//! execs only shrink at the end of a round, so positions found while polling stay true within it.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::base::id::PodId;
use crate::monitor::attach::Attached;
use crate::monitor::child::{Child, Phase, Said, check, not_ready};
use crate::monitor::container::{Buffers, Container};
use crate::monitor::external::Helper;
use crate::monitor::link::{Asked, Incoming, Link};
use crate::monitor::protocol::{Event, Reply};
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::process::Exit;
use crate::sys::{process, signal, socket};

/// Name of the socket in the pod's directory.
pub(crate) const SOCKET: &str = "monitor.sock";

/// What was ready.
#[derive(Clone, Copy, Debug)]
enum Ready {
    Signals,
    Listener,
    Connection,
    Sandbox,
    Container(usize),
    Output(usize, usize),
    Attached(usize),
    Exec(usize),
}

/// A pod that this monitor has adopted.
#[derive(Debug)]
pub(crate) struct Pod {
    /// Its id.
    pub(crate) id: PodId,
    /// Where socket and exit records are.
    pub(crate) directory: PathBuf,
    listener: OwnedFd,
}

/// One more process in a container.
#[derive(Debug)]
pub(crate) struct Exec {
    /// Number that the daemon chose.
    pub(crate) number: u64,
    /// Its process.
    pub(crate) child: Child,
    /// Master of its terminal, until the reply takes it along.
    pub(crate) terminal: Option<OwnedFd>,
    /// Bundle of its container, if that is of an OCI runtime.
    pub(crate) bundle: Option<PathBuf>,
}

/// Everything a monitor has.
#[derive(Debug)]
pub(crate) struct Monitor<'a> {
    /// Shared memory.
    pub(crate) buffers: &'a mut Buffers,
    /// Connection to the daemon.
    pub(crate) link: Link,
    signals: OwnedFd,
    /// Absent: idle.
    pub(crate) pod: Option<Pod>,
    /// Pause.
    pub(crate) sandbox: Option<Child>,
    /// Network namespace of the pod, kept open for it.
    pub(crate) network: Option<OwnedFd>,
    /// User namespace of the pod, if it has its own.
    pub(crate) user: Option<OwnedFd>,
    /// Containers.
    pub(crate) containers: Vec<Container>,
    /// Execs.
    pub(crate) execs: Vec<Exec>,
    /// Calls of OCI runtimes.
    pub(crate) helpers: Vec<Helper>,
    /// Ends of children that nobody knows (yet).
    pub(crate) strays: Vec<(u32, Exit)>,
    /// Who waits for the end of everything.
    pub(crate) stop: Option<Asked>,
    /// The loop ends.
    pub(crate) done: bool,
}

impl<'a> Monitor<'a> {
    /// An idle monitor on this socket. Signals must be blocked already.
    ///
    /// # Errors
    /// The number of signalfd(2) or fcntl(2).
    pub(crate) fn new(connection: OwnedFd, buffers: &'a mut Buffers) -> io::Result<Self> {
        let mut link = Link::default();
        link.replace(connection)?;
        Ok(Self {
            buffers,
            link,
            signals: signal::descriptor(&[signal::SIGCHLD])?,
            pod: None,
            sandbox: None,
            network: None,
            user: None,
            containers: Vec::new(),
            execs: Vec::new(),
            helpers: Vec::new(),
            strays: Vec::new(),
            stop: None,
            done: false,
        })
    }

    /// Becomes the monitor of a pod.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub(crate) fn adopt(&mut self, id: PodId, directory: PathBuf) -> io::Result<()> {
        let path = directory.join(SOCKET);
        let _absent = std::fs::remove_file(&path);
        self.pod = Some(Pod {
            id,
            listener: socket::listen(&path)?,
            directory,
        });
        Ok(())
    }

    /// Serves until it is shut down, or, while idle, until the daemon goes away.
    ///
    /// # Errors
    /// The number of poll(2).
    pub(crate) fn run(mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        while !self.done {
            self.wait(&mut ready)?;
            let now = Instant::now();
            for what in &ready {
                match *what {
                    Ready::Output(container, index) => {
                        self.containers[container].read(index, self.buffers, now);
                    }
                    Ready::Attached(container) => self.containers[container].forget_left(),
                    Ready::Container(index) => self.hear_container(index),
                    Ready::Sandbox => self.hear_sandbox(),
                    Ready::Exec(index) => self.hear_exec(index),
                    Ready::Signals => self.reap(now),
                    Ready::Listener => self.accept(),
                    Ready::Connection => self.serve_connection(),
                }
            }
            self.settle(Instant::now());
        }
        Ok(())
    }

    /// Waits until something is ready or due. Children speak before they are reaped, and the daemon comes last.
    fn wait(&self, ready: &mut Vec<Ready>) -> io::Result<()> {
        let now = Instant::now();
        let mut set: Vec<PollFd<'_>> = Vec::with_capacity(8);
        let mut names = Vec::with_capacity(8);
        let mut add = |name, fd, flags| {
            names.push(name);
            set.push(PollFd::from_borrowed_fd(fd, flags));
        };
        for (at, container) in self.containers.iter().enumerate() {
            for index in 0..container.outputs.len() {
                if let Some(fd) = container.poll(index, now) {
                    add(Ready::Output(at, index), fd, PollFlags::IN);
                }
            }
            for pipe in container.attached.iter().flat_map(Attached::pipes) {
                add(Ready::Attached(at), pipe, PollFlags::empty());
            }
            if let Some(control) = speaking(&container.child) {
                add(Ready::Container(at), control.as_fd(), PollFlags::IN);
            }
        }
        if let Some(control) = self.sandbox.as_ref().and_then(speaking) {
            add(Ready::Sandbox, control.as_fd(), PollFlags::IN);
        }
        for (at, exec) in self.execs.iter().enumerate() {
            if let Some(control) = speaking(&exec.child) {
                add(Ready::Exec(at), control.as_fd(), PollFlags::IN);
            }
        }
        add(Ready::Signals, self.signals.as_fd(), PollFlags::IN);
        if let Some((socket, waiting)) = self.link.poll() {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, waiting);
            add(Ready::Connection, socket, flags);
        }
        if let Some(pod) = &self.pod {
            add(Ready::Listener, pod.listener.as_fd(), PollFlags::IN);
        }
        let timeout = self.wake().map(|at| at.saturating_duration_since(now));
        let _count = poll(&mut set, timeout)?;
        ready.clear();
        let found = set.iter().zip(names);
        ready.extend(found.filter_map(|(fd, name)| (!fd.revents().is_empty()).then_some(name)));
        Ok(())
    }

    fn wake(&self) -> Option<Instant> {
        let containers = self.containers.iter().filter_map(Container::wake);
        let execs = self.execs.iter().filter_map(|exec| exec.child.wake());
        let sandbox = self.sandbox.as_ref().and_then(Child::deadline);
        let helpers = self.helpers.iter();
        let helpers = helpers.filter_map(|helper| helper.child.deadline());
        containers.chain(execs).chain(sandbox).chain(helpers).min()
    }

    fn hear_container(&mut self, index: usize) {
        let container = &mut self.containers[index];
        let said = container.child.listen();
        match said {
            Said::Made { .. } => return self.container_made(index, said),
            Said::Mounted => return self.container_mounted(index),
            _ => {}
        }
        match (said, &container.child.phase) {
            (Said::Nothing, _) => {}
            (Said::Failed(fault), _) => container.child.fail(fault),
            (Said::Ready { user, terminal }, &Phase::Setup { asked, .. }) => {
                if let Some(master) = terminal {
                    let keep_stdin = container.stdin.take().is_some();
                    if let Err(fault) = container.set_terminal(master, keep_stdin) {
                        return container.child.fail(fault);
                    }
                } else if container.terminal {
                    return container.child.fail(check("the process sent no terminal"));
                }
                container.child.phase = Phase::Waiting;
                container.created = true;
                let pid = container.child.pid;
                let reply = Reply::Created { pid, user };
                self.link.reply(asked, reply, Vec::new());
            }
            // Its end tells the rest.
            (Said::Closed, Phase::Starting { .. }) if container.child.is_maker() => {
                container.child.control = None;
            }
            (Said::Closed, &Phase::Starting { asked, .. }) => {
                container.child.control = None;
                if !container.child.has_executed() {
                    return;
                }
                container.child.phase = Phase::Running;
                container.started_at = Timestamp::now();
                self.container_started(index, asked);
            }
            (Said::Closed, Phase::Waiting) => container.child.control = None,
            (
                Said::Closed | Said::Ready { .. } | Said::Made { .. } | Said::Mounted | Said::Done,
                _,
            ) => {
                container
                    .child
                    .fail(check("the process ended before it was ready"));
            }
        }
    }

    fn hear_sandbox(&mut self) {
        let Some(child) = &mut self.sandbox else {
            return;
        };
        match child.listen() {
            Said::Nothing | Said::Ready { .. } | Said::Made { .. } | Said::Mounted | Said::Done => {
            }
            Said::Failed(fault) => child.fail(fault),
            Said::Closed => {
                child.control = None;
                let Phase::Setup { asked, .. } = child.phase else {
                    return;
                };
                if !child.has_executed() {
                    return;
                }
                let mut set = [PollFd::new(&child.pidfd, PollFlags::IN)];
                if poll(&mut set, Some(Duration::ZERO)).is_ok_and(|ended| ended > 0) {
                    return child.fail(check("pause ended before it was ready"));
                }
                child.phase = Phase::Running;
                let pidfd = crate::sys::fd::duplicate(child.pidfd.as_fd(), 3);
                let reply = Reply::Sandbox { pid: child.pid };
                self.link.reply(asked, reply, pidfd.into_iter().collect());
            }
        }
    }

    fn hear_exec(&mut self, index: usize) {
        let exec = &mut self.execs[index];
        let said = exec.child.listen();
        if matches!(said, Said::Made { .. }) {
            return self.exec_made(index, said);
        }
        match (said, &exec.child.phase) {
            (Said::Nothing, _) => {}
            (Said::Failed(fault), _) => exec.child.fail(fault),
            (Said::Ready { terminal, .. }, &Phase::Setup { asked, deadline }) => {
                exec.terminal = terminal;
                if let Err(fault) = exec.child.start(asked, deadline) {
                    exec.child.fail(fault);
                }
            }
            // Its end tells the rest.
            (Said::Closed, Phase::Starting { .. }) if exec.child.is_maker() => {
                exec.child.control = None;
            }
            (Said::Closed, &Phase::Starting { asked, .. }) => {
                exec.child.control = None;
                if !exec.child.has_executed() {
                    return;
                }
                self.exec_started(index, asked);
            }
            (
                Said::Closed | Said::Ready { .. } | Said::Made { .. } | Said::Mounted | Said::Done,
                _,
            ) => {
                exec.child
                    .fail(check("the process ended before it was ready"));
            }
        }
    }

    /// Exec `index` has executed its program.
    fn exec_started(&mut self, index: usize, asked: Asked) {
        let exec = &mut self.execs[index];
        exec.child.phase = Phase::Running;
        let reply = Reply::Executed {
            pid: exec.child.pid,
        };
        let terminal = exec.terminal.take();
        self.link
            .reply(asked, reply, terminal.into_iter().collect());
    }

    fn reap(&mut self, now: Instant) {
        while let Ok(Some(_child_signal)) = signal::next(self.signals.as_fd()) {}
        while let Ok(Some(pid)) = process::ended_child() {
            if self.is_just_born(pid) {
                // Whether it had executed can be read only before it is reaped.
                let executed = process::has_executed(pid).unwrap_or(true);
                let Ok(exit) = process::reap(pid) else {
                    return;
                };
                if let Some(maker) = self.maker_of(pid) {
                    maker.born_ended(exit, executed);
                }
                continue;
            }
            let known = self.knows(pid);
            self.hear_last(pid);
            let Ok(exit) = process::reap(pid) else {
                return;
            };
            let handed_over = known && !self.knows(pid);
            if !handed_over {
                self.reaped(pid, exit, Timestamp::now(), now);
            }
        }
        for child in self.children() {
            child.look_now();
        }
    }

    fn children(&mut self) -> impl Iterator<Item = &mut Child> {
        let containers = self.containers.iter_mut().map(|one| &mut one.child);
        containers.chain(self.execs.iter_mut().map(|one| &mut one.child))
    }

    fn maker_of(&mut self, pid: u32) -> Option<&mut Child> {
        self.children().find(|child| child.born_pid() == Some(pid))
    }

    fn is_just_born(&mut self, pid: u32) -> bool {
        self.maker_of(pid).is_some()
    }

    /// Hears the last words of a child that has ended: a report of a failure, or the end of file of its exec, as long as it
    /// can be told from that of its end.
    fn hear_last(&mut self, pid: u32) {
        let is_it = |child: &Child| child.pid == pid && !child.is_ended();
        if let Some(index) = self.containers.iter().position(|c| is_it(&c.child)) {
            self.hear_container(index);
        } else if let Some(index) = self.execs.iter().position(|e| is_it(&e.child)) {
            self.hear_exec(index);
        } else if self.sandbox.as_ref().is_some_and(is_it) {
            self.hear_sandbox();
        }
        for child in self.children() {
            child.look_now();
        }
    }

    /// A child was reaped; one that is not in any list was an orphan.
    fn reaped(&mut self, pid: u32, exit: Exit, at: Timestamp, now: Instant) {
        let is_it = |child: &Child| child.pid == pid && !child.is_ended();
        if let Some(index) = self.containers.iter().position(|c| is_it(&c.child)) {
            let container = &mut self.containers[index];
            let maker = container.child.is_maker();
            if let (true, &Phase::Starting { asked, .. }) = (maker, &container.child.phase) {
                match container.child.made() {
                    Ok(ended) => {
                        container.child.phase = Phase::Running;
                        container.started_at = Timestamp::now();
                        self.container_started(index, asked);
                        if let Some(exit) = ended {
                            self.containers[index].ended(exit, at, now);
                        }
                        return;
                    }
                    Err(fault) => container.child.fail(fault),
                }
            }
            container.child.fail(not_ready(exit));
            if let Phase::Failing { asked, fault } = &container.child.phase {
                let reply = Reply::Failed(fault.clone());
                self.link.reply(*asked, reply, Vec::new());
            }
            container.ended(exit, at, now);
        } else if let Some(index) = self.execs.iter().position(|e| is_it(&e.child)) {
            let exec = &mut self.execs[index];
            let maker = exec.child.is_maker();
            let mut exit = exit;
            if let (true, &Phase::Starting { asked, .. }) = (maker, &exec.child.phase) {
                match exec.child.made() {
                    Ok(ended) => {
                        self.exec_started(index, asked);
                        let Some(ended) = ended else { return };
                        exit = ended;
                    }
                    Err(fault) => exec.child.fail(fault),
                }
            }
            let exec = &mut self.execs[index];
            exec.child.fail(not_ready(exit));
            if let Phase::Failing { asked, fault } = &exec.child.phase {
                let reply = Reply::Failed(fault.clone());
                exec.remove_files();
                self.link.reply(*asked, reply, Vec::new());
            } else {
                let (exec, code) = (exec.number, exit.code());
                self.link.event(Event::ExecExited { exec, code });
            }
            exec.child.phase = Phase::Ended;
        } else if self.sandbox.as_ref().is_some_and(is_it) {
            if let Some(child) = &mut self.sandbox {
                child.fail(not_ready(exit));
                if let Phase::Failing { asked, fault } = &child.phase {
                    let reply = Reply::Failed(fault.clone());
                    self.link.reply(*asked, reply, Vec::new());
                } else {
                    self.link.event(Event::SandboxExited { at });
                }
            }
            self.sandbox = None;
        } else if let Some(index) = self.helpers.iter().position(|h| is_it(&h.child)) {
            self.helper_ended(index);
        } else {
            self.keep_stray(pid, exit);
        }
    }

    fn accept(&mut self) {
        let Some(pod) = &self.pod else {
            return;
        };
        while let Ok(Some(connection)) = socket::accept(pod.listener.as_fd()) {
            let peer = socket::peer_credentials(connection.as_fd());
            if peer.is_ok_and(|(_, uid, _)| uid == 0) {
                let _kept_the_old = self.link.replace(connection);
            }
        }
    }

    fn serve_connection(&mut self) {
        self.link.flush();
        let mut packet = PACKET
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        loop {
            match self.link.receive(packet.as_mut_slice()) {
                Incoming::Nothing => return,
                Incoming::Request(asked, request, descriptors) => {
                    self.serve(asked, request.call, descriptors);
                }
                Incoming::Closed => {
                    self.done |= self.pod.is_none();
                    return;
                }
            }
        }
    }

    /// What is due is done; what is over is told and forgotten.
    fn settle(&mut self, now: Instant) {
        if let Some(sandbox) = &mut self.sandbox {
            sandbox.expire(now);
        }
        for exec in &mut self.execs {
            exec.expire(now);
        }
        for helper in &mut self.helpers {
            helper.expire(now);
        }
        self.drop_strays();
        self.execs.retain(|exec| !exec.child.is_ended());
        if let Some(pod) = &self.pod {
            for container in &mut self.containers {
                container.expire(now);
                container.resume(self.buffers, now);
                if container.settle(now, &pod.directory)
                    && container.created
                    && let Some(exit) = &container.exit
                {
                    self.link.event(Event::ContainerExited(exit.clone()));
                }
            }
        }
        self.delete_ended();
        if let Some(pod) = &self.pod {
            let mut removed = Vec::new();
            self.containers.retain_mut(|container| {
                let over = container.exit.is_some();
                let gone = over
                    && (!container.created || container.removal.is_some())
                    && container.is_deleted();
                if gone {
                    crate::monitor::record::remove(&pod.directory, container.id);
                    removed.extend(container.removal);
                }
                !gone
            });
            for asked in removed {
                self.link.reply(asked, Reply::Done, Vec::new());
            }
        }
        if let Some(asked) = self.stop
            && self.is_quiet()
        {
            self.stop = None;
            self.link.reply(asked, Reply::Done, Vec::new());
        }
    }

    /// Whether nothing runs any more.
    pub(crate) fn is_quiet(&self) -> bool {
        self.sandbox.is_none()
            && self.execs.is_empty()
            && self.helpers.is_empty()
            && self.containers.iter().all(|c| c.exit.is_some())
    }
}

/// Of a size for any packet; its pages cost nothing until a packet needs them.
static PACKET: std::sync::Mutex<[u8; crate::monitor::protocol::MAX_PACKET]> =
    std::sync::Mutex::new([0; crate::monitor::protocol::MAX_PACKET]);

/// The control socket of a child that has not executed yet. What a maker says once it was started is heard at its end.
fn speaking(child: &Child) -> Option<&OwnedFd> {
    let started = child.is_maker() && matches!(child.phase, Phase::Starting { .. });
    child.control.as_ref().filter(|_| !started)
}

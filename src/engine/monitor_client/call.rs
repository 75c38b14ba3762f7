//! One method per call of the protocol.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::Interest;

use crate::base::clock::Timestamp;
use crate::base::container::ProcessUser;
use crate::base::handler::OciRuntime;
use crate::base::id::ContainerId;
use crate::engine::monitor_client::{END, MonitorClient, MonitorError, QUICK, Result, SETUP};
use crate::monitor::protocol::{Call, Reply, Stdio};
use crate::runtime::external::Text;
use crate::runtime::plan::{IdMappings, NamespaceSource, Plan};
use crate::sys::{memfd, process};

/// A container whose process waits for its start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Created {
    /// Its pid on the host.
    pub(crate) pid: u32,
    /// Who it runs as.
    pub(crate) user: ProcessUser,
}

/// What a new container needs beside its plan.
#[derive(Clone, Debug)]
pub(crate) struct NewContainer {
    /// Its id.
    pub(crate) id: ContainerId,
    /// Its output and input.
    pub(crate) stdio: Stdio,
    /// Where OOM kills are counted: the v2 directory, or that of the v1 memory hierarchy.
    pub(crate) memory_cgroup: PathBuf,
    /// Who is killed with it: the v2 directory, or that of the v1 freezer hierarchy.
    pub(crate) kill_cgroup: PathBuf,
    /// How long its making may take; whole seconds.
    pub(crate) limit: Duration,
}

/// A plan as a sealed memory file.
pub(super) fn sealed(encoded: std::result::Result<Vec<u8>, postcard::Error>) -> Result<OwnedFd> {
    let bytes = encoded.map_err(|source| MonitorError::Plan { source })?;
    memfd::sealed("plan", &bytes).map_err(MonitorError::io("memfd_create for the plan"))
}

fn seconds(limit: Duration) -> u32 {
    u32::try_from(limit.as_secs()).unwrap_or(u32::MAX)
}

impl MonitorClient {
    /// Makes the pod's user namespace, which the monitor keeps, with the network namespace that goes with it if asked.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn user_namespace(
        &self,
        uid_mappings: IdMappings,
        gid_mappings: IdMappings,
        network: bool,
    ) -> Result<Option<OwnedFd>> {
        let call = Call::UserNamespace {
            uid_mappings,
            gid_mappings,
            network,
        };
        let made = self.done("user namespace", call, Vec::new(), QUICK).await?;
        Ok(made.into_iter().nth(1))
    }

    /// Starts pause. `network`: the namespace, where the plan says `Passed`; the monitor keeps it open. Its pid.
    ///
    /// # Errors
    /// [`MonitorError`]; nothing is left of pause then.
    pub(crate) async fn sandbox(&self, plan: &Plan, network: Option<OwnedFd>) -> Result<u32> {
        let mut descriptors = vec![sealed(plan.encode())?];
        descriptors.extend(network);
        match self
            .call("sandbox", Call::Sandbox, descriptors, SETUP)
            .await?
        {
            (Reply::Sandbox { pid }, _) => Ok(pid),
            _ => Err(MonitorError::Unexpected { call: "sandbox" }),
        }
    }

    /// Makes a container whose process waits right before its exec.
    ///
    /// # Errors
    /// [`MonitorError`]; nothing is left of it then (after `Deadline` or `Lost` that is not known: remove it).
    pub(crate) async fn container(&self, new: NewContainer, plan: &Plan) -> Result<Created> {
        let target = match &plan.namespaces.pid {
            NamespaceSource::Container(id) => id.parse().ok(),
            _ => None,
        };
        let call = Call::Container {
            id: new.id,
            stdio: new.stdio,
            memory_cgroup: new.memory_cgroup,
            kill_cgroup: new.kill_cgroup,
            target,
            hooks: plan.hooks.is_some(),
            setup_s: seconds(new.limit),
        };
        let descriptors = vec![sealed(plan.encode())?];
        self.created(call, descriptors, new.limit).await
    }

    /// As [`MonitorClient::container`], by an OCI runtime with this configuration and bundle.
    ///
    /// # Errors
    /// As [`MonitorClient::container`]; the fault tells what the runtime logged.
    pub(crate) async fn external(
        &self,
        new: NewContainer,
        plan: &Plan,
        config: &Text,
        runtime: OciRuntime,
        bundle: PathBuf,
    ) -> Result<Created> {
        let call = Call::External {
            id: new.id,
            stdio: new.stdio,
            memory_cgroup: new.memory_cgroup,
            kill_cgroup: new.kill_cgroup,
            runtime,
            bundle,
            setup_s: seconds(new.limit),
        };
        let descriptors = vec![sealed(plan.encode_with(config))?];
        self.created(call, descriptors, new.limit).await
    }

    /// Makes an OCI runtime forget a container of another monitor, which is gone.
    ///
    /// # Errors
    /// [`MonitorError`]; the fault tells what the runtime logged.
    pub(crate) async fn clean(
        &self,
        id: ContainerId,
        runtime: OciRuntime,
        bundle: PathBuf,
    ) -> Result<()> {
        let call = Call::Clean {
            id,
            runtime,
            bundle,
        };
        self.done("clean", call, Vec::new(), END).await.map(drop)
    }

    /// Runs the poststop hooks of a container that is gone; `plan` is its encoded plan.
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: all have run, these failed; or another.
    pub(crate) async fn poststop(&self, id: ContainerId, plan: Vec<u8>) -> Result<()> {
        let descriptors = vec![sealed(Ok(plan))?];
        let call = Call::Poststop { id };
        let done = self.done("poststop", call, descriptors, SETUP);
        done.await.map(drop)
    }

    async fn created(
        &self,
        call: Call,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Created> {
        // The monitor's word comes first, after it has undone all.
        let patience = limit + QUICK;
        match self.call("container", call, descriptors, patience).await?.0 {
            Reply::Created { pid, user } => Ok(Created { pid, user }),
            _ => Err(MonitorError::Unexpected { call: "container" }),
        }
    }

    /// Lets a container's process execute its program; when that happened, and its pid from then on.
    ///
    /// # Errors
    /// [`MonitorError::Refused`] with the exec's fault (`ContainerExited` follows), or another.
    pub(crate) async fn start(&self, id: ContainerId) -> Result<(Timestamp, u32)> {
        let call = Call::Start { id };
        match self.call("start", call, Vec::new(), SETUP).await?.0 {
            Reply::Started { at, pid } => Ok((at, pid)),
            _ => Err(MonitorError::Unexpected { call: "start" }),
        }
    }

    /// Sends a signal to a container's first process; fine when it has ended.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn signal(&self, id: ContainerId, signal: i32) -> Result<()> {
        let call = Call::Signal { id, signal };
        self.done("signal", call, Vec::new(), QUICK).await.map(drop)
    }

    /// Kills all of a container.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn kill(&self, id: ContainerId) -> Result<()> {
        let call = Call::Kill { id };
        self.done("kill", call, Vec::new(), QUICK).await.map(drop)
    }

    /// Opens the log again; done when the new file is in use.
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: the container has ended (no file was made), or the file cannot be opened.
    pub(crate) async fn reopen_log(&self, id: ContainerId) -> Result<()> {
        let call = Call::ReopenLog { id };
        self.done("reopen log", call, Vec::new(), QUICK)
            .await
            .map(drop)
    }

    /// Makes the monitor forget a container and its exit record; one that lives is killed first. An unknown one is fine.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn remove(&self, id: ContainerId) -> Result<()> {
        let call = Call::Remove { id };
        self.done("remove", call, Vec::new(), END).await.map(drop)
    }

    /// Gets a copy of the output from now on: `copies` are stdout and stderr (one with a terminal), then where a byte comes
    /// when they end because they were not read fast enough. Returns where
    /// stdin is written to, if `stdin` asks for it and the container has one (with `stdin_once` only the first caller
    /// that asks gets it).
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: the container does not run.
    pub(crate) async fn attach(
        &self,
        id: ContainerId,
        copies: Vec<OwnedFd>,
        stdin: bool,
    ) -> Result<Option<OwnedFd>> {
        let call = Call::Attach { id, stdin };
        let descriptors = self.done("attach", call, copies, QUICK).await?;
        Ok(descriptors.into_iter().next())
    }

    /// Sets the size of a container's terminal.
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: it has none.
    pub(crate) async fn resize(&self, id: ContainerId, width: u16, height: u16) -> Result<()> {
        let call = Call::Resize { id, width, height };
        self.done("resize", call, Vec::new(), QUICK).await.map(drop)
    }

    /// Kills everything in the pod, pause too, and waits until it is gone.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn stop(&self) -> Result<()> {
        let call = Call::Stop;
        self.done("stop", call, Vec::new(), END).await.map(drop)
    }

    /// Ends the monitor, in which nothing runs any more, and waits for its end.
    ///
    /// # Errors
    /// [`MonitorError::Refused`]: something runs.
    pub(crate) async fn shutdown(&self) -> Result<()> {
        let call = Call::Shutdown;
        self.done("shutdown", call, Vec::new(), QUICK).await?;
        self.gone().await
    }

    /// Kills the monitor itself. Its containers live on without it: kill their cgroups.
    ///
    /// # Errors
    /// [`MonitorError`]
    pub(crate) async fn kill_monitor(&self) -> Result<()> {
        let pidfd = self.shared.pidfd.get_ref().as_fd();
        let _ended_already = process::send_signal(pidfd, crate::sys::signal::SIGKILL)
            .map_err(MonitorError::io("kill the monitor"))?;
        self.gone().await
    }

    /// Waits for the monitor's end and reaps it if it is our child.
    async fn gone(&self) -> Result<()> {
        let ended = self.shared.pidfd.ready(Interest::READABLE);
        let Ok(_ready) = tokio::time::timeout(QUICK, ended).await else {
            return Err(MonitorError::Deadline {
                call: "end of the monitor",
                after: QUICK,
            });
        };
        let _not_ours = process::try_wait(self.shared.pidfd.get_ref().as_fd());
        Ok(())
    }
}

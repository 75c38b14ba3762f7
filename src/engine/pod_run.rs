//! RunPodSandbox.
//!
//! ```text
//! claim the name -> record Creating -> +- cgroup of pause
//!                                      +- monitor -> pause          -> pod files -> Ready, event
//!                                      +- netns -> addresses
//! ```
//! With a user namespace the monitor comes first and makes that, and the netns in it.
//! Plugins are asked before Ready.
//!
//! The record is there before anything is made, so that a crash leaves nothing unknown. A failure at any
//! point is undone by the same steps that stop and remove a pod.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use crate::base::handler::Handler;
use crate::base::id::PodId;
use crate::base::pod::PodConfig;
use crate::base::security::NamespaceMode;
use crate::engine::Engine;
use crate::engine::container_create::monitor_of;
use crate::engine::core::{Core, blocking, make_pod_directory};
use crate::engine::error::{CleanUp, EngineError, Result};
use crate::engine::monitor_client::{Events, MonitorClient};
use crate::engine::names::{Claim, join};
use crate::engine::pod::{Pod, PodRecord};
use crate::engine::state::{PodInput, PodPhase};

impl Engine {
    /// Makes the pod, joins the call that makes it, or returns the one that a call before has made.
    ///
    /// # Errors
    /// Those of [`EngineError`]; nothing is left then.
    pub(super) async fn run_pod(&self, config: PodConfig, handler: String) -> Result<PodId> {
        let means = self.core().handlers.resolve(&handler)?;
        self.ask_before(&means).await;
        loop {
            match self.core().pod_names.claim(config.metadata.clone()) {
                Claim::Ours(flight) => {
                    let engine = self.clone();
                    return self
                        .task("RunPodSandbox", async move {
                            let made = engine
                                .make_pod(config, handler, means)
                                .await
                                .map_err(Arc::new);
                            flight.land(made.clone());
                            made.map_err(EngineError::Joined)
                        })
                        .await;
                }
                Claim::Join(flight) => {
                    if let Some(outcome) = join(flight).await {
                        return outcome.map_err(EngineError::Joined);
                    }
                }
                Claim::Exists(id) => return self.existing_pod(id, &config, &handler),
            }
        }
    }

    /// The pod of that name, if a retry of the call that made it would get it.
    fn existing_pod(&self, id: PodId, config: &PodConfig, handler: &str) -> Result<PodId> {
        match self.core().pods.get(id) {
            Some(pod)
                if pod.config == *config && pod.runtime_handler == handler && pod.is_ready() =>
            {
                Ok(id)
            }
            _ => Err(EngineError::NameTaken {
                what: "pod sandbox",
                name: format!(
                    "{}/{} (uid {}, attempt {})",
                    config.metadata.namespace,
                    config.metadata.name,
                    config.metadata.uid,
                    config.metadata.attempt
                ),
                id: id.to_string(),
            }),
        }
    }

    async fn make_pod(
        &self,
        config: PodConfig,
        runtime_handler: String,
        handler: Handler,
    ) -> Result<PodId> {
        let core = self.core();
        let cgroup_parent = if config.cgroup_parent.is_empty() {
            format!("{}/pods", core.cgroup_root)
        } else {
            config.cgroup_parent.clone()
        };
        let (labels, level) = core.lower.label_pod(&config)?;
        let networked = config.security.namespaces.network != NamespaceMode::Node;
        let pod = Arc::new(
            PodRecord {
                id: PodId(Core::new_id()?),
                phase: PodPhase::Creating,
                config,
                runtime_handler,
                handler,
                made_parents: core.missing_parents(&cgroup_parent)?,
                cgroup_parent,
                created_at: core.stamps.next(),
                ips: vec![],
                networked,
                pause_pid: None,
                labels,
            }
            .into_pod(),
        );
        pod.lock().level = level;
        let _turn = pod.lane.turn().await;
        core.arriving.insert(pod.id, Arc::clone(&pod));
        let built = self.build_pod(&pod).await;
        core.arriving.remove(pod.id);
        let Err(error) = built else {
            return Ok(pod.id);
        };
        let mut undo = CleanUp::default();
        self.plugins_stop_pod(&pod).await;
        self.plugins_remove_pod(&pod).await;
        self.halt_pod(&pod, &mut undo).await;
        if undo.is_clean() {
            self.erase_pod(&pod, &mut undo).await;
        }
        if !undo.is_clean() {
            // Kubelet sees it as not ready and removes it, which tries the same steps again.
            self.list_pod(&pod, PodInput::Abandoned);
            undo.note("record", core.record_pod(&pod).await);
        }
        Err(undo.after(error, "pod sandbox", pod.id))
    }

    async fn build_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let core = self.core();
        core.lower.check_user_namespace(pod, &core.handlers)?;
        let directory = core.pod_directory(pod.id);
        let (made, of) = (directory.clone(), Arc::clone(pod));
        let (recorded, netns, made) = tokio::join!(
            core.record_pod(pod),
            core.lower.netns(pod),
            blocking("make the pod's directory", move || make_pod_directory(
                &made, &of
            )),
        );
        let (mut netns, ()) = (netns?, recorded.and(made)?);
        let mut events = None;
        if pod.user_root().is_some() {
            // Its network namespace belongs to its user namespace, so that this one comes first.
            let (monitor, first) = self.take_monitor(pod, &directory).await?;
            events = Some(first);
            netns = core.lower.user_namespace(&monitor, pod).await?;
        }
        let passed = netns.as_ref().map(OwnedFd::try_clone).transpose();
        let passed = passed.map_err(EngineError::io("duplicate a namespace descriptor"))?;
        // Both run to their end, so that an undo finds everything made and nothing in the making.
        let (ips, events) = tokio::join!(
            core.lower.attach(pod, netns.as_ref(), &directory),
            self.start_sandbox(pod, &directory, passed, events),
        );
        let (ips, events) = (ips?, events?);
        Arc::make_mut(&mut pod.lock().status).ips = ips;
        self.plugins_run_pod(pod).await?;
        self.list_pod(pod, PodInput::Made);
        self.watch(pod, events);
        core.record_pod(pod).await
    }

    /// A monitor for the pod, which has it from here on.
    async fn take_monitor(
        &self,
        pod: &Arc<Pod>,
        directory: &Path,
    ) -> Result<(MonitorClient, Events)> {
        let (monitor, events) = self.core().lower.monitor(pod.id, directory).await?;
        pod.lock().monitor = Some(monitor.clone());
        Ok((monitor, events))
    }

    /// The cgroup and the pause process, in its monitor; `events`: the pod has one already.
    async fn start_sandbox(
        &self,
        pod: &Arc<Pod>,
        directory: &Path,
        netns: Option<OwnedFd>,
        events: Option<Events>,
    ) -> Result<Events> {
        let core = self.core();
        let (engine, prepared) = (self.clone(), Arc::clone(pod));
        let plan = blocking("prepare a sandbox", move || {
            let core = engine.core();
            core.lower.prepare_sandbox(core, &prepared)
        });
        let taken = async {
            match events {
                Some(events) => Ok((monitor_of(pod)?, events)),
                None => self.take_monitor(pod, directory).await,
            }
        };
        let (plan, taken) = tokio::join!(plan, taken);
        let (monitor, events) = taken?;
        let pid = core.lower.start_pause(pod, &monitor, &plan?, netns).await?;
        pod.lock().pause_pid = Some(pid);
        Ok(events)
    }

    /// Shows the pod to everybody.
    pub(super) fn list_pod(&self, pod: &Arc<Pod>, input: PodInput) {
        let core = self.core();
        core.pods.insert(pod.id, Arc::clone(pod));
        // From Creating both inputs are allowed.
        let _record = core.pod_input(pod, input, |_| {}).is_ok();
    }
}

//! CreateContainer.
//!
//! ```text
//! claim the name -> hold the image -> into the pod's list, if it is ready -> record Creating
//!   -> directories, OCI spec, plan, cgroup -> monitor: process waits -> Created, event
//! ```

use std::path::PathBuf;
use std::sync::Arc;

use crate::base::clock::Timestamp;
use crate::base::container::ContainerConfig;
use crate::base::id::ContainerId;
use crate::engine::Engine;
use crate::engine::container::{Container, ContainerRecord};
use crate::engine::core::{Core, blocking, give, make_directory};
use crate::engine::error::{CleanUp, EngineError, Result};
use crate::engine::exits::note_exit;
use crate::engine::lower::{Design, Held, Materials};
use crate::engine::names::{Claim, join};
use crate::engine::pod::{self, Pod};
use crate::engine::state::{ContainerInput, ContainerPhase, PodPhase, Refused};
use crate::nri::ContainerEvent;
use crate::store::{self, CLOSED};

impl Engine {
    /// Makes the container, joins the call that makes it, or returns the one that a call before has made.
    ///
    /// # Errors
    /// Those of [`EngineError`]; nothing is left then.
    pub(super) async fn create(&self, pod: &str, config: ContainerConfig) -> Result<ContainerId> {
        let pod = self.core().pod(pod)?;
        loop {
            let key = (pod.id, config.name.clone(), config.attempt);
            match self.core().container_names.claim(key) {
                Claim::Ours(flight) => {
                    let engine = self.clone();
                    return self
                        .task("CreateContainer", async move {
                            let made = engine.make(pod, config).await.map_err(Arc::new);
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
                Claim::Exists(id) => return self.existing(id, &config),
            }
        }
    }

    /// The container of that name, if a retry of the call that made it would get it.
    fn existing(&self, id: ContainerId, config: &ContainerConfig) -> Result<ContainerId> {
        match self.core().containers.get(id) {
            Some(found) if found.config == *config && found.phase() == ContainerPhase::Created => {
                Ok(id)
            }
            _ => Err(EngineError::NameTaken {
                what: "container",
                name: format!("{} (attempt {})", config.name, config.attempt),
                id: id.to_string(),
            }),
        }
    }

    async fn make(&self, pod: Arc<Pod>, config: ContainerConfig) -> Result<ContainerId> {
        let core = self.core();
        check_ready(&pod, "create a container in")?;
        self.ask_before(&pod.handler).await;
        let id = ContainerId(Core::new_id()?);
        let held = core.lower.hold(&config, id)?;
        let container = self.new_container(id, &pod, config, &held);
        let _turn = container.lane.turn().await;
        if let Err(error) = self.enlist(&container) {
            core.lower.release(id);
            return Err(error);
        }
        let Err(error) = Box::pin(self.build(&container, &held)).await else {
            return Ok(id);
        };
        let mut undo = CleanUp::default();
        self.plugins_remove(&container).await;
        self.erase(&container, &mut undo).await;
        if undo.is_clean() {
            pod.lock().containers.remove(&id);
        } else {
            // It is listed as exited: kubelet removes it, which tries the same steps again.
            self.list(&container, ContainerInput::Abandoned);
            undo.note("record", core.record_container(&container).await);
        }
        Err(undo.after(error, "container", id))
    }

    fn new_container(
        &self,
        id: ContainerId,
        pod: &Arc<Pod>,
        config: ContainerConfig,
        held: &Held,
    ) -> Arc<Container> {
        let log_path = match (&*pod.config.log_directory, &*config.log_path) {
            ("", _) | (_, "") => String::new(),
            (directory, path) => PathBuf::from(directory).join(path).display().to_string(),
        };
        let record = ContainerRecord {
            id,
            pod_id: pod.id,
            phase: ContainerPhase::Creating { ended: false },
            cgroup: pod::join(&pod.cgroup_parent, &id.to_string()),
            created_at: self.core().stamps.next(),
            started_at: Timestamp::default(),
            finished_at: Timestamp::default(),
            exit_code: 0,
            image_name: held.name(&config.image.image),
            image_ref: held.reference(),
            image_id: held.image.id.clone(),
            layers: held.layers.clone(),
            image_volumes: held.volumes.clone(),
            reason: String::new(),
            message: String::new(),
            log_path,
            resources: config.resources.clone(),
            user: None,
            stop_signal: 0,
            pid: None,
            config,
        };
        let options = record.config.security.selinux.as_ref();
        let level = self.core().lower.hold_level(options);
        let container = record.into_container(Arc::clone(pod));
        container.lock().level = level;
        Arc::new(container)
    }

    /// Puts the container into its pod's list, unless the pod is being stopped.
    fn enlist(&self, container: &Arc<Container>) -> Result<()> {
        let pod = &container.pod;
        let mut inner = pod.lock();
        if inner.phase != PodPhase::Ready {
            drop(inner);
            return check_ready(pod, "create a container in");
        }
        inner.containers.insert(container.id, Arc::clone(container));
        Ok(())
    }

    async fn build(&self, container: &Arc<Container>, held: &Held) -> Result<()> {
        let core = self.core();
        core.record_container(container).await?;
        let mut prepared = self.prepare(container, held).await?;
        check_ready(&container.pod, "create a container in")?;
        let devices = std::mem::take(&mut prepared.net_devices);
        let taken = core.lower.take_devices(&container.pod, devices).await?;
        let made = self.make_process(container, prepared).await;
        if made.is_err() {
            taken.give_back().await;
        }
        made
    }

    async fn make_process(&self, container: &Arc<Container>, prepared: Materials) -> Result<()> {
        let core = self.core();
        let monitor = monitor_of(&container.pod)?;
        let created = core
            .lower
            .create_container(&monitor, container, &prepared)
            .await?;
        core.lower
            .tell_unmapped(&core.tasks, container, &prepared.plan);
        {
            let mut inner = container.lock();
            inner.pid = Some(created.pid);
            let status = Arc::make_mut(&mut inner.status);
            status.user = Some(created.user);
            status.stop_signal = prepared.stop_signal;
            status.resources = prepared.resources;
        }
        // A stop of the pod that began meanwhile waits for our turn to end and then kills this one too.
        self.list(container, ContainerInput::Made);
        let event = ContainerEvent::PostCreate;
        self.plugins_event(event, container).await;
        core.record_container(container).await
    }

    /// Directories, OCI spec, plan and cgroup, with what plugins change. Without plugins it is one piece of work.
    async fn prepare(&self, container: &Arc<Container>, held: &Held) -> Result<Materials> {
        let (engine, of, held_for) = (self.clone(), Arc::clone(container), held.clone());
        let prepared = blocking("prepare a container", move || {
            let core = engine.core();
            make_container_directories(core, &of)?;
            let design = core.lower.design_container(core, &of, &held_for, &[])?;
            if !engine.plugins_idle(&of) {
                return Ok(Err(design));
            }
            let made = core.lower.furnish_container(core, &of, design)?;
            Ok(Ok(made))
        });
        match prepared.await? {
            Ok(materials) => Ok(materials),
            Err(design) => Box::pin(self.prepare_with_plugins(container, held, design)).await,
        }
    }

    /// Asks the plugins about a design, and makes what comes of it.
    async fn prepare_with_plugins(
        &self,
        container: &Arc<Container>,
        held: &Held,
        design: Design,
    ) -> Result<Materials> {
        let edits = self.plugins_create(container, design.spec()?).await?;
        for edit in edits.iter().filter(|edit| !edit.cgroups_path.is_empty()) {
            self.move_cgroup(container, &edit.cgroups_path).await?;
        }
        let (engine, of, held) = (self.clone(), Arc::clone(container), held.clone());
        blocking("prepare a container", move || {
            let core = engine.core();
            let design = match edits.is_empty() {
                true => design,
                false => core.lower.design_container(core, &of, &held, &edits)?,
            };
            core.lower.furnish_container(core, &of, design)
        })
        .await
    }

    /// Shows the container to everybody.
    fn list(&self, container: &Arc<Container>, input: ContainerInput) {
        let core = self.core();
        core.containers.insert(container.id, Arc::clone(container));
        // From Creating both inputs are allowed.
        let _record = core
            .container_input(container, input, |inner| {
                if let Some(exit) = inner.early_exit.take() {
                    note_exit(inner, &exit);
                } else if input == ContainerInput::Abandoned {
                    crate::engine::exits::note_end(
                        inner,
                        Timestamp::now(),
                        128,
                        "StartError",
                        "it could not be made, nor undone completely",
                    );
                }
            })
            .is_ok();
    }
}

/// The pod's monitor.
///
/// # Errors
/// [`EngineError::State`]: it is gone, so the pod is not ready.
pub(super) fn monitor_of(pod: &Pod) -> Result<crate::engine::monitor_client::MonitorClient> {
    pod.monitor().ok_or_else(|| EngineError::State {
        verb: "use",
        what: "pod sandbox",
        id: pod.id.to_string(),
        source: Refused {
            state: "without its monitor",
        },
    })
}

/// Is the pod ready?
///
/// # Errors
/// [`EngineError::State`] names its state.
pub(super) fn check_ready(pod: &Pod, verb: &'static str) -> Result<()> {
    let phase = pod.lock().phase;
    match phase {
        PodPhase::Ready => Ok(()),
        other => Err(EngineError::State {
            verb,
            what: "pod sandbox",
            id: pod.id.to_string(),
            source: Refused {
                state: other.adjective(),
            },
        }),
    }
}

fn make_container_directories(core: &Core, container: &Container) -> Result<()> {
    let directory = core.container_directory(container.id);
    // What is below is a container's, with any mode: nobody passes who could use it on the node.
    store::directory(&directory, CLOSED)?;
    for (name, mode) in [("upper", 0o755), ("work", 0o700)] {
        make_directory(&directory.join(name), mode)?;
    }
    if !container.pod.labels.mount.is_empty() {
        make_directory(&directory.join("empty"), 0o755)?;
    }
    give(&directory.join("upper"), &container.pod)
}

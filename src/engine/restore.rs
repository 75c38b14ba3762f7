//! After a start: what the records say, what the monitors say, and what is made of both.
//!
//! | record says | monitor says | becomes |
//! |---|---|---|
//! | anything, before a reboot | - | pod NOTREADY, containers EXITED 255 `Unknown` |
//! | Creating | - | undone |
//! | Ready | pause runs | Ready, containers as the monitor says, exits with their code and time |
//! | Ready | pause ended | NOTREADY |
//! | Ready | nothing: it is gone | processes killed by cgroup, pod NOTREADY, containers EXITED 255 |
//! | Stopping, Removing | - | gone on with |

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use futures_util::future::join_all;

use crate::base::clock::Timestamp;
use crate::base::error::chain;
use crate::base::id::{ContainerId, PodId};
use crate::base::security::SelinuxLabels;
use crate::engine::Engine;
use crate::engine::container::ContainerRecord;
use crate::engine::core::{PASSED, blocking, make_pod_directory, remove_directory};
use crate::engine::error::{CleanUp, EngineError, Result};
use crate::engine::exits::{Ended, note_exit};
use crate::engine::pod::{Pod, PodRecord};
use crate::engine::state::{ContainerPhase, PodPhase};
use crate::monitor::protocol::MonitorState;
use crate::store::{self, CLOSED, Durability, Loaded};

/// What a restored pod still needs, once everything is in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Undo,
    Stop,
    Remove,
}

impl Engine {
    /// Brings back pods and containers. `boot` is the id of this boot.
    ///
    /// # Errors
    /// [`EngineError::Store`]: the records cannot be read, or a newer version wrote them.
    pub(super) async fn restore(&self, boot: &str) -> Result<()> {
        let core = self.core();
        let rebooted = self.note_boot(boot).await?;
        let (pod_records, container_records) = core.records();
        let (pods, containers) = blocking("read the records", move || {
            Ok((pod_records.load_all()?, container_records.load_all()?))
        })
        .await?;
        let pods = warn_corrupt(pods);
        let mut by_pod: BTreeMap<PodId, Vec<ContainerRecord>> = BTreeMap::new();
        for record in warn_corrupt(containers) {
            by_pod.entry(record.pod_id).or_default().push(record);
        }
        let mut restored = vec![];
        for record in pods {
            let containers = by_pod.remove(&record.id).unwrap_or_default();
            restored.push(self.restore_pod(record, containers, rebooted));
        }
        let restored = join_all(restored).await;
        // Containers whose pod's record is lost: nothing can be done with them but to remove them.
        for record in by_pod.into_values().flatten() {
            self.remove_orphan(record).await;
        }
        let known: Vec<_> = restored.iter().map(|(pod, _)| pod.id).collect();
        let live: Vec<_> = restored
            .iter()
            .filter(|(pod, _)| {
                let inner = pod.lock();
                inner.networked && inner.monitor.is_some() && inner.pause_pid.is_some()
            })
            .map(|(pod, _)| Arc::clone(pod))
            .collect();
        core.lower.restore_network(live).await;
        core.lower.collect();
        let pods = restored.iter().map(|(pod, _)| Arc::clone(pod)).collect();
        self.close_directories(pods).await?;
        self.sweep(&known).await?;
        for (pod, left) in restored {
            self.finish(pod, left);
        }
        Ok(())
    }

    /// Writes the boot id down. True: it is another one than last time.
    async fn note_boot(&self, boot: &str) -> Result<bool> {
        let (path, boot) = (self.core().root.join("boot-id"), boot.to_owned());
        let pods = self.core().state.join("pods");
        blocking("note the boot id", move || {
            let last = std::fs::read_to_string(&path).unwrap_or_default();
            if last.trim() == boot {
                return Ok(false);
            }
            // Nobody needs it any more; what stays of it is not taken for a pod.
            if let Err(error) = remove_directory(&pods) {
                tracing::warn!(error = %chain(&error), "pod files of another boot stay");
            }
            let line = format!("{boot}\n");
            crate::store::write_atomic(&path, line.as_bytes(), 0o600, Durability::Durable)?;
            Ok(!last.is_empty())
        })
        .await
    }

    async fn restore_pod(
        &self,
        mut record: PodRecord,
        containers: Vec<ContainerRecord>,
        rebooted: bool,
    ) -> (Arc<Pod>, Left) {
        let core = self.core();
        let left = match record.phase {
            PodPhase::Creating => Left::Undo,
            PodPhase::Stopping { .. } => Left::Stop,
            PodPhase::Removing => Left::Remove,
            PodPhase::Ready | PodPhase::Unclean | PodPhase::Stopped => Left::Nothing,
        };
        if rebooted {
            // Processes, cgroups, links and leases are gone with the boot.
            record.networked = false;
            record.pause_pid = None;
            record.ips = vec![];
            if record.phase == PodPhase::Ready {
                record.phase = PodPhase::Unclean;
            }
        }
        core.stamps.at_least(record.created_at);
        core.hold_parents(&record.made_parents);
        let level = core.lower.hold_level_of(&record.labels);
        let pod = Arc::new(record.into_pod());
        pod.lock().level = level;
        let _free = core.pod_names.take(pod.config.metadata.clone(), pod.id);
        for record in containers {
            self.restore_container(record, &pod).await;
        }
        if left != Left::Undo {
            core.pods.insert(pod.id, Arc::clone(&pod));
        }
        let connected = match rebooted {
            true => None,
            false => core.lower.connect(&core.pod_directory(pod.id)).await.ok(),
        };
        match connected {
            Some((monitor, events, state)) => {
                pod.lock().monitor = Some(monitor);
                self.reconcile(&pod, &state).await;
                self.watch(&pod, events);
            }
            None => self.restore_lost(&pod, rebooted).await,
        }
        (pod, left)
    }

    async fn restore_container(&self, mut record: ContainerRecord, pod: &Arc<Pod>) {
        let core = self.core();
        core.stamps.at_least(record.created_at);
        if matches!(record.phase, ContainerPhase::Starting { .. }) {
            record.phase = ContainerPhase::Created;
        }
        core.lower.adopt_hold(&record);
        let key = (pod.id, record.config.name.clone(), record.config.attempt);
        let _free = core.container_names.take(key, record.id);
        let level = core
            .lower
            .hold_level(record.config.security.selinux.as_ref());
        let container = Arc::new(record.into_container(Arc::clone(pod)));
        container.lock().level = level;
        pod.lock()
            .containers
            .insert(container.id, Arc::clone(&container));
        if container.is_listed() {
            core.containers.insert(container.id, container);
        }
    }

    /// The monitor knows better than the records what happened while we were away.
    pub(super) async fn reconcile(&self, pod: &Arc<Pod>, state: &MonitorState) {
        let mut told: BTreeMap<ContainerId, _> =
            state.containers.iter().map(|c| (c.id, c)).collect();
        for container in pod.containers() {
            let snapshot = told.remove(&container.id);
            if !container.phase().alive() || !container.is_listed() {
                continue;
            }
            let Some(snapshot) = snapshot else {
                let why = "its monitor does not know it";
                self.container_lost(&container, why, Ended::Unknown).await;
                continue;
            };
            {
                let mut inner = container.lock();
                inner.pid = snapshot.pid;
                if snapshot.started_at != Timestamp::default() {
                    inner.phase = ContainerPhase::Running;
                    let status = Arc::make_mut(&mut inner.status);
                    status.state = ContainerPhase::Running.shown();
                    status.started_at = snapshot.started_at.max(status.created_at);
                }
                if let Some(exit) = &snapshot.exit {
                    inner.phase = ContainerPhase::Exited;
                    Arc::make_mut(&mut inner.status).state = ContainerPhase::Exited.shown();
                    note_exit(&mut inner, exit);
                }
            }
            if snapshot.exit.is_some() {
                container.ended.send_replace(true);
            }
            if let Err(error) = self.core().record_container(&container).await {
                tracing::error!(container.id = %container.id, error = %chain(&error),
                    "a restored container could not be recorded");
            }
        }
        // Made, but not recorded as made.
        if let Some(monitor) = pod.monitor() {
            for id in told.into_keys() {
                let _gone = self.core().lower.forget(&monitor, id).await.is_ok();
            }
        }
        pod.lock().pause_pid = state.pause_pid;
        if state.pause_pid.is_none() {
            self.pod_died(pod).await;
        }
    }

    /// There is no monitor: whatever it ran is killed, its end is unknown.
    async fn restore_lost(&self, pod: &Arc<Pod>, rebooted: bool) {
        if !rebooted && let Err(error) = self.kill_cgroups(pod).await {
            tracing::error!(pod.id = %pod.id, error = %chain(&error),
                "processes of a lost pod could not be killed");
        }
        let why = match rebooted {
            true => "the node rebooted",
            false => "the pod's monitor was gone when berth came back",
        };
        for container in pod.containers() {
            self.container_orphaned(&container, why).await;
        }
        self.pod_died(pod).await;
        if let Err(error) = self.core().record_pod(pod).await {
            tracing::error!(pod.id = %pod.id, error = %chain(&error),
                "a restored pod could not be recorded");
        }
    }

    async fn remove_orphan(&self, record: ContainerRecord) {
        tracing::warn!(container.id = %record.id, pod.id = %record.pod_id,
            "removing a container whose pod has no record");
        let lost = PodRecord {
            id: record.pod_id,
            phase: PodPhase::Unclean,
            config: crate::base::pod::PodConfig::default(),
            runtime_handler: String::new(),
            handler: crate::base::handler::Handler::default(),
            cgroup_parent: String::new(),
            made_parents: vec![],
            created_at: record.created_at,
            ips: vec![],
            networked: false,
            pause_pid: None,
            labels: SelinuxLabels::default(),
        };
        let container = Arc::new(record.into_container(Arc::new(lost.into_pod())));
        let mut clean_up = CleanUp::default();
        self.erase(&container, &mut clean_up).await;
        if let Err(error) = clean_up.finish("container", container.id) {
            tracing::error!(error = %chain(&error), "an orphan could not be removed");
        }
    }

    /// Takes away what older versions gave everybody: to pass through the directories of pods and containers.
    async fn close_directories(&self, pods: Vec<Arc<Pod>>) -> Result<()> {
        let engine = self.clone();
        blocking("close the directories of pods", move || {
            let core = engine.core();
            let mut outcomes = vec![];
            for pod in pods {
                let own = core.pod_directory(pod.id);
                if own.is_dir() {
                    outcomes.push(make_pod_directory(&own, &pod));
                }
                for container in pod.containers() {
                    let own = core.container_directory(container.id);
                    if own.is_dir() {
                        let closed = store::directory(&own, CLOSED);
                        outcomes.push(closed.map_err(EngineError::from));
                    }
                }
            }
            for error in outcomes.into_iter().filter_map(Result::err) {
                tracing::warn!(error = %chain(&error), "a directory stays open to the users of the node");
            }
            Ok(())
        })
        .await
    }

    /// Removes directories that no record speaks of, and the trash.
    async fn sweep(&self, known: &[PodId]) -> Result<()> {
        let core = self.core();
        let pods = core.state.join("pods");
        let candidates = pods.clone();
        let strays = blocking("look for stray pods", move || {
            store::directory(&candidates, PASSED)?;
            Ok(names_in::<PodId>(&candidates))
        })
        .await?;
        for stray in strays.into_iter().filter(|id| !known.contains(id)) {
            tracing::warn!(pod.id = %stray, "removing a pod that has no record");
            let directory = pods.join(stray.to_string());
            if let Ok((monitor, _events, _state)) = core.lower.connect(&directory).await {
                let _stopped = core.lower.stop_monitor(&monitor).await.is_ok();
                let _ended = core.lower.end_monitor(&monitor).await.is_ok();
            }
            let removed = blocking("remove a stray pod", move || remove_directory(&directory));
            if let Err(error) = removed.await {
                tracing::warn!(pod.id = %stray, error = %chain(&error), "files of a stray pod stay");
            }
        }
        let layers = core.root.join("containers");
        let strays = blocking("look for stray layers", move || {
            Ok(names_in::<ContainerId>(&layers))
        })
        .await?;
        let live: Vec<_> = core
            .pods
            .all()
            .iter()
            .flat_map(|pod| pod.containers())
            .collect();
        for stray in strays {
            if live.iter().all(|container| container.id != stray) {
                let (from, trash) = (core.container_directory(stray), Arc::clone(&core.trash));
                let taken = blocking("remove a stray layer", move || Ok(trash.take(&from)?));
                if let Err(error) = taken.await {
                    tracing::warn!(container.id = %stray, error = %chain(&error),
                        "a stray writable layer stays");
                }
            }
        }
        self.empty_trash();
        Ok(())
    }

    /// Goes on, in the background, with what a crash has interrupted.
    fn finish(&self, pod: Arc<Pod>, left: Left) {
        let engine = self.clone();
        let _goes_on = self.core().tasks.spawn(async move {
            let _turn = pod.lane.turn().await;
            let mut clean_up = CleanUp::default();
            if left == Left::Undo {
                engine.halt_pod(&pod, &mut clean_up).await;
            }
            for container in pod.containers() {
                match container.phase() {
                    phase if phase == ContainerPhase::Removing || left == Left::Undo => {
                        clean_up.note("container", engine.remove_in_task(container).await);
                    }
                    ContainerPhase::Creating { .. } => {
                        let _turn = container.lane.turn().await;
                        let mut undo = CleanUp::default();
                        engine.erase(&container, &mut undo).await;
                        let key = (
                            pod.id,
                            container.config.name.clone(),
                            container.config.attempt,
                        );
                        engine.core().container_names.release(&key, container.id);
                        pod.lock().containers.remove(&container.id);
                        clean_up.note("container", undo.finish("container", container.id));
                    }
                    _ => {}
                }
            }
            match left {
                Left::Nothing => {}
                Left::Undo => {
                    engine.erase_pod(&pod, &mut clean_up).await;
                    let core = engine.core();
                    core.pod_names.release(&pod.config.metadata, pod.id);
                }
                Left::Stop => clean_up.note("stop", engine.stop_in_turn(&pod).await),
                Left::Remove => clean_up.note("remove", engine.remove_in_turn(&pod).await),
            }
            if let Err(error) = clean_up.finish("pod sandbox", pod.id) {
                tracing::error!(error = %chain(&error), "interrupted work could not be finished");
            }
        });
    }
}

fn warn_corrupt<T>(loaded: Loaded<T>) -> impl Iterator<Item = T> {
    for (path, why) in &loaded.corrupt {
        tracing::error!(path = %path.display(), error = %why, "a corrupt record was set aside");
    }
    loaded.records.into_iter().map(|(_, record)| record)
}

/// The entries of a directory that are ids.
fn names_in<I: std::str::FromStr>(directory: &Path) -> Vec<I> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect()
}

/// The id of this boot.
///
/// # Errors
/// [`EngineError::Step`]: /proc is not there.
pub(crate) fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path)
        .map(|id| id.trim().to_owned())
        .map_err(EngineError::io(format!("read {path}")))
}

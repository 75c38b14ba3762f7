//! What NRI plugins are told of pods and containers, and what they change.
//!
//! ```text
//! pod        netns, pause -> RunPodSandbox -> listed ...  containers dead -> StopPodSandbox -> network, pause gone
//!                                                         -> RemovePodSandbox -> files, record gone
//! container  designed -> CreateContainer -> designed again with the edits -> made, listed -> PostCreateContainer
//!            StartContainer -> exec -> PostStartContainer ...  dead -> StopContainer ... -> RemoveContainer
//! ```
//! Each event comes once ([`Told`]), in the order of the object's lane. Without plugins a round is a lock and a mark.

use std::sync::{Arc, Weak};

use crate::base::container::Resources;
use crate::base::edits::Edits;
use crate::base::error::chain;
use crate::base::id::ContainerId;
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::core::{Core, blocking, blocking_step};
use crate::engine::error::{EngineError, Result};
use crate::engine::pod::Pod;
use crate::engine::state::{ContainerPhase, PodPhase};
use crate::nri::{
    ContainerEvent, ContainerFacts, Eviction, Node, PodEvent, PodFacts, Round, Update, Work,
};
use crate::runtime::spec::{block_io, resources::check_floor};

/// Seconds that an evicted container gets to end by itself.
const EVICTION_GRACE_S: i64 = 30;

/// What plugins know of a pod or container, or would know if there were any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Told {
    /// Nothing.
    #[default]
    Nothing,
    /// That it is being made; plugins that join from now on get it as part of the state.
    Made,
    /// That it has ended.
    Stopped,
    /// That it goes.
    Removed,
}

impl Told {
    /// What a pod restored in this phase counts as.
    pub(crate) const fn of_pod(phase: PodPhase) -> Self {
        match phase {
            PodPhase::Creating => Self::Nothing,
            PodPhase::Ready | PodPhase::Stopping { .. } | PodPhase::Unclean => Self::Made,
            PodPhase::Stopped => Self::Stopped,
            PodPhase::Removing => Self::Removed,
        }
    }

    /// What a container restored in this phase counts as.
    pub(crate) const fn of_container(phase: ContainerPhase) -> Self {
        match phase {
            ContainerPhase::Creating { .. } => Self::Nothing,
            ContainerPhase::Created | ContainerPhase::Starting { .. } | ContainerPhase::Running => {
                Self::Made
            }
            ContainerPhase::Exited => Self::Stopped,
            ContainerPhase::Removing => Self::Removed,
        }
    }

    /// Moves on to `next`, unless it is there already or never began.
    fn advance(&mut self, next: Self) -> bool {
        let moves = *self != Self::Nothing && *self < next;
        if moves {
            *self = next;
        }
        moves
    }
}

fn pod_facts(pod: &Pod) -> PodFacts {
    let (status, pid) = {
        let inner = pod.lock();
        (Arc::clone(&inner.status), inner.pause_pid.unwrap_or(0))
    };
    PodFacts {
        status,
        config: pod.config_now(),
        cgroup_parent: pod.cgroup_parent.clone(),
        cgroup: pod.pause_cgroup(),
        pid,
    }
}

async fn container_facts(core: &Core, container: &Container) -> ContainerFacts {
    let path = core
        .pod_directory(container.pod.id)
        .join(format!("{}.json", container.id));
    let read = blocking("read an OCI spec", move || {
        let bytes = std::fs::read(path).unwrap_or_default();
        Ok(serde_json::from_slice(&bytes).unwrap_or_default())
    });
    let spec = read.await.unwrap_or_default();
    facts_with(container, spec)
}

fn facts_with(container: &Container, spec: serde_json::Value) -> ContainerFacts {
    let status = container.status();
    let defaults = &container.pod.handler.defaults;
    ContainerFacts {
        resources: status.resources.clone(),
        status,
        seccomp: defaults.seccomp_of(&container.config.security).cloned(),
        config: container.config.clone(),
        pid: container.pid(),
        spec,
    }
}

impl Engine {
    /// Asks the plugins whether a pod may be.
    ///
    /// # Errors
    /// [`EngineError::Step`]: one of them refuses; those asked before it know that the pod goes.
    pub(super) async fn plugins_run_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let round = self.core().nri.round().await;
        pod.lock().told = Told::Made;
        if round.is_idle() {
            return Ok(());
        }
        let outcome = Box::pin(round.run_pod(&pod_facts(pod))).await;
        if outcome.is_err() {
            pod.lock().told = Told::Nothing;
        }
        outcome.map_err(EngineError::step("run the pod sandbox"))
    }

    /// Tells the plugins that a pod ends: its containers are dead, its network is still there.
    pub(super) async fn plugins_stop_pod(&self, pod: &Arc<Pod>) {
        let round = self.core().nri.round().await;
        let told = pod.lock().told.advance(Told::Stopped);
        if told && !round.is_idle() {
            Box::pin(round.pod(PodEvent::Stop, &pod_facts(pod))).await;
        }
    }

    /// Tells the plugins that a pod goes.
    pub(super) async fn plugins_remove_pod(&self, pod: &Arc<Pod>) {
        let round = self.core().nri.round().await;
        let told = pod.lock().told.advance(Told::Removed);
        if told && !round.is_idle() {
            Box::pin(round.pod(PodEvent::Remove, &pod_facts(pod))).await;
        }
    }

    /// Asks the plugins whether a pod's resources may change.
    ///
    /// # Errors
    /// [`EngineError::Step`]: one of them refuses.
    pub(super) async fn plugins_update_pod(
        &self,
        pod: &Arc<Pod>,
        overhead: &Resources,
        wanted: &Resources,
    ) -> Result<()> {
        let round = self.core().nri.round().await;
        if round.is_idle() {
            return Ok(());
        }
        let outcome = Box::pin(round.update_pod(&pod_facts(pod), overhead, wanted)).await;
        outcome.map_err(EngineError::step("update the pod's resources"))
    }

    /// Tells the plugins that a pod's resources have changed.
    pub(super) async fn plugins_updated_pod(&self, pod: &Arc<Pod>) {
        let round = self.core().nri.round().await;
        if !round.is_idle() {
            Box::pin(round.pod(PodEvent::PostUpdate, &pod_facts(pod))).await;
        }
    }

    /// Asks the plugins what a container is to be like. `spec`: what it is without them.
    ///
    /// # Errors
    /// [`EngineError::Step`]: one refuses, two disagree, or another container cannot be changed as one wants.
    pub(super) async fn plugins_create(
        &self,
        container: &Arc<Container>,
        spec: serde_json::Value,
    ) -> Result<Vec<Edits>> {
        let facts = facts_with(container, spec);
        let made = {
            let round = self.core().nri.round().await;
            container.lock().told = Told::Made;
            if round.is_idle() {
                return Ok(vec![]);
            }
            let made = Box::pin(round.create(&pod_facts(&container.pod), &facts)).await;
            if made.is_err() {
                container.lock().told = Told::Nothing;
            }
            made.map_err(EngineError::step("adjust the container"))?
        };
        Box::pin(self.follow(made.updates, made.evictions)).await?;
        Ok(made.edits)
    }

    /// Marks a container as known if there is nobody to ask. False: there is.
    pub(super) fn plugins_idle(&self, container: &Container) -> bool {
        self.core()
            .nri
            .if_idle(|| container.lock().told = Told::Made)
    }

    /// Asks the plugins whether a container may start.
    ///
    /// # Errors
    /// [`EngineError::Step`]: one refuses.
    pub(super) async fn plugins_start(&self, container: &Arc<Container>) -> Result<()> {
        let Some((round, facts)) = self.told(container).await else {
            return Ok(());
        };
        Box::pin(round.start(&pod_facts(&container.pod), &facts))
            .await
            .map_err(EngineError::step("start the container"))
    }

    /// Tells the plugins of an event that nobody can refuse.
    pub(super) async fn plugins_event(&self, event: ContainerEvent, container: &Arc<Container>) {
        if let Some((round, facts)) = self.told(container).await {
            Box::pin(round.container(event, &pod_facts(&container.pod), &facts)).await;
        }
    }

    /// A round about a container that plugins know, if there are any.
    async fn told(&self, container: &Arc<Container>) -> Option<(Round<'_>, ContainerFacts)> {
        let round = self.core().nri.round().await;
        if round.is_idle() || container.lock().told == Told::Nothing {
            return None;
        }
        let facts = container_facts(self.core(), container).await;
        Some((round, facts))
    }

    /// Tells the plugins that a container has ended; the caller has its turn.
    pub(super) async fn plugins_stop(&self, container: &Arc<Container>) {
        let updates = {
            let round = self.core().nri.round().await;
            let told = container.lock().told.advance(Told::Stopped);
            if !told || round.is_idle() {
                return;
            }
            let facts = container_facts(self.core(), container).await;
            Box::pin(round.stop(&pod_facts(&container.pod), &facts)).await
        };
        if let Err(error) = Box::pin(self.follow(updates, vec![])).await {
            tracing::warn!(error = chain(&error), "a plugin's update failed");
        }
    }

    /// Whether nobody is to be told that a pod stops. Then it counts as stopped from now on: a plugin that joins while its
    /// processes end hears nothing of their end.
    pub(super) async fn plugins_none_to_tell_of_stop(&self, pod: &Arc<Pod>) -> bool {
        let round = self.core().nri.round().await;
        if !round.is_idle() {
            return false;
        }
        for container in pod.containers() {
            let _new = container.lock().told.advance(Told::Stopped);
        }
        let _new = pod.lock().told.advance(Told::Stopped);
        true
    }

    /// Tells the plugins, in the container's turn, that it has ended, if it has.
    pub(super) async fn plugins_ended(&self, container: &Arc<Container>) {
        let _turn = container.lane.turn().await;
        if container.phase() == ContainerPhase::Exited {
            self.plugins_stop(container).await;
        }
    }

    /// Tells the plugins that a container goes; the caller has its turn.
    pub(super) async fn plugins_remove(&self, container: &Arc<Container>) {
        self.plugins_stop(container).await;
        let round = self.core().nri.round().await;
        let told = container.lock().told.advance(Told::Removed);
        if told && !round.is_idle() {
            let facts = container_facts(self.core(), container).await;
            let pod = pod_facts(&container.pod);
            Box::pin(round.container(ContainerEvent::Remove, &pod, &facts)).await;
        }
    }

    /// Asks the plugins what the limits of a container are to be.
    ///
    /// # Errors
    /// [`EngineError::Step`]: one refuses, or another container cannot be changed as one wants.
    pub(super) async fn plugins_update(
        &self,
        container: &Arc<Container>,
        wanted: Resources,
    ) -> Result<Resources> {
        let updated = {
            let Some((round, facts)) = self.told(container).await else {
                return Ok(wanted);
            };
            let pod = pod_facts(&container.pod);
            let updated = Box::pin(round.update(&pod, &facts, &wanted)).await;
            updated.map_err(EngineError::step("update the container's limits"))?
        };
        Box::pin(self.follow(updated.updates, updated.evictions)).await?;
        Ok(updated.resources)
    }

    /// Does to other containers what plugins ask for.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the first update that failed where that matters.
    async fn follow(&self, updates: Vec<Update>, evictions: Vec<Eviction>) -> Result<()> {
        for eviction in evictions {
            self.evict(eviction);
        }
        let mut first = Ok(());
        for update in updates {
            let (ignored, what) = (update.ignore_failure, update.id.clone());
            let by = update.by.clone();
            if let Err(error) = self.update_for_plugin(update).await {
                tracing::warn!(
                    plugin = by,
                    container.id = what,
                    error = chain(&error),
                    "a plugin's update failed"
                );
                if !ignored && first.is_ok() {
                    first = Err(error);
                }
            }
        }
        first
    }

    /// Changes the limits of a container. Beside its lane: whoever asks may hold another's.
    async fn update_for_plugin(&self, update: Update) -> Result<()> {
        let missing = || EngineError::no_container(&update.id);
        let id: ContainerId = update.id.parse().map_err(|_malformed| missing())?;
        let container = self.core().containers.get(id).ok_or_else(missing)?;
        if let Some((field, value)) = update.impossible.into_iter().next() {
            return Err(EngineError::Invalid {
                field: "NRI update",
                value: format!("{field}: {value}"),
                mend: "berth cannot change it once a container runs: leave it out".to_owned(),
            });
        }
        self.apply_limits(&container, update.resources).await
    }

    /// Writes limits and notes what is in force.
    ///
    /// # Errors
    /// [`EngineError::State`], [`EngineError::Step`], [`EngineError::Store`].
    pub(super) async fn apply_limits(
        &self,
        container: &Arc<Container>,
        wanted: Resources,
    ) -> Result<()> {
        let core = self.core();
        let _turn = container.limits_lane.turn().await;
        match container.phase() {
            ContainerPhase::Created | ContainerPhase::Running | ContainerPhase::Starting { .. } => {
            }
            other => {
                let state = other.adjective();
                let source = crate::engine::state::Refused { state };
                return Err(crate::engine::container_start::state_error(
                    "update", container, source,
                ));
            }
        }
        check_floor(&wanted, &container.pod.handler)
            .map_err(EngineError::step("update the container's limits"))?;
        let (cgroups, path) = (core.lower.cgroups.clone(), container.cgroup());
        let mut wanted = self.with_block_io(wanted).await?;
        if wanted.oom_score_adj != 0 {
            // As when a container is made: no lower than we may.
            let lowest = i64::from(core.lower.host.min_oom_score_adj);
            wanted.oom_score_adj = wanted.oom_score_adj.max(lowest);
        }
        let mut limits = wanted.clone();
        if let (Some(new), Some(old)) =
            (&mut limits.block_io, &container.status().resources.block_io)
        {
            *new = new.after(old);
        }
        blocking_step("update the container's limits", move || {
            cgroups.update(&path, &limits)?;
            match limits.oom_score_adj {
                0 => Ok(()),
                score => cgroups.set_oom_score_adj(&path, score),
            }
        })
        .await?;
        {
            let mut inner = container.lock();
            let status = Arc::make_mut(&mut inner.status);
            status.resources = status.resources.with(&wanted);
        }
        core.record_container(container).await
    }

    /// These limits with those of the block I/O class that they name.
    ///
    /// # Errors
    /// [`EngineError::Step`]: there is no such class.
    async fn with_block_io(&self, mut wanted: Resources) -> Result<Resources> {
        let Some(class) = wanted.blockio_class.clone() else {
            return Ok(wanted);
        };
        let file = self.core().lower.block_io_classes.clone();
        let found = blocking_step("update the container's limits", move || {
            block_io::limits("NRI update", &class, &file)
        });
        wanted.block_io = Some(found.await?);
        Ok(wanted)
    }

    fn evict(&self, eviction: Eviction) {
        let Eviction { by, id, reason } = eviction;
        tracing::warn!(
            plugin = by,
            container.id = id,
            reason,
            "a plugin evicts a container"
        );
        let engine = self.clone();
        let _stops = self.core().tasks.spawn(async move {
            if let Err(error) = engine.stop(&id, EVICTION_GRACE_S).await {
                tracing::warn!(
                    plugin = by,
                    container.id = id,
                    error = chain(&error),
                    "an eviction failed"
                );
            }
        });
    }

    /// The cgroup that a plugin has chosen: it must not exist yet, or the removal would take what is others'.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub(super) async fn move_cgroup(&self, container: &Arc<Container>, path: &str) -> Result<()> {
        let core = self.core();
        let invalid = |mend: &str| EngineError::Invalid {
            field: "NRI adjustment linux.cgroups_path",
            value: path.to_owned(),
            mend: mend.to_owned(),
        };
        let plain = path.starts_with('/') && !path.contains([':', '\0', '\n']);
        let steps = path.split('/').skip(1);
        if !plain || steps.clone().any(|step| matches!(step, "" | "." | "..")) {
            return Err(invalid("write it as /parent/name"));
        }
        let dirs = core.lower.cgroups.dirs(path);
        let dirs = dirs.map_err(EngineError::step("NRI adjustment linux.cgroups_path"))?;
        if dirs.kill.exists() {
            return Err(invalid("it exists: name a new one"));
        }
        if let Some((parent, _)) = path
            .rsplit_once('/')
            .filter(|(parent, _)| !parent.is_empty())
        {
            let missing = core.missing_parents(parent)?;
            container.pod.lock().made_parents.extend(missing);
            core.record_pod(&container.pod).await?;
        }
        path.clone_into(&mut container.lock().cgroup);
        core.record_container(container).await
    }
}

/// The engine as plugins reach it. Weak: the plugins do not keep it alive.
#[derive(Debug)]
pub(super) struct PluginNode(Weak<Core>);

impl PluginNode {
    /// Of this engine.
    pub(super) fn new(engine: &Engine) -> Self {
        Self(Arc::downgrade(&engine.0))
    }

    fn engine(&self) -> Option<Engine> {
        self.0.upgrade().map(Engine)
    }
}

impl Node for PluginNode {
    fn snapshot(&self) -> Work<'_, (Vec<PodFacts>, Vec<ContainerFacts>)> {
        Box::pin(async {
            let Some(engine) = self.engine() else {
                return (vec![], vec![]);
            };
            let core = engine.core();
            let mut all = core.pods.all();
            all.extend(core.arriving.all());
            all.sort_by_key(|pod| pod.id);
            all.dedup_by_key(|pod| pod.id);
            let (mut pods, mut containers) = (vec![], vec![]);
            for pod in all {
                if matches!(pod.lock().told, Told::Made | Told::Stopped) {
                    pods.push(pod_facts(&pod));
                }
                for container in pod.containers() {
                    if container.lock().told == Told::Made {
                        containers.push(container_facts(core, &container).await);
                    }
                }
            }
            (pods, containers)
        })
    }

    fn update(&self, update: Update) -> Work<'_, std::result::Result<(), String>> {
        Box::pin(async move {
            let engine = self.engine().ok_or("berth is shutting down")?;
            let outcome = engine.update_for_plugin(update).await;
            outcome.map_err(|error| chain(&error))
        })
    }

    fn evict(&self, id: String, by: String, reason: String) {
        if let Some(engine) = self.engine() {
            engine.evict(Eviction { by, id, reason });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_once_and_none_without_a_beginning() {
        let mut told = Told::Nothing;
        assert!(!told.advance(Told::Stopped) && !told.advance(Told::Removed));
        told = Told::Made;
        assert!(told.advance(Told::Stopped));
        assert!(!told.advance(Told::Stopped));
        assert!(told.advance(Told::Removed));
        assert!(!told.advance(Told::Stopped) && !told.advance(Told::Removed));
    }
}

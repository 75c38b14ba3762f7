//! One request to all plugins, in the order of their indices.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::MutexGuard;

use crate::base::container::Resources;
use crate::base::edits::Edits;
use crate::base::error::chain;
use crate::nri::adjust::Adjusted;
use crate::nri::error::{NriError, PluginText};
use crate::nri::owners::Owners;
use crate::nri::plugin::{Event, Plugin};
use crate::nri::proto::api;
use crate::nri::{ContainerFacts, Eviction, NriConfig, PodFacts, Update, resources, view};

const VALIDATE: Event = Event::ValidateContainerAdjustment;

/// A request in the works: no other is, and no plugin joins.
pub(crate) struct Round<'a> {
    config: &'a NriConfig,
    plugins: MutexGuard<'a, Vec<Arc<Plugin>>>,
}

impl std::fmt::Debug for Round<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Round")
            .field("plugins", &self.plugins.len())
            .finish_non_exhaustive()
    }
}

/// Events of a pod whose failure is only logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PodEvent {
    /// Its resources were changed.
    PostUpdate,
    /// Its containers have ended, its processes and network are still there.
    Stop,
    /// It goes.
    Remove,
}

/// Events of a container whose failure is only logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ContainerEvent {
    /// It is made.
    PostCreate,
    /// It runs.
    PostStart,
    /// Its limits were changed.
    PostUpdate,
    /// It goes.
    Remove,
}

/// What plugins answer to CreateContainer.
#[derive(Debug, Default)]
pub(crate) struct Created {
    /// Changes to the container, plugin by plugin.
    pub(crate) edits: Vec<Edits>,
    /// Limits of others.
    pub(crate) updates: Vec<Update>,
    /// Others that are to end.
    pub(crate) evictions: Vec<Eviction>,
}

/// What plugins answer to UpdateContainer.
#[derive(Debug)]
pub(crate) struct Updated {
    /// The limits of this container, as asked for and with those of the plugins over them.
    pub(crate) resources: Resources,
    /// Limits of others.
    pub(crate) updates: Vec<Update>,
    /// Others that are to end.
    pub(crate) evictions: Vec<Eviction>,
}

/// Updates of several plugins, without conflicts.
#[derive(Default)]
struct Updates {
    owners: Owners,
    all: Vec<Update>,
    /// The same, one for each container, as validating plugins see them.
    merged: BTreeMap<String, api::ContainerUpdate>,
}

impl Updates {
    fn take(&mut self, plugin: &str, given: &[api::ContainerUpdate]) -> Result<(), NriError> {
        for update in given {
            let id = &update.container_id;
            let shown = self.merged.get(id).cloned();
            let mut shown = shown.unwrap_or_else(|| api::ContainerUpdate {
                container_id: id.clone(),
                ignore_failure: true,
                ..api::ContainerUpdate::default()
            });
            let linux = update.linux.as_ref();
            if let Some(limits) = linux.and_then(|linux| linux.resources.as_ref()) {
                let into = shown.linux.get_or_insert_default();
                let into = into.resources.get_or_insert_default();
                match resources::merge(&mut self.owners, id, plugin, limits, into) {
                    Err(conflict) if update.ignore_failure => {
                        tracing::warn!(plugin, %conflict, "an update is left out");
                        continue;
                    }
                    merged => merged?,
                }
            }
            // It may fail only where nobody minds.
            shown.ignore_failure &= update.ignore_failure;
            self.merged.insert(id.clone(), shown);
            self.all.push(Update::new(plugin, update));
        }
        Ok(())
    }
}

fn evictions(plugin: &str, given: Vec<api::ContainerEviction>) -> Vec<Eviction> {
    let one = |given: api::ContainerEviction| Eviction {
        by: plugin.to_owned(),
        id: given.container_id,
        reason: given.reason,
    };
    given.into_iter().map(one).collect()
}

fn event_of(pod: &PodFacts, container: &ContainerFacts) -> api::ContainerEvent {
    api::ContainerEvent {
        pod: Some(view::pod(pod)),
        container: Some(view::container(container)),
    }
}

impl<'a> Round<'a> {
    pub(super) fn new(config: &'a NriConfig, plugins: MutexGuard<'a, Vec<Arc<Plugin>>>) -> Self {
        Self { config, plugins }
    }

    /// There is nobody to ask.
    pub(crate) fn is_idle(&self) -> bool {
        self.plugins.is_empty() && self.config.validator.is_none()
    }

    /// Runs `mark` if there is nobody to ask; was it?
    pub(super) fn is_idle_then(&self, mark: impl FnOnce()) -> bool {
        let idle = self.is_idle();
        if idle {
            mark();
        }
        idle
    }

    /// A pod is being made: its network and pause are there, nobody else sees it.
    ///
    /// # Errors
    /// [`NriError::Refused`]: the pod is not to be; the plugins that had agreed know that it goes.
    pub(crate) async fn run_pod(&self, pod: &PodFacts) -> Result<(), NriError> {
        let request = api::PodEvent {
            pod: Some(view::pod(pod)),
        };
        for (number, plugin) in self.plugins.iter().enumerate() {
            let told = plugin
                .tell::<api::Empty>(Event::RunPodSandbox, &request)
                .await;
            if let Err(error) = told {
                for before in &self.plugins[..number] {
                    for event in [Event::StopPodSandbox, Event::RemovePodSandbox] {
                        log(before.tell::<api::Empty>(event, &request).await);
                    }
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// An event of a pod.
    pub(crate) async fn pod(&self, event: PodEvent, pod: &PodFacts) {
        let request = api::PodEvent {
            pod: Some(view::pod(pod)),
        };
        let event = match event {
            PodEvent::PostUpdate => Event::PostUpdatePodSandbox,
            PodEvent::Stop => Event::StopPodSandbox,
            PodEvent::Remove => Event::RemovePodSandbox,
        };
        for plugin in self.plugins.iter() {
            log(plugin.tell::<api::Empty>(event, &request).await);
        }
    }

    /// The resources of a pod are about to change.
    ///
    /// # Errors
    /// [`NriError::Refused`]: they are not to change.
    pub(crate) async fn update_pod(
        &self,
        pod: &PodFacts,
        overhead: &Resources,
        wanted: &Resources,
    ) -> Result<(), NriError> {
        let request = api::UpdatePodSandboxRequest {
            pod: Some(view::pod(pod)),
            overhead_linux_resources: Some(resources::to_proto(overhead)),
            linux_resources: Some(resources::to_proto(wanted)),
        };
        for plugin in self.plugins.iter() {
            plugin
                .tell::<api::Empty>(Event::UpdatePodSandbox, &request)
                .await?;
        }
        Ok(())
    }

    /// A container is designed; nothing of it exists.
    ///
    /// # Errors
    /// [`NriError`]: a plugin refuses it, two disagree, or the result is not allowed; the plugins that had agreed know
    /// that it goes.
    pub(crate) async fn create(
        &self,
        pod: &PodFacts,
        container: &ContainerFacts,
    ) -> Result<Created, NriError> {
        let first = event_of(pod, container);
        let mut agreed = 0;
        let created = Box::pin(self.create_with(first.clone(), &mut agreed)).await;
        if created.is_err() {
            for plugin in &self.plugins[..agreed] {
                let event = Event::StopContainer;
                log(plugin
                    .tell::<api::StopContainerResponse>(event, &first)
                    .await);
                log(plugin
                    .tell::<api::Empty>(Event::RemoveContainer, &first)
                    .await);
            }
        }
        created
    }

    /// `agreed`: how many plugins have.
    async fn create_with(
        &self,
        first: api::ContainerEvent,
        agreed: &mut usize,
    ) -> Result<Created, NriError> {
        let own = first.container.clone().unwrap_or_default().id;
        let mut adjusted = Adjusted::new(first.container.clone().unwrap_or_default());
        // Who is closed from here on cannot agree any more.
        let validators: Vec<_> = self
            .plugins
            .iter()
            .filter(|one| one.wants(VALIDATE))
            .collect();
        let (mut updates, mut evicted) = (Updates::default(), vec![]);
        for plugin in self.plugins.iter() {
            let request = api::ContainerEvent {
                pod: first.pod.clone(),
                container: Some(adjusted.container.clone()),
            };
            let answer =
                plugin.tell::<api::CreateContainerResponse>(Event::CreateContainer, &request);
            let answer = answer.await?;
            *agreed += 1;
            let Some(answer) = answer else { continue };
            let name = plugin.identity.to_string();
            if let Some(given) = answer.adjust {
                adjusted.take(&mut updates.owners, &name, given)?;
            }
            if let Some(update) = answer
                .update
                .iter()
                .find(|update| update.container_id == own)
            {
                return Err(NriError::Invalid {
                    plugin: name,
                    field: "update.container_id".to_owned(),
                    value: update.container_id.clone(),
                    problem: "is the container being made: adjust it instead",
                });
            }
            updates.take(&name, &answer.update)?;
            evicted.extend(evictions(&name, answer.evict));
        }
        self.validate(first, &validators, &adjusted, &updates)
            .await?;
        Ok(Created {
            edits: adjusted.edits,
            updates: updates.all,
            evictions: evicted,
        })
    }

    async fn validate(
        &self,
        first: api::ContainerEvent,
        validators: &[&Arc<Plugin>],
        adjusted: &Adjusted,
        updates: &Updates,
    ) -> Result<(), NriError> {
        if self.config.validator.is_none() && validators.is_empty() {
            return Ok(());
        }
        let plugins = self.plugins.iter().map(|plugin| api::PluginInstance {
            name: plugin.identity.name.clone(),
            index: plugin.identity.index.clone(),
        });
        let request = api::ValidateContainerAdjustmentRequest {
            pod: first.pod,
            container: first.container,
            adjust: Some(adjusted.merged.clone()),
            update: updates.merged.values().cloned().collect(),
            owners: Some(updates.owners.to_proto()),
            plugins: plugins.collect(),
        };
        if let Some(validator) = &self.config.validator {
            validator.check(&request, &updates.owners)?;
        }
        for plugin in validators {
            let answer =
                plugin.tell::<api::ValidateContainerAdjustmentResponse>(VALIDATE, &request);
            let refused = |text: String| NriError::Refused {
                plugin: plugin.identity.to_string(),
                event: VALIDATE.name(),
                source: PluginText(text),
            };
            match answer.await? {
                // Who cannot be asked has not agreed.
                None => return Err(refused("it does not answer".to_owned())),
                Some(answer) if answer.reject => return Err(refused(answer.reason)),
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// A container is about to start.
    ///
    /// # Errors
    /// [`NriError::Refused`]: it is not to start.
    pub(crate) async fn start(
        &self,
        pod: &PodFacts,
        container: &ContainerFacts,
    ) -> Result<(), NriError> {
        let request = event_of(pod, container);
        for plugin in self.plugins.iter() {
            plugin
                .tell::<api::Empty>(Event::StartContainer, &request)
                .await?;
        }
        Ok(())
    }

    /// An event of a container.
    pub(crate) async fn container(
        &self,
        event: ContainerEvent,
        pod: &PodFacts,
        container: &ContainerFacts,
    ) {
        let request = event_of(pod, container);
        let event = match event {
            ContainerEvent::PostCreate => Event::PostCreateContainer,
            ContainerEvent::PostStart => Event::PostStartContainer,
            ContainerEvent::PostUpdate => Event::PostUpdateContainer,
            ContainerEvent::Remove => Event::RemoveContainer,
        };
        for plugin in self.plugins.iter() {
            log(plugin.tell::<api::Empty>(event, &request).await);
        }
    }

    /// A container's limits are about to change.
    ///
    /// # Errors
    /// [`NriError`]: a plugin refuses, two disagree, or one asks for what cannot be.
    pub(crate) async fn update(
        &self,
        pod: &PodFacts,
        container: &ContainerFacts,
        wanted: &Resources,
    ) -> Result<Updated, NriError> {
        let (mut updates, mut evicted) = (Updates::default(), vec![]);
        let mut resources = wanted.clone();
        let own = container.status.id.to_string();
        for plugin in self.plugins.iter() {
            let request = api::UpdateContainerRequest {
                pod: Some(view::pod(pod)),
                container: Some(view::container(container)),
                linux_resources: Some(resources::to_proto(&resources)),
            };
            let answer =
                plugin.tell::<api::UpdateContainerResponse>(Event::UpdateContainer, &request);
            let Some(answer) = answer.await? else {
                continue;
            };
            let name = plugin.identity.to_string();
            updates.take(&name, &answer.update)?;
            evicted.extend(evictions(&name, answer.evict));
            let (mine, others) = updates.all.into_iter().partition(|update| update.id == own);
            updates.all = others;
            let mine: Vec<Update> = mine;
            for update in mine {
                match update.impossible.into_iter().next() {
                    Some((field, value)) if !update.ignore_failure => {
                        return Err(NriError::Invalid {
                            plugin: name,
                            field,
                            value,
                            problem: "cannot be changed by berth once a container runs",
                        });
                    }
                    _ => resources = resources.with(&update.resources),
                }
            }
        }
        Ok(Updated {
            resources,
            updates: updates.all,
            evictions: evicted,
        })
    }

    /// A container has ended. Limits of others that change for it.
    pub(crate) async fn stop(&self, pod: &PodFacts, container: &ContainerFacts) -> Vec<Update> {
        let request = event_of(pod, container);
        let mut updates = Updates::default();
        for plugin in self.plugins.iter() {
            let answer = plugin.tell::<api::StopContainerResponse>(Event::StopContainer, &request);
            match answer.await {
                Ok(Some(answer)) => {
                    let name = plugin.identity.to_string();
                    log(updates.take(&name, &answer.update).map(Some));
                }
                other => log(other),
            }
        }
        updates.all
    }
}

fn log<T>(outcome: Result<Option<T>, NriError>) {
    if let Err(error) = outcome {
        tracing::warn!(
            error = chain(&error),
            "an NRI plugin failed; that changes nothing here"
        );
    }
}

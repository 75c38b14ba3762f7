//! One plugin: how it registers, what it is told, what it asks for.

use std::collections::BTreeSet;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use prost::Message;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::base::tasks::Tasks;
use crate::nri::error::{NriError, PluginText};
use crate::nri::proto::api;
use crate::nri::wire::{Answer, CallError, Service, Wire, code};
use crate::nri::{Node, PLUGIN, Update, resources};
use crate::sys::spawn::Child;

/// Events by NRI's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Event {
    RunPodSandbox = 1,
    StopPodSandbox = 2,
    RemovePodSandbox = 3,
    CreateContainer = 4,
    PostCreateContainer = 5,
    StartContainer = 6,
    PostStartContainer = 7,
    UpdateContainer = 8,
    PostUpdateContainer = 9,
    StopContainer = 10,
    RemoveContainer = 11,
    UpdatePodSandbox = 12,
    PostUpdatePodSandbox = 13,
    ValidateContainerAdjustment = 14,
}

/// Bits of all events.
const ALL_EVENTS: u32 = (1 << 14) - 1;

impl Event {
    const fn bit(self) -> u32 {
        1 << (self as u32 - 1)
    }

    /// The method's name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::RunPodSandbox => "RunPodSandbox",
            Self::StopPodSandbox => "StopPodSandbox",
            Self::RemovePodSandbox => "RemovePodSandbox",
            Self::CreateContainer => "CreateContainer",
            Self::PostCreateContainer => "PostCreateContainer",
            Self::StartContainer => "StartContainer",
            Self::PostStartContainer => "PostStartContainer",
            Self::UpdateContainer => "UpdateContainer",
            Self::PostUpdateContainer => "PostUpdateContainer",
            Self::StopContainer => "StopContainer",
            Self::RemoveContainer => "RemoveContainer",
            Self::UpdatePodSandbox => "UpdatePodSandbox",
            Self::PostUpdatePodSandbox => "PostUpdatePodSandbox",
            Self::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        }
    }

    /// Plugins before NRI 0.11 get it as a `StateChange`.
    const fn has_old_form(self) -> bool {
        !matches!(
            self,
            Self::CreateContainer
                | Self::UpdateContainer
                | Self::StopContainer
                | Self::UpdatePodSandbox
                | Self::ValidateContainerAdjustment
        )
    }
}

/// What a plugin is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    /// Two digits.
    pub(super) index: String,
    /// Letters, digits and `_.+-`.
    pub(super) name: String,
}

impl Identity {
    /// Checks both parts.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub(super) fn new(index: &str, name: &str) -> Result<Self, String> {
        if index.len() != 2 || !index.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(format!("plugin_idx {index:?}: use two digits"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            return Err(format!(
                "plugin_name {name:?}: use letters, digits and -_.+"
            ));
        }
        Ok(Self {
            index: index.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.index, self.name)
    }
}

/// What answers a plugin's own calls.
struct Host {
    node: Arc<dyn Node>,
    /// Known before it registers, if we started it.
    identity: OnceLock<Identity>,
    registered: watch::Sender<Option<Result<(), String>>>,
}

impl Host {
    fn register(&self, payload: &[u8]) -> Result<Vec<u8>, (i32, String)> {
        let request = api::RegisterPluginRequest::decode(payload).map_err(bad)?;
        let outcome = match self.identity.get() {
            Some(_) => Ok(()),
            None => Identity::new(&request.plugin_idx, &request.plugin_name)
                .map(|identity| drop(self.identity.set(identity))),
        };
        self.registered.send_replace(Some(outcome.clone()));
        match outcome {
            Ok(()) => Ok(api::Empty {}.encode_to_vec()),
            Err(why) => Err((code::INVALID_ARGUMENT, why)),
        }
    }

    async fn update(&self, payload: &[u8]) -> Result<Vec<u8>, (i32, String)> {
        let request = api::UpdateContainersRequest::decode(payload).map_err(bad)?;
        let by = self
            .identity
            .get()
            .map(ToString::to_string)
            .unwrap_or_default();
        for eviction in request.evict {
            self.node
                .evict(eviction.container_id, by.clone(), eviction.reason);
        }
        let mut failed = vec![];
        for given in request.update {
            let update = Update::new(&by, &given);
            let ignore = update.ignore_failure;
            let outcome = self.node.update(update).await;
            if let Err(error) = outcome {
                tracing::warn!(
                    plugin = by,
                    container.id = given.container_id,
                    error,
                    "a plugin's update failed"
                );
                if !ignore {
                    failed.push(given);
                }
            }
        }
        Ok(api::UpdateContainersResponse { failed }.encode_to_vec())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn bad(error: prost::DecodeError) -> (i32, String) {
    (code::INVALID_ARGUMENT, error.to_string())
}

impl Service for Host {
    fn serve(&self, method: String, payload: Vec<u8>) -> Answer<'_> {
        Box::pin(async move {
            match method.as_str() {
                "RegisterPlugin" => self.register(&payload),
                "UpdateContainers" => self.update(&payload).await,
                _ => Err((code::UNIMPLEMENTED, format!("no method {method}"))),
            }
        })
    }
}

/// A plugin that has registered and was configured.
#[derive(Debug)]
pub(super) struct Plugin {
    /// Index and name.
    pub(super) identity: Identity,
    wire: Arc<Wire>,
    events: AtomicU32,
    /// Events that it knows only as state changes.
    old: Mutex<BTreeSet<Event>>,
    /// Absent: it connected by itself.
    child: Mutex<Option<Child>>,
    timeout: Duration,
}

/// A plugin's configuration, and what it is told of us.
pub(super) struct Greeting {
    /// Content of its file.
    pub(super) config: String,
    /// Longest wait for its registration.
    pub(super) registration: Duration,
    /// Longest wait for each of its answers.
    pub(super) request: Duration,
    /// Version of berth.
    pub(super) version: &'static str,
}

impl Plugin {
    /// Waits until the plugin registers, and configures it.
    ///
    /// # Errors
    /// [`NriError::Join`]; the connection is closed then.
    pub(super) async fn greet(
        stream: UnixStream,
        known: Option<Identity>,
        greeting: Greeting,
        node: Arc<dyn Node>,
        tasks: &Tasks,
    ) -> Result<Self, NriError> {
        let host = Arc::new(Host {
            node,
            identity: known.map(OnceLock::from).unwrap_or_default(),
            registered: watch::Sender::new(None),
        });
        let service: Arc<dyn Service> = Arc::clone(&host) as _;
        let wire = Wire::start(stream, service, tasks);
        let greeted = Self::greet_on(&wire, &host, &greeting).await;
        let named = || match host.identity.get() {
            Some(identity) => identity.to_string(),
            None => "(not registered)".to_owned(),
        };
        let events = greeted.map_err(|(step, source)| {
            wire.close();
            NriError::Join {
                plugin: named(),
                step,
                source,
            }
        })?;
        let identity = host.identity.get().cloned();
        Ok(Self {
            identity: identity.unwrap_or(Identity {
                index: String::new(),
                name: String::new(),
            }),
            wire,
            events: AtomicU32::new(events),
            old: Mutex::default(),
            child: Mutex::default(),
            timeout: greeting.request,
        })
    }

    async fn greet_on(
        wire: &Wire,
        host: &Host,
        greeting: &Greeting,
    ) -> Result<u32, (&'static str, PluginText)> {
        const REGISTER: &str = "registration";
        let mut registered = host.registered.subscribe();
        let outcome = tokio::select! {
            outcome = registered.wait_for(Option::is_some) => outcome.ok().and_then(|one| one.clone()),
            () = wire.closed() => None,
            () = tokio::time::sleep(greeting.registration) => {
                let text = format!("not within {:?}", greeting.registration);
                return Err((REGISTER, PluginText(text)));
            }
        };
        match outcome {
            Some(Ok(())) => {}
            Some(Err(why)) => return Err((REGISTER, PluginText(why))),
            None => return Err((REGISTER, PluginText("the connection was closed".to_owned()))),
        }
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let request = api::ConfigureRequest {
            config: greeting.config.clone(),
            runtime_name: "berth".to_owned(),
            runtime_version: greeting.version.to_owned(),
            registration_timeout: millis(greeting.registration),
            request_timeout: millis(greeting.request),
            nri_version: "v0.12.0".to_owned(),
        };
        let configured = async {
            let payload = request.encode_to_vec();
            let answer = wire.call(PLUGIN, "Configure", payload, greeting.request);
            let answer = api::ConfigureResponse::decode(&*answer.await?)?;
            Ok::<_, CallError>(answer.events.cast_unsigned())
        };
        match configured.await {
            Ok(0) => Ok(ALL_EVENTS),
            Ok(events) if events & !ALL_EVENTS == 0 => Ok(events),
            Ok(events) => {
                let text = format!("events {events:#x}: unknown ones are among them");
                Err(("configuration", PluginText(text)))
            }
            Err(error) => Err(("configuration", error.into())),
        }
    }

    /// Makes it a plugin that we started: its process ends with it.
    pub(super) fn own(&self, child: Child) {
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
    }

    /// Did it subscribe to an event, and is it still there?
    pub(super) fn wants(&self, event: Event) -> bool {
        !self.wire.is_closed() && self.events.load(Ordering::Relaxed) & event.bit() != 0
    }

    /// Waits for the end of its connection.
    pub(super) async fn closed(&self) {
        self.wire.closed().await;
    }

    /// Ends the connection.
    pub(super) fn close(&self) {
        self.wire.close();
    }

    /// Kills and reaps its process, if it is ours. Blocks for a moment.
    pub(super) fn end_process(&self) {
        let child = self
            .child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(child) = child {
            end_child(&child);
        }
    }

    /// Synchronises it: pods and containers in as many messages as it takes.
    ///
    /// # Errors
    /// [`NriError::Join`].
    pub(super) async fn synchronize(
        &self,
        pods: Vec<api::PodSandbox>,
        containers: Vec<api::Container>,
    ) -> Result<Vec<Update>, NriError> {
        let fail = |source| NriError::Join {
            plugin: self.identity.to_string(),
            step: "synchronisation",
            source,
        };
        let requests = split(pods, containers);
        let last = requests.len().saturating_sub(1);
        let mut updates = vec![];
        for (number, mut request) in requests.into_iter().enumerate() {
            request.more = number < last;
            let payload = request.encode_to_vec();
            let answer = self
                .wire
                .call(PLUGIN, "Synchronize", payload, self.timeout)
                .await;
            let answer = answer.map_err(|error| fail(error.into()))?;
            let answer = api::SynchronizeResponse::decode(&*answer);
            let answer = answer.map_err(|error| fail(CallError::from(error).into()))?;
            if request.more && (!answer.more || !answer.update.is_empty()) {
                let text = "it does not take the state in parts, as NRI 0.7 asks for";
                return Err(fail(PluginText(text.to_owned())));
            }
            updates = answer.update;
        }
        let by = self.identity.to_string();
        Ok(updates
            .iter()
            .map(|given| Update::new(&by, given))
            .collect())
    }

    /// Tells it of an event. Absent: it did not subscribe, or was closed because it does not answer.
    ///
    /// # Errors
    /// [`NriError::Refused`]: it answered with an error.
    pub(super) async fn tell<A: Message + Default>(
        &self,
        event: Event,
        request: &impl Message,
    ) -> Result<Option<A>, NriError> {
        if !self.wants(event) {
            return Ok(None);
        }
        match self.exchange(event, request.encode_to_vec()).await {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.is_fatal() => {
                tracing::error!(plugin = %self.identity, event = event.name(), %error,
                    "an NRI plugin is closed: it does not answer as it should");
                self.close();
                Ok(None)
            }
            Err(error) => Err(NriError::Refused {
                plugin: self.identity.to_string(),
                event: event.name(),
                source: error.into(),
            }),
        }
    }

    async fn exchange<A: Message + Default>(
        &self,
        event: Event,
        payload: Vec<u8>,
    ) -> Result<A, CallError> {
        let old = || self.old.lock().unwrap_or_else(PoisonError::into_inner);
        let is_old = old().contains(&event);
        if !is_old {
            let answer = self
                .wire
                .call(PLUGIN, event.name(), payload.clone(), self.timeout)
                .await;
            match answer {
                Err(CallError::Status { code, .. })
                    if code == code::UNIMPLEMENTED && event.has_old_form() =>
                {
                    old().insert(event);
                }
                answer => return Ok(A::decode(&*answer?)?),
            }
        }
        // StateChangeEvent: the event, then the fields of the event's own message one number up.
        let given = api::ContainerEvent::decode(&*payload)?;
        let change = api::StateChangeEvent {
            event: event as i32,
            pod: given.pod,
            container: given.container,
        };
        let payload = change.encode_to_vec();
        self.wire
            .call(PLUGIN, "StateChange", payload, self.timeout)
            .await?;
        Ok(A::default())
    }

    /// Tells it that we go.
    pub(super) async fn shut_down(&self) {
        let farewell = self
            .wire
            .call(PLUGIN, "Shutdown", vec![], self.timeout)
            .await;
        if let Err(error) = farewell {
            tracing::debug!(plugin = %self.identity, %error, "no answer to the shutdown");
        }
        self.close();
    }
}

/// Kills a process of ours and reaps it.
pub(super) fn end_child(child: &Child) {
    let pidfd = child.pidfd.as_fd();
    let _killed = crate::sys::process::send_signal(pidfd, crate::sys::signal::SIGKILL).is_ok();
    if let Err(error) = crate::sys::process::wait(pidfd) {
        tracing::warn!(pid = child.pid, %error, "a plugin's process was not reaped");
    }
}

/// Bytes of one message of state; some are left for its frame.
const STATE_PART: usize = super::wire::MAX_MESSAGE - (64 << 10);

/// The state in messages that fit.
fn split(
    pods: Vec<api::PodSandbox>,
    containers: Vec<api::Container>,
) -> Vec<api::SynchronizeRequest> {
    // Tag and length of an entry.
    const FRAME: usize = 8;
    let mut all = vec![api::SynchronizeRequest::default()];
    let mut size = 0;
    let mut room = |all: &mut Vec<api::SynchronizeRequest>, bytes: usize| {
        size += bytes + FRAME;
        if size > STATE_PART && size > bytes + FRAME {
            all.push(api::SynchronizeRequest::default());
            size = bytes + FRAME;
        }
    };
    for pod in pods {
        room(&mut all, pod.encoded_len());
        if let Some(last) = all.last_mut() {
            last.pods.push(pod);
        }
    }
    for container in containers {
        room(&mut all, container.encoded_len());
        if let Some(last) = all.last_mut() {
            last.containers.push(container);
        }
    }
    all
}

impl Update {
    /// The update that a plugin asks for.
    pub(super) fn new(by: &str, given: &api::ContainerUpdate) -> Self {
        let linux = given.linux.as_ref();
        let limits = linux.and_then(|linux| linux.resources.clone());
        let limits = limits.unwrap_or_default();
        let (resources, mut impossible) = resources::from_proto(&limits);
        if let Some(class) = limits.rdt_class {
            // A group is joined when a process begins.
            impossible.push(("resources.rdtClass".to_owned(), class.value));
        }
        Self {
            by: by.to_owned(),
            id: given.container_id.clone(),
            resources,
            impossible,
            ignore_failure: given.ignore_failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities() {
        assert_eq!(
            Identity::new("05", "a.b-c_d+e").unwrap().to_string(),
            "05-a.b-c_d+e"
        );
        for (index, name) in [
            ("5", "a"),
            ("005", "a"),
            ("ab", "a"),
            ("", "a"),
            ("05", ""),
            ("05", "a/b"),
        ] {
            assert!(Identity::new(index, name).is_err(), "{index} {name}");
        }
    }

    #[test]
    fn state_is_split_where_it_does_not_fit() {
        assert_eq!(split(vec![], vec![]).len(), 1);
        let pod = |size: usize| api::PodSandbox {
            id: "x".repeat(size),
            ..api::PodSandbox::default()
        };
        let container = |size: usize| api::Container {
            id: "x".repeat(size),
            ..api::Container::default()
        };
        let pods: Vec<_> = (0..50).map(|_| pod(100_000)).collect();
        let containers: Vec<_> = (0..100).map(|_| container(100_000)).collect();
        let parts = split(pods, containers);
        assert_eq!(parts.len(), 4);
        assert_eq!(parts.iter().map(|part| part.pods.len()).sum::<usize>(), 50);
        assert_eq!(
            parts
                .iter()
                .map(|part| part.containers.len())
                .sum::<usize>(),
            100
        );
        for part in &parts {
            assert!(part.encoded_len() <= STATE_PART);
        }
        // One that does not fit is not cut: the call says so.
        assert_eq!(split(vec![pod(1), pod(5 << 20)], vec![]).len(), 2);
    }
}

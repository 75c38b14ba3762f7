//! What all verbs share: the tables, transitions with their events, and records.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::base::container::EventKind;
use crate::base::error::HasKind;
use crate::base::handler::Handlers;
use crate::base::id::{ContainerId, Id, PodId};
use crate::base::pod::PodMetadata;
use crate::base::tasks::Tasks;
use crate::engine::container::{Container, ContainerInner, ContainerRecord};
use crate::engine::error::{EngineError, Result};
use crate::engine::events::{Events, Listener};
use crate::engine::facade::{EngineEvent, PodMoment};
use crate::engine::handlers::HandlerTable;
use crate::engine::lower::Lower;
use crate::engine::meters::Meters;
use crate::engine::names::Names;
use crate::engine::pod::{Pod, PodInner, PodRecord};
use crate::engine::state::{ContainerInput, Effect, PodInput, Refused};
use crate::engine::table::{Found, Stamps, Table};
use crate::nri::Nri;
use crate::store::{self, CLOSED, Durability, Records, Trash};
use crate::sys::remove::{Removal, remove};

/// Mode of `pods` in `state`: roots of user namespaces pass, each to its own pod.
pub(crate) const PASSED: u32 = 0o711;
/// Mode of what only the root of a pod's user namespace passes, by its group.
const PASSED_BY_GROUP: u32 = 0o710;
/// Format of the records.
const FORMAT: u32 = 1;

/// Everything the engine owns.
#[derive(Debug)]
pub(crate) struct Core {
    /// `root`: what survives a reboot.
    pub(crate) root: PathBuf,
    /// `state`: what does not.
    pub(crate) state: PathBuf,
    /// Cgroup below which pods without a parent of their own are made, and the monitors'.
    pub(crate) cgroup_root: String,
    /// Mount overlays with `volatile`.
    pub(crate) volatile: bool,
    /// Name of the sandbox image that kubeadm reads; nothing is ever pulled for it.
    pub(crate) sandbox_image: String,
    /// Runtime handlers.
    pub(crate) handlers: Arc<HandlerTable>,
    /// Who owns the tasks.
    pub(crate) tasks: Tasks,
    /// The layers below.
    pub(crate) lower: Lower,
    /// Plugins.
    pub(crate) nri: Nri,
    /// Pods that are complete.
    pub(crate) pods: Table<PodId, Pod>,
    /// Pods that are being made. Only cAdvisor may see them: it asks once, as soon as their cgroup appears.
    pub(crate) arriving: Table<PodId, Pod>,
    /// Containers that are complete.
    pub(crate) containers: Table<ContainerId, Container>,
    /// Names of pods.
    pub(crate) pod_names: Names<PodMetadata, PodId, Arc<EngineError>>,
    /// Names of containers in their pods.
    pub(crate) container_names: Names<(PodId, String, u32), ContainerId, Arc<EngineError>>,
    /// Cgroup parents that we made, with the number of pods that have each in their `made_parents`: the last removes it.
    pub(crate) made_parents: Mutex<BTreeMap<String, usize>>,
    /// Times that only grow.
    pub(crate) stamps: Stamps,
    /// Walks of writable layers.
    pub(crate) meters: Meters,
    /// Writable layers that wait for their removal.
    pub(crate) trash: Arc<Trash>,
    /// Device that `root` is on, once it was asked for.
    pub(crate) device: std::sync::OnceLock<String>,
    pod_records: Arc<Records<PodRecord>>,
    container_records: Arc<Records<ContainerRecord>>,
    events: Events,
}

/// The directories and settings of an engine.
#[derive(Clone, Debug)]
pub(crate) struct EngineConfig {
    /// What survives a reboot: records, layers, writable layers (`/var/lib/berth`).
    pub(crate) root: PathBuf,
    /// What does not: sockets, pod files, plans (`/run/berth`).
    pub(crate) state: PathBuf,
    /// Cgroup below which pods without a parent of their own are made, and the monitors' (`/berth`).
    pub(crate) cgroup_root: String,
    /// The binary `berth-monitor`.
    pub(crate) monitor: PathBuf,
    /// How many monitors are kept ready for pods to come.
    pub(crate) ready_monitors: usize,
    /// Mount overlays with `volatile`: a writable layer is never used again after a reboot.
    pub(crate) volatile: bool,
    /// Bytes after which a log line is split.
    pub(crate) max_log_line: u32,
    /// Name of the sandbox image that kubeadm reads; nothing is ever pulled for it.
    pub(crate) sandbox_image: String,
    /// Directories of CDI files, the last one wins.
    pub(crate) cdi_spec_dirs: Vec<PathBuf>,
    /// Directories of hooks.
    pub(crate) hooks_dirs: Vec<PathBuf>,
    /// File of block I/O classes; empty: none.
    pub(crate) block_io_classes: PathBuf,
    /// Runtime handlers.
    pub(crate) handlers: Handlers,
    /// SELinux labels for pods; absent: none are given.
    pub(crate) selinux: Option<SelinuxConfig>,
}

/// How pods are labelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SelinuxConfig {
    /// Categories that levels are made of: 0 up to this, exclusive.
    pub(crate) category_range: u32,
    /// Confine pods with the node's network too.
    pub(crate) confine_host_network: bool,
}

impl Core {
    /// Opens the records; nothing is restored yet.
    ///
    /// # Errors
    /// [`EngineError::Store`]: the directories cannot be used.
    pub(crate) fn open(config: EngineConfig, lower: Lower, nri: Nri, tasks: Tasks) -> Result<Self> {
        let pod_records = Records::open(config.root.join("pods"), FORMAT)?;
        let container_records = Records::open(config.root.join("containers"), FORMAT)?;
        let trash = Arc::new(Trash::new(config.root.join("trash"), ""));
        let meters = Meters::new(tasks.clone());
        Ok(Self {
            root: config.root,
            state: config.state,
            cgroup_root: config.cgroup_root.trim_end_matches('/').to_owned(),
            volatile: config.volatile,
            sandbox_image: config.sandbox_image,
            handlers: Arc::new(HandlerTable::new(config.handlers)),
            tasks,
            lower,
            nri,
            pods: Table::default(),
            arriving: Table::default(),
            containers: Table::default(),
            pod_names: Names::default(),
            container_names: Names::default(),
            made_parents: Mutex::default(),
            stamps: Stamps::default(),
            meters,
            trash,
            device: std::sync::OnceLock::new(),
            pod_records: Arc::new(pod_records),
            container_records: Arc::new(container_records),
            events: Events::default(),
        })
    }

    /// The records of both kinds.
    pub(crate) fn records(&self) -> (Arc<Records<PodRecord>>, Arc<Records<ContainerRecord>>) {
        (
            Arc::clone(&self.pod_records),
            Arc::clone(&self.container_records),
        )
    }

    /// A listener of events.
    pub(crate) fn listen(&self) -> Listener {
        self.events.listen(&self.pods)
    }

    /// A new id.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the kernel gives no random bytes.
    pub(crate) fn new_id() -> Result<Id> {
        crate::sys::random::bytes()
            .map(Id::from_bytes)
            .map_err(EngineError::io("take random bytes for an id"))
    }

    /// Directory of a pod's files, gone after a reboot.
    pub(crate) fn pod_directory(&self, id: PodId) -> PathBuf {
        self.state.join("pods").join(id.to_string())
    }

    /// Directory of a container's writable layer.
    pub(crate) fn container_directory(&self, id: ContainerId) -> PathBuf {
        self.root.join("containers").join(id.to_string())
    }

    /// What a container has written.
    pub(crate) fn writable_layer(&self, id: ContainerId) -> PathBuf {
        self.container_directory(id).join("upper")
    }

    /// A pod by unambiguous prefix.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::Ambiguous`].
    pub(crate) fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        match self.pods.find(id) {
            Found::One(pod) => Ok(pod),
            Found::None => Err(EngineError::no_pod(id)),
            Found::Many => Err(EngineError::Ambiguous {
                what: "pod sandbox",
                id: id.to_owned(),
            }),
        }
    }

    /// A container by unambiguous prefix.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::Ambiguous`].
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.containers.find(id) {
            Found::One(container) => Ok(container),
            Found::None => Err(EngineError::no_container(id)),
            Found::Many => Err(EngineError::Ambiguous {
                what: "container",
                id: id.to_owned(),
            }),
        }
    }

    /// Moves a pod on: the new state, what `change` adds to it, and the events. True: its record is to
    /// be written.
    ///
    /// # Errors
    /// [`Refused`]: nothing has changed.
    pub(crate) fn pod_input(
        &self,
        pod: &Pod,
        input: PodInput,
        change: impl FnOnce(&mut PodInner),
    ) -> std::result::Result<bool, Refused> {
        let _order = pod.order.lock().unwrap_or_else(PoisonError::into_inner);
        let effects = {
            let mut inner = pod.lock();
            let (phase, effects) = inner.phase.next(input)?;
            inner.phase = phase;
            change(&mut inner);
            Arc::make_mut(&mut inner.status).state = phase.shown();
            effects
        };
        Ok(self.apply(effects, pod, &pod.id.to_string()))
    }

    /// Moves a container on, as [`Core::pod_input`] does.
    ///
    /// # Errors
    /// [`Refused`]: nothing has changed.
    pub(crate) fn container_input(
        &self,
        container: &Container,
        input: ContainerInput,
        change: impl FnOnce(&mut ContainerInner),
    ) -> std::result::Result<bool, Refused> {
        let pod = &container.pod;
        let _order = pod.order.lock().unwrap_or_else(PoisonError::into_inner);
        let (effects, ended) = {
            let mut inner = container.lock();
            let (phase, effects) = inner.phase.next(input)?;
            inner.phase = phase;
            change(&mut inner);
            Arc::make_mut(&mut inner.status).state = phase.shown();
            (effects, !phase.alive())
        };
        let record = self.apply(effects, pod, &container.id.to_string());
        if ended {
            container.ended.send_replace(true);
        }
        Ok(record)
    }

    /// Publishes what the effects say. True: the record is to be written.
    fn apply(&self, effects: &[Effect], pod: &Pod, id: &str) -> bool {
        let mut record = false;
        for effect in effects {
            match effect {
                Effect::Record => record = true,
                Effect::Publish(kind) => self.publish(*kind, pod, id),
            }
        }
        record
    }

    fn publish(&self, kind: EventKind, pod: &Pod, id: &str) {
        tracing::info!(pod.id = %pod.id, id, kind = ?kind, "event");
        // The status of a pod that is gone is its last: kubelet ignores an event without one, and would
        // keep the pod.
        let PodMoment {
            at,
            pod,
            containers,
        } = self.moment_in_order(pod);
        self.events.publish(EngineEvent {
            id: id.to_owned(),
            kind,
            at,
            pod,
            containers,
        });
    }

    /// A pod and its containers as they are, between two of its transitions.
    ///
    /// kubelet (`EventedPLEG`) keeps of all that it hears about a pod what has the latest time, and drops an event
    /// from before that: the time of a status must not be later than what the status tells.
    pub(crate) fn moment(&self, pod: &Pod) -> PodMoment {
        let _order = pod.order.lock().unwrap_or_else(PoisonError::into_inner);
        self.moment_in_order(pod)
    }

    fn moment_in_order(&self, pod: &Pod) -> PodMoment {
        PodMoment {
            at: self.stamps.next(),
            pod: pod.status(),
            containers: pod.container_statuses(),
        }
    }

    /// The parents of a pod's cgroups, `path` included, that we make and so must remove: outermost first.
    ///
    /// # Errors
    /// [`EngineError::Step`]: the path is malformed.
    pub(crate) fn missing_parents(&self, path: &str) -> Result<Vec<String>> {
        let mut made = self
            .made_parents
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut missing = vec![];
        let ends = path.match_indices('/').map(|(at, _)| at).skip(1);
        for end in ends.chain([path.len()]) {
            let parent = &path[..end];
            if parent.is_empty() {
                continue;
            }
            let dirs = self
                .lower
                .cgroups
                .dirs(parent)
                .map_err(EngineError::step("linux.cgroup_parent"))?;
            if made.contains_key(parent) || !dirs.kill.exists() {
                *made.entry(parent.to_owned()).or_default() += 1;
                missing.push(parent.to_owned());
            }
        }
        Ok(missing)
    }

    /// Counts a restored pod among those that have these parents.
    pub(crate) fn hold_parents(&self, parents: &[String]) {
        let mut made = self
            .made_parents
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for parent in parents {
            *made.entry(parent.clone()).or_default() += 1;
        }
    }

    /// Writes a pod's record as it is now. After [`Core::forget_pod`] it does nothing.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub(crate) async fn record_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let _turn = pod.record_lane.turn().await;
        let Some(record) = pod.record() else {
            return Ok(());
        };
        let records = Arc::clone(&self.pod_records);
        blocking("write a pod's record", move || {
            Ok(records.put(&record.id.to_string(), &record, Durability::Process)?)
        })
        .await
    }

    /// Removes a pod's record for good.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub(crate) async fn forget_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let _turn = pod.record_lane.turn().await;
        pod.lock().gone = true;
        let (records, id) = (Arc::clone(&self.pod_records), pod.id);
        blocking("remove a pod's record", move || {
            Ok(records.remove(&id.to_string())?)
        })
        .await
    }

    /// Writes a container's record as it is now. After [`Core::forget_container`] it does nothing.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub(crate) async fn record_container(&self, container: &Arc<Container>) -> Result<()> {
        let _turn = container.record_lane.turn().await;
        let Some(record) = container.record() else {
            return Ok(());
        };
        let records = Arc::clone(&self.container_records);
        blocking("write a container's record", move || {
            Ok(records.put(&record.id.to_string(), &record, Durability::Process)?)
        })
        .await
    }

    /// Removes a container's record for good.
    ///
    /// # Errors
    /// [`EngineError::Store`].
    pub(crate) async fn forget_container(&self, container: &Arc<Container>) -> Result<()> {
        let _turn = container.record_lane.turn().await;
        container.lock().gone = true;
        let (records, id) = (Arc::clone(&self.container_records), container.id);
        blocking("remove a container's record", move || {
            Ok(records.remove(&id.to_string())?)
        })
        .await
    }
}

/// Runs work that waits for the disk or the kernel beside the reactor.
///
/// # Errors
/// Those of the work; [`EngineError::GivenUp`] when it panicked or the daemon ends.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    Tasks::blocking(work)
        .await
        .unwrap_or(Err(EngineError::GivenUp { what }))
}

/// Runs blocking work of a lower layer; `step` says what is tried.
///
/// # Errors
/// [`EngineError::Step`]; [`EngineError::GivenUp`] when it panicked or the daemon ends.
pub(crate) async fn blocking_step<T: Send + 'static, E: HasKind + Send + Sync + 'static>(
    what: &'static str,
    work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static,
) -> Result<T> {
    blocking(what, move || work().map_err(EngineError::step(what))).await
}

/// Makes a directory with its parents. Blocks on the disk.
///
/// # Errors
/// [`EngineError::Step`].
pub(crate) fn make_directory(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(EngineError::io(format!(
            "make directory {}",
            path.display()
        )))
}

/// Makes a directory of a pod's files, or gives one that is there its mode: closed, but for the root of the pod's user
/// namespace, which passes on its way to a bundle (hack/adr/0006). What its containers own in there, `/etc/hosts` say, may carry
/// a set-user-id bit. Blocks on the disk.
///
/// # Errors
/// [`EngineError::Store`], [`EngineError::Step`].
pub(crate) fn make_pod_directory(path: &Path, pod: &Pod) -> Result<()> {
    let Some((_, group)) = pod.user_root() else {
        return Ok(store::directory(path, CLOSED)?);
    };
    store::directory(path, PASSED_BY_GROUP)?;
    std::os::unix::fs::chown(path, None, Some(group)).map_err(EngineError::io(format!(
        "give {} to group {group}, that of the pod's root",
        path.display()
    )))
}

/// Gives a file or directory to the root of the pod's user namespace, if it has one.
///
/// # Errors
/// [`EngineError::Step`].
pub(crate) fn give(path: &Path, pod: &Pod) -> Result<()> {
    let Some((uid, gid)) = pod.user_root() else {
        return Ok(());
    };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).map_err(EngineError::io(format!(
        "give {} to the pod's root, {uid}:{gid}",
        path.display()
    )))
}

/// Removes a directory of ours with all it holds; a missing one is fine. Blocks on the disk.
///
/// # Errors
/// [`EngineError::Step`]: something of it stays.
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    let failed = || EngineError::io(format!("remove directory {}", path.display()));
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(failed()(std::io::ErrorKind::InvalidInput.into()));
    };
    let parent = match std::fs::File::open(parent) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        parent => parent.map_err(failed())?,
    };
    let name = CString::new(name.as_bytes()).map_err(|nul| failed()(nul.into()))?;
    match remove(parent.as_fd(), &name, &mut || false) {
        Removal::Gone | Removal::Stopped => Ok(()),
        Removal::Left(left) => Err(failed()(std::io::Error::other(left.to_string()))),
    }
}

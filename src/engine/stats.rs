//! The stats calls: read when asked, rates from two readings, nothing polled.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::base::clock::Timestamp;
use crate::base::container::{ContainerFilter, ContainerState};
use crate::base::image::FilesystemUsage;
use crate::base::pod::PodFilter;
use crate::base::stats::{CgroupStats, Scope};
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::core::{Core, blocking};
use crate::engine::error::{EngineError, Result};
use crate::engine::facade::{ContainerFigures, PodFigures};
use crate::engine::pod::Pod;
use crate::engine::state::Refused;
use crate::runtime::cgroups::Readings;

/// Readings closer than this do not make a new rate: the one before is repeated.
const RATE_WINDOW: Duration = Duration::from_millis(500);
/// Threads that read the figures of many objects, at most.
const READERS: usize = 4;
/// So many objects are not worth another thread.
const SHARE: usize = 16;
/// How long an answer waits, in all, for walks of writable layers that take no time.
const PATIENCE: Duration = Duration::from_millis(50);

/// CPU rate from two readings.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    base: Option<(i64, u64)>,
    rate: Option<u64>,
}

impl Rate {
    /// Nanoseconds of CPU per second since the reading before; absent at the first.
    pub(crate) fn reading(&mut self, stats: &CgroupStats) -> Option<u64> {
        let (now, used) = (stats.timestamp.0, stats.cpu_usage_ns?);
        match self.base {
            Some((then, before)) if now > then => {
                let elapsed = u64::try_from(now - then).unwrap_or(u64::MAX);
                if u128::from(elapsed) >= RATE_WINDOW.as_nanos() || self.rate.is_none() {
                    let grown = u128::from(used.saturating_sub(before));
                    let rate = grown * 1_000_000_000 / u128::from(elapsed);
                    self.rate = Some(u64::try_from(rate).unwrap_or(u64::MAX));
                }
                if u128::from(elapsed) >= RATE_WINDOW.as_nanos() {
                    self.base = Some((now, used));
                }
            }
            Some(_) => {}
            None => self.base = Some((now, used)),
        }
        self.rate
    }
}

/// What a container's writable layer takes, as far as that is known by `deadline`; absent: not at all yet.
fn writable_layer(
    core: &Core,
    container: &Container,
    deadline: Instant,
) -> Option<FilesystemUsage> {
    let directory = || core.writable_layer(container.id);
    let counted = core.meters.read(&container.meter, directory, deadline)?;
    Some(FilesystemUsage {
        mountpoint: core.root.display().to_string(),
        used_bytes: counted.bytes,
        inodes_used: counted.inodes,
    })
}

/// Begins to walk those of the writable layers whose time has come; until when an answer waits for them.
fn measure<'a>(core: &Core, containers: impl IntoIterator<Item = &'a Arc<Container>>) -> Instant {
    for container in containers {
        let directory = || core.writable_layer(container.id);
        core.meters.begin(&container.meter, directory);
    }
    Instant::now() + PATIENCE
}

/// Figures of one container.
pub(super) fn container_figures(
    core: &Core,
    readings: &mut Readings<'_>,
    container: &Container,
    scope: Scope,
    deadline: Instant,
) -> ContainerFigures {
    let cgroup = readings.stats(&container.cgroup(), scope);
    let (usage_nano_cores, processes) = match scope {
        Scope::Usage => (container.lock().rate.reading(&cgroup), None),
        Scope::Pod | Scope::Everything => {
            let first = container.pid();
            let processes = readings.process_stats(&container.cgroup(), first);
            (None, Some(processes))
        }
    };
    ContainerFigures {
        status: container.status(),
        cgroup_path: container.cgroup(),
        cgroup,
        usage_nano_cores,
        writable_layer: writable_layer(core, container, deadline),
        processes,
    }
}

/// How many ready pods have their cgroups below each parent.
fn parents(core: &Core) -> HashMap<String, usize> {
    let mut parents = HashMap::new();
    for pod in core.pods.all() {
        if pod.is_ready() {
            *parents.entry(pod.cgroup_parent.clone()).or_default() += 1;
        }
    }
    parents
}

/// Figures of pods, in their order. Reads files on the calling thread.
fn pods_figures(
    core: &Core,
    pods: &[Arc<Pod>],
    parents: &HashMap<String, usize>,
    scope: Scope,
    deadline: Instant,
) -> Vec<PodFigures> {
    let mut readings = core.lower.cgroups.readings();
    let figures = pods.iter().map(|pod| {
        let others = parents.get(&pod.cgroup_parent).copied().unwrap_or(0) > 1;
        let ours = pod
            .cgroup_parent
            .starts_with(&format!("{}/", core.cgroup_root));
        let shared = others || ours;
        pod_figures(core, &mut readings, pod, (scope, shared), deadline)
    });
    figures.collect()
}

/// Reads something of each of many objects, in their order, on a few threads: almost all of the time is
/// the kernel's, which makes every file anew.
async fn read_each<T, R>(
    all: Vec<Arc<T>>,
    read: impl Fn(&[Arc<T>]) -> Vec<R> + Clone + Send + 'static,
) -> Result<Vec<R>>
where
    T: Send + Sync + 'static,
    R: Send + 'static,
{
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(READERS));
    let share = all.len().div_ceil(threads).max(SHARE);
    let parts = all.chunks(share).map(|part| {
        let (part, read) = (part.to_vec(), read.clone());
        blocking("read figures", move || Ok(read(&part)))
    });
    let parts = futures_util::future::try_join_all(parts).await?;
    Ok(parts.into_iter().flatten().collect())
}

/// `shared`: the parent of the pod's cgroups is not its alone.
fn pod_figures(
    core: &Core,
    readings: &mut Readings<'_>,
    pod: &Pod,
    (scope, shared): (Scope, bool),
    deadline: Instant,
) -> PodFigures {
    let containers: Vec<_> = pod
        .containers()
        .iter()
        .filter(|container| container.status().state == ContainerState::Running)
        .map(|container| container_figures(core, readings, container, scope, deadline))
        // Who ended meanwhile is left out.
        .filter(|figures| figures.cgroup.cpu_usage_ns.is_some())
        .collect();
    let cgroup_path = match shared {
        true => pod.pause_cgroup(),
        false => pod.cgroup_parent.clone(),
    };
    let mut read = |scope| readings.stats(&cgroup_path, scope);
    let cgroup = match (scope, shared) {
        // Metrics tell of a pod's cgroup only where it has one.
        (Scope::Everything, true) => CgroupStats {
            timestamp: Timestamp::now(),
            ..CgroupStats::default()
        },
        (Scope::Everything, false) => read(Scope::Pod),
        (_, true) => sum(
            read(scope),
            containers.iter().map(|figures| &figures.cgroup),
        ),
        (_, false) => read(scope),
    };
    let (usage_nano_cores, pid) = {
        let mut inner = pod.lock();
        let rate = match scope {
            Scope::Usage => inner.rate.reading(&cgroup),
            Scope::Pod | Scope::Everything => None,
        };
        (rate, inner.pause_pid)
    };
    let pid = pid.filter(|_| !pod.host_network());
    PodFigures {
        status: pod.status(),
        cgroup_path,
        own_cgroup: !shared,
        cgroup,
        usage_nano_cores,
        interfaces: pid
            .map(|pid| core.lower.interfaces(pid))
            .unwrap_or_default(),
        containers,
    }
}

/// Adds up what several cgroups tell; limits and pressure have no sum.
fn sum<'a>(first: CgroupStats, others: impl Iterator<Item = &'a CgroupStats>) -> CgroupStats {
    let add = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (a, b) => a.or(b),
    };
    others.fold(
        CgroupStats {
            memory_limit: None,
            swap_limit: None,
            pids_limit: None,
            cpu_period: None,
            cpu_quota: None,
            cpu_shares: None,
            memory_reservation: None,
            cpu_psi: None,
            memory_psi: None,
            io_psi: None,
            ..first
        },
        |total, one| CgroupStats {
            timestamp: total.timestamp.max(one.timestamp),
            cpu_usage_ns: add(total.cpu_usage_ns, one.cpu_usage_ns),
            cpu_user_ns: add(total.cpu_user_ns, one.cpu_user_ns),
            cpu_system_ns: add(total.cpu_system_ns, one.cpu_system_ns),
            memory_usage: add(total.memory_usage, one.memory_usage),
            memory_working_set: add(total.memory_working_set, one.memory_working_set),
            memory_rss: add(total.memory_rss, one.memory_rss),
            memory_cache: add(total.memory_cache, one.memory_cache),
            memory_mapped_file: add(total.memory_mapped_file, one.memory_mapped_file),
            memory_kernel: add(total.memory_kernel, one.memory_kernel),
            memory_failcnt: add(total.memory_failcnt, one.memory_failcnt),
            page_faults: add(total.page_faults, one.page_faults),
            major_page_faults: add(total.major_page_faults, one.major_page_faults),
            swap_usage: add(total.swap_usage, one.swap_usage),
            oom_kills: add(total.oom_kills, one.oom_kills),
            pids: add(total.pids, one.pids),
            ..total
        },
    )
}

impl Engine {
    /// Usage of the filesystems of images and of containers.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] at shutdown only.
    pub(super) async fn filesystems(&self) -> Result<(Vec<FilesystemUsage>, Vec<FilesystemUsage>)> {
        let engine = self.clone();
        blocking("measure the filesystems", move || {
            let core = engine.core();
            let mut all = FilesystemUsage {
                mountpoint: core.root.display().to_string(),
                ..FilesystemUsage::default()
            };
            let containers = core.containers.all();
            let deadline = measure(core, &containers);
            for container in containers {
                let layer = writable_layer(core, &container, deadline).unwrap_or_default();
                all.used_bytes = all.used_bytes.saturating_add(layer.used_bytes);
                all.inodes_used = all.inodes_used.saturating_add(layer.inodes_used);
            }
            Ok((vec![core.lower.images.fs_usage()], vec![all]))
        })
        .await
    }

    /// Figures of one container, whatever its state.
    ///
    /// # Errors
    /// [`EngineError::NotFound`].
    pub(super) async fn figures(&self, id: &str) -> Result<ContainerFigures> {
        let container = self.core().container(id)?;
        let engine = self.clone();
        blocking("read stats", move || {
            let core = engine.core();
            let mut readings = core.lower.cgroups.readings();
            let deadline = measure(core, [&container]);
            Ok(container_figures(
                core,
                &mut readings,
                &container,
                Scope::Usage,
                deadline,
            ))
        })
        .await
    }

    /// Figures of the running containers that the filter selects.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] at shutdown only.
    pub(super) async fn all_figures(
        &self,
        filter: &ContainerFilter,
    ) -> Result<Vec<ContainerFigures>> {
        let mut selected = self.select_containers(filter);
        selected.retain(|container| container.status().state == ContainerState::Running);
        let engine = self.clone();
        let deadline = measure(self.core(), &selected);
        read_each(selected, move |part| {
            let core = engine.core();
            let mut readings = core.lower.cgroups.readings();
            part.iter()
                .map(|container| {
                    container_figures(core, &mut readings, container, Scope::Usage, deadline)
                })
                // Who ended meanwhile is left out.
                .filter(|figures| figures.cgroup.cpu_usage_ns.is_some())
                .collect()
        })
        .await
    }

    /// Figures of a ready pod.
    ///
    /// # Errors
    /// [`EngineError::NotFound`], [`EngineError::State`].
    pub(super) async fn figures_of_pod(&self, id: &str) -> Result<PodFigures> {
        let pod = self.core().pod(id)?;
        if !pod.is_ready() {
            return Err(EngineError::State {
                verb: "read the stats of",
                what: "pod sandbox",
                id: pod.id.to_string(),
                source: Refused { state: "not ready" },
            });
        }
        self.read_pods(vec![pod], Scope::Usage)
            .await?
            .pop()
            .ok_or_else(|| EngineError::no_pod(id))
    }

    /// Figures of the ready pods that the filter selects.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] at shutdown only.
    pub(super) async fn all_figures_of_pods(&self, filter: &PodFilter) -> Result<Vec<PodFigures>> {
        let mut selected = self.select_pods(filter);
        selected.retain(|pod| pod.is_ready());
        self.read_pods(selected, Scope::Usage).await
    }

    /// Figures of these pods, in their order.
    ///
    /// # Errors
    /// [`EngineError::GivenUp`] at shutdown only.
    pub(super) async fn read_pods(
        &self,
        pods: Vec<Arc<Pod>>,
        scope: Scope,
    ) -> Result<Vec<PodFigures>> {
        let (engine, parents) = (self.clone(), Arc::new(parents(self.core())));
        let containers = pods.iter().flat_map(|pod| pod.containers());
        let running = containers.filter(|c| c.status().state == ContainerState::Running);
        let deadline = measure(self.core(), &running.collect::<Vec<_>>());
        read_each(pods, move |part| {
            pods_figures(engine.core(), part, &parents, scope, deadline)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_from_two_readings() {
        let mut rate = Rate::default();
        let at = |ms: i64, used: u64| CgroupStats {
            timestamp: Timestamp(ms * 1_000_000),
            cpu_usage_ns: Some(used),
            ..CgroupStats::default()
        };
        assert_eq!(rate.reading(&at(1_000, 0)), None);
        assert_eq!(rate.reading(&at(1_100, 50_000_000)), Some(500_000_000));
        assert_eq!(rate.reading(&at(1_200, 50_000_000)), Some(500_000_000));
        assert_eq!(rate.reading(&at(3_000, 4_000_000_000)), Some(2_000_000_000));
        assert_eq!(rate.reading(&at(4_000, 4_000_000_000)), Some(0));
        // A clock set back does no harm.
        assert_eq!(rate.reading(&at(2_000, 5_000_000_000)), Some(0));
    }
}

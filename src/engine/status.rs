//! Lists, statuses, verbose info and what cAdvisor asks. Everything not verbose answers from memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::base::container::{ContainerFilter, ContainerState, ContainerStatus};
use crate::base::id::ContainerId;
use crate::base::pod::PodFilter;
use crate::base::security::NamespaceMode;
use crate::engine::Engine;
use crate::engine::container::Container;
use crate::engine::core::blocking;
use crate::engine::error::Result;
use crate::engine::facade::{Condition, Info, Inspection, PodMoment, RuntimeStatus};
use crate::engine::pod::Pod;

fn has_all(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

impl Engine {
    /// The pods that a filter selects.
    pub(super) fn select_pods(&self, filter: &PodFilter) -> Vec<Arc<Pod>> {
        let mut pods = self.core().pods.select(&filter.id);
        pods.retain(|pod| {
            let status = pod.status();
            filter.state.is_none_or(|state| state == status.state)
                && has_all(&status.labels, &filter.labels)
        });
        pods
    }

    /// The containers that a filter selects.
    pub(super) fn select_containers(&self, filter: &ContainerFilter) -> Vec<Arc<Container>> {
        let pod = match &*filter.pod_id {
            "" => None,
            prefix => match self.core().pod(prefix) {
                Ok(pod) => Some(pod.id),
                Err(_) => return vec![],
            },
        };
        let mut containers = self.core().containers.select(&filter.id);
        containers.retain(|container| {
            let status = container.status();
            pod.is_none_or(|pod| pod == container.pod.id)
                && filter.state.is_none_or(|state| state == status.state)
                && has_all(&status.labels, &filter.labels)
        });
        containers
    }

    /// Status of a pod and its containers.
    ///
    /// # Errors
    /// [`crate::engine::EngineError::NotFound`].
    pub(super) async fn status_of_pod(&self, id: &str, verbose: bool) -> Result<(PodMoment, Info)> {
        let pod = self.core().pod(id)?;
        let moment = self.core().moment(&pod);
        let info = match verbose {
            true => self.pod_info(&pod).await?,
            false => Info::new(),
        };
        Ok((moment, info))
    }

    async fn pod_info(&self, pod: &Arc<Pod>) -> Result<Info> {
        let (pid, ips) = {
            let inner = pod.lock();
            (inner.pause_pid.unwrap_or(0), inner.status.ips.clone())
        };
        let network = match pod.host_network() {
            true => Value::Null,
            false => json!({
                "Interfaces": {
                    "eth0": {
                        "IPConfigs": ips.iter().map(|ip| json!({ "IP": ip })).collect::<Vec<_>>(),
                    },
                },
            }),
        };
        let spec = self.sandbox_spec(pod).await?;
        let config = json!(pod.config_now());
        let info = json!({
            "pid": pid,
            "processStatus": if pid == 0 { "deleted" } else { "running" },
            "netNamespaceClosed": pid == 0,
            "image": self.core().sandbox_image,
            "runtimeHandler": pod.runtime_handler,
            "runtimeType": runtime_type(pod),
            "runtimeSpec": spec,
            "cniResult": network,
            "cgroupParent": pod.cgroup_parent,
            // Where containerd has them.
            "overhead": { "linux": config["overhead"] },
            "resources": { "linux": config["resources"] },
            "config": config,
        });
        Ok(Info::from([("info".to_owned(), info.to_string())]))
    }

    /// The sandbox as an OCI spec, as far as there is one: pause has no image.
    async fn sandbox_spec(&self, pod: &Arc<Pod>) -> Result<Value> {
        let path = self
            .core()
            .pod_directory(pod.id)
            .join(format!("{}.json", pod.id));
        let mut spec = read_json(path).await?;
        let pid = pod.lock().pause_pid;
        let options = &pod.config.security.namespaces;
        let namespace = |kind: &str, file: &str, mode: NamespaceMode| {
            (mode != NamespaceMode::Node).then(|| match pid {
                Some(pid) => json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }),
                None => json!({ "type": kind }),
            })
        };
        let own = NamespaceMode::Pod;
        let namespaces: Vec<_> = [
            namespace("mount", "mnt", own),
            namespace("network", "net", options.network),
            namespace("ipc", "ipc", options.ipc),
            namespace(
                "uts",
                "uts",
                match options.network {
                    NamespaceMode::Node => NamespaceMode::Node,
                    _ => own,
                },
            ),
            namespace("pid", "pid", options.pid),
        ]
        .into_iter()
        .flatten()
        .collect();
        if !spec.is_object() {
            spec = json!({ "ociVersion": "1.2.0", "process": { "args": ["/pause"] } });
        }
        spec["linux"]["namespaces"] = Value::Array(namespaces);
        spec["linux"]["cgroupsPath"] = json!(pod.pause_cgroup());
        spec["annotations"] = json!(sandbox_labels(pod));
        Ok(spec)
    }

    /// Status of a container.
    ///
    /// # Errors
    /// [`crate::engine::EngineError::NotFound`].
    pub(super) async fn status_of_container(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<(Arc<ContainerStatus>, Info)> {
        let container = self.core().container(id)?;
        if !verbose {
            return Ok((container.status(), Info::new()));
        }
        let spec = self.container_spec(&container).await?;
        let info = json!({
            "sandboxID": container.pod.id.to_string(),
            "pid": container.pid(),
            "removing": false,
            "snapshotKey": container.id.to_string(),
            "snapshotter": "overlay",
            "runtimeType": runtime_type(&container.pod),
            "runtimeSpec": spec,
            "privileged": container.config.security.privileged,
            "config": container.config,
        });
        let info = Info::from([("info".to_owned(), info.to_string())]);
        Ok((container.status(), info))
    }

    async fn container_spec(&self, container: &Arc<Container>) -> Result<Value> {
        let path = self
            .core()
            .pod_directory(container.pod.id)
            .join(format!("{}.json", container.id));
        read_json(path).await
    }

    /// CRI: `Status`.
    pub(super) async fn runtime_status(&self, verbose: bool) -> RuntimeStatus {
        let core = self.core();
        self.ask_features().await;
        let fine = |kind| Condition {
            kind,
            status: true,
            reason: String::new(),
            message: String::new(),
        };
        let network = core.lower.network_condition();
        let mut info = Info::new();
        if verbose {
            let config = json!({
                "sandboxImage": core.sandbox_image,
                "stateDir": core.state,
                "rootDir": core.root,
                "cgroupRoot": core.cgroup_root,
            });
            info.insert("config".to_owned(), config.to_string());
            info.insert("network".to_owned(), core.lower.network.info().to_string());
            let (plugins, trouble) = core.nri.state();
            let nri = json!({ "plugins": plugins, "problem": trouble });
            info.insert("nri".to_owned(), nri.to_string());
            let cdi = json!({ "directories": core.lower.cdi_spec_dirs });
            info.insert("cdi".to_owned(), cdi.to_string());
            let selinux = core.lower.selinux_info();
            info.insert("selinux".to_owned(), selinux.to_string());
            let aside = core.trash.set_aside().into_iter();
            let aside = aside.chain(core.lower.set_aside());
            let aside = aside.map(|aside| {
                json!({ "path": aside.path, "reason": aside.reason, "since": aside.since.0 })
            });
            let trash = json!({ "setAside": aside.collect::<Vec<_>>() });
            info.insert("trash".to_owned(), trash.to_string());
            let counts = json!({ "pods": core.pods.len(), "containers": core.containers.len() });
            info.insert("counts".to_owned(), counts.to_string());
        }
        RuntimeStatus {
            conditions: vec![fine("RuntimeReady"), network],
            handlers: core.handlers.list(core.lower.own_features()),
            supplemental_groups_policy: true,
            info,
        }
    }

    /// A container or sandbox as cAdvisor wants it; only by full id.
    pub(super) async fn inspection(&self, id: &str) -> Option<Inspection> {
        let core = self.core();
        if let Some(container) = id
            .parse()
            .ok()
            .and_then(|id| self.container_or_arriving(id))
        {
            let status = container.status();
            let spec = self.container_spec(&container).await.ok()?;
            return Some(Inspection {
                labels: container_labels(&container),
                image: status.image_name.clone(),
                spec: spec.to_string(),
                pid: container.pid(),
                created_at: status.created_at,
                ended: (status.state == ContainerState::Exited)
                    .then_some((status.exit_code, status.finished_at)),
            });
        }
        let pod = id
            .parse()
            .ok()
            .and_then(|id| core.pods.get(id).or_else(|| core.arriving.get(id)))?;
        let spec = self.sandbox_spec(&pod).await.ok()?;
        Some(Inspection {
            labels: sandbox_labels(&pod),
            image: String::new(),
            spec: spec.to_string(),
            pid: pod.pause_pid(),
            created_at: pod.status().created_at,
            ended: None,
        })
    }
}

impl Engine {
    /// A container, even one that is being made: cAdvisor asks once, as soon as its cgroup appears.
    fn container_or_arriving(&self, id: ContainerId) -> Option<Arc<Container>> {
        let core = self.core();
        core.containers.get(id).or_else(|| {
            let pods = core.pods.all();
            let mut all = pods.iter().flat_map(|pod| pod.containers());
            all.find(|container| container.id == id)
        })
    }
}

async fn read_json(path: std::path::PathBuf) -> Result<Value> {
    blocking("read an OCI spec", move || {
        let text = std::fs::read(path).unwrap_or_default();
        Ok(serde_json::from_slice(&text).unwrap_or(Value::Null))
    })
    .await
}

/// What makes the pod's containers: berth, or the path of an OCI runtime.
fn runtime_type(pod: &Pod) -> String {
    match &pod.handler.runtime {
        Some(runtime) => runtime.path.display().to_string(),
        None => crate::base::handler::BUILT_IN.to_owned(),
    }
}

fn sandbox_labels(pod: &Pod) -> BTreeMap<String, String> {
    let metadata = &pod.config.metadata;
    let mut labels = pod.config.labels.clone();
    for (key, value) in [
        ("io.cri-containerd.kind", "sandbox"),
        ("io.kubernetes.pod.name", &metadata.name),
        ("io.kubernetes.pod.namespace", &metadata.namespace),
        ("io.kubernetes.pod.uid", &metadata.uid),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

fn container_labels(container: &Container) -> BTreeMap<String, String> {
    let mut labels = container.config.labels.clone();
    let metadata = &container.pod.config.metadata;
    for (key, value) in [
        ("io.cri-containerd.kind", "container"),
        ("io.kubernetes.pod.name", &*metadata.name),
        ("io.kubernetes.pod.namespace", &metadata.namespace),
        ("io.kubernetes.pod.uid", &metadata.uid),
        ("io.kubernetes.container.name", &container.config.name),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

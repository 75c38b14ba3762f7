//! Network of the pods, and the files that tell them their names.

use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crate::base::counters;
use crate::base::edits::NetDevice;
use crate::base::id::PodId;
use crate::base::stats::InterfaceStats;
use crate::engine::container_create::monitor_of;
use crate::engine::core::{blocking, blocking_step, give};
use crate::engine::error::{EngineError, Result};
use crate::engine::facade::Condition;
use crate::engine::lower::Lower;
use crate::engine::lower::selinux::label_files;
use crate::engine::pod::Pod;
use crate::network::devices::{self, MovedDevices};
use crate::network::{LivePod, NetworkError, dns};
use crate::runtime::tree;
use crate::store::{Durability, write_atomic};

/// What is asked for when a pod gives no DNS configuration.
const HOST_RESOLV_CONF: &str = "/etc/resolv.conf";

impl Lower {
    /// A fresh network namespace for a pod; none with the node's network or with a user namespace, which owns its own.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn netns(&self, pod: &Pod) -> Result<Option<OwnedFd>> {
        if pod.host_network() || pod.user_root().is_some() {
            return Ok(None);
        }
        let netns = self.network.netns().await;
        netns
            .map(Some)
            .map_err(EngineError::step("make a network namespace"))
    }

    /// Makes a network namespace that others made as those are that we make.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(super) async fn furnish_netns(&self, netns: OwnedFd) -> Result<OwnedFd> {
        self.network
            .furnish(netns)
            .await
            .map_err(EngineError::step("prepare the network namespace"))
    }

    /// Connects a pod and writes its files; its addresses.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn attach(
        &self,
        pod: &Arc<Pod>,
        netns: Option<&OwnedFd>,
        directory: &Path,
    ) -> Result<Vec<IpAddr>> {
        let ips = match netns {
            None => vec![],
            Some(netns) => {
                let attached = self
                    .network
                    .attach(pod.id, netns.as_fd(), &pod.config.port_mappings)
                    .await;
                match &attached {
                    Ok(_) => counters::ATTACHED.add(1),
                    Err(_) => counters::ATTACH_FAILED.add(1),
                }
                attached
                    .map_err(EngineError::step("connect the pod to the network"))?
                    .ips
            }
        };
        let (files, directory, known) = (Arc::clone(pod), directory.to_owned(), ips.clone());
        blocking("write the pod's files", move || {
            write_files(&files, &directory, &known)
        })
        .await?;
        Ok(ips)
    }

    /// Disconnects a pod; one that is not connected is fine.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn detach(&self, pod: PodId) -> Result<()> {
        let detached = self.network.detach(pod).await;
        match &detached {
            Ok(()) => counters::DETACHED.add(1),
            Err(_) => counters::DETACH_FAILED.add(1),
        }
        detached.map_err(EngineError::step("disconnect the pod from the network"))
    }

    /// Tells the network which pods live, after a restart. What others hold is freed.
    pub(crate) async fn restore_network(&self, live: Vec<Arc<Pod>>) {
        let live = live
            .into_iter()
            .map(|pod| LivePod {
                id: pod.id,
                netns: netns_of(&pod).ok(),
            })
            .collect();
        if let Err(error) = self.network.restore(live).await {
            tracing::error!(error = %crate::base::error::chain(&error),
                "the network could not be restored completely");
        }
    }

    /// Moves network devices of the node into the namespace of a pod, by its pause process.
    ///
    /// # Errors
    /// [`EngineError::Step`]; none is moved then.
    pub(crate) async fn take_devices(
        &self,
        pod: &Pod,
        devices: Vec<NetDevice>,
    ) -> Result<TakenDevices> {
        if devices.is_empty() {
            return Ok(TakenDevices(None));
        }
        let netns = netns_of(pod)?;
        blocking_step("move network devices into the pod", move || {
            let moved = devices::take(netns.as_fd(), &devices)?;
            Ok::<_, NetworkError>(TakenDevices(Some((netns, moved))))
        })
        .await
    }

    /// Counters of the interfaces that this process sees; none when it is gone.
    pub(crate) fn interfaces(&self, pid: u32) -> Vec<InterfaceStats> {
        self.network.interfaces(pid).unwrap_or_default()
    }

    /// CRI: condition `NetworkReady`. From memory.
    pub(crate) fn network_condition(&self) -> Condition {
        let (status, reason, message) = match self.network.readiness() {
            // What an administrator should know although pods get their network.
            Ok(()) => (true, String::new(), self.network.notices().join("; ")),
            Err(trouble) => (false, trouble.reason.to_owned(), trouble.message),
        };
        Condition {
            kind: "NetworkReady",
            status,
            reason,
            message,
        }
    }

    /// Takes the node's pod CIDRs.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn set_pod_cidr(&self, cidrs: &str) -> Result<()> {
        self.network
            .set_pod_cidr(cidrs)
            .await
            .map_err(EngineError::step("take the pod CIDR"))
    }
}

/// The network namespace of a pod that is not the node's.
///
/// # Errors
/// [`EngineError::Step`]: its pause has ended; [`EngineError::State`].
pub(crate) fn netns_of(pod: &Pod) -> Result<OwnedFd> {
    let monitor = monitor_of(pod)?;
    let pause = pod.lock().pause_pid;
    let open = || -> io::Result<OwnedFd> {
        let pause = pause.ok_or(ErrorKind::NotFound)?;
        let netns = tree::network_of_child(monitor.pid(), pause)?;
        if monitor.has_ended()? {
            // Its number may have been another's all along.
            return Err(ErrorKind::NotFound.into());
        }
        Ok(netns)
    };
    open().map_err(EngineError::io("find the pod's network"))
}

/// Network devices that were moved into a pod.
#[derive(Debug)]
pub(crate) struct TakenDevices(Option<(OwnedFd, MovedDevices)>);

impl TakenDevices {
    /// Moves them back; what fails is logged.
    pub(crate) async fn give_back(self) {
        let Some((netns, moved)) = self.0 else { return };
        let work = move || {
            devices::give_back(netns.as_fd(), moved);
            Ok(())
        };
        if let Err(error) = blocking("give network devices back", work).await {
            tracing::error!(%error, "network devices stay in the pod");
        }
    }
}

fn write_files(pod: &Pod, directory: &Path, ips: &[IpAddr]) -> Result<()> {
    let config = &pod.config;
    dns::hostname(&config.hostname, pod.id, None).map_err(EngineError::step("sandbox config"))?;
    let hostname = pod.hostname();
    let host_resolv_conf = match &config.dns {
        None => std::fs::read_to_string(HOST_RESOLV_CONF).unwrap_or_default(),
        Some(dns) => {
            dns::check(dns).map_err(EngineError::step("sandbox config"))?;
            String::new()
        }
    };
    let hosts = match pod.host_network() {
        true => std::fs::read_to_string("/etc/hosts").unwrap_or_default(),
        false => dns::hosts(&hostname, ips),
    };
    for (name, text) in [
        ("hosts", hosts),
        ("hostname", format!("{hostname}\n")),
        (
            "resolv.conf",
            dns::resolv_conf(config.dns.as_ref(), &host_resolv_conf),
        ),
    ] {
        let path = directory.join(name);
        write_atomic(&path, text.as_bytes(), 0o644, Durability::Process)?;
        give(&path, pod)?;
    }
    label_files(directory, &pod.labels.mount)
}

//! Figures of containers and pods, out.

use crate::base::stats::{CgroupStats, InterfaceStats, Psi, PsiLine};
use crate::cri::convert::{container, hashed, image, pod};
use crate::cri::v1;
use crate::engine::{ContainerFigures, PodFigures};

fn value(value: Option<u64>) -> Option<v1::UInt64Value> {
    value.map(|value| v1::UInt64Value { value })
}

fn psi(psi: Option<Psi>) -> Option<v1::PsiStats> {
    // The kernel counts microseconds, CRI nanoseconds.
    let line = |line: PsiLine| v1::PsiData {
        total: line.total.saturating_mul(1000),
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    psi.map(|psi| v1::PsiStats {
        full: Some(line(psi.full)),
        some: Some(line(psi.some)),
    })
}

/// CPU figures.
pub(super) fn cpu(stats: &CgroupStats, usage_nano_cores: Option<u64>) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp: stats.timestamp.0,
        usage_core_nano_seconds: value(stats.cpu_usage_ns),
        usage_nano_cores: value(usage_nano_cores),
        psi: psi(stats.cpu_psi),
    }
}

/// Memory figures.
pub(super) fn memory(stats: &CgroupStats) -> v1::MemoryUsage {
    let available = stats
        .memory_limit
        .zip(stats.memory_working_set)
        .map(|(limit, used)| limit.saturating_sub(used));
    v1::MemoryUsage {
        timestamp: stats.timestamp.0,
        working_set_bytes: value(stats.memory_working_set),
        available_bytes: value(available),
        usage_bytes: value(stats.memory_usage),
        rss_bytes: value(stats.memory_rss),
        page_faults: value(stats.page_faults),
        major_page_faults: value(stats.major_page_faults),
        psi: psi(stats.memory_psi),
    }
}

fn swap(stats: &CgroupStats) -> Option<v1::SwapUsage> {
    let usage = stats.swap_usage?;
    let available = stats.swap_limit.map(|limit| limit.saturating_sub(usage));
    Some(v1::SwapUsage {
        timestamp: stats.timestamp.0,
        swap_available_bytes: value(available),
        swap_usage_bytes: value(Some(usage)),
    })
}

fn io(stats: &CgroupStats) -> Option<v1::IoUsage> {
    stats.io_psi.map(|io| v1::IoUsage {
        timestamp: stats.timestamp.0,
        psi: psi(Some(io)),
    })
}

/// Figures of one container.
pub(in crate::cri) fn container(figures: &ContainerFigures) -> v1::ContainerStats {
    let status = &figures.status;
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: status.id.to_string(),
            metadata: Some(container::metadata_out(status)),
            labels: hashed(&status.labels),
            annotations: hashed(&status.annotations),
        }),
        cpu: Some(cpu(&figures.cgroup, figures.usage_nano_cores)),
        memory: Some(memory(&figures.cgroup)),
        writable_layer: figures.writable_layer.as_ref().map(image::filesystem),
        swap: swap(&figures.cgroup),
        io: io(&figures.cgroup),
    }
}

fn interface(stats: &InterfaceStats) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: stats.name.clone(),
        rx_bytes: value(Some(stats.rx_bytes)),
        rx_errors: value(Some(stats.rx_errors)),
        tx_bytes: value(Some(stats.tx_bytes)),
        tx_errors: value(Some(stats.tx_errors)),
    }
}

/// Figures of one pod.
pub(in crate::cri) fn pod(figures: &PodFigures) -> v1::PodSandboxStats {
    let status = &figures.status;
    let timestamp = figures.cgroup.timestamp.0;
    let mut interfaces = figures.interfaces.iter().map(interface);
    let network = interfaces.next().map(|first| v1::NetworkUsage {
        timestamp,
        default_interface: Some(first),
        interfaces: interfaces.collect(),
    });
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: status.id.to_string(),
            metadata: Some(pod::metadata_out(&status.metadata)),
            labels: hashed(&status.labels),
            annotations: hashed(&status.annotations),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(&figures.cgroup, figures.usage_nano_cores)),
            memory: Some(memory(&figures.cgroup)),
            network,
            process: figures.cgroup.pids.map(|pids| v1::ProcessUsage {
                timestamp,
                process_count: value(Some(pids)),
            }),
            containers: figures.containers.iter().map(container).collect(),
            io: io(&figures.cgroup),
        }),
        windows: None,
    }
}

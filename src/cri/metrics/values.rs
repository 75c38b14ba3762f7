//! From figures to metrics.

use crate::base::stats::{CgroupStats, FilesystemSize, InterfaceStats, IoKinds, Psi, PsiLine};
use crate::cri::metrics::Descriptor;
use crate::cri::metrics::descriptors as d;
use crate::cri::metrics::encoded::{Encoded, Writer};
use crate::engine::{ContainerFigures, Metrics, PodFigures};

const NANOSECONDS: u64 = 1_000_000_000;
const MICROSECONDS: u64 = 1_000_000;

/// The metrics of every pod.
pub(in crate::cri) fn all(metrics: &Metrics) -> Vec<Encoded> {
    let pods = metrics.pods.iter();
    pods.map(|figures| pod(figures, metrics)).collect()
}

fn seconds(nanoseconds: Option<u64>) -> Option<u64> {
    nanoseconds.map(|ns| ns / NANOSECONDS)
}

/// A time as seconds since 1970.
fn date(nanoseconds: i64) -> Option<u64> {
    seconds(u64::try_from(nanoseconds).ok())
}

fn pod(figures: &PodFigures, metrics: &Metrics) -> Encoded {
    let status = &figures.status;
    let (namespace, name) = (&*status.metadata.namespace, &*status.metadata.name);
    let id = status.id.to_string();
    let mut out = Writer::new(&id);
    let at = figures.cgroup.timestamp.0;
    let labels = [&*figures.cgroup_path, "", namespace, name, "", &*id];
    out.labels(labels, at);
    out.put(&d::LAST_SEEN, &[], date(at));
    if figures.own_cgroup {
        usage(&figures.cgroup, &mut out);
        pressure(&figures.cgroup, &mut out);
    }
    for interface in &figures.interfaces {
        network(interface, &mut out);
    }
    for one in &figures.containers {
        let status = &one.status;
        let image = match &*status.image_name {
            "" => &*status.image.image,
            name => name,
        };
        let id = status.id.to_string();
        let labels = [
            &*one.cgroup_path,
            image,
            namespace,
            name,
            &*status.name,
            &*id,
        ];
        out.container(&id);
        out.labels(labels, one.cgroup.timestamp.0);
        container(one, metrics, &mut out);
    }
    out.finish()
}

fn container(figures: &ContainerFigures, metrics: &Metrics, out: &mut Writer) {
    let cgroup = &figures.cgroup;
    out.put(&d::LAST_SEEN, &[], date(cgroup.timestamp.0));
    out.put(&d::START_TIME, &[], date(figures.status.started_at.0));
    usage(cgroup, out);
    throttling(cgroup, out);
    memory(cgroup, out);
    pressure(cgroup, out);
    limits(cgroup, out);
    processes(figures, out);
    let used = figures
        .writable_layer
        .as_ref()
        .map(|layer| layer.used_bytes);
    filesystem(&metrics.filesystem, used, out);
    devices(cgroup, metrics, out);
    for pages in &cgroup.huge_pages {
        out.put(&d::HUGETLB, &[&pages.size], Some(pages.usage));
        out.put(&d::HUGETLB_MAX, &[&pages.size], pages.peak);
    }
}

/// What pods with a cgroup of their own have as well.
fn usage(cgroup: &CgroupStats, out: &mut Writer) {
    out.put(&d::CPU_USAGE, &["total"], seconds(cgroup.cpu_usage_ns));
    out.put(&d::CPU_USER, &[], seconds(cgroup.cpu_user_ns));
    out.put(&d::CPU_SYSTEM, &[], seconds(cgroup.cpu_system_ns));
    out.put(&d::MEMORY_USAGE, &[], cgroup.memory_usage);
    out.put(&d::MEMORY_WORKING_SET, &[], cgroup.memory_working_set);
    out.put(&d::MEMORY_RSS, &[], cgroup.memory_rss);
    out.put(&d::MEMORY_CACHE, &[], cgroup.memory_cache);
    out.put(&d::MEMORY_SWAP, &[], cgroup.swap_usage);
    out.put(&d::OOM_EVENTS, &[], cgroup.oom_kills);
}

fn throttling(cgroup: &CgroupStats, out: &mut Writer) {
    out.put(&d::CFS_PERIODS, &[], cgroup.cpu_periods);
    out.put(&d::CFS_THROTTLED_PERIODS, &[], cgroup.cpu_throttled_periods);
    out.put(&d::CFS_THROTTLED, &[], seconds(cgroup.cpu_throttled_ns));
}

fn memory(cgroup: &CgroupStats, out: &mut Writer) {
    out.put(&d::MEMORY_FAILCNT, &[], cgroup.memory_failcnt);
    out.put(&d::MEMORY_KERNEL, &[], cgroup.memory_kernel);
    out.put(&d::MEMORY_MAPPED, &[], cgroup.memory_mapped_file);
    out.put(&d::MEMORY_MAX, &[], cgroup.memory_peak);
    for (kind, count) in [
        ("pgfault", cgroup.page_faults),
        ("pgmajfault", cgroup.major_page_faults),
    ] {
        // A container's cgroup has none below it that is not the container's.
        for scope in ["container", "hierarchy"] {
            out.put(&d::MEMORY_FAILURES, &[kind, scope], count);
        }
    }
}

fn pressure(cgroup: &CgroupStats, out: &mut Writer) {
    let total = |psi: Option<Psi>, line: fn(Psi) -> PsiLine| {
        let microseconds = psi.map(|psi| line(psi).total)?;
        Some(microseconds / MICROSECONDS)
    };
    let pairs: [(&Descriptor, &Descriptor, Option<Psi>); 3] = [
        (&d::CPU_WAITING, &d::CPU_STALLED, cgroup.cpu_psi),
        (&d::MEMORY_WAITING, &d::MEMORY_STALLED, cgroup.memory_psi),
        (&d::IO_WAITING, &d::IO_STALLED, cgroup.io_psi),
    ];
    for (waiting, stalled, psi) in pairs {
        out.put(waiting, &[], total(psi, |psi| psi.some));
        out.put(stalled, &[], total(psi, |psi| psi.full));
    }
}

fn limits(cgroup: &CgroupStats, out: &mut Writer) {
    out.put(&d::SPEC_CPU_PERIOD, &[], cgroup.cpu_period);
    out.put(&d::SPEC_CPU_QUOTA, &[], cgroup.cpu_quota);
    out.put(&d::SPEC_CPU_SHARES, &[], cgroup.cpu_shares);
    if cgroup.memory_usage.is_some() {
        let or_0 = |limit: Option<u64>| Some(limit.unwrap_or(0));
        out.put(&d::SPEC_MEMORY_LIMIT, &[], or_0(cgroup.memory_limit));
        let reservation = or_0(cgroup.memory_reservation);
        out.put(&d::SPEC_MEMORY_RESERVATION, &[], reservation);
        out.put(&d::SPEC_SWAP_LIMIT, &[], or_0(cgroup.swap_limit));
    }
    if let Some(threads) = cgroup.pids {
        out.put(&d::THREADS, &[], Some(threads));
        out.put(&d::THREADS_MAX, &[], Some(cgroup.pids_limit.unwrap_or(0)));
    }
}

fn processes(figures: &ContainerFigures, out: &mut Writer) {
    let Some(found) = figures.processes else {
        return;
    };
    out.put(&d::PROCESSES, &[], Some(found.processes));
    out.put(&d::FILE_DESCRIPTORS, &[], Some(found.descriptors));
    out.put(&d::SOCKETS, &[], found.sockets);
    let limit = found.open_files_limit;
    out.put(&d::ULIMITS_SOFT, &["max_open_files"], limit);
}

fn filesystem(size: &FilesystemSize, used: Option<u64>, out: &mut Writer) {
    let device = &[&*size.device];
    out.put(&d::FS_USAGE, device, used);
    if size.bytes > 0 {
        out.put(&d::FS_LIMIT, device, Some(size.bytes));
        out.put(&d::FS_INODES, device, Some(size.inodes));
        out.put(&d::FS_INODES_FREE, device, Some(size.inodes_free));
    }
}

fn devices(cgroup: &CgroupStats, metrics: &Metrics, out: &mut Writer) {
    for device in &cgroup.devices {
        let key = (device.major, device.minor);
        let name = metrics.devices.get(&key).map_or("", String::as_str);
        let (major, minor) = (key.0.to_string(), key.1.to_string());
        let kind = |bytes: fn(IoKinds) -> u64| device.kinds.map(bytes);
        for (operation, bytes) in [
            ("Read", Some(device.read_bytes)),
            ("Write", Some(device.written_bytes)),
            ("Sync", kind(|kinds| kinds.sync)),
            ("Async", kind(|kinds| kinds.asynchronous)),
            ("Discard", kind(|kinds| kinds.discarded)),
            ("Total", kind(|kinds| kinds.total)),
        ] {
            out.put(&d::BLKIO, &[name, &major, &minor, operation], bytes);
        }
        out.put(&d::FS_READ_BYTES, &[name], Some(device.read_bytes));
        out.put(&d::FS_READS, &[name], Some(device.reads));
        out.put(&d::FS_WRITTEN_BYTES, &[name], Some(device.written_bytes));
        out.put(&d::FS_WRITES, &[name], Some(device.writes));
    }
}

fn network(interface: &InterfaceStats, out: &mut Writer) {
    let name = &[&*interface.name];
    for (metric, value) in [
        (&d::RECEIVED_BYTES, interface.rx_bytes),
        (&d::RECEIVED_PACKETS, interface.rx_packets),
        (&d::RECEIVE_ERRORS, interface.rx_errors),
        (&d::RECEIVE_DROPPED, interface.rx_dropped),
        (&d::SENT_BYTES, interface.tx_bytes),
        (&d::SENT_PACKETS, interface.tx_packets),
        (&d::SEND_ERRORS, interface.tx_errors),
        (&d::SEND_DROPPED, interface.tx_dropped),
    ] {
        out.put(metric, name, Some(value));
    }
}

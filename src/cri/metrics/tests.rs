//! What is written is read back by prost's own decoder.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use prost::Message as _;

use super::*;
use crate::base::clock::Timestamp;
use crate::base::container::{ContainerState, ContainerStatus, Resources};
use crate::base::image::{FilesystemUsage, ImageSpec};
use crate::base::pod::{PodMetadata, PodState, PodStatus};
use crate::base::stats::{
    CgroupStats, DeviceIo, FilesystemSize, HugePages, InterfaceStats, ProcessStats, Psi, PsiLine,
};
use crate::engine::{ContainerFigures, Metrics, PodFigures};

/// `PodSandboxMetrics` as the generated message would be.
#[derive(Clone, PartialEq, prost::Message)]
struct Decoded {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, repeated, tag = "2")]
    metrics: Vec<Metric>,
    #[prost(message, repeated, tag = "3")]
    container_metrics: Vec<OfContainer>,
}

/// `ContainerMetrics`, the same.
#[derive(Clone, PartialEq, prost::Message)]
struct OfContainer {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(message, repeated, tag = "2")]
    metrics: Vec<Metric>,
}

/// `Metric`, the same.
#[derive(Clone, PartialEq, prost::Message)]
struct Metric {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(int64, tag = "2")]
    timestamp: i64,
    #[prost(enumeration = "v1::MetricType", tag = "3")]
    metric_type: i32,
    #[prost(string, repeated, tag = "4")]
    label_values: Vec<String>,
    #[prost(message, optional, tag = "5")]
    value: Option<v1::UInt64Value>,
}

/// Every figure there is, each with a value of its own.
fn cgroup() -> CgroupStats {
    let psi = |n: u64| {
        let line = |total| PsiLine {
            total,
            ..PsiLine::default()
        };
        Some(Psi {
            some: line(n * 1_000_000),
            full: line(n * 2_000_000),
        })
    };
    CgroupStats {
        timestamp: Timestamp(7_000_000_000),
        cpu_usage_ns: Some(12_900_000_000),
        cpu_user_ns: Some(1_000_000_000),
        cpu_system_ns: Some(2_000_000_000),
        cpu_periods: Some(3),
        cpu_throttled_periods: Some(4),
        cpu_throttled_ns: Some(5_000_000_000),
        memory_usage: Some(6),
        memory_peak: Some(7),
        memory_working_set: Some(8),
        memory_rss: Some(9),
        memory_cache: Some(10),
        memory_mapped_file: Some(11),
        memory_kernel: Some(12),
        memory_limit: Some(13),
        memory_failcnt: Some(0),
        page_faults: Some(15),
        major_page_faults: Some(16),
        swap_usage: Some(17),
        swap_limit: Some(18),
        oom_kills: Some(19),
        pids: Some(20),
        pids_limit: None,
        cpu_period: Some(100_000),
        cpu_quota: Some(22),
        cpu_shares: Some(23),
        memory_reservation: None,
        devices: vec![DeviceIo {
            major: 8,
            minor: 1,
            read_bytes: 24,
            written_bytes: 25,
            reads: 26,
            writes: u64::MAX,
            kinds: None,
        }],
        huge_pages: vec![HugePages {
            size: "2MB".to_owned(),
            usage: 27,
            peak: Some(28),
        }],
        cpu_psi: psi(30),
        memory_psi: psi(31),
        io_psi: psi(32),
    }
}

fn status() -> ContainerStatus {
    ContainerStatus {
        id: "cd".repeat(32).parse().unwrap(),
        pod_id: "ab".repeat(32).parse().unwrap(),
        name: "main".to_owned(),
        attempt: 0,
        state: ContainerState::Running,
        created_at: Timestamp(1),
        started_at: Timestamp(2),
        finished_at: Timestamp(0),
        exit_code: 0,
        image: ImageSpec::default(),
        image_name: "img:1".to_owned(),
        image_ref: String::new(),
        image_id: String::new(),
        reason: String::new(),
        message: String::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        mounts: vec![],
        log_path: String::new(),
        resources: Resources::default(),
        user: None,
        stop_signal: 15,
    }
}

fn metrics() -> Metrics {
    let container = ContainerFigures {
        status: Arc::new(status()),
        cgroup_path: "/pods/p/c".to_owned(),
        cgroup: cgroup(),
        usage_nano_cores: None,
        writable_layer: Some(FilesystemUsage {
            used_bytes: 40,
            ..FilesystemUsage::default()
        }),
        processes: Some(ProcessStats {
            processes: 1,
            descriptors: 2,
            sockets: Some(3),
            open_files_limit: Some(1024),
        }),
    };
    let status = PodStatus {
        id: "ab".repeat(32).parse().unwrap(),
        metadata: PodMetadata {
            name: "web".to_owned(),
            namespace: "shop".to_owned(),
            ..PodMetadata::default()
        },
        state: PodState::Ready,
        created_at: Timestamp(1),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        runtime_handler: String::new(),
        ips: vec![],
        namespaces: crate::base::security::NamespaceOptions::default(),
    };
    Metrics {
        pods: vec![PodFigures {
            status: Arc::new(status),
            cgroup_path: "/pods/p".to_owned(),
            own_cgroup: true,
            cgroup: cgroup(),
            usage_nano_cores: None,
            interfaces: vec![InterfaceStats {
                name: "eth0".to_owned(),
                rx_bytes: 50,
                ..InterfaceStats::default()
            }],
            containers: vec![container],
        }],
        filesystem: FilesystemSize {
            device: "/dev/sda1".to_owned(),
            bytes: 60,
            inodes: 61,
            inodes_free: 62,
        },
        devices: BTreeMap::from([((8, 1), "/dev/sda".to_owned())]),
    }
}

fn decoded(metrics: &Metrics) -> Decoded {
    let encoded = all(metrics).remove(0);
    let bytes = encoded.encode_to_vec();
    // What is kept by decoding is what came.
    assert_eq!(Encoded::decode(&*bytes).unwrap(), encoded);
    Decoded::decode(&*bytes).unwrap()
}

#[test]
fn every_name_has_values_and_the_labels_of_its_descriptor() {
    let found = decoded(&metrics());
    assert_eq!(found.pod_sandbox_id, "ab".repeat(32));
    assert_eq!(found.container_metrics.len(), 1);
    let keys: BTreeMap<_, _> = descriptors()
        .into_iter()
        .map(|one| (one.name, one.label_keys))
        .collect();
    assert_eq!(keys.len(), 56);
    let mut seen = BTreeSet::new();
    for metric in found
        .metrics
        .iter()
        .chain(&found.container_metrics[0].metrics)
    {
        let keys = &keys[&metric.name];
        assert_eq!(metric.label_values.len(), keys.len(), "{metric:?}");
        assert_eq!(keys[..5], ["id", "image", "namespace", "pod", "container"]);
        assert_eq!(metric.timestamp, 7_000_000_000);
        assert!(metric.value.is_some(), "{metric:?}");
        seen.insert(metric.name.clone());
    }
    let names: BTreeSet<_> = keys.keys().map(Clone::clone).collect();
    assert_eq!(seen, names, "each has a value");
}

#[test]
fn values_and_labels() {
    let found = decoded(&metrics());
    let of = |list: &[Metric], name: &str| {
        let mut all = list
            .iter()
            .filter(|one| one.name == format!("container_{name}"));
        let one = all.next().unwrap();
        (
            one.label_values.clone(),
            one.value.unwrap().value,
            one.metric_type(),
        )
    };
    let (labels, value, kind) = of(
        &found.container_metrics[0].metrics,
        "cpu_usage_seconds_total",
    );
    assert_eq!(
        labels,
        [
            "/pods/p/c",
            "img:1",
            "shop",
            "web",
            "main",
            &"cd".repeat(32),
            "total"
        ]
    );
    assert_eq!((value, kind), (12, v1::MetricType::Counter));
    let (_, value, kind) = of(&found.container_metrics[0].metrics, "threads_max");
    assert_eq!((value, kind), (0, v1::MetricType::Gauge));
    let (labels, value, _) = of(&found.metrics, "network_receive_bytes_total");
    assert_eq!(
        labels,
        ["/pods/p", "", "shop", "web", "", &"ab".repeat(32), "eth0"]
    );
    assert_eq!(value, 50);
    let (labels, value, _) = of(&found.container_metrics[0].metrics, "fs_writes_total");
    assert_eq!((labels[6].as_str(), value), ("/dev/sda", u64::MAX));
    let (_, value, _) = of(&found.metrics, "pressure_io_stalled_seconds_total");
    assert_eq!(value, 64);
}

#[test]
fn what_cannot_be_read_is_absent() {
    let mut metrics = metrics();
    let cgroup = &mut metrics.pods[0].containers[0].cgroup;
    (cgroup.cpu_psi, cgroup.memory_psi, cgroup.io_psi) = (None, None, None);
    cgroup.cpu_quota = None;
    let found = decoded(&metrics);
    let names: Vec<_> = found.container_metrics[0]
        .metrics
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert!(!names.iter().any(|name| name.contains("pressure")));
    assert!(!names.contains(&"container_spec_cpu_quota"));
    assert!(names.contains(&"container_spec_cpu_period"));
}

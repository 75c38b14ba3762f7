//! Counts the calls: how many, how long, with what outcome. For the daemon's metrics endpoint.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tonic::Code;

use crate::base::counters::{head, sample};

/// Every call that is counted by its name, as `Service/Method`; all others are counted together.
const NAMES: [&str; 50] = [
    "RuntimeService/Version",
    "RuntimeService/RunPodSandbox",
    "RuntimeService/StopPodSandbox",
    "RuntimeService/RemovePodSandbox",
    "RuntimeService/PodSandboxStatus",
    "RuntimeService/ListPodSandbox",
    "RuntimeService/StreamPodSandboxes",
    "RuntimeService/CreateContainer",
    "RuntimeService/StartContainer",
    "RuntimeService/StopContainer",
    "RuntimeService/RemoveContainer",
    "RuntimeService/ListContainers",
    "RuntimeService/StreamContainers",
    "RuntimeService/ContainerStatus",
    "RuntimeService/UpdateContainerResources",
    "RuntimeService/ReopenContainerLog",
    "RuntimeService/ExecSync",
    "RuntimeService/Exec",
    "RuntimeService/Attach",
    "RuntimeService/PortForward",
    "RuntimeService/ContainerStats",
    "RuntimeService/ListContainerStats",
    "RuntimeService/StreamContainerStats",
    "RuntimeService/PodSandboxStats",
    "RuntimeService/ListPodSandboxStats",
    "RuntimeService/StreamPodSandboxStats",
    "RuntimeService/UpdateRuntimeConfig",
    "RuntimeService/Status",
    "RuntimeService/CheckpointContainer",
    "RuntimeService/CheckpointPod",
    "RuntimeService/RestorePod",
    "RuntimeService/GetContainerEvents",
    "RuntimeService/ListMetricDescriptors",
    "RuntimeService/ListPodSandboxMetrics",
    "RuntimeService/StreamPodSandboxMetrics",
    "RuntimeService/RuntimeConfig",
    "RuntimeService/UpdatePodSandboxResources",
    "ImageService/ListImages",
    "ImageService/StreamImages",
    "ImageService/ImageStatus",
    "ImageService/PullImage",
    "ImageService/RemoveImage",
    "ImageService/ImageFsInfo",
    "Images/Import",
    "Images/Pull",
    "Containers/Get",
    "Containers/List",
    "Tasks/Get",
    "Version/Version",
    "other",
];

/// Upper ends of the classes of durations in microseconds, and as Prometheus writes them in seconds.
const CLASSES: [(u64, &str); 10] = [
    (1_000, "0.001"),
    (5_000, "0.005"),
    (10_000, "0.01"),
    (50_000, "0.05"),
    (100_000, "0.1"),
    (500_000, "0.5"),
    (1_000_000, "1"),
    (5_000_000, "5"),
    (30_000_000, "30"),
    (120_000_000, "120"),
];

/// gRPC has codes 0 to 16.
const CODES: usize = 17;

/// What is known of one call.
#[derive(Debug)]
struct Tally {
    classes: [AtomicU64; CLASSES.len()],
    codes: [AtomicU64; CODES],
    microseconds: AtomicU64,
    running: AtomicU64,
}

static TALLIES: [Tally; NAMES.len()] = [const {
    Tally {
        classes: [const { AtomicU64::new(0) }; CLASSES.len()],
        codes: [const { AtomicU64::new(0) }; CODES],
        microseconds: AtomicU64::new(0),
        running: AtomicU64::new(0),
    }
}; NAMES.len()];

/// A call under way; when dropped it has ended, in whatever way.
#[derive(Debug)]
pub(super) struct Call(&'static Tally);

impl Drop for Call {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Notes the begin of a call, by service and method.
pub(super) fn begin(rpc: &str) -> Call {
    let at = NAMES.iter().position(|name| *name == rpc);
    let tally = &TALLIES[at.unwrap_or(NAMES.len() - 1)];
    tally.running.fetch_add(1, Ordering::Relaxed);
    Call(tally)
}

impl Call {
    /// Notes the answer. Of a stream: its begin.
    pub(super) fn end(self, code: Code, elapsed: Duration) {
        let tally = self.0;
        let us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        tally.microseconds.fetch_add(us, Ordering::Relaxed);
        let class = CLASSES.iter().position(|(end, _)| us <= *end);
        if let Some(class) = class {
            tally.classes[class].fetch_add(1, Ordering::Relaxed);
        }
        let code = usize::try_from(code as i32).unwrap_or(CODES);
        if let Some(count) = tally.codes.get(code) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes the calls that there were in Prometheus' text format.
pub(crate) fn render(out: &mut String) {
    let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
    let seen = || {
        let all = NAMES.iter().zip(&TALLIES);
        all.filter(|(_, tally)| {
            tally
                .codes
                .iter()
                .chain([&tally.running])
                .any(|n| get(n) > 0)
        })
    };
    let family = "berth_rpc_total";
    head(out, family, "counter", "Calls by their outcome.");
    for (name, tally) in seen() {
        for (code, count) in tally.codes.iter().enumerate() {
            let number = i32::try_from(code).unwrap_or_default();
            let code = Code::from_i32(number);
            let count = get(count);
            if count > 0 {
                let labels = format!("rpc=\"{name}\",code=\"{code:?}\"");
                sample(out, family, &labels, count);
            }
        }
    }
    let family = "berth_rpc_running";
    head(out, family, "gauge", "Calls that are not answered yet.");
    for (name, tally) in seen() {
        sample(out, family, &format!("rpc=\"{name}\""), get(&tally.running));
    }
    let family = "berth_rpc_duration_seconds";
    let help = "Time until the answer; of a stream, until its begin.";
    head(out, family, "histogram", help);
    for (name, tally) in seen() {
        let all = tally.codes.iter().map(get).sum::<u64>();
        let mut below = 0;
        for (class, (_, end)) in tally.classes.iter().zip(CLASSES) {
            below += get(class);
            let labels = format!("rpc=\"{name}\",le=\"{end}\"");
            sample(out, "berth_rpc_duration_seconds_bucket", &labels, below);
        }
        let labels = format!("rpc=\"{name}\",le=\"+Inf\"");
        sample(out, "berth_rpc_duration_seconds_bucket", &labels, all);
        let us = get(&tally.microseconds);
        let labels = format!("{{rpc=\"{name}\"}}");
        let _infallible = write!(
            out,
            "{family}_sum{labels} {}.{:06}\n{family}_count{labels} {all}\n",
            us / 1_000_000,
            us % 1_000_000
        )
        .is_ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_grow_and_unknown_calls_share_a_name() {
        begin("RuntimeService/CheckpointPod").end(Code::Ok, Duration::from_millis(7));
        begin("RuntimeService/CheckpointPod").end(Code::Internal, Duration::from_secs(999));
        let running = begin("no/such");
        let mut text = String::new();
        render(&mut text);
        for line in [
            "berth_rpc_total{rpc=\"RuntimeService/CheckpointPod\",code=\"Ok\"} 1",
            "berth_rpc_total{rpc=\"RuntimeService/CheckpointPod\",code=\"Internal\"} 1",
            "berth_rpc_duration_seconds_bucket{rpc=\"RuntimeService/CheckpointPod\",le=\"0.005\"} 0",
            "berth_rpc_duration_seconds_bucket{rpc=\"RuntimeService/CheckpointPod\",le=\"120\"} 1",
            "berth_rpc_duration_seconds_bucket{rpc=\"RuntimeService/CheckpointPod\",le=\"+Inf\"} 2",
            "berth_rpc_duration_seconds_sum{rpc=\"RuntimeService/CheckpointPod\"} 999.007000",
            "berth_rpc_running{rpc=\"other\"} 1",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        drop(running);
    }

    #[test]
    fn every_call_of_cri_has_a_name() {
        for line in include_str!("../../tests/fixtures/cri-v1-facts.txt").lines() {
            let Some(rpc) = line.strip_prefix("rpc ") else {
                continue;
            };
            let name = rpc.split(':').next().unwrap().replace('.', "/");
            assert!(NAMES.contains(&&*name), "{name}");
        }
    }
}

//! What the daemon counts of itself, for its metrics endpoint. Counting costs one atomic addition, whether
//! somebody reads or not.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows while the daemon runs.
#[derive(Debug)]
pub(crate) struct Counter {
    family: &'static str,
    /// As Prometheus writes them, without braces; empty: none.
    labels: &'static str,
    help: &'static str,
    value: AtomicU64,
}

impl Counter {
    /// Adds to it.
    pub(crate) fn add(&self, more: u64) {
        self.value.fetch_add(more, Ordering::Relaxed);
    }

    /// Its value now.
    pub(crate) fn get(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($constant:ident: $family:literal $labels:literal = $help:literal;)+) => {
        $(
            #[doc = $help]
            pub(crate) static $constant: Counter = Counter {
                family: $family,
                labels: $labels,
                help: $help,
                value: AtomicU64::new(0),
            };
        )+

        static ALL: &[&Counter] = &[$(&$constant),+];
    };
}

// Those of one family stand together.
counters! {
    EVENTS_PUBLISHED: "berth_events_published_total" "" = "Pod and container events.";
    EVENTS_DROPPED: "berth_events_dropped_total" "" = "Events that a listener lost because it read too slowly, or that nobody asked for in time.";
    OOM_KILLS: "berth_container_oom_kills_total" "" = "Containers that ended because the kernel killed them for want of memory.";
    PULLS_DONE: "berth_image_pulls_total" "result=\"ok\"" = "Pulls of images by their result.";
    PULLS_FAILED: "berth_image_pulls_total" "result=\"error\"" = "Pulls of images by their result.";
    STALLS: "berth_image_stalls_total" "" = "Requests to registries given up because no byte came for too long (pull_progress_timeout).";
    PULLED_BYTES: "berth_image_pull_bytes_total" "" = "Compressed bytes of layers that were fetched.";
    LAYERS_FETCHED: "berth_image_layers_total" "source=\"registry\"" = "Layers of pulled images by where they came from.";
    LAYERS_REUSED: "berth_image_layers_total" "source=\"store\"" = "Layers of pulled images by where they came from.";
    ATTACHED: "berth_network_operations_total" "operation=\"attach\",result=\"ok\"" = "Connections of pods to the network.";
    ATTACH_FAILED: "berth_network_operations_total" "operation=\"attach\",result=\"error\"" = "Connections of pods to the network.";
    DETACHED: "berth_network_operations_total" "operation=\"detach\",result=\"ok\"" = "Connections of pods to the network.";
    DETACH_FAILED: "berth_network_operations_total" "operation=\"detach\",result=\"error\"" = "Connections of pods to the network.";
}

/// Writes `# HELP` and `# TYPE` of a family.
pub(crate) fn head(out: &mut String, family: &str, kind: &str, help: &str) {
    let _infallible = write!(out, "# HELP {family} {help}\n# TYPE {family} {kind}\n").is_ok();
}

/// Writes one sample; `labels` as Prometheus writes them, without braces.
pub(crate) fn sample(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _infallible = match labels {
        "" => writeln!(out, "{name} {value}").is_ok(),
        _ => writeln!(out, "{name}{{{labels}}} {value}").is_ok(),
    };
}

/// Writes all counters in Prometheus' text format (version 0.0.4).
pub(crate) fn render(out: &mut String) {
    let mut last = "";
    for counter in ALL {
        if counter.family != last {
            head(out, counter.family, "counter", counter.help);
            last = counter.family;
        }
        sample(out, counter.family, counter.labels, counter.get());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_have_one_head() {
        let mut text = String::new();
        render(&mut text);
        let mut heads: Vec<_> = text.lines().filter(|l| l.starts_with("# TYPE ")).collect();
        let samples = text.lines().filter(|line| !line.starts_with('#')).count();
        assert_eq!(samples, ALL.len());
        let all = heads.len();
        heads.sort_unstable();
        heads.dedup();
        assert_eq!(heads.len(), all);
        assert!(text.contains("berth_image_pulls_total{result=\"ok\"} "));
    }
}

//! The metrics of `ListMetricDescriptors` and `ListPodSandboxMetrics`: names and labels as kubelet's
//! cAdvisor has them, for kubelet hands them to Prometheus unchanged.
//!
//! Values are whole numbers, so seconds are whole seconds. What a node cannot tell (pressure on cgroup
//! v1, the peak of huge pages on v2) has no value rather than 0.

mod descriptors;
mod encoded;
mod values;

pub(in crate::cri) use encoded::Encoded;
pub(in crate::cri) use values::all;

use crate::cri::v1;

/// Labels that every metric has, first.
const COMMON: [&str; 6] = ["id", "image", "namespace", "pod", "container", "name"];

/// A metric, before any value.
#[derive(Debug)]
pub(super) struct Descriptor {
    name: &'static str,
    help: &'static str,
    kind: v1::MetricType,
    /// Labels after the common ones.
    labels: &'static [&'static str],
}

/// All descriptors; always the same.
pub(in crate::cri) fn descriptors() -> Vec<v1::MetricDescriptor> {
    let all = descriptors::ALL.iter().map(|one| v1::MetricDescriptor {
        name: one.name.to_owned(),
        help: one.help.to_owned(),
        label_keys: COMMON
            .iter()
            .chain(one.labels)
            .map(|key| (*key).to_owned())
            .collect(),
    });
    all.collect()
}

#[cfg(test)]
mod tests;

//! Runtime handlers: the names by which a pod chooses what makes its containers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::security::{ContainerSecurity, SecurityProfile};

/// Name of the handler that is always there: berth itself.
pub(crate) const BUILT_IN: &str = "berth";

/// How long the making of a container may take unless the handler says otherwise. A slow volume may take its time; kubelet
/// waits two minutes, and is told why before that.
const CREATE_TIMEOUT: Duration = Duration::from_secs(110);

/// An OCI runtime program and how it is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OciRuntime {
    /// The program; an absolute path.
    pub(crate) path: PathBuf,
    /// Where it keeps its state (`--root`).
    pub(crate) root: PathBuf,
    /// More global arguments; they come before the sub-command.
    pub(crate) arguments: Vec<String>,
}

/// What a handler means. Pods keep it as it was when they were made, whatever the configuration says later.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Handler {
    /// Its name in the configuration, for messages; empty in records of before it was kept.
    #[serde(default)]
    pub(crate) name: String,
    /// The program that makes containers; absent: berth itself.
    pub(crate) runtime: Option<OciRuntime>,
    /// A privileged container gets only the devices that it names.
    pub(crate) privileged_without_host_devices: bool,
    /// Keys of pod annotations that go into OCI specs; a last `*` stands for any rest.
    pub(crate) pod_annotations: Vec<String>,
    /// As above, of container annotations.
    pub(crate) container_annotations: Vec<String>,
    /// What containers get that ask for nothing else.
    #[serde(default)]
    pub(crate) defaults: Defaults,
    /// Seconds that the making of a container may take; 0: as without a word of it.
    #[serde(default)]
    pub(crate) create_timeout_s: u32,
    /// Bytes: a smaller memory limit is refused.
    #[serde(default)]
    pub(crate) min_memory: u64,
    /// `/sys/fs/cgroup` of unprivileged containers is writable too.
    #[serde(default)]
    pub(crate) cgroup_writable: bool,
    /// Execs run on the first CPU of a container that has CPUs of its own.
    #[serde(default)]
    pub(crate) exec_on_first_cpu: bool,
    /// JSON of the OCI spec that containers begin with; what it says of [`Defaults`] is in those.
    #[serde(default)]
    pub(crate) base_spec: Option<String>,
}

impl Handler {
    /// How long the making of a container may take, its hooks included.
    pub(crate) fn create_timeout(&self) -> Duration {
        match self.create_timeout_s {
            0 => CREATE_TIMEOUT,
            seconds => Duration::from_secs(seconds.into()),
        }
    }

    /// A key of its table in the configuration, for messages.
    pub(crate) fn key(&self, key: &str) -> String {
        match self.name.as_str() {
            "" => format!("runtimes.NAME.{key}"),
            name => format!("runtimes.{name}.{key}"),
        }
    }
}

/// What the configuration gives to containers that ask for nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Defaults {
    /// Where CRI names no seccomp profile; absent: unconfined.
    pub(crate) seccomp: Option<SecurityProfile>,
    /// Of privileged containers, whatever CRI names; absent: unconfined.
    pub(crate) privileged_seccomp: Option<SecurityProfile>,
    /// Capabilities to which CRI's changes apply, bit n for capability n; absent: berth's own set.
    pub(crate) capabilities: Option<u64>,
    /// Sysctls of pods, (key with dots, value), checked; one of a namespace that is the node's does not count.
    pub(crate) sysctls: Vec<(String, String)>,
    /// (resource number, soft, hard); `u64::MAX`: unlimited.
    pub(crate) rlimits: Vec<(u32, u64, u64)>,
    /// Variables that image and CRI may set anew.
    pub(crate) env: Vec<(String, String)>,
    /// Devices that CRI names belong to the container's user and group.
    pub(crate) device_ownership: bool,
}

impl Defaults {
    /// The seccomp profile of a container, asked for or by default; absent: unconfined.
    pub(crate) fn seccomp_of<'a>(
        &'a self,
        security: &'a ContainerSecurity,
    ) -> Option<&'a SecurityProfile> {
        match (security.privileged, &security.seccomp) {
            (true, _) => self.privileged_seccomp.as_ref(),
            (false, None) => self.seccomp.as_ref(),
            (false, asked) => asked.as_ref(),
        }
    }
}

/// All handlers of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handlers {
    /// Which one the empty name means; it is in `named`.
    pub(crate) default: String,
    /// By name; [`BUILT_IN`] is among them.
    pub(crate) named: BTreeMap<String, Handler>,
}

impl Default for Handlers {
    fn default() -> Self {
        Self {
            default: BUILT_IN.to_owned(),
            named: BTreeMap::from([(
                BUILT_IN.to_owned(),
                Handler {
                    name: BUILT_IN.to_owned(),
                    ..Handler::default()
                },
            )]),
        }
    }
}

/// The annotations whose keys `patterns` let through.
pub(crate) fn passed(
    annotations: &BTreeMap<String, String>,
    patterns: &[String],
) -> BTreeMap<String, String> {
    let fits = |key: &str| {
        patterns.iter().any(|pattern| {
            pattern
                .strip_suffix('*')
                .map_or(key == pattern, |front| key.starts_with(front))
        })
    };
    let chosen = annotations.iter().filter(|(key, _)| fits(key));
    chosen
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_let_annotations_through() {
        let given = ["a", "io.katacontainers.x", "io.kata", "b*"];
        let given: BTreeMap<String, String> = given
            .into_iter()
            .map(|key| (key.to_owned(), String::new()))
            .collect();
        let keys = |patterns: &[&str]| {
            let patterns: Vec<String> = patterns.iter().map(|text| (*text).to_owned()).collect();
            passed(&given, &patterns).into_keys().collect::<Vec<_>>()
        };
        assert!(keys(&[]).is_empty());
        assert_eq!(keys(&["io.katacontainers.*"]), ["io.katacontainers.x"]);
        assert_eq!(keys(&["a", "io.kata"]), ["a", "io.kata"]);
        assert_eq!(keys(&["b*"]), ["b*"]);
        assert_eq!(keys(&["*"]).len(), 4);
    }
}

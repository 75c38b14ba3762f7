//! `[runtimes.NAME]`: the runtime handlers of the node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::handler::{BUILT_IN, Defaults, Handler, Handlers, OciRuntime};
use crate::daemon::config::defaults::{profile, variable};
use crate::runtime::spec::base_spec::Base;

/// Keys that other runtimes have in such a table and berth has not: what to do instead.
const NOT_HERE: [(&str, &str); 15] = [
    (
        "allowed_annotations",
        "remove it; pod_annotations and container_annotations let annotations through to the OCI runtime",
    ),
    ("cni_conf_dir", NO_CNI),
    ("cni_max_conf_num", NO_CNI),
    ("io_type", OWN_MONITOR),
    ("monitor_cgroup", OWN_MONITOR),
    ("monitor_env", OWN_MONITOR),
    ("monitor_path", OWN_MONITOR),
    (
        "options",
        "remove it; path (BinaryName), root (Root) and arguments stand in the table itself",
    ),
    ("runtime_path", "berth's name of this key is path"),
    ("runtime_root", "berth's name of this key is root"),
    ("runtime_type", NO_TYPE),
    (
        "sandboxer",
        "berth makes every sandbox itself: remove it (`podsandbox` and the empty one are no others)",
    ),
    (
        "snapshotter",
        "berth has one store of layers, for all handlers, mounted by overlayfs: remove it",
    ),
    (
        "runtime_config_path",
        "berth gives a runtime no such file: name it in arguments, if the runtime takes it there",
    ),
    ("type", NO_TYPE),
];
const NO_CNI: &str =
    "berth's own network serves all handlers, CNI is not built in this version: remove it";
const OWN_MONITOR: &str = "berth has a monitor of its own, the same for all handlers: remove it";
const NO_TYPE: &str = "a handler is an OCI runtime by its path, or berth itself without: remove it. Shims (runtime v2, \
    `vm`, `pod`) cannot be used";
/// Below this many bytes no container starts, with whatever runtime: a sleeping busybox needs 288 KiB with berth itself, about
/// as much with crun, and 3.2 MiB with runc (cgroup v1, Linux 6.18).
const MIN_MEMORY: u64 = 512 << 10;
/// Seconds of `container_create_timeout`.
const CREATE_TIMEOUT: std::ops::RangeInclusive<u32> = 1..=3600;

/// One handler.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Runtime {
    /// The OCI runtime; absent: berth itself.
    pub(crate) path: Option<PathBuf>,
    /// Where it keeps its state; absent: a directory below `state`.
    pub(crate) root: Option<PathBuf>,
    /// Global arguments before the sub-command.
    pub(crate) arguments: Vec<String>,
    /// A privileged container gets only the devices that it names.
    pub(crate) privileged_without_host_devices: bool,
    /// Pod annotations that go into OCI specs.
    pub(crate) pod_annotations: Vec<String>,
    /// Container annotations that go into OCI specs.
    pub(crate) container_annotations: Vec<String>,
    /// Instead of `unset_seccomp_profile`.
    pub(crate) seccomp_profile: Option<String>,
    /// Instead of `privileged_seccomp_profile` above the tables.
    pub(crate) privileged_seccomp_profile: Option<String>,
    /// After `default_env`.
    pub(crate) env: Vec<String>,
    /// Instead of `path` on nodes of a platform: `linux/arm64` to a path.
    pub(crate) platform_runtime_paths: BTreeMap<String, PathBuf>,
    /// Seconds that the making of a container may take.
    pub(crate) container_create_timeout: Option<u32>,
    /// The smallest memory limit, as in `12MiB`.
    pub(crate) container_min_memory: Option<String>,
    /// `first`, or empty.
    pub(crate) exec_cpu_affinity: String,
    /// Unprivileged containers may write to their cgroups.
    pub(crate) cgroup_writable: bool,
    /// A file with the OCI spec that containers begin with; empty: none.
    pub(crate) base_runtime_spec: PathBuf,
    /// Its content, checked.
    #[serde(skip)]
    base: Option<String>,
}

/// The example in the default file.
pub(crate) const EXAMPLE: &str = "\
# [runtimes.runc]
# path = \"/usr/sbin/runc\"                  # the OCI runtime; without it the handler is berth itself
# root = \"/run/berth/runtimes/runc\"        # where it keeps its state; this is the default
# arguments = []                            # global arguments before the sub-command
# privileged_without_host_devices = false   # a privileged container gets only the devices that it names
# pod_annotations = []                      # annotations that go into OCI specs, as \"io.katacontainers.*\"
# container_annotations = []
# seccomp_profile = \"unconfined\"            # instead of unset_seccomp_profile; so the next
# privileged_seccomp_profile = \"unconfined\"
# env = []                                  # more of default_env
# platform_runtime_paths = {}               # instead of path on nodes of a platform: { \"linux/arm64\" = \"/opt/runc\" }
# container_create_timeout = 110            # seconds that the runtime may take to create a container, hooks included. kubelet
#                                           # waits 120 and then asks again, which joins the work: more than that is of use
# container_min_memory = \"512KiB\"           # a smaller memory limit is refused (runc itself needs 4MiB, CRI-O wants 12MiB)
# exec_cpu_affinity = \"\"                    # \"first\": execs run on the first CPU of a container with CPUs of its own
# cgroup_writable = false                   # cgroup v2 with nsdelegate: /sys/fs/cgroup is writable for every container
# base_runtime_spec = \"\"                    # JSON file of the OCI spec that containers begin with; pods' own settings come over it
";

/// Are there only keys that berth has? A name that nobody has is serde's to refuse.
///
/// # Errors
/// Key, value and mend of the first that is not.
pub(crate) fn check_keys(tables: Option<&toml::Value>) -> Result<(), (String, String, String)> {
    let tables = tables.and_then(toml::Value::as_table);
    for (name, table) in tables.into_iter().flatten() {
        for (key, value) in table.as_table().into_iter().flatten() {
            let known = NOT_HERE.iter().find(|(known, _)| known == key);
            if let Some((_, mend)) = known {
                let key = format!("runtimes.{name}.{key}");
                return Err((key, value.to_string(), (*mend).to_owned()));
            }
        }
    }
    Ok(())
}

/// Are all values possible?
///
/// # Errors
/// Key, value and mend of the first that is not.
pub(crate) fn check(
    runtimes: &BTreeMap<String, Runtime>,
    default: &str,
) -> Result<(), (String, String, String)> {
    let bad = |key: String, value: &dyn std::fmt::Debug, mend: &str| {
        Err((key, format!("{value:?}"), mend.to_owned()))
    };
    for (name, runtime) in runtimes {
        let label = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let ends = |c: char| c == '-';
        if name.is_empty()
            || name.len() > 63
            || !name.bytes().all(label)
            || name.trim_matches(ends) != name
        {
            let mend =
                "use 1 to 63 lower-case letters, digits and `-` inside, as RuntimeClass wants";
            return bad(format!("runtimes.{name}"), name, mend);
        }
        let key = |key: &str| format!("runtimes.{name}.{key}");
        for (field, path) in [("path", &runtime.path), ("root", &runtime.root)] {
            let Some(path) = path else { continue };
            if !is_plain(path) {
                return bad(key(field), path, "use an absolute path without `..`");
            }
        }
        if runtime.path.is_none() {
            if let Some(root) = &runtime.root {
                return bad(
                    key("root"),
                    root,
                    "berth itself keeps no such state: remove it, or set `path`",
                );
            }
            if !runtime.arguments.is_empty() {
                let mend = "berth itself takes none: remove it, or set `path`";
                return bad(key("arguments"), &runtime.arguments, mend);
            }
        } else if name == BUILT_IN {
            let mend = "this name is berth itself: give the OCI runtime another";
            return bad(key("path"), &runtime.path, mend);
        }
        let owned = ["--root", "--log", "--log-format"];
        let ours = |text: &&String| owned.contains(&text.split('=').next().unwrap_or_default());
        if let Some(argument) = runtime.arguments.iter().find(ours) {
            return bad(
                key("arguments"),
                argument,
                "berth sets this one: remove it (`root` is a key)",
            );
        }
        if let Some(argument) = runtime.arguments.iter().find(|text| text.contains('\0')) {
            return bad(key("arguments"), argument, "remove the NUL byte");
        }
        runtime
            .check_defaults()
            .and_then(|()| runtime.check_limits())
            .map_err(|(field, value, mend)| (key(field), value, mend))?;
        for (field, patterns) in [
            ("pod_annotations", &runtime.pod_annotations),
            ("container_annotations", &runtime.container_annotations),
        ] {
            let wild = |text: &&String| {
                text.trim_end_matches('*').contains('*') || text.ends_with("**") || text.is_empty()
            };
            if let Some(pattern) = patterns.iter().find(wild) {
                return bad(
                    key(field),
                    pattern,
                    "use a key, or its front with one `*` at the end",
                );
            }
        }
    }
    if default != BUILT_IN && !runtimes.contains_key(default) {
        let mut names: Vec<&str> = runtimes.keys().map(String::as_str).collect();
        names.push(BUILT_IN);
        let mend = format!("no such handler; there are: {}", names.join(", "));
        return bad("default_runtime".to_owned(), &default, &mend);
    }
    Ok(())
}

impl Runtime {
    /// Field, value and mend of the first default that cannot be.
    fn check_defaults(&self) -> Result<(), (&'static str, String, String)> {
        for (field, given) in [
            ("seccomp_profile", &self.seccomp_profile),
            (
                "privileged_seccomp_profile",
                &self.privileged_seccomp_profile,
            ),
        ] {
            if let Some(text) = given {
                let _profile = profile(text).map_err(|mend| (field, format!("{text:?}"), mend))?;
            }
        }
        for text in &self.env {
            let _variable = variable(text).map_err(|mend| ("env", format!("{text:?}"), mend))?;
        }
        Ok(())
    }

    /// Field, value and mend of the first of the other keys that cannot be.
    fn check_limits(&self) -> Result<(), (&'static str, String, String)> {
        let shown = |value: &dyn std::fmt::Debug| format!("{value:?}");
        if let Some(seconds) = self.container_create_timeout
            && !CREATE_TIMEOUT.contains(&seconds)
        {
            let mend = "use 1 to 3600 seconds".to_owned();
            return Err(("container_create_timeout", seconds.to_string(), mend));
        }
        if let Some(text) = &self.container_min_memory
            && bytes(text).is_none()
        {
            let mend = "write a number of bytes, or as in `12MiB`".to_owned();
            return Err(("container_min_memory", shown(text), mend));
        }
        if !matches!(self.exec_cpu_affinity.as_str(), "" | "first") {
            let mend = "use `first`, or leave it empty".to_owned();
            return Err(("exec_cpu_affinity", shown(&self.exec_cpu_affinity), mend));
        }
        for (platform, path) in &self.platform_runtime_paths {
            let field = "platform_runtime_paths";
            let named = |part: &str| {
                !part.is_empty()
                    && part
                        .bytes()
                        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            };
            let fits = platform
                .split_once('/')
                .is_some_and(|(os, architecture)| named(os) && named(architecture));
            if !fits {
                let mend = "name platforms as in `linux/arm64`".to_owned();
                return Err((field, shown(platform), mend));
            }
            if !is_plain(path) {
                let mend = "use an absolute path without `..`".to_owned();
                return Err((field, shown(path), mend));
            }
            if self.path.is_none() {
                let mend = "set `path` too: it is for all other platforms".to_owned();
                return Err((field, shown(platform), mend));
            }
        }
        Ok(())
    }

    /// The OCI runtime on this node.
    fn program(&self) -> Option<&PathBuf> {
        let own = self.platform_runtime_paths.get(&platform());
        own.or(self.path.as_ref())
    }

    /// The base spec; it was checked.
    fn base(&self) -> Base {
        let text = self.base.as_deref().map(|text| Base::read("", text));
        text.and_then(Result::ok).unwrap_or_default()
    }

    /// Those of the configuration, with those of the base spec over them, then its own. All was checked.
    fn defaults(&self, all: &Defaults) -> Defaults {
        let mut made = all.clone();
        let base = self.base();
        for limit in base.rlimits {
            made.rlimits.retain(|(known, ..)| *known != limit.0);
            made.rlimits.push(limit);
        }
        for sysctl in base.sysctls {
            made.sysctls.retain(|(known, _)| *known != sysctl.0);
            made.sysctls.push(sysctl);
        }
        made.env.extend(base.env);
        made.capabilities = base.capabilities.or(made.capabilities);
        for (own, place) in [
            (&self.seccomp_profile, &mut made.seccomp),
            (
                &self.privileged_seccomp_profile,
                &mut made.privileged_seccomp,
            ),
        ] {
            if let Some(Ok(profile)) = own.as_deref().map(profile) {
                *place = profile;
            }
        }
        let own = self.env.iter().filter_map(|text| variable(text).ok());
        made.env.extend(own);
        made
    }
}

/// Reads the files that the tables name.
///
/// # Errors
/// Key, value and mend of the first that cannot be used.
pub(crate) fn load(
    runtimes: &mut BTreeMap<String, Runtime>,
) -> Result<(), (String, String, String)> {
    for (name, runtime) in runtimes {
        let path = &runtime.base_runtime_spec;
        if path.as_os_str().is_empty() {
            continue;
        }
        let key = format!("runtimes.{name}.base_runtime_spec");
        let bad = |mend: String| (key.clone(), format!("{path:?}"), mend);
        if !is_plain(path) {
            return Err(bad("use an absolute path without `..`".to_owned()));
        }
        let text = std::fs::read_to_string(path)
            .map_err(|error| bad(format!("the file cannot be read: {error}")))?;
        Base::read("", &text).map_err(|wrong| bad(format!("in this file, {wrong}")))?;
        runtime.base = Some(text);
    }
    Ok(())
}

/// A number of bytes, with a unit or without: units are powers of 1024, as CRI-O takes them.
fn bytes(text: &str) -> Option<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// This node's platform, as images and configurations write it.
fn platform() -> String {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    format!("linux/{architecture}")
}

fn is_plain(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part.as_os_str() != "..")
}

/// The handlers that the configuration means; `state` is where their state is by default.
pub(crate) fn handlers(
    runtimes: &BTreeMap<String, Runtime>,
    default: &str,
    state: &Path,
    defaults: &Defaults,
) -> Handlers {
    let mut all = Handlers::default();
    for own in all.named.values_mut() {
        own.defaults.clone_from(defaults);
        own.min_memory = MIN_MEMORY;
    }
    default.clone_into(&mut all.default);
    for (name, given) in runtimes {
        let runtime = given.program().map(|path| OciRuntime {
            path: path.clone(),
            root: given
                .root
                .clone()
                .unwrap_or_else(|| state.join("runtimes").join(name)),
            arguments: given.arguments.clone(),
        });
        let min_memory = given.container_min_memory.as_deref();
        let handler = Handler {
            name: name.clone(),
            runtime,
            privileged_without_host_devices: given.privileged_without_host_devices,
            pod_annotations: given.pod_annotations.clone(),
            container_annotations: given.container_annotations.clone(),
            defaults: given.defaults(defaults),
            create_timeout_s: given.container_create_timeout.unwrap_or_default(),
            min_memory: min_memory.and_then(bytes).unwrap_or(MIN_MEMORY),
            cgroup_writable: given.cgroup_writable,
            exec_on_first_cpu: given.exec_cpu_affinity == "first",
            base_spec: given.base.clone(),
        };
        all.named.insert(name.clone(), handler);
    }
    all
}

#[cfg(test)]
mod tests;

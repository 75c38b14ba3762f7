//! `[runtimes.NAME]`: the runtime handlers of the node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::base::handler::{BUILT_IN, Defaults, Handler, Handlers, OciRuntime};
use crate::daemon::config::defaults::{profile, variable};

/// Keys that other runtimes have in such a table, and which are not built here.
const NOT_BUILT: [&str; 12] = [
    "base_runtime_spec",
    "cgroup_writable",
    "cni_conf_dir",
    "cni_max_conf_num",
    "container_create_timeout",
    "container_min_memory",
    "exec_cpu_affinity",
    "platform_runtime_paths",
    "runtime_type",
    "sandboxer",
    "snapshotter",
    "type",
];

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
";

/// Are there only keys that are built?
///
/// # Errors
/// Key, value and mend of the first that is not.
pub(crate) fn check_keys(tables: Option<&toml::Value>) -> Result<(), (String, String, String)> {
    let tables = tables.and_then(toml::Value::as_table);
    for (name, table) in tables.into_iter().flatten() {
        for (key, value) in table.as_table().into_iter().flatten() {
            if NOT_BUILT.contains(&key.as_str()) {
                let mend = "this key is not built in this version of berth: remove it".to_owned();
                return Err((format!("runtimes.{name}.{key}"), value.to_string(), mend));
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

    /// Those of the configuration, with its own over them. All was checked.
    fn defaults(&self, all: &Defaults) -> Defaults {
        let mut made = all.clone();
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
    }
    default.clone_into(&mut all.default);
    for (name, given) in runtimes {
        let runtime = given.path.as_ref().map(|path| OciRuntime {
            path: path.clone(),
            root: given
                .root
                .clone()
                .unwrap_or_else(|| state.join("runtimes").join(name)),
            arguments: given.arguments.clone(),
        });
        let handler = Handler {
            runtime,
            privileged_without_host_devices: given.privileged_without_host_devices,
            pod_annotations: given.pod_annotations.clone(),
            container_annotations: given.container_annotations.clone(),
            defaults: given.defaults(defaults),
        };
        all.named.insert(name.clone(), handler);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::config::Config;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("c.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn tables_become_handlers() {
        let text = "default_runtime = \"runc\"\n[runtimes.runc]\npath = \"/usr/sbin/runc\"\n\
            arguments = [\"--debug\"]\n[runtimes.test-handler]\n\
            privileged_without_host_devices = true\npod_annotations = [\"io.x.*\"]\n";
        let config = parse(text).unwrap();
        let all = handlers(
            &config.runtimes,
            &config.default_runtime,
            Path::new("/run/berth"),
            &Defaults::default(),
        );
        assert_eq!(all.default, "runc");
        let names: Vec<&str> = all.named.keys().map(String::as_str).collect();
        assert_eq!(names, ["berth", "runc", "test-handler"]);
        let runc = all.named["runc"].runtime.as_ref().unwrap();
        assert_eq!(runc.root, Path::new("/run/berth/runtimes/runc"));
        assert_eq!(runc.arguments, ["--debug"]);
        let own = &all.named["test-handler"];
        assert!(own.runtime.is_none() && own.privileged_without_host_devices);
        assert_eq!(all.named["berth"], Handler::default());
        // The example is right.
        let example: String = EXAMPLE
            .lines()
            .map(|line| format!("{}\n", line.trim_start_matches("# ")))
            .collect();
        let config = parse(&example).unwrap();
        let runc = config.handlers();
        let runc = runc.named["runc"].runtime.as_ref().unwrap();
        assert_eq!(runc.root, Path::new("/run/berth/runtimes/runc"));
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (text, part) in [
            (
                "[runtimes.kata]\nsnapshotter = \"x\"",
                "runtimes.kata.snapshotter = \"x\": this key is not built",
            ),
            (
                "[runtimes.a]\nexec_cpu_affinity = \"first\"",
                "runtimes.a.exec_cpu_affinity",
            ),
            ("[runtimes.a]\npaht = \"/x\"", "unknown field `paht`"),
            (
                "[runtimes.a]\npath = \"runc\"",
                "runtimes.a.path = \"runc\": use an absolute path",
            ),
            (
                "[runtimes.a]\npath = \"/r\"\nroot = \"/x/../y\"",
                "runtimes.a.root",
            ),
            ("[runtimes.a]\nroot = \"/x\"", "or set `path`"),
            ("[runtimes.a]\narguments = [\"x\"]", "or set `path`"),
            ("[runtimes.berth]\npath = \"/r\"", "another"),
            (
                "[runtimes.a]\npath = \"/r\"\narguments = [\"--root=/x\"]",
                "berth sets this one",
            ),
            ("[runtimes.A]\n", "lower-case"),
            ("[runtimes.a-]\n", "lower-case"),
            (
                "[runtimes.a]\npod_annotations = [\"a*b\"]",
                "one `*` at the end",
            ),
            (
                "default_runtime = \"runc\"\n[runtimes.crun]\npath = \"/c\"",
                "there are: crun, berth",
            ),
            ("runtimes = 1", "runtimes"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with("c.toml: ") && error.contains(part),
                "{text}: {error}"
            );
        }
    }
}

//! What an OCI runtime says that it can (`features` of the OCI runtime-spec, else its version), and what of a bundle that is not.
//!
//! A runtime that is asked for more ignores it without a word, or fails in words of its own, after it has begun. So the bundle is
//! compared first. What a runtime says nothing about, it may be able to do: only what it leaves out of a list, or says no to, counts.

use std::path::Path;

use serde_json::{Map, Value, json};

/// Version of the runtime-spec that bundles have. Older runtimes know it too (crun before 1.10 knows no 1.1).
const VERSION: Version = (1, 0, 2);

type Version = (u64, u64, u64);

/// What one runtime has told; by default nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Abilities {
    told: Value,
    /// The words that it was asked by, for messages.
    by: String,
}

/// What a bundle asks for and its runtime does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lack {
    /// Field of the bundle.
    pub(crate) field: &'static str,
    /// What is asked for there.
    pub(crate) value: String,
    /// Where the runtime would tell it.
    pub(crate) at: String,
}

impl Abilities {
    /// Of an answer to `PATH features`. One that is no JSON has told nothing.
    pub(crate) fn of_features(path: &Path, answer: &[u8]) -> Self {
        Self {
            told: serde_json::from_slice(answer).unwrap_or_default(),
            by: format!("`{} features`", path.display()),
        }
    }

    /// Of an answer to `PATH --version`, of a runtime that has no `features`: what the runtime-spec has in the version that it
    /// names. User namespaces are part of it from 1.0 on, but runc (before 1.1) joins none whose mappings are not its own.
    pub(crate) fn of_version(path: &Path, answer: &[u8]) -> Self {
        let text = String::from_utf8_lossy(answer);
        let spec = text
            .lines()
            .find_map(|line| version_of(line.trim().strip_prefix("spec: ")?));
        let told = match spec {
            Some((1, minor, _)) => json!({
                "ociVersionMin": "1.0.0",
                // What a patch release adds, its runtimes had before.
                "ociVersionMax": format!("1.{minor}.{}", VERSION.2),
                "mountOptions": [],
                "linux": {
                    "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
                    "mountExtensions": { "idmap": { "enabled": !text.starts_with("runc ") } },
                },
            }),
            Some((major, minor, patch)) => {
                let version = format!("{major}.{minor}.{patch}");
                json!({ "ociVersionMin": version, "ociVersionMax": version })
            }
            None => Value::Null,
        };
        Self {
            told,
            by: format!("`{} --version`", path.display()),
        }
    }

    /// Mounts that are read-only with all below them.
    pub(crate) fn has_recursive_read_only(&self) -> bool {
        self.lists("/mountOptions", "rro") == Some(true)
    }

    /// A container can join a user namespace whose ids the runtime has not mapped. runc can since it has mapped mounts (1.2).
    pub(crate) fn has_user_namespaces(&self) -> bool {
        self.lists("/linux/namespaces", "user") == Some(true)
            && self.told.pointer(IDMAP) == Some(&Value::Bool(true))
    }

    /// What says that it has no user namespaces, for messages.
    pub(crate) fn of_user_namespaces(&self) -> String {
        let by = &self.by;
        format!("linux.namespaces with \"user\" and linux.mountExtensions.idmap of {by}")
    }

    /// The version that its bundles get.
    ///
    /// # Errors
    /// It knows no version 1.
    pub(crate) fn bundle_version(&self) -> Result<String, Lack> {
        let told = |pointer| version_of(self.told.pointer(pointer)?.as_str()?);
        let (first, last) = (told("/ociVersionMin"), told("/ociVersionMax"));
        let version = VERSION
            .min(last.unwrap_or(VERSION))
            .max(first.unwrap_or((0, 0, 0)));
        let (major, minor, patch) = version;
        if major == VERSION.0 && last.is_none_or(|last| version <= last) {
            return Ok(format!("{major}.{minor}.{patch}"));
        }
        let (major, minor, patch) = VERSION;
        let value = format!("{major}.{minor}.{patch}");
        Err(self.lack("ociVersion", value, "ociVersionMin and ociVersionMax"))
    }

    /// The first thing in a bundle's `config.json` that it has not. `unified`: the container is in a cgroup of version 2.
    pub(crate) fn lacking(&self, bundle: &Map<String, Value>, unified: bool) -> Option<Lack> {
        let (kind, pointer) = match unified {
            true => ("cgroup v2", "/linux/cgroup/v2"),
            false => ("cgroup v1", "/linux/cgroup/v1"),
        };
        let no_cgroup = self.denies(pointer).then(|| (kind.to_owned(), pointer));
        let found = no_cgroup.map(|(value, pointer)| ("linux.cgroupsPath", value, pointer));
        let found = found.or_else(|| {
            wanted(bundle)
                .into_iter()
                .find(|(_, value, pointer)| match value.as_str() {
                    "" => self.denies(pointer),
                    value => self.lists(pointer, value) == Some(false),
                })
        });
        let (field, value, pointer) = found?;
        Some(self.lack(field, value, &pointer[1..].replace('/', ".")))
    }

    fn lack(&self, field: &'static str, value: String, at: &str) -> Lack {
        let at = format!("{at} of {}", self.by);
        Lack { field, value, at }
    }

    /// Whether the list there has this word; absent: there is no list.
    fn lists(&self, pointer: &str, word: &str) -> Option<bool> {
        let list = self.told.pointer(pointer)?.as_array()?;
        Some(list.iter().any(|one| one == word))
    }

    fn denies(&self, pointer: &str) -> bool {
        self.told.pointer(pointer) == Some(&Value::Bool(false))
    }
}

const IDMAP: &str = "/linux/mountExtensions/idmap/enabled";

/// Mount options that not every runtime knows; it would hand one on to the filesystem.
const RECURSIVE: [&str; 1] = ["rro"];

/// (field of the bundle, what is asked for there, where `features` has it); nothing asked for in particular: the field itself.
type Want = (&'static str, String, &'static str);

fn wanted(bundle: &Map<String, Value>) -> Vec<Want> {
    let mut all: Vec<Want> = vec![];
    let at = |pointer: &str| bundle.get("linux")?.pointer(pointer);
    let texts = |list: Option<&Value>| -> Vec<String> {
        let list = list.and_then(Value::as_array).into_iter().flatten();
        list.filter_map(|one| Some(one.as_str()?.to_owned()))
            .collect()
    };
    let hooks = bundle.get("hooks").and_then(Value::as_object);
    all.extend(
        hooks
            .into_iter()
            .flat_map(Map::keys)
            .map(|point| ("hooks", point.clone(), "/hooks")),
    );
    let namespaces = at("/namespaces").and_then(Value::as_array);
    all.extend(namespaces.into_iter().flatten().filter_map(|one| {
        let kind = one["type"].as_str()?.to_owned();
        Some(("linux.namespaces", kind, "/linux/namespaces"))
    }));
    let mounts = bundle.get("mounts").and_then(Value::as_array);
    for mount in mounts.into_iter().flatten() {
        let mut options = texts(mount.get("options"));
        options.retain(|option| RECURSIVE.contains(&option.as_str()));
        all.extend(
            options
                .into_iter()
                .map(|option| ("mounts.options", option, "/mountOptions")),
        );
    }
    if let Some(seccomp) = at("/seccomp") {
        all.extend(of_seccomp(seccomp, texts));
    }
    let process = bundle.get("process").unwrap_or(&Value::Null);
    for (value, field, pointer) in [
        (
            process.get("apparmorProfile"),
            "process.apparmorProfile",
            "/linux/apparmor/enabled",
        ),
        (
            process.get("selinuxLabel"),
            "process.selinuxLabel",
            "/linux/selinux/enabled",
        ),
        (
            at("/mountLabel"),
            "linux.mountLabel",
            "/linux/selinux/enabled",
        ),
        (at("/intelRdt"), "linux.intelRdt", "/linux/intelRdt/enabled"),
        (
            at("/intelRdt/schemata"),
            "linux.intelRdt.schemata",
            "/linux/intelRdt/schemata",
        ),
        (
            at("/intelRdt/enableMonitoring").filter(|on| **on == json!(true)),
            "linux.intelRdt.enableMonitoring",
            "/linux/intelRdt/monitoring",
        ),
    ] {
        all.extend(value.map(|_asked| (field, String::new(), pointer)));
    }
    all
}

fn of_seccomp(seccomp: &Value, texts: impl Fn(Option<&Value>) -> Vec<String>) -> Vec<Want> {
    let mut all: Vec<Want> = vec![("linux.seccomp", String::new(), "/linux/seccomp/enabled")];
    let calls = seccomp["syscalls"].as_array().into_iter().flatten();
    let (mut actions, mut operators) = (vec![&seccomp["defaultAction"]], vec![]);
    for call in calls {
        actions.push(&call["action"]);
        let compared = call["args"].as_array().into_iter().flatten();
        operators.extend(compared.map(|one| &one["op"]));
    }
    let mut add = |mut words: Vec<String>, field, pointer| {
        words.sort_unstable();
        words.dedup();
        all.extend(words.into_iter().map(|word| (field, word, pointer)));
    };
    let words = |values: Vec<&Value>| -> Vec<String> {
        let texts = values.into_iter().filter_map(Value::as_str);
        texts.map(str::to_owned).collect()
    };
    add(
        words(actions),
        "linux.seccomp.syscalls.action",
        "/linux/seccomp/actions",
    );
    add(
        words(operators),
        "linux.seccomp.syscalls.args.op",
        "/linux/seccomp/operators",
    );
    add(
        texts(seccomp.get("flags")),
        "linux.seccomp.flags",
        "/linux/seccomp/knownFlags",
    );
    all
}

/// The numbers of `1.0.2` or `1.0.2-dev`.
fn version_of(text: &str) -> Option<Version> {
    let numbers = text.split(['-', '+']).next()?;
    let mut parts = numbers.trim().splitn(3, '.').map(str::parse);
    Some((
        parts.next()?.ok()?,
        parts.next()?.ok()?,
        parts.next().unwrap_or(Ok(0)).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(answer: &Value) -> Abilities {
        Abilities::of_features(Path::new("/x/runc"), answer.to_string().as_bytes())
    }

    fn version(text: &str) -> Abilities {
        Abilities::of_version(Path::new("/x/crun"), text.as_bytes())
    }

    /// As Debian 12's says it, shortened.
    fn runc_1_1() -> Abilities {
        told(&json!({
            "ociVersionMin": "1.0.0", "ociVersionMax": "1.0.2-dev",
            "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
            "mountOptions": ["bind", "ro", "rro"],
            "linux": {
                "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
                "cgroup": { "v1": true, "v2": true },
                "seccomp": { "enabled": true, "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"],
                    "operators": ["SCMP_CMP_EQ"], "archs": ["SCMP_ARCH_X86_64"] },
                "apparmor": { "enabled": true }, "selinux": { "enabled": false },
            },
        }))
    }

    #[test]
    fn user_namespaces_are_those_that_the_runtime_has_not_mapped() {
        assert!(!runc_1_1().has_user_namespaces() && runc_1_1().has_recursive_read_only());
        let mut newer = runc_1_1();
        newer.told["linux"]["mountExtensions"] = json!({ "idmap": { "enabled": true } });
        assert!(newer.has_user_namespaces());
        newer.told["linux"]["namespaces"] = json!(["mount"]);
        assert!(!newer.has_user_namespaces());
        let crun = version("crun version 1.8.1\ncommit: f8a0\nspec: 1.0.0\n+SYSTEMD +CAP\n");
        assert!(crun.has_user_namespaces() && !crun.has_recursive_read_only());
        for other in [
            "runc version 1.0.3\nspec: 1.0.2-dev\n",
            "",
            "x 1.0\n",
            "spec: 0.9.0\n",
            "OCI specs: 1.0.2\n",
            "spec: 10.0\n",
        ] {
            assert!(!version(other).has_user_namespaces(), "{other:?}");
        }
        for answer in [json!(null), json!({}), json!({"linux": {"namespaces": 7}})] {
            assert!(!told(&answer).has_user_namespaces(), "{answer}");
        }
    }

    #[test]
    fn a_bundle_has_a_version_that_its_runtime_knows() {
        let of = |first: &str, last: &str| {
            told(&json!({"ociVersionMin": first, "ociVersionMax": last})).bundle_version()
        };
        for (first, last, wanted) in [
            ("1.0.0", "1.3.0", "1.0.2"),
            ("1.0.0", "1.0.2-dev", "1.0.2"),
            ("1.0.0", "1.0.0", "1.0.0"),
            ("1.1.0", "1.2.1", "1.1.0"),
            ("1.2.0+dev", "2.0.0", "1.2.0"),
        ] {
            assert_eq!(of(first, last).as_deref(), Ok(wanted), "{first} {last}");
        }
        for (first, last) in [("2.0.0", "2.1.0"), ("0.5.0", "0.9.0"), ("1.2.0", "1.1.0")] {
            let lack = of(first, last).unwrap_err();
            assert_eq!((lack.field, &*lack.value), ("ociVersion", "1.0.2"));
            assert_eq!(
                lack.at,
                "ociVersionMin and ociVersionMax of `/x/runc features`"
            );
        }
        assert_eq!(told(&json!({})).bundle_version().as_deref(), Ok("1.0.2"));
        let crun = version("crun version 1.8.1\nspec: 1.0.0\n").bundle_version();
        assert_eq!(crun.as_deref(), Ok("1.0.2"));
        let old = version("crun version 0.1\nspec: 0.9.0\n").bundle_version();
        assert_eq!(old.unwrap_err().field, "ociVersion");
    }

    fn bundle() -> Value {
        json!({
            "hooks": { "createContainer": [{}] },
            "mounts": [{ "options": ["ro", "rro"] }, {}],
            "process": { "apparmorProfile": "p" },
            "linux": {
                "namespaces": [{ "type": "pid" }],
                "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                    { "action": "SCMP_ACT_ALLOW", "args": [{ "op": "SCMP_CMP_EQ" }] }] },
                "intelRdt": { "schemata": ["L3:0=f"], "enableMonitoring": false },
            },
        })
    }

    /// What is lacking when the bundle, or what the runtime tells, has this value there.
    fn lacking(in_bundle: bool, pointer: &str, value: Value) -> Option<(&'static str, String)> {
        let (mut bundle, mut runtime) = (bundle(), runc_1_1());
        let of = if in_bundle {
            &mut bundle
        } else {
            &mut runtime.told
        };
        let (above, name) = pointer.rsplit_once('/').unwrap();
        let above = of.pointer_mut(above).unwrap();
        above.as_object_mut().unwrap().insert(name.into(), value);
        let lack = runtime.lacking(bundle.as_object().unwrap(), true)?;
        assert!(lack.at.ends_with(" of `/x/runc features`"), "{lack:?}");
        Some((lack.field, lack.value))
    }

    #[test]
    fn what_a_bundle_asks_for_beyond_its_runtime_is_named() {
        let (told, bundled) = (false, true);
        let equal = json!({ "op": "SCMP_CMP_GE" });
        let calls = json!([{ "action": "SCMP_ACT_ALLOW", "args": [equal] }]);
        for (place, pointer, value, field, word) in [
            (
                told,
                "/hooks",
                json!(["prestart"]),
                "hooks",
                "createContainer",
            ),
            (
                told,
                "/mountOptions",
                json!(["ro"]),
                "mounts.options",
                "rro",
            ),
            (
                told,
                "/linux/cgroup/v2",
                json!(false),
                "linux.cgroupsPath",
                "cgroup v2",
            ),
            (
                bundled,
                "/linux/namespaces",
                json!([{ "type": "time" }]),
                "linux.namespaces",
                "time",
            ),
            (
                bundled,
                "/linux/seccomp/defaultAction",
                json!("SCMP_ACT_KILL_PROCESS"),
                "linux.seccomp.syscalls.action",
                "SCMP_ACT_KILL_PROCESS",
            ),
            (
                bundled,
                "/linux/seccomp/syscalls",
                calls,
                "linux.seccomp.syscalls.args.op",
                "SCMP_CMP_GE",
            ),
            (
                told,
                "/linux/seccomp/enabled",
                json!(false),
                "linux.seccomp",
                "",
            ),
            (
                told,
                "/linux/apparmor/enabled",
                json!(false),
                "process.apparmorProfile",
                "",
            ),
            (
                bundled,
                "/process/selinuxLabel",
                json!("a:b:c:s0"),
                "process.selinuxLabel",
                "",
            ),
            (
                told,
                "/linux/intelRdt",
                json!({ "enabled": true, "schemata": false }),
                "linux.intelRdt.schemata",
                "",
            ),
        ] {
            let wanted = Some((field, word.to_owned()));
            assert_eq!(lacking(place, pointer, value), wanted, "{pointer}");
        }
    }

    #[test]
    fn what_a_runtime_has_or_says_nothing_about_is_tried() {
        let bundle = bundle();
        let bundle = bundle.as_object().unwrap();
        assert_eq!(runc_1_1().lacking(bundle, true), None);
        let silent = told(&json!({ "ociVersionMax": "1.0.2" }));
        assert_eq!(silent.lacking(bundle, false), None);
    }
}

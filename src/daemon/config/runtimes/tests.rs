//! Tables of handlers: what they mean, and what is refused.

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
    let wanted = Handler {
        name: "berth".to_owned(),
        min_memory: MIN_MEMORY,
        ..Handler::default()
    };
    assert_eq!(all.named["berth"], wanted);
    // The example is right.
    let example: String = EXAMPLE
        .lines()
        .map(|line| line.strip_prefix("# ").unwrap_or(line))
        .filter(|line| !line.starts_with([' ', '#']))
        .map(|line| format!("{line}\n"))
        .collect();
    let config = parse(&example).unwrap();
    let runc = config.handlers();
    let runc = runc.named["runc"].runtime.as_ref().unwrap();
    assert_eq!(runc.root, Path::new("/run/berth/runtimes/runc"));
}

#[test]
fn limits_of_a_handler() {
    let one = |text: &str| parse(text).unwrap().handlers().named["a"].clone();
    let plain = one("[runtimes.a]\n");
    assert_eq!(plain.create_timeout().as_secs(), 110);
    assert_eq!(plain.min_memory, 512 << 10);
    assert!(!plain.cgroup_writable && !plain.exec_on_first_cpu && plain.base_spec.is_none());
    assert_eq!(plain.key("x"), "runtimes.a.x");
    let own = one(
        "[runtimes.a]\ncontainer_create_timeout = 240\ncontainer_min_memory = \"12MiB\"\n\
        exec_cpu_affinity = \"first\"\ncgroup_writable = true\n",
    );
    assert_eq!(own.create_timeout().as_secs(), 240);
    assert_eq!(own.min_memory, 12 << 20);
    assert!(own.cgroup_writable && own.exec_on_first_cpu);
    for (text, value) in [
        ("0", Some(0)),
        ("4096", Some(4096)),
        ("500KiB", Some(500 << 10)),
        ("12 MB", Some(12 << 20)),
        ("1g", Some(1 << 30)),
        ("", None),
        ("MiB", None),
        ("-1", None),
        ("1.5MiB", None),
        ("99999999999999999999", None),
        ("99999999999GiB", None),
    ] {
        assert_eq!(bytes(text), value, "{text}");
    }
}

#[test]
fn a_path_for_each_platform() {
    let here = platform();
    let path = |platforms: &str| {
        let text = format!("[runtimes.a]\npath = \"/r\"\nplatform_runtime_paths = {platforms}");
        let handlers = parse(&text).unwrap().handlers();
        handlers.named["a"].runtime.clone().unwrap().path
    };
    assert_eq!(path("{}"), Path::new("/r"));
    assert_eq!(path("{ \"wasi/wasm32\" = \"/w\" }"), Path::new("/r"));
    assert_eq!(path(&format!("{{ \"{here}\" = \"/h\" }}")), Path::new("/h"));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "test")]
fn a_base_spec_is_read_and_gives_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("base.json");
    let with = |json: &str| {
        std::fs::write(&file, json).unwrap();
        parse(&format!(
            "default_ulimits = [\"nofile=5:6\", \"core=0\"]\ndefault_env = [\"A=1\"]\n\
             default_sysctls = [\"net.core.somaxconn=7\"]\n\
             [runtimes.a]\nenv = [\"B=own\"]\nbase_runtime_spec = {file:?}\n"
        ))
    };
    let json = r#"{"ociVersion":"1.2.0","process":{"env":["B=base","C=base"],
        "capabilities":{"bounding":["CAP_KILL"]},
        "rlimits":[{"type":"RLIMIT_NOFILE","soft":1,"hard":2}]},
        "linux":{"sysctl":{"net.core.somaxconn":"9"}}}"#;
    let handlers = with(json).unwrap().handlers();
    let of = |name: &str| handlers.named[name].defaults.clone();
    let made = of("a");
    assert_eq!(made.rlimits, [(4, 0, 0), (7, 1, 2)]);
    let env: Vec<String> = made.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(env, ["A=1", "B=base", "C=base", "B=own"]);
    assert_eq!(made.capabilities, Some(1 << 5));
    assert_eq!(
        made.sysctls,
        [("net.core.somaxconn".to_owned(), "9".to_owned())]
    );
    assert_eq!(handlers.named["a"].base_spec.as_deref(), Some(json));
    assert_eq!(of("berth").rlimits, [(7, 5, 6), (4, 0, 0)]);
    for (json, part) in [
        ("", "in this file, JSON = no OCI spec that berth can use: "),
        (r#"{"ociVersion":"1.2.0","vm":{}}"#, "unknown field `vm`"),
        (
            r#"{"ociVersion":"1.2.0","linux":{"seccomp":{"defaultAction":"SCMP_ACT_KILL"}}}"#,
            "linux.seccomp = {\"defaultAction\":\"SCMP_ACT_KILL\"}: put it into a file of its own",
        ),
    ] {
        let error = with(json).unwrap_err();
        assert!(
            error.contains("runtimes.a.base_runtime_spec = ") && error.contains(part),
            "{error}"
        );
    }
}

/// (configuration, part of the error).
const REFUSED: &[(&str, &str)] = &[
    (
        "[runtimes.kata]\nsnapshotter = \"x\"",
        "runtimes.kata.snapshotter = \"x\": berth has one store of layers",
    ),
    (
        "[runtimes.a]\ntype = \"x\"",
        "runtimes.a.type = \"x\": a handler is an OCI runtime by its path",
    ),
    (
        "[runtimes.a]\nruntime_type = \"vm\"",
        "Shims (runtime v2, `vm`, `pod`) cannot",
    ),
    (
        "[runtimes.a]\nsandboxer = \"shim\"",
        "sandboxer = \"shim\": berth makes every sandbox itself",
    ),
    (
        "[runtimes.a]\ncni_conf_dir = \"/x\"",
        "berth's own network serves all handlers",
    ),
    (
        "[runtimes.a]\ncni_max_conf_num = 1",
        "runtimes.a.cni_max_conf_num = 1: berth's own network",
    ),
    (
        "[runtimes.a]\nruntime_path = \"/x\"",
        "berth's name of this key is path",
    ),
    (
        "[runtimes.a.options]\nBinaryName = \"x\"",
        "path (BinaryName), root (Root)",
    ),
    (
        "[runtimes.a]\nexec_cpu_affinity = \"last\"",
        "runtimes.a.exec_cpu_affinity = \"last\": use `first`",
    ),
    (
        "[runtimes.a]\ncontainer_create_timeout = 0",
        "runtimes.a.container_create_timeout = 0: use 1 to 3600",
    ),
    (
        "[runtimes.a]\ncontainer_create_timeout = 3601",
        "use 1 to 3600",
    ),
    (
        "[runtimes.a]\ncontainer_min_memory = \"12 apples\"",
        "runtimes.a.container_min_memory = \"12 apples\": write a number",
    ),
    (
        "[runtimes.a]\npath = \"/r\"\nplatform_runtime_paths = { arm64 = \"/x\" }",
        "runtimes.a.platform_runtime_paths = \"arm64\": name platforms as in",
    ),
    (
        "[runtimes.a]\npath = \"/r\"\nplatform_runtime_paths = { \"linux/arm64\" = \"x\" }",
        "runtimes.a.platform_runtime_paths = \"x\": use an absolute path",
    ),
    (
        "[runtimes.a]\nplatform_runtime_paths = { \"linux/arm64\" = \"/x\" }",
        "set `path` too",
    ),
    (
        "[runtimes.a]\nbase_runtime_spec = \"/no/such\"",
        "runtimes.a.base_runtime_spec = \"/no/such\": the file cannot be read: No such file",
    ),
    (
        "[runtimes.a]\nbase_runtime_spec = \"x\"",
        "use an absolute path",
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
];

#[test]
fn what_cannot_be_is_refused_by_name() {
    for (text, part) in REFUSED {
        let error = parse(text).unwrap_err();
        assert!(
            error.starts_with("c.toml: ") && error.contains(part),
            "{text}: {error}"
        );
    }
}

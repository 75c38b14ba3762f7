//! What a configuration may say, and what is said of a wrong one.

use proptest::prelude::*;

use super::*;

fn error(text: &str) -> String {
    Config::parse(Path::new("c.toml"), text)
        .unwrap_err()
        .to_string()
}

#[test]
fn the_shipped_file_is_current() {
    assert_eq!(
        include_str!("../../../deploy/config.toml"),
        default_file(),
        "write the output of `berth config default` to deploy/config.toml"
    );
}

#[test]
fn the_default_file_means_the_defaults() {
    let text = default_file();
    let bare = Config::parse(Path::new("c"), &text).unwrap();
    assert_eq!(bare, Config::default());
    let (flat, _tables) = text.split_once("# [runtimes").unwrap();
    let set: String = flat
        .lines()
        .filter_map(|line| line.strip_prefix("# "))
        .filter(|line| {
            line.split_once(" = ")
                .is_some_and(|(key, _)| KEYS.iter().any(|k| k.name == key))
        })
        .map(|line| format!("{line}\n"))
        .collect();
    // The tables of `runtimes` have a test of their own.
    assert_eq!(set.lines().count(), KEYS.len() - 1);
    assert_eq!(Config::parse(Path::new("c"), &set).unwrap(), bare);
}

#[test]
fn unknown_keys_name_the_nearest() {
    for (written, meant) in [
        ("sokcet", "socket"),
        ("roots", "root"),
        ("loglevel", "log_level"),
        ("cgroup_manager", "cgroup_driver"),
    ] {
        let text = error(&format!("{written} = 1"));
        assert!(text.contains(&format!("did you mean `{meant}`")), "{text}");
    }
    assert!(error("[plugins]\na = 1").contains("unknown key `plugins`"));
}

#[test]
fn values_that_cannot_be_say_why() {
    for (text, part) in [
        ("network = \"cni\"", "not built in this version of berth"),
        (
            "cgroup_driver = \"systemd\"",
            "not built in this version of berth",
        ),
        ("network = \"magic\"", "use \"bridge\""),
        ("socket = \"berth.sock\"", "absolute path"),
        ("root = \"/var/../x\"", "absolute path"),
        ("bridge = \"a-name-too-long-for-linux\"", "15"),
        ("ipv4_pool = \"fd00::/64\"", "ipv4 address/prefix"),
        ("ipv6_pool = \"10.0.0.0/8\"", "ipv6 address/prefix"),
        ("ipv4_pool = \"10.0.0.0\"", "prefix"),
        ("log_level = \"loud\"", "log_level"),
        ("log_format = \"xml\"", "json"),
        ("metrics_address = \"localhost\"", "address with a port"),
        ("selinux_category_range = 1", "2 to 1024"),
        ("selinux_category_range = 1025", "2 to 1024"),
        ("max_concurrent_downloads = 0", "at least 1"),
        ("nri_socket = \"nri.sock\"", "absolute path"),
        ("nri_request_timeout = 0", "600000"),
        ("nri_validator = true\nnri_reject = [\"env\"]", "hooks, "),
        ("nri_reject = [\"hooks\"]", "nri_validator"),
        ("nri_required_plugins = [\"x\"]", "nri_validator"),
        ("cdi_spec_dirs = \"cdi\"", "absolute path"),
        ("blockio_config_file = \"io.yaml\"", "absolute path"),
        (
            "hooks_dir = [\"hooks.d\"]",
            "hooks_dir = \"hooks.d\": use an absolute path",
        ),
        ("stream_idle_timeout = 0", "use 1 to 2592000"),
        ("stream_creation_timeout = 2592001", "use 1 to 2592000"),
        ("stream_tls_cert = \"crt\"", "absolute path"),
        (
            "stream_tls_cert = \"/crt\"",
            "stream_tls_key = \"\": name both",
        ),
        (
            "stream_tls_key = \"/key\"",
            "stream_tls_cert = \"\": name both",
        ),
        ("stream_tls_ca = \"/ca\"", "stream_enable_tls = false"),
        (
            "stream_tls_min_version = \"1.3\"",
            "stream_enable_tls = false",
        ),
        (
            "stream_tls_min_version = \"VersionTLS11\"",
            "use `1.2` or `1.3`",
        ),
        (
            "stream_enable_tls = true\nstream_tls_cert = \"/no/crt\"\nstream_tls_key = \"/no/key\"",
            "stream_tls_cert = \"/no/crt\": read /no/crt: No such file",
        ),
        (
            "stream_enable_tls = true\nstream_tls_ca = \"/no/ca\"",
            "stream_tls_ca = \"/no/ca\": read /no/ca: No such file",
        ),
        (
            "stream_enable_tls = true\nstream_tls_cipher_suites = [\"NULL\"]",
            "stream_tls_cipher_suites = [\"NULL\"]: \"NULL\" is not built in",
        ),
        ("monitor_pool = \"two\"", "monitor_pool"),
        ("registry_config_path = 1", "path"),
        ("socket = ", "1"),
    ] {
        let message = error(text);
        assert!(
            message.starts_with("c.toml: ") && message.contains(part),
            "{text}: {message}"
        );
    }
}

#[test]
fn what_the_streaming_server_gets() {
    let read = |text| Config::parse(Path::new("c"), text).unwrap();
    assert_eq!(read("").stream_tls(), None);
    let limits = read("stream_creation_timeout = 2\nstream_idle_timeout = 3").stream_limits();
    assert_eq!((limits.creation.as_secs(), limits.idle.as_secs()), (2, 3));
    let defaults = read("").stream_limits();
    assert_eq!(
        (defaults.creation.as_secs(), defaults.idle.as_secs()),
        (30, 4 * 60 * 60)
    );
    let suite = "TLS_AES_256_GCM_SHA384";
    let text = format!(
        "stream_enable_tls = true\nstream_tls_min_version = \"VersionTLS13\"\nstream_tls_cipher_suites = [{suite:?}]"
    );
    let options = read(&text).stream_tls().unwrap();
    assert!(options.only_13 && options.pair.is_none() && options.client_ca.is_none());
    assert_eq!(options.cipher_suites, [suite]);
}

#[test]
fn a_list_or_one_path() {
    let read = |text| {
        Config::parse(Path::new("c"), text)
            .unwrap()
            .registry_config_path
            .0
    };
    assert_eq!(read("registry_config_path = \"/a\""), [PathBuf::from("/a")]);
    assert_eq!(
        read("registry_config_path = [\"/a\", \"/b\"]"),
        [PathBuf::from("/a"), PathBuf::from("/b")]
    );
}

proptest! {
    #[test]
    fn distance_is_a_metric(a in "[a-c]{0,6}", b in "[a-c]{0,6}", c in "[a-c]{0,6}") {
        prop_assert_eq!(distance(&a, &a), 0);
        prop_assert_eq!(distance(&a, &b), distance(&b, &a));
        prop_assert!(distance(&a, &c) <= distance(&a, &b) + distance(&b, &c));
    }

    #[test]
    fn any_text_is_an_answer(text in "\\PC{0,80}") {
        let _answer = Config::parse(Path::new("c"), &text).is_ok();
    }
}

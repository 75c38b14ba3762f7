//! Tests of the conversions: what is refused, with which field; what comes through unchanged.

mod refusals;

use proptest::prelude::*;
use tonic::{Code, Status};

use crate::base::pod::PodConfig;
use crate::base::security::{NamespaceMode, SecurityProfile};
use crate::cri::convert::check::Checked;
use crate::cri::convert::{container, image, pod, resources, stats};
use crate::cri::v1;

fn pod_config() -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "p".to_owned(),
            uid: "u".to_owned(),
            namespace: "n".to_owned(),
            attempt: 1,
        }),
        log_directory: "/var/log/pods/x".to_owned(),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption::default()),
                ..Default::default()
            }),
            resources: Some(v1::LinuxContainerResources::default()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn container_config() -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: "c".to_owned(),
            attempt: 0,
        }),
        image: Some(v1::ImageSpec {
            image: "i".to_owned(),
            ..Default::default()
        }),
        mounts: vec![v1::Mount {
            container_path: "/a".to_owned(),
            host_path: "/b".to_owned(),
            ..Default::default()
        }],
        devices: vec![v1::Device {
            container_path: "/dev/a".to_owned(),
            host_path: "/dev/b".to_owned(),
            permissions: "rw".to_owned(),
        }],
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources::default()),
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(v1::NamespaceOption::default()),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

/// The message of a refusal, which must be InvalidArgument.
fn refusal<T: std::fmt::Debug>(outcome: Checked<T>) -> String {
    let status: Status = outcome.unwrap_err().into();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    status.message().to_owned()
}

fn bad_pod(change: fn(&mut v1::PodSandboxConfig)) -> String {
    let mut config = pod_config();
    change(&mut config);
    refusal(pod::config("config", Some(config)))
}

fn bad_container(change: fn(&mut v1::ContainerConfig)) -> String {
    let mut config = container_config();
    change(&mut config);
    refusal(container::config("config", Some(config)))
}

fn linux(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxPodSandboxConfig {
    config.linux.get_or_insert_default()
}

fn pod_security(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    linux(config).security_context.get_or_insert_default()
}

fn limits(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerResources {
    let linux = config.linux.get_or_insert_default();
    linux.resources.get_or_insert_default()
}

fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

fn namespaces(config: &mut v1::ContainerConfig) -> &mut v1::NamespaceOption {
    security(config).namespace_options.get_or_insert_default()
}

const fn id(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

fn port(host_port: i32, container_port: i32) -> v1::PortMapping {
    v1::PortMapping {
        host_port,
        container_port,
        ..Default::default()
    }
}

fn user_namespace(
    mode: v1::NamespaceMode,
    uids: &[(u32, u32, u32)],
    gids: &[(u32, u32, u32)],
) -> v1::UserNamespace {
    let list = |list: &[(u32, u32, u32)]| {
        list.iter()
            .map(|(host_id, container_id, length)| v1::IdMapping {
                host_id: *host_id,
                container_id: *container_id,
                length: *length,
            })
            .collect()
    };
    v1::UserNamespace {
        mode: mode as i32,
        uids: list(uids),
        gids: list(gids),
    }
}

#[test]
fn nothing_given_is_fine() {
    let mut config = pod_config();
    config.linux = None;
    let converted = pod::config("config", Some(config)).unwrap();
    assert_eq!(converted.security.namespaces.pid, NamespaceMode::Pod);
    assert_eq!(converted.dns, None);
    let mut config = container_config();
    config.linux = None;
    let converted = container::config("config", Some(config)).unwrap();
    assert_eq!(converted.stop_signal, None);
    assert_eq!(converted.security.seccomp, None);
}

#[test]
fn empty_dns_is_asked_for() {
    let mut config = pod_config();
    config.dns_config = Some(v1::DnsConfig::default());
    let converted = pod::config("config", Some(config)).unwrap();
    assert_eq!(converted.dns, Some(crate::base::pod::DnsConfig::default()));
}

#[test]
fn ports_without_host_port_say_nothing() {
    let mut config = pod_config();
    config.port_mappings = vec![
        port(0, 80),
        v1::PortMapping {
            host_ip: "0.0.0.0".to_owned(),
            ..port(8080, 80)
        },
    ];
    let ports = pod::config("config", Some(config)).unwrap().port_mappings;
    assert_eq!(ports.len(), 1);
    assert_eq!((ports[0].host_port, ports[0].host_ip), (8080, None));
}

#[test]
#[expect(deprecated, reason = "of older clients")]
fn old_profiles_count_only_without_new_ones() {
    let convert = |config| {
        let converted = container::config("config", Some(config)).unwrap();
        (converted.security.seccomp, converted.security.apparmor)
    };
    let mut config = container_config();
    security(&mut config).seccomp_profile_path = "localhost//a/b.json".to_owned();
    security(&mut config).apparmor_profile = "localhost/mine".to_owned();
    assert_eq!(
        convert(config.clone()),
        (
            Some(SecurityProfile::Localhost("/a/b.json".to_owned())),
            Some(SecurityProfile::Localhost("mine".to_owned()))
        )
    );
    security(&mut config).seccomp = Some(v1::SecurityProfile {
        profile_type: v1::security_profile::ProfileType::Unconfined as i32,
        localhost_ref: String::new(),
    });
    security(&mut config).apparmor_profile = "runtime/default".to_owned();
    assert_eq!(
        convert(config),
        (
            Some(SecurityProfile::Unconfined),
            Some(SecurityProfile::RuntimeDefault)
        )
    );
}

#[test]
fn the_user_of_an_image_is_a_number_or_a_name() {
    for (user, uid, name) in [
        ("", Some(0), ""),
        ("0", Some(0), ""),
        ("1002:30", Some(1002), ""),
        ("www-data", None, "www-data"),
        ("www-data:100", None, "www-data"),
        (":100", Some(0), ""),
    ] {
        let mut plain = crate::base::image::Image::default();
        plain.config.user = user.to_owned();
        let item = image::item(&plain);
        assert_eq!(item.uid.map(|uid| uid.value), uid, "{user}");
        assert_eq!(item.username, name, "{user}");
    }
}

#[test]
fn credentials_are_never_printed() {
    let given = v1::AuthConfig {
        username: "SECRET-1".to_owned(),
        password: "SECRET-2".to_owned(),
        auth: "SECRET-3".to_owned(),
        server_address: "SECRET-4".to_owned(),
        identity_token: "SECRET-5".to_owned(),
        registry_token: "SECRET-6".to_owned(),
    };
    let request = v1::PullImageRequest {
        auth: Some(given.clone()),
        ..Default::default()
    };
    let credentials = image::credentials(Some(given)).unwrap();
    for text in [
        format!("{request:?}"),
        format!("{request:#?}"),
        format!("{credentials:?}"),
    ] {
        assert!(!text.contains("SECRET"), "{text}");
    }
    assert_eq!(image::credentials(Some(v1::AuthConfig::default())), None);
}

#[test]
fn pressure_is_in_nanoseconds() {
    let line = crate::base::stats::PsiLine {
        total: 7,
        ..Default::default()
    };
    let figures = crate::base::stats::CgroupStats {
        cpu_psi: Some(crate::base::stats::Psi {
            some: line,
            full: line,
        }),
        memory_limit: Some(100),
        memory_working_set: Some(30),
        ..Default::default()
    };
    let cpu = stats::cpu(&figures, Some(5));
    assert_eq!(cpu.psi.unwrap().some.unwrap().total, 7000);
    assert_eq!(cpu.usage_nano_cores.unwrap().value, 5);
    assert_eq!(stats::memory(&figures).available_bytes.unwrap().value, 70);
}

fn any_limits() -> impl Strategy<Value = v1::LinuxContainerResources> {
    (
        prop_oneof![Just(0), 1000..=1_000_000i64],
        prop_oneof![Just(0), Just(-1), 1000..=10_000_000i64],
        0..=262_144i64,
        prop_oneof![Just(0), Just(-1), 1..=i64::MAX],
        -1000..=1000i64,
        "([0-9]{1,2}(,[0-9]{1,2})*)?",
        proptest::collection::hash_map("[a-z]{1,6}\\.[a-z]{1,6}", "[a-z0-9 ]{0,8}", 0..3),
    )
        .prop_map(
            |(cpu_period, cpu_quota, cpu_shares, memory, oom_score_adj, cpus, unified)| {
                v1::LinuxContainerResources {
                    cpu_period,
                    cpu_quota,
                    cpu_shares,
                    memory_limit_in_bytes: memory,
                    oom_score_adj,
                    cpuset_cpus: cpus,
                    hugepage_limits: vec![v1::HugepageLimit {
                        page_size: "2MB".to_owned(),
                        limit: 0,
                    }],
                    unified,
                    ..Default::default()
                }
            },
        )
}

proptest! {
    #[test]
    fn limits_come_back_unchanged(given in any_limits()) {
        let converted = resources::from("linux", given.clone()).unwrap();
        prop_assert_eq!(resources::to(&converted), given);
    }

    #[test]
    fn any_name_is_an_answer(name in "\\PC{0,40}", path in "\\PC{0,40}") {
        let mut config = pod_config();
        config.metadata.as_mut().unwrap().name = name.clone();
        config.log_directory = path.clone();
        let converted: Checked<PodConfig> = pod::config("config", Some(config));
        if let Ok(converted) = converted {
            prop_assert_eq!(&converted.metadata.name, &name);
            prop_assert!(!name.contains('/') && !name.is_empty());
            prop_assert!(path.is_empty() || path.starts_with('/'));
        }
    }
}

//! What is refused, in tables: part of the message, and the change that makes a good request a bad one.

use std::collections::HashMap;

use super::{
    bad_container, bad_pod, id, limits, linux, namespaces, pod_security, port, refusal, security,
    user_namespace,
};
use crate::cri::convert::pod;
use crate::cri::v1;

/// Makes one thing wrong.
type Change<T> = fn(&mut T);

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn pods_that_cannot_be() {
    let table: &[(&str, Change<v1::PodSandboxConfig>)] = &[
        ("config.metadata is missing", |c| c.metadata = None),
        ("config.metadata.name is missing", |c| {
            c.metadata.as_mut().unwrap().name.clear();
        }),
        ("config.metadata.name", |c| {
            c.metadata.as_mut().unwrap().name = "a/b".to_owned();
        }),
        ("config.metadata.namespace", |c| {
            c.metadata.as_mut().unwrap().namespace.clear();
        }),
        ("config.metadata.uid", |c| {
            c.metadata.as_mut().unwrap().uid = "..".to_owned();
        }),
        ("config.hostname", |c| c.hostname = "a b".to_owned()),
        ("config.hostname", |c| c.hostname = "h".repeat(65)),
        ("config.log_directory", |c| {
            c.log_directory = "logs".to_owned();
        }),
        ("config.log_directory", |c| {
            c.log_directory = "/a/../b".to_owned();
        }),
        ("config.log_directory", |c| {
            c.log_directory = "/a\nb".to_owned();
        }),
        ("config.dns_config.servers[1]", |c| {
            c.dns_config = Some(v1::DnsConfig {
                servers: vec!["1.1.1.1".to_owned(), "1.1.1.1\noptions x".to_owned()],
                ..Default::default()
            });
        }),
        ("config.port_mappings[0].host_port", |c| {
            c.port_mappings = vec![port(65_536, 80)];
        }),
        ("config.port_mappings[0].host_port", |c| {
            c.port_mappings = vec![port(-1, 80)];
        }),
        ("config.port_mappings[0].container_port", |c| {
            c.port_mappings = vec![port(80, 0)];
        }),
        ("config.port_mappings[0].container_port", |c| {
            c.port_mappings = vec![port(0, 70_000)];
        }),
        ("config.port_mappings[0].protocol", |c| {
            c.port_mappings = vec![v1::PortMapping {
                protocol: 9,
                ..port(80, 80)
            }];
        }),
        ("config.port_mappings[0].host_ip", |c| {
            c.port_mappings = vec![v1::PortMapping {
                host_ip: "here".to_owned(),
                ..port(80, 80)
            }];
        }),
        ("config.port_mappings[1].host_port", |c| {
            c.port_mappings = vec![port(80, 80), port(80, 81)];
        }),
        ("config.linux.cgroup_parent", |c| {
            linux(c).cgroup_parent = "/a/../../b".to_owned();
        }),
        ("config.linux.sysctls", |c| {
            linux(c).sysctls = HashMap::from([("../kernel".to_owned(), "1".to_owned())]);
        }),
        ("config.linux.sysctls[a.b]", |c| {
            linux(c).sysctls = HashMap::from([("a.b".to_owned(), "1\n2".to_owned())]);
        }),
        ("config.linux.resources.cpu_period", |c| {
            linux(c).resources.as_mut().unwrap().cpu_period = 5;
        }),
        ("config.linux.security_context.run_as_user", |c| {
            pod_security(c).run_as_user = id(-1);
        }),
        ("config.linux.security_context.run_as_group", |c| {
            pod_security(c).run_as_group = id(1);
        }),
        (
            "config.linux.security_context.supplemental_groups[0]",
            |c| pod_security(c).supplemental_groups = vec![1 << 32],
        ),
        ("config.linux.security_context.namespace_options.pid", |c| {
            pod_security(c).namespace_options.as_mut().unwrap().pid =
                v1::NamespaceMode::Target as i32;
        }),
        (
            "config.linux.security_context.namespace_options.network",
            |c| {
                pod_security(c).namespace_options.as_mut().unwrap().network =
                    v1::NamespaceMode::Container as i32;
            },
        ),
        ("userns_options.mode", |c| {
            pod_security(c)
                .namespace_options
                .as_mut()
                .unwrap()
                .userns_options = Some(user_namespace(v1::NamespaceMode::Container, &[], &[]));
        }),
        ("userns_options.mode", |c| {
            pod_security(c)
                .namespace_options
                .as_mut()
                .unwrap()
                .userns_options = Some(user_namespace(v1::NamespaceMode::Node, &[(1, 0, 1)], &[]));
        }),
        ("userns_options.gids", |c| {
            pod_security(c)
                .namespace_options
                .as_mut()
                .unwrap()
                .userns_options = Some(user_namespace(v1::NamespaceMode::Pod, &[(1, 0, 1)], &[]));
        }),
        ("userns_options.uids[0].length", |c| {
            pod_security(c)
                .namespace_options
                .as_mut()
                .unwrap()
                .userns_options = Some(user_namespace(
                v1::NamespaceMode::Pod,
                &[(1, 0, 0)],
                &[(1, 0, 1)],
            ));
        }),
        ("config.linux.security_context.seccomp_profile_path", |c| {
            #[expect(deprecated, reason = "of older clients")]
            pod_security(c).seccomp_profile_path.push_str("mine");
        }),
    ];
    for (part, change) in table {
        let message = bad_pod(*change);
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(refusal(pod::config("config", None)).starts_with("config is missing"));
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn containers_that_cannot_be() {
    let table: &[(&str, Change<v1::ContainerConfig>)] = &[
        ("config.metadata is missing", |c| c.metadata = None),
        ("config.metadata.name is missing", |c| {
            c.metadata.as_mut().unwrap().name.clear();
        }),
        ("config.metadata.name", |c| {
            c.metadata.as_mut().unwrap().name = "a\u{7}".to_owned();
        }),
        ("config.image.image is missing", |c| c.image = None),
        ("config.command[0]", |c| {
            c.command = vec!["a\0b".to_owned()];
        }),
        ("config.args[1]", |c| {
            c.args = vec![String::new(), "\0".to_owned()];
        }),
        ("config.working_dir", |c| c.working_dir = "tmp".to_owned()),
        ("config.log_path", |c| c.log_path = "../x.log".to_owned()),
        ("config.log_path", |c| c.log_path = "/x.log".to_owned()),
        ("config.log_path", |c| c.log_path = "a\u{1b}".to_owned()),
        ("config.stop_signal", |c| c.stop_signal = 66),
        ("config.envs[0].key is missing", |c| {
            c.envs = vec![v1::KeyValue::default()];
        }),
        ("config.envs[0].key", |c| {
            c.envs = vec![v1::KeyValue {
                key: "A=B".to_owned(),
                value: vec![],
            }];
        }),
        ("config.envs[0].value", |c| {
            c.envs = vec![v1::KeyValue {
                key: "A".to_owned(),
                value: b"secret\0".to_vec(),
            }];
        }),
        ("config.mounts[0].container_path is missing", |c| {
            c.mounts[0].container_path.clear();
        }),
        ("config.mounts[0].container_path", |c| {
            c.mounts[0].container_path = "/./".to_owned();
        }),
        ("config.mounts[0].host_path is missing", |c| {
            c.mounts[0].host_path.clear();
        }),
        ("config.mounts[0].host_path", |c| {
            c.mounts[0].host_path = "rel".to_owned();
        }),
        ("config.mounts[0].host_path", |c| {
            c.mounts[0].image = Some(v1::ImageSpec::default());
        }),
        ("config.mounts[0].propagation", |c| {
            c.mounts[0].propagation = 3;
        }),
        ("config.mounts[0].recursive_read_only", |c| {
            c.mounts[0].recursive_read_only = true;
        }),
        ("config.mounts[0].recursive_read_only", |c| {
            c.mounts[0].recursive_read_only = true;
            c.mounts[0].readonly = true;
            c.mounts[0].propagation = 1;
        }),
        ("config.mounts[0].uidMappings[1]", |c| {
            let one = v1::IdMapping {
                host_id: 5,
                container_id: 0,
                length: 10,
            };
            c.mounts[0].uid_mappings = vec![
                one,
                v1::IdMapping {
                    container_id: 100,
                    host_id: 14,
                    length: 1,
                },
            ];
        }),
        ("config.mounts[0].image_sub_path", |c| {
            c.mounts[0].image_sub_path = "a".to_owned();
        }),
        ("config.devices[0].host_path is missing", |c| {
            c.devices[0].host_path.clear();
        }),
        ("config.devices[0].container_path", |c| {
            c.devices[0].container_path = "a".to_owned();
        }),
        ("config.devices[0].permissions", |c| {
            c.devices[0].permissions = "rx".to_owned();
        }),
        ("config.devices[0].permissions", |c| {
            c.devices[0].permissions = "rr".to_owned();
        }),
        ("config.CDI_devices[0].name", |c| {
            c.cdi_devices = vec![v1::CdiDevice {
                name: "gpu".to_owned(),
            }];
        }),
        ("config.linux.resources.cpu_quota", |c| {
            limits(c).cpu_quota = -5;
        }),
        ("config.linux.resources.cpu_quota", |c| {
            limits(c).cpu_quota = 10;
        }),
        ("config.linux.resources.cpu_period", |c| {
            limits(c).cpu_period = 2_000_000;
        }),
        ("config.linux.resources.cpu_shares", |c| {
            limits(c).cpu_shares = 262_145;
        }),
        ("config.linux.resources.memory_limit_in_bytes", |c| {
            limits(c).memory_limit_in_bytes = -2;
        }),
        ("config.linux.resources.memory_swap_limit_in_bytes", |c| {
            limits(c).memory_limit_in_bytes = 2;
            limits(c).memory_swap_limit_in_bytes = 1;
        }),
        ("config.linux.resources.oom_score_adj", |c| {
            limits(c).oom_score_adj = 1001;
        }),
        ("config.linux.resources.cpuset_cpus", |c| {
            limits(c).cpuset_cpus = "3-1".to_owned();
        }),
        ("config.linux.resources.cpuset_mems", |c| {
            limits(c).cpuset_mems = "0,".to_owned();
        }),
        ("config.linux.resources.unified", |c| {
            limits(c).unified = HashMap::from([("../memory.max".to_owned(), "1".to_owned())]);
        }),
        ("config.linux.resources.hugepage_limits[0].page_size", |c| {
            limits(c).hugepage_limits = vec![v1::HugepageLimit {
                page_size: "2 MB".to_owned(),
                limit: 0,
            }];
        }),
        ("config.linux.security_context.run_as_group", |c| {
            security(c).run_as_group = id(5);
        }),
        ("config.linux.security_context.run_as_username", |c| {
            security(c).run_as_user = id(5);
            security(c).run_as_username = "five".to_owned();
        }),
        (
            "config.linux.security_context.namespace_options.target_id is missing",
            |c| namespaces(c).pid = v1::NamespaceMode::Target as i32,
        ),
        ("config.linux.security_context.namespace_options.ipc", |c| {
            namespaces(c).ipc = v1::NamespaceMode::Target as i32;
        }),
        ("config.linux.security_context.masked_paths[0]", |c| {
            security(c).masked_paths = vec!["proc/kcore".to_owned()];
        }),
        ("config.linux.security_context.seccomp.localhost_ref", |c| {
            security(c).seccomp = Some(v1::SecurityProfile {
                profile_type: 2,
                localhost_ref: "profile.json".to_owned(),
            });
        }),
        ("config.linux.security_context.apparmor.profile_type", |c| {
            security(c).apparmor = Some(v1::SecurityProfile {
                profile_type: 7,
                localhost_ref: String::new(),
            });
        }),
    ];
    for (part, change) in table {
        let message = bad_container(*change);
        assert!(message.contains(part), "{part}: {message}");
        assert!(!message.contains("secret"), "{message}");
    }
}

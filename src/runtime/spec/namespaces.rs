//! Namespaces of sandboxes and containers, and the sysctls that belong to them.

use std::collections::BTreeMap;

use crate::base::pod::PodConfig;
use crate::base::security::{NamespaceMode, NamespaceOptions};
use crate::runtime::plan::{NamespaceSource, Namespaces};
use crate::runtime::spec::ContainerInput;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::userns;

const POD_OR_NODE: &str = "use POD or NODE";

/// Checks the sandbox's namespace options and makes their sources.
///
/// # Errors
/// [`SpecError::Invalid`]: a mode that the namespace does not have, or as [`userns::of_sandbox`].
pub(crate) fn of_sandbox(pod: &PodConfig) -> Result<Namespaces> {
    let options = &pod.security.namespaces;
    check_modes(options)?;
    let unless_node = |mode, source| match mode {
        NamespaceMode::Node => NamespaceSource::Host,
        _ => source,
    };
    if options.pid == NamespaceMode::Target {
        let mend = "use POD, CONTAINER or NODE";
        let problem = "names a container, a sandbox has none yet";
        return Err(SpecError::invalid(
            "namespace_options.pid",
            "TARGET",
            problem,
            mend,
        ));
    }
    let mut namespaces = Namespaces {
        network: unless_node(options.network, NamespaceSource::Passed),
        ipc: unless_node(options.ipc, NamespaceSource::New),
        // The host name belongs to the network: with the node's network comes the node's name.
        uts: unless_node(options.network, NamespaceSource::New),
        pid: unless_node(options.pid, NamespaceSource::New),
        cgroup: NamespaceSource::New,
        user: NamespaceSource::Host,
        uid_mappings: vec![],
        gid_mappings: vec![],
    };
    userns::of_sandbox(pod, &mut namespaces)?;
    Ok(namespaces)
}

fn check_modes(options: &NamespaceOptions) -> Result<()> {
    for (field, mode) in [
        ("namespace_options.network", options.network),
        ("namespace_options.ipc", options.ipc),
    ] {
        if !matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            let value = format!("{mode:?}").to_uppercase();
            return Err(SpecError::invalid(
                field,
                value,
                "is not possible",
                POD_OR_NODE,
            ));
        }
    }
    Ok(())
}

/// Checks a container's namespace options against its pod's and makes their sources. Network and IPC are
/// the pod's; a container may not ask for the node's where the pod has its own.
///
/// # Errors
/// [`SpecError::Invalid`]: an impossible mode, or one that does not agree with the pod's.
pub(crate) fn of_container(input: &ContainerInput<'_>) -> Result<Namespaces> {
    let own = &input.config.security.namespaces;
    let pod = &input.pod.security.namespaces;
    check_modes(own)?;
    let follow = |field: &str, mode, pod_mode| match (mode, pod_mode) {
        (_, NamespaceMode::Node) => Ok(NamespaceSource::Host),
        (NamespaceMode::Node, _) => Err(differs(field)),
        _ => Ok(NamespaceSource::Pod),
    };
    let network = follow("namespace_options.network", own.network, pod.network)?;
    let mut namespaces = Namespaces {
        ipc: follow("namespace_options.ipc", own.ipc, pod.ipc)?,
        uts: network.clone(),
        network,
        pid: pid(input)?,
        cgroup: NamespaceSource::New,
        user: NamespaceSource::Host,
        uid_mappings: vec![],
        gid_mappings: vec![],
    };
    userns::of_container(own, input.pod, &mut namespaces)?;
    // What is mounted for the node's cgroup namespace cannot be mounted from within a user namespace.
    if input.config.security.privileged && namespaces.user == NamespaceSource::Host {
        namespaces.cgroup = NamespaceSource::Host;
    }
    Ok(namespaces)
}

fn differs(field: &str) -> SpecError {
    let problem = "is not what the pod sandbox has";
    SpecError::invalid(field, "NODE", problem, "make both the same")
}

fn pid(input: &ContainerInput<'_>) -> Result<NamespaceSource> {
    const FIELD: &str = "namespace_options.pid";
    let own = &input.config.security.namespaces;
    let of_pod = input.pod.security.namespaces.pid;
    if own.pid != NamespaceMode::Target && !own.target_id.is_empty() {
        let field = "namespace_options.target_id";
        let problem = "is given, but the mode of pid is not TARGET";
        return Err(SpecError::invalid(
            field,
            &own.target_id,
            problem,
            "remove it",
        ));
    }
    match (own.pid, of_pod) {
        (NamespaceMode::Pod | NamespaceMode::Node, NamespaceMode::Node) => {
            Ok(NamespaceSource::Host)
        }
        (NamespaceMode::Node, _) => Err(differs(FIELD)),
        (NamespaceMode::Pod, _) => Ok(NamespaceSource::Pod),
        (NamespaceMode::Container, _) => Ok(NamespaceSource::New),
        (NamespaceMode::Target, _) => match input.target {
            Some(id) => Ok(NamespaceSource::Container(id.to_string())),
            None => Err(SpecError::invalid(
                "namespace_options.target_id",
                &own.target_id,
                "names no running container of this pod",
                "give the id of a running container of the same pod",
            )),
        },
    }
}

/// Namespace a sysctl belongs to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Network,
    Ipc,
    Uts,
}

/// The allow-list: sysctls that belong to a namespace of the pod.
fn owner(key: &str) -> Option<Owner> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shm_rmid_forced",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
    ];
    if IPC.contains(&key) || key.starts_with("fs.mqueue.") {
        Some(Owner::Ipc)
    } else if key.starts_with("net.") {
        Some(Owner::Network)
    } else if key == "kernel.domainname" {
        Some(Owner::Uts)
    } else {
        None
    }
}

/// Sysctls of a sandbox: berth's own, those of the configuration (`defaults`, but for those of a namespace that is the node's),
/// and those asked for; the later wins.
///
/// Keys have dots as separators; a `/` in one stands for a dot inside a name, as in sysctl(8).
///
/// # Errors
/// [`SpecError::Invalid`]: a sysctl of no namespace, of one that is the node's, or with characters that no
/// sysctl has.
pub(crate) fn sysctls(
    pod: &PodConfig,
    defaults: &[(String, String)],
) -> Result<Vec<(String, String)>> {
    let options = &pod.security.namespaces;
    let mut all = BTreeMap::new();
    if options.network != NamespaceMode::Node {
        // Groups that the user namespace does not have cannot be named in it.
        let groups = options.own_user().and_then(|user| user.gids.first());
        let groups = groups.map_or(u32::MAX, |mapping| mapping.length);
        let last = groups.saturating_sub(1).min(2_147_483_647);
        for (key, value) in [
            ("net.ipv4.ip_unprivileged_port_start", "0".to_owned()),
            ("net.ipv4.ping_group_range", format!("0 {last}")),
        ] {
            all.insert(key.to_owned(), value);
        }
    }
    let node = OfNode {
        network: options.network == NamespaceMode::Node,
        ipc: options.ipc == NamespaceMode::Node,
        uts: options.network == NamespaceMode::Node,
    };
    for (key, value) in defaults {
        // Where it would change the node, it is not meant.
        if check_sysctl("default_sysctls", key, value, node).is_ok() {
            all.insert(key.clone(), value.clone());
        }
    }
    for (given, value) in &pod.sysctls {
        let key = check_sysctl(&format!("sysctls[{given:?}]"), given, value, node)?;
        all.insert(key, value.clone());
    }
    Ok(all.into_iter().collect())
}

/// Which namespaces are the node's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OfNode {
    /// Network.
    pub(crate) network: bool,
    /// IPC.
    pub(crate) ipc: bool,
    /// UTS.
    pub(crate) uts: bool,
}

/// Checks one sysctl; its key with dots as separators.
///
/// # Errors
/// As [`sysctls`].
pub(crate) fn check_sysctl(field: &str, given: &str, value: &str, node: OfNode) -> Result<String> {
    let key = sysctl_key(given).ok_or_else(|| {
        let mend = "write it as in net.ipv4.ip_forward";
        SpecError::invalid(field, given, "is no name of a sysctl", mend)
    })?;
    let Some(owner) = owner(&key) else {
        let problem = "does not belong to a namespace of the pod";
        let mend = "use only net.*, fs.mqueue.*, kernel.shm*, kernel.msg*, kernel.sem";
        return Err(SpecError::invalid(field, key, problem, mend));
    };
    let (node, what) = match owner {
        Owner::Network => (node.network, "network"),
        Owner::Uts => (node.uts, "UTS"),
        Owner::Ipc => (node.ipc, "IPC"),
    };
    if node {
        let problem = format!("would change the node, whose {what} namespace the pod uses");
        let mend = "remove it, or give the pod its own namespace";
        return Err(SpecError::invalid(field, key, problem, mend));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || " \t_.,:/-".contains(c);
    if !value.chars().all(plain) || value.len() > 4096 {
        let problem = "contains what no sysctl of a namespace takes";
        let mend = "use letters, digits, blanks and _ . , : / -";
        return Err(SpecError::invalid(field, value, problem, mend));
    }
    Ok(key)
}

/// The key with dots as separators; a slash first in the text makes slashes the separators.
fn sysctl_key(given: &str) -> Option<String> {
    let first = given.find(['.', '/'])?;
    let slashes = given.as_bytes().get(first) == Some(&b'/');
    let key: String = given
        .chars()
        .map(|c| match c {
            '/' if slashes => '.',
            '.' if slashes => '/',
            c => c,
        })
        .collect();
    let good = |part: &str| {
        !part.is_empty()
            && !part.split('/').any(str::is_empty)
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-/:@".contains(c))
    };
    key.split('.').all(good).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(sysctls: &[(&str, &str)], network: NamespaceMode, ipc: NamespaceMode) -> PodConfig {
        let mut pod = PodConfig::default();
        pod.security.namespaces.network = network;
        pod.security.namespaces.ipc = ipc;
        pod.sysctls = sysctls
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        pod
    }

    #[test]
    fn default_sysctls_yield_to_given_ones() {
        use NamespaceMode::{Node, Pod};
        let given = [("net/ipv4/ip_unprivileged_port_start", "1024")];
        let made = sysctls(&pod(&given, Pod, Pod), &[]).unwrap();
        let expected = [
            ("net.ipv4.ip_unprivileged_port_start", "1024"),
            ("net.ipv4.ping_group_range", "0 2147483647"),
        ];
        assert_eq!(made, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(sysctls(&pod(&[], Node, Pod), &[]).unwrap().is_empty());
    }

    #[test]
    fn sysctls_of_the_configuration() {
        use NamespaceMode::{Node, Pod};
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let defaults = [
            pair("net.core.somaxconn", "77"),
            pair("net.ipv4.ping_group_range", "0 5"),
            pair("kernel.shmmax", "1"),
        ];
        let made = sysctls(&pod(&[("kernel.shmmax", "2")], Pod, Pod), &defaults).unwrap();
        let expected = [
            pair("kernel.shmmax", "2"),
            pair("net.core.somaxconn", "77"),
            pair("net.ipv4.ip_unprivileged_port_start", "0"),
            pair("net.ipv4.ping_group_range", "0 5"),
        ];
        assert_eq!(made, expected);
        let made = sysctls(&pod(&[], Node, Pod), &defaults).unwrap();
        assert_eq!(made, [pair("kernel.shmmax", "1")]);
    }

    #[test]
    fn only_sysctls_of_the_pods_namespaces() {
        use NamespaceMode::{Node, Pod};
        let good = [
            ("kernel.shm_rmid_forced", "1"),
            ("kernel.sem", "250 32000\t32 128"),
            ("fs.mqueue.msg_max", "10"),
            ("net.ipv4.ip_local_reserved_ports", "1-2,3"),
            ("net.ipv4.conf.eth0/100.forwarding", "1"),
            ("net/ipv4/conf/eth0.100/forwarding", "1"),
            ("net.ipv4.tcp_congestion_control", "bbr"),
            ("kernel.domainname", "example.org"),
            ("net.ipv4.ip_local_reserved_ports", ""),
        ];
        for (key, value) in good {
            assert!(
                sysctls(&pod(&[(key, value)], Pod, Pod), &[]).is_ok(),
                "{key}"
            );
        }
        let bad = [
            ("kernel.core_pattern", "|/bin/sh"),
            ("kernel.hostname", "x"),
            ("kernel.panic", "1"),
            ("vm.swappiness", "1"),
            ("fs.file-max", "1"),
            ("net..ipv4", "1"),
            ("net.", "1"),
            ("net", "1"),
            ("", "1"),
            ("net.ipv4.x+kernel.core_pattern=y", "1"),
            ("net.ipv4.ip_forward=1\nkernel.core_pattern", "1"),
            ("net./../../kernel.core_pattern", "1"),
            ("net/../kernel/core_pattern", "1"),
            ("net.ipv4.conf.//.x", "1"),
            ("net.ipv4.conf./.x", "1"),
            ("net.ipv4.ip_forward", "1+kernel.core_pattern=|x"),
            ("net.ipv4.ip_forward", "1\n"),
            ("net.ipv4.ip_forward", "1\0"),
            ("kernel.shmmax ", "1"),
            ("kernel.shm_rmid_forced\0", "1"),
        ];
        for (key, value) in bad {
            let error = sysctls(&pod(&[(key, value)], Pod, Pod), &[]);
            assert!(
                matches!(error, Err(SpecError::Invalid { .. })),
                "{key} {value}: {error:?}"
            );
        }
        for (key, network, ipc) in [
            ("net.ipv4.ip_forward", Node, Pod),
            ("kernel.domainname", Node, Pod),
            ("kernel.shmmax", Pod, Node),
            ("fs.mqueue.msg_max", Pod, Node),
        ] {
            assert!(
                sysctls(&pod(&[(key, "1")], network, ipc), &[]).is_err(),
                "{key}"
            );
        }
    }

    #[test]
    fn namespaces_of_sandboxes() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let made = of_sandbox(&pod(&[], Pod, Pod)).unwrap();
        assert_eq!(made.network, NamespaceSource::Passed);
        assert_eq!(made.uts, NamespaceSource::New);
        let made = of_sandbox(&pod(&[], Node, Node)).unwrap();
        for source in [made.network, made.uts, made.ipc] {
            assert_eq!(source, NamespaceSource::Host);
        }
        assert!(of_sandbox(&pod(&[], Container, Pod)).is_err());
        assert!(of_sandbox(&pod(&[], Pod, Target)).is_err());
        let mut target = pod(&[], Pod, Pod);
        target.security.namespaces.pid = Target;
        assert!(of_sandbox(&target).is_err());
    }
}

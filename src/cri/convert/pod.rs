//! Pod sandboxes: configuration in, status and lists out.

use std::net::IpAddr;

use crate::base::pod::{
    DnsConfig, PodConfig, PodFilter, PodMetadata, PodState, PodStatus, PortMapping, Protocol,
};
use crate::cri::convert::check::{
    Checked, absolute, climbs, invalid, known, missing, name, printable,
};
use crate::cri::convert::{container, hashed, ordered, resources, security};
use crate::cri::v1;
use crate::engine::PodMoment;

/// A sandbox configuration; `at` is its path in the request.
pub(in crate::cri) fn config(at: &str, given: Option<v1::PodSandboxConfig>) -> Checked<PodConfig> {
    let given = given.ok_or_else(|| missing(at, "give the configuration of the sandbox"))?;
    let metadata = metadata(&format!("{at}.metadata"), given.metadata)?;
    hostname(&format!("{at}.hostname"), &given.hostname)?;
    if !given.log_directory.is_empty() {
        absolute(&format!("{at}.log_directory"), &given.log_directory)?;
    }
    let linux = given.linux.unwrap_or_default();
    let field = format!("{at}.linux.cgroup_parent");
    printable(&field, &linux.cgroup_parent)?;
    if climbs(&linux.cgroup_parent) {
        return Err(invalid(
            field,
            &linux.cgroup_parent,
            "has a `..`",
            "write the cgroup without it",
        ));
    }
    for (key, value) in &linux.sysctls {
        sysctl(&format!("{at}.linux.sysctls"), key, value)?;
    }
    let limits = |name: &str, given: Option<v1::LinuxContainerResources>| {
        given
            .map(|given| resources::from(&format!("{at}.linux.{name}"), given))
            .transpose()
    };
    Ok(PodConfig {
        metadata,
        hostname: given.hostname,
        log_directory: given.log_directory,
        dns: given
            .dns_config
            .map(|given| dns(&format!("{at}.dns_config"), given))
            .transpose()?,
        port_mappings: ports(&format!("{at}.port_mappings"), &given.port_mappings)?,
        labels: ordered(given.labels),
        annotations: ordered(given.annotations),
        cgroup_parent: linux.cgroup_parent,
        sysctls: ordered(linux.sysctls),
        overhead: limits("overhead", linux.overhead)?,
        resources: limits("resources", linux.resources)?,
        security: security::pod(
            &format!("{at}.linux.security_context"),
            linux.security_context.unwrap_or_default(),
        )?,
    })
}

fn metadata(at: &str, given: Option<v1::PodSandboxMetadata>) -> Checked<PodMetadata> {
    let given =
        given.ok_or_else(|| missing(at, "give name, namespace, uid and attempt of the pod"))?;
    name(&format!("{at}.name"), &given.name)?;
    name(&format!("{at}.namespace"), &given.namespace)?;
    if !given.uid.is_empty() {
        name(&format!("{at}.uid"), &given.uid)?;
    }
    Ok(PodMetadata {
        name: given.name,
        uid: given.uid,
        namespace: given.namespace,
        attempt: given.attempt,
    })
}

/// Kernel: sethostname(2), at most 64 bytes.
fn hostname(field: &str, text: &str) -> Checked<()> {
    let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_');
    if text.len() > 64 || !text.bytes().all(fine) {
        return Err(invalid(
            field,
            &text,
            "is not a host name",
            "use at most 64 letters, digits, `-`, `.` and `_`",
        ));
    }
    Ok(())
}

fn sysctl(field: &str, key: &str, value: &str) -> Checked<()> {
    let fine = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'_' | b'/');
    if key.is_empty() || !key.bytes().all(fine) || key.contains("..") || key.starts_with('/') {
        return Err(invalid(
            field,
            &key,
            "is not the name of a sysctl",
            "use a name such as `net.ipv4.tcp_syncookies`",
        ));
    }
    if value.contains(['\0', '\n']) {
        return Err(invalid(
            format!("{field}[{key}]"),
            &value,
            "has more than one line",
            "give one line",
        ));
    }
    Ok(())
}

fn dns(at: &str, given: v1::DnsConfig) -> Checked<DnsConfig> {
    for (list, entries) in [
        ("servers", &given.servers),
        ("searches", &given.searches),
        ("options", &given.options),
    ] {
        for (n, entry) in entries.iter().enumerate() {
            if entry.is_empty() || entry.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(invalid(
                    format!("{at}.{list}[{n}]"),
                    entry,
                    "is not one word",
                    "give one entry without spaces",
                ));
            }
        }
    }
    Ok(DnsConfig {
        servers: given.servers,
        searches: given.searches,
        options: given.options,
    })
}

/// Mappings with a host port; the others say nothing to the node.
fn ports(at: &str, given: &[v1::PortMapping]) -> Checked<Vec<PortMapping>> {
    let mut all: Vec<PortMapping> = Vec::new();
    for (n, one) in given.iter().enumerate() {
        let at = format!("{at}[{n}]");
        let protocol = match known::<v1::Protocol>(&format!("{at}.protocol"), one.protocol)? {
            v1::Protocol::Tcp => Protocol::Tcp,
            v1::Protocol::Udp => Protocol::Udp,
            v1::Protocol::Sctp => Protocol::Sctp,
        };
        let port = |name: &str, value: i32| {
            u16::try_from(value).map_err(|_range| {
                invalid(
                    format!("{at}.{name}"),
                    &value,
                    "is not a port",
                    "use 1 to 65535",
                )
            })
        };
        let host_port = port("host_port", one.host_port)?;
        let container_port = port("container_port", one.container_port)?;
        let field = format!("{at}.host_ip");
        let host_ip = match one.host_ip.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_syntax| {
                invalid(
                    field,
                    &text,
                    "is not an address",
                    "use an IPv4 or IPv6 address, or leave it empty for all",
                )
            })?),
        };
        if host_port == 0 {
            continue;
        }
        if container_port == 0 {
            return Err(invalid(
                format!("{at}.container_port"),
                &0,
                "is not a port",
                "use 1 to 65535",
            ));
        }
        let mapping = PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: host_ip.filter(|ip| !ip.is_unspecified()),
        };
        if all.iter().any(|other| {
            other.protocol == protocol
                && other.host_port == host_port
                && (other.host_ip.is_none()
                    || mapping.host_ip.is_none()
                    || other.host_ip == mapping.host_ip)
        }) {
            return Err(invalid(
                format!("{at}.host_port"),
                &host_port,
                "is mapped twice",
                "map each host port of an address once",
            ));
        }
        all.push(mapping);
    }
    Ok(all)
}

/// A filter for lists.
pub(in crate::cri) fn filter(given: Option<v1::PodSandboxFilter>) -> Checked<PodFilter> {
    let given = given.unwrap_or_default();
    let state = given
        .state
        .map(|given| known::<v1::PodSandboxState>("filter.state.state", given.state))
        .transpose()?;
    Ok(PodFilter {
        id: given.id,
        state: state.map(|state| match state {
            v1::PodSandboxState::SandboxReady => PodState::Ready,
            v1::PodSandboxState::SandboxNotready => PodState::NotReady,
        }),
        labels: ordered(given.label_selector),
    })
}

/// A filter for statistics: of ready sandboxes only.
pub(in crate::cri) fn stats_filter(given: Option<v1::PodSandboxStatsFilter>) -> PodFilter {
    let given = given.unwrap_or_default();
    PodFilter {
        id: given.id,
        state: None,
        labels: ordered(given.label_selector),
    }
}

/// Identity, for statuses.
pub(super) fn metadata_out(metadata: &PodMetadata) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: metadata.name.clone(),
        uid: metadata.uid.clone(),
        namespace: metadata.namespace.clone(),
        attempt: metadata.attempt,
    }
}

fn state_out(state: PodState) -> i32 {
    match state {
        PodState::Ready => v1::PodSandboxState::SandboxReady as i32,
        PodState::NotReady => v1::PodSandboxState::SandboxNotready as i32,
    }
}

/// An item of a list.
pub(in crate::cri) fn item(pod: &PodStatus) -> v1::PodSandbox {
    v1::PodSandbox {
        id: pod.id.to_string(),
        metadata: Some(metadata_out(&pod.metadata)),
        state: state_out(pod.state),
        created_at: pod.created_at.0,
        labels: hashed(&pod.labels),
        annotations: hashed(&pod.annotations),
        runtime_handler: pod.runtime_handler.clone(),
    }
}

/// A status.
pub(in crate::cri) fn status(pod: &PodStatus) -> v1::PodSandboxStatus {
    let mut ips = pod.ips.iter().map(ToString::to_string);
    v1::PodSandboxStatus {
        id: pod.id.to_string(),
        metadata: Some(metadata_out(&pod.metadata)),
        state: state_out(pod.state),
        created_at: pod.created_at.0,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(security::namespaces_out(&pod.namespaces)),
            }),
        }),
        labels: hashed(&pod.labels),
        annotations: hashed(&pod.annotations),
        runtime_handler: pod.runtime_handler.clone(),
    }
}

/// A whole reply of PodSandboxStatus.
pub(in crate::cri) fn status_response(
    moment: &PodMoment,
    info: crate::engine::Info,
) -> v1::PodSandboxStatusResponse {
    v1::PodSandboxStatusResponse {
        status: Some(status(&moment.pod)),
        info: info.into_iter().collect(),
        containers_statuses: moment
            .containers
            .iter()
            .map(|one| container::status(one))
            .collect(),
        timestamp: moment.at.0,
    }
}

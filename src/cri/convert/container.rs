//! Containers: configuration in, status and lists out.

use crate::base::container::{
    ContainerConfig, ContainerFilter, ContainerState, ContainerStatus, Device, EventKind, Mount,
    Propagation,
};
use crate::base::image::ImageSpec;
use crate::cri::convert::check::{
    Checked, absolute, climbs, invalid, known, missing, name, no_nul, printable,
};
use crate::cri::convert::{hashed, image, ordered, pod, resources, security, signal};
use crate::cri::v1;
use crate::engine::EngineEvent;

/// A container configuration.
pub(in crate::cri) fn config(
    at: &str,
    given: Option<v1::ContainerConfig>,
) -> Checked<ContainerConfig> {
    let given = given.ok_or_else(|| missing(at, "give the configuration of the container"))?;
    let metadata = given
        .metadata
        .ok_or_else(|| missing(format!("{at}.metadata"), "give name and attempt"))?;
    name(&format!("{at}.metadata.name"), &metadata.name)?;
    for (list, words) in [("command", &given.command), ("args", &given.args)] {
        for (n, word) in words.iter().enumerate() {
            no_nul(&format!("{at}.{list}[{n}]"), word)?;
        }
    }
    if !given.working_dir.is_empty() {
        absolute_in_root(&format!("{at}.working_dir"), &given.working_dir)?;
    }
    log_path(&format!("{at}.log_path"), &given.log_path)?;
    let field = format!("{at}.stop_signal");
    let stop_signal = signal::number(known(&field, given.stop_signal)?);
    let linux = given.linux.unwrap_or_default();
    Ok(ContainerConfig {
        name: metadata.name,
        attempt: metadata.attempt,
        image: image::required(&format!("{at}.image"), given.image)?,
        command: given.command,
        args: given.args,
        working_dir: given.working_dir,
        envs: envs(&format!("{at}.envs"), given.envs)?,
        mounts: each(&format!("{at}.mounts"), given.mounts, mount)?,
        devices: each(&format!("{at}.devices"), given.devices, device)?,
        cdi_devices: each(&format!("{at}.CDI_devices"), given.cdi_devices, cdi)?,
        labels: ordered(given.labels),
        annotations: ordered(given.annotations),
        log_path: given.log_path,
        stdin: given.stdin,
        stdin_once: given.stdin_once,
        tty: given.tty,
        resources: resources::from(
            &format!("{at}.linux.resources"),
            linux.resources.unwrap_or_default(),
        )?,
        security: security::container(
            &format!("{at}.linux.security_context"),
            linux.security_context.unwrap_or_default(),
        )?,
        stop_signal,
    })
}

/// Converts each item of a list, under its own path.
fn each<P, T>(at: &str, given: Vec<P>, one: fn(&str, P) -> Checked<T>) -> Checked<Vec<T>> {
    given
        .into_iter()
        .enumerate()
        .map(|(n, item)| one(&format!("{at}[{n}]"), item))
        .collect()
}

/// A path in the container's root: `..` is harmless there, the resolver keeps it inside.
fn absolute_in_root(field: &str, path: &str) -> Checked<()> {
    printable(field, path)?;
    if !path.starts_with('/') {
        return Err(invalid(
            field,
            &path,
            "is not absolute",
            "start it with `/`",
        ));
    }
    Ok(())
}

fn log_path(field: &str, path: &str) -> Checked<()> {
    printable(field, path)?;
    if path.starts_with('/') || climbs(path) || path.ends_with('/') {
        return Err(invalid(
            field,
            &path,
            "is not a file below the pod's log directory",
            "give a relative path without `..`",
        ));
    }
    Ok(())
}

/// Values may hold a secret: they never get into a message.
fn envs(at: &str, given: Vec<v1::KeyValue>) -> Checked<Vec<(String, Vec<u8>)>> {
    let mut all = Vec::with_capacity(given.len());
    for (n, one) in given.into_iter().enumerate() {
        let field = format!("{at}[{n}].key");
        if one.key.is_empty() {
            return Err(missing(field, "give the name of the variable"));
        }
        no_nul(&field, &one.key)?;
        if one.key.contains('=') {
            return Err(invalid(
                field,
                &one.key,
                "has a `=`",
                "give the name alone, the value beside it",
            ));
        }
        if one.value.contains(&0) {
            return Err(invalid(
                format!("{at}[{n}].value"),
                &one.key,
                "has a value with a NUL character",
                "leave it out",
            ));
        }
        all.push((one.key, one.value));
    }
    Ok(all)
}

fn mount(at: &str, given: v1::Mount) -> Checked<Mount> {
    let field = format!("{at}.container_path");
    if given.container_path.is_empty() {
        return Err(missing(field, "give the path in the container"));
    }
    printable(&field, &given.container_path)?;
    // A relative path counts from the root, as in other runtimes.
    let container_path = format!("/{}", given.container_path.trim_start_matches('/'));
    if container_path
        .split('/')
        .all(|part| matches!(part, "" | "."))
    {
        return Err(invalid(
            field,
            &given.container_path,
            "is the container's root itself",
            "give a path below `/`",
        ));
    }
    let field = format!("{at}.host_path");
    match (&given.image, given.host_path.is_empty()) {
        (None, true) => {
            return Err(missing(
                field,
                "give the path on the node, or an image to mount",
            ));
        }
        (None, false) => absolute(&field, &given.host_path)?,
        (Some(_), true) => {}
        (Some(_), false) => {
            return Err(invalid(
                field,
                &given.host_path,
                "is given beside an image",
                "give one of the two",
            ));
        }
    }
    let field = format!("{at}.propagation");
    let propagation = match known::<v1::MountPropagation>(&field, given.propagation)? {
        v1::MountPropagation::PropagationPrivate => Propagation::Private,
        v1::MountPropagation::PropagationHostToContainer => Propagation::HostToContainer,
        v1::MountPropagation::PropagationBidirectional => Propagation::Bidirectional,
    };
    if given.recursive_read_only && !(given.readonly && propagation == Propagation::Private) {
        return Err(invalid(
            format!("{at}.recursive_read_only"),
            &true,
            "needs a private read-only mount",
            "set readonly and PROPAGATION_PRIVATE too",
        ));
    }
    image_mount(at, &given)?;
    Ok(Mount {
        container_path,
        host_path: given.host_path,
        readonly: given.readonly,
        recursive_read_only: given.recursive_read_only,
        selinux_relabel: given.selinux_relabel,
        propagation,
        uid_mappings: security::mappings(&format!("{at}.uidMappings"), &given.uid_mappings)?,
        gid_mappings: security::mappings(&format!("{at}.gidMappings"), &given.gid_mappings)?,
        image: given
            .image
            .map(|spec| image::required(&format!("{at}.image"), Some(spec)))
            .transpose()?,
        image_sub_path: given.image_sub_path,
        mount_options: given.mount_options,
    })
}

fn image_mount(at: &str, given: &v1::Mount) -> Checked<()> {
    let field = format!("{at}.image_sub_path");
    let path = given.image_sub_path.as_str();
    printable(&field, path)?;
    if path.starts_with('/') || climbs(path) {
        return Err(invalid(
            field,
            &path,
            "is not a directory inside the image",
            "give a relative path without `..`",
        ));
    }
    if !path.is_empty() && given.image.is_none() {
        return Err(invalid(
            field,
            &path,
            "is given without an image",
            "give the image, or leave it empty",
        ));
    }
    if given.image.is_some() && !given.readonly {
        return Err(invalid(
            format!("{at}.readonly"),
            &false,
            "is not offered for an image",
            "set readonly",
        ));
    }
    Ok(())
}

fn device(at: &str, given: v1::Device) -> Checked<Device> {
    for (name, path) in [
        ("host_path", &given.host_path),
        ("container_path", &given.container_path),
    ] {
        let field = format!("{at}.{name}");
        if path.is_empty() {
            return Err(missing(field, "give the path of the device"));
        }
        absolute(&field, path)?;
    }
    let letters = given.permissions.as_str();
    let twice = |(n, letter): (usize, char)| letters[..n].contains(letter);
    if letters.chars().any(|letter| !"rwm".contains(letter)) || letters.char_indices().any(twice) {
        return Err(invalid(
            format!("{at}.permissions"),
            &letters,
            "is not a set of permissions",
            "use letters of `rwm`, each once",
        ));
    }
    let permissions = match letters {
        "" => "rwm".to_owned(),
        _ => given.permissions,
    };
    Ok(Device {
        container_path: given.container_path,
        host_path: given.host_path,
        permissions,
    })
}

fn cdi(at: &str, given: v1::CdiDevice) -> Checked<String> {
    let field = format!("{at}.name");
    printable(&field, &given.name)?;
    match given.name.split_once('=') {
        Some((kind, device)) if kind.contains('/') && !device.is_empty() => Ok(given.name),
        _ => Err(invalid(
            field,
            &given.name,
            "is not a fully qualified CDI device",
            "use vendor/class=device",
        )),
    }
}

/// A filter for lists.
pub(in crate::cri) fn filter(given: Option<v1::ContainerFilter>) -> Checked<ContainerFilter> {
    let given = given.unwrap_or_default();
    let state = given
        .state
        .map(|given| known::<v1::ContainerState>("filter.state.state", given.state))
        .transpose()?;
    Ok(ContainerFilter {
        id: given.id,
        state: state.map(|state| match state {
            v1::ContainerState::ContainerCreated => ContainerState::Created,
            v1::ContainerState::ContainerRunning => ContainerState::Running,
            v1::ContainerState::ContainerExited => ContainerState::Exited,
            v1::ContainerState::ContainerUnknown => ContainerState::Unknown,
        }),
        pod_id: given.pod_sandbox_id,
        labels: ordered(given.label_selector),
    })
}

/// A filter for statistics: of running containers only.
pub(in crate::cri) fn stats_filter(given: Option<v1::ContainerStatsFilter>) -> ContainerFilter {
    let given = given.unwrap_or_default();
    ContainerFilter {
        id: given.id,
        state: None,
        pod_id: given.pod_sandbox_id,
        labels: ordered(given.label_selector),
    }
}

fn state_out(state: ContainerState) -> i32 {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated as i32,
        ContainerState::Running => v1::ContainerState::ContainerRunning as i32,
        ContainerState::Exited => v1::ContainerState::ContainerExited as i32,
        ContainerState::Unknown => v1::ContainerState::ContainerUnknown as i32,
    }
}

/// Name and attempt, for statuses.
pub(super) fn metadata_out(container: &ContainerStatus) -> v1::ContainerMetadata {
    v1::ContainerMetadata {
        name: container.name.clone(),
        attempt: container.attempt,
    }
}

/// An item of a list. Its image is as asked for at the creation, its `image_ref` the image's id: kubelet
/// counts images in use by it.
pub(in crate::cri) fn item(container: &ContainerStatus) -> v1::Container {
    v1::Container {
        id: container.id.to_string(),
        pod_sandbox_id: container.pod_id.to_string(),
        metadata: Some(metadata_out(container)),
        image: Some(image::spec_out(&container.image)),
        image_ref: container.image_id.clone(),
        state: state_out(container.state),
        created_at: container.created_at.0,
        labels: hashed(&container.labels),
        annotations: hashed(&container.annotations),
        image_id: container.image_id.clone(),
    }
}

/// A status. Its image is a tag where the image has one.
pub(in crate::cri) fn status(container: &ContainerStatus) -> v1::ContainerStatus {
    let name = match container.image_name.as_str() {
        "" => &container.image.image,
        name => name,
    };
    let shown = ImageSpec {
        image: name.to_owned(),
        ..container.image.clone()
    };
    v1::ContainerStatus {
        id: container.id.to_string(),
        metadata: Some(metadata_out(container)),
        state: state_out(container.state),
        created_at: container.created_at.0,
        started_at: container.started_at.0,
        finished_at: container.finished_at.0,
        exit_code: container.exit_code,
        image: Some(image::spec_out(&shown)),
        image_ref: container.image_ref.clone(),
        reason: container.reason.clone(),
        message: container.message.clone(),
        labels: hashed(&container.labels),
        annotations: hashed(&container.annotations),
        mounts: container.mounts.iter().map(mount_out).collect(),
        log_path: container.log_path.clone(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources::to(&container.resources)),
            windows: None,
        }),
        image_id: container.image_id.clone(),
        user: container.user.as_ref().map(|user| v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user.groups.iter().map(|gid| i64::from(*gid)).collect(),
            }),
        }),
        stop_signal: signal::of(container.stop_signal) as i32,
    }
}

fn mount_out(mount: &Mount) -> v1::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => v1::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
    };
    v1::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.clone(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation as i32,
        uid_mappings: security::mappings_out(&mount.uid_mappings),
        gid_mappings: security::mappings_out(&mount.gid_mappings),
        recursive_read_only: mount.recursive_read_only,
        image: mount.image.as_ref().map(image::spec_out),
        image_sub_path: mount.image_sub_path.clone(),
        mount_options: mount.mount_options.clone(),
    }
}

/// An event of the event stream.
pub(in crate::cri) fn event(event: &EngineEvent) -> v1::ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => v1::ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => v1::ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
    };
    v1::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind as i32,
        created_at: event.at.0,
        pod_sandbox_status: Some(pod::status(&event.pod)),
        containers_statuses: event.containers.iter().map(|one| status(one)).collect(),
    }
}

//! Security contexts, namespaces and id mappings.
#![expect(
    deprecated,
    reason = "the old fields of profiles are honoured for older clients"
)]

use crate::base::security::{
    CapabilityChange, ContainerSecurity, IdMapping, NamespaceMode, NamespaceOptions, PodSecurity,
    SecurityProfile, SelinuxOptions, SupplementalGroupsPolicy, UserNamespace,
};
use crate::cri::convert::check::{Checked, absolute, invalid, known, missing, printable, within};
use crate::cri::v1;

/// Largest id: -1 means "no change" to the kernel.
const MAX_ID: i64 = u32::MAX as i64 - 1;

/// Whose namespaces are asked for: a sandbox has no other container to join.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Pod,
    Container,
}

/// Security settings of a pod.
pub(super) fn pod(at: &str, given: v1::LinuxSandboxSecurityContext) -> Checked<PodSecurity> {
    let run_as_user = id(&format!("{at}.run_as_user"), given.run_as_user)?;
    let run_as_group = id(&format!("{at}.run_as_group"), given.run_as_group)?;
    if run_as_group.is_some() && run_as_user.is_none() {
        return Err(invalid(
            format!("{at}.run_as_group"),
            &run_as_group,
            "is given without a user",
            "give run_as_user too",
        ));
    }
    Ok(PodSecurity {
        namespaces: namespaces(
            &format!("{at}.namespace_options"),
            given.namespace_options,
            Owner::Pod,
        )?,
        selinux: given.selinux_options.map(selinux),
        run_as_user,
        run_as_group,
        readonly_rootfs: given.readonly_rootfs,
        supplemental_groups: ids(
            &format!("{at}.supplemental_groups"),
            given.supplemental_groups,
        )?,
        supplemental_groups_policy: policy(at, given.supplemental_groups_policy)?,
        privileged: given.privileged,
        seccomp: seccomp(at, given.seccomp, &given.seccomp_profile_path)?,
        apparmor: apparmor(at, given.apparmor, "")?,
    })
}

/// Security settings of a container.
pub(super) fn container(
    at: &str,
    given: v1::LinuxContainerSecurityContext,
) -> Checked<ContainerSecurity> {
    let run_as_user = id(&format!("{at}.run_as_user"), given.run_as_user)?;
    let run_as_group = id(&format!("{at}.run_as_group"), given.run_as_group)?;
    user_rules(at, run_as_user, run_as_group, &given.run_as_username)?;
    for (list, paths) in [
        ("masked_paths", &given.masked_paths),
        ("readonly_paths", &given.readonly_paths),
    ] {
        for (n, path) in paths.iter().enumerate() {
            absolute(&format!("{at}.{list}[{n}]"), path)?;
        }
    }
    let capabilities = given.capabilities.unwrap_or_default();
    Ok(ContainerSecurity {
        capabilities: CapabilityChange {
            add: capabilities.add_capabilities,
            drop: capabilities.drop_capabilities,
            add_ambient: capabilities.add_ambient_capabilities,
        },
        privileged: given.privileged,
        namespaces: namespaces(
            &format!("{at}.namespace_options"),
            given.namespace_options,
            Owner::Container,
        )?,
        selinux: given.selinux_options.map(selinux),
        run_as_user,
        run_as_group,
        run_as_username: given.run_as_username,
        readonly_rootfs: given.readonly_rootfs,
        supplemental_groups: ids(
            &format!("{at}.supplemental_groups"),
            given.supplemental_groups,
        )?,
        supplemental_groups_policy: policy(at, given.supplemental_groups_policy)?,
        no_new_privs: given.no_new_privs,
        masked_paths: given.masked_paths,
        readonly_paths: given.readonly_paths,
        seccomp: seccomp(at, given.seccomp, &given.seccomp_profile_path)?,
        apparmor: apparmor(at, given.apparmor, &given.apparmor_profile)?,
    })
}

fn user_rules(at: &str, user: Option<i64>, group: Option<i64>, username: &str) -> Checked<()> {
    let field = format!("{at}.run_as_username");
    printable(&field, username)?;
    if username.contains([':', '/']) {
        return Err(invalid(
            field,
            &username,
            "is not a user name",
            "use a name of the image's /etc/passwd",
        ));
    }
    if user.is_some() && !username.is_empty() {
        return Err(invalid(
            field,
            &username,
            "is given beside run_as_user",
            "give one of the two",
        ));
    }
    if group.is_some() && user.is_none() && username.is_empty() {
        return Err(invalid(
            format!("{at}.run_as_group"),
            &group,
            "is given without a user",
            "give run_as_user or run_as_username too",
        ));
    }
    Ok(())
}

fn id(field: &str, given: Option<v1::Int64Value>) -> Checked<Option<i64>> {
    if let Some(given) = &given {
        within(field, given.value, 0..=MAX_ID, "use 0 to 4294967294")?;
    }
    Ok(given.map(|given| given.value))
}

fn ids(field: &str, given: Vec<i64>) -> Checked<Vec<i64>> {
    for (n, value) in given.iter().enumerate() {
        within(
            &format!("{field}[{n}]"),
            *value,
            0..=MAX_ID,
            "use 0 to 4294967294",
        )?;
    }
    Ok(given)
}

fn policy(at: &str, given: i32) -> Checked<SupplementalGroupsPolicy> {
    let field = format!("{at}.supplemental_groups_policy");
    Ok(
        match known::<v1::SupplementalGroupsPolicy>(&field, given)? {
            v1::SupplementalGroupsPolicy::Merge => SupplementalGroupsPolicy::Merge,
            v1::SupplementalGroupsPolicy::Strict => SupplementalGroupsPolicy::Strict,
        },
    )
}

fn selinux(given: v1::SeLinuxOption) -> SelinuxOptions {
    SelinuxOptions {
        user: given.user,
        role: given.role,
        kind: given.r#type,
        level: given.level,
    }
}

fn mode(field: &str, given: i32) -> Checked<NamespaceMode> {
    Ok(match known::<v1::NamespaceMode>(field, given)? {
        v1::NamespaceMode::Pod => NamespaceMode::Pod,
        v1::NamespaceMode::Container => NamespaceMode::Container,
        v1::NamespaceMode::Node => NamespaceMode::Node,
        v1::NamespaceMode::Target => NamespaceMode::Target,
    })
}

fn namespaces(
    at: &str,
    given: Option<v1::NamespaceOption>,
    owner: Owner,
) -> Checked<NamespaceOptions> {
    let given = given.unwrap_or_default();
    let shared = |field: &str, given: i32| {
        let mode = mode(field, given)?;
        if matches!(mode, NamespaceMode::Pod | NamespaceMode::Node) {
            return Ok(mode);
        }
        Err(invalid(
            field,
            &mode,
            "is not offered for this namespace",
            "use POD or NODE",
        ))
    };
    let network = shared(&format!("{at}.network"), given.network)?;
    let ipc = shared(&format!("{at}.ipc"), given.ipc)?;
    let field = format!("{at}.pid");
    let pid = mode(&field, given.pid)?;
    if pid == NamespaceMode::Target {
        if owner == Owner::Pod {
            return Err(invalid(
                field,
                &pid,
                "is not offered for a sandbox",
                "use POD, CONTAINER or NODE",
            ));
        }
        if given.target_id.is_empty() {
            return Err(missing(
                format!("{at}.target_id"),
                "give the id of the container whose PID namespace is to be joined",
            ));
        }
        printable(&format!("{at}.target_id"), &given.target_id)?;
    }
    let user = given
        .userns_options
        .map(|given| user_namespace(&format!("{at}.userns_options"), given))
        .transpose()?;
    Ok(NamespaceOptions {
        network,
        pid,
        ipc,
        target_id: given.target_id,
        user,
    })
}

fn user_namespace(at: &str, given: v1::UserNamespace) -> Checked<UserNamespace> {
    let field = format!("{at}.mode");
    let mode = mode(&field, given.mode)?;
    let uids = mappings(&format!("{at}.uids"), &given.uids)?;
    let gids = mappings(&format!("{at}.gids"), &given.gids)?;
    match mode {
        NamespaceMode::Node => {
            if !uids.is_empty() || !gids.is_empty() {
                return Err(invalid(
                    field,
                    &mode,
                    "is given with mappings",
                    "leave uids and gids empty, or use POD",
                ));
            }
        }
        NamespaceMode::Pod => {
            for (list, name) in [(&uids, "uids"), (&gids, "gids")] {
                if list.len() != 1 || list.first().is_some_and(|first| first.container_id != 0) {
                    return Err(invalid(
                        format!("{at}.{name}"),
                        list,
                        "is not one mapping of container id 0",
                        "give exactly one mapping, with container_id 0",
                    ));
                }
            }
        }
        NamespaceMode::Container | NamespaceMode::Target => {
            return Err(invalid(
                field,
                &mode,
                "is not offered for user namespaces",
                "use POD or NODE",
            ));
        }
    }
    Ok(UserNamespace { mode, uids, gids })
}

/// Mappings of a user namespace or of a mount: none empty, none over the end, none overlapping.
pub(super) fn mappings(at: &str, given: &[v1::IdMapping]) -> Checked<Vec<IdMapping>> {
    let mut all: Vec<IdMapping> = Vec::with_capacity(given.len());
    let overlap = |a: u32, a_len: u32, b: u32, b_len: u32| {
        u64::from(a) < u64::from(b) + u64::from(b_len)
            && u64::from(b) < u64::from(a) + u64::from(a_len)
    };
    for (n, one) in given.iter().enumerate() {
        let field = format!("{at}[{n}]");
        if one.length == 0 {
            return Err(invalid(
                format!("{field}.length"),
                &0,
                "maps nothing",
                "use at least 1",
            ));
        }
        if one.host_id.checked_add(one.length).is_none()
            || one.container_id.checked_add(one.length).is_none()
        {
            return Err(invalid(
                format!("{field}.length"),
                &one.length,
                "goes beyond the largest id",
                "end both ranges below 4294967295",
            ));
        }
        if all.iter().any(|other| {
            overlap(other.host_id, other.length, one.host_id, one.length)
                || overlap(
                    other.container_id,
                    other.length,
                    one.container_id,
                    one.length,
                )
        }) {
            return Err(invalid(
                field,
                one,
                "overlaps another mapping",
                "map each id once",
            ));
        }
        all.push(IdMapping {
            host_id: one.host_id,
            container_id: one.container_id,
            length: one.length,
        });
    }
    Ok(all)
}

/// The new message, else the deprecated string of older clients.
fn profile(
    at: &str,
    (new_name, new): (&str, Option<v1::SecurityProfile>),
    (old_name, old): (&str, &str),
) -> Checked<Option<(String, SecurityProfile)>> {
    use v1::security_profile::ProfileType;
    if let Some(new) = new {
        let field = format!("{at}.{new_name}");
        let kind: ProfileType = known(&format!("{field}.profile_type"), new.profile_type)?;
        return Ok(Some((
            format!("{field}.localhost_ref"),
            match kind {
                ProfileType::RuntimeDefault => SecurityProfile::RuntimeDefault,
                ProfileType::Unconfined => SecurityProfile::Unconfined,
                ProfileType::Localhost => SecurityProfile::Localhost(new.localhost_ref),
            },
        )));
    }
    let field = format!("{at}.{old_name}");
    let profile = match old {
        "" => return Ok(None),
        "runtime/default" | "docker/default" => SecurityProfile::RuntimeDefault,
        "unconfined" => SecurityProfile::Unconfined,
        other => match other.strip_prefix("localhost/") {
            Some(path) => SecurityProfile::Localhost(path.to_owned()),
            None => {
                return Err(invalid(
                    field,
                    &other,
                    "is not a profile",
                    "use `runtime/default`, `unconfined` or `localhost/` and a profile",
                ));
            }
        },
    };
    Ok(Some((field, profile)))
}

fn seccomp(
    at: &str,
    new: Option<v1::SecurityProfile>,
    old: &str,
) -> Checked<Option<SecurityProfile>> {
    let found = profile(at, ("seccomp", new), ("seccomp_profile_path", old))?;
    if let Some((field, SecurityProfile::Localhost(path))) = &found {
        if path.is_empty() {
            return Err(missing(
                field,
                "give the absolute path of the seccomp profile",
            ));
        }
        absolute(field, path)?;
    }
    Ok(found.map(|(_, profile)| profile))
}

fn apparmor(
    at: &str,
    new: Option<v1::SecurityProfile>,
    old: &str,
) -> Checked<Option<SecurityProfile>> {
    let found = profile(at, ("apparmor", new), ("apparmor_profile", old))?;
    if let Some((field, SecurityProfile::Localhost(name))) = &found {
        if name.is_empty() {
            return Err(missing(field, "give the name of a loaded AppArmor profile"));
        }
        printable(field, name)?;
    }
    Ok(found.map(|(_, profile)| profile))
}

/// Namespace options as configured, for statuses.
pub(super) fn namespaces_out(options: &NamespaceOptions) -> v1::NamespaceOption {
    let out = |mode: NamespaceMode| match mode {
        NamespaceMode::Pod => v1::NamespaceMode::Pod as i32,
        NamespaceMode::Container => v1::NamespaceMode::Container as i32,
        NamespaceMode::Node => v1::NamespaceMode::Node as i32,
        NamespaceMode::Target => v1::NamespaceMode::Target as i32,
    };
    v1::NamespaceOption {
        network: out(options.network),
        pid: out(options.pid),
        ipc: out(options.ipc),
        target_id: options.target_id.clone(),
        userns_options: options.user.as_ref().map(|user| v1::UserNamespace {
            mode: out(user.mode),
            uids: mappings_out(&user.uids),
            gids: mappings_out(&user.gids),
        }),
    }
}

/// Mappings as configured, for statuses.
pub(super) fn mappings_out(mappings: &[IdMapping]) -> Vec<v1::IdMapping> {
    mappings
        .iter()
        .map(|one| v1::IdMapping {
            host_id: one.host_id,
            container_id: one.container_id,
            length: one.length,
        })
        .collect()
}

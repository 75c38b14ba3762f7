//! User namespaces of pods: what the config asks for, and what does not go together with one.

use crate::base::pod::PodConfig;
use crate::base::security::{IdMapping, NamespaceMode, NamespaceOptions, UserNamespace};
use crate::runtime::plan::{IdMappings, NamespaceSource, Namespaces, UserName, UserPlan};
use crate::runtime::spec::error::{Result, SpecError};

const FIELD: &str = "namespace_options.userns_options";

/// The mappings as a plan has them.
pub(crate) fn plan_mappings(given: &[IdMapping]) -> IdMappings {
    given
        .iter()
        .map(|one| (one.container_id, one.host_id, one.length))
        .collect()
}

/// Puts a sandbox's user namespace into its namespaces, if it has one of its own.
///
/// # Errors
/// [`SpecError::Invalid`]: a mode or mappings that are not possible, or a namespace of the node beside it: procfs and
/// message queues could not be mounted there.
pub(crate) fn of_sandbox(pod: &PodConfig, namespaces: &mut Namespaces) -> Result<()> {
    let options = &pod.security.namespaces;
    let Some(user) = own(options)? else {
        return Ok(());
    };
    for (field, mode) in [
        ("namespace_options.pid", options.pid),
        ("namespace_options.ipc", options.ipc),
    ] {
        if mode == NamespaceMode::Node {
            let problem = "is not possible in a pod with a user namespace";
            let mend = "use POD, or the node's user namespace (hostUsers: true)";
            return Err(SpecError::invalid(field, "NODE", problem, mend));
        }
    }
    set(user, NamespaceSource::Passed, namespaces);
    Ok(())
}

/// Puts a container's user namespace, which is its pod's, into its namespaces.
///
/// # Errors
/// [`SpecError::Invalid`]: it is not what the pod has.
pub(crate) fn of_container(
    options: &NamespaceOptions,
    pod: &PodConfig,
    namespaces: &mut Namespaces,
) -> Result<()> {
    let (asked, of_pod) = (own(options)?, own(&pod.security.namespaces)?);
    if asked != of_pod {
        let problem = format!(
            "is not what the pod sandbox has, which is {}",
            shown(of_pod)
        );
        let mend = "give both the same mode and mappings";
        return Err(SpecError::invalid(FIELD, shown(asked), problem, mend));
    }
    if let Some(user) = of_pod {
        set(user, NamespaceSource::Pod, namespaces);
    }
    Ok(())
}

fn set(user: &UserNamespace, source: NamespaceSource, namespaces: &mut Namespaces) {
    namespaces.user = source;
    namespaces.uid_mappings = plan_mappings(&user.uids);
    namespaces.gid_mappings = plan_mappings(&user.gids);
}

fn shown(user: Option<&UserNamespace>) -> String {
    let list = |mappings: &[IdMapping]| {
        let one = |m: &IdMapping| format!("{}:{}:{}", m.container_id, m.host_id, m.length);
        mappings.iter().map(one).collect::<Vec<_>>().join(",")
    };
    user.map_or_else(
        || "NODE".to_owned(),
        |user| format!("POD (uids {}, gids {})", list(&user.uids), list(&user.gids)),
    )
}

/// The user namespace of the options, if it is not the node's.
fn own(options: &NamespaceOptions) -> Result<Option<&UserNamespace>> {
    let Some(user) = &options.user else {
        return Ok(None);
    };
    let invalid = |problem: &str, mend| {
        let mode = format!("{:?}", user.mode).to_uppercase();
        Err(SpecError::invalid(FIELD, mode, problem, mend))
    };
    match user.mode {
        NamespaceMode::Node if user.uids.is_empty() && user.gids.is_empty() => Ok(None),
        NamespaceMode::Node => invalid("has mappings", "remove them, or use POD"),
        NamespaceMode::Pod => {
            let fits = |list: &[IdMapping]| matches!(list, [one] if one.container_id == 0 && one.length > 0);
            if !fits(&user.uids) || !fits(&user.gids) {
                let mend = "give one mapping of container id 0 for uids and one for gids";
                return invalid("has no such mapping for its root", mend);
            }
            Ok(Some(user))
        }
        NamespaceMode::Container | NamespaceMode::Target => {
            invalid("is not possible", "use POD or NODE")
        }
    }
}

/// Checks that every id given by number exists in the user namespace. Names are looked up later.
///
/// # Errors
/// [`SpecError::Invalid`]: one does not.
pub(crate) fn check_user(user: &UserPlan, namespaces: &Namespaces) -> Result<()> {
    if namespaces.user == NamespaceSource::Host {
        return Ok(());
    }
    let number = |name: &UserName| match name {
        UserName::Id(id) => Some(*id),
        UserName::Name(_) => None,
    };
    let uids = &namespaces.uid_mappings;
    let gids = &namespaces.gid_mappings;
    let groups = user.additional_groups.iter().copied();
    let given = [
        ("user", number(&user.user), uids),
        ("group", user.group.as_ref().and_then(number), gids),
    ]
    .into_iter()
    .chain(groups.map(|id| ("supplemental_groups", Some(id), gids)));
    for (field, id, mappings) in given {
        if let Some(id) = id
            && !is_mapped(id, mappings)
        {
            let problem = "does not exist in the pod's user namespace";
            let mend = "use an id below the length of its mapping, or hostUsers: true";
            return Err(SpecError::invalid(field, id, problem, mend));
        }
    }
    Ok(())
}

/// Does this id exist inside?
pub(crate) fn is_mapped(id: u32, mappings: &IdMappings) -> bool {
    let holds = |(inside, _, length): &(u32, u32, u32)| {
        id.checked_sub(*inside)
            .is_some_and(|offset| offset < *length)
    };
    mappings.iter().any(holds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::spec::namespaces;

    fn user(mode: NamespaceMode, mappings: &[(u32, u32, u32)]) -> Option<UserNamespace> {
        let list: Vec<IdMapping> = mappings
            .iter()
            .map(|(container_id, host_id, length)| IdMapping {
                host_id: *host_id,
                container_id: *container_id,
                length: *length,
            })
            .collect();
        Some(UserNamespace {
            mode,
            uids: list.clone(),
            gids: list,
        })
    }

    fn pod(user: Option<UserNamespace>) -> PodConfig {
        let mut pod = PodConfig::default();
        pod.security.namespaces.user = user;
        pod
    }

    const ONE: &[(u32, u32, u32)] = &[(0, 65536, 65536)];

    #[test]
    fn modes_and_mappings() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let made = |user| namespaces::of_sandbox(&pod(user));
        for none in [None, user(Node, &[])] {
            let made = made(none).unwrap();
            assert_eq!(made.user, NamespaceSource::Host);
            assert_eq!(made.root(), None);
        }
        let own = made(user(Pod, ONE)).unwrap();
        assert_eq!(own.user, NamespaceSource::Passed);
        assert_eq!(own.root(), Some((65536, 65536)));
        for bad in [
            user(Container, &[]),
            user(Target, &[]),
            user(Node, ONE),
            user(Pod, &[]),
            user(Pod, &[(1, 65536, 65536)]),
            user(Pod, &[(0, 65536, 0)]),
            user(Pod, &[(0, 65536, 10), (10, 165_536, 10)]),
        ] {
            let error = made(bad.clone()).unwrap_err();
            assert!(
                matches!(&error, SpecError::Invalid { .. })
                    && error
                        .to_string()
                        .starts_with("namespace_options.userns_options"),
                "{bad:?}: {error}"
            );
        }
        for (pid, ipc, field) in [(Node, Pod, "pid"), (Pod, Node, "ipc")] {
            let mut pod = pod(user(Pod, ONE));
            pod.security.namespaces.pid = pid;
            pod.security.namespaces.ipc = ipc;
            let error = namespaces::of_sandbox(&pod).unwrap_err().to_string();
            assert!(
                error.contains(field) && error.contains("hostUsers"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_container_has_what_its_pod_has() {
        use NamespaceMode::{Node, Pod};
        let other: &[(u32, u32, u32)] = &[(0, 65537, 65536)];
        let check = |asked, of_pod| {
            let options = NamespaceOptions {
                user: asked,
                ..NamespaceOptions::default()
            };
            let mut made = namespaces::of_sandbox(&pod(None)).unwrap();
            of_container(&options, &pod(of_pod), &mut made).map(|()| made.user)
        };
        let none = [None, user(Node, &[])];
        for asked in &none {
            for of_pod in &none {
                let made = check(asked.clone(), of_pod.clone());
                assert_eq!(made.unwrap(), NamespaceSource::Host);
            }
        }
        let made = check(user(Pod, ONE), user(Pod, ONE)).unwrap();
        assert_eq!(made, NamespaceSource::Pod);
        for (asked, of_pod) in [
            (None, user(Pod, ONE)),
            (user(Node, &[]), user(Pod, ONE)),
            (user(Pod, ONE), None),
            (user(Pod, other), user(Pod, ONE)),
        ] {
            let error = check(asked, of_pod).unwrap_err().to_string();
            assert!(error.contains("is not what the pod sandbox has"), "{error}");
        }
    }

    #[test]
    fn users_must_exist_inside() {
        let of_pod = pod(user(NamespaceMode::Pod, &[(0, 1000, 10)]));
        let inside = namespaces::of_sandbox(&of_pod).unwrap();
        let ranges = namespaces::sysctls(&of_pod, &[]).unwrap();
        let range = ("net.ipv4.ping_group_range".to_owned(), "0 9".to_owned());
        assert!(ranges.contains(&range), "{ranges:?}");
        let plan = |user, group, additional: &[u32]| UserPlan {
            user: UserName::Id(user),
            group,
            additional_groups: additional.to_vec(),
            merge_image_groups: true,
        };
        for (user, good) in [
            (plan(9, None, &[0, 9]), true),
            (plan(10, None, &[]), false),
            (plan(0, Some(UserName::Id(10)), &[]), false),
            (plan(0, Some(UserName::Name("x".into())), &[]), true),
            (plan(0, None, &[3, 10]), false),
        ] {
            assert_eq!(check_user(&user, &inside).is_ok(), good, "{user:?}");
        }
        let node = namespaces::of_sandbox(&pod(None)).unwrap();
        check_user(&plan(70_000, None, &[]), &node).unwrap();
    }
}

//! Users as CRI and images name them. A text that is meant as a number is a number in range or refused,
//! never a name: `USER 4294967296` must not become root, nor a name of the image's /etc/passwd.

use crate::base::container::ContainerConfig;
use crate::base::pod::PodConfig;
use crate::base::security::SupplementalGroupsPolicy;
use crate::runtime::plan::{UserName, UserPlan};
use crate::runtime::spec::error::{Result, SpecError};

/// Largest id that Kubernetes and images may name.
const MAX_ID: u32 = 2_147_483_647;
const RANGE: &str = "use an id of 0 to 2147483647";
const NAME: &str = "use a number, or a name of the image's /etc/passwd or /etc/group";

/// One user or group of a text.
///
/// # Errors
/// [`SpecError::Invalid`]: empty, a number out of range, or no possible name.
pub(crate) fn parse_one(field: &str, text: &str) -> Result<UserName> {
    let invalid = |problem: &str, mend| Err(SpecError::invalid(field, text, problem, mend));
    if text.is_empty() {
        return invalid("is empty", NAME);
    }
    if text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-')) {
        if !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return invalid("is neither a number nor a name", NAME);
        }
        return match text.parse::<u32>() {
            Ok(id) if id <= MAX_ID => Ok(UserName::Id(id)),
            _ => invalid("is out of range", RANGE),
        };
    }
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, ':' | ',' | '/' | '"' | '\'');
    if text.len() > 256 || !text.chars().all(plain) {
        return invalid("is no possible user or group name", NAME);
    }
    Ok(UserName::Name(text.to_owned()))
}

/// `USER` of an image: `user`, `user:group`. Empty: root. `user:` is `user`; `:group` is refused.
///
/// # Errors
/// [`SpecError::Invalid`]: as in [`parse_one`].
pub(crate) fn parse_image_user(text: &str) -> Result<(UserName, Option<UserName>)> {
    const FIELD: &str = "image config User";
    if text.is_empty() {
        return Ok((UserName::Id(0), None));
    }
    let Some((user, group)) = text.split_once(':') else {
        return Ok((parse_one(FIELD, text)?, None));
    };
    let whole = |_| SpecError::invalid(FIELD, text, "is not user or user:group", NAME);
    let user = parse_one(FIELD, user).map_err(whole)?;
    if group.is_empty() {
        return Ok((user, None));
    }
    Ok((user, Some(parse_one(FIELD, group).map_err(whole)?)))
}

/// An id of CRI (`int64`).
///
/// # Errors
/// [`SpecError::Invalid`]: negative or above 2147483647.
pub(crate) fn id(field: &str, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id <= MAX_ID)
        .ok_or_else(|| SpecError::invalid(field, value, "is out of range", RANGE))
}

fn ids(field: &str, values: &[i64]) -> Result<Vec<u32>> {
    let mut ids = values
        .iter()
        .map(|value| id(field, *value))
        .collect::<Result<Vec<_>>>()?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// The user of a container: CRI's, else the image's.
///
/// # Errors
/// [`SpecError::Invalid`]: an id out of range, an impossible name, a group without a user, a user both by
/// number and by name.
pub(crate) fn of_container(config: &ContainerConfig, image_user: &str) -> Result<UserPlan> {
    let security = &config.security;
    let name = security.run_as_username.as_str();
    let (user, image_group) = match (security.run_as_user, name) {
        (Some(value), "") => (UserName::Id(id("run_as_user", value)?), None),
        (Some(_), _) => {
            return Err(SpecError::invalid(
                "run_as_username",
                name,
                "is given beside run_as_user",
                "give only one of them",
            ));
        }
        (None, "") => parse_image_user(image_user)?,
        (None, _) => (parse_one("run_as_username", name)?, None),
    };
    let group = match security.run_as_group {
        Some(value) if security.run_as_user.is_none() && name.is_empty() => {
            return Err(group_without_user(value));
        }
        Some(value) => Some(UserName::Id(id("run_as_group", value)?)),
        None => image_group,
    };
    Ok(UserPlan {
        user,
        group,
        additional_groups: ids("supplemental_groups", &security.supplemental_groups)?,
        merge_image_groups: security.supplemental_groups_policy == SupplementalGroupsPolicy::Merge,
    })
}

fn group_without_user(value: i64) -> SpecError {
    SpecError::invalid(
        "run_as_group",
        value,
        "is given without a user",
        "give run_as_user or run_as_username too",
    )
}

/// The user of the sandbox process. There is no image, so all are numbers.
///
/// # Errors
/// [`SpecError::Invalid`]: an id out of range, a group without a user.
pub(crate) fn of_sandbox(pod: &PodConfig) -> Result<UserPlan> {
    let security = &pod.security;
    if let (None, Some(value)) = (security.run_as_user, security.run_as_group) {
        return Err(group_without_user(value));
    }
    let field = |name: &str, value: Option<i64>| value.map(|value| id(name, value)).transpose();
    Ok(UserPlan {
        user: UserName::Id(field("run_as_user", security.run_as_user)?.unwrap_or(0)),
        group: field("run_as_group", security.run_as_group)?.map(UserName::Id),
        additional_groups: ids("supplemental_groups", &security.supplemental_groups)?,
        merge_image_groups: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> UserName {
        UserName::Name(text.to_owned())
    }

    #[test]
    fn image_users() {
        let id = UserName::Id;
        let good = [
            ("", id(0), None),
            ("0", id(0), None),
            ("1", id(1), None),
            ("0001", id(1), None),
            ("1:", id(1), None),
            ("2147483647", id(2_147_483_647), None),
            ("1:2", id(1), Some(id(2))),
            ("name", name("name"), None),
            ("name:2", name("name"), Some(id(2))),
            ("1:staff", id(1), Some(name("staff"))),
            ("_apt", name("_apt"), None),
            (
                "www-data:www-data",
                name("www-data"),
                Some(name("www-data")),
            ),
            ("DOMAIN\\user$", name("DOMAIN\\user$"), None),
        ];
        for (text, user, group) in good {
            assert_eq!(parse_image_user(text).unwrap(), (user, group), "{text:?}");
        }
        for text in [
            "2147483648",
            "4294967295",
            "4294967296",
            "99999999999",
            "18446744073709551616",
            "-1",
            "+1",
            "0x0",
            "0x10",
            " 0",
            "0 ",
            "1\n",
            "ro\not",
            "root\0",
            ":1",
            ":",
            "1:2:3",
            "1:-1",
            "1:4294967296",
            "1: 2",
            "root:x:",
            "1e3",
            "0.0",
            "a,b",
            "../etc",
            "r\u{f6}\u{f6}t",
            "\u{663}",
        ] {
            let error = parse_image_user(text).unwrap_err().to_string();
            assert!(
                error.starts_with("image config User: "),
                "{text:?}: {error}"
            );
        }
    }

    #[test]
    fn users_of_containers() {
        let config = |user: Option<i64>, name: &str, group: Option<i64>| {
            let mut config = ContainerConfig::default();
            config.security.run_as_user = user;
            name.clone_into(&mut config.security.run_as_username);
            config.security.run_as_group = group;
            config.security.supplemental_groups = vec![30, 10, 30];
            config
        };
        let plan = of_container(&config(None, "", None), "nobody:20").unwrap();
        assert_eq!(plan.user, name("nobody"));
        assert_eq!(plan.group, Some(UserName::Id(20)));
        assert_eq!(plan.additional_groups, [10, 30]);
        assert!(plan.merge_image_groups);
        // CRI's user replaces the image's, group included.
        let plan = of_container(&config(Some(7), "", None), "nobody:20").unwrap();
        assert_eq!((plan.user, plan.group), (UserName::Id(7), None));
        // An image's bad user does not matter where CRI names one.
        let plan = of_container(&config(None, "joe", Some(8)), "-1").unwrap();
        assert_eq!(
            (plan.user, plan.group),
            (name("joe"), Some(UserName::Id(8)))
        );
        let bad = [
            (None, "", Some(1)),
            (Some(1), "joe", None),
            (Some(-1), "", None),
            (Some(2_147_483_648), "", None),
            (Some(1), "", Some(4_294_967_296)),
            (None, "joe\n", None),
            (None, "a:b", None),
        ];
        for (user, name, group) in bad {
            assert!(
                of_container(&config(user, name, group), "").is_err(),
                "{user:?} {name:?} {group:?}"
            );
        }
        let mut negative = config(None, "", None);
        negative.security.supplemental_groups = vec![-1];
        assert!(of_container(&negative, "").is_err());
    }

    proptest! {
        /// Whatever the text, a number that comes out is the number that went in.
        #[test]
        fn a_user_is_never_another_one(text in "[0-9+ x:-]{0,12}|\\PC{0,6}") {
            if let Ok((user, _)) = parse_image_user(&text) {
                let first = text.split(':').next().unwrap();
                match user {
                    UserName::Id(id) if !text.is_empty() => {
                        prop_assert_eq!(first.parse::<u128>().unwrap(), u128::from(id));
                    }
                    UserName::Id(id) => prop_assert_eq!(id, 0),
                    UserName::Name(name) => {
                        prop_assert_eq!(&name, first);
                        prop_assert!(!name.starts_with(|c: char| c.is_ascii_digit()));
                    }
                }
            }
        }
    }
}

//! The built-in validator: what the node's owner does not let plugins do, and plugins that must be there.

use crate::nri::error::NriError;
use crate::nri::owners::{Field, Owners};
use crate::nri::proto::api;

/// Annotation of a pod: a YAML list of plugins that must have seen its containers.
const REQUIRED: &str = "required-plugins.noderesource.dev";

/// What plugins may not adjust.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is one thing that is refused"
)]
pub(crate) struct Rejects {
    /// OCI hooks.
    pub(crate) hooks: bool,
    /// The seccomp policy of a container with the runtime's default one.
    pub(crate) seccomp_default: bool,
    /// That of an unconfined container.
    pub(crate) seccomp_unconfined: bool,
    /// That of a container with a profile from a file.
    pub(crate) seccomp_localhost: bool,
    /// Namespaces.
    pub(crate) namespaces: bool,
    /// Sysctls.
    pub(crate) sysctl: bool,
}

impl Rejects {
    /// The words of the configuration.
    pub(crate) const WORDS: [&'static str; 6] = [
        "hooks",
        "seccomp-default",
        "seccomp-unconfined",
        "seccomp-localhost",
        "namespaces",
        "sysctl",
    ];

    /// From words; unknown ones do not count.
    pub(crate) fn from_words(words: &[String]) -> Self {
        let has = |wanted: &str| words.iter().any(|word| word == wanted);
        Self {
            hooks: has("hooks"),
            seccomp_default: has("seccomp-default"),
            seccomp_unconfined: has("seccomp-unconfined"),
            seccomp_localhost: has("seccomp-localhost"),
            namespaces: has("namespaces"),
            sysctl: has("sysctl"),
        }
    }
}

/// The validator.
#[derive(Clone, Debug, Default)]
pub(crate) struct Validator {
    /// What plugins may not adjust.
    pub(crate) rejects: Rejects,
    /// Plugins, by name or as INDEX-NAME, without which no container is made.
    pub(crate) required: Vec<String>,
    /// Annotation that lets a pod do without them: `true`, `True`, `TRUE`, `t`, `T` or `1`; empty: none.
    pub(crate) tolerate_missing: String,
}

impl Validator {
    /// Looks at all adjustments of a container.
    ///
    /// # Errors
    /// [`NriError::Rejected`].
    pub(super) fn check(
        &self,
        request: &api::ValidateContainerAdjustmentRequest,
        owners: &Owners,
    ) -> Result<(), NriError> {
        let container = request.container.clone().unwrap_or_default();
        let profile = container.linux.unwrap_or_default().seccomp_profile;
        let seccomp = match profile.map_or(1, |profile| profile.profile_type) {
            0 => self.rejects.seccomp_default,
            2 => self.rejects.seccomp_localhost,
            _ => self.rejects.seccomp_unconfined,
        };
        for (field, what, refused) in [
            (Field::OciHooks, "OCI hooks", self.rejects.hooks),
            (Field::SeccompPolicy, "the seccomp policy", seccomp),
            (Field::Namespace, "namespaces", self.rejects.namespaces),
            (Field::Sysctl, "sysctls", self.rejects.sysctl),
        ] {
            if refused && let Some((key, owner)) = owners.of(&container.id, field).next() {
                let text = match key {
                    "" => format!("plugin {owner} may not adjust {what} (nri_reject)"),
                    key => format!("plugin {owner} may not adjust {what} ({key}; nri_reject)"),
                };
                return Err(NriError::Rejected(text));
            }
        }
        self.check_required(request, &container.name)
    }

    fn check_required(
        &self,
        request: &api::ValidateContainerAdjustmentRequest,
        container: &str,
    ) -> Result<(), NriError> {
        let pod = request.pod.clone().unwrap_or_default();
        let annotation = |key: &str| {
            if key.is_empty() {
                return None;
            }
            let keys = [
                format!("{key}/container.{container}"),
                format!("{key}/pod"),
                key.to_owned(),
            ];
            keys.iter()
                .find_map(|key| pod.annotations.get(key))
                .cloned()
        };
        if let Some(value) = annotation(&self.tolerate_missing) {
            match &*value {
                "1" | "t" | "T" | "true" | "True" | "TRUE" => return Ok(()),
                "0" | "f" | "F" | "false" | "False" | "FALSE" => {}
                _ => {
                    let key = &self.tolerate_missing;
                    return Err(NriError::Rejected(format!(
                        "annotation {key} {value:?}: write \"true\" or \"false\""
                    )));
                }
            }
        }
        let mut required = self.required.clone();
        if let Some(value) = annotation(REQUIRED) {
            let named: Vec<String> = serde_saphyr::from_str(&value).map_err(|error| {
                NriError::Rejected(format!("annotation {REQUIRED} {value:?}: {error}"))
            })?;
            required.extend(named);
        }
        let is_there = |name: &&String| {
            let is = |plugin: &api::PluginInstance| {
                let (index, short) = (&plugin.index, &plugin.name);
                *short == **name || format!("{index}-{short}") == **name
            };
            request.plugins.iter().any(is)
        };
        match required.iter().find(|name| !is_there(name)) {
            None => Ok(()),
            Some(name) => Err(NriError::Rejected(format!(
                "plugin {name} is required for container {container} and not connected"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(
        profile: i32,
        annotations: &[(&str, &str)],
    ) -> api::ValidateContainerAdjustmentRequest {
        let linux = api::LinuxContainer {
            seccomp_profile: Some(api::SecurityProfile {
                profile_type: profile,
                localhost_ref: String::new(),
            }),
            ..api::LinuxContainer::default()
        };
        api::ValidateContainerAdjustmentRequest {
            pod: Some(api::PodSandbox {
                annotations: annotations
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
                ..api::PodSandbox::default()
            }),
            container: Some(api::Container {
                id: "c".to_owned(),
                name: "main".to_owned(),
                linux: Some(linux),
                ..api::Container::default()
            }),
            plugins: vec![api::PluginInstance {
                name: "here".to_owned(),
                index: "10".to_owned(),
            }],
            ..api::ValidateContainerAdjustmentRequest::default()
        }
    }

    #[test]
    fn what_plugins_may_not_do() {
        let adjusted = |field, key: &str| {
            let mut owners = Owners::default();
            owners.claim("c", field, key, "10-here").unwrap();
            owners
        };
        for (words, field, key, profile, allowed) in [
            (vec![], Field::OciHooks, "", 0, true),
            (vec!["hooks"], Field::OciHooks, "", 0, false),
            (vec!["hooks"], Field::Env, "A", 0, true),
            (vec!["namespaces"], Field::Namespace, "pid", 0, false),
            (vec!["sysctl"], Field::Sysctl, "net.x", 0, false),
            (vec!["seccomp-default"], Field::SeccompPolicy, "", 0, false),
            (vec!["seccomp-default"], Field::SeccompPolicy, "", 1, true),
            (
                vec!["seccomp-unconfined"],
                Field::SeccompPolicy,
                "",
                1,
                false,
            ),
            (
                vec!["seccomp-localhost"],
                Field::SeccompPolicy,
                "",
                2,
                false,
            ),
        ] {
            let words: Vec<_> = words.iter().map(|word: &&str| (*word).to_owned()).collect();
            let validator = Validator {
                rejects: Rejects::from_words(&words),
                ..Validator::default()
            };
            let outcome = validator.check(&request(profile, &[]), &adjusted(field, key));
            assert_eq!(outcome.is_ok(), allowed, "{words:?} {field:?}: {outcome:?}");
            if let Err(error) = outcome {
                assert!(error.to_string().contains("10-here"), "{error}");
            }
        }
    }

    #[test]
    fn plugins_that_must_be_there() {
        let check = |required: &[&str], annotations: &[(&str, &str)]| {
            let validator = Validator {
                required: required.iter().map(|name| (*name).to_owned()).collect(),
                tolerate_missing: "tolerate.example.org".to_owned(),
                ..Validator::default()
            };
            validator.check(&request(0, annotations), &Owners::default())
        };
        assert!(check(&["here"], &[]).is_ok());
        assert!(check(&["10-here"], &[]).is_ok());
        assert!(check(&["20-here"], &[]).is_err());
        let error = check(&["here", "gone"], &[]).unwrap_err().to_string();
        assert!(error.contains("gone") && error.contains("main"), "{error}");
        let tolerated = |value: &str| check(&["gone"], &[("tolerate.example.org", value)]);
        assert!(tolerated("true").is_ok() && tolerated("1").is_ok() && tolerated("T").is_ok());
        let error = tolerated("false").unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
        let error = tolerated("yes").unwrap_err().to_string();
        assert!(error.contains("\"yes\""), "{error}");
        assert!(
            check(
                &["gone"],
                &[("tolerate.example.org/container.main", "true")]
            )
            .is_ok()
        );
        assert!(
            check(
                &["gone"],
                &[("tolerate.example.org/container.other", "true")]
            )
            .is_err()
        );
        assert!(check(&[], &[(REQUIRED, "[here]")]).is_ok());
        assert!(check(&[], &[(REQUIRED, "[gone]")]).is_err());
        assert!(check(&[], &[(REQUIRED, "{")]).is_err());
    }
}

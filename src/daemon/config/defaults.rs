//! What containers get that ask for nothing else, as the configuration writes it.

use crate::base::error::chain;
use crate::base::handler::Defaults;
use crate::base::security::SecurityProfile;
use crate::daemon::config::Config;
use crate::runtime::capabilities;
use crate::runtime::spec::namespaces::{OfNode, check_sysctl};
use crate::runtime::spec::{process, rlimits};

/// Key, value and mend of a value that cannot be.
type Wrong = (&'static str, String, String);

/// berth's own default capabilities, by name.
pub(super) fn own_capabilities() -> Vec<String> {
    capabilities::names(capabilities::default_set())
}

/// A seccomp profile by name or path; absent: unconfined.
///
/// # Errors
/// What to write instead.
pub(super) fn profile(text: &str) -> Result<Option<SecurityProfile>, String> {
    match text {
        "unconfined" => Ok(None),
        "runtime/default" => Ok(Some(SecurityProfile::RuntimeDefault)),
        path if path.starts_with('/') => Ok(Some(SecurityProfile::Localhost(path.to_owned()))),
        _ => {
            Err("use `unconfined`, `runtime/default` or the absolute path of a profile".to_owned())
        }
    }
}

/// A variable as `NAME=value`.
///
/// # Errors
/// What is wrong.
pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    let form = || "write it as in `NAME=value`".to_owned();
    let (name, value) = text.split_once('=').ok_or_else(form)?;
    process::check_variable("env", name, value.as_bytes()).map_err(|error| chain(&error))?;
    Ok((name.to_owned(), value.to_owned()))
}

impl Config {
    /// What it gives to containers that ask for nothing else.
    ///
    /// # Errors
    /// Key, value and mend of the first value that cannot be.
    pub(super) fn defaults(&self) -> Result<Defaults, Wrong> {
        let wrong = |key, value: &String| {
            let value = format!("{value:?}");
            move |mend: String| (key, value, mend)
        };
        let key = "unset_seccomp_profile";
        let text = &self.unset_seccomp_profile;
        let seccomp = profile(text).map_err(wrong(key, text))?;
        let key = "privileged_seccomp_profile";
        let text = &self.privileged_seccomp_profile;
        let privileged_seccomp = profile(text).map_err(wrong(key, text))?;
        let mut made = Defaults {
            seccomp,
            privileged_seccomp,
            device_ownership: self.device_ownership_from_security_context,
            ..Defaults::default()
        };
        let mut set = 0;
        for name in &self.default_capabilities {
            let mend = "use names of capabilities(7), as in `CAP_CHOWN`".to_owned();
            let bit = capabilities::mask(name).ok_or(mend);
            set |= bit.map_err(wrong("default_capabilities", name))?;
        }
        made.capabilities = Some(set);
        for text in &self.default_sysctls {
            let wrong = wrong("default_sysctls", text);
            let Some((key, value)) = text.split_once('=') else {
                let mend = "write it as in `net.core.somaxconn=1024`".to_owned();
                return Err(wrong(mend));
            };
            let (key, value) = (key.trim(), value.trim());
            let own = OfNode {
                network: false,
                ipc: false,
                uts: false,
            };
            let key = check_sysctl("sysctl", key, value, own);
            let key = key.map_err(|error| wrong(chain(&error)))?;
            made.sysctls.push((key, value.to_owned()));
        }
        for text in &self.default_ulimits {
            let limit = rlimits::parse(text).map_err(wrong("default_ulimits", text))?;
            if made.rlimits.iter().any(|(known, ..)| *known == limit.0) {
                let mend = "it is in the list twice: keep one".to_owned();
                return Err(wrong("default_ulimits", text)(mend));
            }
            made.rlimits.push(limit);
        }
        for text in &self.default_env {
            let variable = variable(text).map_err(wrong("default_env", text))?;
            made.env.push(variable);
        }
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("c.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn values() {
        let own = Config::default().defaults().unwrap();
        let wanted = Defaults {
            capabilities: Some(capabilities::default_set()),
            ..Defaults::default()
        };
        assert_eq!(own, wanted);
        let text = "unset_seccomp_profile = \"runtime/default\"\nprivileged_seccomp_profile = \"/p.json\"\n\
            default_capabilities = [\"chown\", \"CAP_KILL\"]\ndefault_sysctls = [\"net/core/somaxconn = 7\"]\n\
            default_ulimits = [\"nofile=1:2\"]\ndefault_env = [\"A=b=c\"]\ndevice_ownership_from_security_context = true\n";
        let made = parse(text).unwrap().defaults().unwrap();
        let wanted = Defaults {
            seccomp: Some(SecurityProfile::RuntimeDefault),
            privileged_seccomp: Some(SecurityProfile::Localhost("/p.json".to_owned())),
            capabilities: Some(0b10_0001),
            sysctls: vec![("net.core.somaxconn".to_owned(), "7".to_owned())],
            rlimits: vec![(7, 1, 2)],
            env: vec![("A".to_owned(), "b=c".to_owned())],
            device_ownership: true,
        };
        assert_eq!(made, wanted);
        let none = parse("default_capabilities = []").unwrap();
        assert_eq!(none.defaults().unwrap().capabilities, Some(0));
    }

    #[test]
    fn handlers_have_them_or_their_own() {
        let text = "default_env = [\"A=1\", \"B=1\"]\n[runtimes.own]\nseccomp_profile = \"runtime/default\"\n\
            privileged_seccomp_profile = \"/p.json\"\nenv = [\"B=2\"]\n[runtimes.plain]\n";
        let handlers = parse(text).unwrap().handlers();
        let of = |name: &str| handlers.named[name].defaults.clone();
        assert_eq!(of("plain"), of("berth"));
        assert_eq!(of("plain").env.len(), 2);
        let own = of("own");
        assert_eq!(own.seccomp, Some(SecurityProfile::RuntimeDefault));
        let path = SecurityProfile::Localhost("/p.json".to_owned());
        assert_eq!(own.privileged_seccomp, Some(path));
        let env: Vec<String> = own.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(env, ["A=1", "B=1", "B=2"]);
        assert_eq!(own.capabilities, of("berth").capabilities);
    }

    #[test]
    fn what_cannot_be_names_key_value_and_mend() {
        for (text, part) in [
            (
                "unset_seccomp_profile = \"default\"",
                "unset_seccomp_profile = \"default\": use `unconfined`, ",
            ),
            (
                "privileged_seccomp_profile = \"\"",
                "privileged_seccomp_profile = \"\": use ",
            ),
            (
                "default_capabilities = [\"CAP_MAGIC\"]",
                "default_capabilities = \"CAP_MAGIC\": use names",
            ),
            (
                "default_sysctls = [\"net.x\"]",
                "default_sysctls = \"net.x\": write it as",
            ),
            (
                "default_sysctls = [\"vm.swappiness=1\"]",
                "does not belong to a namespace of the pod; use only",
            ),
            (
                "default_ulimits = [\"nofile=2:1\"]",
                "default_ulimits = \"nofile=2:1\": the soft limit",
            ),
            (
                "default_ulimits = [\"core=0\", \"CORE=1\"]",
                "default_ulimits = \"CORE=1\": it is in the list twice",
            ),
            ("default_env = [\"A\"]", "default_env = \"A\": write it as"),
            ("default_env = [\"=b\"]", "default_env = \"=b\": env[\"\"]"),
            (
                "[runtimes.a]\nseccomp_profile = \"x\"",
                "runtimes.a.seccomp_profile = \"x\": use `unconfined`",
            ),
            (
                "[runtimes.a]\nprivileged_seccomp_profile = \"x\"",
                "runtimes.a.privileged_seccomp_profile",
            ),
            (
                "[runtimes.a]\nenv = [\"A\"]",
                "runtimes.a.env = \"A\": write it as",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with("c.toml: ") && error.contains(part),
                "{text}: {error}"
            );
        }
    }
}

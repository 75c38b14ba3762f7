//! What is executed: arguments, environment, working directory, stop signal.

use crate::base::container::ContainerConfig;
use crate::base::image::ImageConfig;
use crate::runtime::signals;
use crate::runtime::spec::error::{Result, SpecError};

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The effective command. CRI's command replaces the entrypoint and drops the image's command; CRI's
/// arguments replace the image's command.
///
/// # Errors
/// [`SpecError::Invalid`]: nothing to run, or a NUL byte.
pub(crate) fn args(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>> {
    let (head, tail) = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => (&config.command, &config.args),
        (true, false) => (&image.entrypoint, &config.args),
        (true, true) => (&image.entrypoint, &image.cmd),
    };
    let args: Vec<String> = head.iter().chain(tail).cloned().collect();
    check_args("command", &args)?;
    Ok(args)
}

/// Can these arguments be executed?
///
/// # Errors
/// [`SpecError::Invalid`]: nothing to run, or a NUL byte.
pub(crate) fn check_args(field: &str, args: &[String]) -> Result<()> {
    if args.first().is_none_or(String::is_empty) {
        return Err(SpecError::invalid(
            field,
            "",
            "names no program (nor does the image)",
            "give a command",
        ));
    }
    match args.iter().find(|arg| arg.contains('\0')) {
        Some(arg) => Err(has_nul(field, arg)),
        None => Ok(()),
    }
}

fn has_nul(field: impl Into<String>, value: &str) -> SpecError {
    SpecError::invalid(field, value, "contains a NUL byte", "remove it")
}

/// The environment: a default `PATH`, `TERM` with a terminal, the configuration's (`defaults`), the image's, `HOSTNAME`, CRI's. A name given again
/// keeps its place and takes the last value. Values are bytes and may hold newlines.
///
/// # Errors
/// [`SpecError::Invalid`]: an empty name, a name with `=`, NUL or a control character, a value with NUL, a
/// `HOME` that would break a line of /etc/passwd.
pub(crate) fn env(
    config: &ContainerConfig,
    image: &ImageConfig,
    hostname: &str,
    defaults: &[(String, String)],
) -> Result<Vec<Vec<u8>>> {
    let mut env = Env(vec![PATH.into()]);
    if config.tty {
        env.set(b"TERM", b"xterm");
    }
    for (name, value) in defaults {
        env.set(name.as_bytes(), value.as_bytes());
    }
    for entry in &image.env {
        // An entry without `=` sets nothing.
        if let Some((name, value)) = entry.split_once('=') {
            check_variable("image config Env", name, value.as_bytes())?;
            env.set(name.as_bytes(), value.as_bytes());
        }
    }
    env.set(b"HOSTNAME", hostname.as_bytes());
    for (name, value) in &config.envs {
        check_variable("envs", name, value)?;
        env.set(name.as_bytes(), value);
    }
    Ok(env.0)
}

/// Can this variable be set?
///
/// # Errors
/// As [`env`].
pub(crate) fn check_variable(field: &str, name: &str, value: &[u8]) -> Result<()> {
    let field = format!("{field}[{name:?}]");
    if name.is_empty() || name.contains('=') || name.chars().any(char::is_control) {
        let problem = "is no name of an environment variable";
        let mend = "use a name without =, NUL and control characters";
        return Err(SpecError::invalid(field, name, problem, mend));
    }
    if value.contains(&0) {
        return Err(has_nul(field, &String::from_utf8_lossy(value)));
    }
    let breaks_passwd = |byte: &u8| matches!(byte, b'\n' | b'\r' | b':');
    if name == "HOME" && value.iter().any(breaks_passwd) {
        return Err(SpecError::invalid(
            field,
            String::from_utf8_lossy(value),
            "contains a line break or a colon",
            "use a plain path",
        ));
    }
    Ok(())
}

/// An environment in the making.
pub(crate) struct Env(pub(crate) Vec<Vec<u8>>);

impl Env {
    /// Sets a variable, in its old place where it has one.
    pub(crate) fn set(&mut self, name: &[u8], value: &[u8]) {
        let mut entry = name.to_vec();
        entry.push(b'=');
        let place = self.0.iter_mut().find(|old| old.starts_with(&entry));
        entry.extend_from_slice(value);
        match place {
            Some(old) => *old = entry,
            None => self.0.push(entry),
        }
    }

    /// Takes a variable out.
    pub(crate) fn unset(&mut self, name: &str) {
        let prefix = format!("{name}=");
        self.0.retain(|entry| !entry.starts_with(prefix.as_bytes()));
    }

    /// Is the variable set?
    pub(crate) fn has(&self, name: &str) -> bool {
        let prefix = format!("{name}=");
        self.0
            .iter()
            .any(|entry| entry.starts_with(prefix.as_bytes()))
    }
}

/// The working directory: CRI's, else the image's, else `/`. Without `.`, `..` and double slashes.
///
/// # Errors
/// [`SpecError::Invalid`]: CRI's is relative, or there is a NUL byte.
pub(crate) fn cwd(config: &ContainerConfig, image: &ImageConfig) -> Result<String> {
    const FIELD: &str = "working_dir";
    let asked = config.working_dir.as_str();
    if !asked.is_empty() && !asked.starts_with('/') {
        let problem = "is not an absolute path";
        return Err(SpecError::invalid(
            FIELD,
            asked,
            problem,
            "use one that starts with /",
        ));
    }
    let path = if asked.is_empty() {
        &image.working_dir
    } else {
        asked
    };
    if path.contains('\0') {
        return Err(has_nul(FIELD, path));
    }
    Ok(crate::runtime::spec::mounts::clean(path))
}

/// The signal that asks the container to end: CRI's, else the image's, else `SIGTERM`.
///
/// # Errors
/// [`SpecError::Invalid`]: no such signal.
pub(crate) fn stop_signal(config: &ContainerConfig, image: &ImageConfig) -> Result<i32> {
    let mend = "use a name such as SIGTERM or SIGRTMIN+3, or a number of 1 to 64";
    let invalid =
        |field: &str, value: &str| Err(SpecError::invalid(field, value, "is no signal", mend));
    match config.stop_signal {
        Some(signal) if (1..=64).contains(&signal) => Ok(signal),
        Some(signal) => invalid("stop_signal", &signal.to_string()),
        None if image.stop_signal.is_empty() => Ok(signals::TERM),
        None => match signals::number(&image.stop_signal) {
            Some(signal) => Ok(signal),
            None => invalid("image config StopSignal", &image.stop_signal),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn effective_commands() {
        type List = &'static [&'static str];
        let cases: [(List, List, List, List, Option<List>); 9] = [
            // command, args, entrypoint, cmd
            (&[], &[], &["e"], &["c"], Some(&["e", "c"])),
            (&[], &[], &[], &["c"], Some(&["c"])),
            (&[], &["a"], &["e"], &["c"], Some(&["e", "a"])),
            (&["x"], &[], &["e"], &["c"], Some(&["x"])),
            (&["x"], &["a"], &["e"], &["c"], Some(&["x", "a"])),
            (&[], &["a"], &[], &["c"], Some(&["a"])),
            (&[], &[], &[], &[], None),
            (&[""], &[], &["e"], &[], None),
            (&["x", "\0"], &[], &[], &[], None),
        ];
        for (command, arguments, entrypoint, cmd, expected) in cases {
            let config = ContainerConfig {
                command: texts(command),
                args: texts(arguments),
                ..ContainerConfig::default()
            };
            let image = ImageConfig {
                entrypoint: texts(entrypoint),
                cmd: texts(cmd),
                ..ImageConfig::default()
            };
            assert_eq!(args(&config, &image).ok(), expected.map(texts));
        }
    }

    fn config(envs: &[(&str, &[u8])], tty: bool) -> ContainerConfig {
        let envs = envs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.to_vec()));
        ContainerConfig {
            envs: envs.collect(),
            tty,
            ..ContainerConfig::default()
        }
    }

    #[test]
    fn environments() {
        let image = ImageConfig {
            env: texts(&["A=image", "PATH=/bin", "HOSTNAME=image", "nothing", "B=x=y"]),
            ..ImageConfig::default()
        };
        let given = config(
            &[
                ("A", b"1"),
                ("C", b"\xff\n"),
                ("A", b"2"),
                ("TERM", b"vt100"),
            ],
            true,
        );
        let expected: [&[u8]; 6] = [
            b"PATH=/bin",
            b"TERM=vt100",
            b"A=2",
            b"HOSTNAME=pod",
            b"B=x=y",
            b"C=\xff\n",
        ];
        assert_eq!(env(&given, &image, "pod", &[]).unwrap(), expected);
        let none = env(&config(&[], false), &ImageConfig::default(), "pod", &[]).unwrap();
        assert_eq!(none, [PATH.as_bytes(), b"HOSTNAME=pod"]);
        let bad: [(&str, &[u8]); 8] = [
            ("", b""),
            ("A=B", b""),
            ("A\0", b""),
            ("A\n", b""),
            ("A", b"x\0y"),
            ("HOME", b"/root\nroot2:x:0:0::/:/bin/sh"),
            ("HOME", b"/a\r"),
            ("HOME", b"/a:b"),
        ];
        for (name, value) in bad {
            let given = config(&[(name, value)], false);
            assert!(
                env(&given, &ImageConfig::default(), "pod", &[]).is_err(),
                "{name:?}"
            );
        }
        for entry in ["=x", "A=\0", "HOME=/\n"] {
            let image = ImageConfig {
                env: texts(&[entry]),
                ..ImageConfig::default()
            };
            assert!(
                env(&config(&[], false), &image, "pod", &[]).is_err(),
                "{entry:?}"
            );
        }
    }

    #[test]
    fn working_directories() {
        let cases = [
            ("", "", Some("/")),
            ("", "/srv/", Some("/srv")),
            ("", "srv", Some("/srv")),
            ("/a/../b//c", "/srv", Some("/b/c")),
            ("/../../etc", "", Some("/etc")),
            ("a", "/srv", None),
            ("/a\0", "/srv", None),
        ];
        for (asked, of_image, expected) in cases {
            let config = ContainerConfig {
                working_dir: asked.to_owned(),
                ..ContainerConfig::default()
            };
            let image = ImageConfig {
                working_dir: of_image.to_owned(),
                ..ImageConfig::default()
            };
            assert_eq!(cwd(&config, &image).ok().as_deref(), expected, "{asked:?}");
        }
    }

    #[test]
    fn stop_signals() {
        let cases = [
            (None, "", Some(15)),
            (None, "SIGQUIT", Some(3)),
            (None, "RTMIN+3", Some(37)),
            (Some(10), "SIGQUIT", Some(10)),
            (Some(10), "nonsense", Some(10)),
            (None, "nonsense", None),
            (Some(0), "", None),
            (Some(65), "", None),
        ];
        for (asked, of_image, expected) in cases {
            let config = ContainerConfig {
                stop_signal: asked,
                ..ContainerConfig::default()
            };
            let image = ImageConfig {
                stop_signal: of_image.to_owned(),
                ..ImageConfig::default()
            };
            assert_eq!(stop_signal(&config, &image).ok(), expected, "{of_image}");
        }
    }

    proptest! {
        #[test]
        fn the_last_value_of_each_name_is_there_once(
            image_env in prop::collection::vec(("[A-D]", "[a-z=]{0,3}"), 0..8),
            given in prop::collection::vec(("[A-D]", "[a-z=]{0,3}"), 0..8),
        ) {
            let image = ImageConfig {
                env: image_env.iter().map(|(n, v)| format!("{n}={v}")).collect(),
                ..ImageConfig::default()
            };
            let config = ContainerConfig {
                envs: given.iter().map(|(n, v)| (n.clone(), v.clone().into_bytes())).collect(),
                ..ContainerConfig::default()
            };
            let out = env(&config, &image, "h", &[]).unwrap();
            for letter in ["A", "B", "C", "D"] {
                let last = image_env.iter().chain(&given).rfind(|(name, _)| name == letter);
                let prefix = format!("{letter}=");
                let found: Vec<_> =
                    out.iter().filter(|entry| entry.starts_with(prefix.as_bytes())).collect();
                match last {
                    None => prop_assert!(found.is_empty()),
                    Some((_, value)) => {
                        let wanted = format!("{letter}={value}").into_bytes();
                        prop_assert_eq!(found, vec![&wanted]);
                    }
                }
            }
        }
    }
}

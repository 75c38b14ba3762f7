//! Hooks of files (`hooks_dir`): each says for which containers a program is to run, and when.
//!
//! ```text
//! DIR/*.json --load--> Files --matching(container)--> Edits, one for each file that matches
//! ```
//! Read whenever a container is made, so that a changed file counts at once. Of files with one name that in the last
//! directory counts; they come in the order of their names. A file that cannot be used fails every container: nobody can tell
//! for which it was meant. Format: 1.0.0 of `oci-hooks(5)`; regular expressions without classes of Unicode.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde::Deserialize;

use crate::base::edits::Edits;
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::hooks::check;

/// Largest file in bytes.
const MAX_FILE: u64 = 1 << 20;
const VERSION: &str = "1.0.0";

/// A file, as written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Looked at before.
    #[serde(rename = "version")]
    _version: String,
    hook: Program,
    when: When,
    stages: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    path: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<u64>,
}

/// Conditions, of which at least one is given, and all that are must be met.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct When {
    always: Option<bool>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    commands: Vec<String>,
    has_bind_mounts: Option<bool>,
}

/// What is known of a container before it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Container<'a> {
    /// Its annotations; those of its pod count more.
    pub(crate) annotations: &'a BTreeMap<String, String>,
    /// Those of its pod.
    pub(crate) pod_annotations: &'a BTreeMap<String, String>,
    /// First word of its command line.
    pub(crate) command: &'a str,
    /// CRI gives it mounts.
    pub(crate) has_bind_mounts: bool,
}

/// The hooks of the files that match a container, by file. Blocks on the directories; one that is missing is empty.
///
/// # Errors
/// [`SpecError`] names file and key.
pub(crate) fn matching(directories: &[PathBuf], container: Container<'_>) -> Result<Vec<Edits>> {
    let mut made = vec![];
    for path in files(directories)? {
        let field = path.display().to_string();
        let file = read(&field, &path)?;
        let hooks = hooks(&field, &file)?;
        if matches(&field, &file.when, container)? {
            made.push(Edits {
                by: field,
                hooks,
                ..Edits::default()
            });
        }
    }
    Ok(made)
}

fn files(directories: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut by_name: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let failed = |error| SpecError::host("hooks_dir", "read", directory, error);
        let entries = match fs::read_dir(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|ending| ending == "json") {
                let name = path.file_name().unwrap_or_default().to_owned();
                by_name.insert(name, path);
            }
        }
    }
    Ok(by_name.into_values().collect())
}

fn read(field: &str, path: &Path) -> Result<File> {
    const MEND: &str = "correct the file, or take it away";
    let failed = |error| SpecError::host("hooks_dir", "read", path, error);
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_FILE {
        let problem = format!("is larger than {MAX_FILE} bytes");
        return Err(SpecError::invalid(field, size, problem, MEND));
    }
    let text = fs::read_to_string(path).map_err(failed)?;
    // Of another version the rest means something else.
    #[derive(Deserialize)]
    struct Version {
        version: Option<String>,
    }
    let bad = |error: serde_json::Error| {
        SpecError::invalid("hooks_dir", field, format!("cannot be used: {error}"), MEND)
    };
    let found: Version = serde_json::from_str(&text).map_err(bad)?;
    let version = found.version.unwrap_or_default();
    if version != VERSION {
        let field = format!("{field}: version");
        let mend = "write it for version 1.0.0 of oci-hooks(5)";
        return Err(SpecError::invalid(field, version, "is not known", mend));
    }
    serde_json::from_str(&text).map_err(bad)
}

fn hooks(field: &str, file: &File) -> Result<Vec<Hook>> {
    let program = &file.hook;
    let points = file.stages.iter().map(|stage| {
        HookPoint::from_name(stage).ok_or_else(|| {
            let mend = "use prestart, createRuntime, createContainer, startContainer, poststart or poststop";
            SpecError::invalid(format!("{field}: stages"), stage, "is no stage", mend)
        })
    });
    let points: Vec<HookPoint> = points.collect::<Result<_>>()?;
    if points.is_empty() {
        let mend = "name at least one";
        return Err(SpecError::invalid(
            format!("{field}: stages"),
            "[]",
            "is empty",
            mend,
        ));
    }
    let made = points.into_iter().map(|point| {
        let hook = Hook {
            point,
            path: program.path.clone(),
            args: program.args.clone(),
            env: program.env.clone(),
            timeout: program.timeout,
        };
        check(&format!("{field}: hook"), &hook)?;
        Ok(hook)
    });
    made.collect()
}

fn matches(field: &str, when: &When, container: Container<'_>) -> Result<bool> {
    let regex = |key: &str, text: &str| {
        Regex::new(text).map_err(|error| {
            let problem = format!("is no regular expression: {error}");
            SpecError::invalid(format!("{field}: when.{key}"), text, problem, "correct it")
        })
    };
    // Every expression is read, whatever decides: a file is right or wrong for all containers.
    let mut conditions: Vec<bool> = vec![];
    conditions.extend(when.always);
    conditions.extend(
        when.has_bind_mounts
            .map(|wanted| wanted && container.has_bind_mounts),
    );
    for (key, value) in &when.annotations {
        let (key, value) = (regex("annotations", key)?, regex("annotations", value)?);
        let of_container = container.annotations.iter();
        let mut given = of_container
            .filter(|(key, _)| !container.pod_annotations.contains_key(*key))
            .chain(container.pod_annotations);
        conditions.push(given.any(|(k, v)| key.is_match(k) && value.is_match(v)));
    }
    let commands = when.commands.iter().map(|text| regex("commands", text));
    let commands: Vec<Regex> = commands.collect::<Result<_>>()?;
    if !commands.is_empty() {
        conditions.push(commands.iter().any(|one| one.is_match(container.command)));
    }
    if conditions.is_empty() {
        let mend = "set always, annotations, commands or hasBindMounts";
        let field = format!("{field}: when");
        return Err(SpecError::invalid(field, "{}", "has no condition", mend));
    }
    Ok(conditions.into_iter().all(|met| met))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = r#"{"version": "1.0.0", "hook": {"path": "/bin/x", "args": ["x", "y"], "timeout": 5},
        "when": WHEN, "stages": ["createRuntime", "poststop"]}"#;

    fn annotations(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        list.iter().map(own).collect()
    }

    fn found(directories: &[PathBuf]) -> std::result::Result<Vec<Edits>, String> {
        let container = Container {
            annotations: &annotations(&[("own", "a"), ("both", "of-container")]),
            pod_annotations: &annotations(&[("both", "of-pod"), ("io.x/y", "z")]),
            command: "/usr/bin/nginx",
            has_bind_mounts: true,
        };
        matching(directories, container).map_err(|error| crate::base::error::chain(&error))
    }

    fn write(path: &Path, text: &str) {
        let mut file = fs::File::create(path).unwrap();
        std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    }

    fn with(text: &str) -> std::result::Result<Vec<Edits>, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.json");
        write(&path, text);
        found(&[directory.path().to_owned()])
    }

    #[test]
    fn conditions() {
        for (when, wanted) in [
            (r#"{"always": true}"#, true),
            (r#"{"always": false}"#, false),
            (r#"{"always": true, "commands": ["/sh$"]}"#, false),
            (r#"{"commands": ["/sh$", ".*/nginx$"]}"#, true),
            (r#"{"hasBindMounts": true}"#, true),
            (r#"{"hasBindMounts": false}"#, false),
            (r#"{"annotations": {"^io\\.x/.$": "^z$"}}"#, true),
            (r#"{"annotations": {"^own$": "a", "^io": "q"}}"#, false),
            (r#"{"annotations": {"^own$": "a", "^io": "z"}}"#, true),
            (r#"{"annotations": {"both": "of-container"}}"#, false),
            (
                r#"{"annotations": {"both": "of-pod"}, "hasBindMounts": true}"#,
                true,
            ),
        ] {
            let made = with(&RIGHT.replace("WHEN", when)).unwrap();
            assert_eq!(!made.is_empty(), wanted, "{when}");
            if let [edits] = &made[..] {
                let points: Vec<HookPoint> = edits.hooks.iter().map(|hook| hook.point).collect();
                assert_eq!(points, [HookPoint::CreateRuntime, HookPoint::Poststop]);
                assert_eq!(edits.hooks[0].args, ["x", "y"]);
                assert_eq!(edits.hooks[1].timeout, Some(5));
                assert!(edits.by.ends_with("/a.json"));
            }
        }
    }

    #[test]
    fn a_wrong_file_names_itself_and_the_key() {
        let right = RIGHT.replace("WHEN", r#"{"always": false}"#);
        for (from, to, words) in [
            (
                "\"1.0.0\"",
                "\"0.1.0\"",
                "a.json: version: \"0.1.0\" is not known; write it for",
            ),
            (
                "\"version\": \"1.0.0\",",
                "",
                "a.json: version: \"\" is not known",
            ),
            (
                "/bin/x",
                "x",
                "a.json: hook.path: \"x\" is not an absolute path",
            ),
            ("5", "0", "a.json: hook.timeout"),
            (
                "poststop",
                "stop",
                "a.json: stages: \"stop\" is no stage; use prestart, ",
            ),
            (
                r#"["createRuntime", "poststop"]"#,
                "[]",
                "a.json: stages: \"[]\" is empty",
            ),
            (
                "\"always\": false",
                "",
                "a.json: when: \"{}\" has no condition",
            ),
            (
                "\"always\": false",
                "\"allways\": false",
                "unknown field `allways`",
            ),
            (
                "\"always\": false",
                r#""commands": ["("]"#,
                "a.json: when.commands: \"(\" is no regular expression",
            ),
            (
                "\"always\": false",
                r#""annotations": {"a": "["}"#,
                "a.json: when.annotations: \"[\"",
            ),
            (", \"stages\"", ", \"stage\"", "a.json"),
            ("}", "", "a.json"),
        ] {
            assert!(right.contains(from), "{from}");
            let error = with(&right.replace(from, to)).unwrap_err();
            assert!(
                error.contains(words) && error.contains("a.json"),
                "{to}: {error}"
            );
        }
    }

    #[test]
    fn a_later_directory_wins_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let text = RIGHT.replace("WHEN", r#"{"always": true}"#);
        let mut directories = vec![directory.path().join("missing")];
        for (name, files) in [("1", ["b.json", "c.json"]), ("2", ["a.json", "b.json"])] {
            let place = directory.path().join(name);
            fs::create_dir(&place).unwrap();
            for file in files {
                write(&place.join(file), &text);
            }
            write(&place.join("README"), "no hook");
            directories.push(place);
        }
        let made = found(&directories).unwrap();
        let names: Vec<String> = made.into_iter().map(|edits| edits.by).collect();
        let ends = ["2/a.json", "2/b.json", "1/c.json"];
        assert_eq!(names.len(), 3);
        assert!(
            names
                .iter()
                .zip(ends)
                .all(|(name, end)| name.ends_with(end)),
            "{names:?}"
        );
        assert!(found(&[]).unwrap().is_empty());
    }
}

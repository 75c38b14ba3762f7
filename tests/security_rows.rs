//! The history of attacks on container runtimes (tests/security/rows.toml): each has a test, and the test is there.
#![expect(clippy::unwrap_used, reason = "a failed test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// One class of attack.
#[derive(Debug)]
struct Row {
    id: String,
    tests: Vec<String>,
    /// Why no machine of ours can have a test.
    absent: String,
    /// What is wrong with the row itself.
    wrong: Vec<String>,
}

fn texts(value: Option<&toml::Value>) -> Vec<String> {
    let list = value.and_then(toml::Value::as_array);
    let texts = list.into_iter().flatten().filter_map(toml::Value::as_str);
    texts.map(str::to_owned).collect()
}

impl Row {
    fn of(value: &toml::Value) -> Self {
        let text = |key: &str| {
            let found = value.get(key).and_then(toml::Value::as_str);
            found.unwrap_or_default().to_owned()
        };
        let (id, tests, absent) = (text("id"), texts(value.get("tests")), text("absent"));
        let mut wrong = vec![];
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if id.is_empty() || !id.chars().all(plain) {
            wrong.push(format!("{id:?} is no id: use a-z, 0-9 and -"));
        }
        if text("attack").len() < 20 {
            wrong.push(format!("{id}: the attack is not described"));
        }
        if texts(value.get("known")).is_empty() {
            wrong.push(format!("{id}: nothing says by what name it is known"));
        }
        if tests.is_empty() == absent.is_empty() {
            wrong.push(format!(
                "{id}: give `tests`, or say in `absent` why there can be none"
            ));
        }
        let keys = value.as_table().into_iter().flat_map(toml::Table::keys);
        for key in keys {
            if !["id", "known", "attack", "tests", "absent"].contains(&key.as_str()) {
                wrong.push(format!("{id}: what is `{key}`?"));
            }
        }
        Self {
            id,
            tests,
            absent,
            wrong,
        }
    }
}

fn rows(text: &str) -> Vec<Row> {
    let all: toml::Table = toml::from_str(text).unwrap();
    let list = all.get("row").and_then(toml::Value::as_array);
    list.into_iter().flatten().map(Row::of).collect()
}

/// What is wrong with a name of a test; absent: it is there. `read`: the text of a file of this repository.
fn missing(test: &str, read: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let Some((file, name)) = test.split_once('#') else {
        return Some(format!("{test}: write it as FILE#NAME"));
    };
    let Some(text) = read(file) else {
        return Some(format!("{test}: there is no file {file}"));
    };
    let there = match file.rsplit_once('.') {
        Some((_, "rs")) => is_test(&text, name),
        Some((_, "py")) => is_step(&text, name),
        _ => return Some(format!("{test}: neither a Rust test nor a Python suite")),
    };
    (!there).then(|| format!("{test}: there is no such test"))
}

/// A function with `#[test]` (of any runtime) just above it, not ignored; or one of a `proptest!`, which has it too.
fn is_test(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().collect();
    let defines = |line: &str| {
        let line = line.trim_start();
        let line = line.strip_prefix("async ").unwrap_or(line);
        let rest = line
            .strip_prefix("fn ")
            .and_then(|rest| rest.strip_prefix(name));
        rest.is_some_and(|rest| rest.starts_with('('))
    };
    lines.iter().enumerate().any(|(at, line)| {
        let above = lines[..at].iter().rev();
        let mut attributes = above.map(|line| line.trim()).take_while(|line| {
            line.starts_with("#[")
                || line.starts_with("//")
                || line.ends_with(")]")
                || line.starts_with("clippy::")
        });
        let attributes: Vec<&str> = attributes.by_ref().collect();
        let has = |part: &str| attributes.iter().any(|line| line.contains(part));
        defines(line) && (has("#[test]") || has("::test")) && !has("#[ignore")
    })
}

/// A step of this title, on a line of its own.
fn is_step(text: &str, title: &str) -> bool {
    text.lines().any(|line| {
        let step = line
            .split_once(".step(")
            .map(|(_, rest)| rest.trim_start_matches('f'));
        step.is_some_and(|rest| {
            rest.strip_prefix('"').is_some_and(|rest| {
                rest.strip_prefix(title)
                    .is_some_and(|rest| rest.starts_with('"'))
            })
        })
    })
}

/// Everything that is wrong with a table.
fn faults(rows: &[Row], read: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let (mut found, mut ids) = (vec![], BTreeSet::new());
    for row in rows {
        found.extend(row.wrong.iter().cloned());
        if !ids.insert(&row.id) {
            found.push(format!("{}: two rows have this id", row.id));
        }
        let tests = row.tests.iter();
        found.extend(
            tests
                .filter_map(|test| missing(test, read))
                .map(|text| format!("{}: {text}", row.id)),
        );
    }
    found
}

fn read(file: &str) -> Option<String> {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).ok()
}

#[test]
fn every_attack_has_a_test_that_is_there() {
    let rows = rows(&read("tests/security/rows.toml").unwrap());
    assert!(rows.len() >= 55, "{} rows: some are lost", rows.len());
    let found = faults(&rows, &read);
    assert!(
        found.is_empty(),
        "tests/security/rows.toml:\n{}",
        found.join("\n")
    );
    let absent: Vec<&Row> = rows.iter().filter(|row| !row.absent.is_empty()).collect();
    println!(
        "{} attacks, {} without a test here",
        rows.len(),
        absent.len()
    );
    for row in absent {
        println!("{}: {}", row.id, row.absent);
    }
}

/// The check itself: what is wrong is found.
#[test]
fn wrong_rows_are_found() {
    let rust = "#[test]\nfn there() {}\n#[tokio::test]\nasync fn too() {}\n#[test]\n#[ignore]\nfn idle() {}\nfn helper() {}\n";
    let python = "    with steps.step(\"a title\"):\n    with steps.step(f\"of {x}\"), trap():\n    # a comment\n";
    let files = |file: &str| match file {
        "a.rs" => Some(rust.to_owned()),
        "a.py" => Some(python.to_owned()),
        "a.md" => Some(String::new()),
        _ => None,
    };
    let row = |tests: &str| {
        format!(
            "[[row]]\nid = \"x\"\nknown = [\"y\"]\nattack = \"Something that is long enough.\"\n{tests}\n"
        )
    };
    let wrong = |text: &str| faults(&rows(text), &files).join("\n");
    let good = r#"tests = ["a.rs#there", "a.rs#too", "a.py#a title", "a.py#of {x}"]"#;
    assert_eq!(wrong(&row(good)), "");
    assert_eq!(wrong(&row("absent = \"no such hardware\"")), "");
    for (text, part) in [
        (row(""), "give `tests`"),
        (row("tests = []"), "give `tests`"),
        (
            row("tests = [\"a.rs#there\"]\nabsent = \"x\""),
            "give `tests`",
        ),
        (row("tests = [\"a.rs#gone\"]"), "no such test"),
        (row("tests = [\"a.rs#the\"]"), "no such test"),
        (row("tests = [\"a.rs#idle\"]"), "no such test"),
        (row("tests = [\"a.rs#helper\"]"), "no such test"),
        (row("tests = [\"a.py#a tit\"]"), "no such test"),
        (row("tests = [\"a.py#a comment\"]"), "no such test"),
        (row("tests = [\"b.rs#there\"]"), "no file b.rs"),
        (row("tests = [\"a.md#x\"]"), "neither"),
        (row("tests = [\"there\"]"), "FILE#NAME"),
        (row(good).replace("id = \"x\"", "id = \"X y\""), "is no id"),
        (row(good).replace("known = [\"y\"]", ""), "known"),
        (
            row(good).replace("that is long enough.", ""),
            "not described",
        ),
        (row(good) + "why = \"x\"\n", "what is `why`"),
        (row(good) + &row(good), "two rows"),
    ] {
        let found = wrong(&text);
        assert!(found.contains(part), "{text}\n{found:?} has no {part:?}");
    }
}

/// What is in layers and archives is read by our own code (RUSTSEC-2025-0111 and its kin).
#[test]
fn no_crate_unpacks_archives_for_us() {
    let manifest: toml::Table = toml::from_str(&read("Cargo.toml").unwrap()).unwrap();
    let unpackers = [
        "tar",
        "tokio-tar",
        "astral-tokio-tar",
        "async-tar",
        "zip",
        "unrar",
        "sevenz-rust",
        "libarchive",
    ];
    let used = manifest["dependencies"].as_table().unwrap();
    let used: Vec<&String> = used
        .keys()
        .filter(|name| unpackers.contains(&name.as_str()))
        .collect();
    assert!(used.is_empty(), "{used:?}: for tests only");
    let lock: toml::Table = toml::from_str(&read("Cargo.lock").unwrap()).unwrap();
    let all = lock["package"].as_array().unwrap();
    let names: Vec<&str> = all.iter().filter_map(|one| one["name"].as_str()).collect();
    // Of the tests.
    let others: Vec<&&str> = names
        .iter()
        .filter(|name| unpackers.contains(name) && **name != "tar")
        .collect();
    assert!(others.is_empty(), "{others:?}");
}

//! Paths that match a pattern of the shell: `*`, `?`, `[a-z]`, `[^a]` and `\` in each part.

use std::path::{Path, PathBuf};

/// The paths that there are, sorted. An absolute pattern only; others match nothing. Blocks on the directories.
pub(super) fn paths(pattern: &str) -> Vec<PathBuf> {
    let Some(parts) = pattern.strip_prefix('/') else {
        return vec![];
    };
    let mut found = vec![PathBuf::from("/")];
    for part in parts.split('/').filter(|part| !part.is_empty()) {
        found = found.iter().flat_map(|path| below(path, part)).collect();
    }
    found.retain(|path| path.symlink_metadata().is_ok());
    found
}

fn below(directory: &Path, part: &str) -> Vec<PathBuf> {
    if !part.contains(['*', '?', '[', '\\']) {
        return vec![directory.join(part)];
    }
    let Ok(entries) = directory.read_dir() else {
        return vec![];
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    let fits = |name: &std::ffi::OsString| name.to_str().is_some_and(|name| matches(part, name));
    let mut all: Vec<_> = names.filter(fits).map(|n| directory.join(n)).collect();
    all.sort();
    all
}

/// Does a name match? A pattern that is none matches nothing.
fn matches(pattern: &str, name: &str) -> bool {
    let Some(first) = pattern.chars().next() else {
        return name.is_empty();
    };
    let rest = &pattern[first.len_utf8()..];
    if first == '*' {
        let ends = name.char_indices().map(|(at, _)| at).chain([name.len()]);
        return ends.into_iter().any(|at| matches(rest, &name[at..]));
    }
    let Some(letter) = name.chars().next() else {
        return false;
    };
    let tail = &name[letter.len_utf8()..];
    match first {
        '?' => matches(rest, tail),
        '[' => class(rest, letter).is_some_and(|rest| matches(rest, tail)),
        '\\' => rest
            .strip_prefix(letter)
            .is_some_and(|rest| matches(rest, tail)),
        first => first == letter && matches(rest, tail),
    }
}

/// What follows a class, if the letter is in it.
fn class(text: &str, letter: char) -> Option<&str> {
    let (negated, mut text) = match text.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mut found, mut first) = (false, true);
    loop {
        if let Some(rest) = text.strip_prefix(']').filter(|_| !first) {
            return (found != negated).then_some(rest);
        }
        let (low, rest) = one(text)?;
        let (high, rest) = match rest.strip_prefix('-') {
            Some(rest) => one(rest)?,
            None => (low, rest),
        };
        found |= (low..=high).contains(&letter);
        (text, first) = (rest, false);
    }
}

/// A letter of a class, and what follows.
fn one(text: &str) -> Option<(char, &str)> {
    let text = text.strip_prefix('\\').unwrap_or(text);
    let mut letters = text.chars();
    Some((letters.next()?, letters.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (pattern, name) in [
            ("sd[a-z]", "sda"),
            ("sd*", "sda1"),
            ("sd*", "sd"),
            ("*SSD*", "ata-SSD-1"),
            ("vd?", "vdb"),
            ("vd[^a]", "vdb"),
            ("a\\*b", "a*b"),
            ("x[\\]]", "x]"),
            ("*a*b", "xaxb"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in [
            ("sd[a-z]", "sda1"),
            ("sd[a-z]", "sd1"),
            ("vd?", "vd"),
            ("vd[^a]", "vda"),
            ("a\\*b", "axb"),
            ("[a", "a"),
            ("*a*b", "xbxa"),
            ("[]", "a"),
        ] {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn through_directories() {
        let all = paths("/proc/[s]elf/stat?s");
        assert_eq!(all, [Path::new("/proc/self/status")]);
        assert!(paths("proc/self/status").is_empty());
        assert!(paths("/proc/no-such/x*").is_empty() && paths("/proc/no-such").is_empty());
    }
}

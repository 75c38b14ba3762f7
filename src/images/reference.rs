//! Image references: `[registry[:port]/]path[:tag][@digest]`, with the two customs of Docker: no
//! registry means `docker.io`, one path component there means `library/…`. Strict: what is not
//! plainly a reference is refused, since parts of it become URLs and names of files.

use std::fmt;

use crate::images::digest::Digest;
use crate::images::error::ImageError;

const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;
const DEFAULT_REGISTRY: &str = "docker.io";

/// A normalised reference: with a registry, and a tag or a digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Reference {
    registry: String,
    path: String,
    target: Target,
}

/// What of a repository is meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Target {
    /// A name that may move.
    Tag(String),
    /// A manifest or index by its content.
    Digest(Digest),
}

impl Reference {
    /// Parses and normalises. Without tag and digest the tag is `latest`; with both the digest counts.
    ///
    /// # Errors
    ///
    /// [`ImageError::Reference`]: with what is wrong.
    pub(crate) fn parse(text: &str) -> Result<Self, ImageError> {
        let bad = |reason| ImageError::Reference {
            text: text.chars().take(MAX_NAME + MAX_TAG + 80).collect(),
            reason,
        };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest.parse().map_err(|_error| {
                    bad("the part behind @ must be sha256: and 64 lower-case hexadecimal digits")
                })?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        let (registry, path) = split_registry(name);
        check_registry(registry).map_err(bad)?;
        let path = if registry == DEFAULT_REGISTRY && !path.contains('/') {
            check_path(path).map_err(bad)?;
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_path(&path).map_err(bad)?;
        if registry.len() + path.len() >= MAX_NAME {
            return Err(bad("the name is longer than 255 characters"));
        }
        let hex = |text: &str| text.len() == 64 && text.bytes().all(is_hex);
        if hex(name) || name == "sha256" && tag.is_some_and(hex) {
            return Err(bad("64 hexadecimal digits are an id, not a name"));
        }
        let tag = tag.unwrap_or("latest");
        check_tag(tag).map_err(bad)?;
        Ok(Self {
            registry: registry.to_owned(),
            path,
            target: digest.map_or_else(|| Target::Tag(tag.to_owned()), Target::Digest),
        })
    }

    /// Host of the registry with its port, as in the name.
    pub(crate) fn registry(&self) -> &str {
        &self.registry
    }

    /// Path of the repository in its registry.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Tag or digest.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// The same repository by digest.
    pub(crate) fn with_digest(&self, digest: Digest) -> Self {
        Self {
            target: Target::Digest(digest),
            ..self.clone()
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.path),
            Target::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.path),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// The first component is a registry when it cannot be anything else.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some(("index.docker.io", path)) => (DEFAULT_REGISTRY, path),
        Some((first, path))
            if first == "localhost"
                || first.contains(['.', ':', '['])
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (first, path)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn check_registry(registry: &str) -> Result<(), &'static str> {
    let port_of = |rest: &str| {
        rest.strip_prefix(':').is_some_and(|port| {
            !port.is_empty()
                && port.len() <= 5
                && port.bytes().all(|b| b.is_ascii_digit())
                && port.parse::<u16>().is_ok()
        })
    };
    if let Some(rest) = registry.strip_prefix('[') {
        let (address, rest) = rest
            .split_once(']')
            .ok_or("the registry lacks a closing ]")?;
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err("the registry in brackets is not an IPv6 address");
        }
        return match rest.is_empty() || port_of(rest) {
            true => Ok(()),
            false => Err("the registry's port is not a number up to 65535"),
        };
    }
    let (host, rest) = registry.split_at(registry.find(':').unwrap_or(registry.len()));
    if !rest.is_empty() && !port_of(rest) {
        return Err("the registry's port is not a number up to 65535");
    }
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match host.split('.').all(label_ok) {
        true => Ok(()),
        false => Err("the registry is not a host name"),
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        return Err("the name is empty");
    }
    if path.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("the repository must be in lower case");
    }
    match path.split('/').all(component_ok) {
        true => Ok(()),
        false => Err(
            "each component of the repository must be of a-z and 0-9, joined by one `.`, one or \
             two `_`, or dashes",
        ),
    }
}

fn component_ok(component: &str) -> bool {
    let is_word = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let mut rest = component.as_bytes();
    loop {
        let word = rest.iter().take_while(|byte| is_word(**byte)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        let joint = rest.iter().take_while(|byte| !is_word(**byte)).count();
        match &rest[..joint] {
            b"" => return rest.is_empty(),
            b"." | b"_" | b"__" => {}
            dashes if dashes.iter().all(|byte| *byte == b'-') => {}
            _ => return false,
        }
        rest = &rest[joint..];
    }
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let ok = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if tag.is_empty() || tag.len() > MAX_TAG {
        return Err("the tag must have 1 to 128 characters");
    }
    if tag.starts_with(['.', '-']) || !tag.bytes().all(ok) {
        return Err(
            "the tag must be of letters, digits, `_`, `.`, `-`, and not start with `.` or `-`",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn normal_forms() {
        let hex = "0".repeat(64);
        for (text, normal) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("docker.io/busybox:1", "docker.io/library/busybox:1"),
            ("index.docker.io/a/b", "docker.io/a/b:latest"),
            ("a/b", "docker.io/a/b:latest"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a/b:t", "localhost:5000/a/b:t"),
            ("r.io/a__b/c-d.e", "r.io/a__b/c-d.e:latest"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("UPPER/a", "UPPER/a:latest"),
            ("a---b", "docker.io/library/a---b:latest"),
        ] {
            assert_eq!(Reference::parse(text).unwrap().to_string(), normal);
        }
        let both = format!("r.io/a:t@sha256:{hex}");
        let normal = format!("r.io/a@sha256:{hex}");
        assert_eq!(Reference::parse(&both).unwrap().to_string(), normal);
    }

    #[test]
    fn refusals() {
        let hex = "0".repeat(64);
        for bad in [
            "",
            " ",
            "/",
            "a/",
            "/a",
            "a//b",
            "A",
            "r.io/A",
            "a:",
            "a:.t",
            "a: t",
            "a@",
            "a@sha256:0",
            "a b",
            "r.io:/a",
            "r.io:99999/a",
            "r.io:x/a",
            "r..io/a",
            "-r.io/a",
            "../a",
            "r.io/../a",
            "r.io/./a",
            "a..b",
            "a___b",
            "a_-b",
            "-a",
            "a-",
            "[::1/a",
            "[zz]/a",
            "r.io/a?b",
            "r.io/a#b",
            "r.io/a%2f",
            "a\0",
            "https://r.io/a",
            "user@r.io/a",
            "r.io",
            &hex,
            &format!("sha256:{hex}"),
            &"a".repeat(256),
            &format!("a:{}", "t".repeat(129)),
        ] {
            // "r.io" alone is a repository of docker.io, as everywhere.
            assert_eq!(Reference::parse(bad).is_ok(), bad == "r.io", "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parsing_is_idempotent_and_total(text in "[a-zA-Z0-9./:@_\\-\\[\\]]{0,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                let again = Reference::parse(&reference.to_string()).unwrap();
                prop_assert_eq!(&again, &reference);
                prop_assert!(!reference.path().contains(".."));
            }
        }
    }
}

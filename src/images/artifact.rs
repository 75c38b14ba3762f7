//! OCI artifacts: manifests whose config is no image config. Each of their blobs becomes one file, whatever is in it; a volume
//! of the artifact shows them all.
//!
//! ```text
//! layers[n] --title--> ROOT/layers/<number>/<title>       title: the annotation, else the digits of the digest
//! ```
//! To the layer store such a blob is a layer with one file, whose diff id stands for title and digest together.
//!
//! OCI: image-spec `manifest.md`, "Guidelines for Artifact Usage"; `annotations.md`.

use std::collections::BTreeSet;
use std::io::{BufRead, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::base::image::ImageConfig;
use crate::images::apply::Applied;
use crate::images::digest::{Digest, HashingReader};
use crate::images::error::ImageError;
use crate::images::manifest::{Config, Manifest};
use crate::images::platform::Platform;
use crate::images::unpack::Unpacked;

const TITLE: &str = "org.opencontainers.image.title";
/// Media types of configs of images; the last and the empty one come from early tools.
const IMAGE_CONFIGS: [&str; 4] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
    "application/octet-stream",
    "",
];
/// Longest title in bytes.
const MAX_TITLE: usize = 1024;
const MAX_NAME: usize = 255;

/// Is this config none of an image?
pub(crate) fn is_artifact(config_type: &str) -> bool {
    !IMAGE_CONFIGS.contains(&config_type)
}

/// Where each blob of an artifact goes, and the config that stands for the one it has.
///
/// # Errors
///
/// [`ImageError::Manifest`]: a title is no relative path, or two want the same place.
pub(crate) fn layout(manifest: &Manifest, what: &str) -> Result<(Vec<String>, Config), ImageError> {
    let mut titles = vec![];
    let mut places = BTreeSet::new();
    let mut directories = BTreeSet::new();
    for layer in &manifest.layers {
        let annotations = layer.annotations.as_ref();
        let title = annotations.and_then(|all| all.get(TITLE)).cloned();
        let title = title.unwrap_or_else(|| layer.digest.hex());
        if !is_path(&title) {
            let shown: String = title.chars().take(100).collect();
            let reason = format!("title {shown:?} of a blob is not the relative path of a file");
            return Err(ImageError::manifest(what, reason));
        }
        let above = title
            .match_indices('/')
            .map(|(at, _)| title[..at].to_owned());
        directories.extend(above);
        if !places.insert(title.clone()) {
            let reason = format!("two blobs have the title {title:?}");
            return Err(ImageError::manifest(what, reason));
        }
        titles.push(title);
    }
    if let Some(both) = places.intersection(&directories).next() {
        let reason = format!("{both:?} is the title of a blob and a directory of another");
        return Err(ImageError::manifest(what, reason));
    }
    let blobs = manifest.layers.iter().zip(&titles);
    let diff_ids = blobs.map(|(layer, title)| stand_in(title, &layer.digest));
    let config = Config {
        runtime: ImageConfig::default(),
        diff_ids: diff_ids.collect(),
        platform: Platform::default(),
    };
    Ok((titles, config))
}

fn is_path(title: &str) -> bool {
    let plain = |part: &str| {
        !matches!(part, "" | "." | "..")
            && part.len() <= MAX_NAME
            && !part.chars().any(char::is_control)
    };
    title.len() <= MAX_TITLE && title.split('/').all(plain)
}

/// The diff id of the layer that this blob under this title is.
fn stand_in(title: &str, digest: &Digest) -> Digest {
    Digest::of(format!("artifact\n{digest}\n{title}").as_bytes())
}

/// Writes a blob as the file `title` below the empty directory `root`; directories 0755, the file 0644, all root's.
///
/// Blocks on the source and the disk.
///
/// # Errors
///
/// [`ImageError::Io`]; what was made so far stays for the caller to remove.
pub(crate) fn place<R: BufRead>(
    source: R,
    root: OwnedFd,
    title: &str,
    what: &str,
) -> Result<Unpacked, ImageError> {
    let failed = |operation, errno: rustix::io::Errno| {
        ImageError::io(operation, Path::new(what).join(title), errno)
    };
    let (mut here, mut name, mut applied) = (root, title, Applied::default());
    while let Some((directory, rest)) = name.split_once('/') {
        rustix::fs::mkdirat(&here, directory, Mode::from_raw_mode(0o755))
            .map_err(|errno| failed("make directory above", errno))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below = rustix::fs::openat(&here, directory, flags, Mode::empty())
            .map_err(|errno| failed("open directory above", errno))?;
        rustix::fs::fchmod(&below, Mode::from_raw_mode(0o755))
            .map_err(|errno| failed("chmod directory above", errno))?;
        applied.inodes += 1;
        (here, name) = (below, rest);
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&here, name, flags, Mode::from_raw_mode(0o644))
        .map_err(|errno| failed("create", errno))?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))
        .map_err(|errno| failed("chmod", errno))?;
    let mut file = std::fs::File::from(file);
    let mut source = HashingReader::new(source);
    loop {
        let chunk = source
            .fill_buf()
            .map_err(|error| ImageError::io("read", what, error))?;
        if chunk.is_empty() {
            break;
        }
        let length = chunk.len();
        file.write_all(chunk)
            .map_err(|error| ImageError::io("write", what, error))?;
        source.consume(length);
    }
    let status = rustix::fs::fstat(&file).map_err(|errno| failed("fstat", errno))?;
    let (digest, size) = source.so_far();
    applied.inodes += 1;
    applied.bytes =
        u64::try_from(status.st_blocks).unwrap_or_default() * 512 + (applied.inodes - 1) * 4096;
    Ok(Unpacked {
        digest,
        size,
        diff_id: stand_in(title, &digest),
        applied,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images::manifest::{Document, parse_document};

    fn manifest(titles: &[Option<&str>]) -> Manifest {
        let layer = |(number, title): (usize, &Option<&str>)| {
            let digest = Digest::of(&number.to_ne_bytes()).to_string();
            let mut layer =
                serde_json::json!({"mediaType": "text/plain", "digest": digest, "size": 1});
            if let Some(title) = title {
                layer["annotations"] = serde_json::json!({ TITLE: title });
            }
            layer
        };
        let layers: Vec<_> = titles.iter().enumerate().map(layer).collect();
        let text = serde_json::json!({
            "schemaVersion": 2,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json",
                       "digest": Digest::of(b"{}").to_string(), "size": 2},
            "layers": layers,
        });
        match parse_document(text.to_string().as_bytes(), "", "m").unwrap() {
            Document::Manifest(manifest) => manifest,
            Document::Index(_) => panic!("a manifest"),
        }
    }

    #[test]
    fn titles_are_relative_paths() {
        let good = manifest(&[Some("model.bin"), Some("a/b/c.txt"), Some("a/b/d"), None]);
        let (titles, config) = layout(&good, "m").unwrap();
        assert_eq!(titles[..3], ["model.bin", "a/b/c.txt", "a/b/d"]);
        assert_eq!(titles[3], good.layers[3].digest.hex());
        assert_eq!(config.diff_ids.len(), 4);
        let long = "x".repeat(256);
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            "./a",
            "a\nb",
            "a\0b",
            &long,
        ] {
            let error = layout(&manifest(&[Some(bad)]), "m").unwrap_err();
            assert!(
                matches!(error, ImageError::Manifest { .. }),
                "{bad:?}: {error}"
            );
        }
        for twice in [[Some("a"), Some("a")], [Some("a"), Some("a/b")]] {
            assert!(layout(&manifest(&twice), "m").is_err(), "{twice:?}");
        }
    }

    #[test]
    fn the_same_blob_under_two_titles_is_two_layers() {
        let digest = Digest::of(b"x");
        assert_ne!(stand_in("a", &digest), stand_in("b", &digest));
        assert_ne!(stand_in("a", &digest), digest);
    }

    #[test]
    fn a_blob_becomes_a_file() {
        use std::os::unix::fs::MetadataExt as _;
        let place_in = tempfile::tempdir().unwrap();
        let root = crate::images::apply::open_root(place_in.path()).unwrap();
        let unpacked = place(&b"content"[..], root, "a/b/file", "blob").unwrap();
        assert_eq!(
            (unpacked.digest, unpacked.size),
            (Digest::of(b"content"), 7)
        );
        assert_eq!(unpacked.diff_id, stand_in("a/b/file", &unpacked.digest));
        let file = place_in.path().join("a/b/file");
        assert_eq!(std::fs::read(&file).unwrap(), b"content");
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o7777, 0o644);
    }
}

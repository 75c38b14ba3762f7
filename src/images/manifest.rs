//! Documents of an image: index, manifest, config. What comes out has been checked: no document is two
//! kinds at once, sizes are sane, digests are digests. `urls` of foreign layers are never looked at.
//!
//! OCI: image-index.md, manifest.md, config.md. Docker: manifest schema 2.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::base::image::ImageConfig;
use crate::images::digest::Digest;
use crate::images::error::ImageError;
use crate::images::platform::Platform;

/// A manifest, index or config is not larger.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;
/// Layers of one image; overlayfs takes 500 lower directories.
const MAX_LAYERS: usize = 500;
const MAX_ENTRIES: usize = 4096;

/// What is asked for in `Accept`, best first.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

const INDEX_TYPES: [&str; 2] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
const MANIFEST_TYPES: [&str; 2] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Content somewhere else.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub(crate) media_type: String,
    /// Its digest.
    pub(crate) digest: Digest,
    /// Bytes.
    pub(crate) size: u64,
    /// In an index: what it runs on.
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    /// Names and the like.
    #[serde(default)]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

/// One image.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    /// The config.
    pub(crate) config: Descriptor,
    /// Layers, bottom first.
    pub(crate) layers: Vec<Descriptor>,
}

/// A manifest or an index of them.
#[derive(Clone, Debug)]
pub(crate) enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several, one for each platform.
    Index(Vec<Descriptor>),
}

/// A config as far as it is used.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// For the runtime.
    pub(crate) runtime: ImageConfig,
    /// Diff ids, bottom first.
    pub(crate) diff_ids: Vec<Digest>,
    /// What it runs on; absent in old images.
    pub(crate) platform: Platform,
}

/// Reads a manifest or index. `stated` is the media type that the sender gave; empty: none.
///
/// # Errors
///
/// [`ImageError::Manifest`]: malformed, ambiguous; [`ImageError::Unsupported`]: schema 1, artifacts.
pub(crate) fn parse_document(
    bytes: &[u8],
    stated: &str,
    what: &str,
) -> Result<Document, ImageError> {
    let bad = |reason: &str| ImageError::manifest(what, reason);
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| ImageError::manifest(what, format!("not JSON: {error}")))?;
    let object = value.as_object().ok_or_else(|| bad("not a JSON object"))?;
    let version = object.get("schemaVersion").and_then(Value::as_u64);
    if version == Some(1) || object.contains_key("fsLayers") {
        return Err(ImageError::Unsupported {
            what: what.to_owned(),
            reason: "manifest schema 1 is not supported: push the image again with a current tool",
        });
    }
    if version != Some(2) {
        return Err(bad("schemaVersion must be 2"));
    }
    let (index, manifest) = (
        object.contains_key("manifests"),
        object.contains_key("layers") || object.contains_key("config"),
    );
    if index == manifest {
        return Err(bad(
            "must have either `manifests`, or `config` and `layers`",
        ));
    }
    let own = object
        .get("mediaType")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let stated = stated.split(';').next().unwrap_or_default().trim();
    for media_type in [own, stated] {
        let contradicts = match index {
            true => MANIFEST_TYPES.contains(&media_type),
            false => INDEX_TYPES.contains(&media_type),
        };
        if contradicts {
            return Err(bad("its media type and its content contradict each other"));
        }
    }
    match index {
        true => parse_index(value, what),
        false => parse_manifest(value, what),
    }
}

fn parse_index(value: Value, what: &str) -> Result<Document, ImageError> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Value>,
    }
    let index: Index = serde_json::from_value(value)
        .map_err(|error| ImageError::manifest(what, error.to_string()))?;
    if index.manifests.len() > MAX_ENTRIES {
        return Err(ImageError::TooLarge {
            what: what.to_owned(),
            limit: format!("{MAX_ENTRIES} entries"),
        });
    }
    // An entry that we cannot read is none that we can run.
    let entries = index
        .manifests
        .into_iter()
        .filter_map(|entry| serde_json::from_value(entry).ok());
    Ok(Document::Index(entries.collect()))
}

fn parse_manifest(value: Value, what: &str) -> Result<Document, ImageError> {
    #[derive(Deserialize)]
    struct Raw {
        config: Descriptor,
        #[serde(default)]
        layers: Vec<Descriptor>,
    }
    let raw: Raw = serde_json::from_value(value)
        .map_err(|error| ImageError::manifest(what, error.to_string()))?;
    if raw.layers.len() > MAX_LAYERS {
        return Err(ImageError::TooLarge {
            what: what.to_owned(),
            limit: format!("{MAX_LAYERS} layers"),
        });
    }
    if raw.config.size > MAX_DOCUMENT {
        return Err(ImageError::TooLarge {
            what: format!("{what}: config"),
            limit: format!("{MAX_DOCUMENT} bytes"),
        });
    }
    for layer in &raw.layers {
        if layer.media_type.ends_with("+encrypted") {
            return Err(ImageError::Unsupported {
                what: what.to_owned(),
                reason: "encrypted layers are not supported",
            });
        }
        if layer.size > 1 << 48 {
            return Err(ImageError::manifest(what, "a layer of impossible size"));
        }
    }
    Ok(Document::Manifest(Manifest {
        config: raw.config,
        layers: raw.layers,
    }))
}

/// Reads a config.
///
/// # Errors
///
/// [`ImageError::Manifest`]: malformed; [`ImageError::Unsupported`]: no image for containers.
pub(crate) fn parse_config(bytes: &[u8], what: &str) -> Result<Config, ImageError> {
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "PascalCase", default)]
    struct Inner {
        user: Option<String>,
        env: Option<Vec<String>>,
        entrypoint: Option<Vec<String>>,
        cmd: Option<Vec<String>>,
        working_dir: Option<String>,
        volumes: Option<BTreeMap<String, Value>>,
        stop_signal: Option<String>,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Option<Vec<Digest>>,
    }
    #[derive(Deserialize)]
    struct Raw {
        config: Option<Inner>,
        rootfs: Option<RootFs>,
        #[serde(default)]
        os: String,
        #[serde(default)]
        architecture: String,
        #[serde(default)]
        variant: String,
    }
    let raw: Raw = serde_json::from_slice(bytes)
        .map_err(|error| ImageError::manifest(what, error.to_string()))?;
    let Some(rootfs) = raw.rootfs else {
        return Err(ImageError::Unsupported {
            what: what.to_owned(),
            reason: "no root filesystem: an artifact, not an image",
        });
    };
    let inner = raw.config.unwrap_or_default();
    Ok(Config {
        runtime: ImageConfig {
            user: inner.user.unwrap_or_default(),
            env: inner.env.unwrap_or_default(),
            entrypoint: inner.entrypoint.unwrap_or_default(),
            cmd: inner.cmd.unwrap_or_default(),
            working_dir: inner.working_dir.unwrap_or_default(),
            volumes: inner.volumes.unwrap_or_default().into_keys().collect(),
            stop_signal: inner.stop_signal.unwrap_or_default(),
        },
        diff_ids: rootfs.diff_ids.unwrap_or_default(),
        platform: Platform {
            os: raw.os,
            architecture: raw.architecture,
            variant: raw.variant,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::{HasKind as _, Kind};

    fn descriptor(size: u64) -> String {
        let digest = Digest::of(b"x");
        format!(r#"{{"mediaType":"x","digest":"{digest}","size":{size}}}"#)
    }

    #[test]
    fn ambiguous_documents_are_refused() {
        let d = descriptor(1);
        for (text, stated) in [
            (
                format!(r#"{{"schemaVersion":2,"manifests":[{d}],"layers":[{d}]}}"#),
                "",
            ),
            (
                format!(r#"{{"schemaVersion":2,"manifests":[{d}],"config":{d}}}"#),
                "",
            ),
            (r#"{"schemaVersion":2}"#.to_owned(), ""),
            (
                format!(r#"{{"schemaVersion":2,"manifests":[{d}]}}"#),
                MANIFEST_TYPES[0],
            ),
            (
                format!(
                    r#"{{"schemaVersion":2,"mediaType":"{}","config":{d},"layers":[]}}"#,
                    INDEX_TYPES[0]
                ),
                "",
            ),
            (
                format!(r#"{{"schemaVersion":3,"config":{d},"layers":[]}}"#),
                "",
            ),
            ("[]".to_owned(), ""),
            (String::new(), ""),
            (
                format!(
                    r#"{{"schemaVersion":2,"config":{},"layers":[]}}"#,
                    descriptor(9 << 20)
                ),
                "",
            ),
        ] {
            let error = parse_document(text.as_bytes(), stated, "m").unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidArgument, "{text}");
        }
    }

    #[test]
    fn schema_1_is_refused_by_name() {
        let text = r#"{"schemaVersion":1,"fsLayers":[]}"#;
        let error = parse_document(text.as_bytes(), "", "m").unwrap_err();
        assert!(error.to_string().contains("schema 1"), "{error}");
    }

    #[test]
    fn foreign_urls_are_not_even_read() {
        let d = Digest::of(b"x");
        let text = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[{{"mediaType":"y","digest":"{d}","size":3,"urls":["http://evil/"]}}]}}"#,
            descriptor(2)
        );
        let Document::Manifest(manifest) = parse_document(text.as_bytes(), "", "m").unwrap() else {
            panic!("a manifest")
        };
        assert!(!format!("{manifest:?}").contains("evil"));
    }

    #[test]
    fn configs_with_nulls() {
        let text = r#"{"config":{"Env":null,"Cmd":["a"],"Volumes":{"/v":{}}},"rootfs":{"type":"layers","diff_ids":null}}"#;
        let config = parse_config(text.as_bytes(), "c").unwrap();
        assert_eq!(
            (config.runtime.cmd, config.runtime.volumes),
            (vec!["a".into()], vec!["/v".into()])
        );
        assert!(parse_config(b"{}", "c").is_err());
    }
}

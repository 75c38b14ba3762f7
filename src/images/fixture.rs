//! Layers and archives for tests, made byte by byte so that they can be wrong in every way.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::path::Path;

use crate::base::tasks::Tasks;
use crate::images::digest::Digest;
use crate::images::{ImageStore, ImagesConfig};

/// This machine as images name it.
pub(crate) const HERE: &str = if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    "amd64"
};

/// A tar archive being made.
#[derive(Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

fn octal(field: &mut [u8], value: u64) {
    let text = format!("{value:0width$o}", width = field.len() - 1);
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text.as_bytes()[..length]);
}

/// A ustar header.
pub(crate) fn header(path: &[u8], flag: u8, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    let length = path.len().min(100);
    block[..length].copy_from_slice(&path[..length]);
    octal(&mut block[100..108], 0o644);
    octal(&mut block[108..116], 0);
    octal(&mut block[116..124], 0);
    octal(&mut block[124..136], size);
    octal(&mut block[136..148], 1_600_000_000);
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    octal(&mut block[329..337], 0);
    octal(&mut block[337..345], 0);
    seal(&mut block);
    block
}

/// Puts the checksum right.
pub(crate) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    octal(&mut block[148..155], sum);
}

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, path: &str, data: &[u8]) -> Self {
        self.raw(&header(path.as_bytes(), b'0', data.len() as u64))
            .raw(data)
    }

    pub(crate) fn dir(self, path: &str) -> Self {
        self.owned(path, b'5', 0o755, 0)
    }

    /// An entry without data, with mode, owner and group.
    pub(crate) fn owned(self, path: &str, flag: u8, mode: u64, id: u64) -> Self {
        let mut block = header(path.as_bytes(), flag, 0);
        octal(&mut block[100..108], mode);
        octal(&mut block[108..116], id);
        octal(&mut block[116..124], id);
        seal(&mut block);
        self.raw(&block)
    }

    pub(crate) fn link(self, path: &str, flag: u8, target: &str) -> Self {
        let mut block = header(path.as_bytes(), flag, 0);
        block[157..157 + target.len()].copy_from_slice(target.as_bytes());
        seal(&mut block);
        self.raw(&block)
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.link(path, b'2', target)
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(path, b'1', target)
    }

    pub(crate) fn node(self, path: &str, flag: u8, major: u64, minor: u64) -> Self {
        let mut block = header(path.as_bytes(), flag, 0);
        octal(&mut block[329..337], major);
        octal(&mut block[337..345], minor);
        seal(&mut block);
        self.raw(&block)
    }

    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = vec![];
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + rest.to_string().len();
            if length.to_string().len() != rest.to_string().len() {
                length = rest + length.to_string().len();
            }
            body.extend_from_slice(format!("{length} {key}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.raw(&header(b"pax", b'x', body.len() as u64))
            .raw(&body)
    }

    /// The archive with its end mark.
    pub(crate) fn end(self) -> Vec<u8> {
        let mut bytes = self.0;
        bytes.extend_from_slice(&[0; 1024]);
        bytes
    }
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image as registries and archives have it.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
    /// Compressed layers.
    pub(crate) layers: Vec<Vec<u8>>,
    /// The same, plain.
    pub(crate) plain: Vec<Vec<u8>>,
}

impl TestImage {
    /// An image of these plain layers, with `note` in its config so that ids differ.
    pub(crate) fn new(note: &str, plain: &[Vec<u8>]) -> Self {
        let layers: Vec<_> = plain.iter().map(|layer| gzip(layer)).collect();
        Self::packed(note, plain, layers)
    }

    pub(crate) fn packed(note: &str, plain: &[Vec<u8>], layers: Vec<Vec<u8>>) -> Self {
        let diff_ids: Vec<_> = plain
            .iter()
            .map(|layer| Digest::of(layer).to_string())
            .collect();
        let config = serde_json::json!({
            "architecture": HERE, "os": "linux",
            "config": {"Cmd": ["/bin/sh"], "Env": [format!("NOTE={note}")], "User": "1002:1003"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let descriptor = |kind: &str, bytes: &[u8]| {
            serde_json::json!({
                "mediaType": kind, "digest": Digest::of(bytes).to_string(), "size": bytes.len(),
            })
        };
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|layer| descriptor(tar, layer)).collect::<Vec<_>>(),
        });
        Self {
            config,
            manifest: serde_json::to_vec(&manifest).unwrap(),
            layers,
            plain: plain.to_vec(),
        }
    }

    pub(crate) fn id(&self) -> String {
        Digest::of(&self.config).to_string()
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// As `docker save` wrote it for long.
    pub(crate) fn docker_archive(&self, tags: &[&str]) -> Vec<u8> {
        let mut tar = Tar::new();
        let mut paths = vec![];
        for (at, layer) in self.plain.iter().enumerate() {
            let path = format!("{at}/layer.tar");
            tar = tar.file(&path, layer);
            paths.push(path);
        }
        let manifest = serde_json::json!([{
            "Config": "config.json", "RepoTags": tags, "Layers": paths,
        }]);
        tar.file("config.json", &self.config)
            .file("manifest.json", &serde_json::to_vec(&manifest).unwrap())
            .end()
    }

    /// An OCI layout under the name `name`.
    pub(crate) fn oci_archive(&self, name: &str) -> Vec<u8> {
        let index = serde_json::json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": self.digest().to_string(), "size": self.manifest.len(),
                "annotations": {"io.containerd.image.name": name},
            }],
        });
        let mut tar = Tar::new().file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        for (_, blob) in self.blobs() {
            tar = tar.file(&format!("blobs/sha256/{}", Digest::of(&blob).hex()), &blob);
        }
        tar.file("index.json", &serde_json::to_vec(&index).unwrap())
            .end()
    }

    /// Everything by digest.
    pub(crate) fn blobs(&self) -> BTreeMap<String, Vec<u8>> {
        let all = self.layers.iter().chain([&self.config, &self.manifest]);
        all.map(|bytes| (Digest::of(bytes).to_string(), bytes.clone()))
            .collect()
    }
}

/// An unlinked file with this content, at its start.
pub(crate) fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

pub(crate) fn store(root: &Path) -> ImageStore {
    ImageStore::open(
        ImagesConfig {
            root: root.to_owned(),
            registry_config_paths: vec![root.join("certs.d")],
            pull_progress_timeout: std::time::Duration::from_secs(20),
            ..ImagesConfig::default()
        },
        Tasks::default(),
    )
    .unwrap()
}

/// Everything in the store but the empty directories that are always there.
pub(crate) fn left_in(root: &Path) -> Vec<String> {
    let mut left = vec![];
    for below in ["layers", "images/layer", "images/image", "images/blob"] {
        for entry in std::fs::read_dir(root.join(below)).unwrap() {
            let name = entry.unwrap().file_name().to_string_lossy().into_owned();
            if name != "0" {
                left.push(format!("{below}/{name}"));
            }
        }
    }
    left
}

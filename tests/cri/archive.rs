//! docker-archives made here: a right one, and wrong ones.

use sha2::{Digest as _, Sha256};

/// The static program that the monitor embeds: it waits for a signal.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

fn tar(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(*mode);
        header.set_cksum();
        builder.append_data(&mut header, path, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    let digits: Vec<_> = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    digits.concat()
}

fn layer() -> Vec<u8> {
    tar(&[
        ("pause", PROGRAM, 0o755),
        ("etc/passwd", b"root:x:0:0:root:/:/pause\n", 0o644),
    ])
}

fn archive(name: &str, diff_id: &str) -> Vec<u8> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff_id}")]},
    });
    let manifest = serde_json::json!([
        {"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}
    ]);
    tar(&[
        ("manifest.json", manifest.to_string().as_bytes(), 0o644),
        ("config.json", config.to_string().as_bytes(), 0o644),
        ("layer.tar", &layer(), 0o644),
    ])
}

/// An image of one program.
pub(crate) fn good(name: &str) -> Vec<u8> {
    archive(name, &digest(&layer()))
}

/// Its config names another layer than is there.
pub(crate) fn wrong_digest(name: &str) -> Vec<u8> {
    archive(name, &digest(b"something else"))
}

/// A tar with nothing of an image.
pub(crate) fn without_manifest() -> Vec<u8> {
    tar(&[("readme.txt", b"hello", 0o644)])
}

//! Generates the gRPC types from `proto/` (no `protoc` needed) and builds the pause program.
#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "a build script: it runs rustc, and a failure ends the build"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    pause(&out);
    #[cfg(feature = "daemon")]
    grpc(&out);
    #[cfg(feature = "daemon")]
    nri(&out);
}

/// Builds `src/monitor/pause/pause.rs`, a freestanding static program of a few kilobytes whose bytes
/// the monitor embeds.
fn pause(out: &Path) {
    let source = "src/monitor/pause/pause.rs";
    println!("cargo::rerun-if-changed={source}");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let mut args = vec![
        "--edition=2024".to_owned(),
        "--crate-type=bin".into(),
        format!("--target={arch}-unknown-linux-gnu"),
        "-Cpanic=abort".into(),
        "-Copt-level=s".into(),
        "-Cstrip=symbols".into(),
        "-Crelocation-model=static".into(),
        "-Ctarget-feature=+crt-static".into(),
    ];
    for link in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none,-z,norelro,-z,noseparate-code,-n",
    ] {
        args.push(format!("-Clink-arg={link}"));
    }
    let status = Command::new(rustc)
        .args(&args)
        .arg(source)
        .arg("-o")
        .arg(out.join("pause"))
        .status()
        .expect("rustc runs");
    assert!(status.success(), "building {source} failed");
}

/// What the daemon serves: CRI, the part of containerd's services that cAdvisor asks, our own.
#[cfg(feature = "daemon")]
const PROTOS: &[&str] = &[
    "runtime/v1/api.proto",
    "containerd/services/containers/v1/containers.proto",
    "containerd/services/tasks/v1/tasks.proto",
    "containerd/services/version/v1/version.proto",
    "berth/v1/berth.proto",
];

#[cfg(feature = "daemon")]
fn grpc(out: &Path) {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(PROTOS, ["proto"]).expect("the .proto files under proto/ compile");
    std::fs::write(out.join("descriptors.bin"), encode(&files)).expect("OUT_DIR is writable");
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .skip_debug([".runtime.v1.AuthConfig"])
        // Written by hand: see src/cri/metrics/encoded.rs.
        .extern_path(
            ".runtime.v1.PodSandboxMetrics",
            "crate::cri::metrics::Encoded",
        )
        .extern_path(
            ".runtime.v1.ContainerMetrics",
            "crate::cri::metrics::Encoded",
        )
        .extern_path(".runtime.v1.Metric", "crate::cri::metrics::Encoded")
        .compile_fds(files)
        .expect("the gRPC types are generated");
}

/// Messages of NRI and of ttrpc, which it travels in: no gRPC, so no services.
#[cfg(feature = "daemon")]
fn nri(out: &Path) {
    let protos = ["nri/nri.proto", "nri/ttrpc.proto"];
    let files = protox::compile(protos, ["proto"]).expect("the .proto files under proto/ compile");
    let out = out.join("nri");
    std::fs::create_dir_all(&out).expect("OUT_DIR is writable");
    tonic_prost_build::configure()
        .build_client(false)
        .build_server(false)
        .btree_map(".")
        .out_dir(out)
        .compile_fds(files)
        .expect("the types of NRI are generated");
}

#[cfg(feature = "daemon")]
fn encode(files: &impl prost::Message) -> Vec<u8> {
    files.encode_to_vec()
}

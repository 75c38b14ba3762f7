//! The per-pod monitor. See `src/ARCHITECTURE.md`.
fn main() -> std::process::ExitCode {
    berth::monitor_main()
}

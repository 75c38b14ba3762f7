//! The daemon and the command line. See `src/ARCHITECTURE.md`.
fn main() -> std::process::ExitCode {
    berth::cli_main()
}

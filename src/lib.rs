#![doc = include_str!("ARCHITECTURE.md")]
#![cfg_attr(
    not(feature = "daemon"),
    expect(
        dead_code,
        reason = "the monitor alone needs a part of base, sys and runtime"
    )
)]

pub(crate) mod base;
#[cfg(feature = "daemon")]
pub(crate) mod cli;
#[cfg(feature = "daemon")]
pub(crate) mod cri;
#[cfg(feature = "daemon")]
pub(crate) mod daemon;
#[cfg(feature = "daemon")]
pub(crate) mod engine;
#[cfg(feature = "daemon")]
pub(crate) mod images;
pub(crate) mod monitor;
#[cfg(feature = "daemon")]
pub(crate) mod network;
#[cfg(feature = "daemon")]
pub(crate) mod nri;
pub(crate) mod runtime;
#[cfg(feature = "daemon")]
pub(crate) mod store;
#[cfg(feature = "daemon")]
pub(crate) mod streaming;
pub(crate) mod sys;

/// What hack/fuzz feeds with bytes of its own: parsers of what comes from the network.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    pub use crate::streaming::fuzzing::{spdy, websocket};
}

/// The main of the binary `berth`: the command line, with the daemon behind `serve`.
#[cfg(feature = "daemon")]
#[must_use]
pub fn cli_main() -> std::process::ExitCode {
    cli::main(&cli::Local {
        serve: daemon::serve,
        check_config: daemon::check_config,
        default_config: daemon::default_config,
    })
}

pub use monitor::main as monitor_main;

//! Where log lines go: to stderr, as text or as JSON, one line each.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, fmt, registry};

use crate::daemon::config::Config;

/// What passes: a level for everything, and levels for single modules, as in `info,berth::images=debug`.
/// Libraries below us stay at `warn` unless named. Absent: the text is neither.
pub(super) fn filter(text: &str) -> Option<Targets> {
    // `Targets` would take a word alone for a module whose every line is wanted.
    let fine = |part: &str| part.contains('=') || part.trim().parse::<LevelFilter>().is_ok();
    if text.is_empty() || !text.split(',').all(fine) {
        return None;
    }
    let given: Targets = text.parse().ok()?;
    let mut filter = Targets::new();
    if let Some(level) = given.default_level() {
        filter = filter
            .with_default(level.min(LevelFilter::WARN))
            .with_target("berth", level);
    }
    Some(
        filter.with_targets(
            given
                .iter()
                .map(|(target, level)| (target.to_owned(), level)),
        ),
    )
}

/// Installs the log and the panic hook that writes into it. A second call changes nothing.
pub(super) fn install(config: &Config) {
    let filter = filter(&config.log_level).unwrap_or_default();
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let installed = match config.log_format.as_str() {
        "json" => registry().with(lines.json().with_filter(filter)).try_init(),
        _ => registry().with(lines.with_filter(filter)).try_init(),
    };
    if installed.is_ok() {
        std::panic::set_hook(Box::new(|panic| {
            let place = panic
                .location()
                .map(ToString::to_string)
                .unwrap_or_default();
            let error = panic.payload_as_str().unwrap_or("(not a text)");
            tracing::error!(error, place, "panic");
        }));
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn levels_are_for_us_unless_named() {
        let passes = filter("debug,h2=trace").unwrap();
        assert!(passes.would_enable("berth::cri", &Level::DEBUG));
        assert!(!passes.would_enable("berth::cri", &Level::TRACE));
        assert!(passes.would_enable("h2::codec", &Level::TRACE));
        assert!(!passes.would_enable("hyper", &Level::INFO));
        assert!(passes.would_enable("hyper", &Level::WARN));
        for bad in ["", "loud", "info,loud", "info,berth=loud"] {
            assert!(filter(bad).is_none(), "{bad}");
        }
    }
}

//! Progress of pulls and imports: bars on a terminal, nothing elsewhere.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::table::short;
use crate::cri::berth_v1::LayerProgress;

/// One bar for each layer, one for the upload of an archive.
#[derive(Debug)]
pub(super) struct Bars {
    all: MultiProgress,
    layers: HashMap<String, ProgressBar>,
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Bars {
    /// No bar yet. stderr that is no terminal gets none.
    pub(super) fn new() -> Self {
        Self {
            all: MultiProgress::with_draw_target(ProgressDrawTarget::stderr()),
            layers: HashMap::new(),
        }
    }

    /// A bar for an archive on its way; `total` 0: not known.
    pub(super) fn upload(&self, total: u64) -> ProgressBar {
        let bar = match total {
            0 => ProgressBar::new_spinner().with_style(style("{prefix:14} {spinner} {bytes}")),
            _ => ProgressBar::new(total).with_style(style(
                "{prefix:14} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
            )),
        };
        let bar = self.all.add(bar.with_prefix("archive"));
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    /// News of layers.
    pub(super) fn update(&mut self, layers: &[LayerProgress]) {
        for layer in layers {
            let bar = self.layers.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = ProgressBar::new(layer.total)
                    .with_style(style("{prefix:14} [{bar:30}] {bytes}/{total_bytes} {msg}"))
                    .with_prefix(short(&layer.digest));
                self.all.add(bar)
            });
            if layer.total > 0 {
                bar.set_length(layer.total);
            }
            if layer.done {
                bar.set_position(bar.length().unwrap_or_default());
                bar.finish_with_message("done");
            } else if layer.bytes > 0 {
                bar.set_position(layer.bytes);
            }
        }
    }

    /// Leaves the terminal as it was, the finished bars above.
    pub(super) fn end(&self) {
        for bar in self.layers.values() {
            bar.abandon();
        }
    }
}

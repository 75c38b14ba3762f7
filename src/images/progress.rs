//! Tells clients how far a pull or an import is. Never waits for them: who reads slowly misses steps.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::Sender;

use crate::base::image::Progress;

#[derive(Debug, Default)]
struct State {
    listeners: Vec<Sender<Progress>>,
    layers: Vec<(String, u64)>,
    bytes: HashMap<String, (u64, bool)>,
}

/// Clones report to the same listeners.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reporter(Arc<Mutex<State>>);

impl Reporter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a listener; it is told what is known so far.
    pub(crate) fn listen(&self, listener: Option<Sender<Progress>>) {
        let Some(listener) = listener else { return };
        let mut state = self.state();
        if !state.layers.is_empty() {
            let _missed = listener
                .try_send(Progress::Layers(state.layers.clone()))
                .is_err();
        }
        for (digest, (bytes, done)) in &state.bytes {
            let step = Progress::Layer {
                digest: digest.clone(),
                bytes: *bytes,
                done: *done,
            };
            let _missed = listener.try_send(step).is_err();
        }
        state.listeners.push(listener);
    }

    /// The layers are known.
    pub(crate) fn layers(&self, layers: Vec<(String, u64)>) {
        let mut state = self.state();
        state.layers.extend(layers);
        let step = Progress::Layers(state.layers.clone());
        state.tell(&step);
    }

    /// So much of a layer is here.
    pub(crate) fn layer(&self, digest: &str, bytes: u64, done: bool) {
        let mut state = self.state();
        state.bytes.insert(digest.to_owned(), (bytes, done));
        let step = Progress::Layer {
            digest: digest.to_owned(),
            bytes,
            done,
        };
        state.tell(&step);
    }
}

impl State {
    fn tell(&mut self, step: &Progress) {
        self.listeners.retain(|listener| {
            let _missed = listener.try_send(step.clone()).is_err();
            !listener.is_closed()
        });
    }
}

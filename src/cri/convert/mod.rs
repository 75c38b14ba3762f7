//! CRI messages to plain values, checked, and plain values to CRI messages. Pure.
//!
//! What comes in is refused where no runtime could honour it, with the field, its value and the mend in
//! the message. What the engine has to know the node for (does the image exist, is the pod ready) is not
//! decided here.

pub(super) mod check;
pub(super) mod container;
pub(super) mod image;
pub(super) mod pod;
pub(super) mod resources;
pub(super) mod security;
pub(super) mod signal;
pub(super) mod stats;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

/// A label or annotation map in order.
fn ordered(map: HashMap<String, String>) -> BTreeMap<String, String> {
    map.into_iter().collect()
}

/// An ordered map as the generated types want it.
pub(super) fn hashed(map: &BTreeMap<String, String>) -> HashMap<String, String> {
    map.iter()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

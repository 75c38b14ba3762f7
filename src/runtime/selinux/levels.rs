//! Levels in use: pods get two categories that no other pod or container has.
//!
//! A level is in use as long as somebody has a [`Hold`] of it: a pod from before its record is written until it is gone, a
//! container that names one of its own likewise. After a restart the records say which levels are held.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::base::error::{HasKind, Kind};

/// Every pair of categories is in use.
#[derive(Debug, thiserror::Error)]
#[error(
    "all {count} SELinux levels of {range} categories are in use; raise selinux_category_range"
)]
pub(crate) struct NoLevel {
    /// How many there are.
    pub(crate) count: u64,
    /// Of how many categories.
    pub(crate) range: u32,
}

impl HasKind for NoLevel {
    fn kind(&self) -> Kind {
        Kind::ResourceExhausted
    }
}

/// Levels and how often each is held.
#[derive(Clone, Debug)]
pub(crate) struct Levels {
    range: u32,
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

/// A level in use. Dropped, it is free unless somebody else holds it too.
#[derive(Debug)]
pub(crate) struct Hold {
    level: String,
    held: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.get_mut(&self.level) {
            Some(count) if *count > 1 => *count -= 1,
            _last => {
                held.remove(&self.level);
            }
        }
    }
}

impl Hold {
    /// The level.
    pub(crate) fn level(&self) -> &str {
        &self.level
    }
}

impl Levels {
    /// Levels of categories 0 up to `range`, at least 2, exclusive.
    pub(crate) fn new(range: u32) -> Self {
        Self {
            range: range.max(2),
            held: Arc::default(),
        }
    }

    /// Holds this level, whoever else does.
    pub(crate) fn hold(&self, level: &str) -> Hold {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(level.to_owned()).or_default() += 1;
        Hold {
            level: level.to_owned(),
            held: Arc::clone(&self.held),
        }
    }

    /// Holds a level of this sensitivity that nobody holds: the first free one from a `random` place on.
    ///
    /// # Errors
    /// [`NoLevel`].
    pub(crate) fn allocate(&self, sensitivity: &str, random: u64) -> Result<Hold, NoLevel> {
        let range = u64::from(self.range);
        let count = range * (range - 1) / 2;
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for step in 0..count {
            let (low, high) = pair((random % count + step) % count);
            let level = format!("{sensitivity}:c{low},c{high}");
            if !held.contains_key(&level) {
                held.insert(level.clone(), 1);
                return Ok(Hold {
                    level,
                    held: Arc::clone(&self.held),
                });
            }
        }
        Err(NoLevel {
            count,
            range: self.range,
        })
    }
}

/// The pair of different numbers, lower one first, with this index: (0,1), (0,2), (1,2), (0,3) ...
pub(super) fn pair(index: u64) -> (u64, u64) {
    // Pairs below `high` are high * (high - 1) / 2 many.
    let mut high = (index * 2).isqrt();
    while high * (high + 1) / 2 <= index {
        high += 1;
    }
    while high * high.saturating_sub(1) / 2 > index {
        high -= 1;
    }
    (index - high * (high - 1) / 2, high)
}

//! The objects by id: lookups by unambiguous prefix, and the clock that orders them.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::base::clock::Timestamp;

/// Objects `V` by id `K`. Every method is one short critical section.
#[derive(Debug)]
pub(crate) struct Table<K, V>(RwLock<BTreeMap<K, Arc<V>>>);

/// What a prefix fits.
#[derive(Debug)]
pub(crate) enum Found<V> {
    /// Nothing.
    None,
    /// Exactly one object.
    One(Arc<V>),
    /// Several.
    Many,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(RwLock::default())
    }
}

impl<K: Ord + Copy + Display + FromStr, V> Table<K, V> {
    /// Adds or replaces.
    pub(crate) fn insert(&self, id: K, value: Arc<V>) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, value);
    }

    /// Takes out.
    pub(crate) fn remove(&self, id: K) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
    }

    /// By its full id.
    pub(crate) fn get(&self, id: K) -> Option<Arc<V>> {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        map.get(&id).map(Arc::clone)
    }

    /// By a prefix of its id.
    pub(crate) fn find(&self, prefix: &str) -> Found<V> {
        if prefix.is_empty() || prefix.len() > 64 {
            return Found::None;
        }
        let Ok(lowest) = K::from_str(&format!("{prefix:0<64}")) else {
            return Found::None;
        };
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut fits = map
            .range(lowest..)
            .take_while(|(id, _)| id.to_string().starts_with(prefix));
        match (fits.next(), fits.next()) {
            (None, _) => Found::None,
            (Some((_, one)), None) => Found::One(Arc::clone(one)),
            (Some(_), Some(_)) => Found::Many,
        }
    }

    /// All of them, by id.
    pub(crate) fn all(&self) -> Vec<Arc<V>> {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        map.values().map(Arc::clone).collect()
    }

    /// What a list filter's id selects: all for an empty one; nothing for an unknown or ambiguous one.
    pub(crate) fn select(&self, prefix: &str) -> Vec<Arc<V>> {
        if prefix.is_empty() {
            return self.all();
        }
        match self.find(prefix) {
            Found::One(one) => vec![one],
            Found::None | Found::Many => vec![],
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// The wall clock, but never twice the same time: what is made later has the later time.
#[derive(Debug, Default)]
pub(crate) struct Stamps(AtomicI64);

impl Stamps {
    /// Now, later than every time given out before.
    pub(crate) fn next(&self) -> Timestamp {
        let now = Timestamp::now().0;
        let last = self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| {
                Some(now.max(last.saturating_add(1)))
            })
            .unwrap_or_else(|last| last);
        Timestamp(now.max(last.saturating_add(1)))
    }

    /// Notes a time of before the restart.
    pub(crate) fn at_least(&self, seen: Timestamp) {
        self.0.fetch_max(seen.0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::PodId;

    #[test]
    fn prefixes() {
        let table: Table<PodId, u8> = Table::default();
        let id = |text: &str| format!("{text:0<63}1").parse::<PodId>().unwrap();
        table.insert(id("ab"), Arc::new(1));
        table.insert(id("ac"), Arc::new(2));
        table.insert(id("ff"), Arc::new(3));
        for (prefix, found) in [
            ("ab", Some(1)),
            ("ac", Some(2)),
            ("f", Some(3)),
            ("", None),
            ("b", None),
            ("fg", None),
            ("AB", None),
            ("é", None),
        ] {
            match (table.find(prefix), found) {
                (Found::One(value), Some(expected)) => assert_eq!(*value, expected, "{prefix}"),
                (Found::None, None) => {}
                other => panic!("{prefix}: {other:?}"),
            }
        }
        assert!(matches!(table.find("a"), Found::Many));
        assert!(matches!(table.find(&id("ab").to_string()), Found::One(_)));
        assert!(matches!(table.find(&"a".repeat(65)), Found::None));
        assert_eq!(table.select("").len(), 3);
        assert!(table.select("a").is_empty());
        assert_eq!(table.select("ff").len(), 1);
    }

    #[test]
    fn stamps_grow() {
        let stamps = Stamps::default();
        stamps.at_least(Timestamp(Timestamp::now().0 + 1_000_000_000));
        let given: Vec<_> = (0..100).map(|_| stamps.next()).collect();
        assert!(given.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(given[0] > Timestamp::now());
    }
}

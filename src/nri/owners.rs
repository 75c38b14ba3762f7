//! Who has set what: two plugins that set the same thing are an error.

use std::collections::BTreeMap;

use crate::nri::proto::api;

/// What a plugin can set. The numbers are those that validating plugins see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    Annotations = 1,
    Mounts = 2,
    OciHooks = 3,
    Devices = 4,
    CdiDevices = 5,
    Env = 6,
    Args = 7,
    MemLimit = 8,
    MemReservation = 9,
    MemSwapLimit = 10,
    MemKernelLimit = 11,
    MemTcpLimit = 12,
    MemSwappiness = 13,
    MemDisableOomKiller = 14,
    MemUseHierarchy = 15,
    CpuShares = 16,
    CpuQuota = 17,
    CpuPeriod = 18,
    CpuRealtimeRuntime = 19,
    CpuRealtimePeriod = 20,
    CpuSetCpus = 21,
    CpuSetMems = 22,
    PidsLimit = 23,
    HugepageLimits = 24,
    BlockioClass = 25,
    RdtClass = 26,
    CgroupsUnified = 27,
    CgroupsPath = 28,
    OomScoreAdj = 29,
    Rlimits = 30,
    IoPriority = 31,
    SeccompPolicy = 32,
    Namespace = 33,
    Sysctl = 34,
    LinuxNetDevices = 35,
    LinuxSched = 36,
    RdtClosId = 37,
    RdtSchemata = 38,
    RdtEnableMonitoring = 39,
    MemoryPolicy = 40,
}

/// Two plugins want the same thing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("plugins {one:?} and {other:?} both set {field:?}{key} of container {id}")]
pub(super) struct Conflict {
    one: String,
    other: String,
    field: Field,
    /// With a blank before it, or empty.
    key: String,
    id: String,
}

/// Owners of the fields of containers. A field that was cleared belongs to `-plugin`: only that plugin may set it.
#[derive(Clone, Debug, Default)]
pub(super) struct Owners(BTreeMap<(String, Field, String), String>);

impl Owners {
    /// `plugin` sets a field, or the entry `key` of one.
    ///
    /// # Errors
    /// [`Conflict`]: another plugin has set it.
    pub(super) fn claim(
        &mut self,
        id: &str,
        field: Field,
        key: &str,
        plugin: &str,
    ) -> Result<(), Conflict> {
        let place = (id.to_owned(), field, key.to_owned());
        if let Some(owner) = self.0.get(&place) {
            let cleared = owner.strip_prefix('-');
            if cleared != Some(plugin) {
                return Err(Conflict {
                    one: plugin.to_owned(),
                    other: cleared.unwrap_or(owner).to_owned(),
                    field,
                    key: match key {
                        "" => String::new(),
                        key => format!(" {key:?}"),
                    },
                    id: id.to_owned(),
                });
            }
        }
        self.0.insert(place, plugin.to_owned());
        Ok(())
    }

    /// `plugin` takes away what another has set, and only it may set that anew. What no plugin had set belongs to nobody.
    pub(super) fn clear(&mut self, id: &str, field: Field, key: &str, plugin: &str) {
        let place = (id.to_owned(), field, key.to_owned());
        if let Some(owner) = self.0.get_mut(&place) {
            *owner = format!("-{plugin}");
        }
    }

    /// Adds an owner to a field that several may set.
    pub(super) fn share(&mut self, id: &str, field: Field, plugin: &str) {
        let place = (id.to_owned(), field, String::new());
        let owner = match self.0.get(&place) {
            Some(others) => format!("{others},{plugin}"),
            None => plugin.to_owned(),
        };
        self.0.insert(place, owner);
    }

    /// Owners of a field's entries.
    pub(super) fn of<'a>(
        &'a self,
        id: &'a str,
        field: Field,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        let from = (id.to_owned(), field, String::new());
        self.0
            .range(from..)
            .take_while(move |((of, is, _), _)| of == id && *is == field)
            .map(|((_, _, key), owner)| (key.as_str(), owner.as_str()))
    }

    /// As validating plugins see it.
    pub(super) fn to_proto(&self) -> api::OwningPlugins {
        let mut all = api::OwningPlugins::default();
        for ((id, field, key), owner) in &self.0 {
            let fields = all.owners.entry(id.clone()).or_default();
            let number = *field as i32;
            let compound = matches!(
                field,
                Field::Annotations
                    | Field::Mounts
                    | Field::Devices
                    | Field::CdiDevices
                    | Field::Env
                    | Field::HugepageLimits
                    | Field::CgroupsUnified
                    | Field::Rlimits
                    | Field::Namespace
                    | Field::Sysctl
                    | Field::LinuxNetDevices
            );
            if compound {
                let entries = fields.compound.entry(number).or_default();
                entries.owners.insert(key.clone(), owner.clone());
            } else {
                fields.simple.insert(number, owner.clone());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_owner_for_each_thing() {
        let mut owners = Owners::default();
        owners.claim("c", Field::Env, "A", "10-a").unwrap();
        owners.claim("c", Field::Env, "B", "20-b").unwrap();
        owners.claim("d", Field::Env, "A", "20-b").unwrap();
        let error = owners.claim("c", Field::Env, "A", "20-b").unwrap_err();
        let text = error.to_string();
        for part in ["10-a", "20-b", "Env", "\"A\"", "container c"] {
            assert!(text.contains(part), "{text}");
        }
        owners.clear("c", Field::Env, "A", "20-b");
        assert!(owners.claim("c", Field::Env, "A", "30-c").is_err());
        owners.claim("c", Field::Env, "A", "20-b").unwrap();
        // What the container itself had is nobody's once it is gone.
        owners.clear("c", Field::Env, "OWN", "10-a");
        owners.claim("c", Field::Env, "OWN", "20-b").unwrap();
        owners.share("c", Field::OciHooks, "10-a");
        owners.share("c", Field::OciHooks, "20-b");
        let hooks: Vec<_> = owners.of("c", Field::OciHooks).collect();
        assert_eq!(hooks, [("", "10-a,20-b")]);
        let proto = owners.to_proto();
        assert_eq!(proto.owners["c"].simple[&3], "10-a,20-b");
        assert_eq!(proto.owners["c"].compound[&6].owners["A"], "20-b");
    }
}

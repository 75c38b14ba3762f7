//! What plugins answer to CreateContainer: checked for conflicts, shown to the next plugin, and made edits.

use crate::base::edits::{
    DeviceAccess, DeviceEdit, Edits, MemoryPolicy, MountEdit, NamespaceEdit, NetDevice, Rdt,
    RdtEdit, Scheduler,
};
use crate::base::hook::{Hook, HookPoint};
use crate::nri::owners::{Conflict, Field, Owners};
use crate::nri::proto::api;
use crate::nri::{resources, view};

/// The answers of all plugins to one CreateContainer.
#[derive(Debug)]
pub(super) struct Adjusted {
    id: String,
    /// The container as the next plugin sees it.
    pub(super) container: api::Container,
    /// All adjustments so far, for validating plugins.
    pub(super) merged: api::ContainerAdjustment,
    /// The same for the runtime: one for each plugin.
    pub(super) edits: Vec<Edits>,
}

/// The name of what is to be removed, if that is asked for.
fn removal(name: &str) -> Option<&str> {
    name.strip_prefix('-')
}

/// Sets an entry of a list that has one for each key.
fn put<T>(list: &mut Vec<T>, same: impl Fn(&T) -> bool, new: Option<T>) {
    list.retain(|old| !same(old));
    list.extend(new);
}

impl Adjusted {
    /// Nothing is adjusted yet.
    pub(super) fn new(container: api::Container) -> Self {
        Self {
            id: container.id.clone(),
            container,
            merged: api::ContainerAdjustment::default(),
            edits: vec![],
        }
    }

    /// Takes the answer of one plugin.
    ///
    /// # Errors
    /// [`Conflict`]: another plugin has set the same.
    pub(super) fn take(
        &mut self,
        owners: &mut Owners,
        plugin: &str,
        given: api::ContainerAdjustment,
    ) -> Result<(), Conflict> {
        let mut one = One {
            id: self.id.clone(),
            plugin,
            owners,
            shown: &mut self.container,
            edits: Edits {
                by: format!("NRI plugin {plugin}"),
                ..Edits::default()
            },
        };
        one.annotations(&given)?;
        one.mounts(&given)?;
        one.process(&given)?;
        one.hooks(given.hooks.as_ref());
        if let Some(linux) = &given.linux {
            one.linux(linux)?;
        }
        let edits = one.edits;
        self.edits.push(edits);
        fold(&mut self.merged, given);
        Ok(())
    }
}

/// The answer of one plugin in the works.
struct One<'a> {
    id: String,
    plugin: &'a str,
    owners: &'a mut Owners,
    shown: &'a mut api::Container,
    edits: Edits,
}

impl One<'_> {
    fn claim(&mut self, field: Field, key: &str) -> Result<(), Conflict> {
        self.owners.claim(&self.id, field, key, self.plugin)
    }

    fn clear(&mut self, field: Field, key: &str) {
        self.owners.clear(&self.id, field, key, self.plugin);
    }

    fn annotations(&mut self, given: &api::ContainerAdjustment) -> Result<(), Conflict> {
        for key in given.annotations.keys().filter_map(|key| removal(key)) {
            self.clear(Field::Annotations, key);
            self.shown.annotations.remove(key);
            self.edits.annotations.push((key.to_owned(), None));
        }
        for (key, value) in &given.annotations {
            if removal(key).is_some() {
                continue;
            }
            self.claim(Field::Annotations, key)?;
            self.shown.annotations.insert(key.clone(), value.clone());
            self.edits
                .annotations
                .push((key.clone(), Some(value.clone())));
        }
        Ok(())
    }

    fn mounts(&mut self, given: &api::ContainerAdjustment) -> Result<(), Conflict> {
        for mount in &given.mounts {
            if let Some(destination) = removal(&mount.destination) {
                self.clear(Field::Mounts, destination);
                put(
                    &mut self.shown.mounts,
                    |old| old.destination == destination,
                    None,
                );
                self.edits.mounts.push(MountEdit {
                    destination: destination.to_owned(),
                    remove: true,
                    ..MountEdit::default()
                });
            }
        }
        for mount in &given.mounts {
            if removal(&mount.destination).is_some() {
                continue;
            }
            self.claim(Field::Mounts, &mount.destination)?;
            let same = |old: &api::Mount| old.destination == mount.destination;
            put(&mut self.shown.mounts, same, Some(mount.clone()));
            self.edits.mounts.push(MountEdit {
                destination: mount.destination.clone(),
                remove: false,
                kind: mount.r#type.clone(),
                source: mount.source.clone(),
                options: mount.options.clone(),
            });
        }
        Ok(())
    }

    /// Environment, arguments, limits of the process, CDI devices.
    fn process(&mut self, given: &api::ContainerAdjustment) -> Result<(), Conflict> {
        let named = |name: &str| {
            let prefix = format!("{name}=");
            move |entry: &String| entry.starts_with(&prefix)
        };
        for name in given.env.iter().filter_map(|one| removal(&one.key)) {
            self.clear(Field::Env, name);
            put(&mut self.shown.env, named(name), None);
            self.edits.env.push((name.to_owned(), None));
        }
        for one in given.env.iter().filter(|one| removal(&one.key).is_none()) {
            self.claim(Field::Env, &one.key)?;
            let entry = format!("{}={}", one.key, one.value);
            put(&mut self.shown.env, named(&one.key), Some(entry));
            self.edits
                .env
                .push((one.key.clone(), Some(one.value.clone())));
        }
        if !given.args.is_empty() {
            let mut args = given.args.clone();
            if args[0].is_empty() {
                args.remove(0);
                self.clear(Field::Args, "");
            }
            self.claim(Field::Args, "")?;
            self.shown.args.clone_from(&args);
            self.edits.args = args;
        }
        for limit in &given.rlimits {
            self.claim(Field::Rlimits, &limit.r#type)?;
            let same = |old: &api::PosixRlimit| old.r#type == limit.r#type;
            put(&mut self.shown.rlimits, same, Some(limit.clone()));
            let limit = (limit.r#type.clone(), limit.soft, limit.hard);
            self.edits.rlimits.push(limit);
        }
        for device in &given.cdi_devices {
            self.claim(Field::CdiDevices, &device.name)?;
            self.edits.cdi_devices.push(device.name.clone());
        }
        Ok(())
    }

    fn hooks(&mut self, given: Option<&api::Hooks>) {
        let Some(given) = given else { return };
        let shown = self.shown.hooks.get_or_insert_default();
        for (point, hooks, all) in [
            (HookPoint::Prestart, &given.prestart, &mut shown.prestart),
            (
                HookPoint::CreateRuntime,
                &given.create_runtime,
                &mut shown.create_runtime,
            ),
            (
                HookPoint::CreateContainer,
                &given.create_container,
                &mut shown.create_container,
            ),
            (
                HookPoint::StartContainer,
                &given.start_container,
                &mut shown.start_container,
            ),
            (HookPoint::Poststart, &given.poststart, &mut shown.poststart),
            (HookPoint::Poststop, &given.poststop, &mut shown.poststop),
        ] {
            all.extend(hooks.iter().cloned());
            self.edits.hooks.extend(hooks.iter().map(|hook| Hook {
                point,
                path: hook.path.clone(),
                args: hook.args.clone(),
                env: hook.env.clone(),
                timeout: hook.timeout.and_then(|time| u64::try_from(time.value).ok()),
            }));
        }
        if !self.edits.hooks.is_empty() {
            self.owners.share(&self.id, Field::OciHooks, self.plugin);
        }
    }

    fn linux(&mut self, given: &api::LinuxContainerAdjustment) -> Result<(), Conflict> {
        self.devices(&given.devices)?;
        self.namespaces(&given.namespaces)?;
        self.sysctls(given)?;
        if let Some(limits) = &given.resources {
            let linux = self.shown.linux.get_or_insert_default();
            let into = linux.resources.get_or_insert_default();
            resources::merge(self.owners, &self.id, self.plugin, limits, into)?;
            let (limits_in, impossible) = resources::from_proto(limits);
            self.edits.resources = limits_in;
            self.edits.impossible.extend(impossible);
            if let Some(class) = &limits.rdt_class {
                let group = (!class.value.is_empty()).then(|| Rdt {
                    clos_id: class.value.clone(),
                    ..Rdt::default()
                });
                let edit = ("resources.rdtClass", RdtEdit::Replace(group));
                self.edits.rdt.push(edit);
            }
            self.edits.device_rules = limits.devices.iter().map(access).collect();
        }
        if !given.cgroups_path.is_empty() {
            self.claim(Field::CgroupsPath, "")?;
            let linux = self.shown.linux.get_or_insert_default();
            linux.cgroups_path.clone_from(&given.cgroups_path);
            self.edits.cgroups_path.clone_from(&given.cgroups_path);
        }
        if let Some(score) = given.oom_score_adj {
            self.claim(Field::OomScoreAdj, "")?;
            self.shown.linux.get_or_insert_default().oom_score_adj = Some(score);
            self.edits.oom_score_adj = Some(score.value);
        }
        if let Some(policy) = &given.seccomp_policy {
            self.claim(Field::SeccompPolicy, "")?;
            self.shown.linux.get_or_insert_default().seccomp_policy = Some(policy.clone());
            self.edits.seccomp = Some(view::seccomp_json(policy));
        }
        self.priorities(given)?;
        self.net_devices(given)?;
        self.rdt(given)
    }

    fn devices(&mut self, given: &[api::LinuxDevice]) -> Result<(), Conflict> {
        for path in given.iter().filter_map(|device| removal(&device.path)) {
            self.clear(Field::Devices, path);
            let shown = &mut self.shown.linux.get_or_insert_default().devices;
            put(shown, |old| old.path == path, None);
            self.edits.devices.push(DeviceEdit {
                path: path.to_owned(),
                remove: true,
                ..DeviceEdit::default()
            });
        }
        for device in given
            .iter()
            .filter(|device| removal(&device.path).is_none())
        {
            self.claim(Field::Devices, &device.path)?;
            let shown = &mut self.shown.linux.get_or_insert_default().devices;
            put(shown, |old| old.path == device.path, Some(device.clone()));
            let unsigned = |value: Option<api::OptionalUInt32>| value.map(|value| value.value);
            let number = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
            self.edits.devices.push(DeviceEdit {
                path: device.path.clone(),
                remove: false,
                host_path: String::new(),
                kind: device.r#type.clone(),
                major: number(device.major),
                minor: number(device.minor),
                mode: unsigned(device.file_mode),
                uid: unsigned(device.uid),
                gid: unsigned(device.gid),
                access: match &*device.r#type {
                    "b" => "rwm".to_owned(),
                    _ => "rw".to_owned(),
                },
            });
        }
        Ok(())
    }

    fn namespaces(&mut self, given: &[api::LinuxNamespace]) -> Result<(), Conflict> {
        for namespace in given {
            let (kind, path) = match removal(&namespace.r#type) {
                Some(kind) => (kind, None),
                None => (&*namespace.r#type, Some(namespace.path.clone())),
            };
            self.claim(Field::Namespace, kind)?;
            let shown = &mut self.shown.linux.get_or_insert_default().namespaces;
            let new = path.as_ref().map(|_| namespace.clone());
            put(shown, |old| old.r#type == kind, new);
            self.edits.namespaces.push(NamespaceEdit {
                kind: kind.to_owned(),
                path,
            });
        }
        Ok(())
    }

    fn sysctls(&mut self, given: &api::LinuxContainerAdjustment) -> Result<(), Conflict> {
        for key in given.sysctl.keys().filter_map(|key| removal(key)) {
            self.clear(Field::Sysctl, key);
            self.shown.linux.get_or_insert_default().sysctl.remove(key);
            self.edits.sysctls.push((key.to_owned(), None));
        }
        for (key, value) in &given.sysctl {
            if removal(key).is_some() {
                continue;
            }
            self.claim(Field::Sysctl, key)?;
            let shown = &mut self.shown.linux.get_or_insert_default().sysctl;
            shown.insert(key.clone(), value.clone());
            self.edits.sysctls.push((key.clone(), Some(value.clone())));
        }
        Ok(())
    }

    fn priorities(&mut self, given: &api::LinuxContainerAdjustment) -> Result<(), Conflict> {
        if let Some(priority) = given.io_priority {
            self.claim(Field::IoPriority, "")?;
            self.shown.linux.get_or_insert_default().io_priority = Some(priority);
            // What does not fit is refused by the runtime.
            let small = |value: i32| u8::try_from(value).unwrap_or(u8::MAX);
            self.edits.io_priority = Some((small(priority.class), small(priority.priority)));
        }
        if let Some(scheduler) = &given.scheduler {
            self.claim(Field::LinuxSched, "")?;
            self.shown.linux.get_or_insert_default().scheduler = Some(scheduler.clone());
            // Policy 0 of NRI: none is asked for.
            if let Some(policy) = scheduler
                .policy
                .checked_sub(1)
                .and_then(|p| u32::try_from(p).ok())
            {
                self.edits.scheduler = Some(Scheduler {
                    policy,
                    nice: scheduler.nice,
                    priority: u32::try_from(scheduler.priority).unwrap_or(u32::MAX),
                    flags: scheduler
                        .flags
                        .iter()
                        .fold(0, |all, bit| all | bit_of(*bit)),
                    runtime: scheduler.runtime,
                    deadline: scheduler.deadline,
                    period: scheduler.period,
                });
            }
        }
        if let Some(policy) = &given.memory_policy {
            self.claim(Field::MemoryPolicy, "")?;
            // set_mempolicy(2): static is bit 15, relative 14, NUMA balancing 13.
            let flag = |number: &i32| 1_u32.checked_shl(u32::try_from(15 - number).unwrap_or(32));
            self.edits.memory_policy = Some(MemoryPolicy {
                mode: u32::try_from(policy.mode).unwrap_or(u32::MAX),
                flags: policy
                    .flags
                    .iter()
                    .filter_map(flag)
                    .fold(0, |all, bit| all | bit),
                nodes: policy.nodes.clone(),
            });
        }
        Ok(())
    }

    fn net_devices(&mut self, given: &api::LinuxContainerAdjustment) -> Result<(), Conflict> {
        for (host, device) in &given.net_devices {
            if let Some(host) = removal(host) {
                self.clear(Field::LinuxNetDevices, host);
                self.edits.net_devices.push(NetDevice {
                    host: host.to_owned(),
                    name: String::new(),
                });
                continue;
            }
            self.claim(Field::LinuxNetDevices, host)?;
            let name = match &*device.name {
                "" => host,
                name => name,
            };
            self.edits.net_devices.push(NetDevice {
                host: host.clone(),
                name: name.to_owned(),
            });
        }
        Ok(())
    }

    fn rdt(&mut self, given: &api::LinuxContainerAdjustment) -> Result<(), Conflict> {
        let Some(rdt) = &given.rdt else {
            return Ok(());
        };
        let linux = self.shown.linux.get_or_insert_default();
        if rdt.remove {
            linux.rdt = None;
            for field in RDT {
                self.owners.clear(&self.id, field, "", self.plugin);
            }
            self.edits.rdt.push(("rdt", RdtEdit::Replace(None)));
        }
        let set = [
            rdt.clos_id.is_some(),
            rdt.schemata.is_some(),
            rdt.enable_monitoring.is_some(),
        ];
        for (field, _) in RDT.into_iter().zip(set).filter(|(_, set)| *set) {
            self.owners.claim(&self.id, field, "", self.plugin)?;
        }
        if set.contains(&true) {
            let shown = linux.rdt.get_or_insert_default();
            *shown = merged_rdt(shown, rdt);
            let edit = RdtEdit::Change {
                clos_id: rdt.clos_id.as_ref().map(|class| class.value.clone()),
                schemata: rdt.schemata.as_ref().map(|lines| lines.value.clone()),
                enable_monitoring: rdt.enable_monitoring.map(|on| on.value),
            };
            self.edits.rdt.push(("rdt", edit));
        }
        Ok(())
    }
}

/// What a plugin can set of a resctrl group.
const RDT: [Field; 3] = [
    Field::RdtClosId,
    Field::RdtSchemata,
    Field::RdtEnableMonitoring,
];

fn merged_rdt(old: &api::LinuxRdt, new: &api::LinuxRdt) -> api::LinuxRdt {
    api::LinuxRdt {
        clos_id: new.clos_id.clone().or(old.clos_id.clone()),
        schemata: new.schemata.clone().or(old.schemata.clone()),
        enable_monitoring: new.enable_monitoring.or(old.enable_monitoring),
        remove: false,
    }
}

fn bit_of(number: i32) -> u64 {
    let number = u32::try_from(number).unwrap_or(64);
    1_u64.checked_shl(number).unwrap_or_default()
}

fn access(rule: &api::LinuxDeviceCgroup) -> DeviceAccess {
    let number = |value: Option<api::OptionalInt>| value.and_then(|v| u32::try_from(v.value).ok());
    DeviceAccess {
        allow: rule.allow,
        kind: rule.r#type.clone(),
        major: number(rule.major),
        minor: number(rule.minor),
        access: rule.access.clone(),
    }
}

/// Puts one answer over those before it: conflicts are out of question here.
fn fold(into: &mut api::ContainerAdjustment, given: api::ContainerAdjustment) {
    into.annotations.extend(given.annotations);
    into.mounts.extend(given.mounts);
    into.env.extend(given.env);
    into.rlimits.extend(given.rlimits);
    into.cdi_devices.extend(given.cdi_devices);
    if !given.args.is_empty() {
        into.args = given.args;
    }
    if let Some(hooks) = given.hooks {
        let all = into.hooks.get_or_insert_default();
        all.prestart.extend(hooks.prestart);
        all.create_runtime.extend(hooks.create_runtime);
        all.create_container.extend(hooks.create_container);
        all.start_container.extend(hooks.start_container);
        all.poststart.extend(hooks.poststart);
        all.poststop.extend(hooks.poststop);
    }
    let Some(linux) = given.linux else { return };
    let all = into.linux.get_or_insert_default();
    all.devices.extend(linux.devices);
    all.namespaces.extend(linux.namespaces);
    all.sysctl.extend(linux.sysctl);
    all.net_devices.extend(linux.net_devices);
    if let Some(limits) = &linux.resources {
        let limits_of_all = all.resources.get_or_insert_default();
        // Owners of its own: claims of one plugin on nothing cannot fail.
        let _merged =
            resources::merge(&mut Owners::default(), "", "", limits, limits_of_all).is_ok();
    }
    if !linux.cgroups_path.is_empty() {
        all.cgroups_path = linux.cgroups_path;
    }
    all.oom_score_adj = linux.oom_score_adj.or(all.oom_score_adj);
    all.io_priority = linux.io_priority.or(all.io_priority);
    all.seccomp_policy = linux.seccomp_policy.or(all.seccomp_policy.take());
    all.scheduler = linux.scheduler.or(all.scheduler.take());
    all.rdt = match (all.rdt.take(), linux.rdt) {
        (Some(old), Some(new)) if !new.remove => Some(merged_rdt(&old, &new)),
        (old, new) => new.or(old),
    };
    all.memory_policy = linux.memory_policy.or(all.memory_policy.take());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_value(key: &str, value: &str) -> api::KeyValue {
        api::KeyValue {
            key: key.to_owned(),
            value: value.to_owned(),
        }
    }

    fn container() -> api::Container {
        api::Container {
            id: "c".to_owned(),
            env: vec!["PATH=/bin".to_owned(), "A=0".to_owned()],
            ..api::Container::default()
        }
    }

    fn env(entries: &[(&str, &str)]) -> api::ContainerAdjustment {
        api::ContainerAdjustment {
            env: entries
                .iter()
                .map(|(key, value)| key_value(key, value))
                .collect(),
            ..api::ContainerAdjustment::default()
        }
    }

    #[test]
    fn the_next_plugin_sees_what_the_last_one_did() {
        let (mut all, mut owners) = (Adjusted::new(container()), Owners::default());
        all.take(&mut owners, "10-a", env(&[("A", "1"), ("B", "x")]))
            .unwrap();
        assert_eq!(all.container.env, ["PATH=/bin", "A=1", "B=x"]);
        assert!(all.take(&mut owners, "20-b", env(&[("A", "2")])).is_err());
        all.take(&mut owners, "30-c", env(&[("-A", ""), ("A", "3")]))
            .unwrap();
        assert_eq!(all.container.env, ["PATH=/bin", "B=x", "A=3"]);
        let last = &all.edits.last().unwrap().env;
        assert_eq!(
            last[..],
            [
                ("A".to_owned(), None),
                ("A".to_owned(), Some("3".to_owned()))
            ]
        );
        assert_eq!(all.edits[0].by, "NRI plugin 10-a");
    }

    #[test]
    fn arguments_are_replaced_by_one_plugin_unless_it_says_so() {
        let args = |words: &[&str]| api::ContainerAdjustment {
            args: words.iter().map(|word| (*word).to_owned()).collect(),
            ..api::ContainerAdjustment::default()
        };
        let (mut all, mut owners) = (Adjusted::new(container()), Owners::default());
        all.take(&mut owners, "10-a", args(&["sleep", "1"]))
            .unwrap();
        assert!(all.take(&mut owners, "20-b", args(&["true"])).is_err());
        all.take(&mut owners, "30-c", args(&["", "false"])).unwrap();
        assert_eq!(all.container.args, ["false"]);
        assert_eq!(all.edits.last().unwrap().args, ["false"]);
    }

    #[test]
    fn a_resctrl_group_of_several_plugins() {
        let class = |value: &str| {
            Some(api::OptionalString {
                value: value.to_owned(),
            })
        };
        let rdt = |rdt: api::LinuxRdt| api::ContainerAdjustment {
            linux: Some(api::LinuxContainerAdjustment {
                rdt: Some(rdt),
                ..api::LinuxContainerAdjustment::default()
            }),
            ..api::ContainerAdjustment::default()
        };
        let named = |value: &str, remove| {
            rdt(api::LinuxRdt {
                clos_id: class(value),
                remove,
                ..api::LinuxRdt::default()
            })
        };
        let lines = api::OptionalRepeatedString {
            value: vec!["MB:0=50".to_owned()],
        };
        let (mut all, mut owners) = (Adjusted::new(container()), Owners::default());
        all.take(&mut owners, "10-a", named("gold", false)).unwrap();
        let more = rdt(api::LinuxRdt {
            schemata: Some(lines),
            ..api::LinuxRdt::default()
        });
        all.take(&mut owners, "20-b", more).unwrap();
        let shown = all.container.linux.as_ref().unwrap().rdt.clone().unwrap();
        assert_eq!(shown.clos_id, class("gold"));
        assert_eq!(shown.schemata.unwrap().value, ["MB:0=50"]);
        let merged = all.merged.linux.as_ref().unwrap().rdt.clone().unwrap();
        assert!(merged.clos_id == class("gold") && merged.schemata.is_some());
        assert!(all.take(&mut owners, "30-c", named("tin", false)).is_err());
        all.take(&mut owners, "40-d", named("tin", true)).unwrap();
        let shown = all.container.linux.as_ref().unwrap().rdt.clone().unwrap();
        assert_eq!((shown.clos_id, shown.schemata), (class("tin"), None));
        assert_eq!(all.edits.last().unwrap().rdt.len(), 2);
    }

    #[test]
    fn numbers_of_the_kernel() {
        let (mut all, mut owners) = (Adjusted::new(container()), Owners::default());
        let linux = api::LinuxContainerAdjustment {
            scheduler: Some(api::LinuxScheduler {
                policy: 4,
                flags: vec![0],
                ..api::LinuxScheduler::default()
            }),
            memory_policy: Some(api::LinuxMemoryPolicy {
                mode: 2,
                nodes: "0".to_owned(),
                flags: vec![0, 1],
            }),
            io_priority: Some(api::LinuxIoPriority {
                class: 2,
                priority: 7,
            }),
            net_devices: [("eth1".to_owned(), api::LinuxNetDevice::default())].into(),
            rdt: Some(api::LinuxRdt {
                remove: true,
                ..api::LinuxRdt::default()
            }),
            ..api::LinuxContainerAdjustment::default()
        };
        let given = api::ContainerAdjustment {
            linux: Some(linux),
            ..api::ContainerAdjustment::default()
        };
        all.take(&mut owners, "10-a", given).unwrap();
        let edits = &all.edits[0];
        let scheduler = edits.scheduler.unwrap();
        assert_eq!((scheduler.policy, scheduler.flags), (3, 1));
        let policy = edits.memory_policy.as_ref().unwrap();
        assert_eq!((policy.mode, policy.flags), (2, 1 << 15 | 1 << 14));
        assert_eq!(edits.io_priority, Some((2, 7)));
        assert_eq!(edits.impossible, []);
        assert_eq!(edits.rdt, [("rdt", RdtEdit::Replace(None))]);
        let device = &edits.net_devices[0];
        assert_eq!((&*device.host, &*device.name), ("eth1", "eth1"));
    }
}

//! The OCI spec that containers of a handler begin with (`base_runtime_spec`): what CRI says comes over it.
//!
//! ```text
//! JSON --read--> Base: defaults (env, rlimits, capabilities, sysctls) --> Handler.defaults, once
//!                      the rest --over(ContainerConfig)--> what is left of it beside CRI's own
//! ```
//! Three kinds of keys: those that count; those that CRI decides for every container, which may stand there without an effect
//! because every generated spec has them (user, arguments, namespaces, `noNewPrivileges`, ...); and those that berth
//! cannot take from here, which are refused by name. What berth mounts by itself may be listed as it is generated.

mod file;
#[cfg(test)]
mod tests;

use serde_json::Value;

use crate::base::container::{ContainerConfig, Resources};
use crate::base::edits::{DeviceAccess, DeviceEdit, Edits, MountEdit, Scheduler};
use crate::base::error::chain;
use crate::base::hook::{Hook, HookPoint};
use crate::runtime::capabilities;
use crate::runtime::spec::mounts::clean;
use crate::runtime::spec::namespaces::{OfNode, check_sysctl};
use crate::runtime::spec::{hooks, process, rlimits};

/// What such a spec gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Base {
    /// Mounts, devices, device rules, hooks, annotations, priorities.
    pub(crate) edits: Edits,
    /// Limits for containers that are given none.
    pub(crate) resources: Resources,
    /// Hidden besides, where anything is.
    pub(crate) masked_paths: Vec<String>,
    /// Read-only besides, where anything is.
    pub(crate) readonly_paths: Vec<String>,
    /// The root is read-only.
    pub(crate) readonly_root: bool,
    /// Environment variables.
    pub(crate) env: Vec<(String, String)>,
    /// (number, soft, hard).
    pub(crate) rlimits: Vec<(u32, u64, u64)>,
    /// The default set.
    pub(crate) capabilities: Option<u64>,
    /// Sysctls of pods.
    pub(crate) sysctls: Vec<(String, String)>,
}

/// Which key is wrong, its value, and what to do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {mend}")]
pub(crate) struct Wrong {
    field: String,
    value: String,
    mend: String,
}

fn wrong(field: impl Into<String>, value: impl ToString, mend: impl Into<String>) -> Wrong {
    Wrong {
        field: field.into(),
        value: value.to_string(),
        mend: mend.into(),
    }
}

type Checked<T = ()> = Result<T, Wrong>;

/// What berth mounts itself: (where, type, options beside those of [`HARMLESS`]), as specs are generated with it.
const OWN_MOUNTS: [(&str, &str, &[&str]); 8] = [
    ("/proc", "proc", &[]),
    ("/dev", "tmpfs", &["mode=755", "size=65536k", "strictatime"]),
    (
        "/dev/pts",
        "devpts",
        &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    ),
    ("/dev/shm", "tmpfs", &["mode=1777", "size=65536k"]),
    ("/dev/mqueue", "mqueue", &[]),
    ("/sys", "sysfs", &[]),
    ("/sys/fs/cgroup", "cgroup", &[]),
    // Not mounted for pods, neither here nor by containerd.
    ("/run", "tmpfs", &["mode=755", "size=65536k", "strictatime"]),
];
const HARMLESS: [&str; 6] = ["nosuid", "noexec", "nodev", "relatime", "ro", "rw"];
const PODS_SAY: &str = "leave it out: pods say what they need of that";
const ABSOLUTE: &str = "use an absolute path";

impl Base {
    /// Reads the JSON of an OCI spec; `by` is what its edits are called in messages.
    ///
    /// # Errors
    /// [`Wrong`]: no such spec, or a key that cannot be taken from it.
    pub(crate) fn read(by: &str, text: &str) -> Checked<Self> {
        let file: file::File = serde_json::from_str(text)
            .map_err(|error| wrong("JSON", "no OCI spec that berth can use", error.to_string()))?;
        if !file.oci_version.starts_with("1.") {
            let mend = "write the version of the OCI spec, 1.something";
            return Err(wrong("ociVersion", file.oci_version, mend));
        }
        let mut made = Self::default();
        made.edits.by = by.to_owned();
        nothing("domainname", &file.domainname, PODS_SAY)?;
        made.readonly_root = file.root.is_some_and(|root| root.readonly);
        if let Some(process) = file.process {
            made.process(process)?;
        }
        for (index, mount) in file.mounts.unwrap_or_default().into_iter().enumerate() {
            made.mount(index, mount)?;
        }
        made.hooks(file.hooks.unwrap_or_default())?;
        for (key, value) in file.annotations.unwrap_or_default() {
            made.edits.annotations.push((key, Some(value)));
        }
        if let Some(linux) = file.linux {
            made.linux(linux)?;
        }
        Ok(made)
    }

    /// What is left of it where CRI has its own.
    pub(crate) fn under(mut self, config: &ContainerConfig) -> Self {
        let edits = &mut self.edits;
        let mounted = |path: &str| {
            let given = config.mounts.iter();
            given.into_iter().any(|m| clean(&m.container_path) == path)
        };
        edits.mounts.retain(|mount| !mounted(&mount.destination));
        let given = |path: &str| {
            let inside = |device: &crate::base::container::Device| {
                let place = match device.container_path.as_str() {
                    "" => &device.host_path,
                    place => place,
                };
                clean(place) == path
            };
            config.devices.iter().any(inside)
        };
        edits.devices.retain(|device| !given(&device.path));
        let own = "io.kubernetes.cri.";
        edits
            .annotations
            .retain(|(key, _)| !config.annotations.contains_key(key) && !key.starts_with(own));
        self
    }

    fn process(&mut self, given: file::Process) -> Checked {
        let with = "leave it out: the key exec_cpu_affinity of the handler does that";
        for (field, value, mend) in [
            ("process.apparmorProfile", &given.apparmor_profile, PODS_SAY),
            ("process.selinuxLabel", &given.selinux_label, PODS_SAY),
            ("process.oomScoreAdj", &given.oom_score_adj, PODS_SAY),
            ("process.execCPUAffinity", &given.exec_cpu_affinity, with),
        ] {
            nothing(field, value, mend)?;
        }
        for text in given.env.unwrap_or_default() {
            let field = "process.env";
            let Some((name, value)) = text.split_once('=') else {
                return Err(wrong(field, format!("{text:?}"), "write NAME=value"));
            };
            process::check_variable(field, name, value.as_bytes())
                .map_err(|error| wrong(field, format!("{text:?}"), chain(&error)))?;
            self.env.push((name.to_owned(), value.to_owned()));
        }
        if let Some(sets) = given.capabilities {
            self.capabilities = Some(capability_set(&sets)?);
        }
        for limit in given.rlimits.unwrap_or_default() {
            let field = "process.rlimits";
            let text = format!("{} {}:{}", limit.kind, limit.soft, limit.hard);
            let Some(number) = rlimits::number(&limit.kind) else {
                let mend = "use a name of setrlimit(2), as RLIMIT_NOFILE";
                return Err(wrong(field, text, mend));
            };
            if limit.soft > limit.hard {
                return Err(wrong(field, text, "raise the hard limit"));
            }
            self.rlimits.retain(|(known, ..)| *known != number);
            self.rlimits.push((number, limit.soft, limit.hard));
        }
        self.priorities(given.io_priority, given.scheduler)
    }

    fn priorities(
        &mut self,
        io: Option<file::IoPriority>,
        scheduler: Option<file::Scheduler>,
    ) -> Checked {
        if let Some(io) = io {
            const CLASSES: [&str; 4] = [
                "IOPRIO_CLASS_NONE",
                "IOPRIO_CLASS_RT",
                "IOPRIO_CLASS_BE",
                "IOPRIO_CLASS_IDLE",
            ];
            let class = place_of(&CLASSES, "process.ioPriority.class", &io.class)?;
            if io.priority > 7 {
                let field = "process.ioPriority.priority";
                return Err(wrong(field, io.priority, "use 0 to 7"));
            }
            self.edits.io_priority = Some((class, io.priority));
        }
        if let Some(given) = scheduler {
            // The index is the number (sched.h).
            const POLICIES: [&str; 7] = [
                "SCHED_OTHER",
                "SCHED_FIFO",
                "SCHED_RR",
                "SCHED_BATCH",
                "SCHED_ISO",
                "SCHED_IDLE",
                "SCHED_DEADLINE",
            ];
            let field = "process.scheduler.policy";
            let policy = place_of(&POLICIES, field, &given.policy)?;
            let mend = "leave it out: berth sets no flags from here";
            nothing("process.scheduler.flags", &given.flags, mend)?;
            self.edits.scheduler = Some(Scheduler {
                policy: policy.into(),
                nice: given.nice,
                priority: given.priority,
                flags: 0,
                runtime: given.runtime,
                deadline: given.deadline,
                period: given.period,
            });
        }
        Ok(())
    }

    fn mount(&mut self, index: usize, given: file::Mount) -> Checked {
        let field = |name: &str| format!("mounts[{index}].{name}");
        let mend = "leave it out: only volumes of pods in user namespaces have some";
        nothing(&field("uidMappings"), &given.uid_mappings, mend)?;
        nothing(&field("gidMappings"), &given.gid_mappings, mend)?;
        let destination = clean(&given.destination);
        if !given.destination.starts_with('/') || destination == "/" {
            let value = format!("{:?}", given.destination);
            return Err(wrong(field("destination"), value, ABSOLUTE));
        }
        let options = given.options.unwrap_or_default();
        if let Some((_, kind, own)) = OWN_MOUNTS.iter().find(|own| own.0 == destination) {
            let known = |option: &&String| {
                own.contains(&option.as_str()) || HARMLESS.contains(&option.as_str())
            };
            let odd = options.iter().find(|option| !known(option));
            if destination != "/run" || (given.kind == *kind && odd.is_none()) {
                let mend = "leave this mount out: berth makes it itself, as it is always made";
                if given.kind != *kind {
                    return Err(wrong(field("type"), format!("{:?}", given.kind), mend));
                }
                return odd.map_or(Ok(()), |odd| {
                    Err(wrong(field("options"), format!("{odd:?}"), mend))
                });
            }
        }
        self.edits.mounts.push(MountEdit {
            destination,
            remove: false,
            kind: given.kind,
            source: given.source,
            options,
        });
        Ok(())
    }

    fn hooks(&mut self, given: file::Hooks) -> Checked {
        for (point, programs) in [
            (HookPoint::Prestart, given.prestart),
            (HookPoint::CreateRuntime, given.create_runtime),
            (HookPoint::CreateContainer, given.create_container),
            (HookPoint::StartContainer, given.start_container),
            (HookPoint::Poststart, given.poststart),
            (HookPoint::Poststop, given.poststop),
        ] {
            for program in programs.unwrap_or_default() {
                let hook = Hook {
                    point,
                    path: program.path,
                    args: program.args.unwrap_or_default(),
                    env: program.env.unwrap_or_default(),
                    timeout: program.timeout,
                };
                let field = format!("hooks.{}", point.name());
                hooks::check(&field, &hook)
                    .map_err(|error| wrong(&field, format!("{:?}", hook.path), chain(&error)))?;
                self.edits.hooks.push(hook);
            }
        }
        Ok(())
    }

    fn linux(&mut self, given: file::Linux) -> Checked {
        let profile =
            "put it into a file of its own, and name that with the handler's key seccomp_profile";
        let no = "leave it out: berth does not do that from here";
        for (field, value, mend) in [
            ("uidMappings", &given.uid_mappings, PODS_SAY),
            ("gidMappings", &given.gid_mappings, PODS_SAY),
            ("seccomp", &given.seccomp, profile),
            ("mountLabel", &given.mount_label, PODS_SAY),
            ("intelRdt", &given.intel_rdt, no),
            ("personality", &given.personality, no),
            ("timeOffsets", &given.time_offsets, no),
            ("memoryPolicy", &given.memory_policy, no),
            ("netDevices", &given.net_devices, no),
        ] {
            nothing(&format!("linux.{field}"), value, mend)?;
        }
        let propagation = given.rootfs_propagation;
        if !matches!(propagation.as_str(), "" | "private" | "rprivate") {
            let mend = "leave it out: the propagation of a pod's volumes decides";
            return Err(wrong("linux.rootfsPropagation", propagation, mend));
        }
        for namespace in given.namespaces.unwrap_or_default() {
            let ours = ["pid", "network", "ipc", "uts", "mount", "cgroup"];
            if !namespace.path.is_empty() || !ours.contains(&namespace.kind.as_str()) {
                let value = format!("{} {}", namespace.kind, namespace.path);
                return Err(wrong("linux.namespaces", value.trim_end(), PODS_SAY));
            }
        }
        for (key, value) in given.sysctl.unwrap_or_default() {
            let own = OfNode {
                network: false,
                ipc: false,
                uts: false,
            };
            let checked = check_sysctl("linux.sysctl", &key, &value, own);
            let key = checked.map_err(|error| wrong("linux.sysctl", &key, chain(&error)))?;
            self.sysctls.push((key, value));
        }
        for (field, paths, into) in [
            (
                "linux.maskedPaths",
                given.masked_paths,
                &mut self.masked_paths,
            ),
            (
                "linux.readonlyPaths",
                given.readonly_paths,
                &mut self.readonly_paths,
            ),
        ] {
            *into = paths.unwrap_or_default();
            if let Some(bad) = into.iter().find(|path| !path.starts_with('/')) {
                return Err(wrong(field, format!("{bad:?}"), ABSOLUTE));
            }
        }
        for device in given.devices.unwrap_or_default() {
            self.device(device)?;
        }
        self.limits(given.resources.unwrap_or_default())
    }

    fn device(&mut self, given: file::Device) -> Checked {
        let path = clean(&given.path);
        if !given.path.starts_with('/') || path == "/" {
            let value = format!("{:?}", given.path);
            return Err(wrong("linux.devices", value, ABSOLUTE));
        }
        if !matches!(given.kind.as_str(), "b" | "c" | "u") {
            let field = format!("linux.devices[{path}].type");
            return Err(wrong(field, format!("{:?}", given.kind), "use b or c"));
        }
        self.edits.devices.push(DeviceEdit {
            path,
            remove: false,
            host_path: String::new(),
            kind: given.kind,
            major: given.major,
            minor: given.minor,
            mode: given.file_mode,
            uid: given.uid,
            gid: given.gid,
            // Whether it may be opened linux.resources.devices says.
            access: String::new(),
        });
        Ok(())
    }

    fn limits(&mut self, given: file::Resources) -> Checked {
        let (memory, cpu) = (
            given.memory.unwrap_or_default(),
            given.cpu.unwrap_or_default(),
        );
        let no = "leave it out: berth does not set that";
        for (field, value) in [
            ("blockIO", &given.block_io),
            ("network", &given.network),
            ("rdma", &given.rdma),
            ("memory.kernel", &memory.kernel),
            ("memory.kernelTCP", &memory.kernel_tcp),
            ("memory.swappiness", &memory.swappiness),
            ("memory.disableOOMKiller", &memory.disable_oom_killer),
            ("memory.useHierarchy", &memory.use_hierarchy),
            ("memory.checkBeforeUpdate", &memory.check_before_update),
            ("cpu.burst", &cpu.burst),
            ("cpu.realtimeRuntime", &cpu.realtime_runtime),
            ("cpu.realtimePeriod", &cpu.realtime_period),
            ("cpu.idle", &cpu.idle),
        ] {
            nothing(&format!("linux.resources.{field}"), value, no)?;
        }
        let pages = given.hugepage_limits.unwrap_or_default();
        self.resources = Resources {
            cpu_period: cpu.period.unwrap_or_default(),
            cpu_quota: cpu.quota.unwrap_or_default(),
            cpu_shares: cpu.shares.unwrap_or_default(),
            cpuset_cpus: cpu.cpus,
            cpuset_mems: cpu.mems,
            memory_limit: memory.limit.unwrap_or_default(),
            memory_swap_limit: memory.swap.unwrap_or_default(),
            memory_reservation: memory.reservation.unwrap_or_default(),
            pids_limit: given.pids.map(|pids| pids.limit).unwrap_or_default(),
            hugepage_limits: pages.into_iter().map(|p| (p.page_size, p.limit)).collect(),
            unified: given.unified.unwrap_or_default(),
            ..Resources::default()
        };
        let rules = given.devices.unwrap_or_default();
        for (index, rule) in rules.into_iter().enumerate() {
            let field = format!("linux.resources.devices[{index}]");
            let all = matches!(rule.kind.as_str(), "" | "a") && rule.major.is_none();
            if index == 0 && !rule.allow && all && rule.minor.is_none() {
                // All is denied that is not allowed: so it is here.
                continue;
            }
            if !rule.allow {
                let mend = "leave it out: all is denied that no rule allows";
                return Err(wrong(field, "a rule that denies", mend));
            }
            let number = |name: &str, number: Option<i64>| match number {
                None | Some(-1) => Ok(None),
                Some(number) => u32::try_from(number).map(Some).map_err(|_negative| {
                    wrong(format!("{field}.{name}"), number, "use a device number")
                }),
            };
            self.edits.device_rules.push(DeviceAccess {
                allow: true,
                kind: rule.kind,
                major: number("major", rule.major)?,
                minor: number("minor", rule.minor)?,
                access: rule.access,
            });
        }
        Ok(())
    }
}

/// The one set that all sets of capabilities must be.
fn capability_set(sets: &file::Capabilities) -> Checked<u64> {
    let mend = "leave it empty: pods get such by their own capabilities only";
    for (field, value) in [
        ("inheritable", &sets.inheritable),
        ("ambient", &sets.ambient),
    ] {
        nothing(&format!("process.capabilities.{field}"), value, mend)?;
    }
    let mask = |field: &str, names: &Option<Vec<String>>| -> Checked<u64> {
        let mut set = 0;
        for name in names.iter().flatten() {
            let field = format!("process.capabilities.{field}");
            let mend = "use names of capabilities(7), as CAP_CHOWN";
            set |= capabilities::mask(name).ok_or_else(|| wrong(field, name, mend))?;
        }
        Ok(set)
    };
    let bounding = mask("bounding", &sets.bounding)?;
    for (field, names) in [
        ("effective", &sets.effective),
        ("permitted", &sets.permitted),
    ] {
        if mask(field, names)? != bounding && names.is_some() {
            let field = format!("process.capabilities.{field}");
            let value = names.as_deref().unwrap_or_default().join(",");
            let mend = "give the same as in bounding: pods change one set";
            return Err(wrong(field, value, mend));
        }
    }
    Ok(bounding)
}

fn place_of(names: &[&str], field: &str, given: &str) -> Checked<u8> {
    let place = names.iter().position(|name| *name == given);
    place
        .and_then(|place| u8::try_from(place).ok())
        .ok_or_else(|| wrong(field, given, format!("use one of {}", names.join(", "))))
}

/// Nothing may stand there: absent, empty, 0 and false are that.
fn nothing(field: &str, value: &Value, mend: &str) -> Checked {
    let empty = match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    };
    if empty {
        return Ok(());
    }
    let mut text = value.to_string();
    text.truncate(text.floor_char_boundary(100));
    Err(wrong(field, text, mend))
}

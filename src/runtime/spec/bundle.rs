//! What an OCI runtime program gets: the OCI spec of a plan, made fit to be executed.
//!
//! The spec of `oci::describe` tells what berth does; here the mounts that the helper has staged become bind mounts of its
//! bundle, the user is left out (the helper looks it up in the image), and only annotations that the handler lets through
//! stay.

use std::collections::BTreeMap;
use std::path::Path;

use oci_spec::runtime as oci;
use serde_json::{Map, Value, json};

use crate::base::handler::passed;
use crate::runtime::external::abilities::{Abilities, Lack};
use crate::runtime::external::{Text, is_owned, staged, staged_device, staged_volume};
use crate::runtime::plan::{CgroupJoin, MountSource, NamespaceSource, Plan, ProcessPlan};
use crate::runtime::spec::ContainerInput;
use crate::runtime::spec::oci::{exec_affinity, is_own, process as describe_process};

/// Annotations that say which sandbox a container belongs to. The runtime has made none, pause is berth's own: one that keeps
/// several containers in a sandbox (runsc, kata) would look for it. So each container is a sandbox to it.
const OF_SANDBOX: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.sandbox-id",
];

/// Keys of annotations that an OCI runtime must not see: they may change what it does, and nobody has let them through.
pub(crate) fn hidden_annotations(input: &ContainerInput<'_>) -> Vec<String> {
    let given = &input.config.annotations;
    let shown: BTreeMap<String, String> = passed(given, &input.handler.container_annotations);
    let edited = |key: &str| {
        let asked = input.edits.iter().flat_map(|edits| &edits.annotations);
        asked.into_iter().any(|(name, _)| name == key)
    };
    let hidden = given
        .keys()
        .filter(|key| !shown.contains_key(*key) && !is_own(key) && !edited(key));
    hidden.cloned().collect()
}

/// There is no bundle for a runtime.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    /// The runtime cannot do what it would ask for.
    #[error("{} {}: the OCI runtime does not have it ({})", .0.field, .0.value, .0.at)]
    Lacking(Lack),
    /// Values that are no JSON.
    #[error("encode the OCI configuration")]
    Encode(#[from] serde_json::Error),
}

/// `config.json` of a container whose bundle is this directory, for a runtime of these abilities.
///
/// # Errors
/// [`BundleError`]. Nothing is made then.
pub(crate) fn config(
    spec: &oci::Spec,
    plan: &Plan,
    bundle: &Path,
    hidden: &[String],
    abilities: &Abilities,
) -> Result<Text, BundleError> {
    let mut spec = object(serde_json::to_value(spec)?);
    let version = abilities.bundle_version().map_err(BundleError::Lacking)?;
    spec.insert("ociVersion".to_owned(), json!(version));
    if let Some(root) = spec.get_mut("root") {
        root["path"] = json!("rootfs");
    }
    if let Some(Value::Object(annotations)) = spec.get_mut("annotations") {
        annotations.retain(|key, _| !hidden.contains(key) && !OF_SANDBOX.contains(&key.as_str()));
    }
    if let Some(propagation) = spec.get_mut("linux").map(|l| &mut l["rootfsPropagation"])
        && *propagation == "rprivate"
    {
        // The OCI spec has the short words only, and youki keeps to it. The helper's namespace is private all through.
        *propagation = json!("private");
    }
    if let (true, Some(linux)) = (is_owned(plan), spec.get_mut("linux")) {
        fit_owned(linux, plan);
    }
    let io = spec
        .get_mut("linux")
        .and_then(|linux| linux.pointer_mut("/resources/blockIO"));
    if let Some(Value::Object(io)) = io {
        // The cgroup has them already, where the kernel has weights at all; crun fails where it has none.
        io.remove("weight");
        io.remove("weightDevice");
    }
    if let Some(Value::Array(mounts)) = spec.get_mut("mounts") {
        for (index, (mount, shown)) in plan.mounts.iter().zip(mounts.iter_mut()).enumerate() {
            let staged = staged(plan, index).map(|name| bundle.join(name));
            let source = &mount.source;
            match (source, &plan.namespaces.cgroup, &plan.cgroup) {
                (
                    MountSource::Filesystem { kind, .. },
                    NamespaceSource::Host,
                    CgroupJoin::V2(_),
                ) if kind == "cgroup2" => {
                    show_node_cgroups(shown);
                }
                _ => fit(shown, source, staged.as_deref(), is_owned(plan)),
            }
        }
        // Those of the image are last in the list.
        for (index, shown) in mounts.iter_mut().skip(plan.mounts.len()).enumerate() {
            if let Some(name) = staged_volume(plan, index) {
                shown["source"] = json!(bundle.join(name));
            }
        }
        mounts.extend(devices(plan, bundle));
        // Volumes of the image and devices too go before what is mounted below them.
        mounts.sort_by_key(|mount| {
            let target = mount["destination"].as_str().unwrap_or_default();
            target.matches('/').count()
        });
    }
    let unified = matches!(plan.cgroup, CgroupJoin::V2(_));
    if let Some(lack) = abilities.lacking(&spec, unified) {
        return Err(BundleError::Lacking(lack));
    }
    let mut process = object(spec.remove("process").unwrap_or_default());
    for own in ["ioPriority", "scheduler"] {
        // The helper sets them.
        process.remove(own);
    }
    let process = without_user(process)?;
    Ok(Text {
        head: format!("{{\"process\":{}", process.head),
        tail: format!("{}{}", process.tail, after(&Value::Object(spec))?),
    })
}

/// The node's hierarchy, bound: mounting it anew would change its options for the whole node.
fn show_node_cgroups(shown: &mut Value) {
    const PLACE: &str = "/sys/fs/cgroup";
    shown["type"] = json!("bind");
    shown["source"] = json!(PLACE);
    match shown["options"].as_array_mut() {
        Some(options) => options.push(json!("bind")),
        None => shown["options"] = json!(["bind"]),
    }
}

/// One mount as the runtime is to make it. `owned`: the helper has given it all attributes already.
fn fit(shown: &mut Value, source: &MountSource, staged: Option<&Path>, owned: bool) {
    let Some(place) = staged else {
        // Runtimes know by this type what is to be seen there, whatever the version.
        if matches!(source, MountSource::Filesystem { kind, .. } if kind == "cgroup2") {
            shown["type"] = json!("cgroup");
            shown["source"] = json!("cgroup");
        }
        return;
    };
    shown["type"] = json!("bind");
    shown["source"] = json!(place);
    if let Some(shown) = shown.as_object_mut() {
        // The helper has mapped the ids.
        shown.remove("uidMappings");
        shown.remove("gidMappings");
    }
    let Some(options) = shown["options"].as_array_mut() else {
        return;
    };
    if owned {
        let of_binds = ["rbind", "bind", "rprivate", "rslave", "rshared"];
        options.retain(|option| of_binds.iter().any(|kept| option == kept));
    }
    let more: &[&str] = match source {
        MountSource::Bind { .. } => &[],
        MountSource::Image { .. } if !owned => &["bind", "ro"],
        _ => &["bind"],
    };
    options.extend(more.iter().map(|option| json!(option)));
}

/// Bind mounts of the devices that the helper has staged.
fn devices(plan: &Plan, bundle: &Path) -> Vec<Value> {
    let devices = plan.devices.iter().enumerate();
    let mounts = devices.filter_map(|(index, device)| {
        let source = bundle.join(staged_device(plan, index)?);
        Some(json!({"destination": device.path, "type": "bind", "source": source, "options": ["bind"]}))
    });
    mounts.collect()
}

/// What of a spec's `linux` is different in a user namespace.
fn fit_owned(linux: &mut Value, plan: &Plan) {
    if let Some(linux) = linux.as_object_mut() {
        // Those of the namespace that is joined; runc says that it may refuse both.
        linux.remove("uidMappings");
        linux.remove("gidMappings");
    }
    if let Some(Value::Array(devices)) = linux.get_mut("devices") {
        let mut index = 0..;
        devices.retain(|_| {
            index
                .next()
                .is_some_and(|index| staged_device(plan, index).is_none())
        });
    }
}

/// `process.json` of one more process; `cpu`: it runs there.
///
/// # Errors
/// Values that are no JSON.
pub(crate) fn process(plan: &ProcessPlan, cpu: Option<u32>) -> serde_json::Result<Text> {
    let mut process = describe_process(plan);
    process.set_exec_cpu_affinity(cpu.map(exec_affinity));
    without_user(object(serde_json::to_value(process)?))
}

fn without_user(mut process: Map<String, Value>) -> serde_json::Result<Text> {
    process.remove("user");
    Ok(Text {
        head: "{\"user\":".to_owned(),
        tail: after(&Value::Object(process))?,
    })
}

/// The rest of an object after a first member.
fn after(rest: &Value) -> serde_json::Result<String> {
    let text = serde_json::to_string(rest)?;
    Ok(match text.as_str() {
        "{}" => "}".to_owned(),
        text => format!(",{}", &text[1..]),
    })
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

//! OCI specs and plans.

use std::path::Path;

use crate::base::edits::{Edits, NetDevice};
use crate::base::error::{HasKind as _, Kind};
use crate::base::security::NamespaceMode;
use crate::engine::container::Container;
use crate::engine::core::{Core, give, make_directory};
use crate::engine::error::{EngineError, Result};
use crate::engine::lower::external::{self, Order};
use crate::engine::lower::hooks;
use crate::engine::lower::selinux::label_file;
use crate::engine::lower::{Held, Lower};
use crate::engine::pod::Pod;
use crate::engine::state::{ContainerPhase, Refused};
use crate::runtime::cgroups::CgroupDirs;
use crate::runtime::plan::{ExecPlan, Plan, Preamble};
use crate::runtime::resctrl::Resctrl;
use crate::runtime::spec::{
    self, Built, ContainerInput, SandboxInput, block_io, cdi, hooks_dir, prepare,
};
use crate::store::{Durability, write_atomic};

/// How a container's process is to be; nothing of it exists yet.
#[derive(Debug)]
pub(crate) struct Design(Built);

impl Design {
    /// The OCI spec that describes it, as JSON.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) fn spec(&self) -> Result<serde_json::Value> {
        serde_json::to_value(&self.0.spec)
            .map_err(|error| EngineError::io("encode the OCI spec")(error.into()))
    }
}

/// What a container's process is made of; its cgroup exists.
#[derive(Debug)]
pub(crate) struct Materials {
    /// Where its cgroup is.
    pub(crate) dirs: CgroupDirs,
    /// The plan.
    pub(crate) plan: Plan,
    /// Limits in effect.
    pub(crate) resources: crate::base::container::Resources,
    /// For the pod's OCI runtime, if it has one.
    pub(crate) order: Option<Order>,
    /// Effective stop signal.
    pub(crate) stop_signal: i32,
    /// Network devices of the node that move into the pod.
    pub(crate) net_devices: Vec<NetDevice>,
}

/// How often a sandbox's cgroup is tried to be made again when its parent vanishes.
const CREATE_ATTEMPTS: u32 = 5;

impl Lower {
    /// The plan of a sandbox; its OCI spec is written to the pod's directory, its cgroup made. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) fn prepare_sandbox(&self, core: &Core, pod: &Pod) -> Result<Plan> {
        let cgroup = pod.pause_cgroup();
        let failed = || "sandbox config";
        let mut prepared =
            prepare::sandbox(&pod.config, &self.host).map_err(EngineError::step(failed()))?;
        prepared.labels = pod.labels.clone();
        let dirs = self
            .cgroups
            .dirs(&cgroup)
            .map_err(EngineError::step("linux.cgroup_parent"))?;
        let input = SandboxInput {
            id: pod.id,
            pod: &pod.config,
            cgroup_join: dirs.join,
            cgroup_path: &cgroup,
            hostname: &pod.hostname(),
            prepared: &prepared,
            handler: &pod.handler,
        };
        let built = spec::sandbox(&input, &self.host).map_err(EngineError::step(failed()))?;
        let directory = core.pod_directory(pod.id);
        write_json(&directory.join(format!("{}.json", pod.id)), &built.spec)?;
        let mut attempts = 0..CREATE_ATTEMPTS;
        loop {
            let made = self
                .cgroups
                .create(&cgroup, &built.resources, &built.device_rules);
            match made {
                // The last pod of the same parent has just taken the parent away.
                Err(error) if error.kind() == Kind::NotFound && attempts.next().is_some() => {}
                made => {
                    made.map_err(EngineError::step(format!("make cgroup {cgroup}")))?;
                    return Ok(built.plan);
                }
            }
        }
    }

    /// The plan of a container with the edits of its CDI devices, then those of the plugins. Its OCI spec is written to
    /// the pod's directory. Blocks on the files that its config names.
    ///
    /// # Errors
    /// [`EngineError::Step`], [`EngineError::Invalid`].
    pub(crate) fn design_container(
        &self,
        core: &Core,
        container: &Container,
        held: &Held,
        plugins: &[Edits],
    ) -> Result<Design> {
        let (pod, config) = (&container.pod, &container.config);
        let path = container.cgroup();
        let failed = || "container config";
        let labels = self.label_container(container)?;
        let mut prepared = prepare::container(config, &pod.handler, &self.host)
            .map_err(EngineError::step(failed()))?;
        prepared.labels = labels;
        let dirs = self
            .cgroups
            .dirs(&path)
            .map_err(EngineError::step("linux.cgroup_parent"))?;
        let (files, own) = (
            core.pod_directory(pod.id),
            core.container_directory(container.id),
        );
        let base = pod.handler.base_spec.is_some();
        let base = base.then_some(&prepared.base.edits);
        let edits = self
            .edits(container, held, base, plugins)
            .map_err(EngineError::step(failed()))?;
        let volumes = held.volumes.iter();
        let image_volumes: Vec<_> = volumes
            .map(|volume| (volume.mount, volume.layers.clone()))
            .collect();
        let input = ContainerInput {
            id: container.id,
            pod_id: pod.id,
            pod: &pod.config,
            pod_directory: &files,
            config,
            image: &held.image,
            layers: &held.layers,
            upper: &own.join("upper"),
            work: &own.join("work"),
            volatile: core.volatile,
            empty_layer: &own.join("empty"),
            volumes_directory: &own.join("volumes"),
            cgroup_join: dirs.join.clone(),
            cgroup_path: &path,
            hostname: &pod.hostname(),
            target: target_of(container)?,
            image_volumes: &image_volumes,
            prepared: &prepared,
            edits: &edits,
            handler: &pod.handler,
        };
        let mut built = spec::container(&input, &self.host).map_err(EngineError::step(failed()))?;
        let target = input.target.and_then(|id| core.containers.get(id));
        let target = target.and_then(|target| target.lock().pid);
        if let Some(pause) = pod.lock().pause_pid {
            spec::oci::join(&mut built.spec, &built.plan, pause, target);
        }
        write_json(&files.join(format!("{}.json", container.id)), &built.spec)?;
        Ok(Design(built))
    }

    /// What the handler's base spec, CDI devices, files of hooks and plugins change, in this order: a plugin sees what
    /// the others ask for, and has the last word.
    fn edits(
        &self,
        container: &Container,
        held: &Held,
        base: Option<&Edits>,
        plugins: &[Edits],
    ) -> std::result::Result<Vec<Edits>, spec::SpecError> {
        let config = &container.config;
        let mut asked = config.cdi_devices.clone();
        asked.extend(plugins.iter().flat_map(|edits| edits.cdi_devices.clone()));
        let names = cdi::names(&asked, &config.annotations)?;
        let mut edits: Vec<Edits> = base.into_iter().cloned().collect();
        if !names.is_empty() {
            let files = cdi::Files::load(&self.cdi_spec_dirs);
            edits.extend(cdi::resolve(&names, &files)?);
        }
        let pod = &container.pod.config.annotations;
        let classes = &self.block_io_classes;
        edits.extend(block_io::annotated(
            classes,
            &config.name,
            &config.annotations,
            pod,
        ));
        if !self.hooks_dirs.is_empty() {
            let given = spec::process::args(config, &held.image.config)?;
            let args = plugins.iter().rfind(|edits| !edits.args.is_empty());
            let args = args.map_or(&given, |edits| &edits.args);
            let seen = hooks_dir::Container {
                annotations: &config.annotations,
                pod_annotations: &container.pod.config.annotations,
                command: args.first().map(String::as_str).unwrap_or_default(),
                has_bind_mounts: !config.mounts.is_empty(),
            };
            edits.extend(hooks_dir::matching(&self.hooks_dirs, seen)?);
        }
        edits.extend_from_slice(plugins);
        for edits in &mut edits {
            if let Some(class) = &edits.resources.blockio_class {
                edits.resources.block_io = Some(block_io::limits(&edits.by, class, classes)?);
            }
        }
        spec::edit::check_sources(&edits)?;
        spec::rdt::check_mounted(&edits)?;
        Ok(edits)
    }

    /// Writes the plan of a container to the pod's directory and makes its cgroup. Blocks.
    ///
    /// # Errors
    /// [`EngineError::Step`], [`EngineError::Store`].
    pub(crate) fn furnish_container(
        &self,
        core: &Core,
        container: &Container,
        design: Design,
    ) -> Result<Materials> {
        let files = core.pod_directory(container.pod.id);
        let (built, path) = (design.0, container.cgroup());
        let order = external::order(core, container, &built)?;
        let dirs = self
            .cgroups
            .dirs(&path)
            .map_err(EngineError::step("linux.cgroup_parent"))?;
        for (volume, _) in &built.plan.declared_volumes {
            make_directory(volume, 0o755)?;
            give(volume, &container.pod)?;
            label_file(volume, &built.plan.mount_label)?;
        }
        self.relabel(core, container, &built.plan.mount_label)?;
        let plan = built
            .plan
            .encode()
            .map_err(|error| EngineError::io("encode the plan")(std::io::Error::other(error)))?;
        write(&files.join(format!("{}.plan", container.id)), &plan)?;
        if let Some(order) = &order {
            external::furnish(order, container)?;
        }
        hooks::furnish(container, &built)?;
        if let (Some(wanted), Some(resctrl)) = (&built.rdt, Resctrl::find()) {
            let made = resctrl.make(container.id, wanted);
            made.map_err(EngineError::step("make the resctrl group"))?;
        }
        self.cgroups
            .create(&path, &built.resources, &built.device_rules)
            .map_err(EngineError::step(format!("make cgroup {path}")))?;
        Ok(Materials {
            dirs,
            order,
            plan: built.plan,
            resources: built.resources,
            stop_signal: built.stop_signal,
            net_devices: built.net_devices,
        })
    }

    /// The plan of one more process in a container, as the user that it was made with. Blocks on tmpfs.
    ///
    /// # Errors
    /// [`EngineError::Step`]; [`EngineError::State`]: it was never made.
    pub(crate) fn exec_plan(
        &self,
        core: &Core,
        container: &Container,
        command: Vec<String>,
        terminal: bool,
    ) -> Result<ExecPlan> {
        let directory = core.pod_directory(container.pod.id);
        let path = directory.join(format!("{}.plan", container.id));
        let step = || format!("read the plan {}", path.display());
        let bytes = std::fs::read(&path).map_err(EngineError::io(step()))?;
        let decoded = Preamble::decode(&bytes).and_then(|(_, rest)| postcard::from_bytes(rest));
        let plan: Plan =
            decoded.map_err(|error| EngineError::io(step())(std::io::Error::other(error)))?;
        let status = container.status();
        let user = status.user.clone().ok_or_else(|| EngineError::State {
            verb: "exec in",
            what: "container",
            id: container.id.to_string(),
            source: Refused {
                state: "without a user",
            },
        })?;
        let plan = spec::exec(&plan, user, command, terminal);
        let mut plan = plan.map_err(EngineError::step("exec"))?;
        let score = status.resources.oom_score_adj;
        if score != 0 {
            // An update since may have changed it.
            plan.process.oom_score_adj = i32::try_from(score).ok();
        }
        if container.pod.handler.exec_on_first_cpu {
            plan.cpu = spec::resources::first_own_cpu(&status.resources);
        }
        external::add_process(container, &mut plan)?;
        Ok(plan)
    }
}

/// The running container whose PID namespace is joined.
fn target_of(container: &Container) -> Result<Option<crate::base::id::ContainerId>> {
    let namespaces = &container.config.security.namespaces;
    if namespaces.pid != NamespaceMode::Target {
        return Ok(None);
    }
    let wanted = &namespaces.target_id;
    let mut fits = container.pod.containers();
    fits.retain(|other| {
        !wanted.is_empty()
            && other.id.to_string().starts_with(wanted.as_str())
            && other.phase() == ContainerPhase::Running
    });
    match &fits[..] {
        [one] => Ok(Some(one.id)),
        _ => Err(EngineError::Invalid {
            field: "linux.security_context.namespace_options.target_id",
            value: wanted.clone(),
            mend: "name a running container of the same pod sandbox".to_owned(),
        }),
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    Ok(write_atomic(path, content, 0o600, Durability::Process)?)
}

/// Writes a value as JSON, for root alone.
///
/// # Errors
/// [`EngineError::Step`], [`EngineError::Store`].
pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_vec(value)
        .map_err(|error| EngineError::io("encode the OCI spec")(error.into()))?;
    write(path, &text)
}

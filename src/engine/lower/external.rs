//! Containers that an OCI runtime makes.

use std::path::{Path, PathBuf};

use crate::base::handler::OciRuntime;
use crate::engine::container::Container;
use crate::engine::core::{Core, make_pod_directory};
use crate::engine::error::{EngineError, Result};
use crate::engine::lower::Lower;
use crate::runtime::external::Text;
use crate::runtime::plan::ExecPlan;
use crate::runtime::spec::bundle::BundleError;
use crate::runtime::spec::{Built, bundle};

/// What an OCI runtime needs to make a container.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    /// The runtime.
    pub(crate) runtime: OciRuntime,
    /// Directory of the bundle; exists.
    pub(crate) bundle: PathBuf,
    /// Its configuration.
    pub(crate) config: Text,
}

fn encoding(error: serde_json::Error) -> EngineError {
    EngineError::io("encode the OCI configuration")(error.into())
}

fn no_bundle(container: &Container, error: BundleError) -> EngineError {
    let lack = match error {
        BundleError::Encode(error) => return encoding(error),
        BundleError::Lacking(lack) => lack,
    };
    let handler = &container.pod.handler;
    let path = handler.runtime.as_ref().map(|runtime| &*runtime.path);
    let path = path.unwrap_or(Path::new("")).display();
    let asked = match lack.value.as_str() {
        "" => "it".to_owned(),
        value => format!("{value:?}"),
    };
    let (name, at) = (&handler.name, lack.at);
    EngineError::Unable {
        field: lack.field,
        why: format!(
            "runtime_handler {name:?}: its OCI runtime {path} does not tell that it has {asked} ({at})"
        ),
        mend: "do without, or use a handler that has it (a newer OCI runtime)",
    }
}

/// Directory of a container's bundle, in that of its pod.
pub(crate) fn bundle_of(core: &Core, container: &Container) -> PathBuf {
    core.pod_directory(container.pod.id)
        .join(container.id.to_string())
}

/// The order for the pod's OCI runtime; absent: it has none. Makes nothing yet.
///
/// # Errors
/// [`EngineError::Unable`]: the runtime has not what the container asks for.
pub(super) fn order(core: &Core, container: &Container, built: &Built) -> Result<Option<Order>> {
    let Some(runtime) = &container.pod.handler.runtime else {
        return Ok(None);
    };
    let directory = bundle_of(core, container);
    let abilities = core.handlers.abilities(&runtime.path).unwrap_or_default();
    let (spec, plan, hidden) = (&built.spec, &built.plan, &built.hidden_annotations);
    let config = bundle::config(spec, plan, &directory, hidden, &abilities);
    Ok(Some(Order {
        runtime: runtime.clone(),
        bundle: directory,
        config: config.map_err(|error| no_bundle(container, error))?,
    }))
}

/// Makes the directory of an order's bundle.
///
/// # Errors
/// [`EngineError::Step`].
pub(super) fn furnish(order: &Order, container: &Container) -> Result<()> {
    make_pod_directory(&order.bundle, &container.pod)
}

/// Adds what the OCI runtime of the container, if it has one, needs for an exec.
///
/// # Errors
/// [`EngineError::Step`].
pub(super) fn add_process(container: &Container, plan: &mut ExecPlan) -> Result<()> {
    if container.pod.handler.runtime.is_some() {
        plan.text = Some(bundle::process(&plan.process, plan.cpu).map_err(encoding)?);
    }
    Ok(())
}

impl Lower {
    /// Makes an OCI runtime forget a container whose monitor is gone: another one, which is no pod's, calls it. Fine where
    /// there is nothing to forget.
    ///
    /// # Errors
    /// [`EngineError::Step`].
    pub(crate) async fn clean(&self, core: &Core, container: &Container) -> Result<()> {
        let Some(runtime) = &container.pod.handler.runtime else {
            return Ok(());
        };
        let bundle = bundle_of(core, container);
        if !bundle.exists() {
            // It was never asked for, or the node has rebooted.
            return Ok(());
        }
        let monitor = self.monitors.lend().await;
        let monitor = monitor.map_err(EngineError::step("get a monitor to clean up"))?;
        let cleaned = monitor.clean(container.id, runtime.clone(), bundle).await;
        self.end_monitor(&monitor).await?;
        cleaned.map_err(EngineError::step(
            "make the OCI runtime forget the container",
        ))
    }
}

//! Hooks of a container: checked, and as its plan has them where berth itself runs them.

use std::collections::HashMap;
use std::path::Path;

use serde_json::json;

use crate::base::edits::Edits;
use crate::base::hook::Hook;
use crate::base::id::ContainerId;
use crate::runtime::external::Text;
use crate::runtime::hooks::Hooks;
use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::oci;

/// The hooks that all edits ask for, in order.
///
/// # Errors
/// [`SpecError::Invalid`] names who asks, the point and the field.
pub(crate) fn of(all: &[Edits]) -> Result<Vec<Hook>> {
    for edits in all {
        for hook in &edits.hooks {
            check(&format!("{}: hooks.{}", edits.by, hook.point.name()), hook)?;
        }
    }
    Ok(all.iter().flat_map(|edits| edits.hooks.clone()).collect())
}

/// Is this a hook that can be run? `field` is what it is called in messages.
///
/// # Errors
/// [`SpecError::Invalid`].
pub(crate) fn check(field: &str, hook: &Hook) -> Result<()> {
    let bad = |key: &str, value: &str, problem: &str, mend| {
        let field = format!("{field}.{key}");
        Err(SpecError::invalid(field, value, problem, mend))
    };
    if !hook.path.starts_with('/') {
        let mend = "use an absolute path";
        return bad("path", &hook.path, "is not an absolute path", mend);
    }
    let path = std::slice::from_ref(&hook.path);
    for (key, texts) in [("path", path), ("args", &*hook.args), ("env", &*hook.env)] {
        if let Some(text) = texts.iter().find(|text| text.contains('\0')) {
            return bad(key, text, "has a NUL byte", "remove it");
        }
    }
    let nameless = |text: &&String| text.find('=').is_none_or(|at| at == 0);
    if let Some(text) = hook.env.iter().find(nameless) {
        return bad("env", text, "is no variable", "write it as NAME=value");
    }
    if hook.timeout == Some(0) {
        let mend = "give seconds above 0, or leave it out";
        return bad("timeout", "0", "is no time", mend);
    }
    Ok(())
}

/// What the plan has of them; absent: there are none.
pub(crate) fn plan(
    hooks: &[Hook],
    id: ContainerId,
    pod_directory: &Path,
    annotations: &HashMap<String, String>,
) -> Option<Box<Hooks>> {
    if hooks.is_empty() {
        return None;
    }
    let bundle = pod_directory.join(id.to_string());
    // Text without quotation marks, backslashes or control characters but in annotations, which are encoded.
    let head = format!("{{\"ociVersion\":\"{}\",\"id\":\"{id}\",", oci::VERSION);
    let tail = format!(
        ",\"bundle\":{},\"annotations\":{}}}",
        json!(bundle),
        json!(annotations)
    );
    Some(Box::new(Hooks {
        bundle,
        state: Text { head, tail },
        all: hooks.to_vec(),
    }))
}

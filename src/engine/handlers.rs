//! Runtime handlers: which there are, and what each offers.

mod features;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use features::Features;
use features::{Identity, Told};

use crate::base::handler::{Handler, Handlers};
use crate::base::tasks::Tasks;
use crate::engine::Engine;
use crate::engine::error::{EngineError, Result};
use crate::runtime::external::abilities::Abilities;

/// How long `Status` waits for OCI runtimes that are just being asked. kubelet asks again after five seconds.
const STATUS_WAITS: Duration = Duration::from_millis(500);

/// The handlers of the node.
#[derive(Debug)]
pub(crate) struct HandlerTable {
    all: Handlers,
    /// What OCI runtimes have told, by path; absent: nobody has asked yet.
    told: Mutex<BTreeMap<PathBuf, Told>>,
    /// Held while they are asked: once at a time.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl HandlerTable {
    /// Of the configuration's handlers; nobody was asked anything yet.
    pub(crate) fn new(all: Handlers) -> Self {
        Self {
            all,
            told: Mutex::default(),
            turn: Arc::default(),
        }
    }

    /// What a name means; the empty one is the default.
    ///
    /// # Errors
    /// [`EngineError::Invalid`]: no such handler, or its program is not there.
    pub(crate) fn resolve(&self, name: &str) -> Result<Handler> {
        let invalid = |mend| EngineError::Invalid {
            field: "runtime_handler",
            value: name.to_owned(),
            mend,
        };
        let meant = match name {
            "" => &self.all.default,
            name => name,
        };
        let Some(handler) = self.all.named.get(meant) else {
            let names: Vec<&str> = self.all.named.keys().map(String::as_str).collect();
            let names = names.join(", ");
            return Err(invalid(format!(
                "no such handler; this node has {names} (berth's configuration, [runtimes.NAME])"
            )));
        };
        if let Some(runtime) = &handler.runtime
            && let Err(error) = executable(&runtime.path)
        {
            let path = runtime.path.display();
            return Err(invalid(format!(
                "its OCI runtime {path} cannot be run: {error}; install it, or mend runtimes.{meant}.path"
            )));
        }
        Ok(handler.clone())
    }

    fn told(&self, path: &Path) -> Option<Told> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.get(path).cloned()
    }

    /// The OCI runtimes, each once.
    fn runtimes(&self) -> impl Iterator<Item = &Path> {
        let named = self.all.named.values();
        let mut paths: Vec<&Path> = named
            .filter_map(|handler| Some(&*handler.runtime.as_ref()?.path))
            .collect();
        paths.sort_unstable();
        paths.dedup();
        paths.into_iter()
    }

    /// Why the handler of this name gives pods no user namespace of their own, as far as its OCI runtime has told. What does not
    /// answer in time is tried: its own error tells then.
    pub(crate) fn no_user_namespaces(&self, name: &str) -> Option<String> {
        let meant = match name {
            "" => &self.all.default,
            name => name,
        };
        let path = &self.all.named.get(meant)?.runtime.as_ref()?.path;
        let told = self.told(path)?;
        if told.features.user_namespaces || told.of != Identity::now(path) {
            return None;
        }
        let at = match &told.abilities {
            Some(abilities) => abilities.of_user_namespaces(),
            None => format!("`{} features` fails", path.display()),
        };
        let path = path.display();
        Some(format!(
            "runtime_handler {meant:?}: its OCI runtime {path} does not tell that it can ({at})"
        ))
    }

    /// What the OCI runtime at `path` has told of itself, as it is now; absent: nothing yet.
    pub(crate) fn abilities(&self, path: &Path) -> Option<Arc<Abilities>> {
        let told = self.told(path)?;
        told.abilities.filter(|_| told.of == Identity::now(path))
    }

    /// Is it to be asked (again) before a pod of this handler is made?
    fn is_due(&self, handler: &Handler) -> bool {
        let Some(runtime) = &handler.runtime else {
            return false;
        };
        let told = self.told(&runtime.path);
        told.is_none_or(|told| told.of != Identity::now(&runtime.path))
    }

    /// (name, recursive read-only mounts, user namespaces) of each handler, by name; `""` is the default. A handler whose runtime
    /// was not asked yet, or is not there, offers nothing.
    pub(crate) fn list(&self, own: Features) -> Vec<(String, bool, bool)> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |name: &str| match self.all.named.get(name) {
            Some(Handler { runtime: None, .. }) => own,
            Some(Handler {
                runtime: Some(runtime),
                ..
            }) => told
                .get(&runtime.path)
                .map(|told| told.features)
                .unwrap_or_default(),
            None => Features::default(),
        };
        let row = |shown: &str, name: &str| {
            let features = of(name);
            (
                shown.to_owned(),
                features.recursive_read_only,
                features.user_namespaces,
            )
        };
        let default = row("", &self.all.default);
        let named = self.all.named.keys().map(|name| row(name, name));
        std::iter::once(default).chain(named).collect()
    }

    /// Asks those runtimes that were never asked, could not be asked, or are other files than the ones that were. Blocks.
    fn ask(&self, kernel: Features) {
        for path in self.runtimes() {
            let before = self.told(path);
            let now = Identity::now(path);
            if before
                .as_ref()
                .is_some_and(|one| !one.is_due(now, Instant::now()))
            {
                continue;
            }
            let made = Told::ask(path, now, kernel, before.as_ref());
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            told.insert(path.to_owned(), made);
        }
    }
}

impl Engine {
    /// Asks the OCI runtime of this handler, if nobody has since it is this file: what it cannot do is refused before it is tried.
    pub(super) async fn ask_before(&self, handler: &Handler) {
        if self.core().handlers.is_due(handler) {
            self.ask_features().await;
        }
    }

    /// Asks OCI runtimes for their features, where something may have changed, and waits for a moment for what they tell.
    /// A slow one goes on to be asked.
    pub(super) async fn ask_features(&self) {
        let table = Arc::clone(&self.core().handlers);
        if table.runtimes().next().is_none() {
            return;
        }
        let kernel = self.core().lower.own_features();
        let asked = async {
            let turn = Arc::clone(&table.turn).lock_owned().await;
            let work = async move {
                let done = Tasks::blocking(move || table.ask(kernel));
                let _cut_off = done.await.is_err();
                drop(turn);
            };
            let _cut_off = self.core().tasks.spawn(work).await.is_err();
        };
        let _late = tokio::time::timeout(STATUS_WAITS, asked).await.is_err();
    }
}

/// Can this be run?
fn executable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let found = std::fs::metadata(path)?;
    if found.is_file() && found.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(std::io::Error::other("not an executable file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::{HasKind as _, Kind};
    use crate::base::handler::{BUILT_IN, OciRuntime};

    fn table(path: &str) -> HandlerTable {
        let mut all = Handlers::default();
        let runtime = OciRuntime {
            path: path.into(),
            root: "/run/x".into(),
            arguments: vec![],
        };
        let handler = Handler {
            runtime: Some(runtime),
            ..Handler::default()
        };
        all.named.insert("other".to_owned(), handler);
        HandlerTable::new(all)
    }

    #[test]
    fn names_mean_handlers() {
        let table = table("/bin/true");
        for name in ["", BUILT_IN] {
            let found = table.resolve(name).unwrap();
            assert_eq!((found.name.as_str(), found.runtime), (BUILT_IN, None));
        }
        assert!(table.resolve("other").unwrap().runtime.is_some());
        let error = table.resolve("nope").unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument);
        let text = error.to_string();
        assert!(
            text.starts_with(
                "runtime_handler \"nope\": no such handler; this node has berth, other"
            ),
            "{text}"
        );
        for path in ["/missing/runc", "/proc/self/status", "/etc"] {
            let text = super::tests::table(path)
                .resolve("other")
                .unwrap_err()
                .to_string();
            assert!(
                text.contains(path) && text.contains("runtimes.other.path"),
                "{text}"
            );
        }
    }

    #[test]
    fn lists_are_sorted_and_have_the_default() {
        let mut table = table("/bin/true");
        let own = Features {
            recursive_read_only: true,
            user_namespaces: true,
        };
        let row = |name: &str, rro, user| (name.to_owned(), rro, user);
        let before = [
            row("", true, true),
            row("berth", true, true),
            row("other", false, false),
        ];
        assert_eq!(table.list(own), before);
        table.all.default = "other".to_owned();
        assert_eq!(table.no_user_namespaces("other"), None, "not asked yet");
        table.ask(own);
        let after = [
            row("", false, false),
            row("berth", true, true),
            row("other", false, false),
        ];
        assert_eq!(table.list(own), after);
        for name in ["", "other"] {
            let why = table.no_user_namespaces(name).unwrap();
            let (handler, asked) = ("runtime_handler \"other\"", "`/bin/true features`");
            assert!(why.starts_with(handler) && why.contains(asked), "{why}");
        }
        assert_eq!(table.no_user_namespaces(BUILT_IN), None);
        let told = |table: &HandlerTable| table.told(Path::new("/bin/true"));
        table.told.lock().unwrap().values_mut().for_each(|one| {
            one.of = None;
        });
        assert_eq!(table.no_user_namespaces("other"), None, "another program");
        table.ask(own);
        assert_eq!(
            told(&table).unwrap().of,
            Identity::now(Path::new("/bin/true"))
        );
    }
}

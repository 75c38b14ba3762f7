//! Runtime handlers: which there are, and what each offers.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::base::handler::{Handler, Handlers};
use crate::base::tasks::Tasks;
use crate::engine::Engine;
use crate::engine::error::{EngineError, Result};
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::spawn::Spawn;
use crate::sys::{fd, process, signal};

/// How long an OCI runtime may take to tell its features.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longest answer in bytes.
const MAX_ANSWER: usize = 1024 * 1024;

/// What a handler offers; kubelet refuses pods that need what is not offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// Mounts that are read-only with all below them.
    pub(crate) recursive_read_only: bool,
    /// Pods in user namespaces.
    pub(crate) user_namespaces: bool,
}

/// The handlers of the node.
#[derive(Debug)]
pub(crate) struct HandlerTable {
    all: Handlers,
    /// What OCI runtimes have told; absent: nothing (yet).
    told: Mutex<BTreeMap<String, Features>>,
}

impl HandlerTable {
    /// Of the configuration's handlers; nobody was asked anything yet.
    pub(crate) fn new(all: Handlers) -> Self {
        Self {
            all,
            told: Mutex::default(),
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

    /// Why the handler of this name gives pods no user namespace of their own, as far as its OCI runtime has told. What has not
    /// answered yet is tried: its own error tells then.
    pub(crate) fn no_user_namespaces(&self, name: &str) -> Option<String> {
        let meant = match name {
            "" => &self.all.default,
            name => name,
        };
        let runtime = self.all.named.get(meant)?.runtime.as_ref()?;
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.get(meant)?.user_namespaces {
            return None;
        }
        let path = runtime.path.display();
        Some(format!(
            "runtime_handler {meant:?}: its OCI runtime {path} does not tell that it can (linux.namespaces of `{path} features`)"
        ))
    }

    /// (name, recursive read-only mounts, user namespaces) of each handler, by name; `""` is the default.
    pub(crate) fn list(&self, own: Features) -> Vec<(String, bool, bool)> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |name: &str| match self.all.named.get(name) {
            Some(Handler { runtime: None, .. }) => own,
            _ => told.get(name).copied().unwrap_or_default(),
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
}

impl Engine {
    /// Asks every OCI runtime for its features, in the background, once.
    pub(super) fn ask_features(&self) {
        let table = Arc::clone(&self.core().handlers);
        if table.all.named.values().all(|one| one.runtime.is_none()) {
            return;
        }
        let kernel = self.core().lower.own_features();
        let _asks = self.core().tasks.spawn(async move {
            let done = Tasks::blocking(move || {
                for (name, handler) in &table.all.named {
                    let Some(runtime) = &handler.runtime else {
                        continue;
                    };
                    let features = match ask(&runtime.path, "features") {
                        Ok(answer) => features_of(&answer, kernel),
                        Err(error) => {
                            let told = ask(&runtime.path, "--version").unwrap_or_default();
                            let features = features_of_version(&told, kernel);
                            tracing::warn!(handler = name, runtime = %runtime.path.display(), %error,
                                recursive_read_only = features.recursive_read_only,
                                user_namespaces = features.user_namespaces,
                                "the runtime does not tell its features: only those of the version that it implements are offered");
                            features
                        }
                    };
                    let mut told = table.told.lock().unwrap_or_else(PoisonError::into_inner);
                    told.insert(name.clone(), features);
                }
            });
            let _cut_off = done.await.is_err();
        });
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

/// What `PATH WORD` prints. Blocks for at most [`PATIENCE`].
fn ask(path: &Path, word: &str) -> std::io::Result<Vec<u8>> {
    let (reader, writer) = fd::pipe()?;
    fd::set_nonblocking(reader.as_fd(), true)?;
    let spawned = Spawn::path(path)
        .argument(word)
        .standard(1, writer.as_fd())
        .session()
        .start();
    drop(writer);
    let child =
        spawned.map_err(|error| std::io::Error::other(crate::base::error::chain(&error)))?;
    let answer = read_until(reader.as_fd(), Instant::now() + PATIENCE);
    if answer.is_err() {
        let _ended_already = process::send_signal(child.pidfd.as_fd(), signal::SIGKILL);
    }
    let exit = process::wait(child.pidfd.as_fd())?;
    let answer = answer?;
    match exit.code() {
        0 => Ok(answer),
        code => Err(std::io::Error::other(format!("it exited with {code}"))),
    }
}

fn read_until(reader: std::os::fd::BorrowedFd<'_>, end: Instant) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut set = [PollFd::from_borrowed_fd(reader, PollFlags::IN)];
        if poll(&mut set, Some(left))? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        match fd::read(reader, &mut chunk) {
            Ok(0) => return Ok(answer),
            Ok(count) if answer.len() + count > MAX_ANSWER => {
                return Err(std::io::Error::other("its answer is too long"));
            }
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// What an answer of `features` (OCI runtime-spec, features.md) means for us on this kernel.
fn features_of(answer: &[u8], kernel: Features) -> Features {
    let value: serde_json::Value = serde_json::from_slice(answer).unwrap_or_default();
    let options = value["mountOptions"].as_array();
    let rro = |options: &Vec<serde_json::Value>| options.iter().any(|one| one == "rro");
    Features {
        recursive_read_only: kernel.recursive_read_only && options.is_some_and(rro),
        user_namespaces: kernel.user_namespaces
            && value["linux"]["namespaces"]
                .as_array()
                .is_some_and(|names| names.iter().any(|one| one == "user")),
    }
}

/// What a runtime offers that has no `features` (crun before 1.11), by its `--version`: user namespaces if it says that it
/// implements version 1 of the runtime-spec, which has them from its beginning. What later versions added for them, mapped
/// mounts, berth does itself.
fn features_of_version(told: &[u8], kernel: Features) -> Features {
    let told = String::from_utf8_lossy(told);
    let mut versions = told
        .lines()
        .filter_map(|line| line.trim().strip_prefix("spec: "));
    Features {
        recursive_read_only: false,
        user_namespaces: kernel.user_namespaces && versions.any(|one| one.starts_with("1.")),
    }
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
        let answer = br#"{"mountOptions":["ro","rro"],"linux":{"namespaces":["mount","time"]}}"#;
        let features = features_of(answer, own);
        table
            .told
            .lock()
            .unwrap()
            .insert("other".to_owned(), features);
        let after = [
            row("", true, false),
            row("berth", true, true),
            row("other", true, false),
        ];
        assert_eq!(table.list(own), after);
        for name in ["", "other"] {
            let why = table.no_user_namespaces(name).unwrap();
            let (handler, asked) = ("runtime_handler \"other\"", "`/bin/true features`");
            assert!(why.starts_with(handler) && why.contains(asked), "{why}");
        }
        assert_eq!(table.no_user_namespaces(BUILT_IN), None);
        let answer = br#"{"mountOptions":["ro","rro"],"linux":{"namespaces":["user"]}}"#;
        assert_eq!(features_of(answer, own), own);
        assert_eq!(features_of(b"no JSON", own), Features::default());
        assert_eq!(
            features_of(answer, Features::default()),
            Features::default()
        );
    }

    #[test]
    fn runtimes_are_asked() {
        let ask = |path| ask(Path::new(path), "features");
        assert_eq!(ask("/bin/echo").unwrap(), b"features\n");
        let error = ask("/bin/false").unwrap_err();
        assert!(error.to_string().contains("exited with 1"), "{error}");
        assert!(ask("/missing").is_err());
    }

    #[test]
    fn a_runtime_without_features_has_those_of_its_version() {
        let own = Features {
            recursive_read_only: true,
            user_namespaces: true,
        };
        let crun = b"crun version 1.8.1\ncommit: f8a0\nspec: 1.0.0\n+SYSTEMD +CAP\n";
        let user = |told: &[u8], kernel| features_of_version(told, kernel).user_namespaces;
        assert!(user(crun, own) && !user(crun, Features::default()));
        assert!(!features_of_version(crun, own).recursive_read_only);
        for told in [
            &b""[..],
            b"x 1.0\n",
            b"spec: 0.9.0\n",
            b"OCI specs: 1.0.2\n",
            b"spec: 10.0\n",
        ] {
            assert!(!user(told, own), "{told:?}");
        }
    }
}

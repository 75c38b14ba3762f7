//! Installed plugins: programs `NN-name` of a directory, started with a connected socket as descriptor 3.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};

use futures_util::future::join_all;
use tokio::net::UnixStream;

use crate::base::error::chain;
use crate::base::tasks::Tasks;
use crate::nri::Nri;
use crate::nri::error::{NriError, PluginText};
use crate::nri::plugin::{Identity, Plugin, end_child};
use crate::sys::spawn::{Child, Spawn};

/// An installed plugin.
#[derive(Debug, PartialEq, Eq)]
struct Installed {
    program: PathBuf,
    identity: Identity,
    config: String,
}

impl Nri {
    /// Starts what is installed, all at once; those that register join in the order of their indices.
    pub(super) async fn start_installed(&self) {
        let Some(directory) = self.0.config.plugins.clone() else {
            return;
        };
        let configs = self.0.config.plugin_config.clone();
        let found = Tasks::blocking(move || discover(&directory, &configs)).await;
        let found = match found {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                tracing::error!(
                    error = chain(&error),
                    "installed NRI plugins cannot be found"
                );
                return;
            }
            Err(_panicked) => return,
        };
        let starting = found.into_iter().map(|installed| self.start_one(installed));
        let mut started: Vec<Plugin> = vec![];
        for outcome in join_all(starting).await {
            match outcome {
                Ok(plugin) => started.push(plugin),
                Err(error) => {
                    tracing::error!(error = chain(&error), "an installed NRI plugin failed");
                }
            }
        }
        started.sort_by(|a, b| a.identity.cmp(&b.identity));
        for plugin in started {
            if let Err(error) = self.join(plugin).await {
                tracing::error!(error = chain(&error), "an installed NRI plugin failed");
            }
        }
    }

    async fn start_one(&self, installed: Installed) -> Result<Plugin, NriError> {
        let Installed {
            program,
            identity,
            config,
        } = installed;
        let (path, who) = (program.clone(), identity.clone());
        let spawned = Tasks::blocking(move || spawn(&path, &who)).await;
        let spawned = spawned.unwrap_or_else(|_panicked| Err(std::io::Error::other("given up")));
        let (child, stream) = spawned.map_err(|source| NriError::Io {
            operation: "start",
            path: program,
            source,
        })?;
        let stream = UnixStream::from_std(stream).map_err(|error| NriError::Join {
            plugin: identity.to_string(),
            step: "connection",
            source: PluginText(error.to_string()),
        });
        let greeted = match stream {
            Ok(stream) => self.greet(stream, Some(identity), config).await,
            Err(error) => Err(error),
        };
        match greeted {
            Ok(plugin) => {
                plugin.own(child);
                Ok(plugin)
            }
            Err(error) => {
                let _ended = Tasks::blocking(move || end_child(&child)).await.is_ok();
                Err(error)
            }
        }
    }
}

/// Starts a plugin. Blocks until it has executed.
fn spawn(program: &Path, identity: &Identity) -> std::io::Result<(Child, StdStream)> {
    let (ours, theirs) = StdStream::pair()?;
    ours.set_nonblocking(true)?;
    let theirs = OwnedFd::from(theirs);
    let child = Spawn::path(program)
        .variable("NRI_PLUGIN_NAME", &identity.name)
        .variable("NRI_PLUGIN_IDX", &identity.index)
        .variable("NRI_PLUGIN_SOCKET", "3")
        .pass(theirs.as_fd())
        .session()
        .start()
        .map_err(|error| std::io::Error::other(chain(&error)))?;
    Ok((child, ours))
}

/// The programs of a directory. What is not executable or not named `NN-name` is left out, with a warning for the
/// latter. Blocks on the disk.
///
/// # Errors
/// [`NriError::Io`]: the directory or a plugin's configuration cannot be read.
fn discover(directory: &Path, configs: &Path) -> Result<Vec<Installed>, NriError> {
    let io = |operation, path: &Path, source| NriError::Io {
        operation,
        path: path.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(io("read", directory, error)),
    };
    let mut found = vec![];
    for entry in entries.flatten() {
        let program = entry.path();
        let Ok(metadata) = std::fs::metadata(&program) else {
            continue;
        };
        if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let (index, base) = name.split_once('-').unwrap_or((&name, ""));
        let identity = match Identity::new(index, base) {
            Ok(identity) => identity,
            Err(error) => {
                tracing::warn!(path = %program.display(), error,
                    "not an NRI plugin: call it NN-name");
                continue;
            }
        };
        let mut config = String::new();
        for file in [format!("{name}.conf"), format!("{base}.conf")] {
            let path = configs.join(file);
            match std::fs::read_to_string(&path) {
                Ok(text) => {
                    config = text;
                    break;
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io("read", &path, error)),
            }
        }
        found.push(Installed {
            program,
            identity,
            config,
        });
    }
    found.sort_by(|a, b| a.identity.cmp(&b.identity));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_and_their_configurations() {
        let place = tempfile::tempdir().unwrap();
        let (plugins, configs) = (place.path().join("plugins"), place.path().join("conf.d"));
        assert_eq!(discover(&plugins, &configs).unwrap(), []);
        std::fs::create_dir(&plugins).unwrap();
        std::fs::create_dir(&configs).unwrap();
        let put = |path: &Path, mode: u32, text: &str| {
            let mut file = std::fs::File::create(path).unwrap();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
            file.set_permissions(std::fs::Permissions::from_mode(mode))
                .unwrap();
        };
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o755),
            ("30-c", 0o644),
            ("x-d", 0o755),
        ] {
            put(&plugins.join(name), mode, "");
        }
        put(&configs.join("a.conf"), 0o644, "of a");
        put(&configs.join("20-b.conf"), 0o644, "of 20-b");
        put(&configs.join("b.conf"), 0o644, "of b");
        let found = discover(&plugins, &configs).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|one| (one.identity.to_string(), one.config.as_str()))
            .collect();
        assert_eq!(
            found,
            [("10-a".to_owned(), "of a"), ("20-b".to_owned(), "of 20-b")]
        );
    }
}

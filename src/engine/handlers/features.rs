//! What an OCI runtime offers: it is asked by its `features` sub-command, else by its version.

use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::runtime::external::abilities::Abilities;
use crate::sys::poll::{PollFd, PollFlags, poll};
use crate::sys::spawn::Spawn;
use crate::sys::{fd, process, signal};

/// How long an OCI runtime may take to tell its features.
const PATIENCE: Duration = Duration::from_secs(20);
/// When one that could not be asked is asked again, though it looks the same: what it needs besides may be there then.
const AGAIN: Duration = Duration::from_secs(10);
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

/// Which file a program is, and in which state: another one may tell something else. The time is that of the last change of
/// content, mode or name, which nobody can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    /// Of what lies at `path` now, links followed; absent: nothing that can be looked at.
    pub(super) fn now(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

/// What an OCI runtime has told.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// The program that was asked; absent: there was none.
    pub(super) of: Option<Identity>,
    /// None of them if it could not be asked.
    pub(super) features: Features,
    /// Absent: it could not be asked.
    pub(super) abilities: Option<Arc<Abilities>>,
    /// It could not be asked: when it is worth another try.
    again: Option<Instant>,
}

impl Told {
    /// Asks the program at `path`, which is `of`. `before`: what was known of it. Blocks for at most two times [`PATIENCE`].
    pub(super) fn ask(
        path: &Path,
        of: Option<Identity>,
        kernel: Features,
        before: Option<&Self>,
    ) -> Self {
        let mut told = Self {
            of,
            features: Features::default(),
            abilities: None,
            again: None,
        };
        let runtime = path.display();
        if of.is_none() {
            tracing::warn!(%runtime, "the runtime is not there: its handlers offer nothing");
            return told;
        }
        let error = match ask(path, "features") {
            Ok(answer) => {
                told.learn(Abilities::of_features(path, &answer), kernel);
                return told;
            }
            Err(error) => error,
        };
        match ask(path, "--version") {
            Ok(version) => told.learn(Abilities::of_version(path, &version), kernel),
            Err(_) => told.again = Some(Instant::now() + AGAIN),
        }
        // Once is enough, however often it is tried.
        if !before.is_some_and(|before| before.of == of) {
            tracing::warn!(%runtime, %error,
                recursive_read_only = told.features.recursive_read_only,
                user_namespaces = told.features.user_namespaces,
                "the runtime does not tell its features: only those of the version that it implements are offered");
        }
        told
    }

    fn learn(&mut self, abilities: Abilities, kernel: Features) {
        self.features = Features {
            recursive_read_only: kernel.recursive_read_only && abilities.has_recursive_read_only(),
            user_namespaces: kernel.user_namespaces && abilities.has_user_namespaces(),
        };
        self.abilities = Some(Arc::new(abilities));
    }

    /// Is it time to ask, with this program at its path?
    pub(super) fn is_due(&self, found: Option<Identity>, now: Instant) -> bool {
        self.of != found || self.again.is_some_and(|again| again <= now)
    }
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
    let end = Instant::now() + PATIENCE;
    let answer = read_until(reader.as_fd(), end)
        .and_then(|answer| wait_readable(child.pidfd.as_fd(), end).map(|()| answer));
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
        wait_readable(reader, end)?;
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

fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, end: Instant) -> std::io::Result<()> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut set = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        if poll(&mut set, Some(left))? > 0 {
            return Ok(());
        }
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Features = Features {
        recursive_read_only: true,
        user_namespaces: true,
    };

    #[test]
    fn an_answer_counts_as_far_as_the_kernel_goes() {
        let answer = br#"{"mountOptions":["ro","rro"],
            "linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}}}}"#;
        let learnt = |kernel| {
            let mut told = Told::ask(Path::new("/missing"), None, kernel, None);
            told.learn(Abilities::of_features(Path::new("/x"), answer), kernel);
            told.features
        };
        assert_eq!(learnt(OWN), OWN);
        assert_eq!(learnt(Features::default()), Features::default());
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
    fn a_runtime_is_asked_when_it_is_another_or_could_not_be_asked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime");
        // Links, not scripts: what was just written may be busy for another thread's children.
        let ask = |before: Option<&Told>| Told::ask(&path, Identity::now(&path), OWN, before);
        let due = |told: &Told, later| told.is_due(Identity::now(&path), Instant::now() + later);
        let missing = ask(None);
        assert!(!due(&missing, AGAIN), "nothing has come");
        std::os::unix::fs::symlink("/bin/false", &path).unwrap();
        assert!(due(&missing, Duration::ZERO));
        let failed = ask(Some(&missing));
        assert!(!due(&failed, Duration::ZERO) && due(&failed, AGAIN));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/bin/echo", &path).unwrap();
        assert!(due(&failed, Duration::ZERO));
        let answered = ask(Some(&failed));
        assert!(!due(&answered, AGAIN));
        std::fs::remove_file(&path).unwrap();
        assert!(due(&answered, Duration::ZERO), "it has gone");
    }
}

//! Walks of trees in any depth, of trees that are changed meanwhile, and of trees with mounts in them.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use super::*;
use crate::sys::remove::{Removal, remove};

/// The directory at `path`, to be read.
pub(crate) fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, DIRECTORY, Mode::empty()).unwrap()
}

/// Makes `depth` directories of this name in each other below `top`; the innermost one.
pub(crate) fn nest(top: &Path, depth: usize, name: &str) -> OwnedFd {
    let mut here = open(top);
    for _ in 0..depth {
        rustix::fs::mkdirat(&here, name, Mode::RWXU).unwrap();
        here = rustix::fs::openat(&here, name, DIRECTORY, Mode::empty()).unwrap();
    }
    here
}

/// Makes a file of so many bytes.
pub(crate) fn file(at: &OwnedFd, name: &str, bytes: usize) {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::openat(at, name, flags, Mode::RUSR).unwrap();
    let mut file = fs::File::from(file);
    std::io::Write::write_all(&mut file, &vec![1; bytes]).unwrap();
}

/// A directory that goes with all it holds, however deep that is.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// A path in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A directory in it, made with those above.
    pub(crate) fn made(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let top = open(self.0.path());
        for entry in fs::read_dir(self.0.path()).unwrap() {
            let name = std::ffi::CString::new(entry.unwrap().file_name().as_bytes()).unwrap();
            let removed = remove(top.as_fd(), &name, &mut || false);
            assert!(
                std::thread::panicking() || removed == Removal::Gone,
                "{removed:?}"
            );
        }
    }
}

type Hook = Box<dyn FnMut(&str, usize)>;

/// Notes what it sees.
#[derive(Default)]
struct Notes {
    entries: Vec<String>,
    entered: Vec<String>,
    deepest: usize,
    left: usize,
    failures: Vec<Failure>,
    on_enter: Option<Hook>,
}

impl Visit for Notes {
    type Error = std::convert::Infallible;

    fn entry(
        &mut self,
        _at: BorrowedFd<'_>,
        name: &CStr,
        _kind: FileType,
    ) -> std::result::Result<(), Self::Error> {
        self.entries.push(name.to_string_lossy().into_owned());
        Ok(())
    }

    fn enter(
        &mut self,
        _at: BorrowedFd<'_>,
        name: &CStr,
        _directory: BorrowedFd<'_>,
        depth: usize,
    ) -> std::result::Result<bool, Self::Error> {
        let name = name.to_string_lossy().into_owned();
        if let Some(hook) = &mut self.on_enter {
            hook(&name, depth);
        }
        self.entered.push(name);
        self.deepest = self.deepest.max(depth);
        Ok(true)
    }

    fn leave(&mut self, _directory: BorrowedFd<'_>) -> std::result::Result<(), Self::Error> {
        self.left += 1;
        Ok(())
    }

    fn failed(&mut self, failure: Failure) -> std::result::Result<(), Self::Error> {
        self.failures.push(failure);
        Ok(())
    }
}

fn walk(top: &Path, notes: &mut Notes) {
    let progress = Walk::of(open(top)).unwrap().run(notes, &mut || false);
    assert_eq!(progress, Ok(Progress::Done));
}

#[test]
fn any_depth_is_walked_with_a_few_descriptors() {
    let place = Place::new();
    let top = place.made("top");
    let depth = 3000;
    file(&nest(&top, depth, "d"), "bottom", 1);
    let mut walk = Walk::of(open(&top)).unwrap();
    let (mut notes, mut most) = (Notes::default(), 0);
    while walk.run(&mut notes, &mut || true) == Ok(Progress::Paused) {
        let held = walk.0.0.iter().filter(|level| level.directory.is_some());
        most = most.max(held.count());
    }
    assert_eq!((notes.deepest, notes.left), (depth, depth + 1));
    assert_eq!(notes.entries, ["bottom"]);
    assert_eq!(most, HELD + 1);
    assert_eq!(notes.failures, []);
}

#[test]
fn a_walk_that_pauses_sees_the_same() {
    let place = Place::new();
    let top = place.made("top");
    for number in 0..300 {
        file(&open(&top), &format!("{number:0>250}"), 0);
        let below = place.made(&format!("top/d{number}"));
        for number in 0..number % 7 {
            fs::create_dir(below.join(number.to_string())).unwrap();
        }
    }
    std::os::unix::fs::symlink("/", top.join("link")).unwrap();
    let mut whole = Notes::default();
    super::tests::walk(&top, &mut whole);
    assert_eq!(whole.entries.len(), 301);
    assert_eq!(
        whole.entered.len(),
        300 + (0..300).map(|n| n % 7).sum::<usize>()
    );
    let (mut parts, mut pauses) = (Notes::default(), 0);
    let mut walk = Walk::of(open(&top)).unwrap();
    while walk.run(&mut parts, &mut || true) == Ok(Progress::Paused) {
        pauses += 1;
    }
    assert!(pauses > 10, "{pauses}");
    assert_eq!(parts.entries, whole.entries);
    assert_eq!(parts.entered, whole.entered);
    assert_eq!(parts.left, whole.left);
}

/// Somebody moves an ancestor to where `..` leads to files of others, while we are below it.
#[test]
fn a_directory_that_is_moved_does_not_lead_outside() {
    for moved in [3, HELD + 4] {
        let place = Place::new();
        let (top, outside) = (place.made("top"), place.made("outside"));
        file(&open(&outside), "secret", 1);
        let depth = HELD + 30;
        drop(nest(&top, depth, "d"));
        // A sibling at each level, which comes before or after the one that is deep.
        let mut here = open(&top);
        for level in 0..depth {
            rustix::fs::mkdirat(&here, format!("s{level}"), Mode::RWXU).unwrap();
            here = rustix::fs::openat(&here, "d", DIRECTORY, Mode::empty()).unwrap();
        }
        let from = top.join(vec!["d"; moved].join("/"));
        let to = outside.join("moved");
        let hook: Hook = Box::new(move |name, at| {
            if name == "d" && at == depth {
                fs::rename(&from, &to).unwrap();
            }
        });
        let mut notes = Notes {
            on_enter: Some(hook),
            ..Notes::default()
        };
        walk(&top, &mut notes);
        assert_eq!(notes.entries, Vec::<String>::new(), "{moved}");
        let seen = |level: usize| notes.entered.contains(&format!("s{level}"));
        // What is held is walked to its end.
        assert!((0..HELD).all(seen), "{:?}", notes.entered);
        match moved < HELD {
            true => assert_eq!(notes.failures, []),
            false => {
                assert_eq!(notes.failures.len(), 1);
                assert_eq!(notes.failures[0].errno, Errno::STALE);
            }
        }
    }
}

#[test]
fn mounts_are_told_and_not_walked() {
    let place = Place::new();
    let top = place.made("top");
    place.made("top/a/mounted");
    let seen = in_own_mounts(move || {
        mount_tmpfs(&top.join("a/mounted"));
        file(&open(&top.join("a/mounted")), "inside", 1);
        let mut notes = Notes::default();
        walk(&top, &mut notes);
        (notes.entries, notes.entered)
    });
    assert_eq!(seen, (vec!["mounted".to_owned()], vec!["a".to_owned()]));
}

/// Runs `work` on a thread with a mount namespace of its own.
pub(crate) fn in_own_mounts<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let own = std::thread::spawn(move || {
        let flags = rustix::thread::UnshareFlags::NEWNS;
        #[expect(
            unsafe_code,
            reason = "a thread of the test's own; it holds nothing of others"
        )]
        // SAFETY: only this thread has the new namespace, and it ends with the work.
        unsafe { rustix::thread::unshare_unsafe(flags) }.unwrap();
        let private = rustix::mount::MountPropagationFlags::PRIVATE
            | rustix::mount::MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).unwrap();
        work()
    });
    own.join().unwrap()
}

/// Mounts an empty filesystem.
pub(crate) fn mount_tmpfs(at: &Path) {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", at, "tmpfs", flags, None::<&CStr>).unwrap();
}

//! What is mounted below a volume and cannot be idmapped, so that nothing below that volume is.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::runtime::spec::prepare::unescape;
use crate::runtime::userns;
use crate::sys::file;
use crate::sys::mount::{self, Change, attribute};

/// A mount below a volume.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Below {
    /// Where, from the volume's top.
    pub(crate) path: PathBuf,
    /// Type of its filesystem, as the kernel names it.
    pub(crate) filesystem: String,
}

/// The mounts below `volume` for which it is not mapped by `user` with all that is below it; empty: all is mapped.
/// `mountinfo`: the text of proc_pid_mountinfo(5). Tried, nothing stays.
pub(crate) fn below(volume: &Path, mountinfo: &str, user: BorrowedFd<'_>) -> Vec<Below> {
    let Ok(volume) = std::fs::canonicalize(volume) else {
        return vec![];
    };
    let all = mounted_below(&volume, mountinfo);
    if all.is_empty() || maps_with_all(&volume, user) {
        return vec![];
    }
    let mut unmapped = all;
    unmapped.retain(|one| userns::can_map(&volume.join(&one.path), user).is_err());
    unmapped
}

/// As the mount of the volume is made.
fn maps_with_all(volume: &Path, user: BorrowedFd<'_>) -> bool {
    let change = Change {
        set: attribute::IDMAP,
        user_namespace: Some(user),
        recursive: true,
        ..Change::default()
    };
    let tree = mount::copy_tree(file::CWD, volume, true);
    tree.is_ok_and(|tree| mount::change(tree.as_fd(), &change).is_ok())
}

fn mounted_below(volume: &Path, mountinfo: &str) -> Vec<Below> {
    let of_line = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let point = PathBuf::from(unescape(head.split(' ').nth(4)?));
        let path = point.strip_prefix(volume).ok()?;
        (!path.as_os_str().is_empty()).then(|| Below {
            path: path.to_owned(),
            filesystem: tail.split(' ').next().unwrap_or_default().to_owned(),
        })
    };
    mountinfo.lines().filter_map(of_line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_below_a_volume() {
        let text = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
            30 22 0:30 / /v rw,nosuid - tmpfs tmpfs rw\n\
            31 30 0:31 / /v/with\\040blank rw master:3 - fuse.sshfs x rw\n\
            32 31 0:32 / /v/with\\040blank/deep rw - proc proc rw\n\
            33 22 0:33 / /vv rw - nfs4 x rw\n";
        let below = |volume| {
            let found = mounted_below(Path::new(volume), text).into_iter();
            let found = found.map(|one| (one.path.display().to_string(), one.filesystem));
            found.collect::<Vec<_>>()
        };
        let [blank, deep] = [("with blank", "fuse.sshfs"), ("with blank/deep", "proc")]
            .map(|(path, kind)| (path.to_owned(), kind.to_owned()));
        assert_eq!(below("/v"), [blank, deep]);
        assert_eq!(
            below("/v/with blank"),
            [("deep".to_owned(), "proc".to_owned())]
        );
        assert_eq!(below("/vv"), []);
    }
}

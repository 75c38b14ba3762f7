//! Directories that a layer only implies.
//!
//! A layer's tar may hold `usr/bin/x` without `usr/` and `usr/bin/`. Unpacked alone, such a directory
//! gets made-up owner and mode, and overlayfs shows those of the topmost layer. What it should look
//! like is decided by the layers below it, so it differs from chain to chain, while layers are shared
//! by diff id. So: the chain is looked through, and where the layer does not look as this chain needs
//! it, a variant is made whose directories are its own and whose files are shared by hard links.
//!
//! Where a lower layer has a symlink to a directory in that place (`lib -> usr/lib`), the layer's
//! content belongs behind it: the variant has it moved there.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::{Errno, Result};
use serde::{Deserialize, Serialize};

use crate::images::tree::{self, Meta};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";
const MAX_SYMLINKS: u32 = 40;
/// Directories above what a layer implies, wherever a link leads; as for a layer's own entries.
const MAX_DEPTH: usize = 256;
/// Directories of the layers below that are looked at for one layer: layers of a few megabytes could ask for billions.
pub(crate) const MAX_STEPS: u64 = 3_000_000;

/// Looks of an implied directory, or where its content goes instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Look {
    /// As made: root's, 0755.
    Default,
    /// As the layers below have it.
    Below {
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Attributes, overlayfs' own excluded.
        xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    },
    /// The layers below have a symlink here that leads to this directory (path from the root).
    Moved(Vec<u8>),
}

/// What a chain asks of a layer: its implied directories that must not be as made.
pub(crate) type Looks = BTreeMap<Vec<u8>, Look>;

/// What the lower layers have at a path.
enum Found {
    Nothing,
    /// The directories there, topmost first.
    Directory(Vec<OwnedFd>),
    Symlink(Vec<u8>),
    Other,
}

/// The layers below: roots, topmost first, and what was looked at in them.
struct Below<'a> {
    roots: &'a [OwnedFd],
    steps: Cell<u64>,
}

/// What the layers `below` (roots, topmost first) ask of the implied directories of `layer` on them.
///
/// Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; `EOVERFLOW`: it takes more than [`MAX_STEPS`].
pub(crate) fn looks<'p>(
    layer: BorrowedFd<'_>,
    implied: impl IntoIterator<Item = &'p Vec<u8>>,
    below: &[OwnedFd],
) -> Result<Looks> {
    let below = &Below {
        roots: below,
        steps: Cell::new(0),
    };
    let mut looks = Looks::new();
    // (from, to) of directories that move; everything below one goes with it.
    let mut moves: Vec<(Vec<u8>, Vec<u8>)> = vec![];
    for path in implied {
        let with = moves.iter().find_map(|(from, to)| {
            let rest = path.strip_prefix(&from[..])?.strip_prefix(b"/")?;
            Some([to, rest].join(&b'/'))
        });
        let moved = with.is_some();
        let place = with.unwrap_or_else(|| path.clone());
        match look_at(&place, below)? {
            Look::Default => {}
            Look::Moved(_) if moved => {}
            Look::Moved(target) => {
                moves.push((path.clone(), target.clone()));
                looks.insert(path.clone(), Look::Moved(target));
            }
            look => {
                looks.insert(place, look);
            }
        }
    }
    for (_, target) in &moves {
        let parts = parts_of(target);
        for end in 1..=parts.len() {
            // What the layer has of its own was looked at above, or is described by an entry.
            if descend(layer, &parts[..end]).is_ok() {
                continue;
            }
            let path = parts[..end].join(&b'/');
            if let look @ Look::Below { .. } = look_at(&path, below)? {
                looks.insert(path, look);
            }
        }
    }
    Ok(looks)
}

fn parts_of(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

fn look_at(path: &[u8], below: &Below<'_>) -> Result<Look> {
    let parts = parts_of(path);
    match find(&parts, below)? {
        Found::Directory(dirs) => match dirs.first() {
            Some(top) => Ok(look_of(tree::meta(top.as_fd())?)),
            None => Ok(Look::Default),
        },
        Found::Symlink(_) => match resolve(parts, below)? {
            Some(target) => Ok(Look::Moved(target)),
            None => Ok(Look::Default),
        },
        Found::Nothing | Found::Other => Ok(Look::Default),
    }
}

fn look_of(mut meta: Meta) -> Look {
    meta.xattrs
        .retain(|(name, _)| !name.starts_with(b"trusted.overlay."));
    if (meta.mode, meta.uid, meta.gid) == (0o755, 0, 0) && meta.xattrs.is_empty() {
        return Look::Default;
    }
    Look::Below {
        mode: meta.mode,
        uid: meta.uid,
        gid: meta.gid,
        xattrs: meta.xattrs,
    }
}

/// Walks `parts` through the merged view of `below`, following no symlink.
fn find(parts: &[Vec<u8>], below: &Below<'_>) -> Result<Found> {
    let mut dirs = vec![];
    for root in below.roots {
        dirs.push(rustix::io::fcntl_dupfd_cloexec(root, 0)?);
    }
    for part in parts {
        let mut next = vec![];
        for dir in &dirs {
            let steps = below.steps.get() + 1;
            below.steps.set(steps);
            if steps > MAX_STEPS {
                return Err(Errno::OVERFLOW);
            }
            match tree::open(dir.as_fd(), part) {
                Ok(fd) => {
                    let hides = is_opaque(fd.as_fd())?;
                    next.push(fd);
                    if hides {
                        break;
                    }
                }
                Err(Errno::NOENT) => {}
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    if next.is_empty() {
                        return found_other(dir.as_fd(), part);
                    }
                    break;
                }
                Err(errno) => return Err(errno),
            }
        }
        if next.is_empty() {
            return Ok(Found::Nothing);
        }
        dirs = next;
    }
    Ok(Found::Directory(dirs))
}

fn found_other(dir: BorrowedFd<'_>, part: &[u8]) -> Result<Found> {
    let stat = rustix::fs::statat(dir, part, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => {
            Found::Symlink(rustix::fs::readlinkat(dir, part, vec![])?.into_bytes())
        }
        FileType::CharacterDevice if stat.st_rdev == 0 => Found::Nothing,
        _ => Found::Other,
    })
}

fn is_opaque(dir: BorrowedFd<'_>) -> Result<bool> {
    let mut value = [0; 4];
    match rustix::fs::fgetxattr(dir, OPAQUE, &mut value[..]) {
        Ok(length) => Ok(&value[..length] == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
        Err(Errno::RANGE) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Where `parts` leads in the merged view, every symlink followed inside it; `None`: not to a
/// directory, or to one that is too deep. What does not exist at all is taken as it is named.
fn resolve(parts: Vec<Vec<u8>>, below: &Below<'_>) -> Result<Option<Vec<u8>>> {
    let mut pending: Vec<_> = parts.into_iter().rev().collect();
    let mut path: Vec<Vec<u8>> = vec![];
    let mut links = 0;
    while let Some(part) = pending.pop() {
        if part == b".." {
            path.pop();
            continue;
        }
        path.push(part);
        if path.len() > MAX_DEPTH || pending.len() > 4 * MAX_DEPTH {
            return Ok(None);
        }
        match find(&path, below)? {
            Found::Directory(_) | Found::Nothing => {}
            Found::Other => return Ok(None),
            Found::Symlink(target) => {
                links += 1;
                if links > MAX_SYMLINKS {
                    return Ok(None);
                }
                path.pop();
                if target.starts_with(b"/") {
                    path.clear();
                }
                pending.extend(parts_of(&target).into_iter().rev());
            }
        }
    }
    Ok(Some(path.join(&b'/')))
}

/// Makes the tree `layer` look as `looks` asks. The directories must be the layer's own, not shared.
///
/// Blocks on the disk.
///
/// # Errors
///
/// Those of the system calls; the tree may be half-way then.
pub(crate) fn mend(layer: BorrowedFd<'_>, looks: &Looks) -> Result<()> {
    for (path, look) in looks {
        let mut parts = parts_of(path);
        let (Look::Moved(target), Some(name)) = (look, parts.pop()) else {
            continue;
        };
        let parent = descend(layer, &parts)?;
        let to = make_directories(layer, &parts_of(target))?;
        let from = tree::open(parent.as_fd(), &name)?;
        tree::merge(from.as_fd(), to.as_fd())?;
        tree::remove(parent.as_fd(), &name)?;
    }
    for (path, look) in looks {
        let Look::Below {
            mode,
            uid,
            gid,
            xattrs,
        } = look
        else {
            continue;
        };
        let dir = descend(layer, &parts_of(path))?;
        let meta = Meta {
            mode: *mode,
            uid: *uid,
            gid: *gid,
            xattrs: xattrs.clone(),
        };
        tree::describe(dir.as_fd(), &meta)?;
    }
    Ok(())
}

fn descend(root: BorrowedFd<'_>, parts: &[Vec<u8>]) -> Result<OwnedFd> {
    let mut dir = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
    for part in parts {
        dir = tree::open(dir.as_fd(), part)?;
    }
    Ok(dir)
}

fn make_directories(root: BorrowedFd<'_>, parts: &[Vec<u8>]) -> Result<OwnedFd> {
    let mut dir = rustix::io::fcntl_dupfd_cloexec(root, 0)?;
    for part in parts {
        match rustix::fs::mkdirat(&dir, &part[..], Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        dir = tree::open(dir.as_fd(), part)?;
    }
    Ok(dir)
}

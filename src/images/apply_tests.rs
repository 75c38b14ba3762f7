//! The unpacker against layers that are hostile, odd or large: the rows of the security history, and a
//! comparison with what tar(1) makes of the same bytes.

mod files;
mod links;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use crate::base::error::{HasKind as _, Kind};
use crate::images::ImageError;
use crate::images::apply::{Applied, open_root};
use crate::images::fixture::{Tar, gzip, header, seal};
use crate::images::unpack::{Unpacked, unpack};

/// A directory with a layer in it, and what must not be touched beside it.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("layer")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::File::create(directory.path().join("outside/victim")).unwrap();
        Self { directory }
    }

    fn layer(&self) -> PathBuf {
        self.directory.path().join("layer")
    }

    fn apply(&self, bytes: &[u8]) -> Result<Unpacked, ImageError> {
        unpack(bytes, open_root(&self.layer()).unwrap(), "layer", None)
    }

    fn is_intact(&self) {
        let outside = self.directory.path().join("outside");
        let names: Vec<_> = fs::read_dir(&outside)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["victim"]);
        let victim = fs::symlink_metadata(outside.join("victim")).unwrap();
        assert_eq!(
            (victim.len(), victim.mode() & 0o7777, victim.nlink()),
            (0, 0o644, 1)
        );
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
    }
}

fn applied(layer: Tar) -> (Place, Applied) {
    let place = Place::new();
    let unpacked = place.apply(&layer.end()).unwrap();
    place.is_intact();
    (place, unpacked.applied)
}

fn refused(layer: Tar, reason: &str) {
    let place = Place::new();
    let error = place.apply(&layer.end()).unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{error}");
    assert!(error.to_string().contains(reason), "{error}");
    place.is_intact();
}

fn is_whiteout(path: &Path) -> bool {
    let data = fs::symlink_metadata(path).unwrap();
    data.file_type().is_char_device() && data.rdev() == 0
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = [0; 256];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    Some(value[..length].to_vec())
}

fn is_opaque(path: &Path) -> bool {
    xattr(path, "trusted.overlay.opaque").as_deref() == Some(b"y")
}

#[test]
fn nothing_leaves_the_layer() {
    let up = "../".repeat(30);
    for path in ["../outside/x", "a/../../outside/x", "..", "a/.."] {
        refused(Tar::new().file(path, b"x"), "`..`");
    }
    refused(Tar::new().hard_link("x", "../outside/victim"), "`..`");
    refused(Tar::new().file(".wh...", b""), "whiteout without a name");
    refused(Tar::new().file(".wh..", b""), "whiteout without a name");
    refused(Tar::new().file(".wh.", b""), "whiteout without a name");
    refused(Tar::new().file("", b"x"), "root is no directory");
    refused(Tar::new().symlink(".", "x"), "root is no directory");
    // Through symlinks of the layer itself: they lead to the layer's own root, as in the container.
    for target in [
        "/outside",
        &format!("{up}outside"),
        "/proc/self/root/outside",
        "/../outside",
    ] {
        let tar = Tar::new()
            .symlink("link", target)
            .file("link/x", b"1")
            .file("link/sub/y", b"2");
        let (place, _) = applied(tar);
        let inside = target.trim_start_matches(['.', '/']);
        assert_eq!(
            fs::read(place.layer().join(inside).join("x")).unwrap(),
            b"1"
        );
    }
    for absolute in ["/etc/x", "//etc/x", "./etc//./x"] {
        let (place, _) = applied(Tar::new().file(absolute, b"x"));
        assert_eq!(fs::read(place.layer().join("etc/x")).unwrap(), b"x");
    }
}

#[test]
fn symlinks_are_replaced_not_followed() {
    let target = "/outside/victim";
    // A file, a directory, a device and a link over a symlink.
    let (place, _) = applied(
        Tar::new()
            .symlink("a", target)
            .file("a", b"own")
            .symlink("b", target)
            .node("b", b'6', 0, 0)
            .symlink("c", target)
            .symlink("c", "elsewhere")
            .symlink("d", target)
            .hard_link("d", "a"),
    );
    let layer = place.layer();
    assert_eq!(fs::read(layer.join("a")).unwrap(), b"own");
    assert!(
        fs::symlink_metadata(layer.join("b"))
            .unwrap()
            .file_type()
            .is_fifo()
    );
    assert_eq!(
        fs::read_link(layer.join("c")).unwrap(),
        Path::new("elsewhere")
    );
    assert_eq!(fs::symlink_metadata(layer.join("d")).unwrap().nlink(), 2);
    refused(
        Tar::new().symlink("loop", "loop").file("loop/x", b""),
        "40 symlinks",
    );
    refused(
        Tar::new().file("file", b"").file("file/x", b""),
        "no directory",
    );
    let many = (0..300).map(|_| "d").collect::<Vec<_>>().join("/");
    refused(
        Tar::new().pax(&[("path", many.as_bytes())]).file("x", b""),
        "256 components",
    );
}

#[test]
fn a_symlink_swapped_between_entries() {
    // The parent was a directory when it was made, and is a symlink later.
    let (place, _) = applied(
        Tar::new()
            .dir("a")
            .file("a/one", b"1")
            .symlink("a", "/outside")
            .file("a/two", b"2")
            .owned("a/two", b'6', 0o777, 0),
    );
    let layer = place.layer();
    assert!(fs::symlink_metadata(layer.join("a")).unwrap().is_symlink());
    assert!(layer.join("outside/two").exists());
}

#[test]
fn hard_links() {
    refused(
        Tar::new().hard_link("x", "/outside/victim"),
        "does not hold",
    );
    refused(Tar::new().hard_link("x", "absent"), "does not hold");
    refused(
        Tar::new()
            .symlink("s", "/outside")
            .hard_link("x", "s/victim"),
        "does not hold",
    );
    refused(
        Tar::new().node("n", b'3', 1, 3).hard_link("x", "n"),
        "device or directory",
    );
    refused(
        Tar::new().dir("d").hard_link("x", "d"),
        "device or directory",
    );
    refused(
        Tar::new().file(".wh.gone", b"").hard_link("x", ".wh.gone"),
        "whiteout",
    );
    refused(
        Tar::new().file("d/f", b"").hard_link("d", "d/f"),
        "own target",
    );
    let (place, applied) = applied(
        Tar::new()
            .file("f", b"data")
            .hard_link("/g", "/f")
            .hard_link("f", "f")
            .symlink("s", "/outside/victim")
            .hard_link("t", "s"),
    );
    let layer = place.layer();
    assert_eq!(fs::read(layer.join("g")).unwrap(), b"data");
    // One more name of the symlink, with nothing done to where it points.
    assert!(fs::symlink_metadata(layer.join("t")).unwrap().is_symlink());
    assert_eq!(applied.inodes, 3);
}

#[test]
fn whiteouts_and_opaque_directories() {
    let (place, applied) = applied(
        Tar::new()
            .file(".wh.gone", b"")
            .file("dir/.wh..wh..opq", b"")
            .file("dir/kept", b"k")
            .file("file", b"f")
            .file(".wh.file", b"")
            .file("both/x", b"x")
            .file(".wh.both", b"")
            .file(".wh.again", b"")
            .file("again/x", b"x")
            .file(".wh.twice", b"")
            .file(".wh.twice", b"")
            .file(".wh.now", b"")
            .file("now", b"n")
            .file(".wh..wh.plnk/1.2", b"")
            .file(".wh..wh.aufs", b""),
    );
    let layer = place.layer();
    assert!(is_whiteout(&layer.join("gone")) && is_whiteout(&layer.join("twice")));
    assert!(is_opaque(&layer.join("dir")) && layer.join("dir/kept").exists());
    // A whiteout speaks of the layers below, whatever the order.
    assert_eq!(fs::read(layer.join("file")).unwrap(), b"f");
    assert!(is_opaque(&layer.join("both")) && layer.join("both/x").exists());
    assert!(is_opaque(&layer.join("again")) && layer.join("again/x").exists());
    assert_eq!(fs::read(layer.join("now")).unwrap(), b"n");
    assert_eq!(fs::read_dir(&layer).unwrap().count(), 7);
    assert!(!applied.opaque_root);
    assert!(applied.implied.contains(&b"dir"[..]) && !applied.implied.contains(&b"both"[..]));
    // Through a symlink the marker goes to the directory of the layer that it leads to.
    let (place, _) = self::applied(
        Tar::new()
            .dir("real")
            .symlink("link", "/real")
            .file("link/.wh..wh..opq", b""),
    );
    assert!(is_opaque(&place.layer().join("real")));
    let (_, root) = self::applied(Tar::new().file(".wh..wh..opq", b""));
    assert!(root.opaque_root);
}

#[test]
fn attributes_that_would_fool_the_kernel_are_dropped() {
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut namespaced = capability.to_vec();
    namespaced[3] = 3;
    namespaced.extend_from_slice(&1000u32.to_le_bytes());
    let (place, _) = applied(
        Tar::new()
            .pax(&[
                ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
                ("SCHILY.xattr.trusted.mine", b"x"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
                ("SCHILY.xattr.security.selinux", b"x"),
                ("SCHILY.xattr.user.kept", b"v\0v"),
            ])
            .dir("d")
            .pax(&[("SCHILY.xattr.security.capability", &capability)])
            .file("cap", b"x")
            .pax(&[("SCHILY.xattr.security.capability", &namespaced)])
            .file("cap3", b"x"),
    );
    let layer = place.layer();
    for name in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.mine",
        "user.overlay.opaque",
        "security.selinux",
    ] {
        assert_eq!(xattr(&layer.join("d"), name), None, "{name}");
    }
    assert_eq!(xattr(&layer.join("d"), "user.kept").unwrap(), b"v\0v");
    assert_eq!(
        xattr(&layer.join("cap"), "security.capability").unwrap(),
        capability
    );
    assert_eq!(xattr(&layer.join("cap3"), "security.capability"), None);
}

#[test]
fn malformed_archives() {
    let mut sum = header(b"x", b'0', 0);
    sum[0] = b'y';
    refused(Tar::new().raw(&sum), "checksum");
    let mut number = header(b"x", b'0', 0);
    number[124..136].copy_from_slice(b"99999999999\0");
    seal(&mut number);
    refused(Tar::new().raw(&number), "number");
    refused(Tar::new().raw(&header(b"long", b'L', 2 << 20)), "1 MiB");
    refused(Tar::new().pax(&[("path", b"a\0b")]).file("x", b""), "NUL");
    refused(
        Tar::new().pax(&[("path", &[b'a'; 5000])]).file("x", b""),
        "4096",
    );
    refused(
        Tar::new().pax(&[("path", &[b'a'; 300])]).file("x", b""),
        "name too long",
    );
    refused(
        Tar::new().pax(&[("size", b"-1")]).file("x", b""),
        "bad value",
    );
    refused(
        Tar::new()
            .pax(&[("size", b"99999999999999999999999")])
            .file("x", b""),
        "bad value",
    );
    refused(
        Tar::new()
            .raw(&header(b"pax", b'x', 10))
            .raw(b"99 path=x\n"),
        "extended header",
    );
    let storm = (0..20).fold(Tar::new(), |tar, _| tar.pax(&[("comment", b"x")]));
    refused(storm.file("x", b""), "too many headers");
    refused(Tar::new().raw(&[0; 512]).file("x", b""), "end mark");
    let place = Place::new();
    for length in [100, 600, 1100] {
        let whole = Tar::new().file("x", &[1; 2000]).end();
        let error = place.apply(&whole[..length]).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
    }
    // The size of a PAX header counts for the data and for where the next header is.
    let hidden = Tar::new().file("evil", b"x").0;
    let mut lying = Tar::new().pax(&[("size", hidden.len().to_string().as_bytes())]);
    lying = lying
        .raw(&header(b"outer", b'0', 0))
        .raw(&hidden)
        .file("after", b"");
    let (place, _) = applied(lying);
    assert_eq!(fs::read(place.layer().join("outer")).unwrap(), hidden);
    assert!(place.layer().join("after").exists() && !place.layer().join("evil").exists());
}

#[test]
fn decompression_bombs_and_unknown_compressions() {
    let place = Place::new();
    let mut bomb = zstd::stream::write::Encoder::new(vec![], 1).unwrap();
    std::io::copy(
        &mut std::io::Cursor::new(header(b"zeros", b'0', 200 << 20))
            .chain(std::io::repeat(0).take(200 << 20)),
        &mut bomb,
    )
    .unwrap();
    let error = place.apply(&bomb.finish().unwrap()).unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    let error = place.apply(b"\xfd7zXZ\0rest").unwrap_err();
    assert_eq!(error.kind(), Kind::Unimplemented);
    let tar = Tar::new().file("x", &[7; 100_000]).end();
    let packed = gzip(&tar);
    for bad in [
        &packed[..packed.len() / 2],
        &packed[..5],
        &[&packed[..], b"trailing"].concat(),
    ] {
        assert_eq!(place.apply(bad).unwrap_err().kind(), Kind::InvalidArgument);
    }
    // Several members are one stream, and an empty layer is one.
    let (one, two) = tar.split_at(3000);
    Place::new()
        .apply(&[gzip(one), gzip(two)].concat())
        .unwrap();
    assert_eq!(Place::new().apply(b"").unwrap().applied.inodes, 1);
}

#[test]
fn a_full_disk_is_said_so() {
    let place = Place::new();
    let layer = place.layer();
    mount_small(&layer);
    let outcome = place.apply(&Tar::new().file("big", &vec![1; 4 << 20]).end());
    rustix::mount::unmount(&layer, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(outcome.unwrap_err().kind(), Kind::ResourceExhausted);
}

fn mount_small(at: &Path) {
    let flags = rustix::mount::MountFlags::empty();
    let options = c"size=1m";
    rustix::mount::mount("tmpfs", at, "tmpfs", flags, options).unwrap();
}

#[test]
fn many_entries_take_linear_time() {
    // Wide, deep and repeated: each of these was quadratic somewhere once.
    let name = |n: usize| format!("directory/{n:07}");
    let wide = (0..20_000).fold(Tar::new(), |tar, n| tar.file(&name(n), b""));
    let whiteouts = (0..20_000).fold(Tar::new(), |tar, n| tar.file(&format!("d/.wh.{n}"), b""));
    let deep = vec!["d"; 40].join("/");
    let deep = (0..5_000).fold(Tar::new(), |tar, n| {
        tar.file(&format!("{deep}/{n}"), b"")
            .file(&format!("e/{n}"), b"")
    });
    let again = (0..5_000).fold(Tar::new(), |tar, n| {
        tar.dir("x")
            .dir(&format!("x/{n}"))
            .file("y", b"")
            .symlink("y", "z")
    });
    for (tar, inodes) in [
        (wide, 20_002),
        (whiteouts, 20_002),
        (deep, 10_042),
        (again, 5_003),
    ] {
        let (_place, applied) = applied(tar);
        assert!(applied.inodes >= inodes, "{}", applied.inodes);
    }
}

#[test]
fn two_layers_race_and_neither_leaves() {
    let place = Place::new();
    let other = place.directory.path().join("outside");
    let tar = |n: usize| {
        let link = if n.is_multiple_of(2) {
            "/outside"
        } else {
            "../outside"
        };
        Tar::new()
            .dir("a")
            .symlink("a", link)
            .file("a/x", b"x")
            .dir("a")
            .file("a/y", b"y")
            .end()
    };
    std::thread::scope(|scope| {
        for n in 0..4 {
            let layer = place.layer().join(n.to_string());
            scope.spawn(move || {
                for _ in 0..50 {
                    fs::create_dir(&layer).unwrap();
                    unpack(&tar(n)[..], open_root(&layer).unwrap(), "layer", None).unwrap();
                    crate::images::tree::remove_path(&layer).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read_dir(other).unwrap().count(), 1);
}

type Listing = BTreeMap<PathBuf, (u32, u32, u64, i64, Vec<u8>)>;

fn holes_dir(path: &Path) -> std::os::fd::OwnedFd {
    open_root(path).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the bytes: an answer, and nothing outside.
    #[test]
    fn any_bytes_and_any_mutation(
        noise in proptest::collection::vec(any::<u8>(), 0..2000),
        at in 0usize..6000,
        value: u8,
        fix: bool,
    ) {
        let place = Place::new();
        let _outcome = place.apply(&noise).is_ok();
        let mut tar = Tar::new()
            .dir("d")
            .symlink("d/up", "../../outside")
            .pax(&[("path", b"d/up/file"), ("size", b"3")])
            .file("x", b"abc")
            .hard_link("d/h", "d/up")
            .file("d/.wh.gone", b"")
            .end();
        let at = at % tar.len();
        tar[at] = value;
        if fix {
            let start = at / 512 * 512;
            let mut block = [0; 512];
            block.copy_from_slice(&tar[start..start + 512]);
            seal(&mut block);
            tar[start..start + 512].copy_from_slice(&block);
        }
        let place = Place::new();
        let _outcome = place.apply(&tar).is_ok();
        place.is_intact();
    }
}

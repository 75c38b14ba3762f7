//! Directories whose names are taken by links and other things of the same layer.

use super::*;

fn look(path: &Path) -> (bool, u32, u32) {
    let data = fs::symlink_metadata(path).unwrap();
    (data.is_dir(), data.mode() & 0o7777, data.uid())
}

/// What a directory's entry gives it must not land on what a link of that name led to.
#[test]
fn a_directory_takes_the_place_of_what_has_its_name() {
    for name in ["d", "./d/", "/d", "d/.", ".//d//"] {
        for target in ["real", "/real", "./real/", "/", "../..", "gone", "d"] {
            let (place, applied) = applied(
                Tar::new()
                    .owned("real", b'5', 0o700, 0)
                    .file("real/kept", b"k")
                    .symlink("d", target)
                    .pax(&[("SCHILY.xattr.user.of", b"d")])
                    .owned(name, b'5', 0o2777, 1234)
                    .file("d/new", b"n"),
            );
            let layer = place.layer();
            let (own, real) = (look(&layer.join("d")), look(&layer.join("real")));
            assert_eq!(own, (true, 0o2777, 1234), "{name} {target}");
            assert_eq!(real, (true, 0o700, 0), "{name} {target}");
            for other in [layer.join("real"), layer.clone()] {
                assert_eq!(xattr(&other, "user.of"), None, "{name} {target}");
                assert!(!other.join("new").exists(), "{name} {target}");
            }
            assert!(layer.join("d/new").exists() && !layer.join("gone").exists());
            assert!(applied.implied.contains(&b""[..]), "the root was described");
            // The root, `real` and what is in it, `d` and what is in it.
            assert_eq!(applied.inodes, 5, "{name} {target}");
        }
    }
}

#[test]
fn a_directory_takes_the_place_of_anything() {
    // Anything else that has the name, too; what the link led to, it still leads to by its other name.
    let (place, _) = applied(
        Tar::new()
            .file("file", b"1")
            .dir("file")
            .node("pipe", b'6', 0, 0)
            .dir("pipe/")
            .node("device", b'3', 1, 3)
            .dir("device")
            .symlink("s", "/outside")
            .hard_link("t", "s")
            .dir("t")
            .file(".wh.gone", b"")
            .dir("gone")
            .dir("twice")
            .file("twice/kept", b"k")
            .dir("twice"),
    );
    let layer = place.layer();
    for name in ["file", "pipe", "device", "t", "gone", "twice"] {
        assert!(look(&layer.join(name)).0, "{name}");
    }
    assert!(fs::symlink_metadata(layer.join("s")).unwrap().is_symlink());
    assert!(is_opaque(&layer.join("gone")) && layer.join("twice/kept").exists());
    // Parents through a link lead where it leads, inside the layer; the end does not.
    let (place, _) = applied(
        Tar::new()
            .dir("real")
            .symlink("link", "/real")
            .symlink("real/end", "/outside")
            .owned("link/end", b'5', 0o711, 7),
    );
    assert_eq!(
        look(&place.layer().join("real/end")).1,
        0o711,
        "through the parent"
    );
    assert!(!place.layer().join("outside").exists());
    // Times are set last: not through what has taken the place of a directory meanwhile.
    let (place, _) = applied(
        Tar::new()
            .dir("a")
            .dir("a/b")
            .owned("real", b'5', 0o700, 0)
            .symlink("a", "real")
            .dir("real/b"),
    );
    assert!(
        fs::symlink_metadata(place.layer().join("a"))
            .unwrap()
            .is_symlink()
    );
}

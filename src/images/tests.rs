//! The store as a whole: import, names, holds, restart, removal.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::base::error::{HasKind as _, Kind};
use crate::base::id::{ContainerId, Id};
use crate::images::fixture::{Tar, TestImage, file_of, gzip, left_in, store};

fn holder(byte: u8) -> ContainerId {
    ContainerId(Id::from_bytes([byte; 32]))
}

fn sample(note: &str) -> TestImage {
    let base = Tar::new()
        .dir("bin")
        .file("bin/sh", b"#!")
        .dir("etc")
        .file("etc/os", b"x")
        .end();
    let top = Tar::new().file("etc/note", note.as_bytes()).end();
    TestImage::new(note, &[base, top])
}

#[tokio::test]
async fn both_archive_forms_from_files_and_pipes() {
    let place = tempfile::tempdir().unwrap();
    let store = store(place.path());
    let image = sample("one");
    let docker = image.docker_archive(&["busybox:1", "localhost/x:2"]);
    let all = store.import(file_of(&docker), None, None).await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].id, image.id());
    assert_eq!(
        all[0].repo_tags,
        ["docker.io/library/busybox:1", "localhost/x:2"]
    );
    assert_eq!(all[0].config.user, "1002:1003");
    let oci = gzip(&image.oci_archive("r.io/a:3"));
    let (reader, mut writer) = std::io::pipe().unwrap();
    let feeder = std::thread::spawn(move || writer.write_all(&oci));
    let pipe = fs::File::from(std::os::fd::OwnedFd::from(reader));
    let (send, mut steps) = tokio::sync::mpsc::channel(100);
    let all = store.import(pipe, None, Some(send)).await.unwrap();
    feeder.join().unwrap().unwrap();
    assert_eq!(all[0].id, image.id());
    assert_eq!(all[0].repo_tags.len(), 3);
    assert_eq!(all[0].repo_digests, [format!("r.io/a@{}", image.digest())]);
    let mut told = 0;
    while let Some(step) = steps.recv().await {
        told += usize::from(matches!(
            step,
            crate::base::image::Progress::Layer { done: true, .. }
        ));
    }
    assert_eq!(told, 2);
    assert_eq!(store.list().len(), 1);
    // One copy of each layer, however often it was imported.
    assert_eq!(
        fs::read_dir(place.path().join("layers")).unwrap().count(),
        3
    );
}

#[tokio::test]
async fn names_find_their_image() {
    let place = tempfile::tempdir().unwrap();
    let store = store(place.path());
    let image = sample("one");
    store
        .import(file_of(&image.oci_archive("busybox")), None, None)
        .await
        .unwrap();
    let id = image.id();
    let digest = image.digest();
    for reference in [
        id.as_str(),
        &id[7..],
        &id[7..17],
        &id[..17],
        "busybox",
        "busybox:latest",
        "docker.io/library/busybox",
        "index.docker.io/library/busybox:latest",
        &format!("busybox@{digest}"),
        &format!("busybox:any@{digest}"),
    ] {
        assert_eq!(
            store.find(reference).map(|i| i.id.clone()).as_ref(),
            Some(&id),
            "{reference}"
        );
    }
    for reference in [
        "",
        "busy",
        "busybox:2",
        "a/busybox",
        "sha256:",
        "UPPER",
        &"0".repeat(64),
        "ab",
    ] {
        assert!(store.find(reference).is_none(), "{reference}");
    }
}

#[tokio::test]
async fn a_tag_moves_and_all_names_go() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let (one, two) = (sample("one"), sample("two"));
    images
        .import(file_of(&one.oci_archive("a:1")), None, None)
        .await
        .unwrap();
    images
        .import(file_of(&one.oci_archive("b:1")), None, None)
        .await
        .unwrap();
    images
        .import(file_of(&two.oci_archive("a:1")), None, None)
        .await
        .unwrap();
    assert_eq!(images.find("a:1").unwrap().id, two.id());
    assert_eq!(
        images.find(&one.id()).unwrap().repo_tags,
        ["docker.io/library/b:1"]
    );
    images.remove("b:1").await.unwrap();
    assert!(images.find(&one.id()).is_none());
    assert_eq!(images.list().len(), 1);
    images.remove(&two.id()).await.unwrap();
    images.remove("never:there").await.unwrap();
    assert!(images.list().is_empty());
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    assert_eq!(left_in(place.path()), Vec::<String>::new());
}

#[tokio::test]
async fn held_layers_outlive_their_image_and_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let image = sample("one");
    images
        .import(file_of(&image.docker_archive(&["a"])), None, None)
        .await
        .unwrap();
    let held = images.hold(&image.id(), holder(1)).unwrap();
    assert_eq!(held.lower.len(), 2);
    assert_eq!(fs::read(held.lower[0].join("etc/note")).unwrap(), b"one");
    images.remove("a").await.unwrap();
    assert!(held.lower.iter().all(|path| path.exists()));
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    drop(images);
    // As after kill -9: the container is known to the engine only.
    let images = store(place.path());
    images.adopt_hold(holder(1), &held);
    images.collect().await.unwrap();
    assert!(held.lower.iter().all(|path| path.exists()));
    images.release(&holder(1));
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    assert_eq!(left_in(place.path()), Vec::<String>::new());
}

#[tokio::test]
async fn images_survive_a_restart_and_half_made_things_do_not() {
    let place = tempfile::tempdir().unwrap();
    let image = sample("one");
    {
        let images = store(place.path());
        images
            .import(file_of(&image.docker_archive(&["a"])), None, None)
            .await
            .unwrap();
        images
            .tasks()
            .shutdown(std::time::Duration::from_secs(60))
            .await;
    }
    fs::create_dir_all(place.path().join("layers/new-77/x")).unwrap();
    fs::create_dir_all(place.path().join("layers/78/x")).unwrap();
    fs::File::create(place.path().join("images/blob/00")).unwrap();
    let images = store(place.path());
    assert_eq!(images.find("a").unwrap().id, image.id());
    assert!(!place.path().join("layers/78").exists());
    assert!(!place.path().join("layers/new-77").exists());
    assert!(!place.path().join("images/blob/00").exists());
    images.collect().await.unwrap();
    images.remove("a").await.unwrap();
    assert_eq!(left_in(place.path()), Vec::<String>::new());
}

#[tokio::test]
async fn what_no_sync_confirmed_is_void_after_a_reboot() {
    let place = tempfile::tempdir().unwrap();
    let image = sample("one");
    {
        let images = store(place.path());
        images
            .import(file_of(&image.docker_archive(&["a"])), None, None)
            .await
            .unwrap();
        images
            .tasks()
            .shutdown(std::time::Duration::from_secs(60))
            .await;
    }
    // Settled: no boot in the record.
    let record = place
        .path()
        .join("images/image")
        .join(format!("{}.json", &image.id()[7..]));
    assert!(
        fs::read_to_string(&record)
            .unwrap()
            .contains(r#""boot":null"#)
    );
    let layers = crate::images::layers::Layers::open(place.path(), "another boot").unwrap();
    assert!(layers.usage().1 > 3);
    drop(layers);
    // Not settled: an unpacked layer of another boot goes.
    let layers = crate::images::layers::Layers::open(place.path(), "one").unwrap();
    let new = layers.begin().unwrap();
    let digest = crate::images::digest::Digest::of(b"x");
    let lease = layers.admit(new, digest, Default::default()).unwrap();
    let path = place.path().join("layers").join(lease.number().to_string());
    assert!(path.exists());
    drop((lease, layers));
    let layers = crate::images::layers::Layers::open(place.path(), "two").unwrap();
    assert!(layers.find(&digest).is_none() && !path.exists());
}

#[test]
fn a_layer_collected_while_it_is_settled_leaves_no_record() {
    let place = tempfile::tempdir().unwrap();
    drop(store(place.path()));
    let layers = crate::images::layers::Layers::open(place.path(), "boot").unwrap();
    let digest = crate::images::digest::Digest::of(b"x");
    for _ in 0..300 {
        let new = layers.begin().unwrap();
        let lease = layers.admit(new, digest, Default::default()).unwrap();
        let number = lease.number();
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                layers.settle(&[number]).unwrap();
            });
            start.wait();
            drop(lease);
            layers.collect(&|| false).unwrap();
        });
        assert_eq!(left_in(place.path()), Vec::<String>::new());
    }
}

#[test]
fn layers_are_collected_by_several_at_once() {
    let place = tempfile::tempdir().unwrap();
    drop(store(place.path()));
    let layers = crate::images::layers::Layers::open(place.path(), "boot").unwrap();
    let digest = crate::images::digest::Digest::of(b"x");
    for _ in 0..100 {
        let leases = [(); 4].map(|()| {
            let new = layers.begin().unwrap();
            let lease = layers.admit(new, digest, Default::default()).unwrap();
            let path = place.path().join("layers").join(lease.number().to_string());
            fs::create_dir_all(path.join("a/b/c")).unwrap();
            lease
        });
        let start = std::sync::Barrier::new(leases.len());
        std::thread::scope(|scope| {
            for lease in leases {
                let (layers, start) = (&layers, &start);
                scope.spawn(move || {
                    start.wait();
                    drop(lease);
                    layers.collect(&|| false).unwrap();
                });
            }
        });
        assert_eq!(left_in(place.path()), Vec::<String>::new());
    }
}

#[tokio::test]
async fn bad_archives_leave_nothing() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let good = sample("one").docker_archive(&["a"]);
    let mut wrong = sample("two");
    wrong.plain[1] = Tar::new().file("etc/note", b"forged").end();
    let mut forged = sample("three");
    forged.layers[0] = gzip(&Tar::new().file("bin/sh", b"forged").end());
    let forged_oci = {
        // The right name, the wrong content.
        let image = sample("three");
        let (from, to) = (&image.layers[0], &forged.layers[0]);
        let path = format!(
            "blobs/sha256/{}",
            crate::images::digest::Digest::of(from).hex()
        );
        let mut tar = Tar(image.oci_archive("a"));
        tar.0.truncate(tar.0.len() - 1024);
        tar.file(&path, to).end()
    };
    for (archive, kind) in [
        (b"".to_vec(), Kind::InvalidArgument),
        (vec![b'x'; 5000], Kind::InvalidArgument),
        (good[..good.len() / 2].to_vec(), Kind::InvalidArgument),
        (gzip(&good)[..300].to_vec(), Kind::InvalidArgument),
        (b"\xfd7zXZ\0 and more".to_vec(), Kind::Unimplemented),
        (Tar::new().file("a", b"x").end(), Kind::InvalidArgument),
        (
            Tar::new().file("manifest.json", b"{").end(),
            Kind::InvalidArgument,
        ),
        (
            Tar::new()
                .file(
                    "manifest.json",
                    br#"[{"Config":"/etc/passwd","Layers":[]}]"#,
                )
                .end(),
            Kind::InvalidArgument,
        ),
        (wrong.docker_archive(&["a"]), Kind::FailedPrecondition),
        (forged_oci, Kind::FailedPrecondition),
        (
            sample("x").docker_archive(&["Not A Name"]),
            Kind::InvalidArgument,
        ),
    ] {
        let size = archive.len();
        let error = images
            .import(file_of(&archive), None, None)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), kind, "{size}: {error}");
        assert!(images.list().is_empty());
        assert_eq!(left_in(place.path()), Vec::<String>::new(), "{error}");
    }
}

fn du(path: &Path) -> (u64, u64) {
    crate::images::tree::usage(path).unwrap()
}

#[tokio::test]
async fn usage_is_what_du_says() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let mut tar = Tar::new();
    for at in 0..400 {
        let directory = format!("d{}", at % 20);
        if at < 20 {
            tar = tar.dir(&directory);
        }
        let data = vec![7; at * 100];
        tar = tar.file(&format!("{directory}/f{at}"), &data);
        tar = tar.hard_link(&format!("{directory}/l{at}"), &format!("{directory}/f{at}"));
        tar = tar.symlink(&format!("{directory}/s{at}"), "elsewhere");
    }
    let image = TestImage::new(
        "du",
        &[tar.end(), Tar::new().file("implied/dir/x", b"x").end()],
    );
    images
        .import(file_of(&image.docker_archive(&["a"])), None, None)
        .await
        .unwrap();
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    let (ours, theirs) = (images.fs_usage(), du(place.path()));
    let near = |a: u64, b: u64| a.abs_diff(b) * 20 <= b;
    assert!(near(ours.used_bytes, theirs.0), "{ours:?} {theirs:?}");
    assert!(near(ours.inodes_used, theirs.1), "{ours:?} {theirs:?}");
}

#[tokio::test]
async fn implied_directories_look_as_the_layers_below_have_them() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let shared = Tar::new()
        .file("home/user/file", b"x")
        .file("lib/new", b"l")
        .end();
    let base = |mode, id| {
        Tar::new()
            .dir("home")
            .owned("home/user", b'5', mode, id)
            .dir("lib")
            .end()
    };
    let linked = Tar::new()
        .dir("home")
        .owned("home/user", b'5', 0o2750, 7)
        .dir("usr")
        .owned("usr/lib", b'5', 0o711, 3)
        .symlink("lib", "usr/lib")
        .end();
    let look = |lower: &Path, path: &str| {
        let data = fs::symlink_metadata(lower.join(path)).unwrap();
        (data.mode() & 0o7777, data.uid())
    };
    for (note, below, expected) in [
        ("plain", base(0o755, 0), (0o755, 0)),
        ("private", base(0o700, 5), (0o700, 5)),
        ("linked", linked, (0o2750, 7)),
        ("absent", Tar::new().end(), (0o755, 0)),
        ("private again", base(0o700, 5), (0o700, 5)),
    ] {
        let image = TestImage::new(note, &[below, shared.clone()]);
        images
            .import(file_of(&image.docker_archive(&[])), None, None)
            .await
            .unwrap();
        let lower = images.hold(&image.id(), holder(1)).unwrap().lower;
        assert_eq!(look(&lower[0], "home/user"), expected, "{note}");
        assert_eq!(
            fs::read(lower[0].join("home/user/file")).unwrap(),
            b"x",
            "{note}"
        );
        if note == "linked" {
            assert_eq!(fs::read(lower[0].join("usr/lib/new")).unwrap(), b"l");
            assert_eq!(look(&lower[0], "usr/lib"), (0o711, 3));
            assert!(!lower[0].join("lib").exists());
        } else {
            assert_eq!(fs::read(lower[0].join("lib/new")).unwrap(), b"l", "{note}");
        }
    }
    images.release(&holder(1));
    for image in images.list() {
        images.remove(&image.id).await.unwrap();
    }
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    assert_eq!(left_in(place.path()), Vec::<String>::new());
}

/// A layer as deep as one may be, which looks otherwise on each of two others; and links that lead deeper.
#[tokio::test]
async fn deep_layers_are_made_to_fit_and_removed() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let path = format!("{}x", "d/".repeat(240));
    let deep = Tar::new()
        .pax(&[("path", path.as_bytes())])
        .file("x", b"x")
        .end();
    for (note, mode) in [("plain", 0o755_u32), ("private", 0o700), ("open", 0o777)] {
        let below = Tar::new().owned("d", b'5', u64::from(mode), 1).end();
        let image = TestImage::new(note, &[below, deep.clone()]);
        images
            .import(file_of(&image.docker_archive(&[])), None, None)
            .await
            .unwrap();
        let lower = images.hold(&image.id(), holder(1)).unwrap().lower;
        let top = fs::symlink_metadata(lower[0].join("d")).unwrap();
        assert_eq!((top.mode() & 0o7777, top.uid()), (mode, 1), "{note}");
        assert!(lower[0].join(&path).exists(), "{note}");
    }
    // 30 links, each through the next one: 30,000 directories in each other.
    let mut links = Tar::new();
    for number in 0..30 {
        let target = format!("l{}{}", number + 1, "/n".repeat(1000));
        links = links.pax(&[("linkpath", target.as_bytes())]);
        links = links.symlink(&format!("l{number}"), "n");
    }
    let image = TestImage::new("links", &[links.end(), Tar::new().file("l0/x", b"x").end()]);
    images
        .import(file_of(&image.docker_archive(&[])), None, None)
        .await
        .unwrap();
    let lower = images.hold(&image.id(), holder(1)).unwrap().lower;
    assert!(lower[0].join("l0/x").exists(), "it stays where it is");
    images.release(&holder(1));
    for image in images.list() {
        images.remove(&image.id).await.unwrap();
    }
    images
        .tasks()
        .shutdown(std::time::Duration::from_secs(60))
        .await;
    assert_eq!(left_in(place.path()), Vec::<String>::new());
}

#[tokio::test]
async fn chains_as_overlayfs_takes_them() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let (a, b) = (
        Tar::new().file("a", b"1").end(),
        Tar::new().file("b", b"2").end(),
    );
    let hides = Tar::new().file(".wh..wh..opq", b"").file("c", b"3").end();
    for (note, layers, count) in [
        ("none", vec![], 1),
        ("twice", vec![a.clone(), b.clone(), a.clone()], 2),
        ("opaque", vec![a, b, hides], 1),
    ] {
        let image = TestImage::new(note, &layers);
        images
            .import(file_of(&image.docker_archive(&[])), None, None)
            .await
            .unwrap();
        let held = images.hold(&image.id(), holder(9)).unwrap();
        assert_eq!(held.lower.len(), count, "{note}");
        assert!(held.lower.iter().all(|path| path.is_dir()));
    }
}

/// Documents of an archive are read into memory only up to their limits (CVE-2023-25153).
#[tokio::test]
async fn documents_of_an_archive_are_bounded() {
    let place = tempfile::tempdir().unwrap();
    let images = store(place.path());
    let long = vec![b' '; (8 << 20) + 1];
    let one = r#"[{"Config":"config.json","RepoTags":["a"],"Layers":[]}]"#;
    let entry = format!(
        r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":2}}"#,
        crate::images::digest::Digest::of(b"{}")
    );
    let many = format!(
        r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
        vec![entry; 1001].join(",")
    );
    let layout = || Tar::new().file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    for (what, archive, limit) in [
        (
            "manifest",
            Tar::new().file("manifest.json", &long),
            "8388608 bytes",
        ),
        (
            "config",
            Tar::new()
                .file("config.json", &long)
                .file("manifest.json", one.as_bytes()),
            "8388608 bytes",
        ),
        ("index", layout().file("index.json", &long), "8388608 bytes"),
        (
            "entries",
            layout().file("index.json", many.as_bytes()),
            "1000 images",
        ),
    ] {
        let archive = file_of(&archive.end());
        let error = images.import(archive, None, None).await.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{what}: {error}");
        assert!(error.to_string().contains(limit), "{what}: {error}");
        assert!(images.list().is_empty(), "{what}");
        assert_eq!(left_in(place.path()), Vec::<String>::new(), "{error}");
    }
}

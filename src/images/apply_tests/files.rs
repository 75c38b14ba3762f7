//! Metadata, holes, devices, and what tar(1) makes of the same.

use super::*;

#[test]
fn devices_within_their_range() {
    for (major, minor) in [(4096, 0), (1, 0x10_0000), (0o7777777, 0), (1, 0o7777777)] {
        refused(Tar::new().node("n", b'3', major, minor), "out of range");
    }
    let (place, _) = applied(
        Tar::new()
            .node("c", b'3', 1, 3)
            .node("b", b'4', 4095, 0xf_ffff),
    );
    let data = fs::symlink_metadata(place.layer().join("b")).unwrap();
    assert!(data.file_type().is_block_device());
    assert_eq!(data.rdev(), rustix::fs::makedev(4095, 0xf_ffff));
    refused(Tar::new().owned("x", b'Z', 0o644, 0), "unknown type");
}

#[test]
fn metadata_of_every_kind() {
    let (place, applied) = applied(
        Tar::new()
            .owned("d", b'5', 0o2751, 42)
            .owned("d/setuid", b'0', 0o6755, 7)
            .owned("pipe", b'6', 0o640, 9)
            .pax(&[("mtime", b"-1.5"), ("uid", b"4000000000")])
            .file("d/old", b"x")
            .file("d/new", b"y"),
    );
    let look = |name: &str| {
        let data = fs::symlink_metadata(place.layer().join(name)).unwrap();
        (data.mode() & 0o7777, data.uid(), data.gid())
    };
    assert_eq!(look("d"), (0o2751, 42, 42));
    assert_eq!(look("d/setuid"), (0o6755, 7, 7));
    assert_eq!(look("pipe"), (0o640, 9, 9));
    assert_eq!(look("d/new"), (0o644, 0, 0));
    let old = fs::symlink_metadata(place.layer().join("d/old")).unwrap();
    assert_eq!(
        (old.mtime(), old.mtime_nsec(), old.uid()),
        (-2, 500_000_000, 4_000_000_000)
    );
    // The time of a directory is its own, not that of its last entry.
    assert_eq!(
        fs::metadata(place.layer().join("d")).unwrap().mtime(),
        1_600_000_000
    );
    assert_eq!(applied.implied.len(), 1);
    refused(
        Tar::new().pax(&[("uid", b"4294967295")]).file("x", b""),
        "4294967294",
    );
}

/// A sparse file in each of the forms there are: 1 MiB with "ab" at 4096 and "cd" at its end.
fn sparse_forms() -> Vec<(&'static str, Tar)> {
    let end = (1 << 20) - 2;
    let size: &[u8] = b"1048576";
    let offset = end.to_string();
    let map = format!("4096,2,{end},2");
    let mut old = header(b"f", b'S', 4);
    for (at, (offset, length)) in [(4096, 2), (end, 2)].into_iter().enumerate() {
        let field = 386 + 24 * at;
        old[field..field + 12].copy_from_slice(format!("{offset:011o}\0").as_bytes());
        old[field + 12..field + 24].copy_from_slice(format!("{length:011o}\0").as_bytes());
    }
    old[483..495].copy_from_slice(format!("{:011o}\0", 1 << 20).as_bytes());
    old[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut old);
    let in_data = format!("2\n4096\n2\n{end}\n2\n");
    let mut body = in_data.into_bytes();
    body.resize(512, 0);
    body.extend_from_slice(b"abcd");
    vec![
        ("old GNU", Tar::new().raw(&old).raw(b"abcd")),
        (
            "PAX 0.0",
            Tar::new()
                .pax(&[
                    ("GNU.sparse.size", size),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.offset", b"4096"),
                    ("GNU.sparse.numbytes", b"2"),
                    ("GNU.sparse.offset", offset.as_bytes()),
                    ("GNU.sparse.numbytes", b"2"),
                ])
                .file("f", b"abcd"),
        ),
        (
            "PAX 0.1",
            Tar::new()
                .pax(&[
                    ("GNU.sparse.size", size),
                    ("GNU.sparse.map", map.as_bytes()),
                ])
                .file("f", b"abcd"),
        ),
        (
            "PAX 1.0",
            Tar::new()
                .pax(&[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"f"),
                    ("GNU.sparse.realsize", size),
                ])
                .file("GNUSparseFile.0/f", &body),
        ),
    ]
}

#[test]
fn sparse_files() {
    for (form, tar) in sparse_forms() {
        let (place, _) = applied(tar.file("next", b"n"));
        let content = fs::read(place.layer().join("f")).unwrap();
        assert_eq!(content.len(), 1 << 20, "{form}");
        assert_eq!(
            (&content[4096..4098], &content[content.len() - 2..]),
            (&b"ab"[..], &b"cd"[..])
        );
        assert!(content[..4096].iter().all(|byte| *byte == 0));
        assert!(
            fs::metadata(place.layer().join("f")).unwrap().blocks() < 64,
            "{form}"
        );
        assert!(place.layer().join("next").exists());
    }
    for map in [
        "5,1,4,1",
        "0,4,4,18446744073709551615",
        "0,1",
        "0,9",
        "x",
        "0,4,",
    ] {
        let size: &[u8] = b"8";
        let tar = Tar::new().pax(&[
            ("GNU.sparse.size", size),
            ("GNU.sparse.map", map.as_bytes()),
        ]);
        let place = Place::new();
        assert!(place.apply(&tar.file("f", b"abcd").end()).is_err(), "{map}");
    }
    let bomb = format!("{}\n", u64::MAX);
    let tar = Tar::new().pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"8"),
    ]);
    refused(tar.file("f", format!("{bomb:\0<512}").as_bytes()), "sparse");
}

fn listing(root: &Path) -> Listing {
    let (mut found, mut pending) = (Listing::new(), vec![root.to_owned()]);
    while let Some(path) = pending.pop() {
        let data = fs::symlink_metadata(&path).unwrap();
        let content = if data.is_file() {
            fs::read(&path).unwrap()
        } else if data.is_symlink() {
            fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .into_encoded_bytes()
        } else {
            vec![]
        };
        if data.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let links = if data.is_dir() { 0 } else { data.nlink() };
        let name = path.strip_prefix(root).unwrap().to_owned();
        let time = if name.as_os_str().is_empty() {
            0
        } else {
            data.mtime()
        };
        found.insert(
            name,
            (data.permissions().mode(), data.uid(), links, time, content),
        );
    }
    found
}

/// tar(1), in the two forms that it writes and with holes, and what it makes of them.
#[test]
#[expect(clippy::disallowed_methods, reason = "the other unpacker")]
fn tar_makes_the_same_of_it() {
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    fs::create_dir_all(at("d/sub")).unwrap();
    fs::write(at("d/plain"), b"content").unwrap();
    fs::write(at("d/empty"), b"").unwrap();
    fs::hard_link(at("d/plain"), at("d/sub/hard")).unwrap();
    std::os::unix::fs::symlink("../plain", at("d/sub/soft")).unwrap();
    fs::write(at(&format!("d/{}", "n".repeat(200))), b"long").unwrap();
    std::os::unix::fs::symlink("t".repeat(300), at("d/longlink")).unwrap();
    fs::set_permissions(at("d/plain"), fs::Permissions::from_mode(0o4711)).unwrap();
    std::os::unix::fs::chown(at("d/empty"), Some(3_000_000), Some(5)).unwrap();
    let holes = fs::File::create(at("d/holes")).unwrap();
    for place in [0, 1 << 20, 5 << 20] {
        std::os::unix::fs::FileExt::write_all_at(&holes, b"data", place).unwrap();
    }
    rustix::fs::mkfifoat(holes_dir(&at("d")).as_fd(), "fifo", rustix::fs::Mode::RUSR).unwrap();
    for format in ["gnu", "pax", "posix"] {
        let out = tempfile::NamedTempFile::new().unwrap();
        let tar = |arguments: &[&str]| {
            let status = std::process::Command::new("tar")
                .args(arguments)
                .status()
                .unwrap();
            assert!(status.success(), "{arguments:?}");
        };
        let (archive, from) = (
            out.path().to_str().unwrap(),
            source.path().to_str().unwrap(),
        );
        let form = format!("--format={format}");
        tar(&[
            &form, "--sparse", "--xattrs", "-cf", archive, "-C", from, ".",
        ]);
        let theirs = tempfile::tempdir().unwrap();
        tar(&[
            "-xpf",
            archive,
            "-C",
            theirs.path().to_str().unwrap(),
            "--same-owner",
        ]);
        let place = Place::new();
        place.apply(&fs::read(out.path()).unwrap()).unwrap();
        assert_eq!(listing(&place.layer()), listing(theirs.path()), "{format}");
    }
}

/// Images of filesystems are not layers, whatever type they are said to have: no kernel parser sees them.
#[test]
fn filesystems_are_no_layers() {
    for (at, magic) in [
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0][..]), // EROFS
        (0, b"hsqs"),                          // squashfs
        (1080, &[0x53, 0xef]),                 // ext4
        (0, b"XFSB"),
        (65_536 + 64, b"_BHRfS_M"),
    ] {
        let mut image = vec![0; 128 << 10];
        image[at..at + magic.len()].copy_from_slice(magic);
        let place = Place::new();
        let error = place.apply(&image).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{at}: {error}");
        let place = Place::new();
        let error = place.apply(&gzip(&image)).unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{at}: {error}");
    }
}

//! Cases of the log: exact text, properties, a full disk, rotation.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use proptest::prelude::{Strategy, any, prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

const NOW: Timestamp = Timestamp(1_795_168_800_000_000_123);

fn scratch() -> Vec<u8> {
    vec![0; BATCH]
}

/// Text of one output as a reader of the log puts it together again; checks each line's form.
fn reassemble(log: &[u8], source: &str, max_line: usize) -> Vec<u8> {
    let mut out = vec![];
    assert!(log.is_empty() || log.ends_with(b"\n"));
    for line in log.split_inclusive(|b| *b == b'\n') {
        assert_eq!(&line[..30], b"2026-11-20T10:00:00.000000123Z");
        let rest = &line[30..line.len() - 1];
        let (found, tag, text) = (&rest[1..7], rest[8], &rest[10..]);
        assert!(text.len() <= max_line, "{}", text.len());
        if found == source.as_bytes() {
            out.extend_from_slice(text);
            match tag {
                b'F' => out.push(b'\n'),
                tag => assert_eq!(tag, b'P'),
            }
        }
    }
    out
}

#[test]
fn dates() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00.000000000Z"),
        (951_782_400, "2000-02-29T00:00:00.000000000Z"),
        (951_868_799, "2000-02-29T23:59:59.000000000Z"),
        (1_709_251_199, "2024-02-29T23:59:59.000000000Z"),
        (1_709_251_200, "2024-03-01T00:00:00.000000000Z"),
        (4_107_542_400, "2100-03-01T00:00:00.000000000Z"),
        (1_767_225_599, "2025-12-31T23:59:59.000000000Z"),
        (1_767_225_600, "2026-01-01T00:00:00.000000000Z"),
    ] {
        let stamp = Stamp::default().at(Timestamp(seconds * 1_000_000_000));
        assert_eq!(String::from_utf8_lossy(&stamp), text);
    }
}

#[test]
fn exact_text_of_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pod/container/0.log");
    let mut log = LogFile::open(path.clone(), 4).unwrap();
    let (mut out, mut err) = (Pending::default(), Pending::default());
    let mut batch = scratch();
    log.write(
        Source::Stdout,
        &mut out,
        b"abcd\nabcde\r\n\nx",
        &mut batch,
        NOW,
    );
    log.write(Source::Stderr, &mut err, b"e\n", &mut batch, NOW);
    log.end(Source::Stdout, &mut out, NOW);
    let expected = [
        "stdout F abcd",
        "stdout P abcd",
        "stdout F e\r",
        "stdout F ",
        "stderr F e",
        "stdout P x",
    ]
    .map(|line| format!("2026-11-20T10:00:00.000000123Z {line}\n"))
    .concat();
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&path) & !0o022, 0o640);
    assert_eq!(mode(path.parent().unwrap()), 0o755);
    assert_eq!(
        fs::read_dir(path.parent().unwrap()).unwrap().count(),
        1,
        "only the log"
    );
}

fn outputs() -> impl Strategy<Value = Vec<(bool, Vec<u8>)>> {
    let byte = prop_oneof![3 => any::<u8>(), 1 => proptest::prelude::Just(b'\n')];
    let chunk = proptest::collection::vec(byte, 0..200);
    proptest::collection::vec((any::<bool>(), chunk), 0..30)
}

proptest! {
    #[test]
    fn every_byte_comes_back(chunks in outputs(), max_line in 1usize..60) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = LogFile::open(path.clone(), max_line).unwrap();
        let mut pending = [Pending::default(), Pending::default()];
        let mut sent = [vec![], vec![]];
        let mut batch = scratch();
        let sources = [Source::Stdout, Source::Stderr];
        for (second, chunk) in chunks {
            let i = usize::from(second);
            sent[i].extend_from_slice(&chunk);
            log.write(sources[i], &mut pending[i], &chunk, &mut batch, NOW);
        }
        for (source, pending) in sources.into_iter().zip(&mut pending) {
            log.end(source, pending, NOW);
            prop_assert!(pending.is_empty());
        }
        let written = fs::read(&path).unwrap();
        prop_assert_eq!(&reassemble(&written, "stdout", max_line), &sent[0]);
        prop_assert_eq!(&reassemble(&written, "stderr", max_line), &sent[1]);
    }

    #[test]
    fn newlines_are_found(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 8u8..13], 0..64)) {
        prop_assert_eq!(find_newline(&bytes), bytes.iter().position(|b| *b == b'\n'));
    }
}

/// Calls `work` with a directory, in a mount namespace of its own: small disks can be put on it.
fn with_disks(work: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let body = || {
            crate::sys::ns::unshare(crate::sys::ns::flag::MOUNT).unwrap();
            crate::sys::mount::make_all_private().unwrap();
            work(dir.path());
        };
        scope.spawn(body).join().unwrap();
    });
}

/// A tmpfs of so many bytes.
fn small_disk(at: &Path, bytes: usize) {
    let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", at, "tmpfs", flags, options.as_c_str()).unwrap();
}

/// Lines of numbers until the log is blocked; returns what was given.
fn fill(log: &mut LogFile, out: &mut Pending, batch: &mut [u8]) -> Vec<u8> {
    let mut given = vec![];
    for number in 0.. {
        let text = format!("line {number}\nand its second half {number}\nunfinished");
        log.write(Source::Stdout, out, text.as_bytes(), batch, NOW);
        given.extend_from_slice(text.as_bytes());
        if log.is_blocked() {
            break;
        }
    }
    log.write(Source::Stdout, out, b" while full\nx", batch, NOW);
    log.end(Source::Stdout, out, NOW);
    given.extend_from_slice(b" while full\nx");
    given
}

#[test]
fn a_full_disk_loses_nothing() {
    with_disks(|disk| {
        small_disk(disk, 64 * 1024);
        let ballast = fs::File::options()
            .append(true)
            .create(true)
            .open(disk.join("ballast"))
            .unwrap();
        (&ballast).write_all(&[0; 20_000]).unwrap();
        let (mut out, mut batch) = (Pending::default(), scratch());
        let mut log = LogFile::open(disk.join("log"), 0).unwrap();
        let given = fill(&mut log, &mut out, &mut batch);
        log.retry(&mut [(Source::Stdout, &mut out)], &mut batch, NOW);
        assert!(log.is_blocked());
        ballast.set_len(0).unwrap();
        log.retry(&mut [(Source::Stdout, &mut out)], &mut batch, NOW);
        assert!(!log.is_blocked() && out.is_empty());
        let written = fs::read(disk.join("log")).unwrap();
        assert_eq!(reassemble(&written, "stdout", MAX_LINE), given);
    });
}

#[test]
fn rotation_on_a_full_disk_keeps_lines_whole() {
    with_disks(|disk| {
        small_disk(disk, 16 * 1024);
        let (mut out, mut batch) = (Pending::default(), scratch());
        let mut log = LogFile::open(disk.join("log"), 0).unwrap();
        let given = fill(&mut log, &mut out, &mut batch);
        let mut old = fs::File::open(disk.join("log")).unwrap();
        small_disk(disk, 1 << 20);
        log.reopen().unwrap();
        log.retry(&mut [(Source::Stdout, &mut out)], &mut batch, NOW);
        assert!(!log.is_blocked());
        let mut written = vec![];
        io::Read::read_to_end(&mut old, &mut written).unwrap();
        assert!(written.ends_with(b"\n"));
        written.extend(fs::read(disk.join("log")).unwrap());
        assert_eq!(reassemble(&written, "stdout", MAX_LINE), given);
    });
}

#[test]
fn rotation_loses_and_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("0.log");
    let (mut out, mut batch) = (Pending::default(), scratch());
    let mut log = LogFile::open(path.clone(), 0).unwrap();
    let mut given = vec![];
    for round in 0..20 {
        for number in 0..500 {
            let text = format!("round {round} number {number}\nhalf");
            log.write(Source::Stdout, &mut out, text.as_bytes(), &mut batch, NOW);
            given.extend_from_slice(text.as_bytes());
        }
        fs::rename(&path, dir.path().join(format!("rotated.{round:02}"))).unwrap();
        log.reopen().unwrap();
    }
    log.end(Source::Stdout, &mut out, NOW);
    let mut names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    names.sort_by_key(|p| (p.ends_with("0.log"), p.clone()));
    let all: Vec<u8> = names.iter().flat_map(|p| fs::read(p).unwrap()).collect();
    assert_eq!(reassemble(&all, "stdout", MAX_LINE), given);
}

#[test]
fn reopening_makes_a_removed_file_again_and_errors_keep_the_old() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/0.log");
    let (mut out, mut batch) = (Pending::default(), scratch());
    let mut log = LogFile::open(path.clone(), 0).unwrap();
    fs::remove_file(&path).unwrap();
    log.reopen().unwrap();
    log.write(Source::Stdout, &mut out, b"a\n", &mut batch, NOW);
    fs::rename(dir.path().join("sub"), dir.path().join("moved")).unwrap();
    log.reopen().unwrap_err();
    log.write(Source::Stdout, &mut out, b"b\n", &mut batch, NOW);
    let written = fs::read(dir.path().join("moved/0.log")).unwrap();
    assert_eq!(reassemble(&written, "stdout", MAX_LINE), b"a\nb\n");
}

/// What a container with a directory above the log can put there; where it leads nothing may appear, and nothing is written.
#[test]
fn nothing_that_a_container_can_make_is_followed() {
    use std::os::unix::fs::symlink;

    let dir = tempfile::tempdir().unwrap();
    let (logs, outside) = (dir.path().join("logs"), dir.path().join("outside"));
    fs::create_dir_all(outside.join("pod/container")).unwrap();
    fs::File::create(outside.join("0.log")).unwrap();
    let path = logs.join("pod/container/0.log");
    for (place, target) in [
        ("", "outside"),
        ("pod", "../outside/pod"),
        ("pod/container", "../../outside/pod/container"),
        ("pod/container", "gone"),
        ("pod/container/0.log", "../../../outside/0.log"),
        ("pod/container/0.log", "/dev/null"),
        ("pod/container/0.log", "gone"),
    ] {
        let mut log = LogFile::open(path.clone(), 0).unwrap();
        let (at, aside) = (logs.join(place), dir.path().join("aside"));
        let at = at.components().collect::<PathBuf>();
        fs::rename(&at, &aside).unwrap();
        symlink(target, &at).unwrap();
        for refused in [LogFile::open(path.clone(), 0).map(drop), log.reopen()] {
            let refused = refused.unwrap_err();
            let link = matches!(&refused, Refused::Link(named) if *named == at);
            assert!(link, "{place}: {refused:?}");
            let fault = refused.fault("open log").to_string();
            assert!(fault.contains(&*at.to_string_lossy()), "{fault}");
        }
        // The old file stays in use.
        let (mut out, mut batch) = (Pending::default(), scratch());
        log.write(Source::Stdout, &mut out, b"a\n", &mut batch, NOW);
        fs::remove_file(&at).unwrap();
        fs::rename(&aside, &at).unwrap();
        assert!(fs::read(&path).unwrap().ends_with(b"stdout F a\n"));
    }
    assert_eq!(fs::read(outside.join("0.log")).unwrap(), b"");
    assert_eq!(
        fs::read_dir(outside.join("pod/container")).unwrap().count(),
        0
    );
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 2);
    // Not even opened: what a device does then is not ours to start.
    fs::remove_file(&path).unwrap();
    let null = rustix::fs::makedev(1, 3);
    for kind in ["device", "pipe", "directory", "socket"] {
        match kind {
            "device" => rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::CharacterDevice,
                0o666.into(),
                null,
            )
            .unwrap(),
            "pipe" => rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o666.into()).unwrap(),
            "directory" => fs::create_dir(&path).unwrap(),
            _ => drop(std::os::unix::net::UnixListener::bind(&path).unwrap()),
        }
        let refused = LogFile::open(path.clone(), 0).unwrap_err();
        assert!(matches!(refused, Refused::NoFile(_)), "{kind}: {refused:?}");
        let _gone = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
    }
    for bad in ["relative/0.log", "/", "/tmp/../etc/log"] {
        let refused = LogFile::open(bad.into(), 0).unwrap_err();
        assert!(matches!(refused, Refused::NoPath(_)), "{bad}: {refused:?}");
    }
}

/// Nodes have `/var/log` on another disk.
#[test]
fn links_of_the_node_are_followed() {
    use std::os::unix::fs::symlink;

    with_disks(|disk| {
        small_disk(disk, 1 << 20);
        let data = disk.join("data");
        fs::create_dir(&data).unwrap();
        small_disk(Path::new("/var"), 1 << 20);
        symlink(&data, "/var/log").unwrap();
        drop(LogFile::open("/var/log/pods/a/0.log".into(), 0).unwrap());
        assert!(data.join("pods/a/0.log").is_file());
        symlink("a", data.join("pods/b")).unwrap();
        let refused = LogFile::open("/var/log/pods/b/0.log".into(), 0).unwrap_err();
        assert!(matches!(refused, Refused::Link(_)), "{refused:?}");
        drop(LogFile::open("/var/0.log".into(), 0).unwrap());
        assert!(Path::new("/var/0.log").is_file());
    });
}

#[test]
fn an_empty_path_drops_everything() {
    let mut log = LogFile::open(PathBuf::new(), 0).unwrap();
    let mut out = Pending::default();
    log.write(Source::Stdout, &mut out, b"abc", &mut scratch(), NOW);
    log.end(Source::Stdout, &mut out, NOW);
    log.reopen().unwrap();
    assert!(out.is_empty() && !log.is_blocked());
}

/// Not a test of time: prints how fast lines of 100 bytes are taken.
/// `cargo test --release --lib -- --ignored --nocapture log_throughput`
#[test]
#[ignore = "a measurement"]
fn log_throughput() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("log");
    let (mut out, mut batch) = (Pending::default(), scratch());
    let mut log = LogFile::open(path.clone(), 0).unwrap();
    let mut input = vec![b'x'; MAX_LINE];
    for at in (99..MAX_LINE).step_by(100) {
        input[at] = b'\n';
    }
    let start = std::time::Instant::now();
    let rounds = 20_000;
    for round in 0..rounds {
        log.write(
            Source::Stdout,
            &mut out,
            &input,
            &mut batch,
            Timestamp::now(),
        );
        if round % 1000 == 0 {
            fs::File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_len(0)
                .unwrap();
        }
    }
    let bytes = MAX_LINE * rounds;
    println!("{} MB/s", bytes as u128 / start.elapsed().as_micros());
}

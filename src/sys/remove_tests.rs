//! Removals of trees of any shape, interrupted ones, and of trees that are changed meanwhile.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::sys::descent::tests::{Place, file, in_own_mounts, mount_tmpfs, nest, open};

fn removed(parent: &Path, name: &str) -> Removal {
    let name = CString::new(name).unwrap();
    remove(open(parent).as_fd(), &name, &mut || false)
}

#[test]
fn trees_of_any_shape_go_and_links_are_not_followed() {
    let place = Place::new();
    let (all, outside) = (place.made("all"), place.made("outside"));
    file(&open(&outside), "kept", 1);
    let top = place.made("all/top");
    // Deep, with something at each end and on the way.
    file(&nest(&top, 3000, "d"), "bottom", 1);
    file(&nest(&top, 100, &"x".repeat(255)), "bottom", 1);
    // Wide, with directories that hold something.
    for number in 0..400 {
        let below = place.made(&format!("all/top/wide/{number}/below/{number}"));
        file(&open(&below), "file", 0);
    }
    for number in 0..1000 {
        file(&open(&top), &format!("f{number:0>200}"), 0);
    }
    symlink(&outside, top.join("link")).unwrap();
    symlink(&outside, top.join("d/link")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(top.join("d/socket")).unwrap();
    // Names as we give them.
    fs::create_dir_all(top.join(".berth-remove-0000000000000000-0/x/y")).unwrap();
    assert_eq!(removed(&all, "top"), Removal::Gone);
    assert_eq!(fs::read_dir(&all).unwrap().count(), 0);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    // Once more, and what is no directory.
    assert_eq!(removed(&all, "top"), Removal::Gone);
    symlink(&outside, all.join("link")).unwrap();
    assert_eq!(removed(&all, "link"), Removal::Gone);
    assert!(outside.join("kept").exists());
}

#[test]
fn a_removal_that_was_stopped_is_taken_up_again() {
    let place = Place::new();
    let all = place.made("all");
    let top = place.made("all/top");
    drop(nest(&top, 3000, "d"));
    let mut asked = 0;
    let mut stops = 0;
    loop {
        let done = remove(open(&all).as_fd(), c"top", &mut || {
            asked += 1;
            asked % 3 == 0
        });
        match done {
            Removal::Stopped => stops += 1,
            done => break assert_eq!(done, Removal::Gone),
        }
    }
    assert!(stops > 0);
    assert!(!top.exists());
}

#[test]
fn what_is_mounted_stays_and_the_rest_goes() {
    let place = Place::new();
    let all = place.made("all");
    place.made("all/top/a/b/c/mounted");
    place.made("all/top/a/b/other/d/e");
    place.made("all/top/mounted/x");
    let (left, inside) = in_own_mounts(move || {
        for path in ["top/a/b/c/mounted", "top/mounted"] {
            mount_tmpfs(&all.join(path));
            fs::create_dir_all(all.join(path).join("kept/kept")).unwrap();
        }
        let Removal::Left(left) = removed(&all, "top") else {
            return (None, vec![]);
        };
        let mounted = all.join("top/mounted/kept/kept").exists();
        // The deep one is now below one of our numbers.
        let below = fs::read_dir(all.join("top")).unwrap();
        let below: Vec<_> = below.map(|entry| entry.unwrap().path()).collect();
        let deep = below
            .iter()
            .any(|path| path.join("mounted/kept/kept").exists());
        (Some(left), vec![mounted, deep, below.len() == 2])
    });
    let left = left.unwrap();
    assert_eq!(left.errno, Errno::BUSY, "{left}");
    assert_eq!((&*left.name, left.others), ("mounted", 1), "{left}");
    assert_eq!(inside, [true, true, true]);
}

/// A process that still writes makes no removal endless.
#[test]
fn a_tree_that_is_being_written_to_ends() {
    let place = Place::new();
    let all = place.made("all");
    let top = place.made("all/top/in");
    let (done, inside) = (AtomicBool::new(false), open(&top));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..5000 {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                let made = rustix::fs::mkdirat(&inside, format!("n{number}"), 0o700.into());
                if made == Err(Errno::NOENT) {
                    return;
                }
            }
        });
        let fate = removed(&all, "top");
        done.store(true, Ordering::Relaxed);
        assert!(!matches!(fate, Removal::Stopped));
    });
    assert_eq!(removed(&all, "top"), Removal::Gone);
}

//! Counts: hard links, depth, and directories that are exchanged with links.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::sys::descent::tests::{Place, file, nest, open};

fn count(usage: Result<Usage>) -> Counted {
    let mut usage = usage.unwrap();
    assert_eq!(usage.run(&mut || false), Progress::Done);
    usage.counted()
}

#[test]
fn hard_links_count_once_remembered_or_not() {
    let place = Place::new();
    let top = place.made("top");
    for number in 0..20 {
        file(&open(&top), &format!("f{number}"), 8192);
        let below = place.made(&format!("top/d{number}"));
        for name in 0..number {
            let other = below.join(name.to_string());
            fs::hard_link(top.join(format!("f{number}")), other).unwrap();
        }
    }
    let all = count(Usage::at(&top));
    assert_eq!(all.inodes, 40);
    assert!(all.complete);
    assert!(
        (20 * 8192..20 * 8192 + 40 * 4096).contains(&all.bytes),
        "{all:?}"
    );
    for remembered in [0, 7] {
        let some = count(Usage::within(open(&top), remembered, DEPTH));
        // Shares are rounded down.
        assert!((39..=40).contains(&some.inodes), "{some:?}");
        assert!(
            (all.bytes - 400..=all.bytes).contains(&some.bytes),
            "{some:?}"
        );
    }
}

#[test]
fn what_lies_deeper_than_any_path_counts() {
    let place = Place::new();
    let top = place.made("top");
    file(&nest(&top, 2000, "deep"), "file", 1 << 20);
    let all = count(Usage::at(&top));
    assert_eq!(all.inodes, 2001);
    assert!(all.bytes >= 1 << 20 && all.complete, "{all:?}");
    // What is too deep is not told as all.
    let some = count(Usage::within(open(&top), 1, 1500));
    assert_eq!((some.inodes, some.complete), (1501, false));
}

/// A directory takes turns with a link that leads to files of others.
#[test]
fn a_directory_exchanged_for_a_link_counts_nothing_of_others() {
    let place = Place::new();
    let (top, outside) = (place.made("top"), place.made("outside"));
    for number in 0..200 {
        fs::create_dir_all(outside.join(number.to_string())).unwrap();
        file(&open(&outside), &format!("f{number}"), 0);
    }
    for number in 0..40 {
        fs::create_dir_all(top.join(format!("d{number}/x"))).unwrap();
        symlink(&outside, top.join(format!("l{number}"))).unwrap();
    }
    let (done, at) = (AtomicBool::new(false), open(&top));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for number in 0..40 {
                    let (a, b) = (format!("d{number}"), format!("l{number}"));
                    let exchange = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(&at, a, &at, b, exchange).unwrap();
                }
            }
        });
        let most = (0..200).map(|_| count(Usage::at(&top)).inodes).max();
        done.store(true, Ordering::Relaxed);
        // 40 directories with one in each, 40 links; what is exchanged while it is read may be met twice.
        assert!(most.unwrap() <= 2 * 120, "{most:?}");
    });
}

//! Figures of layers: what is told while walks wait, go on, or end without having seen all.

use std::fs;
use std::path::Path;

use super::*;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn wide(top: &Path, files: usize) {
    fs::create_dir_all(top).unwrap();
    for number in 0..files {
        let _file = fs::File::create(top.join(number.to_string())).unwrap();
    }
}

#[tokio::test]
async fn a_figure_is_measured_once_and_then_known() {
    let place = tempfile::tempdir().unwrap();
    let top = place.path().join("upper");
    wide(&top, 3);
    let (meters, meter) = (Meters::new(Tasks::default()), Arc::<Meter>::default());
    let (m, n, t) = (meters.clone(), Arc::clone(&meter), top.clone());
    let first = Tasks::blocking(move || m.read(&n, || t, soon()));
    let first = first.await.unwrap().unwrap();
    assert_eq!((first.inodes, first.complete), (3, true));
    // For some seconds that is what is told, without a walk.
    wide(&top, 5);
    let again = meters.read(&meter, || top.clone(), Instant::now());
    assert_eq!(again, Some(first));
    assert!(!meter.state().walking);
}

#[tokio::test]
async fn nobody_waits_longer_than_he_says_and_what_is_known_is_told() {
    let place = tempfile::tempdir().unwrap();
    let top = place.path().join("upper");
    wide(&top, 3);
    let meter = Arc::<Meter>::default();
    // As if a walk was under way that never ends.
    meter.state().walking = true;
    let (meters, now) = (Meters::new(Tasks::default()), Instant::now());
    assert_eq!(meters.read(&meter, || top.clone(), now), None);
    let some = |inodes, complete| Counted {
        bytes: inodes * 4096,
        inodes,
        complete,
    };
    assert!(meter.progress(some(7, true)));
    assert_eq!(
        meters.read(&meter, || top.clone(), now),
        Some(some(7, true))
    );
    // It ends without having seen all: what is told does not become less.
    meter.end(Some(some(9, false)), BUDGET);
    assert_eq!(meter.read(now), Some(some(9, false)));
    meter.state().walking = true;
    assert!(meter.progress(some(2, true)));
    assert_eq!(
        meter.read(soon()),
        Some(some(9, false)),
        "a slow one is not waited for"
    );
    meter.end(Some(some(4, false)), BUDGET);
    assert_eq!(meter.read(now), Some(some(9, false)));
    // A walk that has seen all is right, also when it is less.
    meter.end(Some(some(4, true)), SLICE);
    assert_eq!(meter.read(now), Some(some(4, true)));
    assert!(meter.state().due.unwrap() > now);
}

/// Many layers that take long do not keep one from its figure that takes no time.
#[tokio::test]
async fn long_walks_take_turns_and_short_ones_come_first() {
    let place = tempfile::tempdir().unwrap();
    let big = place.path().join("big");
    wide(&big, 10_000);
    let small = place.path().join("small");
    wide(&small, 2);
    let meters = Meters::new(Tasks::default());
    let long: Vec<_> = (0..3 * LONG).map(|_| Arc::<Meter>::default()).collect();
    for meter in &long {
        meters.begin(meter, || big.clone());
    }
    let meter = Arc::<Meter>::default();
    let (m, n) = (meters.clone(), Arc::clone(&meter));
    let told = Tasks::blocking(move || m.read(&n, || small, soon()));
    assert_eq!(told.await.unwrap().unwrap().inodes, 2);
    for meter in long {
        let told = Tasks::blocking(move || {
            let mut state = meter.state();
            while state.walking {
                state = meter.ended.wait(state).unwrap();
            }
            state.told()
        });
        let told = told.await.unwrap().unwrap();
        assert_eq!((told.inodes, told.complete), (10_000, true));
    }
    let queue = meters.queue();
    assert_eq!(
        (queue.places, queue.long.len(), queue.parked.len()),
        (0, 0, 0)
    );
}

#[tokio::test]
async fn a_layer_that_is_not_there_has_no_figure() {
    let (meters, meter) = (Meters::new(Tasks::default()), Arc::<Meter>::default());
    let (m, n) = (meters.clone(), Arc::clone(&meter));
    let told = Tasks::blocking(move || m.read(&n, || "/nonexistent/upper".into(), soon()));
    assert_eq!(told.await.unwrap(), None);
    meter.close();
    meter.state().due = None;
    meters.begin(&meter, || unreachable!());
}

//! The C library's heap, kept small.
#![expect(
    unsafe_code,
    reason = "mallopt is a C call; nothing else of the heap is touched"
)]

/// Two arenas instead of eight per processor, and memory given back early: the daemon idles most of its
/// life, and what it holds then is what a node pays. Only glibc has these knobs.
#[cfg(target_env = "gnu")]
pub(crate) fn keep_small() {
    const KNOBS: [(libc::c_int, libc::c_int); 3] = [
        (libc::M_ARENA_MAX, 2),
        (libc::M_TRIM_THRESHOLD, 64 * 1024),
        (libc::M_MMAP_THRESHOLD, 64 * 1024),
    ];
    for (knob, value) in KNOBS {
        // SAFETY: mallopt takes its own lock and any pair of integers; it keeps no pointer.
        let taken = unsafe { libc::mallopt(knob, value) };
        // A knob that is not taken costs memory, nothing else.
        let _taken = taken == 1;
    }
}

/// As above; this C library has no such knobs.
#[cfg(not(target_env = "gnu"))]
pub(crate) const fn keep_small() {}

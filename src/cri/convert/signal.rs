//! Stop signals: CRI counts them in an order of its own, the kernel by number.
//!
//! Kernel: signal(7), numbers of x86-64 and arm64. Real-time signals start at 34: libc keeps 32 and 33.

use crate::cri::v1::Signal;

/// CRI value and number of each signal that is not a real-time one; the first of a number is the one
/// that statuses show.
const CLASSIC: [(Signal, i32); 34] = [
    (Signal::Sighup, 1),
    (Signal::Sigint, 2),
    (Signal::Sigquit, 3),
    (Signal::Sigill, 4),
    (Signal::Sigtrap, 5),
    (Signal::Sigabrt, 6),
    (Signal::Sigiot, 6),
    (Signal::Sigbus, 7),
    (Signal::Sigfpe, 8),
    (Signal::Sigkill, 9),
    (Signal::Sigusr1, 10),
    (Signal::Sigsegv, 11),
    (Signal::Sigusr2, 12),
    (Signal::Sigpipe, 13),
    (Signal::Sigalrm, 14),
    (Signal::Sigterm, 15),
    (Signal::Sigstkflt, 16),
    (Signal::Sigchld, 17),
    (Signal::Sigcld, 17),
    (Signal::Sigcont, 18),
    (Signal::Sigstop, 19),
    (Signal::Sigtstp, 20),
    (Signal::Sigttin, 21),
    (Signal::Sigttou, 22),
    (Signal::Sigurg, 23),
    (Signal::Sigxcpu, 24),
    (Signal::Sigxfsz, 25),
    (Signal::Sigvtalrm, 26),
    (Signal::Sigprof, 27),
    (Signal::Sigwinch, 28),
    (Signal::Sigio, 29),
    (Signal::Sigpoll, 29),
    (Signal::Sigpwr, 30),
    (Signal::Sigsys, 31),
];

/// The number of a signal; absent: the runtime's default.
pub(super) fn number(signal: Signal) -> Option<i32> {
    if signal == Signal::RuntimeDefault {
        return None;
    }
    let classic = CLASSIC.iter().find(|(known, _)| *known == signal);
    // SIGRTMIN (34) is 35 in CRI, SIGRTMAX (64) is 65, and all between follow in order.
    Some(classic.map_or(signal as i32 - 1, |(_, number)| *number))
}

/// The CRI value of a number; a number without one is the runtime's default.
pub(in crate::cri) fn of(number: i32) -> Signal {
    if let Some((signal, _)) = CLASSIC.iter().find(|(_, known)| *known == number) {
        return *signal;
    }
    match number {
        34..=64 => Signal::try_from(number + 1).unwrap_or(Signal::RuntimeDefault),
        _ => Signal::RuntimeDefault,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_values_have_their_number() {
        let mut numbers = std::collections::BTreeSet::new();
        for value in 1..=65 {
            let signal = Signal::try_from(value).unwrap();
            let number = number(signal).unwrap();
            numbers.insert(number);
            let back = of(number);
            assert_eq!(super::number(back), Some(number), "{signal:?}");
        }
        // 1 to 31 and 34 to 64.
        assert_eq!(numbers.len(), 62);
        assert!(!numbers.contains(&32) && !numbers.contains(&33));
        assert_eq!(number(Signal::RuntimeDefault), None);
        assert_eq!(number(Signal::Sigrtmin), Some(34));
        assert_eq!(number(Signal::Sigrtminplus15), Some(49));
        assert_eq!(number(Signal::Sigrtmaxminus14), Some(50));
        assert_eq!(number(Signal::Sigrtmax), Some(64));
        assert_eq!(of(15), Signal::Sigterm);
        assert_eq!(of(0), Signal::RuntimeDefault);
    }
}

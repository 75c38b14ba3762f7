//! Signals: names and numbers as users write them. Kernel: signal(7); real-time signals count from 34,
//! as glibc and musl both do.

/// Name without `SIG` and number, for machines with the common numbering (`x86_64`, `aarch64`).
const NAMES: [(&str, i32); 34] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];
/// First real-time signal that programs may use.
const RTMIN: i32 = 34;
/// Last signal.
const RTMAX: i32 = 64;
/// `SIGTERM`: asks a process to end.
pub(crate) const TERM: i32 = 15;

/// The signal's number: a name with or without `SIG` in any case, `RTMIN+n`, `RTMAX-n`, or a number
/// 1..=64. Absent: no such signal.
pub(crate) fn number(text: &str) -> Option<i32> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().filter(|n| (1..=RTMAX).contains(n));
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some((_, number)) = NAMES.iter().find(|(known, _)| *known == name) {
        return Some(*number);
    }
    let offset = |rest: &str, sign: char| -> Option<i32> {
        if rest.is_empty() {
            return Some(0);
        }
        let digits = rest.strip_prefix(sign)?;
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse().ok().filter(|_| plain)
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        RTMIN.checked_add(offset(rest, '+')?)?
    } else {
        RTMAX.checked_sub(offset(name.strip_prefix("RTMAX")?, '-')?)?
    };
    Some(number).filter(|n| (RTMIN..=RTMAX).contains(n))
}

/// The signal's usual name, such as `SIGTERM`, `SIGRTMIN+3`; `SIG32` for one without.
#[cfg(test)]
pub(crate) fn name(number: i32) -> String {
    match NAMES.iter().find(|(_, known)| *known == number) {
        Some((name, _)) => format!("SIG{name}"),
        None if number == RTMIN => "SIGRTMIN".to_owned(),
        None if number == RTMAX => "SIGRTMAX".to_owned(),
        None if (RTMIN..=RTMIN + 15).contains(&number) => format!("SIGRTMIN+{}", number - RTMIN),
        None if (RTMIN..RTMAX).contains(&number) => format!("SIGRTMAX-{}", RTMAX - number),
        None => format!("SIG{number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let cases = [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("SigQuit", Some(3)),
            ("9", Some(9)),
            ("64", Some(64)),
            ("RTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("SIGRTMIN+30", Some(64)),
            ("SIGRTMAX", Some(64)),
            ("SIGRTMAX-14", Some(50)),
            ("SIGRTMAX-30", Some(34)),
            ("SIGRTMIN+31", None),
            ("SIGRTMAX-31", None),
            ("SIGRTMIN-1", None),
            ("SIGRTMIN++1", None),
            ("SIGRTMIN+", None),
            ("SIGRTMIN+99999999999", None),
            ("0", None),
            ("65", None),
            ("-1", None),
            ("+9", None),
            ("", None),
            ("SIG", None),
            ("SIG9", None),
            (" TERM", None),
            ("SIGFOO", None),
        ];
        for (text, expected) in cases {
            assert_eq!(number(text), expected, "{text:?}");
        }
    }

    #[test]
    fn every_signal_has_a_name_that_reads_back() {
        for signal in (1..=31).chain(34..=64) {
            assert_eq!(number(&name(signal)), Some(signal));
        }
    }
}

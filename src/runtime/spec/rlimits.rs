//! Limits of processes (`setrlimit(2)`).

use crate::runtime::spec::error::{Result, SpecError};
use crate::runtime::spec::host::HostFacts;

/// Names; the index is the number (asm-generic/resource.h).
const NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];
/// `RLIMIT_NOFILE`.
const NOFILE: u32 = 7;
/// Open files of a container: (soft, hard). Programs that need more raise their soft limit; a huge one
/// slows down those that close every descriptor.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Number of a limit by name, with or without `RLIMIT_`, in any case. Absent: no such limit.
pub(crate) fn number(name: &str) -> Option<u32> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("RLIMIT_").unwrap_or(&upper);
    let place = NAMES.iter().position(|known| *known == bare)?;
    u32::try_from(place).ok()
}

/// A limit as `nofile=1024:4096`, `core=0` (both) or `memlock=unlimited`: (number, soft, hard); `u64::MAX`: unlimited.
///
/// # Errors
/// What is wrong, and what to write instead.
pub(crate) fn parse(text: &str) -> std::result::Result<(u32, u64, u64), String> {
    let form = || "write it as in `nofile=1024:4096`, with `unlimited` for no limit".to_owned();
    let (name, limits) = text.split_once('=').ok_or_else(form)?;
    let Some(number) = number(name) else {
        let names = NAMES.map(str::to_ascii_lowercase).join(", ");
        return Err(format!("`{name}` is no limit: use one of {names}"));
    };
    let value = |text: &str| match text {
        "unlimited" => Ok(u64::MAX),
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => {
            text.parse().map_err(|_too_large| form())
        }
        _ => Err(form()),
    };
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft > hard {
        return Err("the soft limit is above the hard one: raise the hard one".to_owned());
    }
    Ok((number, soft, hard))
}

/// Limits of a container: those of the configuration; of open files berth's own where that has none, as far as this
/// machine allows.
///
/// # Errors
/// [`SpecError::Precondition`]: the configuration gives more open files than the kernel allows anybody.
pub(crate) fn of_container(
    defaults: &[(u32, u64, u64)],
    host: &HostFacts,
) -> Result<Vec<(u32, u64, u64)>> {
    let mut all = defaults.to_vec();
    match defaults.iter().find(|(known, ..)| *known == NOFILE) {
        None => {
            let hard = OPEN_FILES.1.min(host.max_open_files);
            all.push((NOFILE, OPEN_FILES.0.min(hard), hard));
        }
        Some((_, soft, hard)) if *hard > host.nr_open => {
            let problem = format!(
                "is above fs.nr_open of this node, which is {}",
                host.nr_open
            );
            let mend = "lower default_ulimits in berth's configuration, or raise fs.nr_open";
            let value = format!("nofile={soft}:{hard}");
            return Err(SpecError::precondition(
                "default_ulimits",
                value,
                problem,
                mend,
            ));
        }
        Some(_) => {}
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, wanted) in [
            ("nofile=1024:4096", (7, 1024, 4096)),
            ("RLIMIT_NOFILE=1:2", (7, 1, 2)),
            ("core=0", (4, 0, 0)),
            ("memlock=unlimited", (8, u64::MAX, u64::MAX)),
            ("nproc=5:unlimited", (6, 5, u64::MAX)),
        ] {
            assert_eq!(parse(text), Ok(wanted), "{text}");
        }
        for (text, part) in [
            ("nofile", "write it as"),
            ("files=1", "`files` is no limit: use one of cpu, fsize, "),
            ("nofile=", "write it as"),
            ("nofile=-1", "write it as"),
            ("nofile=1:2:3", "write it as"),
            ("nofile=+1", "write it as"),
            ("nofile=99999999999999999999", "write it as"),
            ("nofile=2:1", "above the hard one"),
            ("nofile=unlimited:1", "above the hard one"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_the_machine_allows() {
        let mut host = crate::runtime::spec::tests::host();
        assert_eq!(of_container(&[], &host).unwrap(), [(7, 1024, 524_288)]);
        host.max_open_files = 512;
        assert_eq!(of_container(&[], &host).unwrap(), [(7, 512, 512)]);
        let given = [(4, 0, 0), (7, 1, host.nr_open)];
        assert_eq!(of_container(&given, &host).unwrap(), given);
        let error = of_container(&[(7, 1, host.nr_open + 1)], &host).unwrap_err();
        let error = error.to_string();
        assert!(error.starts_with("default_ulimits: \"nofile=1:"), "{error}");
        assert!(error.contains("fs.nr_open"), "{error}");
    }
}

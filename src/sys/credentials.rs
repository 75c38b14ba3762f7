//! Who a single-threaded process is: ids, capabilities, no_new_privs, limits, keyring. Raw system calls: the C
//! library's versions signal other threads.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;

use rustix::fs::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// `CAP_SYS_ADMIN` as a bit of a mask.
pub(crate) const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Sets user, group (real, effective, saved) and supplementary groups, groups first.
///
/// # Errors
/// The number of `setgroups(2)`, `setresgid(2)` or `setresuid(2)`, with that call's name.
pub(crate) fn become_user(
    uid: u32,
    gid: u32,
    groups: &[u32],
) -> Result<(), (&'static str, io::Error)> {
    let list: Vec<Gid> = groups.iter().map(|id| Gid::from_raw(*id)).collect();
    rustix::thread::set_thread_groups(&list).map_err(|error| ("setgroups", error.into()))?;
    let gid = Gid::from_raw(gid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .map_err(|error| ("setresgid", error.into()))?;
    let uid = Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|error| ("setresuid", error.into()))
}

/// Keeps the permitted capabilities over [`become_user`], or no longer.
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn keep_capabilities(on: bool) -> io::Result<()> {
    Ok(rustix::thread::set_keep_capabilities(on)?)
}

/// The permitted capabilities of this process.
///
/// # Errors
/// The number of `capget(2)`.
pub(crate) fn permitted_capabilities() -> io::Result<u64> {
    Ok(rustix::thread::capabilities(None)?.permitted.bits())
}

/// Sets the permitted, effective and inheritable capabilities.
///
/// # Errors
/// The number of `capset(2)`; `EPERM`: more than permitted now.
pub(crate) fn set_capabilities(permitted: u64, effective: u64, inheritable: u64) -> io::Result<()> {
    let sets = CapabilitySets {
        effective: CapabilitySet::from_bits_retain(effective),
        permitted: CapabilitySet::from_bits_retain(permitted),
        inheritable: CapabilitySet::from_bits_retain(inheritable),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Drops from the bounding set every capability that is not in `keep`, up to the last that the kernel knows.
///
/// # Errors
/// The number of `prctl(2)`; `EPERM`: no `CAP_SETPCAP`.
pub(crate) fn limit_bounding(keep: u64) -> io::Result<()> {
    for number in 0..64_u64 {
        if keep & (1 << number) != 0 {
            continue;
        }
        match prctl(libc::PR_CAPBSET_DROP, number, 0, 0) {
            Ok(()) => {}
            // Beyond the last.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// How [`set_ambient`] begins: the arguments of its first prctl(2).
pub(crate) const CLEAR_AMBIENT: [Option<u64>; 6] = [
    Some(libc::PR_CAP_AMBIENT.unsigned_abs() as u64),
    Some(libc::PR_CAP_AMBIENT_CLEAR_ALL.unsigned_abs() as u64),
    Some(0),
    Some(0),
    Some(0),
    None,
];

/// Makes the ambient set exactly this; all must be permitted and inheritable.
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn set_ambient(mask: u64) -> io::Result<()> {
    let (clear, raise) = (libc::PR_CAP_AMBIENT_CLEAR_ALL, libc::PR_CAP_AMBIENT_RAISE);
    prctl(libc::PR_CAP_AMBIENT, clear.unsigned_abs().into(), 0, 0)?;
    for number in (0..64_u64).filter(|number| mask & (1 << number) != 0) {
        prctl(libc::PR_CAP_AMBIENT, raise.unsigned_abs().into(), number, 0)?;
    }
    Ok(())
}

/// From now on no exec gives more privileges.
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn set_no_new_privs() -> io::Result<()> {
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Forbids others to trace this process or open its `/proc` files; until the next exec.
///
/// # Errors
/// The number of `prctl(2)`.
pub(crate) fn set_not_dumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0, 0)
}

fn prctl(option: i32, a: u64, b: u64, c: u64) -> io::Result<()> {
    // SAFETY: every option used here takes integers only.
    match unsafe { libc::prctl(option, a, b, c, 0_u64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A resource limit by number, soft and hard; `u64::MAX` is unlimited.
///
/// # Errors
/// The number of `prlimit64(2)`.
pub(crate) fn limit(resource: u32) -> io::Result<(u64, u64)> {
    let mut limits = [0_u64; 2];
    // SAFETY: the kernel reads nothing and writes two 64-bit numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            std::ptr::null::<u64>(),
            limits.as_mut_ptr(),
        )
    };
    match result {
        0 => Ok((limits[0], limits[1])),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets a resource limit by number; `u64::MAX` is unlimited.
///
/// # Errors
/// The number of `prlimit64(2)`; `EPERM`: above the hard limit without `CAP_SYS_RESOURCE`.
pub(crate) fn set_limit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limits = [soft, hard];
    // SAFETY: the kernel reads two 64-bit numbers and writes nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            limits.as_ptr(),
            std::ptr::null_mut::<u64>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The soft limit of open files of another process.
///
/// # Errors
/// The number of `prlimit64(2)`: `ESRCH` (it is gone), `EPERM` (its ids are not ours, and we lack `CAP_SYS_RESOURCE` in its
/// user namespace).
#[cfg(feature = "daemon")]
pub(crate) fn open_files_limit(pid: u32) -> io::Result<u64> {
    let mut limits = [0_u64; 2];
    // SAFETY: the kernel writes two 64-bit numbers into the array and reads nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            pid,
            libc::RLIMIT_NOFILE,
            std::ptr::null::<u64>(),
            limits.as_mut_ptr(),
        )
    };
    match result {
        0 => Ok(limits[0]),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Joins a new, anonymous session keyring, so that the parent's is out of reach. A kernel without keyrings is no error.
///
/// # Errors
/// The number of `keyctl(2)`; `EDQUOT`: too many keys for this user.
pub(crate) fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM) => Ok(()),
        _ => Err(error),
    }
}

/// Sets the host name of this UTS namespace.
///
/// # Errors
/// The number of `sethostname(2)`.
pub(crate) fn set_host_name(name: &str) -> io::Result<()> {
    Ok(rustix::system::sethostname(name.as_bytes())?)
}

/// Writes this process's `oom_score_adj`, or the lowest value that the kernel lets us write (it keeps an unprivileged
/// process from going below what it has). What is in force now.
///
/// # Errors
/// The number of opening or writing, other than a refusal to go lower.
pub(crate) fn set_oom_score_adj(wanted: i32) -> io::Result<i32> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let write = |value: i32| {
        let path = std::path::Path::new(FILE);
        crate::sys::file::write_kernel(rustix::fs::CWD, path, value.to_string().as_bytes())
    };
    let refused =
        |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM));
    match write(wanted) {
        Ok(()) => return Ok(wanted),
        Err(error) if refused(&error) => {}
        Err(error) => return Err(error),
    }
    let text = std::fs::read_to_string(FILE)?;
    let now: i32 = text.trim().parse().map_err(io::Error::other)?;
    // The lowest allowed is some number at or below `now`: find it by halves.
    let (mut bad, mut good) = (wanted, now);
    while bad + 1 < good {
        let middle = bad + (good - bad) / 2;
        match write(middle) {
            Ok(()) => good = middle,
            Err(error) if refused(&error) => bad = middle,
            Err(error) => return Err(error),
        }
    }
    Ok(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::clone::in_forked_child;

    fn status(field: &str) -> String {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find(|line| line.starts_with(field)).unwrap();
        line[field.len()..]
            .trim_matches([':', ' ', '\t'])
            .to_owned()
    }

    #[test]
    fn a_user_with_few_capabilities() {
        in_forked_child(|| {
            let net_bind = 1 << 10;
            limit_bounding(net_bind | 1).unwrap();
            keep_capabilities(true).unwrap();
            become_user(1000, 1001, &[7, 9]).unwrap();
            set_capabilities(net_bind, net_bind, net_bind).unwrap();
            set_ambient(net_bind).unwrap();
            set_no_new_privs().unwrap();
            assert_eq!(status("Uid"), "1000\t1000\t1000\t1000");
            assert_eq!(status("Gid"), "1001\t1001\t1001\t1001");
            assert_eq!(status("Groups"), "7 9");
            assert_eq!(status("CapBnd"), "0000000000000401");
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(status(set), "0000000000000400", "{set}");
            }
            assert_eq!(status("NoNewPrivs"), "1");
            assert!(set_capabilities(1, 1, 0).is_err());
        });
    }

    #[test]
    fn the_oom_score_goes_as_low_as_allowed() {
        in_forked_child(|| {
            let here = |text: String| text.trim().parse::<i32>().unwrap();
            let read = || here(std::fs::read_to_string("/proc/self/oom_score_adj").unwrap());
            assert_eq!(set_oom_score_adj(900).unwrap(), 900);
            assert_eq!(read(), 900);
            let lowest = set_oom_score_adj(-999).unwrap();
            assert_eq!(read(), lowest);
            assert!(lowest <= 900);
        });
    }

    #[test]
    fn limits_and_keyring() {
        in_forked_child(|| {
            set_limit(7, 100, 200).unwrap();
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
            assert_eq!((limit.current, limit.maximum), (Some(100), Some(200)));
            join_new_session_keyring().unwrap();
        });
    }
}

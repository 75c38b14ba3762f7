//! The built-in profile: an allow-list, with conditions where a call is harmless only in part.
//!
//! Everything else fails with `EPERM`; numbers that this file has not heard of fail with `ENOSYS`. Not allowed on
//! purpose: `io_uring_*`, kernel keyrings (`keyctl` and friends are not namespaced), `userfaultfd`, `kexec_*`,
//! `swapon`, `nfsservctl`, modules. `clone3` hides its flags from filters, so it says `ENOSYS` (C libraries then use
//! `clone`) unless the process may make namespaces anyhow.

use crate::runtime::seccomp::profile::{
    Action, ArchMap, Circumstances, Condition, Operator, Profile, Rule,
};

/// Allowed for everybody.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    "accept", "accept4", "access", "adjtimex", "alarm", "bind", "brk", "cachestat", "capget",
    "capset", "chdir", "chmod", "chown", "chown32", "clock_adjtime", "clock_adjtime64",
    "clock_getres", "clock_getres_time64", "clock_gettime", "clock_gettime64",
    "clock_nanosleep", "clock_nanosleep_time64", "close", "close_range", "connect",
    "copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create", "epoll_create1",
    "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2", "epoll_wait",
    "epoll_wait_old", "eventfd", "eventfd2", "execve", "execveat", "exit", "exit_group",
    "faccessat", "faccessat2", "fadvise64", "fadvise64_64", "fallocate", "fanotify_mark",
    "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchown32", "fchownat", "fcntl",
    "fcntl64", "fdatasync", "fgetxattr", "file_getattr", "file_setattr", "flistxattr", "flock",
    "fork", "fremovexattr", "fsetxattr", "fstat", "fstat64", "fstatat64", "fstatfs",
    "fstatfs64", "fsync", "ftruncate", "ftruncate64", "futex", "futex_requeue", "futex_time64",
    "futex_wait", "futex_waitv", "futex_wake", "futimesat", "get_robust_list",
    "get_thread_area", "getcpu", "getcwd", "getdents", "getdents64", "getegid", "getegid32",
    "geteuid", "geteuid32", "getgid", "getgid32", "getgroups", "getgroups32", "getitimer",
    "getpeername", "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getrandom",
    "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit", "getrusage", "getsid",
    "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getuid32", "getxattr",
    "getxattrat", "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch",
    "io_cancel", "io_destroy", "io_getevents", "io_pgetevents", "io_pgetevents_time64",
    "io_setup", "io_submit", "ioctl", "ioprio_get", "ioprio_set", "ipc", "kill",
    "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "lchown",
    "lchown32", "lgetxattr", "link", "linkat", "listen", "listmount", "listxattr",
    "listxattrat", "llistxattr", "_llseek", "lremovexattr", "lseek", "lsetxattr", "lstat",
    "lstat64", "madvise", "map_shadow_stack", "membarrier", "memfd_create", "memfd_secret",
    "mincore", "mkdir", "mkdirat", "mknod", "mknodat", "mlock", "mlock2", "mlockall", "mmap",
    "mmap2", "mprotect", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive",
    "mq_timedreceive_time64", "mq_timedsend", "mq_timedsend_time64", "mq_unlink", "mremap",
    "mseal", "msgctl", "msgget", "msgrcv", "msgsnd", "msync", "munlock", "munlockall",
    "munmap", "name_to_handle_at", "nanosleep", "newfstatat", "_newselect", "open", "openat",
    "openat2", "pause", "pidfd_open", "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc",
    "pkey_free", "pkey_mprotect", "poll", "ppoll", "ppoll_time64", "prctl", "pread64",
    "preadv", "preadv2", "prlimit64", "process_mrelease", "pselect6", "pselect6_time64",
    "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv",
    "recv", "recvfrom", "recvmmsg", "recvmmsg_time64", "recvmsg", "remap_file_pages",
    "removexattr", "removexattrat", "rename", "renameat", "renameat2", "restart_syscall",
    "rmdir", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo",
    "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64",
    "rt_tgsigqueueinfo", "sched_get_priority_max", "sched_get_priority_min",
    "sched_getaffinity", "sched_getattr", "sched_getparam", "sched_getscheduler",
    "sched_rr_get_interval", "sched_rr_get_interval_time64", "sched_setaffinity",
    "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp",
    "select", "semctl", "semget", "semop", "semtimedop", "semtimedop_time64", "send",
    "sendfile", "sendfile64", "sendmmsg", "sendmsg", "sendto", "set_robust_list",
    "set_thread_area", "set_tid_address", "setfsgid", "setfsgid32", "setfsuid", "setfsuid32",
    "setgid", "setgid32", "setgroups", "setgroups32", "setitimer", "setpgid", "setpriority",
    "setregid", "setregid32", "setresgid", "setresgid32", "setresuid", "setresuid32",
    "setreuid", "setreuid32", "setrlimit", "setsid", "setsockopt", "setuid", "setuid32",
    "setxattr", "setxattrat", "shmat", "shmctl", "shmdt", "shmget", "shutdown", "sigaltstack",
    "signalfd", "signalfd4", "sigpending", "sigprocmask", "sigreturn", "sigsuspend",
    "socketpair", "splice", "stat", "stat64", "statfs", "statfs64", "statmount", "statx",
    "symlink", "symlinkat", "sync", "sync_file_range", "syncfs", "sysinfo", "tee", "tgkill",
    "time", "timer_create", "timer_delete", "timer_getoverrun", "timer_gettime",
    "timer_gettime64", "timer_settime", "timer_settime64", "timerfd_create", "timerfd_gettime",
    "timerfd_gettime64", "timerfd_settime", "timerfd_settime64", "times", "tkill", "truncate",
    "truncate64", "ugetrlimit", "umask", "uname", "unlink", "unlinkat", "uretprobe", "utime",
    "utimensat", "utimensat_time64", "utimes", "vfork", "vmsplice", "wait4", "waitid",
    "waitpid", "write", "writev",
];

/// Allowed with a capability (without `CAP_`).
#[rustfmt::skip]
const WITH_CAPABILITY: &[(&str, &[&str])] = &[
    ("BPF", &["bpf"]),
    ("DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("PERFMON", &["perf_event_open"]),
    ("SYSLOG", &["syslog"]),
    ("SYS_ADMIN", &[
        "bpf", "clone", "clone3", "fanotify_init", "fsconfig", "fsmount", "fsopen", "fspick",
        "lookup_dcookie", "lsm_get_self_attr", "lsm_list_modules", "lsm_set_self_attr",
        "mount", "mount_setattr", "move_mount", "open_tree", "open_tree_attr",
        "perf_event_open", "quotactl", "quotactl_fd", "setdomainname", "sethostname", "setns",
        "syslog", "umount", "umount2", "unshare",
    ]),
    ("SYS_BOOT", &["reboot"]),
    ("SYS_CHROOT", &["chroot"]),
    ("SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("SYS_PACCT", &["acct"]),
    ("SYS_PTRACE", &[
        "kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev",
        "ptrace",
    ]),
    ("SYS_RAWIO", &["ioperm", "iopl"]),
    ("SYS_TIME", &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
];

/// Allowed on machines of one architecture, with those whose programs they run too.
#[rustfmt::skip]
const WITH_ARCH: &[(&str, &[&str])] = &[
    ("amd64", &["arch_prctl", "modify_ldt"]),
    ("arm64", &["arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls"]),
];

/// `CLONE_NEW*` flags that clone(2) takes: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;
/// Personalities of personality(2): Linux, `UNAME26`, 32 bits, both, and "tell me which".
const PERSONALITIES: [u64; 5] = [0x0, 0x2_0000, 0x8, 0x2_0008, 0xffff_ffff];
/// Linux 4.8 made ptrace(2) safe for filters: they are applied after the tracer.
const PTRACE_KERNEL: &str = "4.8";
const ENOSYS: u32 = 38;

fn rule(names: &[&str]) -> Rule {
    Rule {
        names: names.iter().map(|name| (*name).to_owned()).collect(),
        name: String::new(),
        action: Action::Allow,
        errno_ret: None,
        args: vec![],
        includes: Circumstances::default(),
        excludes: Circumstances::default(),
    }
}

fn capability(name: &str) -> Circumstances {
    Circumstances {
        caps: vec![format!("CAP_{name}")],
        ..Circumstances::default()
    }
}

fn first_argument(name: &str, op: Operator, value: u64, value_two: u64) -> Rule {
    Rule {
        args: vec![Condition {
            index: 0,
            value,
            value_two,
            op,
        }],
        ..rule(&[name])
    }
}

/// socket(2) of every family but `AF_ALG` (38) and `AF_VSOCK` (40).
///
/// The kernel looks at 32 bits of the family, the filter at 64. So what is above 40 is allowed by ranges that
/// end, not by "greater than": 2^32 + 38 is `AF_ALG` too.
fn sockets() -> Vec<Rule> {
    let masked = |start: u64, length: u64| {
        first_argument("socket", Operator::MaskedEq, !(length - 1), start)
    };
    vec![
        first_argument("socket", Operator::Lt, 38, 0),
        first_argument("socket", Operator::Eq, 39, 0),
        first_argument("socket", Operator::Eq, 41, 0),
        masked(42, 2),
        masked(44, 4),
        masked(48, 16),
    ]
}

fn enosys(names: &[&str]) -> Rule {
    Rule {
        action: Action::Errno,
        errno_ret: Some(ENOSYS),
        ..rule(names)
    }
}

/// The built-in profile.
pub(crate) fn profile() -> Profile {
    let mut rules = vec![rule(ALLOWED)];
    rules.push(Rule {
        includes: Circumstances {
            min_kernel: PTRACE_KERNEL.to_owned(),
            ..Circumstances::default()
        },
        ..rule(&["process_vm_readv", "process_vm_writev", "ptrace"])
    });
    rules.append(&mut sockets());
    for personality in PERSONALITIES {
        rules.push(first_argument("personality", Operator::Eq, personality, 0));
    }
    for (arch, names) in WITH_ARCH {
        rules.push(Rule {
            includes: Circumstances {
                arches: vec![(*arch).to_owned()],
                ..Circumstances::default()
            },
            ..rule(names)
        });
    }
    for (name, names) in WITH_CAPABILITY {
        rules.push(Rule {
            includes: capability(name),
            ..rule(names)
        });
    }
    rules.push(Rule {
        excludes: capability("SYS_ADMIN"),
        ..first_argument("clone", Operator::MaskedEq, CLONE_NAMESPACES, 0)
    });
    rules.push(Rule {
        excludes: capability("SYS_ADMIN"),
        ..enosys(&["clone3"])
    });
    // One call for all of socket(2) and its kin, whose arguments a filter cannot see.
    rules.push(enosys(&["socketcall"]));
    let map = |architecture: &str, others: &[&str]| ArchMap {
        architecture: architecture.to_owned(),
        sub_architectures: others.iter().map(|other| (*other).to_owned()).collect(),
    };
    Profile {
        name: "RuntimeDefault".to_owned(),
        digest: [0; 32],
        default_action: Action::Errno,
        default_errno_ret: Some(1),
        architectures: vec![],
        arch_map: vec![
            map("SCMP_ARCH_X86_64", &["SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
            map("SCMP_ARCH_AARCH64", &["SCMP_ARCH_ARM"]),
        ],
        flags: None,
        listener_path: String::new(),
        syscalls: rules,
    }
}

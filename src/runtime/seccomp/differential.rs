//! Our programs against those of libseccomp (Debian: libseccomp-dev and gcc), for random profiles and calls;
//! and in the kernel.
#![expect(
    clippy::disallowed_methods,
    reason = "a compiler and a helper of the test, not of the product"
)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;

use super::profile::{Action, Operator, Profile, Rule};
use super::table::Arch;
use super::tests::model::{POOL, call, calls, number, profiles};
use super::tests::{actions, run};
use super::{Target, program, resolve};

/// Reads profiles from stdin, writes program n to the file n:
/// `P default`, `R action name conditions [index op value value2]...`, `E` (end of the profile).
/// `N arch name` prints the number of a call.
const HELPER: &str = r#"
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
int main(void) {
    scmp_filter_ctx ctx = NULL;
    int count = 0;
    char line[4096], name[128];
    unsigned action, arch;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "P %u", &action) == 1) {
            ctx = seccomp_init(action);
            if (seccomp_arch_add(ctx, SCMP_ARCH_X86) || seccomp_arch_add(ctx, SCMP_ARCH_X32)) return 2;
        } else if (sscanf(line, "N %u %127s", &arch, name) == 2) {
            printf("%d\n", seccomp_syscall_resolve_name_arch(arch, name));
        } else if (line[0] == 'R') {
            struct scmp_arg_cmp args[6];
            unsigned n, at;
            int used;
            char *p = line + 1;
            if (sscanf(p, " %u %127s %u%n", &action, name, &n, &used) != 3) return 3;
            p += used;
            for (at = 0; at < n; at++) {
                unsigned index, op;
                unsigned long long a, b;
                if (sscanf(p, " %u %u %llu %llu%n", &index, &op, &a, &b, &used) != 4) return 4;
                p += used;
                args[at].arg = index; args[at].op = op; args[at].datum_a = a; args[at].datum_b = b;
            }
            int r = seccomp_rule_add_array(ctx, action, seccomp_syscall_resolve_name(name), n, args);
            if (r != 0 && r != -EEXIST) { fprintf(stderr, "%s: %s", strerror(-r), line); return 5; }
        } else if (line[0] == 'E') {
            char path[32];
            snprintf(path, sizeof path, "%d", count++);
            int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
            if (fd < 0 || seccomp_export_bpf(ctx, fd)) return 6;
            close(fd);
            seccomp_release(ctx);
        }
    }
    return 0;
}
"#;

/// Installs the program from stdin, makes each call `number arg0 arg1` of its arguments, prints its
/// error number.
const GUARDED: &str = r#"
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
int main(int argc, char **argv) {
    static struct sock_filter filter[4096];
    size_t n = fread(filter, sizeof filter[0], 4096, stdin);
    struct sock_fprog program = { (unsigned short)n, filter };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return 2;
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, atoi(argv[1]), &program)) return 3;
    for (int at = 2; at < argc; at++) {
        long number;
        unsigned long first, second;
        if (sscanf(argv[at], "%ld %lu %lu", &number, &first, &second) != 3) return 4;
        errno = 0;
        long result = syscall(number, first, second, 0, 0, 0, 0);
        printf("%d\n", result < 0 ? errno : 0);
    }
    return 0;
}
"#;

fn write(path: &Path, content: &[u8]) {
    let mut file = std::fs::File::create(path).unwrap();
    file.write_all(content).unwrap();
}

/// Compiles a helper; what is missing is named.
fn compile(dir: &Path, code: &str, libraries: &[&str]) -> std::path::PathBuf {
    let (source, binary) = (dir.join("helper.c"), dir.join("helper"));
    write(&source, code.as_bytes());
    let built = Command::new("gcc")
        .args(["-O1", "-o"])
        .args([&binary, &source])
        .args(libraries)
        .output()
        .expect("gcc is missing: install gcc");
    assert!(
        built.status.success(),
        "does libseccomp-dev lack?\n{}",
        String::from_utf8_lossy(&built.stderr)
    );
    binary
}

fn helper(dir: &Path, input: &str) -> String {
    let binary = compile(dir, HELPER, &["-lseccomp"]);
    let text = dir.join("input");
    write(&text, input.as_bytes());
    let done = Command::new(&binary)
        .current_dir(dir)
        .stdin(Stdio::from(std::fs::File::open(&text).unwrap()))
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{:?} {}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    String::from_utf8(done.stdout).unwrap()
}

fn action(action: Action) -> u32 {
    match action {
        Action::KillThread => 0,
        Action::KillProcess => 0x8000_0000,
        Action::Trap => 0x0003_0000,
        Action::Errno => 0x0005_0001,
        Action::Trace => 0x7ff0_0001,
        Action::Log => 0x7ffc_0000,
        Action::Allow | Action::Notify => 0x7fff_0000,
    }
}

fn operator(operator: Operator) -> u32 {
    match operator {
        Operator::Ne => 1,
        Operator::Lt => 2,
        Operator::Le => 3,
        Operator::Eq => 4,
        Operator::Ge => 5,
        Operator::Gt => 6,
        Operator::MaskedEq => 7,
    }
}

fn rule_lines(out: &mut String, rule: &Rule) {
    let condition = |condition: &super::profile::Condition| {
        let (index, op) = (condition.index, operator(condition.op));
        format!(" {index} {op} {} {}", condition.value, condition.value_two)
    };
    let mut indices: Vec<u32> = rule.args.iter().map(|condition| condition.index).collect();
    indices.sort_unstable();
    let twice = indices.windows(2).any(|pair| pair[0] == pair[1]);
    for name in &rule.names {
        let mut line = |conditions: &[super::profile::Condition]| {
            let text: String = conditions.iter().map(condition).collect();
            writeln!(
                out,
                "R {} {name} {}{text}",
                action(rule.action),
                conditions.len()
            )
            .unwrap();
        };
        if twice {
            rule.args.iter().for_each(|one| line(&[*one]));
        } else {
            line(&rule.args);
        }
    }
}

fn lines(profile: &Profile) -> String {
    let default = action(profile.default_action);
    let mut out = format!("P {default}\n");
    for rule in profile
        .syscalls
        .iter()
        .filter(|rule| action(rule.action) != default)
    {
        rule_lines(&mut out, rule);
    }
    out.push_str("E\n");
    out
}

fn program_of(path: &Path) -> Vec<(u16, u8, u8, u32)> {
    let bytes = std::fs::read(path).unwrap();
    let one = |b: &[u8]| {
        let code = u16::from_ne_bytes([b[0], b[1]]);
        (
            code,
            b[2],
            b[3],
            u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        )
    };
    bytes.chunks_exact(8).map(one).collect()
}

fn is_narrow(profile: &Profile, args: &[u64; 6]) -> bool {
    let conditions = profile.syscalls.iter().flat_map(|rule| &rule.args);
    conditions
        .flat_map(|condition| [condition.value, condition.value_two])
        .chain(*args)
        .all(|value| value <= u32::MAX.into())
}

#[test]
fn random_profiles_mean_the_same() {
    let mut runner = TestRunner::deterministic();
    // One action beside the default: which of several wins is left open by libseccomp.
    let mut cases = vec![];
    for _ in 0..150 {
        let profile = profiles(1).new_tree(&mut runner).unwrap().current();
        let calls = calls().new_tree(&mut runner).unwrap().current();
        cases.push((profile, calls));
    }
    let input: String = cases.iter().map(|(profile, _)| lines(profile)).collect();
    let dir = tempfile::tempdir().unwrap();
    helper(dir.path(), &input);
    let actions = actions();
    let target = Target {
        arch: Arch::X86_64,
        capabilities: 0,
        kernel: (6, 12),
        actions: &actions,
    };
    let mut compared = 0;
    for (nth, (profile, calls)) in cases.iter().enumerate() {
        let theirs = program_of(&dir.path().join(nth.to_string()));
        let resolved = resolve::resolve(profile, &target).unwrap();
        let ours = program::assemble(&resolved).unwrap();
        for (index, arch, args) in calls {
            let rules = resolved.archs.iter().find(|rules| rules.arch == *arch);
            let call = call(*arch, number(*arch, POOL[*index]), *args);
            // libseccomp alone does not do the ENOSYS of unknown numbers.
            if rules
                .and_then(|rules| rules.highest)
                .is_none_or(|h| call.number > h)
            {
                continue;
            }
            // It takes the arguments of x32 for 32 bits wide; the kernel shows all 64.
            if *arch == Arch::X32 && !is_narrow(profile, &call.args) {
                continue;
            }
            compared += 1;
            assert_eq!(
                run(&ours.instructions, &call),
                run(&theirs, &call),
                "{call:x?} of {}",
                lines(profile)
            );
        }
    }
    assert!(compared > 1000, "{compared}");
}

#[test]
fn numbers_are_the_same() {
    let archs = [Arch::X86_64, Arch::X86, Arch::X32, Arch::Aarch64, Arch::Arm];
    let token = |arch: Arch| match arch {
        Arch::X32 => 0x4000_003e,
        other => other.audit(),
    };
    let names: Vec<String> = Profile::runtime_default()
        .syscalls
        .iter()
        .flat_map(|rule| rule.names.clone())
        .chain(POOL.map(ToOwned::to_owned))
        .collect();
    let mut input = String::new();
    let mut asked = vec![];
    for arch in archs {
        for name in &names {
            writeln!(input, "N {} {name}", token(arch)).unwrap();
            asked.push((arch, name));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let output = helper(dir.path(), &input);
    let mut different = vec![];
    for ((arch, name), line) in asked.into_iter().zip(output.lines()) {
        let theirs: i64 = line.parse().unwrap();
        // Negative: not there, or younger than the library.
        if let Ok(theirs) = u32::try_from(theirs)
            && arch.number(name) != Some(theirs)
        {
            different.push(format!(
                "{name} on {arch:?}: {:?}, {theirs}",
                arch.number(name)
            ));
        }
    }
    assert!(different.is_empty(), "\n{}", different.join("\n"));
}

#[test]
fn the_kernel_takes_the_default_profile_and_obeys_it() {
    let host = crate::runtime::spec::HostFacts::probe();
    let target = Target {
        arch: Arch::native(),
        capabilities: crate::runtime::capabilities::default_set(),
        kernel: host.kernel,
        actions: &host.seccomp_actions,
    };
    let compiled = super::compile(&Profile::runtime_default(), &target).unwrap();
    let bytes: Vec<u8> = compiled
        .filter
        .instructions
        .iter()
        .flat_map(|(code, yes, no, k)| {
            let (code, k) = (code.to_ne_bytes(), k.to_ne_bytes());
            [code[0], code[1], *yes, *no, k[0], k[1], k[2], k[3]]
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let binary = self::compile(dir.path(), GUARDED, &[]);
    let program = dir.path().join("program");
    write(&program, &bytes);
    const EPERM: u32 = 1;
    const ENOSYS: u32 = 38;
    let calls: [(&str, u64, u64, u32); 13] = [
        ("getpid", 0, 0, 0),
        ("socket", 1, 1, 0),
        ("socket", 38, 5, EPERM),
        ("socket", 40, 1, EPERM),
        ("socket", (1 << 32) + 38, 5, EPERM),
        ("clone3", 0, 0, ENOSYS),
        ("clone", 0x1000_0000, 0, EPERM),
        ("unshare", 0x1000_0000, 0, EPERM),
        ("setns", 0, 0, EPERM),
        ("mount", 0, 0, EPERM),
        ("io_uring_setup", 1, 0, EPERM),
        ("keyctl", 0, 0, EPERM),
        ("personality", 0xffff_ffff, 0, 0),
    ];
    let number = |name: &str| Arch::native().number(name).unwrap();
    let mut lines: Vec<String> = calls
        .iter()
        .map(|(name, first, second, _)| format!("{} {first} {second}", number(name)))
        .collect();
    lines.push("9999 0 0".to_owned());
    let done = Command::new(&binary)
        .arg(compiled.filter.flags.to_string())
        .args(&lines)
        .stdin(Stdio::from(std::fs::File::open(&program).unwrap()))
        .output()
        .unwrap();
    assert!(done.status.success(), "{:?}", done.status);
    let output = String::from_utf8(done.stdout).unwrap();
    let found: Vec<u32> = output.lines().map(|line| line.parse().unwrap()).collect();
    let expected: Vec<u32> = calls.iter().map(|call| call.3).chain([ENOSYS]).collect();
    assert_eq!(found, expected, "{calls:?}");
}

//! Births seen from outside: what is executed, what is told of a failure, what a born process has in its memory.

use super::*;
use crate::sys::clone::{self, in_forked_child};
use crate::sys::process::{Exit, ended_child, reap};
use std::os::fd::AsFd;

/// What a maker has on its heap and its stack.
const SECRET: &[u8] = b"what only the maker knows";
/// What the born process is to have.
const GIVEN: &str = "GIVEN=what the program sees";

fn text(text: &str) -> CString {
    CString::new(text).unwrap()
}

/// The maker's work: gives birth to these programs, leaves how that went, and ends.
fn make(shared: &Shared, programs: &[&str], arguments: &[&str], filter: Option<&Filter>) -> i32 {
    let heap = SECRET.to_vec();
    let maps = std::fs::File::open("/proc/self/maps").unwrap();
    let list = |all: &[&str]| all.iter().map(|one| text(one)).collect::<Vec<_>>();
    let birth = Birth {
        programs: &list(programs),
        arguments: &list(arguments),
        environment: &[text(GIVEN)],
        terminal: false,
        filter: filter.map(|filter| (filter, 0)),
        secret: 7,
        maps: maps.as_fd(),
    };
    let prepared = prepare(shared, &birth).unwrap();
    shared.set_stage(Stage::Confining);
    let outcome = prepared.go();
    shared.set_stage(Stage::Over);
    i32::from(outcome.is_err() || heap != SECRET)
}

/// Ends of the children: of the maker, of what was born.
fn ends(shared: &Shared, maker: u32) -> (Exit, Option<Exit>) {
    let (mut of_maker, mut of_born) = (None, None);
    while of_maker.is_none() || (of_born.is_none() && shared.pid().is_some()) {
        let Some(pid) = ended_child().unwrap() else {
            std::thread::yield_now();
            continue;
        };
        let exit = Some(reap(pid).unwrap());
        if pid == maker {
            of_maker = exit;
        } else {
            assert_eq!(shared.pid(), Some(pid));
            of_born = exit;
        }
    }
    (of_maker.unwrap(), of_born)
}

#[test]
fn a_program_runs_as_a_child_of_the_makers_parent() {
    in_forked_child(|| {
        let shared = Shared::new().unwrap();
        assert_eq!((shared.stage(), shared.pid()), (Stage::Early, None));
        let script = [
            "sh",
            "-c",
            "test \"$GIVEN\" = 'what the program sees' && exit 7",
        ];
        let work = || make(&shared, &["/nowhere/sh", "/bin/sh"], &script, None);
        let maker = clone::clone(0, None, &[], work).unwrap();
        let (maker, born) = ends(&shared, maker.pid);
        assert_eq!((maker, born), (Exit::Code(0), Some(Exit::Code(7))));
        assert_eq!((shared.stage(), shared.failure()), (Stage::Over, None));
    });
}

#[test]
fn what_cannot_be_executed_is_told_without_a_word() {
    in_forked_child(|| {
        let refuses_exec = Filter::new(&[
            (0x20, 0, 0, 0),
            (0x15, 0, 1, u32::try_from(libc::SYS_execve).unwrap()),
            (0x06, 0, 0, 0x0005_0000 | 99),
            (0x06, 0, 0, 0x7fff_0000),
        ]);
        let mut longest = vec![(0x20, 0, 0, 0); 4095];
        longest.push((0x06, 0, 0, 0x7fff_0000));
        let longest = Filter::new(&longest);
        // The exit too: it ends all the same.
        let refuses_all = Filter::new(&[(0x06, 0, 0, 0x0005_0000 | 98)]);
        let by_signal = if cfg!(target_arch = "x86_64") {
            libc::SIGILL
        } else {
            libc::SIGTRAP
        };
        for (programs, filter, failure, exit) in [
            (
                &["/nowhere"][..],
                None,
                Failure::Execute(0, libc::ENOENT),
                Exit::Code(127),
            ),
            (
                &["/etc/passwd", "/nowhere"],
                None,
                Failure::Execute(0, libc::EACCES),
                Exit::Code(127),
            ),
            (
                &["/dev/null/x", "/proc/self/mem"],
                None,
                Failure::Execute(1, libc::EACCES),
                Exit::Code(127),
            ),
            (
                &["/nowhere"],
                Some(&longest),
                Failure::Execute(0, libc::ENOENT),
                Exit::Code(127),
            ),
            (
                &["/bin/true"],
                Some(&refuses_exec),
                Failure::Execute(0, 99),
                Exit::Code(127),
            ),
            (
                &["/bin/true"],
                Some(&refuses_all),
                Failure::Execute(0, 98),
                Exit::Signal(by_signal),
            ),
        ] {
            let shared = Shared::new().unwrap();
            let work = || {
                crate::sys::credentials::set_no_new_privs().unwrap();
                make(&shared, programs, &["x"], filter)
            };
            let maker = clone::clone(0, None, &[], work).unwrap();
            let ended = ends(&shared, maker.pid);
            assert_eq!(ended, (Exit::Code(0), Some(exit)), "{programs:?}");
            assert_eq!(shared.failure(), Some(failure), "{programs:?}");
        }
    });
}

#[test]
fn notes_are_cut_and_survive_their_maker() {
    in_forked_child(|| {
        let shared = Shared::new().unwrap();
        let work = || {
            shared.leave(&[9; MAX_NOTE + 100]);
            shared.set_present(3);
            shared.set_stage(Stage::Failed);
            0
        };
        let maker = clone::clone(0, None, &[], work).unwrap();
        let (maker, born) = ends(&shared, maker.pid);
        assert_eq!((maker, born), (Exit::Code(0), None));
        assert_eq!(shared.note(), vec![9; MAX_NOTE]);
        assert_eq!((shared.present(), shared.stage()), (Some(3), Stage::Failed));
    });
}

/// Everything that a stopped process has and that can be written.
fn memory(pid: u32) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let file = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut all = Vec::new();
    for line in maps.lines() {
        let mut words = line.split(' ');
        let (range, rights) = (words.next().unwrap(), words.next().unwrap());
        if !rights.contains('w') {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        let mut part = vec![0; usize::try_from(number(end) - number(start)).unwrap()];
        if file.read_exact_at(&mut part, number(start)).is_ok() {
            all.extend(part);
        }
    }
    all
}

fn has(memory: &[u8], needle: &[u8]) -> bool {
    memory.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn what_is_born_has_nothing_of_its_makers_memory() {
    const PTRACE_SEIZE: u32 = 0x4206;
    const PTRACE_O_TRACEVFORK: usize = 4;
    in_forked_child(|| {
        let shared = Shared::new().unwrap();
        let (reader, writer) = crate::sys::fd::pipe().unwrap();
        let work = || {
            // Until it is traced.
            let _waited = crate::sys::fd::read(reader.as_fd(), &mut [0]);
            make(&shared, &["/bin/true"], &["true"], None)
        };
        let maker = clone::clone(0, None, &[reader.as_fd()], work).unwrap();
        let pid = i32::try_from(maker.pid).unwrap();
        // SAFETY: no memory is passed.
        let seized = unsafe { libc::ptrace(PTRACE_SEIZE, pid, 0_usize, PTRACE_O_TRACEVFORK) };
        assert_eq!(seized, 0);
        crate::sys::fd::write_all(writer.as_fd(), b"x").unwrap();
        let mut status = 0;
        // SAFETY: `status` is written.
        let stopped = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        assert_eq!(stopped, pid);
        assert!(libc::WIFSTOPPED(status), "{status:#x}");
        let born = shared.pid().unwrap();
        let (of_maker, of_born) = (memory(maker.pid), memory(born));
        assert!(
            has(&of_maker, SECRET),
            "the test does not see what it looks for"
        );
        assert!(has(&of_born, GIVEN.as_bytes()), "nothing was given to it");
        assert!(!has(&of_born, SECRET), "it has its maker's memory");
        assert!(!crate::sys::process::has_executed(born).unwrap());
        assert!(crate::sys::process::held(born).is_some());
        for pid in [born, maker.pid] {
            let pidfd = crate::sys::process::pidfd_open(pid).unwrap();
            crate::sys::process::send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        }
    });
}

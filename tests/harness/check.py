#!/usr/bin/env python3
"""The harness itself: what it counts, what it says stands in the way, what a failed step leaves, what it reads from OCI runtimes.

    check.py

Needs no build of berth.
"""

import contextlib
import fcntl
import io
import os
import socket
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import isolate, leaks, obstacles, oci, runtimes  # noqa: E402
from harness.report import Failure, Steps, expect  # noqa: E402

CGROUP = f"/berth-check-{os.getpid()}"


def one_of(parts, found):
    expect(any(all(part in text for part in parts) for text in found), f"{parts} in none of {found}")


@contextlib.contextmanager
def cgroup(*names):
    """A cgroup of these names below the check's own, in a hierarchy of either version."""
    top = next(top for top in leaks.hierarchies() if not top.endswith("/cpuset"))
    path = os.path.join(top, CGROUP.strip("/"), *names)
    os.makedirs(path)
    try:
        yield path
    finally:
        leaks.remove_cgroups(leaks.cgroups(CGROUP))


class Runtime:
    """What leaks.Baseline looks at, without a runtime."""

    def __init__(self, work):
        self.cgroup_root, self.root, self.state = CGROUP, os.path.join(work, "root"), os.path.join(work, "state")
        self.leaves_network, self.state_files_allowed = False, r"$^"


def baseline(steps, work):
    with steps.step("a baseline: what was there before does not count, what came on top of it does, and can be taken away"), \
            cgroup("earlier") as earlier:
        before, runtime = leaks.Baseline(), Runtime(work)
        expect(not before.left(runtime), str(before.left(runtime)))
        new = os.path.join(os.path.dirname(earlier), "new")
        os.mkdir(new)
        child = subprocess.Popen(["sleep", "600"])
        with open(os.path.join(new, "cgroup.procs"), "w") as f:
            f.write(str(child.pid))
        left = before.left(runtime)
        one_of([f"process {child.pid}", "sleep 600"], left)
        one_of([f"cgroup {new}"], left)
        expect(len(left) == 2, str(left))
        before.restore(runtime, isolated=False)
        child.wait()
        expect(not before.left(runtime) and os.path.isdir(earlier), f"{before.left(runtime)}, {earlier}")


def in_the_way(steps, work):
    run, library = os.path.join(work, "run"), os.path.join(work, "library")
    found = lambda: obstacles.of_defaults(run, library, CGROUP)  # noqa: E731
    with steps.step("nothing is in the way of a clean machine, nor are empty directories and cgroups of an earlier berth"):
        expect(not found(), str(found()))
        for place in (run + "/pods", library + "/pods", library + "/containers"):
            os.makedirs(place)
        open(os.path.join(library, "lock"), "w").close()
        with cgroup("monitors"):
            expect(not found(), str(found()))
    with steps.step("in the way: a daemon, by its socket and by its lock"):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(os.path.join(run, "berth.sock"))
            expect(not found(), "nobody listens")
            s.listen()
            one_of(["a daemon of berth", run + "/berth.sock", "systemctl stop berth"], found())
        with open(os.path.join(library, "lock"), "w") as f:
            f.write("4711\n")
            f.flush()
            fcntl.flock(f, fcntl.LOCK_EX)
            one_of(["a daemon of berth", "pid 4711", library], found())
        expect(not found(), str(found()))
    with steps.step("in the way: pods of an earlier berth, by record and by directory"):
        for path in (os.path.join(library, "pods", "ab.json"), os.path.join(run, "pods", "ab")):
            open(path, "w").close()
            one_of(["pods of an earlier berth", path, "berth rm --all"], found())
            os.unlink(path)
    with steps.step("in the way: processes in its cgroup, mounts below its directories"):
        with cgroup("pods") as path:
            child = subprocess.Popen(["sleep", "600"])
            try:
                with open(os.path.join(path, "cgroup.procs"), "w") as f:
                    f.write(str(child.pid))
                one_of([path, f"({child.pid})"], found())
            finally:
                child.kill()
                child.wait()
        subprocess.run(["mount", "-t", "tmpfs", "check", run + "/pods"], check=True)
        try:
            one_of(["mounts are left", run + "/pods", "umount"], found())
        finally:
            subprocess.run(["umount", run + "/pods"], check=True)
        expect(not found(), str(found()))
    with steps.step("in the way of every suite: no cgroups, no room"):
        expect(not obstacles.of_machine(), str(obstacles.of_machine()))
        one_of(["no cgroup hierarchy", work], obstacles.of_machine(top=work))
        one_of(["MiB free"], obstacles.of_machine(free=1 << 60))


class Keeper:
    """Counts instead of asking a runtime."""

    def __init__(self):
        self.there, self.removed = set(), []

    def seen(self):
        return set(self.there)

    def restore(self, before):
        self.removed.append(sorted(self.there - before))
        self.there = before


def alone(steps):
    def fails(inner, name, error, fatal=False):
        with inner.step(name, fatal):
            inner.keeper.there.add(name)
            raise error
    with steps.step("a step that fails takes what it made along, those before and after it keep theirs"):
        inner = Steps("inner")
        inner.keeper = Keeper()
        with contextlib.redirect_stdout(io.StringIO()):
            with inner.step("first"):
                inner.keeper.there.add("kept")
            fails(inner, "second", Failure("no"))
            fails(inner, "third", subprocess.TimeoutExpired("crictl", 1))
            with inner.step("fourth"):
                expect(inner.keeper.there == {"kept"}, str(inner.keeper.there))
        expect((inner.passed, inner.failed) == (2, ["second", "third"]), f"{inner.passed} {inner.failed}")
        expect(inner.keeper.removed == [["second"], ["third"]], str(inner.keeper.removed))
    with steps.step("a fatal step ends its part, with what the part has made, or else the test"):
        inner = Steps("inner")
        inner.keeper = Keeper()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with inner.part("one"):
                inner.keeper.there.add("of the part")
                fails(inner, "the fatal", Failure("no"), fatal=True)
                inner.failed.append("reached")
            with inner.part("two"):
                raise ValueError("between steps")
            with inner.part("three"), inner.step("the last"):
                pass
            try:
                fails(inner, "outside", Failure("no"), fatal=True)
                inner.failed.append("reached")
            except SystemExit as end:
                expect(end.code == 1, str(end.code))
        expect((inner.passed, inner.failed) == (1, ["the fatal", "two", "outside"]), f"{inner.passed} {inner.failed}")
        expect(inner.keeper.removed[0] == ["of the part", "the fatal"], str(inner.keeper.removed))


OLD_RUNC = {"ociVersionMin": "1.0.0", "ociVersionMax": "1.0.2-dev", "mountOptions": ["ro", "rro"],
            "linux": {"namespaces": ["mount", "user"]}}
NEW_RUNC = {**OLD_RUNC, "ociVersionMax": "1.3.0",
            "linux": {"namespaces": ["mount", "user"], "mountExtensions": {"idmap": {"enabled": True}}}}


def abilities(steps):
    with steps.step("what an OCI runtime can is what it tells: by features, by version"):
        old, new = oci.by_features(OLD_RUNC), oci.by_features(NEW_RUNC)
        expect((old.user_namespaces, old.recursive_read_only) == (False, True), str(old))
        expect(new.user_namespaces and new.bundle((1, 2, 1)) and not old.bundle((1, 1, 0)), f"{old} {new}")
        crun = oci.by_version("crun version 1.8.1\ncommit: f8a0\nspec: 1.0.0\n+SYSTEMD\n")
        expect(crun.user_namespaces and crun.bundle((1, 0, 2)) and not crun.bundle((1, 1, 0)), str(crun))
        expect(not oci.by_version("runc version 1.0.3\nspec: 1.0.2-dev\n").user_namespaces, "runc before 1.1")
        expect(not oci.by_version("what?").user_namespaces, "one that tells nothing")


def builds(steps, work):
    with steps.step("another build of berth: its program or its directory, with the monitor beside it"):
        place = os.path.join(work, "build")
        os.mkdir(place)
        for name in ("berth", "berth-monitor"):
            try:
                said = runtimes.berth_program(place)
                raise Failure(f"without {name}: {said}")
            except SystemExit as end:
                expect(f"{place}/{name}" in str(end.code), str(end.code))
            os.close(os.open(os.path.join(place, name), os.O_CREAT, 0o755))
        for given in (place, os.path.join(place, "berth")):
            expect(runtimes.berth_program(given) == os.path.join(place, "berth"), runtimes.berth_program(given))


def main():
    isolate.enter()
    steps = Steps("harness")
    with tempfile.TemporaryDirectory(prefix="berth-check-") as work:
        baseline(steps, work)
        in_the_way(steps, work)
        builds(steps, work)
    alone(steps)
    abilities(steps)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

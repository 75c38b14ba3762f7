#!/usr/bin/env python3
"""What containers leave on disk: trees that no path can say, exchanged links, trash that cannot be removed.

    disk.py [--runtime NAME]

Everything is made by a container of uid 1234 without capabilities, or is in the daemon's trash when it starts. Afterwards the
daemon lives, removes, counts what is there and nothing else, and names what it cannot remove.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import options  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl  # noqa: E402
from inside import IMAGE, Pod  # noqa: E402

NOBODY = {"run_as_user": {"value": 1234}, "run_as_group": {"value": 1234}, "capabilities": {"drop_capabilities": ["ALL"]}}
# 2000 directories in each other are as many as a path can say; each piece goes into the innermost one of the next.
NEST = """
set -e; mkdir /tmp/mine; cd /tmp/mine; deep=
i=0; while [ $i -lt 1999 ]; do deep=d/$deep; i=$((i+1)); done
mkdir -p one/$deep; {first}
i=1; while [ $i -lt {pieces} ]; do mkdir -p n/$deep; mv one n/${{deep}}d; mv n one; i=$((i+1)); done
"""
MIB = 1 << 20
RENAME_EXCHANGE = 2
libc = ctypes.CDLL(None, use_errno=True)


def nested(pod, pieces=4, first=""):
    """A container that has made so many times 2000 directories in each other, and `first` in the innermost ones."""
    container, pid = pod.run(NOBODY)
    pod.inside(container, NEST.format(pieces=pieces, first=first))
    return container, pid


def trash(s):
    path = os.path.join(s.runtime.root, "trash")
    return os.listdir(path) if os.path.isdir(path) else []


def layer(c, container):
    """(bytes, inodes) of a writable layer; absent: not known yet."""
    for one in c.json("stats", "-a", "-o", "json")["stats"]:
        if one["attributes"]["id"] == container and one.get("writableLayer"):
            told = one["writableLayer"]
            return int(told["usedBytes"]["value"]), int(told["inodesUsed"]["value"])
    return None


def told_at_least(c, container, used, inodes):
    told = layer(c, container) or (0, 0)
    return told[0] >= used and told[1] >= inodes


def removal(steps, s, c, pod):
    with steps.step("8,000 directories in each other: the container is removed and the daemon lives"):
        container, _ = nested(pod)
        c("rm", "--force", container)
        wait_for("an empty trash", lambda: not trash(s), 60 * s.factor)
        expect(s.runtime.alive(), "the daemon is gone: " + s.runtime.log_end())
        c("version")
    with steps.step("300 directories of two more each, names of 255 bytes, and a link to the node's /: all of it goes"):
        container, _ = pod.run(NOBODY)
        pod.inside(container, """
            mkdir /tmp/mine; cd /tmp/mine; name=$(printf %0255d 7); ln -s / root
            i=0; while [ $i -lt 300 ]; do mkdir -p $i/$name/$name; : > $i/$name/$name/$name; i=$((i+1)); done""")
        c("rm", "--force", container)
        wait_for("an empty trash", lambda: not trash(s), 60 * s.factor)
        expect(os.path.isdir("/proc/self") and s.runtime.alive(), "the daemon is gone")


def nest(top, depth):
    """Directories in each other, by descriptor: for what is in the trash before the daemon starts."""
    os.makedirs(top)
    here = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


@contextlib.contextmanager
def mounted(path):
    os.makedirs(path)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], check=True)
    try:
        with open(os.path.join(path, "kept"), "w") as f:
            f.write("of the node\n")
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def aside(c):
    return c.json("info").get("trash", {}).get("setAside", [])


def restarts(steps, s, c, pod):
    top = os.path.join(s.runtime.root, "trash")
    with steps.step("a daemon starts with 8,000 directories in each other in its trash, and removes them"):
        s.runtime.kill()
        nest(os.path.join(top, "deep", "upper"), 8000)
        s.runtime.start()
        c("version")
        wait_for("an empty trash", lambda: not trash(s), 60 * s.factor)
        expect(s.runtime.alive(), "the daemon is gone: " + s.runtime.log_end())
    with steps.step("trash with a mount in it is set aside: named in Status and the log, in nobody's way, the mount untouched"):
        s.runtime.stop()
        nest(os.path.join(top, "beside", "upper"), 20)
        stuck = os.path.join(top, "stuck")
        with mounted(os.path.join(stuck, "mnt")):
            os.makedirs(os.path.join(stuck, "goes"))
            s.runtime.start()
            wait_for("only that in the trash", lambda: trash(s) == ["stuck"], 60 * s.factor)
            wait_for("its name in Status", lambda: [one["path"] for one in aside(c)] == [stuck], 20 * s.factor)
            expect("busy" in aside(c)[0]["reason"] and "mnt" in aside(c)[0]["reason"], str(aside(c)))
            container, _ = nested(pod, pieces=1)
            c("rm", "--force", container)
            wait_for("only that in the trash", lambda: trash(s) == ["stuck"], 60 * s.factor)
            expect(os.listdir(stuck) == ["mnt"], str(os.listdir(stuck)))
            expect(os.listdir(stuck + "/mnt") == ["kept"], "what is mounted has lost files")
            with open(s.runtime.log, errors="replace") as f:
                lines = [line for line in f if "set aside" in line and "stuck" in line]
            expect(len(lines) == 1, f"in the log {len(lines)} times")
            s.runtime.stop()
        s.runtime.start()
        wait_for("an empty trash", lambda: not trash(s), 60 * s.factor)
        expect(aside(c) == [], str(aside(c)))


@contextlib.contextmanager
def exchanging(directory, names):
    """A process that exchanges two names of each pair in the directory, over and over."""
    at = os.open(directory, os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                for a, b in names:
                    libc.renameat2(at, a.encode(), at, b.encode(), RENAME_EXCHANGE)
        finally:
            os._exit(0)
    os.close(at)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def usage(steps, s, c, pod):
    with steps.step("what lies deeper than any path counts"):
        # Not before it is there: a figure is good for some seconds.
        container, _ = nested(pod, pieces=3, first="dd if=/dev/zero of=one/${deep}file bs=1048576 count=8 2>/dev/null")
        told = wait_for("a figure", lambda: layer(c, container), 20 * s.factor)
        wait_for("all of it", lambda: told_at_least(c, container, 8 * MIB, 5990), 60 * s.factor)
        expect(told[1] > 0, str(told))
        c("rm", "--force", container)
    with steps.step("directories that are exchanged with links to the node's count nothing of the node's"):
        outside = os.path.join(s.work, "outside")
        os.mkdir(outside)
        for number in range(2000):
            os.mknod(os.path.join(outside, f"f{number}"))
        container, pid = pod.run(NOBODY)
        pod.inside(container, f"""
            set -e; mkdir /tmp/mine; cd /tmp/mine; i=0
            while [ $i -lt 200 ]; do mkdir -p d$i/x; ln -s {outside} l$i; i=$((i+1)); done""")
        with exchanging(f"/proc/{pid}/root/tmp/mine", [(f"d{n}", f"l{n}") for n in range(200)]):
            # Some of it, until the walk ends: it waits for the directory, as everybody does.
            wait_for("all of it", lambda: told_at_least(c, container, 0, 400), 60 * s.factor)
            told = layer(c, container)
        # 200 of each, and one in each directory; what is exchanged while it is read may be met twice.
        expect(told[1] < 1500, f"{told[1]} inodes")
        c("rm", "--force", container)
    with steps.step("a container of 40,000 files: the other's figure comes with the first answer, its own is at least what was counted"):
        big, _ = pod.run(NOBODY)
        small, _ = pod.run(NOBODY)
        pod.inside(big, "mkdir /tmp/mine; cd /tmp/mine; i=0; while [ $i -lt 40000 ]; do : > $i; i=$((i+1)); done")
        pod.inside(small, "mkdir /tmp/mine; : > /tmp/mine/one")
        told = wait_for("the small one's", lambda: layer(c, small), 20 * s.factor)
        expect(1 < told[1] < 100, str(told))
        told = wait_for("a figure of the big one", lambda: layer(c, big), 20 * s.factor)
        expect(0 < told[1] <= 40010, str(told))
        wait_for("all of it", lambda: told_at_least(c, big, 0, 40000), 120 * s.factor)
        c("rm", "--force", big)
        c("rm", "--force", small)


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps("disk")
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        try:
            with steps.step("a pod", fatal=True):
                c("pull", IMAGE)
                pod = Pod(s, c, "disk")
            usage(steps, s, c, pod)
            removal(steps, s, c, pod)
            if args.runtime == "berth":
                restarts(steps, s, c, pod)
            with steps.step("remove"):
                for one in c("pods", "-q").split():
                    c("rmp", "--force", one)
                wait_for("an empty trash", lambda: not trash(s), 60 * s.factor)
        finally:
            if steps.failed:  # Python's own removal is recursive
                left = [os.path.join(s.runtime.root, name) for name in ("trash", "containers")]
                subprocess.run(["rm", "-rf", "--one-file-system", *left], check=False)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

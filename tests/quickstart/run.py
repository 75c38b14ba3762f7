#!/usr/bin/env python3
"""README's first command: a pod's log line appears, and the machine is as it was before.

    run.py [--host]

hack/quickstart runs as it is, without the build, in namespaces of its own (or, with --host,
in a throwaway node's own): on the machine as it is, then where an earlier berth has left its
directories, an image and empty cgroups, then where pods of one are known, which it must not touch.
What stands in the way of the first is told before anything starts.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import isolate, leaks, obstacles, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402

DIRECTORIES = ("/run/berth", "/run/nri", "/var/lib/berth")
SYSCTLS = ("net/ipv4", "net/ipv6", "net/bridge", "net/netfilter")
FACTOR = float(os.environ.get("BERTH_TIME_FACTOR", "1"))


def sysctls():
    """The network's settings, without those of a single device."""
    values = {}
    for top in SYSCTLS:
        for base, dirs, names in os.walk("/proc/sys/" + top):
            dirs[:] = [d for d in dirs if d not in ("neigh", "route")
                       and not (os.path.basename(base) == "conf" and d not in ("all", "default"))]
            for name in names:
                try:
                    with open(os.path.join(base, name)) as f:
                        values[os.path.join(base, name)] = f.read()
                except OSError:
                    continue
    return values


def defaults():
    """berth as it is without a configuration, for leaks.Baseline."""
    berth = runtimes.Berth("/nonexistent-0", "/nonexistent")
    berth.cgroup_root = "/berth"
    return berth


class Leftovers:
    """What berth on its embedded defaults may leave, compared with what was there before."""

    def __init__(self):
        self.sysctls, self.baseline = sysctls(), leaks.Baseline()
        self.before = {d for d in DIRECTORIES if os.path.exists(d)}
        self.records = set(self._records())

    @staticmethod
    def _records():
        return [f for kind in ("pods", "containers", "images") for f in leaks.files("/var/lib/berth/" + kind)]

    def list(self):
        changed = [f"sysctl {k}: {self.sysctls.get(k, '').strip()} -> {v.strip()}" for k, v in sysctls().items()
                   if self.sysctls.get(k) != v and not re.search(r"(count|age|nr|sum)$", k)]
        new = [f"file {f}" for f in self._records() if f not in self.records]
        gone = [f"file {f} is gone" for f in self.records if not os.path.exists(f)]
        gone += [f"directory {d} is gone" for d in self.before if not os.path.exists(d)]
        return self.baseline.left(defaults()) + changed + new + gone + [
            f"directory {d}" for d in DIRECTORIES if os.path.exists(d) and d not in self.before]

    def restore(self, isolated):
        """For a run that failed: nothing of it stays."""
        self.baseline.restore(defaults(), isolated)
        for directory in DIRECTORIES:
            if directory not in self.before:
                runtimes.remove_tree(directory)


def quickstart():
    done = subprocess.run(["hack/quickstart", "--no-build"], cwd=runtimes.REPO, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=900)
    return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode(errors="replace"))


@contextlib.contextmanager
def earlier_berth():
    """What a daemon leaves that was killed when its last pod was gone; taken away again."""
    made = [d for d in DIRECTORIES if not os.path.exists(d)]
    record, text = "/var/lib/berth/earlier", json.dumps({"by": "an earlier berth"})
    # The second is of a pod that this daemon does not know: it stays, and so does what is above it.
    cgroups = [os.path.join(top, "berth", name) for top in leaks.hierarchies() for name in ("monitors", "pods/earlier")]
    before = set(leaks.cgroups("/berth"))
    try:
        for directory in DIRECTORIES + ("/run/berth/pods", "/var/lib/berth/pods", *cgroups):
            os.makedirs(directory, exist_ok=True)
        with open(record, "w") as f:
            f.write(text)
        yield
        with open(record) as f:
            expect(f.read() == text, f"{record} is another")
    finally:
        leaks.remove_cgroups(c for c in leaks.cgroups("/berth") if c not in before)
        for directory in made:
            shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(record)


def works(steps, where, isolated):
    before = Leftovers()
    try:
        with steps.step(f"hack/quickstart shows a pod's log line{where}"):
            code, out = quickstart()
            print(out)
            expect(code == 0, f"exit {code}")
            expect(re.search(r"logs hello\n.*hello", out, re.I), "no line of the pod's log after `berth logs`")
        with steps.step(f"nothing is left{where}"):
            def clean():
                left = before.list()
                expect(not left, "; ".join(left[:20]))
                return True
            wait_for("the machine is as before", clean, 10 * FACTOR)
    finally:
        before.restore(isolated)


def refuses(steps):
    pod = "/var/lib/berth/pods/" + "ab" * 32 + ".json"
    with steps.step("pods of an earlier berth are not touched: it says where they are"):
        with open(pod, "w") as f:
            f.write("kept")
        try:
            expect(any(pod in one for one in obstacles.of_defaults()), f"not told: {obstacles.of_defaults()}")
            code, out = quickstart()
            expect(code == 1 and "/var/lib/berth/pods" in out and "berth rm --all" in out, f"exit {code}: {out}")
            with open(pod) as f:
                expect(f.read() == "kept", "it has been changed")
        finally:
            os.unlink(pod)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--host", action="store_true")
    args = ap.parse_args()
    isolate.enter(not args.host)
    found = obstacles.of_machine() + obstacles.of_defaults()
    if found:
        sys.exit("\n".join(f"in the way: {one}" for one in found))
    steps = Steps("quickstart")
    works(steps, "", not args.host)
    with earlier_berth():
        works(steps, ", where an earlier berth was", not args.host)
        refuses(steps)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

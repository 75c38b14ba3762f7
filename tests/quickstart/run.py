#!/usr/bin/env python3
"""README's first command: a pod's log line appears, and the machine is as it was before.

    run.py [--host]

hack/quickstart runs as it is, without the build, in namespaces of its own (or, with --host,
in a throwaway node's own).
"""

import argparse
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import isolate, leaks, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402

DIRECTORIES = ("/run/berth", "/run/nri", "/var/lib/berth")
SYSCTLS = ("net/ipv4", "net/ipv6", "net/bridge", "net/netfilter")


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


class Leftovers:
    """What berth on its embedded defaults may leave, compared with what was there before."""

    def __init__(self):
        self.sysctls, self.baseline = sysctls(), leaks.Baseline()
        self.before = {d for d in DIRECTORIES if os.path.exists(d)}

    def list(self):
        berth = runtimes.Berth("/nonexistent-0", "/nonexistent")
        berth.cgroup_root = "/berth"
        changed = [f"sysctl {k}: {self.sysctls.get(k, '').strip()} -> {v.strip()}" for k, v in sysctls().items()
                   if self.sysctls.get(k) != v and not re.search(r"(count|age|nr|sum)$", k)]
        return self.baseline.left(berth) + changed + [
            f"directory {d}" for d in DIRECTORIES if os.path.exists(d) and d not in self.before]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--host", action="store_true")
    args = ap.parse_args()
    isolate.enter(not args.host)
    steps, before = Steps("quickstart"), Leftovers()
    with steps.step("hack/quickstart shows a pod's log line"):
        done = subprocess.run(["hack/quickstart", "--no-build"], cwd=runtimes.REPO, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=900)
        out = done.stdout.decode(errors="replace")
        print(out)
        expect(done.returncode == 0, f"exit {done.returncode}")
        expect(re.search(r"logs hello\n(?!.*\x1b).*hello", re.sub(r"\x1b\[[0-9;]*m", "", out), re.I),
               "no line of the pod's log after `berth logs`")
    with steps.step("nothing is left"):
        def clean():
            left = before.list()
            expect(not left, "; ".join(left[:20]))
            return True
        wait_for("the machine is as before", clean, 10 * float(os.environ.get("BERTH_TIME_FACTOR", "1")))
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

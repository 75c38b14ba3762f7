#!/usr/bin/env python3
"""Inside the emulated node: the steps one after the other, then a table of them.

A failed step does not end the run; the exit status tells whether all passed.
"""

import argparse
import os
import subprocess
import sys
import time

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMON = ["--host", "--images", "/payload/images"]
ON_SELINUX = ("selinux", "selinux-critest")  # only where the node was booted with it
BY_NAME = ("disk",)  # no kernel differs in these; the machine's own run has them
OF_BERTH = ("quickstart", "userns-crun")
ON_CGROUPS = "^(cdi|adjustments|resources|block_io|rdt|hooks|changes|with_runc|devices|restart)$"
STEPS = {
    "quickstart": [TESTS + "/quickstart/run.py", "--host"],
    "crictl": [TESTS + "/crictl/walkthrough.py", *COMMON],
    "cgroups": [TESTS + "/cgroups/run.py", *COMMON],
    "metrics": [TESTS + "/metrics/run.py", *COMMON],
    "streaming": [TESTS + "/streaming/run.py", "--sessions", "60", *COMMON],
    "userns": [TESTS + "/userns/run.py", *COMMON],
    "userns-crun": [TESTS + "/userns/run.py", "--runtime-handler", "crun", *COMMON],
    # What depends on the kernel; order and number of events, failures and validation are the same with cgroup v1.
    "nri": [TESTS + "/nri/run.py", "--only", ON_CGROUPS, *COMMON],
    "volumes": [TESTS + "/volumes/run.py", *COMMON],
    # All but the waits for time limits: three minutes here, and no kernel changes them.
    "handlers": [TESTS + "/handlers/run.py", "--only", "^(?!timeouts$)", *COMMON],
    "security": [TESTS + "/security/run.py", *COMMON],
    # What depends on the kernel: links of logs and layers are the same everywhere.
    "files": [TESTS + "/files/run.py", "--only", "^(closed|devices)$", *COMMON],
    "disk": [TESTS + "/security/disk.py", *COMMON],
    "selinux": [TESTS + "/selinux/run.py", *COMMON],
    "selinux-critest": [TESTS + "/critest/run.py", "SELinux", *COMMON],
    "kubelet": [TESTS + "/kubelet/run.py", *COMMON],
    "critest": [TESTS + "/critest/run.py", "--all", *COMMON],
}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (all)")
    ap.add_argument("--runtime", default="berth")
    ap.add_argument("--only", help="handed to the suites, which must all know it")
    args = ap.parse_args()
    unknown = [s for s in args.steps if s not in STEPS]
    if unknown:
        sys.exit(f"no step {unknown}; there are {list(STEPS)}")
    with open("/sys/fs/cgroup/cgroup.controllers") as f:
        print(f"node: {os.uname().release}, cgroup v2 with {f.read().strip()}", flush=True)
    rows = []
    usual = [s for s in STEPS if s not in (*ON_SELINUX, *BY_NAME) and (s not in OF_BERTH or args.runtime == "berth")]
    for name in args.steps or usual:
        print(f"\n=== in the node: {name}", flush=True)
        start = time.monotonic()
        arguments = [] if name == "quickstart" else ["--runtime", args.runtime]
        arguments += ["--only", args.only] if args.only else []
        code = subprocess.run([*STEPS[name], *arguments], check=False).returncode
        rows.append((name, code, time.monotonic() - start))
    print(f"\n{'in the node':14}{'result':>8}{'seconds':>9}")
    for name, code, seconds in rows:
        print(f"{name:14}{'ok' if code == 0 else 'FAILED':>8}{seconds:9.0f}")
    failed = [name for name, code, _ in rows if code]
    print(f"vm: {len(rows) - len(failed)} passed, {len(failed)} failed", flush=True)
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Runs the tests in an emulated node: cgroup v2, systemd, every capability, AppArmor.

    run.py [STEP...] [--only PATTERN] [--runtime NAME] [--artifacts DIR]

Steps are those of inside.py, and reboot (default: all). Those of SELinux run in a node of their own, booted with it. The binaries, tools, tests and the prepared
images travel as the node's read-only /payload; hack/vm boots it and gives back the output.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "images")]
from harness import runtimes  # noqa: E402
import inside  # noqa: E402
import registry  # noqa: E402

TIME_FACTOR = "8"
SELINUX = "security=selinux selinux=1 enforcing=0"  # kernel arguments; the test enforces it
PEERS = ("CONTAINERD", "CONTAINERD_SHIM", "RUNC")
CNI = ("/usr/lib/cni/bridge", "/usr/lib/cni/host-local", "/usr/lib/cni/portmap", "/usr/lib/cni/loopback")


def berth_binaries():
    program = os.environ.get("BERTH") or os.path.join(runtimes.REPO, "target", "release", "berth")
    found = [program, os.path.join(os.path.dirname(program), "berth-monitor")]
    for path in found:
        if not os.access(path, os.X_OK):
            sys.exit(f"missing tool: {path}; hack/build builds it")
    return found


def prepared_demo(directory):
    """The node has no compiler: the demonstration's image is made here and only copied there."""
    maker = os.path.join(directory, "image")
    subprocess.run([maker, os.path.join(directory, "hello.tar")], check=True)
    with open(maker, "w") as f:
        f.write('#!/bin/sh\ncp "${0%/*}/hello.tar" "$1"\n')


def payload(directory, runtime):
    """Fills the directory that the node sees as /payload; the variables the steps need."""
    binaries, repository = os.path.join(directory, "bin"), os.path.join(directory, "repo")
    os.makedirs(binaries)
    variables = {"BERTH_TIME_FACTOR": TIME_FACTOR, "DOCKER_REGISTRY": "/payload/bin/docker-registry"}
    tools = [(n, runtimes.tool(n)) for n in ("CRICTL", "CRITEST", "KUBELET", "KUBELET_STREAMS", "NRI_PLUGIN")]
    if runtime == "berth":
        release = os.path.join(repository, "target", "release")
        os.makedirs(release)
        for path in berth_binaries():
            shutil.copy(path, release)
    else:
        tools += [(n, runtimes.tool(n)) for n in PEERS] + [("", p) for p in CNI]
    tools.append(("", shutil.which(registry.PROGRAM) or sys.exit(f"missing tool: {registry.PROGRAM}")))
    for name, path in tools:
        shutil.copy(path, binaries)
        if name:
            variables[name] = "/payload/bin/" + os.path.basename(path)
    for part in ("tests", "hack", "deploy"):
        if os.path.isdir(os.path.join(runtimes.REPO, part)):
            shutil.copytree(os.path.join(runtimes.REPO, part), os.path.join(repository, part), symlinks=True,
                            ignore=shutil.ignore_patterns("__pycache__", "go.sum"))
    prepared_demo(os.path.join(repository, "hack", "demo"))
    shutil.copytree(registry.prepare(), os.path.join(directory, "images"))
    return variables


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("steps", nargs="*")
    ap.add_argument("--runtime", choices=sorted(runtimes.RUNTIMES), default="berth")
    ap.add_argument("--only", help="parts of the named steps, as their suites name them")
    ap.add_argument("--artifacts", help="a directory for what the steps leave in /artifacts")
    ap.add_argument("--timeout", type=int, default=4000, help="seconds for the whole node (4000)")
    args = ap.parse_args()
    hack = os.path.join(runtimes.REPO, "hack", "vm")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the payload goes
    if subprocess.run([hack + "/build"], check=False).returncode:
        sys.exit("the node cannot be built")
    with tempfile.TemporaryDirectory(prefix="berth-payload-", dir=registry.cache_dir()) as directory:
        content = os.path.join(directory, "payload")
        variables = payload(content, args.runtime)

        def boot(command, arguments="", kernel=""):
            environment = {**os.environ, "VM_INIT": "systemd", "VM_TIMEOUT": str(args.timeout),
                           "VM_ENV": " ".join(f"{k}={v}" for k, v in variables.items()),
                           "VM_APPEND": (os.environ.get("VM_APPEND", "") + " " + kernel).strip(),
                           "VM_QEMU_ARGS": (os.environ.get("VM_QEMU_ARGS", "") + arguments).strip(),
                           **({"VM_ARTIFACTS": args.artifacts} if args.artifacts else {})}
            return subprocess.run([hack + "/run", "-", "-", content, command], env=environment, check=False).returncode

        steps = [s for s in args.steps if s != "reboot" and s not in inside.ON_SELINUX]
        on_selinux = [s for s in inside.ON_SELINUX if s in args.steps or not args.steps]
        script = ["exec python3 -u /payload/repo/tests/vm/inside.py", "--runtime", args.runtime]
        script += ["--only", shlex.quote(args.only)] if args.only else []
        code = 0
        if steps or not args.steps:
            code = boot(" ".join([*script, *steps]))
        if args.runtime == "berth" and on_selinux:
            code = boot(" ".join([*script, *on_selinux]), kernel=SELINUX) or code
        if args.runtime == "berth" and ("reboot" in args.steps or not args.steps):
            code = reboot(boot, directory) or code
    sys.exit(code)


def reboot(boot, directory):
    """Two boots with one disk. The first ends in a reset, so it has no status: the second tells."""
    print("\n=== in the node: reboot", flush=True)
    disk, start = os.path.join(directory, "disk"), time.monotonic()
    with open(disk, "wb") as f:
        f.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-L", "berth-data", disk], check=True)
    arguments = f" -drive file={disk},format=raw,if=none,id=data,cache=unsafe -device virtio-blk-pci,drive=data"
    script = "exec python3 -u /payload/repo/tests/vm/reboot.py "
    for phase in ("before", "after"):
        code = boot(script + phase, arguments)
    print(f"reboot: {'ok' if code == 0 else 'FAILED'} ({time.monotonic() - start:.0f} s)", flush=True)
    return code


if __name__ == "__main__":
    main()

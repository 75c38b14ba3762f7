#!/usr/bin/env python3
"""Runs the benchmark against berth and peers side by side, each with root, state and network of its own.

    hack/bench/run.py [--peer containerd] [--peer berth=PATH]... [-- OPTIONS OF THE BENCHMARK]

Options of the benchmark: the head of hack/bench/main.rs. The peer containerd: hack/install-peers builds it.

berth=PATH is another build of berth: its program, or the directory that holds it; its berth-monitor lies beside it. It stands in
the tables as `other` (the next one as `other2`). The last columns compare round by round: berth's time over the peer's, as the
median of all rounds and where that median lies with 95 %. To compare with a commit:

    git worktree add ../before COMMIT && (cd ../before && hack/build) && hack/build && cargo build --release --example bench
    hack/bench/run.py --peer berth=../before/target/release -- --image registry.k8s.io/lab/bench:1 --rounds 100

Both builds are to be of one kind (release, with the monitor that hack/build makes). Keys that the other build's
configuration does not know are left out of its. `BERTH=PROGRAM` in the environment measures another build instead of this tree's.
Everything runs in namespaces of its own; the images come from the tests' local registry. Pods that a benchmark which
fails leaves running are ended with all that belongs to them.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [os.path.join(REPO, "tests"), os.path.join(REPO, "tests", "images")]
from harness import isolate, leaks, runtimes  # noqa: E402
import registry  # noqa: E402

PROCESSES = {"berth": "berth,berth-monitor,pause", "containerd": "containerd,containerd-shim,pause"}

# Where peers keep cgroups and names of network namespaces, and CNI's library its results: on the machine itself.
PEER_CGROUPS, PEER_FILES = "/k8s.io", ("/run/netns", "/var/lib/cni")


class Before:
    """What was there before the runtimes; `restore` ends what came on top of it, by pid and by path."""

    def __init__(self):
        self.baseline = leaks.Baseline()
        self.cgroups, self.files = set(leaks.cgroups(PEER_CGROUPS)), set(self._files())

    @staticmethod
    def _files():
        return [path for directory in PEER_FILES for path in leaks.files(directory)]

    def restore(self, started):
        for runtime in started:
            runtime.process and runtime.stop()
        left = [pid for pid in leaks.descendants() if pid not in self.baseline.processes]
        if left:
            print(f"bench: {len(left)} processes were left, ending them", file=sys.stderr)
        leaks.end_processes(self.baseline.processes)
        for runtime in started:
            leaks.remove_cgroups(leaks.cgroups(runtime.cgroup_root))
        leaks.remove_cgroups(set(leaks.cgroups(PEER_CGROUPS)) - self.cgroups)
        for path in set(self._files()) - self.files:
            subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL, check=False)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        leaks.forget_forwarding()
        for runtime in started:
            runtimes.remove_tree(runtime.work)


def peers(given):
    """[(name in the tables, class of the runtime, its arguments besides)], this tree's berth first."""
    found, others = [("berth", runtimes.Berth, {})], 0
    for peer in given:
        kind, _, path = peer.partition("=")
        if kind == "berth" and path:
            others += 1
            name = "other" + (str(others) if others > 1 else "")
            found.append((name, runtimes.Berth, {"build": runtimes.berth_program(path), "number": others}))
        elif kind in PROCESSES and kind != "berth" and not path:
            if any(name == kind for name, _, _ in found):
                sys.exit(f"--peer {peer}: given twice")
            found.append((kind, runtimes.RUNTIMES[kind], {}))
        else:
            sys.exit(f"--peer {peer}: neither containerd nor berth=PATH (PATH: another build's program or its directory)")
    return found


def endpoint(name, runtime):
    """The benchmark's --endpoint. Builds of berth have the same names of processes: their cgroups tell them apart."""
    cgroup = "%" + runtime.cgroup_root if runtime.name == "berth" else ""
    return f"{name}={runtime.socket}@{PROCESSES[runtime.name]}{cgroup}"


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--peer", action="append", default=[], metavar="containerd|berth=PATH")
    ap.add_argument("options", nargs="*", help="after --: for the benchmark")
    args = ap.parse_args()
    found = peers(args.peer)
    images = registry.prepare(big=any("lab/big" in option for option in args.options))
    program = os.environ.get("BENCH") or os.path.join(REPO, "target", "release", "examples", "bench")
    if not os.access(program, os.X_OK):
        sys.exit(f"missing tool: {program}; cargo build --release --example bench builds it")
    os.environ.setdefault("BERTH_LOG", "info")
    isolate.enter()
    for name, _, more in found:
        if more:
            print(f"bench: {name} is {more['build']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="berth-bench-") as directory:
        certs = os.path.join(directory, "certs.d")
        with registry.RegistryProcess(images + "/registry", scratch=directory) as reg:
            registry.write_hosts(certs, reg.address)
            before, started, options = Before(), [], []
            try:
                for number, (name, kind, more) in enumerate(found):
                    work = os.path.join(directory, f"{name}-{os.getpid()}x{number}")
                    os.makedirs(work)
                    runtime = kind(work, certs, **more)
                    started.append(runtime)
                    runtime.start()
                    options += ["--endpoint", endpoint(name, runtime)]
                code = subprocess.run([program, *options, *args.options], check=False).returncode
            finally:
                before.restore(started)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""The command line of the tests that drive a runtime, and the set-up it asks for."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time

from harness import isolate, keeper, leaks, report, runtimes

sys.path.insert(0, os.path.join(runtimes.REPO, "tests", "images"))
import registry  # noqa: E402  (tests/images has no package)


def parser(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runtime", choices=sorted(runtimes.RUNTIMES), default="berth",
                   help="the runtime to start for the test (default: berth)")
    p.add_argument("--host", action="store_true",
                   help="in the machine's own namespaces (a throwaway node), not in the test's")
    p.add_argument("--time-factor", type=float, default=float(os.environ.get("BERTH_TIME_FACTOR", "1")),
                   help="multiplies every deadline; an emulated node needs 5 to 10")
    p.add_argument("--hide-hybrid", action="store_true",
                   help="take cgroup v2 away where it lies beside v1 (in the test's own namespaces)")
    p.add_argument("--images", help="a directory made by tests/images/registry.py prepare")
    p.add_argument("--keep", action="store_true", help="keep the work directory")
    return p


class Session:
    """A started runtime, its registry's images.json and its work directory."""

    def __init__(self, work, runtime, images, factor, baseline):
        self.work, self.runtime, self.images, self.factor = work, runtime, images, factor
        self.baseline = baseline

    @property
    def endpoint(self):
        return "unix://" + self.runtime.socket


@contextlib.contextmanager
def session(args, steps):
    """Registry and runtime for the block; asserts at its end that nothing is left."""
    images = args.images or registry.prepare()
    isolate.enter(not args.host)
    if args.hide_hybrid:
        isolate.without_hybrid_cgroups()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    work = tempfile.mkdtemp(prefix=f"berth-test-{os.getpid()}")
    os.chmod(work, 0o711)  # a container's root in a user namespace walks through it
    certs = os.path.join(work, "certs.d")
    failed_before = len(steps.failed)
    try:
        with registry.RegistryProcess(images + "/registry", scratch=work) as reg:
            registry.write_hosts(certs, reg.address)
            baseline = leaks.Baseline()
            runtime = runtimes.RUNTIMES[args.runtime](work, certs, args.time_factor)
            try:
                runtime.start()
                steps.keeper = keeper.Keeper(runtime)
                yield Session(work, runtime, images, args.time_factor, baseline)
                with steps.step(f"{runtime.name} is still running"):
                    report.expect(runtime.alive(), f"ended with {runtime.process.poll()}: {runtime.log_end()}")
                with steps.step("nothing is left"):
                    _end(runtime, baseline, args.time_factor)
            finally:
                steps.keeper = None
                runtime.process and runtime.stop()
                baseline.restore(runtime, not args.host)
    finally:
        if len(steps.failed) > failed_before or sys.exc_info()[0] not in (None, SystemExit):
            with contextlib.suppress(OSError):
                print(f"--- end of {runtime.log}:\n{runtime.log_end()}", flush=True)
        if not args.keep:
            runtimes.remove_tree(work)
        else:
            print(f"kept: {work}")


def _end(runtime, baseline, factor):
    # Trash is emptied beside everything else, and not any more once the daemon ends.
    trash, until = os.path.join(runtime.root, "trash"), time.monotonic() + 10 * factor
    while os.path.isdir(trash) and os.listdir(trash) and time.monotonic() < until:
        time.sleep(0.05)
    code = runtime.stop()
    report.expect(code == 0, f"{runtime.name} ended with {code}")
    end = time.monotonic() + 10 * factor
    while left := baseline.left(runtime, runtime.ids):
        if time.monotonic() > end:
            raise report.Failure(f"{len(left)} left: " + "; ".join(left[:20]))
        time.sleep(0.2)

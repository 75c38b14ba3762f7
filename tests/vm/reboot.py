#!/usr/bin/env python3
"""A reboot for real, in two boots of the emulated node with one disk (tests/vm/run.py runs both).

    reboot.py before    makes pods, then resets the machine under them: nothing is stopped
    reboot.py after     sandboxes are NOTREADY, containers EXITED 255, the image is there, a new pod starts, the old
                        ones go, and nothing of the last boot is left
"""

import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [TESTS] + [os.path.join(TESTS, d) for d in ("crictl", "restart", "images")]
from harness import isolate, leaks, options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from run import COUNT, IMAGE, Pods  # noqa: E402  (tests/restart/run.py)
import registry  # noqa: E402

DISK, LABEL, STATE = "/data", "berth-data", "/run/berth-reboot"
FACTOR = float(os.environ.get("BERTH_TIME_FACTOR", "1"))


class Rebooted(runtimes.Berth):
    """Its root is on the disk that outlives the node, its state where a node has it."""

    def __init__(self):
        super().__init__(os.path.join(DISK, "test-0"), os.path.join(DISK, "certs.d"), FACTOR)
        self.state, self.cgroup_root = STATE, "/berth-reboot"
        self.socket, self.log = STATE + ".sock", "/tmp/berth.log"


def mounted():
    os.makedirs(DISK, exist_ok=True)
    subprocess.run(["mount", "LABEL=" + LABEL, DISK], check=True)


def pods_of(runtime):
    baseline = leaks.Baseline()
    return Pods(options.Session(runtime.work, runtime, None, FACTOR, baseline)), baseline


def before():
    runtime, steps = Rebooted(), Steps("before the reboot")
    os.makedirs(runtime.work)
    with registry.RegistryProcess("/payload/images/registry", scratch="/tmp") as reg:
        registry.write_hosts(runtime.certs, reg.address)
        runtime.start()
        pods, _ = pods_of(runtime)
        with steps.step("pods run", fatal=True):
            pods.c("pull", IMAGE)
            for i in range(3):
                pods.make(f"old-{i}", COUNT)
            wait_for("lines", lambda: all(len(pods.numbers(n)) > 2 for n in pods.made), 20 * FACTOR)
        with steps.step("the image is on disk for good", fatal=True):
            records = os.path.join(runtime.root, "images", "image")
            wait_for("its record", lambda: settled(records), 20 * FACTOR)
    with open(os.path.join(DISK, "made.json"), "w") as f:
        json.dump(pods.made, f)
    subprocess.run(["sync"], check=True)
    print("reset", flush=True)
    time.sleep(1)  # for the output port
    with open("/proc/sysrq-trigger", "w") as f:
        f.write("b")


def settled(records):
    found = []
    for name in os.listdir(records):
        with open(os.path.join(records, name)) as f:
            found.append('"boot":null' in f.read())
    return bool(found) and all(found)


def after():
    runtime, steps = Rebooted(), Steps("after the reboot")
    isolate.become_subreaper()
    expect(not os.path.exists(STATE), "a reboot that keeps /run")
    pods, baseline = pods_of(runtime)
    runtime.start()
    with open(os.path.join(DISK, "made.json")) as f:
        pods.made = {name: tuple(ids) for name, ids in json.load(f).items()}
    with steps.step("sandboxes are NOTREADY, containers EXITED 255"):
        listed = json.loads(pods.c("pods", "-o", "json"))["items"]
        expect(sorted(p["state"] for p in listed) == ["SANDBOX_NOTREADY"] * 3, str(listed))
        for name in pods.made:
            status = pods.status(name)
            expect(status["state"] == "CONTAINER_EXITED" and status["exitCode"] == 255,
                   f"{status['state']} {status['exitCode']}")
    with steps.step("logs are whole"):
        for name in pods.made:
            numbers = pods.numbers(name)
            expect(numbers == list(range(1, len(numbers) + 1)), f"{name}: {numbers[:3]}..{numbers[-3:]}")
    with steps.step("the image is there, a new pod starts from it"):
        pods.make("new", COUNT)
        wait_for("its first lines", lambda: len(pods.numbers("new")) > 2, 10 * FACTOR)
    with steps.step("all are removed"):
        runtime.ids.update(i for ids in pods.made.values() for i in ids)
        pods.remove()
        pods.c("rmi", IMAGE)
    with steps.step("nothing is left"):
        code = runtime.stop()
        expect(code == 0, f"berth ended with {code}: {runtime.log_end()}")
        wait_for("a clean node", lambda: not baseline.left(runtime, runtime.ids), 10 * FACTOR)
    sys.exit(steps.finish())


if __name__ == "__main__":
    if sys.argv[1:] not in (["before"], ["after"]):
        sys.exit(__doc__)
    mounted()
    before() if sys.argv[1] == "before" else after()

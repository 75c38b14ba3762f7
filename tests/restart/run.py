#!/usr/bin/env python3
"""The daemon is killed under 20 pods, and the machine "reboots": nothing is lost or invented.

    run.py [--runtime NAME] [--pods N]

kill -9: containers go on writing numbered lines, one exits meanwhile. After the restart all are
listed, the exit code and time are right, no line is lost or doubled, stop and remove work.
Reboot (simulated: processes, cgroups and the state directory gone, a new boot id): sandboxes
NOTREADY, containers EXITED 255, new pods start.

(containerd 2.4.2 loses the exit code of the one that exits meanwhile: that step fails there.)
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import leaks, options  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
COUNT = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.05; done"
EXIT = "sleep 3; exit 42"


class Pods:
    """Pods of one container each, made and looked at through crictl."""

    def __init__(self, session):
        self.s, self.c = session, Crictl(session.endpoint, session.factor)
        self.logs = os.path.join(session.work, "logs")
        os.makedirs(self.logs, exist_ok=True)
        self.made = {}  # name: (pod, container)

    def make(self, name, script):
        pod_config = written(self.s.work, "pod.json", {
            "metadata": {"name": name, "namespace": "restart", "attempt": 0, "uid": "uid-" + name},
            "log_directory": self.logs, "linux": {}})
        config = written(self.s.work, "container.json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sh", "-c", script],
            "log_path": name + ".log", "linux": {}})
        pod = self.c.id("runp", pod_config)
        container = self.c.id("create", pod, config, pod_config)
        self.c("start", container)
        self.s.runtime.ids.update((pod, container))
        self.made[name] = (pod, container)

    def status(self, name):
        return self.c.json("inspect", self.made[name][1])["status"]

    def remove(self):
        for pod, _ in self.made.values():
            self.c("stopp", pod)
            self.c("rmp", "--force", pod)
        self.made.clear()

    def numbers(self, name):
        """The numbers in a container's log, in order; parts of lines are an error."""
        with open(os.path.join(self.logs, name + ".log")) as f:
            lines = f.read().splitlines()
        matches = [re.match(r"\S+ stdout F line (\d+)$", line) for line in lines[:-1]]
        expect(all(matches), f"{name}: a broken line among {len(lines)}")
        return [int(m.group(1)) for m in matches]


def killed(s, steps, pods, count):
    with steps.step(f"{count} pods write, one is about to exit", fatal=True):
        pods.c("pull", IMAGE)
        for i in range(count - 1):
            pods.make(f"writer-{i}", COUNT)
        pods.make("exits", EXIT)
    with steps.step("kill -9, wait for the exit, start again", fatal=True):
        before = {n: pods.numbers(n)[-1:] for n in pods.made if n != "exits"}
        s.runtime.kill(signal.SIGKILL)
        gone = time.time()
        time.sleep(4 * max(1, s.factor / 3))
        s.runtime.start()
        wait_for("an answer", lambda: pods.c.run("version")[0] == 0, 20 * s.factor)
    with steps.step("all are listed"):
        expect(len(pods.c("pods", "-q", "--state", "ready").split()) == count, "pods: " + pods.c("pods"))
        expect(len(pods.c("ps", "-q").split()) == count - 1, "running: " + pods.c("ps", "-a"))
    with steps.step("exit code and time"):
        status = pods.status("exits")
        expect(status["state"] == "CONTAINER_EXITED" and status["exitCode"] == 42, str(status))
        out = subprocess.run(["date", "-d", status["finishedAt"], "+%s"], stdout=subprocess.PIPE, check=True).stdout
        finished = int(out)
        expect(gone - 3 * s.factor <= finished <= gone + 4 * max(1, s.factor / 3),
               f"finished at {finished}, the daemon was killed at {gone:.0f}")
    with steps.step("the containers went on; exec works"):
        _, container = pods.made["writer-0"]
        expect(pods.c("exec", "--sync", container, "echo", "here").strip() == "here", "exec")
        last = {n: pods.numbers(n)[-1] for n in before}
        still = [n for n in before if before[n] and last[n] <= before[n][0] + 20]
        expect(not still, f"did not go on meanwhile: {still[:5]}")
    with steps.step("no line is lost or doubled"):
        for name in before:
            numbers = pods.numbers(name)
            expect(numbers == list(range(1, len(numbers) + 1)), f"{name}: {gap(numbers)}")
    with steps.step("stop and remove"):
        pods.remove()
        expect(not pods.c("pods", "-q").strip() and not pods.c("ps", "-a", "-q").strip(), "still listed")


def gap(numbers):
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            return f"line {number} where {expected} should be"
    return "?"


def rebooted(s, steps, pods):
    """As after a power cut: every process and the tmpfs are gone, files under root stay."""
    with steps.step("pods before the reboot", fatal=True):
        for i in range(3):
            pods.make(f"old-{i}", COUNT)
    with steps.step("reboot (simulated)", fatal=True):
        keep = set(s.baseline.processes)
        s.runtime.kill(signal.SIGKILL)
        for pid in [p for p in leaks.descendants() if p not in keep]:
            # The end of a PID namespace's first process has taken others with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for("their end", lambda: not [p for p in leaks.descendants() if p not in keep], 20 * s.factor)
        clear_volatile(s)
        s.runtime.start()
        wait_for("an answer", lambda: pods.c.run("version")[0] == 0, 20 * s.factor)
    with steps.step("sandboxes are NOTREADY, containers EXITED 255"):
        listed = json.loads(pods.c("pods", "-o", "json"))["items"]
        expect([p["state"] for p in listed] == ["SANDBOX_NOTREADY"] * 3, str([p["state"] for p in listed]))
        for name in pods.made:
            status = pods.status(name)
            expect(status["state"] == "CONTAINER_EXITED" and status["exitCode"] == 255,
                   f"{status['state']} {status['exitCode']}")
    with steps.step("a new pod starts"):
        pods.make("new", COUNT)
        wait_for("its first lines", lambda: len(pods.numbers("new")) > 2, 10 * s.factor)
    with steps.step("the old ones are removed"):
        pods.remove()


def clear_volatile(s):
    """What a reboot takes: mounts, links, rules, cgroups, /run, the boot id."""
    for _ in range(3):
        for point in reversed([m for m in leaks.mounts() if m.startswith(s.work + "/")]):
            subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL, check=False)
    for link in leaks.links():
        if link not in s.baseline.links:
            subprocess.run(["ip", "link", "delete", link], stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["nft", "flush", "ruleset"], check=False)
    for path in sorted(leaks.cgroups(s.runtime.cgroup_root), key=len, reverse=True):
        os.rmdir(path)
    shutil.rmtree(s.runtime.state)
    if os.path.exists(s.runtime.socket):
        os.unlink(s.runtime.socket)
    new = os.path.join(s.work, "boot_id")
    with open(new, "w") as f:
        f.write(f"{uuid.uuid4()}\n")
    subprocess.run(["mount", "--bind", new, BOOT_ID], check=True)
    s.baseline.mounts.append(BOOT_ID)  # ours; it goes with the namespace


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--pods", type=int, default=20)
    args = parser.parse_args()
    if args.host:
        sys.exit("the simulated reboot needs namespaces of its own")
    steps = Steps("restart")
    with options.session(args, steps) as s:
        pods = Pods(s)
        killed(s, steps, pods, args.pods)
        rebooted(s, steps, pods)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

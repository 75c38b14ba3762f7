#!/usr/bin/env python3
"""Every limit of a container is read back from its cgroup, and devices are refused by default.

    run.py [--runtime NAME]

The values are read on the host, from the cgroup that /proc/PID/cgroup names: cgroup v1 or v2,
whichever the machine has.
"""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import options  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
TOP = "/sys/fs/cgroup"
V2 = os.path.exists(TOP + "/cgroup.controllers")
LIMIT = "memory.max" if V2 else "memory/memory.limit_in_bytes"
MIB = 1 << 20

RESOURCES = {
    "cpu_period": 100000, "cpu_quota": 50000, "cpu_shares": 512,
    "memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 96 * MIB,
    "oom_score_adj": 500, "cpuset_cpus": "0", "cpuset_mems": "0",
}
ONLY_V2 = {
    "hugepage_limits": [{"page_size": "2MB", "limit": 4 * MIB}],
    "unified": {"memory.high": str(48 * MIB), "pids.max": "77", "memory.oom.group": "1"},
}
# file: content, by version
WANTED_V2 = {
    "cpu.max": "50000 100000", "cpu.weight": "59", "memory.max": str(64 * MIB), "memory.swap.max": str(32 * MIB),
    "cpuset.cpus": "0", "cpuset.mems": "0", "hugetlb.2MB.max": str(4 * MIB),
    "memory.high": str(48 * MIB), "pids.max": "77", "memory.oom.group": "1",
}
WANTED_V1 = {
    "cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000", "cpu/cpu.shares": "512",
    "memory/memory.limit_in_bytes": str(64 * MIB), "memory/memory.memsw.limit_in_bytes": str(96 * MIB),
    "cpuset/cpuset.cpus": "0", "cpuset/cpuset.mems": "0",
}
UPDATE = ("--cpu-quota", "30000", "--cpu-period", "50000", "--cpu-share", "1024", "--memory", str(80 * MIB),
          "--cpuset-cpus", "0-1")
UPDATED_V2 = {"cpu.max": "30000 50000", "cpu.weight": "100", "memory.max": str(80 * MIB), "cpuset.cpus": "0-1",
              "memory.high": str(48 * MIB), "pids.max": "77"}
UPDATED_V1 = {"cpu/cpu.cfs_quota_us": "30000", "cpu/cpu.cfs_period_us": "50000", "cpu/cpu.shares": "1024",
              "memory/memory.limit_in_bytes": str(80 * MIB), "cpuset/cpuset.cpus": "0-1"}


def cgroup_files(pid):
    """Reads a process's cgroup files: a function from "controller/file" (v1) or "file" (v2)."""
    with open(f"/proc/{pid}/cgroup") as f:
        rows = [line.strip().split(":", 2) for line in f]
    paths = {c: path for _, controllers, path in rows for c in controllers.split(",")}

    def read(name):
        where = TOP + paths[""] if V2 else os.path.join(TOP, name.partition("/")[0]) + paths[name.partition("/")[0]]
        with open(os.path.join(where, name if V2 else name.partition("/")[2])) as f:
            return f.read().strip()
    return read


def compare(read, wanted):
    wrong = []
    for name, value in wanted.items():
        try:
            found = read(name)
        except FileNotFoundError:
            found = "no such file"
        if found != value:
            wrong.append(f"{name}: {found!r}, not {value!r}")
    expect(not wrong, "; ".join(wrong))


class Pod:
    def __init__(self, session, c):
        self.s, self.c = session, c
        self.config = written(session.work, "pod.json", {
            "metadata": {"name": "limits", "namespace": "cgroups", "attempt": 0, "uid": "uid-limits"},
            "log_directory": session.work, "linux": {}})
        self.id = c.id("runp", self.config)
        session.runtime.ids.add(self.id)

    def run(self, name, **config):
        path = written(self.s.work, name + ".json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log", **config})
        container = self.c.id("create", self.id, path, self.config)
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container, self.c.json("inspect", container)["info"]["pid"]


def limits(steps, c, pod):
    with steps.step("every limit is in the kernel", fatal=True):
        container, pid = pod.run("limited", linux={"resources": {**RESOURCES, **(ONLY_V2 if V2 else {})}})
        read = cgroup_files(pid)
        compare(read, WANTED_V2 if V2 else WANTED_V1)
    with steps.step("oom_score_adj"):
        with open(f"/proc/{pid}/oom_score_adj") as f:
            expect(f.read().strip() == "500", "oom_score_adj is not 500")
    with steps.step("update changes what it names and nothing else"):
        c("update", *UPDATE, container)
        compare(read, UPDATED_V2 if V2 else UPDATED_V1)
    with steps.step("a swap limit below the memory limit is refused, nothing changes"):
        path = written(pod.s.work, "bad.json", {
            "metadata": {"name": "bad"}, "image": {"image": IMAGE}, "command": ["true"], "log_path": "bad.log",
            "linux": {"resources": {"memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 32 * MIB}}})
        code, out, _ = c.run("create", pod.id, path, pod.config)
        if code == 0:  # then at the start at the latest
            pod.s.runtime.ids.add(out.strip())
            c.fails("start", out.strip())
    with steps.step("without limits: none of the kernel's defaults is changed"):
        _, pid = pod.run("free", linux={})
        read = cgroup_files(pid)
        if V2:
            compare(read, {"memory.max": "max", "cpu.max": "max 100000"})
        else:
            compare(read, {"cpu/cpu.cfs_quota_us": "-1"})


def gone(read):
    try:
        read(LIMIT)
    except FileNotFoundError:
        return True
    return False


def ends(steps, c, pod):
    with steps.step("the cgroup goes when the container ends, the container stays"):
        container, pid = pod.run("short", linux={})
        read = cgroup_files(pid)
        expect(read(LIMIT), LIMIT)
        c("stop", "--timeout", "0", container)
        wait_for("its cgroup to go", lambda: gone(read), 10 * pod.s.factor)
        status = c.json("inspect", container)["status"]
        expect(status["state"] == "CONTAINER_EXITED" and status["exitCode"] == 137, str(status)[:300])
        c("stats", container)
        c("rm", container)


def devices(steps, c, pod):
    disk = os.stat("/").st_dev
    attempt = "mknod /tmp/%s %s %d %d && head -c 16 /tmp/%s | wc -c"
    with steps.step("a node made by mknod does not open the disk or /dev/fuse", fatal=True):
        container, _ = pod.run("plain", linux={})
        for name, kind, major, minor in (("disk", "b", os.major(disk), os.minor(disk)), ("fuse", "c", 10, 229)):
            code, out, err = c.run("exec", "--sync", container, "sh", "-c",
                                   attempt % (name, kind, major, minor, name))
            expect("Operation not permitted" in out + err and "16" not in out, f"{name}: {code} {out!r} {err!r}")
    with steps.step("it is the device rule: /dev/zero made the same way reads"):
        out = c("exec", "--sync", container, "sh", "-c", attempt % ("zero", "c", 1, 5, "zero"))
        expect(out.strip() == "16", out)
    with steps.step("a device that the configuration names opens, with its rights only"):
        name = {"host_path": "/dev/fuse", "container_path": "/dev/given", "permissions": "r"}
        container, _ = pod.run("given", devices=[name], linux={})
        c("exec", "--sync", container, "sh", "-c", "exec 3< /dev/given")
        c.fails("exec", "--sync", container, "sh", "-c", "exec 3<> /dev/given")


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps(f"cgroups v{2 if V2 else 1}")
    subprocess.run(["modprobe", "-q", "fuse"], check=False)
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        with steps.step("a pod", fatal=True):
            c("pull", IMAGE)
            pod = Pod(s, c)
        steps.run(limits, steps, c, pod)
        steps.run(ends, steps, c, pod)
        steps.run(devices, steps, c, pod)
        with steps.step("the pod's own cgroup goes when it is stopped"):
            read = cgroup_files(c.json("inspectp", pod.id)["info"]["pid"])
            expect(read(LIMIT), LIMIT)
            c("stopp", pod.id)
            wait_for("its cgroup to go", lambda: gone(read), 10 * s.factor)
        with steps.step("remove"):
            c("rmp", "--force", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

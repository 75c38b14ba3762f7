#!/usr/bin/env python3
"""The metrics, stats and events of a runtime against what the kernel says.

    run.py [--runtime NAME]

crictl asks; every number that the host can read as well is compared with the host's own reading, on
cgroup v1 and v2. What a kernel cannot tell (pressure on cgroup v1) must be absent, not 0. In a throwaway
node (--host) swap is switched on and huge pages are set aside for the time of a step.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import leaks, options  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402
from world import COMMON, IMAGE, MIB, NAMES, V2, Metrics, Node, cgroup_file, not_told, number, value  # noqa: E402
import devices  # noqa: E402
import memory  # noqa: E402
import pods  # noqa: E402


def descriptors(steps, c):
    with steps.step("56 descriptors with help and labels", fatal=True):
        found = {d["name"]: d for d in c.json("metricdescs")["descriptors"]}
        expect(set(found) == NAMES, f"missing {NAMES - set(found)}, unknown {set(found) - NAMES}")
        for d in found.values():
            expect(d["help"] and d["labelKeys"][:5] == COMMON, str(d))
        return {name: d["labelKeys"] for name, d in found.items()}


def values(steps, node, keys, container, pid):
    c = node.c
    with steps.step("every metric has a value, or a reason for none", fatal=True):
        m = Metrics(c, keys, node.pod)
        mine = m.containers[container]
        have = {name for name, _ in mine} | {name for name, _ in m.pod}
        absent = not_told(pid, node.s.runtime.root)
        expect(have == NAMES - absent, f"no value of {sorted(NAMES - absent - have)}; one of {sorted(have & absent)}")
    with steps.step("labels are those of kubelet's cAdvisor"):
        labels = mine["container_memory_rss", ()][0]
        expect((labels["namespace"], labels["pod"], labels["container"]) == ("shop", "web", "main"), str(labels))
        expect(labels["id"] == f"{node.parent}/{container}" and labels["name"] == container, str(labels))
        expect("busybox" in labels["image"], str(labels))
        labels = m.pod["container_network_receive_bytes_total", ("eth0",)][0]
        expect((labels["pod"], labels["container"], labels["id"]) == ("web", "", node.parent), str(labels))
    with steps.step("limits are those in the kernel"):
        wanted = {"spec_cpu_period": 100000, "spec_cpu_quota": 20000, "spec_memory_limit_bytes": 64 * MIB,
                  "spec_memory_reservation_limit_bytes": 0}
        found = {name: value(mine, name) for name in wanted}
        expect(found == wanted, str(found))
        expect(abs(value(mine, "spec_cpu_shares") - 512) < 20, f"shares {value(mine, 'spec_cpu_shares')}")
        limit = cgroup_file(pid, "pids", "pids.max", "pids.max")
        expect(value(mine, "threads_max") == (0 if limit == "max" else int(limit)), limit)
        with open(f"/proc/{pid}/limits") as f:
            soft = re.search(r"^Max open files\s+(\d+)", f.read(), re.M).group(1)
        expect(value(mine, "ulimits_soft", "max_open_files") == int(soft), soft)
    with steps.step("processes, threads, descriptors and sockets"):
        host = {p for p in cgroup_file(pid, "pids", "cgroup.procs", "cgroup.procs").split()}
        fds = [os.readlink(f"/proc/{p}/fd/{n}") for p in host for n in os.listdir(f"/proc/{p}/fd")]
        expect(value(mine, "processes") == len(host) and value(mine, "threads") == len(host), f"host: {host}")
        expect(value(mine, "file_descriptors") == len(fds), f"host: {fds}")
        sockets = [f for f in fds if f.startswith("socket:")]
        expect(sockets and value(mine, "sockets") == len(sockets), f"host: {sockets}")
    with steps.step("memory and faults"):
        usage = int(cgroup_file(pid, "memory", "memory.usage_in_bytes", "memory.current"))
        expect(abs(value(mine, "memory_usage_bytes") - usage) < 8 * MIB, f"host: {usage}")
        expect(0 < value(mine, "memory_working_set_bytes") <= value(mine, "memory_usage_bytes"), "working set")
        expect(value(mine, "memory_max_usage_bytes") >= value(mine, "memory_working_set_bytes"), "peak")
        expect(value(mine, "memory_failures_total", "pgfault", "container") > 0, "pgfault")
        expect(value(mine, "oom_events_total") == 0, "OOM")
    with steps.step("the filesystem"):
        device = next(extra for name, extra in mine if name == "container_fs_limit_bytes")
        host = os.statvfs(node.s.runtime.root)
        expect(value(mine, "fs_limit_bytes", *device) == host.f_blocks * host.f_frsize, f"host: {host}")
        expect(value(mine, "fs_inodes_total", *device) == host.f_files, f"host: {host}")
        with open("/proc/self/mountinfo") as f:
            sources = {line.split(" - ")[1].split()[1] for line in f}
        expect(device[0] in sources, f"{device} is no source of a mount")
    with steps.step("start time and time stamps"):
        started = c.json("inspect", container)["status"]["startedAt"]
        host = int(subprocess.run(["date", "-d", started, "+%s"], stdout=subprocess.PIPE, check=True).stdout)
        expect(value(mine, "start_time_seconds") == host, f"{started}")
        again = Metrics(c, keys, node.pod).containers[container]
        stale = [key for key, (_, _, at) in again.items() if key in mine and not time.time() * 1e9 >= at > mine[key][2]]
        expect(again.keys() == mine.keys() and not stale, f"time stamps do not advance: {stale}")
        expect(min(at for _, _, at in mine.values()) > (time.time() - 60) * 1e9, "time stamps are old")


def changes(steps, node, keys, container, pid):
    def metric(name, *extra):
        return value(Metrics(node.c, keys, node.pod).containers[container], name, *extra)

    with steps.step("CPU: the limit is seen in use, rate and throttling"):
        node.c("exec", "--sync", container, "sh", "-c", "(while :; do :; done) & echo $! > /tmp/busy")
        try:
            wait_for("2 s of CPU", lambda: metric("cpu_usage_seconds_total", "total") >= 2, 90 * node.s.factor, 0.5)
            node.c.json("stats", "-o", "json", "--id", container)
            time.sleep(1)
            cpu = node.c.json("stats", "-o", "json", "--id", container)["stats"][0]["cpu"]
            rate = number(cpu["usageNanoCores"])
            expect(20e6 < rate < 400e6, f"{rate / 1e9:.3f} of a core with a limit of 0.2")
            host = cgroup_file(pid, "cpuacct", "cpuacct.usage", "cpu.stat")
            host = int(host.split()[1]) * 1000 if V2 else int(host)
            expect(0 <= host - number(cpu["usageCoreNanoSeconds"]) < 5e9, f"host: {host}, {cpu}")
            expect(metric("cpu_cfs_throttled_periods_total") > 0, "not throttled")
        finally:
            node.inside(container, "kill $(cat /tmp/busy)")
    with steps.step("writable layer: 32 MiB and 50 files are seen within 10 s"):
        node.inside(container, "head -c 33554432 /dev/zero > /tmp/big; mkdir /tmp/d; cd /tmp/d; "
                    "for i in $(seq 50); do : > $i; done")
        device = next(extra for name, extra in Metrics(node.c, keys, node.pod).containers[container]
                      if name == "container_fs_usage_bytes")

        def seen():
            layer = node.c.json("stats", "-o", "json", "--id", container)["stats"][0]["writableLayer"]
            expect(os.path.isdir(layer["fsId"]["mountpoint"]), str(layer))
            return number(layer["usedBytes"]) >= 32 * MIB and number(layer["inodesUsed"]) >= 51
        wait_for("stats", seen, 10 * node.s.factor)
        expect(metric("fs_usage_bytes", *device) >= 32 * MIB, "metrics")
    with steps.step("network: what the host sends arrives in the counters"):
        address = node.c.json("inspectp", node.pod)["status"]["network"]["ip"]
        received = lambda: value(Metrics(node.c, keys, node.pod).pod, "network_receive_bytes_total", "eth0")  # noqa: E731
        before = received()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            for _ in range(3):
                s.sendto(bytes(1000), (address, 9))
        wait_for("3000 bytes more", lambda: received() >= before + 3000, 10 * node.s.factor)
        with open(f"/proc/{pid}/net/dev") as f:
            host = next(line.split()[1:] for line in f if line.strip().startswith("eth0:"))
        pod = Metrics(node.c, keys, node.pod).pod
        expect(abs(value(pod, "network_receive_bytes_total", "eth0") - int(host[0])) < 2000, f"host: {host}")


def stats(steps, node, container, quiet):
    c = node.c
    with steps.step("stats: pressure and faults where the kernel has them"):
        one = c.json("stats", "-o", "json", "--id", container)["stats"][0]
        psi = one["cpu"].get("psi"), one["memory"].get("psi"), (one.get("io") or {}).get("psi")
        expect(all(psi) if V2 else not any(psi), f"pressure {psi}")
        expect(number(one["memory"]["availableBytes"]) <= 64 * MIB and number(one["memory"]["pageFaults"]) > 0, str(one))
    with steps.step("statsp: network, processes and the sum of its containers"):
        pod = c.json("statsp", "-o", "json", "--id", node.pod)["stats"][0]["linux"]
        names = {x["attributes"]["metadata"]["name"] for x in pod["containers"]}
        expect(names == {"main", "quiet"}, str(names))
        default = pod["network"]["defaultInterface"]
        expect(default["name"] == "eth0" and number(default["rxBytes"]) > 0 and number(default["txBytes"]) > 0, str(default))
        expect(number(pod["process"]["processCount"]) >= 3, str(pod["process"]))
        parts = sum(number(x["cpu"]["usageCoreNanoSeconds"]) for x in pod["containers"])
        expect(number(pod["cpu"]["usageCoreNanoSeconds"]) >= parts, "the pod has less than its containers")
    with steps.step("a container that has ended is in no list; the others are"):
        c("stop", "--timeout", "0", quiet)
        ids = {x["attributes"]["id"] for x in c.json("stats", "-o", "json")["stats"]}
        expect(ids == {container}, str(ids))
        names = {x["attributes"]["metadata"]["name"]
                 for x in c.json("statsp", "-o", "json", "--id", node.pod)["stats"][0]["linux"]["containers"]}
        expect(names == {"main"}, str(names))


class Listener:
    """`crictl events` in the background."""

    def __init__(self, c, path):
        self.path = path
        with open(path, "wb") as out:
            self.process = subprocess.Popen([*c.base, "events", "-o", "json"], stdout=out, stderr=out,
                                            stdin=subprocess.DEVNULL)

    def heard(self):
        """(type, container, names of the containers in it), in order; crictl prints one JSON value after another."""
        with open(self.path) as f:
            text = f.read()
        events, decoder, at = [], json.JSONDecoder(), 0
        while (at := text.find("{", at)) >= 0:
            try:
                event, at = decoder.raw_decode(text, at)
            except ValueError:
                break
            expect(event["podSandboxStatus"]["id"], f"no pod in {event}")
            events.append((event["containerEventType"].removeprefix("CONTAINER_").removesuffix("_EVENT"),
                           event["containerId"], int(event["createdAt"])))
        return events

    def end(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(20)


LIFE = ["CREATED", "STARTED", "STOPPED", "DELETED"]


def events(steps, node):
    c, work = node.c, node.s.work
    with steps.step("events: what nobody heard goes to the first who listens", fatal=True):
        first = Listener(c, work + "/first")
        pod = node.pod
        wait_for("the pod's start", lambda: ("STARTED", pod) in [e[:2] for e in first.heard()], 20 * node.s.factor)
    with steps.step("events: two listeners hear a life in order"):
        second = Listener(c, work + "/second")
        # The second listens once it hears something.
        probes = []

        def hears():
            probes.append(node.run(f"probe{len(probes)}", "true"))
            return second.heard()
        wait_for("the second listens", hears, 30 * node.s.factor, 0.5)
        config = written(work, "other.json", {
            "metadata": {"name": "other", "namespace": "shop", "attempt": 0, "uid": "uid-other"},
            "log_directory": work, "linux": {}})
        pod = c.id("runp", config)
        path = written(work, "life.json", {"metadata": {"name": "life"}, "image": {"image": IMAGE},
                                           "command": ["sleep", "600"], "log_path": "life.log"})
        container = c.id("create", pod, path, config)
        node.s.runtime.ids.update((pod, container))
        c("start", container)
        c("stop", "--timeout", "0", container)
        c("rm", container)
        c("stopp", pod)
        c("rmp", pod)

        def complete():
            for listener in (first, second):
                for of in (pod, container):
                    heard = [kind for kind, who, _ in listener.heard() if who == of]
                    expect(heard == LIFE, f"{heard}")
                times = [at for _, who, at in listener.heard() if who in (pod, container)]
                expect(times == sorted(times), f"times {times}")
            return True
        wait_for("both have heard all", complete, 20 * node.s.factor)
        first.end()
        second.end()


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps(f"metrics, cgroup v{2 if V2 else 1}")
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        keys = descriptors(steps, c)
        with steps.step("a pod with two containers", fatal=True):
            c("pull", IMAGE)
            node = Node(s, c)
            container = node.run("main", "sh", "-c", "nc -l -p 8080 & exec sleep 3600", linux={"resources": {
                "cpu_period": 100000, "cpu_quota": 20000, "cpu_shares": 512,
                "memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 64 * MIB}})
            quiet = node.run("quiet", "sleep", "3600")
            pid = c.json("inspect", container)["info"]["pid"]
            wait_for("nc listens", lambda: ":1F90 " in node.inside(container, "cat /proc/net/tcp /proc/net/tcp6"),
                     20 * s.factor)
        steps.run(devices.traffic, steps, node, keys, container, pid)
        steps.run(values, steps, node, keys, container, pid)
        steps.run(changes, steps, node, keys, container, pid)
        steps.run(memory.swap, steps, node, keys, throwaway=args.host)
        steps.run(memory.huge_pages, steps, node, keys, throwaway=args.host)
        steps.run(pods.processes_and_pressure, steps, node, pid)
        steps.run(pods.interfaces, steps, node, keys, pid)
        steps.run(stats, steps, node, container, quiet)
        steps.run(events, steps, node)
        with steps.step("the pod's cgroups go with it"):
            c("rmp", "--force", node.pod)
            left = leaks.cgroups(node.parent) + leaks.cgroups(os.path.dirname(node.parent))
            expect(not left, f"left: {left}")
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

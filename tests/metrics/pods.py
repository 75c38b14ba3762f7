"""The stats of a pod as a whole: its cgroup's processes and pressure, all its interfaces."""

import os
import subprocess

from harness.report import expect, wait_for
from world import V2, Metrics, number, value

FIELDS = {"rxBytes": 0, "rxErrors": 2, "txBytes": 8, "txErrors": 10}  # columns of /proc/net/dev
METRICS = {"receive_bytes": 0, "receive_packets": 1, "receive_errors": 2, "receive_packets_dropped": 3,
           "transmit_bytes": 8, "transmit_packets": 9, "transmit_errors": 10, "transmit_packets_dropped": 11}


def stats_of(node):
    return node.c.json("statsp", "-o", "json", "--id", node.pod)["stats"][0]["linux"]


def in_cgroup(node, controller, name):
    """What is in a file of the pod's own cgroup."""
    with open(os.path.join("/sys/fs/cgroup", "" if V2 else controller, node.parent.strip("/"), name)) as f:
        return f.read()


def pressures(node):
    """{(resource, some or full): (total in ns, averages)} by the kernel."""
    found = {}
    for resource in ("cpu", "memory", "io"):
        for line in in_cgroup(node, "", resource + ".pressure").splitlines():
            kind, *words = line.split()
            numbers = dict(word.split("=") for word in words)
            found[resource, kind] = int(numbers["total"]) * 1000, [float(numbers[f"avg{n}"]) for n in (10, 60, 300)]
    return found


def processes_and_pressure(steps, node, pid):
    with steps.step("statsp: processes are those of the pod's cgroup"):
        top = os.path.join("/sys/fs/cgroup", "" if V2 else "pids", node.parent.strip("/"))
        processes = []
        for base, _, _ in os.walk(top):
            with open(os.path.join(base, "cgroup.procs")) as f:
                processes += f.read().split()
        told = number(stats_of(node)["process"]["processCount"])
        expect(told == len(processes) >= 3 and str(pid) in processes, f"{told}, host: {processes}")
    with steps.step("statsp: pressure of CPU, memory and I/O is the kernel's" if V2 else "statsp: no pressure on cgroup v1"):
        if not V2:
            pod = stats_of(node)
            told = [(pod.get(resource) or {}).get("psi") for resource in ("cpu", "memory", "io")]
            return expect(not any(told), f"{told}")
        before, pod, after = pressures(node), stats_of(node), pressures(node)
        for (resource, kind), (total, averages) in after.items():
            at, was = f"{resource} {kind}", before[resource, kind]
            told = pod[resource]["psi"][kind.capitalize()]
            expect(was[0] <= number(told["Total"]) <= total, f"{at}: {told}, host: {was}, {total}")
            if was[1] == averages:
                found = [float(told.get(f"Avg{n}", 0)) for n in (10, 60, 300)]
                expect(found == averages, f"{at}: {found}, host: {averages}")
        # It has been throttled and has waited for its disk.
        expect(all(after[resource, "some"][0] > 0 for resource in ("cpu", "io")), f"no pressure: {after}")


def host_counters(pid):
    with open(f"/proc/{pid}/net/dev") as f:
        rows = (line.split(":", 1) for line in f if ":" in line)
        return {name.strip(): [int(n) for n in numbers.split()] for name, numbers in rows}


def interfaces(steps, node, keys, pid):
    """A second and a third interface, as a plugin may give a pod: they have figures, eth0 stays the default."""
    def inside(*command):
        subprocess.run(["nsenter", "-t", str(pid), "-n", *command], check=True)

    with steps.step("statsp, metricsp: every interface with its counters, eth0 as the default"):
        inside("ip", "link", "add", "aaa0", "type", "veth", "peer", "name", "net1")
        for name in ("aaa0", "net1"):
            inside("ip", "link", "set", name, "up")
        inside("ip", "address", "add", "192.0.2.9/30", "dev", "net1")
        inside("bash", "-c", "echo x > /dev/udp/192.0.2.10/9")  # it is asked for by ARP
        wait_for("a packet", lambda: host_counters(pid)["net1"][8] and host_counters(pid)["aaa0"][0], 10 * node.s.factor)
        before, network = host_counters(pid), stats_of(node)["network"]
        metrics, after = Metrics(node.c, keys, node.pod).pod, host_counters(pid)
        expect(network["defaultInterface"]["name"] == "eth0", str(network))
        found = {one["name"]: one for one in (network["defaultInterface"], *network["interfaces"])}
        expect(len(found) == 1 + len(network["interfaces"]), str(network))
        expect(found.keys() == before.keys() - {"lo"} and {"eth0", "aaa0", "net1"} <= found.keys(), f"{found.keys()}")
        for name, one in found.items():
            for field, column in FIELDS.items():
                expect(before[name][column] <= number(one[field]) <= after[name][column], f"{name}: {one}, host: {before[name]}")
            for field, column in METRICS.items():
                told = value(metrics, f"network_{field}_total", name)
                expect(before[name][column] <= told <= after[name][column], f"{name}: {field} {told}, host: {before[name]}")
        inside("ip", "link", "delete", "net1")
        left = {one["name"] for one in stats_of(node)["network"].get("interfaces") or []}
        expect(not left & {"aaa0", "net1"}, f"still there: {left}")

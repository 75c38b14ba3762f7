"""What the tests of metrics and stats share: a pod, crictl's answers about it, and the kernel's own figures."""

import contextlib
import os
import re

from harness.report import expect
from walkthrough import written

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
MIB = 1 << 20
COMMON = ["id", "image", "namespace", "pod", "container"]

NAMES = {"container_" + name for name in """
blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total cpu_cfs_throttled_seconds_total
cpu_system_seconds_total cpu_usage_seconds_total cpu_user_seconds_total file_descriptors fs_inodes_free
fs_inodes_total fs_limit_bytes fs_reads_bytes_total fs_reads_total fs_usage_bytes fs_writes_bytes_total
fs_writes_total hugetlb_max_usage_bytes hugetlb_usage_bytes last_seen memory_cache memory_failcnt
memory_failures_total memory_kernel_usage memory_mapped_file memory_max_usage_bytes memory_rss memory_swap
memory_usage_bytes memory_working_set_bytes network_receive_bytes_total network_receive_errors_total
network_receive_packets_dropped_total network_receive_packets_total network_transmit_bytes_total
network_transmit_errors_total network_transmit_packets_dropped_total network_transmit_packets_total
oom_events_total pressure_cpu_stalled_seconds_total pressure_cpu_waiting_seconds_total
pressure_io_stalled_seconds_total pressure_io_waiting_seconds_total pressure_memory_stalled_seconds_total
pressure_memory_waiting_seconds_total processes sockets spec_cpu_period spec_cpu_quota spec_cpu_shares
spec_memory_limit_bytes spec_memory_reservation_limit_bytes spec_memory_swap_limit_bytes start_time_seconds
threads threads_max ulimits_soft""".split()}
# Metrics that some kernels cannot tell: their names, and the file that says so on v1 and v2 (SIZE: of huge pages).
PER_FILE = (
    ("blkio|fs_reads|fs_writes", "blkio", "blkio.throttle.io_service_bytes_recursive", "io.stat"),
    ("hugetlb_usage", "hugetlb", "hugetlb.SIZE.usage_in_bytes", "hugetlb.SIZE.current"),
    ("hugetlb_max", "hugetlb", "hugetlb.SIZE.max_usage_in_bytes", None),
    ("memory_max_usage", "memory", "memory.max_usage_in_bytes", "memory.peak"),
    *((f"pressure_{name}", "", None, f"{name}.pressure") for name in ("cpu", "memory", "io")),
)


def number(text):
    """crictl prints 64-bit numbers as text; `value` is a message."""
    return int(text.get("value", 0) if isinstance(text, dict) else text)


class Metrics:
    """One answer of metricsp: {(name, labels after the common ones): (labels, value, timestamp)}."""

    def __init__(self, c, keys, pod):
        pods = [p for p in c.json("metricsp")["podMetrics"] if p["podSandboxId"] == pod]
        expect(len(pods) == 1, f"{len(pods)} answers for the pod")
        self.pod, self.containers = self._read(pods[0].get("metrics", []), keys), {}
        for one in pods[0].get("containerMetrics", []):
            self.containers[one["containerId"]] = self._read(one["metrics"], keys)

    @staticmethod
    def _read(metrics, keys):
        found = {}
        for m in metrics:
            values, names = m["labelValues"], keys[m["name"]]
            expect(len(values) == len(names), f"{m['name']}: {values} for {names}")
            labels = dict(zip(names, values))
            extra = tuple(v for k, v in labels.items() if k not in [*COMMON, "name"])
            found[m["name"], extra] = labels, number(m["value"]), int(m["timestamp"])
        return found


def value(found, name, *extra):
    key = ("container_" + name, extra)
    expect(key in found, f"no {key}")
    return found[key][1]


class Node:
    def __init__(self, session, c):
        self.s, self.c = session, c
        # As kubelet has it: a cgroup of the pod's own.
        self.parent = session.runtime.cgroup_root + "-pods/pod1"
        self.pod_config = written(session.work, "pod.json", {
            "metadata": {"name": "web", "namespace": "shop", "attempt": 0, "uid": "uid-metrics"},
            "log_directory": session.work, "linux": {"cgroup_parent": self.parent}})
        self.pod = c.id("runp", self.pod_config)
        session.runtime.ids.add(self.pod)

    def run(self, name, *command, **config):
        path = written(self.s.work, name + ".json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": [*command],
            "log_path": name + ".log", **config})
        container = self.c.id("create", self.pod, path, self.pod_config)
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container

    @contextlib.contextmanager
    def running(self, *arguments, **config):
        """A container for the block only."""
        container = self.run(*arguments, **config)
        try:
            yield container
        finally:
            self.c("rm", "--force", container)

    def inside(self, container, script):
        return self.c("exec", "--sync", container, "sh", "-c", script)


def cgroup_path(pid, controller, v1, v2):
    """The path of a file of the process's cgroup; absent where this version has no such file or controller."""
    with open(f"/proc/{pid}/cgroup") as f:
        paths = {c: path for _, cs, path in (line.strip().split(":", 2) for line in f) for c in cs.split(",")}
    if V2:
        return v2 and f"/sys/fs/cgroup{paths['']}/{v2}"
    return f"/sys/fs/cgroup/{controller}{paths[controller]}/{v1}" if v1 and controller in paths else None


def cgroup_file(pid, controller, v1, v2):
    """What is in a file of the process's cgroup."""
    with open(cgroup_path(pid, controller, v1, v2)) as f:
        return f.read().strip()


def huge_page_sizes():
    """Sizes of huge pages in bytes, the smallest first; none: the kernel has none."""
    if not os.path.isdir("/sys/kernel/mm/hugepages"):
        return []
    return sorted(int(re.search(r"(\d+)kB", name)[1]) << 10 for name in os.listdir("/sys/kernel/mm/hugepages"))


def size_name(size):
    """As files of cgroups name a size of huge pages."""
    return f"{size >> 30}GB" if size >> 30 else f"{size >> 20}MB" if size >> 20 else f"{size >> 10}KB"


def on_block_device(directory):
    """Is the filesystem of that directory on a block device, whose traffic the kernel counts?"""
    device = os.stat(directory).st_dev
    return os.path.exists(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")


def not_told(pid, root):
    """Names of metrics of which this very kernel says nothing for that process, whose writable layer is below `root`."""
    sizes, out = huge_page_sizes(), set()
    for pattern, controller, v1, v2 in PER_FILE:
        path = cgroup_path(pid, controller, v1, v2)
        if path and "SIZE" in path:
            path = path.replace("SIZE", size_name(sizes[0])) if sizes else None
        told = path and os.path.exists(path) and (controller != "blkio" or on_block_device(root))
        out |= set() if told else {name for name in NAMES if re.search(pattern, name)}
    return out

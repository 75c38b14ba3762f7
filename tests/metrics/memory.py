"""Swap and huge pages in stats and metrics. A throwaway node gets both for the time of a step."""

import contextlib
import os
import subprocess

from harness.report import expect, wait_for
from world import MIB, V2, Metrics, cgroup_file, cgroup_path, huge_page_sizes, number, size_name, value

LIMIT, SWAP_LIMIT, FILLED = 32 * MIB, 64 * MIB, 48 * MIB
SWAP_FILE = 64 * MIB
NR_HUGE_PAGES = "/proc/sys/vm/nr_hugepages"


@contextlib.contextmanager
def swap_space(work, throwaway):
    """Whether the machine has swap in the block; in a throwaway node a file that is made for it."""
    if not os.path.exists("/proc/swaps"):
        yield False
        return
    with open("/proc/swaps") as f:
        there = len(f.readlines()) > 1
    if there or not throwaway:
        yield there
        return
    path = os.path.join(work, "swap")
    with open(path, "wb") as f:
        os.fchmod(f.fileno(), 0o600)
        os.posix_fallocate(f.fileno(), 0, SWAP_FILE)
    subprocess.run(["mkswap", path], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", path], check=True)
    try:
        yield True
    finally:
        subprocess.run(["swapoff", path], check=True)
        os.remove(path)


def swapped(pid):
    """The kernel's count of the container's swap."""
    text = cgroup_file(pid, "memory", "memory.stat", "memory.swap.current")
    return int(text if V2 else dict(line.split() for line in text.splitlines())["total_swap"])


def swap_limit(pid):
    if V2:
        return int(cgroup_file(pid, "memory", None, "memory.swap.max"))
    both = int(cgroup_file(pid, "memory", "memory.memsw.limit_in_bytes", None))
    return both - int(cgroup_file(pid, "memory", "memory.limit_in_bytes", None))


def swap(steps, node, keys, throwaway):
    name = "swap: use, rest and limit are the kernel's"
    with swap_space(node.s.work, throwaway) as there:
        if not there:
            return steps.left_out(name, "this machine has no swap")
        with steps.step(name), node.running("swaps", "sleep", "3600", linux={"resources": {
                "memory_limit_in_bytes": LIMIT, "memory_swap_limit_in_bytes": LIMIT + SWAP_LIMIT}}) as container:
            pid = node.c.json("inspect", container)["info"]["pid"]
            expect(swap_limit(pid) == SWAP_LIMIT, f"limit {swap_limit(pid)}")
            node.inside(container, f"head -c {FILLED} /dev/zero > /dev/shm/filled")
            wait_for("swap in use", lambda: swapped(pid) >= FILLED - LIMIT, 10 * node.s.factor)
            before = swapped(pid)
            one = node.c.json("stats", "-o", "json", "--id", container)["stats"][0]["swap"]
            listed = node.c.json("statsp", "-o", "json", "--id", node.pod)["stats"][0]["linux"]["containers"]
            metrics = Metrics(node.c, keys, node.pod)
            mine, after = metrics.containers[container], swapped(pid)
            of_pod = {x["attributes"]["id"]: x["swap"] for x in listed}
            for use in (number(one["swapUsageBytes"]), number(of_pod[container]["swapUsageBytes"]),
                        value(mine, "memory_swap")):
                expect(min(before, after) - MIB <= use <= max(before, after) + MIB, f"{use}, host: {before}, {after}")
            for stats in (one, of_pod[container]):
                expect(number(stats["swapAvailableBytes"]) == SWAP_LIMIT - number(stats["swapUsageBytes"]), str(stats))
                expect(int(stats["timestamp"]) > 0, str(stats))
            expect(value(mine, "spec_memory_swap_limit_bytes") == SWAP_LIMIT, "limit in the metrics")
            expect(value(metrics.pod, "memory_swap") >= value(mine, "memory_swap") - MIB, "the pod has less")
            node.inside(container, "rm /dev/shm/filled")  # that filesystem is the pod's
            none = [x["swap"] for x in listed if x["attributes"]["metadata"]["name"] == "main"][0]
            expect(number(none["swapUsageBytes"]) == number(none["swapAvailableBytes"]) == 0, f"without swap: {none}")


@contextlib.contextmanager
def reserved(count, throwaway):
    """Whether so many huge pages of the usual size are free in the block; a throwaway node sets them aside."""
    def free():
        with open("/proc/meminfo") as f:
            return dict(line.split(":", 1) for line in f).get("HugePages_Free", "0")

    if throwaway and huge_page_sizes():
        with open(NR_HUGE_PAGES) as f:
            before = f.read()
        with open(NR_HUGE_PAGES, "w") as f:
            f.write(str(int(before) + count))
        try:
            yield int(free()) >= count
        finally:
            with open(NR_HUGE_PAGES, "w") as f:
                f.write(before)
    else:
        yield int(free()) >= count


def huge_pages(steps, node, keys, throwaway):
    name = "huge pages: use by size is the kernel's"
    with open("/proc/meminfo") as f:
        size = next((int(line.split()[1]) << 10 for line in f if line.startswith("Hugepagesize:")), 0)
    tag = size_name(size)
    with reserved(3, throwaway) as there:
        pause = node.c.json("inspectp", node.pod)["info"]["pid"]
        path = cgroup_path(pause, "hugetlb", f"hugetlb.{tag}.usage_in_bytes", f"hugetlb.{tag}.current")
        if not there or not path or not os.path.exists(path):
            why = "no free huge pages" if path and os.path.exists(path) else "no hugetlb controller"
            return steps.left_out(name, f"this machine has {why}")
        directory = os.path.join(node.s.work, "huge")
        os.mkdir(directory)
        subprocess.run(["mount", "-t", "hugetlbfs", "-o", f"pagesize={size}", "huge", directory], check=True)
        try:
            with steps.step(name), node.running(
                    "huge", "sleep", "3600", mounts=[{"container_path": "/huge", "host_path": directory}],
                    linux={"resources": {"hugepage_limits": [{"page_size": tag, "limit": 2 * size}]}}) as container:
                use_of_huge_pages(node, keys, container, size)
        finally:
            subprocess.run(["umount", directory], check=True)
            os.rmdir(directory)


def use_of_huge_pages(node, keys, container, size):
    tag = size_name(size)
    pid = node.c.json("inspect", container)["info"]["pid"]

    def metric(name):
        found = Metrics(node.c, keys, node.pod).containers[container]
        return value(found, name, tag)

    def host():
        return int(cgroup_file(pid, "hugetlb", f"hugetlb.{tag}.usage_in_bytes", f"hugetlb.{tag}.current"))
    expect(metric("hugetlb_usage_bytes") == host() == 0, f"at first {metric('hugetlb_usage_bytes')}, host: {host()}")
    node.inside(container, f"fallocate -l {2 * size} /huge/taken")
    expect(metric("hugetlb_usage_bytes") == host() == 2 * size, f"{metric('hugetlb_usage_bytes')}, host: {host()}")
    node.inside(container, f"! fallocate -l {3 * size} /huge/more && rm -f /huge/*")
    expect(metric("hugetlb_usage_bytes") == host() == 0, f"given back: {metric('hugetlb_usage_bytes')}, host: {host()}")
    if not V2:
        expect(metric("hugetlb_max_usage_bytes") == 2 * size, f"most {metric('hugetlb_max_usage_bytes')}")

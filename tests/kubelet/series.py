"""kubelet's metrics of containers are the same series whether it asks the runtime or its own cAdvisor."""

import re

from harness.report import expect, wait_for

GATE = "PodAndContainerStatsFromCRI"
# Not in the CRI's list of names, which critest has.
OF_CADVISOR = re.compile(r"container_(cpu_cfs_burst_|cpu_load_|health_state|memory_total_(in)?active_file|tasks_state)")
# cAdvisor has no figures of a container's filesystem from a runtime that it reaches as it reaches containerd.
OF_CRI = re.compile(r"container_fs_(inodes_free|inodes_total|limit_bytes|usage_bytes)$")
RUNNING = ("web", "writer")  # all the time; others of the pod come and go


def scrape(kubelet):
    """({series of containers}, {series of the pod's network}) of the pod `app`: name and labels; the cgroup that the
    network's are told of is the pod's or its sandbox's."""
    containers, network = set(), set()
    for line in kubelet.get("/metrics/cadvisor").splitlines():
        found = re.match(r'(container_\w+)\{(.*pod="app-node1".*)\} ', line)
        if not found:
            continue
        name, labels = found[1], dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
        if labels["container"] in RUNNING:
            containers.add((name, *sorted(labels.items())))
        elif not labels["container"] and "_network_" in name:
            labels["id"] = "..."
            network.add((name, *sorted(labels.items())))
    return containers, network


def same_series(s, kubelet, steps):
    """Starts kubelet again without the gate: the containers are the same, so their labels are to be."""
    if GATE not in kubelet.gates:
        return
    with steps.step("/metrics/cadvisor: the series and labels of cAdvisor, with and without the runtime's metrics"):
        by_cri, network = scrape(kubelet)
        expect(by_cri and network, "nothing by the CRI")
        kubelet.restart([gate for gate in kubelet.gates if gate != GATE])
        wait_for("/healthz", kubelet.healthy, 60 * s.factor)

        def same():
            by_cadvisor, its_network = scrape(kubelet)
            first = {one for one in by_cri if not OF_CRI.match(one[0])}
            second = {one for one in by_cadvisor if not OF_CADVISOR.match(one[0])}
            expect(first == second, f"only by CRI: {sorted(first - second)[:5]}, only by cAdvisor: {sorted(second - first)[:5]}")
            expect(network == its_network, f"network: {sorted(network ^ its_network)[:5]}")
            return True
        wait_for("the same series", same, 60 * s.factor, 1)

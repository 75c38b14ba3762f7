"""The real kubelet, standalone, in a directory and a cgroup of its own."""

import collections
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request

from harness import runtimes
from harness.report import Failure

CGROUPS = "/sys/fs/cgroup"
CONFIG = """apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
{v1_only}{gates}failSwapOn: false
staticPodPath: {work}/manifests
containerRuntimeEndpoint: unix://{socket}
cgroupDriver: cgroupfs
cgroupRoot: {cgroup}
enforceNodeAllocatable: []
authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}
authorization: {{mode: AlwaysAllow}}
address: 127.0.0.1
readOnlyPort: 10255
podLogsDir: {work}/podlogs
volumePluginDir: {work}/volume-plugins
makeIPTablesUtilChains: false
fileCheckFrequency: 1s
syncFrequency: 5s
evictionHard: {{memory.available: 1Mi}}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
"""
# kubelet sets these; the machine gets them back.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
           "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes")

# Errors of the log that speak of the runtime, the CRI, PLEG or cAdvisor.
SUSPECT = re.compile(r"runtime|\bcri\b|pleg|cadvisor|sandbox|container|cgroup|image|probe", re.I)
# ... and that are in order, with the reason: what in kubelet (v1.36.1) or its cAdvisor (v0.56.2) writes the line. "Peer": the
# same line comes with containerd 2.4.2 below the same kubelet. A pattern with `again` (as berth says it, or the peer)
# fits only a container that kubelet had begun to remove twice, one with `begun` once, one with `orphan` a pod whose directory
# kubelet has cleaned up.
CALL = r"remote_runtime\.go:\d+\] "
REMOVED = r"(?:no container \\\"(?P<again>[0-9a-f]{64})\\\" on this node|an error occurred when try to find container \\\"(?P<again_peer>[0-9a-f]{64})\\\": not found)"
BACK_OFF = r'failed to \\"StartContainer\\" for \\"(?:failing|hungry)\\" with CrashLoopBackOff: \\"[^"]*\\"'
YOUNG = r"(?:container runtime status check may not have completed yet|PLEG is not healthy: pleg has yet to be successful)"
ALLOWED = (
    (r'pod_workers\.go:\d+\] "Error syncing pod, skipping" err="\[?' + BACK_OFF + "(?:, " + BACK_OFF + r')*\]?" pod=',
     "the test's failing containers are restarted with back-off; peer"),
    (r'kubelet\.go:\d+\] "Skipping pod synchronization" err="\[?' + YOUNG + "(?:, " + YOUNG + r')?\]?"$',
     "kubelet's own start, before updateRuntimeUp and the first relist; peer"),
    (r'"Image garbage collection failed once\. Stats initialization may not have completed yet" err="invalid capacity 0 on image filesystem"',
     "kubelet's own start: StartGarbageCollection comes before cAdvisor's first round; peer"),
    (r'"eviction manager: failed to check if we have separate container filesystem\. Ignoring\." err="no imagefs label for configured runtime"',
     "kubelet's ImageFsInfo asks cAdvisor for the label of the image file system, which it has for cri-o alone; peer"),
    (r'summary_sys_containers\.go:\d+\] "Failed to get system container stats" err="failed to get cgroup stats for '
     r'\\"(\S+-kubelet/kubepods)\\": failed to get container info for \\"\1\\": unknown container \\"\1\\""',
     "kubelet's own start: the eviction manager's first look (GetSystemContainersStats) comes before cAdvisor has found, by "
     "reading cgroups, the one that kubelet has just made; no call of the runtime is in it; peer"),
    (r'"Eviction manager: failed to construct signal" err="system container \\"pods\\" not found in metrics"',
     "makeSignalObservations after the line above; peer"),
    (r'"Failed to ensure process in container with oom score" err="failed to find pid namespace of init process"',
     "kubelet's own process: the machine's init is in no pid namespace it can read; peer"),
    (CALL + r'"Version from runtime service failed" err="rpc error: code = Canceled desc = context canceled"$',
     "standalone kubelet asks for the runtime's version whenever it wants the node's address (generateAPIPodStatus -> "
     "getHostIPsAnyWay -> initialNode -> setters.VersionInfo), and the worker's context ends as its pod goes; peer"),
    # (It has a handler for the container, and no figures in InMemoryCache before that one's first housekeeping.)
    (r'cadvisor_stats_provider\.go:\d+\] "Partial failure issuing cadvisor\.ContainerInfoV2" err="partial failures: '
     r'\[\\"[^"]*\\": RecentStats: unable to find data in memory cache\](?:, \[\\"[^"]*\\": RecentStats: unable to find data in memory cache\])*"',
     "cAdvisor has not yet measured a cgroup that it has just found (GetContainerInfoV2): its own cache, nobody is asked"),
    (CALL + r'"ContainerStatus from runtime service failed" err="rpc error: code = NotFound desc = ' + REMOVED,
     "kubelet removes a container again (DeleteContainer, containerGC) that it has just removed: removeContainerLog asks for its "
     "status; peer"),
    (CALL + r'"ContainerStatus from runtime service failed" err="rpc error: code = NotFound desc = no container \\"(?P<begun>[0-9a-f]{64})\\" '
     r'on this node" pod="[^"]+" containerID="(?P=begun)"',
     "a pod's worker lists the containers and then asks for each (getPodContainerStatuses, whose comment calls it normal), while "
     "containerGC, in another goroutine, removes one"),
    (r'kuberuntime_gc\.go:\d+\] "Failed to remove container" err="failed to get container status .*code = NotFound desc = ' + REMOVED,
     "as above, told by containerGC; peer"),
    # Seen in one run of thirty; kubelet makes the pod again.
    (r'CreateContainerConfigError: (?:\\")?open \S+/pods/(?P<orphan>[0-9a-f]{32})/etc-hosts: no such file or directory',
     "kubelet's housekeeping (HandlePodCleanups -> cleanupOrphanedPodDirs) took the directory of a pod that it was just making "
     "for an orphan's, and said so; no call of the runtime is in it"),
)
# ... of a peer alone.
ALLOWED_BY_RUNTIME = {
    "containerd": (
        (r"failed to set removing state for container .*: container is already in removing state",
         "two removals at once, from kubelet's garbage collection and its pod worker; berth lets the second wait"),
    ),
}


def unified():
    return os.path.exists(CGROUPS + "/cgroup.controllers")


def hierarchies():
    """Where each cgroup hierarchy is mounted."""
    if unified():
        return [CGROUPS]
    return [e.path for e in os.scandir(CGROUPS) if e.is_dir() and not e.is_symlink()]


def make_cgroup(name):
    """A cgroup in every hierarchy, usable by kubelet as its root."""
    for top in hierarchies():
        path = os.path.join(top, name.strip("/"))
        os.makedirs(path, exist_ok=True)
        if top.endswith("/cpuset"):
            for key in ("cpuset.cpus", "cpuset.mems"):
                with open(os.path.join(top, key)) as f:
                    value = f.read()
                with open(os.path.join(path, key), "w") as f:
                    f.write(value)
        if unified():
            with open(os.path.join(top, "cgroup.controllers")) as f:
                enable = " ".join("+" + c for c in f.read().split())
            for parent in (top, path):
                with open(os.path.join(parent, "cgroup.subtree_control"), "w") as f:
                    f.write(enable)


def cgroups_below(name):
    return [base for top in hierarchies() for base, _, _ in os.walk(os.path.join(top, name.strip("/")))]


def remove_cgroup(name):
    for path in sorted(cgroups_below(name), key=len, reverse=True):
        os.rmdir(path)


def node_ip():
    out = subprocess.run(["ip", "-j", "route", "get", "198.51.100.1"], stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out)[0]["prefsrc"]


def explain(log, allowed):
    """(error lines of a log that nothing explains, {reason: how often it explained one})"""
    bad, explained, removals, orphans = [], {}, collections.Counter(), set()
    for line in log.splitlines():
        removals.update(re.findall(r'"RemoveContainer" containerID="([0-9a-f]{64})"', line))
        orphans.update(re.findall(r'"Cleaned up orphaned pod volumes dir" podUID="([0-9a-f]{32})"', line))
        if not re.match(r"[EF]\d{4} ", line) or not SUSPECT.search(line):
            continue
        reason = next((r for pattern, r in allowed if fits(pattern, line, removals, orphans)), None)
        if reason:
            explained[reason] = explained.get(reason, 0) + 1
        else:
            bad.append(line)
    return bad, explained


def fits(pattern, line, removals, orphans):
    found = re.search(pattern, line)
    named = {key: value for key, value in found.groupdict().items() if value} if found else {}
    often = {"begun": 1}
    return found and all(value in orphans if key == "orphan" else removals[value] >= often.get(key, 2)
                         for key, value in named.items())


class Kubelet:
    """A running kubelet; `work` holds its manifests, root, logs and log file."""

    def __init__(self, work, runtime, gates=()):
        self.gates = gates
        self.work, self.runtime = os.path.join(work, "kubelet"), runtime
        self.manifests, self.root = self.work + "/manifests", self.work + "/root"
        self.cgroup, self.log = runtime.cgroup_root + "-kubelet", self.work + "/kubelet.log"
        self.process, self.sysctls = None, {}

    def _feature_gates(self):
        return "featureGates: {%s}\n" % ", ".join(f"{g}: true" for g in self.gates) if self.gates else ""

    def start(self):
        for d in ("manifests", "root", "pki", "podlogs"):
            os.makedirs(os.path.join(self.work, d))
        make_cgroup(self.cgroup)
        for key in SYSCTLS:
            with open("/proc/sys/" + key) as f:
                self.sysctls[key] = f.read()
        self._run()

    def restart(self, gates):
        """Another kubelet in its place, with these feature gates; pods live on."""
        self._end()
        self.gates = gates
        self._run()

    def _run(self):
        config = self.work + "/config.yaml"
        with open(config, "w") as f:
            f.write(CONFIG.format(work=self.work, socket=self.runtime.socket, cgroup=self.cgroup,
                                  gates=self._feature_gates(),
                                  v1_only="" if unified() else "failCgroupV1: false\n"))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [runtimes.tool("KUBELET"), "--config", config, "--root-dir", self.root,
                 "--cert-dir", self.work + "/pki", "--hostname-override", "node1", "--node-ip", node_ip(),
                 *self.runtime.kubelet_arguments],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def get(self, path, port=10255):
        if self.process.poll() is not None:
            raise Failure(f"kubelet ended with {self.process.poll()}: {self.log_text()[-1500:]}")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def healthy(self):
        return self.get("/healthz", 10248) == "ok"

    def pods(self):
        """/pods by name, without the node's suffix."""
        items = json.loads(self.get("/pods")).get("items") or []
        return {p["metadata"]["name"].removesuffix("-node1"): p for p in items}

    def add(self, manifest):
        target = os.path.join(self.manifests, os.path.basename(manifest))
        shutil.copy(manifest, target + ".tmp~")  # kubelet leaves out what is hidden or half there
        os.rename(target + ".tmp~", target)

    def remove(self, name):
        os.unlink(os.path.join(self.manifests, name + ".yaml"))

    def log_text(self):
        with open(self.log, errors="replace") as f:
            return f.read()

    def errors(self):
        """As `explain` says of this kubelet's log."""
        return explain(self.log_text(), ALLOWED + ALLOWED_BY_RUNTIME.get(self.runtime.name, ()))

    def _end(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def stop(self):
        if self.process is None:
            return
        self._end()
        for key, value in self.sysctls.items():
            with open("/proc/sys/" + key, "w") as f:
                f.write(value)
        for _ in range(20):
            try:
                return remove_cgroup(self.cgroup)
            except OSError:
                time.sleep(0.5)

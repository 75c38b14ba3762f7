"""The real kubelet, standalone, in a directory and a cgroup of its own."""

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
"""
# kubelet sets these; the machine gets them back.
SYSCTLS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
           "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes")

# Errors of the log that speak of the runtime, the CRI, PLEG or cAdvisor.
SUSPECT = re.compile(r"runtime|\bcri\b|pleg|cadvisor|sandbox|container|cgroup|image|probe", re.I)
# ... and that are in order, with the reason.
ALLOWED = (
    (r"pod_workers\.go.*CrashLoopBackOff", "the test's failing containers are restarted with back-off"),
    (r"pod_workers\.go.*failed to \"StartContainer\" for \"(failing|hungry)\"", "the failing containers, as above"),
    (r"Skipping pod synchronization.*(pleg has yet to be successful|status check may not have completed yet)", "kubelet's own start, before the first relist"),
    (r"Image garbage collection failed once. Stats initialization may not have completed",
     "kubelet's own start, before cAdvisor's first round"),
    (r"eviction manager: failed to check if we have separate container filesystem.*no imagefs label",
     "kubelet knows a label of the image file system for cri-o alone"),
    (r"Failed to get system container stats.*/kubepods.*unknown container",
     "kubelet's own start, before cAdvisor has seen the cgroup that kubelet has just made"),
    (r"Eviction manager: failed to construct signal.*system container .*pods.* not found in metrics", "as above"),
    (r"Failed to ensure process in container with oom score",
     "kubelet's own process: the machine's init is in no pid namespace it can read"),
    (r"\"Version from runtime service failed\".*code = Canceled.*context canceled",
     "kubelet's own call: a pod worker asks for the node (standalone: initialNode) and is cancelled as its pod ends"),
    (r"cadvisor_stats_provider\.go.*Partial failure.*RecentStats: unable to find data in memory cache",
     "cAdvisor has not yet looked at a container that has just started"),
    (r"\"ContainerStatus from runtime service failed\".*code = NotFound",
     "kubelet asks again for a container that it has just removed"),
    (r"kuberuntime_gc\.go.*\"Failed to remove container\".*failed to get container status.*code = NotFound", "as above"),
    (r"Failed to create existing container: .*: no process runs", "cAdvisor finds the cgroup of a container that has just ended"),
)

# ... with a feature gate on.
ALLOWED_BY_GATE = {
    "EventedPLEG": (
        (r"\"Version from runtime service failed\".*code = Canceled", "an event breaks off kubelet's own work"),
        # Seen in one run of eight; the container that is there is the one that kubelet goes on with.
        (r"exists as [0-9a-f]{64}: remove it first", "kubelet makes a container that it has just made, from an older status"),
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
        config = self.work + "/config.yaml"
        with open(config, "w") as f:
            f.write(CONFIG.format(work=self.work, socket=self.runtime.socket, cgroup=self.cgroup,
                                  gates=self._feature_gates(),
                                  v1_only="" if unified() else "failCgroupV1: false\n"))
        with open(self.log, "wb") as log:
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
        """(lines that nothing explains, {reason: how often it explained one})"""
        bad, explained = [], {}
        allowed = ALLOWED + tuple(entry for gate in self.gates for entry in ALLOWED_BY_GATE.get(gate, ()))
        for line in self.log_text().splitlines():
            if not re.match(r"[EF]\d{4} ", line) or not SUSPECT.search(line):
                continue
            reason = next((r for pattern, r in allowed if re.search(pattern, line)), None)
            if reason:
                explained[reason] = explained.get(reason, 0) + 1
            else:
                bad.append(line)
        return bad, explained

    def stop(self):
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for key, value in self.sysctls.items():
            with open("/proc/sys/" + key, "w") as f:
                f.write(value)
        for _ in range(20):
            try:
                return remove_cgroup(self.cgroup)
            except OSError:
                time.sleep(0.5)

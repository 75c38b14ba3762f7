"""Starts a runtime in a directory of its own: berth, or containerd to compare it with."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def versions():
    """The variables of hack/versions, where the environment does not set them."""
    script = os.path.join(REPO, "hack", "versions")
    out = subprocess.run(["bash", "-c", f". {script}; env -0"], stdout=subprocess.PIPE, check=True).stdout
    return dict(item.split("=", 1) for item in out.decode().split("\0") if "=" in item)


def tool(name):
    """The path of a program named in hack/versions (CRICTL, ...), or the end of the test."""
    path = os.environ.get(name) or versions().get(name, "")
    if not os.access(path, os.X_OK):
        hack = "install-peers" if name in ("CONTAINERD", "CONTAINERD_SHIM", "RUNC") else "install-tools"
        sys.exit(f"missing tool: {name.lower()} ({path}); hack/{hack} builds it")
    return path


def toml(value):
    """A value as TOML writes it, on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


class Runtime:
    """A runtime as a child process. `work` holds everything of it; `certs` is its certs.d."""

    name = "?"
    leaves_network = False     # it keeps links, rules and cgroups after its last pod
    state_files_allowed = r"$^"
    kubelet_arguments = ()
    environment = {}
    extra = {}                 # more keys of the configuration: name to value
    handlers = {}              # runtime handlers to configure: name to the path of an OCI runtime, or to keys and values

    def __init__(self, work, certs, factor=1.0):
        tag = os.path.basename(work).rpartition("-")[2]
        self.work, self.certs, self.factor = work, certs, factor
        self.root, self.state = os.path.join(work, "root"), os.path.join(work, "state")
        self.socket = os.path.join(work, "cri.sock")
        self.cgroup_root = f"/berth-test-{tag}"
        self.log = os.path.join(work, self.name + ".log")
        self.process = None
        self.ids = set()  # pods and containers that were made; no file may name them at the end

    def command(self):
        """Writes the configuration; gives the command line."""
        raise NotImplementedError

    def start(self):
        for d in (self.root, self.state):
            os.makedirs(d, exist_ok=True)
        command = self.command()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **self.environment})
        end = time.monotonic() + 20 * self.factor
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{self.name} does not start ({self.process.poll()}): " + self.log_end())
            time.sleep(0.02)

    def _answers(self):
        with socket.socket(socket.AF_UNIX) as s:
            try:
                s.connect(self.socket)
            except OSError:
                return False
        return True

    def log_end(self, size=3000):
        with open(self.log, errors="replace") as f:
            return f.read()[-size:]

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def kill(self, sig=signal.SIGKILL):
        """Ends the daemon; its pods are its own affair."""
        self.process.send_signal(sig)
        try:
            return self.process.wait(20 * self.factor)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "killed: did not end on its own"

    @contextlib.contextmanager
    def configured(self, **extra):
        """Started anew with these keys of its configuration, and afterwards as before."""
        before = self.extra
        try:
            self._again(extra)
            yield
        finally:
            self._again(before)

    def _again(self, extra):
        self.extra = extra
        self.stop()
        self.start()

    def stop(self):
        """Graceful end; what it returned (0 is well)."""
        return self.kill(signal.SIGTERM) if self.alive() else self.process.poll()


def berth_program(path):
    """The program berth of a build, given itself or by its directory, or the end of the test; its monitor lies beside it."""
    path = os.path.realpath(path)
    program = os.path.join(path, "berth") if os.path.isdir(path) else path
    for one in (program, os.path.join(os.path.dirname(program), "berth-monitor")):
        if not os.access(one, os.X_OK) or not os.path.isfile(one):
            sys.exit(f"missing tool: {os.path.basename(one)} ({one}); hack/build builds it")
    return program


class Berth(Runtime):
    """`build`: the program of another build than this tree's (or that of `BERTH`). `number`: among those of one test, for their networks."""

    name = "berth"
    state_files_allowed = r"\.lock$|/lock$"

    def __init__(self, work, certs, factor=1.0, build=None, number=0):
        super().__init__(work, certs, factor)
        self.build, self.number = build, number

    def _known(self, program, config):
        """The keys that this build knows: another one may be older or newer than the tests."""
        if self.build is None:
            return config
        default = subprocess.run([program, "config", "default"], stdout=subprocess.PIPE, check=True).stdout.decode()
        known = set(re.findall(r"^#?\s*(\w+) = ", default, re.M))
        return {key: value for key, value in config.items() if key in known}

    def command(self):
        program = self.build or os.environ.get("BERTH") or os.path.join(REPO, "target", "release", "berth")
        if not os.access(program, os.X_OK):
            sys.exit(f"missing tool: berth ({program}); hack/build builds it")
        number = (os.getpid() + self.number) % 250
        bridge = f"bt{os.getpid()}" + (f"x{self.number}" if self.number else "")
        config = {
            "socket": self.socket, "root": self.root, "state": self.state,
            "registry_config_path": self.certs, "nri_socket": os.path.join(self.work, "nri.sock"),
            "nri_plugin_dir": os.path.join(self.work, "nri-plugins"),
            "nri_plugin_config_dir": os.path.join(self.work, "nri-conf"),
            "cdi_spec_dirs": os.path.join(self.work, "cdi"), "hooks_dir": os.path.join(self.work, "hooks.d"),
            "blockio_config_file": os.path.join(self.work, "blockio.yaml"),
            "cgroup_root": self.cgroup_root, "network": "bridge", "bridge": bridge,
            "ipv4_pool": f"10.85.{number}.0/24", "ipv6_pool": f"fd85:0:0:{number:x}::/64",
            "log_level": os.environ.get("BERTH_LOG", "debug"), **self.extra,
        }
        path = os.path.join(self.work, "berth.toml")
        with open(path, "w") as f:
            f.writelines(f"{key} = {json.dumps(value)}\n" for key, value in self._known(program, config).items())
            for name, keys in self.handlers.items():
                keys = keys if isinstance(keys, dict) else {"path": keys}
                f.write(f"[runtimes.{name}]\n" + "".join(f"{key} = {toml(value)}\n" for key, value in keys.items()))
        self.kubelet_arguments = (f"--containerd={self.socket}",)
        return [program, "serve", "--config", path]


CONTAINERD_CONFIG = """version = 3
root = "{root}"
state = "{state}"
[grpc]
address = "{socket}"
[plugins."io.containerd.cri.v1.images".registry]
config_path = "{certs}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "registry.k8s.io/pause:3.10.1"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
disable_hugetlb_controller = false
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni", "{bin}"]
conf_dir = "{work}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
runtime_path = "{shim}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{runc}"
[plugins."io.containerd.nri.v1.nri"]
disable = true
"""
CNI_CONFIG = """{{"cniVersion": "1.0.0", "name": "test", "plugins": [
 {{"type": "bridge", "bridge": "ct{pid}", "isGateway": true, "ipMasq": true, "hairpinMode": true,
  "ipam": {{"type": "host-local", "dataDir": "{work}/ipam", "routes": [{{"dst": "0.0.0.0/0"}}],
           "ranges": [[{{"subnet": "10.86.{number}.0/24"}}]]}}}},
 {{"type": "portmap", "capabilities": {{"portMappings": true}}}}]}}
"""


class Containerd(Runtime):
    """containerd with runc: the runtime that the test tools themselves are checked against."""

    name = "containerd"
    leaves_network = True
    state_files_allowed = r"."

    def command(self):
        program, runc, shim = tool("CONTAINERD"), tool("RUNC"), tool("CONTAINERD_SHIM")
        os.makedirs(os.path.join(self.work, "cni"), exist_ok=True)
        with open(os.path.join(self.work, "cni", "10-test.conflist"), "w") as f:
            f.write(CNI_CONFIG.format(pid=os.getpid(), number=os.getpid() % 250, work=self.work))
        path = os.path.join(self.work, "containerd.toml")
        with open(path, "w") as f:
            f.write(CONTAINERD_CONFIG.format(root=self.root, state=self.state, socket=self.socket,
                                             certs=self.certs, work=self.work, shim=shim, runc=runc,
                                             bin=os.path.dirname(program)))
        self.environment = {"PATH": os.path.dirname(runc) + ":" + os.environ["PATH"]}
        self.kubelet_arguments = (f"--containerd={self.socket}",)
        return [program, "--config", path]


RUNTIMES = {r.name: r for r in (Berth, Containerd)}


def remove_tree(path):
    """Also what a failed test left mounted below it."""
    with open("/proc/self/mountinfo") as f:
        points = [line.split()[4] for line in f]
    for point in reversed(points):
        if point.startswith(path + "/"):
            subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL)
    shutil.rmtree(path, ignore_errors=True)

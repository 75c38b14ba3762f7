#!/usr/bin/env python3
"""Keys of `[runtimes.NAME]` through the CRI socket: each has the effect that is promised, or is refused by name.

    run.py [--only PART]

The OCI runtime is crun, behind a script that keeps what it was given and can be told to be slow.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import leaks, oci, options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402
from defaults import defaults  # noqa: E402
from features import features  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
KIB, MIB = 1 << 10, 1 << 20
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
MARK = "98765"  # how long the slow ones sleep: nobody else of this test does

# Keeps config.json and process.json, counts the calls of create, and sleeps while a file says so.
WRAPPER = """#!/bin/sh
here=${{0%/*}}
bundle= process= verb=
for word; do
	case $last in --bundle) bundle=$word ;; --process) process=$word ;; esac
	case $word in create | exec) verb=${{verb:-$word}} ;; esac
	last=$word
done
[ "$verb" != create ] || {{ echo >> "$here/calls"; cp "$bundle/config.json" "$here/config.json"; }}
[ "$verb" != exec ] || cp "$process" "$here/process.json"
if [ "$verb" = create ] && [ -e "$here/slow" ]; then
	sleep {mark} &
	sleep "$(cat "$here/slow")"
	[ "$(cat "$here/slow")" != {mark} ] || exit 1
	kill $!
fi
exec {real} "$@"
"""


class World:
    """The directory of the tests' own files, and pods of one handler after the other."""

    def __init__(self, session, c):
        self.s, self.c, self.count = session, c, 0

    @property
    def place(self):
        return place(self.s.runtime)

    def noted(self, made):
        self.s.runtime.ids.add(made)
        return made

    def pod_config(self, handler, **more):
        self.count += 1
        name = f"{handler}-{self.count}"
        return written(self.s.work, name + ".json", {
            "metadata": {"name": name, "namespace": "handlers", "attempt": 0, "uid": "uid-" + name},
            "log_directory": self.s.work, "linux": {}, **more})

    @contextlib.contextmanager
    def pod(self, handler, **more):
        """A pod of a handler, removed at the end: its id and its configuration."""
        config = self.pod_config(handler, **more)
        pod = self.noted(self.c.id("runp", "--runtime", handler, config))
        try:
            yield pod, config
        finally:
            self.c("rmp", "--force", pod)

    def config(self, name, **more):
        return written(self.s.work, name + ".container.json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log", **more})

    def started(self, pod, name="main", **more):
        container = self.noted(self.c.id("create", pod[0], self.config(name, **more), pod[1]))
        self.c("start", container)
        return container

    def refused(self, pod, *parts, **more):
        error = self.c.fails("create", pod[0], self.config("refused", **more), pod[1])
        expect(all(part in error for part in parts), error)

    def shell(self, container, command):
        return self.c("exec", "--sync", container, "sh", "-c", command).strip()

    def given(self, name="config.json"):
        with open(os.path.join(self.place, name)) as f:
            return json.load(f)


def place(runtime):
    return os.path.join(runtime.work, "handlers")


def memory(limit, **more):
    return {"resources": {"memory_limit_in_bytes": limit, **more}}


def sleepers():
    """Processes that the slow ones of this test started: another one may run beside it."""
    return [pid for pid, command in leaks.descendants().items() if command == f"sleep {MARK}"]


def annotations(w, steps):
    with steps.step("annotations reach the OCI runtime by their patterns, and no others", fatal=True):
        given = {"io.katacontainers.config.a": "1", "io.katacontainersx": "2", "other": "3"}
        with w.pod("oci", annotations=given) as pod:
            w.started(pod, annotations={"run.oci.keep": "4", "secret": "5"})
            seen = w.given()["annotations"]
        expect(seen.get("io.katacontainers.config.a") == "1" and seen.get("run.oci.keep") == "4", str(seen))
        expect(not {"io.katacontainersx", "other", "secret"} & set(seen), str(seen))
    with steps.step("an OCI runtime hears of no sandbox: it has made none"):
        expect({"io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"}.isdisjoint(seen), str(seen))
        expect(seen.get("io.kubernetes.cri.container-name") == "main", str(seen))
    with steps.step("annotations that look like berth's own say nothing: not to the runtime, not of the container"):
        own = "io.kubernetes.cri."
        false = {own + "container-name": "root", own + "sandbox-uid": "another", own + "untrusted-workload": "true", own: "x"}
        for handler in ("oci", "berth"):
            with w.pod(handler, annotations=false) as pod:
                container = w.started(pod, annotations=false)
                shown = w.c.json("inspect", container)
                for seen in (shown["info"]["runtimeSpec"]["annotations"], *([w.given()["annotations"]] if handler == "oci" else [])):
                    expect(seen[own + "container-name"] == "main" and seen[own + "sandbox-uid"].startswith("uid-"), str(seen))
                if handler == "oci":
                    expect(not {own, own + "untrusted-workload"} & set(seen), str(seen))
                expect(shown["status"]["annotations"] == false, "CRI shows what CRI gave")


def platforms(w, steps):
    with steps.step("platform_runtime_paths: this node's platform counts, not path"):
        with w.pod("platform") as pod:
            expect(w.shell(w.started(pod), "echo inside") == "inside", "exec")
    with steps.step("without an entry for it path counts: it is not there, and is named"):
        error = w.c.fails("runp", "--runtime", "elsewhere", w.pod_config("elsewhere"))
        expect("/no/such/runtime" in error and "runtimes.elsewhere.path" in error, error)


def floors(w, steps):
    key = "container_min_memory"
    with steps.step("container_min_memory: a smaller limit is refused, the same one is not"):
        with w.pod("berth") as pod:
            w.refused(pod, "memory_limit_in_bytes", str(256 * KIB), f"runtimes.berth.{key}", linux=memory(256 * KIB))
            w.started(pod, linux=memory(512 * KIB))
        with w.pod("large") as pod:
            w.refused(pod, str(8 * MIB), f"runtimes.large.{key} is {12 * MIB}", linux=memory(8 * MIB))
            container = w.started(pod, linux=memory(12 * MIB))
            error = w.c.fails("update", "--memory", str(8 * MIB), container)
            expect(f"runtimes.large.{key}" in error, error)
            w.c("update", "--memory", str(16 * MIB), container)
    with steps.step("container_min_memory = 0: any limit, and none"):
        with w.pod("small") as pod:
            container = w.noted(w.c.id("create", pod[0], w.config("tiny", linux=memory(448 * KIB)), pod[1]))
            w.c("rm", container)
            w.started(pod, "free")


def too_slow(w, handler, before):
    """A creation that takes longer than its time is undone: the error names the key, nothing is left."""
    limit = w.s.runtime.limit()
    with w.pod(handler) as pod:
        files = sorted(os.listdir(os.path.join(w.s.runtime.state, "pods", pod[0])))
        start = time.monotonic()
        w.refused(pod, "DeadlineExceeded", f"runtimes.{handler}.container_create_timeout", f"{limit} s")
        took = time.monotonic() - start
        expect(limit - 0.5 < took < limit + 10 * w.s.factor, f"it took {took:.1f} s")
        wait_for("the slow ones to go", lambda: not sleepers(), 5 * w.s.factor)
        left = sorted(os.listdir(os.path.join(w.s.runtime.state, "pods", pod[0])))
        expect(left == files, f"left in the pod's directory: {set(left) - set(files)}")
        expect(not w.c.json("ps", "-a", "-o", "json", "--pod", pod[0])["containers"], "it is listed")
        before()
        # The name is free again, and the pod as good as before.
        expect(w.shell(w.started(pod, "refused"), "echo well") == "well", "the next one")


def timeouts(w, steps):
    slow, hook = os.path.join(w.place, "slow"), os.path.join(w.place, "hook-slow")

    def told(path, seconds):
        with open(path, "w") as f:
            f.write(str(seconds))
    with steps.step("container_create_timeout: a slow OCI runtime is killed with all that it started"):
        told(slow, MARK)
        too_slow(w, "slow", lambda: os.remove(slow))
    with steps.step("container_create_timeout: so are slow hooks, of berth itself and of the OCI runtime"):
        for handler in ("hooked", "hooked-oci"):
            told(hook, MARK)
            too_slow(w, handler, lambda: os.remove(hook))
    with steps.step("a caller that asks again joins the work: it is done once"):
        impatient = Crictl(w.s.endpoint, w.s.factor)
        told(slow, int(3 * (1 if w.s.factor == 1 else 5 * w.s.factor)))  # its time limit and a half
        with w.pod("patient") as pod:
            os.remove(os.path.join(w.place, "calls"))
            config = w.config("late")
            error = impatient.fails("create", pod[0], config, pod[1])
            expect("DeadlineExceeded" in error, error)
            container = w.noted(w.c.id("create", pod[0], config, pod[1]))
            os.remove(slow)
            expect(w.c.id("create", pod[0], config, pod[1]) == container, "another container")
            w.c("start", container)
            with open(os.path.join(w.place, "calls")) as f:
                expect(len(f.readlines()) == 1, "the runtime made it twice")


def base_specs(w, steps):
    look = ("echo $FROM $BOTH; ulimit -n; ulimit -Hn; cat /proc/sys/net/core/somaxconn; stat -f -c %T /data; "
            "wc -c < /proc/version; touch /x 2> /dev/null || echo read-only; head -c1 /dev/more | wc -c")
    wanted = ["base", "image-or-pod", "77", "88", "99", "tmpfs", "0", "read-only", "1"]
    own = {"envs": [{"key": "BOTH", "value": "image-or-pod"}],
           "linux": {"security_context": {"masked_paths": ["/proc/kcore"]}}}
    for handler in ("based", "based-oci"):
        with steps.step(f"base_runtime_spec: what it says counts ({handler})"):
            with w.pod(handler) as pod:
                container = w.started(pod, **own)
                inside = w.shell(container, look).split()
                expect(inside == wanted, f"{inside}, not {wanted}")
                bounding = w.shell(container, "grep CapBnd /proc/self/status").split()[1]
                expect(int(bounding, 16) == 0b10_0001, f"CapBnd {bounding}")
                limit = "cat /sys/fs/cgroup/" + ("pids.max" if V2 else "pids/pids.max")
                expect(w.shell(container, limit) == "66", w.shell(container, limit))
                if handler == "based-oci":
                    seen = w.given()
                    expect(seen["annotations"].get("from.base") == "yes", str(seen["annotations"]))
        with steps.step(f"base_runtime_spec: what pods say comes over it ({handler})"):
            data = os.path.join(w.place, "data")
            os.makedirs(data, exist_ok=True)
            with w.pod(handler, linux={"sysctls": {"net.core.somaxconn": "55"}}) as pod:
                container = w.started(
                    pod, envs=[{"key": "FROM", "value": "pod"}], mounts=[{"host_path": data, "container_path": "/data"}],
                    linux={"security_context": {"capabilities": {"add_capabilities": ["NET_RAW"]}}})
                expect(w.shell(container, "echo $FROM; cat /proc/sys/net/core/somaxconn").split() == ["pod", "55"], "env, sysctl")
                w.shell(container, "echo here > /data/file")
                expect(os.path.exists(os.path.join(data, "file")), "the pod's volume is not at /data")
                os.remove(os.path.join(data, "file"))
                bounding = w.shell(container, "grep CapBnd /proc/self/status").split()[1]
                expect(int(bounding, 16) == 0b10_0001 | 1 << 13, f"CapBnd {bounding}")


def writable(w, steps):
    # (crictl prints stderr behind stdout.)
    make = "mkdir /sys/fs/cgroup/below 2> /dev/null && echo made || echo refused"
    if not V2:
        with steps.step("cgroup_writable: refused by name on cgroup v1"):
            error = w.c.fails("runp", "--runtime", "writable", w.pod_config("writable"))
            expect("runtimes.writable.cgroup_writable" in error and "cgroup v2" in error, error)
        return
    for handler in ("writable", "writable-oci"):
        with steps.step(f"cgroup_writable: a container may divide its cgroup, but not raise its limits ({handler})"):
            with w.pod(handler) as pod:
                container = w.started(pod, linux=memory(64 * MIB))
                expect(w.shell(container, make) == "made", w.shell(container, "cat /proc/mounts"))
                w.shell(container, "echo $$ > /sys/fs/cgroup/below/cgroup.procs")
                raised = w.shell(container, "(echo max > /sys/fs/cgroup/memory.max) 2> /dev/null && echo raised || echo refused")
                expect(raised == "refused", raised)
                expect(w.shell(container, "cat /sys/fs/cgroup/memory.max") == str(64 * MIB), "memory.max")
    with steps.step("without the key it may not"):
        with w.pod("berth") as pod:
            expect(w.shell(w.started(pod), make) == "refused", "it may")


def affinity(w, steps):
    if os.cpu_count() < 2:
        print("(one CPU: exec_cpu_affinity is not looked at)")
        return
    allowed = "grep Cpus_allowed_list /proc/self/status"

    def cpus(container):
        return w.shell(container, allowed).split()[1]
    both = {"cpuset_cpus": "0-1", "cpu_shares": 2048}
    with steps.step("exec_cpu_affinity: execs run on the first CPU of a container that has its own"):
        with w.pod("first") as pod:
            container = w.started(pod, linux={"resources": both})
            expect(cpus(container) == "0", f"on {cpus(container)}")
            pid = w.c.json("inspect", container)["info"]["pid"]
            with open(f"/proc/{pid}/status") as f:
                expect(re.search(r"Cpus_allowed_list:\s+0-1\n", f.read()), "the container itself was moved")
            w.c("update", "--cpuset-cpus", "1", "--cpu-share", "1024", container)
            expect(cpus(container) == "1", f"after an update on {cpus(container)}")
            shared = w.started(pod, "shared", linux={"resources": {"cpuset_cpus": "0-1", "cpu_shares": 512}})
            expect(cpus(shared) == "0-1", f"one that shares its CPUs on {cpus(shared)}")
        with w.pod("berth") as pod:
            expect(cpus(w.started(pod, linux={"resources": both})) == "0-1", "without the key")
    with steps.step("exec_cpu_affinity: an OCI runtime is told with the container, and with every exec"):
        with w.pod("first-oci") as pod:
            container = w.started(pod, linux={"resources": both})
            w.shell(container, "true")
            for name, process in (("config", w.given()["process"]), ("process", w.given("process.json"))):
                told = process.get("execCPUAffinity")
                expect(told == {"initial": "0", "final": "0"}, f"{name}.json: {told}")
            # crun 1.8 looks at neither: berth moves the process, which may have begun to look by then.
            moved = w.shell(container, f"i=0; until {allowed} | grep -q '[[:space:]]0$' || [ $i = 100 ]; do i=$((i + 1)); sleep 0.05; done; {allowed}")
            expect(moved.split()[1] == "0", f"on {moved}")


def refusals(w, steps):
    bad = os.path.join(w.place, "bad.json")
    with open(bad, "w") as f:
        json.dump({"ociVersion": "1.2.0", "linux": {"intelRdt": {"closID": "x"}}}, f)
    program = w.s.runtime.program()
    for line, parts in (
            ('snapshotter = "x"', ("runtimes.x.snapshotter", "one store of layers")),
            ('sandboxer = "shim"', ("runtimes.x.sandboxer",)), ('runtime_type = "vm"', ("runtimes.x.runtime_type", "Shims")),
            ('type = "vm"', ("runtimes.x.type",)), ('cni_conf_dir = "/x"', ("runtimes.x.cni_conf_dir",)),
            ("cni_max_conf_num = 2", ("runtimes.x.cni_max_conf_num",)),
            ("container_create_timeout = 0", ("runtimes.x.container_create_timeout", "1 to 3600")),
            ('container_min_memory = "x"', ("runtimes.x.container_min_memory", "12MiB")),
            ('exec_cpu_affinity = "x"', ("runtimes.x.exec_cpu_affinity", "`first`")),
            ('base_runtime_spec = "/no/such"', ("runtimes.x.base_runtime_spec", "/no/such", "No such file")),
            (f'base_runtime_spec = "{bad}"', ("runtimes.x.base_runtime_spec", bad, "linux.intelRdt", "leave it out"))):
        with steps.step(f"refused at the start: {line.partition(' ')[0]}"):
            path = os.path.join(w.place, "refused.toml")
            with open(path, "w") as f:
                f.write("[runtimes.x]\n" + line + "\n")
            done = subprocess.run([program, "config", "check", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  check=False)
            out = done.stdout.decode()
            expect(done.returncode != 0 and all(part in out for part in parts), f"{done.returncode}: {out}")


PARTS = (defaults, features, annotations, platforms, floors, timeouts, base_specs, writable, affinity, refusals)


def script(path, text):
    with open(path, "w") as f:
        f.write(text)
    os.chmod(path, 0o755)
    return path


def hook(where, name, text):
    """A base spec with one hook."""
    program = script(os.path.join(where, name), text)
    path = os.path.join(where, name + ".json")
    with open(path, "w") as f:
        json.dump({"ociVersion": "1.2.0", "hooks": {"createRuntime": [{"path": program}]}}, f)
    return path


BASE = {
    "ociVersion": "1.2.0", "root": {"path": "rootfs", "readonly": True}, "annotations": {"from.base": "yes"},
    "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "noNewPrivileges": True,
                "env": ["FROM=base", "BOTH=base"], "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}],
                "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL"]}},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
               {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]}],
    "linux": {"maskedPaths": ["/proc/version"], "sysctl": {"net.core.somaxconn": "99"}, "namespaces": [{"type": "pid"}],
              "devices": [{"path": "/dev/more", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666}],
              "resources": {"pids": {"limit": 66}, "devices": [{"allow": False, "access": "rwm"}]}},
}


class Berth(runtimes.Berth):
    """With all the handlers of this test."""

    def program(self):
        return super().command()[0]

    def limit(self):
        """Seconds of container_create_timeout where something is too slow."""
        return int(2 * self.factor)

    def command(self):
        where = place(self)
        os.makedirs(os.path.join(where, "late"), exist_ok=True)
        wrapper = script(os.path.join(where, "runtime"), WRAPPER.format(mark=MARK, real=oci.handler("crun")))
        base = written(where, "base.json", BASE)
        slow = hook(where, "hook", f"#!/bin/sh\n[ ! -e {where}/hook-slow ] || sleep {MARK}\n")
        here = {f"linux/{ARCHITECTURE}": wrapper}
        self.real = oci.handlers(hidden=True)
        self.handlers = {
            **self.real, "late": {"path": os.path.join(where, "late", "runtime")},
            "oci": {"path": wrapper, "pod_annotations": ["io.katacontainers.*"], "container_annotations": ["run.oci.*"]},
            "platform": {"path": "/no/such/runtime", "platform_runtime_paths": {**here, "linux/other": "/no"}},
            "elsewhere": {"path": "/no/such/runtime", "platform_runtime_paths": {"linux/other": wrapper}},
            "large": {"container_min_memory": "12MiB"}, "small": {"container_min_memory": "0"},
            "slow": {"path": wrapper, "container_create_timeout": self.limit()},
            "patient": {"path": wrapper, "container_create_timeout": 240},
            "hooked": {"container_create_timeout": self.limit(), "base_runtime_spec": slow},
            "hooked-oci": {"path": wrapper, "container_create_timeout": self.limit(), "base_runtime_spec": slow},
            "based": {"base_runtime_spec": base}, "based-oci": {"path": wrapper, "base_runtime_spec": base},
            "writable": {"cgroup_writable": True}, "writable-oci": {"path": wrapper, "cgroup_writable": True},
            "first": {"exec_cpu_affinity": "first"}, "first-oci": {"path": wrapper, "exec_cpu_affinity": "first"},
        }
        return super().command()


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--only", default="", help="parts whose name matches: " + " ".join(p.__name__ for p in PARTS))
    args = parser.parse_args()
    args.hide_hybrid = not args.host
    runtimes.RUNTIMES["berth"] = Berth
    steps = Steps("handlers")
    with options.session(args, steps) as s:
        w = World(s, Crictl(s.endpoint, max(2, s.factor)))
        w.c("pull", IMAGE)
        for part in PARTS:
            if re.search(args.only, part.__name__):
                steps.run(part, w, steps)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

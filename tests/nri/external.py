"""What plugins and CDI files ask of OCI runtimes; priorities, whoever makes the container, read from the kernel."""

import ctypes
import os

from harness import oci
from harness.report import expect
from hooks import Hooks
from limits import SLOW, Classes, class_of, limit
from network import ip
from walkthrough import written
from world import LIFE, plugin

IOPRIO_GET = {"x86_64": 252, "aarch64": 31}[os.uname().machine]
RESET_ON_FORK = os.SCHED_RESET_ON_FORK
# What a plugin asks for, and what the kernel says then: class and level of I/O, policy with its flag, nice value.
PRIORITIES = (
    ({"io_priority": {"class": "IOPRIO_CLASS_BE", "priority": 7},
      "scheduler": {"policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}},
     (2, 7, os.SCHED_BATCH | RESET_ON_FORK, 5)),
    ({"io_priority": {"class": "IOPRIO_CLASS_RT", "priority": 3}, "scheduler": {"policy": "SCHED_OTHER", "nice": -5}},
     (1, 3, os.SCHED_OTHER, -5)),
    ({"io_priority": {"class": "IOPRIO_CLASS_IDLE"}}, (3, 0, os.SCHED_OTHER, 0)))
REALTIME = {"scheduler": {"policy": "SCHED_FIFO", "priority": 9}}


def priorities(pid):
    libc = ctypes.CDLL(None, use_errno=True)
    io = libc.syscall(IOPRIO_GET, 1, pid)
    expect(io >= 0, f"ioprio_get: {os.strerror(ctypes.get_errno())}")
    return io >> 13, io & 7, os.sched_getscheduler(pid), os.getpriority(os.PRIO_PROCESS, pid)


def mapped():
    ids = [{"host_id": 300000, "container_id": 0, "length": 65536}]
    return {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": ids, "gids": ids}}}}


def known(w, handler):
    """What an OCI runtime keeps of containers."""
    path = os.path.join(w.s.runtime.state, "runtimes", handler)
    return set(os.listdir(path)) if os.path.exists(path) else set()


def with_runc(w, steps):
    """An OCI runtime runs the hooks and gets the rest by its spec."""
    for name in w.s.runtime.handlers:
        with_handler(w, steps, name)
    if not w.s.runtime.handlers:
        print("(neither runc nor crun: what an OCI runtime does with edits is not looked at)")


def with_handler(w, steps, name):
    classes = Classes(w)
    with steps.step(f"hooks and adjustments with {name}"):
        marks, out = os.path.join(w.work, "hook"), os.path.join(w.work, f"hook.{name}.out")
        with open(marks, "w") as f:
            f.write(f"#!/bin/sh\ncat > /dev/null\necho $1 >> {out}\n")
        os.chmod(marks, 0o755)
        hook = lambda name: [{"path": marks, "args": ["hook", name]}]  # noqa: E731
        adjust = {"hooks": {"create_runtime": hook("createRuntime"), "poststart": hook("poststart"),
                            "poststop": hook("poststop")},
                  "env": [{"key": "A", "value": "1"}], "args": ["sleep", "7200"],
                  "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 99, "soft": 77}],
                  "linux": {"resources": {"pids": {"limit": 55}, "blockio_class": {"value": "slow"}},
                            "oom_score_adj": {"value": 321}}}
        with plugin(w, script={"CreateContainer": {"adjust": adjust}}) as p:
            pod = w.noted(w.c.id("runp", "--runtime", name, w.pod_config("by-" + name)))
            container = w.started(pod)
            expect(w.shell(container, "echo $A; ulimit -n").split() == ["1", "77"], "inside")
            expect(limit(w, container, "pids/pids.max", "pids.max") == "55", "pids")
            expect(classes.of(container) == SLOW, f"{classes.of(container)}")
            expect(classes.weight(container) in (None, 80), f"weight {classes.weight(container)}")
            expect(not p.send([{"container_id": container, **class_of("")}])["failed"], "the update")
            expect(classes.of(container) == (0, 0, 0, 0), f"{classes.of(container)}")
            w.remove(pod)
            expect(p.about(pod, container)[:5] == LIFE[:5] and len(p.about(pod, container)) == len(LIFE), "events")
        with open(out) as f:
            expect(f.read().split() == ["createRuntime", "poststart", "poststop"], "hooks that ran")


def tuned(w, steps):
    for handler, path in (("berth", None), *w.s.runtime.handlers.items()):
        cannot = path and not oci.abilities(path).user_namespaces
        if cannot:
            without_user_namespaces(w, steps, handler, path)
        for linux, words in (({}, ""), (mapped(), ", in a user namespace"))[:1 if cannot else 2]:
            with steps.step(f"priorities of I/O and CPU: by {handler}{words}"), plugin(w) as p:
                pod = w.noted(w.c.id("runp", "--runtime", handler, w.pod_config(w.fresh(), **linux)))
                for number, (adjust, wanted) in enumerate(PRIORITIES):
                    p.script({"CreateContainer": {"adjust": {"linux": adjust}}})
                    container = w.started(pod, f"c{number}", linux=linux)
                    info = w.c.json("inspect", container)["info"]
                    got = priorities(info["pid"])
                    expect(got == wanted, f"{got}, not {wanted}")
                    expect("ioPriority" in info["runtimeSpec"]["process"], "the spec does not show it")
                realtime(w, p, pod, handler, linux)
                w.remove(pod)


def without_user_namespaces(w, steps, handler, path):
    """runc before 1.2, as distributions have it, joins none whose mappings are not its own."""
    with steps.step(f"a user namespace by {handler}, which does not tell that it can: refused by name, nothing is made"):
        before = w.listed(), known(w, handler)
        error = w.c.fails("runp", "--runtime", handler, w.pod_config(w.fresh(), **mapped()))
        expect(all(word in error for word in ("userns_options", path, "features`", "linux.mountExtensions.idmap")), error)
        expect((w.listed(), known(w, handler)) == before, "something is left")


def realtime(w, p, pod, handler, linux):
    """A kernel that divides real-time CPU among cgroups gives a new one none: then it is refused by name, else it is so."""
    p.script({"CreateContainer": {"adjust": {"linux": REALTIME}}})
    before = w.listed(), known(w, handler)
    code, out, error = w.c.run("create", pod, w.config("realtime", linux=linux), w.any)
    if code == 0:
        container = w.noted(out.strip())
        w.c("start", container)
        pid = w.c.json("inspect", container)["info"]["pid"]
        got = os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority
        expect(got == (os.SCHED_FIFO, 9), f"{got}")
        return
    expect("sched_setattr" in error and "priority: 9" in error, error)
    expect((w.listed(), known(w, handler)) == before, "something is left")


def device(number, **edits):
    """A CDI file of one device that tells its number."""
    edits = {"env": [f"CARD={number}"], **edits}
    return {"cdiVersion": "1.1.0", "kind": "vendor.com/card", "devices": [{"name": "0", "containerEdits": edits}]}


def devices(w, steps):
    """CDI devices of an OCI runtime's containers: all that a file can ask for, and which file counts."""
    first, second = (os.path.join(w.work, name) for name in ("cdi-first", "cdi-second"))
    for directory in (first, second):
        os.makedirs(directory, exist_ok=True)
    with w.s.runtime.configured(cdi_spec_dirs=[first, second]):
        for name in w.s.runtime.handlers:
            pod = w.noted(w.c.id("runp", "--runtime", name, w.pod_config(w.fresh())))
            everything(w, steps, name, pod, first)
            files(w, steps, name, pod, first, second)
            w.remove(pod)


def everything(w, steps, name, pod, directory):
    hooks = Hooks(w)
    with steps.step(f"CDI by {name}: variables, nodes, mounts, groups, hooks, network devices"):
        ip("link", "add", "card7", "type", "veth", "peer", "name", "peer7")
        ip("addr", "add", "192.0.2.77/24", "dev", "card7")
        try:
            hook = lambda point: {"hookName": point, "path": hooks.path, "args": ["hook", point]}  # noqa: E731
            written(directory, "card.json", device(
                1, deviceNodes=[{"path": "/dev/card0", "hostPath": "/dev/full", "permissions": "rw"}],
                mounts=[{"hostPath": "/usr", "containerPath": "/card/usr", "options": ["ro", "rbind"]}],
                additionalGids=[4321], hooks=[hook("createRuntime"), hook("poststop")],
                netDevices=[{"hostInterfaceName": "card7", "name": "net1"}]))
            container = w.started(pod, "all", CDI_devices=[{"name": "vendor.com/card=0"}])
            expect(w.shell(container, "echo $CARD") == "1", "environment")
            expect(w.shell(container, "ls -l /dev/card0; head -c 3 /dev/card0 | wc -c").endswith("3"), "the node cannot be read")
            expect(w.shell(container, "(echo x > /dev/card0) 2>/dev/null || echo no") == "no", "/dev/full takes a byte")
            mount = w.shell(container, "grep /card/usr /proc/self/mounts").split()
            expect("ro" in mount[3].split(","), f"{mount}")
            pid = w.c.json("inspect", container)["info"]["pid"]
            with open(f"/proc/{pid}/status") as f:
                groups = next(line.split()[1:] for line in f if line.startswith("Groups:"))
            expect("4321" in groups, f"groups {groups}")
            shown = w.shell(container, "ip addr show net1")
            expect("192.0.2.77/24" in shown and "UP" in shown, shown)
            expect("card7" not in ip("link"), "it is on the node")
            expect(hooks.points() == ["createRuntime"], "hooks")
            w.c("rm", "-f", container)
            expect(hooks.points() == ["poststop"], "hooks")
        finally:
            if "peer7" in ip("link"):
                ip("link", "del", "peer7")


def files(w, steps, name, pod, first, second):
    ask = {"CDI_devices": [{"name": "vendor.com/card=0"}]}
    card = lambda container: w.shell(container, "echo $CARD")  # noqa: E731
    with steps.step(f"CDI by {name}: the later directory wins, a changed file counts for the next container"):
        written(first, "card.json", device(1))
        one = w.started(pod, "one", **ask)
        written(second, "other.json", device(2))
        two = w.started(pod, "two", **ask)
        written(second, "other.json", device(3))
        three = w.started(pod, "three", **ask)
        os.unlink(os.path.join(second, "other.json"))
        four = w.started(pod, "four", **ask)
        got = [card(container) for container in (one, two, three, four)]
        expect(got == ["1", "2", "3", "1"], f"{got}")
    with steps.step(f"CDI by {name}: an unknown device, twice the same one: named, nothing is left"):
        before = w.listed(), known(w, name), bundles(w, pod)
        error = w.c.fails("create", pod, w.config("refused", CDI_devices=[{"name": "vendor.com/card=9"}]), w.any)
        expect(all(word in error for word in ("CDI_devices", "vendor.com/card=9", first, second)), error)
        written(first, "twin.json", device(4))
        error = w.c.fails("create", pod, w.config("refused", **ask), w.any)
        expect(all(word in error for word in ("CDI_devices", "vendor.com/card=0", "card.json", "twin.json")), error)
        os.unlink(os.path.join(first, "twin.json"))
        os.unlink(os.path.join(first, "card.json"))
        expect((w.listed(), known(w, name), bundles(w, pod)) == before, "something is left")


def bundles(w, pod):
    return sorted(os.listdir(os.path.join(w.s.runtime.state, "pods", pod)))

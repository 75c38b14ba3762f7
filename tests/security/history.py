"""Attacks that have hit other runtimes and that no other suite has a place for. rows.toml says which."""

import contextlib
import os
import subprocess

from harness.report import expect, wait_for
from inside import Pod

LABELLED = "registry.k8s.io/security/labels:1"
SPOILT = "/run/berth-test-spoilt"  # as in tests/images/build.py: what the labels' commands would make
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
CONTROLLERS = {"cpu", "cpuset", "memory", "pids", "devices", "freezer", "blkio"}
POD, NODE, TARGET = 0, 2, 3  # NamespaceMode


def cgroups(pid):
    """{controllers: path} of a process, as far as a container is limited by them."""
    with open(f"/proc/{pid}/cgroup") as f:
        rows = [line.strip().split(":", 2) for line in f]
    return {names: path for _, names, path in rows
            if (names == "" if V2 else CONTROLLERS & set(names.split(",")))}


def members(pid):
    """Processes in the cgroup of a process that limits its memory."""
    path = next(path for names, path in cgroups(pid).items() if names in ("", "memory"))
    with open(os.path.join("/sys/fs/cgroup" if V2 else "/sys/fs/cgroup/memory", path.lstrip("/"), "cgroup.procs")) as f:
        return {int(line) for line in f}


def kinds(s, c):
    """(name, namespace options of the pod, of a container, privileged)."""
    yield "plain", {"pid": 1}, {"pid": 1}, False
    yield "shared", {"pid": POD}, {"pid": POD}, False
    yield "node", {"network": NODE, "pid": NODE, "ipc": NODE}, {"network": NODE, "pid": NODE, "ipc": NODE}, False
    yield "mighty", {"network": NODE, "pid": NODE, "ipc": NODE}, {"network": NODE, "pid": NODE, "ipc": NODE}, True
    ids = [{"host_id": 300000, "container_id": 0, "length": 65536}]
    mapped = {"pid": 1, "userns_options": {"mode": POD, "uids": ids, "gids": ids}}
    if any(h["features"].get("user_namespaces") for h in c.json("info")["runtimeHandlers"]):
        yield "mapped", mapped, mapped, False


def places(steps, s, c):
    with steps.step("pods of every kind and their execs are in the cgroup that they are given (CVE-2025-47291)"):
        found = []
        for name, of_pod, own, privileged in kinds(s, c):
            parent = f"{s.runtime.cgroup_root}/kubepods/besteffort/pod-{name}"
            pod = Pod(s, c, "place-" + name, privileged=privileged, namespace_options=of_pod, linux={"cgroup_parent": parent})
            container, pid = pod.run({"namespace_options": own, "privileged": privileged})
            inside = [(container, pid)]
            if name == "plain":
                inside.append(pod.run({"namespace_options": {"pid": TARGET, "target_id": container}}))
            for one, first in inside:
                at = cgroups(first)
                expect(at, f"{name}: no cgroup")
                for names, path in at.items():
                    expect(path.startswith(parent + "/") and one in path, f"{name}: {names} is {path}")
                pod.inside(one, "sleep 3600 > /dev/null 2>&1 &")
                expect(first in members(first) and len(members(first)) == 2, f"{name}: {members(first)} with the exec's")
            for names, path in cgroups(pod.pause()).items():
                expect(path.startswith(parent + "/"), f"pause of {name}: {names} is {path}")
            pod.remove()
            found.append(name)
        print(f"      ({', '.join(found)})")


def sockets(steps, s, c):
    def abstract(text):
        return {line.split()[-1] for line in text.splitlines() if " @" in line}

    with steps.step("no socket of ours is reached by its name alone, from the node's network either (CVE-2020-15257)"):
        with open("/proc/net/unix") as f:
            before = abstract(f.read())
        pod = Pod(s, c, "names", namespace_options={"network": NODE, "pid": 1})
        container, _ = pod.run({"namespace_options": {"network": NODE, "pid": 1}})
        seen = abstract(pod.inside(container, "cat /proc/net/unix"))
        ours = [one for one in seen - before if "berth" in one or "monitor" in one or "containerd" in one or "shim" in one]
        expect(not ours, str(ours))
        own = set()
        with open(f"/proc/{pod.pause()}/stat") as f:
            monitor = int(f.read().rpartition(")")[2].split()[1])
        for pid in (s.runtime.process.pid, monitor):
            with open(f"/proc/{pid}/net/unix") as f:
                inodes = {line.split()[6]: line.split()[-1] for line in f if " @" in line}
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            own |= {inodes[link[8:-1]] for link in links if link.startswith("socket:[") and link[8:-1] in inodes}
        expect(not own, f"abstract sockets of the daemon or a monitor: {own}")
        pod.remove()


def labels(steps, s, c, pod):
    with steps.step("labels of an image that are commands to others are text here (CVE-2026-53488)"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SPOILT)
        c("pull", LABELLED)
        done = subprocess.run(["grep", "-rlsF", "restart.loguri", s.work], stdout=subprocess.PIPE, check=False)
        expect(done.stdout, "no file of the runtime has the label: the image has none")
        container, pid = pod.run({}, image={"image": LABELLED}, command=["sh", "-c", "echo from inside; sleep 3600"])
        log = os.path.join(s.work, f"c{pod.number}.log")
        wait_for("its log", lambda: "from inside" in open(log).read(), 10 * s.factor)  # noqa: SIM115
        expect(not os.path.exists(SPOILT), "a command of the image ran on the node")
        plain, other = pod.run({})
        for kind in ("mnt", "net", "pid", "user", "cgroup"):
            same = os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink("/proc/self/ns/" + kind)
            usual = os.readlink(f"/proc/{other}/ns/{kind}") == os.readlink("/proc/self/ns/" + kind)
            expect(same == usual, f"{kind} is another kind than without labels")
        for one in (container, plain):
            c("rm", "--force", one)


def checkpoints(steps, s, c, pod):
    with steps.step("a checkpoint is refused, and nothing is written (CVE-2026-53492, kubelet CVE-2025-0426)"):
        container, _ = pod.run({})
        target = os.path.join(s.work, "checkpoint.tar")
        error = c.fails("checkpoint", "--export", target, container)
        expect("Unimplemented" in error and "criu" in error, error)
        expect(not os.path.exists(target), "there is a file")
        expect(c.json("inspect", container)["status"]["state"] == "CONTAINER_RUNNING", "it does not run on")
        c("rm", "--force", container)


def history(steps, s, c, pod):
    places(steps, s, c)
    labels(steps, s, c, pod)
    if s.runtime.name == "berth":
        sockets(steps, s, c)
        checkpoints(steps, s, c, pod)

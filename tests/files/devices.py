"""The node's /dev as a volume: shared memory, queues and terminals stay the pod's own."""

import contextlib
import os
import subprocess

from harness.report import expect
from inside import CONTAINER, Pod

DEV = [{"container_path": "/dev", "host_path": "/dev"}]
NODE = 2
FIRST = 240000
OWN = [{"host_id": FIRST, "container_id": 0, "length": 65536}]
USERNS = {"userns_options": {"mode": 0, "uids": OWN, "gids": OWN}}
SEGMENT = "/dev/shm/berth-test-segment"


def kinds(s):
    """(title, handler, security of the pod, security of its containers)"""
    yield "a container", "", {}, {}
    yield "a privileged container", "", {"privileged": True}, {"privileged": True}
    yield "a container in a user namespace", "", {"namespace_options": USERNS}, {"namespace_options": {"pid": CONTAINER, **USERNS}}
    for handler in s.runtime.handlers:
        yield f"a container of {handler}", handler, {}, {}


def shown(pid, place):
    """The device that a process sees at a mount point, and the options of that mount: others may be hidden below it."""
    device = os.stat(f"/proc/{pid}/root{place}").st_dev
    with open(f"/proc/{pid}/mountinfo") as f:
        for line in map(str.split, f):
            if line[4] == place and line[2] == f"{os.major(device)}:{os.minor(device)}":
                return device, line[5].split(",")
    return device, []


def own_memory(steps, s, c):
    for number, (title, handler, of_pod, security) in enumerate(kinds(s)):
        pods = []
        with steps.step(f"{title} with the node's /dev: the pod's shared memory, not the node's or another pod's"):
            pods = [Pod(s, c, f"dev-{number}-{n}", handler=handler, **of_pod) for n in range(2)]
            first, pid = pods[0].run(security, mounts=DEV)
            second, _ = pods[0].run(security, mounts=DEV)
            plain, _ = pods[0].run(security)
            other, _ = pods[1].run(security, mounts=DEV)
            pods[0].inside(first, "echo secret > /dev/shm/own && test -c /dev/null && test -c /dev/full")
            for same in (second, plain):
                expect(pods[0].inside(same, "cat /dev/shm/own").strip() == "secret", "the pod's containers share it")
            expect(pods[1].inside(other, "ls -A /dev/shm").strip() == "", pods[1].inside(other, "ls -A /dev/shm"))
            expect(not os.path.exists("/dev/shm/own"), "it is on the node")
            options = shown(pid, "/dev/shm")[1]
            expect({"nosuid", "nodev", "noexec"} <= set(options), str(options))
        with steps.step(f"{title}: its own terminals and queues, where the node has the directories"):
            for place in ("/dev/pts", "/dev/mqueue"):
                if os.path.isdir(place):
                    expect(shown(pid, place)[0] != os.stat(place).st_dev, f"{place} is the node's")
        with steps.step(f"{title}: a terminal"):
            tty, _ = pods[0].run(security, mounts=DEV, tty=True, stdin=True, command=["sh"])
            expect(pods[0].inside(tty, "stat -c %t:%T /dev/pts/0; ls /dev/pts").split() == ["88:0", "0", "ptmx"],
                   pods[0].inside(tty, "ls -l /dev/pts"))
        for pod in pods:
            pod.remove()
        with contextlib.suppress(FileNotFoundError):
            os.remove("/dev/shm/own")  # of a step that failed


def others(steps, s, c):
    pod = Pod(s, c, "dev-others")
    with steps.step("a volume at /dev without these directories: none is made in it"):
        source = os.path.join(s.work, "dev")
        os.makedirs(source + "/mine")
        for readonly in (True, False):
            container, _ = pod.run({}, mounts=[{"container_path": "/dev", "host_path": source, "readonly": readonly}])
            found = pod.inside(container, "ls /dev").split()
            expect(found == ["mine"], str(found))
        expect(os.listdir(source) == ["mine"], str(os.listdir(source)))
    with steps.step("a volume at /dev/shm counts more, one at /dev/termination-log stays"):
        memory, end = os.path.join(s.work, "memory"), os.path.join(s.work, "end")
        os.makedirs(memory)
        for path in (memory + "/given", end):
            with open(path, "w") as f:
                f.write("given\n")
        known = os.path.exists("/dev/termination-log")
        container, _ = pod.run({}, mounts=[{"container_path": "/dev/shm", "host_path": memory},
                                           {"container_path": "/dev/termination-log", "host_path": end}, *DEV])
        expect(pod.inside(container, "cat /dev/shm/given /dev/termination-log").split() == ["given"] * 2, "not the volumes")
        if not known:
            os.remove("/dev/termination-log")  # a mount point in the node's own /dev
    pod.remove()
    node = {"namespace_options": {"ipc": NODE}}
    with steps.step("a pod with the node's IPC namespace has the node's memory"):
        pod = Pod(s, c, "dev-ipc", **node)
        with open(SEGMENT, "w") as f:
            f.write("of the node\n")
        try:
            for volumes in (DEV, []):
                container, _ = pod.run({"namespace_options": {"pid": CONTAINER, "ipc": NODE}}, mounts=volumes)
                expect(pod.inside(container, f"cat {SEGMENT}").strip() == "of the node", "not the node's")
        finally:
            os.remove(SEGMENT)
        pod.remove()


def on_the_node(steps, s, c):
    """What is mounted below a volume that shows its mounts to the node."""
    def count():
        with open("/proc/self/mountinfo") as f:
            return sorted(line.split()[4] for line in f)
    pod = Pod(s, c, "shared", privileged=True)
    shared = os.path.join(s.work, "shared")
    os.makedirs(shared)
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    subprocess.run(["mount", "--make-shared", shared], check=True)
    try:
        for target, files in (("/etc", ("hosts", "hostname", "resolv.conf")), ("/dev", ("shm/x", "pts/x", "mqueue/x", "null"))):
            with steps.step(f"a volume at {target} that shows its mounts to the node: none of the pod's own gets there"):
                source = shared + target
                for name in files:
                    os.makedirs(os.path.dirname(f"{source}/{name}"), exist_ok=True)
                    with open(f"{source}/{name}", "w") as f:
                        f.write("of the node\n")
                before = count()
                container, _ = pod.run({"privileged": True}, mounts=[{"container_path": target, "host_path": source, "propagation": 2}])
                expect(count() == before, f"on the node: {[m for m in count() if m not in before]}")
                expect(pod.inside(container, f"cat {target}/{files[0]}").strip() == "of the node", "hidden")
        with steps.step("a terminal in such a /dev: the node's console stays the node's"):
            source = shared + "/dev"
            subprocess.run(["mount", "-t", "devpts", "-o", "newinstance,ptmxmode=666", "devpts", source + "/pts"], check=True)
            with open(source + "/console", "w") as f:
                f.write("of the node\n")
            before = count()
            container, _ = pod.run({"privileged": True}, tty=True, stdin=True, command=["sh"],
                                   mounts=[{"container_path": "/dev", "host_path": source, "propagation": 2}])
            expect(count() == before, f"on the node: {[m for m in count() if m not in before]}")
            expect(pod.inside(container, "cat /dev/console").strip() == "of the node", "another console")
        with steps.step("paths in such a volume that are to be hidden or read-only: refused by name, the node's stay"):
            before = count()
            for field in ("masked_paths", "readonly_paths"):
                pod.refused({field: ["/opt/hosts"]}, field, "/opt/hosts",
                            mounts=[{"container_path": "/opt", "host_path": shared + "/etc", "propagation": 2}])
            expect(count() == before, f"on the node: {[m for m in count() if m not in before]}")
    finally:
        pod.remove()
        for point in reversed(count()):
            if point.startswith(shared):
                subprocess.run(["umount", "-l", point], check=False)


def devices(steps, s, c):
    own_memory(steps, s, c)
    others(steps, s, c)
    on_the_node(steps, s, c)

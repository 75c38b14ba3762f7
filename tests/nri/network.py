"""What a plugin does to a container's network: namespaces by path, devices of the node."""

import os
import subprocess

from harness.report import expect
from world import plugin


def joined(w, steps):
    with steps.step("namespaces of another pod, by path"):
        other = w.pod("other")
        pid = w.c.json("inspect", w.started(other))["info"]["pid"]
        kinds = {"ipc": "ipc", "uts": "uts", "pid": "pid", "network": "net"}
        wanted = [{"type": kind, "path": f"/proc/{pid}/ns/{name}"} for kind, name in kinds.items()]
        with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"namespaces": wanted}}}}):
            pod = w.pod()
            own = w.c.json("inspect", w.started(pod))["info"]["pid"]
            for name in kinds.values():
                there, here = (os.readlink(f"/proc/{p}/ns/{name}") for p in (pid, own))
                expect(there == here, f"{name}: {there} {here}")
            w.remove(pod)
        expect(os.path.exists(f"/proc/{pid}"), "the other pod's container is gone")
        w.remove(other)


def ip(*arguments):
    return subprocess.run(["ip", *arguments], stdout=subprocess.PIPE, check=True).stdout.decode()


def network_devices(w, steps):
    with steps.step("a network device of the node"):
        ip("link", "add", "data7", "mtu", "1400", "type", "veth", "peer", "name", "peer7")
        ip("addr", "add", "192.0.2.77/24", "dev", "data7")
        try:
            pod = w.pod()
            move = {"CreateContainer": {"adjust": {"linux": {"net_devices": {"data7": {"name": "net1"}}}}}}
            # Of a container that cannot be made it comes back, as it was.
            missing = {"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}
            move["CreateContainer"]["adjust"]["mounts"] = [missing]
            with plugin(w, script=move):
                w.c.fails("create", pod, w.config("refused"), w.any)
            expect("192.0.2.77/24" in ip("addr", "show", "data7"), "it is not on the node again")
            del move["CreateContainer"]["adjust"]["mounts"]
            with plugin(w, script=move):
                shown = w.shell(w.started(pod), "ip addr show net1")
                expect("192.0.2.77/24" in shown and "mtu 1400" in shown and "UP" in shown, shown)
                expect("data7" not in ip("link"), "it is on the node")
                # As kubelet does when a container of the pod starts anew.
                again = w.create(pod, "again")
                w.c("start", again)
                expect("192.0.2.77/24" in w.shell(again, "ip addr show net1"), "not shared")
            w.remove(pod)
        finally:
            if "peer7" in ip("link"):
                ip("link", "del", "peer7")

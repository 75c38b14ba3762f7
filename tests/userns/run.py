#!/usr/bin/env python3
"""Pods with a user namespace: what their containers see, what the node has, what is refused.

    run.py [--runtime NAME] [--runtime-handler runc|crun]
"""

import os
import signal
import stat
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import oci, options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
FIRST, SIZE = 200000, 65536
POD, CONTAINER, NODE = 0, 1, 2


def mapping(host=FIRST, container=0, length=SIZE):
    return {"host_id": host, "container_id": container, "length": length}


def userns(*mappings, mode=POD):
    return {"mode": mode, "uids": list(mappings), "gids": list(mappings)}


OWN = userns(mapping())
MAPPED = {"uidMappings": [mapping()], "gidMappings": [mapping()]}

MAPPED_TEN = {key: [mapping(container=10, length=1)] for key in MAPPED}


class Pods:
    def __init__(self, session, handler=None):
        self.s, self.c = session, Crictl(session.endpoint, session.factor)
        self.handler = ["--runtime", handler] if handler else []
        self.count = 0
        self.pods, self.containers = [], []

    def pod_config(self, namespaces, **security):
        self.count += 1
        name = f"userns-{self.count}"
        return written(self.s.work, f"pod-{self.count}.json", {
            "metadata": {"name": name, "namespace": "userns", "attempt": 0, "uid": "uid-" + name},
            "log_directory": self.s.work,
            "linux": {"security_context": {"namespace_options": namespaces, **security}}})

    def run(self, namespaces, **security):
        config = self.pod_config(namespaces, **security)
        pod = self.c.id("runp", *self.handler, config)
        self.s.runtime.ids.add(pod)
        self.pods.append(pod)
        return pod, config

    def container_config(self, namespaces, security=None, resources=None, **config):
        self.count += 1
        name = f"container-{self.count}"
        return written(self.s.work, name + ".json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log",
            "linux": {"security_context": {"namespace_options": namespaces, **(security or {})},
                      "resources": resources or {}}, **config})

    def container(self, pod, namespaces, security=None, **config):
        pod, pod_config = pod
        container = self.c.id("create", pod, self.container_config(namespaces, security, **config), pod_config)
        self.s.runtime.ids.add(container)
        self.containers.append(container)
        self.c("start", container)
        return container

    def sh(self, container, script):
        return self.c("exec", "--sync", container, "sh", "-c", script).strip()

    def pid(self, container):
        return self.c.json("inspect", container)["info"]["pid"]

    def remove(self):
        for pod in self.pods:
            self.c("stopp", pod)
        for container in self.containers if self.handler else ():
            # An OCI runtime is called for each: on a busy machine all of a pod's are more than one call has time for.
            self.c("rm", container)
        for pod in self.pods:
            self.c("rmp", "--force", pod)
        self.pods.clear()
        self.containers.clear()


def layers(root):
    """Owner, mode and time of change of every file of every layer."""
    found = {}
    for base, directories, files in os.walk(os.path.join(root, "layers")):
        for name in directories + files:
            path = os.path.join(base, name)
            status = os.lstat(path)
            found[path] = (status.st_uid, status.st_gid, status.st_mode, status.st_ctime_ns)
    return found


def owner(path):
    status = os.stat(path)
    return status.st_uid, status.st_gid


def offered(p):
    """Names of the handlers with user namespaces."""
    handlers = p.c.json("info")["runtimeHandlers"]
    able = [h for h in handlers if h["features"].get("user_namespaces") or h["features"].get("userNamespaces")]
    return {h.get("name", "") for h in able}


def inside(s, steps, p, volumes):
    own, plain = volumes
    namespaces = {"userns_options": OWN}
    with steps.step("a pod and a container with a user namespace", fatal=True):
        pod = p.run(namespaces)
        mounts = [{"container_path": "/own", "host_path": own, **MAPPED},
                  {"container_path": "/ro", "host_path": own, "readonly": True, **MAPPED},
                  {"container_path": "/plain", "host_path": plain}]
        container = p.container(pod, namespaces, mounts=mounts)
        pid = p.pid(container)
    if p.handler:
        with steps.step("the OCI runtime has made it"):
            made = os.listdir(os.path.join(s.runtime.state, "runtimes", p.handler[1]))
            expect(container in made, f"it knows {made}")
    with steps.step("the kernel's maps, inside and outside"):
        want = ["0", str(FIRST), str(SIZE)]
        out = p.sh(container, "cat /proc/self/uid_map /proc/self/gid_map /proc/1/uid_map").split()
        expect(out == want * 3, f"inside {out}")
        with open(f"/proc/{pid}/gid_map") as f:
            expect(f.read().split() == want, "the first process's gid_map")
        expect(owner(f"/proc/{pid}") == (FIRST, FIRST), f"it runs as {owner(f'/proc/{pid}')}")
        pause = p.c.json("inspectp", pod[0])["info"]["pid"]
        expect(os.readlink(f"/proc/{pause}/ns/user") == os.readlink(f"/proc/{pid}/ns/user"), "not the pod's namespace")
    with steps.step("owners of files, of /proc, of the pod's own files"):
        out = p.sh(container, "stat -c %n=%u:%g / /bin /etc/hosts /etc/resolv.conf /etc/hostname /dev /dev/shm /dev/pts "
                              "/proc/1 /own /plain")
        wrong = [line for line in out.split() if not line.endswith(("=0:0", "/plain=65534:65534"))]
        expect(not wrong, f"{wrong}")
        p.sh(container, "echo 192.0.2.1 added >> /etc/hosts && echo x > /dev/shm/x && echo x > /written && mkdir /new")
    with steps.step("a volume: ids inside are ids on disk; unmapped it is nobody's"):
        p.sh(container, "echo x > /own/file; chown 1000:1001 /own/file; cat /ro/file")
        expect(owner(own + "/file") == (1000, 1001), f"host owner {owner(own + '/file')}")
        expect(p.sh(container, "stat -c %u:%g /ro/file") == "1000:1001", "owner inside")
        p.c.fails("exec", "--sync", container, "sh", "-c", "echo x > /ro/new")
        p.c.fails("exec", "--sync", container, "sh", "-c", "echo x > /plain/new")
    with steps.step("the writable layer belongs to the pod's range, nothing of it to the node's users"):
        upper = os.path.join(s.runtime.root, "containers", container, "upper")
        for path in ("", "/written", "/new"):
            expect(owner(upper + path) == (FIRST, FIRST), f"{path}: {owner(upper + path)}")
    with steps.step("network: addresses, the loopback, sysctls of its own"):
        ip = p.c.json("inspectp", pod[0])["status"]["network"]["ip"]
        expect(ip in p.sh(container, "ip addr show eth0"), f"{ip} is not on eth0")
        p.sh(container, "ping -c 1 -w 5 127.0.0.1 && ping -c 1 -w 5 " + ip.rpartition(".")[0] + ".1")
        expect(p.sh(container, "cat /proc/sys/net/ipv4/ping_group_range").split() == ["0", str(SIZE - 1)], "ping range")
        expect(p.sh(container, "stat -c %u /sys/class/net/eth0/") == "0", "owner of the interface in sysfs")
    with steps.step("devices and cgroups"):
        out = p.sh(container, "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c; ls /dev | tr '\\n' ' '")
        expect(out.startswith("4\n4\n") and "full" in out and "tty" in out, out)
        p.c.fails("exec", "--sync", container, "mknod", "/tmp/null", "c", "1", "3")
        with open(f"/proc/{pid}/cgroup") as f:
            rows = [line.strip().split(":", 2) for line in f]
        v2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        places = [path for _, names, path in rows if (names == "" if v2 else "memory" in names.split(","))]
        expect(places and all(container in path for path in places), f"not in its own cgroup: {rows}")
    return pod, container


def processes(steps, p, pod, container):
    namespaces = {"userns_options": OWN}
    with steps.step("a user by name, groups, seccomp, no new privileges"):
        security = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 1000}, "supplemental_groups": [1234],
                    "no_new_privs": True, "seccomp": {"profile_type": 0}, "readonly_rootfs": True}
        user = p.container(pod, namespaces, security)
        out = p.sh(user, "id -u; id -G; grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status | tr -d '\\n\\t'; echo out > /dev/stdout")
        expect(out.split() == ["1000", "1000", "1234", "NoNewPrivs:1Seccomp:2out"], out)
        expect(owner(f"/proc/{p.pid(user)}") == (FIRST + 1000, FIRST + 1000), "host ids")
        p.c.fails("exec", "--sync", user, "sh", "-c", "echo x > /x")
    with steps.step("a score and limits"):
        scored = p.container(pod, namespaces, resources={"oom_score_adj": 400})
        with open(f"/proc/{p.pid(scored)}/oom_score_adj") as f:
            expect(f.read().strip() == "400", "oom_score_adj")
        expect(p.sh(scored, "ulimit -c; ulimit -H -c").split() == ["8", "16"], "the limits of the configuration")
    with steps.step("a terminal"):
        tty = p.container(pod, namespaces, tty=True, stdin=True, command=["sh"])
        expect(p.sh(tty, "stat -c %u /dev/pts/0 /dev/console").split() == ["0", "0"], "owner of the terminal")
    with steps.step("one PID namespace for the pod: init is ours, processes of the other are seen"):
        shared = {**namespaces, "pid": POD}
        first = p.container(pod, shared)
        expect(p.sh(first, "cat /proc/1/comm; stat -c %u /proc/1").split() == ["pause", "0"], "PID 1")
    with steps.step("privileged: all capabilities, inside only"):
        capable = p.run(namespaces, privileged=True)
        root = p.container(capable, namespaces, {"privileged": True})
        out = p.sh(root, "mkdir -p /mnt && mount -t tmpfs none /mnt && echo mounted; hostname inside && hostname")
        expect(out.split() == ["mounted", "inside"], out)
        for beyond in ("echo 1 > /proc/sys/kernel/panic_on_oops", "echo c > /proc/sysrq-trigger",
                       "mknod /tmp/x b 8 0", "chown 0 /dev/null"):
            p.c.fails("exec", "--sync", root, "sh", "-c", beyond)


def sources(s, steps, p, pod):
    """Where what is mounted comes from."""
    namespaces = {"userns_options": OWN}
    closed = os.path.join(s.work, "closed")
    hidden = os.path.join(closed, "hidden")
    os.makedirs(hidden)
    os.chmod(closed, 0o700)
    with open(hidden + "/file", "w") as f:
        f.write("x")
    with steps.step("a volume in a directory that is closed to the pod's root, one that follows the node's mounts"):
        follows = os.path.join(s.work, "follows")
        os.makedirs(follows + "/later")
        mounts = [{"container_path": "/hidden", "host_path": hidden, **MAPPED},
                  {"container_path": "/one", "host_path": hidden + "/file", "readonly": True, **MAPPED},
                  {"container_path": "/follows", "host_path": follows, "propagation": 1, **MAPPED}]
        container = p.container(pod, namespaces, mounts=mounts)
        p.sh(container, "cat /one && echo new > /hidden/new")
        with open(f"/proc/{p.pid(container)}/mountinfo") as f:
            mapped = [line.split()[4] for line in f if "idmapped" in line.split()[5]]
        expect(set(mapped) >= {"/hidden", "/one", "/follows"}, f"the kernel has mapped {mapped}")
        with open("/proc/self/mountinfo") as f:
            expect(container not in f.read(), "a mount of the container is on the node")
        expect(owner(hidden + "/new") == (0, 0), f"host owner {owner(hidden + '/new')}")
        p.c.fails("exec", "--sync", container, "sh", "-c", "echo x > /one")
        subprocess.run(["mount", "-t", "tmpfs", "later", follows + "/later"], check=True)
        seen = p.sh(container, "grep -c ' /follows/later ' /proc/mounts || true")
        subprocess.run(["umount", follows + "/later"], check=True)
        expect(seen == "1", f"the node's later mount is seen {seen} times")
    with steps.step("an image as a volume: its owners, read-only"):
        mounts = [{"container_path": "/image", "image": {"image": IMAGE}, "readonly": True},
                  {"container_path": "/part", "image": {"image": IMAGE}, "image_sub_path": "bin", "readonly": True}]
        container = p.container(pod, namespaces, mounts=mounts)
        expect(set(p.sh(container, "stat -c %u:%g /image /image/bin /image/bin/sh /part/sh").split()) == {"0:0"}, "owners")
        p.c.fails("exec", "--sync", container, "sh", "-c", "echo x > /image/x")
    with steps.step("a device under another name is that of the node, one of the same name too"):
        devices = [{"container_path": "/dev/name/other", "host_path": "/dev/null", "permissions": "rw"},
                   {"container_path": "/dev/kmsg", "host_path": "/dev/kmsg", "permissions": "r"}]
        container = p.container(pod, namespaces, devices=devices)
        out = p.sh(container, "stat -c %t:%T /dev/name/other /dev/kmsg /dev/null; echo x > /dev/name/other")
        expect(out.split() == ["1:3", "1:b", "1:3"], out)


def told_of(s, container):
    """What the log warns of about that container's mounts."""
    with open(s.runtime.log, errors="replace") as f:
        return [line for line in f if "without idmapped mounts" in line and container in line]


def below(s, steps, p, pod):
    """What is mounted below a volume: mapped with it, or not, and then the log says so."""
    top = os.path.join(s.work, "below")
    mounts = [{"container_path": "/below", "host_path": top, **MAPPED}]
    mounted = []

    def mount(kind, name):
        os.makedirs(os.path.join(top, name))
        subprocess.run(["mount", "-t", kind, kind, os.path.join(top, name)], check=True)
        mounted.append(os.path.join(top, name))

    namespaces = {"userns_options": OWN}
    try:
        mount("tmpfs", "able")
        with open(top + "/able/file", "w"):
            pass
        with steps.step("a filesystem below a volume is mapped with it", fatal=True):
            container = p.container(pod, namespaces, mounts=mounts)
            shown = " /below/able " in p.sh(container, "cat /proc/self/mountinfo")
            if p.handler and not shown:  # crun 1.8
                return steps.left_out("what is mounted below a volume", f"{p.handler[1]} does not show it in a user namespace")
            out = p.sh(container, "stat -c %u:%g /below /below/able /below/able/file").split()
            expect(shown and out == ["0:0"] * 3, f"owners {out}")
            mapped = container
        with steps.step("one that cannot be mapped keeps its owners with its brothers: the log says so, once"):
            mount("proc", "unable")
            container = p.container(pod, namespaces, mounts=mounts)
            out = p.sh(container, "stat -c %u:%g /below /below/able/file /below/unable/version").split()
            expect(out == ["0:0", "65534:65534", "65534:65534"], f"{out}")
            told = wait_for("a warning", lambda: told_of(s, container), 10 * s.factor)
            expect(len(told) == 1 and " WARN " in told[0] and "/below/unable (proc)" in told[0], f"{told}")
            expect("/below/able" not in told[0], f"{told}")
            expect(not told_of(s, mapped), f"{told_of(s, mapped)}")
    finally:
        for point in reversed(mounted):
            subprocess.run(["umount", point], check=True)


def mapped_alone(s, steps, p):
    with steps.step("a mapped volume in a pod with the node's user namespace"):
        path = os.path.join(s.work, "alone")
        os.mkdir(path)
        os.chown(path, 10, 10)
        mounts = [{"container_path": "/alone", "host_path": path, **MAPPED_TEN}]
        container = p.container(p.run({}), {}, mounts=mounts)
        expect(p.sh(container, "stat -c %u:%g /alone") == f"{FIRST}:{FIRST}", "owner inside")


def restarted(s, steps, p, pod, container):
    namespaces = {"userns_options": OWN}
    with steps.step("after kill -9 of the daemon: exec and new containers are in it"):
        s.runtime.kill(signal.SIGKILL)
        s.runtime.start()
        wait_for("an answer", lambda: p.c.run("version")[0] == 0, 20 * s.factor)
        before = os.readlink(f"/proc/{p.pid(container)}/ns/user")
        expect(str(FIRST) in p.sh(container, "cat /proc/self/uid_map; echo x > /again"), "exec")
        late = p.container(pod, namespaces)
        expect(os.readlink(f"/proc/{p.pid(late)}/ns/user") == before, "another user namespace")


def host_network(steps, p):
    namespaces = {"network": NODE, "userns_options": OWN}
    with steps.step("with the node's network: its interfaces, /sys read-only and alone"):
        features = p.c.json("info")["features"]
        expect(features.get("user_namespaces_host_network") or features.get("userNamespacesHostNetwork"), str(features))
        container = p.container(p.run(namespaces), namespaces)
        links = sorted(os.listdir("/sys/class/net"))
        out = p.sh(container, "ls /sys/class/net | sort; cat /proc/self/uid_map; grep ' /sys ' /proc/mounts").split()
        expect(out[:len(links)] == links and str(FIRST) in out, f"{out}, not {links}")
        expect("ro,nosuid,nodev,noexec,relatime" in out, f"{out}")
        p.c.fails("exec", "--sync", container, "ip", "link", "add", "x0", "type", "dummy")


def refused(steps, p, plain):
    own = {"userns_options": OWN}
    pods = {
        "several mappings": {"userns_options": userns(mapping(), mapping(300000, SIZE))},
        "overlapping mappings": {"userns_options": userns(mapping(), mapping())},
        "length 0": {"userns_options": userns(mapping(length=0))},
        "container id 0 is not mapped": {"userns_options": userns(mapping(container=1))},
        "no mapping": {"userns_options": userns()},
        "NODE with a mapping": {"userns_options": userns(mapping(), mode=NODE)},
        "CONTAINER": {"userns_options": userns(mode=CONTAINER)},
        "hostPID": {"pid": NODE, **own},
        "hostIPC": {"ipc": NODE, **own},
        "past the last id": {"userns_options": userns(mapping(4294967295, length=2))},
    }
    for what, namespaces in pods.items():
        with steps.step(f"refused: a pod with {what}"):
            error = p.c.fails("runp", *p.handler, p.pod_config(namespaces))
            expect("InvalidArgument" in error and "namespace_options" in error, error)
    pod, config = p.run(own)
    containers = {
        "another mapping": {"namespaces": {"userns_options": userns(mapping(FIRST + 1))}},
        "NODE": {"namespaces": {"userns_options": userns(mode=NODE)}},
        "none": {"namespaces": {}},
        "a user beyond the mapping": {"namespaces": own, "security": {"run_as_user": {"value": SIZE}}},
        "BIDIRECTIONAL": {"namespaces": own, "mounts": [
            {"container_path": "/p", "host_path": plain, "propagation": 2}]},
        "half a mapping of a mount": {"namespaces": own, "mounts": [
            {"container_path": "/p", "host_path": plain, "uidMappings": [mapping()]}]},
        "a mount of length 0": {"namespaces": own, "mounts": [
            {"container_path": "/p", "host_path": plain, "uidMappings": [mapping(length=0)], "gidMappings": [mapping()]}]},
    }
    for what, change in containers.items():
        with steps.step(f"refused: a container with {what}"):
            error = p.c.fails("create", pod, p.container_config(**change), config)
            expect("InvalidArgument" in error, error)
    with steps.step("refused: a volume whose filesystem has no idmapped mounts, by name"):
        mounts = [{"container_path": "/p", "host_path": "/sys/kernel", **MAPPED}]
        error = p.c.fails("create", pod, p.container_config(own, mounts=mounts), config)
        expect("/sys/kernel" in error and "no idmapped mounts" in error, error)


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--runtime-handler", choices=("runc", "crun"),
                        help="run every pod with this OCI runtime instead of the runtime's own")
    args = parser.parse_args()
    handler = args.runtime_handler
    runtimes.Berth.extra = {**runtimes.Berth.extra, "default_ulimits": ["core=4096:8192"]}
    if handler:
        path = oci.find(handler)
        if path and not oci.abilities(path).user_namespaces:
            sys.exit(f"{handler} ({path}) does not tell that it has user namespaces: runc has from 1.2 on (hack/install-peers)")
        runtimes.Runtime.handlers = {handler: oci.handler(handler)}
    steps = Steps(f"userns {handler}" if handler else "userns")
    with options.session(args, steps) as s:
        p = Pods(s, handler)
        volumes = [os.path.join(s.work, name) for name in ("own", "plain")]
        for path in volumes:
            os.mkdir(path)
        p.c("pull", IMAGE)
        before = layers(s.runtime.root)
        with steps.step("the handlers say that they can"):
            wait_for("the features of all handlers", lambda: offered(p) >= {"", "berth", *([handler] if handler else [])},
                     20 * s.factor)
        pod, container = inside(s, steps, p, volumes)
        steps.run(processes, steps, p, pod, container)
        steps.run(sources, s, steps, p, pod)
        steps.run(below, s, steps, p, pod)
        steps.run(mapped_alone, s, steps, p)
        steps.run(restarted, s, steps, p, pod, container)
        steps.run(host_network, steps, p)
        steps.run(refused, steps, p, volumes[1])
        with steps.step("the image's layers are as they were"):
            expect(before and layers(s.runtime.root) == before, "a layer has changed")
            expect(not any(stat.S_ISDIR(v[2]) and v[0] >= FIRST for v in before.values()), "owner")
        with steps.step("stop and remove"):
            p.remove()
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

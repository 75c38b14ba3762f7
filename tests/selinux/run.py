#!/usr/bin/env python3
"""SELinux labels as the kernel sees them: of processes, mounts, keys and volumes. Needs a kernel with SELinux on.

    run.py

The policy is enforced meanwhile: what a container may not do fails for it. Labels are read on the host
(/proc/PID/attr, mountinfo, the attribute of files), and once more from inside.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import oci, options, runtimes  # noqa: E402
from harness.report import Steps, expect  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
ENFORCE = "/sys/fs/selinux/enforce"
POD, CONTAINER, NODE = 0, 1, 2
PROCESS, FILE = "system_u:system_r:container_t:", "system_u:object_r:container_file_t:"
PAIR = re.compile(r"s0:c(\d+),c(\d+)$")
UNCONFINED = "system_u:system_r:spc_t:s0-s0:c0.c1023"


def attribute(pid, name="current"):
    with open(f"/proc/{pid}/attr/{name}") as f:
        return f.read().strip("\0\n")


def label(path):
    return os.getxattr(path, "security.selinux", follow_symlinks=False).decode().strip("\0")


def contexts(pid):
    """Of a process's mounts: {place: (kind of filesystem, label of all its files or None)}."""
    found = {}
    with open(f"/proc/{pid}/mountinfo") as f:
        for left, right in (line.split(" - ") for line in f):
            context = re.search(r'[ ,]context=(?:"([^"]+)"|([^ ,\n]+))', right)  # quoted where it has a comma
            found[left.split()[4]] = (right.split()[0], context and (context[1] or context[2]))
    return found


class Pods:
    def __init__(self, s):
        self.s, self.c, self.count, self.made = s, Crictl(s.endpoint, s.factor), 0, []

    def config(self, selinux=None, **security):
        self.count += 1
        name = f"selinux-{self.count}"
        context = {**security, **({"selinux_options": selinux} if selinux else {})}
        return written(self.s.work, f"pod-{self.count}.json", {
            "metadata": {"name": name, "namespace": "selinux", "attempt": 0, "uid": "uid-" + name},
            "log_directory": self.s.work, "linux": {"security_context": context}})

    def run(self, selinux=None, **security):
        config = self.config(selinux, **security)
        pod = self.c.id("runp", config)
        self.s.runtime.ids.add(pod)
        self.made.append(pod)
        return pod, config

    def container_config(self, selinux=None, mounts=(), **security):
        self.count += 1
        name = f"container-{self.count}"
        context = {"namespace_options": {"pid": CONTAINER}, **security,
                   **({"selinux_options": selinux} if selinux else {})}
        return written(self.s.work, name + ".json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log", "mounts": list(mounts), "linux": {"security_context": context}})

    def container(self, pod, selinux=None, mounts=(), **security):
        """A running container: (id, pid)."""
        container = self.c.id("create", pod[0], self.container_config(selinux, mounts, **security), pod[1])
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container, self.c.json("inspect", container)["info"]["pid"]

    def refused(self, pod, *words, selinux=None, mounts=(), **security):
        said = self.c.fails("create", pod[0], self.container_config(selinux, mounts, **security), pod[1])
        for word in words:
            expect(word in said, f"{word!r} is not in {said!r}")

    def pause(self, pod):
        return self.c.json("inspectp", pod[0])["info"]["pid"]

    def sh(self, container, script):
        return self.c("exec", "--sync", container, "sh", "-c", script).strip().strip("\0")

    def tried(self, container, script):
        code, out, error = self.c.run("exec", "--sync", container, "sh", "-c", script)
        return code, out + error


def is_pair(level):
    found = PAIR.match(level)
    expect(found and int(found[1]) < int(found[2]) < 1024, f"{level} is no pair of categories")
    return level


def same(what, found, wanted):
    expect(found == wanted, f"{what}: {found}, not {wanted}")


def plain(steps, pods):
    """Two pods that ask for nothing. They are used by the steps that follow."""
    with steps.step("a pod that asks for nothing: type of the policy, a pair of categories", fatal=True):
        first = pods.run()
        level = is_pair(attribute(pods.pause(first)).removeprefix(PROCESS))
        container, pid = pods.container(first)
        same("the container", attribute(pid), PROCESS + level)
        same("an exec", pods.sh(container, "cat /proc/self/attr/current"), PROCESS + level)
        same("a second container", attribute(pods.container(first)[1]), PROCESS + level)
    with steps.step("its mounts: one label for all files of each, its files"):
        found = contexts(pid)
        for place in ("/", "/dev", "/dev/pts", "/dev/shm"):
            same(place, found[place][1], FILE + level)
        same("/dev/mqueue", label(f"/proc/{pid}/root/dev/mqueue"), FILE + level)
        for place in ("/proc", "/sys"):
            same(place, found[place][1], None)
        for name in ("hosts", "hostname", "resolv.conf"):
            same(name, label(f"/proc/{pid}/root/etc/{name}"), FILE + level)
        pods.sh(container, "echo x > /file && cat /file /etc/hosts /dev/null && touch /dev/shm/x /tmp/x")
        same("a new file", label(f"/proc/{pid}/root/file"), FILE + level)
    with steps.step("verbose status has the labels, and that of the runtime"):
        spec = pods.c.json("inspect", container)["info"]["runtimeSpec"]
        same("process", spec["process"]["selinuxLabel"], PROCESS + level)
        same("mount", spec["linux"]["mountLabel"], FILE + level)
        info = pods.c.json("info")
        told = info.get("selinux") or info.get("info", {}).get("selinux") or {}
        expect(told.get("enabled") is True and told["process"].startswith(PROCESS), f"info: {told}")
    with steps.step("another pod has another level", fatal=True):
        second = pods.run()
        other, other_pid = pods.container(second)
        its = is_pair(attribute(other_pid).removeprefix(PROCESS))
        expect(its != level, f"both have {level}")
    return first, container, level, other


def relabelled(steps, pods, first, level, other_pod):
    volume = os.path.join(pods.s.work, "volume")
    os.makedirs(volume + "/below")
    outside = os.path.join(pods.s.work, "outside")
    for path in (volume + "/below/file", outside):
        with open(path, "w") as f:
            f.write("text\n")
    os.symlink(outside, volume + "/link")
    before = label(outside) if "security.selinux" in os.listxattr(outside) else None
    mount = {"container_path": "/data", "host_path": volume}
    with steps.step("a volume that is not relabelled is out of reach"):
        container, _ = pods.container(first, mounts=[mount])
        code, said = pods.tried(container, "cat /data/below/file")
        expect(code != 0 and "denied" in said, f"{code} {said}")
    with steps.step("a relabelled volume is the pod's, with all below, its links not followed"):
        container, _ = pods.container(first, mounts=[{**mount, "selinux_relabel": True}])
        for path in ("", "/below", "/below/file", "/link"):
            same(path, label(volume + path), FILE + level)
        now = label(outside) if "security.selinux" in os.listxattr(outside) else None
        same("what a link leads to", now, before)
        same("read", pods.sh(container, "cat /data/below/file && echo more > /data/new"), "text")
        same("a new file", label(volume + "/new"), FILE + level)
    with steps.step("another pod cannot read it: its level is another"):
        stranger, _ = pods.container(other_pod, mounts=[mount])
        code, said = pods.tried(stranger, "cat /data/below/file")
        expect(code != 0 and "denied" in said, f"{code} {said}")
    with steps.step("directories of the node are not relabelled"):
        before = [label(p) for p in ("/usr", "/etc")]
        for path in ("/usr", "/etc", "/"):
            pods.refused(first, "mounts[0].selinux_relabel", "belongs to the node",
                         mounts=[{"container_path": "/data", "host_path": path, "selinux_relabel": True}])
        same("labels", [label(p) for p in ("/usr", "/etc")], before)


def asked_for(steps, pods, first, level):
    with steps.step("a pod with a level of its own"):
        pod = pods.run({"level": "s0:c7,c8"})
        same("pause", attribute(pods.pause(pod)), PROCESS + "s0:c7,c8")
        container, pid = pods.container(pod)
        same("the container", attribute(pid), PROCESS + "s0:c7,c8")
        same("its root", contexts(pid)["/"][1], FILE + "s0:c7,c8")
    with steps.step("a container with a level, and one with a type, of its own"):
        _, pid = pods.container(first, {"level": "s0:c9"})
        same("process", attribute(pid), PROCESS + "s0:c9")
        same("root", contexts(pid)["/"][1], FILE + "s0:c9")
        _, pid = pods.container(first, {"type": "spc_t"})
        same("process", attribute(pid), "system_u:system_r:spc_t:" + level)
    with steps.step("wrong options are refused by field"):
        field = "security_context.selinux_options"
        pods.refused(first, field + ".level", "s0,c4,c5", selinux={"level": "s0,c4,c5"})
        pods.refused(first, field + ".type", "a:b", selinux={"type": "a:b"})
        pods.refused(first, field, "no_such_t", selinux={"type": "no_such_t"})
        pods.refused(first, field, "c2000", selinux={"level": "s0:c2000"})
        said = pods.c.fails("runp", pods.config({"user": "nobody_u"}))
        expect("linux.security_context.selinux_options" in said and "nobody_u" in said, said)


def unconfined(steps, pods):
    with steps.step("a privileged container is not confined; a plain one of its pod is"):
        pod = pods.run(privileged=True)
        same("pause", attribute(pods.pause(pod)), UNCONFINED)
        container, pid = pods.container(pod, privileged=True)
        same("privileged", attribute(pid), UNCONFINED)
        same("an exec", pods.sh(container, "cat /proc/self/attr/current"), UNCONFINED)
        is_pair(contexts(pid)["/"][1].removeprefix(FILE))
        is_pair(attribute(pods.container(pod)[1]).removeprefix(PROCESS))
        pods.refused(pod, "selinux_options.level", selinux={"level": "s0,c4"}, privileged=True)
    with steps.step("a pod with the node's PID or IPC namespace is not confined, unless it names a type"):
        pod = pods.run(namespace_options={"ipc": NODE})
        same("pause", attribute(pods.pause(pod)), UNCONFINED)
        own = {"namespace_options": {"pid": CONTAINER, "ipc": NODE}}
        same("a container", attribute(pods.container(pod, **own)[1]), UNCONFINED)
        same("pause", attribute(pods.pause(pods.run(namespace_options={"pid": NODE}))), UNCONFINED)
        pod = pods.run({"type": "container_t"}, namespace_options={"pid": NODE})
        is_pair(attribute(pods.pause(pod)).removeprefix(PROCESS))
    with steps.step("one with the node's network is confined"):
        namespaces = {"namespace_options": {"network": NODE, "pid": CONTAINER}}
        pod = pods.run(namespace_options={"network": NODE})
        is_pair(attribute(pods.container(pod, **namespaces)[1]).removeprefix(PROCESS))


def in_user_namespace(steps, pods):
    with steps.step("in a user namespace: the same labels"):
        mapping = [{"host_id": 200000, "container_id": 0, "length": 65536}]
        own = {"namespace_options": {"pid": CONTAINER,
                                     "userns_options": {"mode": POD, "uids": mapping, "gids": mapping}}}
        pod = pods.run(namespace_options={"userns_options": own["namespace_options"]["userns_options"]})
        container, pid = pods.container(pod, **own)
        level = is_pair(attribute(pid).removeprefix(PROCESS))
        same("pause", attribute(pods.pause(pod)), PROCESS + level)
        found = contexts(pid)
        for place in ("/", "/dev", "/dev/pts", "/dev/shm"):
            same(place, found[place][1], FILE + level)
        same("an exec", pods.sh(container, "echo x > /file; cat /proc/self/attr/current"), PROCESS + level)


def packed(files):
    """A tar file in memory of (name, bytes, mode)."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    return whole.getvalue()


def with_volume(s):
    """An image of the node's busybox that declares a volume with a file in it."""
    with open("/bin/busybox", "rb") as f:
        layer = packed([("bin/sh", f.read(), 0o755), ("volume/file", b"text\n", 0o644)])
    config = {"architecture": "amd64", "os": "linux", "config": {"Volumes": {"/volume": {}}, "Env": ["PATH=/bin"]},
              "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}}
    manifest = [{"Config": "config.json", "RepoTags": ["selinux.test/volume:1"], "Layers": ["layer.tar"]}]
    path = os.path.join(s.work, "volume.tar")
    with open(path, "wb") as f:
        f.write(packed([("manifest.json", json.dumps(manifest).encode(), 0o644),
                        ("config.json", json.dumps(config).encode(), 0o644), ("layer.tar", layer, 0o644)]))
    berth = os.environ.get("BERTH") or os.path.join(runtimes.REPO, "target", "release", "berth")
    subprocess.run([berth, "image", "import", "--address", s.runtime.socket, path], check=True,
                   stdout=subprocess.DEVNULL, timeout=60 * s.factor)
    return "selinux.test/volume:1"


def images(steps, pods, first, level):
    with steps.step("a volume that the image declares is the container's, with what was copied into it"):
        image = with_volume(pods.s)
        with open(pods.container_config()) as f:
            config = {**json.load(f), "image": {"image": image}, "command": ["sh", "-c", "exec sh -c 'sleep 3600'"]}
        container = pods.c.id("create", first[0], written(pods.s.work, "declared.json", config), first[1])
        pods.s.runtime.ids.add(container)
        pods.c("start", container)
        pid = pods.c.json("inspect", container)["info"]["pid"]
        same("read", pods.sh(container, "read x < /volume/file; echo $x; echo new > /volume/new"), "text")
        for name in ("", "/file", "/new"):
            same(name, label(f"/proc/{pid}/root/volume{name}"), FILE + level)
    with steps.step("an image as a volume, of one layer: readable"):
        mount = {"container_path": "/v", "image": {"image": IMAGE}, "readonly": True}
        container, pid = pods.container(first, mounts=[mount])
        same("/v", contexts(pid)["/v"][1], FILE + level)
        expect("sh" in pods.sh(container, "ls /v/bin").split(), "no /v/bin/sh")


def of_runtime(steps, pods):
    with steps.step("a pod of an OCI runtime: labels by its specification"):
        config = pods.config()
        pod = pods.c.id("runp", "--runtime", "crun", config)
        pods.s.runtime.ids.add(pod)
        pods.made.append(pod)
        container, pid = pods.container((pod, config))
        level = is_pair(attribute(pid).removeprefix(PROCESS))
        found = contexts(pid)
        for place in ("/", "/dev", "/dev/shm"):
            same(place, found[place][1], FILE + level)
        same("an exec", pods.sh(container, "cat /proc/self/attr/current"), PROCESS + level)


def restarted(steps, pods, runtime, container, level):
    with steps.step("after kill -9 of the daemon a pod has its level still"):
        runtime.kill()
        runtime.start()
        same("an exec", pods.sh(container, "cat /proc/self/attr/current"), PROCESS + level)
        same("a new container", attribute(pods.container(pods.first)[1]), PROCESS + level)


def few_categories(steps, pods, runtime):
    """All levels of a small range are given, none twice, before and after a restart; a removed pod's is free again."""
    with steps.step("remove all"):
        pods.c("rmp", "--force", "--all")
        pods.made.clear()
    with steps.step("levels are held over a restart, refused when all are in use, and freed with their pod"):
        runtime.stop()
        runtime.extra = {**runtime.extra, "selinux_category_range": 3, "hostnetwork_disable_selinux": True}
        runtime.start()
        made = [pods.run(), pods.run()]
        runtime.kill()
        runtime.start()
        made.append(pods.run())
        levels = [attribute(pods.pause(pod)).removeprefix(PROCESS) for pod in made]
        same("levels", sorted(levels), ["s0:c0,c1", "s0:c0,c2", "s0:c1,c2"])
        said = pods.c.fails("runp", pods.config())
        expect("selinux_category_range" in said and "in use" in said, said)
        pods.c("rmp", "--force", made[1][0])
        pods.made.remove(made[1][0])
        last = pods.run(namespace_options={"network": NODE})
        info = pods.c.json("inspectp", last[0])["info"]
        same("the next pod's", info["runtimeSpec"]["linux"]["mountLabel"], FILE + levels[1])
        same("with the node's network, which is not to be confined here", attribute(info["pid"]), UNCONFINED)


def main():
    args = options.parser(__doc__).parse_args()
    if not os.path.exists(ENFORCE):
        sys.exit("this kernel has SELinux off: run it in the node (tests/vm/run.py selinux)")
    runtimes.Berth.extra = {**runtimes.Berth.extra, "selinux": True}
    runtimes.Berth.handlers = {"crun": oci.handler("crun")}
    steps = Steps("selinux")
    with options.session(args, steps) as s:
        pods = Pods(s)
        pods.c("pull", IMAGE)
        with open(ENFORCE, "w") as f:
            f.write("1")
        try:
            first, container, level, _ = plain(steps, pods)
            pods.first = first
            relabelled(steps, pods, first, level, (pods.made[1], pods.config()))
            asked_for(steps, pods, first, level)
            unconfined(steps, pods)
            in_user_namespace(steps, pods)
            images(steps, pods, first, level)
            of_runtime(steps, pods)
            restarted(steps, pods, s.runtime, container, level)
            few_categories(steps, pods, s.runtime)
        finally:
            with open(ENFORCE, "w") as f:
                f.write("0")
        with steps.step("remove"):
            pods.c("rmp", "--force", "--all")
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

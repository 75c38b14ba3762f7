"""Layers whose directories have the names of links of the same layer: what a directory's entry says never lands elsewhere."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "images"))
import build  # noqa: E402
import oci  # noqa: E402
import registry  # noqa: E402

from harness.report import expect  # noqa: E402
from inside import IMAGE  # noqa: E402
from walkthrough import written  # noqa: E402

NAME = "files.test"
TARGETS = ("real", "/real", "../../../real", "./real/.", "/", "gone")


def fill(tar):
    """For each target a link, then a directory of its name with an owner and a mode of its own; in two spellings."""
    tar.dir("real", 0o700, 11, 11)
    for number, target in enumerate(TARGETS):
        for letter, spelling in (("a", "{}"), ("b", "./{}/")):
            name = f"{letter}{number}"
            tar.symlink(name, target)
            tar.dir(spelling.format(name), 0o2777, 1234, 1234)
            tar.dirs.add(name)
            tar.data(name + "/inside", "x")


def lower(tar):
    tar.dir("real", 0o700, 11, 11)
    tar.symlink("below", "/real")


def upper(tar):
    """The link is a lower layer's: there the directory hides it."""
    tar.dir("below", 0o2777, 1234, 1234)
    tar.data("below/inside", "x")


def layers(steps, s, c):
    storage = os.path.join(s.work, "registry")
    os.makedirs(storage)
    with registry.RegistryProcess(storage, scratch=s.work) as own:
        s.baseline.processes.add(own.process.pid)
        registry.write_hosts(s.runtime.certs, own.address, [NAME])
        store, there = oci.Store(s.work + "/blobs"), build.Registry(own.address)
        for repo, fills in (("links", (fill,)), ("below", (lower, upper))):
            blobs = [store.layer(one) for one in fills]
            config, manifest = store.image(blobs, oci.OCI, oci.ARCH, {})
            for blob in [*blobs, config]:
                there.blob(repo, blob)
            there.manifest(repo, "1", manifest, oci.OCI["manifest"])
            c("pull", f"{NAME}/{repo}:1")
    config = written(s.work, "layers-pod.json", {"metadata": {"name": "layers", "namespace": "files", "attempt": 0, "uid": "uid-layers"},
                                                 "log_directory": s.work, "linux": {}})
    pod = c.id("runp", config)
    s.runtime.ids.add(pod)

    def volume(repo):
        mount = {"container_path": "/v", "image": {"image": f"{NAME}/{repo}:1"}, "readonly": True}
        path = written(s.work, repo + ".json", {"metadata": {"name": repo}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
                                                "mounts": [mount], "linux": {}})
        container = c.id("create", pod, path, config)
        s.runtime.ids.add(container)
        c("start", container)
        return c("exec", "--sync", container, "sh", "-c", "cd /v && stat -c '%n %F %a %u' . * && ls /v/real").strip().splitlines()
    with steps.step("a directory takes the place of a link of its name; owner and mode land on nothing else"):
        names = [f"{letter}{number}" for letter in "ab" for number in range(len(TARGETS))]
        want = [". directory 755 0", *(f"{name} directory 2777 1234" for name in names), "real directory 700 11"]
        found = volume("links")
        expect(found == want, f"{[line for line in found if line not in want]}, not {[line for line in want if line not in found]}")
    with steps.step("of a link of a layer below, too"):
        found = volume("below")
        expect(found == [". directory 755 0", "below directory 2777 1234", "real directory 700 11"], str(found))
    c("rmp", "--force", pod)
    for repo in ("links", "below"):
        c("rmi", f"{NAME}/{repo}:1")

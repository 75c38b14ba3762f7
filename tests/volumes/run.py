#!/usr/bin/env python3
"""Images and OCI artifacts as volumes: content, sub paths, digests, refusals, removal, user namespaces.

    run.py [--runtime NAME]

The images are made here and pulled from a registry of the test's own, so that links in them can be as
bad as they come.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile

HERE = os.path.dirname(os.path.abspath(__file__))
TESTS = os.path.dirname(HERE)
sys.path[:0] = [TESTS, os.path.join(TESTS, "crictl"), os.path.join(TESTS, "userns")]
from harness import options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from run import IMAGE, OWN, Pods, layers  # noqa: E402 (tests/userns/run.py)

sys.path.insert(0, os.path.join(TESTS, "images"))
import build  # noqa: E402
import oci  # noqa: E402
import registry  # noqa: E402

NAME = "volumes.test"
DATA, MODEL = NAME + "/data:1", NAME + "/model:1"
EMPTY = "application/vnd.oci.empty.v1+json"
TITLE = "org.opencontainers.image.title"


def lower(tar):
    tar.data("a.txt", "below\n")
    tar.data("hidden.txt", "below\n")
    tar.data("sub/dir/file", "file in sub/dir\n")
    tar.data("run.sh", "#!/bin/sh\necho runs\n", 0o755)
    tar.dir("owned", uid=1000, gid=1001)


def upper(tar):
    tar.data("a.txt", "above\n")
    tar.data(".wh.hidden.txt", "")
    tar.symlink("inside", "/sub")
    tar.symlink("climbs", "../../../../../../../../sub/dir")
    tar.symlink("absolute", "/etc")
    tar.symlink("host", "../../../../../../../../etc")
    tar.symlink("magic", "/proc/1/root")
    tar.symlink("loop", "loop")


class Images:
    """The test's images in a registry, and one artifact as an archive."""

    def __init__(self, work, address):
        self.store, self.registry = oci.Store(work + "/blobs"), build.Registry(address)
        blobs = [self.store.layer(fill) for fill in (lower, upper)]
        conf, manifest = self.store.image(blobs, oci.OCI, oci.ARCH, {})
        self.data = self._push("data", blobs + [conf], manifest)
        self.model = self.artifact("model", ["weights\n", "read me\n", "no title\n"], ["model.bin", "docs/readme.txt", None])
        self.untitled = self.last[1][2].digest.removeprefix("sha256:")
        self.bad = self.artifact("bad", ["x"], ["../../escape"])

    def _push(self, repo, blobs, manifest):
        for blob in blobs:
            self.registry.blob(repo, blob)
        self.registry.manifest(repo, "1", manifest, oci.OCI["manifest"])
        return manifest.digest

    def artifact(self, repo, texts, titles):
        blobs, entries = [self.store.bytes(t.encode()) for t in texts], []
        for blob, title in zip(blobs, titles):
            entries.append({**blob.descriptor("text/plain"), **({"annotations": {TITLE: title}} if title else {})})
        empty = self.store.bytes(b"{}")
        manifest = self.store.json({"schemaVersion": 2, "mediaType": oci.OCI["manifest"], "artifactType": "text/plain",
                                    "config": empty.descriptor(EMPTY), "layers": entries})
        self._push(repo, blobs + [empty], manifest)
        self.last = (manifest, blobs + [empty])
        return manifest.digest

    def archive(self, path):
        """The last artifact as an oci-archive without a name."""
        manifest, blobs = self.last
        index = self.store.json({"schemaVersion": 2, "mediaType": oci.OCI["index"],
                                 "manifests": [manifest.descriptor(oci.OCI["manifest"])]})
        layout = self.store.json({"imageLayoutVersion": "1.0.0"})
        with tarfile.open(path, "w") as tar:
            tar.add(layout.path, "oci-layout")
            tar.add(index.path, "index.json")
            for blob in [manifest, *blobs]:
                tar.add(blob.path, "blobs/sha256/" + blob.digest.removeprefix("sha256:"))
        return manifest.digest


def volume(image, sub="", **more):
    return {"container_path": "/v", "image": {"image": image}, "readonly": True,
            **({"image_sub_path": sub} if sub else {}), **more}


def content(steps, p, pod, images):
    with steps.step("an image as a volume: all its layers, read-only, programs run", fatal=True):
        container = p.container(pod, {}, mounts=[volume(DATA)])
        out = p.sh(container, "cat /v/a.txt /v/sub/dir/file; ls /v; /v/run.sh; stat -c %u:%g /v/owned")
        expect(out.split("\n")[:2] == ["above", "file in sub/dir"], out)
        expect("hidden.txt" not in out and "runs" in out and out.endswith("1000:1001"), out)
        p.c.fails("exec", "--sync", container, "touch", "/v/new")
        p.c.fails("exec", "--sync", container, "sh", "-c", "mount -o remount,rw /v")
    with steps.step("its digest is in the status"):
        mount = p.c.json("inspect", container)["status"]["mounts"][0]
        expect(mount["image"]["imageRef"] == f"{NAME}/data@{images.data}", str(mount))
        expect(mount["image"]["image"] == DATA and mount["containerPath"] == "/v" and not mount["hostPath"], str(mount))
    with steps.step("two images, and one image as root and volume"):
        mounts = [volume(DATA), {**volume(IMAGE), "container_path": "/root-image"},
                  {**volume(DATA, "sub"), "container_path": "/sub"}]
        both = p.container(pod, {}, mounts=mounts)
        p.sh(both, "cmp /bin/busybox /root-image/bin/busybox && cat /v/a.txt && cat /sub/dir/file")
    with steps.step("sub paths, also through links that stay inside"):
        for sub, found in (("sub", "dir"), ("sub/dir", "file"), ("inside", "dir"), ("inside/dir", "file"), ("climbs", "file")):
            container = p.container(pod, {}, mounts=[volume(DATA, sub)])
            expect(p.sh(container, "ls /v") == found, f"{sub}: {p.sh(container, 'ls /v')}")


def digests(s, steps, p, pod, images):
    """What the status says of an image volume (hack/adr/0011): of what was mounted, whatever the tag means later."""
    name = NAME + "/moves:1"

    def mounted(container, image):
        """(image, image_ref) of the status of a container with this volume."""
        mount = p.c.json("inspect", container)["status"]["mounts"][0]
        expect(mount["containerPath"] == "/v" and mount["image"]["image"] == image, str(mount))
        return mount["image"]["imageRef"]
    made = []
    with steps.step("a tag that has moved: each status has the digest of its own volume, also of one given by id", fatal=True):
        for text in ("one", "two"):
            digest = images.artifact("moves", [text + "\n"], ["file"])
            p.c("pull", name)
            container = p.container(pod, {}, mounts=[volume(name)])
            made.append((container, name, f"{NAME}/moves@{digest}", text))
        found = [i["id"] for i in p.c.json("images", "-o", "json")["images"] if made[0][2] in i["repoDigests"]]
        expect(len(found) == 1, f"{made[0][2]} is {found}")
        made.append((p.container(pod, {}, mounts=[volume(found[0])]), found[0], *made[0][2:]))
        for container, image, wanted, text in made:
            expect(mounted(container, image) == wanted, f"{mounted(container, image)}, not {wanted}")
            expect(p.sh(container, "cat /v/file") == text, "content")
        expect(made[0][2] != made[1][2], "the tag has not moved")
    with steps.step("the same after kill -9 of the daemon and without the images"):
        p.c("rmi", name, found[0])
        s.runtime.kill(signal.SIGKILL)
        s.runtime.start()
        wait_for("an answer", lambda: p.c.run("version")[0] == 0, 20 * s.factor)
        for container, image, wanted, text in made:
            expect(mounted(container, image) == wanted, f"{mounted(container, image)}, not {wanted}")
            expect(p.sh(container, "cat /v/file") == text, "content")


def refused(steps, p, pod):
    def create(mount):
        return p.c.fails("create", pod[0], p.container_config({}, mounts=[mount]), pod[1])
    for sub in ("none", "a.txt", "sub/dir/file", "absolute", "host", "magic", "loop"):
        with steps.step(f"refused: sub path {sub}"):
            error = create(volume(DATA, sub))
            expect("ImageVolumeMountFailed" in error and sub in error and "InvalidArgument" in error, error)
    for sub in ("../x", "/sub", "sub/../../x"):
        with steps.step(f"refused: sub path {sub}"):
            error = create(volume(DATA, sub))
            expect("image_sub_path" in error and "InvalidArgument" in error, error)
    for what, mount, words in (
            ("writable", {**volume(DATA), "readonly": False}, ("readonly", "InvalidArgument")),
            ("a host path beside it", volume(DATA, host_path="/tmp"), ("host_path", "InvalidArgument")),
            ("an image that is not here", volume(NAME + "/none:1"), ("ImageVolumeMountFailed", NAME + "/none:1", "NotFound")),
            ("a sub path of a host path", {"container_path": "/v", "host_path": "/tmp", "image_sub_path": "x"},
             ("image_sub_path", "InvalidArgument"))):
        with steps.step(f"refused: {what}"):
            error = create(mount)
            expect(all(word in error for word in words), error)


def artifacts(s, steps, p, pod, images):
    with steps.step("an artifact: each blob a file under its title", fatal=True):
        container = p.container(pod, {}, mounts=[volume(MODEL)])
        out = p.sh(container, f"cat /v/model.bin /v/docs/readme.txt /v/{images.untitled}; ls /v | wc -l; stat -c %a:%u /v/model.bin")
        expect(out.split("\n") == ["weights", "read me", "no title", "3", "644:0"], out)
        p.c.fails("exec", "--sync", container, "sh", "-c", "echo x > /v/model.bin")
        docs = p.container(pod, {}, mounts=[volume(MODEL, "docs")])
        expect(p.sh(docs, "ls /v") == "readme.txt", "sub path")
        mount = p.c.json("inspect", container)["status"]["mounts"][0]
        expect(mount["image"]["imageRef"] == f"{NAME}/model@{images.model}", str(mount))
    with steps.step("it is listed and has a status"):
        found = [i for i in p.c.json("images", "-o", "json")["images"] if MODEL in i["repoTags"]]
        expect(len(found) == 1 and found[0]["id"] == images.model and int(found[0]["size"]) == 25, str(found))
        expect(p.c.json("inspecti", MODEL)["status"]["id"] == images.model, "status")
    with steps.step("refused: a container that runs from it, and a title that leads outside"):
        config = p.container_config({}, image={"image": MODEL})
        error = p.c.fails("create", pod[0], config, pod[1])
        expect("artifact" in error and "InvalidArgument" in error, error)
        error = p.c.fails("pull", NAME + "/bad:1")
        expect("../../escape" in error, error)
    with steps.step("from an archive"):
        images.artifact("archived", ["from an archive\n"], ["file"])
        path = os.path.join(s.work, "artifact.tar")
        digest = images.archive(path)
        berth = os.environ.get("BERTH") or os.path.join(runtimes.REPO, "target", "release", "berth")
        subprocess.run([berth, "image", "import", "--address", s.runtime.socket, "--name", NAME + "/archived:1", path],
                       check=True, stdout=subprocess.DEVNULL)
        container = p.container(pod, {}, mounts=[volume(digest)])
        expect(p.sh(container, "cat /v/file") == "from an archive", "content")
        mount = p.c.json("inspect", container)["status"]["mounts"][0]
        expect(mount["image"]["imageRef"] == digest, f"without a repository digest the id {digest}: {mount}")


def owned(steps, p):
    with steps.step("in a user namespace: owners are those of the image, nothing is copied"):
        namespaces = {"userns_options": OWN}
        pod = p.run(namespaces)
        mounts = [volume(DATA), {**volume(MODEL), "container_path": "/m"},
                  {**volume(DATA, "climbs"), "container_path": "/s"}]
        container = p.container(pod, namespaces, mounts=mounts)
        out = p.sh(container, "stat -c %u:%g /v/a.txt /v/owned /m/model.bin /s/file; cat /v/a.txt /m/model.bin /s/file")
        expect(out.split("\n") == ["0:0", "1000:1001", "0:0", "0:0", "above", "weights", "file in sub/dir"], out)
        p.c.fails("exec", "--sync", container, "touch", "/v/new")


def removed(s, steps, p, pod):
    with steps.step("removed while it is mounted: the volume stays, also over kill -9; new ones fail", fatal=True):
        container = p.container(pod, {}, mounts=[volume(DATA), {**volume(MODEL), "container_path": "/m"}])
        p.c("rmi", DATA, MODEL)
        expect(p.sh(container, "cat /v/a.txt /m/model.bin").split() == ["above", "weights"], "content")
        s.runtime.kill(signal.SIGKILL)
        s.runtime.start()
        wait_for("an answer", lambda: p.c.run("version")[0] == 0, 20 * s.factor)
        expect(p.sh(container, "cat /v/a.txt /v/sub/dir/file").split()[0] == "above", "content after the restart")
        mount = p.c.json("inspect", container)["status"]["mounts"][0]
        expect(mount["image"]["imageRef"].startswith(NAME + "/data@sha256:"), str(mount))
        error = p.c.fails("create", pod[0], p.container_config({}, mounts=[volume(DATA)]), pod[1])
        expect("ImageVolumeMountFailed" in error, error)
    with steps.step("its layers go with the last container"):
        p.remove()
        wait_for("their end", lambda: not any(path.endswith(("/a.txt", "/model.bin")) for path in layers(s.runtime.root)),
                 20 * s.factor)


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps("volumes")
    with options.session(args, steps) as s:
        storage = os.path.join(s.work, "registry")
        os.makedirs(storage)
        with registry.RegistryProcess(storage, scratch=s.work) as own:
            s.baseline.processes.add(own.process.pid)
            registry.write_hosts(s.runtime.certs, own.address, [NAME])
            images = Images(s.work, own.address)
            p = Pods(s)
            for image in (IMAGE, DATA, MODEL):
                p.c("pull", image)
            before = layers(s.runtime.root)
            pod = p.run({})
            steps.run(content, steps, p, pod, images)
            steps.run(digests, s, steps, p, pod, images)
            steps.run(refused, steps, p, pod)
            steps.run(artifacts, s, steps, p, pod, images)
            steps.run(owned, steps, p)
            with steps.step("no layer has changed"):
                now = layers(s.runtime.root)
                expect(before and all(now.get(path) == was for path, was in before.items()), json.dumps(sorted(set(before) - set(now))))
            removed(s, steps, p, pod)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

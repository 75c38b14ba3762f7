"""The list of test images, and their way into a registry.

Repositories carry no registry name: `registry.k8s.io/pause:3.9` and
`k8s.gcr.io/pause:3.9` are both `pause:3.9` here; the runtime's mirror settings
send every registry name to this one. Most images are behind a two-platform
index whose other entry holds nothing that could run, so that a runtime which
picks the wrong one is found out at once.
"""

import http.client
import urllib.parse

import contents
from oci import ARCH, DOCKER, OCI, OTHER_ARCH, Store

E2E, CRI = "e2e-test-images/", "k8s-staging-cri-tools/"
SHELL = {"Cmd": ["sh"]}


class RegistryError(Exception):
    """The registry answered something else than it should."""


class Registry:
    """The pushing side of the distribution API."""

    def __init__(self, address):
        self.address = address

    def call(self, method, path, body=None, headers=None):
        conn = http.client.HTTPConnection(self.address, timeout=300)
        conn.request(method, path, body=body, headers=headers or {})
        resp = conn.getresponse()
        data = resp.read()
        conn.close()
        return resp.status, {k.lower(): v for k, v in resp.getheaders()}, data

    def blob(self, repo, blob):
        status, _, _ = self.call("HEAD", f"/v2/{repo}/blobs/{blob.digest}")
        if status == 200:
            return
        status, head, data = self.call("POST", f"/v2/{repo}/blobs/uploads/")
        if status != 202:
            raise RegistryError(f"upload to {repo}: {status} {data!r}")
        where = urllib.parse.urlsplit(head["location"])
        query = where.query + ("&" if where.query else "") + "digest=" + urllib.parse.quote(blob.digest)
        with open(blob.path, "rb") as f:
            status, _, data = self.call("PUT", where.path + "?" + query, f, {
                "Content-Type": "application/octet-stream", "Content-Length": str(blob.size)})
        if status != 201:
            raise RegistryError(f"upload to {repo}: {status} {data!r}")

    def manifest(self, repo, ref, blob, media_type):
        with open(blob.path, "rb") as f:
            status, _, data = self.call("PUT", f"/v2/{repo}/manifests/{ref}", f.read(),
                                        {"Content-Type": media_type})
        if status != 201:
            raise RegistryError(f"manifest {repo}:{ref}: {status} {data!r}")


class Builder:
    """Makes images of layers and pushes them; `made` maps repo:tag to the digest."""

    def __init__(self, work, address):
        self.store, self.registry, self.made = Store(work + "/blobs"), Registry(address), {}
        busybox = contents.fetch_busybox(work)
        self.busybox, self.work = busybox, work
        self.base = self.store.layer(contents.layer_busybox(busybox))
        self.other = self.store.layer(
            contents.layer_file("WRONG-ARCHITECTURE", "this is not the image you want\n"))

    def layer(self, fill):
        return self.store.layer(fill)

    def push(self, refs, layers, types=OCI, index=True, **config):
        """Pushes one image under every repo:tag of `refs`."""
        for ref in refs:
            repo, tag = ref.rsplit(":", 1)
            conf, manifest = self.store.image(layers, types, ARCH, config)
            for blob in layers + [conf]:
                self.registry.blob(repo, blob)
            if not index:
                self.registry.manifest(repo, tag, manifest, types["manifest"])
                self.made[ref] = manifest.digest
                continue
            conf2, manifest2 = self.store.image([self.other], types, OTHER_ARCH, config)
            for blob in (self.other, conf2):
                self.registry.blob(repo, blob)
            for m in (manifest2, manifest):
                self.registry.manifest(repo, m.digest, m, types["manifest"])
            top = self.store.index(types, [(OTHER_ARCH, manifest2), (ARCH, manifest)])
            self.registry.manifest(repo, tag, top, types["index"])
            self.made[ref] = top.digest


def pause_images(b):
    # 3.9 must not be the image a runtime keeps for its pods: one spec counts its tags.
    pause = contents.compile_c(b.work, "pause")
    layer = b.layer(lambda a: a.file("pause", pause, 0o755))
    b.push(["pause:3.9"], [layer], DOCKER, Entrypoint=["/pause"], User="65535:65535", Labels={"version": "3.9"})
    b.push(["pause:3.10", "pause:3.10.1", "pause:3.10.2"], [layer], Entrypoint=["/pause"], User="65535:65535")
    # Benchmarks: the same program by a name of its own, so that a listing tells
    # sandboxes from containers. It ends at once on SIGTERM.
    b.push(["lab/bench:1"], [b.base, b.layer(lambda a: a.file("idle", pause, 0o755))], Cmd=["/idle"])


def e2e_images(b):
    nnp = contents.compile_c(b.work, "nnp")
    nginx, httpd = b.layer(contents.layer_nginx(b.busybox, 80)), b.layer(contents.layer_httpd)
    serve = {"Cmd": ["nginx", "-g", "daemon off;"], "StopSignal": "SIGTERM"}
    b.push([E2E + "busybox:1.29-2"], [b.base], DOCKER, **SHELL)
    b.push([E2E + "nginx:1.14-2"], [b.base, nginx], DOCKER, ExposedPorts={"80/tcp": {}}, **serve)
    b.push([E2E + "httpd:2.4.39-4"], [b.base, httpd], DOCKER, Cmd=["httpd-foreground"],
           ExposedPorts={"80/tcp": {}}, WorkingDir="/usr/local/apache2")
    b.push([E2E + "nonewprivs:1.3"], [b.base, b.layer(lambda a: a.file("nnp", nnp, 0o6755))], DOCKER,
           Entrypoint=["/nnp"])
    b.push([f"{CRI}hostnet-nginx-{ARCH}:latest"], [b.base, b.layer(contents.layer_nginx(b.busybox, 12003))],
           DOCKER, index=False, ExposedPorts={"12003/tcp": {}}, **serve)


def cri_tools_images(b):
    for name, user in (("uid", "1002"), ("username", "www-data"),
                       ("uid-group", "1003:1004"), ("username-group", "www-data:1004")):
        b.push([f"{CRI}test-image-user-{name}:latest"], [b.base], User=user, **SHELL)
    b.push([CRI + "test-image-predefined-group:latest"], [b.base, b.layer(contents.layer_groups)],
           User="1000", **SHELL)
    # Pulled by digest: without an index, so that there is only one digest to report.
    b.push([CRI + "test-image-digest:latest"],
           [b.base, b.layer(contents.layer_file("test-image-digest", ""))], index=False, **SHELL)
    for ref in ("test-image-latest:latest", "test-image-tag:test", "test-image-tag:all",
                "test-image-1:latest", "test-image-2:latest", "test-image-3:latest"):
        b.push([CRI + ref], [b.base, b.layer(contents.layer_file(ref.replace(":", "-"), ""))], **SHELL)
    b.push([f"{CRI}test-image-tags:{n}" for n in "123"],
           [b.base, b.layer(contents.layer_file("same-image", ""))], **SHELL)


def docker_hub_images(b):
    """What critest's image benchmark pulls, and crictl's own examples name."""
    for tag in ("1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl"):
        b.push([f"docker/library/busybox:{tag}"],
               [b.base, b.layer(contents.layer_file("variant", tag + "\n"))], **SHELL)
    b.push(["library/busybox:latest", "library/busybox:1"], [b.base], **SHELL)


# Where links of hostile images lead: a directory of the node that the test makes, looks after and removes.
ESCAPE = "/run/berth-test-escape"
# What a label of a hostile image would have a runtime make on the node.
SPOILT = "/run/berth-test-spoilt"
LABELS = {
    "containerd.io/restart.status": "running",
    "containerd.io/restart.loguri": f"binary:///bin/sh?-c=touch%20{SPOILT}",
    "io.containerd.image.config.stop-signal": SPOILT,
    "nerdctl/log-uri": f"binary:///bin/touch?{SPOILT}",
    "io.kubernetes.cri-o.UnifiedCgroup.c": "memory.max=max",
    "io.kubernetes.cri-o.Devices": "/dev/kmsg:/dev/kmsg:rwm",
    "io.katacontainers.config.hypervisor.path": SPOILT,
    "org.systemd.property.ExecStartPre": f"touch {SPOILT}",
    "run.oci.hooks.stdout": SPOILT,
    "io.podman.annotations.seccomp": "unconfined",
}


def security_images(b):
    """What tests/security takes to be an attacker's."""
    refused = contents.compile_c(b.work, "refused")
    own = lambda fill: [b.base, b.layer(fill)]  # noqa: E731
    b.push(["security/refused:1"], own(lambda a: a.file("refused", refused, 0o755)), Cmd=["/refused", "wait"])
    hunter = contents.compile_c(b.work, "hunter")
    b.push(["security/hunter:1"], own(lambda a: a.file("hunter", hunter, 0o755)), Cmd=["/hunter"])
    b.push(["security/open:1"], own(contents.layer_open), User="app", **SHELL)
    for number, user in enumerate(("4294967296", "4294967295", "2147483648", "-1", "0x0", " 0", "root\n", "1:-1", "gone")):
        b.push([f"security/user:{number}"], [b.base], User=user, **SHELL)
    again = b.layer(lambda a: a.data("again", "#!/proc/self/exe\n", 0o755))
    b.push(["security/again:1"], [b.base, again], Entrypoint=["/again"])
    for number in (3, 5, 8):
        b.push([f"security/workdir:{number}"], [b.base], WorkingDir=f"/proc/self/fd/{number}", **SHELL)
    for name in ("dev", "proc", "sys", "etc"):
        # The link hides the directory of the layer below.
        b.push([f"security/link:{name}"], own(contents.layer_link(name, ESCAPE)), **SHELL)
        b.push([f"security/up:{name}"], own(contents.layer_link(name, "../../.." + ESCAPE)), **SHELL)
    b.push(["security/labels:1"], [b.base], Labels=LABELS, **SHELL)
    b.push(["security/null:1"], own(contents.layer_link("dev/null", "/proc/sysrq-trigger")), **SHELL)


def big_image(b):
    layers = [b.base] + [b.layer(contents.layer_trees(dirs, limit)) for _, dirs, limit in contents.BIG]
    b.push(["lab/big:1"], layers, **SHELL)


def build(work, address, big=False):
    """Builds every image and pushes it to the registry at `address`: {repo:tag: digest}."""
    builder = Builder(work, address)
    for part in (pause_images, e2e_images, cri_tools_images, docker_hub_images, security_images):
        part(builder)
    if big:
        big_image(builder)
    return builder.made

"""Images as files: blobs named by their digest, gzip layers, manifests and indexes.

Everything is reproducible: the same input gives the same digests.
"""

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile

EPOCH = 1500000000  # every file's time
CREATED = "2017-07-14T02:40:00Z"
ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
OTHER_ARCH = "arm64" if ARCH == "amd64" else "amd64"

OCI = {
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "index": "application/vnd.oci.image.index.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "layer": "application/vnd.oci.image.layer.v1.tar+gzip",
}
DOCKER = {
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "index": "application/vnd.docker.distribution.manifest.list.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "layer": "application/vnd.docker.image.rootfs.diff.tar.gzip",
}


class Blob:
    """A file in the store, named by its digest; a layer has a diff id too."""

    def __init__(self, path, digest, size, diff_id=None):
        self.path, self.digest, self.size, self.diff_id = path, digest, size, diff_id

    def descriptor(self, media_type):
        return {"mediaType": media_type, "digest": self.digest, "size": self.size}


class Tee:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data):
        self.hash.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


class Store:
    """A directory of blobs."""

    def __init__(self, directory):
        self.dir = directory
        os.makedirs(directory, exist_ok=True)

    def bytes(self, data):
        digest = hashlib.sha256(data).hexdigest()
        path = os.path.join(self.dir, digest)
        with open(path + ".tmp", "wb") as f:
            f.write(data)
        os.rename(path + ".tmp", path)
        return Blob(path, "sha256:" + digest, len(data))

    def json(self, obj):
        return self.bytes(json.dumps(obj, sort_keys=True).encode())

    def layer(self, fill, level=6):
        """A gzip layer; `fill` gets a `LayerTar` to put the members in."""
        tmp = os.path.join(self.dir, "layer.tmp")
        with open(tmp, "wb") as raw:
            packed = Tee(raw)
            with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=level, mtime=0) as gz:
                plain = Tee(gz)
                with tarfile.open(fileobj=plain, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                    fill(LayerTar(tar))
        digest = packed.hash.hexdigest()
        path = os.path.join(self.dir, digest)
        os.rename(tmp, path)
        return Blob(path, "sha256:" + digest, os.path.getsize(path), "sha256:" + plain.hash.hexdigest())

    def image(self, layers, types, arch, config):
        """Config and manifest of an image: two blobs."""
        env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
        conf = self.json({
            "architecture": arch, "os": "linux", "created": CREATED,
            "config": {"Env": env, **config},
            "rootfs": {"type": "layers", "diff_ids": [l.diff_id for l in layers]},
            "history": [{"created": CREATED, "created_by": "tests/images"} for _ in layers],
        })
        manifest = self.json({
            "schemaVersion": 2, "mediaType": types["manifest"],
            "config": conf.descriptor(types["config"]),
            "layers": [l.descriptor(types["layer"]) for l in layers],
        })
        return conf, manifest

    def index(self, types, manifests):
        """An index of (architecture, manifest blob) pairs."""
        entries = [{**m.descriptor(types["manifest"]), "platform": {"architecture": arch, "os": "linux"}}
                   for arch, m in manifests]
        return self.json({"schemaVersion": 2, "mediaType": types["index"], "manifests": entries})


class LayerTar:
    """A layer's tar, which makes the parent directories by itself."""

    def __init__(self, tar):
        self.tar, self.dirs = tar, set()

    def _info(self, name, typ, mode, uid=0, gid=0):
        name = name.strip("/")
        parent = os.path.dirname(name)
        if parent and parent not in self.dirs:
            self.dir(parent)
        t = tarfile.TarInfo(name)
        t.type, t.mode, t.uid, t.gid, t.mtime = typ, mode, uid, gid, EPOCH
        return t

    def dir(self, name, mode=0o755, uid=0, gid=0):
        name = name.strip("/")
        if name not in self.dirs:
            info = self._info(name, tarfile.DIRTYPE, mode, uid, gid)
            self.dirs.add(name)
            self.tar.addfile(info)

    def data(self, name, content, mode=0o644):
        if isinstance(content, str):
            content = content.encode()
        info = self._info(name, tarfile.REGTYPE, mode)
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))

    def file(self, name, path, mode=None):
        st = os.stat(path)
        info = self._info(name, tarfile.REGTYPE, stat.S_IMODE(st.st_mode) if mode is None else mode)
        info.size = st.st_size
        with open(path, "rb") as f:
            self.tar.addfile(info, f)

    def hardlink(self, name, to):
        info = self._info(name, tarfile.LNKTYPE, 0o755)
        info.linkname = to.strip("/")
        self.tar.addfile(info)

    def symlink(self, name, to):
        info = self._info(name, tarfile.SYMTYPE, 0o777)
        info.linkname = to
        self.tar.addfile(info)

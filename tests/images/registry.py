#!/usr/bin/env python3
"""A local registry (docker-registry) that holds every test image.

    registry.py prepare [--big]                      build, unless done; print the directory
    registry.py serve --port N [--certs DIR] [--big] [--images DIR]
                                                     prepare, then serve on 127.0.0.1 until ended

The images are built once per content of this directory, into $BERTH_CACHE/images/<hash>:
`registry/` is docker-registry's storage, `images.json` maps repo:tag to the digest.
`serve` prints one line when it answers. `--port 0` takes a free port. `--certs DIR` gets
a hosts.toml for each registry name the tests use. `--images DIR` is a prepared directory.
"""

import argparse
import fcntl
import glob
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
MIRRORED = ("registry.k8s.io", "k8s.gcr.io", "gcr.io", "public.ecr.aws", "docker.io")
PROGRAM = os.environ.get("DOCKER_REGISTRY", "docker-registry")
CONFIG = """version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: "{storage}"}}
  delete: {{enabled: true}}
  maintenance: {{uploadpurging: {{enabled: false}}}}
http: {{addr: "127.0.0.1:{port}", secret: tests}}
"""


def cache_dir():
    return os.environ.get("BERTH_CACHE") or os.path.expanduser("~/.cache/berth")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class RegistryProcess:
    """docker-registry on 127.0.0.1:`port` over `storage`; ends with the `with` block."""

    def __init__(self, storage, port=0, scratch=None):
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.config = os.path.join(scratch or storage, f"registry-{self.port}.yml")
        with open(self.config, "w") as f:
            f.write(CONFIG.format(storage=storage, port=self.port))
        self.log = self.config + ".log"
        with open(self.log, "wb") as log:
            try:
                self.process = subprocess.Popen([PROGRAM, "serve", self.config], stdin=subprocess.DEVNULL,
                                                stdout=log, stderr=log)
            except FileNotFoundError:
                sys.exit(f"missing tool: {PROGRAM} (package docker-registry)")

    def wait_ready(self):
        end = time.monotonic() + 30 * float(os.environ.get("BERTH_TIME_FACTOR", "1"))
        while time.monotonic() < end and self.process.poll() is None:
            try:
                conn = http.client.HTTPConnection(self.address, timeout=2)
                conn.request("GET", "/v2/")
                if conn.getresponse().status == 200:
                    return self
            except OSError:
                time.sleep(0.05)
        with open(self.log) as log:
            sys.exit(f"docker-registry on {self.address} does not answer: {log.read()[-500:]}")

    def stop(self):
        self.process.terminate()
        self.process.wait()
        os.unlink(self.config)
        os.unlink(self.log)

    def __enter__(self):
        return self.wait_ready()

    def __exit__(self, *_):
        self.stop()


def content_hash(big):
    h = hashlib.sha256(b"big" if big else b"small")
    for path in sorted(glob.glob(HERE + "/*.py") + glob.glob(HERE + "/src/*.c") + ["/usr/sbin/nginx"]):
        if os.path.exists(path):
            with open(path, "rb") as f:
                h.update(path.rsplit("/", 1)[1].encode() + b"\0" + f.read())
    return h.hexdigest()[:16]


def prepare(big=False):
    """Builds the images unless that is done: the directory with registry/ and images.json."""
    top = os.path.join(cache_dir(), "images")
    final = os.path.join(top, content_hash(big))
    os.makedirs(top, exist_ok=True)
    with open(os.path.join(top, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(final + "/images.json"):
            return final
        import build  # after the lock: it is only needed here
        start, new = time.monotonic(), final + ".new"
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new + "/registry")
        with RegistryProcess(new + "/registry", scratch=new) as registry:
            made = build.build(os.path.join(top, "work"), registry.address, big)
        with open(new + "/images.json", "w") as f:
            json.dump(made, f, indent=1, sort_keys=True)
        os.rename(new, final)
        shutil.rmtree(os.path.join(top, "work", "blobs"), ignore_errors=True)
        print(f"images: {len(made)} built in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return final


def write_hosts(certs, address, names=MIRRORED):
    """certs.d: each registry name of `names` is answered by the registry at `address` alone."""
    for name in names:
        os.makedirs(os.path.join(certs, name), exist_ok=True)
        with open(os.path.join(certs, name, "hosts.toml"), "w") as f:
            f.write(f'server = "http://{address}"\n\n[host."http://{address}"]\n'
                    '  capabilities = ["pull", "resolve"]\n  skip_verify = true\n')


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("what", choices=("prepare", "serve"))
    ap.add_argument("--port", type=int, default=0)
    ap.add_argument("--certs")
    ap.add_argument("--images")
    ap.add_argument("--big", action="store_true", help="also the pull benchmark's image (a minute)")
    args = ap.parse_args()
    images = args.images or prepare(args.big)
    if args.what == "prepare":
        print(images)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with RegistryProcess(images + "/registry", args.port, scratch=os.environ.get("TMPDIR", "/tmp")) as registry:
        if args.certs:
            write_hosts(args.certs, registry.address)
        print(f"registry: {registry.address} {images}", flush=True)
        registry.process.wait()


if __name__ == "__main__":
    main()

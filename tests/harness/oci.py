"""OCI runtimes for the tests of handlers: the ones of hack/versions, else what is installed, and what each of them can do.

A runtime that is installed may be of any age. What it can is what it says itself, by `features`, or by its version if it has no
such sub-command; a test asks of it nothing else, and looks instead at how berth refuses that.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

from harness import isolate, runtimes

# gVisor makes a sandbox for each container: those of a pod share its network only by sockets of the kernel's.
ARGUMENTS = {"runsc": {"arguments": ["--platform=systrap", "--network=host", "--ignore-cgroups"]}}


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What the tests use of a runtime and not every version has."""

    user_namespaces: bool = False  # a container joins one by path, whose ids the runtime does not map
    recursive_read_only: bool = False
    versions: tuple = ((1, 0, 0), (1, 0, 999))  # of bundles, the first and the last

    def bundle(self, version):
        return self.versions[0] <= version <= self.versions[1]


def number(text):
    """The parts of a version, without what stands behind a `-` or `+`."""
    return tuple(int(part) for part in re.match(r"(\d+)\.(\d+)\.(\d+)", text).groups())


def by_features(answer):
    linux, options = answer.get("linux") or {}, answer.get("mountOptions") or []
    idmap = ((linux.get("mountExtensions") or {}).get("idmap") or {}).get("enabled", False)
    return Abilities("user" in (linux.get("namespaces") or []) and idmap, "rro" in options,
                     (number(answer["ociVersionMin"]), number(answer["ociVersionMax"])))


def by_version(text):
    """crun before 1.11 has no `features`; it joins user namespaces by path, and knows bundles of 1.0 only. runc before 1.1 has none
    either, and wants the mappings of a namespace that it joins."""
    spec = re.search(r"^spec: (\d+)\.(\d+)\.", text, re.M)
    if not spec:
        return Abilities()
    version = tuple(int(part) for part in spec.groups())
    return Abilities(user_namespaces=version[0] == 1 and not text.startswith("runc"),
                     versions=((version[0], 0, 0), (*version, 999)))


def abilities(path):
    """What the program at `path` says of itself."""
    ask = lambda word: subprocess.run([path, word], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,  # noqa: E731
                                      stderr=subprocess.DEVNULL, check=False)
    told = ask("features")
    if told.returncode == 0:
        return by_features(json.loads(told.stdout))
    return by_version(ask("--version").stdout.decode(errors="replace"))


def find(name):
    """The program of that name: that of the environment or hack/versions, else that of PATH; None: there is none."""
    path = os.environ.get(name.upper()) or runtimes.versions().get(name.upper(), "")
    return path if os.access(path, os.X_OK) else shutil.which(name)


def handler(name):
    """What a handler of that name is in the configuration: a path, or keys; the end of the test if there is no such program."""
    path = find(name)
    if not path:
        sys.exit(f"missing tool: {name}; hack/install-peers brings it")
    return {"path": path, **ARGUMENTS[name]} if name in ARGUMENTS else path


def handlers(hidden=False):
    """The OCI runtimes that this machine has and lets run, name to path. crun takes no machine that has both versions of
    cgroups, unless the second is `hidden`."""
    found = {name: find(name) for name in ("runc", "crun") if name != "crun" or hidden or not isolate.is_hybrid()}
    found = {name: path for name, path in found.items() if path}
    for name, path in found.items() if isolate.MARK in os.environ else ():
        print(f"      {name} is {path}: {abilities(path)}", flush=True)
    return found

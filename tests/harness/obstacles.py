#!/usr/bin/env python3
"""What stands in the way of tests, said before the first of them starts.

    obstacles.py [--defaults]

Of every suite: the rights and the kernel's parts without which none of them can run. With --defaults also what is at the
places that berth has without a configuration, where the quick start runs it: a daemon, or what an earlier one has left.
An empty cgroup, directories and images of an earlier daemon are in nobody's way. Exit status 1: something is.
"""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import tempfile

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import leaks  # noqa: E402

RUN, LIBRARY, CGROUP = "/run/berth", "/var/lib/berth", "/berth"
FREE = 2 << 30  # bytes: images, layers, builds of the demonstration


def of_machine(top=leaks.CGROUPS, free=FREE):
    """Sentences, one for each thing that keeps every suite from running."""
    found = []
    if os.geteuid() != 0:
        return ["not root: the tests make namespaces and cgroups; run them by sudo"]
    command = ["unshare", "--net", "--mount", "--ipc", "--propagation", "private", "true"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        found.append(f"no namespaces can be made ({done.stderr.decode(errors='replace').strip()}): a container without "
                     "CAP_SYS_ADMIN, or its seccomp profile, does not let tests make them")
    found += _cgroups(top)
    for place in sorted({tempfile.gettempdir(), "/run"}):
        there = shutil.disk_usage(place)
        if there.free < (free if place != "/run" else 64 << 20):
            found.append(f"{place} has {there.free >> 20} MiB free: too few; make room, or set TMPDIR")
    return found


def _cgroups(top):
    hierarchies = leaks.hierarchies(top)
    if not hierarchies:
        return [f"no cgroup hierarchy is mounted below {top}: mount cgroup2 there, or the v1 hierarchies"]
    for hierarchy in hierarchies:
        path = os.path.join(hierarchy, f"berth-test-obstacle-{os.getpid()}")
        try:
            os.mkdir(path)
            os.rmdir(path)
        except OSError as error:
            return [f"{hierarchy}: no cgroup can be made ({error.strerror}): it must be writable"]
    return []


def of_defaults(run=RUN, library=LIBRARY, cgroup=CGROUP):
    """Sentences, one for each thing of another berth at the places that it has without a configuration."""
    found = []
    answer = _listener(os.path.join(run, "berth.sock"))
    holder = _holder(os.path.join(library, "lock"))
    if answer or holder:
        found.append(f"a daemon of berth runs{f' (pid {holder})' if holder else ''} on {answer or library}: "
                     "stop it (systemctl stop berth)")
    records = [os.path.join(library, kind, name) for kind in ("pods", "containers")
               for name in _names(os.path.join(library, kind)) if name.endswith(".json")]
    directories = [os.path.join(run, "pods", name) for name in _names(os.path.join(run, "pods"))]
    if records or directories:
        first = (records + directories)[0]
        found.append(f"pods of an earlier berth are known ({len(records)} records, {len(directories)} directories, such as {first}): "
                     "the daemon of the quick start would take them for its own; start that berth and remove them (berth rm --all)")
    for path, pids in _occupied(cgroup):
        found.append(f"cgroup {path} has processes ({', '.join(pids[:5])}{', ...' if len(pids) > 5 else ''}): "
                     "pods of an earlier berth live on; start it and remove them (berth rm --all)")
    below = sorted({m for m in leaks.mounts() if m.startswith((run + "/", library + "/"))})
    if below:
        found.append(f"{len(below)} mounts are left, such as {below[0]}: unmount them (umount -R {below[0]})")
    return found


def _names(directory):
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _listener(path):
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect(path)
        except OSError:
            return None
    return path


def _holder(path):
    """Who has the lock of a root directory; absent: nobody."""
    try:
        with open(path) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return f.read(20).strip() or "?"
    except OSError:
        pass
    return None


def _occupied(cgroup):
    """(path, processes) of the cgroups below that have some; one for each set of processes."""
    seen = set()
    for path in leaks.cgroups(cgroup):
        try:
            with open(os.path.join(path, "cgroup.procs")) as f:
                pids = tuple(f.read().split())
        except OSError:
            continue
        if pids and pids not in seen:
            seen.add(pids)
            yield path, list(pids)


def main():
    if sys.argv[1:] not in ([], ["--defaults"]):
        sys.exit(__doc__)
    found = of_machine() + (of_defaults() if sys.argv[1:] else [])
    for one in found:
        print(f"in the way: {one}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

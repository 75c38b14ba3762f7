"""Asserts that a runtime leaves nothing of what was not there before: processes, mounts, links, nft rules, cgroups, files; and ends what it left."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time

CGROUPS = "/sys/fs/cgroup"
FORWARDING = "/run/berth-forwarding"
SO_NETNS_COOKIE = 71  # socket(7), Linux 5.14


def descendants():
    """Live processes below this one: {pid: command line}. Dead orphans are reaped."""
    children, command = {}, {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as f:
                state, parent = f.read().rpartition(")")[2].split()[:2]
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                command[int(pid)] = f.read().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        children.setdefault(int(parent), []).append((int(pid), state))
    found, todo = {}, [os.getpid()]
    while todo:
        parent = todo.pop()
        for pid, state in children.get(parent, []):
            if state == "Z" and parent == os.getpid():
                _reap(pid)
            elif state != "Z":
                found[pid] = command.get(pid, "")
                todo.append(pid)
    return found


def _reap(pid):
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass


def mounts():
    with open("/proc/self/mountinfo") as f:
        return [line.split()[4] for line in f]


def links():
    out = subprocess.run(["ip", "-o", "link"], stdout=subprocess.PIPE, check=True).stdout.decode()
    return [re.sub(r"@.*", "", line.split(": ")[1]) for line in out.splitlines()]


def nft_tables():
    try:
        out = subprocess.run(["nft", "list", "tables"], stdout=subprocess.PIPE, check=True).stdout.decode()
    except FileNotFoundError:
        return []
    return out.splitlines()


def hierarchies(place=CGROUPS):
    """Where each cgroup hierarchy is mounted: v2 alone there, or those of v1 and a v2 beside them below."""
    tops = [place] + ([e.path for e in os.scandir(place) if e.is_dir() and not e.is_symlink()] if os.path.isdir(place) else [])
    tops = [top for top in tops if os.path.exists(os.path.join(top, "cgroup.procs"))]
    return tops[:1] if place in tops else tops


def cgroups(name):
    """Directories of that name, or below one, in every hierarchy."""
    found = []
    for top in hierarchies():
        for base, _, _ in os.walk(os.path.join(top, name.strip("/"))):
            found.append(base)
    return found


def files(directory):
    """Files and symbolic links below a directory."""
    return [os.path.join(base, name) for base, _, names in os.walk(directory) for name in names]


def _extra(now, before):
    """What is there more often than before, in order."""
    left = list(before)
    return [item for item in now if item not in left or left.remove(item)]


def forwarding_notes():
    """Where berth notes what forwarding was in this network namespace, if the note is there. (Not before Linux 5.14.)"""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            cookie = int.from_bytes(s.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
        except OSError:
            return []
    path = f"{FORWARDING}/netns-{cookie}"
    return [path] if os.path.exists(path) else []


def end_processes(before):
    """Ends, one by one, every process below this one that is not in `before`."""
    for _ in range(50):
        stray = [pid for pid in descendants() if pid not in before]
        if not stray:
            return
        for pid in stray:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def remove_cgroups(paths):
    """Removes empty cgroups, the deepest first. A process that has just been killed holds its own for a moment."""
    for path in sorted(paths, key=len, reverse=True):
        for _ in range(20):
            try:
                os.rmdir(path)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.1)


def forget_forwarding():
    """For a network namespace that ends with the test: nobody will put anything back in it."""
    for path in forwarding_notes():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(FORWARDING)


class Baseline:
    """The state before the runtime is started; `left` tells what came on top of it."""

    def __init__(self):
        self.processes, self.mounts = set(descendants()), mounts()
        self.links, self.tables, self.notes = links(), nft_tables(), forwarding_notes()
        self.cgroups = set(cgroups("/"))

    def left(self, runtime, ids=()):
        """Complaints after the runtime's end, one line each; `ids` are its pods and containers."""
        out = [f"process {pid}: {cmd}" for pid, cmd in descendants().items() if pid not in self.processes]
        out += [f"mount {m}" for m in _extra(mounts(), self.mounts)]
        if runtime.leaves_network:
            return out + self._files(runtime, ids)
        out += [f"link {l}" for l in _extra(links(), self.links)]
        out += [f"nft {t}" for t in _extra(nft_tables(), self.tables)]
        out += [f"note {n}" for n in _extra(forwarding_notes(), self.notes)]
        out += [f"cgroup {c}" for c in cgroups(runtime.cgroup_root) if c not in self.cgroups]
        return out + self._files(runtime, ids)

    def restore(self, runtime, isolated):
        """Ends and removes what `left` would tell, by pid and by path, so that the machine is as before. `isolated`: the network
        namespace ends with the test."""
        end_processes(self.processes)
        remove_cgroups(c for c in cgroups(runtime.cgroup_root) if c not in self.cgroups)
        if isolated:
            forget_forwarding()

    @staticmethod
    def _files(runtime, ids):
        allowed = re.compile(runtime.state_files_allowed)
        out = [f"file {f}" for f in files(runtime.state) if not allowed.search(f)]
        for path in files(runtime.root):
            hit = [i for i in ids if i in path]
            if not hit and os.path.isfile(path) and not os.path.islink(path) and os.path.getsize(path) < 65536:
                with open(path, "rb") as f:
                    content = f.read()
                hit = [i for i in ids if i.encode() in content]
            if hit:
                out.append(f"file {path} names {hit[0][:13]}")
        return out

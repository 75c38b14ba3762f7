"""What the daemon makes is closed to the users of the node: whatever modes a container leaves, nobody reads or runs it there."""

import json
import os
import shutil
import signal
import stat
import subprocess

from harness.report import expect, wait_for
from inside import Pod

# One that every user of the node may run.
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
NOBODY = 65534
FORWARDING = "/run/berth-forwarding"
FIRST = 240000  # of the pod's range of ids
OWN = [{"host_id": FIRST, "container_id": 0, "length": 65536}]
USERNS = {"userns_options": {"mode": 0, "uids": OWN, "gids": OWN}}
# Programs that would make their user root on the node, one also where only a volume of berth's own can be written.
LEAVE = """
set -e
for place in /left /etc/hosts /etc/resolv.conf /var/left; do
	mkdir -p ${place%/*}/ && cat /bin/busybox > $place && chown 0:0 $place && chmod 6777 $place
done
echo secret > /secret && chmod 666 /secret && mkdir /open && chmod 777 /open
"""
# Tries every path it is given, NUL between them, and says what could be done with it.
TRY = """import json, os, socket, sys
found = {}
for path in sys.stdin.read().split("\\0"):
    could = []
    def tried(what, do):
        try:
            do()
            could.append(what)
        except OSError:
            pass
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        continue
    could.append("stat")
    tried("list", lambda: os.listdir(path))
    tried("read", lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
    tried("write", lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
    tried("make", lambda: os.mkdir(path + "/x"))
    tried("connect", lambda: socket.socket(socket.AF_UNIX).connect(path))
    if not os.path.isdir(path) and os.access(path, os.X_OK):
        could.append("run")
    found[path] = could
print(json.dumps(found))
"""


def everything(tops):
    """Every path below these, and they themselves."""
    found = []
    for top in tops:
        found.append(top)
        for base, directories, files in os.walk(top):
            found += [os.path.join(base, name) for name in directories + files]
    return found


def reached(s):
    """What a user of the node can do with what the daemon has made: path to words, where it is anything."""
    # What belongs to OCI runtimes, below `runtimes`, is theirs to close; the way to it is ours.
    paths = everything([s.runtime.root, s.runtime.state, s.runtime.socket, os.path.join(s.work, "nri.sock"), FORWARDING])
    done = subprocess.run([PYTHON, "-c", TRY], user=NOBODY, group=NOBODY, extra_groups=[], input="\0".join(paths).encode(),
                          stdout=subprocess.PIPE, check=True, cwd="/")
    return len(paths), json.loads(done.stdout)


def check(s, least):
    """Nothing can be done but to see that these few are there."""
    total, found = reached(s)
    expect(total >= least, f"only {total} paths")
    state = s.runtime.state
    allowed = {s.runtime.root, state, s.runtime.socket, os.path.join(s.work, "nri.sock"), FORWARDING}
    allowed |= {os.path.join(state, name) for name in os.listdir(state)}
    # A pod's name is no secret: its cgroup has it.
    allowed |= {os.path.join(state, "pods", name) for name in os.listdir(os.path.join(state, "pods"))}
    more = {path: could for path, could in found.items() if could != ["stat"] or path not in allowed}
    expect(not more, f"{len(more)} of {total}: {dict(list(more.items())[:8])}")


def loosen(s):
    """The modes that older versions left."""
    root, state = s.runtime.root, s.runtime.state

    def below(directory):
        return [e.path for e in os.scandir(directory) if e.is_dir(follow_symlinks=False)]
    pods = below(state + "/pods")
    for path in (root, state, state + "/pods", *pods, *(b for pod in pods for b in below(pod)), *below(root + "/containers")):
        os.chmod(path, 0o711)
        os.chown(path, 0, 0)
    for path in (*below(root), *below(root + "/images"), state + "/network", *below(state + "/network"),
                 FORWARDING, *below(FORWARDING)):
        os.chmod(path, 0o755)


def started_with(s, umask):
    """Starts the daemon anew, as somebody with this umask would."""
    before = os.umask(umask)
    try:
        s.runtime.kill(signal.SIGTERM)
        s.runtime.start()
    finally:
        os.umask(before)


def pods_of(s, c):
    """A pod of each kind: with and without a user namespace, by berth and by OCI runtimes."""
    for handler in ("", *s.runtime.handlers):
        for namespaces in ({}, USERNS):
            name = f"closed-{handler or 'own'}-{'userns' if namespaces else 'plain'}"
            yield Pod(s, c, name, handler=handler, **({"namespace_options": namespaces} if namespaces else {})), namespaces


def closed(steps, s, c):
    made = []
    device = os.path.join(s.work, "cdi", "closed.json")
    with steps.step("containers of every kind leave programs that would make their user root, everything writable", fatal=True):
        os.makedirs(os.path.dirname(device), exist_ok=True)
        with open(device, "w") as f:
            json.dump({"cdiVersion": "0.6.0", "kind": "test.closed/one", "devices": [
                {"name": "a", "containerEdits": {"deviceNodes": [{"path": "/dev/null", "hostPath": "/dev/null"}]}}]}, f)
        for pod, namespaces in pods_of(s, c):
            container, _ = pod.run({"namespace_options": {"pid": 1, **namespaces}},
                                   CDI_devices=[{"name": "test.closed/one=a"}])
            pod.inside(container, LEAVE)
            made.append((pod, container, namespaces))
        upper = os.path.join(s.runtime.root, "containers", made[0][1], "upper")
        expect(stat.S_IMODE(os.stat(upper + "/left").st_mode) == 0o6777, "the program is not what it should be")
        expect(stat.S_IMODE(os.stat(upper).st_mode) == 0o755, "a container's / must let its users pass")
    with steps.step("a user of the node can neither list, read, write nor run any of it"):
        check(s, 200)
    with steps.step("inside, users who are not root pass and read"):
        for pod, container, namespaces in made:
            user, _ = pod.run({"namespace_options": {"pid": 1, **namespaces}, "run_as_user": {"value": 1234}})
            pod.inside(user, "id -u | grep -qx 1234 && cd / && ls / /etc > /dev/null && cat /etc/passwd > /dev/null && test -r /etc/hostname")
    with steps.step("what older versions left open is closed by the first start, with the pods running"):
        s.runtime.kill(signal.SIGKILL)
        loosen(s)
        total, found = reached(s)
        expect(any("run" in could for could in found.values()), f"it was not open: {total}")
        s.runtime.start()
        wait_for("an answer", lambda: c.run("version")[0] == 0, 20 * s.factor)
        check(s, 200)
        for pod, container, namespaces in made:
            pod.inside(container, "test -u /left && cmp /left /bin/busybox && cat /secret")
            pod.run({"namespace_options": {"pid": 1, **namespaces}})
        check(s, 200)
    for umask in (0, 0o777):
        with steps.step(f"the same when the daemon is started with umask {umask:03o}: what is a container's is as ever"):
            started_with(s, umask)
            source = os.path.join(s.work, f"source-{umask:o}")
            for pod, _, namespaces in made[:2]:
                config = {"mounts": [{"container_path": "/source", "host_path": source}]}
                user, _ = pod.run({"namespace_options": {"pid": 1, **namespaces}, "run_as_user": {"value": 1234}}, **config)
                pod.inside(user, "ls / /source /sys/fs/cgroup > /dev/null && cat /etc/hostname")
            expect(stat.S_IMODE(os.stat(source).st_mode) == 0o755, f"{os.stat(source).st_mode:o}")
            other = Pod(s, c, f"umask-{umask:o}")
            user, _ = other.run({"run_as_user": {"value": 1234}})
            other.inside(user, "cat /etc/resolv.conf /etc/hosts > /dev/null")
            check(s, 200)
            other.remove()
    started_with(s, 0o022)
    for pod, _, _ in made:
        pod.remove()
    os.remove(device)

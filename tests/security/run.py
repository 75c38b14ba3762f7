#!/usr/bin/env python3
"""What the kernel says of a container's rights: every security setting, read back.

    run.py [--runtime NAME] [--only PATTERN]

A container is started with each setting; then its first process is read on the host (/proc/PID/status,
mountinfo, ns, fd), and the same is read from inside by an exec, which must have the same rights. What is
refused is tried.
"""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import oci, options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402
from inside import DEFAULT, IMAGE, MASKED, READONLY, Pod, Status, mounts, readonly  # noqa: E402
import history  # noqa: E402
import hostile  # noqa: E402
import hunter  # noqa: E402
import identity  # noqa: E402
import profiles  # noqa: E402

def capabilities(steps, pod):
    def same(status, wanted, ambient=frozenset()):
        expect(status.caps["CapEff"] == wanted, f"CapEff {sorted(status.caps['CapEff'] ^ wanted)}")
        expect(status.caps["CapPrm"] == wanted, f"CapPrm {sorted(status.caps['CapPrm'] ^ wanted)}")
        for name in ("CapAmb", "CapInh"):
            expect(status.caps[name] == ambient, f"{name} {status.caps[name]}")

    with steps.step("capabilities: the default set, nothing inheritable or ambient"):
        status = pod.statuses({})
        same(status, DEFAULT)
        expect(status.caps["CapBnd"] == DEFAULT and not status.caps["CapInh"], str(status.caps))
    with steps.step("capabilities: add and drop, bounding set included"):
        wanted = DEFAULT - {"CHOWN", "MKNOD"} | {"NET_ADMIN"}
        status = pod.statuses({"capabilities": {"add_capabilities": ["NET_ADMIN"],
                                                "drop_capabilities": ["CAP_CHOWN", "mknod"]}})
        same(status, wanted)
        expect(status.caps["CapBnd"] == wanted, str(status.caps["CapBnd"] ^ wanted))
    with steps.step("capabilities: drop ALL leaves none, and one that is added"):
        status = pod.statuses({"capabilities": {"drop_capabilities": ["ALL"]}})
        expect(not any(status.caps.values()), str(status.caps))
        status = pod.statuses({"capabilities": {"drop_capabilities": ["ALL"], "add_capabilities": ["KILL"]}})
        same(status, {"KILL"})
        expect(status.caps["CapBnd"] == {"KILL"}, str(status.caps))
    with steps.step("capabilities: a user other than root has none in effect; ambient ones it has"):
        status = pod.statuses({"run_as_user": {"value": 1234}})
        same(status, set())
        expect(status.caps["CapBnd"] == DEFAULT, str(status.caps))
        status = pod.statuses({"run_as_user": {"value": 1234},
                               "capabilities": {"add_ambient_capabilities": ["NET_BIND_SERVICE"]}})
        same(status, {"NET_BIND_SERVICE"}, {"NET_BIND_SERVICE"})


def users(steps, pod):
    with steps.step("user, group and supplemental groups"):
        status = pod.statuses({"run_as_user": {"value": 1234}, "run_as_group": {"value": 2345},
                               "supplemental_groups": [3456, 4567]})
        expect(status.uid == ["1234"] * 4 and status.gid == ["2345"] * 4, f"{status.uid} {status.gid}")
        expect(set(status.groups) - {2345} == {3456, 4567}, str(status.groups))
    with steps.step("no_new_privs, in exec too; not unless asked for"):
        expect(pod.statuses({"no_new_privs": True}).no_new_privs == "1", "not set")
        expect(pod.statuses({}).no_new_privs == "0", "set")


def seccomp(steps, s, pod):
    unshare = "unshare -U true"
    with steps.step("seccomp: none, unless asked for"):
        container, pid = pod.run({})
        with open(f"/proc/{pid}/status") as f:
            expect(Status(f.read()).seccomp == "0", "filtered")
        code, said = pod.tried(container, unshare)
        free = code == 0  # some nodes have no user namespaces for containers
        if not free:
            print(f"      (unshare is refused without a filter, too: {said.strip()})")
    with steps.step("seccomp: RuntimeDefault filters, in exec too, and refuses a new user namespace"):
        default = {"seccomp": {"profile_type": 0}}
        expect(pod.statuses(default).seccomp == "2", "no filter")
        container, _ = pod.run(default)
        code, said = pod.tried(container, unshare)
        expect(code != 0 and "not permitted" in said, f"{code} {said}")
    with steps.step("seccomp: a Localhost profile refuses what it says, with its errno"):
        rules = [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]
        container, _ = pod.run(profiles.profile(s, "nomkdir.json", defaultAction="SCMP_ACT_ALLOW", syscalls=rules))
        code, said = pod.tried(container, "mkdir /tmp/new")
        expect(code != 0 and "No space left" in said, f"{code} {said}")
        pod.inside(container, "touch /tmp/new")
    with steps.step("seccomp: profiles that cannot be had are refused by name"):
        pod.refused(profiles.profile(s, "notify.json", defaultAction="SCMP_ACT_ALLOW",
                            syscalls=[{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]), "SCMP_ACT_NOTIFY")
        pod.refused(profiles.profile(s, "broken.json", defaultAction="SCMP_ACT_WHATEVER"), "broken.json")
        pod.refused({"seccomp": {"profile_type": 2, "localhost_ref": s.work + "/absent.json"}}, "absent.json")


def paths(steps, pod):
    with steps.step("masked paths are mounts of nothing, read-only"):
        container, pid = pod.run({"masked_paths": MASKED})
        found = mounts(pid)
        for path in MASKED:
            there = os.path.exists(f"/proc/{pid}/root{path}")
            expect((path in found) == there, f"{path}: mount {found.get(path)}, there: {there}")
            if there:
                expect(readonly(found[path]), f"{path}: {found[path]}")
                code, said = pod.tried(container, f"if [ -d {path} ]; then ls -A {path}; else cat {path}; fi")
                # AppArmor's profile refuses some besides. (crictl adds line ends.)
                refused = code != 0 and "denied" in said
                expect(refused or code == 0 and not said.strip(), f"{path} has {said[:100]!r}")
                code, _ = pod.tried(container, f"if [ -d {path} ]; then touch {path}/x; else echo x > {path}; fi")
                expect(code != 0, f"{path} is writable")
        expect(len(set(MASKED) & set(found)) >= 2, "hardly anything was there to be masked")
    with steps.step("read-only paths are read-only mounts of themselves"):
        container, pid = pod.run({"readonly_paths": READONLY})
        found = mounts(pid)
        for path in READONLY:
            there = os.path.exists(f"/proc/{pid}/root{path}")
            expect((path in found) == there, f"{path}: mount {found.get(path)}, there: {there}")
            expect(not there or ("ro" in found[path][0] and found[path][1] == "proc"), f"{path}: {found.get(path)}")
        code, said = pod.tried(container, "echo 1 > /proc/sys/kernel/domainname")
        expect(code != 0 and "Read-only" in said, f"{code} {said}")
    with steps.step("a read-only root; volumes and /dev/shm stay writable"):
        data = os.path.join(pod.s.work, "data")
        os.makedirs(data, exist_ok=True)
        container, pid = pod.run({"readonly_rootfs": True},
                                 mounts=[{"container_path": "/data", "host_path": data}])
        expect(readonly(mounts(pid)["/"]), str(mounts(pid)["/"]))
        code, said = pod.tried(container, "touch /new")
        expect(code != 0 and "Read-only" in said, f"{code} {said}")
        pod.inside(container, "touch /data/new /dev/shm/new")
    with steps.step("/sys and cgroups are read-only; nothing of the host's root is mounted"):
        _, pid = pod.run({})
        found = mounts(pid)
        expect(readonly(found["/sys"]), str(found["/sys"]))
        cgroups = [m for place, m in found.items() if place.startswith("/sys/fs/cgroup")]
        expect(cgroups and all(readonly(m) for m in cgroups), str(cgroups))
        allowed = re.compile(r"/(proc|sys|dev)(/.*)?$|/etc/(hosts|hostname|resolv\.conf)$|/$")
        other = [place for place in found if not allowed.match(place)]
        expect(not other, f"mounts {other}")
        expect(found["/"][1] == "overlay", str(found["/"]))


def isolation(steps, pod):
    container, pid = pod.run({})
    with steps.step("namespaces of its own, and no descriptor but the three"):
        for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
            own = os.readlink(f"/proc/{pid}/ns/{kind}")
            expect(own != os.readlink(f"/proc/self/ns/{kind}") or kind == "cgroup", f"{kind} is the host's")
        fds = sorted(os.listdir(f"/proc/{pid}/fd"))
        expect(fds == ["0", "1", "2"], str(fds))
        # That of the shell that lists is the directory itself.
        expect(len(pod.inside(container, "ls /proc/self/fd").split()) == 4, "an exec has more descriptors")
    with steps.step("/dev has no device of the host"):
        have = set(pod.inside(container, "ls /dev").split())
        allowed = {"core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
                   "tty", "urandom", "zero", "console"}
        expect(have <= allowed and {"null", "zero", "full", "random", "urandom", "tty"} <= have, str(have ^ allowed))


def privileged(steps, s, c):
    with steps.step("a privileged container in an unprivileged pod is refused"):
        plain = Pod(s, c, "plain")
        plain.refused({"privileged": True}, "privileged")
        c("rmp", "--force", plain.id)
    pod = Pod(s, c, "privileged", privileged=True)
    with steps.step("privileged: every capability, no filter, nothing masked or read-only"):
        with open("/proc/self/status") as f:
            everything = Status(f.read()).caps["CapBnd"]
        container, pid = pod.run({"privileged": True, "masked_paths": MASKED, "readonly_paths": READONLY,
                                  "seccomp": {"profile_type": 0}})
        with open(f"/proc/{pid}/status") as f:
            status = Status(f.read())
        expect(status.caps["CapEff"] == everything, str(status.caps["CapEff"] ^ everything))
        expect(status.seccomp == "0", "filtered")
        found = mounts(pid)
        expect(not readonly(found["/sys"]), str(found["/sys"]))
        expect(not [p for p in (*MASKED, *READONLY) if p in found], "masked or read-only")
        expect("/dev/null" in pod.inside(container, "ls /dev/null /dev/kmsg 2>&1"), "/dev")
    c("rmp", "--force", pod.id)


# Connects to a socket, sends the start of HTTP/2 and tells what comes back: the server's first frame, or nothing.
ASK = """import socket, sys
s = socket.socket(socket.AF_UNIX)
s.settimeout(20)
try:
    s.connect(sys.argv[1])
    s.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + bytes([4]) + bytes(5))
    print("answered" if s.recv(9) else "closed")
except PermissionError:
    print("no permission")
except ConnectionError:
    print("closed")
"""


def restarted(s, **extra):
    s.runtime.extra = extra
    s.runtime.kill(signal.SIGTERM)
    s.runtime.start()


def socket_of(steps, s):
    """Who may use the socket."""
    def ask(group, *more):
        done = subprocess.run([shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable, "-c", ASK, s.runtime.socket],
                              user=65534, group=group, extra_groups=more, stdout=subprocess.PIPE, check=True, cwd="/")
        return done.stdout.decode().strip()

    def owners():
        found = os.stat(s.runtime.socket)
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)

    try:
        with steps.step("the socket is root's alone; a group that it is given to may use it, too"):
            expect(owners() == (0, 0, 0o660), str(owners()))
            # Root's group passes the mode, not the daemon.
            expect((ask(65534), ask(0), ask(65534, 0)) == ("no permission", "closed", "closed"), f"{ask(65534)} {ask(0)}")
            restarted(s, socket_gid=4321)
            # It answers a moment before it has its group.
            wait_for("its group", lambda: owners() == (0, 4321, 0o660), 10 * s.factor)
            asked = [ask(65534), ask(4321), ask(65534, 7, 4321), ask(65534, 7)]
            expect(asked == ["no permission", "answered", "answered", "no permission"], str(asked))
    finally:
        restarted(s)


def defaults(steps, s, c):
    """What the configuration gives to containers that ask for nothing else."""
    profile = written(s.work, "no-mkdir.json", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]})
    made = "mkdir /tmp/made 2>/dev/null && echo made || echo refused"
    device = os.path.join(s.work, "device")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 7))

    try:
        with steps.step("defaults of the configuration: what is asked for counts more"):
            restarted(s, unset_seccomp_profile=profile, privileged_seccomp_profile="runtime/default",
                      default_capabilities=["CHOWN", "CAP_KILL"], default_sysctls=["net.core.somaxconn=77"],
                      default_ulimits=["nofile=55:66", "core=0"], default_env=["GIVEN=by-config", "KEPT=by-config"],
                      device_ownership_from_security_context=True)
            pod = Pod(s, c, "defaults", privileged=True)
            plain, pid = pod.run({}, envs=[{"key": "KEPT", "value": "by-pod"}])
            with open(f"/proc/{pid}/status") as f:
                status = Status(f.read())
            expect(status.caps["CapBnd"] == {"CHOWN", "KILL"} and status.seccomp == "2", f"{status.caps} {status.seccomp}")
            expect(pod.inside(plain, made).strip() == "refused", "mkdir")
            expect(pod.inside(plain, "echo $GIVEN $KEPT; ulimit -n; ulimit -Hn; ulimit -c").split()
                   == ["by-config", "by-pod", "55", "66", "0"], pod.inside(plain, "echo $GIVEN $KEPT; ulimit -a"))
            expect(pod.inside(plain, "cat /proc/sys/net/core/somaxconn").strip() == "77", "sysctl")
            asked, _ = pod.run({"seccomp": {"profile_type": 1}, "capabilities": {"add_capabilities": ["NET_ADMIN"]}})
            expect(pod.inside(asked, made).strip() == "made", "Unconfined")
            mighty, pid = pod.run({"privileged": True})
            with open(f"/proc/{pid}/status") as f:
                expect(Status(f.read()).seccomp == "2", "privileged")
            owned, _ = pod.run({"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}},
                               devices=[{"host_path": device, "container_path": "/dev/mine", "permissions": "rw"}])
            expect(pod.inside(owned, "stat -c %u:%g /dev/mine; head -c 1 /dev/mine | wc -c").split() == ["1000:2000", "1"], "device")
            c("rmp", "--force", pod.id)
        with steps.step("more open files than the kernel allows, and a profile that is gone: errors that name the key's value"):
            restarted(s, default_ulimits=["nofile=1:9999999999"], unset_seccomp_profile=os.path.join(s.work, "gone.json"))
            pod = Pod(s, c, "wrong")
            pod.refused({}, "gone.json")
            pod.refused({"seccomp": {"profile_type": 1}}, "default_ulimits", "fs.nr_open")
            c("rmp", "--force", pod.id)
    finally:
        restarted(s)


def isolated(steps, pod):
    with steps.step("isolation", fatal=False):
        isolation(steps, pod)


PARTS = {
    "capabilities": lambda steps, s, c, pod: capabilities(steps, pod),
    "users": lambda steps, s, c, pod: users(steps, pod),
    "seccomp": lambda steps, s, c, pod: seccomp(steps, s, pod),
    "paths": lambda steps, s, c, pod: paths(steps, pod),
    "isolation": lambda steps, s, c, pod: isolated(steps, pod),
    "privileged": lambda steps, s, c, pod: privileged(steps, s, c),
    "profiles": profiles.profiles,
    "refusers": profiles.refusers,
    "privileges": lambda steps, s, c, pod: profiles.privileged(steps, s, c),
    "hostile": hostile.hostile,
    "history": history.history,
    "identity": identity.identity,
    "hunter": lambda steps, s, c, pod: hunter.hunted(steps, s, c),
    "defaults": lambda steps, s, c, pod: defaults(steps, s, c),
    "socket": lambda steps, s, c, pod: socket_of(steps, s),
}
OF_BERTH = ("refusers", "hunter", "defaults", "socket")


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--only", default="", help="parts whose name matches: " + " ".join(PARTS))
    args = parser.parse_args()
    steps = Steps("security")
    if args.runtime == "berth":
        runtimes.Berth.handlers = oci.handlers(args.hide_hybrid)
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        with steps.step("a pod", fatal=True):
            c("pull", IMAGE)
            pod = Pod(s, c, "main")
        for name, part in PARTS.items():
            if re.search(args.only, name) and (args.runtime == "berth" or name not in OF_BERTH):
                with steps.part(name):
                    part(steps, s, c, pod)
        with steps.step("remove"):
            for one in c("pods", "-q").split():  # those of failed steps too
                c("rmp", "--force", one)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

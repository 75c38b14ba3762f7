#!/usr/bin/env python3
"""What the kernel says of a container's rights: every security setting, read back.

    run.py [--runtime NAME]

A container is started with each setting; then its first process is read on the host (/proc/PID/status,
mountinfo, ns, fd), and the same is read from inside by an exec, which must have the same rights. What is
refused is tried.
"""

import os
import re
import signal
import stat
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import options  # noqa: E402
from harness.report import Steps, expect  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
CAPS = {name: bit for bit, name in enumerate("""CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID
SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO
SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF
CHECKPOINT_RESTORE""".split())}
DEFAULT = {"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
           "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"}
SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
MASKED = ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware", "/proc/nowhere"]
READONLY = ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/nowhere"]
CONTAINER = 1  # NamespaceMode


def names(mask):
    return {name for name, bit in CAPS.items() if mask >> bit & 1}


def fields(text):
    return dict(line.split(":\t", 1) if ":\t" in line else (line.rstrip(":"), "") for line in text.splitlines())


class Status:
    """A /proc/PID/status."""

    def __init__(self, text):
        f = fields(text)
        self.caps = {s: names(int(f[s], 16)) for s in SETS}
        self.uid, self.gid = f["Uid"].split(), f["Gid"].split()
        self.groups = sorted(int(g) for g in f["Groups"].split())
        self.no_new_privs, self.seccomp = f["NoNewPrivs"], f["Seccomp"]

    def __eq__(self, other):
        return vars(self) == vars(other)


class Pod:
    def __init__(self, s, c, name, **security):
        self.s, self.c, self.number = s, c, 0
        self.config = written(s.work, name + "-pod.json", {
            "metadata": {"name": name, "namespace": "security", "attempt": 0, "uid": "uid-" + name},
            "log_directory": s.work, "linux": {"security_context": security}})
        self.id = c.id("runp", self.config)
        s.runtime.ids.add(self.id)

    def config_of(self, security, **config):
        self.number += 1
        name = f"c{self.number}"
        security = {"namespace_options": {"pid": CONTAINER}, **security}
        return written(self.s.work, f"{self.id[:8]}-{name}.json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log", "linux": {"security_context": security}, **config})

    def run(self, security, **config):
        """A running container: (id, pid of its first process on the host)."""
        container = self.c.id("create", self.id, self.config_of(security, **config), self.config)
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container, self.c.json("inspect", container)["info"]["pid"]

    def refused(self, security, *words):
        path = self.config_of(security)
        code, out, error = self.c.run("create", self.id, path, self.config)
        if code == 0:
            self.s.runtime.ids.add(out.strip())
            error = self.c.fails("start", out.strip())
        for word in words:
            expect(word in error, f"{word!r} is not in {error!r}")

    def inside(self, container, script):
        return self.c("exec", "--sync", container, "sh", "-c", script)

    def tried(self, container, script):
        """Exit code and what was said by a script that may fail."""
        code, out, error = self.c.run("exec", "--sync", container, "sh", "-c", script)
        return code, out + error

    def statuses(self, security, **config):
        """Of the first process, by the host; it must be that of an exec, read inside."""
        container, pid = self.run(security, **config)
        with open(f"/proc/{pid}/status") as f:
            first = Status(f.read())
        execed = Status(self.inside(container, "cat /proc/self/status"))
        expect(first == execed, f"an exec has other rights: {vars(execed)}, not {vars(first)}")
        return first


def mounts(pid):
    """Of a process: {place: (options, kind of filesystem, options of it)}, the topmost where several are."""
    with open(f"/proc/{pid}/mountinfo") as f:
        rows = [line.split(" - ") for line in f]
    return {left.split()[4]: (left.split()[5].split(","), right.split()[0], right.split()[2].split(","))
            for left, right in rows}


def readonly(mount):
    return "ro" in mount[0] or "ro" in mount[2]


def capabilities(steps, pod):
    def same(status, wanted, ambient=frozenset()):
        expect(status.caps["CapEff"] == wanted, f"CapEff {sorted(status.caps['CapEff'] ^ wanted)}")
        expect(status.caps["CapPrm"] == wanted, f"CapPrm {sorted(status.caps['CapPrm'] ^ wanted)}")
        expect(status.caps["CapAmb"] == ambient, f"CapAmb {status.caps['CapAmb']}")

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


def profile(s, name, **content):
    return {"seccomp": {"profile_type": 2, "localhost_ref": written(s.work, name, content)}}


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
        container, _ = pod.run(profile(s, "nomkdir.json", defaultAction="SCMP_ACT_ALLOW", syscalls=rules))
        code, said = pod.tried(container, "mkdir /tmp/new")
        expect(code != 0 and "No space left" in said, f"{code} {said}")
        pod.inside(container, "touch /tmp/new")
    with steps.step("seccomp: profiles that cannot be had are refused by name"):
        pod.refused(profile(s, "notify.json", defaultAction="SCMP_ACT_ALLOW",
                            syscalls=[{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]), "SCMP_ACT_NOTIFY")
        pod.refused(profile(s, "broken.json", defaultAction="SCMP_ACT_WHATEVER"), "broken.json")
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
    for one in (plain, pod):
        c("rmp", "--force", one.id)


def defaults(steps, s, c):
    """What the configuration gives to containers that ask for nothing else."""
    profile = written(s.work, "no-mkdir.json", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]})
    made = "mkdir /tmp/made 2>/dev/null && echo made || echo refused"
    device = os.path.join(s.work, "device")
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 7))

    def restarted(**extra):
        s.runtime.extra = extra
        s.runtime.kill(signal.SIGTERM)
        s.runtime.start()

    try:
        with steps.step("defaults of the configuration: what is asked for counts more"):
            restarted(unset_seccomp_profile=profile, privileged_seccomp_profile="runtime/default",
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
            restarted(default_ulimits=["nofile=1:9999999999"], unset_seccomp_profile=os.path.join(s.work, "gone.json"))
            pod = Pod(s, c, "wrong")
            pod.refused({}, "gone.json")
            pod.refused({"seccomp": {"profile_type": 1}}, "default_ulimits", "fs.nr_open")
            c("rmp", "--force", pod.id)
    finally:
        restarted()


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps("security")
    with options.session(args, steps) as s:
        c = Crictl(s.endpoint, s.factor)
        with steps.step("a pod", fatal=True):
            c("pull", IMAGE)
            pod = Pod(s, c, "main")
        capabilities(steps, pod)
        users(steps, pod)
        seccomp(steps, s, pod)
        paths(steps, pod)
        with steps.step("isolation", fatal=False):
            isolation(steps, pod)
        privileged(steps, s, c)
        if args.runtime == "berth":
            defaults(steps, s, c)
        with steps.step("remove"):
            c("rmp", "--force", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

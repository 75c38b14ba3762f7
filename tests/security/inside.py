"""A container's rights as the kernel tells them: read on the node of its first process, and inside by an exec."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness.report import expect  # noqa: E402
from walkthrough import written  # noqa: E402

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
POD, CONTAINER, TARGET = 0, 1, 3  # NamespaceMode


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
    """A pod; `handler` is that of its runtime, `linux` goes into its configuration."""

    def __init__(self, s, c, name, handler="", linux=None, **security):
        self.s, self.c, self.number = s, c, 0
        self.config = written(s.work, name + "-pod.json", {
            "metadata": {"name": name, "namespace": "security", "attempt": 0, "uid": "uid-" + name},
            "log_directory": s.work, "linux": {"security_context": security, **(linux or {})}})
        self.id = c.id("runp", *(["-r", handler] if handler else []), self.config)
        s.runtime.ids.add(self.id)

    def config_of(self, security, **config):
        self.number += 1
        name = f"c{self.number}"
        security = {"namespace_options": {"pid": CONTAINER}, **security}
        return written(self.s.work, f"{self.id[:8]}-{name}.json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sleep", "3600"],
            "log_path": name + ".log", "linux": {"security_context": security}, **config})

    def pause(self):
        """The pid of its pause process on the node."""
        return self.c.json("inspectp", self.id)["info"]["pid"]

    def remove(self):
        self.c("rmp", "--force", self.id)

    def run(self, security, **config):
        """A running container: (id, pid of its first process on the host)."""
        container = self.c.id("create", self.id, self.config_of(security, **config), self.config)
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container, self.c.json("inspect", container)["info"]["pid"]

    def refused(self, security, *words, **config):
        path = self.config_of(security, **config)
        code, out, error = self.c.run("create", self.id, path, self.config)
        if code == 0:
            self.s.runtime.ids.add(out.strip())
            error = self.c.fails("start", out.strip())
        for word in words:
            expect(word in error, f"{word!r} is not in {error!r}")
        return error

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

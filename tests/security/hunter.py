"""A container that hunts: whatever the runtime brings into its PID namespace is stopped, killed, traced and looked through
(tests/images/src/hunter.c). It must find nothing of the node, and whom it catches must fail at once, alone."""

import os
import subprocess
import time

from harness.report import Failure, expect, wait_for
from inside import CONTAINER, IMAGE, POD, TARGET, Pod

HUNTER = "registry.k8s.io/security/hunter:1"
SECRET = "/hunted-secret"
# In the environment and the output of another container of the pod: its monitor has had both in its hands.
CANARY = "CANARY-of-another-container-4711"
WAYS = ("watch", "stop", "kill", "trace")
SYS_PTRACE = {"capabilities": {"add_capabilities": ["SYS_PTRACE"]}, "seccomp": {"profile_type": 0}}
PLAIN = {"seccomp": {"profile_type": 0}}
UNPRIVILEGED = {"seccomp": {"profile_type": 0}, "no_new_privs": True}
# A process that is caught fails within the time that an answer takes anyhow, never by a time limit.
PATIENCE = 20


class Hunt:
    """A running hunter in a pod and what it reports; `options`: its namespaces."""

    def __init__(self, s, pod, way, security, options):
        self.s, self.pod = s, pod
        self.directory = os.path.join(s.work, f"hunt-{pod.id[:8]}-{pod.number}")
        os.makedirs(self.directory)
        os.chmod(self.directory, 0o777)
        self.id, _ = pod.run({**security, "namespace_options": options}, image={"image": HUNTER}, command=["/hunter"],
                             args=["/hunt", way, s.work + SECRET, str(os.stat("/dev/null").st_dev) if "userns_options" not in options else "0",
                                   CANARY, s.work],
                             mounts=[{"container_path": "/hunt", "host_path": self.directory}])
        wait_for("the hunter", lambda: os.path.exists(self.directory + "/ready"), 20 * s.factor)

    def end(self):
        """Ends it: (processes caught, of those before their program, what it found)."""
        open(self.directory + "/stop", "w").close()
        wait_for("its end", lambda: os.path.exists(self.directory + "/count"), 30 * self.s.factor)
        with open(self.directory + "/count") as f:
            count, early = map(int, f.read().split())
        with open(self.directory + "/found") as f:
            return count, early, f.read().splitlines()


def bystander(pod, options):
    """Another container of the pod, whose words and variables the monitor knows."""
    return pod.run({"namespace_options": {"pid": CONTAINER, **options}}, envs=[{"key": "CANARY", "value": CANARY}],
                   command=["sh", "-c", f"while true; do echo {CANARY}; sleep 0.2; done"])[0]


def execs(s, pod, hunt, count):
    """Execs into the hunter's container: how many failed, each with its reason at once."""
    failed, said = 0, ""
    for _ in range(count):
        began = time.monotonic()
        try:
            code, out, error = pod.c.run("exec", "--sync", hunt.id, "true")
        except subprocess.TimeoutExpired as late:
            raise Failure(f"an exec never ended: {late.timeout} s") from late
        took = time.monotonic() - began
        expect(took < PATIENCE * s.factor, f"an exec took {took:.1f} s: {out} {error}")
        if code:
            expect("process" in error or "exit" in error or "137" in error, f"{code} {error}")
            failed, said = failed + 1, error.strip()
    if failed:
        print(f"      {said[-300:]}")
    return failed


def report(found, count, early, failed):
    expect(not found, f"{len(found)} finds: " + "; ".join(sorted(set(found))[:6]))
    print(f"      caught {count}, {early} of them before their program; {failed} calls failed")


def during_execs(steps, s, pod, title, rights, options, number):
    """Hunters in a PID namespace of their own, each way, under execs into them."""
    other = bystander(pod, options)
    for way in WAYS:
        with steps.step(f"hunter {title}, {way}: {number} execs show it nothing of the node"):
            hunt = Hunt(s, pod, way, rights, {**options, "pid": CONTAINER})
            try:
                failed = execs(s, pod, hunt, number)
                pod.inside(other, "true")
            finally:
                count, early, found = hunt.end()
                pod.c("rm", "--force", hunt.id)
            report(found, count, early, failed)
            # Those that it does not catch were too fast for it.
            expect(count > 0, "it saw no process")
    pod.c("rm", "--force", other)


def during_creates(steps, s, pod, title, options, number):
    """Hunters in the PID namespace of the pod, and targets of other containers."""
    other = bystander(pod, options)
    for place in ("pod", "target"):
        for way in WAYS:
            with steps.step(f"hunter where the {place} lives{title}, {way}: {number} creates show it nothing of the node"):
                hunt = Hunt(s, pod, way, SYS_PTRACE, {**options, "pid": POD if place == "pod" else CONTAINER})
                theirs = {"pid": POD} if place == "pod" else {"pid": TARGET, "target_id": hunt.id}
                try:
                    failed = sum(not made(s, pod, {**options, **theirs}) for _ in range(number))
                    pod.inside(other, "true")
                finally:
                    count, early, found = hunt.end()
                    pod.c("rm", "--force", hunt.id)
                report(found, count, early, failed)
                expect(count > 0, "it saw no process")
    pod.c("rm", "--force", other)


def made(s, pod, options):
    """A container in a shared PID namespace, made, started, looked at and removed: whether it was not caught."""
    path = pod.config_of({"namespace_options": options}, command=["sleep", "3600"])
    began = time.monotonic()
    code, out, error = pod.c.run("create", pod.id, path, pod.config)
    if code == 0:
        container = out.strip()
        s.runtime.ids.add(container)
        code, _, error = pod.c.run("start", container)
        if code == 0:
            code, out, _ = pod.c.run("exec", "--sync", container, "sh", "-c", "cat /proc/self/comm")
        pod.c("rm", "--force", container)
    took = time.monotonic() - began
    expect(took < 2 * PATIENCE * s.factor, f"it took {took:.1f} s: {error}")
    return code == 0


def hunted(steps, s, c):
    """Every way of hunting, in all 256 execs and 64 creates; in an emulated node a quarter of that."""
    number = 16 if s.factor < 3 else 4
    with open(s.work + SECRET, "w") as f:
        f.write("of the node\n")
    os.chmod(s.work + SECRET, 0o600)
    with steps.step("the hunter's image"):
        c("pull", HUNTER)
        c("pull", IMAGE)
    creates = max(3, number // 4)
    pod = Pod(s, c, "hunted", namespace_options={"pid": POD})
    try:
        for title, rights in (("with SYS_PTRACE", SYS_PTRACE), ("without a capability of note", PLAIN),
                              ("with no_new_privs", UNPRIVILEGED)):
            during_execs(steps, s, pod, title, rights, {}, number)
        during_creates(steps, s, pod, "", {}, creates)
    finally:
        pod.remove()
    ids = [{"host_id": 1000000, "container_id": 0, "length": 65536}]
    user = {"userns_options": {"mode": 0, "uids": ids, "gids": ids}}
    pod = Pod(s, c, "hunted-user", namespace_options={**user, "pid": POD})
    try:
        during_execs(steps, s, pod, "in a user namespace", SYS_PTRACE, user, number)
        during_creates(steps, s, pod, " (user namespace)", user, creates)
    finally:
        pod.remove()
    nulls(steps, s, c)


def nulls(steps, s, c):
    """Standard streams without anybody at the other end."""
    with steps.step("the mode and owner of the node's /dev/null are out of reach: a container's stdin is its own"):
        before = os.stat("/dev/null")
        pod = Pod(s, c, "nulls")
        try:
            container, _ = pod.run({})
            seen = pod.inside(container, "stat -Lc %d:%i /proc/self/fd/0 /dev/null; chmod 600 /proc/self/fd/0 2>&1; "
                              "chown 1:1 /dev/fd/0 2>&1; true")
            plain, _ = pod.run({}, command=["sh", "-c", "chmod 640 /proc/self/fd/0; chown 2:2 /proc/self/fd/0; sleep 3600"])
            first, second = seen.split()[:2]
            expect(first == second, f"stdin is {first}, the container's /dev/null {second}")
            wait_for("the other tried", lambda: "sleep" in pod.inside(plain, "ps"), 10 * s.factor)
        finally:
            pod.remove()
            after = os.stat("/dev/null")
            os.chmod("/dev/null", before.st_mode & 0o7777)
            os.chown("/dev/null", before.st_uid, before.st_gid)
        same = (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)
        expect(same, f"the node's /dev/null is {after.st_mode:o} {after.st_uid}:{after.st_gid} now")

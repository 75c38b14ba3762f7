"""What confines a process beside its user: seccomp, AppArmor, namespaces, limits; and what a privileged one has."""

import contextlib
import errno
import os
import signal
import stat
import subprocess

from harness.report import expect, wait_for
from inside import Pod
from walkthrough import written

REFUSED = "registry.k8s.io/security/refused:1"
# What RuntimeDefault answers, by the prober's names: what is in none of them is allowed.
NOT_PERMITTED = {"AF_ALG", "AF_ALG+2^32", "AF_VSOCK", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl",
                 "add_key", "request_key", "clone NEWUSER", "unshare", "setns", "userfaultfd", "quotactl", "personality"}
NOT_THERE = {"clone3"}
NEEDED = """execve brk arch_prctl mmap munmap mprotect close read write writev lseek fstat newfstatat openat ioctl pause rt_sigaction
rt_sigprocmask rt_sigreturn set_tid_address set_robust_list rseq prlimit64 getrandom readlink readlinkat futex exit exit_group
getpid kill nanosleep clock_nanosleep restart_syscall prctl capset capget seccomp sigaltstack uname access faccessat
faccessat2""".split()
NODE, TARGET = 2, 3  # NamespaceMode
APPARMOR = "/sys/kernel/security/apparmor/profiles"


def profile(s, name, **content):
    return {"seccomp": {"profile_type": 2, "localhost_ref": written(s.work, name, content)}}


def probed(pod, security):
    """{name: number of the error} of the prober in a container of its own."""
    container, _ = pod.run(security, image={"image": REFUSED}, command=["/refused", "wait"])
    lines = pod.c("exec", "--sync", container, "/refused").replace("\r", "").strip().split("\n")
    return {name: int(number) for name, number in (line.rsplit(" ", 1) for line in lines)}


def refusals(steps, s, pod):
    with steps.step("seccomp: RuntimeDefault refuses what containers have no use for, and nothing else", fatal=True):
        free, found = probed(pod, {}), probed(pod, {"seccomp": {"profile_type": 0}})
        for name, number in found.items():
            wanted = errno.EPERM if name in NOT_PERMITTED else errno.ENOSYS if name in NOT_THERE else free[name]
            expect(number == wanted, f"{name}: {errno.errorcode.get(number)}, without a filter {errno.errorcode.get(free[name])}")
        expect(NOT_PERMITTED | NOT_THERE <= set(found), str(found))
        # Else it would prove nothing: most of these the kernel itself answers in another way.
        other = [name for name in NOT_PERMITTED | NOT_THERE if free[name] != found[name]]
        expect(len(other) >= 12, f"only {other} are answered in another way without a filter: {free}")
    with steps.step("seccomp: the deprecated seccomp_profile_path, where the newer field is not given"):
        old = probed(pod, {"seccomp_profile_path": "runtime/default"})
        expect(old["keyctl"] == errno.EPERM, str(old))
        path = written(s.work, "old.json", {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSPC}]})
        old = probed(pod, {"seccomp_profile_path": "localhost/" + path})
        expect((old["mkdir"], old["keyctl"]) == (errno.ENOSPC, free["keyctl"]), str(old))
        old = probed(pod, {"seccomp_profile_path": "unconfined"})
        expect(old["keyctl"] == free["keyctl"], str(old))
        old = probed(pod, {"seccomp_profile_path": "unconfined", "seccomp": {"profile_type": 0}})
        expect(old["keyctl"] == errno.EPERM, "the newer field does not count more")
        pod.refused({"seccomp_profile_path": "whatever"}, "seccomp")


def actions(steps, s, pod):
    rule = lambda action, *names, **more: {"names": list(names), "action": action, **more}  # noqa: E731

    def run(name, *rules, default="SCMP_ACT_ALLOW"):
        """The prober's words, up to where it was ended, and its exit code."""
        container, _ = pod.run(profile(pod.s, name, defaultAction=default, syscalls=list(rules)),
                               image={"image": REFUSED}, command=["/refused", "wait"])
        if default != "SCMP_ACT_ALLOW":
            return pod.c("exec", "--sync", container, "/refused").replace("\r", ""), 0
        out = pod.inside(container, "/refused > /tmp/out 2>&1; echo $?; cat /tmp/out").replace("\r", "")
        code, _, said = out.partition("\n")
        return said, int(code)

    for action in ("SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP"):
        with steps.step(f"seccomp: {action} ends the process that makes the call, at the call"):
            out, code = run(action.lower() + ".json", rule(action, "userfaultfd"))
            expect("setns" in out and "userfaultfd" not in out and code == 128 + signal.SIGSYS, f"{code}: {out}")
    with steps.step("seccomp: SCMP_ACT_LOG lets the call through"):
        out, code = run("log.json", rule("SCMP_ACT_LOG", "userfaultfd", "mkdir"))
        expect(code == 0 and "mkdir 0" in out, f"{code}: {out}")
    with steps.step("seccomp: a filter of arguments looks at them"):
        out, code = run("args.json", rule("SCMP_ACT_ERRNO", "kill", errnoRet=errno.ENOSPC,
                                             args=[{"index": 1, "value": 18, "op": "SCMP_CMP_EQ"}]))
        expect(f"kill CONT {errno.ENOSPC}" in out and "kill 0 0" in out, f"{code}: {out}")
    with steps.step("seccomp: a list of what is allowed, with everything else refused"):
        out, code = run("allow.json", rule("SCMP_ACT_ALLOW", *NEEDED), default="SCMP_ACT_ERRNO")
        expect(f"mkdir {errno.EPERM}" in out and f"AF_UNIX {errno.EPERM}" in out and "kill 0 0" in out, f"{code}: {out}")


def refusers(steps, s, c, pod):
    """Profiles that refuse what starts a program, and then also what would tell it."""
    start = ("execve", "execveat", "capset", "prctl")
    allow = lambda default, *names: {"defaultAction": default,  # noqa: E731
                                     "syscalls": [{"names": list(names), "action": "SCMP_ACT_ALLOW"}] if names else []}
    refuse = lambda action, *names: {"defaultAction": "SCMP_ACT_ALLOW",  # noqa: E731
                                     "syscalls": [{"names": list(names), "action": action}]}
    true, none = ["/bin/true"], ["/bin/none"]
    cases = [("everything", allow("SCMP_ACT_" + action), true, "execve(2)")
             for action in ("ERRNO", "KILL", "KILL_PROCESS", "TRAP", "TRACE")]
    cases += [("all but the start", allow("SCMP_ACT_ERRNO", *start), none, "sendmsg(2), and exit_group(2)"),
              ("all but the start", allow("SCMP_ACT_KILL", *start), none, "SIGSYS"),
              ("what tells", refuse("SCMP_ACT_ERRNO", "sendmsg"), none, "sendmsg(2): no such file"),
              ("what ends", refuse("SCMP_ACT_ERRNO", "exit", "exit_group"), none, "/bin/none")]

    def gone(pid):
        wait_for("its end", lambda: not os.path.exists(f"/proc/{pid}"), 10 * s.factor)

    with steps.step("seccomp: whatever a profile refuses, StartContainer says why, and no process is left"):
        for number, (what, content, command, reason) in enumerate(cases):
            for no_new_privs in (True, False):
                security = {**profile(s, f"refuser{number}.json", **content), "no_new_privs": no_new_privs}
                path = pod.config_of(security, command=command)
                container = c.id("create", pod.id, path, pod.config)
                s.runtime.ids.add(container)
                pid = c.json("inspect", container)["info"]["pid"]
                error = c.fails("start", container)
                shown = f"{what} {content['defaultAction']}, no_new_privs {no_new_privs}: {error}"
                expect(reason.lower() in error.lower() and "seccomp" in error or reason == "/bin/none" in error, shown)
                gone(pid)
                status = c.json("inspect", container)["status"]
                expect((status["state"], status["reason"]) == ("CONTAINER_EXITED", "StartError"), str(status))
                c("rm", container)
    with steps.step("... and an exec, whose container goes on"):
        content = refuse("SCMP_ACT_ERRNO", "sendmsg", "exit", "exit_group")
        container, _ = pod.run(profile(s, "mute.json", **content))
        code, said = c.run("exec", "--sync", container, "/bin/none")[::2]
        # What is born has no voice that a profile could take.
        expect(code != 0 and '"/bin/none\\": No such file' in said, f"{code}: {said}")
        expect(c.json("inspect", container)["status"]["state"] == "CONTAINER_RUNNING", "it has ended")
        c("rm", "--force", container)
    with steps.step("... and RunPodSandbox"):
        for number, (action, call) in enumerate((("ERRNO", "execveat"), ("KILL", "execveat"), ("TRACE", "execveat"),
                                                 ("ERRNO", "rt_sigtimedwait"))):
            content = allow("SCMP_ACT_" + action) if call == "execveat" else refuse("SCMP_ACT_" + action, call)
            path = written(s.work, f"refused-pod{number}.json", {
                "metadata": {"name": f"refused{number}", "namespace": "security", "attempt": 0, "uid": f"uid-refused{number}"},
                "log_directory": s.work,
                "linux": {"security_context": profile(s, f"refused{number}.json", **content)}})
            error = c.fails("runp", path)
            expect("seccomp" in error and call + "(2)" in error, f"{action} {call}: {error}")
        left = [one for one in c.json("pods", "-o", "json")["items"] if one["metadata"]["name"].startswith("refused")]
        expect(not left, str(left))


def program(command, text):
    subprocess.run(command, input=text.encode(), check=True)


def become(profile_name):
    """The next exec of this process has the AppArmor profile."""
    with open("/proc/self/attr/exec", "w") as f:
        f.write("exec " + profile_name)


def apparmor(steps, s, c, pod):
    if not os.path.exists(APPARMOR):
        with steps.step("AppArmor: a profile by name is refused where the kernel has none"):
            pod.refused({"apparmor": {"profile_type": 2, "localhost_ref": "berth-default"}}, "AppArmor")
        return
    current = "cat /proc/1/attr/current; cat /proc/self/attr/current"

    def labels(where, security):
        container, pid = where.run(security)
        with open(f"/proc/{pid}/attr/current") as f:
            outside = f.read().strip("\0\n")
        first, own = where.inside(container, current).replace("\r", "").replace("\0", "").strip().split("\n")
        expect(outside == first == own, f"on the node {outside}, inside {first}, of an exec {own}")
        return first

    default = "berth-default (enforce)" if s.runtime.name == "berth" else None
    with steps.step("AppArmor: the default where none is named, and by name; in exec too"):
        for security in ({}, {"apparmor": {"profile_type": 0}}, {"apparmor_profile": "runtime/default"}):
            found = labels(pod, security)
            expect(default is None or found == default, f"{security}: {found}")
    with steps.step("AppArmor: the sandbox process too"):
        with open(f"/proc/{pod.pause()}/attr/current") as f:
            found = f.read().strip("\0\n")
        expect(default is None or found == default, found)
    with steps.step("AppArmor: unconfined"):
        for security in ({"apparmor": {"profile_type": 1}}, {"apparmor_profile": "unconfined"}):
            expect(labels(pod, security) == "unconfined", str(security))
    with steps.step("AppArmor: not for privileged containers"):
        mighty = Pod(s, c, "apparmor", privileged=True)
        expect(labels(mighty, {"privileged": True}) == "unconfined", "confined")
        mighty.remove()
    with steps.step("AppArmor: a profile of the node's, and one that is not loaded"):
        text = "profile berth-test-own flags=(attach_disconnected) { file, network, capability, deny /tmp/no w, }\n"
        program(["apparmor_parser", "--replace"], text)
        try:
            security = {"apparmor": {"profile_type": 2, "localhost_ref": "berth-test-own"}}
            expect(labels(pod, security) == "berth-test-own (enforce)", "another profile")
            container, _ = pod.run(security)
            code, said = pod.tried(container, "touch /tmp/yes; touch /tmp/no")
            expect(code != 0 and "/tmp/no" in said, f"{code} {said}")
            c("rm", "--force", container)
        finally:
            program(["apparmor_parser", "--remove"], text)
        pod.refused({"apparmor": {"profile_type": 2, "localhost_ref": "berth-test-none"}}, "berth-test-none", "not loaded")
    with steps.step("AppArmor: a container that has covered its /proc changes nothing of its execs' label (CVE-2025-52881)"):
        text = "profile berth-test-own flags=(attach_disconnected) { file, network, capability, mount, umount, }\n"
        program(["apparmor_parser", "--replace"], text)
        try:
            security = {"apparmor": {"profile_type": 2, "localhost_ref": "berth-test-own"},
                        "capabilities": {"add_capabilities": ["SYS_ADMIN"]}}
            container, _ = pod.run(security)
            pod.inside(container, "mount -t tmpfs none /proc && mkdir -p /proc/self/attr/apparmor /proc/thread-self/attr &&"
                                  " for f in exec current apparmor/exec; do echo as it was > /proc/self/attr/$f; done")
            said = pod.inside(container, "cat /proc/self/attr/exec /proc/self/attr/apparmor/exec; umount /proc; cat /proc/self/attr/current")
            expect(said.replace("\r", "").strip("\0\n").split("\n") == ["as it was", "as it was", "berth-test-own (enforce)"], said)
            c("rm", "--force", container)
        finally:
            program(["apparmor_parser", "--remove"], text)
    with steps.step("AppArmor: runc and crun send signals to containers where they have profiles of their own"):
        _, pid = pod.run({})
        for name, sent in (("runc", True), ("crun", True), ("berth-test-stranger", False)):
            program(["apparmor_parser", "--replace"], f"profile {name} {{ file, signal, capability, }}\n")
            try:
                done = subprocess.run(["kill", "-CONT", str(pid)], stderr=subprocess.PIPE, check=False,
                                      preexec_fn=lambda name=name: become(name))
                expect((done.returncode == 0) == sent, f"{name}: {done.returncode} {done.stderr}")
            finally:
                program(["apparmor_parser", "--remove"], f"profile {name} {{ file, signal, capability, }}\n")
    with steps.step("AppArmor: a container is ended by its runtime and by the node"):
        container, pid = pod.run({})
        c("stop", "-t", "1", container)
        expect(not os.path.exists(f"/proc/{pid}"), "it lives")


def targets(steps, s, c, pod):
    """NamespaceMode TARGET: the PID namespace of another container."""
    target, pid = pod.run({})
    into = lambda name: {"namespace_options": {"pid": TARGET, "target_id": name}}  # noqa: E731
    with steps.step("pid TARGET: the processes of that container, in the same namespace"):
        container, own = pod.run(into(target))
        expect(os.readlink(f"/proc/{own}/ns/pid") == os.readlink(f"/proc/{pid}/ns/pid"), "another namespace")
        expect("sleep 3600" in pod.inside(container, "tr '\\0' ' ' < /proc/1/cmdline"), "not its /proc")
        expect(len(pod.inside(container, "grep -l '^Name:.sleep' /proc/[0-9]*/status").split()) == 2, "not both processes")
    with steps.step("pid TARGET: of no, an unknown, an ended container, and one of another pod: refused"):
        pod.refused(into(""), "target_id")
        pod.refused(into("0" * 64), "target_id")
        other = Pod(s, c, "other")
        stranger, _ = other.run({})
        pod.refused(into(stranger), "target_id")
        other.remove()
        c("stop", "-t", "0", target)
        pod.refused(into(target), "target_id")


def privileged(steps, s, c):
    pod = Pod(s, c, "mighty", privileged=True)
    with steps.step("privileged: ambient capabilities that are asked for, for a user other than root"):
        asked = {"capabilities": {"add_ambient_capabilities": ["NET_BIND_SERVICE", "CAP_CHOWN"]}}
        status = pod.statuses({"privileged": True, "run_as_user": {"value": 1234}, **asked})
        for name in ("CapAmb", "CapInh", "CapEff", "CapPrm"):
            expect(status.caps[name] == {"NET_BIND_SERVICE", "CHOWN"}, f"{name} {status.caps[name]}")
        status = pod.statuses({"privileged": True})
        expect(not status.caps["CapAmb"] and not status.caps["CapInh"], str(status.caps))
        pod.refused({"privileged": True, "capabilities": {"add_ambient_capabilities": ["SYS_MAGIC"]}}, "SYS_MAGIC")
    with steps.step("privileged: no filesystem of the node changes by what containers mount"):
        unchanged(s, c)
    with steps.step("privileged: devices of the node are opened, its own cgroup is written to"):
        container, pid = pod.run({"privileged": True})
        with open(f"/proc/{pid}/cgroup") as f:
            old = "0::" not in f.read().split("\n", 1)[0]
        where = "/sys/fs/cgroup/pids" if old and os.path.isdir("/sys/fs/cgroup/pids") else "/sys/fs/cgroup"
        pod.inside(container, f"mkdir {where}/made && rmdir {where}/made")
        found = block_device()
        if found is None:
            print("      (this machine has no block device that opens for reading and writing)")
        else:
            name, number = found
            pod.inside(container, f"test -b /dev/{name} && : <> /dev/{name}")
            plain, _ = pod.run({})
            major, minor = os.major(number), os.minor(number)
            code, said = pod.tried(plain, f"test -e /dev/{name} || {{ mknod /tmp/b b {major} {minor}; test -b /tmp/b && : <> /tmp/b; }}")
            expect(code != 0 and "not permitted" in said, f"a container that is not privileged opens it: {said}")
    pod.remove()


def filesystems():
    """The node's mounts with the options of each and of its filesystem, and who has their tops."""
    with open("/proc/self/mountinfo") as f:
        rows = {line.split()[0]: line.strip() for line in f}
    tops = {}
    for place in ("/proc", "/sys", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"):
        with contextlib.suppress(FileNotFoundError):
            at = os.lstat(place)
            label = None
            with contextlib.suppress(OSError):
                label = os.getxattr(place, "security.selinux")
            tops[place] = (at.st_mode, at.st_uid, at.st_gid, at.st_dev, label)
    return rows, tops


def unchanged(s, c):
    """Privileged containers in all namespaces of the node, by each runtime, leave its filesystems as they were."""
    node = {"network": NODE, "pid": NODE, "ipc": NODE}
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        # As systemd mounts it; a runtime that has mounted it meanwhile may have changed that.
        subprocess.run(["mount", "-o", "remount,nsdelegate,memory_recursiveprot", "/sys/fs/cgroup"], check=True)
    for handler in ["", *sorted(s.runtime.handlers)]:
        for name, options in (("own", {"pid": 1}), ("node", node)):
            before, tops = filesystems()
            pod = Pod(s, c, f"unchanged-{name}-{handler}", handler=handler, privileged=True, namespace_options=options)
            container, pid = pod.run({"privileged": True, "namespace_options": options})
            with open(f"/proc/{pid}/mountinfo") as f:
                seen = [line for line in f if " - cgroup" in line]
            expect(seen and all(" shared:" not in line for line in seen), f"{handler} {name}: {seen}")
            after, tops_after = filesystems()
            changed = [(line, after.get(number)) for number, line in before.items() if after.get(number) != line]
            expect(not changed and tops == tops_after, f"{handler} {name}: {changed} {tops} {tops_after}")
            pod.remove()


def block_device():
    """One of the node's that opens at all (a loop device without a file does): (name, number)."""
    for name in sorted(os.listdir("/dev")):
        try:
            at = os.lstat("/dev/" + name)
            if stat.S_ISBLK(at.st_mode):
                os.close(os.open("/dev/" + name, os.O_RDWR))
                return name, at.st_rdev
        except OSError:
            continue
    return None


def limits(steps, s, pod):
    with steps.step("open files of a container that names no limit: 1024, up to 524288 where the daemon may"):
        container, _ = pod.run({})
        soft, hard = map(int, pod.inside(container, "ulimit -n; ulimit -Hn").split())
        with open(f"/proc/{s.runtime.process.pid}/limits") as f:
            most = next(int(line.split()[4]) for line in f if line.startswith("Max open files"))
        expect((soft, hard) == (1024, min(524288, most)), f"{soft}:{hard}, the daemon has {most}")


def profiles(steps, s, c, pod):
    c("pull", REFUSED)
    with steps.step("capabilities: one that does not exist is refused by name"):
        for change in ("add_capabilities", "drop_capabilities", "add_ambient_capabilities"):
            pod.refused({"capabilities": {change: ["SYS_MAGIC"]}}, "SYS_MAGIC")
    refusals(steps, s, pod)
    actions(steps, s, pod)
    apparmor(steps, s, c, pod)
    targets(steps, s, c, pod)
    limits(steps, s, pod)

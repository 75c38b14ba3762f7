"""OCI hooks under berth's own runtime: of plugins, of CDI files, of a directory."""

import json
import os
import shutil
import signal
import subprocess
import sys

from harness import leaks
from harness.report import expect, wait_for
from walkthrough import written
from world import plugin

POINTS = ("prestart", "create_runtime", "create_container", "start_container", "poststart", "poststop")
# A hook on the node: what it is told and sees goes into a file as a line of JSON, then it does what its environment says.
HOOK = """#!%s
import json, os, sys, time
state = json.load(sys.stdin)
with open(os.path.join(state["bundle"], "config.json")) as f:
    config = json.load(f)
root = os.path.join(state["bundle"], config["root"]["path"])
with open(%r, "a") as f:
    f.write(json.dumps({"point": sys.argv[1], "state": state, "mnt": os.readlink("/proc/self/ns/mnt"),
                        "net": os.readlink("/proc/self/ns/net"), "root": sorted(os.listdir(root)), "env": dict(os.environ), "cwd": os.getcwd(),
                        "args": config["process"]["args"]}) + "\\n")
if "LINK" in os.environ:
    os.symlink("/target", os.path.join(root, os.environ["LINK"]))
    os.listdir(os.path.join(root, "proc", "sys"))
if "FAIL" in os.environ:
    sys.exit("it fails on purpose: " + sys.argv[1])
if "HANG" in os.environ:
    if os.fork() == 0:
        os.setsid()
    time.sleep(98765)
"""


class Hooks:
    """The program of the hooks, and what they have seen."""

    def __init__(self, w):
        self.w, self.path, self.out = w, os.path.join(w.work, "hook.py"), os.path.join(w.work, "hooks.out")
        with open(self.path, "w") as f:
            # In a user namespace it is run by somebody who may not look into /root.
            f.write(HOOK % (shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable, self.out))
        os.chmod(self.path, 0o755)
        open(self.out, "w").close()
        os.chmod(self.out, 0o666)  # in a user namespace it is somebody else's

    def one(self, point, timeout=0, **env):
        made = {"path": self.path, "args": ["hook", point], "env": [f"{k}={v}" for k, v in env.items()]}
        return {**made, "timeout": {"value": timeout}} if timeout else made

    def adjust(self, **points):
        """An answer to CreateContainer with a hook for each point, with this environment."""
        return {"CreateContainer": {"adjust": {"hooks": {p: [self.one(p, **more)] for p, more in points.items()}}}}

    def seen(self):
        with open(self.out) as f:
            lines = [json.loads(line) for line in f]
        open(self.out, "w").close()
        return lines

    def points(self):
        return [line["point"] for line in self.seen()]

    def nothing_left(self, container=None):
        pods = os.path.join(self.w.s.runtime.state, "pods")
        inside = [name for pod in os.listdir(pods) for name in os.listdir(os.path.join(pods, pod))
                  if os.path.isdir(os.path.join(pods, pod, name))]
        expect(container not in inside if container else not inside, f"bundles are left: {inside}")
        expect(not [c for c in leaks.descendants().values() if "hook.py" in c], "hooks still run")


def inner(pid):
    """Its number in its own PID namespace."""
    with open(f"/proc/{pid}/status") as f:
        return int(next(line for line in f if line.startswith("NSpid:")).split()[-1])


def _inside(script):
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}


# A PID namespace of its own, as kubelet's containers have it: there a hook inside knows the container's number.
OWN_PID = {"linux": {"security_context": {"namespace_options": {"pid": 1}}}}


def order(w, steps, h):
    with steps.step("all six points, in order, with what each is to see"):
        script = h.adjust(**{p: {} for p in POINTS if p != "start_container"})
        hooks = script["CreateContainer"]["adjust"]["hooks"]
        hooks["create_container"][0]["env"] = ["LINK=hooked", "OWN=1"]
        # One without variables does not get the container's.
        bare = {**_inside("/bin/env > /bare; pwd >> /bare"), "env": []}
        hooks["start_container"] = [_inside("cat > /started; id -u >> /started; readlink /hooked >> /started"), bare]
        with plugin(w, script=script):
            pod = w.pod("hooked")
            container = w.create(pod, **OWN_PID)
            expect([p["point"] for p in h.seen()] == ["prestart", "create_runtime", "create_container"], "at create")
            w.c("start", container)
            expect(h.points() == ["poststart"], "at start")
            told = w.shell(container, "cat /started").split("\n")
            state = json.loads(told[0].removesuffix("0"))
            pid = inner(w.c.json("inspect", container)["info"]["pid"])
            expect((state["status"], state["pid"], state["id"]) == ("created", pid, container), told[0])
            expect(told[0].endswith("}0") and told[1] == "/target", str(told))
            *names, where = [line.split("=")[0] for line in w.shell(container, "cat /bare").split()]
            expect(set(names) - {"PWD", "SHLVL", "OLDPWD"} == {"PATH"} and where == "/", f"{names} {where}")
            w.c("stop", "-t", "0", container)
            expect(h.points() == [], "at stop")
            w.c("rm", container)
            expect(h.points() == ["poststop"], "at removal")
            h.nothing_left(container)
            w.remove(pod)
    with steps.step("namespaces, state and the container's root"):
        script = h.adjust(**{p: {} for p in POINTS if p != "start_container"})
        with plugin(w, script=script):
            pod = w.pod("hooked")
            container = w.started(pod, **OWN_PID, annotations={"own": "noted", "quote": 'a "b"'},
                                  envs=[{"key": "LD_PRELOAD", "value": "./evil.so"}])
            pid = w.c.json("inspect", container)["info"]["pid"]
            inside = inner(pid)
            w.remove(pod)
            first, second, third, fourth, last = h.seen()
        node, net = os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/ns/net")
        for line, status, number in ((first, "creating", pid), (second, "creating", pid), (third, "creating", inside),
                                     (fourth, "running", pid), (last, "stopped", None)):
            got, where = line["state"], line["point"]
            expect((got["status"], got.get("pid"), got["id"]) == (status, number, container), f"{where}: {got}")
            expect(got["annotations"]["quote"] == 'a "b"' and got["ociVersion"], f"{where}: {got}")
            mine = where != "create_container"
            expect((line["mnt"] == node, line["net"] == net) == (mine, mine), f"{where}: namespaces")
            expect(line["args"] == ["sleep", "3600"], f"{where}: config.json")
            root = [] if mine else ["bin", "dev", "etc", "proc", "sys"]
            expect(set(root) <= set(line["root"]) and bool(line["root"]) != mine, f"{where}: {line['root']}")
            # Nothing of the container's: neither its variables nor a directory that its image has filled (CVE-2025-23266).
            own = {k: v for k, v in line["env"].items() if k not in ("LC_CTYPE", "PWD", "SHLVL", "_")}
            expect(own == {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, f"{where}: {line['env']}")
            expect(os.path.realpath(line["cwd"]) == os.path.realpath(got["bundle"]), f"{where}: {line['cwd']}")


def around(w, steps, h):
    with steps.step("a hooked container is like any other inside"):
        with plugin(w, script=h.adjust(create_container={"LINK": "hooked"})):
            pod = w.pod()
            hooked = w.started(pod, "hooked")
        plain = w.started(pod, "plain")
        looks = "cut -d' ' -f5,6 /proc/self/mountinfo | sort; ls -l /dev | cut -c1-10,50-; cat /proc/self/status | grep Cap; ls /sys"
        expect(w.shell(hooked, looks) == w.shell(plain, looks), w.shell(hooked, looks) + " against " + w.shell(plain, looks))
        expect(w.shell(hooked, "readlink /hooked") == "/target", "link")
        w.remove(pod)
        h.seen()
    with steps.step("a restart of the daemon between create and start, and before removal"):
        with plugin(w, script=h.adjust(poststart={}, poststop={})):
            pod = w.pod()
            container = w.create(pod)
        for verb in ("start", "stop"):
            w.s.runtime.kill(signal.SIGKILL)
            w.s.runtime.start()
            w.c(verb, container)
        expect(h.points() == ["poststart"], "poststart")
        w.remove(pod)
        expect(h.points() == ["poststop"], "poststop")
        h.nothing_left()
    with steps.step("poststop without the pod's monitor"):
        with plugin(w, script=h.adjust(poststop={})):
            pod = w.pod()
            container = w.started(pod)
        with open(f"/proc/{w.c.json('inspect', container)['info']['pid']}/stat") as f:
            os.kill(int(f.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
        w.remove(pod)
        expect(h.points() == ["poststop"], "poststop")
        h.nothing_left()
    with steps.step("in a pod with a user namespace"):
        ids = [{"host_id": 300000, "container_id": 0, "length": 65536}]
        own = {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": ids, "gids": ids}}}}
        work, old = w.work, os.stat(w.work).st_mode
        os.chmod(work, 0o711)
        try:
            with plugin(w, script=h.adjust(create_runtime={}, create_container={"LINK": "hooked"}, poststop={})):
                pod = w.pod("mapped", **own)
                container = w.started(pod, "mapped", linux=own)
            expect(w.shell(container, "readlink /hooked; cut -c1-30 /proc/self/uid_map").split()[:3] == ["/target", "0", "300000"],
                   "inside")
            w.remove(pod)
        finally:
            os.chmod(work, old)
        expect(h.points() == ["create_runtime", "create_container", "poststop"], "hooks")


def wrong(w, steps, h):
    pod = w.pod()
    before = w.listed()
    for point, name in zip(POINTS[:3], ("prestart", "createRuntime", "createContainer")):
        with steps.step(f"{name} fails: so does the create, with what it said; nothing is left"):
            with plugin(w, script=h.adjust(**{point: {"FAIL": 1}}, poststop={})):
                error = w.c.fails("create", pod, w.config("failing"), w.any)
            expect(all(word in error for word in (name, h.path, "exited with 1", "it fails on purpose: " + point)), error)
            expect(h.points() == [point, "poststop"], "hooks")
            expect(w.listed() == before, "something is listed")
            h.nothing_left()
        with steps.step(f"{name} hangs: it is killed with all it started"):
            script = {"CreateContainer": {"adjust": {"hooks": {point: [h.one(point, timeout=1, HANG=1)]}}}}
            with plugin(w, script=script):
                error = w.c.fails("create", pod, w.config("hanging"), w.any)
            expect(all(word in error for word in (name, h.path, "did not end within 1 s")), error)
            expect(w.listed() == before, "something is listed")
            h.nothing_left()
            h.seen()
    with steps.step("startContainer fails: so does the start"):
        hooks = {"start_container": [_inside("echo not like this >&2; exit 9")], "poststop": [h.one("poststop")]}
        h.seen()
        with plugin(w, script={"CreateContainer": {"adjust": {"hooks": hooks}}}):
            container = w.create(pod, "unstarted")
            error = w.c.fails("start", container)
        expect("startContainer /bin/sh exited with 9; it wrote: not like this" in error, error)
        status = w.c.json("inspect", container)["status"]
        expect((status["state"], status["reason"]) == ("CONTAINER_EXITED", "StartError"), str(status))
        w.c("rm", container)
        expect(h.points() == ["poststop"], "hooks")
        h.nothing_left()
    with steps.step("poststart and poststop fail: the others run, it is logged"):
        hooks = {p: [h.one(p, FAIL=1), h.one(p + "-2")] for p in ("poststart", "poststop")}
        with plugin(w, script={"CreateContainer": {"adjust": {"hooks": hooks}}}):
            container = w.started(pod, "careless")
        expect(w.shell(container, "echo runs") == "runs", "it does not run")
        w.c("rm", "-f", container)
        expect(h.points() == ["poststart", "poststart-2", "poststop", "poststop-2"], "hooks")
        log = w.s.runtime.log_end(200000)
        for name in ("poststart", "poststop"):
            expect(any(name in line and "it fails on purpose: " + name in line and "WARN" in line for line in log.splitlines()), name)
    with steps.step("what is no hook is refused by name"):
        for hook, words in (({"path": "bin/x"}, ("createContainer.path", "bin/x")),
                            ({"path": "/bin/x", "env": ["A"]}, ("createContainer.env", "NAME=value")),
                            ({"path": "/no/such"}, ("createContainer /no/such", "No such file"))):
            with plugin(w, script={"CreateContainer": {"adjust": {"hooks": {"create_container": [hook]}}}}):
                error = w.c.fails("create", pod, w.config("refused"), w.any)
            expect(all(word in error for word in words), error)
    with steps.step("a pod that is stopped while a hook runs"):
        script = {"CreateContainer": {"adjust": {"hooks": {"create_runtime": [h.one("late", timeout=60, HANG=1)]}}}}
        other = w.pod()
        with plugin(w, script=script):
            child = subprocess.Popen([*w.c.base, "create", other, w.config("late"), w.any], stderr=subprocess.DEVNULL)
            wait_for("the hook", lambda: any("hook.py" in c for c in leaks.descendants().values()), 20 * w.factor)
            w.remove(other)
            expect(child.wait(60) != 0, "the create")
        h.seen()
        h.nothing_left()
    w.remove(pod)


def by_cdi(w, steps, h):
    directory = os.path.join(w.work, "cdi")
    os.makedirs(directory, exist_ok=True)
    with steps.step("hooks of a CDI device: a link in the root, by the bundle of the state"):
        hook = {"hookName": "createContainer", "path": h.path, "args": ["vendor-hook", "cdi"], "env": ["LINK=lib.so.1"]}
        written(directory, "hooks.json", {"cdiVersion": "0.6.0", "kind": "vendor.com/lib", "devices": [
            {"name": "0", "containerEdits": {"hooks": [hook]}}]})
        pod = w.pod()
        container = w.started(pod, "linked", CDI_devices=[{"name": "vendor.com/lib=0"}])
        expect(w.shell(container, "readlink /lib.so.1") == "/target", "link")
        expect(h.points() == ["cdi"], "hooks")
        w.remove(pod)
        os.unlink(os.path.join(directory, "hooks.json"))


def by_directory(w, steps, h):
    directory = os.path.join(w.work, "hooks.d")
    pod = w.pod("chosen")
    file = lambda when, **more: written(directory, "10-mark.json", {  # noqa: E731
        "version": "1.0.0", "hook": {"path": h.path, "args": ["mark", "by-file"], "env": ["LINK=hooked"]},
        "when": when, "stages": ["createContainer"], **more})
    with steps.step("hooks of a directory: for the containers that match, from the next container on"):
        os.makedirs(directory, exist_ok=True)
        number = 0
        for when, fits in (({"always": True}, True), ({"annotations": {"^own$": "^c[0-9]"}}, True),
                           ({"annotations": {"note": "of cho"}}, True), ({"annotations": {"own": "other"}}, False),
                           ({"commands": ["^sle+p$"]}, True), ({"commands": ["sh$"]}, False), ({"hasBindMounts": True}, False)):
            file(when)
            number += 1
            container = w.started(pod, f"c{number}")
            expect(h.points() == ["by-file"] * fits, f"{when}")
            expect(w.shell(container, "readlink /hooked || echo none") == ("/target" if fits else "none"), f"{when}: link")
            w.c("rm", "-f", container)
        file({"hasBindMounts": True})
        w.c("rm", "-f", w.started(pod, "mounted", mounts=[{"host_path": "/usr", "container_path": "/u", "readonly": True}]))
        expect(h.points() == ["by-file"], "mounts")
    with steps.step("a plugin sees them; its command line is the one that counts"):
        file({"commands": ["^ash$"]})
        with plugin(w, script={"CreateContainer": {"adjust": {"args": ["ash", "-c", "sleep 3600"]}}}):
            w.c("rm", "-f", w.started(pod, "ash"))
        expect(h.points() == ["by-file"], "hooks")
    with steps.step("a file that cannot be used fails every container and names itself"):
        for when, more, words in (({"always": True}, {"stages": ["precreate"]}, ("stages", "precreate")),
                                  ({"commands": ["("]}, {}, ("when.commands", "(")),
                                  ({"ever": True}, {}, ("ever",)), ({"always": True}, {"version": "0.1.0"}, ("version", "0.1.0"))):
            path = file(when, **more)
            error = w.c.fails("create", pod, w.config("refused"), w.any)
            expect(path in error and all(word in error for word in words), error)
        os.unlink(path)
        w.c("rm", "-f", w.started(pod, "fine"))
        expect(h.points() == [], "hooks")
        h.nothing_left()
    w.remove(pod)


def hooks(w, steps):
    h = Hooks(w)
    for part in (order, around, wrong, by_cdi, by_directory):
        part(w, steps, h)

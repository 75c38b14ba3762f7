"""What the tests of plugins work with: a plugin and its log, pods of one container."""

import contextlib
import json
import os
import subprocess
import threading

from harness import runtimes
from harness.report import expect, wait_for
from walkthrough import Crictl, written

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
LIFE = ["RunPodSandbox", "CreateContainer", "PostCreateContainer", "StartContainer", "PostStartContainer",
        "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"]


class Plugin:
    """A plugin as a process of ours, with its log and script."""

    def __init__(self, session, idx="10", name="test", script=None, once=False):
        self.s, self.name = session, f"{idx}-{name}"
        self.log = os.path.join(session.work, f"{self.name}.events")
        self.path = os.path.join(session.work, f"{self.name}.script")
        self.script(script or {})
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.log)
        command = [runtimes.tool("NRI_PLUGIN"), "-socket", session.nri, "-idx", idx, "-name", name,
                   "-log", self.log, "-script", self.path]
        with open(os.path.join(session.work, "plugins.log"), "ab") as log:
            self.process = subprocess.Popen(command + (["-once"] if once else []), stdin=subprocess.PIPE,
                                            stdout=log, stderr=log)

    def script(self, script):
        written(self.s.work, f"{self.name}.new", script)
        os.rename(self.path.replace(".script", ".new"), self.path)

    def events(self, name=None):
        """All events so far, or those of a name."""
        try:
            with open(self.log) as f:
                lines = [json.loads(line) for line in f.read().splitlines()]
        except FileNotFoundError:
            return []
        return [e for e in lines if name in (None, e["event"])]

    def joined(self, count=1):
        wait_for(f"{self.name} to join", lambda: len(self.events("Synchronize")) >= count, 20 * self.s.factor)
        # It is among the others only after its answer.
        wait_for("its name in the status", lambda: self.name in self.s.plugins(), 20 * self.s.factor)
        return self

    def about(self, *ids):
        """Names of the events about these pods and containers, in order."""
        return [e["event"] for e in self.events() if e["event"] in LIFE
                and e.get("container", {}).get("id", e.get("pod", {}).get("id")) in ids]

    def send(self, updates, evictions=()):
        before = len(self.events("Updated"))
        self.process.stdin.write(json.dumps({"update": updates, "evict": list(evictions)}).encode() + b"\n")
        self.process.stdin.flush()
        wait_for("an answer", lambda: len(self.events("Updated")) > before, 10 * self.s.factor)
        return self.events("Updated")[-1]

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        wait_for("the plugin to be gone", lambda: self.name not in self.s.plugins(), 10 * self.s.factor)


@contextlib.contextmanager
def plugin(session, *args, **more):
    one = Plugin(session, *args, **more)
    try:
        yield one.joined()
    finally:
        one.end()


def consistent(events):
    """Checks one session; how many objects it was about."""
    sync = next(e for e in events if e["event"] == "Synchronize")
    before = [e["event"] for e in events[:events.index(sync)]]
    expect(before == ["Configure"], f"before the state: {before}")
    known = {"pod": {x["id"] for x in sync["pods"]}, "container": {x["id"] for x in sync["containers"]}}
    expect(len(known["pod"]) == len(sync["pods"]) and len(known["container"]) == len(sync["containers"]), "twice in the state")
    lives = {}
    for event in events[events.index(sync) + 1:]:
        kind = "container" if "container" in event else "pod"
        if kind in event and event["event"] in LIFE:
            lives.setdefault((kind, event[kind]["id"]), []).append(event["event"])
    for (kind, identity), names in lives.items():
        order = [n for n in LIFE if n in names]
        expect(names == order, f"{kind} {identity}: {names}")
        first = "RunPodSandbox" if kind == "pod" else "CreateContainer"
        if identity in known[kind]:
            expect(first not in names, f"{kind} {identity} is in the state and begins: {names}")
        else:
            # What had ended before the state was taken is not in it; it may only go.
            expect(names[0] == first or set(names) <= {"RemoveContainer", "RemovePodSandbox"},
                   f"{kind} {identity} is neither in the state nor begins: {names}")
    return len(lives)


class World:
    """The session, with pods of one container."""

    def __init__(self, session):
        self.s, self.work, self.factor = session, session.work, session.factor
        self.c = Crictl(session.endpoint, max(5, session.factor))
        self.nri = os.path.join(session.work, "nri.sock")
        self.number, self.lock = 0, threading.Lock()
        self.any = self.pod_config("any")  # what crictl create looks at besides

    def plugins(self):
        code, out, _ = self.c.run("info")
        return json.loads(out)["nri"]["plugins"] if code == 0 else []

    def call(self, method, request):
        """A call of CRI's RuntimeService that crictl has no command for: exit status, answer, words of the error."""
        command = [runtimes.tool("NRI_PLUGIN"), "-socket", self.s.runtime.socket, "-call", method]
        done = subprocess.run(command, input=json.dumps(request).encode(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=60 * self.factor, check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def pod_config(self, name, **linux):
        return written(self.work, f"{name}.pod.json", {
            "metadata": {"name": name, "namespace": "nri", "attempt": 0, "uid": "uid-" + name},
            "labels": {"app": name}, "annotations": {"note": "of " + name},
            "log_directory": os.path.join(self.work, "logs"), "linux": linux})

    def config(self, name, command=("sleep", "3600"), **more):
        return written(self.work, f"{name}.container.json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": list(command),
            "labels": {"tier": name}, "annotations": {"own": name}, "log_path": name + ".log", "linux": {}, **more})

    def fresh(self, kind="p"):
        with self.lock:
            self.number += 1
            return f"{kind}{self.number}"

    def noted(self, identity):
        self.s.runtime.ids.add(identity)
        return identity

    def pod(self, name=None, **linux):
        return self.noted(self.c.id("runp", self.pod_config(name or self.fresh(), **linux)))

    def create(self, pod, name="main", **more):
        return self.noted(self.c.id("create", pod, self.config(name, **more), self.any))

    def started(self, pod, name="main", **more):
        container = self.create(pod, name, **more)
        self.c("start", container)
        return container

    def inside(self, container, *command):
        return self.c("exec", "--sync", container, *command)

    def shell(self, container, script):
        return self.inside(container, "sh", "-c", script).strip()

    def remove(self, *pods):
        for pod in pods:
            self.c("stopp", pod)
            self.c("rmp", pod)

    def listed(self):
        return set(self.c("pods", "-q").split()), set(self.c("ps", "-a", "-q").split())

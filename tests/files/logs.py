"""Logs go where CRI says, whatever a container that has the node's log directory puts there."""

import contextlib
import os
import shutil

from harness.report import expect, wait_for
from inside import CONTAINER, IMAGE, Pod
from walkthrough import written

LINES = ["sh", "-c", "while true; do echo line; sleep 0.1; done"]


class World:
    """A pod whose logs are in WORK/logs/pods/victim, and a container of another that has WORK/logs, like a log agent."""

    def __init__(self, s, c):
        self.s, self.c, self.number = s, c, 0
        self.logs, self.outside = os.path.join(s.work, "logs"), os.path.join(s.work, "outside")
        os.makedirs(self.logs)
        self.empty()
        self.directory = os.path.join(self.logs, "pods", "victim")
        self.config = written(s.work, "victim.json", {
            "metadata": {"name": "victim", "namespace": "files", "attempt": 0, "uid": "uid-victim"},
            "log_directory": self.directory, "linux": {}})
        self.pod = c.id("runp", self.config)
        s.runtime.ids.add(self.pod)
        self.attacker = Pod(s, c, "agent")
        self.agent, _ = self.attacker.run({}, mounts=[{"container_path": "/logs", "host_path": self.logs}])

    def empty(self):
        """Where links lead: the same directories as in the logs, so that nothing is missing there."""
        shutil.rmtree(self.outside, ignore_errors=True)
        for sub in ("pods/victim/same", "victim/same", "same"):
            os.makedirs(os.path.join(self.outside, sub), exist_ok=True)

    def does(self, script):
        self.attacker.inside(self.agent, script)

    def create(self, log):
        """Makes and starts a container that writes lines: its id, or None and the error."""
        self.number += 1
        config = written(self.s.work, f"writer-{self.number}.json", {
            "metadata": {"name": f"writer-{self.number}"}, "image": {"image": IMAGE}, "command": LINES, "log_path": log,
            "linux": {"security_context": {"namespace_options": {"pid": CONTAINER}}}})
        code, out, error = self.c.run("create", self.pod, config, self.config)
        if code:
            return None, error
        self.s.runtime.ids.add(out.strip())
        self.c("start", out.strip())
        return out.strip(), ""

    def stays_empty(self):
        found = [os.path.join(base, name) for base, _, names in os.walk(self.outside) for name in names]
        directories = sum(len(names) for _, names, _ in os.walk(self.outside))
        expect(not found and directories == 6, f"outside there are {found}, {directories} directories")

    @contextlib.contextmanager
    def swapped(self, place, target):
        """`place` below the logs is a link while the block runs."""
        self.empty()
        self.does(f"mv /logs/{place} /logs/aside && ln -s {target} /logs/{place}")
        try:
            yield
        finally:
            self.does(f"rm /logs/{place} && mv /logs/aside /logs/{place}")


def size(path):
    return os.stat(path).st_size


def grows(w, path):
    before = size(path)
    wait_for(f"more in {path}", lambda: size(path) > before, 10 * w.s.factor)


def logs(steps, s, c):
    w = World(s, c)
    kept = os.path.join(w.directory, "same", "0.log")
    with steps.step("a container writes its log, and after a rotation a new one", fatal=True):
        writer, error = w.create("same/0.log")
        expect(writer, error)
        grows(w, kept)
        os.rename(kept, kept + ".1")
        c("logs", "--reopen", writer)
        grows(w, kept)
    for place, up in (("pods", ""), ("pods/victim", "pods/"), ("pods/victim/same", "pods/victim/")):
        for target in (os.path.join(w.outside, place), "../" * (place.count("/") + 1) + "outside/" + place, "nowhere"):
            what = f"{place} swapped for a link to {target.replace(s.work, '')}"
            with steps.step(f"{what}: no log is made, nor opened again, elsewhere"), w.swapped(place, target):
                made, error = w.create(f"same/{w.number}.log")
                w.stays_empty()
                expect(made is None and up + os.path.basename(place) in error and "link" in error, f"{made} {error}")
                code, _, error = c.run("logs", "--reopen", writer)
                w.stays_empty()
                expect(code != 0 and "link" in error, f"{code} {error}")
            grows(w, kept)  # the old one stays in use
    w.empty()
    with steps.step("a name that a container has taken first, with a link, a device or a pipe, gets no log"):
        for number, make in enumerate(("ln -s /dev/null", "ln -s ../../../../outside/x", "mkfifo", "mkdir", "mknod -m 666")):
            number += 100
            ending = " c 1 3" if make.startswith("mknod") else ""
            w.does(f"{make} /logs/pods/victim/same/{number}.log{ending}")
            made, error = w.create(f"same/{number}.log")
            expect(made is None and f"same/{number}.log" in error, f"{make}: {made} {error}")
            w.stays_empty()
    w.empty()
    with steps.step("directories exchanged with links the whole time: every log is where it belongs, or there is none"):
        w.does("cd /logs/pods/victim && mkdir -p real && (while true; do ln -s /logs/x race 2>/dev/null; rm race; "
               f"mv real race; mv race real; ln -s {w.outside}/victim race; rm race; done) > /dev/null 2>&1 & echo")
        made = [w.create("race/0.log")[0] for _ in range(12)]
        w.stays_empty()
        print(f"      ({len([m for m in made if m])} of {len(made)} were made)")
    for one in (w.attacker.id, w.pod):
        c("rmp", "--force", one)

"""Images and containers of attackers: what has hit other runtimes, tried here; the node is looked at afterwards."""

import contextlib
import hashlib
import os
import shutil

from harness.report import expect, wait_for
from inside import Pod

REGISTRY = "registry.k8s.io/security/"
ESCAPE = "/run/berth-test-escape"  # as in tests/images/build.py


def digest(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def tree(top):
    """Every file of a directory: name, mode, owner, content."""
    found = {}
    for base, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(base, name)
            at = os.lstat(path)
            content = digest(path) if os.path.isfile(path) and not os.path.islink(path) else ""
            found[path] = (at.st_mode, at.st_uid, at.st_gid, content)
    return found


def programs(s):
    """What runs as root on the node for the pods: {pid: digest of its program}."""
    def monitor(pid):
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rpartition(")")[2].split()[1])
    return {pid: digest(f"/proc/{pid}/exe") for pid in (s.runtime.process.pid, *{monitor(p) for p in s.pauses})}


@contextlib.contextmanager
def trap():
    """The directory that links of images lead to, with a file in it; nothing may change there."""
    shutil.rmtree(ESCAPE, ignore_errors=True)
    os.makedirs(ESCAPE)
    try:
        with open(ESCAPE + "/null", "w") as f:
            f.write("of the node\n")
        before = tree(ESCAPE)
        yield
        expect(tree(ESCAPE) == before, f"on the node: {tree(ESCAPE)}, it was {before}")
    finally:
        shutil.rmtree(ESCAPE, ignore_errors=True)


def tried(pod, image, **config):
    """Makes and starts a container, if it can be: its id, else what was said."""
    path = pod.config_of({}, image={"image": REGISTRY + image}, **config)
    code, out, error = pod.c.run("create", pod.id, path, pod.config)
    if code:
        return None, error
    container = out.strip()
    pod.s.runtime.ids.add(container)
    code, out, error = pod.c.run("start", container)
    return (None, error) if code else (container, "")


def own_programs(steps, s, c, pod):
    s.pauses = [pod.pause()]
    disk = [os.path.realpath(f"/proc/{s.runtime.process.pid}/exe")]
    disk += [path for path in [os.path.join(os.path.dirname(disk[0]), "berth-monitor")] if os.path.exists(path)]
    with steps.step("#!/proc/self/exe as entrypoint and in an exec: no program of the node changes (CVE-2019-5736)"):
        before = programs(s), [digest(path) for path in disk]
        script = "/again"
        container, said = tried(pod, "again:1", command=[], args=[])
        if container:
            c("rm", "--force", container)
        else:
            expect(said, "nothing said")
        victim, _ = pod.run({}, image={"image": REGISTRY + "again:1"}, command=["sleep", "3600"])
        for _ in range(3):
            # What the exec becomes may be our own program: it tries to write to it through every name it has.
            pod.c.run("exec", "--sync", victim, script)
            pod.tried(victim, "for p in /proc/[0-9]*; do (echo x > $p/exe) 2>/dev/null; : 2>/dev/null <> $p/exe; done; true")
        after = programs(s), [digest(path) for path in disk]
        expect(before == after, f"{before} {after}")
        c("rm", "--force", victim)


def directories(steps, pod):
    with steps.step("WORKDIR /proc/self/fd/N leads nowhere (CVE-2024-21626)"):
        container, _ = pod.run({})
        for number in (3, 5, 8):
            made, said = tried(pod, f"workdir:{number}")
            expect(made is None and "cwd" in said, f"of the image, {number}: {made} {said}")
        for number in range(3, 24):
            made, said = tried(pod, "open:1", working_dir=f"/proc/self/fd/{number}")
            expect(made is None and "cwd" in said, f"of the config, {number}: {made} {said}")
        made, said = tried(pod, "open:1", working_dir="/proc/1/cwd/../../..")
        if made:
            expect(pod.inside(made, "cat /etc/passwd | grep -c ^app:").strip() == "1", "another root")


def links(steps, pod):
    for name in ("dev", "proc", "sys", "etc"):
        for kind in ("link", "up"):
            with steps.step(f"an image whose /{name} is a link ({kind}) writes nothing on the node"), trap():
                container, said = tried(pod, f"{kind}:{name}")
                if container is None:
                    expect(said, "nothing said")
                    expect(name in said or "link" in said, said)
                    continue
                expect(name != "proc", "procfs is somewhere else: what is written to it may be, too (CVE-2019-16884)")
                pod.inside(container, f"ls /{name} > /dev/null; echo x > /{name}/new 2>/dev/null || true; echo x >> /{name}/null || true")
                # Whatever it is, it is in the container's own root.
                found = pod.inside(container, "stat -c %t:%T /dev/null; grep -c . /etc/hosts /etc/hostname").split()
                expect(found[0] == "1:3", str(found))
                pod.c("rm", "--force", container)
    with steps.step("a link at /dev/null in the image masks nothing and opens nothing (CVE-2025-31133)"), trap():
        masked = {"masked_paths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"]}
        container, pid = pod.run(masked, image={"image": REGISTRY + "null:1"})
        expect(pod.inside(container, "stat -c %F:%t:%T /dev/null").strip() == "character special file:1:3", "/dev/null")
        with open(f"/proc/{pid}/mountinfo") as f:
            over = [line for line in f if line.split()[4] in masked["masked_paths"]]
        expect(over and all("sysrq" not in line for line in over), str(over))
        code, said = pod.tried(container, "head -c 16 /proc/keys | wc -c; cat /proc/keys")
        expect("0" in said.split()[:1] or code != 0, f"{code} {said}")


def hostile(steps, s, c, pod):
    for image in ("again:1", "null:1", "open:1", *(f"workdir:{n}" for n in (3, 5, 8)),
                  *(f"{kind}:{name}" for name in ("dev", "proc", "sys", "etc") for kind in ("link", "up"))):
        c("pull", REGISTRY + image)
    own_programs(steps, s, c, pod)
    directories(steps, pod)
    links(steps, pod)
    with steps.step("the daemon has come to no harm"):
        wait_for("an answer", lambda: c.json("info"), 10 * s.factor)
        other = Pod(s, c, "after")
        other.run({})
        other.remove()

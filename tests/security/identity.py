"""Who the processes of pods and containers are: what the image says once, never what a container makes of it."""

import os
import signal

from harness.report import expect
from inside import IMAGE, Pod, Status

OPEN = "registry.k8s.io/security/open:1"
# Every line that says who somebody is, made into one that says more. (The files may be written, not their directory.)
SPOIL = ("sed -e 's/^app:.*/app:x:0:0::\\/spoilt:\\/bin\\/sh/' -e 's/^root:.*/root:x:7:7::\\/spoilt:/' /etc/passwd > /tmp/passwd;"
         " cat /tmp/passwd > /etc/passwd; echo wheel:x:10:app,root >> /etc/group")
WHO = "id -u; id -g; id -G; echo $HOME"
BAD_USERS = ("4294967296", "4294967295", "2147483648", "-1", "0x0", " 0", "root", "1:-1", "gone")


def who(pod, container):
    uid, gid, groups, home = pod.inside(container, WHO).replace("\r", "").strip().split("\n")
    return uid, gid, sorted(int(group) for group in groups.split()), home


def spoilt(pod, container, wanted):
    """An exec is who it was before, whatever the container writes."""
    before = who(pod, container)
    expect(before == wanted, f"{before} at first, not {wanted}")
    pod.inside(container, SPOIL)
    expect("spoilt" in pod.inside(container, "cat /etc/passwd"), "nothing is spoilt")
    after = who(pod, container)
    expect(after == before, f"{after} after the files were changed, not {before}")
    caps = pod.inside(container, "grep ^CapEff: /proc/self/status").split()[1]
    pod.inside(container, ": > /etc/passwd; : > /etc/group")
    after = who(pod, container)
    expect(after == before, f"{after} without the lines, not {before}")
    return caps


def execs(steps, s, c, pod):
    cases = (("USER app of the image", {}, ("1000", "1001", [50, 1001], "/home/app")),
             ("a number alone", {"run_as_user": {"value": 1000}}, ("1000", "1001", [50, 1001], "/home/app")),
             ("a name and a group", {"run_as_username": "app", "run_as_group": {"value": 7}},
              ("1000", "7", [7, 50], "/home/app")),
             ("Strict groups", {"run_as_user": {"value": 1000}, "supplemental_groups_policy": 1, "supplemental_groups": [9]},
              ("1000", "1001", [9, 1001], "/home/app")))
    for name, security, wanted in cases:
        with steps.step(f"exec stays who the container was made as: {name}"):
            container, _ = pod.run(security, image={"image": OPEN})
            expect(int(spoilt(pod, container, wanted), 16) == 0, "capabilities in effect")
    with steps.step("... and after a restart of the daemon"):
        container, _ = pod.run(security, image={"image": OPEN})
        spoilt(pod, container, wanted)
        s.runtime.kill(signal.SIGKILL)
        s.runtime.start()
        expect(who(pod, container) == wanted, str(who(pod, container)))
    with steps.step("... and with a terminal and an own HOME"):
        container, _ = pod.run({}, image={"image": OPEN}, envs=[{"key": "HOME", "value": "/own"}])
        spoilt(pod, container, ("1000", "1001", [50, 1001], "/own"))


def by_runtimes(steps, s, c):
    """The same by an OCI runtime, where this machine lets it run."""
    for name in ("runc", "crun"):
        if name not in s.runtime.handlers:
            continue
        with steps.step(f"exec by {name} stays who the container was made as"):
            pod = Pod(s, c, "by-" + name, handler=name)
            container, _ = pod.run({}, image={"image": OPEN})
            expect(int(spoilt(pod, container, ("1000", "1001", [50, 1001], "/home/app")), 16) == 0, "capabilities")
            pod.remove()


def images(steps, pod):
    with steps.step("an image's USER that is no user is refused, and never root"):
        for number, text in enumerate(BAD_USERS):
            image = f"registry.k8s.io/security/user:{number}"
            pod.c("pull", image)
            said = pod.refused({}, image={"image": image})
            expect("User" in said or "user" in said, f"USER {text!r}: {said}")
    with steps.step("an image's bad USER does not matter where the pod names one"):
        container, _ = pod.run({"run_as_user": {"value": 5}}, image={"image": "registry.k8s.io/security/user:3"})
        expect(pod.inside(container, "id -u").strip() == "5", "user")
    with steps.step("a HOME that would be several fields or lines of a file is refused (CVE-2022-4318)"):
        for home in ("/home\nroot2::0:0:::/bin/sh", "/home\r", "/a:b"):
            pod.refused({}, "HOME", envs=[{"key": "HOME", "value": home}])


def sandbox(steps, s, c):
    """The pod's own process, as the node sees it."""
    def status(pod):
        with open(f"/proc/{pod.pause()}/status") as f:
            return Status(f.read())

    def fine(found, uid, gid, groups):
        expect((set(found.uid), set(found.gid), found.groups) == ({uid}, {gid}, groups), str(vars(found)))
        expect(not any(found.caps[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")), str(found.caps))
        expect(found.no_new_privs == "1", "no_new_privs")

    def reaps(pod):
        """An orphan of the shared PID namespace is reaped by pause."""
        container, _ = pod.run({"namespace_options": {"pid": 0}})
        pod.inside(container, "sh -c 'sleep 0.1 & exit' ")
        pod.inside(container, "for i in 1 2 3 4 5 6 7 8 9 10; do grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || exit 0;"
                              " sleep 1; done; exit 1")
        expect(pod.c.json("inspectp", pod.id)["status"]["state"] == "SANDBOX_READY", "not ready")

    with steps.step("the sandbox process is the user, with the groups, that the pod names; it reaps"):
        pod = Pod(s, c, "identity", run_as_user={"value": 4321}, run_as_group={"value": 5432}, supplemental_groups=[7, 9],
                  seccomp={"profile_type": 0}, linux={"sysctls": {"net.ipv4.ip_unprivileged_port_start": "77"}},
                  namespace_options={"pid": 0})
        found = status(pod)
        fine(found, "4321", "5432", [7, 9, 5432])
        expect(found.seccomp == "2", "no filter")
        container, _ = pod.run({"namespace_options": {"pid": 0}})
        expect(pod.inside(container, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").strip() == "77", "sysctl")
        reaps(pod)
        pod.remove()
    with steps.step("a container of the sandbox's user cannot trace it"):
        pod = Pod(s, c, "traced", run_as_user={"value": 4321}, namespace_options={"pid": 0})
        container, _ = pod.run({"namespace_options": {"pid": 0}, "run_as_user": {"value": 4321}})
        said = pod.inside(container, "id -u; cat /proc/1/comm; ls /proc/1/fd 2>&1; readlink /proc/1/exe || echo refused")
        said = said.replace("\r", "").strip().split("\n")
        expect(said[:2] == ["4321", "pause"] and "denied" in said[2] and said[-1] == "refused", str(said))
        pod.remove()
    with steps.step("... root without capabilities where it names none, and the group root where it names no group"):
        pod = Pod(s, c, "nobody")
        fine(status(pod), "0", "0", [0])
        pod.remove()
        pod = Pod(s, c, "user-alone", run_as_user={"value": 4321})
        fine(status(pod), "4321", "0", [0])
        pod.remove()
    with steps.step("... in a user namespace: the ids inside, mapped"):
        if not any(h["features"].get("user_namespaces") for h in c.json("info")["runtimeHandlers"]):
            print("      (this node has no user namespaces for pods)")
            return
        ids = [{"host_id": 300000, "container_id": 0, "length": 65536}]
        pod = Pod(s, c, "mapped", run_as_user={"value": 1234}, run_as_group={"value": 2345}, supplemental_groups=[3456],
                  namespace_options={"pid": 0, "userns_options": {"mode": 0, "uids": ids, "gids": ids}})
        fine(status(pod), "301234", "302345", [302345, 303456])
        pod.remove()


def identity(steps, s, c, pod):
    for image in (OPEN, IMAGE):
        c("pull", image)
    images(steps, pod)
    sandbox(steps, s, c)
    if s.runtime.name == "berth":
        execs(steps, s, c, pod)
        by_runtimes(steps, s, c)

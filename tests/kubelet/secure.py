"""A pod with everything that confines: what its processes see of it."""

import json
import os

from harness.report import expect, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
NO_CHMOD = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["chmod", "fchmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 42}]}


def secure_pod(s, kubelet, steps, crictl, container_status, note_ids):
    """Adds the pod, looks from inside, removes it."""
    os.makedirs(kubelet.root + "/seccomp", exist_ok=True)
    with open(kubelet.root + "/seccomp/no-chmod.json", "w") as f:
        json.dump(NO_CHMOD, f)

    def inside(name, script):
        container = container_status(kubelet, "secure", name)["containerID"].partition("://")[2]
        return crictl(s, "exec", "--sync", container, "sh", "-c", script)

    with steps.step("hostUsers: false, image volume, seccomp, procMount: the pod runs", fatal=True):
        kubelet.add(HERE + "/pods/secure.yaml")
        wait_for("its containers", lambda: all("running" in container_status(kubelet, "secure", n)["state"]
                                               for n in ("default", "unmasked")), 90 * s.factor, 0.5)
        note_ids(s)
    first, host, count = inside("unmasked", "cat /proc/self/uid_map").split()
    with steps.step("a user namespace of its own"):
        expect(first == "0" and int(host) >= 65536 and int(count) == 65536, f"{first} {host} {count}")
        inside("unmasked", "echo mine > /shared/file")
        expect(inside("default", "stat -c %u:%g /shared/file").strip() == "0:2000", "owner in an emptyDir")
    with steps.step("an emptyDir has on the node the ids of the pod's inside: nothing there is the range's own"):
        found = [os.path.join(base, name) for base, _, names in os.walk(kubelet.root + "/pods") for name in names
                 if name == "file" and base.endswith("kubernetes.io~empty-dir/shared")]
        expect(len(found) == 1, str(found))
        at = os.stat(found[0])
        expect((at.st_uid, at.st_gid) == (0, 2000), f"{at.st_uid}:{at.st_gid}, the range begins at {host}")
        inside("default", "id -u > /shared/of-1000 && cat /shared/of-1000")
        at = os.stat(os.path.join(os.path.dirname(found[0]), "of-1000"))
        expect((at.st_uid, at.st_gid) == (1000, 2000), f"{at.st_uid}:{at.st_gid}")
    with steps.step("runAsUser, runAsGroup, supplementalGroupsPolicy: Strict"):
        expect(inside("default", "id -u; id -g; id -G").split() == ["1000", "2000", "2000", "3000"],
               inside("default", "id"))
        status = container_status(kubelet, "secure", "default").get("user", {}).get("linux", {})
        expect(status.get("uid") == 1000 and sorted(status.get("supplementalGroups", [])) == [2000, 3000], str(status))
    with steps.step("seccomp: RuntimeDefault and a Localhost profile"):
        expect(inside("default", "grep ^Seccomp: /proc/self/status").split()[1] == "2", "no filter")
        # A new user namespace, with which everybody would be somebody's root.
        said = inside("default", "unshare -U true 2>&1 && echo made || true")
        expect("not permitted" in said and "made" not in said, f"unshare: {said!r}")
        said = inside("unmasked", "chmod 600 /shared/file 2>&1 || true")
        expect("No message of desired type" in said or "42" in said, f"chmod: {said!r}")
    with steps.step("procMount: Unmasked, and masked"):
        expect(" /proc/sys " not in inside("unmasked", "cat /proc/self/mountinfo"), "/proc/sys is covered")
        expect(" /proc/sys " in inside("default", "cat /proc/self/mountinfo"), "/proc/sys is open")
    with steps.step("image volume with a subPath, read-only"):
        expect("passwd" in inside("default", "ls /content"), inside("default", "ls /content"))
        said = inside("default", "touch /content/x 2>&1 || true")
        expect("Read-only" in said, said)
    kubelet.remove("secure")

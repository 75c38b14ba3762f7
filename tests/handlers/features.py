"""What `Status` says that each handler offers: what its OCI runtime tells, as that is now."""

import os
import time

from harness import oci
from harness.report import expect, wait_for

# Tells that it has both, or only recursive read-only mounts, or nothing; keeps count of who asks; waits where a file says so.
RUNTIME = """#!/bin/sh
here=${{0%/*}}
echo "$1" >> "$here/asked"
while [ -e "$here/hold" ]; do sleep 0.05; done
[ "$1" = features ] || exit 1
{answer}
"""
BOTH = """echo '{"ociVersionMin": "1.0.0", "ociVersionMax": "1.3.0", "mountOptions": ["ro", "rro"], "linux": {
	"namespaces": ["mount", "user"], "mountExtensions": {"idmap": {"enabled": true}}}}'"""
MOUNTS = """echo '{"ociVersionMin": "1.0.0", "ociVersionMax": "1.3.0", "mountOptions": ["ro", "rro"], "linux": {
	"namespaces": ["mount", "user"], "mountExtensions": {}}}'"""
NOTHING = "exit 1"
IDS = [{"host_id": 300000, "container_id": 0, "length": 65536}]
MAPPED = {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": IDS, "gids": IDS}}}}
KEYS = (("recursive_read_only_mounts", "recursiveReadOnlyMounts"), ("user_namespaces", "userNamespaces"))


def offered(w):
    """(recursive read-only mounts, user namespaces) of each handler, as Status has them."""
    handlers = w.c.json("info")["runtimeHandlers"]
    return {h.get("name", ""): tuple(any(h["features"].get(key, False) for key in keys) for keys in KEYS) for h in handlers}


def told(program):
    """The same as the program itself says."""
    can = oci.abilities(program)
    return can.recursive_read_only, can.user_namespaces


def features(w, steps):
    kernel = offered(w)["berth"]
    with steps.step("features: berth's own are the default's; of an OCI runtime what it tells itself"):
        expect(offered(w)[""] == kernel, f"{offered(w)}")
        for name, path in {**w.s.runtime.real, "oci": os.path.join(w.place, "runtime")}.items():
            wanted = tuple(own and can for own, can in zip(kernel, told(path)))
            wait_for(f"what {name} tells", lambda: offered(w)[name] == wanted, 10 * w.s.factor)  # noqa: B023
    with steps.step("features: a handler whose OCI runtime is not there offers nothing"):
        expect(offered(w)["elsewhere"] == (False, False), f"{offered(w)}")
    later(w, steps, kernel)


def later(w, steps, kernel):
    """The runtime of the handler `late` is not there when the daemon starts."""
    where = os.path.join(w.place, "late")
    hold, asked = os.path.join(where, "hold"), os.path.join(where, "asked")
    mounts = (kernel[0], False)

    def put(answer):
        # As installers do: it is there as a whole, or not.
        new = os.path.join(where, "new")
        with open(new, "w") as f:
            f.write(RUNTIME.format(answer=answer))
        os.chmod(new, 0o755)
        os.rename(new, os.path.join(where, "runtime"))

    def becomes(wanted, words):
        """The next Status says so (a slow node's soon), and the runtime was asked these words since, once."""
        wait_for(str(wanted), lambda: offered(w)["late"] == wanted, 10 * w.s.factor)
        for _ in range(3):
            expect(offered(w)["late"] == wanted, f"{offered(w)}, not {wanted} any more")
        with open(asked) as f:
            got = f.read().split()
        # One that failed is tried again after 10 s, as long as a slow node may need for this.
        expect(got == words or (w.s.factor > 1 and got == words * (len(got) // 2)), f"it was asked {got}")
        os.remove(asked)

    with steps.step("features: a runtime that comes, changes and goes while the daemon runs; asked once each time"):
        expect(offered(w)["late"] == (False, False), f"{offered(w)}")
        put(BOTH)
        becomes(kernel, ["features"])
        put(MOUNTS)
        becomes(mounts, ["features"])
        os.remove(os.path.join(where, "runtime"))
        wait_for("nothing", lambda: offered(w)["late"] == (False, False), 10 * w.s.factor)
        expect(not os.path.exists(asked), "something was asked")
        put(NOTHING)
        becomes((False, False), ["features", "--version"])
    if kernel[1]:
        with steps.step("features: a user namespace is refused by what the runtime is now, even if nobody has asked it yet"):
            put(MOUNTS)
            becomes(mounts, ["features"])
            error = w.c.fails("runp", "--runtime", "late", w.pod_config("late", linux=MAPPED))
            expect(all(word in error for word in ("userns_options", "late", "features")), error)
            put(BOTH)
            with w.pod("late", linux=MAPPED):
                pass
            becomes(kernel, ["features"])
            put(NOTHING)
            becomes((False, False), ["features", "--version"])
    with steps.step("features: a runtime that takes its time does not hold up Status"):
        open(hold, "w").close()
        try:
            put(BOTH)
            start = time.monotonic()
            expect(offered(w)["late"] == (False, False), f"{offered(w)}")
            took = time.monotonic() - start
            expect(took < 3 * w.s.factor, f"Status took {took:.1f} s")
            expect(os.path.exists(asked), "it was not asked")
            expect(offered(w)["berth"] == kernel, f"{offered(w)}")
        finally:
            os.remove(hold)
        becomes(kernel, ["features"])

"""`default_runtime`: what a pod gets that names no handler."""

import json
import os
import subprocess

from harness.report import Failure, expect


def made(w, container):
    """What the OCI runtime of the handler `oci` itself says of a container: nothing if it has not made it."""
    root = os.path.join(w.s.runtime.state, "runtimes", "oci")
    if not os.path.exists(os.path.join(root, container)):
        return None
    out = subprocess.run([w.s.runtime.real["crun"], "--root", root, "state", container], stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out)


def by_oci(w, pod, container, handler):
    """The container is the OCI runtime's, in a pod of this handler's name."""
    shown, inside = w.c.json("inspectp", pod), w.c.json("inspect", container)["info"]
    expect(shown["status"].get("runtimeHandler", "") == handler, f"{shown['status']}")
    wrapper = os.path.join(w.place, "runtime")
    expect((shown["info"]["runtimeType"], inside["runtimeType"]) == (wrapper, wrapper), f"{shown['info']} {inside}")
    state = made(w, container)
    expect(state and (state["status"], state["pid"]) == ("running", inside["pid"]), f"the runtime says {state}")
    expect(w.given()["annotations"]["io.kubernetes.cri.sandbox-name"] == shown["status"]["metadata"]["name"], "its config.json")


def by_berth(w, pod, container, handler):
    shown, inside = w.c.json("inspectp", pod), w.c.json("inspect", container)["info"]
    expect(shown["status"].get("runtimeHandler", "") == handler, f"{shown['status']}")
    expect((shown["info"]["runtimeType"], inside["runtimeType"]) == ("berth", "berth"), f"{shown['info']} {inside}")
    expect(made(w, container) is None, "the OCI runtime knows it")
    expect(w.shell(container, "echo well") == "well", "it does not run")


def defaults(w, steps):
    with w.s.runtime.configured(default_runtime="oci"):
        with steps.step("default_runtime: a pod that names no handler is the OCI runtime's; `berth` is berth all the same"):
            offered = {h.get("name", ""): h["features"] for h in w.c.json("info")["runtimeHandlers"]}
            expect(offered[""] == offered["oci"], f"{offered}")
            with w.pod("") as pod:
                by_oci(w, pod[0], w.started(pod), "")
            with w.pod("berth") as pod:
                by_berth(w, pod[0], w.started(pod), "berth")
            with w.pod("oci") as pod:
                by_oci(w, pod[0], w.started(pod), "oci")
        with steps.step("default_runtime: a name that nobody has is refused all the same"):
            unknown(w)
        kept = w.pod("")
        pod = kept.__enter__()
    try:
        with steps.step("default_runtime: a pod keeps what the default was when it was made"):
            by_oci(w, pod[0], w.started(pod), "")
    finally:
        kept.__exit__(None, None, None)
    with steps.step("without the key the default is berth"):
        with w.pod("") as pod:
            by_berth(w, pod[0], w.started(pod), "")
        unknown(w)
    missing(w, steps)


def unknown(w):
    before = w.c("pods", "-q")
    error = w.c.fails("runp", "--runtime", "nobody", w.pod_config("nobody"))
    expect(all(word in error for word in ("InvalidArgument", "runtime_handler", "nobody", "no such handler")), error)
    expect(all(name in error for name in w.s.runtime.handlers) and "berth" in error, error)
    expect(w.c("pods", "-q") == before, "something is listed")


def missing(w, steps):
    with steps.step("default_runtime: one that has no table keeps the daemon from starting, which says so"):
        path, own = os.path.join(w.place, "missing.toml"), os.path.join(w.place, "missing")
        with open(path, "w") as f:
            f.writelines(f'{key} = "{own}/{key}"\n' for key in ("socket", "root", "state", "nri_socket"))
            f.write('default_runtime = "crum"\n[runtimes.crun]\npath = "/usr/bin/crun"\n')
        for command in (["serve", "--config", path], ["config", "check", path]):
            try:
                done = subprocess.run([w.s.runtime.program(), *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      timeout=20 * w.s.factor, check=False)
            except subprocess.TimeoutExpired as late:
                raise Failure(f"{command[0]} goes on: {late.stdout}") from late
            out = done.stdout.decode()
            expect(done.returncode != 0, f"{command[0]}: {out}")
            expect(all(word in out for word in ("default_runtime", '"crum"', "no such handler", "crun, berth")), f"{command[0]}: {out}")
        expect(not os.path.exists(own), "it has made its directories")

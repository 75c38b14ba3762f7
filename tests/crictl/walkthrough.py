#!/usr/bin/env python3
"""Drives unmodified crictl through the life of a pod and checks what it prints.

    walkthrough.py [--runtime NAME]

The pod and container configurations are those of crictl's own documentation, with the log
directory moved into the test's. Every command of the main set is used: info version pull
images inspecti rmi runp pods inspectp create start ps inspect logs exec --sync update stats
statsp stop rm stopp rmp imagefsinfo.
"""

import json
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402

HERE = os.path.dirname(os.path.abspath(__file__))
IMAGE = "docker.io/busybox"            # crictl's examples; means docker.io/library/busybox:latest
FULL = "docker.io/library/busybox:latest"
HEX = re.compile(r"^[0-9a-f]{64}$")


class Crictl:
    """Runs crictl against one socket: with its default timeout of 2 s, more on a slow node."""

    def __init__(self, endpoint, factor):
        self.factor = factor
        timeout = "2s" if factor == 1 else f"{int(10 * factor)}s"
        self.base = [runtimes.tool("CRICTL"), "--config", "/dev/null", "-r", endpoint, "-i", endpoint,
                     "--timeout", timeout]

    def run(self, *arguments):
        done = subprocess.run([*self.base, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60 * self.factor, check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def __call__(self, *arguments):
        code, out, err = self.run(*arguments)
        expect(code == 0, f"crictl {' '.join(arguments)}: exit {code}: {err.strip() or out.strip()}")
        return out

    def json(self, *arguments):
        return json.loads(self(*arguments))

    def id(self, *arguments):
        out = self(*arguments).strip()
        expect(HEX.match(out), f"crictl {arguments[0]} prints no id: {out!r}")
        return out

    def fails(self, *arguments):
        code, out, err = self.run(*arguments)
        expect(code != 0, f"crictl {' '.join(arguments)} succeeds: {out.strip()}")
        return err


def written(work, name, config):
    path = os.path.join(work, name)
    with open(path, "w") as f:
        json.dump(config, f)
    return path


def example(work, name, **changes):
    """One of the example configurations, changed at its top level: a file."""
    with open(os.path.join(HERE, name)) as f:
        return written(work, name, {**json.load(f), **changes})


def about_the_runtime(c, steps, runtime):
    with steps.step("version"):
        out = c("version")
        for field in ("Version", "RuntimeName", "RuntimeVersion", "RuntimeApiVersion"):
            expect(re.search(rf"^{field}:\s+\S+", out, re.M), f"no {field} in {out!r}")
        expect(f"RuntimeName:  {runtime}" in out, f"not {runtime}: {out!r}")
        expect(re.search(r"RuntimeApiVersion:\s+v1$", out, re.M), f"API is not v1: {out!r}")
    with steps.step("info"):
        info = c.json("info")
        on = {x["type"]: x["status"] for x in info["status"]["conditions"]}
        expect(on.get("RuntimeReady") and on.get("NetworkReady"), f"conditions: {on}")
        expect("config" in info or len(info) > 1, "no verbose information beside the status")
    with steps.step("runtime-config"):
        expect(re.search(r"cgroup ?driver\W+(cgroupfs|systemd)", c("runtime-config"), re.I), c("runtime-config"))


def images(c, steps):
    with steps.step("pull", fatal=True):
        expect("Image is up to date for" in c("pull", IMAGE), "no image reference")
    with steps.step("images"):
        found = [i for i in c.json("images", "-o", "json")["images"] if FULL in i["repoTags"]]
        expect(len(found) == 1, f"{FULL} is listed {len(found)} times")
        expect(re.match(r"sha256:[0-9a-f]{64}$", found[0]["id"]), f"id {found[0]['id']!r}")
        expect(found[0]["repoDigests"][0].startswith("docker.io/library/busybox@sha256:"), str(found[0]))
        expect(int(found[0]["size"]) > 100000, f"size {found[0]['size']}")
        expect(re.search(r"docker.io/library/busybox\s+latest\s+[0-9a-f]{13}\s", c("images")), "not in the table")
        expect(c("images", "-q", IMAGE).strip() == found[0]["id"], "images -q")
    with steps.step("inspecti"):
        status = c.json("inspecti", IMAGE)
        expect(FULL in status["status"]["repoTags"], str(status["status"]))
        config = status["info"]["imageSpec"]["config"]
        expect(config["Cmd"] == ["sh"], f"image config {config}")
        c.fails("inspecti", "docker.io/library/nosuch:1")
    with steps.step("pull what does not exist"):
        error = c.fails("pull", "docker.io/library/nosuch:1")
        expect("NotFound" in error or "not found" in error, error)


def sandbox(c, steps, work, ids):
    config = example(work, "podsandbox-config.json", log_directory=os.path.join(work, "logs"))
    with steps.step("runp", fatal=True):
        pod = c.id("runp", config)
        ids.add(pod)
    with steps.step("runp again is the same pod or an error"):
        code, out, _ = c.run("runp", config)
        expect(code != 0 or out.strip() == pod, f"a second pod: {out}")
    with steps.step("pods"):
        found = c.json("pods", "-o", "json", "--name", "busybox-sandbox")["items"]
        expect([p["id"] for p in found] == [pod] and found[0]["state"] == "SANDBOX_READY", str(found))
        expect(found[0]["metadata"]["uid"] == "hdishd83djaidwnduwk28bcsb", str(found[0]["metadata"]))
        expect(re.search(rf"^{pod[:13]}\s+.*\sReady\s+busybox-sandbox\s+default\s+1\s", c("pods"), re.M), "table")
        expect(not c("pods", "-q", "--state", "notready").strip(), "listed as not ready")
    with steps.step("inspectp"):
        status = c.json("inspectp", pod)["status"]
        expect(status["state"] == "SANDBOX_READY" and status["metadata"]["attempt"] == 1, str(status))
        expect(re.match(r"\d+\.\d+\.\d+\.\d+$", status["network"]["ip"]), f"ip {status['network']}")
        expect(c.json("inspectp", pod[:10])["status"]["id"] == pod, "not found by a prefix of its id")
    return pod, config


def running(c, steps, work, pod, pod_config, ids):
    config = example(work, "container-config.json")
    with steps.step("create", fatal=True):
        container = c.id("create", pod, config, pod_config)
        ids.add(container)
        expect(c.json("inspect", container)["status"]["state"] == "CONTAINER_CREATED", "state")
    with steps.step("start", fatal=True):
        expect(c("start", container).strip() == container, "does not print the id")
    with steps.step("ps"):
        found = c.json("ps", "-o", "json", "--pod", pod)["containers"]
        expect([x["id"] for x in found] == [container] and found[0]["state"] == "CONTAINER_RUNNING", str(found))
        expect(re.search(rf"^{container[:13]}\s.*\sRunning\s+busybox\s+0\s+{pod[:13]}\s", c("ps"), re.M), "table")
    with steps.step("inspect"):
        inspected = c.json("inspect", container)
        status = inspected["status"]
        expect(status["state"] == "CONTAINER_RUNNING" and status["metadata"]["name"] == "busybox", str(status))
        expect(status["image"]["image"] and status["imageRef"], "no image")
        expect(status["logPath"] == os.path.join(work, "logs", "busybox.0.log"), status["logPath"])
        expect(os.path.isdir(f"/proc/{inspected['info']['pid']}"), f"pid {inspected['info']['pid']}")
        expect(inspected["info"]["runtimeSpec"]["process"]["args"] == ["top"], "runtimeSpec")
    with steps.step("logs"):
        wait_for("top's output", lambda: "Load average" in c("logs", container), 10 * c.factor)
        expect(len(c("logs", "--tail", "2", container).splitlines()) == 2, "--tail 2")
    with steps.step("exec --sync"):
        expect(c("exec", "--sync", container, "echo", "hello").strip() == "hello", "output")
        expect(c("exec", "--sync", container, "pgrep", "top").strip(), "does not see the container's own process")
        code, _, err = c.run("exec", "--sync", container, "sh", "-c", "echo oops >&2; exit 7")
        expect(code != 0 and "oops" in err and "7" in err, f"exit {code}, stderr {err!r}")
        code, _, err = c.run("exec", "--sync", "--timeout", "1", container, "sleep", "30")
        expect(code != 0 and "DeadlineExceeded" in err, f"time-out: exit {code}, {err!r}")
    return container


def resources(c, steps, container, pod, runtime):
    with steps.step("update"):
        c("update", "--memory", str(64 << 20), "--cpu-quota", "20000", "--cpu-period", "100000", container)
        out = c("exec", "--sync", container, "sh", "-c",
                "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes; "
                "cat /sys/fs/cgroup/cpu.max 2>/dev/null || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        expect(out.split()[:2] == [str(64 << 20), "20000"], f"the kernel says {out.split()}")
        linux = c.json("inspect", container)["status"]["resources"]["linux"]
        expect(int(linux["memoryLimitInBytes"]) == 64 << 20, f"status says {linux}")
    with steps.step("stats"):
        def measured():
            s = c.json("stats", "-o", "json", "--id", container)["stats"][0]
            return s if int(s["cpu"]["usageCoreNanoSeconds"]["value"]) > 0 and \
                int(s["memory"]["workingSetBytes"]["value"]) > 0 else None
        s = wait_for("CPU and memory figures", measured, 20 * c.factor, 0.5)
        expect(s["attributes"]["metadata"]["name"] == "busybox", str(s["attributes"]))
        expect(int(s["writableLayer"]["usedBytes"]["value"]) >= 0, str(s.get("writableLayer")))
        expect(re.search(rf"^{container[:13]}\s", c("stats", "--id", container), re.M), "table")
    with steps.step("imagefsinfo"):
        def counted():
            fs = c.json("imagefsinfo")["status"]["imageFilesystems"][0]
            return fs if int(fs["usedBytes"]["value"]) > 100000 and int(fs["inodesUsed"]["value"]) > 0 else None
        fs = wait_for("the image filesystem's figures", counted, 20 * c.factor, 0.5)
        expect(os.path.isdir(fs["fsId"]["mountpoint"]), f"mountpoint {fs['fsId']}")
    if runtime == "containerd":
        return  # it has no figures for a pod without a cgroup parent, as in crictl's example
    with steps.step("statsp"):
        s = wait_for("the pod's figures",
                     lambda: c.json("statsp", "-o", "json", "--id", pod)["stats"], 20 * c.factor, 0.5)[0]
        expect(s["attributes"]["id"] == pod and s["linux"]["cpu"] and s["linux"]["memory"], str(s)[:300])


def second_container(c, steps, work, pod, pod_config, ids):
    """One that writes, fails, and is started by `crictl create` from the same pod."""
    script = "for i in $(seq 1 200); do echo line $i; done; echo last >&2; exit 3"
    config = example(work, "container-config.json", metadata={"name": "writer", "attempt": 2},
                     command=["sh", "-c", script], log_path="writer.2.log")
    with steps.step("create and start one that exits 3", fatal=True):
        container = c.id("create", pod, config, pod_config)
        ids.add(container)
        c("start", container)
        def exited():
            status = c.json("inspect", container)["status"]
            return status if status["state"] == "CONTAINER_EXITED" else None
        status = wait_for("its end", exited, 10 * c.factor)
        expect(status["exitCode"] == 3 and status["reason"] == "Error", f"{status['exitCode']} {status['reason']}")
        expect(status["createdAt"] <= status["startedAt"] <= status["finishedAt"], "times out of order")
    with steps.step("its whole log"):
        code, out, err = c.run("logs", container)
        expect(code == 0 and out.splitlines() == [f"line {i}" for i in range(1, 201)], f"stdout {out[-60:]!r}")
        expect(err.strip() == "last", f"stderr {err!r}")
        with open(os.path.join(work, "logs", "writer.2.log")) as f:
            bad = [l for l in f if not re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\S+ std(out|err) F .*\n$", l)]
        expect(not bad, f"not in the CRI log format: {bad[:1]}")
    with steps.step("ps -a, states and labels"):
        expect(c("ps", "-q", "--state", "exited").split() == [container], "ps --state exited")
        expect(set(c("ps", "-a", "-q", "--pod", pod).split()) >= {container}, "ps -a")
        expect(not c("ps", "-a", "-q", "--label", "a=b").split(), "a label that nothing has")
    return container


def clean_end(c, steps, pod, container, exited):
    with steps.step("rm refuses a running container"):
        c.fails("rm", container)
    with steps.step("stop"):
        c("stop", container)
        status = c.json("inspect", container)["status"]
        expect(status["state"] == "CONTAINER_EXITED", status["state"])
        expect(status["exitCode"] in (0, 137, 143), f"exit code {status['exitCode']}")
        c("stop", container)  # again, without an error
    with steps.step("rm"):
        c("rm", container)
        c("rm", exited)
        expect(not c("ps", "-a", "-q").strip(), "still listed")
        c.fails("inspect", container)
    with steps.step("stopp"):
        c("stopp", pod)
        expect(c.json("inspectp", pod)["status"]["state"] == "SANDBOX_NOTREADY", "state")
        c("stopp", pod)
    with steps.step("rmp"):
        c("rmp", pod)
        expect(not c("pods", "-q").strip(), "still listed")
        c.fails("inspectp", pod)
    with steps.step("rmi"):
        c("rmi", IMAGE)
        expect(FULL not in c("images", "-o", "json"), "still listed")
        c.fails("rmi", IMAGE)


def example_yaml(c, steps, work, ids):
    """`crictl run`: the documentation's YAML form in one command, ended by force."""
    pod = example(work, "podsandbox-config.json", log_directory=os.path.join(work, "logs"))
    with steps.step("run, then rmp --force"):
        container = c.id("run", "--no-pull=false", os.path.join(HERE, "container-config.yaml"), pod)
        pods = c("pods", "-q").split()
        ids.update([container, *pods])
        expect(c.json("inspect", container)["status"]["state"] == "CONTAINER_RUNNING", "state")
        c("rmp", "--force", *pods)
        expect(not c("ps", "-a", "-q").strip() and not c("pods", "-q").strip(), "something is left")
        c("rmi", IMAGE)


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps("crictl")
    with options.session(args, steps) as s:
        os.makedirs(os.path.join(s.work, "logs"))
        c, ids = Crictl(s.endpoint, s.factor), s.runtime.ids
        about_the_runtime(c, steps, s.runtime.name)
        images(c, steps)
        pod, config = sandbox(c, steps, s.work, ids)
        container = running(c, steps, s.work, pod, config, ids)
        resources(c, steps, container, pod, s.runtime.name)
        exited = second_container(c, steps, s.work, pod, config, ids)
        clean_end(c, steps, pod, container, exited)
        example_yaml(c, steps, s.work, ids)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The real kubelet runs static pods on a runtime and tells the truth about them.

    run.py [--runtime NAME] [--gate EventedPLEG]...

One pod with an init container, two containers that share an emptyDir, an HTTP readiness probe,
an exec liveness probe, limits, a container that exits 3 after a termination message and is
restarted with back-off, and one that is OOM-killed; a plain pod that becomes Ready; one that is
confined in every way (secure.py); and one for the endpoints of kubelet's own server (streams.py).
Deleting their manifests removes everything. No error of kubelet's log may speak of the runtime.
"""

import json
import os
import re
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
from harness import isolate, options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
import kubelet as k  # noqa: E402
from secure import secure_pod  # noqa: E402
from series import same_series  # noqa: E402
from streams import streams as streaming_endpoints  # noqa: E402


def crictl(s, *arguments):
    done = subprocess.run([runtimes.tool("CRICTL"), "--config", "/dev/null", "-r", s.endpoint, "-i", s.endpoint,
                           "--timeout", f"{int(10 * s.factor)}s", *arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
    expect(done.returncode == 0, f"crictl {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def container_status(kubelet, pod, name, kind="containerStatuses"):
    found = [c for c in kubelet.pods()[pod]["status"].get(kind, []) if c["name"] == name]
    expect(found, f"/pods has no status of {pod}/{name}")
    return found[0]


def conditions(kubelet, pod):
    return {c["type"]: c["status"] for c in kubelet.pods()[pod]["status"].get("conditions", [])}


def note_ids(s):
    s.runtime.ids.update(crictl(s, "pods", "-q").split() + crictl(s, "ps", "-a", "-q").split())


def comes_up(s, kubelet, steps):
    with steps.step("kubelet starts and is healthy", fatal=True):
        kubelet.start()
        wait_for("/healthz", kubelet.healthy, 60 * s.factor)
    with steps.step("the pod's init container ends, then the others start", fatal=True):
        kubelet.add(HERE + "/pods/app.yaml")
        kubelet.add(HERE + "/pods/plain.yaml")

        def started():
            init = container_status(kubelet, "app", "prepare", "initContainerStatuses")
            expect(init["state"]["terminated"]["reason"] == "Completed", str(init["state"]))
            return all("running" in container_status(kubelet, "app", n)["state"] for n in ("web", "writer"))
        wait_for("init container, web and writer", started, 90 * s.factor, 0.5)
        note_ids(s)
    with steps.step("the pod has an address and a start time"):
        status = kubelet.pods()["app"]["status"]
        expect(status["phase"] == "Running" and re.match(r"\d+\.\d+\.\d+\.\d+$", status["podIP"]), str(status)[:300])
        for name in ("web", "writer"):
            c = container_status(kubelet, "app", name)
            expect(re.match(r"\w+://[0-9a-f]{64}$", c["containerID"]) and "@sha256:" in c["imageID"] + "@", str(c))
            expect(c["state"]["running"]["startedAt"], str(c))


def probes(s, kubelet, steps):
    def in_writer(script):
        container = container_status(kubelet, "app", "writer")["containerID"].partition("://")[2]
        return crictl(s, "exec", "--sync", container, "sh", "-c", script)

    with steps.step("readiness: not ready before, ready after its page is there"):
        expect(not container_status(kubelet, "app", "web")["ready"], "ready although the probe's page is missing")
        expect(conditions(kubelet, "app")["ContainersReady"] == "False", "ContainersReady")
        in_writer("echo yes > /shared/ready")
        wait_for("web is ready", lambda: container_status(kubelet, "app", "web")["ready"], 30 * s.factor, 0.5)
    with steps.step("the two containers share the emptyDir"):
        expect(in_writer("cat /shared/index.html; cat /shared/count").split()[0] == "prepared", "index.html")
        web = container_status(kubelet, "app", "web")["containerID"].partition("://")[2]
        expect(int(crictl(s, "exec", "--sync", web, "cat", "/shared/count")) >= 1, "count")
        expect("tmpfs" in crictl(s, "exec", "--sync", web, "grep", " /memory ", "/proc/mounts"), "medium: Memory")
    with steps.step("liveness: a failing exec probe restarts the container"):
        before = container_status(kubelet, "app", "writer")
        expect(before["restartCount"] == 0 and before["ready"], f"restarted before: {before}")
        in_writer("touch /shared/sick")
        web = container_status(kubelet, "app", "web")["containerID"].partition("://")[2]
        wait_for("the restart", lambda: container_status(kubelet, "app", "writer")["restartCount"] == 1,
                 60 * s.factor, 0.5)
        crictl(s, "exec", "--sync", web, "rm", "-f", "/shared/sick")
        wait_for("writer runs again", lambda: "running" in container_status(kubelet, "app", "writer")["state"],
                 60 * s.factor, 0.5)
        last = container_status(kubelet, "app", "writer")["lastState"]["terminated"]
        expect(last["exitCode"] in (137, 143), f"last state {last}")
    with steps.step("the plain pod is Ready in every condition"):
        def ready():
            c = conditions(kubelet, "plain")
            missing = [t for t in ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady",
                                   "PodScheduled") if c.get(t) != "True"]
            expect(not missing, f"not True: {missing} of {c}")
            return True
        wait_for("Ready", ready, 60 * s.factor, 0.5)


def failures(s, kubelet, steps):
    with steps.step("exit 3: message, reason and back-off"):
        def backed_off():
            c = container_status(kubelet, "app", "failing")
            expect(c["restartCount"] >= 2, f"restarted {c['restartCount']} times")
            expect(c["state"].get("waiting", {}).get("reason") == "CrashLoopBackOff", str(c["state"]))
            return c
        c = wait_for("two restarts and CrashLoopBackOff", backed_off, 90 * s.factor, 0.5)
        last = c["lastState"]["terminated"]
        expect(last["exitCode"] == 3 and last["reason"] == "Error", str(last))
        expect(last["message"].strip() == "failed on purpose", f"termination message {last.get('message')!r}")
        expect(last["startedAt"] <= last["finishedAt"], str(last))
    with steps.step("OOM kill: 137, OOMKilled"):
        def killed():
            c = container_status(kubelet, "app", "hungry")
            return c["lastState"].get("terminated") or c["state"].get("terminated")
        last = wait_for("its end", killed, 60 * s.factor, 0.5)
        expect(last["exitCode"] == 137 and last["reason"] == "OOMKilled", str(last))
    with steps.step("limits are in the kernel"):
        web = container_status(kubelet, "app", "web")["containerID"].partition("://")[2]
        out = crictl(s, "exec", "--sync", web, "sh", "-c", "cd /sys/fs/cgroup; cat memory.max cpu.max 2>/dev/null || "
                     "cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us")
        expect(out.split() == [str(64 << 20), "50000", "100000"], f"memory, quota, period: {out.split()}")
    note_ids(s)


def summary(s, kubelet, steps):
    with steps.step("/stats/summary has CPU, memory, rootfs and network"):
        def figures():
            pods = {p["podRef"]["name"]: p for p in json.loads(kubelet.get("/stats/summary"))["pods"]}
            pod = pods["app-node1"]
            # From the CRI the default interface stands alone, and the list has only the others.
            received = max(i["rxBytes"] for i in [pod["network"], *pod["network"].get("interfaces", [])])
            expect(received > 0, f"network {pod['network']}")
            expect(pod["cpu"]["usageCoreNanoSeconds"] > 0 and pod["memory"]["workingSetBytes"] > 0, "the pod's own")
            containers = {c["name"]: c for c in pod["containers"]}
            for name in ("web", "writer"):
                c = containers[name]
                expect(c["cpu"]["usageCoreNanoSeconds"] > 0 and c["cpu"]["usageNanoCores"] >= 0, f"{name}: {c['cpu']}")
                expect(c["memory"]["workingSetBytes"] > 0, f"{name}: {c['memory']}")
                expect(c["rootfs"]["usedBytes"] >= 0 and c["rootfs"]["capacityBytes"] > 0, f"{name}: {c['rootfs']}")
                expect(c["logs"]["usedBytes"] >= 0, f"{name}: {c['logs']}")
            return True
        wait_for("all figures", figures, 60 * s.factor, 1)


def cadvisor(s, kubelet, steps):
    wanted = [(m, c) for c in ("web", "writer") for m in
              ("container_cpu_usage_seconds_total", "container_memory_working_set_bytes", "container_start_time_seconds",
               "container_spec_memory_limit_bytes")]
    # (Figures of a container's file system come by the CRI, in /stats/summary; cAdvisor has none
    # of a runtime that it reaches as it reaches containerd.)
    with steps.step("/metrics/cadvisor has CPU, memory and network"):
        def figures():
            lines = kubelet.get("/metrics/cadvisor").splitlines()
            mine = [l for l in lines if 'pod="app-node1"' in l and 'namespace="default"' in l]
            missing = [f"{m}{{{c}}}" for m, c in wanted
                       if not any(l.startswith(m + "{") and f'container="{c}"' in l for l in mine)]
            # "name{labels} value timestamp"
            received = [float(l.rpartition("} ")[2].split()[0]) for l in mine
                        if l.startswith("container_network_receive_bytes_total{")]
            if not any(v > 0 for v in received):
                missing.append("container_network_receive_bytes_total > 0")
            expect(not missing, f"missing: {missing}")
            return True
        wait_for("all metrics", figures, 60 * s.factor, 1)
    with steps.step("container names, images and ids are in the metrics"):
        line = next(l for l in kubelet.get("/metrics/cadvisor").splitlines()
                    if l.startswith("container_memory_working_set_bytes{") and 'container="web"' in l)
        expect("busybox" in line and re.search(r'name="[0-9a-f]{64}"', line), line)


# What kubelet calls with a feature gate on that it does not call without.
CALLS = {"EventedPLEG": ("GetContainerEvents",),
         "PodAndContainerStatsFromCRI": ("ListPodSandboxStats", "ListMetricDescriptors", "ListPodSandboxMetrics")}


def gates(s, kubelet, steps):
    for gate in kubelet.gates if s.runtime.name == "berth" else ():  # containerd's log names no calls
        with steps.step(f"{gate} was used"):
            expect(gate in CALLS, "no call is known that tells")
            with open(s.runtime.log, errors="replace") as f:
                log = f.read()
            missing = [call for call in CALLS[gate] if f"RuntimeService/{call}" not in log]
            expect(not missing, f"kubelet never called {missing}")


def secure(s, kubelet, steps):
    secure_pod(s, kubelet, steps, crictl, container_status, note_ids)


def streams(s, kubelet, steps):
    streaming_endpoints(s, kubelet, steps, container_status, note_ids)


def same(s, kubelet, steps):
    same_series(s, kubelet, steps)


def goes_away(s, kubelet, steps):
    note_ids(s)
    with steps.step("healthy, both CRI conditions true"):
        expect(kubelet.healthy(), "/healthz")
        info = json.loads(crictl(s, "info"))["status"]["conditions"]
        on = {c["type"]: c["status"] for c in info}
        expect(on["RuntimeReady"] and on["NetworkReady"], str(on))
    with steps.step("deleting the manifests removes everything"):
        start = time.monotonic()
        kubelet.remove("app")
        kubelet.remove("plain")
        # kubelet collects dead sandboxes once a minute, whatever the machine's speed
        wait_for("/pods is empty", lambda: not kubelet.pods(), 60 * s.factor)

        def nothing():
            left = crictl(s, "pods", "-q").split() + crictl(s, "ps", "-a", "-q").split()
            left += [c for c in k.cgroups_below(kubelet.cgroup) if re.search(r"/pod[0-9a-f]", c)]
            left += os.listdir(kubelet.root + "/pods") + os.listdir(kubelet.work + "/podlogs")
            expect(not left, f"left: {left[:8]}")
            return True
        wait_for("nothing of them is left", nothing, 130 + 60 * s.factor, 1)
        print(f"      (after {time.monotonic() - start:.0f} s)")
    with steps.step("no error of kubelet's log speaks of the runtime"):
        bad, explained = kubelet.errors()
        for reason, count in explained.items():
            print(f"      {count} in order: {reason}")
        expect(not bad, f"{len(bad)} lines:\n" + "\n".join(bad[:15]))


def private_directories():
    """kubelet writes into a few fixed places: the test has its own."""
    for path in ("/var/lib/kubelet", "/var/log"):
        os.makedirs(path, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "kubelet-test", path], check=True)
    os.makedirs("/var/log/containers")


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--gate", action="append", default=[], metavar="NAME",
                        help="a feature gate of kubelet to turn on; may be repeated")
    args = parser.parse_args()
    if not args.host and isolate.MARK not in os.environ:
        isolate.enter()
    if not args.host:
        private_directories()
    steps = Steps("kubelet")
    with options.session(args, steps) as s:
        steps.keeper = None  # the pods are kubelet's, which makes them when it likes
        kubelet = k.Kubelet(s.work, s.runtime, args.gate)
        try:
            for part in (comes_up, probes, failures, summary, cadvisor, gates, same, secure, streams, goes_away):
                part(s, kubelet, steps)
        finally:
            kubelet.stop()
            if steps.failed:
                print("--- end of kubelet's log:\n" + "\n".join(kubelet.log_text().splitlines()[-25:]))
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""CDI devices, NRI plugins and OCI hooks, seen from both ends: by crictl, and by a plugin made of the official stub.

    run.py [--runtime NAME] [--only PATTERN]

The plugin (hack/tools/nri) writes down every event and answers by a script. Asserted: order, number and content of
the events; every adjustment, read from inside the container; failures and their undoing; plugins that hang, die,
disagree; joining under load; a restart of the daemon; plugins that the daemon starts itself.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import oci, options, runtimes  # noqa: E402
from harness.report import Failure, Steps, expect, wait_for  # noqa: E402
from edges import edges  # noqa: E402
from external import devices, tuned, with_runc  # noqa: E402
from hooks import hooks  # noqa: E402
from limits import V2, block_io, limit, rdt, resources  # noqa: E402
from network import joined, network_devices  # noqa: E402
from walkthrough import written  # noqa: E402
from world import IMAGE, LIFE, Plugin, World, consistent, plugin  # noqa: E402


def life(w, steps):
    with steps.step("every event of a life, once and in order"), plugin(w) as p:
        pod = w.pod("alive")
        container = w.started(pod)
        w.c("stop", "-t", "0", container)
        w.c("rm", container)
        w.c("stopp", pod)
        w.c("stopp", pod)
        w.c("rmp", pod)
        expect(p.about(pod, container) == LIFE, f"{p.about(pod, container)}")
        run, create, stop = (p.events(name)[0] for name in ("RunPodSandbox", "CreateContainer", "StopContainer"))
        got = run["pod"]
        expect((got["name"], got["uid"], got["namespace"]) == ("alive", "uid-alive", "nri"), str(got))
        expect(got["labels"] == {"app": "alive"} and got["annotations"] == {"note": "of alive"}, str(got))
        expect(got["ips"] and got["pid"] and got["linux"]["cgroup_parent"], str(got))
        expect(any(n["type"] == "network" and n["path"] for n in got["linux"]["namespaces"]), str(got))
        got = create["container"]
        expect((got["name"], got["pod_sandbox_id"], got["state"]) == ("main", pod, "CONTAINER_CREATED"), str(got))
        expect(got["labels"] == {"tier": "main"} and got["annotations"]["own"] == "main", str(got))
        expect(got["args"] == ["sleep", "3600"] and any(e.startswith("PATH=") for e in got["env"]), str(got))
        expect({"/proc", "/etc/hosts"} <= {m["destination"] for m in got["mounts"]}, str(got["mounts"]))
        got = stop["container"]
        expect((got["state"], got["exit_code"]) == ("CONTAINER_STOPPED", 137) and got["finished_at"], str(got))
        start = p.events("PostStartContainer")[0]["container"]
        expect(start["state"] == "CONTAINER_RUNNING" and start["pid"], str(start))
    with steps.step("a container that exits by itself"), plugin(w) as p:
        pod = w.pod()
        container = w.started(pod, command=("sh", "-c", "exit 42"))
        wait_for("StopContainer", lambda: p.events("StopContainer"), 10 * w.factor)
        w.c("stop", container)
        w.remove(pod)
        expect(p.about(container) == LIFE[1:7], str(p.about(container)))
        expect(p.events("StopContainer")[0]["container"]["exit_code"] == 42, str(p.events("StopContainer")))
        # Its pod went with the container in it: containers end first.
        expect(p.about(pod, container)[-4:] == ["StopContainer", "StopPodSandbox", "RemoveContainer",
                                                "RemovePodSandbox"], str(p.about(pod, container)))
    with steps.step("stop of a pod: containers are dead, its network is still there"), plugin(w) as p:
        p.script({"StopPodSandbox": {"ls": "ls /proc/self/ns/net >/dev/null; ip -o link | wc -l"}})
        pod = w.pod()
        one, other = w.started(pod, "one"), w.create(pod, "other")
        w.remove(pod)
        events = p.about(pod, one, other)
        expect(events.index("StopPodSandbox") > max(i for i, e in enumerate(events) if e == "StopContainer"), str(events))
        stop = p.events("StopPodSandbox")[0]["pod"]
        expect(stop["pid"] and stop["ips"], f"its pause is gone already: {stop}")
        expect(p.about(other) == ["CreateContainer", "PostCreateContainer", "StopContainer", "RemoveContainer"],
               str(p.about(other)))


ADJUST = {
    "annotations": {"added": "by-plugin", "-own": ""},
    "env": [{"key": "ADDED", "value": "x=y z"}, {"key": "-GONE"}, {"key": "KEPT", "value": "changed"}],
    "args": ["sleep", "7200"],
    "mounts": [{"destination": "/added", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "ro"]},
               {"destination": "-/etc/hostname"}],
    "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 99, "soft": 77}],
    "linux": {
        "devices": [{"path": "/dev/null2", "type": "c", "major": 1, "minor": 3, "file_mode": {"value": 0o640}}],
        "oom_score_adj": {"value": 321},
        "sysctl": {"net.core.somaxconn": "77"},
        "namespaces": [{"type": "pid"}],
        "io_priority": {"class": "IOPRIO_CLASS_BE", "priority": 7},
        "scheduler": {"policy": "SCHED_BATCH", "nice": 5},
        "seccomp_policy": {"default_action": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errno_ret": {"value": 1}}]},
        "resources": {"memory": {"limit": {"value": 64 << 20}}, "cpu": {"shares": {"value": 512}, "cpus": "0"},
                      "pids": {"limit": 55}},
    },
}


def adjustments(w, steps):
    with plugin(w, script={"CreateContainer": {"adjust": ADJUST}}) as p:
        with steps.step("CreateContainer is adjusted", fatal=True):
            pod = w.pod("adjusted")
            container = w.started(pod, envs=[{"key": "GONE", "value": "1"}, {"key": "KEPT", "value": "1"}])
        with steps.step("environment and arguments"):
            env = w.shell(container, "tr '\\0' '\\n' < /proc/1/environ").splitlines()
            expect("ADDED=x=y z" in env and "KEPT=changed" in env, str(env))
            expect(not any(e.startswith("GONE=") for e in env), str(env))
            expect(w.shell(container, "tr '\\0' ' ' < /proc/1/cmdline") == "sleep 7200", "arguments")
        with steps.step("mounts, limits of the process, priorities"):
            mounts = w.shell(container, "cat /proc/1/mounts").splitlines()
            expect(any(m.split()[1:3] == ["/added", "tmpfs"] and "ro" in m.split()[3].split(",") for m in mounts), str(mounts))
            expect(not any(m.split()[1] == "/etc/hostname" for m in mounts), str(mounts))
            limits = w.shell(container, "cat /proc/1/limits")
            expect(re.search(r"Max open files\s+77\s+99\s", limits), limits)
            expect(w.shell(container, "cat /proc/1/oom_score_adj") == "321", "oom_score_adj")
            stat = w.shell(container, "cat /proc/1/stat").rpartition(")")[2].split()
            expect((stat[16], stat[38]) == ("5", "3"), f"nice and policy: {stat}")
            expect("best-effort: prio 7" in w.shell(container, "ionice -p 1"), w.shell(container, "ionice -p 1"))
        with steps.step("devices, sysctl, namespaces, seccomp"):
            listed = w.shell(container, "ls -l /dev/null2")
            expect(listed.startswith("crw-r-----") and re.search(r"1,\s+3 ", listed), listed)
            w.shell(container, "echo x > /dev/null2")
            expect(w.shell(container, "cat /proc/sys/net/core/somaxconn") == "77", "sysctl")
            expect(w.shell(container, "readlink /proc/1/exe").endswith("busybox") or
                   "sleep" in w.shell(container, "readlink /proc/1/exe"), "pid 1 is not its own")
            code, _, err = w.c.run("exec", "--sync", container, "mkdir", "/tmp/x")
            expect(code != 0, f"mkdir works in spite of the filter {err}")
        with steps.step("cgroup limits"):
            expect(limit(w, container, "memory/memory.limit_in_bytes", "memory.max") == str(64 << 20), "memory")
            expect(limit(w, container, "cpuset/cpuset.cpus", "cpuset.cpus") == "0", "cpus")
            expect(limit(w, container, "pids/pids.max", "pids.max") == "55", "pids")
            # 59: the weight that the shares 512 are, quadratic in their logarithm.
            expect(limit(w, container, "cpu/cpu.shares", "cpu.weight") == ("59" if V2 else "512"), "shares")
        with steps.step("what is shown afterwards"):
            seen = p.events("PostCreateContainer")[-1]["container"]
            expect(seen["args"] == ["sleep", "7200"] and seen["annotations"].get("added") == "by-plugin", str(seen))
            expect("own" not in seen["annotations"], str(seen["annotations"]))
            info = w.c.json("inspect", container)
            expect(info["info"]["runtimeSpec"]["annotations"]["added"] == "by-plugin", "inspect")
            expect(info["status"]["annotations"] == {"own": "main"}, "CRI shows what CRI gave")
            expect(info["status"]["resources"]["linux"]["memoryLimitInBytes"] == str(64 << 20), str(info["status"]["resources"]))
            w.remove(pod)
    with steps.step("a cgroup of its own"):
        path = f"{w.s.runtime.cgroup_root}/elsewhere/chosen"
        with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"cgroups_path": path}}}}):
            pod = w.pod()
            container = w.started(pod)
            pid = w.c.json("inspect", container)["info"]["pid"]
            with open(f"/proc/{pid}/cgroup") as f:
                expect(all(line.strip().endswith("/elsewhere/chosen") for line in f
                           if V2 or ":memory:" in line), f"cgroup of {pid}")
            w.remove(pod)
    joined(w, steps)
    network_devices(w, steps)
    with steps.step("what berth cannot do is refused by name"):
        pod = w.pod()
        before = w.listed()
        for adjust, words in (
                ({"linux": {"net_devices": {"none7": {"name": "x"}}}}, ("netDevices", "none7", "not on the node")),
                ({"linux": {"net_devices": {"none7": {"name": "x/y"}}}}, ("netDevices[none7]", "x/y")),
                ({"linux": {"namespaces": [{"type": "network", "path": "x"}]}}, ("namespaces[network]", "absolute")),
                ({"linux": {"namespaces": [{"type": "ipc", "path": "/no/such"}]}}, ("/no/such",)),
                ({"linux": {"namespaces": [{"type": "ipc", "path": "/proc/self/ns/uts"}]}}, ("ipc", "/proc/self/ns/uts")),
                ({"linux": {"sysctl": {"vm.swappiness": "1"}}}, ("sysctl", "vm.swappiness")),
                ({"linux": {"cgroups_path": w.s.runtime.cgroup_root}}, ("cgroups_path",)),
                ({"mounts": [{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}]},
                 ("mounts[/x]", "/no/such")),
                ({"CDI_devices": [{"name": "vendor.com/gpu=9"}]}, ("vendor.com/gpu=9",))):
            with plugin(w, script={"CreateContainer": {"adjust": adjust}}) as p:
                error = w.c.fails("create", pod, w.config("refused"), w.any)
                expect(all(word in error for word in words), f"{words}: {error}")
                gone = [e["event"] for e in p.events() if e.get("container", {}).get("name") == "refused" and e["event"] in LIFE]
                expect(gone == ["CreateContainer", "StopContainer", "RemoveContainer"], str(gone))
        expect(w.listed() == before, "something is listed")
        w.c("start", w.create(pod, "refused"))
        w.remove(pod)


def failures(w, steps):
    with steps.step("RunPodSandbox fails: nothing is left, the retry works"), plugin(w) as p:
        before = w.listed()
        p.script({"RunPodSandbox": {"error": "no pods today"}})
        for _ in range(3):
            error = w.c.fails("runp", w.pod_config("twice"))
            expect("no pods today" in error and "10-test" in error, error)
            expect(w.listed() == before, "listed")
        expect([e["event"] for e in p.events()][-3:] == ["RunPodSandbox"] * 3, "who refuses is not told of the end")
        p.script({})
        w.remove(w.pod("twice"))
    with steps.step("CreateContainer fails: nothing is left, the retry works"), plugin(w) as p:
        pod = w.pod()
        before = w.listed()
        p.script({"CreateContainer": {"error": "no room"}})
        for _ in range(3):
            error = w.c.fails("create", pod, w.config("retried"), w.any)
            expect("no room" in error, error)
            expect(w.listed() == before, "listed")
        expect(not p.events("StopContainer"), "who refuses is not told of the end")
        p.script({})
        w.started(pod, "retried")
        w.remove(pod)
    with steps.step("StartContainer fails"), plugin(w, script={"StartContainer": {"error": "not now"}}) as p:
        pod = w.pod()
        container = w.create(pod)
        expect("not now" in w.c.fails("start", container), "the error")
        status = w.c.json("inspect", container)["status"]
        expect((status["state"], status["reason"]) == ("CONTAINER_EXITED", "StartError"), str(status))
        w.c("rm", container)
        p.script({})
        w.started(pod, "another")
        w.remove(pod)
    with steps.step("errors about ends change nothing"):
        script = {e: {"error": "whatever"} for e in LIFE if "Stop" in e or "Remove" in e or "Post" in e}
        with plugin(w, script=script) as p:
            pod = w.pod()
            container = w.started(pod)
            w.c("stop", "-t", "0", container)
            w.c("rm", container)
            w.remove(pod)
            expect(p.about(pod, container) == LIFE, str(p.about(pod, container)))
    # A slow node gets time to look.
    with steps.step("nothing is listed while a hook is in progress"), \
            w.s.runtime.configured(nri_request_timeout=int(2000 * w.factor)), plugin(w) as p:
        for event, command in (("RunPodSandbox", None), ("CreateContainer", "create")):
            pod = w.pod() if command else None
            before = w.listed()
            p.script({event: {"delay_ms": int(1000 * w.factor)}})
            count = len(p.events(event))
            done = []
            work = threading.Thread(target=lambda: done.append(
                w.create(pod) if command else w.pod()))  # noqa: B023
            work.start()
            wait_for("the hook", lambda: len(p.events(event)) > count, 10 * w.factor, 0.02)  # noqa: B023
            answers, looks = len(p.events("Answers")), 0
            while work.is_alive():
                seen = w.listed()
                if len(p.events("Answers")) == answers:
                    looks += 1
                    expect(seen == before, f"listed meanwhile: {event}")
                work.join(0.01)
            expect(looks, "the hook was over too soon")
            expect(done and w.listed() != before, "not listed afterwards")
            p.script({})
            w.remove(pod or done[0])


def troubles(w, steps):
    with steps.step("a plugin that hangs is closed, the request goes on, it may come back"), plugin(w) as p:
        p.script({"RunPodSandbox": {"delay_ms": 4000}})
        pod = w.pod()
        wait_for("its second coming", lambda: len(p.events("Synchronize")) > 1, 10 * w.factor)
        known = [x["id"] for x in p.events("Synchronize")[-1]["pods"]]
        expect(pod in known, f"{pod} is not in the state: {known}")
        p.script({})
        p.joined(2)
        w.remove(pod)
        expect(p.about(pod).count("StopPodSandbox") == 1, str(p.about(pod)))
    with steps.step("a plugin that dies in a request does not matter"):
        # Not a validator: without one that was to judge nothing is made (edges.py).
        p = Plugin(w, once=True, script={"events": "CreateContainer", "CreateContainer": {"exit": True}}).joined()
        pod = w.pod()
        container = w.started(pod)
        p.end()
        expect(w.inside(container, "echo", "here").strip() == "here", "the container")
        w.remove(pod)
    with steps.step("two plugins: order, what the second sees, conflicts"):
        env = lambda key, value: {"CreateContainer": {"adjust": {"env": [{"key": key, "value": value}]}}}  # noqa: E731
        with plugin(w, "20", "late", script=env("B", "late")) as late, plugin(w, "10", "early", script=env("A", "early")) as early:
            pod = w.pod()
            container = w.started(pod, "both")
            seen = late.events("CreateContainer")[-1]["container"]["env"]
            expect("A=early" in seen, f"the second does not see what the first did: {seen}")
            expect("A=early" not in early.events("CreateContainer")[-1]["container"]["env"], "the first sees it")
            out = w.shell(container, "echo $A $B")
            expect(out == "early late", out)
            late.script(env("A", "mine"))
            error = w.c.fails("create", pod, w.config("torn"), w.any)
            expect("10-early" in error and "20-late" in error and "Env" in error, error)
            late.script({"CreateContainer": {"adjust": {"env": [{"key": "-A"}, {"key": "A", "value": "mine"}]}}})
            container = w.started(pod, "torn")
            expect(w.shell(container, "echo $A") == "mine", "a removal makes room")
            w.remove(pod)
    with steps.step("a validating plugin rejects"), plugin(w) as p:
        p.script({"CreateContainer": {"adjust": {"env": [{"key": "A", "value": "1"}]}},
                  "ValidateContainerAdjustment": {"error": "not like this"}})
        pod = w.pod()
        error = w.c.fails("create", pod, w.config("invalid"), w.any)
        expect("not like this" in error, error)
        event = p.events("ValidateContainerAdjustment")[-1]
        expect(event["adjust"]["env"] == [{"key": "A", "value": "1"}], str(event["adjust"]))
        owners = event["owners"]["owners"][event["container"]["id"]]["compound"]
        expect(owners["6"]["owners"] == {"A": "10-test"}, str(owners))
        w.remove(pod)


def changes(w, steps):
    memory = lambda size: {"linux": {"resources": {"memory": {"limit": {"value": size}}}}}  # noqa: E731
    read = lambda container: limit(w, container, "memory/memory.limit_in_bytes", "memory.max")  # noqa: E731
    with plugin(w) as p:
        pod = w.pod()
        one, other = w.started(pod, "one"), w.started(pod, "other")
        with steps.step("UpdateContainer: asked, changed, told"):
            p.script({"UpdateContainer": {"update": [{"container_id": one, **memory(32 << 20)},
                                                     {"container_id": other, **memory(48 << 20)}]}})
            w.c("update", "--cpu-share", "600", "--memory", str(100 << 20), one)
            asked = p.events("UpdateContainer")[-1]["resources"]
            expect(asked["memory"]["limit"]["value"] == str(100 << 20) and asked["cpu"]["shares"]["value"] == "600", str(asked))
            expect((read(one), read(other)) == (str(32 << 20), str(48 << 20)), f"{read(one)} {read(other)}")
            after = p.events("PostUpdateContainer")[-1]["container"]["linux"]["resources"]
            expect(after["memory"]["limit"]["value"] == str(32 << 20) and after["cpu"]["shares"]["value"] == "600", str(after))
            p.script({"UpdateContainer": {"error": "hands off"}})
            expect("hands off" in w.c.fails("update", "--memory", str(90 << 20), one), "the error")
            expect(read(one) == str(32 << 20), "it was changed all the same")
        with steps.step("a new container and an end change others"):
            p.script({"CreateContainer": {"update": [{"container_id": one, **memory(40 << 20)}]},
                      "StopContainer": {"update": [{"container_id": other, **memory(56 << 20)}]}})
            third = w.started(pod, "third")
            expect(read(one) == str(40 << 20), read(one))
            w.c("stop", "-t", "0", third)
            expect(read(other) == str(56 << 20), read(other))
            p.script({"CreateContainer": {"update": [{"container_id": "0" * 64, **memory(40 << 20)}]}})
            error = w.c.fails("create", pod, w.config("fourth"), w.any)
            expect("0" * 64 in error, error)
            p.script({"CreateContainer": {"update": [{"container_id": one, **memory(300 << 10)}]}})
            error = w.c.fails("create", pod, w.config("fourth"), w.any)
            expect("container_min_memory" in error and str(300 << 10) in error, error)
            expect(read(one) == str(40 << 20), read(one))
            p.script({})
        with steps.step("updates that nobody asked for"):
            answer = p.send([{"container_id": one, **memory(44 << 20)}, {"container_id": "f" * 64, **memory(44 << 20)},
                             {"container_id": "e" * 64, "ignore_failure": True, **memory(44 << 20)}])
            expect(answer["failed"] == ["f" * 64] and "error" not in answer, str(answer))
            expect(read(one) == str(44 << 20), read(one))
            status = w.c.json("inspect", one)["status"]["resources"]["linux"]
            expect(status["memoryLimitInBytes"] == str(44 << 20), str(status))
        w.remove(pod)


def under_load(w, steps):
    """Plugins come and go while pods do: for each session of a plugin an object is in the state or begins with its event."""
    with steps.step("joining under load loses and doubles nothing"), plugin(w, "05", "steady") as steady:
        stop, errors, seen = threading.Event(), [], []

        def worker():
            try:
                while not stop.is_set():
                    pod = w.pod()
                    container = w.started(pod, w.fresh("c"))
                    seen.append((pod, container))
                    w.c("stop", "-t", "0", container)
                    w.remove(pod)
            except Failure as error:
                errors.append(error)

        workers = [threading.Thread(target=worker) for _ in range(3)]
        for one in workers:
            one.start()
        sessions = []
        try:
            for number in range(6):
                # Not a validator: one that dies when it is asked makes the creation fail.
                with plugin(w, "50", f"s{number}", script={"events": ",".join(LIFE)}) as one:
                    made = len(seen)
                    wait_for("some lives", lambda: len(seen) > made + 3 or errors, 60 * w.factor)  # noqa: B023
                sessions.append(one.events())
        finally:
            stop.set()
            for one in workers:
                one.join()
        expect(not errors, "; ".join(map(str, errors)))
        for ids in seen:
            for of, one in zip(("Pod", "Container"), ids):
                expect(steady.about(one) == [e for e in LIFE if of in e], f"{one}: {steady.about(one)}")
        checked = sum(consistent(events) for events in sessions)
        print(f"      ({len(seen)} pods, {checked} objects in {len(sessions)} sessions)", flush=True)


def restart(w, steps):
    with steps.step("the daemon restarts, the plugin comes back and is told of what lives"), plugin(w) as p:
        pod = w.pod("stays")
        running, created, ended = w.started(pod, "running"), w.create(pod, "created"), w.started(pod, "ended")
        w.c("stop", "-t", "0", ended)
        for sig, count in ((signal.SIGKILL, 2), (signal.SIGTERM, 3)):
            w.s.runtime.kill(sig)
            w.s.runtime.start()
            p.joined(count)
            state = p.events("Synchronize")[-1]
            expect([x["id"] for x in state["pods"]] == [pod], str(state["pods"]))
            got = {x["id"]: x for x in state["containers"]}
            expect(set(got) == {running, created}, f"{set(got)}, not {running} and {created}")
            expect(got[running]["state"] == "CONTAINER_RUNNING" and got[running]["args"] == ["sleep", "3600"], str(got))
        expect(len(p.events("Shutdown")) == 1, "a daemon that ends in order says so")
        w.remove(pod)
        after = [e["event"] for e in p.events()[p.events().index(state):]]
        expect((after.count("StopContainer"), after.count("RemoveContainer")) == (2, 3), str(after))
        expect((after.count("StopPodSandbox"), after.count("RemovePodSandbox")) == (1, 1), str(after))


def installed(w, steps):
    directory, config = os.path.join(w.work, "nri-plugins"), os.path.join(w.work, "nri-conf")
    log, script = os.path.join(w.work, "installed.events"), os.path.join(w.work, "installed.script")
    read = lambda: [json.loads(line) for line in open(log)]  # noqa: E731, SIM115
    os.makedirs(directory)
    os.makedirs(config)
    try:
        with steps.step("a plugin that the daemon starts", fatal=True):
            pod = w.pod("early")
            shutil.copy(runtimes.tool("NRI_PLUGIN"), os.path.join(directory, "15-installed"))
            with open(os.path.join(directory, "99-broken"), "w") as f:
                f.write("#!/bin/sh\nexit 1\n")
            os.chmod(f.name, 0o755)
            written(config, "installed.conf", {"log": log, "script": script})
            w.s.runtime.kill(signal.SIGTERM)
            w.s.runtime.start()
            wait_for("its state", lambda: any(e["event"] == "Synchronize" for e in read()), 20 * w.factor)
            expect(w.plugins() == ["15-installed"], str(w.plugins()))
            expect([x["id"] for x in read()[1]["pods"]] == [pod], str(read()[1]))
            told = read()[0]
            expect((told["runtime"], told["request_ms"], told["registration_ms"]) == ("berth", 2000, 5000), str(told))
            process = told["pid"]
            with open(f"/proc/{process}/environ") as f:
                expect("NRI_PLUGIN_SOCKET=3" in f.read().split("\0"), "its environment")
            written(w.work, "installed.script", {"RunPodSandbox": {"error": "says the installed one"}})
            expect("says the installed one" in w.c.fails("runp", w.pod_config("late")), "the error")
            os.unlink(script)
        with steps.step("it ends with the daemon"):
            w.s.runtime.kill(signal.SIGTERM)
            expect(not os.path.exists(f"/proc/{process}"), "it still runs")
            expect(read()[-1]["event"] == "Shutdown", str(read()[-1]))
            expect(not os.path.exists(w.nri), "the socket is still there")
    finally:
        # Else the daemon would start them again, and each step after this one would ask them.
        w.s.runtime.stop()
        shutil.rmtree(directory)
        w.s.runtime.start()
    w.remove(pod)


CDI = {"cdiVersion": "0.7.0", "kind": "vendor.com/gpu", "containerEdits": {"env": ["VENDOR=here"]}, "devices": [
    {"name": "0", "containerEdits": {
        "env": ["GPU=0"], "deviceNodes": [{"path": "/dev/gpu0", "hostPath": "/dev/full", "permissions": "rw"}],
        "mounts": [{"hostPath": "/usr", "containerPath": "/gpu/usr", "options": ["ro", "rbind"]}]}},
    {"name": "cached", "containerEdits": {"intelRdt": {"closID": "gold"}}}]}


def cdi(w, steps):
    directory = os.path.join(w.work, "cdi")
    os.makedirs(directory, exist_ok=True)
    pod = w.pod("devices")
    ask = lambda *names: {"CDI_devices": [{"name": n} for n in names]}  # noqa: E731
    fails = lambda name, **more: w.c.fails("create", pod, w.config(name, **more), w.any)  # noqa: E731
    with steps.step("an unknown CDI device is an error that names it and the directories"):
        error = fails("none", **ask("vendor.com/gpu=0"))
        expect("vendor.com/gpu=0" in error and directory in error, error)
        expect("gpu" in fails("none", **ask("gpu")), "a malformed name")
    with steps.step("devices, mounts and environment of a CDI file"):
        written(directory, "vendor.json", CDI)
        container = w.started(pod, "gpu", **ask("vendor.com/gpu=0"))
        expect(w.shell(container, "echo $VENDOR $GPU") == "here 0", "environment")
        expect(re.search(r"^c.*1,\s+7 .*/dev/gpu0", w.shell(container, "ls -l /dev/gpu0")), "node")
        expect(w.shell(container, "(echo x > /dev/gpu0) 2>/dev/null || echo no") == "no", "/dev/full takes a byte")
        expect(w.shell(container, "head -c 3 /dev/gpu0 | wc -c") == "3", "the device cannot be read")
        expect("ro" in w.shell(container, "grep /gpu/usr /proc/self/mounts").split()[3].split(","), "mount")
    with steps.step("by annotation, once, and from YAML; a changed file counts at once"):
        yaml = "cdiVersion: 0.5.0\nkind: vendor.com/nic\ndevices:\n- name: a\n  containerEdits:\n    env: [NIC=%d]\n"
        for number in (1, 2):
            with open(os.path.join(directory, "nic.yaml"), "w") as f:
                f.write(yaml % number)
            container = w.started(pod, f"nic{number}", **ask("vendor.com/nic=a"), annotations={
                "cdi.k8s.io/x": "vendor.com/nic=a,vendor.com/gpu=0"})
            expect(w.shell(container, "echo $NIC $GPU") == f"{number} 0", "environment")
    with steps.step("what cannot be done names the device and the file"):
        error = fails("cached", **ask("vendor.com/gpu=cached"))
        expect(all(word in error for word in ("vendor.com/gpu=cached", "vendor.json", "intelRdt")), error)
        with open(os.path.join(directory, "bad.json"), "w") as f:
            f.write("{")
        expect("bad.json" in fails("bad", **ask("vendor.com/tpu=0")), "the broken file")
        w.started(pod, "fine", **ask("vendor.com/gpu=0"))
    with steps.step("in a pod with a user namespace"):
        ids = [{"host_id": 300000, "container_id": 0, "length": 65536}]
        own = {"security_context": {"namespace_options": {"userns_options": {"mode": 0, "uids": ids, "gids": ids}}}}
        adjust = {"env": [{"key": "A", "value": "1"}], "linux": {"resources": {"pids": {"limit": 44}}}}
        mapped = w.pod("mapped", **own)
        with plugin(w, script={"CreateContainer": {"adjust": adjust}}):
            container = w.started(mapped, "mapped", linux=own, **ask("vendor.com/gpu=0"))
        expect(w.shell(container, "echo $GPU $A; head -c 3 /dev/gpu0 | wc -c").split() == ["0", "1", "3"], "inside")
        expect(w.shell(container, "ls /gpu/usr"), "the mount is empty")
        expect(w.shell(container, "cat /proc/self/uid_map").split()[1] == "300000", "uid_map")
        w.remove(mapped)
    with steps.step("an NRI plugin injects a CDI device"):
        with plugin(w, script={"CreateContainer": {"adjust": {"CDI_devices": [{"name": "vendor.com/gpu=0"}]}}}):
            container = w.started(pod, "injected")
            expect(w.shell(container, "echo $GPU; test -c /dev/gpu0 && echo node").split() == ["0", "node"], "device")
    w.remove(pod)


def validator(w, steps):
    with steps.step("the built-in validator: plugins that must be there, what they may not adjust"):
        with w.s.runtime.configured(nri_validator=True, nri_reject=["hooks", "namespaces", "seccomp-unconfined"],
                                    nri_required_plugins=["test"]):
            pod = w.pod()
            error = w.c.fails("create", pod, w.config("alone"), w.any)
            expect("plugin test is required" in error, error)
            for adjust, words in (({"hooks": {"poststop": [{"path": "/bin/true"}]}}, ("hooks", "10-test")),
                                  ({"linux": {"namespaces": [{"type": "pid"}]}}, ("namespaces", "pid", "10-test")),
                                  ({"linux": {"seccomp_policy": {"default_action": "SCMP_ACT_ALLOW"}}}, ("seccomp", "10-test"))):
                with plugin(w, script={"CreateContainer": {"adjust": adjust}}):
                    error = w.c.fails("create", pod, w.config("bold"), w.any)
                    expect(all(word in error for word in words), error)
            with plugin(w, script={"CreateContainer": {"adjust": {"env": [{"key": "A", "value": "1"}]}}}):
                expect(w.shell(w.started(pod, "modest"), "echo $A") == "1", "what is allowed")
            w.remove(pod)


PARTS = (cdi, life, adjustments, resources, block_io, rdt, hooks, failures, troubles, changes, with_runc, devices, tuned, validator, edges, restart, installed, under_load)


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--only", default="", help="parts whose name matches: " + " ".join(p.__name__ for p in PARTS))
    args = parser.parse_args()
    runtimes.tool("NRI_PLUGIN")
    runtimes.Runtime.handlers = oci.handlers(args.hide_hybrid)
    steps = Steps("nri")
    with options.session(args, steps) as s:
        world = World(s)
        os.makedirs(os.path.join(s.work, "logs"), exist_ok=True)
        world.c("pull", IMAGE)
        for part in PARTS:
            if re.search(args.only, part.__name__):
                steps.run(part, world, steps)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

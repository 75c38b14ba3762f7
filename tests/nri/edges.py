"""The edges: who has not agreed, who is in doubt, what is asked in the middle of something else."""

import contextlib
import socket
import threading
import time

from harness.report import expect, wait_for
from limits import limit, pod_with
from walkthrough import written
from world import IMAGE, LIFE, Plugin, consistent, plugin

VALIDATE = "ValidateContainerAdjustment"
ENDS = ("StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox")
# Longest waits for a registration and for an answer, milliseconds.
REGISTRATION, REQUEST = 4000, 1500
# What a plugin takes its time with: long enough to look, short enough to be answered.
PAUSE = 800


def memory(megabytes, **more):
    return {"linux": {"resources": {"memory": {"limit": {"value": megabytes << 20}}}}, **more}


def memory_of(w, container):
    return int(limit(w, container, "memory/memory.limit_in_bytes", "memory.max")) >> 20


def pause(w):
    return {"delay_ms": int(PAUSE * w.factor)}


class Silent:
    """A connection that never registers; when it was cut."""

    def __init__(self, w):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60 * w.factor)
        # The daemon takes plugins a moment after it takes calls.
        wait_for("the plugins' socket", lambda: self.socket.connect_ex(w.nri) == 0, 10 * w.factor, 0.02)
        self.since, self.cut = time.monotonic(), None
        self.thread = threading.Thread(target=self.wait)
        self.thread.start()

    def wait(self):
        with contextlib.suppress(OSError):
            while self.socket.recv(4096):
                pass
            self.cut = time.monotonic()
        self.socket.close()


def edges(w, steps):
    given = {"nri_registration_timeout": int(REGISTRATION * w.factor), "nri_request_timeout": int(REQUEST * w.factor)}
    with w.s.runtime.configured(**given):
        silent = Silent(w)
        with plugin(w, "40", "talks"):
            joined = time.monotonic()
        for part in (validators, disputes, joining, pods_in_between, evictions, pod_resources):
            steps.run(part, w, steps)
        with steps.step("a connection that never registers is cut in time, and holds up nobody"):
            silent.thread.join(60 * w.factor)
            expect(silent.cut, "it is open")
            took, wanted = silent.cut - silent.since, REGISTRATION / 1000 * w.factor
            expect(wanted - 0.1 < took < wanted + 3 * w.factor, f"cut after {took:.2f} s, not {wanted:.2f}")
            expect(joined < silent.cut, "another plugin joined only after it was cut")
            expect(logged(w, "ERROR", "not registered", "not within"), "no word of it in the log")
    built_in(w, steps)


def logged(w, *words):
    """Lines of the daemon's log with all of these words."""
    with open(w.s.runtime.log, errors="replace") as f:
        return [line for line in f if all(word in line for word in words)]


def validators(w, steps):
    pod = w.pod()
    with steps.step("a validator that hangs or dies has not agreed: nothing is made"), plugin(w, "10", "bold") as bold:
        bold.script({"CreateContainer": {"adjust": {"env": [{"key": "A", "value": "1"}]}}})
        before = w.listed()
        for event, trouble in (("CreateContainer", {"delay_ms": int(3 * REQUEST * w.factor)}),
                               ("CreateContainer", {"exit": True}), (VALIDATE, {"exit": True})):
            with plugin(w, "20", "gate", script={"events": f"CreateContainer,{VALIDATE}", event: trouble}) as gate:
                error = w.c.fails("create", pod, w.config("unseen"), w.any)
                expect("20-gate" in error and VALIDATE in error and "does not answer" in error, f"{event} {trouble}: {error}")
                expect(gate.events(event), f"it was not asked: {event} {trouble}")
            expect(w.listed() == before, f"something is listed: {event} {trouble}")
        told = [e["event"] for e in bold.events() if e["event"] in LIFE and e.get("container", {}).get("name") == "unseen"]
        expect(told == ["CreateContainer", "StopContainer", "RemoveContainer"] * 3, f"the other plugin: {told}")
        w.started(pod, "unseen")
    with steps.step("a validator sees what becomes of other containers, and judges by it"), plugin(w, "10", "bold") as bold, \
            plugin(w, "20", "gate", script={"events": VALIDATE}) as gate:
        one = w.started(pod, "one")
        bold.script({"CreateContainer": {"update": [{"container_id": one, **memory(48)}]}})
        gate.script({VALIDATE: {"error": "leave that one alone", "if_updated": one}})
        before, limits = w.listed(), limit(w, one, "memory/memory.limit_in_bytes", "memory.max")
        error = w.c.fails("create", pod, w.config("two"), w.any)
        expect("leave that one alone" in error and "20-gate" in error, error)
        seen = gate.events(VALIDATE)[-1]
        got = [(x["container_id"], x["linux"]["resources"]["memory"]["limit"]["value"]) for x in seen["update"]]
        expect(got == [(one, str(48 << 20))], f"updates: {seen['update']}")
        expect("10-bold" in seen["owners"]["owners"][one]["simple"].values(), f"owners: {seen['owners']}")
        expect(limit(w, one, "memory/memory.limit_in_bytes", "memory.max") == limits, "it was changed all the same")
        expect(w.listed() == before, "something is listed")
        bold.script({})
        w.started(pod, "two")
        expect(gate.events(VALIDATE)[-1]["update"] == [], "updates of nobody")
    w.remove(pod)


def disputes(w, steps):
    pod = w.pod()
    one = w.started(pod, "one")
    both = plugin(w, "20", "late"), plugin(w, "10", "early")
    with both[0] as late, both[1] as early:
        def say(event, first, second):
            early.script({event: first})
            late.script({event: second})

        with steps.step("what nobody had set may be removed by one plugin and set by the next"):
            say("CreateContainer", {"adjust": {"env": [{"key": "-OWN"}], "annotations": {"-own": ""}}},
                {"adjust": {"env": [{"key": "OWN", "value": "late"}], "annotations": {"own": "late"}}})
            container = w.started(pod, "handed", envs=[{"key": "OWN", "value": "first"}])
            expect(w.shell(container, "echo $OWN") == "late", "environment")
            seen = late.events("CreateContainer")[-1]["container"]
            expect("own" not in seen["annotations"] and "OWN=first" not in seen["env"], f"the second sees it still: {seen}")
            expect(late.events("PostCreateContainer")[-1]["container"]["annotations"]["own"] == "late", "annotations")
        with steps.step("two plugins that want different things of a new container"):
            before = w.listed()
            for adjust, word in ((memory(64), "MemLimit"), ({"linux": {"oom_score_adj": {"value": 5}}}, "OomScoreAdj"),
                                 ({"linux": {"sysctl": {"net.core.somaxconn": "7"}}}, "net.core.somaxconn")):
                say("CreateContainer", {"adjust": adjust}, {"adjust": adjust})
                error = w.c.fails("create", pod, w.config("torn"), w.any)
                expect(all(x in error for x in ("10-early", "20-late", word)), f"{adjust}: {error}")
            expect(w.listed() == before, "something is listed")
        with steps.step("two plugins that want different limits of a container that runs"):
            def clash(event, act, **more):
                say(event, {"update": [{"container_id": one, **memory(40)}]},
                    {"update": [{"container_id": one, **memory(44), **more}]})
                return act()

            create = ("create", pod, w.config("torn"), w.any)
            update = ("update", "--memory", str(60 << 20), one)
            w.c("update", "--memory", str(36 << 20), one)
            for event, command in (("CreateContainer", create), ("UpdateContainer", update)):
                error = clash(event, lambda: w.c.fails(*command))  # noqa: B023
                expect(all(x in error for x in ("10-early", "20-late", "MemLimit")), f"{event}: {error}")
                expect(memory_of(w, one) == 36, f"{event}: it was changed all the same: {memory_of(w, one)} MiB")
            for event, command in (("CreateContainer", create), ("UpdateContainer", update)):
                clash(event, lambda: w.c(*command), ignore_failure=True)  # noqa: B023
                expect(memory_of(w, one) == 40, f"{event}: who does not mind gives way: {memory_of(w, one)} MiB")
                say(event, {}, {})
                w.c("update", "--memory", str(36 << 20), one)
    w.remove(pod)


def joining(w, steps):
    with steps.step("while a plugin is joining: nothing is lost, nothing doubled, no end before its time"):
        pod, doomed = w.pod(), w.pod()
        before, dying = w.started(pod, "before"), w.started(doomed, "dying")
        pid = w.c.json("inspect", dying)["info"]["pid"]
        p = Plugin(w, script={"Synchronize": pause(w), "StopContainer": {"container": "dying", "ls": f"ls -d /proc/{pid}"}})
        try:
            wait_for("the state", lambda: p.events("Synchronize"), 10 * w.factor, 0.02)
            made = {}
            tasks = {"container": lambda: w.create(pod, "during"), "pod": lambda: w.pod(), "stop": lambda: w.c("stopp", doomed)}
            threads = [threading.Thread(target=lambda name=name: made.update({name: tasks[name]()})) for name in tasks]
            for one in threads:
                one.start()
            for one in threads:
                one.join()
            expect(set(made) == set(tasks), f"only {set(made)} worked")
            p.joined()
            after = w.started(pod, "after")
            w.c("rmp", doomed)
            w.remove(pod, made["pod"])
            consistent(p.events())
            state = p.events("Synchronize")[0]
            expect({x["id"] for x in state["pods"]} == {pod, doomed}, str(state["pods"]))
            expect({x["id"] for x in state["containers"]} == {before, dying}, str(state["containers"]))
            pods, containers = ([e for e in LIFE if kind in e] for kind in ("Pod", "Container"))
            for what, wanted in ((before, containers[-2:]), (dying, containers[-2:]), (after, containers), (pod, pods[1:]),
                                 (made["container"], containers[:2] + containers[-2:]), (doomed, pods[1:]), (made["pod"], pods)):
                expect(p.about(what) == wanted, f"{p.about(what)}, not {wanted}")
            stop = next(e for e in p.events("StopContainer") if e["container"]["id"] == dying)
            expect(stop["container"]["state"] == "CONTAINER_STOPPED" and "ls_error" in stop, f"it runs: {stop}")
        finally:
            p.end()


def unanswered(w, p, event, work):
    """Runs `work` beside, and gives True as long as the plugin has not answered this event."""
    seen, answers = len(p.events(event)), len(p.events("Answers"))
    thread = threading.Thread(target=work)
    thread.start()
    wait_for(event, lambda: len(p.events(event)) > seen, 10 * w.factor, 0.02)
    return thread, lambda: len(p.events("Answers")) == answers


def pods_in_between(w, steps):
    with plugin(w, "20", "late") as late, plugin(w, "10", "early") as early:
        with steps.step("a pod that a plugin still thinks about is nobody's", fatal=True):
            late.script({"RunPodSandbox": pause(w)})
            made, looks = [], 0
            thread, thinks = unanswered(w, late, "RunPodSandbox", lambda: made.append(w.pod("pondered")))
            pod = late.events("RunPodSandbox")[-1]["pod"]["id"]
            while thinks():
                code, out, _ = w.c.run("inspectp", pod)
                created, _, error = w.c.run("create", pod, w.config("hasty"), w.any)
                if thinks():
                    looks += 1
                    expect(code != 0 or "SANDBOX_READY" not in out, f"it is ready: {out}")
                    expect(created != 0 and pod[:12] in error, f"a container in it: {error}")
                    expect(not early.events("CreateContainer"), "plugins were asked about a container in it")
            thread.join()
            expect(looks, "the hook was over too soon")
            expect(made == [pod], f"{made}, not {pod}")
            # The last one may have come in time.
            for late_one in w.c("ps", "-a", "-q", "--pod", pod).split():
                w.c("rm", "-f", late_one)
        with steps.step("errors about ends are in the log, with the plugin's name"):
            early.script({event: {"error": f"no {event}, please"} for event in ENDS})
            late.script({})
            container = w.started(pod)
            w.remove(pod)
            expect(late.about(pod, container)[-4:] == ["StopContainer", "StopPodSandbox", "RemoveContainer", "RemovePodSandbox"],
                   str(late.about(pod, container)))
            for event in ENDS:
                expect(len(logged(w, "WARN", "10-early", f"no {event}, please")) == 1, f"{event} is not in the log once")
            early.script({})
        with steps.step("a pod that is being stopped: its containers have ended, none is made any more", fatal=True):
            pod = w.pod("halted")
            running, idle = w.started(pod, "running"), w.create(pod, "idle")
            late.script({"StopPodSandbox": pause(w)})
            count, looks = len(early.events("CreateContainer")), 0
            thread, thinks = unanswered(w, late, "StopPodSandbox", lambda: w.c("stopp", pod))
            while thinks():
                shown = w.c.json("ps", "-a", "--pod", pod, "-o", "json")["containers"]
                pods = w.c("pods", "-q").split()
                created, _, error = w.c.run("create", pod, w.config("tardy"), w.any)
                if thinks():
                    looks += 1
                    states = {x["id"]: x["state"] for x in shown}
                    expect(states.get(running) == "CONTAINER_EXITED" and idle in states, f"{states}")
                    expect(pod in pods, "the pod is not listed any more")
                    expect(created != 0, "a container in a pod that stops")
            thread.join()
            expect(looks, "the hook was over too soon")
            late.script({})
            error = w.c.fails("create", pod, w.config("tardy"), w.any)
            expect(pod[:12] in error, error)
            expect(len(early.events("CreateContainer")) == count, "plugins were asked about it")
            expect(early.about(pod).count("StopPodSandbox") == 1, f"{early.about(pod)}")
        with steps.step("what is no valid request is no event"):
            nothing_asked(w, early, pod)
            w.remove(pod)


def nothing_asked(w, p, stopped):
    """Requests about what is not there, or is there already."""
    pod = w.pod("twin")
    twin = w.started(pod, "twin")
    before, listed = p.events(), w.listed()
    nobody = "f" * 64
    missing = written(w.work, "missing.json", {"metadata": {"name": "x"}, "image": {"image": "registry.k8s.io/no-such:1"}})
    # Asked for again they are what they are.
    expect(w.c.id("runp", w.pod_config("twin")) == pod, "another pod")
    w.c.run("create", pod, w.config("twin"), w.any)
    for command in (("create", nobody, w.config("x"), w.any), ("create", pod, missing, w.any),
                    ("create", stopped, w.config("x"), w.any), ("start", nobody), ("start", twin),
                    ("update", "--memory", str(36 << 20), nobody)):
        w.c.fails(*command)
    for method, request, word in (("RunPodSandbox", {}, "config"), ("RunPodSandbox", {"config": {"hostname": "x"}}, "metadata"),
                                  ("CreateContainer", {"pod_sandbox_id": pod}, "config"),
                                  ("CreateContainer", {"pod_sandbox_id": pod, "config": {"image": {"image": IMAGE}}}, "metadata"),
                                  ("UpdatePodSandboxResources", {"pod_sandbox_id": nobody}, nobody[:12])):
        code, _, error = w.call(method, request)
        expect(code == 1 and word in error, f"{method} {request}: {error}")
    for verb in ("stopp", "rmp", "stop", "rm"):
        w.c.run(verb, nobody)
    w.c("stopp", stopped)
    new = [e["event"] for e in p.events()[len(before):]]
    expect(not new, f"plugins were told: {new}")
    expect(w.listed() == listed, "something else is listed now")
    w.remove(pod)


def evictions(w, steps):
    with steps.step("plugins evict containers: with an answer, and unasked"), plugin(w) as p:
        pod = w.pod()
        tidy = ("sh", "-c", "trap 'exit 7' TERM; touch /tmp/ready; sleep 3600 & wait")
        victims = [w.started(pod, name, command=tidy) for name in ("first", "second", "third")]
        for one in victims:
            wait_for("its trap", lambda: w.c.run("exec", "--sync", one, "test", "-e", "/tmp/ready")[0] == 0, 10 * w.factor)  # noqa: B023
        evict = lambda identity: {"container_id": identity, "reason": "no room for " + identity[:12]}  # noqa: E731
        p.script({"CreateContainer": {"evict": [evict("e" * 64), evict(victims[0])]}})
        guest = w.started(pod, "guest")
        p.script({"UpdateContainer": {"evict": [evict(victims[1])]}})
        w.c("update", "--cpu-share", "600", guest)
        p.script({})
        answer = p.send([{"container_id": guest, **memory(44)}], [evict(victims[2]), evict("f" * 64)])
        expect(answer["failed"] == [] and "error" not in answer, str(answer))
        expect(memory_of(w, guest) == 44, "the update beside it")
        for one in victims:
            status = lambda: w.c.json("inspect", one)["status"]  # noqa: B023, E731
            # Long before it would be killed: it has had its SIGTERM.
            wait_for("its end", lambda: status()["state"] == "CONTAINER_EXITED", 20 * w.factor)  # noqa: B023
            expect(status()["exitCode"] == 7, str(status()))
            wait_for("StopContainer", lambda: "StopContainer" in p.about(one), 10 * w.factor)  # noqa: B023
            expect(len(logged(w, "WARN", "10-test", "no room for " + one[:12])) == 1, "no word of it in the log")
        expect(w.c.json("inspect", guest)["status"]["state"] == "CONTAINER_RUNNING", "the guest")
        w.remove(pod)
        expect(all(p.about(one).count("StopContainer") == 1 for one in victims), str(p.about(*victims)))


def pod_resources(w, steps):
    with steps.step("UpdatePodSandboxResources: asked, told, refused"), plugin(w, "20", "late") as late, \
            plugin(w, "10", "early") as early:
        pod = w.pod()
        ask = lambda **given: w.call("UpdatePodSandboxResources", {"pod_sandbox_id": pod, **given})  # noqa: E731
        code, _, error = ask(overhead={"memory_limit_in_bytes": 10 << 20}, resources={"cpu_shares": 300, "cpu_quota": 7000})
        expect(code == 0, error)
        for one in (early, late):
            told = [e["event"] for e in one.events() if "UpdatePod" in e["event"]]
            expect(told == ["UpdatePodSandbox", "PostUpdatePodSandbox"], f"{one.name}: {told}")
            event = one.events("UpdatePodSandbox")[0]
            cpu = {key: int(value["value"]) for key, value in event["resources"]["cpu"].items() if value and "value" in value}
            expect(event["pod"]["id"] == pod and (cpu["shares"], cpu["quota"]) == (300, 7000), str(event))
            expect(event["overhead"]["memory"]["limit"]["value"] == str(10 << 20), str(event["overhead"]))
            after = one.events("PostUpdatePodSandbox")[0]["pod"]["linux"]
            expect(after["pod_resources"]["cpu"]["shares"]["value"] == "300", f"not in force afterwards: {after}")
            expect(after["pod_overhead"]["memory"]["limit"]["value"] == str(10 << 20), f"not in force afterwards: {after}")
        late.script({"UpdatePodSandbox": {"error": "not in this pod"}})
        code, _, error = ask(resources={"cpu_shares": 900})
        expect(code == 1 and "not in this pod" in error and "20-late" in error, error)
        expect(len(early.events("PostUpdatePodSandbox")) == 1, "told of what was refused")
        late.script({})
        code, _, error = ask(overhead={"memory_limit_in_bytes": 12 << 20})
        expect(code == 0, error)
        event = late.events("UpdatePodSandbox")[-1]
        expect(event["resources"]["cpu"]["shares"]["value"] == "300", f"what was refused is kept: {event['resources']}")
        w.remove(pod)


def built_in(w, steps):
    """The built-in validator, where nothing but the configuration says what a container's profile is."""
    profile = written(w.work, "profile.json", {"defaultAction": "SCMP_ACT_ALLOW"})
    with w.s.runtime.configured(nri_validator=True, nri_reject=["seccomp-default", "seccomp-localhost", "sysctl"],
                                unset_seccomp_profile="runtime/default", nri_required_plugins=["10-test"],
                                nri_tolerate_missing_annotation="may.miss"):
        pod = w.pod()
        fails = lambda pod, name="bold", **more: w.c.fails("create", pod, w.config(name, **more), w.any)  # noqa: E731
        with steps.step("the built-in validator: the profile that applies, from a file, sysctls"), plugin(w) as p:
            policy = {"linux": {"seccomp_policy": {"default_action": "SCMP_ACT_ALLOW"}}}
            p.script({"CreateContainer": {"adjust": policy}})
            asked = lambda **given: {"linux": {"security_context": {"seccomp": given}}}  # noqa: E731
            for more in ({}, asked(profile_type=0), asked(profile_type=2, localhost_ref=profile)):
                error = fails(pod, **more)
                expect("seccomp" in error and "10-test" in error, f"{more}: {error}")
            w.started(pod, "unconfined", **asked(profile_type=1))
            p.script({"CreateContainer": {"adjust": {"linux": {"sysctl": {"net.core.somaxconn": "7"}}}}})
            error = fails(pod)
            expect(all(x in error for x in ("sysctl", "net.core.somaxconn", "10-test")), error)
            p.script({})
            for annotation, word in (("[test, 30-other]", "30-other"), ("[10-test]", ""), ("{", "required-plugins")):
                needy = pod_with(w, w.fresh(), {"required-plugins.noderesource.dev": annotation})
                if word:
                    expect(word in fails(needy), "an annotation that asks for others")
                else:
                    w.create(needy)
                w.remove(needy)
        with steps.step("the built-in validator: pods that do without"):
            expect("10-test" in fails(pod), "a plugin that is required")
            for annotations, word in (({"may.miss": "true"}, ""), ({"may.miss/container.bold": "True"}, ""),
                                      ({"may.miss/container.other": "true"}, "10-test"), ({"may.miss": "perhaps"}, "perhaps")):
                lenient = pod_with(w, w.fresh(), annotations)
                if word:
                    expect(word in fails(lenient), str(annotations))
                else:
                    w.create(lenient, "bold")
                w.remove(lenient)
        w.remove(pod)

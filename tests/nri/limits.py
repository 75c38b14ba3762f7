"""Limits that only plugins set: all of `resources`, block I/O classes; classes of cache and bandwidth, as far as this node goes."""

import json
import os
import re
import signal

from harness.report import expect
from walkthrough import written
from world import plugin

V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
RESCTRL = os.path.ismount("/sys/fs/resctrl")


def limit(w, container, v1, v2):
    return w.shell(container, f"cat /sys/fs/cgroup/{v2 if V2 else v1}")


def has(w, container, path):
    return w.shell(container, f"test -e /sys/fs/cgroup/{path} && echo yes || true") == "yes"


def disk():
    """A whole block device: its path, and major:minor."""
    for name in sorted(os.listdir("/sys/block")):
        with open(f"/sys/block/{name}/dev") as f:
            numbers = f.read().strip()
        if re.match(r"(vd|sd|xvd|nvme)", name) and os.path.exists(f"/dev/{name}"):
            return f"/dev/{name}", numbers
    raise SystemExit("this machine has no disk that could be limited")


def page_size():
    """The name of a size of huge pages, as the files of cgroups have it."""
    sizes = [int(re.search(r"(\d+)kB", name)[1]) for name in os.listdir("/sys/kernel/mm/hugepages")]
    size = min(sizes)
    return f"{size >> 10}MB" if size < 1 << 20 else f"{size >> 20}GB"


def resources(w, steps):
    """What adjustments() does not set, each by a container of its own, read in its cgroup."""
    page = page_size()
    cases = [
        ("cpu quota and period", {"cpu": {"quota": {"value": 25000}, "period": {"value": 50000}}},
         [("cpu/cpu.cfs_quota_us", "cpu.max", "25000", "25000 50000"), ("cpu/cpu.cfs_period_us", "cpu.max", "50000", "25000 50000")]),
        ("memory reservation and swap", {"memory": {"limit": {"value": 64 << 20}, "reservation": {"value": 16 << 20},
                                                    "swap": {"value": 96 << 20}}},
         [("memory/memory.soft_limit_in_bytes", "memory.low", str(16 << 20), str(16 << 20)),
          ("memory/memory.memsw.limit_in_bytes", "memory.swap.max", str(96 << 20), str(32 << 20))]),
        ("memory nodes", {"cpu": {"mems": "0"}}, [("cpuset/cpuset.mems", "cpuset.mems", "0", "0")]),
        ("huge pages", {"hugepage_limits": [{"page_size": page, "limit": 4 << 20}]},
         [(f"hugetlb/hugetlb.{page}.limit_in_bytes", f"hugetlb.{page}.max", str(4 << 20), str(4 << 20))]),
    ]
    if V2:
        cases.append(("files of cgroup v2", {"unified": {"memory.high": str(48 << 20), "pids.max": "66"}},
                      [("", "memory.high", "", str(48 << 20)), ("", "pids.max", "", "66")]))
    with steps.step("resources: " + ", ".join(name for name, *_ in cases)):
        pod = w.pod()
        for name, given, files in cases:
            with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"resources": given}}}}):
                container = w.started(pod, w.fresh("c"))
            for v1, v2, in_v1, in_v2 in files:
                path = v2 if V2 else v1
                if re.search("swap|memsw|hugetlb", path) and not has(w, container, path):
                    print(f"      (this node has no {path})")
                    continue
                got = limit(w, container, v1, v2)
                expect(got == (in_v2 if V2 else in_v1), f"{name}: {v2 if V2 else v1}: {got}")
        w.remove(pod)
    no_reservation(w, steps)
    if not V2:
        with steps.step("resources: files of cgroup v2 are refused on v1"):
            pod = w.pod()
            with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"resources": {"unified": {"memory.high": "1"}}}}}}):
                error = w.c.fails("create", pod, w.config("refused"), w.any)
                expect("unified" in error and "memory.high" in error, error)
            w.remove(pod)
    with steps.step("resources: rules for devices"):
        pod = w.pod()
        rules = [{"allow": True, "type": "c", "major": {"value": 10}, "minor": {"value": 200}, "access": "rwm"},
                 {"allow": False, "type": "c", "major": {"value": 1}, "minor": {"value": 5}, "access": "rw"}]
        with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"resources": {"devices": rules}}}}}):
            container = w.started(pod)
        tries = "mknod /tmp/t c 10 200 && echo made; head -c 1 /dev/zero >/dev/null 2>&1 || echo denied; head -c 1 /dev/urandom | wc -c"
        expect(w.shell(container, tries).split() == ["made", "denied", "1"], w.shell(container, tries))
        w.remove(pod)
    with steps.step("memory policy"):
        pod = w.pod()
        policy = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
        with plugin(w, script={"CreateContainer": {"adjust": {"linux": {"memory_policy": policy}}}}):
            container = w.started(pod)
        maps = w.shell(container, "cat /proc/$(pidof sleep)/numa_maps")
        expect("bind=static:0" in maps, maps.splitlines()[0])
        w.remove(pod)


def no_reservation(w, steps):
    with steps.step("resources: a memory reservation of 0 takes one away, and is none from the start"):
        ask = lambda value: {"linux": {"resources": {"memory": {"reservation": {"value": value}}}}}  # noqa: E731
        none = "0" if V2 else str((1 << 63) - os.sysconf("SC_PAGE_SIZE"))
        pod = w.pod()
        with plugin(w) as p:
            for value in (16 << 20, 0):
                p.script({"CreateContainer": {"adjust": ask(value)}})
                container = w.started(pod, w.fresh("c"))
                read = lambda: limit(w, container, "memory/memory.soft_limit_in_bytes", "memory.low")  # noqa: B023, E731
                expect(read() == (str(value) if value else none), f"made with {value}: {read()}")
                for other in (8 << 20, 0):
                    expect(not p.send([{"container_id": container, **ask(other)}])["failed"], "the update")
                    expect(read() == (str(other) if other else none), f"updated to {other}: {read()}")
                w.c("update", "--memory", str(64 << 20), container)
                expect(read() == none, f"it is back: {read()}")
        w.remove(pod)


def class_of(name):
    return {"linux": {"resources": {"blockio_class": {"value": name}}}}


class Classes:
    """The file of classes, and what a container's cgroup says of the disk."""

    def __init__(self, w):
        self.w, self.path = w, os.path.join(w.work, "blockio.yaml")
        self.disk, self.numbers = disk()
        self.write(5)

    def write(self, megabytes):
        pattern = self.disk[:-1] + "[" + self.disk[-1] + "]"
        with open(self.path, "w") as f:
            f.write(f"""Classes:
  slow:
    - Weight: 80
    - Devices: ["{pattern}", /dev/no-such-*]
      ThrottleReadBps: {megabytes}M
      ThrottleWriteBps: 1Mi
      ThrottleReadIOPS: 2k
      ThrottleWriteIOPS: 500
  quick:
    - Devices: [{self.disk}]
      ThrottleReadBps: 50M
  ghost:
    - Devices: [/dev/no-such-disk, /dev/null]
      ThrottleReadBps: 1
  bad:
    - Devices: [{self.disk}]
      ThrottleReadBps: plenty
""")

    def of(self, container):
        """(read bytes, write bytes, reads, writes) in a second; 0: unlimited."""
        names = ("read_bps", "write_bps", "read_iops", "write_iops")
        if not V2:
            lines = [limit(self.w, container, f"blkio/blkio.throttle.{name}_device", "").split() for name in names]
            rates = [dict(zip(words[::2], words[1::2])) for words in lines]
            return tuple(int(one.get(self.numbers, 0)) for one in rates)
        lines = dict(line.split(" ", 1) for line in limit(self.w, container, "", "io.max").splitlines())
        words = dict(word.split("=") for word in lines.get(self.numbers, "").split())
        return tuple(int(words.get(short, "max").replace("max", "0")) for short in ("rbps", "wbps", "riops", "wiops"))

    def weight(self, container):
        """The weight, where this kernel has one."""
        for path in ("io.bfq.weight",) if V2 else ("blkio/blkio.bfq.weight", "blkio/blkio.weight"):
            if has(self.w, container, path):
                return int(limit(self.w, container, path, path).split("\n")[0].replace("default ", ""))
        return None


SLOW, QUICK, NONE = (5000000, 1 << 20, 2000, 500), (50000000, 0, 0, 0), (0, 0, 0, 0)


def pod_with(w, name, annotations):
    path = w.pod_config(name)
    with open(path) as f:
        config = json.load(f)
    config["annotations"].update(annotations)
    return w.noted(w.c.id("runp", written(w.work, f"{name}.pod.json", config)))


def block_io(w, steps):
    classes = Classes(w)
    pod = w.pod("disks")
    with steps.step("block I/O class of a new container", fatal=True), plugin(w, script={"CreateContainer": {"adjust": class_of("slow")}}) as p:
        container = w.started(pod, "slow")
        expect(classes.of(container) == SLOW, f"{classes.of(container)}")
        expect(classes.weight(container) in (None, 80), f"weight {classes.weight(container)}")
        if classes.weight(container) is None:
            print("      (this kernel has no weights: BFQ is not loaded)")
        spec = w.c.json("inspect", container)["info"]["runtimeSpec"]["linux"]["resources"]["blockIO"]
        major, minor = map(int, classes.numbers.split(":"))
        expect(spec["weight"] == 80 and spec["throttleReadBpsDevice"] == [{"major": major, "minor": minor, "rate": SLOW[0]}], str(spec))
        seen = p.events("PostCreateContainer")[-1]["container"]["linux"]["resources"]
        expect(seen["blockio_class"] == {"value": "slow"}, str(seen))
    with steps.step("block I/O: what cannot be is refused by name, nothing is left"):
        before = w.listed()
        with plugin(w) as p:
            for name, words in (("golden", ("golden", "blockio.yaml")), ("bad", ("bad", "blockio.yaml", "ThrottleReadBps", "plenty"))):
                p.script({"CreateContainer": {"adjust": class_of(name)}})
                error = w.c.fails("create", pod, w.config("refused"), w.any)
                expect(all(word in error for word in (*words, "blockioClass", "10-test")), error)
            p.script({"CreateContainer": {"adjust": class_of("slow")}})
            os.rename(classes.path, classes.path + ".away")
            error = w.c.fails("create", pod, w.config("refused"), w.any)
            expect("blockioClass" in error and classes.path in error, error)
            with open(classes.path, "w") as f:
                f.write("Classes: [slow]\n")
            error = w.c.fails("create", pod, w.config("refused"), w.any)
            expect("blockioClass" in error and classes.path in error, error)
            os.rename(classes.path + ".away", classes.path)
            expect(w.listed() == before, "something is listed")
            p.script({"CreateContainer": {"adjust": class_of("ghost")}})
            expect(classes.of(w.started(pod, "ghost")) == NONE, "a device that nobody has")
    with steps.step("block I/O class of a container that runs: another, none, after a restart, as the file is now"):
        w.s.runtime.kill(signal.SIGKILL)
        w.s.runtime.start()
        with plugin(w) as p:
            change = lambda name: p.send([{"container_id": container, **class_of(name)}])  # noqa: E731
            expect(not change("quick")["failed"] and classes.of(container) == QUICK, f"{classes.of(container)}")
            expect(classes.weight(container) in (None, 100), f"the weight stays: {classes.weight(container)}")
            expect(change("golden")["failed"] == [container] and classes.of(container) == QUICK, f"{classes.of(container)}")
            classes.write(7)
            expect(not change("slow")["failed"] and classes.of(container) == (7000000, *SLOW[1:]), f"{classes.of(container)}")
            classes.write(5)
            expect(not change("")["failed"] and classes.of(container) == NONE, f"{classes.of(container)}")
            p.script({"UpdateContainer": {"update": [{"container_id": container, **class_of("slow")}]}})
            w.c("update", "--cpu-share", "600", container)
            expect(classes.of(container) == SLOW, f"{classes.of(container)}")
            seen = p.events("PostUpdateContainer")[-1]["container"]["linux"]["resources"]
            expect(seen["blockio_class"] == {"value": "slow"} and seen["cpu"]["shares"]["value"] == "600", str(seen))
    w.remove(pod)
    with steps.step("block I/O class by annotation"):
        prefix = "blockio.resources.beta.kubernetes.io/"
        pod = pod_with(w, "annotated", {prefix + "pod": "slow", prefix + "container.second": "quick"})
        expect(classes.of(w.started(pod, "first")) == SLOW, "of the pod")
        expect(classes.of(w.started(pod, "second")) == QUICK, "of one container")
        own = w.started(pod, "third", annotations={"io.kubernetes.cri.blockio-class": "ghost"})
        expect(classes.of(own) == NONE, "of the container itself")
        with plugin(w, script={"CreateContainer": {"adjust": class_of("quick")}}):
            expect(classes.of(w.started(pod, "fourth")) == QUICK, "a plugin has the last word")
        error = w.c.fails("create", pod, w.config("fifth", annotations={"io.kubernetes.cri.blockio-class": "golden"}), w.any)
        expect("golden" in error and "annotation io.kubernetes.cri.blockio-class" in error, error)
        with w.s.runtime.configured(blockio_config_file=""):
            expect(classes.of(w.started(pod, "sixth")) == NONE, "without a file annotations have no effect")
            with plugin(w, script={"CreateContainer": {"adjust": class_of("slow")}}):
                error = w.c.fails("create", pod, w.config("seventh"), w.any)
                expect("blockio_config_file" in error and "slow" in error, error)
        w.remove(pod)


def rdt(w, steps):
    """Classes of cache and bandwidth. No node of these tests has resctrl: what is left is who refuses, and how."""
    with steps.step("RDT: refused by name where the node has none, or not that class"):
        pod = w.pod()
        before = w.listed()
        cases = [({"rdt": {"clos_id": {"value": "gold"}}}, ("rdt", "gold", "/sys/fs/resctrl")),
                 ({"resources": {"rdt_class": {"value": "gold"}}}, ("gold", "/sys/fs/resctrl")),
                 ({"rdt": {"clos_id": {"value": "a/b"}}}, ("rdt", "a/b"))]
        if not RESCTRL:
            cases += [({"rdt": {"schemata": {"value": ["MB:0=50"]}}}, ("rdt", "MB:0=50", "/sys/fs/resctrl", "10-test")),
                      ({"rdt": {"enable_monitoring": {"value": True}}}, ("rdt", "/sys/fs/resctrl")),
                      ({"resources": {"rdt_class": {"value": "gold"}}}, ("rdtClass", "10-test"))]
        with plugin(w) as p:
            for adjust, words in cases:
                p.script({"CreateContainer": {"adjust": {"linux": adjust}}})
                error = w.c.fails("create", pod, w.config("refused"), w.any)
                expect(all(word in error for word in words), f"{words}: {error}")
            expect(w.listed() == before, "something is listed")
            # To be in no class of one's own is what every container is.
            for nothing in ({"rdt": {"remove": True}}, {"resources": {"rdt_class": {"value": ""}}},
                            {"rdt": {"enable_monitoring": {"value": False}}}):
                p.script({"CreateContainer": {"adjust": {"linux": nothing}}})
                container = w.started(pod, w.fresh("c"))
            answer = p.send([{"container_id": container, "linux": {"resources": {"rdt_class": {"value": "gold"}}}}])
            expect(answer["failed"] == [container], str(answer))
        w.remove(pod)

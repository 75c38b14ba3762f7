"""Traffic of block devices: what a container writes and reads past the page cache, in its metrics."""

from harness.report import expect
from world import MIB, V2, Metrics, cgroup_file, on_block_device

DIRECT = 4 * MIB


def kernel(pid):
    """{(device, Read, Write, on v1 also Sync, Async, Discard, Total): bytes} of the process's cgroup."""
    text = cgroup_file(pid, "blkio", "blkio.throttle.io_service_bytes_recursive", "io.stat")
    if not V2:
        lines = [line.split() for line in text.splitlines()]
        return {(words[0], words[1]): int(words[2]) for words in lines if len(words) == 3}
    found = {}
    for device, *fields in (line.split() for line in text.splitlines()):
        counters = dict(field.split("=") for field in fields)
        found.update({(device, "Read"): int(counters.get("rbytes", 0)), (device, "Write"): int(counters.get("wbytes", 0))})
    return found


def told(metrics):
    """The same from the metrics; they also have the device's name."""
    return {(f"{major}:{minor}", operation): value
            for (name, (_, major, minor, operation)), (_, value, _) in
            ((key, one) for key, one in metrics.items() if key[0] == "container_blkio_device_usage_total")}


def traffic(steps, node, keys, container, pid):
    name = "block devices: what is written and read past the page cache"
    if not on_block_device(node.s.runtime.root):
        return steps.left_out(name, "the writable layers are on none")
    with steps.step(name):
        node.inside(container, f"cd /tmp && dd if=/dev/zero of=direct bs=1M count={DIRECT // MIB} oflag=direct && "
                    "dd if=direct of=/dev/null bs=1M iflag=direct && rm direct")
        before = kernel(pid)
        metrics = Metrics(node.c, keys, node.pod).containers[container]
        after, found = kernel(pid), told(metrics)
        # v1 also tells by other kinds; kubelet's cAdvisor has all.
        expect({kind for _, kind in found} == {kind for _, kind in after}, f"kinds: {sorted(found)}, host: {sorted(after)}")
        moved = {operation: sum(v for (_, o), v in found.items() if o == operation) for operation in ("Read", "Write")}
        expect(moved["Read"] >= DIRECT <= moved["Write"], f"{moved} of {DIRECT} bytes each")
        for key in after:
            expect(before.get(key, 0) <= found.get(key, 0) <= after[key], f"{key}: {found} between {before} and {after}")
        for operation, kind in (("Read", "reads"), ("Write", "writes")):
            values = {m: sum(v for (n, _), (_, v, _) in metrics.items() if n == f"container_fs_{kind}{m}_total")
                      for m in ("", "_bytes")}
            expect(values["_bytes"] == moved[operation] and values[""] > 0, f"{kind}: {values}, not {moved}")
        names = {extra[0] for n, extra in metrics if n == "container_fs_writes_total"}
        expect(all(device.startswith("/dev/") for device in names), f"devices {names}")

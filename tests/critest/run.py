#!/usr/bin/env python3
"""Runs critest, area by area, and prints what passed, failed and was skipped.

    run.py [AREA...] [--runtime NAME | --socket PATH] [--websocket]

An area is the name of a top-level container of the suite ("Container OOM"). Without
one, the areas of AREAS are run; `--all` runs every area of the suite. A failure, a skip that
SKIPS does not explain, or a run without any spec makes the exit status non-zero.

critest is run from a copy in which the 64 digits of test-image-digest's original digest are
those of the local image: no rebuilt image can have the original's. Nothing else differs.
"""

import contextlib
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from harness import oci, options, report, runtimes  # noqa: E402

AREAS = ("Runtime info", "Idempotence", "PodSandbox", "Container", "Container Mount Propagation",
         "Container Mount Readonly", "Container OOM", "Image Manager", "Image Consistency",
         "Image Identifier Consistency", "Multiple Containers", "Networking")

# Skips that are in order: (area, pattern of the skip's message or of the spec's text, reason).
SKIPS = (
    ("AppArmor", r".", "AppArmor is not in this kernel"),
)
# What pods of an OCI runtime do not offer, beside SKIPS: handler to such a list.
HANDLER_SKIPS = {
    "crun": (("Container Mount Readonly", r"does not implement recursive readonly mounts",
              "crun before 1.11 has no sub-command `features` that would tell of them"),),
}
# Specs that an OCI runtime cannot pass by its design; they are not run: handler to (pattern of the spec's text, reason).
HANDLER_CANNOT = {
    "runsc": ((r"should support (un)?safe sysctls", "gVisor's own kernel has no such files in /proc/sys"),
              (r"execSync with timeout", "what an exec starts lives in gVisor, where no kill of the node reaches it")),
}
BENCHMARK = "-benchmark"
BENCHMARKS = {"containersNumber": 20, "containersNumberParallel": 2, "containerBenchmarkTimeoutSeconds": 60,
              "podsNumber": 20, "podsNumberParallel": 2, "podBenchmarkTimeoutSeconds": 60,
              "imagesNumber": 5, "imagesNumberParallel": 1, "imageBenchmarkTimeoutSeconds": 60,
              "imagePullingBenchmarkImage": "registry.k8s.io/e2e-test-images/busybox:1.29-2",
              "imageListingBenchmarkImages": ["registry.k8s.io/e2e-test-images/busybox:1.29-2"],
              "podContainerStartBenchmarkTimeoutSeconds": 60}
SELINUX = "/sys/fs/selinux/enforce"
APPARMOR = "/sys/module/apparmor/parameters/enabled"

ORIGINAL_DIGEST = b"9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"
DIGEST_IMAGE = "k8s-staging-cri-tools/test-image-digest:latest"


def adapted_critest(images, work):
    """The copy of critest that knows the local image's digest."""
    with open(runtimes.tool("CRITEST"), "rb") as f:
        program = f.read()
    with open(os.path.join(images, "images.json")) as f:
        digest = json.load(f)[DIGEST_IMAGE].removeprefix("sha256:").encode()
    report.expect(program.count(ORIGINAL_DIGEST) == 1, "critest does not hold the digest once")
    path = os.path.join(work, "critest")
    with open(path, "wb") as f:
        f.write(program.replace(ORIGINAL_DIGEST, digest))
    os.chmod(path, 0o755)
    return path


def area_of(spec):
    name = (spec["ContainerHierarchyTexts"] or ["?"])[0]
    return re.sub(r"^\[k8s\.io\] | \[Conformance\]$", "", name)


def text_of(spec):
    return " ".join([*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]])


def specs_in(path):
    with open(path) as f:
        suites = json.load(f)
    return [s for suite in suites for s in suite["SpecReports"] if s["LeafNodeType"] == "It"]


def choose(critest, work, areas, pattern, mode):
    """The texts of the specs to run (a dry run lists them all), and the areas there are."""
    dry = os.path.join(work, "dry.json")
    subprocess.run([critest, *mode, "-ginkgo.dry-run", f"-ginkgo.json-report={dry}"], cwd=work, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    listed = [s for s in specs_in(dry) if s["State"] == "passed"]  # what the mode leaves out is "skipped"
    known = sorted({area_of(s) for s in listed})
    unknown = [a for a in areas if a not in known]
    report.expect(not unknown, f"no area {unknown}; there are {known}")
    return [text_of(s) for s in listed
            if (not areas or area_of(s) in areas) and re.search(pattern, text_of(s))]


def segments():
    """Ids of the System V shared memory segments."""
    with open("/proc/sysvipc/shm") as f:
        return {line.split()[1] for line in f.readlines()[1:]}


@contextlib.contextmanager
def segments_restored():
    """The HostIPC specs leave segments behind: those that were not there before go."""
    before = segments()
    try:
        yield
    finally:
        for segment in segments() - before:
            subprocess.run(["ipcrm", "-m", segment], check=False)


def run(critest, work, socket, texts, factor, arguments):
    """Runs the chosen specs; the suite's output goes to critest.log."""
    result = os.path.join(work, "report.json")
    # In its benchmark mode critest sets focus and verbosity itself.
    focus = [] if BENCHMARK in arguments else ["-ginkgo.v", *(f"-ginkgo.focus={re.escape(t)}$" for t in texts)]
    command = [critest, f"-runtime-endpoint=unix://{socket}", f"-image-endpoint=unix://{socket}",
               f"-ginkgo.json-report={result}", "-ginkgo.no-color",
               f"-ginkgo.timeout={int(1500 * factor)}s", *arguments, *focus]
    with open(os.path.join(work, "critest.log"), "wb") as log:
        with segments_restored():
            subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    if not os.path.exists(result):
        with open(os.path.join(work, "critest.log"), errors="replace") as log:
            raise report.Failure("critest gave no report: " + log.read()[-2000:])
    chosen = set(texts)
    return [s for s in specs_in(result) if text_of(s) in chosen]


def skip_reason(spec, handler=None):
    """Why this skip is in order, or None."""
    said = spec.get("Failure", {}).get("Message", "") + " " + text_of(spec)
    for area, pattern, reason in SKIPS + HANDLER_SKIPS.get(handler, ()):
        if area == area_of(spec) and re.search(pattern, said):
            if area == "AppArmor" and os.path.exists(APPARMOR):
                continue
            return reason
    return None


def show(specs, missing, seconds, handler=None):
    """Prints failures, unexplained skips and the table; the exit status."""
    rows, bad = {}, 0
    for spec in specs:
        row = rows.setdefault(area_of(spec), {"passed": 0, "failed": 0, "skipped": 0, "s": 0.0})
        state = {"passed": "passed", "skipped": "skipped"}.get(spec["State"], "failed")
        row[state] += 1
        row["s"] += spec["RunTime"] / 1e9
        if state == "failed":
            bad += 1
            failure = spec.get("Failure", {})
            where = os.path.basename(failure.get("Location", {}).get("FileName", "?"))
            print(f"\nFAIL  {text_of(spec)} ({spec['State']}, {where}:"
                  f"{failure.get('Location', {}).get('LineNumber', 0)})\n      "
                  + failure.get("Message", "").strip().replace("\n", "\n      "))
        elif state == "skipped":
            reason = skip_reason(spec, handler)
            bad += reason is None
            said = spec.get("Failure", {}).get("Message", "").strip()
            print(f"skip  {text_of(spec)}: {reason or 'NOT EXPECTED: ' + said}")
    for text in missing:
        bad += 1
        print(f"FAIL  {text}: not run")
    print(f"\n{'area':34}{'passed':>8}{'failed':>8}{'skipped':>8}{'seconds':>9}")
    for area, row in sorted(rows.items()):
        print(f"{area:34}{row['passed']:8}{row['failed']:8}{row['skipped']:8}{row['s']:9.1f}")
    total = {k: sum(r[k] for r in rows.values()) for k in ("passed", "failed", "skipped")}
    print(f"\n({seconds:.0f} s)\ncritest: {total['passed']} passed, {total['failed'] + len(missing)} failed, "
          f"{total['skipped']} skipped", flush=True)
    return 1 if bad or not total["passed"] else 0


def suite(args, work, images, socket):
    critest = adapted_critest(images, work)
    mode = [BENCHMARK] if args.benchmark else []
    texts = choose(critest, work, () if args.all or mode else args.areas or AREAS, args.spec, mode)
    for pattern, reason in HANDLER_CANNOT.get(args.runtime_handler, ()):
        for text in [t for t in texts if re.search(pattern, t)]:
            print(f"not run  {text}: {reason}")
            texts.remove(text)
    report.expect(texts, "no spec is chosen")
    arguments = [*mode, *([f"-runtime-handler={args.runtime_handler}"] if args.runtime_handler else [])]
    if args.websocket:
        arguments += [f"-websocket-{kind}" for kind in ("exec", "attach", "portforward")]
    if args.benchmark:
        params = os.path.join(work, "benchmarks.yaml")
        with open(params, "w") as f:
            json.dump(BENCHMARKS, f)  # JSON is YAML
        arguments += [f"-benchmarking-params-file={params}"]
    start = time.monotonic()
    specs = run(critest, work, socket, texts, args.time_factor, arguments)
    ran = {text_of(s) for s in specs}
    status = show(specs, [t for t in texts if t not in ran], time.monotonic() - start, args.runtime_handler)
    if status and not args.keep:
        print("(--keep keeps critest.log and the runtime's log)")
    return status


def main():
    parser = options.parser(__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA")
    parser.add_argument("--all", action="store_true", help="every area of the suite")
    parser.add_argument("--spec", default="", help="only specs whose text matches this pattern")
    parser.add_argument("--socket", help="a runtime that runs already, with certs.d set up for the test images")
    parser.add_argument("--websocket", action="store_true", help="streaming over WebSocket instead of SPDY")
    parser.add_argument("--benchmark", action="store_true", help="the suite's benchmarks instead of its specs")
    parser.add_argument("--runtime-handler", metavar="NAME",
                        help="run every pod with this handler; runc, crun, runsc and youki are configured for it")
    args = parser.parse_args()
    if args.socket:
        with tempfile.TemporaryDirectory(prefix="critest-") as work:
            sys.exit(suite(args, work, args.images or options.registry.prepare(), args.socket))
    if args.runtime_handler in ("runc", "crun", "runsc", "youki"):
        runtimes.Runtime.handlers = {args.runtime_handler: oci.handler(args.runtime_handler)}
    if os.path.exists(SELINUX):
        runtimes.Berth.extra = {**runtimes.Berth.extra, "selinux": True}
    steps, status = report.Steps("critest harness"), 1
    with options.session(args, steps) as s:
        status = suite(args, s.work, s.images, s.runtime.socket)
        for leftover in glob.glob("/tmp/podLogTest*"):
            shutil.rmtree(leftover)  # by its log specs
    sys.exit(status or bool(steps.failed))


if __name__ == "__main__":
    main()

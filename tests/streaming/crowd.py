#!/usr/bin/env python3
"""Crowds of a local user at the ports of the daemon: they keep nobody from exec, nor from the metrics.

    crowd.py

A process of nobody's holds more connections than there are places and opens each again when it is closed: silent ones, halves of requests, of
TLS handshakes, requests with tokens that were never given. Meanwhile crictl and a client of the tests' own run commands, over
both transports; a session that is open goes on.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

from run import METRICS, TRANSPORTS, Pod, cost, settled  # sets the path to the others
from protocols import restarted  # noqa: E402
from harness import options, runtimes  # noqa: E402
from harness.report import Steps, expect, wait_for  # noqa: E402
from raw import Cri, Spdy, exit_code  # noqa: E402

SIZE = 1100
CROWD = """
import os, resource, selectors, socket, sys
host, port, size, text = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), bytes.fromhex(sys.argv[4])
resource.setrlimit(resource.RLIMIT_NOFILE, (size + 100, size + 100))
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
waiting = selectors.DefaultSelector()
def come():
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex((host, port))
    waiting.register(s, selectors.EVENT_WRITE)
for _ in range(size):
    come()
told = 0
while True:
    for key, event in waiting.select():
        s = key.fileobj
        try:
            if event & selectors.EVENT_WRITE:
                s.send(text) if text else s.getpeername()
                waiting.modify(s, selectors.EVENT_READ)
                told += 1
                if told == size:
                    print("here", flush=True)
                continue
            if s.recv(4096):
                continue
        except OSError:
            pass
        waiting.unregister(s)
        s.close()
        come()
"""
HEAD = "POST /exec/%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n" % ("x" * 22)
SHAPES = {
    "silent": b"",
    "half a request": HEAD.encode(),
    "a token that was never given, and no end of a body": (HEAD + "Content-Length: 100000\r\n\r\n").encode(),
    "half a handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}


@contextlib.contextmanager
def crowd(address, text):
    """Holds its connections for the block."""
    host, _, port = address.rpartition(":")
    process = subprocess.Popen([sys.executable, "-c", CROWD, host, port, str(SIZE), text.hex()], stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE)
    try:
        expect(process.stdout.readline() == b"here\n", "no crowd")
        yield
        expect(process.poll() is None, f"the crowd has gone: {process.returncode}")
    finally:
        process.kill()
        process.communicate()


def served(pod, cri, container):
    """Commands run, by every way."""
    for transport in TRANSPORTS:
        code, out, err = pod.run("exec", "--transport", transport, container, "echo", "done")
        expect(code == 0 and out == b"done\n", f"{transport}: exit {code}, {out!r}, {err}")
    for _ in range(10):
        with Spdy(cri.exec(container, ["sh", "-c", "exit 3"], stdout=True), "v4.channel.k8s.io", ("error", "stdout")) as session:
            expect(exit_code(session.until_ended("error")[0]) == 3, "not the exit code")


def at_the_streaming_port(pod, cri, container, steps):
    for shape, text in SHAPES.items():
        with steps.step(f"a crowd of {SIZE}, {shape}: commands run, a session goes on"):
            before = cost(pod.s)
            url = cri.exec(container, ["cat"], stdin=True, stdout=True)
            place = urllib.parse.urlsplit(url).netloc
            with Spdy(url, "v4.channel.k8s.io", ("error", "stdin", "stdout")) as session, crowd(place, text):
                session.send("stdin", b"before")
                served(pod, cri, container)
                session.send("stdin", b" and after", end=True)
                expect(session.until_ended("stdout") == [b"before and after"], "the session has changed")
            wait_for(f"the baseline {before}", lambda before=before: settled(pod.s, before), 30 * pod.s.factor)


def alone(cri, container, steps, factor):
    with steps.step("a connection without a request is closed within seconds, however slowly it speaks"):
        place = urllib.parse.urlsplit(cri.exec(container, ["true"], stdout=True))
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(socket.create_connection((place.hostname, place.port), 20 * factor)) for _ in range(2)]
            end = time.monotonic() + 20 * factor
            ends[0].settimeout(0.2)
            with contextlib.suppress(ConnectionError):
                while True:
                    expect(time.monotonic() < end, "the slow one is still there")
                    ends[0].sendall(b"G")
                    with contextlib.suppress(TimeoutError):
                        if not ends[0].recv(4096):
                            break
            with contextlib.suppress(ConnectionError):
                expect(ends[1].recv(1) == b"", "an answer to nothing")


def encrypted(pod, container, steps):
    restarted(pod.s, stream_enable_tls=True, metrics_address=METRICS)
    for shape in ("silent", "half a handshake"):
        with steps.step(f"in TLS, a crowd of {SIZE}, {shape}: commands run"):
            place = urllib.parse.urlsplit(Cri(pod.s.runtime.socket).exec(container, ["true"], stdout=True)).netloc
            with crowd(place, SHAPES[shape]):
                for transport in TRANSPORTS:
                    code, out, err = pod.run("exec", "--transport", transport, container, "echo", "done")
                    expect(code == 0 and out == b"done\n", f"{transport}: exit {code}, {out!r}, {err}")


def scraped(patience):
    with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=patience) as page:
        expect(b"berth_build_info" in page.read(), "no metrics")
    return True


def at_the_metrics(steps, factor):
    for shape in ("silent", "half a request"):
        with steps.step(f"a crowd of {SIZE} at the metrics, {shape}: they are served"), crowd(METRICS, SHAPES[shape]):
            for _ in range(3):
                # As scrapers do: one that finds the door crowded comes again.
                wait_for("the metrics", lambda: scraped(5 * factor), 60 * factor)


def main():
    args = options.parser(__doc__).parse_args()
    if args.runtime != "berth":
        sys.exit("limits of berth's own")
    runtimes.Berth.extra = {**runtimes.Berth.extra, "metrics_address": METRICS}
    steps = Steps("crowds")
    with options.session(args, steps) as s:
        pod, cri = Pod(s), Cri(s.runtime.socket)
        container = pod.container("main", "sleep 100000")
        at_the_streaming_port(pod, cri, container, steps)
        alone(cri, container, steps, s.factor)
        at_the_metrics(steps, s.factor)
        encrypted(pod, container, steps)
        pod.c("stopp", pod.id)
        pod.c("rmp", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

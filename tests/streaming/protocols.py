#!/usr/bin/env python3
"""What streaming promises to every client, old and new, by a client of the tests' own and by crictl.

    protocols.py

Each protocol version over SPDY and WebSocket; a terminal attached to, and its sizes; URLs that are used twice, late, by GET and
by POST; a gigabyte out and a quarter in; a server on ::1; a hundred forwards at once; the configured address, port and
limits, over restarts of the daemon.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

from run import METRICS, PORT, TRANSPORTS, Pod, Terminal, cost, forwarded, settled  # sets the path to the others
from harness import options, runtimes  # noqa: E402
from harness.report import Failure, Steps, expect, wait_for  # noqa: E402
from raw import Cri, Refused, Spdy, WebSocket, exit_code, upgrade  # noqa: E402

COMMAND = ["sh", "-c", "read line; echo got $line; echo err >&2; exit 3"]
SIZE_SCRIPT = "trap 'echo now $(stty size)' WINCH; echo begun; while :; do sleep 1; done"
BLOCK, OUT, IN = 64 << 20, 16, 4
FORWARDS = 100
PORT_6, PORT_ECHO = 8081, 8082


def spdy_protocols(pod, cri, container, steps):
    for version, protocol in enumerate(("channel.k8s.io", "v2.channel.k8s.io", "v3.channel.k8s.io", "v4.channel.k8s.io"), 1):
        with steps.step(f"SPDY, version {version}: output, stdin with its end, the exit code"):
            url = cri.exec(container, ["sh", "-c", "cat; echo err >&2; exit 3"], stdin=True, stdout=True, stderr=True)
            with Spdy(url, protocol, ("error", "stdin", "stdout", "stderr")) as session:
                expect(session.protocol == protocol, f"the server chose {session.protocol}")
                session.send("stdin", b"some ")
                session.send("stdin", b"words", end=True)
                out, err, told = session.until_ended("stdout", "stderr", "error")
            expect((out, err) == (b"some words", b"err\n"), f"{out!r} {err!r}")
            if version == 4:
                expect(exit_code(told) == 3, f"{told!r}")
            else:
                expect(b"exit code" in told and told.endswith(b"3"), f"{told!r}")
            url = cri.exec(container, ["true"], stdout=True)
            with Spdy(url, protocol, ("error", "stdout")) as session:
                told = session.until_ended("error")[0]
            expect(exit_code(told) == 0 if version == 4 else told == b"", f"success is told as {told!r}")
    for version in (3, 4):
        with steps.step(f"SPDY, version {version}: a terminal and its sizes"):
            url = cri.exec(container, ["sh", "-c", SIZE_SCRIPT], stdin=True, stdout=True, tty=True)
            with Spdy(url, f"v{version}.channel.k8s.io", ("error", "stdin", "stdout", "resize")) as session:
                wait_told(session, "stdout", b"begun")
                session.send("resize", b'{"Width":91,"Height":33}')
                wait_told(session, "stdout", b"now 33 91")
    with steps.step("SPDY: the first of the offered versions that is known"):
        url = cri.exec(container, ["true"], stdout=True)
        with Spdy(url, ("v9.channel.k8s.io", "v2.channel.k8s.io", "v4.channel.k8s.io")) as session:
            expect(session.protocol == "v2.channel.k8s.io", session.protocol)


def wait_told(session, channel, text):
    """Waits until a channel has told this; the socket has a timeout."""
    while text not in session.heard.get(session.ids[channel], b""):
        expect(session.frame(), f"ended after {session.heard}")


def websocket_protocols(cri, container, steps):
    for protocol in ("v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io",
                     "base64.channel.k8s.io", None):
        with steps.step(f"WebSocket, {protocol or 'no protocol named'}: output, stdin, the exit code"):
            url = cri.exec(container, COMMAND, stdin=True, stdout=True, stderr=True)
            with WebSocket(url, protocol) as session:
                expect(session.protocol == protocol, f"the server chose {session.protocol}")
                session.send(0, b"wor")
                session.send(0, b"ds\n")
                out, err, told = session.until_closed(1, 2, 3)
            expect((out, err) == (b"got words\n", b"err\n"), f"{out!r} {err!r}")
            if protocol and protocol[:2] in ("v4", "v5"):
                expect(exit_code(told) == 3, f"{told!r}")
            else:
                expect(b"exit code" in told and told.endswith(b"3"), f"{told!r}")


def urls(cri, pod, container, steps):
    with steps.step("a URL counts once, by GET as by POST, and no other's verb"):
        for method in ("GET", "POST"):
            url = cri.exec(container, ["true"], stdout=True)
            refused(404, url.replace("/exec/", "/attach/"), method)
            refused(405, url, "PUT")
            with Spdy(url, "v4.channel.k8s.io", ("error", "stdout"), method=method) as session:
                expect(exit_code(session.until_ended("error")[0]) == 0, "exec fails")
            refused(404, url, method)
        url = cri.port_forward(pod.id, PORT)
        Spdy(url, "portforward.k8s.io").socket.close()
        refused(404, url, protocol="portforward.k8s.io")


def refused(status, url, method="POST", protocol="v4.channel.k8s.io"):
    try:
        upgrade(url, [("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)], method)[0].close()
    except Refused as error:
        expect(error.status == status, f"{error}, not {status}")
    else:
        raise Failure(f"served, not {status}")


def late(begun, url, steps):
    with steps.step("a URL of a minute ago counts no more"):
        time.sleep(max(0, begun + 61 - time.monotonic()))
        refused(404, url)


def attach_terminal(pod, steps, transport):
    wait = 10 * pod.s.factor
    with steps.step(f"{transport}: attach to a terminal, its size is seen inside"):
        name = "size-" + transport
        container = pod.container(name, SIZE_SCRIPT, stdin=True, tty=True)
        terminal = Terminal([*pod.c.base, "attach", "--transport", transport, "-it", container], 31, 97)
        terminal.until(rb"now 31 97", wait)
        terminal.resize(40, 120)
        os.kill(terminal.pid, signal.SIGWINCH)
        terminal.until(rb"now 40 120", wait)
        terminal.end()
        expect(pod.c("ps", "-q", "--state", "running", "--name", name).strip() == container, "ended with its client")
        pod.c("stop", "--timeout", "0", container)
        pod.c("rm", container)


def blocks(pattern, count):
    """Numbered blocks: none can be lost, doubled or moved unseen."""
    for number in range(count):
        yield b"%d\n" % number
        yield pattern


def large(pod, steps, transport):
    """A gigabyte out, a quarter in: the sums are right, and the daemon does not hold them."""
    wait = 300 * pod.s.factor
    with open(pod.s.work + "/volume/block", "rb") as f:
        pattern = f.read()
    container = pod.volume
    with steps.step(f"{transport}: 1 GiB out"):
        want, got = hashlib.sha1(), hashlib.sha1()
        for part in blocks(pattern, OUT):
            want.update(part)
        script = f"i=0; while [ $i -lt {OUT} ]; do echo $i; cat /volume/block; i=$((i+1)); done"
        start = time.monotonic()
        client = pod.client("exec", "--transport", transport, container, "sh", "-c", script)
        try:
            size = 0
            while part := client.stdout.read1(1 << 20):
                got.update(part)
                size += len(part)
                expect(time.monotonic() < start + wait, f"{size} bytes in {wait} s")
            client.wait(wait)
            expect(got.digest() == want.digest(), f"{size} bytes, not the same")
        finally:
            client.kill()
            client.communicate()
        print(f"      ({(OUT * BLOCK >> 20) / (time.monotonic() - start):.0f} MiB/s)")
    with steps.step(f"{transport}: 256 MiB in"):
        want = hashlib.sha1()
        start = time.monotonic()
        client = pod.client("exec", "--transport", transport, "-i", container, "sha1sum", stdin=subprocess.PIPE)
        try:
            for part in blocks(pattern, IN):
                want.update(part)
                client.stdin.write(part)
            out, err = client.communicate(timeout=wait)
            expect(out.split()[:1] == [want.hexdigest().encode()], f"{out!r} {err[-300:]!r}, not {want.hexdigest()}")
        finally:
            client.kill()
            client.communicate()
        print(f"      ({(IN * BLOCK >> 20) / (time.monotonic() - start):.0f} MiB/s)")


def loopback_6(pod, container, steps, transport):
    with steps.step(f"{transport}: a forward to a server on ::1 only"):
        code, _, _ = pod.run("exec", "--sync", container, "wget", "-qO-", f"http://127.0.0.1:{PORT_6}/")
        expect(code != 0, "it answers on 127.0.0.1 too")
        with forwarded(pod, transport, to=PORT_6) as port, socket.create_connection(("127.0.0.1", port), 20) as s:
            s.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
            got = b"".join(iter(lambda: s.recv(65536), b""))
            expect(b"the page" in got, f"{got!r}")


# httpd's accept queue is so short that the kernel resets some of a hundred connections: a server with room for all.
ECHO = f"""
import socketserver
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(100):
            self.request.sendall(data)
class Server(socketserver.ThreadingTCPServer):
    request_queue_size, daemon_threads = {2 * FORWARDS}, True
with Server(("127.0.0.1", {PORT_ECHO}), Echo) as server:
    print("listening", flush=True)
    server.serve_forever()
"""


@contextlib.contextmanager
def echo_server(pod, container):
    """Echoes in the pod's network, without being of the pod."""
    pid = pod.c.json("inspect", container)["info"]["pid"]
    server = subprocess.Popen(["nsenter", "--net", "--target", str(pid), sys.executable, "-c", ECHO], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE)
    try:
        expect(server.stdout.readline() == b"listening\n", "the test's server does not start")
        yield
    finally:
        server.kill()
        server.communicate()


def echoed(s, text):
    s.sendall(text)
    got = b""
    while len(got) < len(text) and (part := s.recv(100)):
        got += part
    expect(got == text, f"{got!r}, not {text!r}")


def parallel_forwards(pod, steps, transport):
    with steps.step(f"{transport}: {FORWARDS} forwards at once through one client, nothing is left"):
        before, wait = cost(pod.s), 30 * pod.s.factor
        together = threading.Barrier(FORWARDS)
        with forwarded(pod, transport, to=PORT_ECHO) as port:
            def one(number):
                try:
                    with socket.create_connection(("127.0.0.1", port), wait) as s:
                        echoed(s, b"first %d" % number)
                        together.wait(wait)  # all are open now
                        echoed(s, b"then %d" % number)
                        together.wait(wait)
                except (Failure, OSError, threading.BrokenBarrierError) as error:
                    together.abort()
                    return f"{number}: {error!r}"
                return ""

            with concurrent.futures.ThreadPoolExecutor(FORWARDS) as threads:
                failed = list(filter(None, threads.map(one, range(FORWARDS))))
            expect(not failed, f"{len(failed)} of {FORWARDS} failed: {failed[:3]}")
        wait_for(f"the baseline {before}", lambda: settled(pod.s, before), wait)


def stopped_pod(pod, cri, steps):
    """A session that outlives its pod leads nowhere: not to what listens on the node."""
    url = cri.port_forward(pod.id)
    with socket.create_server(("127.0.0.1", 0)) as node, Spdy(url, "portforward.k8s.io") as session:
        def pair(name, port):
            for kind in ("error", "data"):
                session.open(name + kind, streamtype=kind, port=str(port), requestid=name)
            session.send(name + "error", b"", end=True)

        with steps.step("a forward of a pod that has stopped reaches nothing on the node"):
            pair("before", PORT)
            session.send("beforedata", b"GET /index.html HTTP/1.0\r\n\r\n")
            expect(b"the page" in session.until_ended("beforedata")[0], "no page")
            pod.c("stopp", pod.id)
            pair("after", node.getsockname()[1])
            session.socket.settimeout(5 * pod.s.factor)
            told = b""
            with contextlib.suppress(TimeoutError):  # where it is connected, nothing is told
                told = session.until_ended("aftererror")[0]
            node.settimeout(0)
            try:
                node.accept()
            except BlockingIOError:
                expect(b"forward" in told, f"{told!r}")
            else:
                raise Failure("it reaches the node's own port")


def restarted(s, **extra):
    """The same daemon and its pods, with other keys."""
    s.runtime.extra = extra
    code = s.runtime.stop()
    expect(code == 0, f"the daemon ended with {code}")
    s.runtime.start()


def fixed_place(s, cri, container, steps):
    with socket.create_server(("127.0.0.2", 0)) as free:
        port = free.getsockname()[1]
    with steps.step("the configured address and port, and the same after a restart with an open session"):
        for _ in range(2):
            restarted(s, stream_address="127.0.0.2", stream_port=port)
            url = cri.exec(container, ["sh", "-c", "echo begun; exec sleep 1000"], stdout=True)
            expect(urllib.parse.urlsplit(url).netloc == f"127.0.0.2:{port}", url)
            session = Spdy(url, "v4.channel.k8s.io", ("error", "stdout"))
            wait_told(session, "stdout", b"begun")
        session.socket.close()


def limits(pod, cri, container, steps):
    s, wait = pod.s, 20 * pod.s.factor
    restarted(s, stream_creation_timeout=2, stream_idle_timeout=2)

    def over_after(session, name, channel=None):
        start = time.monotonic()
        session.socket.settimeout(wait)
        while b"stream_idle_timeout" not in session.heard.get(channel, b""):
            if not (session.frame() if isinstance(session, Spdy) else session.message()):
                expect(channel is None, f"{name}: closed without a word: {session.heard}")
                break
        taken = time.monotonic() - start
        expect(1 < taken < wait, f"{name}: over after {taken:.1f} s")

    with steps.step("stream_creation_timeout: a client that does not open its streams"):
        url = cri.exec(container, ["true"], stdout=True, stderr=True)
        with Spdy(url, "v4.channel.k8s.io", ("error",)) as session:
            start = time.monotonic()
            while time.monotonic() < start + 1.5:  # it is not silent
                session.socket.sendall(b"\x80\x03\x00\x06\x00\x00\x00\x04\x00\x00\x00\x01")  # PING
                time.sleep(0.1)
            while session.frame():
                expect(time.monotonic() < start + wait, "not closed")
            expect(time.monotonic() - start < wait, "late")
    with steps.step("stream_idle_timeout: sessions in which nothing is said end, and their commands"):
        number = 4000 + os.getpid() % 1000
        command = ["sleep", str(number)]
        with Spdy(cri.exec(container, command, stdout=True), "v4.channel.k8s.io", ("error", "stdout")) as session:
            over_after(session, "SPDY", session.ids["error"])
        with WebSocket(cri.exec(container, command, stdout=True), "v4.channel.k8s.io") as session:
            over_after(session, "WebSocket", 3)
        with Spdy(cri.attach(container, stdout=True), "v4.channel.k8s.io", ("error", "stdout")) as session:
            over_after(session, "attach", session.ids["error"])
        with Spdy(cri.port_forward(pod.id, PORT), "portforward.k8s.io") as session:
            over_after(session, "port-forward")

        def gone():
            _, out, _ = pod.run("exec", "--sync", container, "ps", "-o", "args")
            return f"sleep {number}".encode() not in out

        wait_for("the end of the commands", gone, wait)


def main():
    args = options.parser(__doc__).parse_args()
    runtimes.Berth.extra = {**runtimes.Berth.extra, "metrics_address": METRICS}  # for cost()
    steps = Steps("protocols")
    with options.session(args, steps) as s:
        pod, cri = Pod(s), Cri(s.runtime.socket)
        serve = (f"mkdir /www; echo the page > /www/index.html; httpd -p [::1]:{PORT_6} -h /www;"
                 f"exec httpd -f -p 127.0.0.1:{PORT} -h /www")
        container = pod.container("main", serve)
        os.makedirs(s.work + "/volume")
        with open(s.work + "/volume/block", "wb") as f:
            f.write(os.urandom(BLOCK))
        pod.volume = pod.container("volume", "sleep 100000", mounts=[
            {"container_path": "/volume", "host_path": s.work + "/volume", "readonly": True}])
        begun, waiting = time.monotonic(), cri.exec(container, ["true"], stdout=True)
        steps.run(spdy_protocols, pod, cri, container, steps)
        steps.run(websocket_protocols, cri, container, steps)
        steps.run(urls, cri, pod, container, steps)
        for transport in TRANSPORTS:
            steps.run(attach_terminal, pod, steps, transport)
            steps.run(loopback_6, pod, container, steps, transport)
            with echo_server(pod, container):
                steps.run(parallel_forwards, pod, steps, transport)
            steps.run(large, pod, steps, transport)
        steps.run(late, begun, waiting, steps)
        steps.run(fixed_place, s, cri, container, steps)
        steps.run(limits, pod, cri, container, steps)
        restarted(s)
        steps.run(stopped_pod, pod, cri, steps)
        pod.c("rmp", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

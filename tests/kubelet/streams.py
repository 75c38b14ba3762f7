"""kubelet's own /exec, /attach, /portForward, /run and /containerLogs, by Kubernetes' client library.

kubelet 1.36 speaks the newest WebSocket protocols itself and asks the runtime by SPDY ("websocket" below; with
port-forward SPDY inside WebSocket); what is older it passes on as it is ("spdy", "websocket-v4").
"""

import concurrent.futures
import contextlib
import json
import os
import select
import signal
import ssl
import subprocess
import time
import urllib.parse
import urllib.request

from harness import runtimes
from harness.report import expect, wait_for

HERE = os.path.dirname(os.path.abspath(__file__))
SERVER = "https://127.0.0.1:10250"
EXEC = ("spdy", "websocket", "websocket-v4")
FORWARD = ("spdy", "websocket")
PORTS = {"8081": "one", "8082": "two"}
CLOSED = "8099"
GIVEN_UP = 125  # the client's own exit status when the call fails


class Streams:
    """The client against the pod `streams`."""

    def __init__(self, s):
        self.s, self.program = s, runtimes.tool("KUBELET_STREAMS")

    def command(self, verb, transport, path, *flags, more=()):
        return [self.program, verb, "-server", SERVER, "-transport", transport, *flags, path, *more]

    def path(self, verb, container, command=(), **query):
        pairs = [("command", word) for word in command] + [(key, "1") for key, wanted in query.items() if wanted]
        return f"/{verb}/default/streams-node1/{container}?{urllib.parse.urlencode(pairs)}"

    def exec(self, transport, command, given=None, **query):
        """Exit status, stdout and stderr of a command in the container `shell`."""
        path = self.path("exec", "shell", command, output=True, error=not query.get("tty"), input=given is not None,
                         **query)
        done = subprocess.run(self.command("exec", transport, path, *(["-stdin"] if given is not None else [])),
                              input=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
                              timeout=60 * self.s.factor,
                              **({} if given is not None else {"stdin": subprocess.DEVNULL}))
        return done.returncode, done.stdout, done.stderr

    @contextlib.contextmanager
    def client(self, *arguments, **more):
        """A client that is killed at the end of the block."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        process = subprocess.Popen(self.command(*arguments, more=pipes.pop("arguments", ())), **pipes)
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def plain(method, path):
    """What kubelet answers without an upgrade; the caller closes it."""
    request = urllib.request.Request(SERVER + path, method=method)
    anyone = ssl._create_unverified_context()  # kubelet's certificate is signed by nobody
    return urllib.request.urlopen(request, timeout=60, context=anyone)


def hear(stream, wanted, seconds, say=None):
    """Reads until `wanted` came; `say` is called again and again meanwhile: an attach has no first word."""
    seen, end = b"", time.monotonic() + seconds
    while wanted not in seen:
        expect(time.monotonic() < end, f"{wanted!r} is not in {seen!r}")
        if say:
            say()
        if select.select([stream], [], [], 0.3)[0]:
            got = os.read(stream.fileno(), 65536)
            expect(got, f"ended with {seen!r}")
            seen += got
    return seen


def executes(t, steps, transport):
    with steps.step(f"{transport}: /exec, stdout and stderr apart, exit code 3"):
        code, out, err = t.exec(transport, ["sh", "-c", "echo out; echo err >&2; exit 3"])
        expect((code, out, err) == (3, b"out\n", b"err\n"), f"exit {code}: {out!r} {err!r}")
        code, out, err = t.exec(transport, ["no-such-program"])
        expect(code == GIVEN_UP and b"no-such-program" in err, f"exit {code}: {out!r} {err!r}")
    if transport != "websocket-v4":  # it has no end of stdin
        with steps.step(f"{transport}: /exec, 4 MiB of stdin come back, and its end is heard"):
            data = os.urandom(4 << 20)
            code, out, err = t.exec(transport, ["sh", "-c", "cat; echo over >&2"], given=data)
            expect(code == 0 and out == data and err == b"over\n", f"exit {code}, {len(out)} bytes, {err!r}")
    with steps.step(f"{transport}: /exec, a terminal with resize"):
        path = t.path("exec", "shell", ["sh"], output=True, input=True, tty=True)
        with t.client("exec", transport, path, "-stdin", "-tty", "-size", "97x31,120x40") as terminal:
            def ask():
                terminal.stdin.write(b"stty size; tty\n")
                terminal.stdin.flush()

            hear(terminal.stdout, b"31 97", 20 * t.s.factor, ask)
            hear(terminal.stdout, b"/dev/pts/", 20 * t.s.factor, ask)
            terminal.send_signal(signal.SIGWINCH)
            hear(terminal.stdout, b"40 120", 20 * t.s.factor, ask)
            terminal.stdin.write(b"exit 5\n")
            terminal.stdin.flush()
            terminal.stdout.read()
            expect(terminal.wait(20 * t.s.factor) == 5, f"exit {terminal.returncode}: {terminal.stderr.read()!r}")


def attaches(t, steps, transport):
    path = t.path("attach", "echo", input=True, output=True, error=True)
    with steps.step(f"{transport}: /attach, stdin reaches the container, stdout and stderr come apart"):
        word = f"hello-{transport}".encode()
        with t.client("attach", transport, path, "-stdin") as client:
            def say():
                client.stdin.write(word + b"\n")
                client.stdin.flush()

            out = hear(client.stdout, b"got " + word, 20 * t.s.factor, say)
            err = hear(client.stderr, b"heard " + word, 20 * t.s.factor)
            expect(b"heard" not in out and b"got" not in err, f"{out!r} {err!r}")
    with steps.step(f"{transport}: /attach, the container goes on when its client is gone"):
        with t.client("attach", transport, path, "-stdin") as again:
            def repeat():
                again.stdin.write(b"again\n")
                again.stdin.flush()

            hear(again.stdout, b"got again", 20 * t.s.factor, repeat)


def page(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/index.html", timeout=20) as got:
        return got.read().decode().strip()


def forwards(t, steps, transport):
    path = "/portForward/default/streams-node1"
    with steps.step(f"{transport}: /portForward, two ports at once of servers on the pod's 127.0.0.1"):
        with t.client("forward", transport, path, arguments=["0:" + port for port in PORTS]) as client:
            line = client.stdout.readline()
            expect(line, f"no ports: {client.stderr.read()!r}" if client.poll() is not None else "no ports")
            local = json.loads(line)["ports"]
            with concurrent.futures.ThreadPoolExecutor(8) as at_once:
                pages = list(at_once.map(page, local * 8))
            expect(pages == list(PORTS.values()) * 8, f"pages {pages}")
            client.stdin.close()
            client.stdin = None  # communicate() would write to it
            expect(client.wait(20 * t.s.factor) == 0, f"exit {client.returncode}: {client.stderr.read()!r}")
    with steps.step(f"{transport}: /portForward, a closed port gives an error and the connection stays"):
        with t.client("ask", transport, path, arguments=["8081", CLOSED, "8082"]) as client:
            out, err = client.communicate(timeout=60 * t.s.factor)
            got = [json.loads(line) for line in out.splitlines()]
            expect([one["port"] for one in got] == ["8081", CLOSED, "8082"], f"{got} {err!r}")
            expect(got[0]["answer"].endswith("one\n") and not got[0]["error"], str(got[0]))
            expect(CLOSED in got[1]["error"] and not got[1]["answer"], str(got[1]))
            expect(got[2]["answer"].endswith("two\n") and not got[2]["error"], str(got[2]))


def without_upgrade(t, steps):
    with steps.step("/run answers with the command's output, /containerLogs with the log"):
        with plain("POST", "/run/default/streams-node1/shell?cmd=cat+/one/index.html") as answer:
            expect(answer.read() == b"one\n", "/run")
        with plain("GET", "/containerLogs/default/streams-node1/shell?tailLines=2") as answer:
            lines = answer.read().split(b"\n")
            expect(len(lines) == 3 and lines[0].startswith(b"line "), f"/containerLogs: {lines}")
    with steps.step("/containerLogs follows"):
        # kubelet ends it itself: a client that hangs up leaves an error in kubelet's log.
        query = "follow=true&tailLines=1&limitBytes=40"
        with plain("GET", "/containerLogs/default/streams-node1/shell?" + query) as answer:
            lines = answer.read().decode()
        expect(len(lines) == 40, f"{len(lines)} bytes: {lines!r}")
        numbers = [int(line.split()[1]) for line in lines.split("\n")[:-1]]
        expect(numbers == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) >= 3, lines)


def streams(s, kubelet, steps, container_status, note_ids):
    """Adds the pod, drives every endpoint, removes it."""
    t = Streams(s)
    with steps.step("the pod of kubelet's streaming endpoints runs", fatal=True):
        kubelet.add(HERE + "/pods/streams.yaml")
        wait_for("its containers", lambda: all("running" in container_status(kubelet, "streams", n)["state"]
                                               for n in ("shell", "echo")), 90 * s.factor, 0.5)
        note_ids(s)
        wait_for("its servers", lambda: t.exec("spdy", ["wget", "-q", "-O", "-", "127.0.0.1:8082/index.html"])[1] == b"two\n",
                 30 * s.factor, 0.5)
    for transport in EXEC:
        executes(t, steps, transport)
        attaches(t, steps, transport)
    for transport in FORWARD:
        forwards(t, steps, transport)
    without_upgrade(t, steps)
    kubelet.remove("streams")

#!/usr/bin/env python3
"""Exec, attach and port-forward as crictl does them, over SPDY and WebSocket, and a thousand of each.

    run.py [--runtime NAME] [--sessions N]

By hand: output, exit code, stdin, a terminal with resize, two attached clients, a forwarded port. ExecSync: output
without end, a child left behind, a timeout. Then N exec sessions and N forwarded connections, a third of them
cut in the middle: descriptors, threads, memory and processes of the runtime are back where they were.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import leaks, options  # noqa: E402
from harness.report import Failure, Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
TRANSPORTS = ("spdy", "websocket")
PORT = 8080
AT_ONCE = 8


class Pod:
    """One pod, its containers, and crictl processes that talk to them."""

    def __init__(self, s):
        self.s, self.c = s, Crictl(s.endpoint, s.factor)
        self.c("pull", IMAGE)
        self.config = written(s.work, "pod.json", {
            "metadata": {"name": "streams", "namespace": "streaming", "attempt": 0, "uid": "uid-streams"},
            "log_directory": s.work + "/logs", "linux": {}})
        os.makedirs(s.work + "/logs", exist_ok=True)
        self.id = self.c.id("runp", self.config)
        s.runtime.ids.add(self.id)

    def container(self, name, script, **more):
        config = written(self.s.work, name + ".json", {
            "metadata": {"name": name}, "image": {"image": IMAGE}, "command": ["sh", "-c", script],
            "log_path": name + ".log", "linux": {}, **more})
        container = self.c.id("create", self.id, config, self.config)
        self.s.runtime.ids.add(container)
        self.c("start", container)
        return container

    def client(self, *arguments, **more):
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen([*self.c.base, *arguments], **pipes)

    def run(self, *arguments, given=None):
        done = subprocess.run([*self.c.base, *arguments], input=given, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60 * self.s.factor, check=False,
                              **({} if given is not None else {"stdin": subprocess.DEVNULL}))
        return done.returncode, done.stdout, done.stderr.decode()


class Terminal:
    """A program on a pseudo-terminal of ours."""

    def __init__(self, command, rows=24, columns=80):
        pid, self.master = pty.fork()
        if pid == 0:
            os.execv(command[0], command)
        self.pid, self.seen = pid, b""
        self.resize(rows, columns)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def until(self, pattern, seconds):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            left = end - time.monotonic()
            expect(left > 0, f"{pattern} is not in {self.seen!r}")
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError as error:  # EIO: the other side is closed
                    expect(re.search(pattern, self.seen), f"{pattern} is not in {self.seen!r} ({error})")
        self.seen = b""

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.master)
        return os.waitstatus_to_exitcode(status)


def exec_by_hand(pod, container, steps, transport):
    via, wait = ("--transport", transport), 10 * pod.s.factor
    with steps.step(f"{transport}: exec, output and exit code"):
        code, out, err = pod.run("exec", *via, container, "sh", "-c", "echo out; echo err >&2; exit 7")
        expect(out == b"out\n" and "err" in err.splitlines()[0], f"{out!r} {err!r}")
        expect(code != 0 and "7" in err, f"exit {code}: {err!r}")
    with steps.step(f"{transport}: exec, 3 MiB of stdin come back"):
        data = os.urandom(3 << 20)
        code, out, err = pod.run("exec", *via, "-i", container, "cat", given=data)
        expect(code == 0 and out == data, f"exit {code}, {len(out)} bytes, {err}")
    with steps.step(f"{transport}: exec -it, a terminal with resize"):
        terminal = Terminal([*pod.c.base, "exec", *via, "-it", container, "sh"], 31, 97)
        terminal.until(rb"[#$] ", wait)
        terminal.resize(40, 120)
        os.kill(terminal.pid, signal.SIGWINCH)

        def resized():
            terminal.type("stty size\n")
            with contextlib.suppress(Failure):
                terminal.until(rb"40 120", 1)
                return True

        wait_for("the new size", resized, wait)
        terminal.type("tty; exit 5\n")
        terminal.until(rb"/dev/pts/\d+", wait)
        expect(terminal.end() != 0, "crictl hides the exit code")


def stdin_once(pod, steps):
    with steps.step("stdin_once: who only looks takes no stdin; the first who types closes it"):
        container = pod.container("once", "cat; echo over", stdin=True, stdin_once=True)
        looking = pod.client("attach", container)
        try:
            time.sleep(0.5)  # nothing tells that it is attached
            code, out, err = pod.run("attach", "-i", container, given=b"words\n")
            expect(b"words" in out, f"exit {code}: {out!r} {err}")
            wait_for("its end", lambda: pod.c("ps", "-a", "-q", "--state", "exited", "--name", "once").strip(), 10 * pod.s.factor)
        finally:
            looking.kill()
            looking.communicate()
        pod.c("rm", container)


def attach_by_hand(pod, steps, transport):
    via, wait = ("--transport", transport), 10 * pod.s.factor
    with steps.step(f"{transport}: two attached clients, one types"):
        name = "echo-" + transport
        container = pod.container(name, "while read line; do echo got $line; done; echo end", stdin=True)
        other = pod.client("attach", *via, container)
        typing = pod.client("attach", *via, "-i", container, stdin=subprocess.PIPE)
        try:
            # An attach has no first word: typing is repeated until both have heard it.
            heard = {typing: b"", other: b""}

            def both():
                typing.stdin.write(b"hello\n")
                typing.stdin.flush()
                for client in heard:
                    if select.select([client.stdout], [], [], 0.3)[0]:
                        heard[client] += os.read(client.stdout.fileno(), 4096)
                return all(b"got hello" in seen for seen in heard.values())

            wait_for("both to hear", both, wait)
        finally:
            for client in (typing, other):
                client.kill()
                client.communicate()
        expect(pod.c("ps", "-q", "--state", "running", "--name", name).strip() == container, "ended with its clients")
        pod.c("stop", "--timeout", "0", container)
        pod.c("rm", container)


@contextlib.contextmanager
def forwarded(pod, transport, pattern=re.compile(rb"127\.0\.0\.1:(\d+) ")):
    """crictl port-forward to the pod's port; gives the local port. crictl ends by SIGKILL."""
    client = pod.client("port-forward", "--transport", transport, pod.id, f"0:{PORT}")
    try:
        line = client.stdout.readline()
        found = pattern.search(line)
        expect(found, f"port-forward says {line!r}")
        yield int(found.group(1))
    finally:
        client.kill()
        client.communicate()


def ask(port, cut=False):
    """One connection: an HTTP request, or only its beginning, ended by a reset."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        if cut:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(b"GET / HT")
            return b""
        connection.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def forward_by_hand(pod, steps, transport):
    with steps.step(f"{transport}: port-forward"):
        with forwarded(pod, transport) as port:
            expect(b"the page" in ask(port), "no page")
            ask(port, cut=True)
            expect(b"the page" in ask(port), "no page after a cut connection")


def exec_sync(pod, container, steps):
    daemon = pod.s.runtime.process.pid
    with steps.step("ExecSync: output without end is capped, memory bounded"):
        code, _, err = pod.run("exec", "--sync", "--timeout", "2", container, "yes", "0123456789" * 10)
        expect(code != 0 and "DeadlineExceeded" in err, f"exit {code}: {err[-300:]}")
        code, out, err = pod.run("exec", "--sync", container, "sh", "-c", "head -c 40000000 /dev/zero | tr '\\0' x")
        expect(code == 0 and 1 << 20 < len(out) < 16 << 20, f"exit {code}, {len(out)} bytes: {err[-300:]}")
        peak = status_kib(daemon, "VmHWM")
        expect(peak < 160 << 10, f"the daemon took {peak >> 10} MiB")
    with steps.step("ExecSync: a child left behind does not hold it"):
        start = time.monotonic()
        code, out, _ = pod.run("exec", "--sync", container, "sh", "-c", "sleep 1000 & echo done")
        expect(code == 0 and out.strip() == b"done", f"exit {code}, {out!r}")  # crictl adds line ends
        expect(time.monotonic() - start < 60 * pod.s.factor, "held by its child")
        pod.run("exec", "--sync", container, "killall", "sleep")
    with steps.step("ExecSync: a timeout kills the whole tree"):
        script = "(sleep 4242 & sleep 4243) & sleep 4244"
        code, _, err = pod.run("exec", "--sync", "--timeout", "1", container, "sh", "-c", script)
        expect(code != 0 and "DeadlineExceeded" in err, f"exit {code}: {err[-300:]}")
        _, out, _ = pod.run("exec", "--sync", container, "ps", "-o", "args")
        expect(b"sleep 424" not in out, f"still runs: {out!r}")


def status_kib(pid, key):
    with open(f"/proc/{pid}/status") as f:
        return int(re.search(rf"^{key}:\s+(\d+) kB", f.read(), re.M).group(1))


def cost(s):
    """What the runtime holds: (processes, descriptors, threads) of the daemon and all its descendants."""
    pids = [p for p in leaks.descendants() if p not in s.baseline.processes]
    descriptors = threads = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            threads += len(os.listdir(f"/proc/{pid}/task"))
    return len(pids), descriptors, threads


def settled(s, before):
    """Back at the baseline; the runtime's pool of threads may have one or two idle ones more."""
    processes, descriptors, threads = cost(s)
    return (processes <= before[0] and descriptors <= before[1] and threads <= before[2] + THREADS) and (
        processes, descriptors, threads)


THREADS = 12  # idle threads of the runtime's pool of blocking work: they end after ten seconds


def one_exec(pod, container, number):
    transport = TRANSPORTS[number % 2]
    if number % 3 == 0:  # cut in the middle
        client = pod.client("exec", "--transport", transport, container, "sh", "-c", "echo begun; sleep 1000")
        first = client.stdout.readline()
        client.kill()
        client.communicate()
        return first == b"begun\n"
    code, out, err = pod.run("exec", "--transport", transport, container, "echo", str(number))
    if code != 0 or out != b"%d\n" % number:
        print(f"      ({transport}: exit {code}, {out!r}, {err.strip()})")
        return False
    return True


def many(pod, container, steps, sessions):
    s, daemon = pod.s, pod.s.runtime.process.pid
    with steps.step("before the many"):
        time.sleep(11)  # the pool's idle threads end
        before, memory = cost(s), status_kib(daemon, "VmRSS")
    with steps.step(f"{sessions} exec sessions, a third cut in the middle"):
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
            done = list(threads.map(lambda n: one_exec(pod, container, n), range(sessions)))
        expect(all(done), f"{done.count(False)} of {sessions} failed, first {done.index(False) if False in done else ''}")
        wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
    with steps.step(f"{sessions} forwarded connections, a third cut in the middle"):
        each = 50
        for batch in range(-(-sessions // each)):
            with forwarded(pod, TRANSPORTS[batch % 2]) as port, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
                done = list(threads.map(lambda n: n % 3 == 0 and ask(port, cut=True) == b"" or b"the page" in ask(port),
                                        range(each)))
                expect(all(done), f"{done.count(False)} of {each} failed in batch {batch}")
        wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
    with steps.step("memory is back"):
        grown = status_kib(daemon, "VmRSS") - memory
        expect(grown < 16 << 10, f"the daemon has grown by {grown} KiB")
        print(f"      (the daemon has grown by {grown} KiB; {before} processes, descriptors, threads)")


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    args = parser.parse_args()
    steps = Steps("streaming")
    with options.session(args, steps) as s:
        pod = Pod(s)
        serve = f"mkdir /www; echo the page > /www/index.html; httpd -f -p {PORT} -h /www"
        container = pod.container("main", serve)
        for transport in TRANSPORTS:
            exec_by_hand(pod, container, steps, transport)
            attach_by_hand(pod, steps, transport)
            forward_by_hand(pod, steps, transport)
        stdin_once(pod, steps)
        exec_sync(pod, container, steps)
        many(pod, container, steps, args.sessions)
        pod.c("stopp", pod.id)
        pod.c("rmp", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

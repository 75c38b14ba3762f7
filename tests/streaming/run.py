#!/usr/bin/env python3
"""Exec, attach and port-forward as crictl does them, over SPDY and WebSocket, and a thousand of each.

    run.py [--runtime NAME] [--sessions N]

By hand: output, exit code, stdin, a terminal with resize, two attached clients, a forwarded port. Clients that leave a
silent container, that leave while nobody takes what they send, that read too slowly. ExecSync: output without end, on both
streams, of many commands at once; a child left behind, a timeout. Then N exec sessions and N forwarded connections, a third of
them cut in the middle: descriptors, threads, tasks, memory and processes of the runtime are back where they were.
"""

import concurrent.futures
import contextlib
import functools
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
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), os.path.join(os.path.dirname(HERE), "crictl")]
from harness import leaks, options, runtimes  # noqa: E402
from harness.report import Failure, Steps, expect, wait_for  # noqa: E402
from walkthrough import Crictl, written  # noqa: E402

IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.29-2"
TRANSPORTS = ("spdy", "websocket")
PORT = 8080
DEAF = 8081                       # here somebody listens who reads nothing
METRICS = "127.0.0.1:9464"
AT_ONCE = 8
MIB = 1 << 20


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

    def ended(self):
        """Whether the program has ended; what it says is dropped."""
        with contextlib.suppress(BlockingIOError, OSError):
            while os.read(self.master, 65536):
                pass
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def end(self, by=signal.SIGHUP):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, by)
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


def forwarding(pod, transport, to, *flags):
    """A crictl port-forward to a port of the pod, and the local port."""
    client = pod.client("port-forward", "--transport", transport, *flags, pod.id, f"0:{to}")
    line = client.stdout.readline()
    found = re.search(rb"127\.0\.0\.1:(\d+) ", line)
    if not found:
        client.kill()
        raise Failure(f"port-forward says {line!r} {client.communicate()[1]!r}")
    return client, int(found.group(1))


@contextlib.contextmanager
def forwarded(pod, transport, *flags, to=PORT, held=contextlib.nullcontext()):
    """crictl port-forward to the pod's server; gives the local port. crictl ends by SIGKILL, `held` after it."""
    client, port = forwarding(pod, transport, to, *flags)
    with held:
        try:
            yield port
        finally:
            client.kill()
            client.communicate()


def begin(port):
    """A connection in the middle of a long answer."""
    connection = socket.create_connection(("127.0.0.1", port), 20)
    connection.sendall(b"GET /big HTTP/1.0\r\n\r\n")
    expect(connection.recv(1000), "no answer")
    return connection


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
    with steps.step("ExecSync: both streams are full at once"):
        script = "yes out | head -c 20000000 & yes err | head -c 20000000 >&2; wait"
        code, out, err = pod.run("exec", "--sync", container, "sh", "-c", script)
        sizes = [out.count(line) * len(line) for line in (b"out\n", b"err\n")]  # crictl prints both to its stdout
        expect(code == 0, f"exit {code}: {err[-300:]}")
        expect(all(7 * MIB < size <= 8 * MIB for size in sizes), f"{sizes} bytes")
    with steps.step("ExecSync: 20 without end at once have the daemon hold 256 MiB at most"):
        with open(f"/proc/{daemon}/clear_refs", "w") as f:
            f.write("5")  # proc_pid_clear_refs(5): the peak is now what there is
        before = status_kib(daemon, "VmRSS")

        def endless(_):
            code, _, err = pod.run("exec", "--sync", "--timeout", "5", container, "sh", "-c", "yes out & yes err >&2")
            return code != 0 and re.search("DeadlineExceeded|ResourceExhausted", err)

        with concurrent.futures.ThreadPoolExecutor(20) as threads:
            done = list(threads.map(endless, range(20)))
        expect(all(done), f"{20 - len(list(filter(None, done)))} of 20 did not end as they should")
        grown = status_kib(daemon, "VmHWM") - before
        # 256 MiB is what it holds of output; the rest for buffers, and pages that the allocator had not given back.
        expect(grown < 320 << 10, f"the daemon grew by {grown >> 10} MiB")
        print(f"      (by {grown >> 10} MiB)")
        pod.run("exec", "--sync", container, "killall", "yes")
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


def berth_only(s):
    return s.runtime.name == "berth"


def monitors(s):
    """Processes of pods' monitors; none where the runtime has no such thing."""
    return [pid for pid, command in leaks.descendants().items()
            if pid not in s.baseline.processes and "berth-monitor" in command]


def open_in(pids):
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def private_kib(pids):
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            total += int(re.search(r"^Pss:\s+(\d+) kB", f.read(), re.M).group(1))
    return total


def tasks(s):
    """Tasks of the daemon, of its own count; 0 where it has none."""
    if not berth_only(s):
        return 0
    with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=20) as answer:
        return int(re.search(rb"^berth_tasks (\d+)$", answer.read(), re.M).group(1))


def cost(s):
    """What the runtime holds: (processes, descriptors, threads) of the daemon and all its descendants, its tasks."""
    pids = [p for p in leaks.descendants() if p not in s.baseline.processes]
    descriptors = threads = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            threads += len(os.listdir(f"/proc/{pid}/task"))
    return len(pids), descriptors, threads, tasks(s)


def settled(s, before):
    """Back at the baseline; the runtime's pool of threads may have one or two idle ones more."""
    now = cost(s)
    if all(have <= had + more for have, had, more in zip(now, before, (0, 0, THREADS, TASKS))):
        return now
    raise Failure(f"now {now}")


THREADS = 12  # idle threads of the runtime's pool of blocking work: they end after ten seconds
TASKS = 3     # the connections of crictl, and of who asks, may be closed or not


def silent(pod, steps):
    """Attach to containers that say nothing, and leave."""
    s = pod.s
    for tty in (False, True):
        with steps.step(f"20 clients leave a silent container{' with a terminal' if tty else ''}: nothing is left of them"):
            container = pod.container(f"silent-{tty}", "sleep 100000", tty=tty)
            quiet(lambda: cost(s))  # the container's own processes come and open what they need
            before, own = cost(s), open_in(monitors(s))
            clients = [pod.client("attach", "--transport", TRANSPORTS[n % 2], container) for n in range(20)]
            try:
                each = 1 if tty else 2
                wait_for("all to be attached", lambda: not berth_only(s) or open_in(monitors(s)) >= own + 20 * each,
                         30 * s.factor)
            finally:
                for client in clients:
                    client.kill()
                    client.communicate()
            wait_for(f"the baseline {before}", functools.partial(settled, s, before), 30 * s.factor)
            pod.c("stop", "--timeout", "0", container)
            pod.c("rm", container)


def quiet(read, seconds=1.0):
    """Waits until what `read` gives has not changed for a while."""
    last, since = read(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.05)
        if (now := read()) != last:
            last, since = now, time.monotonic()


def read_bytes(pid):
    with open(f"/proc/{pid}/io") as f:
        return re.search(r"rchar: (\d+)", f.read()).group(1)


def flooded(pod, container, transport):
    """A terminal whose program reads nothing, full of what was typed."""
    script = "stty raw; echo be''gun; sleep 100000"
    terminal = Terminal([*pod.c.base, "exec", "--transport", transport, "-it", container, "sh", "-c", script])
    terminal.until(rb"begun", 20 * pod.s.factor)
    os.set_blocking(terminal.master, False)
    sent = 0
    while select.select([], [terminal.master], [], 1)[1] and sent < 32 * MIB:
        with contextlib.suppress(BlockingIOError):
            sent += os.write(terminal.master, bytes(4096))
    return terminal


def stalled(pod, steps):
    """Clients that are killed while nobody takes what they send."""
    s = pod.s
    serve = f"while true; do nc -l -p {DEAF} -e sleep 100000; done"
    deaf = pod.container("deaf", serve, stdin=True)
    quiet(lambda: cost(s))
    before = cost(s)

    def ended(client):
        client.kill()
        client.communicate()
        wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)

    for transport in TRANSPORTS:
        via = ("--transport", transport)
        for verb, arguments in (("exec", ("sleep", "100000")), ("attach", ())):
            with steps.step(f"{transport}: {verb}, killed while its stdin is stalled"), open("/dev/zero", "rb") as zero:
                client = pod.client(verb, *via, "-i", deaf, *arguments, stdin=zero)
                wait_for("it to send", lambda: int(read_bytes(client.pid)) > MIB, 20 * s.factor)
                quiet(lambda: read_bytes(client.pid))
                ended(client)
        with steps.step(f"{transport}: exec -it, killed while its terminal is stalled"):
            flooded(pod, deaf, transport).end(signal.SIGKILL)
            wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
        with steps.step(f"{transport}: exec -it, its command ends while its terminal is stalled"):
            terminal = flooded(pod, deaf, transport)
            try:
                pod.run("exec", "--sync", deaf, "killall", "sleep")
                # The hung-up terminal takes no more and does not fail: nobody may wait for it, or try for ever.
                wait_for("the session's end", terminal.ended, 20 * s.factor)
            finally:
                terminal.end(signal.SIGKILL)
            wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
        with steps.step(f"{transport}: port-forward, killed while the port reads nothing"):
            client, port = forwarding(pod, transport, DEAF)
            with socket.create_connection(("127.0.0.1", port), 20) as connection:
                connection.settimeout(2)
                with contextlib.suppress(TimeoutError):
                    while True:
                        connection.sendall(bytes(65536))
                client.kill()
                client.communicate()
            pod.run("exec", "--sync", deaf, "killall", "nc", "sleep")
            wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
    pod.c("stop", "--timeout", "0", deaf)
    pod.c("rm", deaf)


def slow(pod, steps):
    """Attached clients that do not read: the container goes on, and they hear that they lost something."""
    size, lines = 48 * MIB, f"read x; yes 0123456789012345678901234567890 | head -c {48 * MIB}; echo the end; sleep 100000"
    for number, (transport, tty) in enumerate([("spdy", False), ("spdy", True), ("websocket", False)]):
        with steps.step(f"{transport}: a client that reads too slowly{' with a terminal' if tty else ''} is told so"):
            name = f"slow-{number}"
            container = pod.container(name, lines, stdin=True, tty=tty)
            log = f"{pod.s.work}/logs/{name}.log"
            with subprocess.Popen([*pod.c.base, "attach", "--transport", transport, "-i", container],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
                try:
                    def ends():
                        client.stdin.write(b"\n")
                        client.stdin.flush()
                        with open(log, "rb") as f:
                            f.seek(max(0, os.path.getsize(log) - 200))
                            return b"the end" in f.read()

                    wait_for("the log to be complete, without the client", ends, 60 * pod.s.factor)
                    expect(os.path.getsize(log) > size, f"the log has {os.path.getsize(log)} bytes")
                    out, err = client.communicate(timeout=60 * pod.s.factor)
                except subprocess.TimeoutExpired as hangs:
                    raise Failure("it hangs") from hangs
                finally:
                    client.kill()
            expect(client.returncode != 0 and b"slow" in err, f"exit {client.returncode} after {len(out)} bytes: {err[-300:]}")
            # Each line is whole, up to the last.
            expect(set(out.replace(b"\r", b"").split(b"\n")[1:-1]) <= {b"0123456789012345678901234567890", b""}, "mangled")
            pod.c("stop", "--timeout", "0", container)
            pod.c("rm", container)


def one_exec(pod, container, number):
    transport = TRANSPORTS[number % 2]
    if number % 30 == 3:  # cut while its stdin is stalled
        with open("/dev/zero", "rb") as zero:
            client = pod.client("exec", "--transport", transport, "-i", container, "sh", "-c", "echo begun; sleep 1000", stdin=zero)
            first = client.stdout.readline()
            wait_for("it to send", lambda: int(read_bytes(client.pid)) > MIB // 2, 20 * pod.s.factor)
            client.kill()
            client.communicate()
        return first == b"begun\n"
    if number % 30 == 6:  # cut on a terminal
        terminal = Terminal([*pod.c.base, "exec", "--transport", transport, "-it", container, "sh", "-c", "echo begun; sleep 1000"])
        terminal.until(rb"begun", 20 * pod.s.factor)
        terminal.end(signal.SIGKILL)
        return True
    if number % 30 == 9:  # an attach, at whatever point it is
        client = pod.client("attach", "--transport", transport, container)
        time.sleep(0.1 * (number % 7))
        client.kill()
        client.communicate()
        return True
    if number % 30 == 12:  # a program that is not there, on a terminal (CVE-2022-23471)
        terminal = Terminal([*pod.c.base, "exec", "--transport", transport, "-it", container, "/none"])
        terminal.until(rb"/none", 20 * pod.s.factor)
        terminal.end()
        return True
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
    with steps.step("before the many", fatal=True):
        time.sleep(11)  # the pool's idle threads end
        before, memory, private = cost(s), status_kib(daemon, "VmRSS"), private_kib(monitors(s))
    with steps.step(f"{sessions} exec sessions, a third cut in the middle"):
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
            done = list(threads.map(lambda n: one_exec(pod, container, n), range(sessions)))
        expect(all(done), f"{done.count(False)} of {sessions} failed, first {done.index(False) if False in done else ''}")
        wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
    with steps.step(f"{sessions} forwarded connections, a third cut in the middle"):
        each = 50
        for batch in range(-(-sessions // each)):
            held = contextlib.ExitStack()
            with forwarded(pod, TRANSPORTS[batch % 2], held=held) as port, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
                done = list(threads.map(lambda n: n % 3 == 0 and ask(port, cut=True) == b"" or b"the page" in ask(port),
                                        range(each)))
                expect(all(done), f"{done.count(False)} of {each} failed in batch {batch}")
                # The client is killed in the middle of this. One: more would wait for each other in crictl.
                held.enter_context(begin(port))
        wait_for(f"the baseline {before}", lambda: settled(s, before), 30 * s.factor)
    with steps.step("memory is back"):
        grown = status_kib(daemon, "VmRSS") - memory
        expect(grown < 16 << 10, f"the daemon has grown by {grown} KiB")
        more = private_kib(monitors(s)) - private
        expect(more < 256, f"the monitor has grown by {more} KiB")
        print(f"      (the daemon has grown by {grown} KiB, the monitor by {more}; {before} processes, descriptors, threads, tasks)")


def main():
    parser = options.parser(__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    args = parser.parse_args()
    runtimes.Berth.extra = {**runtimes.Berth.extra, "metrics_address": METRICS}
    steps = Steps("streaming")
    with options.session(args, steps) as s:
        pod = Pod(s)
        serve = ("mkdir /www; echo the page > /www/index.html; dd if=/dev/zero of=/www/big bs=1M count=0 seek=64; "
                 f"httpd -f -p {PORT} -h /www")
        container = pod.container("main", serve)
        for transport in TRANSPORTS:
            steps.run(exec_by_hand, pod, container, steps, transport)
            steps.run(attach_by_hand, pod, steps, transport)
            steps.run(forward_by_hand, pod, steps, transport)
        steps.run(stdin_once, pod, steps)
        steps.run(silent, pod, steps)
        steps.run(stalled, pod, steps)
        steps.run(slow, pod, steps)
        steps.run(exec_sync, pod, container, steps)
        steps.run(many, pod, container, steps, args.sessions)
        pod.c("stopp", pod.id)
        pod.c("rmp", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

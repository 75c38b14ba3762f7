#!/usr/bin/env python3
"""Streaming in TLS, by crictl and by a client of the tests' own.

    tls.py

The daemon's own certificate; a pair of files, replaced while a session goes on, broken and mended; the least version and the
cipher suites; clients with and without a certificate of the authority; configurations that cannot be.
"""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.parse

from protocols import restarted, wait_told  # sets the path to the others
from run import PORT, TRANSPORTS, Pod, Terminal, ask, forwarded
from harness import options  # noqa: E402
from harness.report import Failure, Steps, expect, wait_for  # noqa: E402
from raw import Cri, Spdy, WebSocket, connect, exit_code  # noqa: E402

EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
SUITE = "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256"


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def authority(d, name):
    openssl("req", "-x509", *EC, "-keyout", f"{d}/{name}.key", "-out", f"{d}/{name}.crt", "-days", "2", "-subj", f"/CN={name}")


def issue(d, ca, name, names):
    openssl("req", *EC, "-keyout", f"{d}/{name}.key", "-out", f"{d}/{name}.csr", "-subj", f"/CN={name}")
    with open(f"{d}/{name}.ext", "w") as f:
        f.write(f"subjectAltName={names}\n")
    openssl("x509", "-req", "-in", f"{d}/{name}.csr", "-CA", f"{d}/{ca}.crt", "-CAkey", f"{d}/{ca}.key",
            "-CAcreateserial", "-out", f"{d}/{name}.crt", "-days", "2", "-extfile", f"{d}/{name}.ext")


def client(ca, pair=None, newest=None):
    """A context that trusts this file alone, and shows this pair."""
    context = ssl.create_default_context(cafile=ca)
    if pair:
        context.load_cert_chain(pair + ".crt", pair + ".key")
    if newest:
        context.maximum_version = newest
    return context


def shown(url, tls):
    """The certificate that the server shows to one that trusts it, and what is spoken."""
    with connect(url, tls) as s:
        return s.getpeercert(binary_form=True), s.version(), s.cipher()[0]


def not_served(url, tls, why):
    """The handshake fails, or (in TLS 1.3) the first answer says that it has failed."""
    try:
        with connect(url, tls) as s:
            s.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            expect(not s.recv(1), why)
    except (ssl.SSLError, ConnectionError):
        return
    raise Failure(why + ", though the connection is closed in order")


class Https:
    """URLs of a daemon that encrypts."""

    def __init__(self, cri, container):
        self.cri, self.container = cri, container

    def exec(self, *command):
        url = self.cri.exec(self.container, command or ("sh", "-c", "cat; exit 3"), stdin=True, stdout=True)
        expect(url.startswith("https://127.0.0.1:"), url)
        return url


def sessions(https, tls):
    """An exec over each transport, with more than one record each way."""
    data = os.urandom(200_000)
    with Spdy(https.exec(), "v4.channel.k8s.io", ("error", "stdin", "stdout"), tls=tls) as session:
        session.send("stdin", data, end=True)
        out, status = session.until_ended("stdout", "error")
        expect(out == data and exit_code(status) == 3, f"SPDY: {len(out)} bytes, {status!r}")
    with WebSocket(https.exec("sh", "-c", "head -c 200000; exit 3"), "v4.channel.k8s.io", tls=tls) as session:
        session.send(0, data)
        out, status = session.until_closed(1, 3)
        expect(out == data and exit_code(status) == 3, f"WebSocket: {len(out)} bytes, {status!r}")


def by_crictl(pod, container, steps, what, *flags):
    """Exec, a terminal and a forward, as with a server that does not encrypt."""
    for transport in TRANSPORTS:
        via = ("--transport", transport, *flags)
        with steps.step(f"{what}: crictl exec, exec -it and port-forward over {transport}"):
            data = os.urandom(3 << 20)
            code, out, err = pod.run("exec", *via, "-i", container, "cat", given=data)
            expect(code == 0 and out == data, f"exit {code}, {len(out)} bytes, {err}")
            terminal = Terminal([*pod.c.base, "exec", *via, "-it", container, "sh"], 31, 97)
            terminal.until(rb"[#$] ", 10 * pod.s.factor)
            terminal.type("tty; exit\n")
            terminal.until(rb"/dev/pts/\d+", 10 * pod.s.factor)
            terminal.end()
            with forwarded(pod, transport, *flags) as port:
                expect(b"the page" in ask(port), "no page")


def own_certificate(pod, https, steps):
    s = pod.s
    restarted(s, stream_enable_tls=True)
    by_crictl(pod, https.container, steps, "the daemon's own certificate")
    with steps.step("the daemon's own certificate: trusted, it is enough for 127.0.0.1 and localhost"):
        place = urllib.parse.urlsplit(https.exec())
        with open(s.work + "/own.crt", "w") as f:
            f.write(ssl.get_server_certificate((place.hostname, place.port)))
        tls = client(s.work + "/own.crt")
        sessions(https, tls)
        with socket.create_connection((place.hostname, place.port), 20) as raw:
            tls.wrap_socket(raw, server_hostname="localhost").close()
    with steps.step("nothing is served in plain"):
        with connect(https.exec().replace("https", "http")) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                expect(b"HTTP" not in plain.recv(4096), "it is")


def files(pod, https, steps, d):
    s = pod.s
    issue(d, "ca", "server", "IP:127.0.0.1,DNS:localhost")
    issue(d, "ca", "newer", "IP:127.0.0.1,DNS:localhost")
    restarted(s, stream_enable_tls=True, stream_tls_cert=d + "/server.crt", stream_tls_key=d + "/server.key")
    tls = client(d + "/ca.crt")
    with steps.step("a pair of files"):
        sessions(https, tls)
        for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            version = shown(https.exec(), client(d + "/ca.crt", newest=newest))[1]
            expect(version == newest.name.replace("_", "."), version)
    with steps.step("a new pair counts for new connections, the open session goes on", fatal=True):
        with Spdy(https.exec("cat"), "v4.channel.k8s.io", ("error", "stdin", "stdout"), tls=tls) as session:
            session.send("stdin", b"before")
            wait_told(session, "stdout", b"before")
            before = shown(https.exec(), tls)[0]
            for kind in ("crt", "key"):
                os.replace(f"{d}/newer.{kind}", f"{d}/server.{kind}")
            with open(d + "/server.crt") as f:
                after = ssl.PEM_cert_to_DER_cert(f.read())
            expect(before != after == shown(https.exec(), tls)[0], "not the new one")
            session.send("stdin", b" and after", end=True)
            expect(session.until_ended("stdout") == [b"before and after"], "the session has changed")
    with steps.step("a pair that cannot be used: the one of before goes on, and the log says so"):
        shutil.copy(d + "/ca.key", d + "/server.key")  # another's
        expect(shown(https.exec(), tls)[0] == after, "not the one of before")
        expect("cannot be used; those of before go on" in s.runtime.log_end(20000), "the log says nothing")
        expect("is not the key of the certificate" in s.runtime.log_end(20000), "the log does not say why")
        sessions(https, tls)


def versions(pod, https, steps, d):
    s = pod.s
    issue(d, "ca", "server", "IP:127.0.0.1,DNS:localhost")
    pair = {"stream_enable_tls": True, "stream_tls_cert": d + "/server.crt", "stream_tls_key": d + "/server.key"}
    with steps.step("below the least version nobody is served"):
        restarted(s, **pair, stream_tls_min_version="1.3")
        expect(shown(https.exec(), client(d + "/ca.crt"))[1] == "TLSv1.3", "not TLS 1.3")
        old = client(d + "/ca.crt", newest=ssl.TLSVersion.TLSv1_2)
        not_served(https.exec(), old, "TLS 1.2 is served")
        code, _, err = pod.run("exec", https.container, "true")
        expect(code == 0, err)
    with steps.step("only the cipher suites that are named"):
        restarted(s, **pair, stream_tls_cipher_suites=[SUITE])
        expect(shown(https.exec(), client(d + "/ca.crt"))[1:] == ("TLSv1.2", "ECDHE-ECDSA-CHACHA20-POLY1305"), "another")
        other = client(d + "/ca.crt", newest=ssl.TLSVersion.TLSv1_2)
        other.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        not_served(https.exec(), other, "another suite is spoken")


def clients(pod, https, steps, d):
    s = pod.s
    for ca, name in (("ca", "client"), ("other", "stranger")):
        issue(d, ca, name, "DNS:node")
    restarted(s, stream_enable_tls=True, stream_tls_cert=d + "/server.crt", stream_tls_key=d + "/server.key",
              stream_tls_ca=d + "/clients.crt")
    trusted = ("--tls-ca", d + "/ca.crt")
    by_crictl(pod, https.container, steps, "a client's certificate", *trusted,
              "--tls-cert", d + "/client.crt", "--tls-key", d + "/client.key")
    with steps.step("a client's certificate: of the authority, over SPDY and WebSocket"):
        sessions(https, client(d + "/ca.crt", d + "/client"))
    with steps.step("a client without a certificate, or with another's: not served"):
        for newest in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            not_served(https.exec(), client(d + "/ca.crt", newest=newest), "served without")
            not_served(https.exec(), client(d + "/ca.crt", d + "/stranger", newest), "served with another's")
        for transport in TRANSPORTS:
            code, out, _ = pod.run("exec", "--transport", transport, https.container, "echo", "done")
            expect(code != 0 and not out, f"{transport}: crictl without: exit {code}, {out!r}")
            code, out, _ = pod.run("exec", "--transport", transport, *trusted, "--tls-cert", d + "/stranger.crt",
                                   "--tls-key", d + "/stranger.key", https.container, "echo", "done")
            expect(code != 0 and not out, f"{transport}: crictl with another's: exit {code}, {out!r}")
    with steps.step("another authority counts at once"):
        shutil.copy(d + "/other.crt", d + "/clients.crt")
        sessions(https, client(d + "/ca.crt", d + "/stranger"))
        not_served(https.exec(), client(d + "/ca.crt", d + "/client"), "served with a certificate of before")


def configurations(s, steps, d):
    """A daemon does not start with these, and `berth config check` names the key."""
    pair = {"stream_tls_cert": d + "/server.crt", "stream_tls_key": d + "/server.key"}
    good = dict(s.runtime.extra)
    with steps.step("configurations that cannot be are refused by key"):
        for key, bad in (
                ("stream_enable_tls", pair),
                ("stream_tls_key", {"stream_enable_tls": True, "stream_tls_cert": d + "/server.crt"}),
                ("stream_tls_key", {"stream_enable_tls": True, **pair, "stream_tls_key": d + "/ca.key"}),
                ("stream_tls_cert", {"stream_enable_tls": True, **pair, "stream_tls_cert": d + "/none"}),
                ("stream_tls_ca", {"stream_enable_tls": True, **pair, "stream_tls_ca": d + "/ca.key"}),
                ("stream_tls_min_version", {"stream_enable_tls": True, "stream_tls_min_version": "1.1"}),
                ("stream_tls_cipher_suites", {"stream_enable_tls": True, "stream_tls_cipher_suites": ["RC4"]})):
            s.runtime.extra = bad
            program, *serve = s.runtime.command()
            for command in ([program, "config", "check", serve[-1]], [program, *serve]):
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      timeout=20 * s.factor, check=False)
                text = done.stdout.decode()
                expect(done.returncode != 0 and f": {key} = " in text, f"{command[1]}, {key}: {done.returncode}, {text}")
    s.runtime.extra = good
    s.runtime.command()


def main():
    args = options.parser(__doc__).parse_args()
    steps = Steps("streaming in TLS")
    with options.session(args, steps) as s:
        pod = Pod(s)
        container = pod.container("main", f"mkdir /www; echo the page > /www/index.html; exec httpd -f -p {PORT} -h /www")
        wait_for("the page", lambda: pod.run("exec", "--sync", container, "wget", "-qO-", f"http://127.0.0.1:{PORT}/")[0] == 0,
                 20 * s.factor)
        d = s.work + "/tls"
        os.makedirs(d)
        for name in ("ca", "other"):
            authority(d, name)
        shutil.copy(d + "/ca.crt", d + "/clients.crt")
        https = Https(Cri(s.runtime.socket), container)
        steps.run(own_certificate, pod, https, steps)
        steps.run(files, pod, https, steps, d)
        steps.run(versions, pod, https, steps, d)
        steps.run(clients, pod, https, steps, d)
        steps.run(configurations, s, steps, d)
        pod.c("stopp", pod.id)
        pod.c("rmp", pod.id)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Pulls over real TLS and through proxies, as hosts.toml and the daemon's environment ask for them.

    run.py

A registry behind nginx: an authority of its own (`ca`), client certificates (`client`), `skip_verify`, Basic
authentication. Then a daemon with HTTP_PROXY, HTTPS_PROXY and NO_PROXY, and a proxy that notes what it passes on.
"""

import contextlib
import os
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE)] + [os.path.join(os.path.dirname(HERE), d) for d in ("crictl", "images")]
from harness import options  # noqa: E402
from harness.report import Steps, expect  # noqa: E402
from walkthrough import Crictl  # noqa: E402
import registry  # noqa: E402

IMAGE = "e2e-test-images/busybox:1.29-2"
NGINX = """daemon off; master_process off; pid {d}/nginx.pid; error_log {d}/error.log;
events {{}}
http {{
 access_log off; client_body_temp_path {d}/t1; proxy_temp_path {d}/t2; fastcgi_temp_path {d}/t3;
 uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
 server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {d}/server.crt; ssl_certificate_key {d}/server.key; {more}
  location / {{ proxy_pass http://{registry}; proxy_set_header Host $http_host; }} }}
}}
"""


def openssl(*arguments):
    subprocess.run(["openssl", *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def certificates(d):
    """An authority, a server's certificate for 127.0.0.1 and registry.test, a client's."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", f"{d}/ca.key", "-out", f"{d}/ca.crt", "-days", "2", "-subj", "/CN=test ca")
    for name, names in (("server", "IP:127.0.0.1,DNS:registry.test"), ("client", "DNS:node")):
        openssl("req", *key, "-keyout", f"{d}/{name}.key", "-out", f"{d}/{name}.csr", "-subj", f"/CN={name}")
        with open(f"{d}/{name}.ext", "w") as f:
            f.write(f"subjectAltName={names}\n")
        openssl("x509", "-req", "-in", f"{d}/{name}.csr", "-CA", f"{d}/ca.crt", "-CAkey", f"{d}/ca.key",
                "-CAcreateserial", "-out", f"{d}/{name}.crt", "-days", "2", "-extfile", f"{d}/{name}.ext")


@contextlib.contextmanager
def tls_in_front(d, address, more=""):
    """nginx with TLS before the registry: its port."""
    port = registry.free_port()
    with open(f"{d}/nginx.conf", "w") as f:
        f.write(NGINX.format(d=d, port=port, registry=address, more=more))
    nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") or sys.exit("missing tool: nginx (nginx-light)")
    process = subprocess.Popen([nginx, "-c", f"{d}/nginx.conf", "-e", f"{d}/error.log"])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


class Proxy(socketserver.ThreadingTCPServer):
    """Passes requests on to where `names` says; notes their first lines."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, names):
        super().__init__(("127.0.0.1", 0), Passing)
        self.names, self.asked = names, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Passing(socketserver.StreamRequestHandler):
    def handle(self):
        line = self.rfile.readline()
        headers = list(iter(self.rfile.readline, b"\r\n"))
        if not line:
            return
        method, target, version = line.decode().split()
        self.server.asked.append(f"{method} {target}")
        place = target if method == "CONNECT" else target.split("/")[2]
        host, _, port = place.partition(":")
        with socket.create_connection(self.server.names.get(host, (host, int(port or 80)))) as far:
            if method == "CONNECT":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                path = "/" + target.split("/", 3)[3]
                kept = [h for h in headers if not h.lower().startswith((b"connection:", b"proxy-"))]
                far.sendall(f"{method} {path} {version}\r\n".encode() + b"".join(kept) + b"Connection: close\r\n\r\n")
            back = threading.Thread(target=self.copy, args=(far, self.connection), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := self.rfile.read1(65536):
                    far.sendall(data)
                far.shutdown(socket.SHUT_WR)
            back.join()

    @staticmethod
    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def hosts(s, name, text):
    directory = os.path.join(s.runtime.certs, name)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "hosts.toml"), "w") as f:
        f.write(text)


def over_tls(s, c, steps, d, address):
    with tls_in_front(d, address) as port:
        server = f'server = "https://127.0.0.1:{port}"\n'
        with steps.step("an authority that nobody knows is refused"):
            hosts(s, "tls.test", server)
            error = c.fails("pull", "tls.test/" + IMAGE)
            expect("certificate" in error.lower(), error)
        with steps.step("ca names the authority"):
            hosts(s, "tls.test", server + f'ca = "{d}/ca.crt"\n')
            c("pull", "tls.test/" + IMAGE)
            c("rmi", "tls.test/" + IMAGE)
        with steps.step("skip_verify"):
            hosts(s, "tls.test", server + "skip_verify = true\n")
            c("pull", "tls.test/" + IMAGE)
            c("rmi", "tls.test/" + IMAGE)
    with tls_in_front(d, address, f"ssl_client_certificate {d}/ca.crt; ssl_verify_client on;") as port:
        server = f'server = "https://127.0.0.1:{port}"\nca = "{d}/ca.crt"\n'
        with steps.step("no client certificate where one is needed"):
            hosts(s, "tls.test", server)
            c.fails("pull", "tls.test/" + IMAGE)
        with steps.step("client certificate"):
            hosts(s, "tls.test", server + f'client = [["{d}/client.crt", "{d}/client.key"]]\n')
            c("pull", "tls.test/" + IMAGE)
            c("rmi", "tls.test/" + IMAGE)
    openssl_password = subprocess.run(["openssl", "passwd", "-apr1", "secret-word"], stdout=subprocess.PIPE, check=True)
    with open(f"{d}/users", "wb") as f:
        f.write(b"jane:" + openssl_password.stdout)
    with tls_in_front(d, address, f'auth_basic "registry"; auth_basic_user_file {d}/users;') as port:
        hosts(s, "tls.test", f'server = "https://127.0.0.1:{port}"\nca = "{d}/ca.crt"\n')
        with steps.step("Basic authentication; the password is in no log"):
            c.fails("pull", "tls.test/" + IMAGE)
            c.fails("pull", "--creds", "jane:wrong-word", "tls.test/" + IMAGE)
            c("pull", "--creds", "jane:secret-word", "tls.test/" + IMAGE)
            c("rmi", "tls.test/" + IMAGE)
            with open(s.runtime.log) as f:
                expect("-word" not in f.read(), "a password is in the log")


def through_proxies(s, c, steps, d, address, plain, connect):
    port = int(address.rpartition(":")[2])
    with steps.step("HTTP_PROXY"):
        hosts(s, "plain.test", 'server = "http://plain.registry.test"\n')
        c("pull", "plain.test/" + IMAGE)
        c("rmi", "plain.test/" + IMAGE)
        expect(any("http://plain.registry.test/v2/" in line for line in plain.asked), str(plain.asked))
    with steps.step("HTTPS_PROXY, by CONNECT"), tls_in_front(d, address) as tls:
        connect.names["registry.test"] = ("127.0.0.1", tls)
        hosts(s, "tls.test", f'server = "https://registry.test"\nca = "{d}/ca.crt"\n')
        c("pull", "tls.test/" + IMAGE)
        c("rmi", "tls.test/" + IMAGE)
        expect(set(connect.asked) == {"CONNECT registry.test:443"}, str(connect.asked))
    with steps.step("NO_PROXY"):
        seen = len(plain.asked)
        hosts(s, "near.test", f'server = "http://127.0.0.1:{port}"\n')
        c("pull", "near.test/" + IMAGE)
        c("rmi", "near.test/" + IMAGE)
        expect(len(plain.asked) == seen, f"asked the proxy: {plain.asked[seen:]}")


def main():
    args = options.parser(__doc__).parse_args()
    if args.runtime != "berth":
        sys.exit("the proxy variables are set for berth alone")
    steps = Steps("registry")
    with options.session(args, steps) as s:
        d = os.path.join(s.work, "tls")
        os.makedirs(d)
        certificates(d)
        plain, connect = Proxy({}), Proxy({})
        with registry.RegistryProcess(s.images + "/registry", scratch=d) as near:
            plain.names["plain.registry.test"] = ("127.0.0.1", near.port)
            c = Crictl(s.endpoint, s.factor)
            over_tls(s, c, steps, d, near.address)
            s.runtime.stop()
            s.runtime.environment = {"HTTP_PROXY": plain.url, "HTTPS_PROXY": connect.url, "NO_PROXY": "127.0.0.1"}
            s.runtime.start()
            through_proxies(s, c, steps, d, near.address, plain, connect)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

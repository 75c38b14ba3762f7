#!/usr/bin/env python3
"""Secrets go to the host they are for: registries that lead elsewhere, by redirects, realms and names.

    secrets.py

Hosts of this test, each on an address of its own that is not the loopback, all by TLS: a registry, the realm it names, a
store that it redirects to, the store's own realm. Beside them what must not be reached: a service on the loopback, one on
169.254.169.254, a store by plain http. Names are in an /etc/hosts of the test's own, which changes while a pull runs.
"""

import base64
import contextlib
import http.client
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading

from run import IMAGE, Proxy, certificates, hosts, openssl  # sets the path to the others
from harness import options  # noqa: E402
from harness.report import Steps, expect  # noqa: E402
from walkthrough import Crictl  # noqa: E402
import registry  # noqa: E402

NAMES = {"registry.test": "192.0.2.21", "auth.test": "192.0.2.22", "store.test": "192.0.2.23", "store-auth.test": "192.0.2.24",
         "local.test": "127.0.0.1", "both.test": "127.0.0.1", "meta.test": "169.254.169.254", "moving.test": "192.0.2.22"}
META = "169.254.169.254"
CREDS = "jane:secret-word"
OWN = "own-token-word"
HEADER = "header-word"
SECRETS = ("secret-word", base64.b64encode(CREDS.encode()).decode(), OWN, HEADER, "account=")


class Host(http.server.ThreadingHTTPServer):
    """Answers as `answer` says; notes what it is asked, and how often it is connected to."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, address, port, tls=None, answer=None):
        super().__init__((address, port), Asked)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.answer, self.asked, self.reached = answer, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def get_request(self):
        self.reached += 1
        return super().get_request()

    def handle_error(self, request, client_address):
        """A client that gives up is none of our faults."""

    def forget(self):
        self.asked.clear()
        self.reached = 0

    def told(self):
        """The secrets that it has seen."""
        return [word for word in SECRETS if any(word in text for text, _ in self.asked)]


class Asked(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        certificate = self.connection.getpeercert(True) if isinstance(self.connection, ssl.SSLSocket) else None
        self.server.asked.append((f"{self.requestline}\n{self.headers}{self.body}", bool(certificate)))
        status, headers, body = self.server.answer(self)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass

    def bearer(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")


def denied(realm, more=""):
    return 401, {"WWW-Authenticate": f'Bearer realm="{realm}",service="s"{more}'}, b""


def moved(to, status=307):
    return status, {"Location": to}, b""


def token(word):
    return lambda asked: (200, {}, json.dumps({"token": word}).encode())


def members(asked):
    """A realm that knows who asks, or does not."""
    return token(OWN if asked.headers.get("Authorization") else "nobodys-token")(asked)


class World:
    """The hosts, and what is tried with them."""

    def __init__(self, s, c, steps, d, near):
        self.s, self.c, self.steps, self.d, self.near = s, c, steps, d, near
        self.hosts_file, self.realms = d + "/hosts", 0
        self.name()
        subprocess.run(["mount", "--bind", self.hosts_file, "/etc/hosts"], check=True)
        for address in {*NAMES.values(), META}:
            if not address.startswith("127."):
                device = "lo" if address == META else "uplink0"
                subprocess.run(["ip", "address", "add", address + "/32", "dev", device], check=True)
        tls = self.tls()
        self.registry, self.auth = Host(NAMES["registry.test"], 443, tls), Host(NAMES["auth.test"], 443, tls)
        self.store, self.store_auth = Host(NAMES["store.test"], 443, tls), Host(NAMES["store-auth.test"], 443, tls)
        self.plain = Host(NAMES["store.test"], 80)
        self.local = [Host("127.0.0.1", 443, tls), Host("127.0.0.1", 80), Host(META, 80), Host(META, 443, tls)]
        self.all = [self.registry, self.auth, self.store, self.store_auth, self.plain, *self.local]

    def tls(self):
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(self.d + "/all.crt", self.d + "/all.key")
        tls.load_verify_locations(self.d + "/ca.crt")
        tls.verify_mode = ssl.CERT_OPTIONAL
        return tls

    def close(self):
        subprocess.run(["umount", "/etc/hosts"], check=True)
        for host in self.all:
            host.shutdown()
            host.server_close()

    def name(self, **changes):
        """Writes what names mean now; `_` stands for the dot of `.test`."""
        names = {**NAMES, **{name.replace("_", ".", 1): address for name, address in changes.items()}}
        with open(self.hosts_file, "w") as f:
            f.writelines(f"{address} {name}\n" for name, address in names.items())
            f.write("192.0.2.22 both.test\n127.0.0.1 localhost\n")

    @contextlib.contextmanager
    def step(self, name):
        """A step in which everything is first as it should be."""
        self.name()
        self.configure()
        self.auth.answer, self.store_auth.answer = members, token("store-token")
        self.store.answer = self.plain.answer = self.have
        for host in self.local:  # each would give a token
            host.answer = token("local-word")
        with self.steps.step(name):
            yield

    def realm(self, url):
        """A realm that no token is kept of."""
        self.realms += 1
        return f"{url}?n={self.realms}"

    def have(self, asked):
        """What the registry of all tests answers."""
        connection = http.client.HTTPConnection(self.near)
        kept = {name: value for name, value in asked.headers.items() if name.lower() in ("accept", "range")}
        connection.request("GET", asked.path, headers=kept)
        answer = connection.getresponse()
        body = answer.read()
        names = ("content-type", "content-range", "docker-content-digest")
        return answer.status, {k: v for k, v in answer.getheaders() if k.lower() in names}, body

    def behind(self, realm, then):
        """A registry that names `realm` first, and then does this."""
        realm = self.realm(realm)

        def answer(asked):
            return then(asked) if asked.bearer() == OWN else denied(realm)
        self.registry.answer = answer

    def leads(self, part, to, status=307):
        """What redirects a part of its paths there."""
        def then(asked):
            return moved(to + asked.path, status) if part in asked.path else self.have(asked)
        return then

    def configure(self, more=""):
        hosts(self.s, "registry.test", f'server = "https://registry.test"\nca = "{self.d}/ca.crt"\n'
              f'client = [["{self.d}/client.crt", "{self.d}/client.key"]]\n{more}\n[header]\nx-key = "{HEADER}"\n')

    def pull(self):
        """Pulls, and takes it away again: the error, or nothing."""
        for host in self.all:
            host.forget()
        code, _, error = self.c.run("pull", "--creds", CREDS, "registry.test/" + IMAGE)
        if code == 0:
            self.c("rmi", "registry.test/" + IMAGE)
        return error.strip() if code else None

    def works(self):
        error = self.pull()
        expect(error is None, error)

    def refused(self, *words):
        error = self.pull()
        self.untouched()
        expect(error is not None, "the pull succeeds")
        for word in words:
            expect(word in error, f"no {word!r} in: {error}")
        expect(not any(word in error for word in SECRETS), f"a secret is in: {error}")

    def untouched(self, *hosts):
        for host in hosts or self.local:
            expect(host.reached == 0, f"{host.server_address} was reached: {host.asked}")

    def ignorant(self, *hosts):
        for host in hosts:
            expect(host.told() == [], f"{host.server_address} was told {host.told()}: {host.asked}")
            expect(not any(certificate for _, certificate in host.asked), f"{host.server_address} saw our certificate")


def redirects(w):
    realm = "https://auth.test/token"
    for part in ("/blobs/", "/manifests/"):
        with w.step(f"a store for {part} with a realm of its own is told nothing of the registry's"):
            w.behind(realm, w.leads(part, "https://store.test"))
            its = w.realm("https://store-auth.test/token")
            w.store.answer = lambda asked, its=its: w.have(asked) if asked.bearer() == "store-token" else denied(its)
            w.works()
            w.ignorant(w.store, w.store_auth)
            expect(len(w.store_auth.asked) == 1, f"asked for {len(w.store_auth.asked)} tokens")
            expect(all(certificate for _, certificate in w.registry.asked + w.auth.asked), "no certificate for our own")
            expect(w.auth.told() == [SECRETS[1], "account="], f"the realm was told {w.auth.told()}")
    with w.step("a store that asks for a password gets none, and the error names both"):
        w.store.answer = lambda asked: (401, {"WWW-Authenticate": 'Basic realm="r"'}, b"")
        w.refused("store.test denies", "registry.test alone")
        w.ignorant(w.store)
    with w.step("the registry's realm for the store's own: the store is nobody to it either"):
        w.store.answer = lambda asked: w.have(asked) if asked.bearer() else denied(realm)
        w.works()
        w.ignorant(w.store)
    with w.step("a token endpoint that redirects to another host, and is followed there as nobody"):
        for status in (302, 307):
            w.auth.answer = lambda asked, status=status: moved("https://store-auth.test/t", status)
            w.store_auth.answer = token(OWN)
            w.behind(realm, w.have)
            w.works()
            w.ignorant(w.store_auth)
            expect(len(w.store_auth.asked) == 1, "not followed")


def near(w):
    """From a registry that is elsewhere nothing leads to this machine or its link."""
    auth = "https://auth.test/token"
    targets = ["https://127.0.0.1", "https://2130706433", "https://0x7f.1", "https://0", "https://localhost", "https://local.test",
               "https://[::ffff:127.0.0.1]", "https://[::ffff:a9fe:a9fe]", f"https://{META}", "https://meta.test",
               "https://[64:ff9b::127.0.0.1]"]
    for target in targets:
        with w.step(f"nothing leads to {target}"):
            w.behind(target + "/token", w.have)
            w.refused("registry.test names the realm", "local_targets")
            w.untouched()
            for part in ("/blobs/", "/manifests/"):
                w.behind(auth, w.leads(part, target))
                w.refused("registry.test redirects to", "local_targets")
                w.untouched()
            w.auth.answer = lambda asked, target=target: moved(target + "/token")
            w.behind(auth, w.have)
            w.refused("auth.test redirects to", "local_targets")
            w.untouched()
    with w.step("of a name with several addresses those elsewhere are taken"):
        w.behind("https://both.test/token", w.have)
        w.works()
        w.untouched()
    with w.step("hosts.toml says what may be near"):
        w.local[0].answer = token(OWN)
        w.behind("https://local.test/token", w.have)
        w.configure('local_targets = ["local.test:444", "127.0.0.1"]')
        w.refused("local.test, which is on the loopback (127.0.0.1)")
        w.untouched()
        w.configure('local_targets = ["local.test:443"]')
        w.works()
        expect(w.local[0].reached > 0, "not asked")


def moving(w):
    """Names that mean something else the second time."""
    with w.step("a realm whose name moves to the loopback after it was asked once"):
        def answer(asked):
            w.name(moving_test="127.0.0.1")
            return 200, {"Connection": "close"}, json.dumps({"token": OWN}).encode()
        w.behind("https://moving.test/token", lambda asked: denied("https://moving.test/token"))
        w.auth.answer = answer
        w.refused("moving.test", "local_targets")
        w.untouched()
    with w.step("a registry whose name moves to the loopback while it is asked"):
        def then(asked):
            w.name(registry_test="127.0.0.1")
            status, headers, body = w.have(asked)
            return status, {**headers, "Connection": "close"}, body
        w.behind("https://auth.test/token", then)
        w.refused("registry.test is now at registry.test", "127.0.0.1")
        w.untouched()


def plain(w):
    """From https to http goes a blob, and nothing else."""
    realm = "https://auth.test/token"
    with w.step("a blob comes from a plain store, without credentials"):
        w.behind(realm, w.leads("/blobs/", "http://store.test"))
        w.works()
        w.ignorant(w.plain)
        expect(w.plain.asked, "the store was not asked")
    with w.step("a plain store is asked for no token"):
        w.plain.answer = lambda asked: denied("https://store-auth.test/t")
        w.refused("store.test denies")
        w.untouched(w.store_auth)
        w.ignorant(w.plain)
    with w.step("what a plain store changes is found out"):
        w.plain.answer = lambda asked: (200, {}, b"xxx")
        w.refused("digest is sha256:")
    with w.step("a manifest does not come by http"):
        w.behind(realm, w.leads("/manifests/", "http://store.test"))
        w.refused("redirects a manifest from https to http (store.test)")
        w.untouched(w.plain)
    with w.step("nor does a token"):
        w.behind("http://store.test/token", w.have)
        w.refused("names the realm store.test by http")
        w.untouched(w.plain)
        w.auth.answer = lambda asked: moved("http://store.test/token")
        w.behind(realm, w.have)
        w.refused("auth.test redirects the request for a token from https to http (store.test)")
        w.untouched(w.plain)
    with w.step("registry_http_blobs = false: nor does a blob"), w.s.runtime.configured(registry_http_blobs=False):
        w.behind(realm, w.leads("/blobs/", "http://store.test"))
        w.refused("redirects a blob from https to http (store.test)", "registry_http_blobs")
        w.untouched(w.plain)


def proxied(w):
    """A proxy resolves names itself; what can be judged without, is."""
    proxy = Proxy({})
    w.s.runtime.environment = {"HTTPS_PROXY": proxy.url, "HTTP_PROXY": proxy.url}
    w.s.runtime.stop()
    w.s.runtime.start()
    try:
        with w.step("through a proxy: the registry, its realm and its store"):
            w.behind("https://auth.test/token", w.leads("/blobs/", "https://store.test"))
            w.works()
            expect({line.split()[1] for line in proxy.asked} == {f"{name}.test:443" for name in ("registry", "auth", "store")},
                   str(proxy.asked))
        with w.step("through a proxy: no address and no localhost that is near"):
            for target in ("https://127.0.0.1", "https://localhost", "https://a.localhost", f"https://{META}"):
                proxy.asked.clear()
                w.behind(target + "/token", w.have)
                w.refused("registry.test names the realm", "local_targets")
                w.behind("https://auth.test/token", w.leads("/blobs/", target))
                w.refused("registry.test redirects to", "local_targets")
                w.untouched()
                expect(not any(target[8:] in line for line in proxy.asked), str(proxy.asked))
    finally:
        w.s.runtime.environment = {}


def log_of_everything(w):
    with w.step("no secret is in a log that tells everything"):
        libraries = ("reqwest", "hyper", "hyper_util", "h2", "rustls", "tower", "tonic")
        level = ",".join(["trace", *(f"{name}=trace" for name in libraries)])
        with w.s.runtime.configured(log_level=level):
            w.behind("https://auth.test/token", w.leads("/blobs/", "https://store.test/signed-word"))
            w.store.answer = lambda asked: (403, {}, b"")
            w.refused("store.test denies")
            w.store.answer = w.have
            w.behind("https://auth.test/token", w.have)
            w.works()
        with open(w.s.runtime.log) as f:
            text = f.read()
        expect("TRACE" in text, "nothing is told")
        found = [word for word in (*SECRETS[:4], "store-token", "local-word", "signed-word") if word in text]
        expect(not found, f"in the log: {found}")


def main():
    args = options.parser(__doc__).parse_args()
    if args.runtime != "berth":
        sys.exit("what is refused, and how, is berth's own")
    steps = Steps("secrets")
    with options.session(args, steps) as s:
        d = os.path.join(s.work, "tls")
        os.makedirs(d)
        certificates(d)
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        openssl("req", *key, "-keyout", f"{d}/all.key", "-out", f"{d}/all.csr", "-subj", "/CN=all")
        with open(f"{d}/all.ext", "w") as f:
            names = [f"DNS:{name}" for name in (*NAMES, "localhost", "a.localhost")]
            f.write("subjectAltName=" + ",".join([*names, "IP:127.0.0.1", f"IP:{META}"]))
        openssl("x509", "-req", "-in", f"{d}/all.csr", "-CA", f"{d}/ca.crt", "-CAkey", f"{d}/ca.key", "-CAcreateserial",
                "-out", f"{d}/all.crt", "-days", "2", "-extfile", f"{d}/all.ext")
        with registry.RegistryProcess(s.images + "/registry", scratch=d) as content, contextlib.ExitStack() as stack:
            w = World(s, Crictl(s.endpoint, s.factor), steps, d, content.address)
            stack.callback(w.close)
            for part in (redirects, near, moving, plain, proxied, log_of_everything):
                part(w)
    sys.exit(steps.finish())


if __name__ == "__main__":
    main()

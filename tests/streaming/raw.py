"""A streaming client of the tests' own, byte by byte, for what crictl does not do: URLs from CRI without using them, every
protocol version over SPDY/3.1 and WebSocket, connections in plain or in TLS that are given up half-way."""

import base64
import json
import os
import socket
import struct
import urllib.parse
import zlib

from harness.report import Failure, expect

WORDS = """options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow
authorization cache-control connection content-base content-encoding content-language content-length content-location
content-md5 content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range
if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer
retry-after server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get status
200_OK version HTTP/1.1 url public set-cookie keep-alive origin"""
TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative "
    "Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal "
    "Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, "
    "Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,"
    "application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8"
    "charset=iso-8859-1,utf-,*,enq=0.")


def dictionary():
    """That of SPDY/3 for header blocks."""
    words = (word.replace("_", " ").encode() for word in WORDS.split())
    whole = b"".join(struct.pack(">I", len(word)) + word for word in words) + TAIL.encode()
    expect(zlib.adler32(whole) == 0xe3c6a7c2, "not the dictionary of the specification")
    return whole


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, value):
    """A field of a protobuf message: bytes, a text, a truth, or a list of them."""
    if isinstance(value, list):
        return b"".join(field(number, one) for one in value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


class Cri:
    """Asks for streaming URLs: gRPC over the socket, no more of HTTP/2 than that takes."""

    def __init__(self, path, timeout=20):
        self.path, self.timeout = path, timeout

    def exec(self, container, command, **streams):
        flags = [field(n, 1) for n, name in ((3, "tty"), (4, "stdin"), (5, "stdout"), (6, "stderr")) if streams.get(name)]
        return self._url("Exec", field(1, container) + field(2, list(command)) + b"".join(flags))

    def attach(self, container, **streams):
        flags = [field(n, 1) for n, name in ((2, "stdin"), (3, "tty"), (4, "stdout"), (5, "stderr")) if streams.get(name)]
        return self._url("Attach", field(1, container) + b"".join(flags))

    def port_forward(self, pod, *ports):
        return self._url("PortForward", field(1, pod) + field(2, list(ports)))

    def _url(self, method, message):
        def text(value):
            return bytes([len(value)]) + value.encode()

        def frame(kind, flags, stream, payload=b""):
            return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

        path = "/runtime.v1.RuntimeService/" + method
        # Fields of the static table by their number, none compressed.
        headers = (b"\x83\x86\x04" + text(path) + b"\x01" + text("localhost") + b"\x0f\x10" + text("application/grpc")
                   + b"\x00" + text("te") + text("trailers"))
        body = b"\0" + struct.pack(">I", len(message)) + message
        reply = b""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(self.timeout)
            s.connect(self.path)
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + frame(1, 4, 1, headers) + frame(0, 1, 1, body))
            with s.makefile("rb") as stream:
                while True:
                    head = stream.read(9)
                    expect(len(head) == 9, f"{method}: the daemon closed the connection")
                    kind, flags, number = struct.unpack(">BBI", head[3:])
                    payload = stream.read(int.from_bytes(head[:3], "big"))
                    if number == 1 and kind == 0:
                        reply += payload
                    if number == 1 and (kind == 3 or kind in (0, 1) and flags & 1):
                        break
        expect(len(reply) > 5, f"{method} is refused")
        # One field, number 1, of fewer than 128 bytes.
        expect(reply[5] == 10 and reply[6] == len(reply) - 7, f"{method} answers {reply!r}")
        return reply[7:].decode()


class Refused(Failure):
    """The server answers something else than the upgrade."""

    def __init__(self, status, text):
        super().__init__(f"{status}: {text}")
        self.status = status


def connect(url, tls=None, timeout=20):
    """A connection to a URL's server; `tls` is the ssl.SSLContext for https."""
    parts = urllib.parse.urlsplit(url)
    raw = socket.create_connection((parts.hostname, parts.port), timeout)
    if parts.scheme == "http":
        return raw
    expect(tls, f"{url} asks for TLS")
    try:
        return tls.wrap_socket(raw, server_hostname=parts.hostname)
    except BaseException:
        raw.close()
        raise


def upgrade(url, headers, method="POST", tls=None, timeout=20):
    """The socket after the upgrade, and the headers of the answer by their names in small letters."""
    s = connect(url, tls, timeout)
    try:
        parts = urllib.parse.urlsplit(url)
        lines = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: Upgrade",
                 *(f"{name}: {value}" for name, value in headers)]
        s.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = s.recv(1)
            expect(byte, f"closed after {head!r}")
            head += byte
        first, *rest = head.decode().split("\r\n")[:-2]
        status = int(first.split()[1])
        if status != 101:
            raise Refused(status, s.recv(4096).decode().strip())
        return s, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
    except BaseException:
        s.close()
        raise


class Session:
    """What both transports have in common: bytes by channel, until the server ends."""

    def __init__(self, s):
        self.socket, self.heard = s, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def exactly(self, size):
        """That many bytes; none where the server has ended."""
        parts, left = [], size
        while left:
            part = self.socket.recv(min(left, 1 << 20))
            if not part:
                expect(left == size, "ended in the middle")
                return b""
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


class Spdy(Session):
    """Streams over SPDY/3.1; no flow control, as Kubernetes' own client. Channels are the types of streams."""

    def __init__(self, url, protocol, streams=(), **more):
        offered = [("X-Stream-Protocol-Version", one) for one in ([protocol] if isinstance(protocol, str) else protocol)]
        s, answer = upgrade(url, [("Upgrade", "SPDY/3.1"), *offered], **more)
        super().__init__(s)
        self.protocol = answer.get("x-stream-protocol-version")
        self.deflate, self.ids, self.ended = zlib.compressobj(zdict=dictionary()), {}, set()
        for name in streams:
            self.open(name, streamtype=name)

    def open(self, channel, **headers):
        number = 2 * len(self.ids) + 1
        self.ids[channel] = number
        pairs = b"".join(struct.pack(">I", len(part)) + part.encode() for pair in headers.items() for part in pair)
        block = self.deflate.compress(struct.pack(">I", len(headers)) + pairs)
        block += self.deflate.flush(zlib.Z_SYNC_FLUSH)
        payload = struct.pack(">IIBB", number, 0, 0, 0) + block
        self.socket.sendall(struct.pack(">HHI", 0x8003, 1, len(payload)) + payload)

    def send(self, channel, data, end=False):
        self.socket.sendall(struct.pack(">II", self.ids[channel], end << 24 | len(data)) + data)

    def frame(self):
        """Takes one frame; false at the end of the connection."""
        head = self.exactly(8)
        if not head:
            return False
        first, second = struct.unpack(">II", head)
        payload = self.exactly(second & 0xffffff)
        if first & 1 << 31:
            if first & 0xffff == 3:  # RST_STREAM
                self.ended.add(struct.unpack(">I", payload[:4])[0])
            return True
        self.heard[first] = self.heard.get(first, b"") + payload
        if second >> 24 & 1:
            self.ended.add(first)
        return True

    def until_ended(self, *channels):
        """What came on these channels until the server ended them."""
        wanted = {self.ids[channel] for channel in channels}
        while not wanted <= self.ended:
            expect(self.frame(), f"the connection ended before {channels}, after {self.heard}")
        return [self.heard.get(self.ids[channel], b"") for channel in channels]


class WebSocket(Session):
    """Channels by number; text in base64 where the protocol says so."""

    def __init__(self, url, protocol, **more):
        key = base64.b64encode(os.urandom(16)).decode()
        named = [("Sec-WebSocket-Protocol", protocol)] if protocol else []
        s, answer = upgrade(url, [("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", key), *named],
                            **{"method": "GET", **more})
        super().__init__(s)
        self.protocol, self.base64 = answer.get("sec-websocket-protocol"), "base64" in (protocol or "")

    def send(self, channel, data):
        if self.base64:
            self._send(1, str(channel).encode() + base64.b64encode(data))
        else:
            self._send(2, bytes([channel]) + data)

    def _send(self, kind, payload):
        length = len(payload)
        size = bytes([128 | length]) if length < 126 else struct.pack(">BH", 254, length) if length < 1 << 16 else (
            struct.pack(">BQ", 255, length))
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
        self.socket.sendall(bytes([128 | kind]) + size + mask + masked)

    def message(self):
        """Takes one message; false at the end of the connection or its closing."""
        head = self.exactly(2)
        if not head:
            return False
        length = head[1] & 127
        if length > 125:
            length = int.from_bytes(self.exactly(2 if length == 126 else 8), "big")
        payload = self.exactly(length)
        kind = head[0] & 15
        if kind == 8:
            return False
        expect(kind == (1 if self.base64 else 2), f"a frame of kind {kind}")
        if self.base64:
            channel, data = int(payload[:1]), base64.b64decode(payload[1:], validate=True)
        else:
            channel, data = payload[0], payload[1:]
        self.heard[channel] = self.heard.get(channel, b"") + data
        return True

    def until_closed(self, *channels):
        while self.message():
            pass
        return [self.heard.get(channel, b"") for channel in channels]


def exit_code(status):
    """The exit code in what the error channel says since v4."""
    told = json.loads(status)
    if told["status"] == "Success":
        return 0
    expect(told["reason"] == "NonZeroExitCode", f"{told}")
    return int(next(cause["message"] for cause in told["details"]["causes"] if cause["reason"] == "ExitCode"))

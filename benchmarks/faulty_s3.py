"""A proxy in front of an S3 server: it fails a seeded share of the requests, and holds a write while it is under way.

The faults: an answer 500, an answer 503 SlowDown, silence beyond the client's patience, a connection that is reset
before the request is carried out or after it (the client can't know which), a body cut short, with its length announced
or without. It can limit the speed of each connection, as S3 does.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "503", "silence", "reset", "reset after", "cut", "cut unannounced")
_WEIGHTS = (2, 2, 1, 1, 1, 2, 1)
_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_HOP_HEADERS = frozenset({"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"})


class Hold:
    """One write kept waiting by the proxy: it has the body, the server hasn't, and the client waits for the answer."""

    def __init__(self, wanted: Callable[[str, int], bool]) -> None:
        self.wanted = wanted
        self.path = ""
        self.client_port = 0
        self.caught = threading.Event()
        self._go_on = threading.Event()
        self._is_dropped = False

    def release(self, *, drop: bool) -> None:
        """Let the write go on to the server, or drop it as if it had never come."""
        self._is_dropped = drop
        self._go_on.set()

    def catch(self, path: str, client_port: int) -> bool:
        """Keep the calling request until it is released; whether it is to be dropped."""
        self.path, self.client_port = path, client_port
        self.caught.set()
        self._go_on.wait()
        return self._is_dropped


class FaultyS3:
    """The proxy's state: how often it fails, what it did (`counts`, by fault and by method), and the write it holds."""

    def __init__(
        self,
        target_port: int,
        share: float,
        seed: int = 0,
        silence_s: float = 10.0,
        faults: Sequence[str] = FAULTS,
    ) -> None:
        self.target_port = target_port
        self.share = share
        self.silence_s = silence_s
        self.faults = tuple(faults)
        self.counts: Counter[str] = Counter()
        self.write_delay_s = 0.0  # of every write: a slow store
        self.bytes_per_s: float | None = None  # of the answers of one connection; None: as fast as it goes
        self.reads: list[tuple[str, str]] = []  # path and range of every GET that came
        self.most_reads_at_once = 0
        self.writes: list[tuple[str, float]] = []  # path and time (monotonic) of every PUT that came
        self.port = 0
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._hold: Hold | None = None
        self._next: list[tuple[str, str]] = []
        self._reads_now = 0

    @property
    def num_faults(self) -> int:
        """Faults injected so far."""
        return sum(self.counts[fault] for fault in FAULTS)

    def hold(self, wanted: Callable[[str, int], bool]) -> Hold:
        """Hold the next write that `wanted(path, client's port)` picks; one at a time."""
        with self._lock:
            self._hold = Hold(wanted)
            return self._hold

    def unhold(self) -> None:
        """Stop waiting for a write; a write already held goes on."""
        with self._lock:
            held, self._hold = self._hold, None
        if held is not None:
            held.release(drop=False)

    def seed(self, seed: int) -> None:
        """Begin the sequence of faults anew."""
        with self._lock:
            self._random = random.Random(seed)

    def fail_next(self, *faults: tuple[str, str]) -> None:
        """Let the next requests of these (fault, method) pairs fail, whatever the share."""
        with self._lock:
            self._next = list(faults)

    @contextmanager
    def read(self, path: str, of_range: str) -> Iterator[None]:
        """Note a GET for as long as the body answers it."""
        with self._lock:
            self.reads.append((path.partition("?")[0], of_range))
            self._reads_now += 1
            self.most_reads_at_once = max(self.most_reads_at_once, self._reads_now)
        try:
            yield
        finally:
            with self._lock:
                self._reads_now -= 1

    def draw(self, method: str) -> str | None:
        """The fault of the next request, None for most."""
        with self._lock:
            self.counts[method] += 1
            fault = next((fault for fault, of in self._next if of == method), None)
            if fault is not None:
                self._next.remove((fault, method))
            elif self._random.random() < self.share:
                weights = [_WEIGHTS[FAULTS.index(fault)] for fault in self.faults]
                fault = self._random.choices(self.faults, weights)[0]
                if fault.startswith("cut") and method != "GET":
                    fault = "reset" if "reset" in self.faults else None  # other answers have next to no body
            if fault is not None:
                self.counts[fault] += 1
            return fault

    def take_hold(self, path: str, client_port: int) -> Hold | None:
        """The hold that wants this write, which then is over for others."""
        with self._lock:
            held = self._hold
        if held is None or not held.wanted(path.partition("?")[0], client_port):
            return None
        with self._lock:
            if self._hold is not held:
                return None
            self._hold = None
            self.counts["held"] += 1
            return held


@contextmanager
def faulty_s3(proxy: FaultyS3, port: int = 0) -> Iterator[FaultyS3]:
    """Run the proxy on this machine at `port` (0: any free one, then found in `proxy.port`)."""

    class Handler(_Handler):
        state = proxy

    server = _Server(("127.0.0.1", port), Handler)
    proxy.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.unhold()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a silent or held request would keep us
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed leaves broken connections; they are what we are here for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FaultyS3

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: thousands of requests come through."""

    def _serve(self) -> None:
        is_read = self.command == "GET"
        with self.state.read(self.path, self.headers.get("Range", "")) if is_read else nullcontext():
            self._serve_one()

    def _serve_one(self) -> None:
        body = self._read_body()
        fault = self.state.draw(self.command)
        if self.command == "PUT":
            self.state.writes.append((self.path.partition("?")[0], time.monotonic()))
            time.sleep(self.state.write_delay_s)
        if self.command in ("PUT", "POST"):
            held = self.state.take_hold(self.path, self.client_address[1])
            if held is not None:
                if held.catch(self.path, self.client_address[1]):
                    return self._reset()
                fault = None
        if fault in ("500", "503"):
            code = {"500": "InternalError", "503": "SlowDown"}[fault]
            length = [("Content-Length", "0")] if self.command == "HEAD" else []
            return self._answer(int(fault), length, _ERROR.format(code=code).encode())
        if fault == "silence":
            time.sleep(self.state.silence_s)
            return self._reset()
        if fault == "reset":
            return self._reset()
        status, headers, data = self._forward(body)
        if fault == "reset after":
            return self._reset()
        self._answer(status, headers, data, fault or "")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815 (named by http.server)

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(chunks)
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client died while it was sending")  # its half request is never carried out
        return body

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection("127.0.0.1", self.state.target_port, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
            headers["Content-Length"] = str(len(body))
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            data = answer.read()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS]
            if self.command == "HEAD":  # tells the length of what it doesn't send
                kept.append(("Content-Length", answer.headers.get("Content-Length", "0")))
            return answer.status, kept, data
        finally:
            server.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str = "") -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if fault == "cut unannounced":
            self.send_header("Connection", "close")
        elif self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(data[: len(data) // 2] if fault.startswith("cut") else data)
        if fault.startswith("cut"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_WR)

    def _send(self, data: bytes) -> None:
        speed = self.state.bytes_per_s
        if speed is None:
            self.wfile.write(data)
            return
        piece = max(1, int(speed / 50))
        began = time.monotonic()
        for start in range(0, len(data), piece):
            self.wfile.write(data[start : start + piece])
            time.sleep(max(0.0, began + (start + piece) / speed - time.monotonic()))

    def _reset(self) -> None:
        """Close without a word; the peer sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile = _Nowhere()  # type: ignore[assignment]
        self.connection.close()


class _Nowhere:
    """What is written to a connection that is gone."""

    closed = False

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

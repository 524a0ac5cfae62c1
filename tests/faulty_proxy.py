"""A proxy in front of an HTTP server that counts requests, answers some with errors, and is slow.

    python -m tests.faulty_proxy --to=5000 --port=5001 --errors=0.1 --slow=0.05

Written for `tests/drill_store.py`. `GET /-/counts` gives the counts as JSON and sets them to zero.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

_ERROR = b"<Error><Code>InternalError</Code><Message>made by the drill</Message></Error>"
_OWN = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Proxy(BaseHTTPRequestHandler):
    """Passes a request on, or fails it."""

    protocol_version = "HTTP/1.1"
    to, errors, slow, seconds = 0, 0.0, 0.0, 0.0
    random, lock = random.Random(0), threading.Lock()
    counts: ClassVar[Counter[str]] = Counter()
    servers = threading.local()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/-/counts":
            with self.lock:
                told = json.dumps(self.counts).encode()
                self.counts.clear()
            return self._answer(200, {}, told)
        with self.lock:
            fails, late = (self.random.random() < share for share in (self.errors, self.slow))
            self.counts[self._what()] += 1
            self.counts["failed"] += fails
            self.counts["slow"] += late
        if late:
            time.sleep(self.seconds)
        # Half of the failures come after the deed: the answer is what is lost.
        lost = fails and len(body) % 2
        if fails and not lost:
            return self._answer(500, {}, _ERROR)
        status, headers, data = self._pass_on(body)
        return self._answer(500, {}, _ERROR) if lost else self._answer(status, headers, data)

    def _what(self) -> str:
        """The method; a GET of a range by itself, as is one of a list."""
        if self.command == "GET" and "Range" in self.headers:
            return "GET range"
        listing = "list-type" in urlsplit(self.path).query
        return f"{self.command} list" if listing else self.command

    def _pass_on(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for attempt in range(2):
            server = getattr(self.servers, "server", None)
            if server is None:
                server = self.servers.server = http.client.HTTPConnection("127.0.0.1", self.to)
            try:
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()
            except (http.client.HTTPException, OSError):
                server.close()
                if attempt:
                    raise
        raise AssertionError

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OWN:
                self.send_header(name, value)
        # Of a HEAD the length is the object's.
        told = {name.lower(): value for name, value in headers.items()}
        length = told.get("content-length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", type=int, required=True, help="port of the server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--errors", type=float, default=0.0, help="share of answers that are 500")
    parser.add_argument("--slow", type=float, default=0.0, help="share of answers that are late")
    parser.add_argument("--seconds", type=float, default=3.0, help="how late")
    options = parser.parse_args()
    for name in ("to", "errors", "slow", "seconds"):
        setattr(Proxy, name, getattr(options, name))
    ThreadingHTTPServer(("127.0.0.1", options.port), Proxy).serve_forever()


if __name__ == "__main__":
    main()

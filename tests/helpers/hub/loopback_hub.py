"""The loopback Hub, running: how requests are read, failed and answered, and downloads."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub.pages import ROUTES, Pages
from tests.helpers.hub.repositories import Refused, git_oid, is_large
from tests.helpers.hub.server import LoopbackHub


class Handler(Pages):
    """One request: read whole, counted, then failed or answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms: its head is sent, and its body when that is told

    def log_message(self, *arguments: Any) -> None:
        """Requests are noted by the server and not printed."""
        pass

    def handle_any(self) -> None:
        """Count a request, fail it where the script says so, else answer it."""
        body = self.body()
        split = urlsplit(self.path)
        hub = self.server
        with hub.lock:
            hub.log.append(f"{self.command} {unquote(split.path)}")
            number = len(hub.log)
            fault = hub.faults.get(number)
            if hub.hard is not None and number >= hub.hard[0]:
                fault = str(hub.hard[1])
            if fault == "drop":
                return self.hang_up()
            if fault is not None and fault.isdecimal():
                extra = {"Retry-After": "7"} if fault == "429" else {}
                return self.answer(int(fault), b"<html>no JSON</html>", extra)
            try:
                status, content, headers = self.route(unquote(split.path), parse_qs(split.query), body)
            except Refused as refused:
                codes = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
                status, content, headers = (
                    refused.status,
                    json.dumps({"error": refused.message} | refused.more).encode(),
                    codes,
                )
            if fault == "lost":
                return self.hang_up()
            self.answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def body(self) -> bytes:
        """All bytes of a request, chunked or not."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def hang_up(self) -> None:
        """Close the connection at once."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        """Send status, headers and content."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers of the page that a request asks for."""
        if self.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/(.+)", path)):
            return self.resolve(*match.groups())
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer = action(self, *match.groups(), query=query, body=body)
                return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        raise Refused(404, f"no such page: {path}")

    def resolve(self, name: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        """A file to download."""
        repository = self.repository(name)
        commit = self.commit_of(repository, revision)
        content = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        if not is_large(path):
            return self.ranged(content, git_oid(content), headers)
        sha256 = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        return self.ranged(content, sha256, headers | linked)

    def ranged(self, content: bytes, etag: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """All of a content, or the range that was asked for."""
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | headers
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], headers
        return 200, content, headers | {"Content-Length": str(len(content))}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running Hub."""
    hub = LoopbackHub(Handler)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

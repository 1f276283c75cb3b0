"""The server of the loopback Hub: what it holds, and its script of faults."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.hub.repositories import Files, Repository

TOKEN = "hf_" + "loopback" * 4


class LoopbackHub(ThreadingHTTPServer):
    """The server and all it holds.

    Attributes:
        faults: number of a request, from 1, -> `503`, `429`, `408`, `drop` (the connection closes, nothing is
            done), `lost` (done, and the connection closes before the answer); with `hard` set, all from there on.
        log: method and path of each request.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: Files = {}
        self.faults: dict[int, str] = {}
        self.hard: tuple[int, int] | None = None  # from this request on, this status
        self.log: list[str] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def restart(self) -> None:
        """Forget repositories, faults and log."""
        self.repositories, self.blobs, self.faults, self.hard, self.log = {}, {}, {}, None, []

    def put(self, name: str, files: Files, *, private: bool = False) -> str:
        """A repository that is there already; returns its commit."""
        made = self.repositories.setdefault(name, Repository(private))
        made.branches["main"] = made.add(files, made.branches.get("main"))
        return made.branches["main"]

    def files(self, name: str, revision: str = "main") -> Files:
        """What a repository holds; nothing where there is none."""
        found = self.repositories.get(name)
        return {} if found is None else found.commits[str(found.resolve(revision))]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that closes its connection is no news."""

"""A Hub on 127.0.0.1 for the real huggingface_hub client: repositories in memory, and a script of faults.

It speaks what publishing and loading need: create, refs, branch, tag, validate-yaml, preupload, LFS batch, upload and
verify, commit with parent and pull request, info, tree, and resolve with ETag and ranges. A commit is one
assignment under a lock: half of one cannot be seen. Writes, and private repositories, need the token.
"""

import base64
import copy
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "loopback" * 4
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by id, and the names that point to them."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    proposals: dict[str, str] = field(default_factory=dict)

    def add(self, files: Files, parent: str | None) -> str:
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(f"{len(self.commits)} {content} {parent}".encode()).hexdigest()
        self.commits[oid], self.parents[oid] = files, parent
        return oid

    def resolve(self, revision: str) -> str | None:
        for names in (self.branches, self.tags, self.proposals):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None


class Refused(Exception):
    """An answer that is an error: status, and what huggingface_hub tells errors by."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


class LoopbackHub(ThreadingHTTPServer):
    """The server and all it holds.

    Attributes:
        faults: number of a request, from 1, -> `503`, `429`, `408`, `drop` (the connection closes, nothing is
            done), `lost` (done, and the connection closes before the answer); with `hard` set, all from there on.
        log: method and path of each request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.blobs: Files = {}
        self.faults: dict[int, str] = {}
        self.hard: tuple[int, int] | None = None  # from this request on, this status
        self.log: list[str] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
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


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running Hub."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def described(path: str, content: bytes) -> dict[str, Any]:
    """A file as the Hub lists it."""
    sha256 = hashlib.sha256(content).hexdigest()
    blob = f"version https://git-lfs sha256:{sha256}".encode() if is_large(path) else content
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(blob)}
    if is_large(path):
        found["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return found


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request: read whole, counted, then failed or answered."""

    server: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_any(self) -> None:
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
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, *, write: bool = False) -> Repository:
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.authorized()):
            raise Refused(404 if self.authorized() else 401, "Repository not found", "RepoNotFound")
        if write and not self.authorized():
            raise Refused(403, "no right to write here")
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        found = repository.resolve(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if self.command in ("GET", "HEAD") and (match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/(.+)", path)):
            return self.resolve(*match.groups())
        for method, pattern, action in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer = action(self, *match.groups(), query=query, body=body)
                return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
        raise Refused(404, f"no such page: {path}")

    def resolve(self, name: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
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
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"} | headers
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], headers
        return 200, content, headers | {"Content-Length": str(len(content))}

    def create(self, *, query: Any, body: bytes) -> Any:
        if not self.authorized():
            raise Refused(401, "Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repositories:
            raise Refused(409, "You already created this model repo", url=f"{self.server.url}/{name}")
        made = self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        made.branches["main"] = made.add({".gitattributes": b"*.safetensors filter=lfs\n"}, None)
        return {"url": f"{self.server.url}/{name}", "name": name}

    def info(self, name: str, revision: str | None = None, *, query: Any, body: bytes) -> Any:
        repository = self.repository(name)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        return {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    def refs(self, name: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        repository = self.repository(name)

        def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": key, "ref": prefix + key, "targetCommit": commit} for key, commit in names.items()]

        found = {"branches": listed(repository.branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/")}
        return found | {"converts": [], "pullRequests": listed(repository.proposals, "")}

    def tree(self, name: str, revision: str, inner: str | None = None, *, query: Any, body: bytes) -> Any:
        repository = self.repository(name)
        files = repository.commits[self.commit_of(repository, revision)]
        found = [described(path, content) for path, content in files.items() if path.startswith(inner or "")]
        if inner and not found:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return found

    def branch(self, name: str, branch: str, *, query: Any, body: bytes) -> Any:
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[branch] = self.commit_of(repository, json.loads(body).get("startingPoint", "main"))
        return {}

    def tag(self, name: str, revision: str, *, query: Any, body: bytes) -> Any:
        repository, tag = self.repository(name, write=True), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, "Tag already exists")
        repository.tags[tag] = self.commit_of(repository, revision)
        return {}

    def validate(self, *, query: Any, body: bytes) -> Any:
        asked = json.loads(body)
        if not asked["content"].startswith("---\n"):
            raise Refused(400, "no metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str, *, query: Any, body: bytes) -> Any:
        repository = self.repository(name, write=True)
        there = repository.commits[self.commit_of(repository, revision)]
        answers = []
        for wanted in json.loads(body)["files"]:
            path = wanted["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in there and not is_large(path):
                answer["oid"] = git_oid(there[path])
            answers.append(answer)
        return {"files": answers}

    def batch(self, name: str, *, query: Any, body: bytes) -> Any:
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                places = {"upload": f"/lfs/{wanted['oid']}", "verify": f"/{name}.git/verify"}
                known["actions"] = {kind: {"href": self.server.url + place} for kind, place in places.items()}
            objects.append(known)
        return {"transfer": "basic", "objects": objects}

    def upload(self, sha256: str, *, query: Any, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refused(400, "other bytes than promised")
        self.server.blobs[sha256] = body
        return {}

    def verify(self, name: str, *, query: Any, body: bytes) -> Any:
        if json.loads(body)["oid"] not in self.server.blobs:
            raise Refused(404, "not uploaded")
        return {}

    def commit(self, name: str, revision: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        repository = self.repository(name, write=True)
        if revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *lines = [json.loads(line) for line in body.splitlines()]
        parent = repository.branches[revision]
        asked = header["value"].get("parentCommit")
        proposed = "create_pr" in query
        if asked is not None and asked != parent and not proposed:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = copy.copy(repository.commits[asked or parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, "a large file was not uploaded")
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                files.pop(value["path"], None)
        oid = repository.add(files, parent)
        answer = {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}", "success": True}
        if proposed:
            number = len(repository.proposals) + 1
            repository.proposals[f"refs/pr/{number}"] = oid
            return answer | {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"}
        repository.branches[revision] = oid
        return answer


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    ("GET", f"/api/models/{NAME}/tree/([^/]+|refs/pr/\\d+)", Handler.tree),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/(.+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/tag/(.+)", Handler.tag),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/{NAME}\\.git/verify", Handler.verify),
    ("PUT", r"/lfs/(\w+)", Handler.upload),
]

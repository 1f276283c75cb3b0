"""The pages of the loopback Hub's API, by method and path."""

import base64
import copy
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.helpers.hub.repositories import Refused, Repository, described, git_oid, is_large
from tests.helpers.hub.server import TOKEN, LoopbackHub


class Pages(BaseHTTPRequestHandler):
    """What each page of the API does to the repositories and says; each raises `Refused` where it will not."""

    server: LoopbackHub

    def authorized(self) -> bool:
        """Whether the request carries the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str, *, write: bool = False) -> Repository:
        """A repository that the client may see, or write to."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self.authorized()):
            raise Refused(404 if self.authorized() else 401, "Repository not found", "RepoNotFound")
        if write and not self.authorized():
            raise Refused(403, "no right to write here")
        return found

    def commit_of(self, repository: Repository, revision: str) -> str:
        """The commit that a revision names."""
        found = repository.resolve(revision)
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create(self, *, query: Any, body: bytes) -> Any:
        """Make a repository."""
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
        """What a repository is and which files it has."""
        repository = self.repository(name)
        commit = self.commit_of(repository, revision or "main")
        siblings = [{"rfilename": path} for path in repository.commits[commit]]
        return {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}

    def refs(self, name: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        """Its branches, tags and pull requests."""
        repository = self.repository(name)

        def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
            """One kind of them."""
            return [{"name": key, "ref": prefix + key, "targetCommit": commit} for key, commit in names.items()]

        found = {"branches": listed(repository.branches, "refs/heads/"), "tags": listed(repository.tags, "refs/tags/")}
        return found | {"converts": [], "pullRequests": listed(repository.proposals, "")}

    def tree(self, name: str, revision: str, inner: str | None = None, *, query: Any, body: bytes) -> Any:
        """Its files, or those of a folder."""
        repository = self.repository(name)
        files = repository.commits[self.commit_of(repository, revision)]
        found = [described(path, content) for path, content in files.items() if path.startswith(inner or "")]
        if inner and not found:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return found

    def branch(self, name: str, branch: str, *, query: Any, body: bytes) -> Any:
        """Make a branch."""
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[branch] = self.commit_of(repository, json.loads(body).get("startingPoint", "main"))
        return {}

    def tag(self, name: str, revision: str, *, query: Any, body: bytes) -> Any:
        """Make a tag."""
        repository, tag = self.repository(name, write=True), json.loads(body)["tag"]
        if tag in repository.tags:
            raise Refused(409, "Tag already exists")
        repository.tags[tag] = self.commit_of(repository, revision)
        return {}

    def validate(self, *, query: Any, body: bytes) -> Any:
        """Check that a card has metadata."""
        asked = json.loads(body)
        if not asked["content"].startswith("---\n"):
            raise Refused(400, "no metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str, *, query: Any, body: bytes) -> Any:
        """Say which files are uploaded as large ones."""
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
        """Say where the large files that are not there yet are uploaded."""
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
        """Take a large file."""
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refused(400, "other bytes than promised")
        self.server.blobs[sha256] = body
        return {}

    def verify(self, name: str, *, query: Any, body: bytes) -> Any:
        """Say whether a large file has arrived."""
        if json.loads(body)["oid"] not in self.server.blobs:
            raise Refused(404, "not uploaded")
        return {}

    def commit(self, name: str, revision: str, *, query: dict[str, list[str]], body: bytes) -> Any:
        """Change files on a branch, or propose it."""
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
    ("POST", "/api/repos/create", Pages.create),
    ("POST", "/api/validate-yaml", Pages.validate),
    ("GET", f"/api/models/{NAME}", Pages.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", Pages.info),
    ("GET", f"/api/models/{NAME}/refs", Pages.refs),
    ("GET", f"/api/models/{NAME}/tree/([^/]+|refs/pr/\\d+)", Pages.tree),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/(.+)", Pages.tree),
    ("POST", f"/api/models/{NAME}/branch/(.+)", Pages.branch),
    ("POST", f"/api/models/{NAME}/tag/(.+)", Pages.tag),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Pages.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Pages.commit),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", Pages.batch),
    ("POST", f"/{NAME}\\.git/verify", Pages.verify),
    ("PUT", r"/lfs/(\w+)", Pages.upload),
]

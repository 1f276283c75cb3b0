"""Repositories in memory, their files as the Hub lists them, and its errors."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

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
        """Keep files as a commit; returns its id."""
        content = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        oid = hashlib.sha1(f"{len(self.commits)} {content} {parent}".encode()).hexdigest()
        self.commits[oid], self.parents[oid] = files, parent
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a name or an id stands for."""
        for names in (self.branches, self.tags, self.proposals):
            if revision in names:
                return names[revision]
        return revision if revision in self.commits else None


class Refused(Exception):
    """An answer that is an error: status, and what huggingface_hub tells errors by."""

    def __init__(self, status: int, message: str, code: str = "", **more: str) -> None:
        self.status, self.message, self.code, self.more = status, message, code, more


def is_large(path: str) -> bool:
    """Whether the Hub keeps a file in LFS."""
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
    """The id that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

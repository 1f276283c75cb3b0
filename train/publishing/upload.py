"""A staged adapter on its way to one branch of a Hub repository: one commit, retried, read back.

It looks first at what is there, and so can be repeated after any interruption: what has arrived is not sent again,
and a commit whose answer was lost is found. Knows no adapter but the names of its files.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from runtime.adapter.config import VERSION
from runtime.adapter.folder import CONFIG_FILE
from runtime.adapter.hub import RETRIED, TRANSPORT_ERROR
from runtime.adapter.identity import file_sha256
from runtime.errors import AdapterError
from train.publishing.staging import OURS, published

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try, where the Hub names none
LONGEST_WAIT = 300.0


@dataclass(frozen=True, slots=True)
class Published:
    """Where an adapter is: page, commit, and whether this call put it there."""

    url: str
    commit: str
    changed: bool


class Upload:
    """One staged folder on its way to one branch."""

    def __init__(self, target: Path, repo_id: str, branch: str, token: str | None) -> None:
        self.target, self.repo_id, self.branch, self.token = target, repo_id, branch, token
        self.api = HfApi(token=token, library_name="specbound", library_version=VERSION)

    def run(self, *, private: bool, create_pr: bool, tag: str | None) -> Published:
        """The whole way: repository, branch, commit, read back, tag."""
        self._check_repo(private=private)
        head = self._head()
        changed, commit, url = False, head, f"{self.api.endpoint}/{self.repo_id}"
        if tag is not None:
            self._check_tag(tag, head)
        if operations := self._differing(head):
            self._check_replaceable(head)
            proposal = self._proposal() if create_pr else None
            changed = proposal is None
            commit, url = proposal or self._commit(operations, head, url, create_pr=create_pr)
        self._read_back(commit)
        if tag is not None:
            _patiently(lambda: self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True))
        return Published(url, commit, changed)

    def _check_repo(self, *, private: bool) -> None:
        """Make the repository where there is none; one with another visibility is not ours to change."""
        try:
            info = _patiently(lambda: self.api.repo_info(self.repo_id))
        except RepositoryNotFoundError:
            _patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
            info = _patiently(lambda: self.api.repo_info(self.repo_id))
        if bool(info.private) != private:
            there, remedy = ("private", "leave out --public") if info.private else ("public", "give --public")
            raise AdapterError(f"{self.repo_id} is there and {there}: {remedy}, or change it on its settings page")

    def _head(self) -> str:
        """Commit of the branch, which is made from `main` where it is not there."""
        refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id))
        if self.branch in {ref.name for ref in refs.tags}:
            raise AdapterError(
                f"{self.branch} is a tag of {self.repo_id}: expected a branch, tags stay where they are"
            )
        if self.branch not in {ref.name for ref in refs.branches}:
            _patiently(lambda: self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True))
            refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id))
        return next(ref.target_commit for ref in refs.branches if ref.name == self.branch)

    def _check_tag(self, tag: str, head: str) -> None:
        """A tag that is there stays where it is."""
        refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id))
        there = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if there is not None and (there != head or self._differing(head)):
            raise AdapterError(f"{self.repo_id} has a tag {tag} already, of commit {there[:12]}: give another")

    def _differing(self, commit: str) -> dict[str, bool]:
        """Files that the repository has not, or has otherwise (True), and those of an adapter it has too much (False).

        By the Hub's own hashes: SHA-256 of large files, git's of small ones.
        """
        verification = _patiently(
            lambda: self.api.verify_repo_checksums(self.repo_id, revision=commit, local_dir=self.target)
        )
        wanted = [*verification.extra_paths, *(mismatch["path"] for mismatch in verification.mismatches)]
        return dict.fromkeys(sorted(wanted), True) | dict.fromkeys(set(verification.missing_paths) & OURS, False)

    def _check_replaceable(self, head: str) -> None:
        """A repository with a config that is not an adapter's is somebody's model."""
        names = _patiently(lambda: self.api.list_repo_files(self.repo_id, revision=head))
        if CONFIG_FILE in names and b'"specbound_version"' not in self._bytes(CONFIG_FILE, head):
            raise AdapterError(f"{self.repo_id} holds something else than a SpecBound adapter: give another name")

    def _proposal(self) -> tuple[str, str] | None:
        """Commit and page of a pull request that proposes these very files already."""
        refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        for ref in reversed(refs.pull_requests or []):
            if not self._differing(ref.target_commit):
                number = ref.ref.rpartition("/")[2]
                return ref.target_commit, f"{self.api.endpoint}/{self.repo_id}/discussions/{number}"
        return None

    def _commit(self, files: dict[str, bool], head: str, url: str, *, create_pr: bool) -> tuple[str, str]:
        """One commit on top of `head`, or a refusal where `head` is the branch's last no more; its id and page."""

        def send() -> tuple[str, str]:
            operations = [  # made anew for each try: huggingface_hub marks them
                CommitOperationAdd(name, self.target / name) if wanted else CommitOperationDelete(name)
                for name, wanted in files.items()
            ]
            made = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message="SpecBound adapter",
                revision=self.branch,
                parent_commit=head,
                create_pr=create_pr,
            )
            return made.oid, str(made.pr_url) if create_pr else url

        def landed() -> tuple[str, str] | None:
            """Where the commit is whose answer was lost."""
            if create_pr:
                return self._proposal()
            now = self._head()
            if now == head:
                return None
            if not self._differing(now):
                return now, url
            raise AdapterError(
                f"{self.repo_id} was changed by somebody else while this was published (commit {now[:12]}):"
                " look at it, then publish again"
            )

        return _patiently(send, landed)

    def _read_back(self, commit: str) -> None:
        """Download what was published, and compare it with what was sent, by sha256."""
        for path in published(self.target):
            name = path.relative_to(self.target).as_posix()
            if hashlib.sha256(self._bytes(name, commit)).hexdigest() != file_sha256(path):
                raise AdapterError(f"{name} came back from {self.repo_id} with other bytes: publish again")

    def _bytes(self, name: str, commit: str) -> bytes:
        url = hf_hub_url(self.repo_id, name, revision=commit, endpoint=self.api.endpoint)
        response = http_backoff("GET", url, headers=build_hf_headers(token=self.token))
        hf_raise_for_status(response)
        return bytes(response.content)


def _patiently(call: Callable[[], Answer], landed: Callable[[], Answer | None] | None = None) -> Answer:
    """Call until the Hub answers, a few times, waiting as long as it asks; `landed` finds what a lost answer said."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (TRANSPORT_ERROR, json.JSONDecodeError) as error:  # a proxy's error page is no JSON
            if landed is not None and (answer := landed()) is not None:
                return answer
            pause = _pause(error, wait)
            if pause is None:
                raise
            logger.info("the Hub failed (%s), next try in %g s", one_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _pause(error: Exception, wait: float | None) -> float | None:
    """Seconds until the next try; None where there is to be none."""
    response = getattr(error, "response", None)
    if wait is None or (response is not None and response.status_code not in RETRIED):
        return None
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait


def one_line(error: BaseException) -> str:
    """What a library's error says, on one line and not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__

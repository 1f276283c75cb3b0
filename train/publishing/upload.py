"""Upload a staged adapter to one branch of a Hub repository, in one commit with retries and verification.

An upload first compares the repository with the staged files, so it can be repeated after any interruption. Files
that have arrived are not sent again, and a commit whose response was lost is found.
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

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry, if the Hub names no time
LONGEST_WAIT = 300.0


@dataclass(frozen=True, slots=True)
class Published:
    """Where an adapter was published: page, commit, and whether this call changed anything."""

    url: str
    commit: str
    changed: bool


class Upload:
    """The upload of one staged folder to one branch."""

    def __init__(self, target: Path, repo_id: str, branch: str, token: str | None) -> None:
        self.target, self.repo_id, self.branch, self.token = target, repo_id, branch, token
        self.api = HfApi(token=token, library_name="specbound", library_version=VERSION)

    def run(self, *, private: bool, create_pr: bool, tag: str | None) -> Published:
        """Create the repository and the branch if missing, commit, verify and tag."""
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
        """Create the repository if it does not exist; raises AdapterError if it has the other visibility."""
        try:
            info = _patiently(lambda: self.api.repo_info(self.repo_id))
        except RepositoryNotFoundError:
            _patiently(lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))
            info = _patiently(lambda: self.api.repo_info(self.repo_id))
        if bool(info.private) != private:
            visibility, remedy = ("private", "leave out --public") if info.private else ("public", "give --public")
            raise AdapterError(f"{self.repo_id} is there and {visibility}: {remedy}, or change that in its settings")

    def _head(self) -> str:
        """Return the branch's last commit; creates the branch from `main` if it does not exist."""
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
        """Raise an AdapterError if the tag exists and would have to move."""
        refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id))
        there = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
        if there is not None and (there != head or self._differing(head)):
            raise AdapterError(f"{self.repo_id} has a tag {tag} already, of commit {there[:12]}: give another")

    def _differing(self, commit: str) -> dict[str, bool]:
        """Compare a commit with the staged files; returns names of files to send (True) and to delete (False).

        The Hub's hashes are compared: SHA-256 of large files, git's of small ones. Only adapter files are deleted.
        """
        verification = _patiently(
            lambda: self.api.verify_repo_checksums(self.repo_id, revision=commit, local_dir=self.target)
        )
        wanted = [*verification.extra_paths, *(mismatch["path"] for mismatch in verification.mismatches)]
        return dict.fromkeys(sorted(wanted), True) | dict.fromkeys(set(verification.missing_paths) & OURS, False)

    def _check_replaceable(self, head: str) -> None:
        """Raise an AdapterError if the repository has a config that is not an adapter's."""
        names = _patiently(lambda: self.api.list_repo_files(self.repo_id, revision=head))
        if CONFIG_FILE in names and b'"specbound_version"' not in self._bytes(CONFIG_FILE, head):
            raise AdapterError(f"{self.repo_id} holds something else than a SpecBound adapter: give another name")

    def _proposal(self) -> tuple[str, str] | None:
        """Return commit and page of a pull request that already proposes the same files, if there is one."""
        refs = _patiently(lambda: self.api.list_repo_refs(self.repo_id, include_pull_requests=True))
        for ref in reversed(refs.pull_requests or []):
            if not self._differing(ref.target_commit):
                number = ref.ref.rpartition("/")[2]
                return ref.target_commit, f"{self.api.endpoint}/{self.repo_id}/discussions/{number}"
        return None

    def _commit(self, files: dict[str, bool], head: str, url: str, *, create_pr: bool) -> tuple[str, str]:
        """Commit on top of `head`; returns id and page. Raises AdapterError if somebody else changed the branch."""

        def send() -> tuple[str, str]:
            operations = [  # new objects for each try, since huggingface_hub marks them as sent
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
            """Look for the commit after its response was lost."""
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
        """Download the published files and compare their SHA-256 with the staged files."""
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
    """Call the Hub, with retries after the time it asks for; `landed` looks for the result of a call that failed."""
    for wait in (*WAITS, None):
        try:
            return call()
        except (TRANSPORT_ERROR, json.JSONDecodeError) as error:  # a proxy's error page is not JSON
            if landed is not None and (answer := landed()) is not None:
                return answer
            pause = _pause(error, wait)
            if pause is None:
                raise
            logger.info("the Hub failed (%s), next try in %g s", one_line(error), pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _pause(error: Exception, wait: float | None) -> float | None:
    """Return the seconds until the next try; None if there should be none."""
    response = getattr(error, "response", None)
    if wait is None or (response is not None and response.status_code not in RETRIED):
        return None
    asked = "" if response is None else response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdecimal() else wait


def one_line(error: BaseException) -> str:
    """Return a library's error message on one line of limited length."""
    return " ".join(str(error).split())[:300] or type(error).__name__

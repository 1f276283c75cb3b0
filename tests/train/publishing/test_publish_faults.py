"""Publishing while the Hub fails: every request in every way, no right to write, somebody else's commit."""

import shutil
from functools import partial

import huggingface_hub
import pytest

from tests.helpers.hub.server import TOKEN
from tests.helpers.publication import NAME, hashes, refusal, rename
from train.publishing.publish import publish
from train.publishing.staging import Claims, stage

# huggingface_hub's own call of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """The same folder without pictures and traces, staged once: each test of many faults publishes it often."""
    for path in (*folder.glob("*.png"), folder / "traces.safetensors"):
        path.unlink()
    (tmp_path / "staged").mkdir()
    stage(folder, tmp_path / "staged", NAME, Claims())
    copy = partial(shutil.copytree, tmp_path / "staged", dirs_exist_ok=True)
    monkeypatch.setattr("train.publishing.publish.stage", lambda _, target, *rest: copy(target))
    return folder


@pytest.fixture
def requests(hub, small):
    """What one undisturbed publication asks of the Hub, in order, and what is there afterwards."""
    publish(small, "some-org/first", tag="v1")  # the client asks some things only once
    hub.restart()
    publish(small, NAME, tag="v1")
    found, files = list(hub.log), hub.files(NAME)
    assert (
        len(found) > 15
        and "PUT" in str(found)
        and found[-1].startswith("POST /api/models/some-org/tiny-specbound/tag")
    )
    return found, files


@pytest.mark.parametrize("fault", ["503", "429", "408", "drop", "lost"])
def test_a_fault_at_each_request_is_outlived(hub, small, requests, fault):
    before = hashes(small)
    every = {"503": 4, "408": 4, "drop": 2}.get(fault, 1)  # outlived by the same lines as 429
    for number, request in list(enumerate(requests[0], start=1))[::every]:
        hub.restart()
        hub.slept.clear()
        hub.faults = {number: fault}
        found = publish(small, NAME, tag="v1")
        assert hub.files(NAME) == requests[1] and len(hub.repositories[NAME].commits) == 2, request
        assert hub.repositories[NAME].tags == {"v1": found.commit}, request
        assert hub.slept or fault == "lost", request
        assert fault != "429" or "validate-yaml" in request or max(hub.slept) >= 7, request
    assert hashes(small) == before


@pytest.mark.parametrize("status", [500, 403])
def test_a_hub_that_goes_on_failing_from_any_request_on_has_all_or_nothing(hub, small, requests, status):
    before = hashes(small)
    every = 1 if status == 500 else 3  # refused by the same lines
    for number, request in list(enumerate(requests[0], start=1))[::every]:
        hub.restart()
        hub.hard = (number, status)
        message = refusal(small, NAME, tag="v1")
        assert "the same command goes on" in message and hashes(small) == before
        assert status != 403 or "hf auth login" in message, request
        there = hub.files(NAME) if NAME in hub.repositories else {}
        assert there in ({}, requests[1]) or list(there) == [".gitattributes"], request
        hub.hard = None
        publish(small, NAME, tag="v1")
        assert hub.files(NAME) == requests[1] and len(hub.repositories[NAME].commits) == 2


def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(hub, small, requests):
    for number in range(1, len(requests[0]) + 2, 2):
        hub.restart()
        hub.faults = {number: "lost"}
        publish(small, NAME, create_pr=True)
        assert len(hub.repositories[NAME].proposals) == 1


def test_a_commit_of_somebody_else_in_between_is_not_overwritten(hub, folder, monkeypatch):
    publish(folder, NAME)
    rename(folder, license="mit")
    real = huggingface_hub.HfApi.create_commit

    def late(self, *arguments, **options):
        repository = hub.repositories[NAME]
        repository.branches["main"] = repository.add({"README.md": b"theirs"}, repository.branches["main"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", late)
    assert "was changed by somebody else while this was published" in refusal(folder, NAME)
    assert hub.files(NAME) == {"README.md": b"theirs"}


def test_other_bytes_than_were_sent_are_noticed(hub, folder, monkeypatch):
    publish(folder, NAME)
    files = hub.files(NAME)
    monkeypatch.setattr("tests.helpers.hub.loopback_hub.Handler.ranged", lambda self, *rest: (200, b"[]", {}))
    assert "came back from some-org/tiny-specbound with other bytes" in refusal(folder, NAME)
    assert hub.files(NAME) == files


def test_without_a_right_to_write(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 8)
    assert "hf auth login" in refusal(folder, NAME)
    assert "hf auth login" in refusal(folder, NAME, token="hf_" + "other" * 8)
    assert hub.repositories == {}
    assert publish(folder, NAME, token=TOKEN).changed

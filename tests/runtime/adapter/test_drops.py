"""A Hub whose connection drops while an adapter or its base loads: another try, and one line where none helps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from runtime import AdapterError, load_specbound, save_adapter
from runtime.adapter.hub import WAITS
from runtime.cli.options import to_ids
from runtime.cli.speaker import Speaker
from runtime.text.prompts import Message, Prompt
from tests.helpers.hub.server import LoopbackHub

NAME, BASE = "some-org/tiny-specbound", "some-org/tiny-base"
REQUESTS = 12  # fewer than a load makes


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def published(
    hub: LoopbackHub,
    tmp_path: Path,
    make_model: Any,
    make_tokenizer: Any,
    make_adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> LoopbackHub:
    """A tiny base and an adapter for it, both on the Hub; nothing of them in the cache."""
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    save_adapter(make_adapter(model, tokenizer, base_model_name_or_path=BASE), tmp_path / "adapter")
    hub.put(BASE, files(tmp_path / "base"))
    hub.put(NAME, files(tmp_path / "adapter"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def load(published: LoopbackHub, tmp_path: Path) -> Any:
    """By name, with no word on the base."""
    published.log.clear()
    return load_specbound(NAME, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("fault", ["drop", "503"])
@pytest.mark.parametrize("request_number", range(1, REQUESTS, 2))
def test_one_fault_is_outlived(published: LoopbackHub, tmp_path: Path, fault: str, request_number: int) -> None:
    """Whatever is asked for in that moment."""
    published.faults = {request_number: fault}
    assert load(published, tmp_path).specbound.config.base_model_name_or_path == BASE
    assert len(published.log) > REQUESTS


@pytest.mark.parametrize("first", [1, 6, REQUESTS])
def test_a_hub_that_goes_on_failing_is_told_in_a_line(published: LoopbackHub, tmp_path: Path, first: int) -> None:
    """Which of the two could not be had, and what to do; a few tries were made."""
    published.hard = (first, 503)
    with pytest.raises(AdapterError) as caught:
        load(published, tmp_path)
    said = str(caught.value)
    assert "\n" not in said and "the Hub could not give it" in said and (NAME in said or BASE in said)
    assert published.slept.count(WAITS[-1]) >= 1


@pytest.mark.parametrize("verb", ["to_ids", "speaker"])
def test_the_tokenizer_of_a_verb_outlives_a_drop(
    published: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """The base is in memory, its tokenizer is not here yet; whatever is asked for in that moment."""
    model = SimpleNamespace(name_or_path=BASE, device="cpu")
    monkeypatch.setattr("runtime.cli.speaker.load_with_adapter", lambda *rest, **options: model)
    for request_number in range(1, REQUESTS):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{request_number}"))
        published.log.clear()
        published.faults = {request_number: "drop"}
        if verb == "to_ids":
            assert to_ids(model, [Prompt((Message("user", "w1 w2"),))])[0].tolist() == [[4, 5]]
        else:
            assert Speaker.load(NAME, None).tokenizer("w1 w2")["input_ids"] == [4, 5]
    assert published.slept.count(WAITS[0]) >= 2

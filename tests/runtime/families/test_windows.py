"""Layers that see a window of the last tokens: ids of plain decoding before, at and beyond its edge."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime import SpeculationBounds, UnsupportedModel, detach
from runtime.decoding import families
from runtime.decoding.families import CACHE
from runtime.exact.attention import BlockAttention
from runtime.exact.execution import ExecutionPolicy
from runtime.exact.probe import compare
from runtime.exact.reference import Reference
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers import cells
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import INSIDE_ALONE, VOCABULARY, WINDOWS, model_type, prompt, require, tiny

WINDOW, NEW = 16, 30
GREEDY: dict[str, Any] = {"do_sample": False, "no_repeat_ngram_size": 2}
TREES = SpeculationBounds(0.2, 1, 8, max_branches=3, max_depth=4)


def both(model: PreTrainedModel, ids: Tensor, bounds: SpeculationBounds, **options: Any) -> tuple[Any, Any]:
    """What plain decoding gives, and what comes of drafts that are right two times of three, and others beside."""
    options = {"max_new_tokens": NEW, "return_dict_in_generate": True} | options
    torch.manual_seed(3)
    stock = model.generate(ids, **options)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock.sequences[0].tolist(), VOCABULARY), bounds))
    torch.manual_seed(3)
    found = model.generate(ids, **options)
    stats, certificate = model.specbound.stats, model.specbound.certificate
    detach(model)
    assert certificate.bitwise and stats.accepted.total() > 5 and stats.drafted.total() > stats.accepted.total()
    return stock, found


def test_every_family_with_windows_is_tried() -> None:
    """Of those that are accepted with them."""
    windows = {name for name, family in families.FAMILIES.items() if family.windows}
    assert set(map(model_type, WINDOWS)) == windows - set(INSIDE_ALONE)


@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_from_before_the_edge_to_beyond_it(family: str) -> None:
    """Greedy trees in float32 whose text fills the window on the way; the cache is the one that stock leaves."""
    require(family)
    stock, found = both(tiny(family, window=WINDOW), prompt(7), TREES, **GREEDY)
    assert torch.equal(found.sequences, stock.sequences) and len(set(stock.sequences[0, -NEW:].tolist())) > 9
    for own, other in zip(found[CACHE].layers, stock[CACHE].layers, strict=True):
        if other.keys is None:  # it reads those of another layer
            continue
        assert torch.equal(own.keys, other.keys) and torch.equal(own.values, other.values)
        assert own.get_seq_length() == other.get_seq_length() and own.is_sliding == other.is_sliding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_before_at_and_beyond_the_edge(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts shorter than the window, as long, and longer, whatever is drafted."""
    require(family)
    calls = [(7, cells.GREEDY), (WINDOW, cells.SAMPLED), (30, cells.GREEDY)]
    cells.check(tiny(family, window=WINDOW, dtype=dtype), calls, monkeypatch)


@pytest.mark.parametrize("length", [WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_that_end_at_the_edge(length: int, attention: str) -> None:
    """One token before, at it, and one after."""
    stock, found = both(tiny("mistral", window=WINDOW, attention=attention), prompt(length), TREES, **GREEDY)
    assert torch.equal(found.sequences, stock.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_is_never_filled(dtype: torch.dtype) -> None:
    """The text stays shorter."""
    stock, found = both(tiny("mistral", window=256, dtype=dtype), prompt(7), TREES, **GREEDY)
    assert torch.equal(found.sequences, stock.sequences)


def test_a_prompt_that_is_read_in_pieces() -> None:
    """Pieces that end before the edge, at it and beyond it."""
    model, options = tiny("mistral", window=WINDOW), {"prefill_chunk_size": 8, "max_new_tokens": NEW, **GREEDY}
    stock = model.generate(prompt(30), **options)
    attach(model, SpecBound(model, FakeHeads("mixed", [1], stock[0].tolist(), VOCABULARY), TREES))
    assert torch.equal(model.generate(prompt(30), **options), stock)


def test_a_second_call_goes_on_with_the_cache_of_the_first() -> None:
    """Beyond the window, where the cache has dropped rows."""
    model = tiny("mistral", window=WINDOW)
    stock, found = both(model, prompt(7), TREES, **GREEDY)
    again = torch.cat([stock.sequences, prompt(3)], dim=1)
    first = model.generate(again, max_new_tokens=9, **{CACHE: stock[CACHE]}, **GREEDY)
    assert torch.equal(first, model.generate(again, max_new_tokens=9, **{CACHE: found[CACHE]}, **GREEDY))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(WINDOWS))
@pytest.mark.usefixtures("whole_probes")
def test_a_window_that_is_overlooked_shows(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the probe, which finds every bit of logits and cache in the tests above, finds others."""
    require(family)
    model = tiny(family, window=WINDOW, dtype=dtype)
    reference = Reference.near(model)
    assert reference.length > 3 * WINDOW
    whole = BlockAttention.__call__

    def overlook(self: BlockAttention, *args: Any, **kwargs: Any) -> Any:
        return whole(self, *args, **(kwargs | {"sliding_window": None}))

    monkeypatch.setattr(BlockAttention, "__call__", overlook)
    assert compare(model, reference, ExecutionPolicy.rowwise(), [2, 5]).differing > 0


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("smollm3", {"use_sliding_window": False}),
        ("qwen3", {"sliding_window": None}),
        ("qwen2", {"layer_types": ["chunked_attention"] * 4}),
    ],
)
def test_settings_that_contradict_each_other_are_refused(family: str, settings: dict[str, Any]) -> None:
    """And windows of other kinds."""
    model = tiny(family, window=WINDOW)
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModel, match=r"layer_types name windows|layers of the kinds"):
        families.check_config(model.config)

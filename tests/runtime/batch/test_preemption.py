"""Calls that are put out when KV blocks run out, and resumed: ids and streams stay those of stock."""

from typing import Any

import pytest
import torch

from runtime import SpeculationBounds
from runtime.batch import Batch, KVMemory, generated
from runtime.decoding.cache import blocks_of
from runtime.decoding.families import CACHE
from tests.helpers.families import tiny
from tests.helpers.pools.tight import (
    BLOCK,
    GREEDY,
    KEPT,
    LONGEST,
    NEW,
    SAMPLED,
    TIGHT,
    Keeping,
    held_bytes,
    run,
    small_blocks,
    stock,
    together,
)  # fmt: skip
from tests.helpers.speculation import BOUNDS, PROMPTS, adapted, alone

CHAIN = SpeculationBounds(0.2, 2, 6)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV blocks of a few tokens."""
    small_blocks(monkeypatch)


@pytest.mark.parametrize("bounds", [BOUNDS, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_are_stock_s(dtype: torch.dtype, options: dict[str, Any], bounds: SpeculationBounds) -> None:
    """Several are put out, some twice; each token is told once and counted once."""
    model, greedy, _ = stock(dtype)
    expected = greedy if options is GREEDY else alone(model, options)
    calls = together(adapted(model, expected, bounds), options)
    assert [generated(call) for call in calls] == expected
    times = [call.times_out for call in calls]
    assert times[0] == 0 and sum(map(bool, times)) > 2 and max(times) > 1
    for call in calls:
        assert call.stats is not None and call.stats.emitted == NEW and call.stats.accepted.total() > 5
        assert call.stats.parts["prompt"] > 0


@pytest.mark.parametrize(("family", "window"), [("gemma3_text", 8), ("gemma3_text", 24), ("mistral", 24)])
def test_windows(family: str, window: int) -> None:
    """That prompt or answer fill; the cache that is left is stock's, though it was put out."""
    model = tiny(family, window=window)
    expected = alone(model, GREEDY)
    caches = [model.generate(torch.tensor([prompt]), **KEPT)[CACHE] for prompt in PROMPTS]
    for options in (GREEDY, KEPT):
        calls = together(adapted(model, expected), options)
        assert [generated(call) for call in calls] == expected and any(call.times_out for call in calls)
    for call, left in zip(calls, caches, strict=True):
        for layer, other in zip(call.output[CACHE].layers, left.layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
            assert layer.get_seq_length() == other.get_seq_length()


def test_one_that_is_cancelled_while_it_is_out() -> None:
    """Ends with what it had said; the others go on, and one whose time is over waits no longer."""
    model, expected, _ = stock(torch.float32)
    memory, streamer = KVMemory(TIGHT * BLOCK), Keeping()
    with Batch(adapted(model, expected), 6, memory) as batch:
        calls = [
            batch.add(prompt, streamer=streamer if prompt is PROMPTS[2] else None, **GREEDY) for prompt in PROMPTS
        ]
        while not (calls[2].times_out and calls[2] in batch.calls):
            batch.round()
        assert calls[2].generation is not None and not held_bytes(calls[2])
        calls[2].cancelled = True
        assert calls[2] in batch.round() and calls[2] not in batch.calls
        run(batch, calls)
    cut = generated(calls[2])
    assert 0 < len(cut) < NEW and cut == expected[2][: len(cut)]
    assert streamer.said == PROMPTS[2] + cut and streamer.ended == 1
    assert [generated(call) for call in calls[:2] + calls[3:]] == expected[:2] + expected[3:]
    assert memory.used == 0


def test_a_pool_of_one_request() -> None:
    """Both end, the first one first, and nobody takes more than there is."""
    model, expected, _ = stock(torch.float32)
    made, memory = adapted(model, expected), KVMemory(LONGEST * BLOCK)
    with Batch(made, 6, memory) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in (PROMPTS[5], PROMPTS[4])]
        while not calls[0].ended:
            batch.round()
        assert not calls[1].ended
        run(batch, calls)
    assert [generated(call) for call in calls] == [expected[5], expected[4]] and memory.used == 0


def test_a_prompt_that_is_asked_again_is_dropped_first() -> None:
    """Kept prompts go before a call is put out, and one that is still kept is not read again."""
    model, expected, _ = stock(torch.float32)
    made, memory = adapted(model, expected), KVMemory((LONGEST + 1) * BLOCK)
    with Batch(made, 6, memory) as batch:
        call = batch.add(PROMPTS[5], **GREEDY)
        batch.round()
        assert memory.kept == blocks_of(len(PROMPTS[5]))
        run(batch, [call])
        assert call.times_out == 0 and memory.kept == 0
    assert generated(call) == expected[5]


def test_those_that_read_or_draft_nothing_are_put_out_too() -> None:
    """`speculate=False`, and scores, which are kept; ids are stock's."""
    model, expected, _ = stock(torch.bfloat16)
    scored = KEPT | {"output_scores": True}
    scores = model.generate(torch.tensor([PROMPTS[5]]), **scored).scores
    made, memory = adapted(model, expected), KVMemory(TIGHT * BLOCK)
    with Batch(made, 6, memory) as batch:
        calls = [batch.add(prompt, speculate=False, **GREEDY) for prompt in PROMPTS[:5]]
        calls.append(batch.add(PROMPTS[5], **scored))
        run(batch, calls)
    assert [generated(call) for call in calls] == expected
    assert sum(call.times_out for call in calls) > 2
    assert all(torch.equal(one, other) for one, other in zip(scores, calls[5].output.scores, strict=True))


def test_what_takes_all_its_blocks_at_once() -> None:
    """A call by stock's loop waits until there is room for the whole of it."""
    model, expected, _ = stock(torch.float32)
    with Batch(adapted(model, expected), 6, KVMemory(LONGEST * BLOCK)) as batch:
        assert batch.would_begin(len(PROMPTS[0]), NEW)
        calls = [batch.add(PROMPTS[0], **GREEDY), batch.add(PROMPTS[5], use_cache=False, **GREEDY)]
        batch.round()
        assert calls[1] in batch.calls and not batch.would_begin(len(PROMPTS[0]), NEW)
        run(batch, calls)
    assert generated(calls[0]) == expected[0] and len(generated(calls[1])) == NEW

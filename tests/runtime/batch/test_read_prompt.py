"""A prompt that several calls have is read once: ids, scores and cache stay stock's."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from runtime.batch import Batch, KVMemory, generated
from runtime.decoding.cache import BLOCK_TOKENS
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import tiny
from tests.helpers.speculation import BOUNDS, GREEDY, PROMPTS, SAMPLED, Told, adapted, alone, base

KEPT = {"return_dict_in_generate": True, "output_scores": True}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[DecoderLayers]:
    """Has an entry for every prompt that goes through the stock forward."""
    seen: list[DecoderLayers] = []
    watching = DecoderLayers.watching

    def told(self: DecoderLayers, *given: Any) -> Any:
        seen.append(self)
        return watching(self, *given)

    monkeypatch.setattr(DecoderLayers, "watching", told)
    return seen


def run(batch: Batch, *calls: Any) -> None:
    """Rounds until all have ended."""
    while not all(call.ended for call in calls):
        batch.round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_of_a_prompt_read_it_once(dtype: torch.dtype, read: list[DecoderLayers]) -> None:
    """Each samples under its own seed; also one that comes when the others are far on, or have ended."""
    model = base(dtype)
    prompts = [PROMPTS[3]] * 4
    expected = alone(model, SAMPLED, prompts)
    assert len({tuple(ids) for ids in expected}) > 1
    made = adapted(model, alone(model, GREEDY))
    read.clear()
    with Batch(made, 3) as batch:
        calls = [batch.add(prompt, seed=seed, **SAMPLED) for seed, prompt in enumerate(prompts[:2])]
        batch.round()
        batch.round()
        calls.append(batch.add(prompts[2], seed=2, **SAMPLED))
        run(batch, *calls)
        calls.append(batch.add(prompts[3], seed=3, **SAMPLED))
        run(batch, *calls)
    assert [generated(call) for call in calls] == expected
    assert len(read) == 1
    assert [call.stats.reused for call in calls if call.stats is not None] == [0] + [len(PROMPTS[3])] * 3


@pytest.mark.parametrize("window", [None, 8])
def test_scores_and_cache_are_stock_s(window: int | None, read: list[DecoderLayers]) -> None:
    """Of the first, and of those that did not read; also where layers have windows shorter than the prompt."""
    model = tiny("mistral", window=window)
    prompt = PROMPTS[5]
    stock = model.generate(torch.tensor([prompt]), **GREEDY, **KEPT)
    whole = stock.sequences[0].tolist()
    attach(model, SpecBound(model, Told([whole]), BOUNDS))
    model.specbound.prepare(model)
    read.clear()
    with Batch(model, 2) as batch:
        calls = [batch.add(prompt, **GREEDY, **KEPT) for _ in range(3)]
        run(batch, *calls)
    assert len(read) == 1
    for call in calls:
        assert call.output.sequences[0].tolist() == whole
        pairs = zip(stock.scores, call.output.scores, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        for layer, other in zip(stock[CACHE].layers, call.output[CACHE].layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
            assert layer.get_seq_length() == other.get_seq_length()


def test_what_differs_is_read_again(read: list[DecoderLayers]) -> None:
    """Another prompt; one behind a cache of the user's; positions of the user's; other weights; no room to keep it."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
    made, memory = adapted(model, expected), KVMemory(10_000)
    ids = torch.tensor([PROMPTS[0]])
    before = made.generate(ids[:, :4], max_new_tokens=1, **{CACHE: DynamicCache(config=made.config)},
                           return_dict_in_generate=True, do_sample=False)[CACHE]  # fmt: skip
    read.clear()
    with Batch(made, 1, memory) as batch:
        calls = [batch.add(PROMPTS[0], **GREEDY), batch.add(PROMPTS[1], **GREEDY)]
        calls.append(batch.add(PROMPTS[0], **{CACHE: before}, **GREEDY))
        calls.append(batch.add(PROMPTS[0], position_ids=torch.arange(5, 5 + len(PROMPTS[0]))[None], **GREEDY))
        run(batch, *calls)
    assert len(read) == 4
    assert [generated(call) for call in calls[:2]] == expected[:2]
    with torch.no_grad():
        made.lm_head.weight.neg_()
        model.lm_head.weight.neg_()
    for kept in (memory, KVMemory(BLOCK_TOKENS)):
        with Batch(made, 1, kept) as batch:
            call = batch.add(PROMPTS[0], **GREEDY)
            run(batch, call)
        assert generated(call) == alone(model, GREEDY, PROMPTS[:1])[0] != expected[0]
    assert kept.kept == 0
    for one in (made, model):
        one.lm_head.weight.data.neg_()  # neither its place nor its version tells
    with Batch(made, 1, memory) as batch:
        call = batch.add(PROMPTS[0], **GREEDY)
        run(batch, call)
    assert generated(call) == alone(model, GREEDY, PROMPTS[:1])[0] == expected[0]


def test_a_prompt_of_another_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what was kept of whichever prompt."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
    monkeypatch.setattr(KVMemory, "find", lambda self, key: next((kept for _, kept in self._prompts.values()), None))
    with Batch(adapted(model, expected), 2) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS[:2]]
        run(batch, *calls)
    assert generated(calls[0]) == expected[0] and generated(calls[1]) != expected[1]

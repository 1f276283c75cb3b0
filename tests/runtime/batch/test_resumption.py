"""What a resumed call has: the keys and values that it had, bit for bit; and what must show where it has not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from runtime import SpeculationBounds
from runtime.batch import Batch, KVMemory, generated
from runtime.batch.generation import Generation
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.drafting.temperature import TemperatureSchedule
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import NATIVE_SHAPE
from tests.helpers.pools.tight import (
    BLOCK,
    GREEDY,
    TIGHT,
    held_bytes,
    small_blocks,
    stock,
    together,
)  # fmt: skip
from tests.helpers.speculation import BOUNDS, PROMPTS, Told, adapted, alone, base


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """KV blocks of a few tokens."""
    small_blocks(monkeypatch)


def differing(dtype: torch.dtype) -> tuple[int, int]:
    """Rows of keys and values after resumptions, and how many differ in a bit from those that stock leaves."""
    model, expected, caches = stock(dtype)
    rows, wrong = 0, 0
    with Batch(adapted(model, expected), len(PROMPTS), KVMemory(TIGHT * BLOCK)) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS]
        while not all(call.ended for call in calls):
            batch.round()
            for call, left in zip(calls, caches, strict=True):
                if not (call.times_out and call.generation is not None and call in batch.running):
                    continue
                own = call.generation.cache
                for index, layer in enumerate(left.layers if own.get_seq_length() else ()):
                    for mine, other in zip(own.rows(index, 0), (layer.keys, layer.values), strict=True):
                        length = min(mine.shape[2], other.shape[2])
                        same = (mine[0, :, :length] == other[0, :, :length]).all(-1).all(0)
                        rows, wrong = rows + length, wrong + int((~same).sum())
    return rows, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_have_the_bits_that_they_had(dtype: torch.dtype) -> None:
    """Of stock's own decoding, which nobody put out."""
    rows, wrong = differing(dtype)
    assert rows > 1000 and wrong == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_read_as_a_prompt_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what was emitted, read with the prompt as one."""
    model, _, _ = stock(dtype)
    catch_up = Generation.catch_up

    def as_prompt(self: Generation, tokens: int | None = None) -> int:
        count = catch_up(self, tokens)
        text = self.emitter.input_ids[:, : self.cache.get_seq_length()]
        for index, layer in enumerate(model(text)[CACHE].layers):
            for own, other in zip(self.cache.rows(index, 0), (layer.keys, layer.values), strict=True):
                own.copy_(other)
        return count

    monkeypatch.setattr(Generation, "catch_up", as_prompt)
    assert differing(dtype)[1] > 0


@pytest.mark.parametrize("way", ["another token", "one dropped"])
def test_what_is_resumed_otherwise_shows(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: ids are other ones where a token's keys are another's, or each lies a place too early."""
    model, expected, _ = stock(torch.float32)
    read = DecodeState.read

    def spoilt(self: DecodeState, token_ids: Sequence[int]) -> None:
        first, *others = token_ids
        read(self, [(first + 1) % 90, *others] if way == "another token" else [*others, first])

    monkeypatch.setattr(DecodeState, "read", spoilt)
    with pytest.raises((AssertionError, RuntimeError, StopIteration)):
        assert [generated(call) for call in together(adapted(model, expected), GREEDY)] == expected


@pytest.mark.parametrize("place", ["rows", "prompt"])
def test_an_error_on_the_way_back_is_the_call_s_own(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Ctrl-C while calls are out leaves nothing taken."""
    model, expected, _ = stock(torch.float32)

    def fails(*_: Any) -> None:
        raise error

    for error in (RuntimeError("mine"), KeyboardInterrupt()):
        memory = KVMemory(TIGHT * BLOCK)
        with monkeypatch.context() as patch:
            try:
                with Batch(adapted(model, expected), 6, memory) as batch:
                    calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS]
                    while not any(call.times_out for call in calls):
                        batch.round()
                    if place == "rows":
                        patch.setattr(DecodeState, "read", fails)
                    else:
                        patch.setattr(Generation, "resume", fails)
                    while not all(call.ended for call in calls):
                        batch.round()
                failed = [call for call in calls if call.error is not None]
                assert failed and all(call.error is error and call.times_out for call in failed)
                assert all(generated(call) == expected[calls.index(call)] for call in calls if call not in failed)
            except KeyboardInterrupt:
                assert isinstance(error, KeyboardInterrupt)
        assert memory.used == 0 and not any(map(held_bytes, calls))


def test_heads_that_attend_draft_as_if_nothing_had_been() -> None:
    """They read the text again, its base's states too: as many drafts, as many accepted."""
    expected = stock(torch.bfloat16)[1]
    torch.manual_seed(1)
    sizes = {"hidden_size": NATIVE_SHAPE["hidden_size"], "draft_vocab_size": 96, "rank": 32}
    exits = ExitHeads("attention", [1, 2], **sizes)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exits.to(torch.bfloat16).requires_grad_(False).eval()
    counts, made = [], base(torch.bfloat16)
    heads = DraftHeads.of(exits, DecoderLayers(made), torch.arange(96))
    drafter = HeadDrafter(heads, TemperatureSchedule.none([1, 2]))
    attach(made, SpecBound(made, drafter, SpeculationBounds(0.0, 2, 6, max_branches=2, max_depth=3)))
    for blocks in (TIGHT, 10 * TIGHT):
        calls = together(made, GREEDY, blocks)
        assert [generated(call) for call in calls] == expected
        assert any(call.times_out for call in calls) == (blocks == TIGHT)
        counts.append([(call.stats.drafted, call.stats.accepted) for call in calls if call.stats is not None])
    assert counts[0] == counts[1]


def test_one_that_is_put_out_while_its_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is said yet; it is read anew."""
    monkeypatch.setattr("runtime.batch.calls.AT_ONCE", 33)
    model = base(torch.bfloat16)
    options: list[dict[str, Any]] = [GREEDY, GREEDY | {"max_new_tokens": 16}]
    prompts = [PROMPTS[0], [6, *[*range(80, 16, -1)] * 4, 7, 8, 9]]
    expected = [alone(model, each, [prompt])[0] for prompt, each in zip(prompts, options, strict=True)]
    attach(model, SpecBound(model, Told([[*one, *two] for one, two in zip(prompts, expected, strict=True)]), BOUNDS))
    model.specbound.prepare(model)
    layers = model.specbound.prepared.prompts
    if layers is None or not layers.in_parts(len(prompts[1])):
        pytest.skip("prompts are read whole here")
    reading, memory = False, KVMemory(73 * BLOCK)
    with Batch(model, 2, memory) as batch:
        calls = [batch.add(prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
        while not all(call.ended for call in calls):
            before = calls[1].times_out
            batch.round()
            reading = reading or (calls[1].times_out > before and calls[1].generation is None)
    assert reading and [generated(call) for call in calls] == expected and memory.used == 0

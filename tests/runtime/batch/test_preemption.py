"""Calls that are put out when KV blocks run out, and resumed: ids, streams, keys and values stay those of stock."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import SpeculationBounds
from runtime.batch import Batch, Call, KVMemory, generated
from runtime.batch.generation import Generation
from runtime.batch.memory import bytes_per_token
from runtime.decoding.cache import blocks_of
from runtime.decoding.families import CACHE
from runtime.decoding.state import DecodeState
from runtime.drafting import policy
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import tiny
from tests.helpers.speculation import BOUNDS, PROMPTS, Told, adapted, alone, base, held_bytes, small_blocks

BLOCK, NEW = 8, 40
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": NEW}
CHAIN = SpeculationBounds(0.2, 2, 6)
LONGEST = -(-(max(map(len, PROMPTS)) + NEW + BOUNDS.max_draft_tokens + 1) // BLOCK)
TIGHT = 14  # blocks: half of the calls begin, and hardly two of them end beside one another


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks; all requests draft, however many there are."""
    small_blocks(monkeypatch, BLOCK)
    monkeypatch.setattr(policy, "MAX_ROWS", 64)


class Keeping:
    """What a call says, token by token."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        """The prompt, then each token."""
        self.said += value.flatten().tolist()

    def end(self) -> None:
        """Once."""
        self.ended += 1


def run(batch: Batch, calls: list[Call]) -> None:
    """Rounds until all have ended; none holds more than it has taken, and the oldest always goes on."""
    memory, each = batch.memory, bytes_per_token(batch.model) * BLOCK
    while not all(call.ended for call in calls):
        oldest = batch.running[:1]
        batch.round()
        assert all(call.ended or call is batch.running[0] for call in oldest)
        assert all(held_bytes(call) <= call.blocks * each for call in calls)
        assert not any(held_bytes(call) for call in batch.calls)
        assert memory.used == sum(call.blocks for call in calls) and memory.used + memory.kept <= memory.blocks
        waiting = [calls.index(call) for call in (*batch.running, *batch.calls)]
        assert waiting == sorted(waiting)  # nobody overtakes


def together(model: Any, options: dict[str, Any], blocks: int = TIGHT) -> list[Call]:
    """All prompts in one batch, in a pool of so many blocks."""
    memory, streamers = KVMemory(blocks * BLOCK), [Keeping() for _ in PROMPTS]
    with Batch(model, len(PROMPTS), memory) as batch:
        calls = [
            batch.add(prompt, seed=seed, streamer=streamers[seed], **options) for seed, prompt in enumerate(PROMPTS)
        ]
        run(batch, calls)
    assert memory.used == 0
    for prompt, call, streamer in zip(PROMPTS, calls, streamers, strict=True):
        assert streamer.said == prompt + generated(call) and streamer.ended == 1
    return calls


@pytest.mark.parametrize("bounds", [BOUNDS, CHAIN], ids=["tree", "chain"])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_are_stock_s(dtype: torch.dtype, options: dict[str, Any], bounds: SpeculationBounds) -> None:
    """Several are put out, some twice; each token is told once and counted once."""
    model = base(dtype)
    expected = alone(model, options)
    calls = together(adapted(model, expected, bounds), options)
    assert [generated(call) for call in calls] == expected
    times = [call.times_out for call in calls]
    assert times[0] == 0 and sum(map(bool, times)) > 2 and max(times) > 1
    for call in calls:
        assert call.stats is not None and call.stats.emitted == NEW and call.stats.accepted.total() > 5
        assert call.stats.parts["prompt"] > 0


@pytest.mark.parametrize("window", [8, 24])
@pytest.mark.parametrize("family", ["gemma3_text", "mistral"])
def test_windows(family: str, window: int) -> None:
    """That prompt or answer fill; the cache that is left is stock's, though it was put out."""
    model = tiny(family, window=window)
    expected = alone(model, GREEDY)
    kept = GREEDY | {"return_dict_in_generate": True}
    stock = [model.generate(torch.tensor([prompt]), **kept) for prompt in PROMPTS]
    for options in (GREEDY, kept):
        calls = together(adapted(model, expected), options)
        assert [generated(call) for call in calls] == expected and any(call.times_out for call in calls)
    for call, one in zip(calls, stock, strict=True):
        for layer, other in zip(call.output[CACHE].layers, one[CACHE].layers, strict=True):
            assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
            assert layer.get_seq_length() == other.get_seq_length()


def differing(model: Any, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of keys and values after resumptions, and how many differ in a bit from those that stock leaves."""
    expected = alone(model, GREEDY)
    kept = GREEDY | {"return_dict_in_generate": True}
    caches = [model.generate(torch.tensor([prompt]), **kept)[CACHE] for prompt in PROMPTS]
    made, memory, rows, wrong = adapted(model, expected), KVMemory(TIGHT * BLOCK), 0, 0
    with Batch(made, len(PROMPTS), memory) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS]
        while not all(call.ended for call in calls):
            batch.round()
            for call, stock in zip(calls, caches, strict=True):
                if not (call.times_out and call.generation is not None and call in batch.running):
                    continue
                cache = call.generation.cache
                for index, layer in enumerate(stock.layers if cache.get_seq_length() else ()):
                    for own, other in zip(cache.rows(index, 0), (layer.keys, layer.values), strict=True):
                        length = min(own.shape[2], other.shape[2])
                        same = (own[0, :, :length] == other[0, :, :length]).all(-1).all(0)
                        rows, wrong = rows + length, wrong + int((~same).sum())
    return rows, wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_and_values_have_the_bits_that_they_had(dtype: torch.dtype) -> None:
    """Of stock's own decoding, which nobody put out."""
    rows, wrong = differing(base(dtype), dtype)
    assert rows > 1000 and wrong == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["as a prompt", "another token", "one left out"])
def test_what_is_resumed_otherwise_shows(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: emitted tokens read as a part of the prompt; another token's keys; one token dropped."""
    model, read = base(dtype), DecodeState.read

    def spoilt(self: DecodeState, token_ids: Any) -> None:
        tokens = list(token_ids)
        if way == "one left out":
            read(self, [*tokens[1:], tokens[-1]] if len(tokens) > 1 else tokens)
        elif way == "another token":
            read(self, [(tokens[0] + 1) % 90, *tokens[1:]])
        else:
            read(self, tokens)
            text = torch.tensor([[*prompt_of(self), *tokens]])
            for index, layer in enumerate(model(text)[CACHE].layers):
                start = self.length - len(tokens)
                for own, other in zip(self.cache.rows(index, start), (layer.keys, layer.values), strict=True):
                    own.copy_(other[:, :, -len(tokens) :])

    def prompt_of(state: DecodeState) -> list[int]:
        call = next(prompt for prompt in PROMPTS if prompt[0] == texts[id(state)][0])
        return texts[id(state)][: len(call) + state.length - len(call)]

    texts: dict[int, list[int]] = {}
    catch_up = Generation.catch_up

    def noted(self: Generation, tokens: int | None = None) -> int:
        texts[id(self.request.state)] = self.emitter.input_ids[0].tolist()
        return catch_up(self, tokens)

    monkeypatch.setattr(Generation, "catch_up", noted)
    monkeypatch.setattr(DecodeState, "read", spoilt)
    with pytest.raises((AssertionError, RuntimeError, StopIteration)):
        assert differing(model, dtype)[1] == 0


def test_one_that_is_cancelled_while_it_is_out() -> None:
    """Ends with what it had said; the others go on, and one whose time is over waits no longer."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
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


@pytest.mark.parametrize("place", ["rows", "prompt"])
def test_an_error_on_the_way_back_is_the_call_s_own(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And Ctrl-C while calls are out leaves nothing taken."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)

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


def test_a_pool_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both end, the first one first, and nobody takes more than there is."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
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
    model = base(torch.float32)
    expected = alone(model, GREEDY)
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
    model = base(torch.bfloat16)
    expected = alone(model, GREEDY)
    stock = model.generate(torch.tensor([PROMPTS[5]]), **GREEDY, return_dict_in_generate=True, output_scores=True)
    made, memory = adapted(model, expected), KVMemory(TIGHT * BLOCK)
    with Batch(made, 6, memory) as batch:
        calls = [batch.add(prompt, speculate=False, **GREEDY) for prompt in PROMPTS[:5]]
        calls.append(batch.add(PROMPTS[5], return_dict_in_generate=True, output_scores=True, **GREEDY))
        run(batch, calls)
    assert [generated(call) for call in calls] == expected
    assert sum(call.times_out for call in calls) > 2
    assert all(torch.equal(one, other) for one, other in zip(stock.scores, calls[5].output.scores, strict=True))


def test_what_takes_all_its_blocks_at_once() -> None:
    """A call by stock's loop waits until there is room for the whole of it."""
    model = base(torch.float32)
    attach(model, SpecBound(model, Told([]), BOUNDS))
    memory = KVMemory(LONGEST * BLOCK)
    with Batch(model, 6, memory) as batch:
        assert batch.would_begin(len(PROMPTS[0]), NEW)
        calls = [batch.add(PROMPTS[0], **GREEDY), batch.add(PROMPTS[5], use_cache=False, **GREEDY)]
        batch.round()
        assert calls[1] in batch.calls and not batch.would_begin(len(PROMPTS[0]), NEW)
        run(batch, calls)
    with model.specbound.disabled():
        assert [generated(call) for call in calls] == alone(model, GREEDY, [PROMPTS[0], PROMPTS[5]])

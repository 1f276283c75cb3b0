"""Calls in a pool too small for all of them, and what stock makes of each."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.batch import Batch, Call, KVMemory, generated
from runtime.batch.memory import bytes_per_token
from runtime.decoding.families import CACHE
from runtime.drafting import policy
from tests.helpers.speculation import BOUNDS, PROMPTS, alone, base

BLOCK, NEW = 4, 60
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20, "max_new_tokens": NEW}
LONGEST = -(-(max(map(len, PROMPTS)) + NEW + BOUNDS.max_draft_tokens + 1) // BLOCK)
TIGHT = 32  # blocks: half of the calls begin, and hardly two of them end beside one another
KEPT = GREEDY | {"return_dict_in_generate": True}


def small_blocks(monkeypatch: pytest.MonkeyPatch, tokens: int = BLOCK) -> None:
    """KV blocks of so few tokens that short texts take several; all requests draft, however many there are."""
    for module in ("decoding.cache", "batch.generation", "batch.memory"):
        monkeypatch.setattr(f"runtime.{module}.BLOCK_TOKENS", tokens)
    monkeypatch.setattr(policy, "MAX_ROWS", 64)


def held_bytes(call: Call) -> int:
    """Of the buffers of keys and values that a call has."""
    if call.generation is None:
        return 0
    cache = call.generation.cache
    return sum(buffer.nbytes for buffer in (*cache._keys, *cache._values) if buffer is not None)


@cache
def stock(dtype: torch.dtype) -> tuple[Any, list[list[int]], list[Any]]:
    """A model, what it answers to the prompts, and the keys and values that it leaves."""
    model = base(dtype)
    caches = [model.generate(torch.tensor([prompt]), **KEPT)[CACHE] for prompt in PROMPTS]
    return model, alone(model, GREEDY), caches


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

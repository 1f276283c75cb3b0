"""KV blocks of one pool: what a token takes, who waits for blocks, who never gets any, and that all come back."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from runtime.batch import Batch, KVMemory, generated
from runtime.batch.memory import MAX_PROMPTS, TooLong, bytes_per_token
from runtime.decoding.cache import BLOCK_TOKENS, KVCache, blocks_of, grown
from runtime.decoding.families import CACHE
from runtime.errors import ConfigError
from tests.helpers.families import tiny
from tests.helpers.speculation import BOUNDS, GREEDY, PROMPTS, adapted, alone, base

BESIDE = BOUNDS.max_draft_tokens + 1
LONGEST = max(map(len, PROMPTS)) + 24 + BESIDE


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "qwen3", "phi3"])
def test_a_token_takes_what_its_keys_and_values_do(family: str) -> None:
    """As transformers' own cache holds them; bytes are as many tokens as fit."""
    model = tiny(family)
    cache = model(torch.arange(2, 12)[None])[CACHE]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert bytes_per_token(model) * 10 == held
    memory = KVMemory.of(model, 25 * held)
    assert (memory.blocks, memory.tokens) == (250 // BLOCK_TOKENS, 250 - 250 % BLOCK_TOKENS)
    assert KVMemory.of(model).tokens > 10_000
    with pytest.raises(ConfigError, match=f"{held} bytes for keys and values: a block of 64 tokens"):
        KVMemory.of(model, held)


def test_buffers_grow_by_whole_blocks() -> None:
    """By one, or by an eighth of many, and never beyond the longest that the text may be."""
    assert [grown(held, held + 1, 1000) for held in (1, 7, 16, 80)] == [2, 8, 18, 90]
    assert grown(16, 17, 17) == 17 and grown(3, 9, 20) == 9 and grown(3, 9, 4) == 9
    model = base(torch.float32)
    longer = GREEDY | {"max_new_tokens": 200}
    expected, sizes = alone(model, longer), set[int]()
    with Batch(adapted(model, expected), 1) as batch:
        call = batch.add(PROMPTS[0], **longer)
        while not call.ended:
            batch.round()
            if call.generation is not None:
                sizes |= {keys.shape[2] for keys in call.generation.cache._keys if keys is not None}
    assert generated(call) == expected[0]
    assert sorted(sizes) == [BLOCK_TOKENS * blocks for blocks in (2, 3, 4)]
    assert blocks_of(len(PROMPTS[0]) + 200 + BESIDE) == 4


def test_what_never_has_room_is_refused_by_name() -> None:
    """When it is added; the others are not touched."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
    memory = KVMemory(LONGEST + BLOCK_TOKENS)
    room = memory.tokens
    with Batch(adapted(model, expected), 6, memory) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS[:2]]
        size = len(PROMPTS[0]) + room + BESIDE
        with pytest.raises(TooLong, match=rf"of {size} tokens: keys and values have room for {room}; ask for fewer"):
            batch.add(PROMPTS[0], **(GREEDY | {"max_new_tokens": room}))
        while not all(call.ended for call in calls):
            batch.round()
    assert [generated(call) for call in calls] == expected[:2]


class Failing(StoppingCriteria):
    """Raises at the fifth new token."""

    def __init__(self, length: int, error: BaseException) -> None:
        self.length, self.error = length, error

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        """Raise, or go on."""
        if input_ids.shape[1] > self.length + 5:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_all_of_it_comes_back(error: BaseException) -> None:
    """Of calls that fail, that are cancelled while they run or wait, or that Ctrl-C ends."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
    memory = KVMemory(3 * BLOCK_TOKENS)
    try:
        with Batch(adapted(model, expected), 6, memory) as batch:
            criteria = StoppingCriteriaList([Failing(len(PROMPTS[0]), error)])
            calls = [batch.add(PROMPTS[0], stopping_criteria=criteria, **GREEDY)]
            calls += [batch.add(prompt, **GREEDY) for prompt in PROMPTS[1:]]
            batch.round()
            for call in (calls[1], calls[5]):
                call.cancelled = True
            while not all(call.ended for call in calls):
                batch.round()
            assert calls[0].error is error and generated(calls[2]) == expected[2]
    except KeyboardInterrupt:
        assert isinstance(error, KeyboardInterrupt)
    assert memory.used == 0


def test_how_many_run_where_nobody_says() -> None:
    """As many of a usual length, or of the context, as have room half-way; more where they share each product."""

    def usual(tokens: int, *, native: bool, context: int = 8192) -> int:
        model = Mock()
        model.config.get_text_config.return_value.max_position_embeddings = context
        model.specbound.certificate.policy.native = native
        return KVMemory(tokens).usual_requests(model)

    assert [usual(tokens, native=True) for tokens in (100, 5 * 1024, 10**6)] == [1, 5, 16]
    assert [usual(tokens, native=False) for tokens in (100, 5 * 1024, 10**6)] == [1, 5, 8]
    assert usual(1024, native=True, context=250) == 4


def test_prompts_are_kept_in_what_is_left() -> None:
    """Least recently asked for first out; requests come first; a few at most."""
    memory = KVMemory(10 * BLOCK_TOKENS + 5)
    for name in "abc":
        assert memory.keep(name, 3 * BLOCK_TOKENS, name.upper())
    assert memory.find("a") == "A" and memory.kept == 9 and memory.used == 0 and memory.blocks == 10
    assert memory.keep("d", 2 * BLOCK_TOKENS + 1, "D")
    assert memory.find("b") is None and memory.find("c") == "C"
    assert memory.take(5) and memory.kept == 3 and memory.find("c") == "C"
    assert not memory.keep("e", 6 * BLOCK_TOKENS, "E")
    assert memory.find("e") is None and memory.usage == 0.5
    assert memory.take(5) and memory.kept == 0 and not memory.take(1)
    memory.give_back(10)
    memory = KVMemory((MAX_PROMPTS + 3) * BLOCK_TOKENS)
    for number in range(MAX_PROMPTS + 3):
        memory.keep(number, 1, number)
    assert memory.kept == MAX_PROMPTS and memory.find(2) is None and memory.find(3) == 3


def test_a_buffer_that_grew_in_inference_mode_can_be_written_outside() -> None:
    """Layers run in it, and accepted drafts are moved up behind the settled ones after it."""
    cache, rows = KVCache(1, 1), torch.arange(2.0 * BLOCK_TOKENS).reshape(1, 1, -1, 1)
    with torch.inference_mode():
        cache.update(rows[:, :, :BLOCK_TOKENS], rows[:, :, :BLOCK_TOKENS], 0)
        cache.update(rows[:, :, BLOCK_TOKENS:], rows[:, :, BLOCK_TOKENS:], 0)
    cache.keep(BLOCK_TOKENS, [2, 5])
    keys, values = cache.rows(0, BLOCK_TOKENS)
    assert keys.flatten().tolist() == values.flatten().tolist() == [BLOCK_TOKENS + 2, BLOCK_TOKENS + 5]

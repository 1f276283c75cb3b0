"""Options of `generate` x {plain, SpecBound}: same ids, same scores, same streamer calls, same exceptions.

What ends a text and what turns ids into text stand in test_conformance_stops.py and test_conformance_text.py.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer

from runtime import SpeculationBounds, detach
from runtime.decoding.families import CACHE
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.speculation import NEW_TOKENS, PROMPT, both, with_speculation


class Nudge(LogitsProcessor):
    """A user's processor that depends on the text's length and last token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Raise the score of one id."""
        scores = scores.clone()
        scores[:, (input_ids.shape[1] * 7 + int(input_ids[0, -1])) % scores.shape[1]] += 4.0
        return scores


class Odd(LogitsProcessor):
    """A user's processor whose scores are of another kind: the largest several times, no numbers, another dtype."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.change = change

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Whatever the change makes of them."""
        return self.change(scores)


class Recorder(BaseStreamer):
    """Writes down every call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        """Tokens, with their shape."""
        self.calls.append((tuple(value.shape), value.flatten().tolist()))

    def end(self) -> None:
        """The end."""
        self.calls.append("end")


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.3},
    "hot": {"do_sample": True, "temperature": 2.5},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p": {"do_sample": True, "top_p": 0.7},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[4], [9, 10]]},
    "suppress_tokens": {"suppress_tokens": list(range(40, 90))},
    "sequence_bias": {"sequence_bias": [[[3], 6.0]]},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda batch, ids: [int(ids[-1] + step) % 128 for step in (3, 5, 11)]
    },
    "logits_processor": {"logits_processor": LogitsProcessorList([Nudge()])},
    "processor_and_sample": {"do_sample": True, "logits_processor": LogitsProcessorList([Nudge()]), "top_k": 9},
    "ties": {"logits_processor": LogitsProcessorList([Odd(lambda scores: scores.div(4).round())])},
    "one_score": {"logits_processor": LogitsProcessorList([Odd(torch.zeros_like)])},
    "nan": {"logits_processor": LogitsProcessorList([Odd(lambda scores: scores.where(scores < 1.0, torch.nan))])},
    "bfloat16_scores": {"logits_processor": LogitsProcessorList([Odd(lambda scores: scores.bfloat16())])},
    "float64_scores": {"logits_processor": LogitsProcessorList([Odd(lambda scores: scores.double())])},
    "renormalize": {"do_sample": True, "renormalize_logits": True, "top_k": 20},
    "exponential_decay": {"eos_token_id": 7, "exponential_decay_length_penalty": (3, 1.4)},
    "forced_eos": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "min_new_tokens": {"min_new_tokens": 10, "eos_token_id": list(range(0, 128, 3))},
    "max_length": {"max_length": 19, "max_new_tokens": None},
    "one_token": {"max_new_tokens": 1},
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=9, do_sample=True, top_k=7, pad_token_id=0)
    },
    "no_cache_of_its_own": {"use_cache": False},
    "attention_mask": {"attention_mask": torch.ones_like(PROMPT)},
    "holes": {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])},
    "beams": {"num_beams": 3},
    "beam_sample": {"num_beams": 2, "do_sample": True},
    "returned_twice": {"num_return_sequences": 2, "do_sample": True},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
    "early_exit": {"assistant_early_exit": 3},
    "chunked_prefill": {"prefill_chunk_size": 3},
    "static_cache": {"cache_implementation": "static"},
    "position_ids": {"position_ids": torch.arange(4, 11)[None]},
}
SPECULATIVE = set(CASES) - {
    "no_cache_of_its_own", "holes", "beams", "beam_sample", "returned_twice", "prompt_lookup", "early_exit",
    "static_cache", "one_token",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # transformers' own remarks on odd settings, in both ways
@pytest.mark.parametrize("name", sorted(CASES))
def test_same_ids_scores_and_stream(model: Any, name: str) -> None:
    """Ids, scores, logits and the calls of the streamer are stock's; drafts were accepted where it speculates."""
    streams: list[Recorder] = []

    def options() -> dict[str, Any]:
        """Those of the case, with a new streamer."""
        chosen = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False} | CASES[name]
        chosen |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        if "beam" not in name and name != "returned_twice":
            streams.append(Recorder())
            chosen["streamer"] = streams[-1]
        return {key: value for key, value in chosen.items() if value is not None}

    torch.manual_seed(11)
    stock = model.generate(**options())
    found, specbound = with_speculation(model, stock.sequences[0].tolist(), lambda: model.generate(**options()))
    assert torch.equal(found.sequences, stock.sequences)
    for part in ("scores", "logits"):
        pairs = zip(getattr(found, part) or (), getattr(stock, part) or (), strict=True)
        assert all(torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0)) for mine, theirs in pairs)
    if streams:
        assert streams[1].calls == streams[0].calls
    assert type(found) is type(stock)
    assert (specbound.stats.accepted.total() > 0) == (name in SPECULATIVE)


@pytest.mark.parametrize("options", [{"temperature": -1.0, "do_sample": True}, {"max_new_tokens": 0}, {"nonsense": 3}])
def test_same_exceptions(model: Any, plain: list[int], options: dict[str, Any]) -> None:
    """What stock refuses is refused in the same words."""
    with pytest.raises(Exception) as stock:
        model.generate(PROMPT, **options)
    with pytest.raises(type(stock.value)) as found:
        with_speculation(model, plain, lambda: model.generate(PROMPT, **options))
    assert str(found.value) == str(stock.value)


def test_inputs_embeds(model: Any) -> None:
    """A prompt given as embeddings."""
    embeds = model.get_input_embeddings()(PROMPT)
    stock, found, specbound = both(model, inputs_embeds=embeds, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(found, stock)
    assert specbound.stats.emitted == NEW_TOKENS


def test_prefix_cache(model: Any, plain: list[int]) -> None:
    """A cache of an earlier part of the prompt; it is left as stock leaves it."""
    caches = []
    for _ in range(2):
        cache = DynamicCache()
        with torch.no_grad():
            model(PROMPT[:, :4], use_cache=True, **{CACHE: cache})
        caches.append(cache)
    options = {"inputs": PROMPT, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    stock = model.generate(**options, **{CACHE: caches[0]})
    truth = stock[0].tolist()
    found, specbound = with_speculation(model, truth, lambda: model.generate(**options, **{CACHE: caches[1]}))
    assert torch.equal(found, stock)
    assert specbound.stats.accepted.total() > 0
    for mine, theirs in zip(caches[1].layers, caches[0].layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)


def test_left_padded_batch_is_plain_and_equal(model: Any) -> None:
    """Rows of a batch equal stock's rows for the same batch."""
    batch = torch.cat([PROMPT, torch.tensor([[0, 0, 9, 8, 7, 6, 5]])])
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    stock, found, _ = both(model, inputs=batch, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, stock)


PLAIN = {
    "no_cache_of_its_own": "does not use the default dynamic cache",
    "holes": "its attention mask has holes",
    "beams": "it asks for beam search",
    "returned_twice": "it decodes several sequences at once",
    "prompt_lookup": "it asks for assisted decoding",
    "early_exit": "it asks for assisted decoding",
    "static_cache": "does not use the default dynamic cache",
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_what_speculation_cannot_honour_is_plain_with_one_warning(
    model: Any, plain: list[int], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is asked for; its ids are stock's."""
    options = {"inputs": PROMPT, "max_new_tokens": 6, "do_sample": False} | CASES[name]

    def twice() -> Any:
        """The second of two calls."""
        model.generate(**options)
        torch.manual_seed(11)
        return model.generate(**options)

    torch.manual_seed(11)
    stock = model.generate(**options)
    found, specbound = with_speculation(model, plain, twice)
    assert torch.equal(found, stock)
    assert specbound.stats.emitted == 0
    said = [record.message for record in caplog.records if record.message.startswith("SpecBound")]
    assert len(said) == 1 and PLAIN[name] in said[0]


def test_negative_control_batched_blocks_differ(make_model: Callable[..., Any]) -> None:
    """The suite can fail: in bfloat16 the same drafts give other ids where blocks are not exact, and only there."""
    differing = {"bitwise": 0, "batched": 0}
    for seed in (0, 2, 4):
        if differing["batched"]:
            break
        model = make_model(seed).bfloat16()
        options = {"inputs": PROMPT, "max_new_tokens": 300, "do_sample": False}
        stock = model.generate(**options)
        for exactness in differing:
            heads = FakeHeads("mixed", [2, 4], stock[0].tolist(), vocabulary=128)
            attach(model, SpecBound(model, heads, SpeculationBounds(0.2, 4, 4), exactness=exactness))
            differing[exactness] += int((model.generate(**options) != stock).sum())
            detach(model)
    assert differing["bitwise"] == 0
    assert differing["batched"] > 0

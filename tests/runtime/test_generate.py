"""Equality with stock `generate`: the oracle is the same model without SpecBound, run in the test, ids compared."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, PreTrainedModel

import runtime.decoding.rounds
from runtime import SpeculationBounds, UnsupportedModel, detach
from runtime.decoding.accept import Accepted
from runtime.decoding.cache import KVCache
from runtime.decoding.drafter import head_context
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.decoding.state import DecodeState
from runtime.drafting.heads import MAX_AGE
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.families import FAMILIES, LAYERS, SHAPE, VOCABULARY, prompt, tiny

KINDS, WIDTHS = ["random", "right", "wrong", "constant", "mixed"], [1, 2, 4, 8, 16]
EXITS = (1, 2, LAYERS - 1)
LONG = 36  # more than two of the longest drafts


def run(
    model: PreTrainedModel, heads: FakeHeads, bounds: SpeculationBounds, *, seed: int = 0, **options: Any
) -> tuple[torch.Tensor, SpecBound]:
    """Generate with speculation; what came out and what was attached."""
    attach(model, SpecBound(model, heads, bounds))
    try:
        torch.manual_seed(seed)
        return model.generate(**options), model.specbound
    finally:
        detach(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_one_by_one_equal_forward(family: str, attention: str) -> None:
    """Driving the layers one by one gives the logits of `model.forward`, token by token, to the bit."""
    model = tiny(family, attention=attention)
    layers = DecoderLayers(model)
    ids = prompt(9)
    cache = KVCache(layers.num_layers, 16)
    stock = None
    with torch.no_grad():
        for position in range(ids.shape[1]):
            output = model(input_ids=ids[:, position : position + 1], use_cache=True, **{CACHE: stock})
            stock = output[CACHE]
            hidden = layers.embed(ids[:, position : position + 1], position)
            for depth in range(layers.num_layers):
                hidden = layers.run(hidden, depth, depth + 1, position, cache)
            assert torch.equal(layers.logits(hidden), output.logits)
    assert cache.lengths == [ids.shape[1]] * layers.num_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_greedy_and_sampled(family: str, dtype: torch.dtype) -> None:
    """Same ids with heads that are right two times of three, at three exits."""
    model = tiny(family, dtype=dtype)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_p": 0.9}):
        options |= {"max_new_tokens": 40}
        torch.manual_seed(3)
        stock = model.generate(prompt(), **options)
        heads = FakeHeads("mixed", [1, 2, 3], stock[0].tolist())
        found, specbound = run(model, heads, SpeculationBounds(0.4, 3, 4), inputs=prompt(), seed=3, **options)
        assert torch.equal(found, stock)
        assert specbound.certificate.bitwise
        assert specbound.stats.accepted.total() > 5
        assert specbound.stats.drafted.total() > specbound.stats.accepted.total()
        assert len(specbound.stats.drafted) == 3


class WatchingHeads(FakeHeads):
    """Keeps what the newest token's age and the verified state's own choice were, at every proposal."""

    def propose(self, layer: int, state: DecodeState, nodes: Sequence[int], count: int) -> Any:
        context = head_context(state, nodes)
        for row, node in enumerate(nodes):
            age, distance = int(context.age[row]), len(state.paths[node])
            choice = int(state.layers.unembed(context.deep[row : row + 1]).argmax()) if age else None
            ids = torch.tensor([[state.pending[node]]])
            fits = torch.equal(context.embedding[row], state.layers.embed(ids, 0)[0, 0])
            self.seen.append((age, choice is None or choice == state.pending[0], distance, fits))
        return super().propose(layer, state, nodes, count)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_heads_read_the_state_that_the_last_emitted_token_came_from(family: str) -> None:
    """Of the prompt's forward in the first round, of verification afterwards; too old beyond four drafts."""
    model = tiny(family)
    stock = model.generate(prompt(), max_new_tokens=40, do_sample=False)
    heads = WatchingHeads("mixed", [1, 2], stock[0].tolist())
    heads.seen = []
    for bounds in (SpeculationBounds(0.4, 2, 8), SpeculationBounds(0.4, 2, 12, max_branches=2)):
        assert torch.equal(run(model, heads, bounds, inputs=prompt(), max_new_tokens=40, do_sample=False)[0], stock)
    assert all(correct for _, correct, _, _ in heads.seen)
    assert all(age == (distance if distance <= MAX_AGE else 0) for age, _, distance, _ in heads.seen)
    assert {age for age, _, _, _ in heads.seen} >= {0, 1, 2, 3}
    assert family == "gpt2" or all(fits for _, _, _, fits in heads.seen)  # positions are added there


@pytest.mark.parametrize("max_draft_tokens", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_adversarial_heads(kind: str, max_draft_tokens: int) -> None:
    """Whatever the heads say, for whatever length, each at every exit with some other: stock's ids."""
    model = tiny("llama")
    turn = KINDS.index(kind) + WIDTHS.index(max_draft_tokens)
    runs = [(1, False), (max_draft_tokens, False), (max_draft_tokens + 1, False), (LONG, False), (LONG, True)]
    for index, (new_tokens, do_sample) in enumerate(runs):
        exit_layer = EXITS[(turn + index) % len(EXITS)]
        options = {"max_new_tokens": new_tokens, "do_sample": do_sample}
        torch.manual_seed(new_tokens)
        stock = model.generate(prompt(), **options)
        heads = FakeHeads(kind, [exit_layer], stock[0].tolist())
        bounds = SpeculationBounds(0.5, exit_layer, max_draft_tokens)
        found, specbound = run(model, heads, bounds, inputs=prompt(), seed=new_tokens, **options)
        assert torch.equal(found, stock), (exit_layer, new_tokens, do_sample)
        assert specbound.stats.emitted == new_tokens


def test_right_heads_reach_the_bound() -> None:
    """All drafts right: each round emits `max_draft_tokens` drafts and exactly one bonus token."""
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=41, do_sample=False)
    heads = FakeHeads("right", [2], stock[0].tolist())
    _, specbound = run(model, heads, SpeculationBounds(0.5, 2, 4), inputs=prompt(), max_new_tokens=41, do_sample=False)
    assert specbound.stats.rounds == 8
    assert specbound.stats.mean_accepted_length == 5.0
    assert specbound.stats.acceptance_rate == 1.0


def test_wrong_heads_accept_nothing() -> None:
    """No draft right: one token a round."""
    model, options = tiny("llama"), {"max_new_tokens": 20, "do_sample": False}
    stock = model.generate(prompt(), **options)
    heads = FakeHeads("wrong", [2], stock[0].tolist())
    _, specbound = run(model, heads, SpeculationBounds(0.5, 2, 4), inputs=prompt(), **options)
    assert specbound.stats.acceptance_rate == 0.0
    assert specbound.stats.mean_accepted_length == 1.0


def test_negative_control_accepting_a_wrong_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with every draft taken as right, ids differ."""

    def gullible(draft: list[int], parents: list[int], choose: Callable[[int], tuple[int, bool]]) -> Accepted:
        token, stop = choose(0)
        return Accepted([draft[0] if draft else token], [0, 1] if draft else [0], stop)

    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=20, do_sample=False)
    monkeypatch.setattr(runtime.decoding.rounds, "accept", gullible)
    heads = FakeHeads("wrong", [2], stock[0].tolist())
    bounds = SpeculationBounds(0.5, 2, 4)
    found, _ = run(model, heads, bounds, inputs=prompt(), max_new_tokens=20, do_sample=False)
    # What the loop believed is what it went on from; its own record of tokens is the target's.
    assert not torch.equal(found, stock)


def test_negative_control_rollback_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a cache row too many after a rejection changes ids."""
    crop = KVCache.crop
    monkeypatch.setattr(KVCache, "crop", lambda self, length: crop(self, length + 1))
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=30, do_sample=False)
    heads = FakeHeads("mixed", [2], stock[0].tolist())
    try:
        found, _ = run(model, heads, SpeculationBounds(0.3, 2, 4), inputs=prompt(), max_new_tokens=30, do_sample=False)
    except RuntimeError:
        return
    assert not torch.equal(found, stock)


def test_rejected_rows_are_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache rows of rejected tokens, poisoned with NaN, change nothing."""
    crop = KVCache.crop

    def poisoned(self: KVCache, length: int) -> None:
        crop(self, length)
        for buffer in (*self._keys, *self._values):
            buffer[:, :, length:] = float("nan")

    monkeypatch.setattr(KVCache, "crop", poisoned)
    model = tiny("llama")
    stock = model.generate(prompt(), max_new_tokens=40, do_sample=False)
    heads = FakeHeads("mixed", [1, 3], stock[0].tolist())
    found, _ = run(model, heads, SpeculationBounds(0.3, 3, 4), inputs=prompt(), max_new_tokens=40, do_sample=False)
    assert torch.equal(found, stock)


def test_other_models_are_refused_by_name() -> None:
    """A model that cannot be driven exactly is refused, with its architecture and the reason."""
    config = LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match=rf"{type(model).__name__}.*rotary"):
        DecoderLayers(model)


def test_unknown_family_is_refused() -> None:
    """Bloom is not in the table."""
    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(UnsupportedModel, match=r"BloomForCausalLM.*model_type 'bloom'.*biases of attention"):
        DecoderLayers(AutoModelForCausalLM.from_config(config))


def test_model_is_as_it_was() -> None:
    """After a call, and after an exception in it, no module is patched; `detach` restores the class."""
    model = tiny("llama")
    before = [dict(module.__dict__) for module in model.modules()]
    stock_class, attention = type(model), model.config._attn_implementation

    class Broken(FakeHeads):
        def propose(self, *args: Any) -> tuple[int, float]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, Broken("right", [2]), SpeculationBounds(0.5, 2, 4), inputs=prompt(), max_new_tokens=5)
    assert type(model) is stock_class
    assert model.config._attn_implementation == attention
    for module, saved in zip(model.modules(), before, strict=True):
        assert "forward" not in module.__dict__
        assert module.__dict__.keys() == saved.keys()
    stock = model.generate(prompt(), max_new_tokens=9, do_sample=False)
    heads = FakeHeads("mixed", [2], stock[0].tolist())
    found, _ = run(model, heads, SpeculationBounds(0.3, 2, 4), inputs=prompt(), max_new_tokens=9, do_sample=False)
    assert torch.equal(found, stock)


def test_disabled_and_batches_are_plain(caplog: pytest.LogCaptureFixture) -> None:
    """Inside `disabled()`, and for several sequences at once, stock's loop runs; the latter says so once."""
    model = tiny("llama")
    batch = torch.cat([prompt(), prompt() + 1]).clamp(max=VOCABULARY - 1)
    stock = model.generate(batch, max_new_tokens=8, do_sample=False)
    attach(model, SpecBound(model, FakeHeads("right", [2]), SpeculationBounds(0.5, 2, 4)))
    with model.specbound.disabled():
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert model.specbound.stats.emitted == 0 and not caplog.records
    for _ in range(2):
        assert torch.equal(model.generate(batch, max_new_tokens=8, do_sample=False), stock)
    assert [record.message for record in caplog.records].count(
        "SpecBound: plain decoding for this call, because it decodes several sequences at once: model.generate_batch"
        " speculates on each, with the ids it has alone."
    ) == 1

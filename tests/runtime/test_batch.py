"""Calls that run together: each has the ids, scores and cache that stock's `generate` gives it alone."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from runtime import SpeculationBounds
from runtime.batch import Batch, Call, generated
from runtime.decoding.drafter import HeadDrafter
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.drafting import policy
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.drafting.lookup import MAX_MATCH, NUM_SUPPORTS, LookupTable
from runtime.drafting.temperature import TemperatureSchedule
from runtime.errors import ConfigError
from runtime.exact.native.stack import NativeLayers
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.families import NATIVE_SHAPE
from tests.helpers.speculation import GREEDY, PROMPTS, SAMPLED, adapted, alone, base

TABLE = LookupTable(((0.7,) * NUM_SUPPORTS,) * MAX_MATCH)


@pytest.fixture(autouse=True)
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests draft, however many there are."""
    monkeypatch.setattr(policy, "MAX_ROWS", 64)


def together(model: Any, options: dict[str, Any], limit: int) -> list[Call]:
    """All prompts in one batch, begun at different times."""
    with Batch(model, limit) as batch:
        calls = []
        for seed, prompt in enumerate(PROMPTS):
            calls.append(batch.add(prompt, seed=seed, **options))
            batch.round()
        while not all(call.ended for call in calls):
            batch.round()
    return calls


@pytest.mark.parametrize("limit", [1, 2, 6])
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ids_are_those_of_each_call_alone(dtype: torch.dtype, options: dict[str, Any], limit: int) -> None:
    """Whoever runs beside it, and whenever it came."""
    model = base(dtype)
    expected = alone(model, options)
    calls = together(adapted(model, expected), options, limit)
    assert [generated(call) for call in calls] == expected
    stats = [call.stats for call in calls]
    assert all(one is not None and one.accepted.total() > 5 for one in stats)


def test_a_part_that_mixes_the_rows_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rows of one request given to another, where both have as many."""
    model = base(torch.bfloat16)
    expected = alone(model, GREEDY)
    made = adapted(model, expected)
    made.specbound.prepare(made)
    if not made.specbound.certificate.policy.native:
        pytest.skip("no native layers here: requests run one after the other")
    run = NativeLayers.__call__

    def mixed(self: NativeLayers, blocks: Any) -> list[Tensor] | None:
        outputs = run(self, blocks)
        if outputs is not None and len({output.shape for output in outputs}) == 1:
            outputs.reverse()
        return outputs

    monkeypatch.setattr(NativeLayers, "__call__", mixed)
    with pytest.raises((AssertionError, RuntimeError, StopIteration)):
        assert [generated(call) for call in together(made, GREEDY, 6)] == expected


@pytest.mark.parametrize("kind", ["deep", "attention"])
def test_real_heads_draft_for_several(kind: str) -> None:
    """Heads of requests that are asked together draft what they draft alone, and ids are stock's."""
    model = base(torch.bfloat16)
    expected = alone(model, GREEDY)
    torch.manual_seed(1)
    exits = ExitHeads(kind, [1, 2], hidden_size=NATIVE_SHAPE["hidden_size"], draft_vocab_size=96, rank=32)
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    exits.to(torch.bfloat16).requires_grad_(False).eval()
    heads = DraftHeads.of(exits, DecoderLayers(model), torch.arange(96))
    drafter = HeadDrafter(heads, TemperatureSchedule.none([1, 2]), TABLE)
    attach(model, SpecBound(model, drafter, SpeculationBounds(0.0, 2, 6, max_branches=2, max_depth=3)))
    counts = []
    for limit in (1, 6):
        calls = together(model, GREEDY, limit)
        assert [generated(call) for call in calls] == expected
        counts.append([(call.stats.drafted, call.stats.accepted) for call in calls if call.stats is not None])
    assert counts[0] == counts[1]


def test_one_that_fails_or_is_cancelled_leaves_the_others_alone() -> None:
    """Its error is its own; what it had said so far was stock's."""

    class Failing(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] > len(PROMPTS[1]) + 5:
                raise RuntimeError("mine")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = base(torch.bfloat16)
    expected = alone(model, GREEDY)
    with Batch(adapted(model, expected)) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS[:1]]
        calls.append(batch.add(PROMPTS[1], stopping_criteria=StoppingCriteriaList([Failing()]), **GREEDY))
        calls += [batch.add(prompt, **GREEDY) for prompt in PROMPTS[2:]]
        batch.round()
        batch.round()
        calls[2].cancelled = True
        while not all(call.ended for call in calls):
            batch.round()
        late = batch.add(PROMPTS[0], **GREEDY)
        late.cancelled = True
        assert batch.round() == [late] and late.ended and generated(late) == []
    assert str(calls[1].error) == "mine"
    cut = generated(calls[2])
    assert 0 < len(cut) < 24 and cut == expected[2][: len(cut)]
    for number in (0, 3, 4, 5):
        assert generated(calls[number]) == expected[number]


def test_scores_cache_and_streamer_are_stock_s() -> None:
    """Of a call among others."""

    class Keeping:
        def __init__(self) -> None:
            self.said: list[list[int]] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.said.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model = base(torch.bfloat16)
    texts = alone(model, GREEDY)
    options = GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    streamers = [Keeping(), Keeping()]
    stock = model.generate(torch.tensor([PROMPTS[3]]), streamer=streamers[0], **options)
    with Batch(adapted(model, texts)) as batch:
        calls = [batch.add(prompt, **GREEDY) for prompt in PROMPTS[:3]]
        calls.append(batch.add(PROMPTS[3], streamer=streamers[1], **options))
        while not all(call.ended for call in calls):
            batch.round()
    found = calls[3].output
    assert all(torch.equal(one, other) for one, other in zip(stock.scores, found.scores, strict=True))
    for layer, other in zip(stock[CACHE].layers, found[CACHE].layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    assert streamers[0].said == streamers[1].said and streamers[1].ended


def test_what_cannot_speculate_runs_plain_and_is_the_same() -> None:
    """By stock's loop, with its own seed, one warning; beams are refused."""
    model = base(torch.float32)
    options = SAMPLED | {"use_cache": False}
    expected = alone(model, options)
    made = adapted(model, expected)
    assert [generated(call) for call in together(made, options, 3)] == expected
    with Batch(made) as batch, pytest.raises((ConfigError, ValueError)):
        batch.add(PROMPTS[0], num_beams=2, **GREEDY)
    with pytest.raises(ConfigError, match="max_requests is 0"):
        Batch(made, 0)


def test_ctrl_c_stops_all_of_it() -> None:
    """It comes out of the round, whichever call it met."""

    class Stopping(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            if input_ids.shape[1] > len(PROMPTS[1]) + 5:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = base(torch.float32)
    with Batch(adapted(model, alone(model, GREEDY))) as batch, pytest.raises(KeyboardInterrupt):
        calls = [batch.add(PROMPTS[0], **GREEDY)]
        calls.append(batch.add(PROMPTS[1], stopping_criteria=StoppingCriteriaList([Stopping()]), **GREEDY))
        while not all(call.ended for call in calls):
            batch.round()


def test_drafts_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer for each where more run together, none where few would be left."""
    monkeypatch.setattr(policy, "MAX_ROWS", 16)
    bounds = SpeculationBounds(0.2, 2, 20)
    assert [bounds.among(number).max_draft_tokens for number in (1, 2, 4, 5, 6, 16)] == [20, 7, 3, 2, 0, 0]


def test_a_batch_that_cannot_begin_leaves_the_model_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is probed; the next call speculates."""
    model = base(torch.float32)
    expected = alone(model, GREEDY)
    made = adapted(model, expected)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SpecBound, "why_stock", interrupted)
        with pytest.raises(KeyboardInterrupt), Batch(made):
            pass
    assert [generated(call) for call in together(made, GREEDY, 2)] == expected


def test_disabled_speculation_is_plain_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """As `generate` has it."""
    model = base(torch.float32)
    expected = alone(model, SAMPLED)
    made = adapted(model, expected)
    with made.specbound.disabled():
        calls = together(made, SAMPLED, 2)
    assert [generated(call) for call in calls] == expected and not caplog.records
    assert all(call.stats is None for call in calls)

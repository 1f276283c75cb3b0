"""Replay: totals against a simulation that goes token by token and layer by layer, and against the runtime itself."""

import random
from dataclasses import replace
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from runtime.decoding.draft import draft_tokens
from runtime.drafting.lookup import MAX_MATCH, ContextLookup, LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import ConfigError
from runtime.generate import attach
from runtime.handle import SpecBound
from train.calibration.lookup_traces import LookupTraces
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer, Totals

EXITS, NUM_LAYERS = (0, 2, 3, 5), 6
WIDTHS = range(1, 10)
DRAFTS = 3  # kinds of drafts in a round: the first, the second, any other
FOLLOWED = 4  # drafts of the lookup behind a wrong one of its own
COSTS = CostTable(
    num_hidden_layers=NUM_LAYERS,
    layer={width: 1.0 + 0.4 * (width - 1) for width in WIDTHS},
    layer_context={width: 0.001 * width for width in WIDTHS},
    unembedding={width: 1.5 + 0.1 * width for width in WIDTHS},
    head=0.25,
    lookup=0.03,
    token=0.2,
    round=0.3,
    plain=9.0,
    plain_context=0.002,
)


def random_traces(lengths: tuple[int, ...], seed: int = 0, prompt: int = 7) -> Traces:
    numbers = np.random.default_rng(seed)
    total = sum(lengths)
    return Traces(
        layers=EXITS,
        confidence=numbers.random((len(EXITS), DRAFTS, total), dtype=np.float32),
        correct=numbers.random((len(EXITS), DRAFTS, total)) < 0.7,
        sequence=np.repeat(np.arange(len(lengths)), lengths),
        context=np.concatenate([prompt + np.arange(length) for length in lengths]),
        after_wrong=numbers.random((FOLLOWED, total), dtype=np.float32),
    )


def climb(depth: list[int], to: int, context: int, costs: CostTable) -> float:
    """Bring every pending token to a depth, layer by layer; what that costs."""
    ms = 0.0
    for layer in range(to):
        rows = sum(reached == layer for reached in depth)
        if rows:
            ms += costs.layer[rows] + costs.layer_context[rows] * context
        depth[:] = [reached + (reached == layer) for reached in depth]
    return ms


def simulate(traces: Traces, text: int, bounds: SpeculationBounds, costs: CostTable) -> dict[str, float]:
    """One token and one layer at a time; the text is emitted token by token until none is left."""
    totals = {"emitted": 0, "rounds": 0, "drafted": 0, "accepted": 0, "hard": 0, "ms": 0.0}
    left = np.flatnonzero(traces.sequence == text).tolist()[1:]  # the prompt's own forward emits the first
    exits = [e for e in EXITS if e <= bounds.max_exit_layer and bounds.threshold(e) <= 1]
    while left:
        context = traces.context[left[0]]
        depth: list[int] = []
        drafts: list[tuple[int, int, int]] = []
        survival, hard = 1.0, False
        wrong: int | None = None  # where a draft by lookup was wrong, since when it copies from the wrong place

        for position in left:
            depth.append(0)
            if len(drafts) >= bounds.max_draft_tokens or position == left[-1]:
                break
            out = None
            for layer in exits if survival >= bounds.min_draft_survival else []:
                stopped = survival < bounds.min_survival
                if layer > 0 and stopped:
                    break
                confidence = traces.confidence[EXITS.index(layer), min(len(drafts), DRAFTS - 1), position]
                if layer == 0 and wrong is not None:
                    assert traces.after_wrong is not None
                    behind = position - wrong - 1
                    confidence = traces.after_wrong[behind, wrong] if behind < FOLLOWED else np.float32(0)
                # a stopped lookup's last question is not priced
                if not stopped or confidence >= bounds.threshold(layer):
                    totals["ms"] += climb(depth, layer, context, costs)
                    totals["ms"] += costs.lookup if layer == 0 else costs.head
                if confidence >= bounds.threshold(layer):
                    out = layer
                    break
            if out is None:
                hard = survival >= max(bounds.min_survival, bounds.min_draft_survival)
                break
            drafts.append((EXITS.index(out), min(len(drafts), DRAFTS - 1), position))
            survival *= float(confidence)
            if out > 0 or traces.after_wrong is None:
                wrong = None
            elif wrong is None and not traces.correct[drafts[-1]]:
                wrong = position
        totals["ms"] += climb(depth, NUM_LAYERS, context, costs)
        good = 0
        while good < len(drafts) and traces.correct[drafts[good]]:
            good += 1
        totals["ms"] += costs.unembedding[len(depth)] + costs.round + costs.token * (good + 1)
        totals["rounds"] += 1
        totals["hard"] += hard
        totals["drafted"] += len(drafts)
        totals["accepted"] += good
        totals["emitted"] += good + 1
        left = left[good + 1 :]
    return totals


def check(found: Totals, traces: Traces, bounds: SpeculationBounds) -> None:
    """Against the simulation of every text."""
    single = [simulate(traces, text, bounds, COSTS) for text in range(traces.num_sequences)]
    totals = {name: sum(one[name] for one in single) for name in single[0]}
    assert found.emitted == totals["emitted"] == len(traces) - traces.num_sequences
    assert (found.rounds, found.hard_tokens) == (totals["rounds"], totals["hard"])
    assert (found.drafted.total(), found.accepted.total()) == (totals["drafted"], totals["accepted"])
    assert found.ms_by_text.tolist() == pytest.approx([one["ms"] for one in single], rel=1e-9)
    later = np.setdiff1d(np.arange(len(traces)), traces.starts)
    plain = sum(COSTS.plain + COSTS.plain_context * context for context in traces.context[later])
    assert found.speedup == pytest.approx(plain / totals["ms"])
    assert found.tokens_per_second == pytest.approx(1000 * found.emitted / totals["ms"])


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9, 1.1])
@pytest.mark.parametrize("deepest", [0, 1, 2, 5])
@pytest.mark.parametrize("most", [0, 1, 3, 8])
def test_totals_equal_a_simulation_token_by_token(threshold: float, deepest: int, most: int) -> None:
    """With thresholds of their own for some exits and a survival stop, and without."""
    traces = random_traces((1, 2, 9, 40))
    for own, *survival in (({}, 0.0, 0.0), ({2: 0.5, 3: 2.0}, 0.3, 0.02), ({0: 2.0}, 0.05, 0.2), ({}, 0.0, 0.1)):
        bounds = SpeculationBounds(threshold, deepest, most, own, *survival)
        check(Replayer(traces, COSTS).run(bounds), traces, bounds)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_between_replays_changes_nothing(seed: int) -> None:
    """One replayer for bounds in any order; a confidence that is no number is never sure."""
    numbers = random.Random(seed)
    traces = random_traces((5, 1, 30, 2, 12), seed)
    traces.confidence[np.random.default_rng(seed).random(traces.confidence.shape) < 0.1] = np.nan
    replayer = Replayer(traces, COSTS)
    for _ in range(80):
        own = {layer: numbers.choice((0.2, 2.0)) for layer in numbers.sample(EXITS, numbers.choice((0, 0, 1, 2)))}
        threshold, deepest, most = numbers.choice((0.0, 0.4)), numbers.choice((0, 2, 5)), numbers.randrange(9)
        bounds = SpeculationBounds(
            threshold, deepest, most, own, numbers.choice((0.0, 0.1, 0.6, 1.0)), numbers.choice((0.0, 0.1, 0.5))
        )
        check(replayer.run(bounds), traces, bounds)


class LoggedHeads:
    """Drafts and confidences of a log: right ones are the truth's, wrong ones another token."""

    def __init__(self, traces: Traces, truth: list[int], prompt_length: int) -> None:
        self.exit_layers, self.modules = list(traces.layers), ()
        self.traces, self.truth, self.prompt_length = traces, truth, prompt_length

    def on(self, layers: Any) -> "LoggedHeads":
        """Nothing to move."""
        return self

    def propose(self, layer: int, state: Any) -> tuple[int, float]:
        """What the log says at the newest token; after its end, and only then, nothing is sure."""
        position = state.length - self.prompt_length
        if position >= len(self.traces):
            return 0, 0.0
        at = self.traces.layers.index(layer), min(len(state.pending), DRAFTS) - 1, position
        correct = self.truth[state.length]
        return (correct if self.traces.correct[at] else (correct + 1) % 128), float(self.traces.confidence[at])


@pytest.mark.parametrize(
    "bounds",
    [
        SpeculationBounds(0.2, 5, 4),
        SpeculationBounds(0.5, 3, 8),
        SpeculationBounds(0.0, 0, 2),
        SpeculationBounds(0.3, 5, 8, exit_thresholds={0: 0.7, 2: 2.0}, min_survival=0.3),
    ],
)
def test_the_runtime_does_what_replay_says(make_model: Any, bounds: SpeculationBounds) -> None:
    """Rounds, drafts and acceptances by source, one for one: the same code decides."""
    model, prompt, new = make_model(), torch.arange(3, 12)[None], 120
    truth = model.generate(prompt, max_new_tokens=new, do_sample=False)[0].tolist()
    length = prompt.shape[1]
    traces = random_traces((new,), seed=4, prompt=length)
    heads = LoggedHeads(traces, truth, length)
    attach(model, SpecBound(model, heads, bounds))
    assert model.generate(prompt, max_new_tokens=new, do_sample=False)[0].tolist() == truth
    stats, found = model.specbound.stats, Replayer(traces, COSTS).run(bounds)
    assert found.emitted == stats.emitted - 1 == new - 1
    assert found.rounds == stats.rounds and found.accepted == stats.accepted
    assert found.mean_accepted_length == pytest.approx(stats.mean_accepted_length)
    assert found.hard_tokens == stats.hard_tokens or not bool(traces.correct.all())


class Copying:
    """The lookup alone, and a state that has no model: what is pending, and the settled text."""

    exit_layers: ClassVar = [0]
    table = LookupTable(tuple((0.3 + 0.08 * length, 0.4 + 0.07 * length, 0.2) for length in range(MAX_MATCH)))

    def __init__(self, text: list[int]) -> None:
        self.lookup, self.pending = ContextLookup(text), [0]

    def advance(self, depth: int) -> None:
        """No layers."""

    def push(self, token: int) -> None:
        """As `DecodeState.push`."""
        self.pending.append(token)

    def propose(self, layer: int, state: Any) -> tuple[int, float]:
        """As `HeadDrafter` at depth 0."""
        proposal = state.lookup.propose(state.pending)
        return (0, 0.0) if proposal is None else (proposal.token, self.table.confidence(proposal))


@pytest.mark.parametrize("stop", [0.0, 0.05, 0.2])
def test_replay_copies_on_behind_a_wrong_draft(stop: float) -> None:
    """As the runtime's lookup does, whose round goes on with what it copies: as many drafts, within a tenth."""
    numbers = random.Random(5)
    phrases = [[numbers.randrange(40) for _ in range(numbers.randrange(4, 9))] for _ in range(12)]
    text = [token for _ in range(150) for token in (*numbers.choice(phrases), numbers.randrange(40))]
    bounds = SpeculationBounds(0.25, 0, 12, min_draft_survival=stop)
    drafted = accepted = rounds = 0
    state: Any = Copying(text[:10])
    at = 10  # of the newest token; the first is not speculation's
    while at < len(text) - 1:
        state.pending = [text[at]]
        limit = bounds.draft_limit(len(text) - 1 - at)
        draft = draft_tokens(state, state, bounds, limit=limit, stop_tokens=())
        good = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft.tokens, text[at + 1 :])))  # noqa: B905
        drafted, accepted, rounds = drafted + len(draft.tokens), accepted + good, rounds + 1
        state.lookup.extend(text[at : at + good + 1])
        at += good + 1
    looked_up = LookupTraces.collect([(text[:10], text[10:])], text[10:])
    traces = Traces.join(
        {0: looked_up.confidences(Copying.table)},
        {0: looked_up.correct},
        np.zeros(len(text) - 10, int),
        np.array([10]),
        after_wrong=looked_up.confidences_after_wrong(Copying.table),
    )
    found = Replayer(traces, COSTS).run(bounds)
    assert found.rounds == pytest.approx(rounds, rel=0.02) and found.acceptance_rate < 0.6
    assert found.drafted.total() == pytest.approx(drafted, rel=0.1)
    assert found.accepted.total() == pytest.approx(accepted, rel=0.02)
    blind = Replayer(replace(traces, after_wrong=None), COSTS).run(bounds)
    assert blind.drafted.total() < 0.9 * drafted  # what a log without it would say


@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_perfect_drafts_give_the_longest_acceptance(most: int) -> None:
    """And never being sure, or never right, gives one token a round."""
    length = 40 * (most + 1) + 1
    traces = random_traces((length,))
    perfect = Traces(
        EXITS, np.full_like(traces.confidence, 0.99), np.ones_like(traces.correct), traces.sequence, traces.context
    )
    found = Replayer(perfect, COSTS).run(SpeculationBounds(0.5, 5, most))
    assert found.mean_accepted_length == most + 1 and found.acceptance_rate == 1.0
    assert found.drafted == {0: 40 * most}
    wrong = Traces(EXITS, perfect.confidence, ~perfect.correct, traces.sequence, traces.context)
    assert Replayer(wrong, COSTS).run(SpeculationBounds(0.5, 5, most)).mean_accepted_length == 1.0
    assert Replayer(perfect, COSTS).run(SpeculationBounds(0.995, 5, most)).drafted.total() == 0


def test_the_interval_is_of_texts() -> None:
    """It holds the estimate, is narrower for more texts, and comes out the same again."""
    bounds = SpeculationBounds(0.4, 5, 4)
    random.seed(0)

    def width(found: Totals) -> float:
        low, high = found.speedup_interval()
        assert low <= found.speedup <= high
        return high - low

    few, many = (Replayer(random_traces((30,) * texts, seed=2), COSTS).run(bounds) for texts in (4, 60))
    assert width(many) < width(few)
    assert few.speedup_interval() == few.speedup_interval()


def test_too_many_drafts_are_refused() -> None:
    """16 from 4 sources are fine, 31 are not."""
    replayer = Replayer(random_traces((40,)), COSTS)
    assert replayer.run(SpeculationBounds(0.0, 5, 16)).emitted == 39
    with pytest.raises(ConfigError, match="too many to replay"):
        replayer.run(SpeculationBounds(0.0, 5, 31))

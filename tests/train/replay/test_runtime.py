"""Replay against the runtime itself: rounds and drafts of the same text, one for one."""

import random
from dataclasses import replace
from itertools import takewhile
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from runtime.decoding.draft import draft_all, draft_tree
from runtime.drafting.lookup import MAX_MATCH, ContextLookup, LookupTable
from runtime.drafting.policy import SpeculationBounds
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.replay import BRANCHES, COSTS, DRAFTS, random_traces
from train.calibration.lookup_traces import LookupTraces
from train.calibration.traces import Traces
from train.replay.replay import Replayer


class LoggedHeads:
    """Drafts and confidences of a log: right ones are the truth's, wrong ones another token."""

    def __init__(self, traces: Traces, truth: list[int], prompt_length: int) -> None:
        self.exit_layers, self.modules, self.watched = list(traces.layers), (), []
        self.traces, self.truth, self.prompt_length = traces, truth, prompt_length

    def on(self, layers: Any) -> "LoggedHeads":
        """Nothing to move."""
        return self

    def propose(self, layer: int, state: Any, nodes: list[int], count: int) -> list[list[tuple[int, float]]]:
        """What the log says at a node's distance from the root; after its end, and only then, nothing."""
        places = [(state.length + len(state.paths[node]), len(state.paths[node])) for node in nodes]
        return [self._of(layer, *place)[:count] for place in places]

    def _of(self, layer: int, place: int, distance: int) -> list[tuple[int, float]]:
        position, traces = place - self.prompt_length, self.traces
        if position >= len(traces):
            return []
        index, age = traces.layers.index(layer), min(distance, DRAFTS) - 1
        rank, shared = traces.rank[index, age, position], traces.shared[index, age, position]
        copied = traces.rank[0, age, position]  # the lookup's token is the truth's, or another one
        proposals = []
        for branch, confidence in enumerate(traces.confidence[index, age, :, position].tolist()):
            token = self.truth[place] + 2 + index * BRANCHES + branch
            token = self.truth[place] + 1 if branch == shared and copied != 0 else token
            token = self.truth[place] if branch == rank else token
            if confidence > 0:
                proposals.append((token % 128, confidence))
        return proposals


@pytest.mark.parametrize(
    "bounds",
    [
        SpeculationBounds(0.2, 5, 4),
        SpeculationBounds(0.5, 3, 8),
        SpeculationBounds(0.0, 0, 2),
        SpeculationBounds(0.3, 5, 8, exit_thresholds={0: 0.7, 2: 2.0}, min_survival=0.3),
        SpeculationBounds(0.2, 5, 12, max_branches=2, sure_threshold=0.7),
        SpeculationBounds(0.1, 2, 15, max_branches=3, sure_threshold=0.8, min_survival=0.2, min_draft_survival=0.05),
        SpeculationBounds(0.1, 5, 15, max_branches=3, sure_threshold=1.1, min_draft_survival=0.1, max_depth=2),
    ],
)
def test_the_runtime_does_what_replay_says(make_model: Any, bounds: SpeculationBounds) -> None:
    """Rounds, drafts and acceptances by source, one for one: the same code decides."""
    model, prompt, new = make_model(), torch.arange(3, 12)[None], 120
    truth = model.generate(prompt, max_new_tokens=new, do_sample=False)[0].tolist()
    length = prompt.shape[1]
    traces = replace(random_traces((new,), seed=4, prompt=length), after_wrong=None)
    heads = LoggedHeads(traces, truth, length)
    attach(model, SpecBound(model, heads, bounds))
    assert model.generate(prompt, max_new_tokens=new, do_sample=False)[0].tolist() == truth
    stats, found = model.specbound.stats, Replayer(traces, COSTS).run(bounds)
    assert found.emitted == stats.emitted - 1 == new - 1
    assert found.rounds == stats.rounds and found.accepted == stats.accepted
    assert found.mean_accepted_length == pytest.approx(stats.mean_accepted_length)
    assert found.drafted == stats.drafted and found.hard_tokens == stats.hard_tokens


class Copying:
    """The lookup alone, and a state that has no model: what is pending, and the settled text."""

    exit_layers: ClassVar = [0]
    table = LookupTable(tuple((0.3 + 0.08 * length, 0.4 + 0.07 * length, 0.2) for length in range(MAX_MATCH)))

    def __init__(self, text: list[int]) -> None:
        self.lookup, self.pending = ContextLookup(text), [0]

    def advance(self, depth: int) -> None:
        """No layers."""

    def push(self, token: int, parent: int) -> int:
        """As `DecodeState.push`, for a chain."""
        self.pending.append(token)
        return parent + 1

    def propose(self, layer: int, state: Any, nodes: list[int], count: int) -> list[list[tuple[int, float]]]:
        """As `HeadDrafter` at depth 0."""
        proposal = state.lookup.propose(state.pending)
        return [[] if proposal is None else [(proposal.token, self.table.confidence(proposal))]]


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
        tree = draft_tree(state, [0], bounds, remaining=len(text) - 1 - at, stop_tokens=())
        (draft,) = draft_all([tree], state)
        good = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(draft.tokens, text[at + 1 :])))  # noqa: B905
        drafted, accepted, rounds = drafted + len(draft.tokens), accepted + good, rounds + 1
        state.lookup.extend(text[at : at + good + 1])
        at += good + 1
    looked_up = LookupTraces.collect([(text[:10], text[10:])], text[10:])
    length = len(text) - 10
    right = np.where(looked_up.correct, 0, -1).astype(np.int8)[None]
    traces = Traces(
        layers=(0,),
        confidence=looked_up.confidences(Copying.table)[None, :, None],
        rank=right,
        shared=np.zeros_like(right),
        sequence=np.zeros(length, int),
        context=10 + np.arange(length),
        after_wrong=looked_up.confidences_after_wrong(Copying.table),
    )
    found = Replayer(traces, COSTS).run(bounds)
    assert found.rounds == pytest.approx(rounds, rel=0.02) and found.acceptance_rate < 0.6
    assert found.drafted.total() == pytest.approx(drafted, rel=0.1)
    assert found.accepted.total() == pytest.approx(accepted, rel=0.02)
    blind = Replayer(replace(traces, after_wrong=None), COSTS).run(bounds)
    assert blind.drafted.total() < 0.9 * drafted  # what a log without it would say

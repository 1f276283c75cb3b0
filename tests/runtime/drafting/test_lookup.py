"""The depth-0 exit: longest suffix match against a brute-force search, its table, and its drafts in generation."""

import random
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import pytest
import torch

from runtime import ConfigError, SpeculationBounds, detach
from runtime.drafting.lookup import (
    AGREED,
    DIFFERED,
    MAX_MATCH,
    NUM_SUPPORTS,
    ONCE,
    ContextLookup,
    LookupTable,
    Proposal,
)
from runtime.generate import attach
from runtime.loading import make_specbound
from train.calibration.lookup_traces import DISTANCES, FOLLOWED, LookupTraces


def brute_force(settled: list[int], pending: list[int]) -> Proposal | None:
    """Every earlier occurrence of every suffix, written another way."""
    context = settled + pending
    for length in range(min(MAX_MATCH, len(context)), 0, -1):
        suffix = context[-length:]
        followers = [settled[end] for end in range(length, len(settled)) if settled[end - length : end] == suffix]
        if followers:
            support = ONCE
            if len(followers) > 1:
                support = AGREED if followers[-1] == followers[-2] else DIFFERED
            return Proposal(followers[-1], length, support)
    return None


@pytest.mark.parametrize("seed", range(20))
def test_equals_brute_force(seed: int) -> None:
    """Random texts over few tokens, settled a few at a time, with drafts pending."""
    numbers = random.Random(seed)
    settled = [numbers.randrange(4) for _ in range(numbers.randrange(6))]
    lookup = ContextLookup(settled)
    for _ in range(60):
        pending = [numbers.randrange(4) for _ in range(numbers.randrange(4))]
        assert lookup.propose(pending) == brute_force(settled, pending)
        more = [numbers.randrange(4) for _ in range(numbers.randrange(1, 4))]
        lookup.extend(more)
        settled += more


def test_nothing_known_proposes_nothing() -> None:
    """An empty text, and a token never seen before."""
    assert ContextLookup().propose() is None
    assert ContextLookup([1, 2, 3]).propose([9]) is None


def test_table_is_checked() -> None:
    """Shape and range."""
    rows = ((0.5,) * NUM_SUPPORTS,) * MAX_MATCH
    assert LookupTable(rows).confidence(Proposal(7, 3, AGREED)) == 0.5
    for wrong in (rows[1:], (*rows[1:], (0.5,)), (*rows[1:], (0.5, 0.5, 1.5)), (*rows[1:], (0.5, 0.5, float("nan")))):
        with pytest.raises(ConfigError, match="lookup is not 8 rows of 3"):
            LookupTable(wrong)


def test_traces_and_table() -> None:
    """Proposals at response positions as the runtime makes them; the table is their smoothed precision."""
    rows = [([1, 2, 3, 1], [2, 3, 9])]
    traces = LookupTraces.collect(rows, targets=[2, 3, 9])
    # After `1`: seen once, followed by 2. After `1 2`: followed by 3. After `2 3`: followed by 1, wrong.
    assert traces.match[0].tolist() == [1, 2, 3]
    assert traces.correct[0].tolist() == [True, True, False] and traces.token[0].tolist() == [2, 3, 1]
    # Behind that wrong 1, with `2 3 1` for an end, it would go on with what followed then, and on.
    assert traces.after_wrong.shape == (2, FOLLOWED, 3) and not traces.after_wrong[:, :, :2].any()
    lookup, pending = ContextLookup([1, 2, 3, 1, 2]), [3, 1]
    for behind in range(FOLLOWED):
        proposal = lookup.propose(pending)
        assert proposal is not None
        assert traces.after_wrong[:, behind, 2].tolist() == [proposal.match, proposal.support]
        pending.append(proposal.token)
    nothing = np.zeros((2, FOLLOWED, 1000), int)
    right, token = np.arange(1000)[None] % 4 > 0, np.zeros((1, 1000), int)
    table = LookupTraces(np.array([[2] * 1000]), np.array([[AGREED] * 1000]), right, token, nothing).fit()
    assert table.rows[1][AGREED] == pytest.approx(0.75, abs=0.01)
    confidence = traces.confidences(table)
    assert confidence.shape == (DISTANCES, 3) and (confidence[0] > 0).all()
    behind = traces.confidences_after_wrong(table)
    assert behind.shape == (FOLLOWED, 3) and (behind[:, 2] > 0).all() and not behind[:, :2].any()
    none = np.array([[0]])
    assert LookupTraces(none, none, none > 0, none - 1, nothing).confidences(table).tolist() == [[0.0]]


def test_a_later_draft_is_looked_up_in_the_text_before_its_root() -> None:
    """A round's own drafts are not read yet: in a text that repeats itself the settled text knows one repeat more."""
    text = [7, 7, 7, 7, 8, 7, 7, 7, 7, 7, 7]
    traces = LookupTraces.collect([(text[:2], text[2:])], targets=text[2:])
    for root in range(len(text) - 2):
        lookup, pending = ContextLookup(text[: root + 1]), text[root + 1 : -1]
        for distance in range(min(DISTANCES, len(pending))):
            proposal, at = lookup.propose(pending[: distance + 1]), root + distance
            found = [int(log[distance, at]) for log in (traces.token, traces.match, traces.support)]
            assert found == ([-1, 0, 0] if proposal is None else [*astuple(proposal)])
    assert (traces.match[0] != traces.match[2]).any() and (traces.support[0] != traces.support[1]).any()


def test_drafts_of_both_kinds_mix_and_ids_are_stocks(make_model: Any, make_adapter: Any) -> None:
    """On a text full of repeats the lookup drafts, unsure places fall to the heads, and every id is stock's."""
    model = make_model()
    confidence = ((0.9,) * NUM_SUPPORTS,) * MAX_MATCH
    adapter = make_adapter(model)
    adapter = replace(adapter, config=replace(adapter.config, lookup=LookupTable(confidence)))
    prompt = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8, 9, 10, 11, 5, 6, 7]])
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 4}):
        torch.manual_seed(1)
        stock = model.generate(prompt, max_new_tokens=120, **options)
        specbound = make_specbound(model, adapter, exactness="bitwise")
        specbound.bounds = SpeculationBounds(exit_threshold=0.05, max_exit_layer=4, max_draft_tokens=4)
        attach(model, specbound)
        torch.manual_seed(1)
        found = model.generate(prompt, max_new_tokens=120, **options)
        detach(model)
        assert torch.equal(found, stock)
        assert specbound.stats.drafted[0] > 0 and specbound.stats.drafted[2] > 0


def test_lookup_alone(make_model: Any, make_adapter: Any) -> None:
    """With `max_exit_layer` 0 no head runs."""
    model = make_model()
    adapter = make_adapter(model)
    adapter = replace(adapter, config=replace(adapter.config, lookup=LookupTable(((0.9,) * 3,) * MAX_MATCH)))
    prompt = torch.tensor([[5, 6, 7, 5, 6, 7, 5]])
    stock = model.generate(prompt, max_new_tokens=60, do_sample=False)
    specbound = make_specbound(model, adapter, exactness="bitwise")
    specbound.bounds = SpeculationBounds(exit_threshold=0.5, max_exit_layer=0, max_draft_tokens=4)
    attach(model, specbound)
    found = model.generate(prompt, max_new_tokens=60, do_sample=False)
    detach(model)
    assert torch.equal(found, stock)
    assert set(specbound.stats.drafted) == {0}

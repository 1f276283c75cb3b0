"""Replay of several requests together: what they share, and what drafts are worth then."""

from dataclasses import replace

import pytest

from runtime.drafting.policy import MOST_REQUESTS, SpeculationBounds
from tests.helpers.replay import COSTS, random_traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import tune
from train.replay.together import REQUESTS, line, together

BOUNDS = SpeculationBounds(0.2, 5, 8, max_branches=2)
# Further rows cost next to nothing: requests share all but their own rows.
SHARED = CostTable.counted(6, head=0.1, unembedding=1.0)


def test_alone_it_is_the_replay_of_one_request() -> None:
    """And what is told of more is for the faster kind of round."""
    traces = random_traces((1, 2, 9, 40))
    table = together(traces, SHARED, BOUNDS)
    assert [one["requests"] for one in table] == list(REQUESTS)
    alone = max(
        Replayer(traces, SHARED).run(each).tokens_per_second for each in (BOUNDS, replace(BOUNDS, max_draft_tokens=0))
    )
    assert table[0]["tokens_per_second"] == pytest.approx(alone)
    assert all(one["tokens_per_second"] >= one["plain_tokens_per_second"] for one in table)
    said = line(table)
    assert all(f"{one['requests']}: {one['tokens_per_second']:.0f} tokens/s" in said for one in table)


def test_requests_share_a_pass_and_from_six_on_nothing_is_drafted() -> None:
    """Without drafts a round of N requests costs what a block of N rows does; more than five have no rows to spare."""
    traces = random_traces((30, 40))
    table = {one["requests"]: one for one in together(traces, SHARED, BOUNDS)}
    for number, one in table.items():
        ms = SHARED.of_round((), 1, number)[0]
        assert one["plain_tokens_per_second"] == pytest.approx(1000 * number / ms)
        assert one["rows"] == 0 or number <= MOST_REQUESTS


@pytest.mark.parametrize("requests", [1, 3, MOST_REQUESTS])
def test_bounds_are_chosen_for_so_many(requests: int) -> None:
    """There they are at least as fast as those chosen for another number."""
    traces = random_traces((30, 40, 50), seed=3)
    bounds, found = tune(traces, COSTS, requests=requests, progress=False)
    replayer = Replayer(traces, COSTS, requests)
    assert found.ms_by_text.tolist() == replayer.run(bounds).ms_by_text.tolist()
    others = (tune(traces, COSTS, requests=number, progress=False)[0] for number in {1, 3, MOST_REQUESTS} - {requests})
    assert all(found.speedup >= 0.99 * replayer.run(other).speedup for other in others)

"""What drafts are worth where several requests decode together, by replay: in how many rows, and beside none at all.

The runtime's controller finds the same by the clock. Needs no model.
"""

from dataclasses import replace
from typing import Any

from runtime.drafting.policy import SpeculationBounds, widths
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.replay import Replayer
from train.replay.search import FINALIST_POSITIONS, some_texts

# Requests that decode together; from 6 on no round drafts.
REQUESTS = (1, 2, 3, 4, 5, 8, 16)


def together(traces: Traces, costs: CostTable, bounds: SpeculationBounds) -> list[dict[str, Any]]:
    """For each number of requests, JSON values: predicted tokens a second of all of them, with and without drafts.

    Returns:
        `requests`, `rows` of the faster kind of round (0 where that is without drafts; alone, what the bounds allow),
        `tokens_per_second` in these, and `plain_tokens_per_second` without drafts.
    """
    several = some_texts(traces, FINALIST_POSITIONS)
    return [_predicted(Replayer(several, costs, number), bounds) for number in REQUESTS]


def line(table: list[dict[str, Any]]) -> str:
    """The table in a line."""
    said = [
        f"{one['requests']}: {one['tokens_per_second']:.0f} tokens/s, {_gain(one):.2f}x without drafts"
        + (f" ({one['rows']} rows a round)" if one["rows"] else "")
        for one in table
    ]
    return f"requests together, predicted: {'; '.join(said)}"


def _predicted(replayer: Replayer, bounds: SpeculationBounds) -> dict[str, Any]:
    number = replayer.requests
    plain = replayer.run(replace(bounds, max_draft_tokens=0)).ms_per_token
    shares = widths(number) if number > 1 else [bounds.max_draft_tokens + 1]
    drafting = [(replayer.run(bounds, rows).ms_per_token, rows) for rows in shares]
    best, rows = min([(plain, 0), *drafting])
    return {
        "requests": number,
        "rows": rows,
        "tokens_per_second": 1000.0 / best,
        "plain_tokens_per_second": 1000.0 / plain,
    }


def _gain(one: dict[str, Any]) -> float:
    gain: float = one["tokens_per_second"] / one["plain_tokens_per_second"]
    return gain

"""`Controller`: is speculation paying? Watches rounds as they come, rests where it is not, and tries again.

Decides only how much is drafted, so never which tokens come out. Time comes from a clock that tests replace.
Knows no model.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from runtime.drafting.policy import MAX_ROWS, SpeculationBounds, widths
from runtime.drafting.trial import REFRESH, Trial

# A source's record: how many observations its own confidence counts for, and how fast old ones are forgotten.
PRIOR, KEEP = 8.0, 0.98


class Controller:
    """Bounds for each round of one model, call after call, however many requests decode together.

    Each number of requests has prices and a verdict of its own, which stay when requests join and leave. How far the
    sources are to be believed is learned from all of them.

    Args:
        clock: seconds, never running backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._trials = {1: Trial(1, [MAX_ROWS], [])}  # alone: one width, which its own bounds say
        self._together: list[Trial] = []  # those of more than one request
        self._trial = self._trials[1]  # of this round
        self._rounds = 0
        self._last: dict[int, int] = {}  # the last round of so many requests
        self._records: dict[int, tuple[float, float]] = {}
        self._started = 0.0

    @property
    def resting(self) -> int:
        """Rounds of as many requests as the last one still to come without drafts, because they did not pay."""
        return self._trial.resting

    def begin(self, bounds: Sequence[SpeculationBounds]) -> list[SpeculationBounds]:
        """Start a round of requests with these bounds; what each may draft, which is never more."""
        requests = len(bounds)
        if requests not in self._trials:
            self._trials[requests] = Trial(requests, widths(requests), self._together)
        self._trial = self._trials[requests]
        self._rounds += 1
        if self._rounds - self._last.get(requests, self._rounds) > REFRESH:
            self._trial.renew()
        self._last[requests] = self._rounds
        rows = self._trial.begin()
        allowed = [
            self._corrected(own.among(requests, rows)) if rows else replace(own, max_draft_tokens=0) for own in bounds
        ]
        self._started = self.clock()
        return allowed

    def end(self, judged: Sequence[tuple[int, float, bool]], num_tokens: int) -> None:
        """End the round.

        Args:
            judged: source and confidence of each draft that followed an accepted token, and whether it was right.
            num_tokens: tokens emitted, of all requests.
        """
        seconds = self.clock() - self._started
        if not self._trial.is_plain:
            self._observe(judged)
        self._trial.end(seconds, num_tokens)

    def _observe(self, judged: Sequence[tuple[int, float, bool]]) -> None:
        """Hold the confidences of drafts that were judged against what came of them."""
        self._records = {
            layer: (KEEP * expected, KEEP * correct) for layer, (expected, correct) in self._records.items()
        }
        for layer, confidence, right in judged:
            expected, correct = self._records.get(layer, (0.0, 0.0))
            self._records[layer] = (expected + confidence, correct + right)

    def _corrected(self, bounds: SpeculationBounds) -> SpeculationBounds:
        """The bounds with a higher threshold for each source that has been correct less often than it said, and
        narrower rounds where all of them together have."""
        own = dict(bounds.exit_thresholds)
        for layer, record in self._records.items():
            own[layer] = bounds.threshold(layer) / _honesty(record)
        total = (sum(held[0] for held in self._records.values()), sum(held[1] for held in self._records.values()))
        width = math.ceil(bounds.max_draft_tokens * _honesty(total))
        return replace(bounds, exit_thresholds=own, max_draft_tokens=width)


def _honesty(record: tuple[float, float]) -> float:
    """How often a source was correct over how often its confidence said so, at most 1."""
    expected, correct = record
    return min(1.0, (correct + PRIOR) / (expected + PRIOR))

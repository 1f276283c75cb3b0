"""`Controller`: is speculation paying? Watches rounds as they come, rests where it is not, and tries again.

Decides only how much is drafted, so never which tokens come out. Time comes from a clock that tests replace.
Knows no model.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from runtime.drafting.policy import SpeculationBounds

# Rounds without drafts that the price of a plain token is taken from, and the fewest.
PLAIN_WINDOW, FIRST_PLAIN = 8, 2
# The gain of speculation is the tokens it emitted less what its rounds cost, in plain tokens, summed up. At a loss of
# ALLOWED_LOSS drafting rests; where it has paid before, the machine may have become slower since a plain token was
# priced last, so it is priced anew first and the sum begins again. The sum never exceeds KEPT_GAIN: an old gain does
# not hide a new loss for long.
ALLOWED_LOSS, KEPT_GAIN = 3.0, 12.0
# A round without drafts now and then, while speculating, keeps the price of a plain token fresh.
REFRESH = 48
# A round dearer than this, in plain tokens, was held up by something else.
DEAREST = 3.0
# Rounds without drafts after a trial that did not pay: longer each time, so that trials cost ever less.
FIRST_REST, REST_GROWTH, MAX_REST = 16, 3, 768
# A source's record: how many observations its own confidence counts for, and how fast old ones are forgotten.
PRIOR, KEEP = 8.0, 0.98


class Controller:
    """Bounds for each round of one model, call after call.

    Args:
        clock: seconds, never running backwards.

    Attributes:
        resting: rounds without drafts still to come because speculation did not pay.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.resting = 0
        self._rest = FIRST_REST
        self._plain: deque[float] = deque(maxlen=PLAIN_WINDOW)
        self._won = 0.0
        self._has_paid = False  # since it rested last, or was doubted
        self._since_plain = 0
        self._records: dict[int, tuple[float, float]] = {}
        self._started = 0.0
        self._is_plain = False

    def begin(self, bounds: SpeculationBounds) -> SpeculationBounds:
        """Start a round; what it may draft, which is never more than `bounds` say."""
        fresh = len(self._plain) >= FIRST_PLAIN and self._since_plain < REFRESH
        self._is_plain = self.resting > 0 or not fresh
        allowed = replace(bounds, max_draft_tokens=0) if self._is_plain else self._corrected(bounds)
        self._started = self.clock()
        return allowed

    def end(self, judged: Sequence[tuple[int, float, bool]], num_tokens: int) -> None:
        """End the round.

        Args:
            judged: source and confidence of each draft that followed an accepted token, and whether it was right.
            num_tokens: tokens emitted.
        """
        seconds = self.clock() - self._started
        if self._is_plain:
            self._plain.append(seconds)
            self._since_plain = 0
            self.resting = max(0, self.resting - 1)
            return
        self._since_plain += 1
        self._observe(judged)
        self._judge(seconds / max(median(self._plain), 1e-9), num_tokens)

    def _judge(self, price: float, tokens: int) -> None:
        """Add a round's gain over plain decoding to the sum (a CUSUM test), and go on, or rest.

        Args:
            price: of the round, in plain tokens; one that was held up by something else counts as a dear one at most.
        """
        self._won = min(KEPT_GAIN, self._won + tokens - min(price, DEAREST))
        if self._won <= -ALLOWED_LOSS and self._has_paid:
            self._plain.clear()
            self._won, self._has_paid = 0.0, False
        elif self._won <= -ALLOWED_LOSS:
            self.resting, self._rest = self._rest, min(REST_GROWTH * self._rest, MAX_REST)
            self._won = 0.0
        elif self._won == KEPT_GAIN:
            self._rest, self._has_paid = FIRST_REST, True

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

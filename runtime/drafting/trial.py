"""`Trial`: does drafting pay where so many requests decode together, and in how many rows? Judged by what rounds cost.

The unit is a plain round of as many requests, which emits one token for each. Knows no clock and no drafts.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

# Rounds without drafts that the price of a plain round is taken from, and the fewest.
PLAIN_WINDOW, FIRST_PLAIN = 8, 2
# The gain of speculation is the tokens it emitted less what its rounds cost, in plain rounds, summed up. At a loss of
# ALLOWED_LOSS drafting rests; where it has paid before, the machine may have become slower since a plain round was
# priced last, so it is priced anew first and the sum begins again. The sum never exceeds KEPT_GAIN: an old gain does
# not hide a new loss for long.
ALLOWED_LOSS, KEPT_GAIN = 3.0, 12.0
# A round without drafts now and then, while speculating, keeps the price of a plain round fresh.
REFRESH = 48
# A round dearer than this, in plain rounds, was held up by something else.
DEAREST = 3.0
# Rounds without drafts after a trial that did not pay: longer each time, so that trials cost ever less.
FIRST_REST, REST_GROWTH, MAX_REST = 16, 3, 768
# Rounds that draft in as many rows as proved better, until both widths are compared again.
SETTLED = 96


class Trial:
    """Whether rounds of so many requests draft, and in how many rows.

    Args:
        requests: that decode together.
        widths: rows that rounds which draft may have; none where nothing is drafted.
        together: trials of other numbers of requests, whose losses count together with its own; it is put among them.

    Attributes:
        is_plain: whether the round drafts nothing.
        resting: rounds without drafts still to come because speculation did not pay.
    """

    def __init__(self, requests: int, widths: Sequence[int], together: "list[Trial]") -> None:
        self.requests = requests
        self.is_plain = True
        self.resting = 0
        self._rest = FIRST_REST
        self._plain: deque[float] = deque(maxlen=PLAIN_WINDOW)
        self._since_plain = 0
        self._won = 0.0
        self._has_paid = False  # since it rested last, or was doubted
        self._race = Race(widths)
        self._together = together
        together.append(self)

    def begin(self) -> int:
        """Start a round; the rows that it may have, 0 where it drafts nothing."""
        fresh = len(self._plain) >= FIRST_PLAIN and self._since_plain < REFRESH
        self.is_plain = self.resting > 0 or not fresh or not self._race.widths
        return 0 if self.is_plain else self._race.rows

    def renew(self) -> None:
        """Forget the prices of plain rounds: they are of long ago."""
        self._plain.clear()

    def end(self, seconds: float, num_tokens: int) -> None:
        """End a round that took so long, and emitted so many tokens of all requests."""
        if self.is_plain:
            self._plain.append(seconds)
            self._since_plain = 0
            self.resting = max(0, self.resting - 1)
            return
        self._since_plain += 1
        tokens = num_tokens / self.requests
        # A round that was held up by something else counts as a dear one at most.
        price = min(seconds / max(median(self._plain), 1e-9), DEAREST)
        self._race.add(tokens, price)
        self._judge(tokens - price)

    def _judge(self, gain: float) -> None:
        """Add a round's gain over plain decoding to the sum (a CUSUM test), and go on, or rest."""
        self._won = min(KEPT_GAIN, self._won + gain)
        if self._won <= -ALLOWED_LOSS and self._has_paid:
            self._plain.clear()
            self._won, self._has_paid = 0.0, False
        elif failed := self._failed():
            for trial in failed:
                trial._pause()
            # More requests share the same rows: what does not pay for few does not for them.
            for trial in self._together:
                if (
                    trial.requests > failed[0].requests
                    and not trial._has_paid
                    and trial._won <= 0.0
                    and trial._race.widths
                ):
                    trial.resting = max(trial.resting, failed[0].resting)
        elif self._won == KEPT_GAIN:
            self._rest, self._has_paid = FIRST_REST, True

    def _failed(self) -> "list[Trial]":
        """Those of which this round showed that drafting does not pay, the fewest requests first.

        Where requests join and leave all the time each number of them comes to few rounds, and all of them would lose
        as much before they rest. So their losses also count together.
        """
        if self._loss >= ALLOWED_LOSS:
            return [self]
        losing = sorted((trial for trial in self._together if trial._loss > 0.0), key=lambda trial: trial.requests)
        return losing if sum(trial._loss for trial in losing) >= ALLOWED_LOSS else []

    @property
    def _loss(self) -> float:
        """What it has lost since it rested last; 0 where it has paid."""
        return 0.0 if self._has_paid else max(0.0, -self._won)

    def _pause(self) -> None:
        """Draft nothing for a while; both widths are compared again when it goes on."""
        self.resting, self._rest = self._rest, min(REST_GROWTH * self._rest, MAX_REST)
        self._won = 0.0
        self._race.settled = 0


class Race:
    """Which of two widths gives more tokens for their price: in turn until one leads enough, then that one a while.

    When they are compared again what was seen so far counts half, so that it takes few rounds to find the same.

    Args:
        widths: rows; where it is one, or none, there is nothing to compare.

    Attributes:
        settled: rounds still to come in the better width alone.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self.widths = widths
        self.settled = 0
        self._turn = 0
        self._tokens, self._price = [0.0, 0.0], [0.0, 0.0]

    @property
    def rows(self) -> int:
        """Of this round."""
        return self.widths[self._turn]

    def add(self, tokens: float, price: float) -> None:
        """Count what a round in `rows` gave, in plain rounds, and choose the next one's."""
        if self.settled > 0 or len(self.widths) < 2:
            self.settled = max(0, self.settled - 1)
            return
        self._tokens[self._turn] += tokens
        self._price[self._turn] += price
        (tokens, others), (price, other_price) = self._tokens, self._price
        # Tokens that the first has won more than the second, each against what both give for their price.
        lead = 2 * (tokens * other_price - others * price) / max(price + other_price, 1e-9)
        self._turn = 1 - self._turn
        if abs(lead) >= ALLOWED_LOSS:
            self._turn, self.settled = int(lead < 0), SETTLED
            self._tokens = [value / 2 for value in self._tokens]
            self._price = [value / 2 for value in self._price]

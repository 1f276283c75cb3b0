"""`ContextLookup`: the depth-0 exit. The longest suffix of the text seen before proposes what followed it then.

Costs no layer. Incremental: each settled token adds one entry for every suffix length, so work a token is constant
and memory is at most `MAX_MATCH` entries a token. Confidence comes from a small table fitted by the training side:
by length of the match, and by whether the last two times agreed. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import ConfigError

MAX_MATCH = 8
# How the occurrences before speak: only one; the last two say the same; the last two differ.
NUM_SUPPORTS = 3
ONCE, AGREED, DIFFERED = range(NUM_SUPPORTS)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A token, the length of the match (1 to `MAX_MATCH`) and its support (`ONCE`, `AGREED` or `DIFFERED`)."""

    token: int
    match: int
    support: int


class ContextLookup:
    """Suffix index over the settled tokens of one text.

    Args:
        token_ids: the text so far.
    """

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        # suffix -> (what followed it last, support)
        self._followers: dict[tuple[int, ...], tuple[int, int]] = {}
        self._tail: list[int] = []
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Settle more tokens."""
        for token in token_ids:
            for length in range(1, len(self._tail) + 1):
                suffix = tuple(self._tail[-length:])
                before = self._followers.get(suffix)
                support = ONCE if before is None else AGREED if before[0] == token else DIFFERED
                self._followers[suffix] = (token, support)
            self._tail = [*self._tail, token][-MAX_MATCH:]

    def propose(self, pending: Sequence[int] = ()) -> Proposal | None:
        """What followed the longest known suffix; None where even the last token is new.

        Args:
            pending: tokens after the settled ones (drafts), which the suffix includes but the index does not.
        """
        context = [*self._tail, *pending][-MAX_MATCH:]
        for length in range(len(context), 0, -1):
            follower = self._followers.get(tuple(context[-length:]))
            if follower is not None:
                return Proposal(follower[0], length, follower[1])
        return None


@dataclass(frozen=True, slots=True)
class LookupTable:
    """Confidence of a proposal by match length and support: `MAX_MATCH` rows of `NUM_SUPPORTS` numbers in [0, 1]."""

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.rows]
        if shape != [NUM_SUPPORTS] * MAX_MATCH or not all(0.0 <= cell <= 1.0 for row in self.rows for cell in row):
            raise ConfigError(f"lookup is not {MAX_MATCH} rows of {NUM_SUPPORTS} numbers from 0 to 1")

    def confidence(self, proposal: Proposal) -> float:
        """Calibrated chance that the proposal is right."""
        return self.rows[proposal.match - 1][proposal.support]

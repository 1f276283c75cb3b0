"""`LookupTraces`: what the lookup (the depth-0 exit) would have proposed on logged text, and its confidence table.

Needs no model: token ids and the base's choices are enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.drafting.lookup import MAX_MATCH, NUM_SUPPORTS, ContextLookup, LookupTable
from train.calibration.reliability import expected_calibration_error

# Weight of a cell's prior, in positions: the share of a few proposals alone is unreliable.
PRIOR_WEIGHT = 8.0
# Drafts logged after a wrong one: about the length of the longest round in a replay.
FOLLOWED = 15
NOTHING = ((0,) * FOLLOWED,) * 2


@dataclass(frozen=True, slots=True)
class LookupTraces:
    """Proposals at N response positions.

    Attributes:
        match: length of the match, shape [N]; 0 where nothing was proposed.
        support: see `runtime.drafting.lookup`, shape [N].
        correct: whether the proposal is the base's choice, shape [N].
        token: the proposal, shape [N]; -1 where nothing was proposed.
        after_wrong: match and support of the lookup's next proposals after a wrong one of its own, shape
            [2, FOLLOWED, N]; match is 0 after a correct proposal and where the lookup would propose nothing.
    """

    match: NDArray[np.int64]
    support: NDArray[np.int64]
    correct: NDArray[np.bool_]
    token: NDArray[np.int64]
    after_wrong: NDArray[np.int64]

    @classmethod
    def collect(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]], targets: Iterable[int]) -> "LookupTraces":
        """Run the lookup over texts as the runtime would, one token at a time.

        Args:
            rows: prompt ids and response ids of each text.
            targets: the base's choice at each response position, text after text.
        """
        proposals, behind = [], []
        choices = iter(targets)
        for prompt, response in rows:
            lookup = ContextLookup(prompt[:-1])
            for newest in [prompt[-1], *response[:-1]]:
                proposal = lookup.propose([newest])
                choice = next(choices)
                proposals.append(
                    (0, 0, False, -1)
                    if proposal is None
                    else (proposal.match, proposal.support, proposal.token == choice, proposal.token)
                )
                lost = proposal is not None and proposal.token != choice
                behind.append(_followed(lookup, newest) if lost else NOTHING)
                lookup.extend([newest])
        match, support, correct, token = map(np.array, zip(*proposals, strict=True))
        return cls(match, support, correct, token, np.moveaxis(np.array(behind), 0, -1))

    def fit(self) -> LookupTable:
        """Fit the table: share of correct proposals by match length and support, shrunk towards that of the length."""
        proposed = self.match > 0
        overall = float(self.correct[proposed].mean()) if proposed.any() else 0.0
        rows = []
        for length in range(1, MAX_MATCH + 1):
            of_length = self.match == length
            prior = _share(self.correct[of_length], overall)
            cells = [
                _share(self.correct[of_length & (self.support == support)], prior) for support in range(NUM_SUPPORTS)
            ]
            rows.append(tuple(round(cell, 4) for cell in cells))
        return LookupTable(tuple(rows))

    def report(self, table: LookupTable) -> dict[str, float]:
        """Figures for `calibration.json`: shares of positions with a (correct) proposal, precision and ECE."""
        proposed = self.match > 0
        confidence = self.confidences(table)
        return {
            "proposed": float(proposed.mean()),
            "agreement": float(self.correct.mean()),
            "precision": float(self.correct[proposed].mean()) if proposed.any() else 0.0,
            "ece": expected_calibration_error(confidence, self.correct),
        }

    def confidences(self, table: LookupTable) -> NDArray[np.float32]:
        """Calibrated confidence at each position, shape [N]; 0 where nothing was proposed."""
        return _looked_up(table, self.match, self.support)

    def confidences_after_wrong(self, table: LookupTable) -> NDArray[np.float32]:
        """Calibrated confidence of each proposal of `after_wrong`, shape [FOLLOWED, N]."""
        return _looked_up(table, *self.after_wrong)


def _followed(lookup: ContextLookup, newest: int) -> tuple[tuple[int, ...], ...]:
    """Match and support of the `FOLLOWED` proposals after the one for `newest`; each continues the ones before it."""
    followed: list[tuple[int, int]] = []
    pending = [newest]
    while len(followed) <= FOLLOWED and (proposal := lookup.propose(pending)) is not None:
        followed.append((proposal.match, proposal.support))
        pending.append(proposal.token)
    followed += [(0, 0)] * (1 + FOLLOWED - len(followed))
    return tuple(zip(*followed[1:], strict=True))


def _looked_up(table: LookupTable, match: NDArray[np.int64], support: NDArray[np.int64]) -> NDArray[np.float32]:
    cells = np.array(table.rows)[np.maximum(match, 1) - 1, support]
    return np.where(match > 0, cells, 0.0).astype(np.float32)


def _share(correct: NDArray[np.bool_], prior: float) -> float:
    return (float(correct.sum()) + PRIOR_WEIGHT * prior) / (len(correct) + PRIOR_WEIGHT)

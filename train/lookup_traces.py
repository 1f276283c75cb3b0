"""The depth-0 exit on logged text: what the lookup would have proposed, and the table of its confidence.

Knows no model: token ids and the base's choices are enough.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.lookup import MAX_MATCH, NUM_SUPPORTS, ContextLookup, LookupTable
from train.reliability import expected_calibration_error

# Positions that the prior of a cell counts for: few proposals say little.
PRIOR_WEIGHT = 8.0


@dataclass(frozen=True, slots=True)
class LookupTraces:
    """Proposals at N response positions.

    Attributes:
        match: length of the match, shape [N]; 0 where nothing was proposed.
        support: see `runtime.lookup`, shape [N].
        right: whether the proposal is the base's choice, shape [N].
    """

    match: NDArray[np.int64]
    support: NDArray[np.int64]
    right: NDArray[np.bool_]

    @classmethod
    def collect(cls, rows: Iterable[tuple[Sequence[int], Sequence[int]]], targets: Iterable[int]) -> "LookupTraces":
        """Run the lookup over texts as the runtime would, one token at a time.

        Args:
            rows: prompt ids and response ids of each text.
            targets: the base's choice at each response position, text after text.
        """
        found = []
        choices = iter(targets)
        for prompt, response in rows:
            lookup = ContextLookup(prompt[:-1])
            for newest in [prompt[-1], *response[:-1]]:
                proposal = lookup.propose([newest])
                choice = next(choices)
                found.append(
                    (0, 0, False) if proposal is None else (proposal.match, proposal.support, proposal.token == choice)
                )
                lookup.extend([newest])
        match, support, right = zip(*found, strict=True)
        return cls(np.array(match), np.array(support), np.array(right))

    def fit(self) -> LookupTable:
        """Share of right proposals by match length and support, drawn to the share of its match length."""
        proposed = self.match > 0
        overall = float(self.right[proposed].mean()) if proposed.any() else 0.0
        rows = []
        for length in range(1, MAX_MATCH + 1):
            of_length = self.match == length
            prior = _share(self.right[of_length], overall)
            cells = [
                _share(self.right[of_length & (self.support == support)], prior) for support in range(NUM_SUPPORTS)
            ]
            rows.append(tuple(round(cell, 4) for cell in cells))
        return LookupTable(tuple(rows))

    def report(self, table: LookupTable) -> dict[str, float]:
        """Share of positions with a proposal, share of those that are right, and ECE; for `calibration.json`."""
        proposed = self.match > 0
        sure = self.confidences(table)
        return {
            "proposed": float(proposed.mean()),
            "agreement": float(self.right.mean()),
            "precision": float(self.right[proposed].mean()) if proposed.any() else 0.0,
            "ece": expected_calibration_error(sure, self.right),
        }

    def confidences(self, table: LookupTable) -> NDArray[np.float32]:
        """Calibrated confidence at each position, shape [N]; 0 where nothing was proposed."""
        cells = np.array(table.rows)[np.maximum(self.match, 1) - 1, self.support]
        return np.where(self.match > 0, cells, 0.0).astype(np.float32)


def _share(right: NDArray[np.bool_], prior: float) -> float:
    return (float(right.sum()) + PRIOR_WEIGHT * prior) / (len(right) + PRIOR_WEIGHT)

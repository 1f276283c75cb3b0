"""What the heads would be worth if the fit ended now: replay of held-out text with the runtime's policy.

Good agreement can go with poor acceptance; accepted length and speed are what users see. Knows no loop and no files.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.calibration.lookup_traces import LookupTraces
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.search import best_uniform


class Simulation:
    """Figures of heads on the held-out texts; the lookup is asked once, for it does not learn.

    Args:
        rows: prompt ids and response ids of each text.
        costs: of the parts of a round.
    """

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], costs: CostTable) -> None:
        self.rows = rows
        self.costs = costs
        self._lookup: tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]] | None = None

    def figures(
        self,
        confidence: dict[int, NDArray[np.float32]],
        correct: dict[int, NDArray[np.bool_]],
        targets: NDArray[np.int64],
    ) -> dict[str, float]:
        """`held_out/accepted_length` and `held_out/predicted_speedup` under the best single threshold.

        Args:
            confidence: exit layer -> confidence at T = 1, shape [ages, N]. (Temperatures are fitted after the heads.)
            correct: exit layer -> whether the draft is the base's choice, shape [ages, N].
            targets: the base's choice, shape [N].
        """
        if self._lookup is None:
            found = LookupTraces.collect(self.rows, targets.tolist())
            table = found.fit()
            self._lookup = found.confidences(table), found.correct, found.confidences_after_wrong(table)
        lengths = [len(response) for _, response in self.rows]
        traces = Traces.join(
            confidence | {0: self._lookup[0]},
            correct | {0: self._lookup[1]},
            np.repeat(np.arange(len(lengths)), lengths),
            np.array([len(prompt) for prompt, _ in self.rows]),
            after_wrong=self._lookup[2],
        )
        if len(traces) == traces.num_sequences:  # one token each: the prompts' own forwards give them all
            return {}
        best = best_uniform(traces, self.costs)
        return {
            "held_out/accepted_length": best.mean_accepted_length,
            "held_out/predicted_speedup": best.speedup,
        }

"""`Simulation`: accepted length and speed if the fit ended now, by replay of held-out text with the runtime's policy.

High agreement does not ensure high acceptance; accepted length and speed are what users see. Reads no files.
"""

from collections.abc import Sequence

from runtime.drafting.lookup import LookupTable
from train.calibration.exit_log import ExitLog
from train.calibration.lookup_traces import LookupTraces
from train.calibration.traces import Traces
from train.replay.costs import CostTable
from train.replay.search import best_uniform


class Simulation:
    """Figures of heads on the held-out texts; the lookup runs only once, because it does not learn.

    Args:
        rows: prompt ids and response ids of each text.
        costs: of the parts of a round.
    """

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], costs: CostTable) -> None:
        self.rows = rows
        self.costs = costs
        self._lookup: tuple[LookupTraces, LookupTable] | None = None

    def figures(self, exits: ExitLog) -> dict[str, float]:
        """`held_out/accepted_length` and `held_out/predicted_speedup` under the best single threshold.

        Args:
            exits: with confidences at T = 1. (Temperatures are fitted after the heads.)
        """
        if self._lookup is None:
            log = LookupTraces.collect(self.rows, exits.targets.tolist())
            self._lookup = log, log.fit()
        traces = Traces.of(self.rows, exits, self._lookup)
        if len(traces) == traces.num_sequences:  # one token each: prefill emits them all
            return {}
        best = best_uniform(traces, self.costs)
        return {
            "held_out/accepted_length": best.mean_accepted_length,
            "held_out/predicted_speedup": best.speedup,
        }

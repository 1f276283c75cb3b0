"""`Contention`: how much of the time other work had the core that this thread would have had."""

import time
from dataclasses import replace

from train.replay.costs import CostTable

NOTICED = 0.1  # a share from which costs are off by more than noise


class Contention:
    """Begins to count when it is made.

    A thread that computes, or waits for a device, is on a core all the time, unless something else has it.
    """

    def __init__(self) -> None:
        self._began, self._had = time.perf_counter(), time.thread_time()

    @property
    def share(self) -> float:
        """Of the time since then, the part that this thread had no core."""
        return max(0.0, 1.0 - (time.thread_time() - self._had) / (time.perf_counter() - self._began))

    def told(self, costs: CostTable) -> CostTable:
        """The costs, with a condition `busy` where they were measured beside much other work."""
        share = self.share
        if share < NOTICED:
            return costs
        busy = f"other work had the cores {share:.0%} of the time: profile again when they are free"
        return replace(costs, conditions={**costs.conditions, "busy": busy})

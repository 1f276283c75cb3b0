"""Alarms of a fit: heads that learn nothing, and a loss that rises. Knows no loop; it reads figures."""

import logging
import math
from collections.abc import Mapping

from runtime.errors import ConfigError

logger = logging.getLogger(__name__)

STEPS_WITHOUT_GRADIENT = 10
RISEN = 1.5  # times the loss at the start
BEYOND_CHANCE = 1.2  # times the cross-entropy of a guess that knows nothing: below it, batches differ by themselves
FEWEST, MOST = 3, 50  # steps above both that end a fit: a twentieth of all, within these


class Alarms:
    """Says once of each head that gets no gradient, and at each evaluation which heads are no better than chance."""

    def __init__(self) -> None:
        self._without: dict[int, int] = {}

    def gradients(self, norms: Mapping[int, float]) -> None:
        """The norms of one step: exit layer -> norm of the gradient of its head."""
        for layer, norm in norms.items():
            self._without[layer] = 0 if norm else self._without.get(layer, 0) + 1
            if self._without[layer] == STEPS_WITHOUT_GRADIENT:
                logger.warning(
                    "the head of exit layer %d had no gradient in %d steps: it learns nothing; see that the draft"
                    " vocabulary holds what the base says",
                    layer,
                    STEPS_WITHOUT_GRADIENT,
                )

    def agreement(self, values: Mapping[str, float], chance: float) -> dict[str, float]:
        """`alarm/dead/layer_<NN>`, 1 for each head whose agreement is not above chance.

        Args:
            values: figures of an evaluation, with `held_out/agreement/layer_<NN>`.
            chance: agreement of always drafting the token that the base says most.
        """
        alarms = {}
        for key, agreement in values.items():
            if "/agreement/" in key and agreement <= chance:
                layer = key.rpartition("/")[2]
                alarms[f"alarm/dead/{layer}"] = 1.0
                logger.warning(
                    "the head of %s is right at %.3f of the positions; always the same token would be at %.3f",
                    layer.replace("layer_", "exit layer "),
                    agreement,
                    chance,
                )
        return alarms


class Divergence:
    """Ends a fit whose loss has stayed far above its start, which is what too high a learning rate does.

    It reads the loss of all processes, which is the same on each, so that they end together. A step far above counts
    one, and any other takes one away, so that no spike and no noise ends a fit.

    Args:
        total: steps of the whole fit.
        vocabulary: tokens that the heads can draft.
        start, risen: where an earlier run of the fit left them.

    Attributes:
        start: the loss of the first step; None before it.
        risen: steps counted.
    """

    def __init__(self, learning_rate: float, *, total: int, vocabulary: int, start: float | None, risen: int) -> None:
        self.learning_rate, self.start, self.risen = learning_rate, start, risen
        self.steps = min(max(FEWEST, total // 20), MOST)
        self.floor = BEYOND_CHANCE * math.log(vocabulary)

    def look(self, loss: float, *, step: int, whole: bool) -> None:
        """Take the loss of one step; one that lacks batches, so is not `whole`, says only whether it is a number.

        Raises:
            ConfigError: the fit diverges.
        """
        if whole and math.isfinite(loss):
            self.start = loss if self.start is None else self.start
            self.risen = max(0, self.risen + (1 if loss > max(RISEN * self.start, self.floor) else -1))
        # A batch that is left out counts as 0, so only heads that are no numbers give a loss that is none.
        if self.risen >= self.steps or not math.isfinite(loss):
            began = "" if self.start is None else f", {self.start:.2f} at the start"
            raise ConfigError(
                f"the fit diverges: the loss is {loss:.2f} at step {step}{began}; set learning_rate to"
                f" {self.learning_rate / 10:g} or less ({self.learning_rate:g} now), with another output_dir"
            )

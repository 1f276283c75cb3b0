"""Alarms of a fit: heads that learn nothing. Knows no loop; it reads figures."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

STEPS_WITHOUT_GRADIENT = 10


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

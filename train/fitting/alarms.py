"""Alarms of a fit: heads that learn nothing, a loss or a gradient that rises. Knows no loop; it reads figures."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from runtime.errors import ConfigError
from train.fitting.checkpoints import FitState
from train.settings.fit_config import FitConfig

logger = logging.getLogger(__name__)

STEPS_WITHOUT_GRADIENT = 10
RISEN = 1.5  # times the loss at the start
BEYOND_CHANCE = 1.2  # times the cross-entropy of a guess that knows nothing: below it, batches differ by themselves
FALLEN_BACK = 3.0  # times the lowest mean loss: what was learnt is lost, also where it is no worse than at the start
EXPLODED = 100.0  # times the largest gradient of the first steps
FEWEST, MOST = 3, 50  # bad steps that end a fit: a twentieth of all, within these


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
                    "the head of exit layer %d had no gradient in %d steps: it learns nothing; raise draft_vocab_size"
                    " if it does not cover the text, or leave the layer out of exit_layers",
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


def dead_heads(evaluations: Iterable[Mapping[str, float]]) -> list[int]:
    """Exit layers whose heads were above chance in none of these evaluations.

    Args:
        evaluations: lines of the log; those without `held_out/chance` are passed over.
    """
    gains: dict[int, float] = {}
    for values in evaluations:
        for key in values:
            if key.startswith("held_out/agreement/"):
                layer, gain = int(key.rpartition("_")[2]), values[key] - values["held_out/chance"]
                gains[layer] = max(gain, gains.get(layer, gain))
    return sorted(layer for layer, gain in gains.items() if gain <= 0)


def name_dead_heads(evaluations: Iterable[Mapping[str, float]], learning_rate: float) -> None:
    """Say of each head that was never above chance what to change; at the end of a fit."""
    for layer in dead_heads(evaluations):
        logger.warning(
            "the head of exit layer %d was never better than always the same token: leave %d out of exit_layers or"
            " take a deeper one, give more text or a higher num_train_epochs, or another learning_rate (%g now)",
            layer,
            layer,
            learning_rate,
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """Ends a fit whose loss or gradient has stayed far above what it was; too high a learning rate does that.

    It reads the loss of all processes, which is the same on each, so that they end together. A bad step counts one,
    and any other takes one away, so that no spike and no noise ends a fit.

    Attributes:
        steps: bad steps that end the fit.
        floor: a loss that is high wherever the fit began.
    """

    config: FitConfig
    steps: int
    floor: float

    @classmethod
    def of(cls, config: FitConfig, *, total: int, vocabulary: int) -> "Divergence":
        """For a fit of `total` steps, whose heads can draft `vocabulary` tokens."""
        return cls(config, min(max(FEWEST, total // 20), MOST), BEYOND_CHANCE * math.log(vocabulary))

    def look(self, state: FitState, loss: float, *, norm: float | None, whole: bool) -> FitState:
        """Take the figures of the step that has just been done; returns the state with what is kept of them.

        Args:
            state: its step is counted already.
            norm: of the gradient of all heads before clipping; None where it is not known.
            whole: whether no batch was left out; otherwise the loss says only whether it is a number.

        Raises:
            ConfigError: the fit diverges.
        """
        reason = self._reason(state, loss, norm)
        if whole and math.isfinite(loss):
            state = self._kept(state, loss, norm, bad=bool(reason))
        # A batch that is left out counts as 0, so only heads that are no numbers give a loss that is none.
        if not math.isfinite(loss):
            reason = f"the loss is {loss:.2f} at step {state.step}" + _began(state)
        elif state.risen < self.steps:
            return state
        rate, warmup = self.config.learning_rate, self.config.warmup_ratio
        raise ConfigError(
            f"the fit diverges: {reason}; set learning_rate to {rate / 10:g} or less ({rate:g} now), or raise"
            f" warmup_ratio ({warmup:g} now), with another output_dir"
        )

    def _reason(self, state: FitState, loss: float, norm: float | None) -> str:
        """What is bad about a step, in words; nothing where it is as steps are."""
        here = f"at step {state.step}"
        if state.start is not None and loss > max(RISEN * state.start, self.floor):
            return f"the loss is {loss:.2f} {here}" + _began(state)
        if state.low is not None and loss > FALLEN_BACK * state.low:
            return f"the loss is {loss:.2f} {here}, after a mean of {state.low:.2f}"
        if norm is not None and state.norm is not None and state.step > self.steps and norm > EXPLODED * state.norm:
            return f"the gradient has norm {norm:.3g} {here}, {state.norm:.3g} at most in its first steps"
        return ""

    def _kept(self, state: FitState, loss: float, norm: float | None, *, bad: bool) -> FitState:
        mean = loss if state.mean is None else state.mean + (loss - state.mean) / self.steps
        low, largest = state.low, state.norm
        if state.step >= self.steps:  # before, it is the mean of too few
            low = mean if low is None else min(low, mean)
        if state.step <= self.steps and norm is not None:
            largest = norm if largest is None else max(largest, norm)
        start = loss if state.start is None else state.start
        return replace(
            state, start=start, mean=mean, low=low, norm=largest, risen=max(0, state.risen + (1 if bad else -1))
        )


def _began(state: FitState) -> str:
    return "" if state.start is None else f", {state.start:.2f} at the start"

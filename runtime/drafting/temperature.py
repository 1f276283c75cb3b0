"""Exit temperatures: one positive number per exit layer that turns draft logits into an honest confidence.

Not the sampling temperature. Knows nothing of models, heads or thresholds.

Source: SpecBound (arXiv 2604.12247), annealed confidence threshold: `T_l = 1 + alpha (1 - l / L)`; the `fitted`
and `monotone` schedules, one temperature per exit by held-out likelihood, go beyond the paper.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import ConfigError
from runtime.fields import shown

SCHEDULE_KINDS = ("none", "linear", "fitted", "monotone")
MAX_TEMPERATURE = 1000.0


def linear_temperature(alpha: float, layer: int, num_hidden_layers: int) -> float:
    """The paper's `T_l = 1 + alpha (1 - l / L)`; shallow layers are softened most.

    Args:
        alpha: slope, greater than -1 so that every temperature is positive.
        layer: number of decoder layers below the exit.
        num_hidden_layers: L, layers of the base.
    """
    return 1.0 + alpha * (1.0 - layer / num_hidden_layers)


def confidence(logits: Tensor, temperature: float) -> Tensor:
    """Largest probability of `softmax(logits / temperature)`, in float32.

    Args:
        logits: draft logits, shape [..., draft vocabulary], any float dtype.
        temperature: exit temperature, greater than 0.

    Returns:
        Tensor of shape [...], float32, in (0, 1].
    """
    return torch.softmax(logits.float() / temperature, dim=-1).amax(dim=-1)


def likeliest(logits: Tensor, temperature: float, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest probabilities of `softmax(logits / temperature)`, float32, and where they are, int64.

    Args:
        logits: as `confidence` takes them.

    Returns:
        Two tensors of shape [..., count], most likely first.
    """
    values, indices = torch.softmax(logits.float() / temperature, dim=-1).topk(count, dim=-1)
    return values, indices


@dataclass(frozen=True, slots=True)
class TemperatureSchedule:
    """Exit temperatures by exit layer.

    Attributes:
        kind: `none` (all 1), `linear` (the paper's, from `alpha`), `fitted` (one per exit) or
            `monotone` (one per exit, never rising with depth).
        temperatures: exit layer -> temperature.
        alpha: slope of the linear schedule; None for the other kinds.
    """

    kind: str
    temperatures: Mapping[int, float]
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULE_KINDS:
            raise ConfigError(f"temperature schedule {shown(self.kind)} is unknown: expected one of {SCHEDULE_KINDS}")
        for layer, value in self.temperatures.items():
            if not (math.isfinite(value) and 0.0 < value <= MAX_TEMPERATURE):
                raise ConfigError(
                    f"exit temperature of layer {layer} is {value}: expected a number in (0, {MAX_TEMPERATURE:g}]"
                )

    @classmethod
    def none(cls, exit_layers: list[int]) -> "TemperatureSchedule":
        """The schedule that leaves logits as they are: T = 1 at every exit."""
        return cls("none", dict.fromkeys(exit_layers, 1.0))

    @classmethod
    def linear(cls, alpha: float, exit_layers: list[int], num_hidden_layers: int) -> "TemperatureSchedule":
        """The paper's schedule for these exits."""
        temperatures = {layer: linear_temperature(alpha, layer, num_hidden_layers) for layer in exit_layers}
        return cls("linear", temperatures, alpha)

    def __getitem__(self, layer: int) -> float:
        return self.temperatures[layer]

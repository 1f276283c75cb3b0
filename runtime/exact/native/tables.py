"""What the kernels look up: cosines and sines of positions, and an activation of every number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RotaryTables:
    """Cosines and sines of a block's positions, in the operations of a model's own rotary module.

    They depend on the position alone; there is one table for each kind of layer.

    Shape suffixes: K kinds of layers, T tokens of the block, R numbers of a head that are turned.

    Args:
        rotary: the module; its frequencies are read where they are.
        kinds: of layers that have tables of their own; one empty name where all have the same.
        rounds: whether tables are rounded to bfloat16.
    """

    def __init__(self, rotary: Any, kinds: Sequence[str], rounds: bool) -> None:
        names = [f"{kind}_" if kind else "" for kind in kinds]
        self.kinds = list(kinds)
        self.frequencies: list[Tensor] = [getattr(rotary, f"{name}inv_freq") for name in names]
        self.magnitudes: list[float] = [getattr(rotary, f"{name}attention_scaling") for name in names]
        self.rounds = rounds

    @property
    def turned(self) -> int:
        """R, the same for all kinds."""
        (size,) = {2 * len(frequencies) for frequencies in self.frequencies}
        return size

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [K, T, R] of positions [1, T], float32."""
        both = [self._of(position_ids, *kind) for kind in zip(self.frequencies, self.magnitudes, strict=True)]
        cosines, sines = zip(*both, strict=True)
        return torch.cat(cosines), torch.cat(sines)

    def _of(self, position_ids: Tensor, frequencies: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
        """Of one kind, [1, T, R]."""
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), -1)
        cosines, sines = angles.cos(), angles.sin()
        if magnitude != 1.0:
            cosines, sines = cosines * magnitude, sines * magnitude
        if self.rounds:
            cosines, sines = cosines.to(torch.bfloat16).float(), sines.to(torch.bfloat16).float()
        return cosines, sines


def table_of(activation: nn.Module) -> Tensor:
    """Torch's answer for every bfloat16, by its bits; one more, since the kernel reads words of two."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return functional.pad(activation(bits.view(torch.bfloat16)), (0, 1))

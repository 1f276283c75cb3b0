"""What the kernels look up: cosines and sines of positions, and an activation of every number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Positions whose cosines and sines are kept: a round asks for the same ones several times.
KEPT = 1024


class RotaryTables:
    """Cosines and sines of positions, in the operations of a model's own rotary module.

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
        self.forget()
        with torch.inference_mode(False):  # a tensor that is made in inference mode cannot be written outside of it
            self._kept = torch.empty(2, len(names), KEPT, self.turned)

    @property
    def turned(self) -> int:
        """R, the same for all kinds."""
        (size,) = {2 * len(frequencies) for frequencies in self.frequencies}
        return size

    def forget(self) -> None:
        """Compute all anew, from the frequencies as they are now: a write through `.data` is seen by nobody."""
        self._at: list[int | None] = [None] * KEPT  # the position that stands at a place of the tables kept

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """Cosines, then sines [2, K, T, R] of T positions, float32, contiguous."""
        places = [position % KEPT for position in positions]
        new = [position for position, place in zip(positions, places, strict=True) if self._at[place] != position]
        if new:
            at = [position % KEPT for position in new]
            self._kept[:, :, at] = self._of_all(new)
            for position, place in zip(new, at, strict=True):
                self._at[place] = position
            if [self._at[place] for place in places] != list(positions):
                return self._of_all(positions)  # two of them have one place
        first, last = places[0], places[-1]
        if len(self.frequencies) == 1 and places == list(range(first, last + 1)):
            return torch.stack([kept[:, first : last + 1] for kept in self._kept])
        return self._kept[:, :, places]

    def _of_all(self, positions: Sequence[int]) -> Tensor:
        """Of all kinds, [2, K, T, R]."""
        given = torch.tensor(positions, device=self.frequencies[0].device)
        kinds = zip(self.frequencies, self.magnitudes, strict=True)
        return torch.stack([torch.stack(self._of(given, *kind)) for kind in kinds], 1)

    def _of(self, positions: Tensor, frequencies: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
        """Of one kind, [T, R] each."""
        angles = positions[:, None].float() * frequencies
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

"""`TreeRows`: the rows of a block that do not follow one another, each with its own path. Knows no model and no draft.

Each row sees the settled keys, then those on its path, its own last. A block whose rows follow one another needs none
of this: there row t sees what row t - 1 sees, and itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes. Torch allocates so; some kernels add in another order where a row of a block, such as LoRA's, lies otherwise.
ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TreeRows:
    """What each row of a block sees.

    Attributes:
        settled: keys that all rows see, the first ones of the cache.
        paths: of each row, the places of the other keys that it sees, counted from the settled ones on, in the order
            of the text; the last is its own.
    """

    settled: int
    paths: tuple[tuple[int, ...], ...]

    def positions(self, first: int) -> list[int]:
        """Positions of the rows; `first` is that of the first row."""
        start = first - len(self.paths[0])
        return [start + len(path) for path in self.paths]

    def keys(self, row: int, device: torch.device) -> Tensor:
        """Places in the cache of the keys that a row sees, in order, shape [keys], int64."""
        path = torch.tensor(self.paths[row], device=device) + self.settled
        return torch.cat([torch.arange(self.settled, device=device), path])

    def hidden(self, length: int, device: torch.device) -> Tensor:
        """Which of `length` keys each row does not see, shape [T, length], bool."""
        hidden = torch.ones(len(self.paths), length, dtype=torch.bool)
        hidden[:, : self.settled] = False
        for row, path in enumerate(self.paths):
            hidden[row, torch.tensor(path) + self.settled] = False
        return hidden.to(device)

    def table(self, length: int) -> Tensor:
        """For our kernel: of each row, the length of its path and the path, [T, 1 + length - settled], int64."""
        room = length - self.settled
        return torch.tensor([[len(path), *path, *[0] * (room - len(path))] for path in self.paths])


def is_chain(paths: Sequence[tuple[int, ...]], first: int) -> bool:
    """Whether rows follow one another, the first of them at place `first` behind the settled ones."""
    return all(len(path) == first + index + 1 for index, path in enumerate(paths))


def as_alone(part: Tensor) -> Tensor:
    """A part of a block as it would lie alone: with the strides of its own, which decide how torch multiplies."""
    alone = part.reshape(-1).view(part.shape)
    return alone.clone() if alone.data_ptr() % ALIGNMENT else alone

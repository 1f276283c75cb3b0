"""An attention head on whole texts, as it will draft: `unrolled` gives its states draft by draft.

At step j every response position is taken as the j-th draft of a round: the verified states end j positions before it,
and what lies between has the head's own states and keys of the steps before (EAGLE-3's training-time test).

Shape suffixes: B texts, S positions, R response positions, D hidden size, H query heads, G key heads, E head size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from runtime.drafting.exit_head import NONE, OWN, VERIFIED, WholeTexts
from runtime.drafting.unembedding import DraftUnembedding

LOWEST = -1e4


class Attending(Protocol):
    """The two halves of an attention head, before and after it attends; see `AttentionHead`."""

    def read(
        self, hidden: Tensor, embedding: Tensor, deep: Tensor, source: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mix, queries, keys and values."""

    def write(self, mixed: Tensor, attended: Tensor) -> Tensor:
        """State before the base's norm."""


def unrolled(
    head: Attending, hidden: Tensor, texts: WholeTexts, unembedding: DraftUnembedding, *, steps: int
) -> list[Tensor]:
    """States [B, R, D], normed as the base's, of each step; at response position r of its first r + 1 steps only.

    Args:
        hidden: states at the exit, shape [B, S, D].
    """
    embedding, deep, device = texts.embedding, texts.deep, hidden.device
    positions = torch.arange(hidden.shape[1], device=device).expand(hidden.shape[:2])
    source = torch.where(positions == 0, NONE, VERIFIED)
    rows = (texts.start[:, None] + torch.arange(texts.chosen.shape[1], device=device)).clamp(max=hidden.shape[1] - 1)
    states: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for step in range(steps):
        mixed, queries, *own = head.read(hidden, embedding, deep, source, positions)
        keys.append(own[0])
        values.append(own[1])
        if step == 0:  # of positions before the response only keys and values are needed
            mixed, queries, hidden, embedding = (_at(each, rows) for each in (mixed, queries, hidden, embedding))
            positions = rows
        states.append(unembedding.normalize(head.write(mixed, attended(queries, keys, values, rows))))
        deep = _later(states[-1], 1)
        source = torch.full_like(rows, OWN)
    return states


def attended(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What queries [B, H, R, E] of step j attend to, same shape.

    Args:
        keys, values: of each step so far; of the first step [B, G, S, E], of later ones [B, G, R, E].
        rows: position of each query, shape [B, R].
    """
    step, (batch, heads, number, size), (groups, length) = len(keys) - 1, queries.shape, keys[0].shape[1:3]
    grouped = queries.reshape(batch, groups, -1, size) * size**-0.5  # the R queries of each head of a group
    seen = torch.arange(length, device=rows.device) <= rows[..., None] - step
    scores = (grouped @ keys[0].transpose(-1, -2)).view(batch, groups, -1, number, length)
    parts = [scores.masked_fill(~seen[:, None, None], LOWEST)]
    grouped = grouped.view(batch, groups, -1, number, size)
    place = torch.arange(number, device=rows.device)[:, None]
    for index in range(1, step + 1):  # of each later step one key: of the position that it would have drafted at
        own = (grouped * _later(keys[index], step - index)[:, :, None]).sum(-1, keepdim=True)
        parts.append(own.masked_fill(place < step - index, LOWEST))
    weights = torch.cat(parts, dim=-1).float().softmax(-1).to(values[0].dtype)
    total = weights[..., :length].reshape(batch, groups, -1, length) @ values[0]
    total = total.view(batch, groups, -1, number, size)
    for index in range(1, step + 1):
        share = weights[..., length + index - 1 : length + index]
        total = total + share * _later(values[index], step - index)[:, :, None]
    return total.reshape(batch, heads, number, size)


def _later(states: Tensor, count: int) -> Tensor:
    """States [R, D] moved `count` positions on, zeros first."""
    return functional.pad(states, (0, 0, count, 0))[..., : states.shape[-2], :] if count else states


def _at(states: Tensor, rows: Tensor) -> Tensor:
    """Those of states [B, ..., S, D] at `rows` [B, R]."""
    index = rows.view(len(rows), *[1] * (states.dim() - 3), rows.shape[1], 1)
    return states.gather(-2, index.expand(*states.shape[:-2], rows.shape[1], states.shape[-1]))

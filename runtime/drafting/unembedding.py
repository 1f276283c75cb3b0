"""`DraftUnembedding`: the base's frozen way from a hidden state to logits, for the tokens a head can draft.

Borrowed: its weights are the base's and never part of a head's state. Knows no head, no policy and no file.
"""

from typing import Protocol, cast

import torch
from torch import Tensor, nn


class Base(Protocol):
    """The parts of a base that drafting borrows."""

    norm: nn.Module
    unembedding: nn.Module
    logits_scaling: float


class DraftUnembedding:
    """The base's final norm and the rows of its unembedding for the draft vocabulary.

    Shape suffixes: N tokens (any leading shape), D hidden size, V draft vocabulary.

    Args:
        base: whose parts are used.
        draft_to_target: shape [V], int64, target token id of each draft id; None for the whole vocabulary, whose rows
            are not copied.
        dtype: of copied rows; the base's own where None.
    """

    def __init__(self, base: Base, draft_to_target: Tensor | None, *, dtype: torch.dtype | None = None) -> None:
        weight = cast(Tensor, base.unembedding.weight).detach()
        bias: Tensor | None = getattr(base.unembedding, "bias", None)
        if draft_to_target is not None:
            chosen = draft_to_target.to(weight.device)
            weight = weight[chosen]
            bias = None if bias is None else bias.detach()[chosen]
        self.is_copy = draft_to_target is not None
        self.norm = base.norm
        self.rows = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.rows.weight = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
        if bias is not None:
            self.rows.bias = nn.Parameter(bias if dtype is None else bias.to(dtype), requires_grad=False)
        self.scaling = base.logits_scaling

    @property
    def weight(self) -> Tensor:
        """Shape [V, D]."""
        return self.rows.weight

    @property
    def bias(self) -> Tensor | None:
        """Shape [V]; None where the base's unembedding has none."""
        return self.rows.bias

    @property
    def norm_scale(self) -> Tensor:
        """What the final norm multiplies each number by, shape [D]: as it makes it of ones, every other one negative.

        Families keep it in different ways: Gemma's norm holds one less.
        """
        signs = torch.ones_like(self.weight[0])
        signs[1::2] = -1
        scaled: Tensor = (self.normalize(signs) - self.normalize(-signs)) / 2 * signs
        return scaled

    def __call__(self, hidden: Tensor) -> Tensor:
        """Draft logits [N, V] of hidden states [N, D]."""
        return self.of_normed(self.normalize(hidden))

    def of_normed(self, normed: Tensor) -> Tensor:
        """Draft logits [N, V] of normed states [N, D]: the base's top states, and what `normalize` gives."""
        logits: Tensor = self.rows(normed)
        return logits / self.scaling if self.scaling != 1.0 else logits

    def normalize(self, hidden: Tensor) -> Tensor:
        """The base's final norm; a norm in another dtype than the head's rows is cast back."""
        normed: Tensor = self.norm(hidden)
        return normed.to(self.weight.dtype)

"""`ExitHead`: what exit heads of every kind have, and `HeadContext`: what they may read besides a hidden state.

Knows no kind of head, no policy, no cache and no file.

Shape suffixes: N tokens (any leading shape), D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from runtime.drafting.unembedding import DraftUnembedding

# Verified states older than this are of no use for the next token.
MAX_AGE = 4
# Age of the verified state at the first, second, ... draft of a round; 0: too old, and so for all further drafts.
AGES = (*range(1, MAX_AGE + 1), 0)
# Prompt positions that heads attend to: those just before the response.
PROMPT_TOKENS = 256
# Where heads that attend have the state of the position before from: nowhere, the base's verified one, their own.
NONE, VERIFIED, OWN = range(3)


@dataclass(frozen=True, slots=True)
class WholeTexts:
    """B texts of up to S positions, prompt positions included, padded on the right; R the longest response.

    Attributes:
        hidden: exit layer -> hidden states, shape [B, S, D].
        embedding: hidden states at depth 0, shape [B, S, D].
        deep: the base's top state, normed, at the position before, shape [B, S, D]; 0 at the first.
        start: index of the first response position, shape [B], int64.
        chosen: which response positions there are, shape [B, R], bool; N in all, text after text.
    """

    hidden: Mapping[int, Tensor]
    embedding: Tensor
    deep: Tensor
    start: Tensor
    chosen: Tensor


@dataclass(frozen=True, slots=True)
class SettledStates:
    """What the base knew at N consecutive settled positions of one request, for heads that attend.

    Attributes:
        hidden: hidden states at the exit, shape [N, D].
        embedding: hidden states at depth 0, shape [N, D].
        deep: the base's top state, normed, at the position before each, shape [N, D].
        known: whether there is such a state before the first of them.
    """

    hidden: Tensor
    embedding: Tensor
    deep: Tensor
    known: bool = True


@dataclass(frozen=True, slots=True)
class HeadContext:
    """What heads may read of N tokens besides their hidden states at the exit.

    Attributes:
        embedding: hidden states at depth 0, shape [N, D].
        deep: the base's top state, normed, at the newest position it has verified, shape [N, D]; 0 where too old.
        age: positions from there to the token, shape [N], int64, 1 to `MAX_AGE`; 0 where too old.
        texts: the whole texts that the tokens are from, for heads that attend; then N is the sum of their responses.

    Deep states and ages may have a leading dimension A: as many drafts of each token, one for each age.
    """

    embedding: Tensor
    deep: Tensor
    age: Tensor
    texts: WholeTexts | None = None

    @classmethod
    def join(cls, parts: Sequence["HeadContext"]) -> "HeadContext":
        """Those of several requests, one after the other."""
        embedding, deep = torch.cat([part.embedding for part in parts]), torch.cat([part.deep for part in parts])
        return cls(embedding, deep, torch.cat([part.age for part in parts]))


class ExitHead(nn.Module):
    """What heads of every kind have: sizes, and what they read and cost.

    Attributes:
        ages: those of `AGES` that make a difference to the head.
        borrows_rows: whether its logits come from the base's rows.
        attends: whether it reads positions before its own, as `WholeTexts` in fitting.
        rank: its inner width; None where it has none.
    """

    ages: ClassVar[tuple[int, ...]] = AGES[-1:]
    borrows_rows: ClassVar[bool] = True
    attends: ClassVar[bool] = False

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int | None) -> None:
        super().__init__()
        self.hidden_size, self.draft_vocab_size, self.rank = hidden_size, draft_vocab_size, rank

    def start(self, unembedding: DraftUnembedding) -> None:
        """Set the weights that fitting starts from; those it was made with, unless a kind says otherwise."""

    @property
    def num_weights(self) -> int:
        """Trained numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def weights_read(self) -> int:
        """Numbers read for one draft: its own, and the rows that it borrows."""
        return self.num_weights + (self.draft_vocab_size * self.hidden_size if self.borrows_rows else 0)

    @property
    def fit_flops(self) -> int:
        """Floating-point operations at one position, forward and backward; a product and a sum are two.

        A matrix takes two a weight forward, two for its gradient where it is trained, and two for the gradient of its
        input where something trained lies below.
        """
        raise NotImplementedError

    @property
    def kept_numbers(self) -> int:
        """Numbers kept of one position until the head goes backward, its logits left out."""
        raise NotImplementedError

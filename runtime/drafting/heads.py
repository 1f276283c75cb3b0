"""`ExitHead` and its kinds, `ExitHeads`: hidden state at an exit layer, and more of the token -> draft logits.

All that differs between kinds is a method here: what a head reads, how it starts, what it costs. A head holds only
what was trained; the base's norm and unembedding rows come from outside. Knows no policy, no cache and no file.

Shape suffixes: N tokens (any leading shape), D hidden size, R rank, V draft vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.drafting.unembedding import DraftUnembedding
from runtime.errors import ConfigError

LORA_ALPHA_PER_RANK = 2.0
# Verified states older than this are of no use for the next token.
MAX_AGE = 4
# Age of the verified state at the first, second, ... draft of a round; 0: too old, and so for all further drafts.
AGES = (*range(1, MAX_AGE + 1), 0)


@dataclass(frozen=True, slots=True)
class HeadContext:
    """What heads may read of N tokens besides their hidden states at the exit.

    Attributes:
        embedding: hidden states at depth 0, shape [N, D].
        deep: the base's top state, normed, at the newest position it has verified, shape [N, D]; 0 where too old.
        age: positions from there to the token, shape [N], int64, 1 to `MAX_AGE`; 0 where too old.
    """

    embedding: Tensor
    deep: Tensor
    age: Tensor


class ExitHead(nn.Module):
    """What heads of every kind have: sizes, and what they read and cost.

    Attributes:
        ages: those of `AGES` that make a difference to the head.
        borrows_rows: whether its logits come from the base's rows.
        rank: its inner width; None where it has none.
    """

    ages: ClassVar[tuple[int, ...]] = AGES[-1:]
    borrows_rows: ClassVar[bool] = True

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


class DeepHead(ExitHead):
    """A gated block on the hidden state, the token's embedding and the base's newest verified top state, with its age.

    That state is what the base itself predicted the token before from, so a shallow layer learns what the deep
    ones were about to say (the idea of EAGLE, arXiv 2401.15077, here without a layer of its own). The embedding tells
    a shallow layer which token it stands on.
    """

    ages = AGES

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__(hidden_size, draft_vocab_size, rank)
        self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.embedding_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.deep_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.age = nn.Parameter(torch.zeros(MAX_AGE + 1, hidden_size))
        # The logit lens of the hidden state to begin with, but easily outweighed: at a shallow layer it says little.
        self.keep = nn.Parameter(torch.full((hidden_size,), 0.25))
        self.carry = nn.Parameter(torch.zeros(hidden_size))
        self.gate_up = nn.Linear(3 * hidden_size, 2 * rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D] and its context."""
        dtype = self.down.weight.dtype  # while fitting, heads are float32 on a base of any dtype
        hidden, embedding, deep = hidden.to(dtype), context.embedding.to(dtype), context.deep.to(dtype)
        parts = [
            self.hidden_norm(hidden),
            self.embedding_norm(embedding),
            self.deep_norm(deep) + self.age[context.age],
        ]
        gate, up = self.gate_up(torch.cat(parts, dim=-1)).chunk(2, dim=-1)
        skipped = self.keep * hidden + self.carry * deep
        return unembedding(skipped + self.down(functional.silu(gate) * up))

    @property
    def fit_flops(self) -> int:
        """As `ExitHead.fit_flops`."""
        matrices = self.gate_up.weight.numel() + self.down.weight.numel()
        return 6 * matrices + 4 * self.draft_vocab_size * self.hidden_size

    @property
    def kept_numbers(self) -> int:
        """As `ExitHead.kept_numbers`."""
        return 9 * self.hidden_size + 4 * self.down.in_features


class LinearHead(ExitHead):
    """The paper's head: a trained LM head on the normed hidden state."""

    borrows_rows = False

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__(hidden_size, draft_vocab_size, None)
        self.weight = nn.Parameter(torch.empty(draft_vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def start(self, unembedding: DraftUnembedding) -> None:
        """The base's own rows."""
        self.weight.data.copy_(unembedding.weight / unembedding.scaling)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the context is not read."""
        return functional.linear(unembedding.normalize(hidden).to(self.weight.dtype), self.weight)

    @property
    def fit_flops(self) -> int:
        """As `ExitHead.fit_flops`."""
        return 4 * self.draft_vocab_size * self.hidden_size

    @property
    def kept_numbers(self) -> int:
        """As `ExitHead.kept_numbers`."""
        return self.hidden_size


class LoraHead(ExitHead):
    """LoRA on the frozen unembedding, in PEFT's parametrisation: `W + (alpha / R) B A`. PEFT fits it."""

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__(hidden_size, draft_vocab_size, rank)
        self.lora_A = nn.Parameter(torch.empty(rank, hidden_size))
        self.lora_B = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the context is not read."""
        normed = unembedding.normalize(hidden)
        update = functional.linear(functional.linear(normed.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        logits = functional.linear(normed, unembedding.weight, unembedding.bias) + LORA_ALPHA_PER_RANK * update
        return logits / unembedding.scaling if unembedding.scaling != 1.0 else logits

    @property
    def num_weights(self) -> int:
        """As `ExitHead.num_weights`; by its sizes, for PEFT's twin has the base's rows among its parameters."""
        return cast(int, self.rank) * (self.hidden_size + self.draft_vocab_size)

    @property
    def fit_flops(self) -> int:
        """As `ExitHead.fit_flops`; nothing trained lies below the rows and A."""
        own = cast(int, self.rank) * (4 * self.hidden_size + 6 * self.draft_vocab_size)
        return own + 2 * self.draft_vocab_size * self.hidden_size

    @property
    def kept_numbers(self) -> int:
        """As `ExitHead.kept_numbers`."""
        return self.hidden_size + cast(int, self.rank)


_KINDS = {"deep": DeepHead, "linear": LinearHead, "lora": LoraHead}
HEAD_KINDS = tuple(_KINDS)


class ExitHeads(nn.Module):
    """One head of one kind per exit layer; its state is what an adapter stores.

    Attributes:
        exit_layers: ascending.

    Raises:
        ConfigError: for an unknown kind.
    """

    def __init__(
        self, kind: str, exit_layers: Sequence[int], *, hidden_size: int, draft_vocab_size: int, rank: int
    ) -> None:
        super().__init__()
        if kind not in _KINDS:
            raise ConfigError(f"head {kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")
        self.exit_layers = sorted(exit_layers)
        self.heads = nn.ModuleDict(
            {str(layer): _KINDS[kind](hidden_size, draft_vocab_size, rank) for layer in self.exit_layers}
        )

    def __iter__(self) -> Iterator[ExitHead]:
        """The heads, shallowest first."""
        return (cast(ExitHead, head) for head in self.heads.values())

    @property
    def one(self) -> ExitHead:
        """Any of them: they are of one kind and size."""
        return next(iter(self))

    def logits(self, layer: int, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] of one exit from hidden states [N, D]."""
        head: Tensor = self.heads[str(layer)](hidden, context, unembedding)
        return head

    def forward(
        self, hidden: Mapping[int, Tensor], context: HeadContext, unembedding: DraftUnembedding
    ) -> dict[int, Tensor]:
        """Draft logits of every exit: exit layer -> [N, V]."""
        return {layer: self.logits(layer, hidden[layer], context, unembedding) for layer in self.exit_layers}

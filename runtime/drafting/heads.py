"""`ExitHead` and its kinds, `ExitHeads`: hidden state at an exit layer, and more of the token -> draft logits.

All that differs between kinds is a method here: what a head reads, how it starts, what it costs. A head holds only
what was trained; the base's norm and unembedding rows come from outside. Knows no policy, no cache and no file.

Shape suffixes: N tokens (any leading shape), D hidden size, R rank, V draft vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.drafting.attention_head import AttentionHead
from runtime.drafting.exit_head import AGES, MAX_AGE, ExitHead, HeadContext
from runtime.drafting.unembedding import DraftUnembedding
from runtime.errors import ConfigError

__all__ = ["AGES", "HEAD_KINDS", "LORA_ALPHA_PER_RANK", "MAX_AGE", "ExitHead", "ExitHeads", "HeadContext", "attends"]

LORA_ALPHA_PER_RANK = 2.0


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


_KINDS: dict[str, type[ExitHead]] = {
    "attention": AttentionHead,
    "deep": DeepHead,
    "linear": LinearHead,
    "lora": LoraHead,
}
HEAD_KINDS = tuple(_KINDS)


def attends(kind: str) -> bool:
    """Whether heads of this kind read positions before their own."""
    return _KINDS[kind].attends


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
        """Draft logits [N, V] of one exit from hidden states [N, D]; [A, N, V] where the context has A ages."""
        if self.one.attends and context.texts is not None:
            hidden = context.texts.hidden[layer]
        head: Tensor = self.heads[str(layer)](hidden, context, unembedding)
        return head

    def forward(
        self, hidden: Mapping[int, Tensor], context: HeadContext, unembedding: DraftUnembedding
    ) -> dict[int, Tensor]:
        """Draft logits of every exit: exit layer -> [N, V]."""
        return {layer: self.logits(layer, hidden[layer], context, unembedding) for layer in self.exit_layers}

"""`ExitHead` and `ExitHeads`: hidden state at an exit layer (and what else is known of the token) -> draft logits.

The base's final norm and the rows of its unembedding for the draft vocabulary are borrowed, frozen and never
part of a head's state; a head holds only what was trained. Knows no policy, no cache and no file.

Shape suffixes: N tokens (any leading shape), D hidden size, R rank, V draft vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.decoding.layers import DecoderLayers
from runtime.errors import ConfigError

HEAD_KINDS = ("deep", "residual", "linear", "lora")
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


class DraftUnembedding:
    """The base's frozen way from a top hidden state to logits, pruned to the draft vocabulary.

    Args:
        layers: the base.
        draft_to_target: shape [V], int64, target token id of each draft id; None for the whole vocabulary.
        dtype: dtype of the copied rows; the base's own where None.
    """

    def __init__(
        self, layers: DecoderLayers, draft_to_target: Tensor | None, *, dtype: torch.dtype | None = None
    ) -> None:
        weight = cast(Tensor, layers.unembedding.weight).detach()
        bias: Tensor | None = getattr(layers.unembedding, "bias", None)
        if draft_to_target is not None:
            rows = draft_to_target.to(weight.device)
            weight = weight[rows]
            bias = None if bias is None else bias.detach()[rows]
        self.norm = layers.norm
        self.rows = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.rows.weight = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
        if bias is not None:
            self.rows.bias = nn.Parameter(bias if dtype is None else bias.to(dtype), requires_grad=False)
        self.scaling = layers.logits_scaling

    @property
    def weight(self) -> Tensor:
        """Shape [V, D]."""
        return self.rows.weight

    @property
    def bias(self) -> Tensor | None:
        """Shape [V]; None where the base's unembedding has none."""
        return self.rows.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        """Draft logits [N, V] of hidden states [N, D]."""
        logits: Tensor = self.rows(self.normalize(hidden))
        return logits / self.scaling if self.scaling != 1.0 else logits

    def normalize(self, hidden: Tensor) -> Tensor:
        """The base's final norm; a norm in another dtype than the head's rows is cast back."""
        normed: Tensor = self.norm(hidden)
        return normed.to(self.weight.dtype)


class ResidualHead(nn.Module):
    """A small gated block on the hidden state and the token's embedding, then the base's frozen unembedding.

    `h' = h + down(silu(gate(x)) * up(x))` with `x = [rms(h); rms(e)]`; zero at the start, so that training
    begins at the logit lens. Reading the embedding tells a shallow layer which token it stands on.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.embedding_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.gate_up = nn.Linear(2 * hidden_size, 2 * rank, bias=False)
        self.down = nn.Linear(rank, hidden_size, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D] and the token's embedding."""
        dtype = self.down.weight.dtype  # while fitting, heads are float32 on a base of any dtype
        hidden, embedding = hidden.to(dtype), context.embedding.to(dtype)
        features = torch.cat([self.hidden_norm(hidden), self.embedding_norm(embedding)], dim=-1)
        gate, up = self.gate_up(features).chunk(2, dim=-1)
        return unembedding(hidden + self.down(functional.silu(gate) * up))


class DeepHead(nn.Module):
    """As `ResidualHead`, which also reads the base's top state at the newest verified position, and how old it is.

    That state is what the base itself predicted the token before from, so a shallow layer learns what the deep
    ones were about to say (the idea of EAGLE, arXiv 2401.15077, here without a layer of its own).
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
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
        dtype = self.down.weight.dtype
        hidden, embedding, deep = hidden.to(dtype), context.embedding.to(dtype), context.deep.to(dtype)
        parts = [
            self.hidden_norm(hidden),
            self.embedding_norm(embedding),
            self.deep_norm(deep) + self.age[context.age],
        ]
        gate, up = self.gate_up(torch.cat(parts, dim=-1)).chunk(2, dim=-1)
        skipped = self.keep * hidden + self.carry * deep
        return unembedding(skipped + self.down(functional.silu(gate) * up))


class LinearHead(nn.Module):
    """The paper's head: a trained LM head on the normed hidden state, rows started at the base's own."""

    def __init__(self, hidden_size: int, draft_vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(draft_vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the context is not read."""
        return functional.linear(unembedding.normalize(hidden).to(self.weight.dtype), self.weight)


class LoraHead(nn.Module):
    """LoRA on the frozen unembedding, in PEFT's parametrisation: `W + (alpha / R) B A`."""

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, hidden_size))
        self.lora_B = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the context is not read."""
        normed = unembedding.normalize(hidden)
        update = functional.linear(functional.linear(normed.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        logits = functional.linear(normed, unembedding.weight, unembedding.bias) + LORA_ALPHA_PER_RANK * update
        return logits / unembedding.scaling if unembedding.scaling != 1.0 else logits


ExitHead = DeepHead | ResidualHead | LinearHead | LoraHead


def make_head(kind: str, *, hidden_size: int, draft_vocab_size: int, rank: int) -> ExitHead:
    """A new head of one of `HEAD_KINDS`.

    Raises:
        ConfigError: for an unknown kind.
    """
    if kind == "deep":
        return DeepHead(hidden_size, rank)
    if kind == "residual":
        return ResidualHead(hidden_size, rank)
    if kind == "linear":
        return LinearHead(hidden_size, draft_vocab_size)
    if kind == "lora":
        return LoraHead(hidden_size, draft_vocab_size, rank)
    raise ConfigError(f"head {kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")


class ExitHeads(nn.Module):
    """One head per exit layer; its state is what an adapter stores.

    Attributes:
        exit_layers: ascending.
        ages: those of `AGES` that make a difference to these heads.
    """

    def __init__(
        self, kind: str, exit_layers: Sequence[int], *, hidden_size: int, draft_vocab_size: int, rank: int
    ) -> None:
        super().__init__()
        self.exit_layers = sorted(exit_layers)
        self.ages = AGES if kind == "deep" else AGES[-1:]
        self.heads = nn.ModuleDict(
            {
                str(layer): make_head(kind, hidden_size=hidden_size, draft_vocab_size=draft_vocab_size, rank=rank)
                for layer in self.exit_layers
            }
        )

    def logits(self, layer: int, hidden: Tensor, context: HeadContext, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] of one exit from hidden states [N, D]."""
        head: Tensor = self.heads[str(layer)](hidden, context, unembedding)
        return head

    def forward(
        self, hidden: Mapping[int, Tensor], context: HeadContext, unembedding: DraftUnembedding
    ) -> dict[int, Tensor]:
        """Draft logits of every exit: exit layer -> [N, V]."""
        return {layer: self.logits(layer, hidden[layer], context, unembedding) for layer in self.exit_layers}

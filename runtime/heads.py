"""`ExitHead` and `ExitHeads`: hidden state at an exit layer (and the token's embedding) -> draft logits.

The base's final norm and the rows of its unembedding for the draft vocabulary are borrowed, frozen and never
part of a head's state; a head holds only what was trained. Knows no policy, no cache and no file.

Shape suffixes: N tokens (any leading shape), D hidden size, R rank, V draft vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from runtime.errors import ConfigError
from runtime.layers import DecoderLayers

HEAD_KINDS = ("residual", "linear", "lora")
LORA_ALPHA_PER_RANK = 2.0


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
        self.weight = weight if dtype is None else weight.to(dtype)
        self.bias = bias if dtype is None or bias is None else bias.to(dtype)
        self.scaling = layers.logits_scaling

    def __call__(self, hidden: Tensor) -> Tensor:
        """Draft logits [N, V] of hidden states [N, D]."""
        logits = functional.linear(self.normalize(hidden), self.weight, self.bias)
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

    def forward(self, hidden: Tensor, embedding: Tensor, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D] and the token's embedding [N, D]."""
        dtype = self.down.weight.dtype  # while fitting, heads are float32 on a base of any dtype
        hidden, embedding = hidden.to(dtype), embedding.to(dtype)
        features = torch.cat([self.hidden_norm(hidden), self.embedding_norm(embedding)], dim=-1)
        gate, up = self.gate_up(features).chunk(2, dim=-1)
        return unembedding(hidden + self.down(functional.silu(gate) * up))


class LinearHead(nn.Module):
    """The paper's head: a trained LM head on the normed hidden state, rows started at the base's own."""

    def __init__(self, hidden_size: int, draft_vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(draft_vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)

    def forward(self, hidden: Tensor, embedding: Tensor, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the embedding is not read."""
        return functional.linear(unembedding.normalize(hidden).to(self.weight.dtype), self.weight)


class LoraHead(nn.Module):
    """LoRA on the frozen unembedding, in PEFT's parametrisation: `W + (alpha / R) B A`."""

    def __init__(self, hidden_size: int, draft_vocab_size: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, hidden_size))
        self.lora_B = nn.Parameter(torch.zeros(draft_vocab_size, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, hidden: Tensor, embedding: Tensor, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] from the hidden state [N, D]; the embedding is not read."""
        normed = unembedding.normalize(hidden)
        update = functional.linear(functional.linear(normed.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        logits = functional.linear(normed, unembedding.weight, unembedding.bias) + LORA_ALPHA_PER_RANK * update
        return logits / unembedding.scaling if unembedding.scaling != 1.0 else logits


ExitHead = ResidualHead | LinearHead | LoraHead


def make_head(kind: str, *, hidden_size: int, draft_vocab_size: int, rank: int) -> ExitHead:
    """A new head of one of `HEAD_KINDS`.

    Raises:
        ConfigError: for an unknown kind.
    """
    if kind == "residual":
        return ResidualHead(hidden_size, rank)
    if kind == "linear":
        return LinearHead(hidden_size, draft_vocab_size)
    if kind == "lora":
        return LoraHead(hidden_size, draft_vocab_size, rank)
    raise ConfigError(f"head {kind!r} is unknown: expected one of {', '.join(HEAD_KINDS)}")


class ExitHeads(nn.Module):
    """One head per exit layer; its state is what an adapter stores."""

    def __init__(
        self, kind: str, exit_layers: Sequence[int], *, hidden_size: int, draft_vocab_size: int, rank: int
    ) -> None:
        super().__init__()
        self.exit_layers = sorted(exit_layers)
        self.heads = nn.ModuleDict(
            {
                str(layer): make_head(kind, hidden_size=hidden_size, draft_vocab_size=draft_vocab_size, rank=rank)
                for layer in self.exit_layers
            }
        )

    def logits(self, layer: int, hidden: Tensor, embedding: Tensor, unembedding: DraftUnembedding) -> Tensor:
        """Draft logits [N, V] of one exit from hidden states [N, D] and token embeddings [N, D]."""
        head: Tensor = self.heads[str(layer)](hidden, embedding, unembedding)
        return head

    def forward(
        self, hidden: Mapping[int, Tensor], embedding: Tensor, unembedding: DraftUnembedding
    ) -> dict[int, Tensor]:
        """Draft logits of every exit: exit layer -> [N, V]."""
        return {layer: self.logits(layer, hidden[layer], embedding, unembedding) for layer in self.exit_layers}

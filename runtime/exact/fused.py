"""A decoder layer of the Llama kind in few calls: the same sums as its modules', without what surrounds them.

In one-token decoding of a small model, calls between the multiplications take as long as those. Only layers whose
Linears run packed are fused, and only where the probe finds that every bit is kept. Knows no policy and no probe.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from runtime.decoding.families import CACHE, family_of, text_decoder
from runtime.decoding.rows import TreeRows
from runtime.exact.attention import BlockAttention
from runtime.exact.native.parts import LayerParts
from runtime.exact.packed import Forward


class Shared:
    """What the layers of one model use one after the other, made once.

    Room for the sums of a norm, for each length of block: to allocate it takes as long as to fill it. And the rotary
    tables of the block that runs.
    """

    def __init__(self, hidden_size: int, like: Tensor) -> None:
        self.hidden_size, self.like = hidden_size, like
        self._by_length: dict[int, tuple[Tensor, ...]] = {}
        self._given: Tensor | None = None
        self._tables: tuple[Tensor, Tensor] | None = None

    def room(self, length: int) -> tuple[Tensor, ...]:
        """Hidden states and their squares in float32, a sum and a scale for each row, hidden states as they come."""
        if length not in self._by_length:
            exact, dtype = torch.float32, self.like.dtype
            room = ((self.hidden_size, exact), (self.hidden_size, exact), (1, exact), (1, exact))
            with torch.inference_mode(False):  # what is made there cannot be written elsewhere
                self._by_length[length] = tuple(
                    torch.empty(1, length, size, dtype=kind, device=self.like.device)
                    for size, kind in (*room, (self.hidden_size, dtype))
                )
        return self._by_length[length]

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [1, T, E] as [1, 1, T, E], the sine's first half with the sign of the half turned into it."""
        if self._tables is None or self._given is not cos:
            first, second = sin.chunk(2, -1)
            self._tables = cos.unsqueeze(1), torch.cat((-first, second), -1).unsqueeze(1)
            self._given = cos
        return self._tables


class FusedLayer:
    """What a layer's `forward` does to a block of one request's tokens.

    Shape suffixes: T tokens of the block, D hidden size, E head size.

    Args:
        parts: of the layer; its norms are read as they are.
        linears: in the place of its own, on [1, T, in]: query, key and value side by side; output; gate and up; down.
        attention: of a block.
        shared: with the layers before and after.
    """

    def __init__(
        self, parts: LayerParts, linears: list[Forward], *, attention: BlockAttention, shared: Shared
    ) -> None:
        module = parts.attention
        self.query_key_value, self.output, self.gate_up, self.down = linears
        # As tensors: a number would be made one, and cast, in every call.
        self.norms = [(norm.weight, torch.tensor(norm.variance_epsilon)) for norm in parts.all_norms]
        self.hidden_size = torch.tensor(float(module.q_proj.weight.shape[1]))
        self.head_size: int = module.head_dim
        self.num_queries = module.q_proj.weight.shape[0] // self.head_size
        self.num_keys = module.k_proj.weight.shape[0] // self.head_size
        self.module, self.window = module, parts.window
        self.attention = attention
        self.shared = shared

    def __call__(
        self,
        hidden: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: TreeRows | None = None,
        **given: Any,
    ) -> Tensor:
        """Hidden states [1, T, D] one layer further; appends to the cache."""
        length = hidden.shape[1]
        heads = self.query_key_value(self._norm(0, hidden)).view(1, length, -1, self.head_size).transpose(1, 2)
        turning, value = heads.split_with_sizes([self.num_queries + self.num_keys, self.num_keys], 1)
        turned = _rotate(turning, *self.shared.tables(*position_embeddings))
        query, key = turned.split_with_sizes([self.num_queries, self.num_keys], 1)
        keys, values = given[CACHE].update(key, value, self.module.layer_idx)
        options = {"scaling": self.module.scaling, "sliding_window": self.window}
        attended, _ = self.attention(self.module, query, keys, values, attention_mask, **options)
        hidden = self.output(attended.reshape(1, length, -1)).add_(hidden)
        gate, up = self.gate_up(self._norm(1, hidden)).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(up)).add_(hidden)

    def _norm(self, index: int, hidden: Tensor) -> Tensor:
        """The module's own sums in float32, rounded where it rounds; what comes back holds until the next call."""
        weight, epsilon = self.norms[index]
        exact, squares, total, scale, normed = self.shared.room(hidden.shape[1])
        exact.copy_(hidden)
        torch.mul(exact, exact, out=squares)
        torch.sum(squares, -1, keepdim=True, out=total)
        torch.addcdiv(epsilon, total, self.hidden_size, out=scale).rsqrt_()
        return normed.copy_(exact.mul_(scale)).mul_(weight)


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary positions for [1, heads, T, E]; tables as `Shared.tables` gives them."""
    return (heads * cos).add_(heads.roll(heads.shape[-1] // 2, -1).mul_(signed_sin))


def fused_layers(
    model: PreTrainedModel, joint: Mapping[tuple[nn.Module, ...], Forward], attention: BlockAttention
) -> Iterator[tuple[nn.Module, FusedLayer]]:
    """The model's layers that can be fused.

    Args:
        joint: the Linears that run packed, by the modules that each stands for.
    """
    family = family_of(model.config)
    if family.norms is None or attention.stock == "eager":
        return
    decoder = text_decoder(model)
    weight: Tensor = decoder.norm.weight
    shared = Shared(weight.shape[0], weight)
    for layer in decoder.layers:
        parts = LayerParts.of(layer, family)
        if parts is not None and parts.is_llama(family) and all(linears in joint for linears in parts.linears):
            yield layer, FusedLayer(parts, [joint[each] for each in parts.linears], attention=attention, shared=shared)

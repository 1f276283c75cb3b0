"""A decoder layer of the Llama kind in few calls: the same sums as its modules', without what surrounds them.

In one-token decoding of a small model, calls between the multiplications take as long as those. Only layers whose
Linears run packed are fused, and only where the probe finds that every bit is kept. Knows no policy and no probe.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from runtime.decoding.layers import FAMILIES
from runtime.exact.attention import attend_in_groups
from runtime.exact.packed import Forward


class Scratch:
    """Room for the sums of a norm, made once for each length of block: to allocate it takes as long as to fill it."""

    def __init__(self, hidden_size: int, like: Tensor) -> None:
        self.hidden_size, self.like = hidden_size, like
        self._by_length: dict[int, tuple[Tensor, ...]] = {}

    def __call__(self, length: int) -> tuple[Tensor, ...]:
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


class FusedLayer:
    """What a layer's `forward` does to a block of one request's tokens.

    Shape suffixes: T tokens of the block, D hidden size, H query heads, G heads of keys and as many of values,
    E head size, S tokens so far.

    Args:
        layer: the module; its norms are read as they are.
        query_key_value, output, gate_up, down: its Linears on [1, T, in], those that share an input side by side.
        attention: how a block attends, one of `attention.KINDS`.
        scratch: may be shared by layers that run one after the other.
    """

    def __init__(
        self,
        layer: Any,
        query_key_value: Forward,
        output: Forward,
        gate_up: Forward,
        down: Forward,
        *,
        attention: str,
        scratch: Scratch,
    ) -> None:
        module = layer.self_attn
        self.query_key_value, self.output, self.gate_up, self.down = query_key_value, output, gate_up, down
        # As tensors: a number would be made one, and cast, in every call.
        self.norms = [(norm.weight, torch.tensor(norm.variance_epsilon)) for norm in _norms(layer)]
        self.hidden_size = torch.tensor(float(module.q_proj.weight.shape[1]))
        self.head_size: int = module.head_dim
        self.num_queries = module.q_proj.weight.shape[0] // self.head_size
        self.num_keys = module.k_proj.weight.shape[0] // self.head_size
        self.scaling: float = module.scaling
        self.layer_idx: int = module.layer_idx
        self.attention = attention
        self.scratch = scratch

    def __call__(
        self, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any, **ignored: Any
    ) -> Tensor:
        """Hidden states [1, T, D] one layer further; appends to the cache."""
        length = hidden.shape[1]
        heads = self.query_key_value(self._norm(0, hidden)).view(1, length, -1, self.head_size).transpose(1, 2)
        turning, value = heads.split_with_sizes([self.num_queries + self.num_keys, self.num_keys], 1)
        turned = _rotate(turning, *position_embeddings)
        query, key = turned.split_with_sizes([self.num_queries, self.num_keys], 1)
        keys, values = past_key_values.update(key, value, self.layer_idx)
        attended = self._attend(query, keys, values).transpose(1, 2).reshape(1, length, -1)
        hidden = self.output(attended).add_(hidden)
        gate, up = self.gate_up(self._norm(1, hidden)).chunk(2, -1)
        return self.down(functional.silu(gate).mul_(up)).add_(hidden)

    def _norm(self, index: int, hidden: Tensor) -> Tensor:
        """The module's own sums in float32, rounded where it rounds; what comes back holds until the next call."""
        weight, epsilon = self.norms[index]
        exact, squares, total, scale, normed = self.scratch(hidden.shape[1])
        exact.copy_(hidden)
        torch.mul(exact, exact, out=squares)
        torch.sum(squares, -1, keepdim=True, out=total)
        torch.addcdiv(epsilon, total, self.hidden_size, out=scale).rsqrt_()
        return normed.copy_(exact.mul_(scale)).mul_(weight)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Queries [1, H, T, E] on keys and values [1, G, S, E], row t of T on the first S - T + t + 1."""
        rows, seen = query.shape[2], keys.shape[2]
        attend = functional.scaled_dot_product_attention
        if rows == 1:
            return attend(query, keys, values, scale=self.scaling, enable_gqa=True)
        if self.attention == "grouped":
            return attend_in_groups(query, keys, values, self.scaling)
        if self.attention == "batched":
            mask = torch.ones(rows, seen, dtype=torch.bool, device=query.device).tril(seen - rows)
            return attend(query, keys, values, attn_mask=mask, scale=self.scaling, enable_gqa=True)
        shared = self.num_queries // self.num_keys  # every row would spread the heads anew
        keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        attended = []
        for row in range(rows):
            end = seen - rows + row + 1
            own = query[:, :, row : row + 1], keys[:, :, :end], values[:, :, :end]
            attended.append(attend(*own, scale=self.scaling))
        return torch.cat(attended, 2)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions for [1, heads, T, E]; tables [1, T, E]."""
    cos, signed = _tables(cos, sin)
    return (heads * cos).add_(heads.roll(heads.shape[-1] // 2, -1).mul_(signed))


@lru_cache(maxsize=1)
def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The tables as [1, 1, T, E], the sine's first half with the sign of the half that is turned into it; one pair for
    all layers."""
    first, second = sin.chunk(2, -1)
    return cos.unsqueeze(1), torch.cat((-first, second), -1).unsqueeze(1)


def fused_layers(
    model: PreTrainedModel, joint: Mapping[tuple[nn.Module, ...], Forward], *, attention: str
) -> Iterator[tuple[nn.Module, FusedLayer]]:
    """The model's layers that can be fused.

    Args:
        joint: the Linears that run packed, by the modules that each stands for.
    """
    if not FAMILIES[model.config.model_type].fusable or model.config._attn_implementation.endswith("eager"):
        return
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    weight: Tensor = decoder.norm.weight
    scratch = Scratch(weight.shape[0], weight)
    for layer in decoder.layers:
        parts = _parts(layer)
        forwards = [joint[part] for part in parts if part in joint]
        if forwards and len(forwards) == len(parts):
            yield layer, FusedLayer(layer, *forwards, attention=attention, scratch=scratch)


def _parts(layer: Any) -> list[tuple[nn.Module, ...]]:
    """The Linears of a layer of that kind, by shared input; none where it is of another, or somebody listens in."""
    try:
        attention, mlp = layer.self_attn, layer.mlp
        parts: list[tuple[nn.Module, ...]] = [
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj),
            (mlp.down_proj,),
        ]
        plain = all(hasattr(norm, "variance_epsilon") and hasattr(norm, "weight") for norm in _norms(layer))
    except AttributeError:
        return []
    plain = plain and "silu" in type(mlp.act_fn).__name__.lower()
    listened = any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in layer.modules()
    )
    return parts if plain and not listened else []


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm

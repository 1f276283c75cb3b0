"""A `deep` head as one call of our own kernel, from the hidden state at its exit to a draft and its confidence.

Drafts are verified, so these need no bits of anybody's. Knows no policy and no base.
"""

import ctypes
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import DeepHead, HeadContext
from runtime.drafting.unembedding import DraftUnembedding
from runtime.exact.native.library import native_library
from runtime.exact.native.products import BLOCK, LANES, pack_for_products
from runtime.exact.native.stack import silu_of_all


class NativeHead:
    """One exit's head, its weights packed.

    Args:
        head, unembedding: in bfloat16 on the CPU.
        rows: those of the unembedding, packed; several heads share them.
        silu: as `silu_of_all` gives it.
    """

    def __init__(self, head: DeepHead, unembedding: DraftUnembedding, rows: Tensor, silu: Tensor) -> None:
        self.made_of = head, unembedding, rows, silu
        final: Any = unembedding.norm
        norms: tuple[Any, ...] = (head.hidden_norm, head.embedding_norm, head.deep_norm, final)
        packed = (*map(pack_for_products, (head.gate_up.weight, head.down.weight)), rows)
        vectors = (head.keep, head.carry, head.age)
        self.held: list[Any] = [*packed, *(norm.weight for norm in norms), *vectors, silu]
        self.places = (ctypes.c_void_p * 10)(*(tensor.data_ptr() for tensor in self.held[:-1]))
        self.sizes = (head.hidden_size, head.down.in_features, head.draft_vocab_size)
        self.epsilons: tuple[float, float] = (norms[0].eps, final.variance_epsilon)
        self.scaling = unembedding.scaling

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle is made anew from its modules: addresses cannot be copied."""
        return NativeHead, self.made_of

    def __call__(self, hidden: Tensor, context: HeadContext, temperature: float, count: int) -> tuple[Tensor, Tensor]:
        """Draft ids and confidences [N, count] of hidden states [N, D]; id 0 and NaN where no logit is a number."""
        library = native_library()
        assert library is not None
        rows = hidden.shape[0]
        ids, chances = torch.empty(rows, count, dtype=torch.int64), torch.empty(rows, count)
        given = [part.contiguous() for part in (hidden, context.embedding, context.deep, context.age)]
        library.specbound_draft(
            self.places,
            (ctypes.c_int64 * 6)(rows, count, *self.sizes, BLOCK // 2),
            (ctypes.c_float * 3)(*self.epsilons, temperature * self.scaling),
            *(part.data_ptr() for part in given),
            self.held[-1].data_ptr(),
            ids.data_ptr(),
            chances.data_ptr(),
            torch.get_num_threads(),
        )
        return ids.clamp_(min=0), chances


def native_heads(heads: DraftHeads) -> DraftHeads:
    """The heads, those that the kernel takes running in it."""
    exits = {layer: heads.exits.heads[str(layer)] for layer in heads.exit_layers}
    fit = {layer: head for layer, head in exits.items() if _is_fit(head, heads.unembedding)}
    if native_library() is None or not fit:
        return heads
    rows, silu = pack_for_products(heads.unembedding.weight), silu_of_all()
    return replace(
        heads, native={layer: NativeHead(head, heads.unembedding, rows, silu) for layer, head in fit.items()}
    )


def _is_fit(head: Any, unembedding: DraftUnembedding) -> bool:
    """Whether the kernel takes its kind, dtype, device and sizes, and the final norm is of the Llama kind."""
    weights = (unembedding.weight, *head.parameters(), *unembedding.norm.parameters())
    return (
        type(head) is DeepHead
        and hasattr(unembedding.norm, "variance_epsilon")
        and unembedding.bias is None
        and head.hidden_size % 2 == 0
        and head.rank is not None
        and head.rank % LANES == 0
        and all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
        and all(weight.is_contiguous() for weight in weights)
    )

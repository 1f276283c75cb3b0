"""How the weights of Linears lie and are multiplied: by our own kernels, or by oneDNN.

Our kernels take the shapes for which they add in the order of the model's own Linears, on numbers that show it. The
rest is oneDNN's in bfloat16, whose operators are torch's own but not public: where they are missing nothing is packed.
In float32 the rest stays with torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.exact.native.products import Order, has_products, orders, pack_for_products, products
from runtime.exact.native.singles import LANES, singles
from runtime.exact.order import is_plain, same_linear

# oneDNN chooses its layout for calls of about so many rows; for one row it would keep the unpacked layout.
LAYOUT_ROWS = 8
# Blocks that show whether our kernel adds as the model's Linears do: it takes rows in eights, then the rest.
NATIVE_WIDTHS = (1, 2, 11)


@dataclass(frozen=True, slots=True)
class Layout:
    """How weights are packed and multiplied.

    Attributes:
        name: for the certificate.
        pack: of the weights [outputs of its own, K] of Linears side by side.
        multiply: hidden states [..., K], the packed weights, a bias [N] or None, and N: outputs [..., N].
        order: of additions, in our own kernel for bfloat16.
        copies: whether what `pack` gives is a copy; otherwise weights are read where they lie.
    """

    name: str
    pack: Callable[[Sequence[Tensor]], Any]
    multiply: Callable[[Tensor, Any, Tensor | None, int], Tensor]
    order: Order | None = None
    copies: bool = True

    def runner(self, linear: nn.Module) -> Callable[[Tensor], Tensor]:
        """What runs a block in the place of a Linear."""
        weight: Tensor = linear.weight  # type: ignore[assignment]
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        packed = self.pack([weight])
        return lambda hidden: self.multiply(hidden, packed, bias, weight.shape[0])


def onednn_pack(weights: Sequence[Tensor]) -> Tensor:
    """Weights, under one another, in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(torch.cat(list(weights)), LAYOUT_ROWS)
    return packed


def onednn_multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, _: int) -> Tensor:
    """A Linear from a weight in that layout."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, "none", [], "")
    return output


NATIVE = "native"
ONEDNN = Layout("oneDNN", onednn_pack, onednn_multiply)


def native_layout(order: Order) -> Layout:
    """Our own kernel for bfloat16, adding in one order."""

    def pack(weights: Sequence[Tensor]) -> Tensor:
        return pack_for_products(torch.cat(list(weights)))

    return Layout(NATIVE, pack, partial(products, order=order), order)


def single_layout(lanes: int) -> Layout:
    """Our own kernel for float32, which reads the model's own weights."""
    return Layout(NATIVE, list, partial(singles, lanes=lanes), copies=False)


def has_onednn() -> bool:
    """Whether torch has oneDNN's operators for bfloat16 on this CPU."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def layout_of(like: nn.Linear, outputs: int) -> Layout | None:
    """The kernel for Linears of one kind and shape; None where torch's own operator is all there is.

    Args:
        like: one of them.
        outputs: numbers that come out, of all Linears that run as one.
    """
    single = like.weight.dtype == torch.float32
    rest = None if single else ONEDNN
    if not has_products() or not is_plain(like) or (like.weight.shape[1] % 2 and not single):
        return rest
    found = map(single_layout, LANES) if single else map(native_layout, orders(like.weight.shape[1]))
    return next((one for one in found if same_linear(one.runner, like, outputs, NATIVE_WIDTHS)), rest)

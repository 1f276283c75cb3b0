"""How a packed weight lies and is multiplied: by our own kernel, or by oneDNN.

Our kernel takes the shapes for which it adds in the order of the model's own Linears, on numbers that show it; oneDNN
takes the rest. Its operators are torch's own, but not public: where they are missing nothing is packed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from runtime.exact.native.products import Order, has_products, orders, pack_for_products, products
from runtime.exact.order import is_plain, same_linear

# oneDNN chooses its layout for calls of about so many rows; for one row it would keep the unpacked layout.
LAYOUT_ROWS = 8
# Blocks that show whether our kernel adds as the model's Linears do: it takes rows in eights, then the rest.
NATIVE_WIDTHS = (1, 2, 11)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is packed and multiplied.

    Attributes:
        name: for the certificate.
        pack: of a weight [N, K].
        multiply: hidden states [..., K], the packed weight, a bias [N] or None, and N: outputs [..., N].
        order: of additions, in our own kernel.
    """

    name: str
    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    order: Order | None = None

    def runner(self, linear: nn.Module) -> Callable[[Tensor], Tensor]:
        """What runs a block in the place of a Linear."""
        weight: Tensor = linear.weight  # type: ignore[assignment]
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        packed = self.pack(weight)
        return lambda hidden: self.multiply(hidden, packed, bias, weight.shape[0])


def onednn_pack(weight: Tensor) -> Tensor:
    """A weight in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
    return packed


def onednn_multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, _: int) -> Tensor:
    """A Linear from a weight in that layout."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, "none", [], "")
    return output


NATIVE = "native"
ONEDNN = Layout("oneDNN", onednn_pack, onednn_multiply)


def native_layout(order: Order) -> Layout:
    """Our own kernel, adding in one order."""
    return Layout(NATIVE, pack_for_products, partial(products, order=order), order)


def has_onednn() -> bool:
    """Whether torch has oneDNN's operators for bfloat16 on this CPU."""
    names = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def layout_of(like: nn.Linear, outputs: int) -> Layout:
    """The kernel for Linears of one kind and shape.

    Args:
        like: one of them.
        outputs: numbers that come out, of all Linears that run as one.
    """
    if not has_products() or like.weight.shape[1] % 2 or not is_plain(like):
        return ONEDNN
    layouts = map(native_layout, orders(like.weight.shape[1]))
    return next((one for one in layouts if same_linear(one.runner, like, outputs, NATIVE_WIDTHS)), ONEDNN)

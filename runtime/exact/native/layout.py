"""How a packed weight lies and is multiplied: by our own kernel, or by oneDNN.

Our kernel takes the shapes for which it adds in the order of the model's own Linears, on numbers that show it; oneDNN
takes the rest. Its operators are torch's own, but not public: where they are missing nothing is packed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.exact.native.products import has_products, pack_for_products, products
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
    """

    name: str
    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


def onednn_pack(weight: Tensor) -> Tensor:
    """A weight in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
    return packed


def onednn_multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, _: int) -> Tensor:
    """A Linear from a weight in that layout."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, "none", [], "")
    return output


ONEDNN = Layout("oneDNN", onednn_pack, onednn_multiply)
NATIVE = Layout("native", pack_for_products, products)


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
    return NATIVE if same_linear(_native, like, outputs, NATIVE_WIDTHS) else ONEDNN


def _native(linear: nn.Module) -> Callable[[Tensor], Tensor]:
    """What runs a block through our kernel in the place of a Linear."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    packed = NATIVE.pack(weight)
    return lambda hidden: NATIVE.multiply(hidden, packed, bias, weight.shape[0])

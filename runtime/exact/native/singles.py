"""Linears in float32 by our own kernel, from the weights that the model holds: nothing is packed or copied.

Whether they have the bits of a model's own is the caller's business. Knows no model and no probe.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.exact.native.library import native_library

# Lanes that the products along K are dealt to, as MKL was seen to do for one row; which it is here, is probed.
LANES = (4, 16)
# Where outputs are no such multiple, or weights lie otherwise (bytes), it was seen to add in other orders.
OUTPUT_MULTIPLE, ALIGNMENT = 16, 64
FEWEST_INPUTS = 16


def is_fit(weight: Tensor) -> bool:
    """Whether the kernel takes a weight [N, K]: its shape, and where it lies."""
    outputs, inputs = weight.shape
    return outputs % OUTPUT_MULTIPLE == 0 and inputs >= FEWEST_INPUTS and weight.data_ptr() % ALIGNMENT == 0


def singles(hidden: Tensor, weights: Sequence[Tensor], bias: Tensor | None, outputs: int, *, lanes: int) -> Tensor:
    """Outputs [..., N] of Linears side by side for hidden states [..., K], float32.

    Each row has the bits that it has alone.

    Args:
        weights: of each Linear, [outputs of its own, K], such as `is_fit`.
        bias: shape [N], of all of them.
        lanes: one of `LANES`.
    """
    library = native_library()
    assert library is not None
    assert hidden.dtype == torch.float32
    rows = hidden.contiguous()
    output = rows.new_empty((*hidden.shape[:-1], outputs))
    inputs, start = rows.shape[-1], 0
    for weight in weights:
        library.specbound_singles(
            weight.data_ptr(),
            rows.data_ptr(),
            0 if bias is None else bias.data_ptr() + 4 * start,
            output.data_ptr() + 4 * start,
            rows.numel() // inputs,
            weight.shape[0],
            inputs,
            outputs,
            lanes,
            torch.get_num_threads(),
        )
        start += weight.shape[0]
    return output

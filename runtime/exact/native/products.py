"""Linears by our own kernel, packed in the order in which it reads.

Whether they have the bits of a model's own is the caller's business. Knows no model and no probe.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.exact.native.library import has_tiles, native_library

LANES = 16
TILE = 32  # numbers along K that one tile takes
ZERO, STEPS = 64, 63  # of a quantized weight


@dataclass(frozen=True, slots=True)
class Order:
    """How numbers are added along K.

    Attributes:
        tiles: by the CPU's tiles (AMX), even and odd numbers of 32 apart; otherwise pairs in order.
        block: numbers that are summed apart, then added in order.
        group: numbers of blocks that are added up apart from others, then added in order; 0 for all together.
    """

    tiles: bool
    block: int
    group: int = 0


def orders(inputs: int) -> list[Order]:
    """Orders in which oneDNN was seen to add for one row of so many numbers; which of them it is here, is probed."""
    found = [Order(False, 512)]
    if inputs % TILE == 0 and has_tiles():
        found += [Order(True, -(-inputs // (parts * TILE)) * TILE) for parts in (1, 2, 4)]
    return found


def has_products() -> bool:
    """Whether the kernel is there."""
    return native_library() is not None


def pack_for_products(weight: Tensor) -> Tensor:
    """A weight [N, K], bfloat16, K even, as [N / 16, K / 2, 16] words of two numbers; N filled up with zeros."""
    outputs, inputs = weight.shape
    words = weight.detach().contiguous().view(torch.int32)
    words = nn.functional.pad(words, (0, 0, 0, -outputs % LANES))
    return words.view(-1, LANES, inputs // 2).transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of drafts in half the memory, quantized to 7 bits with a scale for each output.

    Attributes:
        numbers: shape [N / 16, K / 2, 16, 2], uint8, 1 to 127; N filled up to a multiple of 16.
        scales: of each output, shape [N], float32; a number is (byte - 64) times it.
    """

    numbers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "QuantizedWeight":
        """Of a weight [N, K], bfloat16, K even."""
        filled = nn.functional.pad(weight.detach().float(), (0, 0, 0, -weight.shape[0] % LANES))
        scales = filled.abs().amax(1) / STEPS
        numbers = (filled / scales.clamp_min(torch.finfo().tiny)[:, None]).round() + ZERO
        parts = numbers.to(torch.uint8).view(-1, LANES, weight.shape[1] // 2, 2)
        return cls(parts.transpose(1, 2).contiguous(), scales)

    @property
    def places(self) -> tuple[int, int]:
        """Addresses, as the kernels have them."""
        return self.numbers.data_ptr(), self.scales.data_ptr()


def products(hidden: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, order: Order) -> Tensor:
    """A Linear's outputs [..., outputs] for hidden states [..., K], bfloat16; each row has the bits that it has alone.

    Args:
        weight: as `pack_for_products` gives it.
        bias: shape [outputs], bfloat16.
        order: tiles only where the CPU has them, and K is a multiple of `TILE`.
    """
    library = native_library()
    assert library is not None
    assert hidden.dtype == torch.bfloat16 and hidden.shape[-1] == 2 * weight.shape[1]
    rows = hidden.contiguous()
    output = rows.new_empty((*hidden.shape[:-1], outputs))
    library.specbound_products(
        weight.data_ptr(),
        rows.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        rows.numel() // hidden.shape[-1],
        outputs,
        weight.shape[1],
        order.block // 2,
        order.tiles,
        order.group // 2,
        torch.get_num_threads(),
    )
    return output

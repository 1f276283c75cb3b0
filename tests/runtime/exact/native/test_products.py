"""Our products: the bits of torch's Linears for one row, and refused where their order is another."""

import pytest
import torch
from torch import Tensor, nn

from runtime.exact.native import library
from runtime.exact.native.layout import ONEDNN, Layout, layout_of
from runtime.exact.native.products import Order, has_products, pack_for_products, products

WIDTHS = (1, 2, 3, 7, 8, 9, 16, 17)


@pytest.fixture(autouse=True)
def kernels() -> None:
    """A machine on which the kernels can be built."""
    if not has_products():
        pytest.skip(f"no native kernels here: {library.why_not_native()}")


def alone(linear: nn.Linear, block: Tensor) -> Tensor:
    """Each row through the Linear by itself."""
    return torch.cat([linear(row[None]) for row in block])


def native_layout_of(linear: nn.Linear) -> Layout:
    """Our kernel in the order of torch's own."""
    layout = layout_of(linear, linear.out_features)
    if layout is None or layout.order is None:
        pytest.skip("torch adds in an order of its own here")
    return layout


@pytest.mark.parametrize("inputs", [32, 96, 1536])
def test_tiles_add_even_and_odd_numbers_of_32_apart(inputs: int) -> None:
    """As written down, in float32; rows that fill tiles and rows that do not."""
    if not library.has_tiles():
        pytest.skip("the CPU has no tiles")
    torch.manual_seed(inputs)
    weight, hidden = torch.randn(40, inputs).bfloat16(), torch.randn(19, inputs).bfloat16()
    block = max(32, inputs // 64 * 32)
    total = torch.zeros(19, 40)
    for first in range(0, inputs, block):
        summed = torch.zeros(19, 40)
        for start in range(first, min(first + block, inputs), 32):
            apart = torch.zeros(2, 19, 40)
            for k in range(start, min(start + 32, inputs)):
                apart[k % 2] += hidden[:, k, None].float() * weight[None, :, k].float()
            summed += apart[0] + apart[1]
        total = summed if first == 0 else total + summed
    given = products(hidden, pack_for_products(weight), None, 40, Order(True, block))
    assert torch.equal(given, total.bfloat16())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (1000, 1100), (17, 2048), (896, 4864)])
@torch.no_grad()
def test_products_have_the_bits_of_each_row_alone(shape: tuple[int, int], bias: bool) -> None:
    """Where the order is found to be the Linear's; at any number of rows, also of outputs that fill no register."""
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=torch.bfloat16)
    layout = native_layout_of(linear)
    packed = layout.pack([linear.weight])
    for width in WIDTHS:
        block = torch.randn(width, shape[1]).to(torch.bfloat16)
        assert torch.equal(layout.multiply(block, packed, linear.bias, shape[0]), alone(linear, block))


@pytest.mark.parametrize("block", [256, 1024])
def test_products_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Negative control: other blocks along K."""
    linear = nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16)
    order = native_layout_of(linear).order
    assert order is not None
    monkeypatch.setattr("runtime.exact.native.layout.orders", lambda inputs: [Order(order.tiles, block)])
    assert layout_of(linear, 576) is ONEDNN


def test_products_without_their_last_pair_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tail that is left out."""

    def cut(weight: Tensor) -> Tensor:
        packed = pack_for_products(weight)
        packed[:, -1] = 0
        return packed

    linear = nn.Linear(576, 576, bias=False, dtype=torch.bfloat16)
    monkeypatch.setattr("runtime.exact.native.layout.pack_for_products", cut)
    assert layout_of(linear, 576) is ONEDNN

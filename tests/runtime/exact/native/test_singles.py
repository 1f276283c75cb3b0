"""Our float32 products: added as written down, with the bits of torch's Linears for one row, and refused otherwise."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from runtime import SpeculationBounds
from runtime.exact.native import layout, library
from runtime.exact.native.products import has_products
from runtime.exact.native.singles import LANES, is_fit, singles
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import probe
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads

ROWS = (1, 2, 3, 7, 8, 9, 16, 17)
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the kernels can be built, and a folder of its own for certificates."""
    if not has_products():
        pytest.skip(f"no native kernels here: {library.why_not_native()}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))


def by_fours(weight: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One row's outputs, four lanes each: products rounded, the first one to four begin the first lane."""
    first = (len(row) - 1) % 4 + 1
    lanes = np.zeros((len(weight), 4), np.float32)
    lanes[:, 0] = weight[:, 0] * row[0]
    for k in range(1, first):
        lanes[:, 0] += weight[:, k] * row[k]
    for k in range(first, len(row), 4):
        lanes += weight[:, k : k + 4] * row[k : k + 4]
    return (lanes[:, 0] + lanes[:, 2]) + (lanes[:, 1] + lanes[:, 3])


def by_sixteens(weight: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One row's outputs, sixteen lanes each: products not rounded; the rest is a vector that begins with the sum."""

    def fused(at: slice, lanes: np.ndarray) -> np.ndarray:
        return (weight[:, at].astype(np.float64) * row[at] + lanes).astype(np.float32)

    def folded(lanes: np.ndarray) -> np.ndarray:
        for apart in (8, 4, 2, 1):
            lanes = lanes[:, :apart] + lanes[:, apart : 2 * apart]
        return lanes[:, 0]

    lanes = np.zeros((len(weight), 16), np.float32)
    lanes[:, 0] = weight[:, 0] * row[0]
    whole = len(row) - (len(row) - 1) % 16
    for k in range(1, whole, 16):
        lanes = fused(slice(k, k + 16), lanes)
    total = folded(lanes)
    if whole < len(row):
        lanes = np.zeros((len(weight), 16), np.float32)
        lanes[:, 0] = total
        lanes[:, : len(row) - whole] = fused(slice(whole, None), lanes[:, : len(row) - whole])
        total = folded(lanes)
    return total


@pytest.mark.parametrize("inputs", [16, 17, 33, 64, 130, 576])
@pytest.mark.parametrize("lanes", LANES)
def test_numbers_are_added_as_written_down(lanes: int, inputs: int) -> None:
    """Two weights side by side, a bias at the end, any number of rows."""
    torch.manual_seed(inputs)
    weights, bias = [torch.randn(16, inputs), torch.randn(32, inputs)], torch.randn(48)
    rows = torch.randn(max(ROWS), inputs)
    order = by_fours if lanes == 4 else by_sixteens
    whole = torch.cat(weights).numpy()
    expected = np.stack([order(whole, row) + bias.numpy() for row in rows.numpy()])
    for count in ROWS:
        given = singles(rows[:count], weights, bias, 48, lanes=lanes)
        assert np.array_equal(given.numpy(), expected[:count])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (576, 1536), (1024, 1100), (896, 4864), (32000, 64)])
@torch.no_grad()
def test_products_have_the_bits_of_each_row_alone(shape: tuple[int, int], bias: bool) -> None:
    """Where the order is found to be the Linear's; at any number of rows."""
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    found = layout.layout_of(linear, shape[0])
    if found is None:
        pytest.skip("torch adds in an order of its own here")
    packed = found.pack([linear.weight])
    for rows in ROWS:
        block = torch.randn(rows, shape[1])
        alone = torch.cat([linear(row[None]) for row in block])
        assert torch.equal(found.multiply(block, packed, linear.bias, shape[0]), alone)


@torch.no_grad()
def test_an_order_that_is_torch_s_is_found() -> None:
    """Where one of the two written down above gives torch's numbers, the kernel runs, also for odd K."""
    torch.manual_seed(1)
    for inputs in (576, 577):
        linear, row = nn.Linear(inputs, 320, bias=False), torch.randn(inputs)
        expected, weight = linear(row[None])[0].numpy(), linear.weight.numpy()
        known = [order for order in (by_fours, by_sixteens) if np.array_equal(order(weight, row.numpy()), expected)]
        assert (layout.layout_of(linear, 320) is not None) == bool(known)


def test_no_rows_give_no_outputs() -> None:
    """As torch's Linear."""
    assert singles(torch.empty(1, 0, 32), [torch.zeros(16, 32)], None, 16, lanes=4).shape == (1, 0, 16)


def test_a_model_of_two_dtypes_runs_natively_in_bfloat16_alone(make_model: Any) -> None:
    """Policies go by shape, which says nothing of the dtype; float32 is left to torch there."""
    model = make_model(**WIDE).to(torch.bfloat16)
    assert PackedLinears.of(model) is not None
    model.model.layers[0].mlp.down_proj.float()
    kept = model.model.layers[0].mlp.down_proj
    kept.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    kept.register_forward_hook(lambda _, __, output: output.bfloat16())
    found = PackedLinears.of(model)
    assert found is not None
    dtypes = {module.weight.dtype for joint in found.joint for module in joint.modules}
    assert dtypes == {torch.bfloat16}


def test_products_in_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: of the orders at most one is torch's, and the others do not pass."""
    passed = []
    for lanes in LANES:
        monkeypatch.setattr(layout, "LANES", (lanes,))
        passed.append(layout.layout_of(nn.Linear(576, 576), 576) is not None)
    assert sum(passed) <= 1


def test_weights_of_other_sizes_and_places_are_left_to_torch() -> None:
    """There it adds in other orders."""
    buffer = torch.zeros(64 * 64 + 1)
    assert is_fit(buffer[:-1].view(64, 64))
    assert not is_fit(buffer[1:].view(64, 64))
    assert not is_fit(torch.zeros(63, 64))
    assert not is_fit(torch.zeros(64, 8))


@pytest.mark.parametrize("moved", [False, True])
def test_a_float32_model_keeps_its_ids(make_model: Any, moved: bool) -> None:
    """Its Linears in our kernel where their order is known; also where some weights lie elsewhere in memory."""
    model = make_model(**WIDE)
    if moved:
        for layer in model.model.layers[1:]:
            layer.mlp.down_proj.weight = nn.Parameter(elsewhere(layer.mlp.down_proj.weight), requires_grad=False)
    found = PackedLinears.of(model)
    if found is None or not found.joint:
        pytest.skip("torch adds in an order of its own here")
    certificate = probe(model, max_width=4, packed=found)
    assert certificate.bitwise and certificate.native
    attach(model, SpecBound(model, FakeHeads("random", [1]), SpeculationBounds(0.5, 1, 3)))
    prompt = torch.tensor([[5, 9, 2, 7]])
    given = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    with model.specbound.disabled():
        expected = model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)
    assert torch.equal(given, expected)
    assert model.specbound.stats.rounds < 24


def elsewhere(weight: Tensor) -> Tensor:
    """The same numbers, eight bytes behind a multiple of 64."""
    buffer = torch.empty(weight.numel() + 2)
    moved = buffer[2:].view(weight.shape)
    with torch.no_grad():
        moved.copy_(weight)
    return moved

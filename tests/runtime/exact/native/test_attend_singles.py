"""Attention in float32 by our own kernel: added as written down, torch's bits for one row, and refused otherwise."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from runtime import SpeculationBounds
from runtime.decoding.rows import TreeRows
from runtime.exact.attention import BlockAttention
from runtime.exact.native import library
from runtime.exact.native.attend import SINGLES, attend, can_attend
from runtime.exact.native.products import has_products
from runtime.exact.order import cancelling, same_attention, same_sums
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import probe
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.native.single_orders import alone, is_torch_s, means, score, telling_values

HEADS = (4, 1, 64)
KIND = f"native_{SINGLES}"
PATHS = ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 2, 4), (0, 2, 5), (0, 1, 3, 6), (0, 1, 3, 6, 7), (0, 1, 3, 6, 7, 8))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the kernels can be built, and a folder of its own for certificates."""
    if not has_products():
        pytest.skip(f"no native kernels here: {library.why_not_native()}")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Torch's, which share the heads out."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def known() -> None:
    """A machine whose torch adds so; our kernel has to have its bits then."""
    if not is_torch_s():
        pytest.skip("torch attends in an order of its own here")
    assert in_order()


def in_order(heads: tuple[int, int, int] = HEADS) -> bool:
    """Whether the probe finds our kernel's bits to be torch's."""
    attention, device = BlockAttention(KIND, "sdpa"), torch.device("cpu")
    blocks = (same_attention(attention, heads, rows, dtype=torch.float32, device=device) for rows in (1, 2, 5))
    return all(blocks) and same_sums(attention, heads[2])


@pytest.mark.parametrize("keys", [1, 7, 8, 13, 203, 512, 525, 1100])
def test_values_add_as_written_down(threads: int, keys: int) -> None:
    """In plain numpy, whatever order this machine's torch has."""
    query, own, values = telling_values(keys, 80)
    found = attend(query, own, values, None, SINGLES)
    assert found is not None and np.array_equal(found[0, 0].numpy(), means(values, threads))


@pytest.mark.parametrize("size", [8, 24, 64, 80, 128])
@pytest.mark.parametrize("number", [1, 2, 3, 40, 41, 42, 43])
def test_scores_add_as_written_down(number: int, size: int) -> None:
    """Of keys that cancel: another order gives other scores altogether, and keys other weights."""
    torch.manual_seed(size)
    keys, values = cancelling(number, size, torch.float32), torch.randn(number, size)
    scores = torch.from_numpy(score(np.ones(size, np.float32), keys.numpy()))
    scale = float(4 / scores.abs().max().clamp(min=1e-3))
    found = attend(torch.ones(1, 1, 1, size), keys[None, None], values[None, None], scale, SINGLES)
    assert found is not None
    assert torch.allclose(found[0, 0, 0], (scores * scale).softmax(0) @ values, atol=1e-5)


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 7, 17, 48, 511, 512, 513, 1023, 1024, 1025])
@pytest.mark.usefixtures("known", "threads")
def test_attention_has_the_bits_of_each_row_alone(length: int, size: int) -> None:
    """Rows of a block over their own keys; keys after them, though they are no numbers, are not read."""
    torch.manual_seed(length)
    rows = min(6, length)
    for heads, shared in ((6, 2), (3, 3), (7, 1)):
        query = torch.randn(1, heads, rows, size)
        keys, values = torch.randn(2, 1, shared, length + 5, size)
        keys[:, :, length:], values[:, :, length:] = torch.nan, torch.inf
        block = attend(query, keys[:, :, :length], values[:, :, :length], None, SINGLES)
        assert block is not None
        for row in range(rows):
            own = (part[:, :, : length - rows + row + 1] for part in (keys, values))
            assert torch.equal(block[:, row], alone(query[:, :, row : row + 1], *own))


@pytest.mark.parametrize("settled", [0, 1, 15, 47, 505, 1030])
@pytest.mark.usefixtures("known", "threads")
def test_a_row_of_a_tree_has_the_bits_of_its_path(settled: int) -> None:
    """Across fours, vectors and blocks; no key that it does not see is read."""
    torch.manual_seed(settled)
    length = settled + 9
    query = torch.randn(1, 6, len(PATHS), 64)
    keys, values = torch.randn(2, 1, 2, length + 3, 64)
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    tree = TreeRows(settled, PATHS)
    for row in range(len(PATHS)):
        own = tree.keys(row, query.device)
        poisoned = [torch.full_like(part, torch.nan).index_copy_(2, own, part[:, :, own]) for part in (keys, values)]
        only = attend(
            query[:, :, row : row + 1],
            *(p[:, :, :length] for p in poisoned),
            None,
            SINGLES,
            TreeRows(settled, PATHS[row : row + 1]),
        )
        expected = alone(query[:, :, row : row + 1], keys[:, :, own], values[:, :, own])
        assert only is not None and torch.equal(only[:, 0], expected)
        found = attend(query, keys[:, :, :length], values[:, :, :length], None, SINGLES, tree)
        assert found is not None and torch.equal(found[:, row], expected)


Attend = Callable[..., Tensor | None]


def backwards(query: Tensor, keys: Tensor, values: Tensor, *more: Any) -> Tensor | None:
    """Keys in another order."""
    return attend(query, keys.flip(2), values.flip(2), *more)


def last_bit(query: Tensor, keys: Tensor, values: Tensor, _: float | None, *more: Any) -> Tensor | None:
    """Scores off in their last bit."""
    return attend(query, keys, values, query.shape[3] ** -0.5 * (1 + 2**-23), *more)


def elsewhere(query: Tensor, *more: Any) -> Tensor | None:
    """As if other threads of torch had the heads: a head more, which changes who has which."""
    found = attend(torch.cat([query, query[:, :1]], 1), *more)
    return None if found is None else found[:, :, :-1]


@pytest.mark.parametrize("spoilt", [backwards, last_bit, elsewhere])
@pytest.mark.usefixtures("known")
def test_another_order_is_refused(spoilt: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the probe sees it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert in_order()
        monkeypatch.setattr("runtime.exact.attention.attend", spoilt)
        assert not in_order()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("known")
def test_a_sum_of_weights_in_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: weights alone, which are positive, so that nothing cancels."""
    assert same_sums(BlockAttention(KIND, "sdpa"), 64)
    monkeypatch.setattr("runtime.exact.attention.attend", backwards)
    assert not same_sums(BlockAttention(KIND, "sdpa"), 64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_go_to_torch(bad: float) -> None:
    """The kernel says so, and the block gets what torch gives."""
    query, keys, values = (torch.rand(1, 2, 4, 64) for _ in range(3))
    keys[0, 0, 1, 5] = bad
    assert can_attend(query, keys, values, SINGLES)
    assert attend(query, keys, values, None, SINGLES) is None
    module = nn.Module()
    module.__dict__["num_key_value_groups"] = 1
    native, _ = BlockAttention(KIND, "sdpa")(module, query, keys, values, None)
    rowwise, _ = BlockAttention("rowwise", "sdpa")(module, query, keys, values, None)
    assert torch.equal(native, rowwise) or torch.equal(native.isnan(), rowwise.isnan())


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 64), (torch.float32, 12), (torch.float32, 264)], ids=str)
def test_what_the_kernel_does_not_take_goes_to_torch(dtype: torch.dtype, size: int) -> None:
    """Other dtypes, sizes that are no multiple of eight, heads too large."""
    tensor = torch.zeros(1, 2, 3, size, dtype=dtype)
    assert not can_attend(tensor, tensor, tensor, SINGLES)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.usefixtures("known")
def test_a_float32_model_keeps_its_ids(make_model: Any, sampled: bool, branches: int) -> None:
    """Chains and trees; the certificate names the kernel."""
    model = make_model(**WIDE)
    certificate = probe(model, max_width=7, packed=PackedLinears.of(model))
    assert certificate.bitwise and "attention native (singles)" in str(certificate)
    bounds = SpeculationBounds(0.0, 1, 6, max_branches=branches, max_depth=3)
    attach(model, SpecBound(model, FakeHeads("random", [1]), bounds))
    options: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": sampled, "pad_token_id": 0}
    prompt = torch.tensor([[5, 9, 2, 7, 5, 9]])
    torch.manual_seed(3)
    given = model.generate(prompt, **options)
    torch.manual_seed(3)
    with model.specbound.disabled():
        expected = model.generate(prompt, **options)
    assert torch.equal(given, expected) and model.specbound.stats.rounds
    assert model.specbound.prepared.certificate.policy.attention == KIND

"""Numbers that show another order of additions, where ordinary ones seldom do."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from runtime.exact import order
from runtime.exact.attention import WINDOW_KINDS, BlockAttention
from runtime.exact.execution import in_rows
from runtime.exact.native.library import why_not_native
from runtime.exact.order import cancelling, same_attention, same_linear, windows_like
from runtime.exact.probe import probe
from tests.helpers.native.orders import torch_order

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = [(4, 2, 8), (8, 8, 32), (9, 3, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 33, 576])
def test_each_row_cancels(dtype: torch.dtype, size: int) -> None:
    """Exactly, so that what a kernel leaves is rounding."""
    rows = cancelling(5, size, dtype)
    assert rows.shape == (5, size) and rows.dtype == dtype and rows.isfinite().all()
    ordered = rows.double().sort().values
    assert torch.equal((ordered + ordered.flip(-1)), torch.zeros(5, size, dtype=torch.float64))


def turned(linear: Any) -> Callable[[Tensor], Tensor]:
    """The same sums, from the sixth input on and then the first five."""
    weight = linear.weight if isinstance(linear, Conv1D) else linear.weight.t()
    return lambda hidden: hidden.roll(-5, -1) @ weight.roll(-5, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("like", [nn.Linear(64, 96), nn.Linear(576, 32, bias=False), Conv1D(96, 64)])
def test_another_order_of_a_linear_is_seen(dtype: torch.dtype, like: nn.Module) -> None:
    """One row a call is the order itself; nothing is drawn from the user's random numbers."""
    like, state = like.to(dtype), torch.random.get_rng_state()
    assert same_linear(partial(in_rows, rows=1), like, 96, [2, 5])
    assert not same_linear(turned, like, 96, [2, 5])
    assert torch.equal(torch.random.get_rng_state(), state)


def bias_first(linear: Any) -> Callable[[Tensor], Tensor]:
    """The bias before the products: the last input of all, instead of what is added at the end."""
    weight, bias = linear.weight.float(), linear.bias.float()

    def run(hidden: Tensor) -> Tensor:
        total = bias.expand(*hidden.shape[:-1], -1)
        for place in range(hidden.shape[-1]):
            total = total + hidden[..., place, None].float() * weight[:, place]
        return total.to(linear.weight.dtype)

    return run


def test_the_place_of_a_bias_shows() -> None:
    """Two ways that differ in it alone."""
    linear, inputs = order.telling_linear(nn.Linear(64, 96), 96)
    given = torch.ones(1, 1, inputs)
    last = bias_first(SimpleNamespace(weight=linear.weight, bias=torch.zeros(96)))(given) + linear.bias
    assert not torch.equal(bias_first(linear)(given), last)


class Backwards(BlockAttention):
    """Each row alone, its keys from the last to the first."""

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        if query.shape[2] == 1:
            return super().__call__(module, query, key, value, mask, **kwargs)
        last, seen = query.shape[2] - 1, key.shape[2]
        rows = [
            super(Backwards, self).__call__(
                module,
                query[:, :, row : row + 1],
                key[:, :, : seen - last + row].flip(2),
                value[:, :, : seen - last + row].flip(2),
                mask,
                **kwargs,
            )[0]
            for row in range(last + 1)
        ]
        return torch.cat(rows, 1), None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_another_order_of_attention_is_seen(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Row by row is the order itself."""
    where = {"dtype": dtype, "device": torch.device("cpu")}
    assert same_attention(BlockAttention("rowwise", "sdpa"), heads, 5, **where)
    assert not same_attention(Backwards("rowwise", "sdpa"), heads, 5, **where)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", HEADS)
def test_groups_are_close_to_row_by_row(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    """Around multiples of the vector length, where groups end, and with one row more than a group holds."""
    queries, shared, size = heads
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, shared, 200, size).to(dtype)
    module = nn.Module()
    module.num_key_value_groups = queries // shared  # type: ignore[assignment]
    for length in (9, 15, 16, 17, 31, 33, 48, 64, 127, 130, 200):
        for rows in (2, 5, 9):
            query = torch.randn(1, queries, rows, size).to(dtype)
            given = query, keys[:, :, :length], values[:, :, :length]
            one, other = (BlockAttention(kind, "sdpa")(module, *given, None)[0] for kind in ("grouped", "rowwise"))
            torch.testing.assert_close(one, other)


def test_groups_are_taken_only_where_they_keep_the_order(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which CPUs do differs; what the probe of a model of this shape finds follows, where no kernel of ours is."""
    monkeypatch.setattr("runtime.exact.probe.NATIVE_KINDS", ())
    model = make_model().bfloat16()
    kept = same_attention(BlockAttention("grouped", "sdpa"), (4, 2, 8), 5, dtype=model.dtype, device=model.device)
    assert probe(model, max_width=5).policy.attention == ("grouped" if kept else "rowwise")


@pytest.mark.parametrize(
    ("window", "expected"),
    [(20, [20]), (512, [37, 512]), (777, [37, 777]), (1024, [37, 1024]), (1030, [37, 518]), (4096, [37, 1024])],
)
def test_windows_end_as_the_model_s_own_does(window: int, expected: list[int]) -> None:
    """Torch's order goes by the keys of its last block of 512."""
    assert windows_like(window) == expected


def test_orders_of_full_windows_are_told_apart() -> None:
    """At most one of them passes, also where the last block of keys is short."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    kinds = [kind for kind in WINDOW_KINDS if kind.startswith(f"native_{torch_order()}_")]
    if why_not_native() is not None or not kinds:
        pytest.skip(f"no native kernels here, or torch attends in an order of its own: {why_not_native()}")
    for window in (64, 383, 512, 520):
        passing = [
            k for k in kinds if same_attention(BlockAttention(k, "sdpa"), (8, 2, 64), 1, window=window, **options)
        ]
        assert len(passing) <= 1

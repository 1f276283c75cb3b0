"""Our own kernels: the bits of torch's Linears and attention for one row, and refused where their order is another."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn
from torch.nn import functional

from runtime.exact import order as order_module
from runtime.exact.attention import NATIVE_KINDS, BlockAttention
from runtime.exact.native import library
from runtime.exact.native.attend import ORDERS, attend, can_attend
from runtime.exact.native.products import has_products
from runtime.exact.order import same_attention
from tests.helpers.native.orders import orders_of, score_sum, telling_values, torch_order
from tests.helpers.paths import ROOT

HEADS = (4, 2, 64)
SCALE = 0.05  # of scores


@pytest.fixture
def kernels() -> None:
    """A machine on which the kernels can be built."""
    if not has_products():
        pytest.skip(f"no native kernels here: {library.why_not_native()}")


@pytest.fixture
def attention_order(kernels: None) -> str:
    """The order in which this machine's torch attends, as torch's own sums tell; our kernel has to have its bits."""
    name = torch_order()
    if name is None:
        pytest.skip("torch attends in an order of its own here")
    assert in_order(name), f"torch attends in {name} here, and our kernel in {name} has other bits"
    return name


def in_order(name: str) -> bool:
    """Whether our kernel in this order has torch's bits on this machine."""
    attention = BlockAttention(f"native_{name}", "sdpa")
    return all(
        same_attention(attention, HEADS, rows, dtype=torch.bfloat16, device=torch.device("cpu")) for rows in (1, 2, 5)
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("keys", [1, 2, 7, 33, 203])
def test_values_add_as_written_down(kernels: None, order: str, keys: int) -> None:
    """In plain torch, whatever order this machine's torch has; at numbers of keys that fill no tile."""
    given = telling_values(keys, 80)
    found = attend(*given, None, order)
    assert found is not None
    same = orders_of(found[0, 0, 0], given[2])
    assert order in same and (keys < 203 or same == [order])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [20, 64, 80, 128])
def test_scores_add_as_written_down(kernels: None, order: str, size: int) -> None:
    """Of keys that cancel: another order gives other scores altogether, and keys other weights."""
    torch.manual_seed(size)
    keys, values = order_module.cancelling(40, size, torch.bfloat16), torch.randn(40, size).bfloat16()
    found = attend(torch.ones(1, 1, 1, size).bfloat16(), keys[None, None], values[None, None], SCALE, order)
    assert found is not None

    def distance(each: str) -> float:
        scores = score_sum(keys.float().t(), each) * SCALE
        return float((found[0, 0, 0].double() - scores.double().softmax(0) @ values.double()).abs().max())

    near = [each for each in ORDERS if distance(each) < 0.004]
    assert order in near and (size < 64 or near == [order])


@pytest.mark.parametrize("size", [64, 80, 128])
@pytest.mark.parametrize("length", [1, 2, 17, 48, 511, 512, 513, 1100])
def test_attention_has_the_bits_of_each_row_alone(attention_order: str, length: int, size: int) -> None:
    """Rows of a block over their own keys; keys after them, though they are no numbers, are not read."""
    torch.manual_seed(length)
    rows = min(3, length)
    query, keys, values = (
        torch.randn(1, heads, count, size).to(torch.bfloat16)
        for heads, count in ((6, rows), (2, length + 5), (2, length + 5))
    )
    keys[:, :, length:] = torch.nan
    values[:, :, length:] = torch.inf
    block = attend(query, keys[:, :, :length], values[:, :, :length], None, attention_order)
    assert block is not None
    for row in range(rows):
        seen = length - rows + row + 1
        own_keys, own_values = (part[:, :, :seen].repeat_interleave(3, 1) for part in (keys, values))
        stock = functional.scaled_dot_product_attention(query[:, :, row : row + 1], own_keys, own_values)
        assert torch.equal(block[:, row], stock[:, :, 0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shared", [1, 2, 3, 4, 7])
def test_rows_and_heads_that_go_together_have_the_bits_they_have_alone(kernels: None, shared: int, order: str) -> None:
    """However many rows, and heads on the same keys; with numbers too small to be normal among the values."""
    torch.manual_seed(shared)
    for length, rows, size in ((9, 9, 80), (64, 3, 64), (71, 8, 48), (600, 6, 64)):
        query = torch.randn(1, 2 * shared, rows, size).bfloat16()
        keys, values = torch.randn(2, 1, 2, length, size).bfloat16()
        values[:, :, :, ::5] *= 1e-38
        block = attend(query, keys, values, None, order)
        assert block is not None
        for row in range(rows):
            own = [part[:, :, : length - rows + row + 1] for part in (keys, values)]
            for head in range(2 * shared):
                group = slice(head // shared, head // shared + 1)
                one = query[:, head : head + 1, row : row + 1]
                alone = attend(one, *(part[:, group] for part in own), None, order)
                assert alone is not None and torch.equal(block[:, row, head], alone[:, 0, 0])


def test_the_other_order_of_attention_is_refused(attention_order: str) -> None:
    """Negative control: the orders differ, and the probe sees it."""
    assert [name for name in ORDERS if in_order(name)] == [attention_order]


def test_another_sum_of_weights_is_refused(attention_order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: weights that are added in another order, which no number that cancels can show."""
    assert order_module.same_sums(BlockAttention(f"native_{attention_order}", "sdpa"), HEADS[2])

    def backwards(query: Tensor, keys: Tensor, values: Tensor, *args: Any) -> Tensor | None:
        return attend(query, keys.flip(2), values.flip(2), *args)

    monkeypatch.setattr("runtime.exact.attention.attend", backwards)
    assert not order_module.same_sums(BlockAttention(f"native_{attention_order}", "sdpa"), HEADS[2])


def test_a_sum_of_weights_off_in_its_last_bits_is_refused(
    attention_order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: scores off in their last bit, which millions of ordinary outputs hardly show."""
    attention = BlockAttention(f"native_{attention_order}", "sdpa")

    def shifted(query: Tensor, keys: Tensor, values: Tensor, _: float | None, name: str, *more: Any) -> Tensor | None:
        return attend(query, keys, values, HEADS[2] ** -0.5 * (1 + 2**-23), name, *more)

    monkeypatch.setattr("runtime.exact.attention.attend", shifted)
    assert not order_module.same_sums(attention, HEADS[2])
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 32, count, 64).bfloat16() for count in (1, 203, 203))
    ordinary, _ = BlockAttention("rowwise", "sdpa")(torch.nn.Identity(), query, keys, values, None)
    shown = attend(query, keys, values, HEADS[2] ** -0.5 * (1 + 2**-23), attention_order)
    assert shown is not None and torch.equal(shown, ordinary)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_no_numbers_go_to_torch(kernels: None, bad: float) -> None:
    """The kernel says so, and the block gets what torch gives."""
    torch.manual_seed(0)  # that some score of the bad key is above the others
    query, keys, values = (torch.randn(1, 2, 4, 64).to(torch.bfloat16) for _ in range(3))
    keys[0, 0, 1, 5] = bad
    assert can_attend(query, keys, values)
    for name in ORDERS:
        assert attend(query, keys, values, None, name) is None
    module = nn.Module()
    module.__dict__["num_key_value_groups"] = 1
    native, _ = BlockAttention(NATIVE_KINDS[0], "sdpa")(module, query, keys, values, None)
    rowwise, _ = BlockAttention("rowwise", "sdpa")(module, query, keys, values, None)
    assert torch.equal(native, rowwise) or torch.equal(native.isnan(), rowwise.isnan())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 6), (torch.bfloat16, 260)], ids=str)
def test_what_the_kernel_does_not_take_goes_to_torch(dtype: torch.dtype, size: int) -> None:
    """Other dtypes, odd sizes, heads too large."""
    tensor = torch.zeros(1, 2, 3, size, dtype=dtype)
    assert not can_attend(tensor, tensor, tensor)


def loaded(home: Path, **environment: str) -> str:
    """What a fresh process says of the kernels."""
    code = "from runtime.exact.native.library import why_not_native; print(why_not_native())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"HF_HOME": str(home), "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_without_a_compiler_there_are_none_until_one_has_built_them(kernels: None, tmp_path: Path) -> None:
    """The reason is a line; what another process has built is used. The compiler gives what this process has built."""
    built, compiler = library.native_library(), tmp_path / "g++"
    assert built is not None
    compiler.write_text(
        f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp "{built._name}" "$2"\n', encoding="utf-8"
    )
    compiler.chmod(0o755)
    assert "no C++ compiler" in loaded(tmp_path, PATH="")
    assert loaded(tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin") == "None"
    assert loaded(tmp_path, PATH="") == "None"
    assert len(list((tmp_path / "specbound").glob("native-*"))) == 1  # nothing half-built stays


def test_a_cache_that_cannot_be_written_gives_none(kernels: None, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "specbound").write_text("in the way", encoding="utf-8")
    assert loaded(tmp_path, PATH="/usr/bin:/bin:/usr/local/bin") not in ("None", "")


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With its last line; nothing is left behind."""
    monkeypatch.setattr(library, "_missing", lambda: None)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(library.Unavailable, match="no such option"):
        library._load()
    assert list((tmp_path / "specbound").iterdir()) == []


def test_no_memory_is_touched_that_is_not_theirs(kernels: None, tmp_path: Path) -> None:
    """Odd sizes, one row to 64, contexts of 1 to 8,192, under the address and undefined-behaviour sanitizers."""
    program = tmp_path / "sanitized"
    sources = [str(Path(__file__).with_name("sanitized.cpp")), str(library.SOURCE)]
    flags = [flag for flag in library.COMPILE if flag not in ("-O3", "-fPIC")]
    sanitizers = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(["g++", *flags, *sanitizers, *sources, "-o", str(program)], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"no sanitizers here: {built.stderr.strip().splitlines()[-1]}")
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr


def test_other_platforms_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named."""
    monkeypatch.setattr(library.platform, "system", lambda: "Darwin")
    with pytest.raises(library.Unavailable, match="not Darwin"):
        library._load()

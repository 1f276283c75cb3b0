"""Attention of prompts in our own kernel: torch's bits at every length, whichever rows are asked for, or none."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from runtime.exact.native.attend import can_attend
from runtime.exact.native.prompt_attention import PromptAttention, block_of, few_rows

HEADS = [(9, 3, 64), (4, 1, 128), (2, 2, 80), (4, 1, 256), (6, 2, 96), (3, 1, 20)]
# Around blocks of queries and of keys, and where parts of keys that are summed apart change.
LENGTHS = [
    13,
    31,
    32,
    33,
    34,
    36,
    65,
    66,
    100,
    191,
    192,
    193,
    194,
    200,
    257,
    300,
    383,
    384,
    385,
    400,
    511,
    512,
    513,
    514,
]
LENGTHS += [516, 520, 523, 524, 600, 704, 767, 768, 769, 770, 900, 1024, 1025, 1030]


def attention(heads: tuple[int, int, int]) -> PromptAttention:
    """Of such heads, or a skip where torch's order is another."""
    made = PromptAttention(heads, heads[2] ** -0.5, ALL_ATTENTION_FUNCTIONS["sdpa"])
    parts = made.told(40)
    if not can_attend(*parts) or not _same(made(*parts), made.stock(*parts)):
        pytest.skip("torch adds a prompt's attention in another order here, or there are no kernels")
    return made


def _same(found: Tensor | None, stock: Tensor) -> bool:
    return found is not None and torch.equal(found, stock)


def numbers(heads: tuple[int, int, int], length: int) -> list[Tensor]:
    """Queries, keys and values as texts have them: [1, H, T, E] seen from [1, T, H, E]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, length, count, heads[2]) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_every_length_has_the_bits_of_torch(heads: tuple[int, int, int], threads: int) -> None:
    """On numbers that tell the order, and on such as texts have; and the last rows alone have those of the whole."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = attention(heads)
        for length in LENGTHS:
            assert ours.knows(length), length
            parts = numbers(heads, length)
            whole = ours.stock(*parts)
            for first in {0, 1, length // 3, length - 5, length - 1}:
                rest = ours(parts[0][:, :, first:], *parts[1:])
                assert rest is not None and torch.equal(rest, whole[:, first:]), (length, first)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS[:3], ids=str)
def test_rows_that_are_common_are_so_in_torch(heads: tuple[int, int, int]) -> None:
    """Of pairs of lengths; and no more could be said of some of them, so that it says neither too much nor nothing."""
    ours, exact = attention(heads), 0
    generator = torch.Generator().manual_seed(5)
    for one, other in torch.randint(13, 900, (60, 2), generator=generator).tolist():
        rows = ours.common(one, other)
        assert 0 <= rows <= min(one, other)
        told = ours.told(max(one, other))
        outputs = [ours.stock(*[part[:, :, :length].contiguous() for part in told])[0] for length in (one, other)]
        assert torch.equal(outputs[0][:rows], outputs[1][:rows]), (one, other)
        shorter = min(one, other)
        exact += rows < shorter and not torch.equal(outputs[0][:shorter], outputs[1][:shorter])
    assert exact > 0


def test_rows_are_few_at_the_end_of_some_lengths() -> None:
    """Queries in a block that is cut short, or keys in one."""
    assert [few_rows(length) for length in (64, 65, 66, 67, 68, 192, 194, 520, 523, 524, 769)] == [
        0, 1, 2, 3, 0, 0, 2, 8, 11, 0, 1,
    ]  # fmt: skip
    assert [block_of(length) for length in (191, 192, 767, 768)] == [32, 64, 64, 256]


@torch.no_grad()
def test_numbers_that_are_not_finite_are_left_to_torch() -> None:
    """Wherever they are; and all others are taken."""
    ours = attention((4, 2, 64))
    assert ours(*numbers((4, 2, 64), 50)) is not None
    for part in range(3):
        for what in (torch.inf, torch.nan):
            parts = numbers((4, 2, 64), 50)
            parts[part][0, 1, 20, 3] = what
            assert ours(*parts) is None


@torch.no_grad()
def test_another_order_is_not_known() -> None:
    """Negative control: a kernel that adds otherwise, from the start or at some lengths; three rows at the end."""
    attention((4, 2, 64))
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def rounded(module: Any, query: Tensor, *others: Any, **given: Any) -> Any:
        found, weights = sdpa(module, query, *others, **given)
        if query.shape[2] < least:
            return found, weights
        return found.flatten().index_copy(0, torch.tensor([70]), found.flatten()[70:71] * 1.01).view_as(found), weights

    least = 0
    always = PromptAttention((4, 2, 64), 0.125, rounded)
    assert not always.knows(100) and not always.knows(200) and len(always._lengths) == 1
    least = 150
    longer = PromptAttention((4, 2, 64), 0.125, rounded)
    assert longer.knows(100) and not longer.knows(200) and longer.knows(120) and not longer.knows(99)

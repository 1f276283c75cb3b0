"""Whether two ways to compute add in the same order, on numbers made so that any other order shows.

Sums of bfloat16 products are mostly exact in float32, so that two orders of addition give the same bits on ordinary
activations in all but one row of thousands: too seldom for a probe of a few hundred rows, too often for a text. These
numbers span more bits than a sum holds, and cancel: what is left is rounding alone. Knows no model and no policy.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from runtime.exact.attention import BlockAttention
from runtime.exact.native.attend import SINGLES

# Keys around multiples of a vector, and around the block of 512 that torch's CPU kernel sums apart.
LENGTHS = (*range(1, 5), *range(5, 60, 3), 511, 514, 526, 1035)
# Larger weights are looked at by their first rows: bytes.
LARGEST = 2**26
PATTERNS = 32
WHOLE = 64  # outputs that fill vectors: those that do not are added in other orders
# Keys -> times that so many heads are looked at: no full vector of keys, an odd and an even number of them, blocks.
SUMMED, SUMMED_HEADS = {13: 64, 30: 64, 47: 64, 203: 32, 527: 16, 1035: 16}, 256
SUMMED_SINGLES = 2  # times in float32
KEY_BLOCK = 512  # keys that torch's kernel weighs together
SMALL_WINDOW = 37  # keys: every base with windows is looked at with such a one too
FINER = (-4, -3, -2)  # keys whose values move an output in finer and finer steps
NORMED_PARTS, NORMED_NUMBERS, NORMED_ALONE = 16, 2**21, 512


def cancelling(rows: int, size: int, dtype: torch.dtype) -> Tensor:
    """Numbers of shape [rows, size], each row of pairs that cancel, in any order and of very different sizes."""
    generator = torch.Generator().manual_seed(size)
    # Of float16, whose range is small, the sizes are as different as they can be.
    spread = 12 if dtype == torch.float16 else 24
    half = torch.randn(rows, size // 2, generator=generator)
    half *= torch.exp2(torch.randint(-spread, spread + 1, half.shape, generator=generator).float())
    whole = torch.cat([half, -half, torch.zeros(rows, size % 2)], 1).to(dtype)
    return whole[:, torch.randperm(size, generator=generator)]


def same_linear(
    make: Callable[[nn.Module], Callable[[Tensor], Tensor]], like: nn.Module, outputs: int, widths: Sequence[int]
) -> bool:
    """Whether a block through `make(linear)` gives each row what the Linear itself gives it alone.

    Args:
        make: gives what runs a block in the place of a Linear.
        like: a Linear of the model, for its class, input size, dtype and device, and whether there is a bias.
        outputs: numbers that come out, of all Linears that run as one.
    """
    linear, inputs = telling_linear(like, outputs)
    run = make(linear)
    weight: Tensor = linear.weight  # type: ignore[assignment]
    for width in widths:
        # Halves and doubles: every row has the same roundings, in numbers of its own.
        scales = torch.exp2(torch.arange(width) % 5 - 2.0).to(weight)
        block = scales[:, None].expand(width, inputs).contiguous()
        expected = torch.cat([linear(row[None, None])[0] for row in block])
        if not torch.equal(run(block[None])[0], expected):
            return False
    return True


def is_plain(module: nn.Module) -> bool:
    """Whether a Linear is one that can be made anew with other numbers."""
    kinds = (nn.Linear.forward, Conv1D.forward)
    return type(module).forward in kinds and type(module.weight) in (nn.Parameter, Tensor)


def telling_linear(like: nn.Module, outputs: int, *, largest: int | None = LARGEST) -> tuple[nn.Module, int]:
    """A Linear like that, whose rows of weights cancel, and its number of inputs; fewer outputs if too large."""
    weight: Tensor = like.weight  # type: ignore[assignment]
    stands_on_inputs = isinstance(like, Conv1D)
    inputs = weight.shape[0 if stands_on_inputs else 1]
    if largest is not None:
        fewer = largest // (inputs * weight.element_size())
        outputs = min(outputs, max(1, fewer - fewer % WHOLE))
    pattern = cancelling(min(PATTERNS, outputs), inputs, weight.dtype).to(weight.device)
    rows = pattern.repeat(-(-outputs // len(pattern)), 1)[:outputs]
    linear = type(like).__new__(type(like))
    nn.Module.__init__(linear)
    linear.weight = nn.Parameter(rows.t().contiguous() if stands_on_inputs else rows, requires_grad=False)
    # As different in size as the products: it shows where in the sum a bias comes.
    bias = cancelling(1, outputs, weight.dtype)[0].to(weight.device)
    linear.bias = None if like.bias is None else nn.Parameter(bias, requires_grad=False)
    linear.__dict__["nf"] = outputs  # of a Conv1D
    return linear, inputs


def same_attention(
    attention: BlockAttention,
    heads: tuple[int, int, int],
    rows: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> bool:
    """Whether a block's rows attend as torch's kernel lets each attend alone.

    Args:
        attention: of any kind around `sdpa`.
        heads: of queries, of keys, and the size of each.
        rows: of the block.
        window: keys that a row sees at most, if not all.
    """
    stock = BlockAttention("rowwise", "sdpa")
    module = nn.Module()
    module.__dict__["num_key_value_groups"] = heads[0] // heads[1]
    module.__dict__["sliding_window"] = window
    for length in (length for length in LENGTHS if length >= rows):
        for given in (telling_values(heads, rows, length, dtype), _telling_keys(heads, rows, length, dtype)):
            query, keys, values = (tensor.to(device, dtype).contiguous() for tensor in given)
            block, _ = attention(module, query, keys, values, None)
            for row in range(rows):
                seen = length - rows + row + 1
                alone, _ = stock(module, query[:, :, row : row + 1], keys[:, :, :seen], values[:, :, :seen], None)
                if not torch.equal(block[:, row : row + 1], alone):
                    return False
    return True


def same_sums(attention: BlockAttention, size: int) -> bool:
    """Whether a native kind of attention sums the weights of its keys to the bit as torch's kernel for one row.

    Weights are positive: nothing cancels. In float32 any values show the last bit of a sum, in bfloat16 one output in
    60,000. So values are sought there, for each of many heads, at which an output is just between two bfloat16.

    Args:
        attention: around `sdpa`.
        size: of a head.
    """
    stock = BlockAttention("rowwise", "sdpa")
    module = nn.Module()
    module.__dict__["num_key_value_groups"] = 1
    generator = torch.Generator().manual_seed(0)
    for length, times in SUMMED.items():
        for _ in range(SUMMED_SINGLES if attention.order == SINGLES else times):
            query, keys = _graded_keys(length, size, generator)
            if attention.order == SINGLES:
                given = (query.float(), keys.float(), torch.randn(keys.shape, generator=generator), None)
                if not torch.equal(attention(module, *given)[0], stock(module, *given)[0]):
                    return False
                continue
            values = torch.zeros(1, SUMMED_HEADS, length, size, dtype=torch.bfloat16)
            values[:, :, -1] = 1 + torch.randint(128, (SUMMED_HEADS, 1), generator=generator) / 128
            for place in FINER:
                sweep = torch.arange(size) * (80 / size) / 16 - (2 if place == FINER[0] else 0.25)
                values[:, :, place] = sweep
                output, _ = attention(module, query, keys, values, None)
                if place == FINER[-1]:
                    break
                edge = (output[0, 0, :, 1:] != output[0, 0, :, :-1]).int().argmax(-1)
                values[:, :, place] = sweep.to(torch.bfloat16)[edge][:, None]
            if not torch.equal(output, stock(module, query, keys, values, None)[0]):
                return False
    return True


def _graded_keys(length: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A query for each head, and keys that weigh much; the last weighs 1, those of `FINER` 2^-8, 2^-14 and 2^-20."""
    query = torch.randn(1, SUMMED_HEADS, 1, size, generator=generator).bfloat16()
    whole = query.float().square().sum(-1, keepdim=True) * size**-0.5  # score of a key that is the query
    below = 4 * torch.rand(1, SUMMED_HEADS, length, 1, generator=generator)
    below[:, :, -1] = -0.1
    for place, fraction in zip(FINER, (8, 14, 20), strict=True):
        below[:, :, place] = fraction * math.log(2)
    return query, (query.float() * (1 - below / whole)).bfloat16()


def same_norm(norm: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether `run(norm, rows)` gives rows [N, D] what the module gives them: some alone, and very many together.

    Squares are positive: nothing cancels, and another order shows in one row of some thousand.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    for part in range(NORMED_PARTS):
        shape = (NORMED_NUMBERS // weight.shape[0], weight.shape[0])
        sizes = torch.exp2(torch.randint(-2, 3, shape, generator=generator).float())
        rows = (torch.randn(shape, generator=generator) * sizes).to(weight)
        normed = run(norm, rows)
        if not torch.equal(normed, norm(rows[None])[0]):
            return False
        alone = range(min(NORMED_ALONE, len(rows)) if part == 0 else 0)
        if not all(torch.equal(normed[row], norm(rows[None, row : row + 1])[0, 0]) for row in alone):
            return False
    return True


def telling_values(heads: tuple[int, int, int], rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values that cancel: every other head weighs its keys as text does, the rest weigh all alike."""
    num_queries, num_keys, size = heads
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(1, num_queries, rows, size)
    query[:, 1::2] = 4 * torch.randn(query[:, 1::2].shape, generator=generator)
    keys = torch.randn(1, num_keys, length, size, generator=generator)
    values = cancelling(num_keys * size, length, dtype).view(1, num_keys, size, length).transpose(2, 3)
    return query, keys, values


def _telling_keys(heads: tuple[int, int, int], rows: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Keys that cancel: what is left of a score is the rounding of its sum, times a size of its own for each row."""
    num_queries, num_keys, size = heads
    query = torch.exp2(torch.arange(rows) % 5 - 2.0)[None, None, :, None].expand(1, num_queries, rows, size)
    keys = cancelling(num_keys * length, size, dtype).view(1, num_keys, length, size)
    values = torch.randn(1, num_keys, length, size, generator=torch.Generator().manual_seed(0))
    return query, keys, values


def windows_like(window: int) -> list[int]:
    """Windows to look at in the place of one: a small one, and one of at most two blocks of keys, the last as long."""
    own = window if window <= 2 * KEY_BLOCK else KEY_BLOCK + (window % KEY_BLOCK or KEY_BLOCK)
    return sorted({min(window, SMALL_WINDOW), own})


@cache
def kind_in_order(
    kind: str,
    heads: tuple[int, int, int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None,
    threads: int,
) -> bool:
    """`same_attention`, once in a process for all that it depends on."""
    return same_attention(BlockAttention(kind, "sdpa"), heads, rows, dtype=dtype, device=device, window=window)


@cache
def kind_sums(kind: str, size: int, threads: int) -> bool:
    """`same_sums`, once in a process for each kind, head size and number of threads."""
    return same_sums(BlockAttention(kind, "sdpa"), size)

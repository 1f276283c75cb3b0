"""Attention of a block's rows by our own kernel, each row over its own keys, in torch's order for one row.

Whether that gives torch's bits on this machine is the caller's business.
"""

import ctypes

import torch
from torch import Tensor

from runtime.decoding.rows import TreeRows
from runtime.exact.native.library import native_library

MAX_SIZE = 256  # of a head
NO_WINDOW = 2**62  # keys: more than there are
# How products are added: pairs in order; or every fourth number apart, for values fours of keys, the rest backwards;
# or every 16th pair apart, for values eights of keys; or 32 at a time, even and odd ones apart, as the CPU's tiles do;
# or one by one, blocks of them apart.
ORDERS = ("pairs", "fours", "eights", "tiles", "ones")
# And of float32, as MKL's loops for older CPUs add: see `attention_singles.h`.
SINGLES = "singles"


def can_attend(query: Tensor, keys: Tensor, values: Tensor, order: str = ORDERS[0]) -> bool:
    """Whether the kernel is there and takes such tensors in that order.

    Tensors of one request on a CPU: in bfloat16, head sizes in fours; in the order of float32 such, in eights.
    """
    size = query.shape[3]
    dtype, multiple = (torch.float32, 8) if order == SINGLES else (torch.bfloat16, 4)
    return (
        native_library() is not None
        and query.shape[0] == 1
        and size % multiple == 0
        and size <= MAX_SIZE
        and keys.shape == values.shape
        and query.shape[1] % keys.shape[1] == 0
        and all(
            part.dtype == dtype and part.device.type == "cpu" and part.stride(3) == 1 for part in (query, keys, values)
        )
    )


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float | None,
    order: str,
    tree: TreeRows | None = None,
    window: int | None = None,
    filled: str | None = None,
) -> Tensor | None:
    """Row t of T on the first S - T + t + 1 keys, or on those of its path; None where some score is not finite.

    Args:
        query: shape [1, H, T, E], in a dtype of that order.
        keys, values: shape [1, G, S, E].
        scaling: of the scores; by default 1 / sqrt(E).
        order: one of `ORDERS`, or `SINGLES`.
        tree: what the rows see where they do not follow one another.
        window: keys that a row sees at most: the last ones of these. In float32 there have to be fewer.
        filled: order of a row that sees as many as that; by default as others.

    Returns:
        Shape [1, T, H, E].
    """
    library = native_library()
    assert library is not None
    _, heads, rows, size = query.shape
    output = query.new_empty(1, rows, heads, size)
    length = keys.shape[2]
    table = None if tree is None else tree.table(length)
    sizes = (rows, heads, heads // keys.shape[1], size, length)
    strides = [part.stride(dim) for part in (query, keys, values) for dim in (1, 2)]
    settled = 0 if tree is None else tree.settled
    threads = torch.get_num_threads()
    if order == SINGLES:  # bits go by where in memory sums are, and that by torch's threads, which share the heads out
        run, how, rest = library.specbound_attention_singles, -(-heads // min(threads, heads)), (0, 0)
    else:
        run, how = library.specbound_attention, ORDERS.index(order)
        rest = NO_WINDOW if window is None else window, ORDERS.index(filled or order)
    numbers = (ctypes.c_int64 * 14)(*sizes, *strides, settled, *rest)
    scale = size**-0.5 if scaling is None else scaling
    pointers = [part.data_ptr() for part in (query, keys, values, output)]
    paths = None if table is None else table.data_ptr()
    fine = run(*pointers, numbers, paths, scale, how, threads)
    return output if fine else None

"""Exit heads in our own kernels: a `deep` one as one call from hidden states at its exit to drafts and confidences, an
`attention` one as a call for states, keys and values, and one for the drafts of these.

Drafts are verified, so these need no bits of anybody's, and their weights are kept in half the memory. Knows no policy
and no base.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from runtime.drafting.attention_head import AttentionHead, turns
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.head_memory import Reading
from runtime.drafting.heads import DeepHead, HeadContext
from runtime.drafting.unembedding import DraftUnembedding
from runtime.exact.native.library import native_library
from runtime.exact.native.parts import epsilon
from runtime.exact.native.products import LANES, QuantizedWeight
from runtime.exact.native.tables import table_of


class NativeDeepHead:
    """One exit's head, its weights packed.

    Args:
        head, unembedding: in bfloat16 on the CPU.
        rows: those of the unembedding; several heads share them.
        silu: as `table_of` gives it.
    """

    def __init__(self, head: DeepHead, unembedding: DraftUnembedding, rows: QuantizedWeight, silu: Tensor) -> None:
        self.made_of = head, unembedding, rows, silu
        final: Any = unembedding.norm
        own: tuple[Any, ...] = (head.hidden_norm, head.embedding_norm, head.deep_norm)
        self.weights = QuantizedWeight.of(head.gate_up.weight), QuantizedWeight.of(head.down.weight), rows
        vectors = (unembedding.norm_scale.contiguous(), head.keep, head.carry, head.age)
        self.held: list[Any] = [*(norm.weight for norm in own), *vectors]
        self.silu, self.places = silu, _places(self.weights, self.held)
        self.sizes = (head.hidden_size, head.down.in_features, head.draft_vocab_size)
        self.epsilons: tuple[float, float] = (own[0].eps, epsilon(final))
        self.scaling = unembedding.scaling

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle is made anew from its modules: addresses cannot be copied."""
        return NativeDeepHead, self.made_of

    def __call__(self, hidden: Tensor, context: HeadContext, temperature: float, count: int) -> tuple[Tensor, Tensor]:
        """Draft ids and confidences [N, count] of hidden states [N, D]; id 0 and NaN where no logit is a number."""
        library = native_library()
        assert library is not None
        rows = hidden.shape[0]
        ids, chances = torch.empty(rows, count, dtype=torch.int64), torch.empty(rows, count)
        given = [part.contiguous() for part in (hidden, context.embedding, context.deep, context.age)]
        library.specbound_draft(
            self.places,
            (ctypes.c_int64 * 5)(rows, count, *self.sizes),
            (ctypes.c_float * 3)(*self.epsilons, temperature * self.scaling),
            *(part.data_ptr() for part in given),
            self.silu.data_ptr(),
            ids.data_ptr(),
            chances.data_ptr(),
            torch.get_num_threads(),
        )
        return ids.clamp_(min=0), chances


class NativeAttentionHead:
    """One exit's head, its weights packed; takes what `AttentionHead.step` takes, and makes drafts of its states.

    Args:
        head, unembedding: in bfloat16 on the CPU.
        rows: those of the unembedding; several heads share them.
        silu: as `table_of` gives it.
    """

    def __init__(
        self, head: AttentionHead, unembedding: DraftUnembedding, rows: QuantizedWeight, silu: Tensor
    ) -> None:
        self.made_of = head, unembedding, rows, silu
        final: Any = unembedding.norm
        linears = (head.mix, head.query_key_value, head.attention_out, head.gate_up, head.down)
        own: tuple[Any, ...] = (head.hidden_norm, head.embedding_norm, head.deep_norm)
        own += (head.attention_norm, head.gate_norm)
        self.weights = [QuantizedWeight.of(linear.weight) for linear in linears]
        self.held: list[Any] = [*(norm.weight for norm in own), unembedding.norm_scale.contiguous(), head.source]
        self.places = _places(self.weights, self.held)
        self.rows, self.silu, self.turns = rows, silu, turns(0, head.head_size)
        self.sizes = (head.hidden_size, head.down.in_features, head.num_heads, head.num_key_heads, head.head_size)
        self.vocabulary, self.scaling = head.draft_vocab_size, unembedding.scaling
        self.floats = (ctypes.c_float * 2)(own[0].eps, epsilon(final))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or pickle is made anew from its modules: addresses cannot be copied."""
        return NativeAttentionHead, self.made_of

    def step(self, readings: Sequence[Reading]) -> list[Tensor]:
        """As `AttentionHead.step`, of several requests; states are no numbers where a score is none."""
        library = native_library()
        assert library is not None
        positions = [place for reading in readings for place in reading.positions]
        sources = [kind for reading in readings for kind in reading.source]
        while self.turns.shape[0] <= max(positions):
            self.turns = turns(2 * self.turns.shape[0] + 1024, self.sizes[-1])
        given = [torch.cat(part) for part in zip(*(reading.states for reading in readings), strict=True)]
        drafting = [len(reading.paths) for reading in readings]
        output = torch.empty(sum(drafting), self.sizes[0], dtype=torch.bfloat16)
        parts, tables = _parts(readings)
        fine = library.specbound_head_step(
            self.places,
            (ctypes.c_int64 * len(parts))(*parts),
            (ctypes.c_int64 * 8)(len(readings), len(positions), sum(drafting), *self.sizes),
            self.floats,
            *(part.data_ptr() for part in given),
            (ctypes.c_int64 * len(sources))(*sources),
            (ctypes.c_int64 * len(positions))(*positions),
            self.turns.data_ptr(),
            self.silu.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        del tables  # until here their addresses were in use
        return list(torch.split(output if fine else output.fill_(torch.nan), drafting))

    def likeliest(self, states: Tensor, temperature: float, count: int) -> tuple[Tensor, Tensor]:
        """Draft ids and confidences [N, count] of states [N, D]; id 0 and NaN where no logit is a number."""
        library = native_library()
        assert library is not None
        number = states.shape[0]
        ids, chances = torch.empty(number, count, dtype=torch.int64), torch.empty(number, count)
        library.specbound_likeliest(
            (ctypes.c_void_p * 2)(*self.rows.places),
            (ctypes.c_int64 * 4)(number, count, self.sizes[0], self.vocabulary),
            temperature * self.scaling,
            states.data_ptr(),
            ids.data_ptr(),
            chances.data_ptr(),
            torch.get_num_threads(),
        )
        return ids.clamp_(min=0), chances


def _places(weights: Sequence[QuantizedWeight], vectors: Sequence[Tensor]) -> Any:
    """Addresses, as a head in `heads.h` has them."""
    found = [*(place for weight in weights for place in weight.places), *(vector.data_ptr() for vector in vectors)]
    return (ctypes.c_void_p * len(found))(*found)


def _parts(readings: Sequence[Reading]) -> tuple[list[int], list[Any]]:
    """Of each request, what `HeadPart` in `heads.h` has, and the tables of paths that it points to."""
    parts: list[int] = []
    tables: list[Any] = []
    for reading in readings:
        rows, held, settled = len(reading.source), reading.held, reading.settled
        room = held + rows - settled
        table = [place for path in reading.paths for place in (len(path), *path, *[0] * (room - len(path)))]
        tables.append((ctypes.c_int64 * len(table))(*table))
        parts += rows, len(reading.paths), held, settled, reading.keys.shape[1]
        parts += reading.keys.data_ptr(), reading.values.data_ptr(), ctypes.addressof(tables[-1])
    return parts, tables


NATIVE: dict[Any, Any] = {DeepHead: NativeDeepHead, AttentionHead: NativeAttentionHead}


def native_heads(heads: DraftHeads) -> DraftHeads:
    """The heads, those that the kernels take running in them."""
    exits = {layer: heads.exits.heads[str(layer)] for layer in heads.exit_layers}
    fit = {layer: head for layer, head in exits.items() if _is_fit(head, heads.unembedding)}
    if native_library() is None or not fit:
        return heads
    rows, silu = QuantizedWeight.of(heads.unembedding.weight), table_of(nn.SiLU())
    native = {layer: NATIVE[type(head)](head, heads.unembedding, rows, silu) for layer, head in fit.items()}
    return replace(heads, native=native)


def _is_fit(head: Any, unembedding: DraftUnembedding) -> bool:
    """Whether the kernels take its kind, dtype, device and sizes, and the final norm is by the root mean square."""
    weights = (unembedding.weight, *head.parameters(), *unembedding.norm.parameters())
    return (
        type(head) in NATIVE
        and epsilon(unembedding.norm) is not None
        and unembedding.bias is None
        and head.hidden_size % 2 == 0
        and head.rank is not None
        and head.rank % LANES == 0
        and all(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in weights)
        and all(weight.is_contiguous() for weight in weights)
        and _is_root_mean_square(unembedding)
    )


def _is_root_mean_square(unembedding: DraftUnembedding) -> bool:
    """Whether its norm gives what the kernels give, up to rounding, of numbers whose mean is not 0."""
    row = torch.linspace(-1, 3, unembedding.weight.shape[1], dtype=unembedding.weight.dtype)
    found = unembedding.normalize(row).float()
    over = (row.float().square().mean() + epsilon(unembedding.norm)).rsqrt()
    return torch.allclose(found, row.float() * over * unembedding.norm_scale.float(), rtol=0.02, atol=1e-3)

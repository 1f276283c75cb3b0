"""How many rows of a block the model's Linears may take in one call, each row keeping the bits that it has alone.

Looked at on the rows that the probe recorded, and on numbers that tell the order of additions. Knows no policy.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from runtime.exact.execution import Shape, in_rows
from runtime.exact.native.layout import Layout
from runtime.exact.order import is_plain, same_linear
from runtime.exact.packed import JointLinear, PackedLinears
from runtime.exact.reference import Reference

# Cheapest first: one call for the block, one call at a steady number of rows, one call a row.
LINEAR_ROWS = (None, 8, 16, 32, 1)


def packed_rows(reference: Reference, packed: PackedLinears, widths: Sequence[int]) -> dict[Shape, int | None]:
    """Rows in one call of the packed Linears, by shape; shapes that have other bits than the model's are left out."""
    by_shape: dict[Shape, list[JointLinear]] = {}
    for joint in packed.joint:
        by_shape.setdefault(joint.shape, []).append(joint)
    rows_by_shape = {}
    for shape, joints in by_shape.items():
        recorded = [(joint, _joint_rows(reference, joint.modules)) for joint in joints]
        for rows in LINEAR_ROWS:
            run = partial(_packed_in_rows, layout=joints[0].layout, rows=rows)
            in_order = same_linear(run, joints[0].modules[0], shape[0], widths)
            if in_order and all(_same_rows(joint, given, rows, widths) for joint, given in recorded):
                rows_by_shape[shape] = rows
                break
    return rows_by_shape


def _packed_in_rows(linear: nn.Module, layout: Layout, rows: int | None) -> Callable[..., Tensor]:
    return in_rows(JointLinear([cast(nn.Linear, linear)], layout), rows)


def _joint_rows(reference: Reference, modules: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The recorded inputs of Linears that share them, with all their outputs side by side."""
    inputs = [given for given, _ in reference.rows[modules[0]]]
    outputs = zip(*([output for _, output in reference.rows[module]] for module in modules), strict=True)
    return [(given, torch.cat(parts, dim=-1)) for given, parts in zip(inputs, outputs, strict=True)]


def linear_rows(reference: Reference, widths: Sequence[int]) -> dict[Shape, int]:
    """Rows in one call of the Linears, by weight shape; shapes that may run as the whole block are left out."""
    by_shape: dict[Shape, list[nn.Module]] = {}
    for module in reference.rows:
        by_shape.setdefault(tuple(module.weight.shape), []).append(module)  # type: ignore[arg-type]
    rows_by_shape: dict[Shape, int] = {}
    for shape, modules in by_shape.items():
        kinds = {(type(module), module.bias is None): module for module in modules if is_plain(module)}
        for rows in LINEAR_ROWS:
            if rows == 1 or (
                all(same_linear(partial(in_rows, rows=rows), one, _outputs(one), widths) for one in kinds.values())
                and all(_same_rows(module, reference.rows[module], rows, widths) for module in modules)
            ):
                break
        if rows is not None:
            rows_by_shape[shape] = rows
    return rows_by_shape


def _outputs(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def _same_rows(
    forward: Callable[..., Tensor], recorded: list[tuple[Tensor, Tensor]], rows: int | None, widths: Sequence[int]
) -> bool:
    """Whether blocks of these widths give every recorded row its own bits, with `rows` rows a call."""
    for width in widths:
        for start in range(0, len(recorded) - width + 1, width):
            given, expected = (torch.cat(part) for part in zip(*recorded[start : start + width], strict=True))
            if not torch.equal(in_rows(forward, rows)(given.unsqueeze(0))[0], expected):
                return False
    return True

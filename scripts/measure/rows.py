"""Which operations keep the bits of one row when 2 to 16 rows run in one call, on this device and in each dtype.

Looked at on numbers that tell the order of additions (`runtime/exact/order.py`), so that one call says what thousands
of ordinary rows would not. Quoted in docs/exactness.md. Example:
python scripts/measure/rows.py --json rows.json
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from runtime.conditions import conditions
from runtime.exact.attention import BlockAttention
from runtime.exact.execution import in_rows
from runtime.exact.order import cancelling, same_attention, same_linear
from runtime.files import write_atomic

DTYPES = ("bfloat16", "float32", "float16")
WIDTHS = list(range(2, 17))
# Outputs by inputs: of SmolLM2-135M, of 7B shapes, and an unembedding.
SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096))
TINY_SHAPES = ((64, 48), (48, 64))
HEADS = {"9 heads on 3": (9, 3, 64), "32 heads on 32": (32, 32, 128), "32 heads on 8": (32, 8, 128)}
TINY_HEADS = {"4 heads on 2": (4, 2, 8)}


def main(
    device: str = "cpu",
    width: Annotated[list[int], typer.Option(help="Rows in a call; may be given several times.")] = WIDTHS,
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes only.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep what is seen in this file.")] = None,
) -> None:
    """Look and print; the file is written after each dtype, so that a limit of time leaves what was seen."""
    where = torch.device(device)
    shapes, heads = (TINY_SHAPES, TINY_HEADS) if tiny else (SHAPES, HEADS)
    report: dict[str, Any] = conditions(where) | {"widths": sorted(width), "kept": {}}
    for name in DTYPES:
        report["kept"][name] = kept(getattr(torch, name), where, shapes, heads, sorted(width))
        if json_file is not None:
            write_atomic(json_file, (json.dumps(report, indent=1) + "\n").encode())
    show(report)


@torch.no_grad()
def kept(
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    heads: dict[str, tuple[int, int, int]],
    widths: Sequence[int],
) -> dict[str, list[int]]:
    """Operation -> numbers of rows in a call that keep every bit."""
    checks: dict[str, Callable[[int], bool]] = {}
    for outputs, inputs in shapes:
        like = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
        checks[f"Linear {outputs}x{inputs}"] = partial(_linear, like, outputs)
        checks[f"norm of {inputs}"] = partial(_norm, LlamaRMSNorm(inputs).to(device, dtype))
    for name, sizes in heads.items():
        for kind in ("grouped", "batched"):
            checks[f"attention {kind}, {name}"] = partial(_attention, kind, sizes, dtype, device)
    return {name: [width for width in widths if check(width)] for name, check in checks.items()}


def _linear(like: nn.Linear, outputs: int, width: int) -> bool:
    return same_linear(partial(in_rows, rows=None), like, outputs, [width])


def _attention(kind: str, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, width: int) -> bool:
    return same_attention(BlockAttention(kind, "sdpa"), sizes, width, dtype=dtype, device=device)


def _norm(norm: Any, width: int) -> bool:
    size = norm.weight.shape[0]
    block: Tensor = cancelling(width, size, norm.weight.dtype).to(norm.weight)[None]
    return torch.equal(norm(block), torch.cat([norm(block[:, row : row + 1]) for row in range(width)], 1))


def show(report: dict[str, Any]) -> None:
    """A row for each operation."""
    console, widths = Console(highlight=False), report["widths"]
    console.print(
        f"{report['hardware']}, {report['threads']} threads: rows in a call that keep every bit, of"
        f" {', '.join(map(str, widths))}"
    )
    table = Table("operation", *report["kept"], box=None)
    for name in next(iter(report["kept"].values())):
        table.add_row(name, *(_short(by_operation[name], len(widths)) for by_operation in report["kept"].values()))
    console.print(table)


def _short(widths: list[int], possible: int) -> str:
    if len(widths) == possible:
        return "all"
    return ", ".join(map(str, widths)) or "none"


if __name__ == "__main__":
    typer.run(main)

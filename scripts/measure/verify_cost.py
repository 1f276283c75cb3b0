"""What one verification pass costs, by width: exact and batched, beside stock's one-token forward.

Interleaved in one process; medians. Example: python scripts/measure/verify_cost.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import trange
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from runtime.adapter.identity import base_fingerprint
from runtime.conditions import hardware
from runtime.decoding.cache import KVCache
from runtime.decoding.families import CACHE
from runtime.decoding.layers import DecoderLayers
from runtime.exact.execution import ExecutionPolicy, execution
from runtime.exact.packed import PackedLinears
from runtime.exact.probe import certify
from runtime.files import write_atomic


def main(
    base: Annotated[str, typer.Argument(help="Folder or Hub id of a base.")],
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the block.")] = 256,
    widths: Annotated[str, typer.Option(help="Tokens of the blocks.")] = "1,2,4,8,16",
    repeats: Annotated[int, typer.Option(min=3)] = 25,
    device: str = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Measure, print a table, and keep the figures."""
    transformers_logging.set_verbosity_error()
    if threads is not None:
        torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
    figures = measure(model, context, [int(width) for width in widths.split(",")], repeats)
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())


@torch.no_grad()
def measure(model: Any, context: int, widths: list[int], repeats: int) -> dict[str, Any]:
    """Milliseconds of a forward: `stock` for one token, `bitwise` and `batched` by width."""
    packed = PackedLinears.of(model)
    certificate = certify(model, base_fingerprint(model), max_width=max(widths), packed=packed)
    stock = DynamicCache()
    token_ids = torch.randint(model.config.vocab_size, (1, context + max(widths)), device=model.device)
    model(input_ids=token_ids[:, :context], use_cache=True, **{CACHE: stock})
    cache = KVCache.from_dynamic(stock, context + max(widths))
    layers = DecoderLayers(model)

    def one_token() -> None:
        model(input_ids=token_ids[:, :1], use_cache=True, **{CACHE: stock})
        stock.crop(-1)

    def block(width: int, policy: ExecutionPolicy) -> None:
        with execution(model, policy, packed), torch.inference_mode():
            hidden = layers.embed(token_ids[:, context : context + width], context)
            layers.logits(layers.run(hidden, 0, layers.num_layers, context, cache))
        cache.crop(context)

    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    policies = {"bitwise": certificate.policy, "batched": ExecutionPolicy.batched()}
    for number in trange(repeats + 3, desc="rounds"):
        timed = {("stock", 1): timing(one_token, model.device)}
        for name, policy in policies.items():
            for width in widths:
                timed[name, width] = timing(lambda w=width, p=policy: block(w, p), model.device)
        if number >= 3:  # the first rounds pay for allocations
            for key, taken in timed.items():
                seconds[key].append(taken)
    median = {key: 1000 * statistics.median(taken) for key, taken in seconds.items()}
    return {
        "hardware": hardware(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": certificate.versions,
        "base": f"{model.config.model_type}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters",
        "context": context,
        "repeats": repeats,
        "certificate": str(certificate),
        "stock_ms": round(median["stock", 1], 3),
        "bitwise_ms": {width: round(median["bitwise", width], 3) for width in widths},
        "batched_ms": {width: round(median["batched", width], 3) for width in widths},
    }


def timing(call: Callable[[], None], device: torch.device) -> float:
    """Seconds that a call takes, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(figures: dict[str, Any]) -> None:
    """Print the table: milliseconds of a pass, and per token as a share of stock's one-token forward."""
    console = Console(highlight=False)
    console.print(
        f"{figures['hardware']}, {figures['dtype']}, {figures['threads']} threads, context {figures['context']}"
    )
    console.print(f"stock one-token forward: {figures['stock_ms']:.1f} ms (median of {figures['repeats']})")
    table = Table("width", "exact ms", "per token / stock", "batched ms", "per token / stock", box=None)
    for width, exact in figures["bitwise_ms"].items():
        batched = figures["batched_ms"][width]
        shares = (f"{ms / width / figures['stock_ms']:.3f}" for ms in (exact, batched))
        table.add_row(str(width), f"{exact:.1f}", next(shares), f"{batched:.1f}", next(shares))
    console.print(table)
    console.print(figures["certificate"], soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)

"""An adapter against plain decoding, ids compared: the demo's first minute, and its last stage.

`python scripts/demo.py` takes the adapter fitted just now and prompts it was not fitted on, and writes
`report.json` and the adapter's card with the figures measured. `python scripts/demo.py --adapter FOLDER
--prompts_file FILE.jsonl` only shows what an adapter does. Exits 1 if any id differs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from runtime import SpecBoundError, load_specbound
from runtime.cli.options import to_ids
from runtime.text.prompts import read_prompts, spread
from train.corpus.corpus import load_split
from train.evaluation.comparison import compare
from train.publishing.assembly import add_speed
from train.publishing.contents import CALIBRATION_FILE


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--adapter", type=Path, help="instead of the one fitted in --output_dir")
    parser.add_argument("--prompts_file", help="instead of the held-out texts in --output_dir")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    folder = options.adapter or options.output_dir / "adapter"
    model: Any = load_specbound(folder)
    print(f"exactness: {model.specbound.certificate}")
    if options.prompts_file:
        prompts = to_ids(model, spread(read_prompts(options.prompts_file), options.prompts))
    else:
        prompts = held_out(options.output_dir, options.prompts, options.max_new_tokens)
    report = measure(model, prompts, options.max_new_tokens) | outlook(model, folder)
    if options.adapter is None:
        path = options.output_dir / "report.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        add_speed(options.output_dir / "adapter", report)
    show(report)
    if report["identical_prompts"] != report["prompts"]:
        sys.exit("error: some ids differ from plain decoding; please report this with the lines above")


def held_out(output_dir: Path, num_prompts: int, max_new_tokens: int) -> list[torch.Tensor]:
    """Held-out prompts of the corpus whose plain answer is long enough."""
    rows = [row for row in load_split(output_dir / "corpus", "held_out") if len(row["response_ids"]) >= max_new_tokens]
    if len(rows) < num_prompts:
        raise SpecBoundError(f"only {len(rows)} held-out prompts have {max_new_tokens} tokens: ask for fewer")
    return [torch.tensor([row["prompt_ids"]]) for row in rows[:num_prompts]]


def measure(model: Any, prompts: list[torch.Tensor], max_new_tokens: int) -> dict[str, Any]:
    """Both ways on every prompt; all answers are made equally long."""
    bar = tqdm(total=len(prompts), desc="plain against SpecBound", unit="prompt")
    for totals in compare(
        model, prompts, min_new_tokens=max_new_tokens, max_new_tokens=max_new_tokens, do_sample=False
    ):
        bar.set_postfix_str(f"{totals.speedup:.2f}x, {sum(totals.identical)} identical")
        bar.update()
    bar.close()
    return totals.report(model)


def outlook(model: Any, adapter: Path) -> dict[str, Any]:
    """What the adapter may draft with, and the speed-up that replay predicted for it, and where."""
    replay = json.loads((adapter / CALIBRATION_FILE).read_text(encoding="utf-8"))["replay"]
    specbound = model.specbound
    where = replay["costs"] if isinstance(replay["costs"], str) else f"on {replay['costs']['hardware']}"
    layers, bounds = specbound.drafter.exit_layers, specbound.bounds
    used = bounds.exits(layers) if bounds.max_draft_tokens else []
    return {
        "sources": [source(layer) for layer in used],
        "never_asked": [source(layer) for layer in layers if layer not in used],
        "predicted": f"{replay['predicted_speedup']:.2f}x by replay, {where}",
        "predicted_mean_accepted_length": replay["mean_accepted_length"],
    }


def source(layer: int) -> str:
    """Its name."""
    return f"the head at layer {layer}" if layer else "the lookup"


def show(report: dict[str, Any]) -> None:
    """The table."""
    table = Table(title="SpecBound demo: SmolLM2-135M-Instruct, same tokens", show_header=False)
    used = ", ".join(
        f"{source(int(layer))}: {counts['accepted']} of {counts['drafted']}"
        for layer, counts in report["exits"].items()
    )
    rows = {
        "stock generate": f"{report['stock_tokens_per_second']:.1f} tokens/s",
        "SpecBound": f"{report['specbound_tokens_per_second']:.1f} tokens/s",
        "speed-up": f"{report['speedup']:.2f}x (median over prompts)",
        "predicted": report["predicted"],
        "sources in use": ", ".join(report["sources"]) or "none: nothing pays here",
        "sources never asked": ", ".join(report["never_asked"]) or "none",
        "mean accepted length": f"{report['mean_accepted_length']:.2f} tokens per verification, predicted "
        f"{report['predicted_mean_accepted_length']:.2f}",
        "acceptance rate": f"{report['acceptance_rate']:.2f}",
        "drafts accepted": used or "none",
        "identical ids": f"{report['identical_prompts']} of {report['prompts']} prompts, {report['tokens']} tokens",
        "on": f"{report['hardware']}, {report['dtype']}, {report['threads']} threads",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    try:
        main()
    except SpecBoundError as error:
        sys.exit(f"error: {error}")

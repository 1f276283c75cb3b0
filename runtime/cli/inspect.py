"""`specbound inspect`: what an adapter is, and whether it is whole and valid.

Slow libraries are imported when it runs.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from runtime.cli.failure import fail
from runtime.errors import one_line


def describe(adapter: str, *, revision: str | None = None) -> dict[str, Any]:
    """What `specbound inspect` says of an adapter, as plain JSON values.

    Raises:
        SpecBoundError: where the adapter cannot be found or does not load.
    """
    from runtime.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
    from runtime.adapter.hub import resolve_adapter

    folder = resolve_adapter(adapter, revision=revision)
    loaded = load_adapter(folder)
    config, stamps = loaded.config, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    measured, remarks = _calibration(folder / "calibration.json", config.exit_layers)
    return {
        "adapter": adapter,
        "valid": True,
        "format": stamps["format"],
        "specbound_version": stamps["specbound_version"],
        "license": config.license,
        "base": {
            "name": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "fingerprint": config.base_model_fingerprint,
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        },
        "tokenizer_fingerprint": config.tokenizer_fingerprint,
        "head": {"kind": config.head, "rank": loaded.heads.one.rank},
        "dtype": str(next(loaded.heads.parameters()).dtype).removeprefix("torch."),
        "draft_vocab_size": config.draft_vocab_size,
        "lookup": config.lookup is not None,
        "schedule": {"kind": config.temperatures.kind, "alpha": config.temperatures.alpha},
        "bounds": {
            "exit_threshold": config.bounds.exit_threshold,
            "max_exit_layer": config.bounds.max_exit_layer,
            "max_draft_tokens": config.bounds.max_draft_tokens,
            "exit_thresholds": {str(layer): tau for layer, tau in config.bounds.exit_thresholds.items()},
            "min_survival": config.bounds.min_survival,
            "min_draft_survival": config.bounds.min_draft_survival,
            "max_branches": config.bounds.max_branches,
            "max_depth": config.bounds.max_depth,
            "sure_threshold": config.bounds.sure_threshold,
        },
        "weights_bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "weights_sha256": config.weights_sha256,
        "exits": [
            {"layer": layer, "temperature": config.temperatures[layer]} | measured.get(layer, {})
            for layer in config.exit_layers
        ],
        "warnings": remarks,
    }


FIGURES = ("agreement", "ece_before", "ece_after")


def _calibration(path: Path, exit_layers: tuple[int, ...]) -> tuple[dict[int, dict[str, float]], list[str]]:
    """Figures of each exit, and a remark where the file is there but not usable: it is evidence only."""
    if not path.exists():
        return {}, []
    try:
        exits = json.loads(path.read_text(encoding="utf-8"))["exits"]
        by_layer = {layer: {name: exits[str(layer)][name] for name in FIGURES} for layer in exit_layers}
        good = all(type(x) in (int, float) and 0 <= x <= 1 for figures in by_layer.values() for x in figures.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    return (
        (by_layer, []) if good else ({}, ["calibration.json is damaged or of other exits; its figures are left out"])
    )


def show(summary: dict[str, Any], console: Console) -> None:
    """Print what `describe` returned, readable in 80 columns and in a pipe."""
    base, bounds, head = summary["base"], summary["bounds"], summary["head"]
    alpha = summary["schedule"]["alpha"]
    lines = {
        "adapter": summary["adapter"],
        "valid": "yes",
        "format": f"{summary['format']}, written by specbound {summary['specbound_version']}",
        "license": summary["license"] or "not stated",
        "base": base["name"],
        "revision": base["revision"] or "not stated",
        "fingerprint": f"{base['fingerprint'][:23]}... (all of it: --json)",
        "shape": f"{base['num_hidden_layers']} layers, hidden size {base['hidden_size']}, {base['vocab_size']} tokens",
        "heads": head["kind"] + ("" if head["rank"] is None else f", rank {head['rank']}") + f", {summary['dtype']}",
        "depth-0 lookup": "on" if summary["lookup"] else "off",
        "draft vocabulary": f"{summary['draft_vocab_size']} of {base['vocab_size']} tokens",
        "temperatures": summary["schedule"]["kind"] + ("" if alpha is None else f", alpha {alpha:g}"),
        "exit_threshold": f"{bounds['exit_threshold']:g}"
        + "".join(f", {tau:g} at layer {layer}" for layer, tau in bounds["exit_thresholds"].items()),
        "max_exit_layer": str(bounds["max_exit_layer"]),
        "max_draft_tokens": str(bounds["max_draft_tokens"]),
        "min_survival": f"{bounds['min_survival']:g}",
        "min_draft_survival": f"{bounds['min_draft_survival']:g}",
        "max_branches": str(bounds["max_branches"]),
        "max_depth": "that of max_draft_tokens" if bounds["max_depth"] is None else str(bounds["max_depth"]),
        "sure_threshold": f"{bounds['sure_threshold']:g}",
        "size": f"{summary['weights_bytes'] / 1e6:.1f} MB",
    }
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines.items():
        grid.add_row(name, Text(value))  # Text: brackets in a name are no markup
    console.print(grid)
    measured = [name for name in FIGURES if name in summary["exits"][0]]
    titles = {"agreement": "agreement", "ece_before": "ECE before", "ece_after": "ECE after"}
    exits = Table("exit after layer", "temperature", *(titles[name] for name in measured), box=None, pad_edge=False)
    for column in exits.columns:
        column.justify = "right"
    for row in summary["exits"]:
        exits.add_row(str(row["layer"]), f"{row['temperature']:.3f}", *(f"{row[name]:.3f}" for name in measured))
    console.print()
    console.print(exits)


def inspect_command(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or its Hub id.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Say what an adapter is, and whether it is whole and valid."""
    from runtime.errors import SpecBoundError

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            summary = describe(adapter, revision=revision)
    except SpecBoundError as error:
        fail(error, {"adapter": adapter, "valid": False} if as_json else None)
    summary["warnings"] += [one_line(entry.message) for entry in caught if entry.category is UserWarning]
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    for warning in summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    show(summary, Console(highlight=False))

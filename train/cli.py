"""`specbound`, the command line: one verb a task. Slow libraries are imported when a verb needs them."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in any script, on any terminal
    app()


@app.callback()
def root() -> None:
    """SpecBound: exit heads that let a transformer draft for itself."""


@app.command("inspect")
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
            found = describe(adapter, revision=revision)
    except SpecBoundError as error:
        _fail(error, {"adapter": adapter, "valid": False} if as_json else None)
    found["warnings"] += [_one_line(entry.message) for entry in caught if entry.category is UserWarning]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    show(found, Console(highlight=False))


@app.command("audit")
def audit_command(
    adapter: Annotated[str, typer.Option(help="The adapter's folder, or its Hub id.")],
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl file, or a data set's name.")],
    model: Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="This many prompts, spread over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated from each prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Sample; without it decoding is greedy.")] = False,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="torch seed before each generation.")] = 0,
    exactness: Annotated[str, typer.Option(help="bitwise or batched.")] = "bitwise",
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the findings in this file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the --json file holds.")] = False,
) -> None:
    """Generate every prompt plainly and with SpecBound, and compare the ids. Exit code 1 if any differ.

    Example: specbound audit --adapter outputs/demo/adapter --prompts prompts.jsonl --limit 16
    """
    from runtime.errors import SpecBoundError
    from train.audits import AuditSettings, run_audit

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    if sample:
        options["temperature"] = temperature
    settings = AuditSettings(adapter, prompts, model, limit, dtype, threads, seed, exactness, options)
    try:
        found = run_audit(settings, report=json_file, resume=resume)
    except (SpecBoundError, OSError) as error:
        _fail(error, None)
    for number, prompt in enumerate(found["findings"]):
        if prompt["divergence"] is not None:
            print(f"prompt {number}: {prompt['divergence']}")
    print(f"{found['differing_tokens']} differing tokens of {found['tokens']} over {found['prompts']} prompts")
    print(f"{found['differing_logits']} rows of logits with a differing bit")
    print(f"exactness: {found['certificate']}")
    if found["differing_tokens"]:
        raise typer.Exit(1)


def _fail(error: Exception, as_json: dict[str, Any] | None) -> NoReturn:
    """End with exit code 1: one line on stderr, or these fields and the error as JSON on stdout."""
    if as_json is None:
        print(f"error: {_one_line(error)}", file=sys.stderr)
    else:
        print(json.dumps(as_json | {"error": _one_line(error)}, indent=2))
    raise typer.Exit(1)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def describe(adapter: str, *, revision: str | None = None) -> dict[str, Any]:
    """What `specbound inspect` says of an adapter, as plain JSON values.

    Raises:
        SpecBoundError: where the adapter cannot be found or does not load.
    """
    from runtime.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
    from runtime.hub import resolve_adapter

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
        "head": {"kind": config.head, "rank": None if config.head == "linear" else config.head_rank},
        "dtype": str(next(loaded.heads.parameters()).dtype).removeprefix("torch."),
        "draft_vocab_size": config.draft_vocab_size,
        "lookup": config.lookup is not None,
        "schedule": {"kind": config.temperatures.kind, "alpha": config.temperatures.alpha},
        "bounds": {
            "exit_threshold": config.bounds.exit_threshold,
            "max_exit_layer": config.bounds.max_exit_layer,
            "max_draft_tokens": config.bounds.max_draft_tokens,
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
        found = {layer: {name: exits[str(layer)][name] for name in FIGURES} for layer in exit_layers}
        good = all(type(x) in (int, float) and 0 <= x <= 1 for figures in found.values() for x in figures.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    return (found, []) if good else ({}, ["calibration.json is damaged or of other exits; its figures are left out"])


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `describe` returned, readable in 80 columns and in a pipe."""
    base, bounds, head = found["base"], found["bounds"], found["head"]
    alpha = found["schedule"]["alpha"]
    lines = {
        "adapter": found["adapter"],
        "valid": "yes",
        "format": f"{found['format']}, written by specbound {found['specbound_version']}",
        "license": found["license"] or "not stated",
        "base": base["name"],
        "revision": base["revision"] or "not stated",
        "fingerprint": f"{base['fingerprint'][:23]}... (all of it: --json)",
        "shape": f"{base['num_hidden_layers']} layers, hidden size {base['hidden_size']}, {base['vocab_size']} tokens",
        "heads": head["kind"] + ("" if head["rank"] is None else f", rank {head['rank']}") + f", {found['dtype']}",
        "depth-0 lookup": "on" if found["lookup"] else "off",
        "draft vocabulary": f"{found['draft_vocab_size']} of {base['vocab_size']} tokens",
        "temperatures": found["schedule"]["kind"] + ("" if alpha is None else f", alpha {alpha:g}"),
        "exit_threshold": f"{bounds['exit_threshold']:g}",
        "max_exit_layer": str(bounds["max_exit_layer"]),
        "max_draft_tokens": str(bounds["max_draft_tokens"]),
        "size": f"{found['weights_bytes'] / 1e6:.1f} MB",
    }
    grid = Table(box=None, show_header=False, pad_edge=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in lines.items():
        grid.add_row(name, Text(value))  # Text: brackets in a name are no markup
    console.print(grid)
    measured = [name for name in FIGURES if name in found["exits"][0]]
    titles = {"agreement": "agreement", "ece_before": "ECE before", "ece_after": "ECE after"}
    exits = Table("exit after layer", "temperature", *(titles[name] for name in measured), box=None, pad_edge=False)
    for column in exits.columns:
        column.justify = "right"
    for row in found["exits"]:
        exits.add_row(str(row["layer"]), f"{row['temperature']:.3f}", *(f"{row[name]:.3f}" for name in measured))
    console.print()
    console.print(exits)


if __name__ == "__main__":
    main()

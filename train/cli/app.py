"""`specbound`, the command line: one verb a task. Slow libraries are imported when a verb needs them."""

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from train.cli import plan as cli_plan
from train.cli import publish as cli_publish
from train.cli import serve as cli_serve
from train.cli import text as cli_text
from train.cli.failure import fail, one_line

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names in any script, on any terminal
    app()


@app.callback()
def root() -> None:
    """SpecBound: exit heads that let a transformer draft for itself.

    Exit codes: 0 done, 1 an error or ids that differ, 2 wrong usage, 130 interrupted.
    """


app.command("generate")(cli_text.generate_command)
app.command("chat")(cli_text.chat_command)
app.command("serve")(cli_serve.serve_command)
app.command("publish")(cli_publish.publish_command)
app.command("plan")(cli_plan.plan_command)


@app.command("inspect")
def inspect_command(
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, or its Hub id.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Say what an adapter is, and whether it is whole and valid."""
    from runtime.errors import SpecBoundError
    from train.cli.inspect import describe, show

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = describe(adapter, revision=revision)
    except SpecBoundError as error:
        fail(error, {"adapter": adapter, "valid": False} if as_json else None)
    found["warnings"] += [one_line(entry.message) for entry in caught if entry.category is UserWarning]
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
    from train.evaluation.audit import AuditSettings, run_audit

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    if sample:
        options["temperature"] = temperature
    settings = AuditSettings(adapter, prompts, model, limit, dtype, threads, seed, exactness, options)
    try:
        found = run_audit(settings, report=json_file, resume=resume)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    for number, prompt in enumerate(found["findings"]):
        if prompt["divergence"] is not None:
            print(f"prompt {number}: {prompt['divergence']}")
    print(f"{found['differing_tokens']} differing tokens of {found['tokens']} over {found['prompts']} prompts")
    print(f"{found['differing_logits']} rows of logits with a differing bit")
    print(f"exactness: {found['certificate']}")
    if found["differing_tokens"]:
        raise typer.Exit(1)


@app.command("profile")
def profile_command(
    adapter: Annotated[str, typer.Option(help="The adapter's folder, or its Hub id.")],
    json_file: Annotated[Path, typer.Option("--json", help="Keep the costs in this file.")],
    model: Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")] = None,
    exactness: Annotated[str, typer.Option(help="bitwise or batched.")] = "bitwise",
) -> None:
    """Measure what the parts of a round cost on this machine.

    Example: specbound profile --adapter outputs/demo/adapter --json costs.json
    """
    from runtime.errors import SpecBoundError
    from train.cli.attached import load_attached
    from train.replay.profile import measure

    try:
        attached = load_attached(adapter, model, dtype=dtype, threads=threads, exactness=exactness)
        costs = measure(attached)
        costs.write(json_file)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(costs)


@app.command("tune")
def tune_command(
    adapter: Annotated[Path, typer.Option(help="The adapter's folder; its bounds are written anew.")],
    costs: Annotated[Path, typer.Option(help="What `specbound profile` measured.")],
    exit_threshold: Annotated[float | None, typer.Option(help="Held; by default chosen.")] = None,
    max_exit_layer: Annotated[int | None, typer.Option(help="Held; by default chosen.")] = None,
    max_draft_tokens: Annotated[int | None, typer.Option(help="Held; by default chosen.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Tune on answers to these; by default on logged text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="This many prompts, spread over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    model: Annotated[str | None, typer.Option(help="The base, for answers; by default the adapter's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base, for answers.")] = "bfloat16",
) -> None:
    """Choose the bounds that replay says are fastest on this machine, for logged text or for a workload.

    Example: specbound tune --adapter outputs/demo/adapter --costs costs.json
    """
    from runtime.errors import SpecBoundError
    from train.replay.costs import CostTable
    from train.replay.search import Held
    from train.replay.tune import tune_adapter

    try:
        table, held = CostTable.read(costs), Held(exit_threshold, max_exit_layer, max_draft_tokens)
        traces = None
        if prompts is not None:
            from train.cli.attached import load_attached, read_spread, to_ids
            from train.replay.workload import log_workload

            chosen = read_spread(prompts, limit)
            attached = load_attached(str(adapter), model, dtype=dtype, threads=table.conditions.get("threads"))
            traces = log_workload(attached, to_ids(attached, chosen), max_new_tokens=max_new_tokens)
        found = tune_adapter(adapter, table, held, traces=traces)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    for name in ("before", "after"):
        one = found[name]
        print(
            f"{name}: {one['predicted_speedup']:.2f}x stock predicted, mean accepted length"
            f" {one['mean_accepted_length']:.2f}, {one['bounds']}"
        )
    print(f"on texts that bounds were not chosen on: {found['cross_fitted_speedup']:.2f}x")


@app.command("bench")
def bench_command(
    adapter: Annotated[str, typer.Option(help="The adapter's folder, or its Hub id.")],
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl file, or a data set's name.")],
    json_file: Annotated[Path, typer.Option("--json", help="Keep figures and records in this file.")],
    model: Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")] = None,
    methods: Annotated[
        str, typer.Option(help="Out of stock, plain, specbound, steady, heads, lookup, hand, paper, ...")
    ] = "stock,plain,specbound,prompt_lookup,early_exit",
    limit: Annotated[int | None, typer.Option(min=1, help="This many prompts, spread over the file.")] = None,
    per_task: Annotated[int | None, typer.Option(min=1, help="This many prompts of each category.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated from each prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")] = None,
    exactness: Annotated[str, typer.Option(help="bitwise or batched.")] = "bitwise",
    costs: Annotated[Path | None, typer.Option(help="Of `specbound profile`: sets predictions beside.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the --json file holds.")] = False,
) -> None:
    """Run methods side by side on the same prompts, and compare speeds and ids. Exit code 1 if SpecBound's differ.

    Example: specbound bench --adapter outputs/demo/adapter --prompts prompts.jsonl --limit 16 --json bench.json
    Beside FILE.json it writes FILE.md, a table, and FILE.png, a picture.
    """
    from runtime.errors import SpecBoundError
    from train.evaluation.bench import BenchSettings, run_bench
    from train.evaluation.picture import picture
    from train.evaluation.report import markdown

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    settings = BenchSettings(
        adapter, prompts, names, model, limit, per_task, max_new_tokens, dtype, threads, exactness, costs
    )
    try:
        found = run_bench(settings, report=json_file, resume=resume)
        json_file.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
        picture(found, json_file.with_suffix(".png"))
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(markdown(found), end="")
    if not found["complete"]:
        print("error: interrupted; --resume goes on with the other prompts", file=sys.stderr)
        raise typer.Exit(130)
    ours = found["methods"].get("specbound", found["methods"]["stock"])
    if exactness == "bitwise" and ours["identical_prompts"] != ours["prompts"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()

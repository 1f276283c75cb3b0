"""`specbound bench`: ways to generate, side by side. Slow libraries are imported when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail
from runtime.cli.options import Adapter, Dtype, Exactness, Model, Threads

Methods = Annotated[
    str,
    typer.Option(
        help="Methods to run, with commas between. Known are stock, plain, specbound, steady, heads, lookup, hand,"
        " paper, fixed_exit, prompt_lookup and early_exit."
    ),
]


def bench_command(
    adapter: Adapter,
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl or .json file, or a data set's name.")],
    json_file: Annotated[Path, typer.Option("--json", help="Keep the figures in this file.")],
    model: Model = None,
    methods: Methods = "stock,plain,specbound,prompt_lookup,early_exit",
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many prompts, spread over the file.")] = None,
    per_task: Annotated[int | None, typer.Option(min=1, help="Take this many prompts of each category.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Generate this many tokens a prompt at most.")] = 128,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    exactness: Exactness = "bitwise",
    costs: Annotated[
        Path | None, typer.Option(help="Costs from `specbound profile`. Adds what replay predicts.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the --json file holds.")] = False,
) -> None:
    """Run methods side by side on the same prompts, and compare speeds and ids. Exit code 1 if SpecBound's differ.

    Example: specbound bench --adapter outputs/demo/adapter --prompts prompts.jsonl --limit 16 --json bench.json
    Beside FILE.json it writes FILE.md, a table, and FILE.png, a picture.
    """
    from runtime.errors import SpecBoundError
    from runtime.files import check_writable
    from train.evaluation.bench import BenchSettings, run_bench
    from train.evaluation.picture import picture
    from train.evaluation.report import markdown

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    settings = BenchSettings(
        adapter, prompts, names, model, limit, per_task, max_new_tokens, dtype, threads, exactness, costs
    )
    try:
        check_writable(json_file)
        report = run_bench(settings, path=json_file, resume=resume)
        json_file.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
        picture(report, json_file.with_suffix(".png"))
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(markdown(report), end="")
    if not report["complete"]:
        print("error: interrupted; --resume goes on with the other prompts", file=sys.stderr)
        raise typer.Exit(130)
    ours = report["methods"].get("specbound", report["methods"]["stock"])
    if exactness == "bitwise" and ours["identical_prompts"] != ours["prompts"]:
        raise typer.Exit(1)

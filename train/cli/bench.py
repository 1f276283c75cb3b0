"""`specbound bench`: compare methods of generation on the same prompts. Slow libraries are imported inside."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail
from runtime.cli.options import Adapter, Device, Dtype, Exactness, Model, Threads

Methods = Annotated[
    str,
    typer.Option(
        help="Methods to run, separated by commas: any of stock, plain, specbound, steady, heads, lookup, hand,"
        " paper, fixed_exit, prompt_lookup, early_exit."
    ),
]


def bench_command(
    adapter: Adapter,
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl or .json file, or a data set's name.")],
    json_file: Annotated[Path, typer.Option("--json", help="Write the report to this file.")],
    model: Model = None,
    methods: Methods = "stock,plain,specbound,prompt_lookup,early_exit",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take this many prompts, evenly spaced over the file.")
    ] = None,
    per_task: Annotated[int | None, typer.Option(min=1, help="Take this many prompts of each category.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Generate at most this many tokens per prompt.")] = 128,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    exactness: Exactness = "bitwise",
    costs: Annotated[
        Path | None, typer.Option(help="Costs from `specbound profile`; adds the speed that they predict.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the report in the --json file.")] = False,
) -> None:
    """Compare the speed and the ids of several methods on the same prompts. Exit code 1 if SpecBound's ids differ.

    Example: specbound bench --adapter outputs/demo/adapter --prompts prompts.jsonl --limit 16 --json bench.json
    With --json FILE.json it also writes a table, FILE.md, and a picture, FILE.png.
    """
    from runtime.errors import SpecBoundError
    from runtime.files import check_writable, write_atomic
    from train.evaluation.bench import BenchSettings, run_bench
    from train.evaluation.picture import picture
    from train.evaluation.report import markdown

    names = tuple(name.strip() for name in methods.split(",") if name.strip())
    settings = BenchSettings(
        adapter, prompts, names, model, limit, per_task, max_new_tokens, dtype, threads, device, exactness, costs
    )
    try:
        check_writable(json_file)
        report = run_bench(settings, path=json_file, resume=resume)
        write_atomic(json_file.with_suffix(".md"), markdown(report).encode())
        picture(report, json_file.with_suffix(".png"))
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(markdown(report), end="")
    if not report["complete"]:
        print("error: interrupted; run it again with --resume for the remaining prompts", file=sys.stderr)
        raise typer.Exit(130)
    ours = report["methods"].get("specbound", report["methods"]["stock"])
    if exactness == "bitwise" and ours["identical_prompts"] != ours["prompts"]:
        raise typer.Exit(1)

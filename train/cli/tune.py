"""`specbound tune`: an adapter's bounds chosen anew. Slow libraries are imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail


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
    from train.publishing.tune import tune_adapter
    from train.replay.costs import CostTable
    from train.replay.search import Held

    try:
        table, held = CostTable.read(costs), Held(exit_threshold, max_exit_layer, max_draft_tokens)
        traces = None
        if prompts is not None:
            from runtime.cli.options import load_with_adapter, to_ids
            from runtime.text.prompts import spread
            from train.corpus.prompts import read_prompts
            from train.replay.workload import log_workload

            chosen = spread(read_prompts(prompts), limit)
            attached = load_with_adapter(str(adapter), model, dtype=dtype, threads=table.conditions.get("threads"))
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

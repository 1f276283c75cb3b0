"""`specbound tune`: choose an adapter's speculation bounds again. Slow libraries are imported inside."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail
from runtime.cli.options import Device, Model
from runtime.drafting.policy import MOST_REQUESTS


def tune_command(
    adapter: Annotated[Path, typer.Option(help="The adapter's folder. Its bounds are replaced.")],
    costs: Annotated[Path, typer.Option(help="Costs from `specbound profile`.")],
    exit_threshold: Annotated[
        float | None, typer.Option(help="Fix the exit threshold. By default it is chosen.")
    ] = None,
    max_exit_layer: Annotated[int | None, typer.Option(help="Fix the deepest exit. By default it is chosen.")] = None,
    max_draft_tokens: Annotated[
        int | None, typer.Option(help="Fix the longest draft. By default it is chosen.")
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, max=MOST_REQUESTS, help="Choose what is fastest where so many decode together.")
    ] = 1,
    prompts: Annotated[
        str | None, typer.Option(help="Tune on answers to these prompts. By default on the traces of the fit.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take this many prompts, evenly spaced over the file.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Generate at most this many tokens per answer.")] = 128,
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the base that answers the prompts.")] = "bfloat16",
    device: Device = "cpu",
) -> None:
    """Choose the fastest bounds for this machine by replaying the adapter's traces, or answers to your prompts.

    Example: specbound tune --adapter outputs/demo/adapter --costs costs.json
    """
    from runtime.errors import SpecBoundError
    from train.publishing.evidence import sources_line
    from train.publishing.tune import tunable, tune_adapter
    from train.replay.costs import CostTable
    from train.replay.search import Held
    from train.replay.together import line

    try:
        table, held = CostTable.read(costs), Held(exit_threshold, max_exit_layer, max_draft_tokens)
        tunable(adapter, table)  # before prompts are answered
        how = {"dtype": dtype, "threads": table.conditions.get("threads"), "device": device}
        traces = None if prompts is None else _answers(adapter, model, prompts, limit, max_new_tokens, how)
        summary = tune_adapter(adapter, table, held, traces=traces, requests=requests)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(f"costs of: {_words(table.conditions) or 'no machine, they are counted'}")
    for name in ("before", "after"):
        one = summary[name]
        print(
            f"{name}: {one['predicted_speedup']:.2f}x stock predicted, mean accepted length"
            f" {one['mean_accepted_length']:.2f}; {_words(one['bounds'])}"
        )
    print(sources_line(summary["sources"], summary["after"]["costs"]))
    print(line(summary["together"]))
    print(f"predicted on texts that were not used to choose bounds: {summary['cross_fitted_speedup']:.2f}x")


def _words(settings: Mapping[str, Any]) -> str:
    """Settings in a line; those that are not set, and tables that are empty, are left out."""
    parts = [
        f"{name} {_words(value) if isinstance(value, Mapping) else value}"
        for name, value in settings.items()
        if value not in (None, {})
    ]
    return ", ".join(parts)


def _answers(
    adapter: Path, model: str | None, prompts: str, limit: int | None, max_new_tokens: int, how: dict[str, Any]
) -> Any:
    """Traces of the base's answers to prompts.

    Args:
        how: the base is loaded.
    """
    from runtime.cli.options import load_with_adapter, to_ids
    from runtime.text.prompts import spread
    from train.corpus.collection import Collection
    from train.replay.workload import log_workload

    chosen = spread(Collection.read(prompts).prompts, limit)
    attached = load_with_adapter(str(adapter), model, **how)
    return log_workload(attached, to_ids(attached, chosen), max_new_tokens=max_new_tokens)

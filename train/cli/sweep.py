"""`specbound sweep`: fits with varied settings, and the best of them. Slow libraries are imported inside."""

from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail

SHOWN = 10


def sweep_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe that is varied, a YAML file.", show_default=False)],
    space: Annotated[
        Path, typer.Option(help="What varies: a YAML file of `setting: [values]` or `setting: {low: ..., high: ...}`.")
    ],
    trials: Annotated[int, typer.Option(min=1, help="Fits in all, those of earlier calls included.")] = 20,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="Costs from `specbound profile`: the fastest wins. Without, the one with the longest accepted drafts,"
            " whatever they take."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the sweep. By default `sweep` in the recipe's output folder.")
    ] = None,
) -> None:
    """Fit a recipe with varied settings on one corpus and judge each fit by replay of calibration text.

    Stopped, the same command goes on. Several of them at a time, on as many GPUs or machines, share the trials.

    Example: specbound sweep mine.yaml --space configs/sweep/heads.yaml --trials 20 --costs costs.json
    """
    from runtime.errors import SpecBoundError
    from train.sweep.results import BEST, PICTURE, TABLE
    from train.sweep.sweep import Sweep

    try:
        sweep = Sweep(recipe, space, costs, output)
        results = sweep.run(trials)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(results.table(SHOWN))
    print(f"{sweep.folder / BEST} is the recipe of trial {results.trials[0]['number']}; see also {TABLE}, {PICTURE}")

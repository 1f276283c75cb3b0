"""`specbound profile`: time the parts of a round on this machine. Slow libraries are imported inside."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli.failure import fail
from runtime.cli.options import Adapter, Device, Dtype, Exactness, Model, Threads


def profile_command(
    adapter: Adapter,
    json_file: Annotated[Path, typer.Option("--json", help="Write the costs to this file.")],
    model: Model = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    exactness: Exactness = "bitwise",
) -> None:
    """Measure how long each part of a speculation round takes on this machine.

    Example: specbound profile --adapter outputs/demo/adapter --json costs.json
    """
    from runtime.cli.options import load_with_adapter
    from runtime.errors import SpecBoundError
    from runtime.files import check_writable
    from train.replay.profile import measure

    try:
        check_writable(json_file)
        attached = load_with_adapter(adapter, model, dtype=dtype, threads=threads, device=device, exactness=exactness)
        costs = measure(attached)
        costs.write(json_file)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    print(costs)
    if "busy" in costs.conditions:
        print(f"warning: {costs.conditions['busy']}; until then `tune` counts with a busy machine", file=sys.stderr)

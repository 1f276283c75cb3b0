"""`specbound audit`: the ids of SpecBound beside the base's own. Slow libraries are imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.cli.failure import fail
from runtime.cli.options import (
    Adapter,
    Device,
    Dtype,
    Exactness,
    Model,
    Sample,
    Threads,
    load_with_adapter,
    sampling,
    to_ids,
)


def audit_command(
    adapter: Adapter,
    prompts: Annotated[str, typer.Option(help="Prompts: a .jsonl or .json file.")],
    model: Model = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many prompts, spread over the file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Generate this many tokens a prompt at most.")] = 128,
    dtype: Dtype = "bfloat16",
    threads: Threads = None,
    device: Device = "cpu",
    sample: Sample = False,
    temperature: Annotated[float | None, typer.Option(min=1e-6, help="Temperature of sampling. By default 1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of torch before each generation.")] = 0,
    exactness: Exactness = "bitwise",
    concurrency: Annotated[
        int, typer.Option(min=1, help="SpecBound decodes this many prompts together. Plainly each is alone.")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the findings in this file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the --json file holds.")] = False,
) -> None:
    """Generate every prompt plainly and with SpecBound, and compare the ids. Exit code 1 if any differ.

    Example: specbound audit --adapter outputs/demo/adapter --prompts prompts.jsonl --limit 16 --concurrency 4
    """
    from runtime.audit.audit import AuditSettings, run_audit
    from runtime.audit.record import earlier_entries
    from runtime.errors import SpecBoundError
    from runtime.files import check_writable
    from runtime.text.prompts import read_prompts, spread

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens} | ({"temperature": 1.0} if sample else {})
    try:
        options |= sampling(sample, temperature, None)
        how = (limit, dtype, threads, seed, exactness, options, concurrency)
        settings = AuditSettings(adapter, prompts, model, *how)
        if json_file is not None:
            check_writable(json_file)
            if resume:
                earlier_entries(json_file, "findings", {}, under="conditions")  # that it is a report; of what, later
        chosen = spread(read_prompts(prompts), limit)  # before the model, which takes longer
        attached = load_with_adapter(
            adapter, model, dtype=dtype, threads=threads, device=device, exactness=exactness, adaptive=False
        )  # a model at rest would show little
        report = run_audit(settings, attached, to_ids(attached, chosen), report=json_file, resume=resume)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    for number, prompt in enumerate(report["findings"]):
        if prompt["divergence"] is not None:
            print(f"prompt {number}: {prompt['divergence']}")
    print(f"{report['differing_tokens']} differing tokens of {report['tokens']} over {report['prompts']} prompts")
    print(f"{report['differing_logits']} rows of logits with a differing bit")
    print(f"exactness: {report['certificate']}")
    if report["differing_tokens"]:
        raise typer.Exit(1)

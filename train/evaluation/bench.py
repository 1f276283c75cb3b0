"""The benchmark: run every prompt through several methods in one process, and compare ids with stock `generate`.

Each prompt gives one record of what its generations took. The report is rewritten after every prompt and can be
resumed. Its statistics are computed in `train.evaluation.report`.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.adapter.folder import load_adapter
from runtime.adapter.hub import resolve_adapter
from runtime.audit.record import earlier_entries, write_report
from runtime.cli.options import load_with_adapter, to_ids
from runtime.conditions import conditions
from runtime.text.prompts import Prompt, spread
from train.corpus.collection import Collection
from train.evaluation.methods import Method, make_methods, require_known
from train.evaluation.prediction import predict
from train.evaluation.report import summarize
from train.fitting.throughput import peak_memory
from train.replay.clock import Clock
from train.replay.costs import CostTable

# Spec-Bench counts the eight categories of MT-bench as one task.
MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """The settings of a benchmark.

    Attributes:
        prompts: a .jsonl file or the name of a data set; only the first turn of each prompt is used.
        limit, per_task: number of prompts in total, or of each task, evenly spaced over the file.
        methods: names in `train.evaluation.methods.METHODS`; `stock` always runs, as the reference.
        costs: costs measured on this machine; with them the report adds predictions for the same texts.
    """

    adapter: str
    prompts: str
    methods: tuple[str, ...]
    base_model: str | None = None
    limit: int | None = None
    per_task: int | None = None
    max_new_tokens: int = 128
    dtype: str = "bfloat16"
    threads: int | None = None
    device: str = "cpu"
    exactness: str = "bitwise"
    costs: Path | None = None


def run_bench(settings: BenchSettings, *, path: Path | None = None, resume: bool = False) -> dict[str, Any]:
    """Run every method on every prompt.

    Args:
        path: file of the report, rewritten after every prompt.
        resume: continue the report in `path`, which must have the same settings and machine.

    Raises:
        SpecBoundError: options, prompts, adapter or base are wrong, or the report is of another benchmark.
        KeyboardInterrupt: only before the first prompt is done; later it ends the run and the report is kept.
    """
    require_known(settings.methods)
    prompts = choose(Collection.read(settings.prompts).prompts, settings.limit, settings.per_task)
    costs = None if settings.costs is None else CostTable.read(settings.costs)
    if costs is not None:
        own = load_adapter(resolve_adapter(settings.adapter)).config
        costs.check_layers(own.num_hidden_layers, settings.adapter)
    if path is not None and resume:
        earlier_entries(path, "records", {})  # that it is a report; of which settings is known later
    started = time.perf_counter()
    model = load_with_adapter(
        settings.adapter,
        settings.base_model,
        dtype=settings.dtype,
        threads=settings.threads,
        device=settings.device,
        exactness=settings.exactness,
    )
    names = ["stock", *(name for name in settings.methods if name != "stock")]
    methods = make_methods(model, names)
    loading = time.perf_counter() - started
    conditions = _conditions(settings, model, methods)
    records = earlier_entries(path, "records", conditions) if path is not None and resume else []
    ids = to_ids(model, prompts)
    _warm_up(model, methods, ids[0])
    try:
        with tqdm(total=len(ids), initial=len(records), desc="bench", unit="prompt") as bar:
            for number in range(len(records), len(ids)):
                records.append(_record(model, methods, prompts[number], ids[number], number, settings.max_new_tokens))
                report = _report(records, len(ids), conditions, loading)
                if path is not None:
                    write_report(path, report)
                speeds = (f"{name} {one['speedup_over_stock']:.2f}x" for name, one in report["methods"].items())
                bar.set_postfix_str(" ".join(speeds))
                bar.update()
    except KeyboardInterrupt:  # keep the report on the prompts that are done
        if not records:
            raise
    report = _report(records, len(ids), conditions, loading)
    if costs is not None:
        predict(model, methods, ids, records, costs, report)
        if path is not None:
            write_report(path, report)
    return report


def _report(records: list[dict[str, Any]], total: int, conditions: dict[str, Any], loading: float) -> dict[str, Any]:
    """Build the report on the records so far; `total` is the number of prompts."""
    return {
        "complete": len(records) == total,
        **conditions,
        **summarize(records),
        "loading_seconds": round(loading, 1),
        "peak_memory_mib": peak_memory(torch.device("cpu")) >> 20,
        "records": records,
    }


def choose(prompts: Sequence[Prompt], limit: int | None, per_task: int | None) -> list[Prompt]:
    """Choose prompts evenly spaced over the file, or over each task in it."""
    if per_task is None:
        return spread(prompts, limit)
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(task_of(prompt), []).append(prompt)
    chosen = [spread(group, per_task) for group in by_task.values()]
    # Tasks take turns, so that an interrupted benchmark covers them all.
    turns = max(map(len, chosen), default=0)
    return [group[turn] for turn in range(turns) for group in chosen if turn < len(group)]


def task_of(prompt: Prompt) -> str:
    """Return the Spec-Bench task of a prompt."""
    return "mt_bench" if prompt.task in MT_BENCH else prompt.task or "all"


def _record(
    model: Any, methods: dict[str, Method], prompt: Prompt, ids: torch.Tensor, number: int, max_new_tokens: int
) -> dict[str, Any]:
    """Run one prompt through every method; each prompt starts with the next method."""
    names = list(methods)
    turn = number % len(names)
    outputs, runs = {}, {}
    for name in names[turn:] + names[:turn]:
        outputs[name], runs[name] = _generate(model, methods[name], ids, max_new_tokens)
    for name, run in runs.items():
        run["identical"] = torch.equal(outputs[name], outputs["stock"])
    response = outputs["stock"][0, ids.shape[1] :].tolist()
    return {
        "task": task_of(prompt),
        "prompt_tokens": ids.shape[1],
        "response": response,
        "runs": {name: runs[name] for name in names},
    }


def _generate(
    model: Any, method: Method, ids: torch.Tensor, max_new_tokens: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Generate once; returns the ids and the run's measurements."""
    clock = Clock()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    output = method.generate(model, ids, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    seconds = time.perf_counter() - started
    run: dict[str, Any] = {"seconds": seconds, "tokens": output.shape[1] - ids.shape[1]}
    run["first_token"] = clock.times[1] - started  # times[0] is the prompt itself
    if model.device.type == "cuda":
        run["peak_memory_mib"] = torch.cuda.max_memory_allocated() >> 20
    if method.bounds is not None:
        stats = model.specbound.stats
        run |= {"rounds": stats.rounds, "resting_rounds": stats.resting_rounds, "parts": dict(stats.parts)}
        run |= {"drafted": dict(stats.drafted), "accepted": dict(stats.accepted)}
    return output, run


def _warm_up(model: Any, methods: dict[str, Method], ids: torch.Tensor) -> None:
    """Run each method once without timing, since first calls allocate memory."""
    for method in methods.values():
        method.generate(model, ids, max_new_tokens=WARM_UP_TOKENS, do_sample=False)


def _conditions(settings: BenchSettings, model: Any, methods: dict[str, Method]) -> dict[str, Any]:
    """Describe settings and machine of the benchmark, without folders of this machine."""
    specbound = model.specbound
    return {
        "settings": {
            **asdict(settings),
            "methods": list(methods),
            "costs": None if settings.costs is None else settings.costs.name,
            "adapter": Path(settings.adapter).name if Path(settings.adapter).exists() else settings.adapter,
            "prompts": "/".join(Path(settings.prompts).parts[-2:]),
            "base_model": specbound.config.base_model_name_or_path,
        },
        "adapter_sha256": specbound.config.weights_sha256,
        "titles": {name: method.title for name, method in methods.items()},
        **conditions(model.device, model.dtype),
        "certificate": str(specbound.certificate),
    }

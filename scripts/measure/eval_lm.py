"""lm-eval's generation tasks with and without SpecBound on one model: the same texts; scores and speeds of both.

Needs the `eval` extra. Tasks of lm-eval's own come from the Hub; those in configs/eval need no network. Example:
python scripts/measure/eval_lm.py adapters/smollm2-135m-instruct --tasks sums --limit 8
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from runtime.cli.failure import fail
from runtime.cli.options import load_with_adapter
from runtime.conditions import hardware
from runtime.errors import ConfigError, SpecBoundError
from runtime.files import write_atomic

LOCAL_TASKS = Path(__file__).parents[2] / "configs" / "eval"


class Timed(HFLM):  # type: ignore[misc]
    """The model as lm-eval sees it; keeps the ids of every answer and the time they took."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1)
        self.answers: list[list[int]] = []
        self.seconds = 0.0

    def _model_generate(self, context: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        started = time.perf_counter()
        output: torch.Tensor = super()._model_generate(context, *args, **options)
        self.seconds += time.perf_counter() - started
        self.answers.append(output[0, context.shape[1] :].tolist())
        return output

    def loglikelihood(self, *args: Any, **options: Any) -> Any:
        raise ConfigError("a task scores given answers, where nothing is generated: expected generation tasks")


def main(
    adapter: str,
    tasks: Annotated[str, typer.Option(help="Names with commas between: of configs/eval, or lm-eval's own.")] = "sums",
    model: Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="This many items of each task.")] = None,
    dtype: str = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures in this file.")] = None,
) -> None:
    """Evaluate both ways, print scores and speeds, keep the figures; exit code 1 if any text differs."""
    try:
        attached = load_with_adapter(adapter, model, dtype=dtype, threads=threads)
        tokenizer = AutoTokenizer.from_pretrained(attached.name_or_path)
        figures = compare(attached, tokenizer, [name.strip() for name in tasks.split(",")], limit)
    except (SpecBoundError, OSError) as error:
        fail(error, None)
    figures |= {"hardware": hardware(attached.device), "dtype": dtype, "threads": torch.get_num_threads()}
    show(figures)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if figures["different"]:
        raise typer.Exit(1)


def compare(model: Any, tokenizer: Any, tasks: list[str], limit: int | None) -> dict[str, Any]:
    """Scores, speeds and the names of items whose text or ids differ.

    Raises:
        ConfigError: an unknown task, or one in which nothing is generated.
    """
    local = {path.stem for path in LOCAL_TASKS.glob("*.yaml")}
    # lm-eval's own are some ten thousand files to look through.
    manager = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=not local.issuperset(tasks))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}: `lm-eval ls tasks` lists them")
    ways, texts, answers = {}, {}, {}
    for way in ("plain", "specbound"):
        timed = Timed(model, tokenizer)
        with model.specbound.disabled() if way == "plain" else nullcontext():
            results = simple_evaluate(
                timed, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0,
                apply_chat_template=tokenizer.chat_template is not None,
            )  # fmt: skip
        texts[way] = {
            f"{task} {sample['doc_id']}": sample["resps"]
            for task, samples in results["samples"].items()
            for sample in samples
        }
        answers[way] = timed.answers
        tokens = sum(map(len, timed.answers))
        scores = {task: _numbers(metrics) for task, metrics in results["results"].items()}
        ways[way] = {"scores": scores, "tokens": tokens, "seconds": round(timed.seconds, 2)}
    different = [name for name, text in texts["plain"].items() if texts["specbound"].get(name) != text]
    if not different and answers["plain"] != answers["specbound"]:
        different = ["ids of equal texts"]
    return {"items": len(texts["plain"]), "different": different, **ways}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The scores of a task, without their errors, which take more items than anybody waits for."""
    return {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}


def show(figures: dict[str, Any]) -> None:
    """Both ways side by side."""
    console = Console(highlight=False)
    table = Table("", "plain", "specbound", box=None)
    for task, scores in figures["plain"]["scores"].items():
        for name, value in scores.items():
            table.add_row(f"{task} {name}", f"{value:.4f}", f"{figures['specbound']['scores'][task][name]:.4f}")
    speeds = [figures[way]["tokens"] / figures[way]["seconds"] for way in ("plain", "specbound")]
    table.add_row("tokens/s", *(f"{speed:.1f}" for speed in speeds))
    console.print(table)
    console.print(
        f"{figures['hardware']}, {figures['dtype']}, {figures['threads']} threads, {speeds[1] / speeds[0]:.2f}x"
    )
    same = figures["items"] - len(figures["different"])
    console.print(f"{same} of {figures['items']} items with the same text")
    for name in figures["different"]:
        console.print(f"different: {name}", style="bold")


if __name__ == "__main__":
    typer.run(main)

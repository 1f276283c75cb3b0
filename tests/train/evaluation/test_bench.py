"""`specbound bench` on a tiny base: every method, ids compared, figures by task, resumed where it was cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import train.evaluation.bench
from runtime import load_specbound
from runtime.text.prompts import Message, Prompt
from train.cli.app import app
from train.evaluation.bench import choose, task_of
from train.evaluation.methods import METHODS, make_methods
from train.evaluation.picture import picture
from train.evaluation.report import markdown, summarize
from train.replay.costs import CostTable


@pytest.fixture
def prompts(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of prompts of three categories, two of them of MT-bench, in a folder with the demo's adapter."""
    monkeypatch.chdir(demo_outputs)
    kinds = ["writing", "qa", "coding", "qa", "qa", "qa"]
    rows = [{"turns": [f"w{n} w{n + 3} w{2 * n}", "w1"], "category": kind} for n, kind in enumerate(kinds)]
    path = demo_outputs / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench(prompts: Path, *options: str) -> Any:
    """The verb, on the demo's adapter."""
    given = ["--adapter", "outputs/demo/adapter", "--prompts", str(prompts), "--json", "bench.json"]
    return CliRunner().invoke(app, ["bench", *given, "--dtype", "float32", "--max-new-tokens", "12", *options])


def test_every_method_of_our_own_loop_gives_stocks_ids(prompts: Path) -> None:
    """And the report has what was promised: figures overall and by task, hardware, a table, a picture."""
    ours = [name for name in METHODS if name not in ("early_exit", "prompt_lookup")]
    CostTable.counted(6, head=0.1, unembedding=1.0).write(Path("costs.json"))
    options = ["--per-task", "1", "--costs", "costs.json"]
    result = bench(prompts, "--methods", ",".join([*ours, "prompt_lookup"]), *options)
    assert result.exit_code == 0, result.output
    found = json.loads(Path("bench.json").read_text())
    assert found["complete"] and {"hardware", "dtype", "threads", "versions"} <= found.keys()
    assert set(found["by_task"]) == {"mt_bench", "qa"} and list(found["methods"]) == [*ours, "prompt_lookup"]
    for name in ours:
        figures = found["methods"][name]
        assert figures["identical_prompts"] == figures["prompts"] == 2 and figures["tokens"] > 0
        assert (
            figures["tokens_per_second_interval"][0] <= figures["tokens_per_second"] and figures["first_token_seconds"]
        )
        if name != "stock":
            assert {"mean_accepted_length", "acceptance_rate", "exits", "time_split"} <= figures.keys()
            assert figures["speedup_over_plain"] > 0
    assert found["methods"]["plain"]["mean_accepted_length"] == 1.0
    steady = found["methods"]["steady"]
    assert steady["predicted_mean_accepted_length"] == pytest.approx(steady["mean_accepted_length"], rel=0.05)
    assert steady["predicted_speedup"] > 0 and "predicted_speedup" not in found["methods"]["paper"]
    assert "0" not in found["methods"]["heads"]["exits"] and set(found["methods"]["lookup"]["exits"]) <= {"0"}
    assert Path("bench.png").stat().st_size > 1000 and "| specbound |" in Path("bench.md").read_text()


def test_a_benchmark_goes_on_where_it_was_cut(prompts: Path) -> None:
    """Records that are there are kept; of other settings they are refused."""
    assert bench(prompts, "--methods", "plain", "--limit", "3").exit_code == 0
    whole = json.loads(Path("bench.json").read_text())
    Path("bench.json").write_text(json.dumps(whole | {"records": whole["records"][:2]}))
    assert bench(prompts, "--methods", "plain", "--limit", "3", "--resume").exit_code == 0
    found = json.loads(Path("bench.json").read_text())
    assert found["records"][:2] == whole["records"][:2] and len(found["records"]) == 3
    result = bench(prompts, "--methods", "heads", "--limit", "3", "--resume")
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and last.startswith("error: bench.json is of another run")
    result = bench(prompts, "--methods", "fastest")
    assert result.exit_code == 1 and result.stderr.startswith("error: method 'fastest' is unknown")


def test_a_benchmark_that_is_interrupted_keeps_what_it_has(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the third prompt: a report on two, an exit code that says so."""
    record = train.evaluation.bench._record
    monkeypatch.setattr(
        train.evaluation.bench, "_record", lambda *given: record(*given) if given[4] < 2 else interrupt()
    )

    def interrupt() -> None:
        raise KeyboardInterrupt

    result = bench(prompts, "--methods", "plain", "--limit", "5")
    assert result.exit_code == 130 and "--resume" in result.stderr.splitlines()[-1]
    found = json.loads(Path("bench.json").read_text())
    assert not found["complete"] and len(found["records"]) == 2 and Path("bench.png").exists()


def test_methods_leave_the_adapter_as_it_was(prompts: Path) -> None:
    """Bounds, drafter, controller, and whether it is enabled; one certificate serves all."""
    model: Any = load_specbound("outputs/demo/adapter")
    specbound = model.specbound
    names = [name for name in METHODS if name != "early_exit"]
    specbound.prepare(model)
    before = (specbound.bounds, specbound.drafter, specbound.controller, specbound.enabled)
    methods = make_methods(model, names)
    certificate = specbound.certificate
    for method in methods.values():
        method.generate(model, torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False)
    assert (specbound.bounds, specbound.drafter, specbound.controller, specbound.enabled) == before
    assert specbound.certificate is certificate


def test_tasks_are_seen_in_turn() -> None:
    """So that a benchmark cut short has seen every one; MT-bench's categories are one task."""
    kinds = ["writing"] * 4 + ["qa"] * 2 + [""]
    prompts = [Prompt((Message("user", str(n)),), task=kind) for n, kind in enumerate(kinds)]
    assert [task_of(prompt) for prompt in choose(prompts, None, 2)] == ["mt_bench", "qa", "all", "mt_bench", "qa"]
    assert len(choose(prompts, 3, None)) == 3


def test_a_method_that_changes_ids_is_marked(tmp_path: Path) -> None:
    """In the table and in the picture."""

    def run(seconds: float, identical: bool) -> dict[str, Any]:
        return {"seconds": seconds, "first_token": 0.1, "tokens": 10, "identical": identical}

    records = [
        {"task": "qa", "prompt_tokens": 4, "runs": {"stock": run(2.0, True), "other": run(1.0, number > 0)}}
        for number in range(3)
    ]
    found = {
        **summarize(records),
        "hardware": "a CPU", "dtype": "bfloat16", "threads": 2, "versions": {"torch": "2", "transformers": "5"},
        "settings": {"prompts": "prompts.jsonl", "max_new_tokens": 10}, "titles": {"stock": "a", "other": "b"},
    }  # fmt: skip
    assert found["methods"]["other"]["speedup_over_stock"] == 2.0
    assert "**2 of 3**" in markdown(found)
    picture(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000

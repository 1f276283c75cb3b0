"""From a fitted adapter to bounds for this machine: `specbound profile`, `specbound tune`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from runtime import SpecBoundError, SpeculationBounds, load_specbound
from runtime.adapter.folder import load_adapter
from runtime.stats import SpeculationStats
from train.calibration.traces import Traces
from train.cli.app import app
from train.corpus.corpus import load_split
from train.replay import profile
from train.replay.agreement import check_agreement
from train.replay.costs import CostTable
from train.replay.profile import _Bench, measure
from train.replay.replay import Replayer
from train.replay.workload import log_workload


@pytest.fixture
def fitted(fitted: Path, make_recipe: Any, tmp_path: Path) -> tuple[Path, str, Path]:
    """A copy of the fitted adapter's folder, its base, and the corpus it was fitted on."""
    recipe = make_recipe(tmp_path)
    shutil.copytree(fitted, tmp_path / "adapter")
    return tmp_path / "adapter", recipe["model_name_or_path"], Path(recipe["corpus_dir"])


def test_from_profile_to_tuned_bounds(fitted: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No cost is negative or falls with width; the tuned bounds are the adapter's, which loads, other files kept."""
    folder, base, _ = fitted
    model: Any = load_specbound(folder, base)
    costs = measure(model, max_width=4, repeats=3, progress=False)
    assert not any("plain decoding" in record.message for record in caplog.records)
    assert costs.num_hidden_layers == model.config.num_hidden_layers and sorted(costs.layer) == [1, 2, 3, 4]
    assert min(costs.plain, costs.lookup, costs.token, *costs.unembedding.values()) > 0
    assert min(costs.head, costs.round, *costs.layer.values()) >= 0  # differences: a tiny base's drown in noise
    assert sorted(costs.unembedding.values()) == [costs.unembedding[width] for width in (1, 2, 3, 4)]
    assert costs.conditions["exactness"] == "bitwise" and "stock generate" in str(costs)
    costs.write(tmp_path / "costs.json")
    assert CostTable.read(tmp_path / "costs.json") == costs
    names = {path.name for path in folder.iterdir()}
    arguments = ["tune", "--adapter", str(folder), "--costs", str(tmp_path / "costs.json")]
    result = CliRunner().invoke(app, [*arguments, "--max-draft-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert "after: " in result.output and "not used to choose bounds" in result.output
    assert "lookup " in result.output and "layer 4 " in result.output and " instead of " in result.output
    tuned = load_adapter(folder).config
    assert tuned.bounds.max_draft_tokens == 3
    assert {path.name for path in folder.iterdir()} == names | {"costs.json"}
    calibrated = json.loads((folder / "calibration.json").read_text())
    assert calibrated["tuned"]["after"]["bounds"]["max_draft_tokens"] == 3
    assert calibrated["replay"]["costs"]["threads"] == 1
    assert Traces.read(folder / "traces.safetensors", weights_sha256=tuned.weights_sha256).layers[0] == 0
    load_specbound(folder, base)


def test_heads_that_attend_are_measured(fit: Any, tiny_base: Path, tmp_path: Path) -> None:
    """After a prompt that they have read; the state of a measurement holds it."""
    folder, _ = fit(tmp_path, head="attention")
    model: Any = load_specbound(folder / "adapter", tiny_base)
    model.specbound.prepare(model)
    assert model.specbound.drafter.watched
    with model.specbound.prepared.running(model):
        seconds = _Bench(model, 40, 10, 4).sources()
    assert {name for name, *_ in seconds} >= {"head", "head_row"}
    assert all(taken > 0 for (name, *_), taken in seconds.items() if name == "head")


def test_a_slow_base_is_measured_in_fewer_rounds(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one to warm up and one that counts, where a third would end after the limit."""
    folder, base, _ = fitted
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    rounds = []
    gaps = _Bench.gaps
    monkeypatch.setattr(_Bench, "gaps", lambda self: rounds.append(self.context) or gaps(self))
    assert measure(load_specbound(folder, base), max_width=2, progress=False).plain > 0
    assert len(rounds) == 2 * len(profile.CONTEXTS)


def test_blocks_are_measured_at_every_alignment(fitted: Any) -> None:
    """From one time to the next the context is shorter, and so is what the cache holds."""
    folder, base, _ = fitted
    model: Any = load_specbound(folder, base)
    model.specbound.prepare(model)
    bench, lengths = _Bench(model, 40, 40, 2), []
    for _ in range(16):
        lengths.append(bench.cache.get_seq_length())
        assert set(bench.blocks()) == {(name, width, 40) for name in ("layers", "unembedding") for width in (1, 2)}
        assert bench.cache.get_seq_length() == lengths[-1]
        bench.shorten()
    assert lengths[0] == 80 and {length % 16 for length in lengths} == set(range(16))


def test_what_cannot_be_tuned_is_refused(fitted: Any, tmp_path: Path) -> None:
    """In one line, the adapter untouched."""
    folder, _, _ = fitted
    CostTable.counted(99, head=1.0, unembedding=1.0).write(tmp_path / "other.json")
    before = (folder / "config.json").read_bytes()
    for arguments, message in (
        (["--adapter", str(folder), "--costs", str(tmp_path / "none.json")], "specbound profile"),
        (["--adapter", str(folder), "--costs", str(tmp_path / "other.json")], "costs are of a base of 99 layers"),
        (["--adapter", str(tmp_path / "none"), "--costs", str(tmp_path / "other.json")], "is not a folder"),
    ):
        result = CliRunner().invoke(app, ["tune", *arguments])
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    (folder / "traces.safetensors").unlink()
    CostTable.counted(6, head=1.0, unembedding=1.0).write(tmp_path / "right.json")
    result = CliRunner().invoke(app, ["tune", "--adapter", str(folder), "--costs", str(tmp_path / "right.json")])
    assert result.exit_code == 1 and "fit the adapter again" in result.stderr
    assert (folder / "config.json").read_bytes() == before


def test_replay_and_run_accept_alike(fitted: Any) -> None:
    """Mean accepted length on the calibration texts, predicted and measured: within 2 %."""
    folder, base, corpus = fitted
    model: Any = load_specbound(folder, base, adaptive=False)
    bounds = SpeculationBounds(0.05, 99, 4)
    model.specbound.bounds = bounds
    measured = SpeculationStats()
    for row in load_split(corpus, "calibration"):
        prompt = torch.tensor([row["prompt_ids"]])
        text = model.generate(prompt, max_new_tokens=len(row["response_ids"]), do_sample=False)
        assert text[0, prompt.shape[1] :].tolist() == row["response_ids"]
        measured += model.specbound.stats
    traces = Traces.read(folder / "traces.safetensors", weights_sha256=model.specbound.config.weights_sha256)
    costs = CostTable.counted(model.config.num_hidden_layers, head=1.0, unembedding=1.0)
    predicted = Replayer(traces, costs).run(bounds)
    assert measured.accepted.total() > 20
    assert predicted.mean_accepted_length == pytest.approx(measured.mean_accepted_length, rel=0.02)


def test_an_adapter_that_replay_misjudges_is_not_published(fitted: Any) -> None:
    """On forced text the two agree, on foreign text too (test_calibration.py); with other traces they do not."""
    folder, base, corpus = fitted
    model: Any = load_specbound(folder, base, adaptive=False)
    specbound, bounds = model.specbound, SpeculationBounds(0.05, 99, 4)
    rows = [(row["prompt_ids"], row["response_ids"]) for row in load_split(corpus, "calibration")]
    traces = Traces.read(folder / "traces.safetensors", weights_sha256=specbound.config.weights_sha256)
    parts = specbound.prepared.layers, specbound.drafter, bounds
    found = check_agreement(*parts, rows, traces)  # what the base said itself is its choice everywhere
    assert found["by_run"] == pytest.approx(found["by_replay"], rel=0.02) and found["by_run"] > 1.02
    assert json.loads((folder / "calibration.json").read_text())["agreement"]["tokens"] > 0
    with pytest.raises(SpecBoundError, match="not published"):
        check_agreement(*parts, rows, replace(traces, rank=np.where(traces.rank == 0, -1, 0).astype(np.int8)))


def test_bounds_for_a_workload(fitted: Any, tmp_path: Path) -> None:
    """Its traces are those that the fit would have logged on the same text; the bounds are tuned on them."""
    folder, base, corpus = fitted
    model: Any = load_specbound(folder, base)
    rows = [row for row in load_split(corpus, "calibration") if len(row["response_ids"]) == 16]
    traces = log_workload(model, [torch.tensor([row["prompt_ids"]]) for row in rows], max_new_tokens=16)
    assert traces.layers == (0, 2, 4) and traces.num_sequences == len(rows)
    logged = Traces.read(folder / "traces.safetensors", weights_sha256=model.specbound.config.weights_sha256)
    whole = np.bincount(logged.sequence) == 16  # the others ended before
    logged = logged.of_sequences(whole)
    assert logged.num_sequences == len(rows) > 0
    assert (traces.correct == logged.correct).mean() > 0.99
    assert abs(traces.confidence - logged.confidence).max() < 0.01
    assert traces.after_wrong is not None and logged.after_wrong is not None and logged.after_wrong.any()
    assert abs(traces.after_wrong - logged.after_wrong).max() < 0.01
    CostTable.counted(6, head=0.1, unembedding=1.0).write(tmp_path / "costs.json")
    (tmp_path / "mine.jsonl").write_text("".join(f'{{"prompt": "w{n} w{n + 3} w{2 * n}"}}\n' for n in range(30)))
    options = ["--costs", str(tmp_path / "costs.json"), "--prompts", str(tmp_path / "mine.jsonl"), "--limit", "20"]
    result = CliRunner().invoke(
        app,
        ["tune", "--adapter", str(folder), *options, "--model", base, "--dtype", "float32", "--max-new-tokens", "16"],
    )
    assert result.exit_code == 0, result.output
    few = [*options[:-1], "2"]
    result = CliRunner().invoke(app, ["tune", "--adapter", str(folder), *few, "--model", base, "--dtype", "float32"])
    assert result.exit_code in (0, 1) and "Traceback" not in result.stderr


def test_a_base_that_decodes_plainly_is_not_profiled(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounds would be stock's: an error says why, instead of figures of nothing."""
    folder, base, _ = fitted
    model: Any = load_specbound(folder, base)
    monkeypatch.setattr(type(model.specbound.prepared), "look", lambda *_: "its layers are not known")
    with pytest.raises(SpecBoundError, match="decodes plainly here: its layers are not known"):
        measure(model)

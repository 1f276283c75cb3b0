"""The measuring scripts, on a tiny base: they run, and say what they measured."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from runtime import load_specbound
from runtime.decoding.layers import DecoderLayers
from runtime.drafting.draft_heads import DraftHeads
from runtime.drafting.heads import ExitHeads
from runtime.exact.native.library import why_not_native
from runtime.generate import attach
from runtime.loading import make_specbound
from tests.helpers.families import tiny
from tests.helpers.paths import ROOT
from tests.helpers.programs import forks
from tests.helpers.scripts import script
from train.calibration.traces import TRACES_FILE, Traces
from train.features.extractor import Sequences
from train.replay.costs import CostTable
from train.replay.variants import FULL, UNCALIBRATED


def test_verify_cost(make_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every width in both modes, beside stock."""
    verify_cost = script("measure/verify_cost")
    found = verify_cost.measure(make_model(), 40, [1, 3], 3)
    assert found["stock_ms"] > 0 and set(found["bitwise_ms"]) == set(found["batched_ms"]) == {1, 3}
    verify_cost.show(found)
    assert "per token / stock" in capsys.readouterr().out


@pytest.mark.parametrize(("features", "head"), [("online", "attention"), ("cache", "deep")])
def test_fit_cost(tiny_base: Path, fresh_accelerate: None, features: str, head: str) -> None:
    """A row of figures, the planner's beside."""
    fit_cost = script("measure/fit_cost")
    row = fit_cost.USUAL | {"features": features, "head": head, "batch": 2}
    found = row | fit_cost.measure(str(tiny_base), "float32", row, 1)
    assert found["tokens_per_second"] > 0 and found["step_seconds"] > 0 and found["forward_seconds"] > 0
    assert found["planned_gib"] > 0 and found["planned_times_forward"] > 0
    heading, line, first = fit_cost.table([found]).splitlines()
    assert heading.count("|") == line.count("|") == first.count("|") and f"| {features} | {head} | 3 | 2 |" in first


@pytest.fixture
def adapted(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny base with an adapter."""
    monkeypatch.chdir(demo_outputs)
    return load_specbound("outputs/demo/adapter", adaptive=False)


def test_ablations_by_run(adapted: Any) -> None:
    """Every variant, the same ids, the adapter as it was."""
    before = (adapted.specbound.bounds, adapted.specbound.drafter)
    found = script("measure/ablations").measure(adapted, [torch.arange(3, 12)[None]], 20)
    assert found["identical"] and {FULL, UNCALIBRATED, "heads alone"} <= set(found["variants"])
    assert (adapted.specbound.bounds, adapted.specbound.drafter) == before


def test_adversarial(adapted: Any) -> None:
    """Heads of noise give the same ids; the texts are the same every time."""
    adversarial = script("measure/adversarial")
    assert list(adversarial.texts("random strings", 2)) == list(adversarial.texts("random strings", 2))
    heads = adapted.specbound.drafter.heads
    noisy = adversarial.noise(heads)
    pairs = list(zip(heads.exits.parameters(), noisy.exits.parameters(), strict=True))
    assert all(not torch.equal(before, after) for before, after in pairs)
    *seconds, same = adversarial.compare(adapted, torch.arange(3, 12)[None], 12, sample=True)
    assert same and min(seconds) > 0


def random_traces(layers: tuple[int, ...]) -> Traces:
    """Sources that are right as often as they are sure."""
    numbers = np.random.default_rng(0)
    confidence = numbers.random((len(layers), 1, 1, 80)).astype(np.float32)
    rank = np.where(numbers.random(confidence.shape) < confidence, 0, -1).astype(np.int8)[:, :, 0]
    return Traces(layers, confidence, rank, np.full_like(rank, -1), np.repeat([0, 1], 40), np.arange(80))


def test_ceiling(adapted: Any, demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both loops are split, and drafts that are never wrong are the fastest."""
    ceiling = script("measure/ceiling")
    monkeypatch.setattr(ceiling, "READ_BYTES", 2**16)
    folder, config = demo_outputs / "outputs/demo/adapter", adapted.specbound.config
    random_traces((0, *config.exit_layers)).write(folder / TRACES_FILE, weights_sha256=config.weights_sha256)
    CostTable.counted(6, head=0.2, unembedding=0.5).write(folder / "costs.json")
    found = ceiling.split(adapted, 40, 3) | {"bounds": ceiling.bounds(adapted, folder)}
    assert found["stock"]["attention"] > 0  # ours may run in our own kernel, which is in the rest
    for way in (found["stock"], found["plain"]):
        assert way["products"] > 0
        assert sum(way.values()) == pytest.approx(2 * way["whole"], abs=0.05)
    assert found["bounds"]["never_wrong"] > found["bounds"]["plain"] > 0


def test_scale(make_model: Any) -> None:
    """A deeper base costs what its layers do; the same shares of it are asked."""
    scale = script("measure/scale")
    shape = make_model(max_position_embeddings=64).config  # no room for more than one length of context
    measured = scale.part(shape, torch.float32, "cpu", "bitwise", 2)
    assert measured.num_hidden_layers == 2
    measured = replace(measured, plain=5.0, plain_context=0.2, unembedding={1: 0.75, 2: 1.0}, token=0.25)
    costs = scale.whole(measured, 10)
    assert (costs.num_hidden_layers, costs.plain, costs.plain_context) == (10, 21.0, 1.0)
    found = scale.predict(random_traces((0, 3)), CostTable.counted(10, head=0.1, unembedding=0.5))
    assert found["over_plain"] == found["over_stock"] > 1 and found["plain_over_stock"] == 1


def test_gpu(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one command for the day a GPU is there, here on the CPU with small shapes: every step but `scale` runs."""
    prompts = demo_outputs / "prompts.jsonl"
    texts = [" ".join(f"w{(7 * number + place) % 90}" for place in range(2 + number % 6)) for number in range(60)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    folder, report = demo_outputs / "outputs", demo_outputs / "gpu.json"
    base, adapter = folder / "base" / "smollm2-135m-instruct", folder / "demo" / "adapter"
    gpu = script("measure/gpu")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    program = subprocess.run

    def run(command: list[str], **options: Any) -> Any:
        """In forks, but for pytest, which wants to be the first to import what it rewrites."""
        return (program if "pytest" in command else forks.run)(command, **options)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.main(report, base, adapter, prompts, tiny=True)
    found = json.loads(report.read_text())
    assert list(found["steps"]) == ["rows", "tests", "audit", "bench", "fit"] and found["hardware"]
    assert any(name.startswith("speed/") for name in found["steps"]["fit"]["report"])
    assert found["steps"]["audit"]["report"]["differing_tokens"] == 0
    assert set(found["steps"]["rows"]["report"]["kept"]) == {"float32", "bfloat16", "float16"}


def test_gpu_is_one_command(tmp_path: Path) -> None:
    """The shell's part of it: from any folder, with all that it is given."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD $*"\n')
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / "scripts/measure/gpu.sh"), "--tiny", "--json", "a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PATH": path})
    assert done.stdout == f"{ROOT} scripts/measure/gpu.py --tiny --json a\n"


@torch.inference_mode()
def test_native() -> None:
    """Each way of a prompt's products and of a draft is timed."""
    if why_not_native() is not None:
        pytest.skip(f"no native kernels here: {why_not_native()}")
    native, base = script("measure/native"), tiny("llama", dtype=torch.bfloat16)
    assert set(native.prompt(base, 5, 2)) == {"forward", "products by torch", "products by our kernel"}
    exits = ExitHeads("deep", [1], hidden_size=48, draft_vocab_size=32, rank=16).to(torch.bfloat16)
    heads = DraftHeads.of(exits, DecoderLayers(base), torch.arange(32))
    assert min(native.draft(heads, 2).values()) > 0


def test_checks(make_model: Any, make_adapter: Any) -> None:
    """Each check beside an answer, and what they are of it."""
    checks = script("measure/checks")
    model = make_model()
    attach(model, make_specbound(model, make_adapter(model), exactness="bitwise"))
    found = checks.measure(model, tokens=8, repeats=3)
    assert set(found["ms"]) == {"code", "settings", "weights", "packed", "all checks", "answer"}
    assert found["share"] == found["ms"]["all checks"] / found["ms"]["answer"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_lora(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, merged and unmerged; a certificate for each, and no id differs."""
    lora = script("measure/lora")
    monkeypatch.chdir(demo_outputs)
    Path("p.jsonl").write_text('{"prompt": "w3 w9 w60"}\n{"prompt": "w17 w5"}\n')
    monkeypatch.setattr(lora, "ANSWER", 12)
    options = {"steps": 2, "tokens": 20, "dtype": "float32", "json_file": Path("lora.json")}
    lora.main("outputs/demo/adapter", "p.jsonl", **options)
    found = json.loads(Path("lora.json").read_text())
    assert list(found["stages"]) == ["unmerged", "merged", "unmerged again"] and len(found["losses"]) == 2
    assert all(stage["tokens"] >= 20 and stage["differing"] == 0 for stage in found["stages"].values())


@pytest.mark.parametrize("head", ["attention", "deep"])
def test_recall_of_heads_rises_with_k(make_model, make_adapter, tmp_path, head):
    heads, model = script("recall"), make_model()
    adapter = make_adapter(model, head=head)
    save_file(
        adapter.heads.state_dict() | {"draft_to_target": adapter.draft_to_target}, tmp_path / "heads.safetensors"
    )
    layers = DecoderLayers(model)
    read = heads.read_heads(tmp_path / "heads.safetensors", head, layers)
    rows = Sequences([([3, 4, 5, 6], list(range(7, 27))), ([5, 8], list(range(30, 60)))], 0)
    found = heads.measure(read, layers, rows, prompt_tokens=8 if head == "attention" else 0)
    assert list(found) == [2, 4] and list(found[2]) == [1, 2, 3, 4]
    for drafts in found.values():
        for shares in drafts.values():
            assert list(shares.values()) == sorted(shares.values())
    assert len(heads.lines(found)) == 4

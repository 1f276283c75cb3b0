"""The measuring scripts, on a tiny base: they run, and say what they measured."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from runtime import load_specbound
from train.ablations import FULL, UNCALIBRATED

SCRIPTS = Path(__file__).parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_verify_cost(make_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every width in both modes, beside stock."""
    verify_cost = script("verify_cost")
    found = verify_cost.measure(make_model(), 40, [1, 3], 3)
    assert found["stock_ms"] > 0 and set(found["bitwise_ms"]) == set(found["batched_ms"]) == {1, 3}
    verify_cost.show(found)
    assert "per token / stock" in capsys.readouterr().out


@pytest.fixture
def adapted(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny base with an adapter."""
    monkeypatch.chdir(demo_outputs)
    return load_specbound("outputs/demo/adapter", adaptive=False)


def test_ablations_by_run(adapted: Any) -> None:
    """Every variant, the same ids, the adapter as it was."""
    before = (adapted.specbound.bounds, adapted.specbound.drafter)
    found = script("ablations").measure(adapted, [torch.arange(3, 12)[None]], 20)
    assert found["identical"] and {FULL, UNCALIBRATED, "heads alone"} <= set(found["variants"])
    assert (adapted.specbound.bounds, adapted.specbound.drafter) == before


def test_adversarial(adapted: Any) -> None:
    """Heads of noise give the same ids; the texts are the same every time."""
    adversarial = script("adversarial")
    assert list(adversarial.texts("random strings", 2)) == list(adversarial.texts("random strings", 2))
    heads = adapted.specbound.drafter.heads
    noisy = adversarial.noise(heads)
    pairs = list(zip(heads.parameters(), noisy.parameters(), strict=True))
    assert all(not torch.equal(before, after) for before, after in pairs)
    ratio, same = adversarial.compare(adapted, torch.arange(3, 12)[None], 12)
    assert same and ratio > 0

"""Equality on a real model, SmolLM2-135M-Instruct, in both dtypes; skipped where the model cannot be had."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runtime import SpeculationBounds, detach
from runtime.adapter.hub import kept_base
from runtime.exact.execution import ExecutionPolicy
from runtime.exact.probe import Reference, compare
from runtime.generate import attach
from runtime.handle import SpecBound
from tests.helpers.fake_heads import FakeHeads
from tests.helpers.paths import ROOT

BASE = kept_base("HuggingFaceTB/SmolLM2-135M-Instruct")
pytestmark = pytest.mark.usefixtures("whole_probes")
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("Explain how bees make honey.", {"do_sample": False}),
    (
        "Write a Python function that reverses a list, and say how it works.",
        {"do_sample": True, "temperature": 0.7},
    ),
]


@pytest.fixture(scope="module")
def base() -> str:
    """Its folder, fetched first where it is not here."""
    fetched = subprocess.run(
        [sys.executable, str(ROOT / "scripts/fetch_smollm2.py")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if fetched.returncode != 0:
        pytest.skip(f"SmolLM2 cannot be had here: {fetched.stderr.strip().splitlines()[-1:]}")
    return str(BASE)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(base: str, request: pytest.FixtureRequest) -> Any:
    """The model in one dtype."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=request.param).eval()


@pytest.mark.parametrize(("question", "options"), RUNS, ids=["greedy", "sampled"])
def test_same_ids(model: Any, question: str, options: dict[str, Any]) -> None:
    """Heads right two times of three, at three exits: stock's ids, most drafts in use."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(5)
    stock = model.generate(**inputs, **options, max_new_tokens=32)
    heads = FakeHeads("mixed", [4, 12, 20], stock[0].tolist(), vocabulary=model.config.vocab_size)
    attach(model, SpecBound(model, heads, SpeculationBounds(0.4, 20, 4)))
    try:
        torch.manual_seed(5)
        found = model.generate(**inputs, **options, max_new_tokens=32)
        assert model.specbound.certificate.bitwise
        assert model.specbound.stats.mean_accepted_length > 1.3
    finally:
        detach(model)
    assert torch.equal(found, stock)


def test_negative_control_batched_rows_differ(model: Any) -> None:
    """The probe can fail: computed as one block, rows do not have the bits of one-token decoding."""
    found = compare(model, Reference.near(model), ExecutionPolicy.batched(), [4], whole=True)
    assert found.rows == 32
    assert found.differing > 0

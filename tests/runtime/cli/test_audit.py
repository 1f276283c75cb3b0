"""The audit finds what differs, and nothing else; it tells a tie from a defect."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from runtime import load_specbound
from runtime.audit.audit import AuditSettings, run_audit
from runtime.audit.divergence import _compare, audit
from runtime.cli.options import to_ids
from runtime.decoding.cache import KVCache
from runtime.drafting.policy import SpeculationBounds
from runtime.errors import DataError
from runtime.generate import attach, detach
from runtime.handle import SpecBound
from runtime.text.prompts import read_prompts, spread
from tests.helpers.fake_heads import FakeHeads
from train.cli.app import app


def attached(model: Any, prompt: torch.Tensor, tokens: int) -> Any:
    """The model with heads that are right two times of three."""
    truth = model.generate(prompt, max_new_tokens=tokens, do_sample=False)[0].tolist()
    heads = FakeHeads("mixed", [2, 4], truth, vocabulary=model.config.vocab_size)
    return attach(model, SpecBound(model, heads, SpeculationBounds(0.3, 4, 4)))


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("do_sample", [False, True])
def test_nothing_differs(make_model: Any, do_sample: bool, concurrency: int) -> None:
    """Greedy and sampled, alone and together: 0 differing tokens, 0 differing logits."""
    prompt = torch.arange(3, 12)[None]
    model = attached(make_model(), prompt, 30)
    prompts = [prompt, prompt + 1, prompt[:, 1:]]
    options = {"max_new_tokens": 30, "do_sample": do_sample}
    found = list(audit(model, prompts, seed=3, concurrency=concurrency, **options))
    assert [(one.tokens, one.differing, one.divergence) for one in found] == [(30, 0, None)] * 3
    assert all(one.differing_logits == 0 for one in found)
    assert model.specbound.enabled


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_defect_is_found(make_model: Any, monkeypatch: pytest.MonkeyPatch, concurrency: int) -> None:
    """A cache that keeps a row too many: differing tokens, called a defect or at least explained."""
    prompt = torch.arange(3, 12)[None]
    model = attached(make_model(), prompt, 30)
    update = KVCache.update

    def broken(self: KVCache, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **more: Any) -> Any:
        return update(self, keys * 0.5, values, *rest, **more)

    monkeypatch.setattr(KVCache, "update", broken)
    for found in audit(model, [prompt] * concurrency, concurrency=concurrency, max_new_tokens=30, do_sample=False):
        assert found.differing > 0
        assert found.divergence is not None and found.divergence.largest_shift > 0
    detach(model)


SECONDS = {"stock": 1.0, "specbound": 1.0}


def outputs(ids: list[int], logits: list[list[float]]) -> Any:
    """What `generate` returns, as far as the audit reads it."""
    return SimpleNamespace(sequences=torch.tensor([ids]), logits=tuple(torch.tensor([row]) for row in logits))


def test_ties_and_defects_are_told_apart() -> None:
    """A margin within the shift of both logits is a tie; equal logits with other tokens, or a wide margin, are not."""
    stock = outputs([9, 0], [[1.0, 0.9]])
    tie = _compare(stock, outputs([9, 1], [[0.95, 0.96]]), 1, SECONDS).divergence
    assert tie is not None and tie.kind == "tie"
    assert tie.stock_logits == pytest.approx((1.0, 0.9)) and tie.margin == pytest.approx(0.1)
    same_logits = _compare(stock, outputs([9, 1], [[1.0, 0.9]]), 1, SECONDS).divergence
    assert same_logits is not None and same_logits.kind == "defect"
    wide = _compare(outputs([9, 0], [[5.0, 0.9]]), outputs([9, 1], [[4.9, 1.0]]), 1, SECONDS).divergence
    assert wide is not None and wide.kind == "defect"
    shorter = _compare(stock, outputs([9], []), 1, SECONDS)
    assert (shorter.tokens, shorter.differing) == (1, 1)
    assert shorter.divergence is not None and shorter.divergence.specbound_token is None


def test_the_command(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`specbound audit` on an adapter folder: the line, the JSON, the exit codes."""
    monkeypatch.chdir(demo_outputs)
    Path("prompts.jsonl").write_text('{"prompt": "w1 w2 w3"}\n{"turns": ["w5 w9", "w4"]}\n')
    arguments = ["audit", "--adapter", "outputs/demo/adapter", "--prompts", "prompts.jsonl", "--max-new-tokens", "20"]
    more = ["--dtype", "float32", "--json", "found.json", "--concurrency", "2"]
    result = CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    assert "0 differing tokens of 40 over 2 prompts" in result.output
    found = json.loads(Path("found.json").read_text())
    assert (found["prompts"], found["identical_prompts"], found["complete"]) == (2, 2, True)
    assert found["conditions"]["dtype"] == "float32" and found["differing_logits"] == 0
    assert found["conditions"]["concurrency"] == 2
    wrong = CliRunner().invoke(app, [*arguments, "--dtype", "int3"])
    assert wrong.exit_code == 1 and "expected one of" in wrong.stderr


def test_a_cut_audit_is_resumed(demo_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the report holds is not generated again; a report of other settings is refused."""
    monkeypatch.chdir(demo_outputs)
    Path("four.jsonl").write_text("".join(f'{{"prompt": "w{n} w{n + 1}"}}\n' for n in range(4)))
    settings = AuditSettings(
        "outputs/demo/adapter", "four.jsonl", dtype="float32", options={"max_new_tokens": 6, "do_sample": False}
    )
    model = load_specbound("outputs/demo/adapter", dtype="float32", adaptive=False)
    given = model, to_ids(model, read_prompts("four.jsonl"))
    report = Path("four.json")
    whole = run_audit(settings, *given, report=report)
    assert json.loads(report.read_text()) == whole
    cut = whole | {"findings": whole["findings"][:3], "complete": False}
    report.write_text(json.dumps(cut))
    again = run_audit(settings, *given, report=report, resume=True)
    assert again["findings"][:3] == whole["findings"][:3] and again["complete"] and again["prompts"] == 4
    with pytest.raises(DataError, match="seed differ"):
        run_audit(replace(settings, seed=1), *given, report=report, resume=True)
    report.write_text("[]")
    with pytest.raises(DataError, match="not a report of this kind"):
        run_audit(settings, *given, report=report, resume=True)


def test_a_limit_is_spread_over_the_file() -> None:
    """Prompts sorted by subject: a few of each."""
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]  # type: ignore[type-var]
    assert spread([1, 2], 5) == spread([1, 2], None) == [1, 2]  # type: ignore[list-item]

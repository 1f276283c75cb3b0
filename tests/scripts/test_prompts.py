"""The scripts that make prompts and measure them, on tiny ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import SpeculationBounds, detach
from runtime.batch.memory import KVMemory
from runtime.decoding.drafter import NoDrafter
from runtime.generate import attach
from runtime.handle import SpecBound
from runtime.text.prompts import read_prompts
from tests.helpers.scripts import script


def test_prompts_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of row becomes a prompt that is read back; the same rows every time; what is missing is named."""
    mix = script("make_mix_prompts")
    rows = {
        "question": " Why? ", "prompt": "Sum it up.", "instruction": "Write", "input": "a poem",
        "turns": [{"speaker": who, "text": f"t{n}"} for n, who in enumerate(["USER", "SYSTEM"] * 3)],
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
    }  # fmt: skip
    for name, _, _ in mix.SOURCES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps([rows]) if path.suffix == ".json" else json.dumps(rows) + "\n")
    (tmp_path / "ntrex").mkdir()
    for name in ("src.eng", "ref.deu", "ref.fra", "ref.spa"):
        (tmp_path / "ntrex" / f"newstest2019-{name}.txt").write_text("Ein Satz.\nA sentence.\n")
    texts = []
    for out in (tmp_path / "one.jsonl", tmp_path / "two.jsonl"):
        monkeypatch.setattr(sys, "argv", ["make_mix_prompts.py", str(tmp_path), str(out), "--mix", "code"])
        mix.main()
        texts.append(out.read_text())
    assert texts[0] == texts[1]
    prompts = read_prompts(str(tmp_path / "one.jsonl"))
    assert {message.role for prompt in prompts for message in prompt.messages} == {"user", "assistant"}
    assert all(prompt.messages[-1].role == "user" for prompt in prompts)
    asked = {prompt.messages[0].content for prompt in prompts}
    assert {"Why?", "Write\na poem", "hi", "Translate German to English: Ein Satz."} <= asked
    (tmp_path / "gsm8k/train.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"train.jsonl cannot be read"):
        mix.main()


def test_prompts(make_model: Any) -> None:
    """Of a prompt both ways and in pieces; in one piece it has its own bits, other text has others."""
    prompts, model = script("prompts"), make_model()
    attach(model, SpecBound(model, NoDrafter(), SpeculationBounds(2.0, 0, 2)))
    model.specbound.prepare(model)
    row = prompts.by_length(model, torch.arange(3, 40)[None])
    assert row["tokens"] == 37 and row["identical"] and row["stock ms"] > 0
    seconds, taken, answer = prompts.first_token(model, [5, 6, 7], KVMemory.of(model))
    assert 0 < seconds < 60 and taken == 0
    with model.specbound.disabled():
        stock = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=prompts.ANSWER, do_sample=False)
    assert answer == stock[0, 3:].tolist()
    detach(model)
    words = prompts.in_pieces(model, 40, 16)
    assert words["cut at"] == 16 and words["other before the cut"].endswith(" of 16")
    ids = torch.arange(10)[None]
    assert torch.equal(prompts.rows(model, [ids]), prompts.rows(model, [ids]))
    assert not torch.equal(prompts.rows(model, [ids]), prompts.rows(model, [ids + 1]))

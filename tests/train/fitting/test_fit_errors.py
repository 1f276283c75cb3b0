"""What a user can get wrong with a fit: one clear line on stderr, exit code 1, and nothing half-written."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

from tests.helpers.paths import ROOT
from train.fit_exits import run

SCRIPT = ROOT / "train" / "fit_exits.py"


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def recipe(tmp_path, make_recipe):
    """`recipe(**settings)`: a recipe file with a corpus folder of its own; writes `tmp_path / out`."""

    def write(**settings) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(make_recipe(tmp_path / "out", corpus_dir=None) | settings))
        return path

    return write


def save_other_base(folder, make_tokenizer, kind: str) -> str:
    sizes = {"vocab_size": 128, "num_attention_heads": 2, "pad_token_id": 0}
    if kind == "t5":
        model = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, **sizes))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=128, hidden_size=8, n_layer=5, n_head=2, pad_token_id=0))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def no_base(tmp: Path) -> dict[str, str]:
    """With it, what is told of a file is told before the base is loaded."""
    return {"model_name_or_path": str(tmp / "base")}


PROMPT = '{"prompt": "w1 w2"}\n'
CASES = {
    # name: settings from the temporary folder, and what the line must say
    "misspelt key": (
        lambda tmp: {"learning_rte": 0.1},
        "unknown setting learning_rte (did you mean learning_rate?)",
    ),
    "wrong choice": (lambda tmp: {"head": "linaer"}, "did you mean linear?"),
    "exit layer 0": (lambda tmp: {"exit_layers": [0, 2]}, "exit_layers: expected layers from 1 on"),
    "exit layer L": (
        lambda tmp: {"exit_layers": [2, 6]},
        "exit_layers: expected layers in 1 to 5 of a model of 6",
    ),
    "exit layer beyond L": (
        lambda tmp: {"exit_layers": [9]},
        "expected layers in 1 to 5 of a model of 6; got [9]",
    ),
    "empty prompts": (
        lambda tmp: {"prompts": [write(tmp / "p.jsonl", "\n")], **no_base(tmp)},
        "p.jsonl: no prompts in it",
    ),
    "broken line": (
        lambda tmp: {"prompts": [write(tmp / "p.jsonl", '\n{"prompt": "w1"\n')], **no_base(tmp)},
        "p.jsonl: no prompts in it: 1 of 1 rows skipped: 1 not valid JSON (the first: line 2)",
    ),
    "no answers to keep": (
        lambda tmp: {"prompts": [write(tmp / "p.jsonl", PROMPT)], "answers": "keep", **no_base(tmp)},
        "answers: keep needs answers",
    ),
    "empty evaluation file": (
        lambda tmp: {"evaluation_files": [write(tmp / "e.csv", "")], **no_base(tmp)},
        "e.csv: no prompts in it: it is empty",
    ),
    "no adapter to begin with": (
        lambda tmp: {"init_adapter": str(tmp / "adapter"), **no_base(tmp)},
        "adapter does not exist",
    ),
    "missing prompts": (
        lambda tmp: {"prompts": [str(tmp / "no.jsonl")], **no_base(tmp)},
        "no.jsonl: cannot be read",
    ),
    "missing evaluation file": (lambda tmp: {"evaluation_files": [str(tmp / "no.csv")]}, "no.csv: cannot be read"),
    "no pattern's file": (lambda tmp: {"prompts": [str(tmp / "*.csv")]}, "*.csv: no file has such a name"),
    "no text left": (
        lambda tmp: {"max_length": 2},
        "no assistant text is left in the fit split after truncation to 2",
    ),
    "file in the way": (
        lambda tmp: {"output_dir": write(tmp / "file", "x")},
        "cannot be written (Not a directory)",
    ),
    "below a file": (lambda tmp: {"output_dir": write(tmp / "file", "x") + "/out"}, "cannot be written"),
    "unknown tracker": (
        lambda tmp: {"report_to": ["tensorbord"]},
        "'tensorbord' is unknown (did you mean tensorboard?)",
    ),
    "tracker not there": (lambda tmp: {"report_to": ["aim"]}, "report_to: 'aim' is not installed"),
    "missing base": (
        lambda tmp: {"model_name_or_path": str(tmp / "base")},
        "does not exist: give the base's folder or Hub id (base_model in Python, --model in a shell, model_name",
    ),
    "no chat template": (
        lambda tmp: {"chat_template": "auto"},
        "no chat template; set `chat_template: none`",
    ),
    "little calibration text": (
        lambda tmp: {"calibration_fraction": 0.05},
        "positions to calibrate on: expected at least 200",
    ),
    "no such checkpoint": (lambda tmp: {"resume_from_checkpoint": str(tmp)}, "is not a whole checkpoint"),
}


def only_line(text: str) -> str:
    """The one line of an error; bars and log lines of the stages before it are not errors."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize("case", CASES)
def test_each_error_is_one_line_and_leaves_nothing(case, recipe, tmp_path, capsys):
    settings, expected = CASES[case]
    path = recipe(**settings(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as caught:
        run(["--config", str(path)])
    message = caught.value.code
    assert isinstance(message, str)  # which Python prints on stderr, and exits with 1
    assert message.startswith("error: ")
    assert expected in message
    assert "\n" not in message
    left = {entry for entry in tmp_path.rglob("*") if entry not in before}
    whole = {
        "corpus.json",
        "fit.parquet",
        "calibration.parquet",
        "held_out.parquet",
    }  # a corpus is kept for later
    assert all("out/corpus" in str(entry) or entry == tmp_path / "out" for entry in left), left
    assert not left or whole <= {entry.name for entry in left}


@pytest.mark.parametrize(("kind", "expected"), [("t5", "model_type 't5'"), ("bloom", "BloomForCausalLM")])
def test_an_unsupported_base_is_named(kind, expected, recipe, tmp_path, make_tokenizer):
    base = save_other_base(tmp_path / kind, make_tokenizer, kind)
    with pytest.raises(SystemExit) as caught:
        run(["--config", str(recipe(model_name_or_path=base))])
    assert expected in caught.value.code
    assert "\n" not in caught.value.code
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_stop_the_fit(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("train.fit_exits.fit", lambda config, accelerator, heads, *rest: spoil(heads))

    def spoil(heads):
        (tmp_path / "out" / "metrics.jsonl").write_text("")
        with torch.no_grad():
            heads.exits.heads["4"].down.weight.fill_(float("nan"))
        return heads

    with pytest.raises(SystemExit) as caught:
        run(["--config", str(recipe())])
    assert "the head of exit layer 4 gives logits that are not finite" in caught.value.code
    assert not (tmp_path / "out" / "adapter").exists()


def test_the_script_ends_with_the_line(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", str(recipe(exit_layers=[6]))])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "expected layers in 1 to 5" in only_line(caught.value.code)

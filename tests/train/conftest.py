"""What tests of the training side share: fits of a second, and a fitted adapter."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from tests.helpers.publication import BASE, rename
from train import fit_exits
from train.settings.fit_config import FitConfig


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
    """`fit` without calibration: of the adapter only the weights are written."""

    def publish(config: FitConfig, model: Any, tokenizer: Any, heads: Any, *rest: Any, **options: Any) -> Path:
        folder = Path(config.output_dir) / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(heads.exits.state_dict(), folder / "model.safetensors")
        return folder

    monkeypatch.setattr(fit_exits, "write_adapter", publish)
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
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder / "adapter"


@pytest.fixture
def folder(fitted, tmp_path):
    """A copy of it that names a base on the Hub."""
    shutil.copytree(fitted, tmp_path / "adapter")
    rename(tmp_path / "adapter", base_model_name_or_path=BASE, base_model_revision="a" * 40)
    return tmp_path / "adapter"

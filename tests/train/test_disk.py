"""A full disk under any file that fitting writes: one line names it and says what to do, and no half file stays."""

import json
import logging
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from runtime.adapter.folder import load_adapter, save_adapter
from runtime.decoding.layers import DecoderLayers
from runtime.errors import AdapterError, DataError
from runtime.files import append, disk_line, write_atomic
from tests.helpers.paths import ROOT
from train.cli.app import app
from train.features.cache import FeatureCache
from train.features.extractor import FeatureExtractor
from train.fit_exits import run
from train.fitting.log import MetricsLog, read_log
from train.settings.fit_config import FitConfig
from train.sweep.space import Space
from train.sweep.study import JOURNAL, Study

Disk = Callable[[int], Path]
SAID = r"cannot be written \(No space left on device\): make room there and run the same command again"


def unfinished(folder: Path) -> list[Path]:
    """Temporary files that were left."""
    return [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def line_of(act: Callable[[], object]) -> str:
    """What the end of a command says of the error that this raises."""
    with pytest.raises(OSError) as caught:
        act()
    line = disk_line(caught.value)
    assert line is not None and "\n" not in line
    return line


def test_a_file_is_whole_or_not_there(disk: Disk) -> None:
    """And what was there is as it was."""
    path = disk(16) / "corpus" / "fit.parquet"
    write_atomic(path, b"before")
    for data in (b"0" * 40_000, lambda file: file.write(b"0" * 40_000)):
        line = line_of(lambda data=data: write_atomic(path, data))  # type: ignore[misc]
        assert line.startswith(f"{path} cannot be written (No space left on device): make room")
    assert path.read_bytes() == b"before" and [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_line_is_whole_or_not_there(disk: Disk) -> None:
    folder = disk(16)
    log = MetricsLog(folder / "metrics.jsonl", step=0)
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        for step in range(3000):
            log.write(step, {"fit/loss": 1.0, "x": "y" * 50})
    found = read_log(folder / "metrics.jsonl")  # each can be read
    assert [line["step"] for line in found] == list(range(len(found))) and len(found) > 100
    line_of(lambda: append(folder / "other.txt", b"0" * 9000))
    assert not (folder / "other.txt").exists() or not (folder / "other.txt").read_bytes()


def test_cached_features(disk: Disk, make_model: Callable[..., Any]) -> None:
    folder, extract = disk(16), FeatureExtractor(DecoderLayers(make_model()), (2, 4), top_k=5)
    cache, features = FeatureCache(folder, {}), extract([([1, 2, 3], list(range(4, 100)))])
    path = cache._path(0)
    assert line_of(lambda: cache._write(path, features)).startswith(f"{path} cannot be written (No space")
    assert not path.exists() and not unfinished(cache.folder)
    with pytest.raises(DataError, match="is missing or not as it was written"):
        cache[0]


def test_a_sweeps_journal_can_be_read_when_there_is_room_again(disk: Disk, tmp_path: Path) -> None:
    """Of a line that did not fit nothing stays, so that others can follow."""
    config = FitConfig(model_name_or_path="-", prompts=["-"], output_dir="-", exit_layers=[2], head_rank=8)
    (tmp_path / "space.yaml").write_text("head_rank: {low: 4, high: 400}\n")
    space, folder = Space.read(tmp_path / "space.yaml", config), disk(16)
    study = Study(folder, space, {}, 0)
    with pytest.raises(OSError, match=r"No space left on device: '.*study.log'"):
        for _ in range(400):
            study.study.ask(space.distributions)
    lines = (folder / JOURNAL).read_bytes()
    assert lines.endswith(b"\n") and [json.loads(line) for line in lines.splitlines()]
    assert len(Study(folder, space, {}, 0).trials) > 3


def test_an_adapter(disk: Disk, fitted: Path) -> None:
    """That which was there stays."""
    folder = disk(sum(path.stat().st_size for path in fitted.rglob("*")) // 1000 + 40)
    shutil.copytree(fitted, folder / "adapter")
    with pytest.raises(AdapterError, match="make room there and run the same command again") as caught:
        save_adapter(load_adapter(folder / "adapter"), folder / "adapter", extra=lambda new: _copy(fitted, new))
    assert "\n" not in str(caught.value) and not unfinished(folder)
    assert load_adapter(folder / "adapter").config.weights_sha256


def _copy(source: Path, target: Path) -> None:
    for path in source.glob("*.*"):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_fit(disk: Disk, make_recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Its corpus finds no room."""
    folder, recipe = disk(8), tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(tmp_path / "out", corpus_dir=str(folder / "corpus"))))
    with pytest.raises(SystemExit, match=SAID) as ended:
        run(["--config", str(recipe)])
    said = str(ended.value.code)
    assert said.startswith(f"error: {folder}/corpus/") and "\n" not in said
    assert not unfinished(folder) and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fresh_accelerate")
def test_distilling(
    disk: Disk, make_recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = disk(8), tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(make_recipe(tmp_path / "out", corpus_dir=str(folder / "corpus"))))
    monkeypatch.setattr(sys, "argv", ["distil.py", "--config", str(recipe)])
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    with pytest.raises(SystemExit, match=SAID) as ended:
        runpy.run_path(str(ROOT / "train" / "distil.py"), run_name="__main__")
    assert str(ended.value.code).startswith(f"error: {folder}/corpus/") and not unfinished(folder)


def test_verbs(disk: Disk, folder: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of `data`, and the copy that `publish` makes of an adapter."""
    full, rows = disk(4), tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1"}\n')
    options = [str(rows), "--model", str(tiny_base), "--chat-template", "none", "--picture", str(full / "a.png")]
    found = CliRunner().invoke(app, ["data", *options])
    assert (found.exit_code, found.stderr) == (1, f"error: {full}/a.png {SAID}\n".replace("\\", ""))
    assert not list(full.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(full))
    found = CliRunner().invoke(app, ["publish", str(folder), "some-org/tiny"])
    assert found.exit_code == 1 and found.stderr.startswith(f"error: {full}") and found.stderr.count("\n") == 1
    assert "make room there" in found.stderr and not list(full.iterdir())


def test_other_errors_pass() -> None:
    """Negative control: of what is no disk's there is no line."""
    for error in (ValueError("no"), ConnectionResetError(104, "reset"), DataError("x (os error 28)"), KeyError(28)):
        assert disk_line(error) is None
    assert disk_line(RuntimeError("I/O error: No space left (os error 28)")) is not None

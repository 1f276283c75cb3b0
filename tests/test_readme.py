"""README's snippets run as they stand."""

import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from runtime import AdapterError, load_specbound
from runtime.adapter.hub import kept_base
from tests.helpers.paths import ROOT
from tests.helpers.publication import rename

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_there_is_a_snippet() -> None:
    """The test below tests something."""
    assert len(SNIPPETS) == 1 and "load_specbound" in SNIPPETS[0]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(
    snippet: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_outputs: Path,
) -> None:
    """In an empty folder, without the Hub, with a tiny base where `scripts/fetch_smollm2.py` keeps the real one."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    shutil.copytree(demo_outputs / "outputs/base/smollm2-135m-instruct", kept_base(BASE))
    adapter = demo_outputs / "adapters/smollm2-135m-instruct"
    rename(adapter, base_model_name_or_path=BASE)
    monkeypatch.setenv("ADAPTER", str(adapter))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    exec(compile(snippet, "README.md", "exec"), {})
    assert "bit for bit equal" in capsys.readouterr().out


def test_without_the_base_one_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_outputs: Path
) -> None:
    """Where neither the cache nor the Hub has it."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    adapter = demo_outputs / "adapters/smollm2-135m-instruct"
    rename(adapter, base_model_name_or_path=BASE)
    with pytest.raises(AdapterError, match=r"run `python scripts/fetch_smollm2\.py` in SpecBound's checkout"):
        load_specbound(adapter, local_files_only=True, cache_dir=tmp_path / "cache")

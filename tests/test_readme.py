"""README's snippets run as they stand."""

import re
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

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
    """In a folder that looks like the repository after the demo, with a tiny base in the real one's place."""
    monkeypatch.chdir(demo_outputs)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "bit for bit equal" in capsys.readouterr().out

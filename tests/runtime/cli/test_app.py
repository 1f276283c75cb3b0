"""How the command line starts and ends: its version, a pipe that closes, a library that is not there."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from train.cli.app import app

VERBS = ("generate", "chat", "serve", "inspect", "audit", "profile", "tune", "bench", "publish", "plan")
TRAIN_EXTRA = ("accelerate", "datasets", "deepspeed", "matplotlib", "peft", "pyarrow", "scipy", "gguf")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({TRAIN_EXTRA!r})); from train.cli.app import main; main()"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def test_version() -> None:
    """That of the distribution, at once: torch is not needed."""
    block = "import sys; sys.modules['torch'] = None; from train.cli.app import main; main()"
    found = run(block, "--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"specbound {version('specbound')}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_in_sentences(verb: str) -> None:
    """Each option says something, and ends like a sentence."""
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for line in result.stdout.splitlines():
        if "--" in line and line.startswith("\u2502"):
            text = line.strip("\u2502 ").split("[default")[0].split("[env")[0].split("[required")[0].rstrip()
            assert text.endswith("."), line


def test_a_verb_of_training_names_its_extra() -> None:
    """Where the libraries of the train extra are not installed: one line, exit code 1."""
    found = run(WITHOUT, "bench", "--adapter", "a", "--prompts", "p.jsonl", "--json", "b.json")
    assert found.returncode == 1 and found.stderr.count("\n") == 1, found.stderr
    assert "is not installed: pip install 'specbound[train]'" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["generate", "--adapter", "nowhere", "w"], "nowhere"),
        (["audit", "--adapter", "nowhere", "--prompts", "n.jsonl"], "n.jsonl"),
        (["serve", "--adapter", "nowhere"], "nowhere"),
    ],
)
def test_other_verbs_need_no_extra_of_training(arguments: list[str], missing: str) -> None:
    """They get as far as to miss what they are given."""
    found = run(WITHOUT, *arguments)
    assert found.returncode == 1 and missing in found.stderr and found.stderr.count("\n") == 1, found.stderr


def into_a_closed_pipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, where nobody reads what it prints."""
    command = [sys.executable, "-c", "from train.cli.app import main; main()", *arguments]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        return subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect"], ["inspect", "--json"]])
def test_a_closed_pipe_ends_quietly(demo_outputs: Path, arguments: list[str]) -> None:
    """Nothing is said of it, in the help and in a verb."""
    if arguments[0] == "inspect":
        arguments = [*arguments, str(demo_outputs / "outputs" / "demo" / "adapter")]
    found = into_a_closed_pipe(*arguments)
    assert found.returncode != 0 and found.stderr == "", found.stderr

"""How the command line starts and ends: its version, a pipe that closes, a library that is not there."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from runtime.cli.app import run as run_app
from tests.helpers.paths import ROOT
from train.cli.app import app

ADAPTER = "outputs/demo/adapter"
VERBS = ("generate", "chat", "serve", "inspect", "audit", "profile", "tune", "bench", "publish", "plan", "data")
TRAIN_EXTRA = ("accelerate", "datasets", "deepspeed", "matplotlib", "peft", "pyarrow", "scipy", "gguf")
# Of the runtime: not needed before a verb runs.
SLOW = ("torch", "transformers", "huggingface_hub", "safetensors", "numpy", "tqdm", "yaml")
SERVE_EXTRA = ("fastapi", "uvicorn", "prometheus_client")


def without(*libraries: str) -> str:
    """Code that runs the command line where these libraries are not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({libraries!r})); from train.cli.app import main; main()"


def run(code: str, *arguments: str, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, input=stdin, timeout=300, cwd=cwd, env=environment,
    )  # fmt: skip


# Commands one after another, in one process: each prints what it ended with.
SEVERAL = """
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["specbound", *arguments]
    try:
        main()
    except SystemExit as ended:
        print("ended:", ended.code)
"""


def test_version() -> None:
    """That of the distribution, at once."""
    found = run(without(*TRAIN_EXTRA, *SERVE_EXTRA, *SLOW), "--version")
    assert (found.returncode, found.stdout, found.stderr) == (0, f"specbound {version('specbound')}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["serve", "--help"], ["bench", "--help"]])
def test_help_needs_no_library(arguments: list[str]) -> None:
    """Help is there at once, of the verbs of fitting too."""
    found = run(without(*TRAIN_EXTRA, *SERVE_EXTRA, *SLOW), *arguments)
    assert (found.returncode, found.stderr) == (0, "") and "Usage" in found.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_in_sentences(verb: str) -> None:
    """Each option says something, and ends like a sentence."""
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    for line in result.stdout.splitlines():
        if "--" in line and line.startswith("\u2502"):
            text = line.strip("\u2502 ").split("[default")[0].split("[env")[0].split("[required")[0].rstrip()
            assert text.endswith("."), line


def test_a_verb_of_training_names_its_extra(tmp_path: Path) -> None:
    """Where the libraries of the train extra are not installed: one line, exit code 1, no file."""
    commands = [
        ["bench", "--adapter", "a", "--prompts", "p.jsonl", "--json", "b.json"],
        ["profile", "--adapter", "a", "--json", "c.json"],
        ["tune", "--adapter", "a", "--costs", "c.json"],
        ["publish", "a", "org/name"],
    ]
    code = without(*TRAIN_EXTRA).removesuffix("main()") + "import json"
    found = run(code + SEVERAL, json.dumps(commands), cwd=tmp_path)
    assert found.stdout == "ended: 1\n" * 4 and list(tmp_path.iterdir()) == []
    told = re.findall(r"^error: (\w+) is not installed: pip install 'specbound\[train\]'$", found.stderr, re.MULTILINE)
    assert len(told) == len(found.stderr.splitlines()) == 4 and set(told) <= set(TRAIN_EXTRA)


def test_a_sweep_names_its_own_extra(tmp_path: Path) -> None:
    """Where only that is missing."""
    found = run(without("optuna"), "sweep", "r.yaml", "--space", "s.yaml", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == "error: optuna is not installed: pip install 'specbound[sweep]'\n"


@pytest.mark.parametrize(("name", "is_ours"), [("scipy.stats", False), ("runtime.gone", True), (None, True)])
def test_a_module_of_ours_that_is_missing_is_no_extra(
    name: str | None, is_ours: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake of ours is told as such, with its traceback."""

    def verb() -> None:
        raise ModuleNotFoundError("no such module", name=name)

    broken = typer.Typer(pretty_exceptions_enable=False)
    broken.command()(verb)
    monkeypatch.setattr(sys, "argv", ["specbound"])
    with pytest.raises(ModuleNotFoundError if is_ours else SystemExit):
        run_app(broken)
    assert ("specbound[train]" in capsys.readouterr().err) is not is_ours


def test_other_verbs_run_without_extras(demo_outputs: Path) -> None:
    """Whole, where neither the train extra nor the serve extra is installed."""
    (demo_outputs / "p.jsonl").write_text('{"prompt": "w5 w9"}\n')
    short = ["--adapter", ADAPTER, "--max-new-tokens", "8"]
    commands = [
        (["generate", *short, "w1 w2"], "w"),
        (["inspect", ADAPTER], "valid"),
        (["audit", *short, "--prompts", "p.jsonl"], "0 differing tokens of 8"),
        (["chat", *short], "w"),
    ]
    code = without(*TRAIN_EXTRA, *SERVE_EXTRA).removesuffix("main()") + "import json"
    found = run(code + SEVERAL, json.dumps([words for words, _ in commands]), cwd=demo_outputs, stdin="w3 w4\n")
    said = found.stdout.split("ended: 0\n")
    assert len(said) == 1 + len(commands) and "Traceback" not in found.stderr, found.stderr
    for (_, shown), text in zip(commands, said[:-1], strict=True):
        assert shown in text


def test_serve_names_its_own_extra() -> None:
    """And needs nothing of training."""
    found = run(without(*TRAIN_EXTRA), "serve", "--adapter", "nowhere")
    assert found.returncode == 1 and "nowhere" in found.stderr and found.stderr.count("\n") == 1
    found = run(without(*SERVE_EXTRA), "serve", "--adapter", "nowhere")
    assert found.returncode == 1 and found.stderr.endswith("is not installed: pip install 'specbound[serve]'\n")


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    [
        (["--help"], ""),
        (["--help"], "1"),
        (["--version"], ""),
        (["--version"], "1"),
        (["inspect", "--json", ADAPTER], "1"),
        (["generate", "--adapter", ADAPTER, "w1"], ""),
    ],
)
def test_a_closed_pipe_ends_quietly(demo_outputs: Path, arguments: list[str], buffered: str) -> None:
    """Nobody reads what the command prints: nothing is said of it, whatever notices it first."""
    command = [sys.executable, "-c", "from train.cli.app import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": buffered, "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        found = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=300, cwd=demo_outputs, env=environment
        )
    assert (found.returncode, found.stderr) == (1, "")


def test_head_takes_the_first_line(demo_outputs: Path) -> None:
    """`specbound inspect ... | head -1` in a shell, where more is printed than a pipe holds."""
    many = "import sys; from train.cli.app import main; from runtime.cli import inspect; show = inspect.show\n"
    many += "inspect.show = lambda *given: [show(*given) for _ in range(100)]; main()"
    line = f'"{sys.executable}" -c "$CODE" inspect {ADAPTER} | head -1; exit "${{PIPESTATUS[0]}}"'
    found = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=300, cwd=demo_outputs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CODE": many},
    )  # fmt: skip
    assert (found.returncode, found.stderr, found.stdout.count("\n")) == (1, "", 1)
